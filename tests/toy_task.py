"""A task small enough to write down: two clips a patient, and a label that says how bright they are."""

import numpy as np
import torch

from usjepa_nb.tasks import Task


def toy(parts=("train",) * 12 + ("val",) * 6 + ("test",) * 6, *, classes=("dark", "grey", "white"), seed=0, **changes):
    """Patients in the given parts, labelled in turn; clips uint8 [2n, 4, 32, 32] whose grey level is the label."""
    level = np.arange(len(parts)) % len(classes)
    noise = torch.randint(0, 20, (2 * len(parts), 4, 32, 32), generator=torch.Generator().manual_seed(seed))
    clips = 20 + 200 * torch.from_numpy(level.repeat(2))[:, None, None, None] // len(classes) + noise
    task = {"name": "toy", "clips": clips.byte(), "labels": np.array(classes)[level].repeat(2),
            "groups": np.array([f"p{i}" for i in range(len(parts))]).repeat(2), "split": np.array(parts).repeat(2)}
    return Task(**task | changes)


def quantity(task):
    """The same clips, with their mean grey value as the label."""
    return Task("level", task.clips, task.clips.double().mean((1, 2, 3)).numpy(), task.groups, task.split)
