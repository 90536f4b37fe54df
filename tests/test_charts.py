"""Charts show every number they were given, leave out what is missing, and print the right agreement."""

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest

from usjepa_nb import charts, figures


def is_drawn(figure):
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figures.png(figure).startswith(b"\x89PNG")
    return figure


def scores():
    cells = [(m, f) for m in ("random", "V-JEPA") for f in (100, 10, 50) if (m, f) != ("random", 50)]
    rows = [{"method": m, "fraction": f, "dsc": 0.6 + f / 1e3, "lo": 0.55, "hi": 0.8} for m, f in cells]
    return pd.DataFrame(rows)


def test_mask_bias_has_a_line_for_each_rule():
    ax = is_drawn(charts.mask_bias({"first": [9, 5, 1], "random": [5, 5, 5]})).axes[0]
    assert [list(line.get_ydata()) for line in ax.lines] == [[9, 5, 1], [5, 5, 5]]
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == 2


def test_training_curves_skip_the_steps_at_which_a_monitor_was_not_read():
    history = pd.DataFrame({"step": range(6), "loss": 10.0 ** -np.arange(6), "ll": 0.5, "rank": np.nan})
    history.loc[[0, 4], "rank"] = [3.0, 7.0]
    figure = is_drawn(charts.training_curves(history, ["loss", ["loss", "ll"], "rank", "ll"]))
    axes = [ax for ax in figure.axes if ax.axison]
    assert [len(ax.lines) for ax in axes] == [1, 2, 1, 1]
    assert list(axes[2].lines[0].get_xdata()) == [0, 4]
    assert [ax.get_yscale() for ax in axes] == ["log", "log", "linear", "linear"]


def test_training_curves_show_spread_and_rank_from_zero_and_a_share_up_to_one():
    history = pd.DataFrame({"step": range(3), "std": [0.49, 0.5, 0.5], "rank": [26.0, 27, 28], "jepa": [0.3, 0.4, 0.35],
                            "position_share": [0.67, 0.68, 0.67]})
    std, rank, share, both, loss = charts.training_curves(
        history, ["std", "rank", "position_share", ["jepa", "std"], "jepa"]).axes[:5]
    assert std.get_ylim()[0] == rank.get_ylim()[0] == 0 and 28 < rank.get_ylim()[1] < 35
    assert share.get_ylim() == (0, 1)
    assert both.get_ylim()[0] > 0.2 and loss.get_ylim()[0] > 0.2


def test_training_curves_with_a_rank_over_decades_stay_logarithmic():
    history = pd.DataFrame({"step": range(3), "rank": [1.0, 20, 500]})
    ax = charts.training_curves(history, ["rank"]).axes[0]
    assert ax.get_yscale() == "log" and 0 < ax.get_ylim()[0] <= 1


def test_training_curves_of_an_empty_history_are_empty_panels():
    history = pd.DataFrame({"step": [], "loss": []})
    assert len(is_drawn(charts.training_curves(history, ["loss"])).axes) == 1


def test_dsc_vs_fraction_draws_no_missing_cell():
    ax = is_drawn(charts.dsc_vs_fraction(scores())).axes[0]
    lines = [container.lines[0] for container in ax.containers]
    assert [list(line.get_ydata()) for line in lines] == [[0.61, 0.7], pytest.approx([0.61, 0.65, 0.7])]
    bars = ax.containers[0].lines[2][0].get_segments()
    assert bars[0][:, 1] == pytest.approx([0.55, 0.8])


def test_dsc_vs_fraction_interactive_holds_the_same_numbers():
    traces = charts.dsc_vs_fraction_interactive(scores()).data
    assert [trace.name for trace in traces] == ["random", "V-JEPA"]
    assert list(traces[0].x) == [10, 100]
    assert list(traces[1].y) == pytest.approx([0.61, 0.65, 0.7])
    assert traces[0].error_y.array[0] == pytest.approx(0.19)


