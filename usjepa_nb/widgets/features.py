"""What a token is like and whom it asks: principal components, cosine similarity, the probe's attention.

Everything is read from the folder of a run, where notebook 05 has left features and probe. Nothing here trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import figures
from ..probe import SegmentationProbe
from ..segment import labelled_rows, probing
from ..vit import Grid
from ..weights import read

# Colour scales that do not depend on red and green; both are known to matplotlib and to plotly.
SCALES = {"similarity": ("PuOr", -1.0, 1.0, "cosine"), "attention": ("cividis", 0.0, None, "share of the attention")}


@dataclass
class View:
    """What one frozen encoder makes of some clips.

    Attributes:
        features: [n, N, D], zeros where a token was left out; `seen`: bool [n, N].
        probe: what was trained on such features, or None where that is not on disk.
    """

    features: Tensor
    seen: Tensor
    probe: SegmentationProbe | None = None

    @cached_property
    def common(self) -> Tensor:
        """Mean feature of each place over the clips that see it, [N, D]: what every heart has there."""
        return self.features.sum(0) / self.seen.sum(0).clamp(min=1)[:, None]

    def clip(self, i: int, residual: bool = False) -> Tensor:
        """Features of clip `i`, [N, D]; with `residual` only what sets it apart from the other clips at each place."""
        return self.features[i] - self.common * residual


def load(lab, cell, rows: np.ndarray, fraction: int = 100) -> View:
    """Cached features of validation or test rows under one cell of the grid, and its probe where it is on disk.

    Raises:
        FileNotFoundError: no features there.
    """
    folder = lab.folder(lab.spec(cell.method, cell.lam, cell.freeze, fraction))
    path, kept = folder / "features.h5", folder / f"probe-{fraction}pc-{probing(lab, fraction)}.pt"
    if not path.exists():
        raise FileNotFoundError(f"{cell.id}: no features.h5 in its run's folder; delete the segmentation-*.npz beside "
                                "it and run notebook 05, which makes both")
    order = np.concatenate([lab.labelled(100), labelled_rows(lab)]).tolist()
    with h5py.File(path, "r") as file:
        features, seen = (torch.from_numpy(np.stack([file[name][order.index(r)] for r in rows]))
                          for name in ("features", "seen"))
    view, p = View(features.float(), seen), lab.profile
    if kept.exists():
        grid = p.grid(lab.frames)
        view.probe = SegmentationProbe(grid, p.tubelet_size, features.shape[-1], p.heads, p.probe_width)
        view.probe.load_state_dict(read(kept)["best"])
    return view


@torch.no_grad()
def attention_weights(probe: SegmentationProbe, features: Tensor, seen: Tensor, asking) -> Tensor:
    """Whom tokens listen to in a probe: softmax(q k / sqrt(d)) of each head, over the tokens that were seen.

    Args:
        features: of one clip [N, D]; `seen`: bool [N].
        asking: numbers of the asking tokens, [A].

    Returns:
        [heads, A, N]; every row sums to 1.
    """
    heads, attention = probe.attention.num_heads, probe.attention
    kv = probe.norm1((features.float() - probe.mean) / probe.std * seen[:, None])
    (wq, wk, _), (bq, bk, _) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k = F.linear(kv[asking] + probe.query, wq, bq), F.linear(kv, wk, bk)
    q, k = (v.view(len(v), heads, -1).transpose(0, 1) for v in (q, k))  # [heads, A or N, d]
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def similarity(features: Tensor, seen: Tensor, asking: int) -> Tensor:
    """Cosine between one token and all [N], each less the mean of the clip's tokens (which would make all alike)."""
    x = features - features[seen].mean(0)
    return F.cosine_similarity(x[asking], x, dim=-1)


