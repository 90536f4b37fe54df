"""One prediction, every reading of its scores: what a paper leaves unsaid, made visible in numbers.

"DSC 0.83" is no number before four questions are answered: which classes (the myocardium's ring, or the epicardium,
which is ring and cavity together), whether background is in the mean, whether a video's frames are pooled or each is
scored and the scores averaged, and what a class scores that neither mask holds. `OURS` is what `metrics` answers.
Pixels without a reference (`UNLABELLED`) never count.
"""

import itertools

import numpy as np
import pandas as pd

from .camus import UNLABELLED
from .charts import LINES, MARKERS
from .figures import panels

REGIONS = {"LV cavity": (1,), "myocardium ring": (2,), "left atrium": (3,), "epicardium": (1, 2), "background": (0,)}
CLASSES = {"ring": ["LV cavity", "myocardium ring", "left atrium"], "epi": ["LV cavity", "epicardium", "left atrium"]}
BACKGROUND = {"out": [], "in": ["background"]}
FRAMES = {"pooled": "frames pooled per video", "mean": "mean over scored frames", "ED/ES": "mean over ED and ES alone"}
ABSENT = {"skip": np.nan, "0": 0.0, "1": 1.0}  # the score of a class that neither mask holds
AXES = ["classes", "background", "frames", "absent"]
OURS = dict(zip(AXES, ("ring", "out", "pooled", "skip"), strict=True))  # `metrics.video_scores`
SCORES = {  # |P and T|, |P|, |T| -> numerator, denominator (section 3.2 of the paper)
    "dsc": lambda both, p, t: (2 * both, p + t),
    "jaccard": lambda both, p, t: (both, p + t - both),
    "ppv": lambda both, p, t: (both, p),
    "recall": lambda both, p, t: (both, t),
    "recall over |P|": lambda both, p, t: (both, p),  # the slip to look for in a formula: PPV a second time
}


def describe(reading):
    """A reading (a mapping with the keys of `AXES`) in words, to stand beside a number."""
    absent = "skipped" if reading["absent"] == "skip" else f"scored {reading['absent']}"
    return (f"mean over {', '.join(CLASSES[reading['classes']])}; background {reading['background']}; "
            f"{FRAMES[reading['frames']]}; classes in neither mask {absent}")


def confusion(pred, true):
    """Pixels of each pair of labels in each frame: int [T, 4, 4], reference first; all zero for an unlabelled frame.

    Args:
        pred, true: uint8 [T, H, W], labels 0…3; pixels where `true` is UNLABELLED are left out.

    Raises:
        ValueError: other shapes or labels, or no pixel with a reference at all.
    """
    pred, true = np.asarray(pred), np.asarray(true)
    if pred.ndim != 3 or pred.shape != true.shape:
        raise ValueError(f"pred has shape {pred.shape} and true {true.shape}: give both as [T, H, W], the same.")
    known = true != UNLABELLED
    if not known.any():
        raise ValueError("true has no labelled pixel: nothing can be scored, leave this video out.")
    for name, labels in (("pred", pred[known]), ("true", true[known])):
        if labels.min() < 0 or labels.max() > 3:
            raise ValueError(f"{name} holds label {labels.max()}: labels are 0 to 3 (and {UNLABELLED} in true).")
    frame = np.broadcast_to(np.arange(len(true))[:, None, None], true.shape)
    codes = (frame[known] * 4 + true[known]) * 4 + pred[known].astype(int)
    return np.bincount(codes, minlength=16 * len(true)).reshape(-1, 4, 4)


def _mean(values):
    """Mean over the first axis of what is not nan; nan, without a warning, where nothing is left."""
    there = ~np.isnan(values)
    total, count = np.where(there, values, 0).sum(0), there.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def overlaps(counts, regions=tuple(REGIONS)):
    """|P and T|, |P| and |T| of each frame and region: int [3, T, regions], from `confusion`'s [T, 4, 4]."""
    member = np.array([[label in REGIONS[region] for label in range(4)] for region in regions]).T.astype(int)
    both = np.einsum("tij,ir,jr->tr", counts, member, member)
    return np.stack([both, counts.sum(1) @ member, counts.sum(2) @ member])


