"""Masks to turn and change: a multi-block mask beside a tube mask, what a batch cuts away, the grid in 3-D.

Everything is drawn from one `Setting` by plain functions that return figures; `explorer` puts controls over them.
"""

from dataclasses import dataclass
from textwrap import fill

import numpy as np
import torch
from ipywidgets import Checkbox, Dropdown, FloatRangeSlider, FloatSlider, IntSlider
from torch import Generator, Tensor

from .. import charts, figures, masking
from ..masking import Masks
from ..vit import Grid
from . import explore

KINDS = ("multi-block", "tube")
NAMES = {"visible": "visible (clear)", "hidden": "hidden", "outside": "outside", "unused": "unused (cut away)"}
EYES = {"oblique": (1.6, -1.9, 1.0), "along t": (-2.2, 0.001, 0.001), "from above": (0.001, 0.001, 2.2),
        "from the side": (0.001, -2.2, 0.001)}  # where plotly's camera stands: turning needs no mouse


@dataclass(frozen=True)
class Setting:
    """Arguments of `masking.multiblock` and `masking.tube`, with the published values; one batch of clips.

    Attributes:
        blocks, scale, aspect, extent: of multi-block masks (short range: 8 blocks of 0.15).
        ratio: share of the area that a tube mask hides.
        seed: of the generator.
        batch: clips that share one rectangle; the first of them is shown.
        rule: how their rows are made equally long, see `masking`.
        sector: leave out the tokens beyond the ultrasound sector.
    """

    blocks: int = 8
    scale: float = 0.15
    aspect: tuple[float, float] = (0.75, 1.5)
    extent: float = 1.0
    ratio: float = 0.9
    seed: int = 0
    batch: int = 4
    rule: str = "first"
    sector: bool = True

    def draw(self, kind: str, grid: Grid, generator: Generator, inside: Tensor, rule: str | None = None) -> Masks:
        """Masks of the batch; inside: bool [B, N], tokens in the sector, B at least `batch`.

        Raises:
            ValueError: an unknown kind; fewer clips than the batch asks for; what `masking` refuses.
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if len(inside) < self.batch:
            raise ValueError(f"batch={self.batch}, and there are {len(inside)} clips: give more or lower batch")
        how = {"allowed": inside[:self.batch] if self.sector else None, "rule": rule or self.rule}
        if kind == "tube":
            return masking.tube(grid, self.batch, generator, ratio=self.ratio, **how)
        return masking.multiblock(grid, self.batch, generator, blocks=self.blocks, scale=self.scale,
                                  aspect=self.aspect, extent=self.extent, **how)


def on_grid(index: Tensor, grid: Grid, valid: Tensor | None = None) -> np.ndarray:
    """Token numbers [K] and their padding flags -> bool [t, y, x]."""
    where = np.zeros(grid, bool)
    where.flat[(index if valid is None else index[valid]).numpy()] = True
    return where


def tokens(setting: Setting, kind: str, grid: Grid, inside: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Context, target and outside of the batch's first clip, bool [t, y, x] each; the rest was cut away."""
    masks = setting.draw(kind, grid, Generator().manual_seed(setting.seed), inside)
    first = masks.take(torch.tensor([0]))
    valid = (None, None) if first.valid is None else (first.context_valid[0], first.target_valid[0])
    outside = ~inside[0].view(grid).numpy() & setting.sector
    return on_grid(first.context[0], grid, valid[0]), on_grid(first.target[0], grid, valid[1]), outside


def counts(context: np.ndarray, target: np.ndarray, outside: np.ndarray) -> dict:
    """Numbers of tokens of each kind, and the share of those allowed that is to be predicted."""
    n = {kind: int(where.sum()) for kind, where in figures.token_kinds(context, target, outside).items()}
    return n | {"share hidden": n["hidden"] / max(1, context.size - n["outside"])}


