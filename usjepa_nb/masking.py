"""What is hidden and what is predicted: multi-block masks, tube masks, and the ultrasound sector.

A mask is a pair of index tensors into the flattened (t, y, x) grid. Clips of one batch hide different numbers
of tokens, but a batch must be rectangular; `rule` says how:

* "random": every clip is cut to the smallest count, tokens dropped at random. No place or time is favoured.
* "first": cut to the smallest count, the first in (t, y, x) order kept. This is what the published V-JEPA code
  does; it always drops the *latest* tubelets, so the end of the clip is hardly ever predicted.
* "pad": nothing is dropped; short rows are padded, and attention and losses skip the padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from usjepa_nb.vit import Grid, patchify

RULES = ("random", "first", "pad")


@dataclass
class Masks:
    """Context and target tokens of a batch. Padding flags are None when nothing is padded."""

    context: Tensor  # int64 [B, Kc]
    target: Tensor  # int64 [B, Kt]
    context_valid: Tensor | None = None  # bool [B, Kc]
    target_valid: Tensor | None = None  # bool [B, Kt]

    @property
    def valid(self) -> Tensor | None:
        """Padding flags of context followed by target, bool [B, Kc + Kt]."""
        return None if self.context_valid is None else torch.cat([self.context_valid, self.target_valid], 1)

    def swapped(self) -> Masks:
        """Context and target exchanged."""
        return Masks(self.target, self.context, self.target_valid, self.context_valid)

    def take(self, clips: Tensor) -> Masks:
        """Those of some clips, int64 [b]."""
        return Masks(*(v if v is None else v[clips] for v in vars(self).values()))

    def to(self, device) -> Masks:
        return Masks(*(v if v is None else v.to(device, non_blocking=True) for v in vars(self).values()))


def stack(kinds: list[Masks]) -> Masks:
    """Masks of several kinds below one another, as one batch, padded to the longest; what is padding is marked."""
    def below(index: list[Tensor], valid: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        K = max(i.shape[1] for i in index)
        valid = [torch.ones_like(i, dtype=torch.bool) if v is None else v for i, v in zip(index, valid, strict=True)]
        return tuple(torch.cat([F.pad(t, (0, K - t.shape[1])) for t in each]) for each in (index, valid))

    context, context_valid = below([m.context for m in kinds], [m.context_valid for m in kinds])
    target, target_valid = below([m.target for m in kinds], [m.target_valid for m in kinds])
    return Masks(context, target, context_valid, target_valid)


def apart(kinds: list[Masks]) -> Tensor:
    """Who may look at whom when the contexts of several kinds lie side by side: bool [B or 1, K, K], K their sum."""
    kind = torch.cat([torch.full_like(m.context[0], k) for k, m in enumerate(kinds)])
    same = kind[:, None] == kind
    if kinds[0].context_valid is None:
        return same[None]
    return same & torch.cat([m.context_valid for m in kinds], 1)[:, None]


def rectangle(chosen: Tensor, rule: str, generator: Generator) -> tuple[Tensor, Tensor | None]:
    """Chosen tokens bool [B, N] -> sorted indices int64 [B, K] and padding flags (None unless rule = "pad")."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown: choose one of {', '.join(RULES)}")
    counts = chosen.sum(1)
    order = torch.rand(chosen.shape, generator=generator) if rule == "random" else torch.arange(chosen.shape[1])
    rank = torch.where(chosen, order.to(torch.float64), math.inf).argsort(dim=1, stable=True)
    if rule != "pad":
        return rank[:, : int(counts.min())].sort(1).values, None
    K = int(counts.max())
    return rank[:, :K].contiguous(), torch.arange(K) < counts[:, None]


def make_masks(hidden: Tensor, allowed: Tensor | None, rule: str, generator: Generator) -> Masks:
    """Hidden tokens bool [B, N]: targets are the hidden ones, context the rest, both within `allowed` [B, N]."""
    allowed = torch.ones_like(hidden) if allowed is None else allowed
    context, context_valid = rectangle(allowed & ~hidden, rule, generator)
    target, target_valid = rectangle(allowed & hidden, rule, generator)
    return Masks(context, target, context_valid, target_valid)


