"""Every reading is the score it says it is, and what moves a mean or an order is found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from usjepa_nb import audit, figures, metrics
from usjepa_nb.camus import UNLABELLED

masks = hnp.arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3))
references = hnp.arrays(np.uint8, (3, 4, 5), elements=st.sampled_from([0, 1, 2, 3, UNLABELLED]))

PRED = np.array([[[1, 1, 2, 3, 0, 0]], [[1, 2, 2, 0, 0, 3]]], np.uint8)
TRUE = np.array([[[1, 2, 2, 3, 3, 0]], [[1, 1, 2, 0, 0, 3]]], np.uint8)


def value(pred, true, score="dsc", ends=(0, -1), **changes):
    rows = audit.readings(pred, true, ends)
    return audit.ours(rows[rows["score"] == score], **changes)["value"].item()


@settings(max_examples=40, deadline=None)
@given(masks, references)
def test_our_reading_is_what_the_package_reports(pred, true):
    true[0, 0, 0] = 1  # something is labelled
    scores = metrics.video_scores(pred, true)
    for score in metrics.SCORES:
        assert value(pred, true, score) == pytest.approx(scores[score]["mean"], nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(masks, references)
def test_epicardium_and_background_are_regions_of_the_metrics(pred, true):
    true[0, 0, 0] = 1
    for score, function in metrics.SCORES.items():
        regions = [function(pred, true, region) for region in (1, (1, 2), 3, 0)]
        want = [np.mean([v for v in part if not np.isnan(v)]) for part in (regions[:3], regions)]
        assert value(pred, true, score, classes="epi") == pytest.approx(want[0])
        assert value(pred, true, score, classes="epi", background="in") == pytest.approx(want[1])


def test_readings_by_hand():
    # pooled: cavity 2·2/(3+3), ring 2·2/(3+3), atrium 2·2/(2+3); background 2·3/(4+3)
    assert value(PRED, TRUE) == pytest.approx((2 / 3 + 2 / 3 + 4 / 5) / 3)
    assert value(PRED, TRUE, background="in") == pytest.approx((2 / 3 + 2 / 3 + 4 / 5 + 6 / 7) / 4)
    assert value(PRED, TRUE, classes="epi") == pytest.approx((2 / 3 + 1 + 4 / 5) / 3)
    # frame by frame: cavity 2/3 twice, ring 2/3 twice, atrium 2/3 and 1
    assert value(PRED, TRUE, frames="mean") == pytest.approx((2 / 3 + 2 / 3 + 5 / 6) / 3)
    assert value(PRED, TRUE, "recall") == pytest.approx((2 / 3 + 2 / 3 + 2 / 3) / 3)


def test_ed_and_es_are_the_frames_named():
    pred, true = np.concatenate([PRED, 0 * PRED]), np.concatenate([TRUE, TRUE])
    assert value(pred, true, ends=(0, 1), frames="ED/ES") == pytest.approx(value(PRED, TRUE, frames="mean"))
    assert value(pred, true, ends=(2, 3), frames="ED/ES") == 0
    assert "ED/ES" not in set(audit.readings(pred, true)["frames"])
    true[1] = UNLABELLED  # then ED alone has a reference
    assert value(pred, true, ends=(0, 1), frames="ED/ES") == pytest.approx(value(PRED[:1], TRUE[:1]))


def test_frames_without_reference_change_nothing():
    more = np.concatenate([TRUE, np.full_like(TRUE[:1], UNLABELLED)])
    one, two = audit.readings(PRED, TRUE, (0, 1)), audit.readings(np.concatenate([PRED, PRED[:1]]), more, (0, 1))
    assert len(one) == 5 * 2 * 2 * 3 * 3
    np.testing.assert_allclose(one["value"], two["value"])


def test_a_class_that_neither_mask_holds_scores_as_the_reading_says():
    pred, true = np.where(PRED == 3, 0, PRED), np.where(TRUE == 3, 0, TRUE)
    found = {absent: value(pred, true, absent=absent) for absent in audit.ABSENT}
    assert found == pytest.approx({"skip": 2 / 3, "0": 4 / 9, "1": 7 / 9})
    assert value(PRED, true, absent="skip") == pytest.approx(4 / 9)  # a false alarm is 0 in any reading


def test_recall_over_the_prediction_is_ppv_and_not_recall():
    rows = audit.readings(PRED, TRUE)
    columns = {score: part["value"].to_numpy() for score, part in rows.groupby("score")}
    np.testing.assert_array_equal(columns["recall over |P|"], columns["ppv"])
    assert not np.allclose(columns["recall"], columns["ppv"])


@pytest.mark.parametrize(("pred", "true", "message"), [
    (PRED[0], TRUE[0], "T, H, W"), (PRED, TRUE[:1], "shape"), (PRED + 4, TRUE, "pred holds label 7"),
    (PRED, TRUE + 4, "true holds label 7"), (PRED, np.full_like(TRUE, UNLABELLED), "no labelled pixel")])
def test_what_cannot_be_scored_is_refused(pred, true, message):
    with pytest.raises(ValueError, match=message):
        audit.readings(pred, true)


def test_positions_and_videos_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="2 frames"):
        audit.readings(PRED, TRUE, (0, 2))
    with pytest.raises(ValueError, match="A has 1 videos and true 2"):
        audit.table({"A": PRED[None]}, np.stack([TRUE, TRUE]))


@pytest.fixture(scope="module")
def methods():
    """A mixes up cavity and ring, B misses part of the atrium: who is better depends on the ring."""
    true = np.zeros((2, 2, 8, 8), np.uint8)
    true[..., 1:4, 1:4], true[..., 1:4, 4:7], true[..., 5:7, 1:7] = 1, 2, 3
    a, b = true.copy(), true.copy()
    a[..., 1:4, 3], a[..., 1, 2], b[..., 5:7, 4:7] = 2, 2, 0
    a[1], b[1] = true[1], true[1]  # the second video is right: means over videos are not those of the first
    return audit.table({"A": a, "B": b}, true, [(0, 1)] * 2)


def test_a_table_is_the_mean_over_videos(methods):
    row = audit.ours(methods[(methods["score"] == "dsc") & (methods["method"] == "B")])
    assert row["value"].item() == pytest.approx((8 / 9 + 1) / 2)  # the atrium of the first: 2·6/(6 + 12)
    assert row["sd"].item() == pytest.approx((1 - 8 / 9) / np.sqrt(2))


def test_the_order_of_methods_can_depend_on_the_reading(methods):
    orders = audit.rankings(methods)
    assert set(orders[orders["classes"] == "ring"]["best"]) == {"B"}
    assert set(orders[orders["classes"] == "epi"]["best"]) == {"A"}
    assert set(orders["swapped"]) == {0, 1} and set(orders["tau"]) == {-1.0, 1.0}
    ring = audit.ours(methods[methods["score"] == "dsc"])["value"]
    assert orders["widest"].max() == pytest.approx(ring.max() - ring.min())


def test_moves_change_one_answer_at_a_time(methods):
    moves = audit.moves(methods).set_index(["score", "axis", "answer"])
    rows = methods[methods["score"] == "dsc"]
    want = (audit.ours(rows, classes="epi").set_index("method")["value"]
            - audit.ours(rows).set_index("method")["value"])
    found = moves.loc[("dsc", "classes", "epi")]
    assert found["least"] == want.min() and found["most"] == want.max()
    assert found["move"] == pytest.approx(want.mean())
    assert want["A"] > 0 and want["B"] == pytest.approx(0)
    assert moves.loc[("dsc", "absent", "0"), "move"] == 0


def test_a_reading_can_be_said(methods):
    assert audit.describe(audit.OURS) == ("mean over LV cavity, myocardium ring, left atrium; background out; frames "
                                          "pooled per video; classes in neither mask skipped")
    said = {audit.describe(reading) for reading in methods[audit.AXES].drop_duplicates().to_dict("records")}
    assert len(said) == 2 * 2 * 3 * 3


def test_charts_hold_every_reading(methods):
    rows = audit.readings(PRED, TRUE, (0, 1))
    figure = audit.readings_chart(rows)
    *dots, ringed = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert sorted(x for line in dots for x in line.get_xdata()) == pytest.approx(sorted(rows["value"]))
    assert list(ringed.get_xdata()) == list(audit.ours(rows)["value"])
    lines = audit.rankings_chart(methods, "jaccard").axes[0].lines
    assert {line.get_linestyle() for line in lines} == {"None"}  # readings have no order that a line could follow
    assert [line.get_label() for line in lines] == ["A", "B"] and len(lines[0].get_xdata()) == 2 * 2 * 3
    bands = [np.round(line.get_ydata()) for line in lines]
    assert (bands[0] == bands[1]).all() and (lines[0].get_ydata() < lines[1].get_ydata()).all()  # none covers another
    assert figures.png(figure).startswith(b"\x89PNG")
