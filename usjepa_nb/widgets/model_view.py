"""What the model sees of one sequence: which frames, which of them twice, how augmented, with which numbers.

`see` cuts and augments as a training batch does, `picture` draws it, `explorer` puts controls over the picture.
"""

from dataclasses import dataclass

import numpy as np
import torch
from ipywidgets import Dropdown, FloatSlider, IntSlider
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Generator

from .. import augment, figures, masking
from ..camus import UNLABELLED
from ..dataset import Dataset
from . import explore

AUGMENTATIONS = ("none", "mild", "published")
LEFT_OUT = tuple(0.6 + 0.4 * v for v in figures.to_rgba(figures.PALETTE["sky"])[:3])  # a pale sky
NEW, AGAIN = figures.PALETTE["blue"], figures.PALETTE["vermillion"]


@dataclass
class View:
    """One clip as the encoder gets it."""

    index: np.ndarray  # int [F], frames of the sequence
    repeated: np.ndarray  # bool [F], the frame before was the same
    phase: np.ndarray  # float [F], % of the way from ED to ES
    x: np.ndarray  # float [F, S, S], the input: standardised grey values
    inside: np.ndarray  # bool [t, y, x], tokens in the sector
    mirrored: bool  # left and right are exchanged


def view(frames: np.ndarray, augmentation: str, generator: Generator) -> tuple[torch.Tensor, bool]:
    """uint8 [F, S, S] -> grey values [1, F, S, S] after a random view, and whether it is a mirror image.

    Raises:
        ValueError: another augmentation than none, mild, published.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"augmentation={augmentation!r} is unknown: choose one of {', '.join(AUGMENTATIONS)}")
    clip = torch.from_numpy(frames)[None]
    if augmentation == "none":
        return clip.float(), False
    if augmentation == "mild":
        return augment.augment(clip, generator)[0], False
    again = Generator().set_state(generator.get_state())
    ramp = torch.arange(clip.shape[-1]).expand_as(clip).float()  # brighter to the right, unless it is mirrored
    turned = augment.crop_and_flip(ramp, again)[0, 0].mean(0)
    return augment.crop_and_flip(clip, generator), bool(turned[0] > turned[-1])


def see(lab: Dataset, row: int, rule: str = "cover", step: int = 4, offset: float = 0.0, augmentation: str = "mild",
        seed: int = 0) -> View:
    """The clip of a store row under a rule and an augmentation.

    Args:
        rule, step, offset: of `clips.clip_index`. Training draws the offset, evaluation has 0.
        augmentation: none (evaluation) | mild | published.
        seed: of the augmentation.
    """
    meta, tubelet = lab.store.table.loc[row], lab.profile.tubelet_size
    clip = lab.store.clip(int(row), lab.frames, rule, step, offset)
    grey, mirrored = view(clip.frames, augmentation, Generator().manual_seed(seed))
    inside = masking.sector_tokens(grey, tubelet)[0].view(lab.profile.grid(lab.frames)).numpy()
    repeated = np.r_[False, np.diff(clip.index) == 0]
    phase = 100 * (clip.index - meta["ed"]) / max(1, meta["es"] - meta["ed"])
    return View(clip.index, repeated, phase, augment.standardise(grey)[0, 0].numpy(), inside, mirrored)


def cavity(masks: np.ndarray, spacing) -> np.ndarray:
    """Area of the left ventricle's cavity, masks [T, H, W] -> cm² [T]; nan where a frame has no reference."""
    area = (masks == 1).sum((1, 2)) * spacing[0] * spacing[1] / 100
    return np.where((masks == UNLABELLED).all((1, 2)), np.nan, area)


def side(mask: np.ndarray) -> float:
    """Where the cavity's centre lies, in % of the width from the left; nan without a cavity."""
    columns = np.nonzero(mask == 1)[1]
    return 100 * (columns.mean() + 0.5) / mask.shape[1] if columns.size else float("nan")


