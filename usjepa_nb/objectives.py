"""What is learned: V-JEPA with or without localisation loss, SALT, and VideoMAE. How it is trained is in `pretrain`.

An objective is a module whose `forward(grey clips, generator)` returns named losses, "loss" among them, whose
`features` is the encoder to be probed, and whose `after_step` does what follows an optimiser step (EMA).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from usjepa_nb import losses, masking
from usjepa_nb.augment import standardise
from usjepa_nb.masking import Masks, rectangle, sector_tokens
from usjepa_nb.profile import Profile
from usjepa_nb.vit import Encoder, PixelDecoder, Predictor, gather


def make_encoder(p: Profile, frames: int, positions: str = "sincos3d") -> Encoder:
    return Encoder(p.grid(frames), p.tubelet_size, p.width, p.depth, p.heads, positions=positions)


def ema_start(steps: int, remains: float = 0.02) -> float:
    """First EMA momentum m such that, rising linearly to 1, a share `remains` of the first weights is left at the end.

    ln(remains) = sum of ln(m_k), about -(1 - m)·steps/2. The published 0.998 suits hundreds of thousands of steps;
    over 300 it would keep 0.998^300 = 55 % if held, and 74 % while rising, so the target would hardly learn.
    """
    return max(0.0, 1 + 2 * math.log(remains) / steps)


def standardise_tokens(x: Tensor, valid: Tensor | None) -> Tensor:
    """Zero mean, unit variance over the tokens of each clip, feature by feature (padding left out). [B, K, D]."""
    w = x.new_ones(x.shape[:2]) if valid is None else valid.to(x)
    w = (w / w.sum(1, keepdim=True))[..., None]
    mean = (x * w).sum(1, keepdim=True)
    var = ((x - mean).square() * w).sum(1, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


def jepa_masks(p: Profile, grid, batch: int, allowed: Tensor | None, generator: Generator) -> list[Masks]:
    """One of each kind the profile asks for: short and long range as published, or a tube mask."""
    rule = {"allowed": allowed, "rule": p.mask_rule}
    if p.mask == "tube":
        return [masking.tube(grid, batch, generator, ratio=p.hidden, **rule)]
    return [masking.multiblock(grid, batch, generator, blocks=blocks, scale=scale, **rule)
            for blocks, scale in (p.short_range, p.long_range)]


class VJEPA(nn.Module):
    """V-JEPA (Eq. 1), with the localisation loss (Eq. 3) mixed in by `lam` (Eq. 4); lam = 1 is V-JEPA alone.

    Published V-JEPA is target_layers = 1, centre = 0: the target is the last layer, layer-normalised. Two switches
    are meant to make a collapse onto position less likely: targets averaged over blocks, and centred per position.
    """

    def __init__(self, p: Profile, frames: int, encoder: Encoder, lam: float, freeze: int,
                 teacher: Encoder | None = None):
        super().__init__()
        self.p, self.grid, self.lam = p, p.grid(frames), lam
        self.encoder = encoder
        self.encoder.freeze(freeze)
        self.target_encoder = (teacher or copy.deepcopy(encoder)).requires_grad_(False)
        width = self.target_encoder.width
        self.predictor = Predictor(self.grid, p.width, p.predictor_width, p.predictor_depth, p.predictor_heads,
                                   target_width=width)
        located = width if p.ll_on == "predicted" else p.width
        self.head = losses.LocalisationHead(located) if lam < 1 else None
        self.register_buffer("position_sum", torch.zeros(1, math.prod(self.grid), width))
        self.register_buffer("position_count", torch.zeros(1, math.prod(self.grid), 1))

    @property
    def features(self) -> Encoder:
        """The encoder that is probed: the EMA target, as published."""
        return self.target_encoder

    @torch.no_grad()
    def targets(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """sg(EMA E_theta(y)): features of the whole clip x [B, 1, T, H, W] on the full grid, [B, N, D]."""
        keep, valid = (None, None) if allowed is None else rectangle(allowed.cpu(), "pad", Generator())
        keep, valid = (v if v is None else v.to(x.device) for v in (keep, valid))
        if self.p.target_layers == 1:
            h = self.target_encoder(x, keep, valid)
        else:
            outputs = self.target_encoder(x, keep, valid, layers=True)[-self.p.target_layers:]
            h = sum(standardise_tokens(o, valid) for o in outputs) / len(outputs)
        full, seen = h, h.new_ones(*h.shape[:2], 1)
        if keep is not None:  # back onto the grid; padding points at tokens outside the sector and carries zeros
            seen = valid[..., None].to(h)
            empty = h.new_zeros(len(h), math.prod(self.grid), 1)
            full = empty.expand(-1, -1, h.shape[-1]).scatter_add(1, keep[..., None].expand_as(h), h * seen)
            seen = empty.scatter_add(1, keep[..., None], seen)
        if self.p.centre:
            self.position_sum.mul_(self.p.centre).add_(full.sum(0, keepdim=True))
            self.position_count.mul_(self.p.centre).add_(seen.sum(0, keepdim=True))
            full = full - self.position_sum / (self.position_count + 1)
        return F.layer_norm(full, full.shape[-1:])

    def forward(self, grey: Tensor, generator: Generator) -> dict[str, Tensor]:
        """Grey clips 0…255 [B, T, H, W] -> {"loss", "jepa", "ll", "zero": what always predicting zero would cost}."""
        x = standardise(grey)
        allowed = sector_tokens(grey, self.p.tubelet_size) if self.p.sector_aware else None
        target = self.targets(x, allowed)
        jepa = ll = zero = spread = x.new_zeros(())
        kinds = self.masks(len(x), None if allowed is None else allowed.cpu(), generator)
        for kind, masks in enumerate(m.to(x.device) for m in kinds):
            z = self.encoder(x, masks.context, masks.context_valid)
            e = self.predictor(z, masks, kind)
            wanted = gather(target, masks.target)
            jepa = jepa + losses.l_jepa(e, wanted, masks.target_valid, self.p.beta) / len(kinds)
            zero = zero + losses.l_jepa(torch.zeros_like(e), wanted, masks.target_valid, self.p.beta) / len(kinds)
            if self.head is not None:
                located = (e, masks) if self.p.ll_on == "predicted" else (z, masks.swapped())
                ll = ll + losses.l_ll(self.head, *located, self.grid, self.p.pairs, generator) / len(kinds)
            if self.p.variance:
                spread = spread + losses.variance_covariance(z, masks.context_valid) / len(kinds)
        unused = 0 * sum(token.sum() for token in self.predictor.mask_tokens[len(kinds):])  # DDP wants every gradient
        return {"loss": losses.combined(jepa, ll, self.lam) + self.p.variance * spread + unused, "jepa": jepa, "ll": ll,
                "zero": zero}

    def masks(self, batch: int, allowed: Tensor | None, generator: Generator) -> list[Masks]:
        return jepa_masks(self.p, self.grid, batch, allowed, generator)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Target <- m · target + (1 - m) · encoder, m rising linearly to 1."""
        start = self.p.ema or ema_start(self.p.steps)
        m = start + (1 - start) * step / self.p.steps
        torch._foreach_lerp_(list(self.target_encoder.parameters()), list(self.encoder.parameters()), 1 - m)


