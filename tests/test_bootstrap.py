"""Scores equal scikit-learn's under any weights; patients are resampled whole; intervals cover."""

import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from toy_task import quantity, toy

from usjepa_nb import bootstrap, linear

seeds = st.integers(0, 10_000)


def case(seed, classes=3, m=24):
    """True classes, probabilities with ties, and counts of a resample."""
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 5, (m, classes)) + 0.2
    return rng.integers(0, classes, m), p / p.sum(1, keepdims=True), rng.multinomial(m, np.full(m, 1 / m), 3)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 4))
def test_f1_equals_scikit_learns(seed, classes):
    true, p, w = case(seed, classes)
    for row, value in zip(w, bootstrap.macro_f1(w, true, p), strict=True):
        drawn = np.repeat(np.arange(len(true)), row)
        theirs = sk.f1_score(true[drawn], p[drawn].argmax(1), average="macro", zero_division=np.nan)
        assert value == pytest.approx(theirs)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 4))
def test_auroc_equals_scikit_learns(seed, classes):
    true, p, w = case(seed, classes)
    assume(all(len(set(true[row > 0])) == classes for row in w))
    for row, value in zip(w, bootstrap.auroc(w, true, p), strict=True):
        drawn = np.repeat(np.arange(len(true)), row)
        score = p[drawn, 1] if classes == 2 else p[drawn]
        assert value == pytest.approx(sk.roc_auc_score(true[drawn], score, multi_class="ovr", average="macro"))


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_errors_equal_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    true, p, w = rng.normal(50, 10, 20), rng.normal(50, 10, 20), rng.multinomial(20, np.full(20, 0.05), 3)
    for row, mae, r2 in zip(w, bootstrap.mae(w, true, p), bootstrap.r2(w, true, p), strict=True):
        assert mae == pytest.approx(sk.mean_absolute_error(true, p, sample_weight=row))
        assert r2 == pytest.approx(sk.r2_score(true, p, sample_weight=row))


def test_where_a_class_is_missing_the_others_are_scored():
    true, p = np.array([0, 0, 1, 1]), np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.3, 0.7, 0], [0.1, 0.9, 0]])
    w = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        area, f1 = bootstrap.auroc(w, true, p), bootstrap.macro_f1(w, true, p)
    assert area[0] == pytest.approx(0.75) and np.isnan(area[1])  # one class alone cannot be ranked
    assert f1 == pytest.approx([(2 / 3 + 4 / 5) / 2, (2 / 3 + 0) / 2])


def test_patients_are_resampled_whole():
    task = toy()
    w = bootstrap.resamples(task, 500, seed=0)
    assert w.shape == (501, 12) and (w[0] == 1).all()
    assert (w[:, 0::2] == w[:, 1::2]).all()  # the two clips of a patient
    assert (w[:, ::2].sum(1) == 6).all() and w[1:, 0].std() > 0.5
    np.testing.assert_array_equal(w, bootstrap.resamples(task, 500, seed=0))


def test_intervals_of_a_mean_are_those_of_scipy():
    from scipy import stats

    task = quantity(toy(("train",) * 4 + ("test",) * 40))
    true = task.targets(task.part("test"))
    errors = np.random.default_rng(0).gamma(2, 3, 40).repeat(2)
    row = bootstrap.evaluate(task, true + errors, n=9999).set_index("score").loc["MAE"]
    theirs = stats.bootstrap((errors[::2],), np.mean, method="percentile", rng=np.random.default_rng(1))
    assert row["value"] == pytest.approx(errors.mean(), rel=1e-4)
    assert [row["low"], row["high"]] == pytest.approx(list(theirs.confidence_interval), rel=0.02)
    assert (row["clips"], row["patients"]) == (80, 40)


def test_a_comparison_is_paired():
    """b errs as a does and 0.5 more: the difference is sure, though each score alone is not."""
    task = quantity(toy(("train",) * 4 + ("test",) * 20))
    true = task.targets(task.part("test")).astype(float)
    errors = np.random.default_rng(0).gamma(1, 10, 40)
    a, b = true + errors, true + errors + 0.5
    alone = bootstrap.evaluate(task, a).set_index("score").loc["MAE"]
    both = bootstrap.evaluate(task, b, than=a).set_index("score").loc["MAE"]
    assert alone["high"] - alone["low"] > 4
    assert both[["value", "low", "high"]].to_numpy(float) == pytest.approx([0.5] * 3)


def test_one_patient_has_a_score_and_no_interval():
    """Two clips of one heart: each draw is the same patient again, which would look like certainty."""
    task = toy(("train",) * 6 + ("test",))
    right = np.eye(3)[task.targets(task.part("test"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scores in (bootstrap.evaluate(task, right), bootstrap.evaluate(task, right, than=right[::-1])):
            assert scores["patients"].tolist() == [1, 1] and scores[["low", "high"]].isna().all(axis=None)
        assert bootstrap.evaluate(task, right)["value"][0] == 1
        table = linear.table([task], {("toy", "none", "constant"): right})
    assert table.loc[0, "macro-F1"] == "1.00 [nan, nan]"
    two = bootstrap.evaluate(toy(("train",) * 6 + ("test",) * 2), np.eye(3)[[0, 0, 1, 1]])
    assert two.loc[0, ["low", "high"]].tolist() == [1, 1]


def test_classes_are_scored_by_f1_and_auroc():
    task = toy()
    true = task.targets(task.part("test"))
    right = bootstrap.evaluate(task, np.eye(3)[true])
    assert right["score"].tolist() == ["macro-F1", "AUROC"]
    assert (right[["value", "low", "high"]] == 1).all(None)
    wrong = bootstrap.evaluate(task, np.eye(3)[(true + 1) % 3])
    assert wrong["value"].tolist() == [0, 0.25]