def region_scores(overlap, score, absent="skip"):
    """One score of each frame and region: float [T, regions], from `overlaps`."""
    part, whole = SCORES[score](*overlap)
    return np.where(overlap[1] + overlap[2] == 0, ABSENT[absent], part / np.maximum(whole, 1))


def readings(pred, true, ends=None):
    """Every reading of every score of one video.

    Args:
        pred, true: uint8 [T, H, W], see `confusion`.
        ends: positions (ED, ES) among the T frames, of which those with a reference count; without them that reading
            is left out.

    Returns:
        DataFrame with columns score, classes, background, frames, absent and value, a row for each reading. A class
        is averaged over frames first, then classes are averaged. nan where no class is left.
    """
    counts = confusion(pred, true)
    scored = counts.sum((1, 2)) > 0
    if ends is not None and not all(-len(counts) <= k < len(counts) for k in ends):
        raise ValueError(f"ends = {tuple(ends)} is not possible: the video has {len(counts)} frames, counted from 0.")
    units = {"pooled": overlaps(counts.sum(0)[None]), "mean": overlaps(counts[scored])}
    if ends is not None:
        units["ED/ES"] = overlaps(counts[[k for k in ends if scored[k]]])
    means = {(score, frames, absent): dict(zip(REGIONS, _mean(region_scores(unit, score, absent=absent)), strict=True))
             for score, (frames, unit), absent in itertools.product(SCORES, units.items(), ABSENT)}
    rows = [(score, classes, background, frames, absent, float(_mean(np.array(
                [means[score, frames, absent][region] for region in CLASSES[classes] + BACKGROUND[background]]))))
            for score, classes, background, frames, absent in itertools.product(
                SCORES, CLASSES, BACKGROUND, units, ABSENT)]
    return pd.DataFrame(rows, columns=["score", *AXES, "value"])


def table(predictions, true, ends=None):
    """Mean over videos of every reading, for several methods.

    Args:
        predictions: {method: uint8 [n, T, H, W]}; `true` likewise [n, T, H, W].
        ends: [n, 2], see `readings`.

    Returns:
        DataFrame with columns method, score, classes, background, frames, absent, value (mean over the videos that
        have a score) and sd.
    """
    parts, ends = [], [None] * len(true) if ends is None else ends
    for method, masks in predictions.items():
        if len(masks) != len(true):
            raise ValueError(f"{method} has {len(masks)} videos and true {len(true)}: give the same videos.")
        videos = pd.concat([readings(*video) for video in zip(masks, true, ends, strict=True)])
        means = videos.groupby(["score", *AXES], sort=False)["value"].agg(["mean", "std"]).reset_index()
        parts.append(means.rename(columns={"mean": "value", "std": "sd"}).assign(method=method))
    return pd.concat(parts, ignore_index=True)[["method", "score", *AXES, "value", "sd"]]


def ours(rows, **changes):
    """The rows of our own reading, or of one that differs from it in the axes given."""
    return rows[np.logical_and.reduce([rows[axis] == value for axis, value in {**OURS, **changes}.items()])]


def moves(rows):
    """What each other answer to one question, alone, adds to a score: mean, least and most over methods.

    Args:
        rows: from `table`.

    Returns:
        DataFrame, a row for each score and answer: columns score, axis, answer, move, least, most.
    """
    out = []
    base = ours(rows).set_index(["score", "method"])["value"]
    for axis in AXES:
        for answer in [a for a in rows[axis].unique() if a != OURS[axis]]:
            move = ours(rows, **{axis: answer}).set_index(["score", "method"])["value"] - base
            by_score = move.groupby("score", sort=False).agg(["mean", "min", "max"]).set_axis(["move", "least", "most"],
                                                                                              axis=1)
            out.append(by_score.reset_index().assign(axis=axis, answer=answer))
    return pd.concat(out, ignore_index=True)[["score", "axis", "answer", "move", "least", "most"]]