class SALT(VJEPA):
    """Static-teacher asymmetric latent training (Li et al. 2025; US-JEPA): V-JEPA whose target never moves.

    The teacher may be of another width and depth. No EMA, and what is probed is the student.
    """

    @property
    def features(self) -> Encoder:
        return self.encoder

    def after_step(self, step: int) -> None:
        """The teacher stays as it is."""


class VideoMAE(nn.Module):
    """VideoMAE: under a tube mask, a decoder predicts the standardised pixels of what is hidden."""

    def __init__(self, p: Profile, frames: int, encoder: Encoder):
        super().__init__()
        self.p, self.grid, self.encoder = p, p.grid(frames), encoder
        self.decoder = PixelDecoder(self.grid, p.tubelet_size, encoder.width, p.decoder_width, p.decoder_depth,
                                    p.decoder_heads, positions=self.positions)

    @property
    def features(self) -> Encoder:
        return self.encoder

    @property
    def positions(self) -> str:
        return self.p.decoder_positions

    def forward(self, grey: Tensor, generator: Generator) -> dict[str, Tensor]:
        x = standardise(grey)
        allowed = sector_tokens(grey, self.p.tubelet_size).cpu() if self.p.sector_aware else None
        loss, kinds = 0.0, self.masks(len(x), allowed, generator)
        for masks in (m.to(x.device) for m in kinds):
            predicted = self.decoder(self.encoder(x, masks.context, masks.context_valid), masks)
            target = losses.pixel_targets(x, self.p.tubelet_size, masks.target)
            loss = loss + losses.l_pixel(predicted, target, masks.target_valid) / len(kinds)
        return {"loss": loss}

    def masks(self, batch: int, allowed: Tensor | None, generator: Generator) -> list[Masks]:
        return [masking.tube(self.grid, batch, generator, ratio=self.p.tube_ratio, allowed=allowed,
                             rule=self.p.mask_rule)]

    def after_step(self, step: int) -> None:
        """Nothing follows a step."""


class PixelTeacher(VideoMAE):
    """SALT's first stage: pixels again, but under V-JEPA's masks and with its positions."""

    positions = "sincos3d"

    def masks(self, batch: int, allowed: Tensor | None, generator: Generator) -> list[Masks]:
        return jepa_masks(self.p, self.grid, batch, allowed, generator)
