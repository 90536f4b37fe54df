"""Linear probing: what a linear model reads from frozen features, with intervals over patients.

A clip's tokens are averaged to one vector; scikit-learn standardises it and fits logistic or ridge regression. It
sees training patients only, and how strongly it is held back is chosen by cross-validation among them, patients kept
whole. Scores stand beside a constant guess, with 95 % bootstrap intervals that resample test *patients*: two clips of
one heart are not two witnesses. `heads` has the attentive probe and fine-tuning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from usjepa_nb import bootstrap, folder, heads, weights
from usjepa_nb.heads import mean_pool
from usjepa_nb.objectives import make_encoder
from usjepa_nb.probe import encode
from usjepa_nb.profile import Profile, ProfileError, load
from usjepa_nb.tasks import Task, TaskError
from usjepa_nb.vit import POSITIONS, Encoder

WAYS = ("mean-pooled", "attentive", "fine-tuned")


@torch.no_grad()
def frozen(encoder: Encoder, clips: Tensor, sector_aware: bool, device="cpu") -> tuple[Tensor, Tensor]:
    """Features of uint8 clips [n, T, S, S]: fp16 [n, N, D] (zeros where left out) and seen bool [n, N]."""
    encoder = encoder.eval().to(device)
    parts = [encode(encoder, grey.to(device).float(), sector_aware) for grey in clips.split(16)]
    encoder.to("cpu")
    z, seen = zip(*((z.half().cpu(), s.cpu()) for z, s in parts), strict=True)
    return torch.cat(z), torch.cat(seen)


def search(task: Task, x: np.ndarray, seed: int = 0) -> GridSearchCV:
    """The linear model of a task, fitted on the training patients' vectors `x` [n, D]."""
    train = task.part("train")
    y, groups = task.targets(train), task.groups[train]
    if task.regression:
        folds = GroupKFold(min(5, len(np.unique(groups))))
        model, grid, scoring = Ridge(), {"ridge__alpha": 10.0 ** np.arange(5, -3, -1)}, "neg_mean_absolute_error"
    else:
        rarest = min(len(np.unique(groups[y == c])) for c in range(len(task.classes)))
        folds = StratifiedGroupKFold(min(5, rarest), shuffle=True, random_state=seed)
        model = LogisticRegression(class_weight="balanced", max_iter=5000)
        grid, scoring = {"logisticregression__C": 10.0 ** np.arange(-5, 2)}, "f1_macro"
    # both grids begin with the firmest hold, which wins a tie
    found = GridSearchCV(make_pipeline(StandardScaler(), model), grid, scoring=scoring, cv=folds)
    return found.fit(x[train], y, groups=groups)


