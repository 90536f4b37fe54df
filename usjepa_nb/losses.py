"""The losses, each next to its equation. Equation numbers are those of Ellis et al. (the localisation-loss paper)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from usjepa_nb.masking import Masks
from usjepa_nb.vit import Grid, gather, patchify


def mean_valid(per_token: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of [B, K] over the tokens that are not padding."""
    return per_token.mean() if valid is None else (per_token * valid).sum() / valid.sum()


def l_jepa(predicted: Tensor, target: Tensor, valid: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """Eq. 1: || P_phi(E_theta(x), Delta y) - sg(EMA E_theta(y)) ||_1 on the masked tokens.

    The paper writes a norm; like the published code we average over tokens and features, so that the value does
    not grow with the mask. `beta` > 0 makes it a smooth L1 (quadratic below beta), which the paper does not use.

    Args:
        predicted, target: [B, K, D].
        valid: bool [B, K], False on padding.
    """
    return mean_valid(F.smooth_l1_loss(predicted, target.detach(), beta=beta, reduction="none").mean(-1), valid)


def position(index: Tensor, grid: Grid) -> Tensor:
    """Flat token index [...] -> (t, i, j) coordinates in tokens, [..., 3]."""
    _, y, x = grid
    return torch.stack([index // (y * x), index // x % y, index % x], -1)


def delta(index1: Tensor, index2: Tensor, grid: Grid) -> Tensor:
    """Eq. 2: ((t1 - t2)/t, (i1 - i2)/i, (j1 - j2)/j), each in [-1, 1]. Indices [B, P] -> [B, P, 3]."""
    steps = position(index1, grid) - position(index2, grid)
    return torch.stack([steps[..., k] / n for k, n in enumerate(grid)], -1)


def sample_pairs(masks: Masks, pairs: int, generator: Generator, replacement: bool = True) -> tuple[Tensor, Tensor]:
    """R_100: positions of both members of `pairs` random pairs among the masked tokens, two int64 [B, pairs].

    Drawn with replacement unless told otherwise (the paper does not say); padding is never drawn. Without it, no
    ordered pair comes twice and no token meets itself, as long as a clip has that many pairs.

    Raises:
        ValueError: without replacement, a clip has one token.
    """
    B, K = masks.target.shape
    count = torch.full((B,), K) if masks.target_valid is None else masks.target_valid.sum(1).cpu()
    if replacement:
        draw = (torch.rand(2, B, pairs, generator=generator) * count.view(-1, 1)).long()
    elif count.min() < 2:
        raise ValueError("a clip has one masked token, which makes no pair: draw with replacement, or hide more")
    else:  # number the ordered pairs of different tokens 0…n(n-1)-1 and take the first of a random order
        order = [torch.randperm(int(n * (n - 1)), generator=generator) for n in count]
        number = torch.stack([o.repeat(-(-pairs // len(o)))[:pairs] for o in order])
        first, second = number // (count.view(-1, 1) - 1), number % (count.view(-1, 1) - 1)
        draw = torch.stack([first, second + (second >= first)])
    m1, m2 = draw.to(masks.target.device)
    return m1, m2


class LocalisationHead(nn.Module):
    """F(.): an MLP of three fully connected layers, [e_m1; e_m2] [..., 2D] -> predicted offset [..., 3].

    Width and activation are not in the paper; here 256 and GELU.
    """

    def __init__(self, width: int, hidden: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, 3))

    def forward(self, e_m1: Tensor, e_m2: Tensor) -> Tensor:
        return self.mlp(torch.cat([e_m1, e_m2], -1))


def l_ll(head: LocalisationHead, predicted: Tensor, masks: Masks, grid: Grid, pairs: int | tuple[Tensor, Tensor],
         generator: Generator | None = None) -> Tensor:
    """Eq. 3: mean over all pairs of || F([e_m1; e_m2]) - Delta_m1,m2 ||_2^2.

    The formula is a squared norm, the *sum* over the three axes; the text calls it a mean squared error, which
    would be a third of it. We take the formula. Dividing by 3 equals the formula at another weight:
    lam' = lam / (lam + (1 - lam) / 3), so 0.25 would act like 0.5.

    Args:
        predicted: predictor outputs e on the masked tokens, [B, Kt, D].
        pairs: how many to draw with the generator, or drawn ones (`sample_pairs`).
    """
    m1, m2 = sample_pairs(masks, pairs, generator) if isinstance(pairs, int) else pairs
    offset = head(gather(predicted, m1), gather(predicted, m2))
    truth = delta(masks.target.gather(1, m1), masks.target.gather(1, m2), grid)
    return (offset - truth).square().sum(-1).mean()


def combined(jepa: Tensor, ll: Tensor, lam: float) -> Tensor:
    """Eq. 4: lam · L_jepa + (1 - lam) · L_ll."""
    return lam * jepa + (1 - lam) * ll


def variance_covariance(z: Tensor, valid: Tensor | None = None) -> Tensor:
    """VICReg's guard against collapse (Bardes et al., 2022, Eq. 1 and 3), over all tokens z [B, K, D] of a batch.

    A hinge on each feature's standard deviation at 1, and a twenty-fifth of the sum of its squared covariances with the
    other features, both averaged over features (VICReg's weights 25 and 1).
    """
    x = z.flatten(0, 1)
    counts = x.new_ones(len(x), 1) if valid is None else valid.flatten()[:, None].to(x)
    x = x.where(counts > 0, 0)  # not x[valid]: how many rows that has would be read back from a GPU
    x = (x - x.sum(0) / counts.sum()) * counts
    covariance = x.T @ x / (counts.sum() - 1)
    std = (covariance.diagonal() + 1e-4).sqrt()
    off = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - std).mean() + off / x.shape[-1] / 25


def pixel_targets(clips: Tensor, tubelet: Grid, index: Tensor) -> Tensor:
    """VideoMAE's labels: pixels of the masked tubelets, standardised per tubelet and channel. -> [B, K, pt·ph·pw·C].

    Pixels come in (pt, ph, pw, C) order, as in the published head.
    """
    patches = patchify(clips, tubelet)
    picked = gather(patches.flatten(2), index).view(*index.shape[:1], index.shape[1], clips.shape[1], -1)
    mean, std = picked.mean(-1, keepdim=True), picked.var(-1, keepdim=True).sqrt()
    return ((picked - mean) / (std + 1e-6)).transpose(2, 3).flatten(2)


def l_pixel(predicted: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """VideoMAE: mean squared error on the standardised pixels of the masked tubelets, [B, K, P] each."""
    return mean_valid((predicted - target).square().mean(-1), valid)
