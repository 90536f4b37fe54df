"""What a probe is asked: clips, one label for each, whose they are, and the part of the split they belong to.

CAMUS offers four tasks. View, image quality and EF are asked of clips of the half beat; phase is asked of *stills*,
clips that hold the ED frame (or the ES frame) throughout. Phase from the first against the last tokens of one clip
would be no test: the encoder adds to each token where in time it lies, and that alone gives the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from usjepa_nb.splits import PARTS


class TaskError(ValueError):
    """A task that cannot be set; the message names what is wrong and the remedy."""


@dataclass
class Task:
    """Clips and labels; labels are text for classification and floats for regression ("" and nan: unknown).

    Args:
        clips: uint8 [n, T, S, S]; tasks on the same clips share this tensor.
        labels, groups, split: [n]; a group (patient) is in one part only and is resampled as a whole.
    """

    name: str
    clips: Tensor
    labels: np.ndarray
    groups: np.ndarray
    split: np.ndarray

    @property
    def regression(self) -> bool:
        return self.labels.dtype.kind == "f"

    @property
    def classes(self) -> np.ndarray:
        """Names of the classes among the training labels, sorted; in this order scores give their columns."""
        return np.unique(self.labels[self.part("train")])

    def part(self, name: str) -> np.ndarray:
        """Indices of one part (train, val, test) whose label is known: int [m]."""
        known = ~np.isnan(self.labels) if self.regression else self.labels != ""
        return np.flatnonzero((self.split == name) & known)

    def targets(self, index: np.ndarray) -> np.ndarray:
        """Labels of clips as numbers: the place in `classes`, int64, or the value, float32."""
        known = self.labels[index]
        return known.astype(np.float32) if self.regression else np.searchsorted(self.classes, known)

    def shared(self) -> list:
        """Groups that are in more than one part, sorted; a score of theirs would mean nothing."""
        parts: dict = {}
        for group, part in zip(self.groups.tolist(), self.split.tolist(), strict=True):
            parts.setdefault(group, set()).add(part)
        return sorted(group for group, of in parts.items() if len(of) > 1)

    def obstacle(self) -> str:
        """Why no probe can be fitted or scored, in a sentence; empty where one can."""
        train, test = self.part("train"), self.part("test")
        if not len(train) or not len(test):
            return f"{self.name}: {len(train)} labelled clips to train on and {len(test)} to test on; both need some"
        if self.regression:
            few = len(np.unique(self.groups[train])) < 2
            return f"{self.name}: one training patient only; two are the least to learn from" if few else ""
        if len(self.classes) < 2:
            return f"{self.name}: all training clips are {self.classes[0]}, so there is nothing to tell apart"
        for c in self.classes:
            if len(np.unique(self.groups[train][self.labels[train] == c])) < 2:
                return f"{self.name}: one training patient only for the class {c}; two are the least to learn from"
        if strange := sorted(set(self.labels[np.concatenate([self.part("val"), test])]) - set(self.classes)):
            return f"{self.name}: validation or test hold {', '.join(strange)}, which no training clip shows"
        return ""


def possible(tasks: list[Task]) -> list[Task]:
    """The tasks that can be fitted and scored; of each other one a sentence says why it is skipped."""
    for task in tasks:
        if obstacle := task.obstacle():
            print(f"skipped: {obstacle}")
    return [task for task in tasks if not task.obstacle()]


def camus_tasks(lab) -> list[Task]:
    """View, quality, EF (%) and phase of a lab's sequences, labelled by their cfg files; see `possible`."""
    rows = np.concatenate([lab.store.rows(part) for part in PARTS])
    table = lab.store.table.loc[rows]
    clips = torch.from_numpy(np.concatenate([lab.clips(lab.store.rows(part))[0] for part in PARTS]))
    text = {name: table[name].to_numpy(str) for name in ("patient", "split", "view", "quality")}
    tasks = [Task(name, clips, text.get(name, table["ef"].to_numpy(float)), text["patient"], text["split"])
             for name in ("view", "quality", "ef")]
    beats = table.loc[table["ed"] != table["es"]]
    instants = [lab.store.frames(i)[[row["ed"], row["es"]]] for i, row in beats.iterrows()]
    stills, phases = still(np.concatenate(instants), lab.frames), np.tile(["ED", "ES"], len(beats))
    twice = [beats[name].to_numpy(str).repeat(2) for name in ("patient", "split")]
    return [*tasks, Task("phase", stills, phases, *twice)]


def still(frames: np.ndarray, length: int) -> Tensor:
    """Images uint8 [n, S, S] -> clips [n, length, S, S] in which nothing moves, without copying."""
    return torch.from_numpy(frames)[:, None].expand(-1, length, -1, -1)


def group_weights(groups) -> Tensor:
    """Chances of being drawn, so that every group (view, quality, organ, folder) is drawn equally often.

    For `torch.multinomial` or a `WeightedRandomSampler`: the published answer to uneven organs in pre-training data.

    Args:
        groups: [n], the group of each clip.

    Returns:
        float64 [n], summing to 1: 1 / (number of groups · size of the clip's group).
    """
    _, group, size = np.unique(np.asarray(groups).astype(str), return_inverse=True, return_counts=True)
    return torch.from_numpy(1 / (len(size) * size[group]))