def fit(task: Task, x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Fit a linear model on the training patients' vectors `x` [n, D] and predict the test clips.

    Returns:
        Probabilities [m, classes], or values [m] for a regression.
    """
    model, test = search(task, x, seed), task.part("test")
    return model.predict(x[test]) if task.regression else model.predict_proba(x[test])


def classifier(task: Task, encoder: Encoder, p: Profile, seed: int = 0, device="cpu"):
    """A linear probe as a function from any clips, uint8 [n, T, S, S], to classes [n], as `robustness` wants it."""
    pooled = lambda clips: mean_pool(*frozen(encoder, clips, p.sector_aware, device)).numpy()  # noqa: E731
    model = search(task, pooled(task.clips), seed)
    return lambda clips: task.classes[model.predict(pooled(torch.as_tensor(clips)))]


def constant(task: Task) -> np.ndarray:
    """What is predicted without looking: the training clips' mean, or the shares of their classes."""
    train, test = task.part("train"), task.part("test")
    x, y = np.zeros((len(task.labels), 1)), task.targets(train)
    if task.regression:
        return DummyRegressor().fit(x[train], y).predict(x[test])
    return DummyClassifier(strategy="prior").fit(x[train], y).predict_proba(x[test])


def study(tasks: list[Task], encoders: dict[str, Encoder], p: Profile, ways=WAYS[:2], *, seed: int = 0,
          device="cpu") -> dict[tuple[str, str, str], np.ndarray]:
    """Predictions of the test clips by (task, encoder, way); the constant guess is encoder "none".

    Args:
        ways: of `WAYS`; "fine-tuned" starts from each encoder and leaves it as it was.
    """
    if strange := set(ways) - set(WAYS):
        raise ValueError(f"{', '.join(sorted(strange))}: no way to probe; choose from {', '.join(WAYS)}")
    out = {(task.name, "none", "constant"): constant(task) for task in tasks}
    for name, encoder in encoders.items():
        known: dict[int, tuple[Tensor, Tensor]] = {}  # tasks on the same clips share their features
        for task in tasks:
            if id(task.clips) not in known:
                known[id(task.clips)] = frozen(encoder, task.clips, p.sector_aware, device)
            features = known[id(task.clips)]
            for way in ways:
                if way == "mean-pooled":
                    guess = fit(task, mean_pool(*features).numpy(), seed)
                elif way == "attentive":
                    guess = heads.attentive(task, *features, p.heads, seed=seed, device=device)
                else:
                    guess = heads.fine_tuned(task, encoder, p.sector_aware, seed=seed, device=device)
                out[task.name, name, way] = guess
    return out


def table(tasks: list[Task], predicted: dict[tuple[str, str, str], np.ndarray], seed: int = 0) -> pd.DataFrame:
    """One row per task, encoder and way, with "value [low, high]" for every score."""
    rows, by_name = [], {task.name: task for task in tasks}
    for (task, encoder, way), guess in predicted.items():
        scores = bootstrap.evaluate(by_name[task], guess, seed=seed)
        cells = {r.score: f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in scores.itertuples()}
        rows.append({"task": task, "encoder": encoder, "way": way, **cells, "patients": scores["patients"][0]})
    order = {task.name: i for i, task in enumerate(tasks)}
    return pd.DataFrame(rows).sort_values("task", key=lambda c: c.map(order), kind="stable", ignore_index=True)


def named(paths: Iterable[str]) -> dict[str, str]:
    """Short names of checkpoints: the file's, with its folder's where one comes twice or is a control's.

    Raises:
        TaskError: two are still alike.
    """
    paths = [Path(path) for path in paths]
    stems = [path.stem for path in paths]
    if len({*stems, "random", "none"}) < len(stems) + 2:
        stems = [f"{path.resolve().parent.name}/{path.stem}" for path in paths]
    if twice := sorted({name for name in stems if stems.count(name) > 1}):
        raise TaskError(f"--weights: two files are called {twice[0]}; give each once, or rename one's folder")
    return dict(zip(stems, map(str, paths), strict=True))


def load_encoder(path: str, p, positions: str) -> Encoder:
    """An encoder of the profile's size, filled from a checkpoint; prints what was loaded.

    Raises:
        WeightsError: see `weights.load`.
    """
    encoder = make_encoder(p, p.frames, positions)
    print(*weights.load(path, encoder), sep="\n")
    return encoder


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m usjepa_nb.linear", description=(
        "Probe encoders on the images of a folder: an UltraBench data set, or <split>/<class>/*.png."))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", nargs="+", default=[], metavar="FILE", help="checkpoints; a random encoder is "
                        "always there to compare with")
    parser.add_argument("--profile", default="tiny", help="size of encoder and clips (a name, or a YAML file)")
    parser.add_argument("--positions", default="sincos3d", choices=list(POSITIONS), help="of the checkpoints")
    parser.add_argument("--ways", nargs="+", default=list(WAYS[:2]), choices=WAYS)
    parser.add_argument("--label", default="label", help="key of UltraBench's lists that is asked for")
    parser.add_argument("--regression", action="store_true", help="the label is a quantity")
    parser.add_argument("--patient", default="", metavar="REGEX", help="finds the patient in an image's file name")
    parser.add_argument("--shared-patients", action="store_true", help="score although patients are in two parts")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(argv)
    try:
        if not 0 <= a.seed < 2**32:
            raise TaskError(f"--seed {a.seed} is not possible: choose a whole number from 0 to {2**32 - 1}")
        p = load(a.profile)
        device = "cuda" if torch.cuda.is_available() and p.accelerator != "cpu" else "cpu"
        task = folder.read(a.folder, p.size, p.frames, a.label, a.regression, a.patient)
        if obstacle := task.obstacle():
            raise TaskError(obstacle)
        if (both := task.shared()) and not a.shared_patients:
            raise TaskError(f"{task.name}: {both[0]} is in more than one part ({len(both)} in all), so scores would "
                            "flatter; split again by patient, or say --shared-patients")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(a.seed)
            encoders = {"random": make_encoder(p, p.frames, a.positions)}
        encoders |= {name: load_encoder(path, p, a.positions) for name, path in named(a.weights).items()}
    except (TaskError, ProfileError, weights.WeightsError) as error:
        print(error, file=sys.stderr)
        return 1
    predicted = study([task], encoders, p, a.ways, seed=a.seed, device=device)
    print(table([task], predicted, a.seed).to_string(index=False))
    for (_, encoder, way), guess in predicted.items():
        if encoder not in ("none", "random"):
            rows = bootstrap.evaluate(task, guess, predicted[task.name, "random", way], seed=a.seed)
            for r in rows.itertuples():
                print(f"{encoder} - random, {way}, {r.score}: {r.value:+.2f} [{r.low:+.2f}, {r.high:+.2f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
