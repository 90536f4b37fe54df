"""What is a frozen encoder worth? Features once, then a small attentive probe with two transposed convolutions.

The published attentive probe asks *one* learned question and gets one vector per clip. A segmentation needs an
answer per token, and the paper does not say how it made one; here every token asks: the learned query is added to
the token itself, all tokens answer. Two transposed convolutions then turn tokens into pixels.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from usjepa_nb.augment import standardise
from usjepa_nb.camus import LABELS, UNLABELLED
from usjepa_nb.masking import rectangle, sector_tokens
from usjepa_nb.parts import require_space
from usjepa_nb.profile import Profile
from usjepa_nb.vit import Encoder, Grid, gather

CLASSES = len(LABELS)
OUTSIDE = -20.0  # logit of all classes but background outside the sector: a label there costs, but not infinitely


def autocast(precision: str, device) -> torch.autocast:
    """What Fabric does for a profile's `precision`."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16-mixed")


def seen_tokens(encoder: Encoder, grey: Tensor, sector_aware: bool) -> Tensor:
    """Tokens of grey clips that an encoder is shown: those in the sector, or all. bool [B, N]."""
    if sector_aware:
        return sector_tokens(grey, encoder.tubelet)
    return torch.ones(len(grey), math.prod(encoder.grid), dtype=torch.bool, device=grey.device)


