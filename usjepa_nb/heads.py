"""Heads that torch has to train: the attentive probe on frozen features, and fine-tuning of the encoder itself.

Both see training patients only; of about ten looks at the validation patients the best step is kept, and where there
are none the last.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from usjepa_nb.augment import augment
from usjepa_nb.probe import encode
from usjepa_nb.tasks import Task
from usjepa_nb.vit import Encoder


def mean_pool(features: Tensor, seen: Tensor) -> Tensor:
    """Mean over the seen tokens: [n, N, D] and bool [n, N] -> [n, D]."""
    return (features.float() * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)


class AttentiveProbe(nn.Module):
    """One learned query asks all tokens and answers once: the published probe (V-JEPA, Bardes et al. 2024).

    Features [B, N, D] and seen bool [B, N] -> [B, outputs].
    """

    def __init__(self, width: int, heads: int, outputs: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))  # of the training features, see `fit_scale`
        self.register_buffer("std", torch.ones(width))
        self.query = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, outputs)

    def fit_scale(self, features: Tensor, seen: Tensor) -> None:
        """Remember mean and spread of the training features, so that encoders of any scale are probed alike."""
        self.std, self.mean = (v.clone() for v in torch.std_mean(features[seen].float(), 0))
        self.std.clamp_(min=1e-6)

    def forward(self, features: Tensor, seen: Tensor) -> Tensor:
        kv = self.norm1((features.float() - self.mean) / self.std)
        query = self.query.expand(len(kv), -1, -1)
        x = query + self.attention(query, kv, kv, key_padding_mask=~seen, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class FineTuned(nn.Module):
    """A copy of the encoder that goes on learning under a linear head on mean-pooled features.

    Grey clips 0…255 [B, T, H, W] -> [B, outputs].
    """

    def __init__(self, encoder: Encoder, outputs: int, sector_aware: bool):
        super().__init__()
        self.encoder, self.sector_aware = copy.deepcopy(encoder).requires_grad_(True), sector_aware
        self.head = nn.Sequential(nn.LayerNorm(encoder.width), nn.Linear(encoder.width, outputs))

    def forward(self, grey: Tensor) -> Tensor:
        return self.head(mean_pool(*encode(self.encoder, grey, self.sector_aware)))


def attentive(task: Task, features: Tensor, seen: Tensor, heads: int, *, steps: int = 200, lr: float = 5e-4,
              seed: int = 0, device="cpu") -> np.ndarray:
    """Train an attentive probe and predict the test clips; returns as `linear.fit`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = AttentiveProbe(features.shape[-1], heads, outputs(task))
    train = task.part("train")
    probe.fit_scale(features[train], seen[train])
    inputs = lambda index, generator: (features[index].to(device), seen[index].to(device))  # noqa: E731
    return learn(probe.to(device), inputs, task, [{"params": probe.parameters(), "lr": lr}], steps, seed)


def fine_tuned(task: Task, encoder: Encoder, sector_aware: bool, *, steps: int = 100, lr: float = 1e-3,
               encoder_lr: float = 0.2, seed: int = 0, device="cpu") -> np.ndarray:
    """Train head and encoder (a copy: the given one stays as it is) on augmented clips and predict the test clips.

    Args:
        lr: of the head; the encoder learns at `encoder_lr` times this.

    Returns:
        As `linear.fit`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FineTuned(encoder, outputs(task), sector_aware).to(device)

    def inputs(index, generator):
        grey = task.clips[index]
        return ((grey if generator is None else augment(grey, generator)[0]).float().to(device),)

    groups = [{"params": model.head.parameters(), "lr": lr},
              {"params": model.encoder.parameters(), "lr": encoder_lr * lr}]
    return learn(model, inputs, task, groups, steps, seed)


def outputs(task: Task) -> int:
    return 1 if task.regression else len(task.classes)


def learn(model: nn.Module, inputs, task: Task, groups: list[dict], steps: int, seed: int,
          batch: int = 16) -> np.ndarray:
    """Train `model` on a task's training clips, keep the best step on validation, predict the test clips.

    Args:
        inputs: function (indices, generator) -> arguments of the model; generator None asks for plain clips.
        groups: parameter groups with their peak learning rates.
    """
    train, val, test = (torch.from_numpy(task.part(name)) for name in ("train", "val", "test"))
    device = next(model.parameters()).device
    y = torch.from_numpy(task.targets(np.arange(len(task.labels)))).to(device)
    if task.regression:
        spread, centre = torch.std_mean(y[train])
        loss_of = lambda z, index: F.mse_loss(z[:, 0], (y[index] - centre) / spread)  # noqa: E731
    else:
        weight = len(train) / torch.bincount(y[train]).float() / len(task.classes)  # as class_weight="balanced"
        loss_of = lambda z, index: F.cross_entropy(z, y[index], weight)  # noqa: E731

    @torch.no_grad()
    def predict(index):
        model.eval()
        z = torch.cat([model(*inputs(part, None)) for part in index.split(batch)])
        model.train()
        return z

    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, order = Generator().manual_seed(seed), train[:0]
    best, state = float("inf"), copy.deepcopy(model.state_dict())
    for step in range(1, steps + 1):
        if not len(order):
            order = train[torch.randperm(len(train), generator=generator)]
        index, order = order[:batch], order[batch:]
        loss = loss_of(model(*inputs(index, generator)), index)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if len(val) and (step % max(1, steps // 10) == 0 or step == steps):
            if (now := float(loss_of(predict(val), val))) < best:
                best, state = now, copy.deepcopy(model.state_dict())
    if len(val):
        model.load_state_dict(state)
    z = predict(test)
    return ((z[:, 0] * spread + centre) if task.regression else z.softmax(1)).cpu().numpy()
