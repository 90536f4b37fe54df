"""Robustness tables say what was predicted from which clip, and mCE is what its paper defines."""

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest

from usjepa_nb import figures, metrics, robustness, widgets
from usjepa_nb.corruptions import CORRUPTIONS, SEVERITIES, corrupt


def by_threshold(clips):
    """A method that suffers from every change of grey value."""
    return np.digitize(clips, [80, 130, 170]).astype(np.uint8)


def blind(clips):
    """A method that looks at nothing."""
    return np.ones_like(clips)


@pytest.fixture(scope="module")
def data():
    clips = np.random.default_rng(0).integers(30, 220, (3, 6, 12, 14)).astype(np.uint8)
    videos = pd.DataFrame({"patient": ["p1", "p1", "p2"], "view": ["2CH", "4CH", "4CH"]}, index=[7, 8, 9])
    return clips, by_threshold(clips), videos


@pytest.fixture(scope="module")
def table(data):
    return robustness.robustness({"grey": by_threshold, "blind": blind}, *data, severities=(2, 5), seed=4)


def test_a_row_for_every_video_method_corruption_and_severity(table, data):
    keys = ["method", "corruption", "severity", "patient", "view"]
    assert len(table) == 2 * len(CORRUPTIONS) * 3 * 3 and not table.duplicated(keys).any()
    assert list(table["corruption"].unique()) == list(CORRUPTIONS)
    assert sorted(table["severity"].unique()) == [0, 2, 5]
    assert (table.query("method == 'grey' and severity == 0")["dsc"] == 1).all()


def test_a_score_is_that_of_the_spoilt_clip(table, data):
    clips, masks, _ = data
    row = table.query("method == 'grey' and corruption == 'gamma' and severity == 5 and view == '2CH'").iloc[0]
    expected = metrics.video_scores(by_threshold(corrupt(clips[0], "gamma", 5, (4, 0))), masks[0])["dsc"]
    assert [row["dsc"], row["dsc_1"], row["dsc_3"]] == pytest.approx([expected[k] for k in ("mean", 1, 3)])
    assert 0 <= row["dsc"] < 0.9


def test_clips_do_not_share_their_noise_but_methods_do(data):
    seen = {"a": [], "b": []}

    def note(method):
        return lambda clips: seen[method].append(clips.copy()) or blind(clips)

    same = np.repeat(data[0][:1], 3, 0)
    robustness.robustness({m: note(m) for m in seen}, same, data[1], data[2], ["speckle"], [3])
    assert all((a == b).all() for a, b in zip(*seen.values(), strict=True))
    assert (seen["a"][1][0] != seen["a"][1][1]).any()


def test_who_looks_at_nothing_loses_nothing(table):
    assert table[table["method"] == "blind"].groupby(["corruption", "patient", "view"])["dsc"].nunique().eq(1).all()


def test_classes_are_scored_by_macro_f1(data):
    clips, _, videos = data
    grey = lambda x: (x.mean((1, 2, 3)) > 150).astype(int)  # noqa: E731
    table = robustness.robustness({"grey": grey}, clips, np.array([0, 0, 1]), videos, ["gain"], [5])
    assert list(table["severity"]) == [0, 5]
    # 0, 0, 0 at first: F1 of class 0 is 4/5, of class 1 zero; all 1 when gain is too high: 0 and 1/2
    assert table["macro_f1"].tolist() == pytest.approx([0.4, 0.25])


def test_as_many_of_each_are_asked_for(data):
    with pytest.raises(ValueError, match="3 clips, 2 in truth and 3 videos"):
        robustness.robustness({}, data[0], data[1][:2], data[2])


def by_hand(**scores):
    """{method_corruption: scores at severities 0, 1, 2} as a table with two videos a cell, around that mean."""
    rows = [{"method": key.split("_")[0], "corruption": key.split("_")[1], "severity": s, "dsc": value + d}
            for key, values in scores.items() for s, value in enumerate(values) for d in (-0.1, 0.1)]
    return pd.DataFrame(rows)


