"""Scores: overlap, distances in mm, ejection fraction, and paired comparisons over patients.

The four overlap scores are written out beside the paper's formulas (section 3.2). Everything else leans on a
library: distances on MONAI, statistics on SciPy. Pixels without a reference (``UNLABELLED``) never count.
"""

import numpy as np

from .camus import UNLABELLED

CLASSES = (1, 2, 3)  # the foreground classes; "mean" is over these, never over the background


def _sets(pred, true, label):
    """The pixels called `label` by the prediction and by the reference, among those that have a reference."""
    pred, true = np.asarray(pred), np.asarray(true)
    if pred.shape != true.shape:
        raise ValueError(f"pred has shape {pred.shape} and true {true.shape}: give both the same shape.")
    known, of = true != UNLABELLED, np.isin if np.ndim(label) else np.equal  # equal: 10× as fast for a single class
    return of(pred, label) & known, of(true, label) & known


def _counts(pred, true, label):
    """|P and T|, |P|, |T| in pixels."""
    p, t = _sets(pred, true, label)
    return tuple(int(np.count_nonzero(pixels)) for pixels in (p & t, p, t))


def _ratio(part, whole, p, t):
    """part / whole; nan where neither mask holds the class, 0 where only one of the two does."""
    return np.nan if p == t == 0 else part / whole if whole else 0.0


def dsc(pred, true, label):
    """Dice similarity coefficient of one class, in [0, 1].

    Args:
        pred, true: class masks of one shape (any); pixels where `true` is UNLABELLED are left out.
        label: the class, or a tuple that is taken together: ``(1, 2)`` is the epicardium, 2 alone the ring.

    Returns:
        nan when both masks lack the class (nothing to score: means over videos skip it), 0 when only
        one does. The three scores below follow the same rule. (Where only the reference lacks the class,
        MONAI says nan by default: a false alarm would cost nothing.)
    """
    both, p, t = _counts(pred, true, label)
    return _ratio(2 * both, p + t, p, t)  # DSC = 2 |P and T| / (|P| + |T|)


def jaccard(pred, true, label):
    """Jaccard index, or intersection over union; arguments and empty classes as in `dsc`."""
    both, p, t = _counts(pred, true, label)
    return _ratio(both, p + t - both, p, t)  # JI = |P and T| / |P or T|


def ppv(pred, true, label):
    """Positive predictive value, or precision: the share of what was predicted that is right."""
    both, p, t = _counts(pred, true, label)
    return _ratio(both, p, p, t)  # PPV = |P and T| / |P|


def recall(pred, true, label):
    """Recall, or sensitivity: the share of the reference that was found.

    The reference stands below the line. With |P| there instead, a slip that is easily printed, it would be
    PPV a second time; this is recall as meant.
    """
    both, p, t = _counts(pred, true, label)
    return _ratio(both, t, p, t)  # Rec. = |P and T| / |T|


SCORES = {"dsc": dsc, "jaccard": jaccard, "ppv": ppv, "recall": recall}


def _mean(values):
    """Mean of what is not nan; nan where nothing is left."""
    values = np.asarray(values, float)
    return float(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else np.nan


def video_scores(pred, true):
    """The four scores of one video, its labelled frames pooled: one set of pixels, not a mean over frames.

    Args:
        pred, true: uint8 [T, H, W].

    Returns:
        ``{"dsc": {1: .., 2: .., 3: .., "mean": ..}, "jaccard": .., "ppv": .., "recall": ..}``; "mean" is over
        the foreground classes that are there.
    """
    scores = {name: {label: score(pred, true, label) for label in CLASSES} for name, score in SCORES.items()}
    return {name: {**row, "mean": _mean(list(row.values()))} for name, row in scores.items()}


def mean_dsc(pred, true):
    """Mean DSC over the foreground classes that are there, the frames [T, H, W] pooled; nan without any frame."""
    return _mean([dsc(pred, true, label) for label in CLASSES])


def in_mm(spacing):
    """A spacing as two numbers (y, x), in mm per pixel.

    Raises:
        ValueError: they are not two, or not finite and above 0.
    """
    mm = tuple(map(float, spacing))
    if len(mm) != 2 or not all(0 < side < np.inf for side in mm):
        raise ValueError(f"spacing = {mm} is not possible: give (y, x) in mm per pixel, both finite and above 0")
    return mm


def surface_distances(pred, true, spacing, labels=CLASSES):
    """Distances in mm between the outlines of one frame, by MONAI (outline: the mask less its erosion).

    Args:
        pred, true: uint8 [H, W].
        spacing: (y, x) in mm per pixel.
        labels: classes, or tuples taken together, as in `dsc`.

    Returns:
        ``{"hd": {label: ..}, "hd95": .., "assd": ..}``; nan where a side lacks the class.
        hd: the largest distance from either outline to the other. hd95: the 95th percentile of each
        direction, the larger of the two (libraries differ on this one). assd: mean over the points of both.

    Raises:
        ValueError: a spacing that is not finite and above 0.
    """
    import torch
    from monai.metrics import get_mask_edges, get_surface_distance

    rows, mm = {"hd": {}, "hd95": {}, "assd": {}}, in_mm(spacing)
    for label in labels:
        sides = [torch.from_numpy(side) for side in _sets(pred, true, label)]
        if not all(side.any() for side in sides):
            for row in rows.values():
                row[label] = np.nan
            continue
        p, t = get_mask_edges(*sides)
        d = get_surface_distance(p, t, spacing=mm), get_surface_distance(t, p, spacing=mm)  # of every outline point
        rows["hd"][label] = max(side.max().item() for side in d)
        rows["hd95"][label] = max(side.quantile(0.95).item() for side in d)
        rows["assd"][label] = torch.cat(d).mean().item()
    return rows


def _disks(mask, spacing, label, disks):
    """Length (mm) of the long axis and the mean width (mm) of each of the disks across it."""
    from scipy import ndimage

    spacing = in_mm(spacing)
    pieces, count = ndimage.label(np.isin(mask, label))
    if not count:
        return np.nan, np.full(disks, np.nan)
    largest = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])  # islands are no ventricle
    inside = (np.arange(4) + 0.5) / 4 - 0.5  # 4 x 4 points a pixel: tilted disks then cut pixels smoothly
    dy, dx = np.meshgrid(inside, inside, indexing="ij")
    points = np.argwhere(largest)[:, None] + np.stack([dy, dx], -1).reshape(1, 16, 2)
    points = points.reshape(-1, 2) * spacing  # mm
    points -= points.mean(0)
    axis = np.linalg.eigh(points.T @ points)[1][:, -1]  # the direction in which the ventricle is longest
    along = points @ (axis if axis[0] > 0 else -axis)  # from the apex (up) to the base, in every view
    length = np.ptp(along)
    area = np.histogram(along, disks)[0] * np.prod(spacing) / 16
    return length, area / (length / disks)