def rankings(rows, score="dsc"):
    """Does the order of the methods depend on the reading? Each reading's order against our own.

    Args:
        rows: from `table`.

    Returns:
        DataFrame, a row for each reading: the axes; best: the method with the largest mean; swapped: pairs of methods
        in the other order; widest: the largest difference, under our reading, within such a pair (nan: none); tau:
        Kendall's, 1 for the same order.
    """
    from scipy.stats import kendalltau

    rows = rows[rows["score"] == score]
    base = ours(rows).set_index("method")["value"]
    out = []
    for reading, group in rows.groupby(AXES, sort=False):
        means = group.set_index("method")["value"].loc[base.index]
        swaps = [abs(base[a] - base[b]) for a, b in itertools.combinations(base.index, 2)
                 if (base[a] - base[b]) * (means[a] - means[b]) < 0]
        out.append({**dict(zip(AXES, reading, strict=True)), "best": means.idxmax(), "swapped": len(swaps),
                    "widest": max(swaps, default=np.nan), "tau": kendalltau(base, means).statistic})
    return pd.DataFrame(out)


def readings_chart(rows):
    """All readings of one prediction (from `readings`): a line for each score, a dot for each reading, ours ringed."""
    figure, axes = panels(1, 1, width=9, ratio=0.42)
    ax, names = axes[0, 0], list(rows["score"].unique())
    styles = list(itertools.product(CLASSES, BACKGROUND))
    frames = list(rows["frames"].unique())
    for (i, (classes, background)), (j, kind) in itertools.product(enumerate(styles), enumerate(frames)):
        dots = rows[(rows["classes"] == classes) & (rows["background"] == background) & (rows["frames"] == kind)]
        ax.plot(dots["value"], dots["score"].map(names.index) + 0.18 * (i - 1.5), MARKERS[j], color=LINES[i],
                markersize=5, alpha=0.8, label=f"{classes}, background {background}" if j == 0 else None)
    for j, kind in enumerate(frames):
        ax.plot([], [], MARKERS[j], color="gray", label=f"frames: {kind}")
    mine = ours(rows)
    ax.plot(mine["value"], mine["score"].map(names.index) - 0.27, "o", markersize=11, markerfacecolor="none",
            markeredgecolor="black", label="ours")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("score of one video", fontsize=9)
    ax.grid(alpha=0.3, axis="x")
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def rankings_chart(rows, score="dsc"):
    """Methods under every reading (from `table`): a dot each; where two of a band change places, the order does."""
    figure, axes = panels(1, 1, width=9, ratio=0.75)
    ax, rows = axes[0, 0], rows[(rows["score"] == score) & (rows["absent"] == OURS["absent"])]
    methods = rows.groupby("method", sort=False)
    for i, (method, group) in enumerate(methods):  # one below the other within a band: equal values are all seen
        ticks = [f"{r.classes} · background {r.background} · {r.frames}" for r in group.itertuples()]
        at = np.arange(len(group)) + 0.8 * ((i + 0.5) / len(methods) - 0.5)
        ax.plot(group["value"], at, MARKERS[i % 8], color=LINES[i % 8], markersize=4, label=method)
    ax.set_yticks(range(len(ticks)), ticks, fontsize=8)
    for i in range(0, len(ticks), 2):
        ax.axhspan(i - 0.5, i + 0.5, color="0.95")
    ax.set_ylim(len(ticks) - 0.5, -0.5)
    ax.set_xlabel(f"{score.upper()}, mean over videos", fontsize=9)
    ax.grid(alpha=0.3, axis="x")
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