def targets_by_slice(setting: Setting, kind: str, grid: Grid, inside: Tensor, rule: str, draws: int = 20):
    """Targets per clip in each time slice, mean over batches: [t]. The draws of one seed are equal for all rules."""
    found = np.zeros(grid[0])
    for draw in range(draws):
        masks = setting.draw(kind, grid, Generator().manual_seed(1000 * setting.seed + draw), inside, rule)
        times = masks.target // (grid[1] * grid[2])
        times = times.flatten() if masks.target_valid is None else times[masks.target_valid]
        found += np.bincount(times.numpy(), minlength=grid[0])
    return found / draws / setting.batch


def picture(frames: np.ndarray, inside: Tensor, tubelet: Grid, setting: Setting, spacing=(1, 1)) -> figures.Figure:
    """Both kinds of mask on a clip, their counts, and what the published truncation does to them over time.

    Args:
        frames: uint8 [F, H, W], the batch's first clip.
        inside: bool [B, N], tokens in the sector of each clip of the batch.
    """
    grid = tuple(n // p for n, p in zip(frames.shape, tubelet, strict=True))
    tall = frames.shape[1] * spacing[0] / (frames.shape[2] * spacing[1] * grid[0])  # a strip's height / width
    beside = grid[0] <= 4  # two short strips share a row
    height = 5 * tall + 0.6 if beside else 2 * (10 * tall + 0.6)
    figure = figures.Figure(figsize=(10, height + 2.9), dpi=80, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[height, 2.9])
    strips, curves, rows = above.subplots(*((1, 2) if beside else (2, 1))), below.subplots(1, 3), {}
    for kind, strip, ax in zip(KINDS, strips, curves[1:], strict=True):
        try:
            parts = tokens(setting, kind, grid, inside)
            _bias(ax, setting, kind, grid, inside)
        except ValueError as impossible:  # such as blocks that leave nothing to see: it says what to change
            strip.text(0.5, 0.5, fill(str(impossible), 60), ha="center", va="center", fontsize=9)
            strip.set_axis_off()
            ax.set_axis_off()
            continue
        rows[kind] = counts(*parts)
        strip.set_title(f"{kind}: {rows[kind]['share hidden']:.0%} of the allowed tokens to predict", fontsize=10)
        image = covered(frames[::tubelet[0]], *parts)
        strip.imshow(image, aspect=spacing[0] / spacing[1])
        middles = image.shape[1] * (np.arange(grid[0]) + 0.5) / grid[0]
        strip.set_xticks(middles, [f"t = {t}" for t in range(grid[0])])
        strip.set_yticks([])
        strip.tick_params(length=0, labelsize=8)
        strip.spines[:].set_visible(False)
    _bars(curves[0], rows)
    return figure


def covered(frames: np.ndarray, context: np.ndarray, target: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Time slices side by side, visible tokens clear, the others covered by their colour.

    Args:
        frames: uint8 [t, H, W], one for each slice; context, target, outside: bool [t, y, x].

    Returns:
        RGB [H, t (W + gap) - gap, 3] in [0, 1], the gaps white.
    """
    (_, H, W), (_, y, x) = frames.shape, context.shape
    rgb = np.repeat(frames[..., None] / 255, 3, axis=-1)
    for kind, where in figures.token_kinds(context, target, outside).items():
        if kind != "visible":
            pixels = where.repeat(H // y, 1).repeat(W // x, 2)
            rgb[pixels] = 0.25 * rgb[pixels] + 0.75 * np.array(figures.to_rgba(figures.TOKEN_COLOURS[kind])[:3])
    gap = np.ones((H, max(1, W // 20), 3))
    return np.hstack([part for frame in rgb for part in (gap, frame)][1:])


def _bars(ax, rows):
    """Counts as a bar for each kind of mask, in the colours of the tokens; no colour without its number."""
    for y, n in enumerate(rows.values()):
        left = 0
        for kind, colour in figures.TOKEN_COLOURS.items():
            ax.barh(y, n[kind], left=left, color=colour, ec="white", label=NAMES[kind] if y == 0 else None)
            if n[kind]:
                ink = "black" if kind in ("visible", "hidden") else "white"
                ax.text(left + n[kind] / 2, y, n[kind], ha="center", va="center", color=ink, fontsize=8)
            left += n[kind]
    ax.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(1.5, -0.5), xticks=[])
    ax.set_title("tokens of the clip shown", fontsize=9)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=8, frameon=False)
    ax.spines[:].set_visible(False)


def _bias(ax, setting, kind, grid, inside):
    """Targets in each time slice, by rule."""
    styles = {"pad": ("black", ":", "", "pad: all of them"), "random": ("blue", "-", "s", "random: unbiased"),
              "first": ("vermillion", "-", "o", "first: published")}
    for rule, (colour, line, marker, label) in styles.items():
        found = targets_by_slice(setting, kind, grid, inside, rule)
        ax.plot(range(grid[0]), found, line, marker=marker, color=figures.PALETTE[colour], label=label)
    ax.set(xlabel="time slice t", xticks=range(grid[0]))
    ax.set_ylim(0, 1.55 * ax.get_ylim()[1])  # room for the legend
    ax.set_title(f"{kind}: targets per clip, batches of {setting.batch}", fontsize=9)
    ax.legend(fontsize=8, frameon=False, loc="upper left")


def solid(setting: Setting, kind: str, grid: Grid, inside: Tensor, eye: str = "oblique"):
    """`charts.token_grid3d` of the batch's first clip, seen from one of `EYES`.

    Raises:
        ValueError: what `Setting.draw` refuses.
    """
    figure = charts.token_grid3d(*tokens(setting, kind, grid, inside))
    return figure.update_layout(scene_camera={"eye": dict(zip("xyz", EYES[eye], strict=True))}, height=430,
                                title={"text": kind, "font_size": 14, "y": 0.98})


def explorer(clips: np.ndarray, tubelet: Grid, spacing=(1, 1), start: Setting | None = None):
    """Controls over `picture` and, below it, `solid`.

    Args:
        clips: uint8 [B, T, H, W], a batch at most as large as B; the first clip is shown.
        start: where the controls stand at first.

    Returns:
        The box of `widgets.explore`; `box.solid` is the 3-D figure, a plotly FigureWidget.
    """
    import plotly.graph_objects as go

    s = start or Setting(batch=min(4, len(clips)))
    inside = masking.sector_tokens(torch.from_numpy(clips), tubelet)
    grid = tuple(n // p for n, p in zip(clips.shape[1:], tubelet, strict=True))
    turned = go.FigureWidget(solid(s, KINDS[0], grid, inside))

    def draw(solid_mask, seen_from, **values):
        setting = Setting(**values)
        try:
            new = solid(setting, solid_mask, grid, inside, seen_from)
        except ValueError:  # `picture` says why; every token counts as cut away
            new = charts.token_grid3d(*np.zeros((2, *grid), bool)).update_layout(title_text="not possible")
        with turned.batch_update():
            for trace, source in zip(turned.data, new.data, strict=True):
                trace.update({part: source[part] for part in ("x", "y", "z", "name")})
            turned.layout.title.text = new.layout.title.text
            turned.layout.scene.camera.eye = dict(zip("xyz", EYES[seen_from], strict=True))
        return picture(clips[0], inside, tubelet, setting, spacing)

    calm = {"continuous_update": False}  # drawn when the slider is let go
    controls = {
        "blocks": IntSlider(s.blocks, 1, 12, **calm),
        "scale": FloatSlider(s.scale, min=0.05, max=0.7, step=0.05, **calm),
        "aspect": FloatRangeSlider(value=s.aspect, min=0.3, max=3, step=0.05, **calm),
        "extent": FloatSlider(s.extent, min=0.25, max=1, step=0.25, description="temporal extent", **calm),
        "ratio": FloatSlider(s.ratio, min=0.5, max=0.95, step=0.05, description="tube: share hidden", **calm),
        "seed": IntSlider(s.seed, 0, 30, **calm),
        "batch": IntSlider(s.batch, 1, len(clips), **calm),
        "rule": Dropdown(options=masking.RULES, value=s.rule, description="batch made rectangular"),
        "sector": Checkbox(s.sector, description="sector-aware"),
        "solid_mask": Dropdown(options=KINDS, description="3-D: mask"),
        "seen_from": Dropdown(options=list(EYES), description="3-D: seen from"),
    }
    box = explore(draw, **controls)
    box.children, box.solid = (*box.children, turned), turned
    return box