def test_lambda_freeze_averages_seeds_and_says_what_is_missing():
    rows = [(0, 1, 0.5), (0, 1, 0.7), (0, 0.25, 0.8), (12, 0.25, 0.9), (0, 0.5, np.nan)]
    table = pd.DataFrame(rows, columns=["freeze", "lam", "dsc"])
    ax = is_drawn(charts.lambda_freeze(table)).axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["0.600", "missing", "0.800", "missing", "missing", "0.900"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "0.5", "0.25"]
    framed = [text.get_bbox_patch().get_edgecolor()[3] > 0 for text in ax.texts]
    assert framed == [False, False, True, False, False, True]


@pytest.mark.parametrize(("scores", "limits"), [((0.669, 0.671), (0.645, 0.695)), ((0.6, 0.8), (0.6, 0.8))])
def test_lambda_freeze_does_not_paint_a_small_difference_as_a_large_one(scores, limits):
    table = pd.DataFrame({"freeze": 0, "lam": [1, 0.25], "dsc": scores})
    (image,) = charts.lambda_freeze(table).axes[0].images
    assert image.get_clim() == pytest.approx(limits)
    low, high = charts.lambda_freeze_interactive(table).layout.yaxis.range
    assert (low, high) == pytest.approx((limits[0] - 0.0025, limits[1] + 0.0025))


def test_lambda_freeze_without_any_number_says_missing():
    table = pd.DataFrame({"freeze": [0, 0], "lam": [1, 0.25], "dsc": np.nan})
    assert [text.get_text() for text in is_drawn(charts.lambda_freeze(table)).axes[0].texts] == ["missing", "missing"]


def test_ef_agreement_prints_bias_and_limits():
    reference = np.array([30, 40, 50, 60, np.nan, 55])
    predicted = np.array([32, 41, 53, 62, 50, np.nan])  # differences 2, 1, 3, 2: mean 2, SD (2/3)^.5
    left, right = is_drawn(charts.ef_agreement(reference, predicted)).axes
    assert left.get_title().startswith("n = 4, r = 1.00, error 2.0 points")
    assert right.get_title() == "bias +2.0, limits +0.4 to +3.6 points"
    points = right.collections[0].get_offsets()
    assert list(points[0]) == [31, 2]


def test_ef_agreement_of_too_few_patients_is_drawn_without_numbers():
    assert "r = nan" in is_drawn(charts.ef_agreement([50.0], [52.0])).axes[0].get_title()
    assert "n = 0" in is_drawn(charts.ef_agreement([np.nan], [52.0])).axes[0].get_title()


def test_token_grid3d_places_every_token_once():
    hidden = np.zeros((2, 3, 5), bool)
    hidden[1, 2, 4] = True
    context = ~hidden
    context[0] = False
    traces = {trace.name.split()[0]: trace for trace in charts.token_grid3d(context, hidden).data}
    assert {kind: len(trace.x) for kind, trace in traces.items()} == {
        "visible": 14, "hidden": 1, "outside": 0, "unused": 15,
    }  # fmt: skip
    only = traces["hidden"]
    assert (only.x[0], only.z[0], only.y[0]) == (1, 2, 4)  # t across, y upright, x in depth


def test_scaling_draws_what_was_measured_above_its_floor():
    rows = [{"grows": g, "value": v, "s": 2.0 * v, "floor, s": 1.0 * v} for g in ("size", "frames", "depth", "batch")
            for v in (1, 2, 4)]
    figure = charts.scaling({"rows": rows, "epochs": 7, "runs": [{"patients": n, "hours": n / 9} for n in (9, 90)],
                             "processes": [{"processes": 1, "s, on the wall": 3.0},
                                           {"processes": 2, "s, on the wall": 2.0}]})
    assert [ax.get_xlabel() for ax in figure.axes][:4] == ["frame size, px", "frames", "blocks", "clips of a step"]
    measured, floor = figure.axes[0].lines
    assert measured.get_ydata().tolist() == [2, 4, 8] and floor.get_ydata().tolist() == [1, 2, 4]
    assert figure.axes[4].lines[0].get_ydata().tolist() == [1, 10] and "7 epochs" in figure.axes[4].get_ylabel()
    assert figure.axes[5].lines[0].get_ydata().tolist() == [3, 2]
