"""Pre-training: objectives (V-JEPA with or without localisation loss, VideoMAE) and the one loop that trains them.

An objective is a module whose `forward(grey clips, generator)` returns named losses, "loss" among them, and whose
`after_step` does what follows an optimiser step (EMA). The loop does not know which objective it runs.
Every random choice of step k comes from a generator seeded with (seed, k), so a resumed run is the same run.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning_fabric import Fabric
from timm.scheduler import CosineLRScheduler
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from usjepa_nb import losses, masking, weights
from usjepa_nb.augment import standardise
from usjepa_nb.masking import rectangle, sector_tokens
from usjepa_nb.profile import Profile
from usjepa_nb.vit import Encoder, PixelDecoder, Predictor, gather


class Diverged(RuntimeError):
    """The loss is no longer a number; the last good checkpoint stays on disk."""


def step_generator(seed: int, step: int, rank: int = 0) -> Generator:
    """The generator of one step of one process. A running generator's state would have to be saved; this need not."""
    return Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)


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


class VJEPA(nn.Module):
    """V-JEPA (Eq. 1), with the localisation loss (Eq. 3) mixed in by `lam` (Eq. 4); lam = 1 is V-JEPA alone.

    Published V-JEPA is target_layers = 1, centre = 0: the target is the last layer, layer-normalised. Two switches
    keep a small run from collapsing onto position: targets averaged over blocks, and centred per position.
    """

    def __init__(self, p: Profile, frames: int, encoder: Encoder, lam: float, freeze: int):
        super().__init__()
        self.p, self.grid, self.lam = p, p.grid(frames), lam
        self.encoder = encoder
        self.encoder.freeze(freeze)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = Predictor(self.grid, p.width, p.predictor_width, p.predictor_depth, p.predictor_heads)
        self.head = losses.LocalisationHead(p.width) if lam < 1 else None
        self.register_buffer("position_sum", torch.zeros(1, math.prod(self.grid), p.width))
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
        jepa = ll = zero = x.new_zeros(())
        kinds = (self.p.short_range, self.p.long_range)
        for kind, (blocks, scale) in enumerate(kinds):
            masks = masking.multiblock(self.grid, len(x), generator, blocks=blocks, scale=scale, rule=self.p.mask_rule,
                                       allowed=None if allowed is None else allowed.cpu()).to(x.device)
            z = self.encoder(x, masks.context, masks.context_valid)
            e = self.predictor(z, masks, kind)
            wanted = gather(target, masks.target)
            jepa = jepa + losses.l_jepa(e, wanted, masks.target_valid, self.p.beta) / len(kinds)
            zero = zero + losses.mean_valid(wanted.abs().mean(-1), masks.target_valid) / len(kinds)
            if self.head is not None:
                ll = ll + losses.l_ll(self.head, e, masks, self.grid, self.p.pairs, generator) / len(kinds)
        return {"loss": losses.combined(jepa, ll, self.lam), "jepa": jepa, "ll": ll, "zero": zero}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Target <- m · target + (1 - m) · encoder, m rising linearly to 1."""
        start = self.p.ema or ema_start(self.p.steps)
        m = start + (1 - start) * step / self.p.steps
        torch._foreach_lerp_(list(self.target_encoder.parameters()), list(self.encoder.parameters()), 1 - m)


class VideoMAE(nn.Module):
    """VideoMAE: under a tube mask, a decoder predicts the standardised pixels of what is hidden."""

    def __init__(self, p: Profile, frames: int, encoder: Encoder):
        super().__init__()
        self.p, self.grid, self.encoder = p, p.grid(frames), encoder
        self.decoder = PixelDecoder(self.grid, p.tubelet_size, p.width, p.decoder_width, p.decoder_depth,
                                    p.decoder_heads)

    @property
    def features(self) -> Encoder:
        return self.encoder

    def forward(self, grey: Tensor, generator: Generator) -> dict[str, Tensor]:
        x = standardise(grey)
        allowed = sector_tokens(grey, self.p.tubelet_size).cpu() if self.p.sector_aware else None
        masks = masking.tube(self.grid, len(x), generator, ratio=self.p.tube_ratio, allowed=allowed,
                             rule=self.p.mask_rule).to(x.device)
        predicted = self.decoder(self.encoder(x, masks.context, masks.context_valid), masks)
        target = losses.pixel_targets(x, self.p.tubelet_size, masks.target)
        return {"loss": losses.l_pixel(predicted, target, masks.target_valid)}

    def after_step(self, step: int) -> None:
        """Nothing follows a step."""


def parameter_groups(module: nn.Module) -> list[dict]:
    """No weight decay on biases and other 1-D parameters."""
    params = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in params if p.ndim > 1]},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]


@torch.no_grad()
def monitors(features: Tensor) -> dict[str, float]:
    """Is it collapsing? Features [B, N, D] of several clips on the same grid ->

    std: mean standard deviation of a feature (0 = every token alike).
    rank: effective rank, exp(entropy of the covariance spectrum), once each position's mean is removed.
    position_share: share of the variance that the token's position alone explains (1 = content does not matter).
    """
    x = features.float()
    mean = x.mean(0, keepdim=True)
    content = (x - mean).flatten(0, 1)
    spectrum = torch.linalg.eigvalsh(content.T @ content).clamp(min=0)
    share = spectrum / spectrum.sum().clamp(min=1e-12)
    total = x.flatten(0, 1).var(0, unbiased=False).mean()
    return {"std": float(x.flatten(0, 1).std(0).mean()),
            "rank": float(torch.exp(-(share * (share + 1e-12).log()).sum())),
            "position_share": float(mean[0].var(0, unbiased=False).mean() / total.clamp(min=1e-12))}


def train(objective: nn.Module, batches: Callable[[Generator, int], object], p: Profile, path: Path, *, seed: int,
          fabric: Fabric, watch: Callable[[nn.Module], dict] | None = None) -> Iterator[dict]:
    """The loop: yields one history row per step, and writes `path` every `log_every` steps and at the end.

    Args:
        batches: (generator, batch size) -> what the objective takes, for pre-training grey clips [B, T, H, W].
        path: checkpoint; when it exists, training continues from it, exactly as if never interrupted.
        watch: extra columns for the history (monitors), computed every `log_every` steps.

    Raises:
        Diverged: loss or gradients not finite.
        OSError: a checkpoint cannot be written.
    """
    optimizer = torch.optim.AdamW(parameter_groups(objective), lr=p.lr, betas=(0.9, p.beta2),
                                  weight_decay=p.weight_decay)
    warmup = round(p.warmup * p.steps)  # warmup_prefix: the cosine begins where the warm-up ends: the peak is reached
    schedule = CosineLRScheduler(optimizer, t_initial=p.steps - warmup, lr_min=p.lr_end, warmup_t=warmup,
                                 warmup_lr_init=p.lr / 100, warmup_prefix=True, t_in_epochs=False)
    model, optimizer = fabric.setup(objective, optimizer)
    start, rows = resume(path, objective, optimizer)  # after setup: it moves weights to the device, not AdamW's state
    yield from rows
    for step in tqdm(range(start, p.steps), initial=start, total=p.steps, desc=path.parent.name,
                     disable=not fabric.is_global_zero):
        generator = step_generator(seed, step, fabric.global_rank)
        schedule.step_update(step)
        share = (1 + math.cos(math.pi * step / p.steps)) / 2  # from 1 to 0
        optimizer.param_groups[0]["weight_decay"] = p.weight_decay_end + (p.weight_decay - p.weight_decay_end) * share
        batch = fabric.to_device(batches(generator, p.batch // fabric.world_size))
        out = model(batch, generator)
        fabric.backward(out["loss"])
        norm = fabric.clip_gradients(model, optimizer, max_norm=p.clip, error_if_nonfinite=False)
        row = {"step": step + 1, "lr": optimizer.param_groups[0]["lr"], "grad_norm": float(norm)} | \
              {k: float(v.detach()) for k, v in out.items()}
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            kept = f"The last good checkpoint is {path}" if path.exists() else "No checkpoint had been written yet"
            raise Diverged(f"step {step + 1}: loss {row['loss']}, gradient norm {row['grad_norm']}: training "
                           f"diverged; lower lr ({p.lr}) or clip ({p.clip}). {kept}")
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step + 1)
        last = (step + 1) % p.log_every == 0 or step + 1 == p.steps
        rows.append(row | (watch(objective) if last and watch else {}))
        if last and fabric.is_global_zero:
            save(path, {"format": 1, "step": step + 1, **states(objective), "optimizer": optimizer.state_dict(),
                        "history": rows})
        yield rows[-1]


def states(objective: nn.Module) -> dict[str, dict]:
    """State per part, in the layout of the published checkpoints: encoder, target_encoder, predictor, …"""
    parts = {name: module.state_dict() for name, module in objective.named_children()}
    return parts | {"buffers": dict(objective.named_buffers(recurse=False))}


def resume(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple[int, list[dict]]:
    """Load the checkpoint `path` if it exists -> (steps done, history so far)."""
    if not path.exists():
        return 0, []
    file = weights.read(path)
    for name, module in objective.named_children():
        module.load_state_dict(file[name])
    for name, buffer in objective.named_buffers(recurse=False):
        buffer.copy_(file["buffers"][name])
    if optimizer is not None:
        optimizer.load_state_dict(file["optimizer"])
    return file["step"], file["history"]


def steps_done(path: Path) -> int:
    """Steps that the checkpoint `path` holds; 0 when there is none."""
    return weights.read(path)["step"] if path.exists() else 0


def save(path: Path, content: dict) -> None:
    """Write a checkpoint whole or not at all: to a temporary name, then moved."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch turns a full disk into a RuntimeError
        raise OSError(f"{path} could not be written ({str(e).splitlines()[0]}): see that its folder is writable and "
                      "has space, then run it again; it goes on from the last checkpoint") from e
    finally:
        part.unlink(missing_ok=True)
