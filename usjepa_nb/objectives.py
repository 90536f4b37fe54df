"""What is learned: V-JEPA with or without localisation loss, SALT, and VideoMAE. How it is trained is in `pretrain`."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from usjepa_nb import losses, masking
from usjepa_nb.augment import standardise
from usjepa_nb.masking import Masks, apart, rectangle, sector_tokens, stack
from usjepa_nb.profile import Profile
from usjepa_nb.vit import Encoder, PixelDecoder, Predictor, gather


class Objective(nn.Module):
    """What the training loop knows: losses of a batch, and what follows an optimiser step.

    `prepare` is all that needs no gradient and no weights: views, masks, pairs. A GPU does it one step ahead, since the
    number of hidden tokens has to be read back. `features` is the encoder that is probed.
    """

    def prepare(self, batch, generator: Generator):
        """What `losses` takes, from a batch (of clips, or what else the objective learns from)."""
        raise NotImplementedError

    def losses(self, prepared) -> dict[str, Tensor]:
        """Named losses, "loss" among them."""
        raise NotImplementedError

    def forward(self, batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Both, one after the other; without a generator the batch has been prepared."""
        return self.losses(batch if generator is None else self.prepare(batch, generator))

    def after_step(self, step: int) -> None:
        """Nothing follows a step, unless an objective says so."""


@dataclass
class Prepared:
    """Clips and what is drawn for them."""

    clips: Tensor  # standardised [B, 1, T, H, W]
    kept: tuple[Tensor, Tensor] | None  # tokens in the sector [B, K] and their padding flags, see `masking.rectangle`
    kinds: list[Masks]  # one of each mask kind
    pairs: list[tuple[Tensor, Tensor]]  # of each kind, for the localisation loss


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


