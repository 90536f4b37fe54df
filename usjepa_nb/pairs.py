"""Pairs of tokens: the true offset (Eq. 2) beside the one a localisation head predicts; in tokens, mm, frames, ms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor

from usjepa_nb import figures, losses
from usjepa_nb.lens import Tokens
from usjepa_nb.vit import Grid


@dataclass
class Pairs:
    """R ordered pairs of located tokens of one clip.

    Attributes:
        first, second: flat token indices, int64 [R].
        true, predicted: offsets first - second along (t, y, x), in tokens [R, 3].
    """

    first: Tensor
    second: Tensor
    true: Tensor
    predicted: Tensor

    @property
    def off(self) -> Tensor:
        """predicted - true, in tokens [R, 3]."""
        return self.predicted - self.true

    @property
    def error(self) -> Tensor:
        """Mean absolute error over the three axes, in tokens [R]."""
        return self.off.abs().mean(-1)

    def take(self, which: Tensor) -> Pairs:
        return Pairs(self.first[which], self.second[which], self.true[which], self.predicted[which])


def places(tokens: Tokens) -> Tensor:
    """Where the tokens of one clip lie, without padding: flat indices, int64 [K]."""
    valid = tokens.masks.target_valid
    return tokens.masks.target[0] if valid is None else tokens.masks.target[0][valid[0]]


def every_pair(index: Tensor, most: int = 20_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different tokens of `index` [K], or `most` of them drawn at random: two int64 [R]."""
    n = len(index)
    number = torch.arange(n * (n - 1))
    if len(number) > most:
        number = torch.randperm(len(number), generator=Generator().manual_seed(seed))[:most]
    first, second = number // (n - 1), number % (n - 1)
    return index[first], index[second + (second >= first)]


@torch.no_grad()
def answer(head: losses.LocalisationHead, tokens: Tokens, grid: Grid, first: Tensor, second: Tensor) -> Pairs:
    """What the head says of pairs of one clip's tokens; first, second: flat indices [R], all among `places`."""
    row = torch.full((int(np.prod(grid)),), -1)
    row[places(tokens)] = torch.arange(len(places(tokens)))
    valid = tokens.masks.target_valid
    e, lengths = (tokens.values[0] if valid is None else tokens.values[0][valid[0]]), torch.tensor(grid)
    return Pairs(first, second, losses.delta(first, second, grid) * lengths,
                 head(e[row[first]], e[row[second]]) * lengths)


def nearest(index: Tensor, wanted: int, grid: Grid) -> int:
    """The token of `index` [K] that lies nearest to the flat index `wanted`, in the same time slice if there is one."""
    apart = (losses.position(index, grid) - losses.position(torch.tensor(wanted), grid)).abs()
    return int(index[(apart * torch.tensor([sum(grid), 1, 1])).sum(-1).argmin()])


def one_token(lab, row: int) -> dict[str, float]:
    """A step of one token in a store row's clip: {"frames" of the sequence, "ms" (nan if unknown), "y", "x" in mm}."""
    p, meta = lab.profile, lab.store.table.loc[row]
    index = lab.store.clip(int(row), lab.frames, p.clip_rule, p.frame_step).index
    frames = p.tubelet * float(index[-1] - index[0]) / (len(index) - 1)
    rate = meta.frame_rate if meta.length > 2 and meta.frame_rate > 0 else float("nan")
    return {"frames": frames if meta.length > 2 else 1.0, "ms": 1000 * frames / rate,
            "y": float(p.patch * meta.spacing_y), "x": float(p.patch * meta.spacing_x)}


def in_plane(offset: Tensor, unit: dict[str, float]) -> Tensor:
    """Length within the image of offsets in tokens [..., 3] -> mm [...]; unit: see `one_token`."""
    return (offset[..., 1:] * offset.new_tensor([unit["y"], unit["x"]])).norm(dim=-1)


