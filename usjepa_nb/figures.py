"""Pictures of clips: masks over frames, errors, hidden tubelets, token offsets, features as colours.

Every function returns a `Figure` and shows nothing; curves and tables are in `charts`. Frames are uint8. They
are stored square while their pixels are not: give `spacing` (y, x) in mm and pictures have true proportions.
Grids of tokens are (t, y, x) and a tubelet spans (frames, pixels, pixels), as everywhere.
"""

import io

import matplotlib.figure
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from .camus import LABELS, UNLABELLED

# Okabe and Ito's palette: told apart with any kind of colour vision. The only place where colours are named.
PALETTE = {
    "black": "#000000", "orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73",
    "yellow": "#F0E442", "blue": "#0072B2", "vermillion": "#D55E00", "purple": "#CC79A7",
}  # fmt: skip
CLASS_COLOURS = {1: PALETTE["green"], 2: PALETTE["vermillion"], 3: PALETTE["sky"]}
TOKEN_COLOURS = {
    "visible": PALETTE["sky"], "hidden": PALETTE["orange"], "outside": PALETTE["black"], "unused": "#777777",
}  # fmt: skip
DARK_EDGE = [withStroke(linewidth=2.6, foreground="black")]  # makes white lines visible on white
ERROR_COLOURS = {"missed": PALETTE["sky"], "added": PALETTE["orange"], "wrong class": PALETTE["purple"]}


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that a notebook shows as it is and that pyplot never holds: nothing to close."""

    def _repr_png_(self):
        return png(self)


def png(figure):
    """A figure as PNG bytes; a palette of 256 colours (chosen far apart, for a legend's to be kept) halves its size."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    palette = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, 2, dither=Image.Dither.NONE)
    palette.save(small, "png", optimize=True)
    return small.getvalue()


def panels(rows, columns, width=10.0, ratio=1.0, extra=0.3):
    """An empty figure, `width` inches wide, and its axes [rows, columns] of height / width = `ratio`."""
    height = rows * (width / columns * ratio + extra) + 0.3  # a title above each panel, a legend below all
    figure = Figure(figsize=(width, height), dpi=80, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _ratio(frames, spacing):
    return frames.shape[-2] * spacing[0] / (frames.shape[-1] * spacing[1])


def _show(ax, frame, spacing, title=None):
    ax.imshow(frame, cmap="gray", vmin=0, vmax=255, aspect=spacing[0] / spacing[1])
    ax.set_xticks([])
    ax.set_yticks([])
    if title is not None:
        ax.set_title(str(title), fontsize=9)


def _paint(ax, classes, colours, opacity):
    """Fill the pixels of each class in its colour; extent and aspect stay those of the frame below."""
    rgba = np.zeros((*classes.shape, 4))
    for label, colour in colours.items():
        rgba[classes == label] = to_rgba(colour, opacity)
    extent = ax.get_images()[0].get_extent()
    ax.imshow(rgba, extent=extent, aspect=ax.get_aspect(), interpolation="nearest")


def _outline(ax, mask, width=1.2):
    for label in sorted(CLASS_COLOURS, reverse=True):  # the cavity last: its border is also the myocardium's
        if (mask == label).any():
            ax.contour(mask == label, [0.5], colors=CLASS_COLOURS[label], linewidths=width)


def draw_reference(ax, mask):
    """The outline of a reference, in white dashes over whatever is there."""
    for labels in ((1,), (1, 2), (3,)):  # the ring's inner border is the cavity's
        if (inside := np.isin(mask, labels)).any():
            ax.contour(inside, [0.5], colors="white", linewidths=1.3, linestyles="--").set_path_effects(DARK_EDGE)


def reference_line(label="reference"):
    """Its line in a legend."""
    return Line2D([], [], color="white", linestyle="dashed", path_effects=DARK_EDGE, label=label)


def _legend(figure, colours, names=None, lines=()):
    names = names or {}
    handles = [Patch(fc=colour, ec="gray", label=names.get(key, key)) for key, colour in colours.items()]
    handles += lines
    columns = min(len(handles), int(figure.get_figwidth() / 1.6))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def clip_strip(frames, masks=None, titles=None, spacing=(1, 1), columns=8):
    """All frames of a clip, in rows of `columns`, with the outlines of their masks where there are any.

    Args:
        frames: uint8 [F, H, W]; `masks` likewise (frames that are UNLABELLED get no outline).
        titles: one per frame; default: the frame's number in the clip, from 0.
    """
    columns = min(columns, len(frames))
    figure, axes = panels(-(-len(frames) // columns), columns, ratio=_ratio(frames, spacing))
    for i, ax in enumerate(axes.flat):
        if i >= len(frames):
            ax.set_axis_off()
            continue
        _show(ax, frames[i], spacing, i if titles is None else titles[i])
        if masks is not None:
            _outline(ax, masks[i], width=0.8)
    if masks is not None:
        _legend(figure, CLASS_COLOURS, LABELS)
    return figure


def overlay(frame, mask, reference=None, spacing=(1, 1), opacity=0.35, title=None):
    """One frame [H, W], its mask filled and outlined; a reference mask is outlined in dashes over it."""
    figure, axes = panels(1, 1, width=4.5, ratio=_ratio(frame, spacing), extra=0.6)
    draw_overlay(axes[0, 0], frame, mask, reference, spacing, opacity, title)
    _legend(figure, CLASS_COLOURS, LABELS, () if reference is None else [reference_line()])
    return figure


def draw_overlay(ax, frame, mask, reference=None, spacing=(1, 1), opacity=0.35, title=None):
    """What `overlay` shows, in a panel of another figure and without a legend."""
    _show(ax, frame, spacing, title)
    _paint(ax, mask, CLASS_COLOURS, opacity)
    _outline(ax, mask)
    if reference is not None:
        draw_reference(ax, reference)


def overlays_grid(frames, columns, spacings=None, row_titles=None, opacity=0.4):
    """The paper's Fig. 2: a row for each frame, a column for each method.

    Args:
        frames: uint8 [R, H, W].
        columns: {method: masks [R, H, W]}, in the order shown; "reference" belongs among them.
        spacings: [R, 2] mm per pixel (y, x): patients differ.
    """
    spacings = [(1, 1)] * len(frames) if spacings is None else spacings
    ratio = max(_ratio(frames, spacing) for spacing in spacings)
    figure, axes = panels(len(frames), 1 + len(columns), width=min(12, 1.8 * (1 + len(columns))), ratio=ratio)
    for r, (frame, spacing) in enumerate(zip(frames, spacings, strict=True)):
        _show(axes[r, 0], frame, spacing, "frame" if r == 0 else None)
        axes[r, 0].set_ylabel("" if row_titles is None else row_titles[r], fontsize=9)
        for ax, (method, masks) in zip(axes[r, 1:], columns.items(), strict=True):
            _show(ax, frame, spacing, method if r == 0 else None)
            _paint(ax, masks[r], CLASS_COLOURS, opacity)
            _outline(ax, masks[r], width=0.8)
    _legend(figure, CLASS_COLOURS, LABELS)
    return figure


def error_maps(frames, pred, true, spacing=(1, 1), titles=None, columns=8):
    """Where a prediction is wrong [F, H, W]: missed, added, or another class (UNLABELLED: never)."""
    figure = clip_strip(frames, None, titles, spacing, columns)
    kinds = np.select([(true == UNLABELLED) | (pred == true), pred == 0, true == 0], [0, 1, 2], 3)
    for ax, kind in zip(figure.axes, kinds, strict=False):
        _paint(ax, kind, dict(enumerate(ERROR_COLOURS.values(), 1)), 0.8)
    _legend(figure, ERROR_COLOURS)
    return figure


def _slices(frames, tubelet, grid, what):
    """The first frame of every tubelet in time; refuses a grid that is not the clip's."""
    expected = tuple(n // p for n, p in zip(frames.shape, tubelet, strict=True))
    if tuple(grid) != expected:
        raise ValueError(f"{what} has the grid {tuple(grid)}, but frames / tubelet = (t, y, x) = {expected}.")
    return frames[:: tubelet[0]]


def token_kinds(context, target, outside=None):
    """{"visible", "hidden", "outside", "unused": bool [t, y, x]}; every token is of one kind."""
    outside = np.zeros_like(target) if outside is None else outside & ~target & ~context
    visible = context & ~target
    return {"visible": visible, "hidden": target, "outside": outside, "unused": ~(visible | target | outside)}


def token_masks(frames, context, target, outside=None, tubelet=(2, 16, 16), spacing=(1, 1), columns=8):
    """The tubelets of a clip in each time slice: visible ones stay clear, hidden ones are covered.

    Args:
        frames: uint8 [F, H, W].
        context, target, outside: bool [t, y, x]: visible to the encoder, to be predicted, out of the sector.
            Tokens in none of the three were dropped to make a batch rectangular ("unused").
    """
    kinds = token_kinds(context, target, outside)
    figure = clip_strip(_slices(frames, tubelet, target.shape, "target"), None, None, spacing, columns)
    covers = {kind: TOKEN_COLOURS[kind] for kind in ("hidden", "outside", "unused")}
    codes = np.select([kinds[kind] for kind in covers], list(covers), "visible")
    for t, (ax, code) in enumerate(zip(figure.axes, codes, strict=False)):
        _paint(ax, code, covers, 0.75)
        ax.set_title(f"t = {t}: {int(target[t].sum())} hidden", fontsize=9)
    shown = {kind: covers.get(kind, "none") for kind, where in kinds.items() if where.any()}
    _legend(figure, shown, {kind: f"{kind} {int(where.sum())}" for kind, where in kinds.items()})
    return figure


def offsets(frames, pairs, true, predicted, tubelet=(2, 16, 16), spacing=(1, 1)):
    """Localisation pairs: where the first token lies, seen from the second, and where it is thought to.

    Args:
        frames: uint8 [F, H, W].
        pairs: int [n, 2], flat token numbers (m1, m2) in (t, y, x) order; one panel each, so n of 4 to 8.
        true, predicted: [n, 3] offsets m1 - m2 as in Eq. 2: (t, y, x), each divided by the grid's length.
    """
    grid = np.array([n // p for n, p in zip(frames.shape, tubelet, strict=True)])
    size = np.array(tubelet[1:])
    columns = min(4, len(pairs))
    figure, axes = panels(-(-len(pairs) // columns), columns, ratio=_ratio(frames, spacing), extra=0.5)
    for ax in axes.flat[len(pairs) :]:
        ax.set_axis_off()
    for ax, pair, steps, guess in zip(axes.flat, pairs, true * grid, predicted * grid, strict=False):
        cells = np.stack(np.unravel_index(pair, grid), 1)
        _show(ax, frames[cells[1, 0] * tubelet[0]], spacing)
        middle = (cells[1, 1:] + 0.5) * size - 0.5
        for cell, colour in zip(cells, (PALETTE["sky"], PALETTE["yellow"]), strict=True):
            y, x = cell[1:] * size - 0.5
            ax.add_patch(Rectangle((x, y), size[1], size[0], fill=False, edgecolor=colour, linewidth=1.5))
        for step, colour, style in ((steps, PALETTE["green"], "-"), (guess, PALETTE["orange"], "--")):
            tip = middle + step[1:] * size
            arrow = {"arrowstyle": "->", "color": colour, "linestyle": style, "linewidth": 1.8}
            ax.annotate("", xy=tip[::-1], xytext=middle[::-1], arrowprops=arrow, annotation_clip=False)
        text = ["(" + ", ".join(f"{value:+.1f}" for value in step) + ")" for step in (steps, guess)]
        ax.set_title(f"true {text[0]}\npredicted {text[1]} tokens", fontsize=8)
    boxes = {"first token": PALETTE["sky"], "second token": PALETTE["yellow"]}
    _legend(figure, boxes | {"true offset": PALETTE["green"], "predicted offset": PALETTE["orange"]})
    return figure


def principal_colours(tokens):
    """Three largest principal components of tokens [n, D] as red, green and blue.

    Returns:
        RGB [n, 3] in 0..1, cut at the 2nd and 98th percentile, and the share of the variance that the three hold.
    """
    tokens = tokens.astype(float)
    _, values, axes = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    axes = axes[:3] * np.sign(axes[:3].sum(1, keepdims=True))  # the sign of a component is free: fix it
    colours = (tokens - tokens.mean(0)) @ axes.T
    low, high = np.percentile(colours, [2, 98], axis=0)
    share = (values[:3] ** 2).sum() / max((values**2).sum(), 1e-12)
    return np.clip((colours - low) / (high - low + 1e-12), 0, 1), share


def pca_tokens(features, frames, keep=None, tubelet=(2, 16, 16), spacing=(1, 1), columns=8):
    """Tokens as colours: their three largest principal components as red, green and blue, over time.

    Args:
        features: [t, y, x, D]; `keep`: bool [t, y, x], tokens outside it have no feature and stay clear.
        frames: uint8 [F, H, W], shown in the row above.
    """
    grid = features.shape[:3]
    keep = np.ones(grid, bool) if keep is None else keep
    colours, share = principal_colours(features[keep])
    rgba = np.zeros((*grid, 4))
    rgba[keep] = np.c_[colours, np.ones(len(colours))]
    shown, ratio = _slices(frames, tubelet, grid, "features")[:columns], spacing[0] / spacing[1]
    figure, panel = panels(2, len(shown), ratio=_ratio(frames, spacing))
    for t, frame in enumerate(shown):
        _show(panel[0, t], frame, spacing, f"t = {t}")
        _show(panel[1, t], np.zeros_like(frame), spacing)
        panel[1, t].imshow(rgba[t], extent=panel[0, t].get_images()[0].get_extent(), aspect=ratio)
    figure.suptitle(f"three of {features.shape[-1]} directions hold {share:.0%} of the variance", fontsize=9)
    return figure
