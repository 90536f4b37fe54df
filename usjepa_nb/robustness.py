"""What bad images cost each method: scores against severity, mean corruption error, and pictures of both.

A method is a function that predicts from uint8 clips [n, T, H, W]; all methods see the same spoilt clips.
"""

import itertools

import numpy as np
import pandas as pd
from tqdm import tqdm

from usjepa_nb import figures, metrics
from usjepa_nb.charts import LINES, MARKERS
from usjepa_nb.corruptions import CORRUPTIONS, SEVERITIES, corrupt


def robustness(methods, clips, truth, videos, names=tuple(CORRUPTIONS), severities=SEVERITIES, seed=0):
    """Score every method on clean clips and on each corruption at each severity.

    Args:
        methods: {method: function uint8 [n, T, H, W] -> masks [n, T, H, W], or classes [n]}.
        clips: uint8 [n, T, H, W].
        truth: masks [n, T, H, W] for segmentation, scored by DSC per video (the F1 of pixels); or classes [n],
            scored by macro-F1, the mean of the classes' F1 over all clips.
        videos: DataFrame of n rows, what to say of each video in its rows: patient, view and so on.
        seed: clip i is spoilt with the seed (seed, i), at every severity, for every method.

    Returns:
        DataFrame of method, corruption, severity and scores: a row per video with the columns of `videos`, dsc (mean
        of the classes that are there), dsc_1, dsc_2, dsc_3; or one row with macro_f1. Severity 0, the clean clips,
        stands under every corruption.
    """
    if not len(clips) == len(truth) == len(videos):
        raise ValueError(f"{len(clips)} clips, {len(truth)} in truth and {len(videos)} videos: give as many of each.")
    clean = {method: _scores(predict(clips), truth, videos) for method, predict in methods.items()}
    rows = [{"method": method, "corruption": name, "severity": 0, **row}
            for name, (method, scored) in itertools.product(names, clean.items()) for row in scored]
    for name, severity in tqdm([*itertools.product(names, sorted({*severities} - {0}))], "corruptions"):
        spoilt = np.stack([corrupt(clip, name, severity, (seed, i)) for i, clip in enumerate(clips)])
        for method, predict in methods.items():
            scored = _scores(predict(spoilt), truth, videos)
            rows += [{"method": method, "corruption": name, "severity": severity, **row} for row in scored]
    return pd.DataFrame(rows)


def _scores(predicted, truth, videos):
    """Rows of scores: one per video for masks, one in all for classes."""
    if np.ndim(truth) == 1:
        from sklearn.metrics import f1_score  # imported late: it takes a second

        return [{"macro_f1": float(f1_score(truth, predicted, average="macro"))}]
    out = []
    for about, p, m in zip(videos.to_dict("records"), predicted, truth, strict=True):
        by_class = {f"dsc_{label}": metrics.dsc(p, m, label) for label in metrics.CLASSES}
        out.append({**about, "dsc": pd.Series(by_class).mean(), **by_class})  # a class that is not there does not count
    return out


def corruption_error(table, baseline, score="dsc"):
    """Corruption errors relative to a baseline, after Hendrycks and Dietterich 2019 (section 4.2).

    With E = 1 - mean score of a method f under corruption c at severity s, and E_0 on clean clips,
    CE = sum_s E / sum_s E of the baseline, and mCE is the mean of CE over corruptions. Relative CE compares what is
    lost: sum_s (E - E_0) over the baseline's. CE is nan, and left out of its mean, where the baseline makes no error,
    relative CE where it loses nothing.

    Args:
        table: as `robustness` returns it.
        baseline: the method that gets 100 %.

    Returns:
        DataFrame with a row per method: clean (E_0), mCE, relative_mCE, and CE of each corruption; all in %.

    Raises:
        ValueError: the baseline is not in the table.
    """
    if baseline not in set(table["method"]):
        raise ValueError(f"baseline={baseline!r} is not in the table: choose one of {', '.join(set(table['method']))}.")
    error = 1 - table.pivot_table(index=["method", "corruption"], columns="severity", values=score, sort=False)
    total = error.drop(columns=0).sum(axis=1).unstack(sort=False)  # [method, corruption]
    lost = error.drop(columns=0).sub(error[0], axis=0).sum(axis=1).unstack(sort=False)
    ce = 100 * total / total.loc[baseline].where(total.loc[baseline] > 0)
    relative = 100 * lost / lost.loc[baseline].where(lost.loc[baseline] > 0)
    clean = 100 * error[0].groupby(level="method", sort=False).first()
    return pd.DataFrame({"clean": clean, "mCE": ce.mean(axis=1), "relative_mCE": relative.mean(axis=1)}).join(ce)


def score_vs_severity(table, score="dsc"):
    """Mean score against severity: a panel for each corruption, a line for each method (one scale for all)."""
    names, methods = table["corruption"].unique(), [*table["method"].unique()]
    across = min(4, len(names))
    figure, axes = figures.panels(-(-len(names) // across), across, ratio=0.8)
    for ax in axes.flat[len(names):]:
        ax.set_axis_off()
    panel = dict(zip(names, axes.flat, strict=False))
    for (name, method), rows in table.groupby(["corruption", "method"], sort=False):
        line, i = rows.groupby("severity")[score].mean(), methods.index(method) % 8
        panel[name].plot(line.index, line, color=LINES[i], marker=MARKERS[i], markersize=4, label=method)
    low, high = (f([f(ax.get_ylim()) for ax in panel.values()]) for f in (min, max))
    for name, ax in panel.items():
        ax.set_title(name.replace("_", " "), fontsize=10)
        ax.set_xticks(sorted(table["severity"].unique()))
        ax.set_ylim(low, high)
        ax.grid(alpha=0.3)
    figure.supxlabel("severity (0: clean)", fontsize=9)
    figure.supylabel({"dsc": "DSC (mean of three classes)", "macro_f1": "macro-F1"}.get(score, score), fontsize=9)
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=min(4, len(methods)), fontsize=8, frameon=False)
    return figure


def severity_sheet(clip, names=tuple(CORRUPTIONS), seed=0, frame=-1, spacing=(1, 1)):
    """One frame of a clip, uint8 [T, H, W], under every corruption (rows) at severities 0 to 5 (columns)."""
    cases = [*itertools.product(names, (0, *SEVERITIES))]
    frames = np.stack([corrupt(clip, name, severity, seed)[frame] for name, severity in cases])
    titles = [f"{name.replace('_', ' ')} {severity}" for name, severity in cases]
    return figures.clip_strip(frames, None, titles, spacing, columns=1 + len(SEVERITIES))


def spoilt_overlay(clip, mask, predict, name, severity, frame=0, seed=0, spacing=(1, 1)):
    """A frame of a spoilt clip with what a method makes of it; the reference in dashes, the clip's DSC above.

    Args:
        clip, mask: uint8 [T, H, W].
        predict: as in `robustness`, for segmentation.
    """
    spoilt = corrupt(clip, name, severity, seed)
    predicted = predict(spoilt[None])[0]
    title = f"{name.replace('_', ' ')} {severity}: DSC {metrics.video_scores(predicted, mask)['dsc']['mean']:.3f}"
    return figures.overlay(spoilt[frame], predicted[frame], mask[frame], spacing, title=title)
