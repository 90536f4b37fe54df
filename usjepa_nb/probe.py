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
from usjepa_nb.profile import Profile
from usjepa_nb.store import require_space
from usjepa_nb.vit import Encoder, Grid, gather

CLASSES = len(LABELS)
OUTSIDE = -20.0  # logit of all classes but background outside the sector: a label there costs, but not infinitely


def autocast(precision: str, device) -> torch.autocast:
    """What Fabric does for a profile's `precision`."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16-mixed")


def encode(encoder: Encoder, grey: Tensor, sector_aware: bool) -> tuple[Tensor, Tensor]:
    """Grey clips 0…255 [B, T, H, W] -> features on the full grid [B, N, D] (zeros where left out), seen bool [B, N]."""
    x = standardise(grey)
    if not sector_aware:
        z = encoder(x)
        return z, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    seen = sector_tokens(grey, encoder.tubelet)
    keep, valid = (v.to(grey.device) for v in rectangle(seen.cpu(), "pad", Generator()))
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

    def forward(self, features: Tensor, seen: Tensor, kept: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`kept`, where it is known: the `rectangle` of `seen`, on its device. Tokens that were not seen do no work."""
        keep, valid = kept or (v.to(features.device) for v in rectangle(seen.cpu(), "pad", Generator()))
        x = (gather(features, keep).float() - self.mean) / self.std
        kv = self.norm1(x)
        x = x + self.attention(kv + self.query, kv, kv, key_padding_mask=~valid, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.on_grid(self.decode(x), keep, valid)

    def decode(self, x: Tensor) -> Tensor:
        """Two transposed convolutions, token by token: kernel = stride, so each is a matrix product.

        Tokens [B, K, D] -> logits [B, K, frames, classes, patch, patch] of each token's tubelet.
        """
        (_, hidden, f, _), s = self.up1.weight.shape, self.up2.stride[0]
        x = F.linear(x, self.up1.weight.permute(2, 3, 1, 0).flatten(0, 2), self.up1.bias.repeat(f * f))
        x = F.gelu(x).unflatten(-1, (f, f, hidden))
        x = F.linear(x, self.up2.weight.flatten(1).T, self.up2.bias.repeat_interleave(s * s))
        x = x.unflatten(-1, (-1, s, s)).permute(0, 1, 4, 2, 5, 3, 6)  # B, K, frame · class, (f, s), (f, s)
        return x.reshape(*x.shape[:2], self.tubelet[0], CLASSES, f * s, f * s)

    def on_grid(self, patches: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
        """Logits of the tokens `keep` [B, K, …] -> [B, classes, T, H, W]; tokens that were left out are background."""
        background = patches.new_full((CLASSES, 1, 1), OUTSIDE)
        background[0] = 0
        (t, y, x), B, each = self.grid, len(keep), patches.shape[2:]
        full = background.expand(B, t * y * x, *each).contiguous()
        known = valid.view(*valid.shape, 1, 1, 1, 1)  # padding points at tokens that were left out
        full.scatter_(1, keep.view(*keep.shape, 1, 1, 1, 1).expand_as(patches), torch.where(known, patches, background))
        full = full.view(B, t, y, x, *each).permute(0, 5, 1, 4, 2, 6, 3, 7)  # B, class, (t, frame), (y, row), (x, col)
        return full.reshape(B, CLASSES, t * each[0], y * each[2], x * each[3])


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
            encoder.to("cpu")
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
            logits = probe(cache.features[index].to(device), cache.seen[index])
        loss = segmentation_loss(logits.float(), masks[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % look == 0 or step == steps:
            dice = mean_dice(predict(probe, cache.features[val], cache.seen[val]), masks[val])
            history.append({"step": step, "loss": float(loss.detach()), "val_dsc": dice})
            if dice > best:
                best, best_state = dice, state()
    last_state = state()
    probe.load_state_dict(best_state)
    return {"best": best_state, "last": last_state, "history": history, "probe": probe}
