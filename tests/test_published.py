"""Bounds hold for any masks and are reached; a row is traced to the reading that made it; the text is counted."""

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from usjepa_nb import published
from usjepa_nb.published import jaccard

dice = st.lists(st.floats(0.05, 0.99), min_size=3, max_size=12)


@settings(max_examples=100, deadline=None)
@given(dice)
def test_the_mean_jaccard_lies_within_its_bounds(values):
    d = np.array(values)
    low, high = published.jaccard_bounds(d.mean(), d.std())
    assert low - 1e-9 <= jaccard(d).mean() <= high + 1e-9
    needed = published.least_sd(d.mean(), jaccard(d).mean() + 1e-12)
    assert needed <= d.std() + 1e-5


def test_the_bounds_are_reached():
    for d, end in ((np.array([0, 0.8, 0.8]), 0), (np.array([1, 0.7, 0.7]), 1)):
        assert published.jaccard_bounds(d.mean(), d.std())[end] == pytest.approx(jaccard(d).mean())
    assert published.least_sd(0.8, jaccard(np.array([1, 0.7, 0.7])).mean()) == pytest.approx(
        np.array([1, 0.7, 0.7]).std())
    assert published.jaccard_bounds(0.8, 0) == pytest.approx((jaccard(0.8), jaccard(0.8)))


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match=r"SD 0\.967"):
        published.jaccard_bounds(0.671, 0.967)
    assert np.isnan(published.least_sd(0.8, 0.5)) and np.isnan(published.least_sd(0.8, 0.85))


@pytest.fixture(scope="module")
def videos():
    """DSC of three classes of 200 videos, with what `yardstick` would say of them."""
    g = np.random.default_rng(0)
    classes = np.clip(np.array([0.92, 0.78, 0.82]) + g.normal(0, 0.05, (200, 1)) + g.normal(0, 0.02, (200, 3)), 0, 0.99)
    missing = 1 - classes.mean()
    yard = {"error": (0.14, 0.16), "epi": (0.7, 0.75), "spread": np.sqrt(classes.var(1).mean()) / missing}
    return classes, 1 - 0.15 * (1 - classes.mean(1, keepdims=True)), yard


@pytest.mark.parametrize(("reading", "in_dsc", "in_ji"), [
    (name, *where[:2]) for name, where in published.READINGS.items() if not where[2]])
def test_a_row_fits_the_reading_that_made_it_and_no_other(videos, reading, in_dsc, in_ji):
    classes, background, yard = videos
    every = np.c_[classes, background]
    dsc = (every if in_dsc else classes).mean(1)
    ji = round(jaccard(every if in_ji else classes).mean(), 3)
    rows = published.implied(round(dsc.mean(), 3), round(dsc.std(ddof=1), 3), **yard).drop(
        index="ring in DSC, epicardium in JI")  # it can look like background in JI alone: the table cannot tell
    assert list(rows.index[(rows["low"] <= ji) & (ji <= rows["high"])]) == [reading]


def test_a_row_with_the_epicardium_in_ji_fits_its_reading(videos):
    classes, _, yard = videos
    epi = 1 - 0.72 * (1 - classes)
    row = published.implied(classes.mean(), classes.mean(1).std(), **yard).loc["ring in DSC, epicardium in JI"]
    assert row["low"] <= jaccard(epi).mean() <= row["high"]


def test_yardstick_by_hand():
    true = np.zeros((1, 1, 4, 4), np.uint8)
    true[..., 0, :], true[..., 1, :], true[..., 2, :2] = 1, 2, 3
    pred = true.copy()
    pred[..., 1, :2] = 1  # DSC: cavity 2·4/(6+4), ring 2·2/(2+4), atrium 1; epicardium and background 1
    missing = 1 - (0.8 + 2 / 3 + 1) / 3
    found = published.yardstick({"A": pred, "perfect": true}, true)
    assert found["error"] == (0, 0)
    assert found["epi"] == pytest.approx([(1 - (0.8 + 1 + 1) / 3) / missing] * 2)
    assert found["spread"] == pytest.approx(np.std([0.8, 2 / 3, 1]) / missing)
    with pytest.raises(ValueError, match="nothing is missing"):
        published.yardstick({"perfect": true}, true)


def test_consistency_has_every_row_under_every_reading():
    table = published.table2()
    rows = published.consistency(table, error=(0.13, 0.16), epi=(0.7, 0.75), spread=0.4)
    assert len(table) == 32 and len(rows) == 32 * len(published.READINGS)
    assert (rows["fits"] == ((rows["low"] <= rows["JI"]) & (rows["JI"] <= rows["high"]))).all()
    assert ((rows["miss"] == 0) == rows["fits"]).all()
    assert not rows[rows["reading"] == "the same three classes in both"]["fits"].any()


def test_the_odd_sd_is_found_and_impossible():
    table = published.table2()
    (odd,) = published.odd_sds(table).to_dict("records")
    assert (odd["method"], odd["fraction"], odd["score"], odd["SD"]) == ("V-JEPA (12b) + LL", 10, "JI", 0.967)
    assert odd["most"] == pytest.approx(np.std([1, 0], ddof=1) * np.sqrt(4 * 0.671 * 0.329)) and odd["SD"] > odd["most"]
    assert published.odd_sds(table.replace(0.967, 0.097)).empty


def test_gains_absolute_and_relative():
    gains = published.gains(published.table2()).set_index(["method", "fraction"])
    assert len(gains) == 12
    assert gains.loc[("V-JEPA (12b)", 10), "DSC"] == pytest.approx(0.057)
    assert gains.loc[("V-JEPA (12b)", 10), "DSC %"] == pytest.approx(100 * (0.740 / 0.683 - 1))
    assert list(gains.index[gains["DSC"] < 0]) == [("V-JEPA", 20), ("V-JEPA (16b)", 20)]


def test_claims_follow_the_tables(tmp_path):
    said = published.claims().set_index("claim")
    assert said.loc["similar improvement in JI"].to_list() == ["4.2", "7 of 12", "no"]
    assert said.loc["LL improves DSC, where none is", "holds"] == "not claimed"
    assert said.loc["gains in DSC as printed, if they are relative", "found"] == "8 of 8"
    paper = yaml.safe_load(published.PAPER.read_text(encoding="utf-8"))
    paper["table1"]["V-JEPA + LL"][0] = 0.9
    for row in paper["table2"]:
        row[4] += 0.1 * row[0].endswith("LL")
        row[2] += 0.01 * (row[0] == "V-JEPA (16b)")
    changed = tmp_path / "paper.yaml"
    changed.write_text(yaml.safe_dump(paper, sort_keys=False), encoding="utf-8")
    other = published.claims(changed).set_index("claim")
    assert other.loc["the best λ is 0.25"].to_list() == ["4.1", "2 of 3", "no"]
    assert other.loc["similar improvement in JI"].to_list() == ["4.2", "12 of 12", "yes"]
    assert other.loc["gains in DSC as printed, if they are relative", "found"] == "4 of 8"