def simpson_volume(mask, spacing, label=1, second=None, disks=20):
    """Volume in ml by Simpson's rule (method of disks) of the LV cavity in one apical view, or in two.

    The long axis is the principal axis of the largest piece of the mask. It needs no landmark, so a bad
    atrium cannot spoil it. Its ends stand for the apex and the mitral plane.

    Args:
        mask: uint8 [H, W], apex up as everywhere here; `spacing` is (y, x) in mm per pixel.
        second: ``(mask, spacing)`` of the other view for the biplane rule: disks become ellipses, and the
            longer of the two axes counts.

    Returns:
        ml; nan where a mask lacks the class.

    Raises:
        ValueError: a spacing that is not finite and above 0.
    """
    length, width = _disks(mask, spacing, label, disks)
    other_length, other_width = (length, width) if second is None else _disks(*second, label, disks)
    height = np.maximum(length, other_length) / disks
    return float((np.pi / 4 * width * other_width * height).sum() / 1000)  # mm^3 to ml


def ejection_fraction(ed_ml, es_ml):
    """EF in %: the share of the end-diastolic volume that is pumped out; nan where that is 0 or nan."""
    return float(100 * (ed_ml - es_ml) / ed_ml) if ed_ml > 0 else np.nan


def paired(a, b, seed=0):
    """Is `a` larger than `b`? One value per patient, the same patients in the same order.

    Args:
        a, b: [n]; pairs with a nan are left out.

    Returns:
        difference: mean of a - b; low, high: its 95 % bootstrap interval (BCa, 9999 resamples of patients);
        wilcoxon_p, t_p: two-sided; d_z: Cohen's effect size for pairs, mean over SD; n: pairs used. Where all pairs are
        equal both p are 1 (SciPy says nan).
    """
    from scipy import stats

    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}: give one value per patient.")
    delta = (a - b)[~np.isnan(a - b)]
    n, difference = delta.size, _mean(delta)
    row = dict.fromkeys(["difference", "low", "high", "wilcoxon_p", "t_p", "d_z"], np.nan)
    row |= {"difference": difference, "n": n}
    if n < 2:
        return row
    wilcoxon_p = stats.wilcoxon(delta).pvalue if delta.any() else 1.0
    if np.ptp(delta) < 1e-12:  # no spread: nothing to resample, and t is 0 or infinite
        low, high, t_p = difference, difference, float(not delta.any())
    else:
        low, high = stats.bootstrap((delta,), np.mean, rng=np.random.default_rng(seed)).confidence_interval
        t_p = stats.ttest_1samp(delta, 0).pvalue
    d_z = difference / delta.std(ddof=1) if np.ptp(delta) >= 1e-12 else np.nan
    return row | {"low": float(low), "high": float(high), "wilcoxon_p": float(wilcoxon_p), "t_p": float(t_p),
                  "d_z": float(d_z)}


def holm(p):
    """Holm's step-down correction of a family of p values [n]; nan stays and does not count as a test."""
    p = np.asarray(p, float)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]  # nan is sorted to the end
    corrected = np.full(p.shape, np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return corrected