def test_corruption_error_by_hand():
    table = by_hand(base_haze=[0.8, 0.7, 0.5], base_gain=[0.8, 0.8, 0.6],
                    ours_haze=[0.9, 0.8, 0.8], ours_gain=[0.9, 0.7, 0.6])
    errors = robustness.corruption_error(table, "base")
    assert list(errors.columns) == ["clean", "mCE", "relative_mCE", "haze", "gain"]
    assert errors.loc["base"].tolist() == pytest.approx([20, 100, 100, 100, 100])
    # haze: (.2 + .2) / (.3 + .5), gain: (.3 + .4) / (.2 + .4); what is lost: .2 / .4 and .5 / .2
    assert errors.loc["ours"].tolist() == pytest.approx([10, (50 + 700 / 6) / 2, 150, 50, 700 / 6])


def test_relative_error_leaves_out_what_does_not_hurt_the_baseline():
    table = by_hand(base_haze=[0.8, 0.7], base_gain=[0.8, 0.8], ours_haze=[0.8, 0.6], ours_gain=[0.8, 0.5])
    errors = robustness.corruption_error(table, "base")
    assert errors["relative_mCE"].tolist() == pytest.approx([100, 200])
    alone = robustness.corruption_error(table[table["corruption"] == "gain"], "base")
    assert alone["relative_mCE"].isna().all() and alone.loc["ours", "mCE"] == pytest.approx(250)


def test_error_leaves_out_where_the_baseline_makes_none():
    table = by_hand(base_haze=[0.8, 0.7], base_gain=[0.8, 1.0], ours_haze=[0.8, 0.6], ours_gain=[0.8, 0.5])
    errors = robustness.corruption_error(table, "base")
    assert errors["gain"].isna().all() and errors["mCE"].tolist() == pytest.approx([100, 400 / 3])
    alone = robustness.corruption_error(table[table["corruption"] == "gain"], "base")
    assert alone["mCE"].isna().all() and alone["clean"].tolist() == pytest.approx([20, 20])


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match=r"baseline='alex'.*base"):
        robustness.corruption_error(by_hand(base_haze=[0.8, 0.7]), "alex")


def test_a_panel_for_each_corruption_and_a_line_for_each_method(table):
    figure = robustness.score_vs_severity(table)
    assert isinstance(figure, matplotlib.figure.Figure) and figures.png(figure).startswith(b"\x89PNG")
    axes = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title() for ax in axes] == [name.replace("_", " ") for name in CORRUPTIONS]
    gain = axes[list(CORRUPTIONS).index("gain")]
    shown = {line.get_label(): line for line in gain.lines}
    expected = table.query("method == 'grey' and corruption == 'gain'").groupby("severity")["dsc"].mean()
    assert list(shown["grey"].get_xdata()) == [0, 2, 5]
    assert list(shown["grey"].get_ydata()) == pytest.approx(expected.tolist())
    assert len({(line.get_color(), line.get_marker()) for line in shown.values()}) == 2


def test_some_corruptions_leave_the_other_panels_empty(table):
    some = table[table["corruption"].isin([*CORRUPTIONS][:5])]
    axes = robustness.score_vs_severity(some).axes
    assert [ax.axison for ax in axes] == [True] * 5 + [False] * 3


def test_the_sheet_shows_every_corruption_at_every_severity(data):
    clip = data[0][0]
    axes = [ax for ax in robustness.severity_sheet(clip, seed=2).axes if ax.axison]
    assert len(axes) == len(CORRUPTIONS) * (1 + len(SEVERITIES))
    for ax, (name, severity) in zip(axes[:12:5], (("depth_attenuation", 0), ("depth_attenuation", 5),
                                                 ("acoustic_shadow", 4)), strict=True):
        assert ax.get_title() == f"{name.replace('_', ' ')} {severity}"
        assert (ax.get_images()[0].get_array() == corrupt(clip, name, severity, 2)[-1]).all()


def test_a_slider_spoils_a_clip_and_shows_what_the_method_makes_of_it(data):
    clips, masks, _ = data

    def draw(name="haze", severity=0, frame=0):
        return robustness.spoilt_overlay(clips[0], masks[0], by_threshold, name, severity, frame)

    assert draw().axes[0].get_title() == "haze 0: DSC 1.000"
    assert draw("gamma", 5, 3).axes[0].get_title() != "gamma 5: DSC 1.000"
    assert (draw("gamma", 5, 3).axes[0].get_images()[0].get_array() == corrupt(clips[0], "gamma", 5, 0)[3]).all()
    box = widgets.explore(draw, name=list(CORRUPTIONS), severity=(0, 5), frame=(0, 5))
    before = box.picture.value
    box.controls["severity"].value = 5
    assert box.picture.value != before
