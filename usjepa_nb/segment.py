"""Segmentations of the validation and test clips by any method, with scores per video; loaded or else made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import nn

from usjepa_nb import memory, metrics, probe
from usjepa_nb.dataset import digest
from usjepa_nb.methods import END_TO_END, label
from usjepa_nb.parts import DAMAGED
from usjepa_nb.pretrain import save
from usjepa_nb.runs import Lab, Run
from usjepa_nb.vit import Encoder
from usjepa_nb.weights import read

PROBING = ("probe_epochs", "probe_min_steps", "probe_batch", "probe_lr", "probe_width")


@dataclass
class Segmentation:
    """Masks of one method on validation and test clips, and their scores per video."""

    spec: dict
    rows: np.ndarray  # store rows, in the order of the predictions
    best: np.ndarray  # uint8 [n, T, S, S], step chosen on validation
    last: np.ndarray  # uint8 [n, T, S, S], after the last step
    scores: pd.DataFrame  # a row per video and `which` ("best" | "last"), see `scores`
    history: list[dict]  # of the probe: step, loss, val_dsc
    seconds: float


def labelled_rows(lab: Lab) -> np.ndarray:
    """Store rows of the validation and test clips, in the order of all predictions."""
    return np.concatenate([lab.store.rows(s, labelled=True) for s in ("val", "test")])


def probing(lab: Lab, fraction: int, online: bool = False) -> str:
    """A short name for what shapes a probe beside its encoder."""
    return digest([{k: getattr(lab.profile, k) for k in PROBING}, fraction, lab.seed, online])


def segmentation(lab: Lab, method: str, fraction: int = 100, lam: float = 1.0, freeze: int = 0,
                 online: bool = False, train: bool = True) -> Segmentation | None:
    """Segment with a probe trained on `fraction` % of the training patients' labels.

    Args:
        method: a key of `methods.METHODS`. "prior" looks at no image, `methods.END_TO_END` need no probe.
        online: probe V-JEPA's online encoder instead of its EMA target.
        train: where it is not on disk make it; else the answer is None.
    """
    if online and method not in ("vjepa", "vjepa_ll"):
        raise ValueError(f"online = True is not possible for {method!r}: only V-JEPA has two encoders")
    rows = labelled_rows(lab)
    if method == "prior":
        begun, guess = time.time(), shape_prior(lab, rows, fraction)
        spec = {"method": "prior", "lam": 1.0, "freeze": 0, "seed": lab.seed}
        return Segmentation(spec, rows, guess, guess, scores(lab, spec, rows, guess, guess), [], time.time() - begun)
    spec = lab.spec(method, lam, freeze, fraction)
    path = lab.folder(spec) / f"segmentation-{fraction}pc-{probing(lab, fraction, online)}.npz"
    if not path.exists() and not train:
        return None
    if not path.exists():
        run, begun = lab.encoder(method, lam, freeze, fraction), time.time()
        best, last, history = segment(lab, run, rows, fraction, run.objective.encoder if online else None)
        part = path.with_suffix(f".{os.getpid()}.npz")
        try:
            np.savez_compressed(part, best=best, last=last, history=json.dumps(history), seconds=time.time() - begun)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    try:
        with np.load(path) as file:
            best, last, history = file["best"], file["last"], json.loads(str(file["history"]))
            seconds = float(file["seconds"])
    except DAMAGED as e:
        raise OSError(f"{path} cannot be read as a segmentation ({str(e)[:99]}): delete it, it is made again") from e
    return Segmentation(spec, rows, best, last, scores(lab, spec, rows, best, last), history, seconds)


def segment(lab: Lab, run: Run, rows: np.ndarray, fraction: int, online: Encoder | None = None) -> tuple:
    """Predictions of best and last probe on `rows`, and its history; the best one is kept in the run's folder."""
    if run.spec["method"] in END_TO_END:  # its decoder was trained with it
        predicted = predictor(lab, run)(lab.clips(rows)[0])
        return predicted, predicted, []
    cache, fitted = fit_probe(lab, run, rows, fraction, online)
    if online is None:
        save(probe_file(lab, run, fraction), {"best": fitted["best"]})
    at = slice(len(lab.labelled(100)), None)
    predicted = []
    for which in ("best", "last"):
        fitted["probe"].load_state_dict(fitted[which])
        predicted.append(probe.predict(fitted["probe"], cache.features[at], cache.seen[at]).numpy())
    return *predicted, fitted["history"]


