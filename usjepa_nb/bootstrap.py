"""Scores of a probe with bootstrap intervals over patients.

Every score takes weights [B, m], how often each of m clips counts, and gives B values at once: a row of ones is the
score itself, rows of counts are its resamples. Two encoders are compared on the same rows.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from usjepa_nb.tasks import Task


def macro_f1(w: np.ndarray, true: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur, in truth or prediction. Weights [B, m] of the clips -> [B]."""
    each = np.arange(p.shape[1])
    is_true, is_called = true[:, None] == each, p.argmax(1)[:, None] == each
    both, either = w @ (is_true & is_called), w @ is_true + w @ is_called  # TP and 2 TP + FP + FN
    with np.errstate(invalid="ignore"):
        return np.nanmean(2 * both / either, 1)


def auroc(w: np.ndarray, true: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Mean over classes of the AUROC of one against the rest; a class without clips, or with all, is left out."""
    per_class = []
    for c in range(p.shape[1]):
        own, rest = np.flatnonzero(true == c), np.flatnonzero(true != c)
        difference = p[own, c][:, None] - p[rest, c]
        won = (w[:, own] @ ((difference > 0) + 0.5 * (difference == 0)) * w[:, rest]).sum(1)
        pairs = w[:, own].sum(1) * w[:, rest].sum(1)
        per_class.append(np.divide(won, pairs, out=np.full(len(w), np.nan), where=pairs > 0))
    known = ~np.isnan(per_class)
    total = known.sum(0)
    return np.divide(np.where(known, per_class, 0).sum(0), total, out=np.full(len(w), np.nan), where=total > 0)


def mae(w: np.ndarray, true: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Mean absolute error, in the label's unit."""
    return w @ np.abs(p - true) / w.sum(1)


def r2(w: np.ndarray, true: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Share of the variance explained: 1 is all, 0 a guess of the test mean, below 0 worse than that."""
    mean = w @ true / w.sum(1)
    variance = (w * (true - mean[:, None]) ** 2).sum(1)
    return 1 - np.divide(w @ (p - true) ** 2, variance, out=np.full(len(w), np.nan), where=variance > 0)


def scores_of(task: Task) -> dict:
    return {"MAE": mae, "R2": r2} if task.regression else {"macro-F1": macro_f1, "AUROC": auroc}


def resamples(task: Task, n: int, seed: int) -> np.ndarray:
    """How often each test clip counts: all once, then in `n` draws of as many test patients with replacement."""
    _, patient = np.unique(task.groups[task.part("test")], return_inverse=True)
    many = patient.max() + 1
    drawn = np.random.default_rng(seed).multinomial(many, np.full(many, 1 / many), n)
    return np.concatenate([np.ones((1, len(patient))), drawn[:, patient]])


def evaluate(task: Task, predicted: np.ndarray, than: np.ndarray | None = None, *, n: int = 2000,
             seed: int = 0) -> pd.DataFrame:
    """Scores on the test clips with 95 % intervals, or their differences to other predictions of the same clips.

    Args:
        predicted, than: as `fit` gives them; with `than` both are scored on the same resampled patients.

    Returns:
        A row per score: score, value, low, high (percentiles of `n` resamples; nan for fewer than two patients, whom
        no draw can vary), clips, patients.
    """
    w, true = resamples(task, n, seed), task.targets(task.part("test"))
    patients = len(np.unique(task.groups[task.part("test")]))
    rows = []
    for name, score in scores_of(task).items():
        values = score(w, true, predicted) - (0 if than is None else score(w, true, than))
        drawn = values[1:] if patients > 1 else values[:0]
        low, high = np.nanpercentile(drawn, [2.5, 97.5]) if not np.isnan(drawn).all() else [np.nan] * 2
        rows.append({"score": name, "value": values[0], "low": low, "high": high, "clips": w.shape[1],
                     "patients": patients})
    return pd.DataFrame(rows)


