"""One inspector for scored videos: the beat under any method's masks, its errors, its volume and ejection fraction."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import ipywidgets
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .. import figures, metrics
from ..camus import LABELS, UNLABELLED
from . import explore

REFERENCE = "reference"
ERROR = figures.PALETTE["yellow"]


@dataclass
class Beats:
    """Videos, their reference masks, and what methods drew.

    Attributes:
        frames, truth: uint8 [n, T, H, W]; `predicted`: {(method, % of the labels): uint8 [n, T, H, W]}.
        spacings: (y, x) in mm per pixel, [n, 2]; `names`: of the videos, [n].
        instants: where ED and ES lie in each clip, [n, 2].
    """

    frames: np.ndarray
    truth: np.ndarray
    predicted: dict[tuple[str, int], np.ndarray]
    spacings: np.ndarray
    names: list[str]
    instants: np.ndarray
    curves: dict = field(default_factory=dict, repr=False)  # volumes that were asked for once

    def masks(self, key) -> np.ndarray:
        """Masks [n, T, H, W] of a (method, % of the labels), or of REFERENCE; UNLABELLED where there are none."""
        return self.truth if key == REFERENCE else self.predicted.get(key, np.full_like(self.truth, UNLABELLED))

    def volumes(self, key, video: int) -> np.ndarray:
        """LV volume in ml of every frame, [T], by single-plane Simpson; nan without a cavity or a mask."""
        if (key, video) not in self.curves:
            self.curves[key, video] = np.array([
                np.nan if (mask == UNLABELLED).all() else metrics.simpson_volume(mask, self.spacings[video])
                for mask in self.masks(key)[video]])
        return self.curves[key, video]

    def ejection_fraction(self, key, video: int) -> float:
        """EF in % from the volumes at ED and ES."""
        return metrics.ejection_fraction(*self.volumes(key, video)[list(self.instants[video])])

    def instant(self, video: int, frame: int) -> str:
        """"ED", "ES" or ""."""
        return " and ".join(text for text, at in zip(("ED", "ES"), self.instants[video], strict=True) if at == frame)


def gather(lab, rows: np.ndarray, results: dict) -> Beats:
    """Validation or test rows of a lab, with {(method, % of the labels): `segment.Segmentation`}."""
    table = lab.store.table.loc[rows]
    predicted = {key: s.best[[s.rows.tolist().index(r) for r in rows]] for key, s in results.items()}
    return Beats(*lab.clips(rows), predicted, table[["spacing_y", "spacing_x"]].to_numpy(),
                 (table.patient + " " + table["view"]).tolist(), np.array([lab.instants(r) for r in rows]))


def picture(beats: Beats, video: int, method: str, fraction: int, frame: int, classes=metrics.CLASSES, opacity=0.35,
            errors=False):
    """One frame with the masks of one method, and the volume of the left ventricle over the beat.

    Args:
        classes: which are drawn; the others count as background, in the errors too.
        errors: draw a line around every pixel where prediction and reference differ.
    """
    key, spacing, last = (method, fraction), beats.spacings[video], beats.frames.shape[1] - 1
    mask, truth = (keep(beats.masks(of)[video, frame], classes) for of in (key, REFERENCE))
    wrong = (mask != truth) & (truth != UNLABELLED) & (mask != UNLABELLED)
    ratio = mask.shape[0] * spacing[0] / (mask.shape[1] * spacing[1])
    figure, ((left, right),) = figures.panels(1, 2, width=10, ratio=ratio, extra=0.6)
    figures.draw_overlay(left, beats.frames[video, frame], mask, None, spacing, opacity)
    if errors and wrong.any():
        left.contour(wrong, [0.5], colors=ERROR, linewidths=1.6)
    figures.draw_reference(left, truth)
    now = beats.instant(video, frame)
    left.text(0.03, 0.96, now, transform=left.transAxes, color="white", fontsize=16, va="top")
    scores = [metrics.dsc(mask, truth, label) for label in classes if (mask == label).any() or (truth == label).any()]
    dsc = "no such class here"
    if scores:
        dsc = f"DSC of this frame {np.mean(scores):.3f}, {wrong.mean():.1%} of its pixels differ"
    dsc = dsc if key in beats.predicted else "this result is not on disk"
    left.set_title(f"{beats.names[video]}, frame {frame + 1} of {last + 1}{now and f' = {now}'}\n{dsc}", fontsize=10)
    _volumes(right, beats, video, key, frame)
    handles = [Patch(fc=figures.CLASS_COLOURS[label], ec="gray", label=LABELS[label]) for label in classes]
    handles += [figures.reference_line(REFERENCE)]
    handles += [Line2D([], [], color=ERROR, label="prediction and reference differ")] * errors
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def _volumes(ax, beats, video, key, frame):
    last = beats.frames.shape[1] - 1
    drawn, reference = (beats.volumes(of, video) for of in (key, REFERENCE))
    ax.plot(reference, color=figures.PALETTE["black"], linestyle="--", marker="o", markersize=4, label=REFERENCE)
    ax.plot(drawn, color=figures.PALETTE["blue"], marker="s", markersize=4, label=key[0])
    ax.plot([frame] * 2, [reference[frame], drawn[frame]], "o", markersize=11, fillstyle="none", markeredgewidth=2,
            color=figures.PALETTE["vermillion"])
    for text, at in zip(("ED", "ES"), beats.instants[video], strict=True):
        ax.axvline(at, color="0.6", linewidth=1, linestyle=":")
        ax.text(at, 0.02, text, transform=ax.get_xaxis_transform(), ha="center", fontsize=11)
    ef = [beats.ejection_fraction(of, video) for of in (key, REFERENCE)]
    told = [f"{v:.0f} %" if v == v else "none" for v in ef]
    ax.set_title(f"{key[0]}, {key[1]} % of the labels\nEF {told[0]}, reference {told[1]}", fontsize=10)
    ax.set(xlabel="frame", ylabel="LV volume (ml), single-plane Simpson", xlim=(-0.5, last + 0.5),
           ylim=(0, 1.15 * np.nanmax([*drawn, *reference, 1])))
    ax.set_xticks(range(last + 1), range(1, last + 2))
    ax.legend(fontsize=8, loc="upper right", frameon=False)


def keep(mask: np.ndarray, classes) -> np.ndarray:
    """A mask in which all other classes are background; UNLABELLED stays."""
    return np.where(np.isin(mask, (*classes, UNLABELLED)), mask, 0)


def inspect(beats: Beats, video: int, method: str, fraction: int, frame: int = 0):
    """`picture` under its controls; Play lets the heart beat, two buttons go to ED and to ES.

    `box.controls[name]` is the widget of an argument of `picture`, `box.jumps` holds the buttons by name.
    """
    def show(video, method, fraction, frame, classes, opacity, errors):
        return picture(beats, video, method, fraction, frame, classes, opacity, errors)

    methods, fractions = ([*dict.fromkeys(key[k] for key in beats.predicted)] for k in (0, 1))
    last = beats.frames.shape[1] - 1
    box = explore(
        show, video=ipywidgets.Dropdown(options=[(name, k) for k, name in enumerate(beats.names)], value=video),
        method=ipywidgets.Dropdown(options=methods, value=method),
        fraction=ipywidgets.Dropdown(options=[(f"{f} % of the labels", f) for f in fractions], value=fraction),
        frame=ipywidgets.SelectionSlider(options=[(str(k + 1), k) for k in range(last + 1)], value=frame),
        classes=ipywidgets.SelectMultiple(options=[(LABELS[c], c) for c in metrics.CLASSES], value=metrics.CLASSES,
                                          rows=3),
        opacity=ipywidgets.FloatSlider(0.35, min=0, max=1, step=0.05), errors=False)
    play = ipywidgets.Play(min=0, max=last, interval=250, repeat=True)
    ipywidgets.jslink((play, "value"), (box.controls["frame"], "index"))
    box.jumps = {}
    for k, text in enumerate(("ED", "ES")):
        def jump(_=None, k=k):
            box.controls["frame"].value = int(beats.instants[box.controls["video"].value][k])

        button = ipywidgets.Button(description=f"to {text}", layout={"width": "70px"})
        button.on_click(jump)
        box.jumps[text] = button
        if os.environ.get("USJEPA_EXERCISE") == "1":
            jump()  # a click of the button would swallow an exception
    box.controls["frame"].value = frame
    box.children = (ipywidgets.HBox([play, *box.jumps.values()]), *box.children)
    return box