def mean_by(key: Tensor, value: Tensor, n: int) -> Tensor:
    """Mean of `value` [R] where `key` [R] is 0…n-1 -> [n], nan where it never is."""
    return value.new_zeros(n).index_add(0, key, value) / torch.bincount(key, minlength=n)


def numbers(pair: Pairs, unit: dict[str, float]) -> pd.DataFrame:
    """One pair: a row for each axis, the error in tokens and in the axis's own unit."""
    true, predicted, off = (v[0].tolist() for v in (pair.true, pair.predicted, pair.off))
    ms = "" if np.isnan(unit["ms"]) else f"{off[0] * unit['ms']:+.0f} ms, "
    physical = [f"{ms}{off[0] * unit['frames']:+.1f} frames", *(f"{off[k] * unit['tyx'[k]]:+.1f} mm" for k in (1, 2))]
    return pd.DataFrame({"true (tokens)": [f"{v:+.0f}" for v in true], "predicted": [f"{v:+.2f}" for v in predicted],
                         "error (tokens)": [f"{v:+.2f}" for v in off], "error": physical}, index=["Δt", "Δy", "Δx"])


def extremes(pairs: Pairs, grid: Grid, unit: dict[str, float], n: int = 3) -> pd.DataFrame:
    """The n hardest and the n easiest pairs, by `Pairs.error`."""
    order = pairs.error.argsort(descending=True, stable=True)
    few = pairs.take(torch.cat([order[:n], order[-n:]]))
    text = lambda rows, form: ["(" + ", ".join(form.format(v) for v in row) + ")" for row in rows.tolist()]  # noqa: E731
    return pd.DataFrame({
        "first (t, y, x)": text(losses.position(few.first, grid), "{}"),
        "second (t, y, x)": text(losses.position(few.second, grid), "{}"),
        "true (tokens)": text(few.true, "{:+.0f}"), "predicted": text(few.predicted, "{:+.1f}"),
        "error (tokens)": few.error.tolist(), "in the image (mm)": in_plane(few.off, unit).tolist(),
        "in time (frames)": (few.off[:, 0].abs() * unit["frames"]).tolist(),
        "in time (ms)": (few.off[:, 0].abs() * unit["ms"]).tolist(),
    }, index=[f"{what} {k + 1}" for what in ("hardest", "easiest") for k in range(len(order[:n]))]).round(2)


def error_maps(pairs: Pairs, grid: Grid, unit: dict[str, float]):
    """Mean error against distance, in the image (mm) and in time (frames), and place by place; a Figure."""
    figure, (axes,) = figures.panels(1, 3, width=10, ratio=0.75)
    step, frames = min(unit["y"], unit["x"]), unit["frames"]
    far, wrong, apart = in_plane(pairs.true, unit), in_plane(pairs.off, unit), pairs.true[:, 0].abs()
    for ax, key, distance, error, what in (
            (axes[0], (far / step).round().long(), far, wrong, "in the image (mm)"),
            (axes[1], apart.round().long(), apart * frames, pairs.off[:, 0].abs() * frames, "in time (frames)")):
        n = int(key.max()) + 1
        x, y = mean_by(key, distance, n), mean_by(key, error, n)
        seen = ~x.isnan()
        ax.plot(x[seen], x[seen], "--", color="gray", label="answering zero")
        ax.plot(x[seen], y[seen], "o-", markersize=4, color=figures.PALETTE["blue"], label="the head")
        ax.set_xlabel(f"distance {what}", fontsize=9)
        ax.set_title(f"mean error {what}", fontsize=9)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    area = grid[1] * grid[2]
    by_place = mean_by(torch.cat([pairs.first, pairs.second]) % area, wrong.repeat(2), area).view(grid[1:])
    image = axes[2].imshow(by_place, cmap="cividis", aspect=unit["y"] / unit["x"])
    axes[2].set(title="mean error of a place's pairs (mm)", xlabel="x (tokens)", ylabel="y (tokens)")
    axes[2].title.set_fontsize(9)
    figure.colorbar(image, ax=axes[2])
    return figure
