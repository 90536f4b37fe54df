"""Scores equal the libraries', empty classes score as they say, volumes are those of known solids."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from usjepa_nb import metrics
from usjepa_nb.camus import UNLABELLED

PRED = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
TRUE = np.array([[0, 1, 2], [2, 1, 2]], np.uint8)

masks = hnp.arrays(np.uint8, (2, 5, 7), elements=st.integers(0, 3))
references = hnp.arrays(np.uint8, (2, 5, 7), elements=st.sampled_from([0, 1, 2, 3, UNLABELLED]))


def disc(size, centre, radius):
    y, x = np.indices(size)
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2).astype(np.uint8)


def test_scores_by_hand():
    # class 1: P = 2, T = 2, both 1; class 2: P = 2, T = 3, both 1
    assert metrics.dsc(PRED, TRUE, 1) == pytest.approx(2 / 4)
    assert metrics.jaccard(PRED, TRUE, 1) == pytest.approx(1 / 3)
    assert metrics.ppv(PRED, TRUE, 2) == pytest.approx(1 / 2)
    assert metrics.recall(PRED, TRUE, 2) == pytest.approx(1 / 3)
    assert metrics.dsc(PRED, TRUE, (1, 2)) == pytest.approx(8 / 9)  # epicardium: P = 4, T = 5, both 4


@settings(max_examples=30, deadline=None)
@given(masks, references)
def test_scores_equal_monai(pred, true):
    import torch
    from monai.metrics import compute_confusion_matrix_metric, compute_dice, compute_iou, get_confusion_matrix

    known = true != UNLABELLED
    stacks = [np.stack([m[known] == c for c in range(4)]) for m in (pred, true)]
    one_hot = [torch.from_numpy(stack[None]).float() for stack in stacks]
    table = get_confusion_matrix(*one_hot)[0]  # [classes, tp fp tn fn]
    theirs = {
        "dsc": compute_dice(*one_hot, ignore_empty=True)[0],
        "jaccard": compute_iou(*one_hot, ignore_empty=True)[0],
        "ppv": compute_confusion_matrix_metric("precision", table),
        "recall": compute_confusion_matrix_metric("recall", table),
    }
    for name, score in metrics.SCORES.items():
        for label in metrics.CLASSES:
            ours, monai = score(pred, true, label), float(theirs[name][label])
            sides = [(m[known] == label).any() for m in (pred, true)]
            if all(sides):
                assert ours == pytest.approx(monai, abs=1e-6)
            elif any(sides):
                assert ours == 0
            else:
                assert np.isnan(ours) and np.isnan(monai)


@settings(max_examples=50, deadline=None)
@given(masks, references)
def test_scores_equal_sets(pred, true):
    """Oracle of another kind: Python sets of pixel positions; and what ties the four scores together."""
    for label in metrics.CLASSES:
        p = {i for i in np.ndindex(true.shape) if true[i] != UNLABELLED and pred[i] == label}
        t = {i for i in np.ndindex(true.shape) if true[i] == label}
        if p and t:
            d, j, v, r = (score(pred, true, label) for score in metrics.SCORES.values())
            both = len(p & t)
            assert (j, v, r) == pytest.approx((both / len(p | t), both / len(p), both / len(t)))
            assert d == pytest.approx(2 * j / (1 + j))
            if v + r:
                assert d == pytest.approx(2 * v * r / (v + r))


@settings(max_examples=30, deadline=None)
@given(masks, references, st.integers(0, 3))
def test_unlabelled_pixels_never_count(pred, true, other):
    changed = np.where(true == UNLABELLED, np.uint8(other), pred)
    assert_same(metrics.video_scores(pred, true), metrics.video_scores(changed, true))


def assert_same(one, two):
    for name, row in one.items():
        for key, value in row.items():
            assert value == pytest.approx(two[name][key], nan_ok=True)


def test_recall_is_not_ppv():
    assert metrics.recall(PRED, TRUE, 2) != metrics.ppv(PRED, TRUE, 2)


@pytest.mark.parametrize("score", metrics.SCORES.values())
def test_empty_class(score):
    empty, full = np.zeros((3, 3), np.uint8), np.ones((3, 3), np.uint8)
    assert np.isnan(score(empty, empty, 1))
    assert score(full, empty, 1) == 0
    assert score(empty, full, 1) == 0
    assert np.isnan(score(full, np.full_like(full, UNLABELLED), 1))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 3\).*same shape"):
        metrics.dsc(np.zeros((2, 2)), np.zeros((3, 3)), 1)


def test_video_pools_its_labelled_frames():
    pred = np.zeros((3, 4, 4), np.uint8)
    true = pred.copy()
    pred[0, 0, 0] = true[0, 0, 0] = 1  # one pixel, right
    true[1] = 1  # sixteen pixels, all missed
    pred[2], true[2] = 3, UNLABELLED  # no reference: whatever is predicted costs nothing
    scores = metrics.video_scores(pred, true)
    assert scores["dsc"][1] == pytest.approx(2 / 18)  # a mean over frames would be 0.5
    assert np.isnan(scores["dsc"][3])
    assert scores["dsc"]["mean"] == scores["dsc"][1]  # absent classes are not averaged in
    assert set(scores) == {"dsc", "jaccard", "ppv", "recall"}


def test_a_video_without_reference_scores_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = metrics.video_scores(np.ones((2, 3, 3), np.uint8), np.full((2, 3, 3), UNLABELLED, np.uint8))
    assert np.isnan(scores["dsc"]["mean"])


def test_surface_distances_equal_brute_force_in_mm():
    from scipy.ndimage import binary_erosion
    from scipy.spatial.distance import cdist

    spacing = (0.5, 1.25)
    pred, true = disc((40, 30), (18, 14), 9), disc((40, 30), (21, 16), 7)
    edges = [np.argwhere(m & ~binary_erosion(m)) * spacing for m in (pred.astype(bool), true.astype(bool))]
    between = cdist(*edges)
    there, back = between.min(1), between.min(0)
    rows = metrics.surface_distances(pred, true, spacing)
    assert rows["hd"][1] == pytest.approx(max(there.max(), back.max()), rel=1e-5)
    assert rows["hd95"][1] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    assert rows["assd"][1] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
    assert all(np.isnan(row[label]) for row in rows.values() for label in (2, 3))


def test_surface_distances_by_hand_empty_and_joined_labels():
    pred, true = np.zeros((9, 12), np.uint8), np.zeros((9, 12), np.uint8)
    pred[3:6, 2:5], true[3:6, 4:7] = 1, 2  # a square, and the same two pixels further right
    rows = metrics.surface_distances(pred, true, (1, 0.5), labels=(1, (1, 2)))
    assert rows["hd"][(1, 2)] == pytest.approx(1)  # 2 px of 0.5 mm
    assert np.isnan(rows["hd"][1]) and np.isnan(rows["assd"][1])


def ellipsoid(semi, tilt, spacing, size=(400, 400)):
    """Section of an ellipsoid of revolution: semi-axes (long, short) in mm, tilted by `tilt` rad."""
    y, x = [(np.arange(n) - n / 2) * s for n, s in zip(size, spacing, strict=True)]
    y, x = np.meshgrid(y, x, indexing="ij")
    along, across = y * np.cos(tilt) + x * np.sin(tilt), x * np.cos(tilt) - y * np.sin(tilt)
    return ((along / semi[0]) ** 2 + (across / semi[1]) ** 2 <= 1).astype(np.uint8)


@settings(max_examples=20, deadline=None)
@given(st.floats(35, 50), st.floats(15, 25), st.floats(-0.6, 0.6), st.floats(0.3, 0.9), st.floats(0.3, 0.9))
def test_simpson_volume_of_an_ellipsoid(long, short, tilt, sy, sx):
    mask = ellipsoid((long, short), tilt, (sy, sx))
    if (mask[0] | mask[-1]).any() or (mask[:, 0] | mask[:, -1]).any():  # would be cut by the picture
        mask = ellipsoid((long, short), tilt, (sy, sx), (700, 700))
    volume = 4 / 3 * np.pi * long * short**2 / 1000
    assert metrics.simpson_volume(mask, (sy, sx)) == pytest.approx(volume, rel=0.02)


def test_simpson_biplane():
    one, two = ellipsoid((40, 20), 0.2, (0.5, 0.5)), ellipsoid((40, 12), -0.3, (0.4, 0.6))
    volume = metrics.simpson_volume(one, (0.5, 0.5), second=(two, (0.4, 0.6)))
    assert volume == pytest.approx(4 / 3 * np.pi * 40 * 20 * 12 / 1000, rel=0.02)
    same = metrics.simpson_volume(one, (0.5, 0.5), second=(one, (0.5, 0.5)))
    assert same == pytest.approx(metrics.simpson_volume(one, (0.5, 0.5)))


def test_simpson_biplane_matches_apex_with_apex():
    """A cone in both views: base with base gives pi r^2 h / 3; the wrong way round, less."""
    y, x = np.mgrid[0:200, -60:61]
    cones = [(abs(x + lean * (y - 100)) <= 0.25 * y).astype(np.uint8) for lean in (0.0, 0.15, -0.15)]
    alone = metrics.simpson_volume(cones[0], (0.5, 0.5))
    assert alone == pytest.approx(np.pi / 3 * 25**2 * 100 / 1000, rel=0.03)
    for cone in cones[1:]:
        both = metrics.simpson_volume(cones[0], (0.5, 0.5), second=(cone, (0.5, 0.5)))
        assert both == pytest.approx(alone, rel=0.05)


def test_simpson_counts_the_largest_piece_and_nothing_else():
    mask = ellipsoid((40, 20), 0.1, (0.5, 0.5))
    volume = metrics.simpson_volume(mask, (0.5, 0.5))
    mask[2:6, 2:6], mask[-9:-3, -9:-3] = 1, 3
    assert metrics.simpson_volume(mask, (0.5, 0.5)) == volume
    assert np.isnan(metrics.simpson_volume(np.zeros((5, 5), np.uint8), (1, 1)))


@pytest.mark.parametrize("spacing", [(np.nan, 1), (1, np.inf), (0, 1), (1, -1), (1, 1, 1)])
def test_a_spacing_that_is_none_is_refused(spacing):
    mask = disc((20, 20), (10, 10), 6)
    for measure in (lambda: metrics.simpson_volume(mask, spacing),
                    lambda: metrics.surface_distances(mask, mask, spacing),
                    lambda: metrics.simpson_volume(mask, (1, 1), second=(mask, spacing))):
        with pytest.raises(ValueError, match=r"^spacing = \(.*\) is not possible: give \(y, x\) in mm per pixel, both"):
            measure()


def test_ejection_fraction():
    assert metrics.ejection_fraction(100, 45) == pytest.approx(55)
    assert np.isnan(metrics.ejection_fraction(0, 0))
    assert np.isnan(metrics.ejection_fraction(np.nan, 40))
    assert np.isnan(metrics.ejection_fraction(100, np.nan))


pairs = st.integers(3, 25).flatmap(
    lambda n: st.tuples(*[hnp.arrays(float, n, elements=st.floats(0, 1).map(lambda v: round(v, 3)))] * 2)
)


@settings(max_examples=15, deadline=None)
@given(pairs)
def test_paired_agrees_with_scipy_and_is_antisymmetric(pair):
    from scipy import stats

    a, b = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row, back = metrics.paired(a, b), metrics.paired(b, a)
        assert row["difference"] == pytest.approx(a.mean() - b.mean(), abs=1e-9)
        assert row["difference"] == pytest.approx(-back["difference"])
        assert row["n"] == a.size
        if np.ptp(a - b) > 1e-9:
            assert row["t_p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
            assert row["wilcoxon_p"] == pytest.approx(stats.wilcoxon(a - b).pvalue)
            assert row["wilcoxon_p"] == pytest.approx(back["wilcoxon_p"])


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    truth, hits = 0.05, 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        a = rng.normal(0.7, 0.1, 30)
        row = metrics.paired(a + rng.normal(truth, 0.05, 30), a, seed=trial)
        hits += row["low"] <= truth <= row["high"]
        assert row["low"] < row["difference"] < row["high"]
    assert 33 <= hits <= 40  # 95 % of 40 is 38


def test_paired_without_differences_says_one_not_nan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = metrics.paired([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
        assert np.isnan(row.pop("d_z"))
        assert row == {"difference": 0, "low": 0, "high": 0, "wilcoxon_p": 1, "t_p": 1, "n": 3}
        shifted = metrics.paired(np.arange(6) / 10 + 0.25, np.arange(6) / 10)
        assert shifted["low"] == shifted["high"] == pytest.approx(0.25) and shifted["t_p"] == 0


def test_paired_leaves_out_missing_pairs_repeats_and_refuses():
    a, b = np.array([0.5, np.nan, 0.7, 0.9]), np.array([0.4, 0.6, np.nan, 0.7])
    row = metrics.paired(a, b)
    assert row["n"] == 2 and row["difference"] == pytest.approx(0.15)
    assert np.isnan(metrics.paired([0.5], [0.4])["t_p"])
    rng = np.random.default_rng(0)
    x, y = rng.random(20), rng.random(20)
    assert metrics.paired(x, y, seed=3) == metrics.paired(x, y, seed=3)
    assert metrics.paired(x, y, seed=3)["low"] != metrics.paired(x, y, seed=4)["low"]
    with pytest.raises(ValueError, match="one value per patient"):
        metrics.paired(x, y[:-1])


CAMUS = Path(__file__).parents[2] / "shared" / "camus" / "database_nifti"


@pytest.mark.skipif(not CAMUS.is_dir(), reason="no real CAMUS masks beside the repository")
def test_ejection_fraction_of_real_masks_follows_the_cfg():
    """One plane and a principal axis against the hospital's biplane values: r = .85 over 300 patients."""
    import nibabel

    ours, theirs = [], []
    for folder in sorted(CAMUS.iterdir())[:40]:
        ml = []
        for instant in ("ED", "ES"):
            image = nibabel.load(folder / f"{folder.name}_4CH_{instant}_gt.nii.gz")
            sx, sy = image.header.get_zooms()[:2]
            ml.append(metrics.simpson_volume(np.asanyarray(image.dataobj).T, (sy, sx)))
        assert 5 < ml[1] < ml[0] < 350
        ours.append(metrics.ejection_fraction(*ml))
        theirs.append(float((folder / "Info_4CH.cfg").read_text().split("EF:")[1].split()[0]))
    assert np.corrcoef(ours, theirs)[0, 1] > 0.7
    assert np.mean(np.abs(np.subtract(ours, theirs))) < 10


def test_holm_steps_down_and_skips_nan():
    assert metrics.holm([0.01, 0.04, np.nan, 0.03]) == pytest.approx([0.03, 0.06, np.nan, 0.06], nan_ok=True)
    assert metrics.holm([0.9, 0.6]) == pytest.approx([1, 1]) and metrics.holm([]).shape == (0,)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_no_correction_and_bonferroni(p):
    corrected, p = metrics.holm(p), np.array(p)
    assert (corrected >= p).all() and (corrected <= np.minimum(1, p * len(p)) + 1e-12).all()
    assert corrected.min() == min(1, p.min() * len(p))


def test_effect_size_is_the_mean_over_the_sd_of_the_differences():
    a, b = np.array([0.5, 0.7, 0.9, 0.4]), np.array([0.4, 0.65, 0.7, 0.45])
    assert metrics.paired(a, b)["d_z"] == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
    assert np.isnan(metrics.paired(a, a - 0.1)["d_z"])  # no spread
