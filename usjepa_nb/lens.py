"""LL under a lens: where does an answer to "how far apart are these two tokens?" come from?

A fresh localisation head is trained on *frozen* tokens of one kind and scored on clips it has not seen. What it can
do with tokens that hold a position and no image is its position-only baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from usjepa_nb import losses, masking
from usjepa_nb.augment import standardise
from usjepa_nb.masking import Masks
from usjepa_nb.objectives import VJEPA
from usjepa_nb.vit import gather

SOURCES = ("predicted", "predicted, encoder blanked", "context", "context, no image", "context, no position",
           "context, neither")


@dataclass
class Tokens:
    """Frozen tokens [n, K, D] and where they lie (`masks.target`, int64 [n, K], with padding flags)."""

    values: Tensor
    masks: Masks


@torch.no_grad()
def tokens(objective: VJEPA, grey: Tensor, source: str, generator: Generator) -> Tokens:
    """Tokens of grey clips [n, T, H, W] after pre-training.

    Args:
        source: "predicted" is what the paper locates, the predictor's output at the hidden places; "predicted, encoder
            blanked" the same with the encoder's features set to zero; "context" the encoder's visible tokens;
            "context, no image" the same for clips of one grey value; "context, no position" the same when the encoder
            is not told where they lie; "context, neither" with neither image nor position: all alike.

    Raises:
        ValueError: another source.
    """
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown: choose one of {', '.join(SOURCES)}")
    p = objective.p
    allowed = masking.sector_tokens(grey, p.tubelet_size).cpu() if p.sector_aware else None
    masks = objective.masks(len(grey), allowed, generator)[0]
    x = standardise(torch.zeros_like(grey) if source in ("context, no image", "context, neither") else grey)
    z = objective.encoder(x, masks.context, masks.context_valid, placed=source not in SOURCES[4:])
    if source.startswith("context"):
        return Tokens(z, masks.swapped())
    return Tokens(objective.predictor(z * (source == "predicted"), masks), masks)


def fresh_head(train: Tokens, objective: VJEPA, seed: int, generator: Generator, *, steps: int = 200, batch: int = 16,
               shuffled: bool = False, replacement: bool = True) -> losses.LocalisationHead:
    """A localisation head trained on frozen tokens: weights from `seed`, clips and pairs from `generator`.

    Args:
        steps, batch: `batch` clips a step.
        shuffled: train on the offsets of other pairs; a head that then still does well has found a leak.
        replacement: of the pairs of one clip.
    """
    grid, pairs = objective.grid, objective.p.pairs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = losses.LocalisationHead(train.values.shape[-1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = torch.randperm(len(train.values), generator=generator)[:batch]
        values, masks = train.values[some], train.masks.take(some)
        m1, m2 = losses.sample_pairs(masks, pairs, generator, replacement)
        truth = losses.delta(masks.target.gather(1, m1), masks.target.gather(1, m2), grid)
        truth = truth[:, torch.randperm(truth.shape[1], generator=generator)] if shuffled else truth
        loss = (head(gather(values, m1), gather(values, m2)) - truth).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


def offset_error(train: Tokens, test: Tokens, objective: VJEPA, seed: int, *,
                 head: losses.LocalisationHead | None = None, **options) -> Tensor:
    """Mean absolute error of predicted offsets along (t, y, x), in tokens -> [3].

    Args:
        head: score this head as it is, instead of training one.
        options: of `fresh_head`.
    """
    grid, generator = objective.grid, Generator().manual_seed(seed)
    if head is None:
        head = fresh_head(train, objective, seed, generator, **options)
    m1, m2 = losses.sample_pairs(test.masks, objective.p.pairs, generator)
    with torch.no_grad():
        answer = head(gather(test.values, m1), gather(test.values, m2))
    truth = losses.delta(test.masks.target.gather(1, m1), test.masks.target.gather(1, m2), grid)
    return ((answer - truth).abs() * torch.tensor(grid)).mean((0, 1))


def answering_zero(test: Tokens, objective: VJEPA, seed: int) -> Tensor:
    """The trivial baseline: the error of always saying "no offset", in tokens -> [3]."""
    blind = losses.LocalisationHead(test.values.shape[-1])
    for parameter in blind.mlp[-1].parameters():
        torch.nn.init.zeros_(parameter)
    return offset_error(test, test, objective, seed, head=blind)
