"""A baseline: V-JEPA's step in the structure of the published code, written from its description.

The mathematics is that of `usjepa_nb.objectives.VJEPA` (a test holds losses and gradients equal); what differs is how
it is computed: grey values copied to three channels, every tubelet embedded by Conv3d and most then dropped, one pass
of encoder and predictor for each kind of mask, EMA and AdamW one parameter after another, masks made between the
steps, and the norm of every parameter's gradient read back at every step, for the log.
"""
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from usjepa_nb import objectives
from usjepa_nb.augment import standardise
from usjepa_nb.masking import Masks
from usjepa_nb.pretrain import parameter_groups
from usjepa_nb.vit import Encoder, gather


class ThreeChannels(nn.Module):
    """An encoder around the blocks of `ours`: Conv3d over three equal channels, positions, then the kept tokens."""

    def __init__(self, ours: Encoder):
        super().__init__()
        weight = ours.patch_embed.proj.weight
        self.proj = nn.Conv3d(3, ours.width, ours.tubelet, ours.tubelet)
        self.proj.weight.data = (weight / 3).repeat(1, 3, 1, 1, 1)
        self.proj.bias.data = ours.patch_embed.proj.bias.clone()
        self.register_buffer("pos_embed", ours.pos_embed)  # so that it moves to the device with the rest
        self.blocks, self.norm = ours.blocks, ours.norm

    def forward(self, clips: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.proj(clips).flatten(2).transpose(1, 2) + self.pos_embed
        if keep is not None:
            x = gather(x, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Published(nn.Module):
    """Takes over the weights of an objective (all blocks learning, published targets and loss, no LL)."""

    def __init__(self, objective: objectives.VJEPA):
        super().__init__()
        mine = copy.deepcopy(objective)
        self.p, self.grid = mine.p, mine.grid
        self.encoder, self.predictor = ThreeChannels(mine.encoder), mine.predictor
        self.target_encoder = ThreeChannels(mine.target_encoder).requires_grad_(False)

    def forward(self, grey: Tensor, kinds: list[Masks]) -> Tensor:
        x = standardise(grey).repeat(1, 3, 1, 1, 1)
        with torch.no_grad():
            h = F.layer_norm(self.target_encoder(x), (self.target_encoder.proj.out_channels,))
        loss = 0.0
        for kind, masks in enumerate(kinds):
            e = self.predictor(self.encoder(x, masks.context), masks, kind)
            loss = loss + (e - gather(h, masks.target)).abs().mean() / len(kinds)
        return loss


class Step:
    """Forward, backward, clipping, AdamW, EMA and the log, as published."""

    def __init__(self, objective: objectives.VJEPA, device="cpu"):
        self.model = Published(objective).to(device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=1e-5, foreach=False, fused=False)

    def __call__(self, grey: Tensor, generator: torch.Generator, autocast: torch.autocast) -> dict[str, float]:
        model = self.model
        kinds = [m.to(grey.device) for m in objectives.jepa_masks(model.p, model.grid, len(grey), None, generator)]
        with autocast:
            loss = model(grey, kinds)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), model.p.clip, foreach=False)
        log = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for theirs, mine in zip(model.encoder.parameters(), model.target_encoder.parameters(), strict=True):
                mine.mul_(0.998).add_((1 - 0.998) * theirs)
        return log | {"loss": float(loss.detach())}