def fit_probe(lab: Lab, run: Run, rows: np.ndarray, fraction: int, online: Encoder | None = None) -> tuple:
    """Cached features of the labelled training clips and of `rows`, and what `probe.fit` makes of them."""
    p = lab.profile
    everything = np.concatenate([lab.labelled(100), rows])
    grey, masks = lab.clips(everything)
    cached = run.folder / ("features.h5" if online is None else "features-online.h5")
    with FileLock(run.folder / "lock"), memory.remedy(f"features of {run.label}", memory.FEATURES):
        for left in run.folder.glob(f"{cached.stem}.*.part"):  # by a killed process: nobody else holds the lock
            left.unlink()
        if not cached.exists():
            probe.Cache.write(cached, online or run.encoder, grey, p.sector_aware, lab.device, precision=p.precision)
    cache = probe.Cache(cached)
    labelled = np.flatnonzero(np.isin(everything, lab.labelled(fraction)))
    val = np.flatnonzero(np.isin(everything, lab.store.rows("val", labelled=True)))
    return cache, probe.fit(cache, torch.from_numpy(masks), labelled, val, p.grid(lab.frames), p, seed=lab.seed,
                            device=lab.device)


def probe_file(lab: Lab, run: Run, fraction: int) -> Path:
    """Where the probe that was best on validation is kept."""
    return run.folder / f"probe-{fraction}pc-{probing(lab, fraction)}.pt"


def predictor(lab: Lab, run: Run, fraction: int = 100) -> Callable[[np.ndarray], np.ndarray]:
    """A function from any clips, uint8 [n, T, S, S], to their masks: what scores corrupted or foreign clips.

    The probe that was best on validation is loaded from the run's folder, where `segment` left it, or fitted.
    """
    p = lab.profile
    if run.spec["method"] in END_TO_END:
        model = run.objective.eval()
        logits = model.logits
    else:
        path = probe_file(lab, run, fraction)
        if not path.exists():
            segment(lab, run, labelled_rows(lab), fraction)
        encoder = run.encoder.eval()
        model = probe.SegmentationProbe(p.grid(lab.frames), p.tubelet_size, encoder.width, p.heads, p.probe_width)
        model.load_state_dict(read(path)["best"])
        model = nn.ModuleList([encoder, model.eval()])

        def logits(grey):
            features, seen = probe.encode(encoder, grey, p.sector_aware)
            with probe.autocast("32-true", grey.device):  # as it learned: from half-precision features
                return model[1](features.half(), seen)

    @torch.no_grad()
    def predict(clips: np.ndarray) -> np.ndarray:
        model.to(lab.device)
        with probe.autocast(p.precision, lab.device):
            parts = [probe.classes(logits(grey.float().to(lab.device))).cpu()
                     for grey in torch.from_numpy(clips).split(16)]
        model.to("cpu")
        return torch.cat(parts).numpy()

    return predict


def shape_prior(lab: Lab, rows: np.ndarray, fraction: int) -> np.ndarray:
    """The control that looks at no image: the commonest label of each pixel over the training clips."""
    _, masks = lab.clips(lab.labelled(fraction))
    votes = np.stack([(masks == c).mean(0) for c in range(probe.CLASSES)])
    return np.broadcast_to(votes.argmax(0).astype(np.uint8), (len(rows), *masks.shape[1:]))


def scores(lab: Lab, spec: dict, rows: np.ndarray, best: np.ndarray, last: np.ndarray) -> pd.DataFrame:
    """Scores per video against the reference, for the best-on-validation and the last probe.

    Columns dsc, jaccard, ppv, recall: mean over the three foreground classes, all labelled frames of a video pooled;
    dsc_1 … for a class. dsc_ed, dsc_es, dsc_between: the same mean DSC on the ED frame, on the ES frame, and on the
    frames between (nan where a clip has none), whose reference CAMUS is said to have interpolated.
    """
    _, masks = lab.clips(rows)
    table = lab.store.table.loc[rows, ["patient", "view", "split", "quality"]]
    moments = []
    for row in rows:
        ed, es = lab.instants(row)
        at = lab.store.clip(int(row), lab.frames, lab.profile.clip_rule, lab.profile.frame_step, masks=False).index
        between = [k for k in range(lab.frames) if min(at[ed], at[es]) < at[k] < max(at[ed], at[es])]
        moments.append({"ed": [ed], "es": [es], "between": between})
    out = []
    for which, predicted in (("best", best), ("last", last)):
        for (_, meta), p, m, at in zip(table.iterrows(), predicted, masks, moments, strict=True):
            flat = {f"{name}{'' if key == 'mean' else f'_{key}'}": value
                    for name, values in metrics.video_scores(p, m).items() for key, value in values.items()}
            parts = {f"dsc_{part}": metrics.mean_dsc(p[frames], m[frames]) for part, frames in at.items()}
            out.append({"method": label(spec), **meta, "which": which, **flat, **parts})
    return pd.DataFrame(out)