def picture(lab: Dataset, row: int, rule: str = "cover", step: int = 4, offset: float = 0.0,
            augmentation: str = "mild", seed: int = 0) -> figures.Figure:
    """Beat, input frames and views of one clip; arguments of `see`."""
    seen, meta = see(lab, row, rule, step, offset, augmentation, seed), lab.store.table.loc[row]
    spacing = (meta["spacing_y"], meta["spacing_x"])
    rows, columns = -(-len(seen.index) // 8), min(8, len(seen.index))
    ratio = spacing[0] / spacing[1]
    strip_height = rows * (9.3 / columns * ratio + 0.35) + 0.4
    figure = figures.Figure(figsize=(10, 2.3 + strip_height + 2.7), dpi=80, layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[2.3, strip_height, 2.7])
    _beat(top.subplots(), lab, row, seen)
    _strip(middle, middle.subplots(rows, 1, squeeze=False)[:, 0], seen, lab.profile, spacing)
    _views(bottom.subplots(1, 4), lab, row, seen, augmentation, spacing)
    distinct = len(seen.index) - int(seen.repeated.sum())
    figure.suptitle(f"{meta['patient']} {meta['view']}, rule {rule}" + (f" {step}" if rule == "step" else "")
                    + f": {distinct} of {len(seen.index)} frames distinct, {seen.inside.mean():.0%} of the tokens "
                    + "in the sector" + (", ED/ES only" if lab.store.ed_es_only else ""), fontsize=10)
    return figure


def _beat(ax, lab, row, seen):
    """The cavity's area over the half beat; frames of the clip on it, repeats piled above the frame they repeat."""
    meta = lab.store.table.loc[row]
    area = cavity(lab.store.masks(row), (meta["spacing_y"], meta["spacing_x"]))
    known = not np.isnan(area).all()
    height, rate = area if known else np.zeros(len(area)), meta["frame_rate"]
    timed = rate > 0 and not meta["ed_es_only"]  # of two frames nobody knows how far they are apart
    times = np.arange(len(area)) * (1000 / rate if timed else 1)
    ax.plot(times, height, "-|", color="gray", markersize=8, linewidth=1)
    pile = np.arange(len(seen.index)) - np.searchsorted(seen.index, seen.index)  # 0 = new, 1 = first repeat, ...
    lift = 0.06 * (np.nanmax(height) - np.nanmin(height) or 1)
    base = np.where(np.isnan(height), np.nanmin(height), height)[seen.index]
    ax.scatter(times[seen.index][pile == 0], base[pile == 0], s=32, color=NEW, label="frame of the clip", zorder=3)
    again = pile > 0
    ax.scatter(times[seen.index][again], (base + pile * lift)[again], s=32, marker="D", fc="none", ec=AGAIN,
               label="the same frame again", zorder=3)
    for name, at, beside in (("ED ", meta["ed"], "right"), (" ES", meta["es"], "left")):
        ax.axvline(times[at], color="gray", linestyle=":", linewidth=1)
        ax.text(times[at], 0.97, name, transform=ax.get_xaxis_transform(), fontsize=9, va="top", ha=beside)
    ax.set_xlabel("time (ms)" if timed else "frame of the sequence", fontsize=9)
    ax.set_ylabel("LV cavity (cm²)" if known else "", fontsize=9)
    ax.set_xlim(-0.05 * times[-1], 1.05 * times[-1])
    ax.legend(fontsize=8, frameon=False, loc="upper center")


def _strip(figure, axes, seen, profile, spacing):
    """The input, frame by frame, one axes for each row; the value of a pixel is read off the colour bar."""
    pixels = seen.inside.repeat(profile.tubelet, 0).repeat(profile.patch, 1).repeat(profile.patch, 2)
    scale = ScalarMappable(Normalize(-1, 4), "gray")
    rgb = np.where(pixels[..., None], scale.cmap(scale.norm(seen.x))[..., :3], LEFT_OUT)
    (F, H, W), gap, columns = seen.x.shape, max(2, seen.x.shape[2] // 16), -(-len(seen.x) // len(axes))
    for row, ax in enumerate(axes):
        ax.set_axis_off()
        for k in range(row * columns, min(F, (row + 1) * columns)):
            left, again = (k - row * columns) * (W + gap), seen.repeated[k]
            colour = AGAIN if again else NEW
            ax.imshow(rgb[k], extent=(left - 0.5, left + W - 0.5, H - 0.5, -0.5), aspect=spacing[0] / spacing[1])
            ax.add_patch(Rectangle((left - 0.5, -0.5), W, H, fill=False, ec=colour, lw=2, ls="--" if again else "-"))
            title = f"{seen.index[k]} again" if again else f"{seen.index[k]}: {seen.phase[k]:.0f} %"
            ax.text(left + W / 2, -0.06 * H, title, color=colour, fontsize=9, ha="center")
        ax.set(xlim=(-1, columns * (W + gap) - gap + 1), ylim=(H + 0.5, -0.2 * H))
    bar = figure.colorbar(scale, ax=list(axes), label="input value", aspect=12, shrink=0.85, ticks=range(-1, 5))
    bar.ax.tick_params(labelsize=8)
    what = "left out" if profile.sector_aware else "given to the model all the same"
    figure.legend(handles=[Line2D([], [], color=NEW, lw=2, label="new frame: % of the way from ED to ES"),
                           Line2D([], [], color=AGAIN, lw=2, ls="--", label="the same frame again"),
                           Patch(color=LEFT_OUT, label=f"token outside the sector, {what}")],
                  loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _views(axes, lab, row, seen, augmentation, spacing):
    """The first frame as stored, as this view has it and as a flip would; the values inside the sector."""
    frame, mask = lab.store.frames(row)[seen.index[0]], lab.store.masks(row)[seen.index[0]]
    grey = 255 * (seen.x[0] * augment.STD + augment.MEAN)
    place = "" if np.isnan(side(mask)) else "LV centre at {:.0f} %"
    kind = "published: mirrored" if seen.mirrored else augmentation
    for ax, image, label, title in (
            (axes[0], frame, mask, "stored: " + place.format(side(mask))),
            (axes[1], grey, None, f"this view: {kind}"),
            (axes[2], frame[:, ::-1], mask[:, ::-1], "flipped: " + place.format(100 - side(mask)))):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255, aspect=spacing[0] / spacing[1])
        if label is not None and (label == 1).any():
            ax.contour(label == 1, [0.5], colors=[figures.CLASS_COLOURS[1]], linewidths=1.2)
        ax.axvline((frame.shape[1] - 1) / 2, color="white", linestyle=":", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set(xticks=[], yticks=[])
    pixels = seen.inside.repeat(lab.profile.tubelet, 0).repeat(lab.profile.patch, 1).repeat(lab.profile.patch, 2)
    values = seen.x[pixels]
    axes[3].hist(values, bins=np.linspace(-1, 4, 41), color=NEW)
    axes[3].axvline(values.mean(), color="black", linestyle="--", linewidth=1)
    axes[3].set_title(f"kept tokens: mean {values.mean():.1f}, SD {values.std():.1f}", fontsize=9)
    axes[3].set_xlabel("input value (-1 = black)", fontsize=9)
    axes[3].set_yticks([])


def explorer(lab: Dataset, rows: np.ndarray, augmentation: str | None = None):
    """Controls over `picture`; rows: store rows to choose from; augmentation: at first, None for the profile's."""
    table, calm = lab.store.table, {"continuous_update": False}
    names = [(f"{table.patient[r]} {table.view[r]}", int(r)) for r in rows]
    return explore(
        lambda **values: picture(lab, **values),
        row=Dropdown(options=names, description="clip"),
        rule=Dropdown(options=("cover", "step"), value=lab.profile.clip_rule),
        step=IntSlider(lab.profile.frame_step, 1, 8, **calm),
        offset=FloatSlider(value=0, min=0, max=0.9, step=0.1, **calm),
        augmentation=Dropdown(options=AUGMENTATIONS, value=augmentation or lab.profile.augmentation),
        seed=IntSlider(0, 0, 20, **calm))