@dataclass
class Tokens:
    """Clips and what several encoders make of them.

    Attributes:
        views: {method: View} of the same clips.
        frames: uint8 [n, T, H, W]; `spacings`: (y, x) in mm per pixel, [n, 2]; `names`: of the clips, [n].
        grid, tubelet: tokens along (t, y, x), and the pixels of one.
    """

    views: dict[str, View]
    frames: np.ndarray
    spacings: np.ndarray
    names: list[str]
    grid: Grid
    tubelet: Grid

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """What can be asked of a token: (text, name). Attention needs the probe of every method."""
        found = [("similarity", "similarity"), ("similarity, place removed", "similarity residual")]
        probes = [view.probe for view in self.views.values()]
        if all(probes):
            found += [("attention, mean of heads", "attention"),
                      *((f"attention, head {h}", f"attention {h}") for h in range(probes[0].attention.num_heads))]
        return found

    def values(self, method: str, clip: int, kind: str, token: Grid) -> np.ndarray:
        """What `token` (t, y, x) has with every token: [t, y, x], nan where one of the two was left out."""
        view, at = self.views[method], int(np.ravel_multi_index(token, self.grid))
        seen = view.seen[clip]
        if not seen[at]:
            return np.full(self.grid, np.nan)
        what, _, which = kind.partition(" ")
        if what == "similarity":
            found = similarity(view.clip(clip, residual=bool(which)), seen, at)
        else:
            weights = attention_weights(view.probe, view.features[clip], seen, [at])[:, 0]
            found = weights[int(which)] if which else weights.mean(0)
        return torch.where(seen, found, torch.nan).view(self.grid).numpy()

    def slices(self, clip: int) -> np.ndarray:
        """The first frame of every tubelet in time, uint8 [t, H, W]."""
        return self.frames[clip][:: self.tubelet[0]]

    def colours(self, method: str, clip: int, t: int, residual: bool = False):
        """One time slice beside its tokens as colours; the components are those of the whole clip."""
        view, seen = self.views[method], self.views[method].seen[clip].view(self.grid).numpy()
        features = view.clip(clip, residual).view(*self.grid, -1).numpy()
        rgba = np.zeros((*self.grid, 4))
        rgb, share = figures.principal_colours(features[seen])
        rgba[seen] = np.c_[rgb, np.ones(len(rgb))]
        figure, axes = self._panels(1, 2, clip, width=7)
        self._frame(axes[0, 0], clip, t)
        self._tokens(axes[0, 1], clip, rgba[t])
        figure.suptitle(f"{method}, {self.names[clip]}, t = {t}\nthree of {features.shape[-1]} directions hold "
                        f"{share:.0%} of the variance", fontsize=9)
        return figure

    def heat(self, method: str, clip: int, kind: str, token: Grid):
        """What `token` has with every token as a heat map under the slices in time; the token is framed."""
        values, (scale, low, high, unit) = self.values(method, clip, kind, token), SCALES[kind.split()[0]]
        figure, axes = self._panels(2, self.grid[0], clip, width=10)
        for t in range(self.grid[0]):
            self._frame(axes[0, t], clip, t)
            axes[0, t].set_title(f"t = {t}", fontsize=9)
            image = self._tokens(axes[1, t], clip, values[t], cmap=scale, vmin=low,
                                 vmax=np.nanmax(values, initial=1e-9) if high is None else high)
        for ax in axes[:, token[0]]:
            y, x = token[1] - 0.5, token[2] - 0.5
            ax.add_patch(figures.Rectangle((x, y), 1, 1, fill=False, edgecolor=figures.PALETTE["yellow"], linewidth=2))
        figure.colorbar(image, ax=axes[1, :], shrink=0.8, label=unit)
        figure.suptitle(f"{method}, {self.names[clip]}: {dict(map(reversed, self.kinds))[kind]}\n"
                        f"{describe(values, token, kind)}", fontsize=9)
        return figure

    def _panels(self, rows, columns, clip, width):
        (h, w), (y, x) = self.frames.shape[-2:], self.spacings[clip]
        return figures.panels(rows, columns, width=width, ratio=h * y / (w * x))

    def _tokens(self, ax, clip, image, **how):
        (_, high, wide), (y, x) = self.tubelet, self.spacings[clip]
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_facecolor("black")
        return ax.imshow(image, aspect=high * y / (wide * x), interpolation="nearest", **how)

    def _frame(self, ax, clip, t):
        edges = (-0.5, self.grid[2] - 0.5, self.grid[1] - 0.5, -0.5)  # in tokens, as the maps below
        self._tokens(ax, clip, self.slices(clip)[t], cmap="gray", vmin=0, vmax=255, extent=edges)


def describe(values: np.ndarray, token: Grid, kind: str) -> str:
    """A heat map [t, y, x] in one line of words."""
    if np.isnan(values[token]):
        return f"token {token} lies outside the sector: it was left out, choose another"
    if kind.startswith("attention"):
        w = values[~np.isnan(values)]
        spread = np.exp(-(w * np.log(w + 1e-12)).sum())
        return (f"token {token} gives {np.nansum(values[token[0]]):.0%} of its attention to its own time slice, "
                f"{values[token]:.1%} to itself, as if spread over {spread:.0f} of {len(w)} tokens")
    others = values.copy()
    others[token] = np.nan
    best = tuple(int(v) for v in np.unravel_index(np.nanargmax(others), others.shape))
    return (f"token {token} is most like {best}, cosine {others[best]:.2f}; "
            f"{np.mean(others[~np.isnan(others)] > 0.5):.0%} of the others lie above 0.5")