class VJEPA(Objective):
    """V-JEPA (Eq. 1), with the localisation loss (Eq. 3) mixed in by `lam` (Eq. 4); lam = 1 is V-JEPA alone.

    Published V-JEPA is target_layers = 1, centre = 0: the target is the last layer, layer-normalised. Two switches
    are meant to make a collapse onto position less likely: targets averaged over blocks, and centred per position.
    """

    def __init__(self, p: Profile, frames: int, encoder: Encoder, lam: float, freeze: int,
                 teacher: Encoder | None = None):
        super().__init__()
        self.p, self.grid, self.lam = p, p.grid(frames), lam
        encoder.freeze(freeze)
        self.encoder, self.target_encoder = encoder, teacher or copy.deepcopy(encoder)
        if teacher is None and freeze:  # what is frozen is the same in both: one copy of its weights
            self.target_encoder.patch_embed = encoder.patch_embed
            for i in range(freeze):
                self.target_encoder.blocks[i] = encoder.blocks[i]
        self.target_encoder.requires_grad_(False)
        self.encoder.requires_grad_(True).freeze(freeze)
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

    def prepare(self, grey: Tensor, generator: Generator) -> Prepared:
        """Grey clips 0…255 [B, T, H, W] -> standardised clips, masks and pairs, on the device of the clips."""
        allowed = sector_tokens(grey, self.p.tubelet_size).cpu() if self.p.sector_aware else None
        kinds = self.masks(len(grey), allowed, generator)
        pairs = []
        if self.head is not None:
            on = (m if self.p.ll_on == "predicted" else m.swapped() for m in kinds)
            pairs = [losses.sample_pairs(m, self.p.pairs, generator) for m in on]
        there = lambda *v: tuple(t.to(grey.device, non_blocking=True) for t in v)  # noqa: E731
        return Prepared(standardise(grey), self.kept(allowed, grey.device), [m.to(grey.device) for m in kinds],
                        [there(*two) for two in pairs])

    def masks(self, batch: int, allowed: Tensor | None, generator: Generator) -> list[Masks]:
        return jepa_masks(self.p, self.grid, batch, allowed, generator)

    def kept(self, allowed: Tensor | None, device) -> tuple[Tensor, Tensor] | None:
        """Tokens that the target encoder works on: those in the sector, bool [B, N], or all (None)."""
        return None if allowed is None else tuple(v.to(device) for v in rectangle(allowed.cpu(), "pad", Generator()))

    def targets(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """sg(EMA E_theta(y)): features of the whole clip x [B, 1, T, H, W] on the full grid, [B, N, D]."""
        return self.targets_of(x, self.kept(allowed, x.device))

    @torch.no_grad()
    def targets_of(self, x: Tensor, kept: tuple[Tensor, Tensor] | None) -> Tensor:
        """`targets`, for tokens that are known."""
        keep, valid = kept or (None, None)
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

    def losses(self, prepared: Prepared) -> dict[str, Tensor]:
        """-> {"loss", "jepa", "ll", "zero": what always predicting zero would cost}, means over the mask kinds."""
        x, kinds = prepared.clips, prepared.kinds
        target = self.targets_of(x, prepared.kept)
        jepa = ll = zero = spread = x.new_zeros(())
        for kind, (masks, z, e) in enumerate(self.predictions(x, kinds)):
            wanted = gather(target, masks.target)
            jepa = jepa + losses.l_jepa(e, wanted, masks.target_valid, self.p.beta) / len(kinds)
            zero = zero + losses.l_jepa(torch.zeros_like(e), wanted, masks.target_valid, self.p.beta) / len(kinds)
            if self.head is not None:
                located = (e, masks) if self.p.ll_on == "predicted" else (z, masks.swapped())
                if self.p.ll_on == "unplaced":
                    visible = self.encoder(x, masks.context, masks.context_valid, placed=False)
                    located = visible, masks.swapped()
                ll = ll + losses.l_ll(self.head, *located, self.grid, prepared.pairs[kind]) / len(kinds)
            if self.p.variance:
                spread = spread + losses.variance_covariance(z, masks.context_valid) / len(kinds)
        unused = 0 * sum(token.sum() for token in self.predictor.mask_tokens[len(kinds):])  # DDP wants every gradient
        return {"loss": losses.combined(jepa, ll, self.lam) + self.p.variance * spread + unused, "jepa": jepa, "ll": ll,
                "zero": zero}

    def predictions(self, x: Tensor, kinds: list[Masks]) -> list[tuple[Masks, Tensor, Tensor]]:
        """Context features z and predictions e for each mask kind, with the masks that they belong to.

        In one pass (the profile's `one_pass`) the encoder sees the contexts of all kinds side by side, each attending
        to itself; the predictor, whose sequences are about as long for every kind, sees the kinds as one batch.
        """
        if not self.p.one_pass or len(kinds) == 1:
            seen = ((kind, masks, self.encoder(x, masks.context, masks.context_valid))
                    for kind, masks in enumerate(kinds))
            return [(masks, z, self.predictor(z, masks, kind)) for kind, masks, z in seen]
        z = self.encoder(x, torch.cat([m.context for m in kinds], 1), apart(kinds))
        z = z.split([m.context.shape[1] for m in kinds], 1)
        masks, n = stack(kinds), len(x)
        below = torch.cat([F.pad(part, (0, 0, 0, masks.context.shape[1] - part.shape[1])) for part in z])
        e = self.predictor(below, masks, torch.arange(len(kinds), device=x.device).repeat_interleave(n)).split(n)
        return [(m, part, each[:, :m.target.shape[1]]) for m, part, each in zip(kinds, z, e, strict=True)]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Target <- m · target + (1 - m) · encoder, m rising linearly to 1."""
        start = self.p.ema or ema_start(self.p.steps)
        m = start + (1 - start) * step / self.p.steps
        pairs = zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True)
        ours, theirs = zip(*((t, o) for t, o in pairs if t is not o), strict=True)
        torch._foreach_lerp_(ours, theirs, 1 - m)


class SALT(VJEPA):
    """Static-teacher asymmetric latent training (Li et al. 2025; US-JEPA): V-JEPA whose target never moves.

    The teacher may be of another width and depth. No EMA, and what is probed is the student.
    """

    @property
    def features(self) -> Encoder:
        return self.encoder

    def after_step(self, step: int) -> None:
        """The teacher stays as it is."""


class VideoMAE(Objective):
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

    def prepare(self, grey: Tensor, generator: Generator) -> Prepared:
        """Grey clips 0…255 [B, T, H, W] -> standardised clips and masks, on the device of the clips."""
        allowed = sector_tokens(grey, self.p.tubelet_size).cpu() if self.p.sector_aware else None
        kinds = self.masks(len(grey), allowed, generator)
        return Prepared(standardise(grey), None, [m.to(grey.device) for m in kinds], [])

    def losses(self, prepared: Prepared) -> dict[str, Tensor]:
        x, loss = prepared.clips, 0.0
        for masks in prepared.kinds:
            predicted = self.decoder(self.encoder(x, masks.context, masks.context_valid), masks)
            target = losses.pixel_targets(x, self.p.tubelet_size, masks.target)
            loss = loss + losses.l_pixel(predicted, target, masks.target_valid) / len(prepared.kinds)
        return {"loss": loss}

    def masks(self, batch: int, allowed: Tensor | None, generator: Generator) -> list[Masks]:
        return [masking.tube(self.grid, batch, generator, ratio=self.p.tube_ratio, allowed=allowed,
                             rule=self.p.mask_rule)]


class PixelTeacher(VideoMAE):
    """SALT's first stage: pixels again, but under V-JEPA's masks and with its positions."""

    positions = "sincos3d"

    def masks(self, batch: int, allowed: Tensor | None, generator: Generator) -> list[Masks]:
        return jepa_masks(self.p, self.grid, batch, allowed, generator)