def encode(encoder: Encoder, grey: Tensor, sector_aware: bool, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Grey clips 0…255 [B, T, H, W] -> features on the full grid [B, N, D] (zeros where left out), seen bool [B, N].

    Args:
        seen: `seen_tokens`, where they are known. On the host, nothing has to be read back from a GPU.
    """
    x = standardise(grey)
    seen = seen_tokens(encoder, grey, sector_aware) if seen is None else seen
    if not sector_aware:
        return encoder(x), seen
    keep, valid = (v.to(grey.device, non_blocking=True) for v in rectangle(seen.cpu(), "pad", Generator()))
    z = encoder(x, keep, valid) * valid[..., None]
    full = z.new_zeros(len(z), seen.shape[1], z.shape[-1])
    return full.scatter_add(1, keep[..., None].expand_as(z), z), seen


class SegmentationProbe(nn.Module):
    """Attentive probe and shallow decoder: features [B, N, D] -> logits [B, classes, T, H, W] for every frame."""

    def __init__(self, grid: Grid, tubelet: Grid, width: int, heads: int, hidden: int):
        super().__init__()
        self.grid, self.tubelet = grid, tubelet
        self.register_buffer("mean", torch.zeros(width))  # of the training features, see `fit_scale`
        self.register_buffer("std", torch.ones(width))
        self.query = nn.Parameter(torch.zeros(width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        first = 2 ** math.ceil(math.log2(tubelet[1]) / 2)  # patch 16 = 4·4, patch 8 = 4·2
        second = tubelet[1] // first
        self.up1 = nn.ConvTranspose2d(width, hidden, first, first)
        self.up2 = nn.ConvTranspose2d(hidden, tubelet[0] * CLASSES, second, second)

    def fit_scale(self, features: Tensor, seen: Tensor) -> None:
        """Remember mean and spread of the training features, so that encoders of any scale are probed alike."""
        self.std, self.mean = (v.clone() for v in torch.std_mean(features[seen].float(), 0))
        self.std.clamp_(min=1e-6)

    def forward(self, features: Tensor, seen: Tensor) -> Tensor:
        """Logits of every pixel; where no token was seen, background."""
        return self.on_grid(*self.patches(features, seen))

    def patches(self, features: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the seen tokens alone [B, K, f, f, frames, classes, s, s], and their `rectangle`.

        The two transposed convolutions have kernel = stride, so each is a matrix product, token by token; of a
        token's patch of f·s pixels they make f × f blocks of s × s.
        """
        keep, valid = (v.to(features.device, non_blocking=True) for v in rectangle(seen.cpu(), "pad", Generator()))
        x = (gather(features, keep).float() - self.mean) / self.std
        kv = self.norm1(x)
        x = x + self.attention(kv + self.query, kv, kv, key_padding_mask=~valid, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        (_, hidden, f, _), s = self.up1.weight.shape, self.up2.stride[0]
        x = F.linear(x, self.up1.weight.permute(2, 3, 1, 0).flatten(0, 2), self.up1.bias.repeat(f * f))
        x = F.gelu(x).unflatten(-1, (f, f, hidden))
        x = F.linear(x, self.up2.weight.flatten(1).T, self.up2.bias.repeat_interleave(s * s))
        return x.unflatten(-1, (self.tubelet[0], CLASSES, s, s)), keep, valid

    def on_grid(self, patches: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
        """Logits of the tokens `keep`, see `patches` -> [B, classes, T, H, W]."""
        (t, y, x), (n, p, _), (B, _, *each) = self.grid, self.tubelet, patches.shape
        background = patches.new_full((CLASSES, 1, 1), OUTSIDE)
        background[0] = 0
        full = background.expand(B, t * y * x, *each).contiguous()
        known = valid.view(*valid.shape, *[1] * len(each))  # padding points at tokens that were left out
        full.scatter_(1, keep.view(known.shape).expand_as(patches), torch.where(known, patches, background))
        full = full.view(B, t, y, x, *each).permute(0, 7, 1, 6, 2, 4, 8, 3, 5, 9)
        return full.reshape(B, CLASSES, t * n, y * p, x * p)  # (t, frame), (y, f, s), (x, f, s)

    def loss(self, features: Tensor, seen: Tensor, masks: Tensor) -> Tensor:
        """`segmentation_loss` of `forward`, with the same gradients and fewer copies: the labels go to the tokens.

        Args:
            masks: uint8 [B, T, H, W].
        """
        patches, keep, valid = self.patches(features, seen)
        (t, y, x), (_, _, f, _, n, _, s, _) = self.grid, patches.shape
        labels = masks.view(-1, t, n, y, f, s, x, f, s).permute(0, 1, 3, 6, 4, 7, 2, 5, 8).flatten(4).flatten(1, 3)
        known, outside = labels != UNLABELLED, ~seen.to(labels.device, non_blocking=True)[..., None]
        missed = ((labels != 0) & known & outside).sum()  # labels outside the sector, at `on_grid`'s fixed logits
        labels = gather(labels, keep).masked_fill(~valid[..., None], UNLABELLED).flatten(0, 1).long()
        logits = patches.flatten(0, 1).movedim(4, 1).flatten(2)  # [tokens, classes, pixels of the tubelet]
        inside = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
        return (inside - OUTSIDE * missed) / known.sum()


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy per pixel; pixels without a reference do not count. Logits [B, classes, T, H, W]."""
    return F.cross_entropy(logits, masks.long(), ignore_index=UNLABELLED)


def classes(logits: Tensor) -> Tensor:
    """The likeliest class: logits [B, classes, T, H, W] -> uint8 [B, T, H, W]. (`max`: 7× as fast as `argmax` here.)"""
    return logits.max(1).indices.byte()


@torch.no_grad()
def mean_dice(predicted: Tensor, masks: Tensor) -> float:
    """Mean DSC over clips and the foreground classes that are there, to choose an epoch. [n, T, H, W] each."""
    known = masks != UNLABELLED
    per_class = []
    for label in range(1, CLASSES):
        p, m = (predicted == label) & known, masks == label
        total = p.flatten(1).sum(1) + m.flatten(1).sum(1)
        per_class.append(2 * (p & m).flatten(1).sum(1) / total)  # 0 / 0 = nan, as `metrics.dsc`
    return float(torch.stack(per_class).nanmean(0).nanmean())


class Cache:
    """Frozen features of clips, computed once: fp16 [n, N, D] and seen bool [n, N] in one HDF5 file.

    Raises:
        OSError: the file is absent or cut short.
    """

    def __init__(self, path: Path):
        try:
            with h5py.File(path, "r") as file:
                self.features = torch.from_numpy(file["features"][:])
                self.seen = torch.from_numpy(file["seen"][:])
        except (OSError, KeyError) as e:
            raise OSError(f"{path} cannot be read as cached features ({e}): delete it, it is made again") from e

    @staticmethod
    @torch.no_grad()
    def write(path: Path, encoder: Encoder, grey: np.ndarray, sector_aware: bool, device="cpu", batch: int = 16,
              precision: str = "32-true") -> Cache:
        """Encode uint8 clips [n, T, H, W] batch by batch into `path`, written whole or not at all.

        Raises:
            OSError: the disk has no space for it, or cannot be written.
        """
        part = path.with_suffix(f".{os.getpid()}.part")
        home = next(encoder.parameters()).device  # of a training that goes on, perhaps
        encoder = encoder.eval().to(device)
        shape = (len(grey), math.prod(encoder.grid), encoder.width)
        require_space(path.parent, 2 * math.prod(shape) + math.prod(shape[:2]) + 32_000)
        try:
            with h5py.File(part, "w") as file:
                features = file.create_dataset("features", shape, "f2")
                seen = file.create_dataset("seen", shape[:2], "?")
                for i in range(0, len(grey), batch):
                    with autocast(precision, device):
                        z, s = encode(encoder, torch.from_numpy(grey[i:i + batch]).to(device).float(), sector_aware)
                    features[i:i + batch], seen[i:i + batch] = z.half().cpu().numpy(), s.cpu().numpy()
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
            encoder.to(home)
        return Cache(path)


@torch.no_grad()
def predict(probe: SegmentationProbe, features: Tensor, seen: Tensor, batch: int = 16) -> Tensor:
    """Labels of every frame, uint8 [n, T, H, W]."""
    device = probe.mean.device
    parts = [classes(probe(features[i:i + batch].to(device), seen[i:i + batch])).cpu()
             for i in range(0, len(features), batch)]
    return torch.cat(parts)


def fit(cache: Cache, masks: Tensor, train: np.ndarray, val: np.ndarray, grid: Grid, p: Profile, *, seed: int,
        device="cpu") -> dict:
    """Train a probe on cached features of the clips `train`; follow the validation DSC of the clips `val`.

    Args:
        masks: uint8 [n, T, H, W], UNLABELLED where there is no reference.

    Returns:
        {"best": state, "last": state, "history": [{"step", "loss", "val_dsc"}], "probe": module with the best state}

    Raises:
        ValueError: there is nothing to train on, or nothing to choose the best step by.
    """
    if not len(train) or not len(val):
        raise ValueError(f"a probe needs labelled clips to train on and to validate on, not {len(train)} and "
                         f"{len(val)}: give the data set more patients, or split it otherwise")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = SegmentationProbe(grid, p.tubelet_size, cache.features.shape[-1], p.heads, p.probe_width)
    probe.fit_scale(cache.features[train], cache.seen[train])
    probe.to(device)
    features, there = cache.features.to(device), masks.to(device)  # once: fp16 and bytes, some GB at ViT-L
    per_epoch = math.ceil(len(train) / p.probe_batch)
    steps = max(p.probe_epochs * per_epoch, p.probe_min_steps)
    look = max(per_epoch, steps // 10)  # validate about ten times
    optimizer = torch.optim.AdamW(probe.parameters(), lr=p.probe_lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, best, history, order = Generator().manual_seed(seed), -1.0, [], torch.empty(0, dtype=torch.long)
    state = lambda: {k: v.detach().cpu().clone() for k, v in probe.state_dict().items()}  # noqa: E731
    for step in range(1, steps + 1):
        if not len(order):
            order = torch.from_numpy(train)[torch.randperm(len(train), generator=generator)]
        index, order = order[:p.probe_batch], order[p.probe_batch:]
        with autocast(p.precision, device):
            at = index.to(device, non_blocking=True)
            loss = probe.loss(features[at], cache.seen[index], there[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % look == 0 or step == steps:
            dice = mean_dice(predict(probe, features[torch.from_numpy(val).to(device)], cache.seen[val]), masks[val])
            history.append({"step": step, "loss": float(loss.detach()), "val_dsc": dice})
            if not dice <= best:  # nan, of masks without a heart, is taken as well
                best, best_state = dice, state()
    last_state = state()
    probe.load_state_dict(best_state)
    return {"best": best_state, "last": last_state, "history": history, "probe": probe}
