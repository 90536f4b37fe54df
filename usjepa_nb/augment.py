"""From stored bytes to what the encoder sees: uint8 clips -> augmented, standardised floats, on any device.

No horizontal flip in the default view: a mirrored four-chamber view shows the ventricles on the wrong sides.
`crop_and_flip` is the published view, kept to compare.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

MEAN, STD = 0.2, 0.2  # of grey values in [0, 1]; rounded from whole CAMUS frames, black surroundings included


def standardise(clips: Tensor) -> Tensor:
    """Grey values 0…255 [B, T, H, W] -> encoder input [B, 1, T, H, W]."""
    return ((clips.float() / 255 - MEAN) / STD)[:, None]


def affine(batch: int, generator: Generator, scale: tuple[float, float], rotate: float, aspect: float) -> Tensor:
    """Random views of the frame, one per clip: zoom, aspect, rotation (rad) and shift. -> [B, 2, 3] for grid_sample."""
    u = lambda low, high: torch.empty(batch).uniform_(low, high, generator=generator)  # noqa: E731
    sx = u(*scale)
    sy = sx * torch.exp(u(-aspect, aspect))
    angle = u(-rotate, rotate)
    tx = (1 - sx.clamp(max=1)) * u(-1, 1) * 0.8 + u(-0.08, 0.08)
    ty = (1 - sy.clamp(max=1)) * u(-1, 1) * 0.8 + u(-0.08, 0.08)
    rows = [torch.stack([sx * angle.cos(), -sy * angle.sin(), tx], 1),
            torch.stack([sx * angle.sin(), sy * angle.cos(), ty], 1)]
    return torch.stack(rows, 1)


def augment(clips: Tensor, generator: Generator, masks: Tensor | None = None, *,
            scale: tuple[float, float] = (0.6, 1.05), rotate: float = 0.2, aspect: float = 0.2,
            gamma: float = 0.4, gain: float = 0.25) -> tuple[Tensor, Tensor | None]:
    """One random view per clip, the same for all its frames (tissue motion must stay motion).

    Args:
        clips: uint8 or float grey values 0…255, [B, T, H, W].
        masks: labels [B, T, H, W], moved along (nearest neighbour).
        gamma, gain: log-gamma is drawn from ±gamma, gain from 1 ± gain.

    Returns:
        Grey values 0…255 as float [B, T, H, W], and the moved masks.
    """
    B, device = len(clips), clips.device
    theta = affine(B, generator, scale, rotate, aspect).to(device)
    grid = F.affine_grid(theta, [B, 1, *clips.shape[-2:]], align_corners=False)
    x = F.grid_sample(clips.float(), grid, align_corners=False)
    power = torch.empty(B, 1, 1, 1).uniform_(-gamma, gamma, generator=generator).exp().to(device)
    factor = torch.empty(B, 1, 1, 1).uniform_(1 - gain, 1 + gain, generator=generator).to(device)
    x = x.div_(255).clamp_(0, 1).pow_(power).mul_(factor).clamp_(0, 1).mul_(255)
    if masks is not None:
        masks = F.grid_sample(masks.float(), grid, mode="nearest", align_corners=False).to(masks.dtype)
    return x, masks


def crop_and_flip(clips: Tensor, generator: Generator, scale: tuple[float, float] = (0.3, 1.0),
                  ratio: tuple[float, float] = (0.75, 1.35)) -> Tensor:
    """The published V-JEPA view: random resized crop and, in half of the clips, a mirror image. Kept to compare.

    Whole pixels are cropped and enlarged bilinearly, as published; but one grey channel instead of three.

    Args:
        clips: uint8 or float grey values 0…255, [B, T, H, W].
        scale: share of the area that is cropped.
        ratio: width / height of the crop.
    """
    (H, W), n = clips.shape[-2:], len(clips)
    area, aspect, y, x, mirror = torch.rand(5, n, generator=generator).double()
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = (math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * aspect).exp()
    h, w = ((side * share.sqrt()).round().clamp(1, side).long()
            for side, share in ((H, area / aspect), (W, area * aspect)))
    top, left = (((side - part + 1) * u).long().tolist() for side, part, u in ((H, h, y), (W, w, x)))
    views = [F.interpolate(clip[:, None, i:i + a, j:j + b].float(), (H, W), mode="bilinear", align_corners=False)
             for clip, i, j, a, b in zip(clips, top, left, h.tolist(), w.tolist(), strict=True)]
    out = torch.stack(views)[:, :, 0]
    return torch.where((mirror < 0.5).to(clips.device).view(-1, 1, 1, 1), out.flip(-1), out)