def multiblock(grid: Grid, batch: int, generator: Generator, *, blocks: int, scale: float,
               aspect: tuple[float, float] = (0.75, 1.5), extent: float = 1.0, allowed: Tensor | None = None,
               rule: str = "random") -> Masks:
    """V-JEPA's multi-block mask: the union of `blocks` boxes is hidden, as published through the whole clip.

    Args:
        blocks, scale: short range is 8 blocks of 0.15 of the area, long range 2 blocks of 0.7 (V-JEPA, section 3).
        aspect: height / width of a block is drawn between these. One size per batch, positions per clip.
        extent: share of the clip's time slices that a block spans, above 0. V-JEPA: 1, all of them; below, each
            block begins at a time of its own.
        allowed: bool [B, N]; tokens outside (beyond the ultrasound sector) are neither context nor target.

    Raises:
        ValueError: an extent outside (0, 1]; the settings leave a clip without context or without target in 100 draws.
    """
    if not 0 < extent <= 1:
        raise ValueError(f"extent={extent} is no share of a clip's time slices: choose one above 0, at most 1")
    t, y, x = grid
    d = max(1, round(t * extent))
    ratio = float(torch.empty(()).uniform_(*aspect, generator=generator))
    h = min(y, max(1, round(math.sqrt(scale * y * x * ratio))))
    w = min(x, max(1, round(math.sqrt(scale * y * x / ratio))))
    times, rows, cols = torch.arange(t), torch.arange(y), torch.arange(x)
    allowed = torch.ones(batch, t * y * x, dtype=torch.bool) if allowed is None else allowed
    hidden = torch.zeros(batch, t * y * x, dtype=torch.bool)
    todo = torch.ones(batch, dtype=torch.bool)  # a clip is drawn again while its context or target is empty
    for _ in range(100):
        top = torch.randint(y - h + 1, (batch, blocks, 1), generator=generator)
        left = torch.randint(x - w + 1, (batch, blocks, 1), generator=generator)
        in_rows = (rows >= top) & (rows < top + h)  # [B, blocks, y]
        in_cols = (cols >= left) & (cols < left + w)  # [B, blocks, x]
        boxes = in_rows[..., None, :, None] & in_cols[..., None, None, :]  # [B, blocks, 1, y, x]
        if d < t:  # a block through the whole clip has no beginning to draw
            begin = torch.randint(t - d + 1, (batch, blocks, 1), generator=generator)
            boxes = boxes & ((times >= begin) & (times < begin + d))[..., None, None]  # [B, blocks, t, y, x]
        hidden = torch.where(todo[:, None], boxes.any(1).expand(batch, t, y, x).flatten(1), hidden)
        todo = ~((allowed & hidden).any(1) & (allowed & ~hidden).any(1))
        if not todo.any():
            return make_masks(hidden, allowed, rule, generator)
    raise ValueError(f"{blocks} blocks of scale {scale} on a {y}×{x} grid leave no context or no target: "
                     "lower blocks or scale, or use a finer patch")


def tube(grid: Grid, batch: int, generator: Generator, *, ratio: float = 0.9, allowed: Tensor | None = None,
         rule: str = "random") -> Masks:
    """VideoMAE's tube mask: one random spatial mask per clip, the same at every time; `ratio` of the area hidden.

    Raises:
        ValueError: a clip has fewer than two places in the sector, so nothing could be hidden and something shown.
    """
    t, y, x = grid
    floor = torch.ones(batch, y * x, dtype=torch.bool) if allowed is None else allowed.view(batch, t, -1).any(1)
    noise = torch.where(floor, torch.rand(batch, y * x, generator=generator), -1.0)
    rank = noise.argsort(1, descending=True).argsort(1)  # 0 for the largest noise within the sector
    count = floor.sum(1, keepdim=True)
    if count.min() < 2:
        raise ValueError(f"a {y}×{x} grid leaves a clip {int(count.min())} places in the sector, a tube mask needs 2: "
                         "use a finer patch or all tokens")
    hide = (count * ratio).long().clamp(min=1).minimum(count - 1)
    return make_masks((rank < hide).repeat(1, t), allowed, rule, generator)


def sector(clips: Tensor, level: float = 2) -> Tensor:
    """Where the scanner looked: clips [B, T, H, W] (grey values 0…255) -> bool [B, H, W].

    Dark blood inside must not fall out, so a pixel counts when anything brighter than `level` lies to its left
    and to its right at some time: an ultrasound sector is convex.
    """
    lit = (clips.amax(1) > level).byte()
    return (lit.cummax(-1).values & lit.flip(-1).cummax(-1).values.flip(-1)).bool()


def sector_tokens(clips: Tensor, tubelet: Grid, share: float = 0.05) -> Tensor:
    """Tokens with more than `share` of their pixels in the sector: clips [B, T, H, W] -> bool [B, t·y·x].

    Computed on the clip as the encoder sees it, that is *after* cropping. A clip with no such token (all black)
    keeps all of them, so that a batch never holds an empty row.
    """
    seen = sector(clips)[:, None, None].expand(-1, -1, clips.shape[1], -1, -1).float()
    inside = patchify(seen, tubelet).flatten(2).mean(-1) > share
    return inside | ~inside.any(1, keepdim=True)
