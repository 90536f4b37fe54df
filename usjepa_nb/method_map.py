"""The method on one page: what flows where, in which shape, and which notebook and module have it."""

import itertools
import math

from matplotlib.patches import FancyBboxPatch, Rectangle

from . import figures
from .figures import PALETTE
from .profile import Profile

HEIGHT = 0.86  # of a box
LANES = {  # lane: (bottom, top, title, colour)
    "data": (5.95, 7.75, "Data", PALETTE["sky"]),
    "learn": (1.95, 5.75, "Pre-training: films, no masks drawn by anybody", PALETTE["yellow"]),
    "use": (-0.05, 1.75, "Use: few masks", PALETTE["green"]),
}
# name: (x and y of the centre, width, what it is, notebook and modules). {letters} are filled in.
BOXES = {
    "films": (1.7, 6.7, 2.3, "CAMUS or phantom:\nfilms, some with masks", "01 · camus, phantom"),
    "store": (4.3, 6.7, 1.9, "one HDF5 file\nof square frames", "01 · store"),
    "clip": (6.6, 6.7, 1.9, "clip [B, C, T, H, W]\n[{B}, 1, {T}, {S}, {S}]", "01 · clips, augment"),
    "masks": (9.0, 6.7, 2.1, "which of N = {N}\ntubelets are hidden?", "02 · masking"),
    "context": (1.7, 4.65, 2.3, "context encoder $E_\\theta$\nsees the visible tokens", "03 · vit"),
    "predictor": (5.2, 4.65, 2.3, "predictor $P_\\phi$\nfeatures of hidden tokens", "03 · vit"),
    "ll": (8.75, 4.65, 2.3, "head $F$, Eq. 2, 3: $\\mathcal{L}_{ll}$\nhow far apart is a pair?", "03 · losses, lens"),
    "target": (1.7, 2.8, 2.3, "target encoder $\\bar E_\\theta$\nsees all of them", "03 · objectives"),
    "jepa": (5.2, 2.8, 2.3, "Eq. 1: $\\mathcal{L}_{jepa}$\nhow far off are they?", "03 · losses"),
    "sum": (8.75, 2.8, 2.3, "Eq. 4: $\\mathcal{L} =$\n$\\lambda \\mathcal{L}_{jepa} + (1 - \\lambda) "
            "\\mathcal{L}_{ll}$", "03, 04 · losses"),
    "frozen": (1.7, 0.75, 2.3, "frozen encoder\n[B, N, D] = [{B}, {N}, {D}]", "05 · probe"),
    "probe": (4.45, 0.75, 1.9, "probe, trained\non few masks", "05 · probe, segment"),
    "out": (6.8, 0.75, 1.9, "a mask per frame:\nDSC, distances", "05, 06 · metrics"),
    "ef": (9.1, 0.75, 1.6, "volumes,\nejection fraction", "06 · metrics"),
}
SIDE, GAP = 0.2, 5.85  # x left of the boxes, y between two lanes: where the two long arrows run
ARROWS = {  # (from, to): (what is carried, corners on the way)
    ("films", "store"): ("", []), ("store", "clip"): ("", []), ("clip", "masks"): ("", []),
    ("masks", "context"): ("visible tokens", [(9.0, GAP), (1.7, GAP)]),
    ("clip", "target"): ("{tokens}", [(6.6, GAP + 0.24), (SIDE, GAP + 0.24), (SIDE, 2.8)]),
    ("context", "predictor"): ("features", []), ("predictor", "ll"): ("$e_{m_1}, e_{m_2}$", []),
    ("predictor", "jepa"): ("$e_m$ of every hidden token", []), ("target", "jepa"): ("no gradient", []),
    ("ll", "sum"): ("", []), ("jepa", "sum"): ("", []),
    ("context", "target"): ("EMA: running average of the weights", []), ("target", "frozen"): ("handed over", []),
    ("frozen", "probe"): ("", []), ("probe", "out"): ("", []), ("out", "ef"): ("", []),
}
STYLES = {("context", "target"): "dotted", ("target", "frozen"): "dashed"}  # weights travel, not features


def method_map(profile: Profile) -> figures.Figure:
    """Draw the map with the shapes of a profile; read it along the arrows, lane by lane.

    Solid arrows carry data; the dotted one is the moving average, the dashed one hands the finished encoder over.
    """
    figure = figures.Figure(figsize=(11, 7.6), dpi=80)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(-0.15, 10.65), ylim=(-0.15, 7.85))
    ax.set_axis_off()
    for bottom, top, title, colour in LANES.values():
        ax.add_patch(Rectangle((0, bottom), 10.5, top - bottom, fc=colour, alpha=0.13, ec="none", zorder=0))
        ax.text(10.4, top - 0.1, title, ha="right", va="top", fontsize=10, weight="bold")
    for name, (x, y, width, what, where) in BOXES.items():
        ax.add_patch(FancyBboxPatch((x - width / 2, y - HEIGHT / 2), width, HEIGHT, gid=name, zorder=2, fc="white",
                                    ec="black", boxstyle="round,pad=0,rounding_size=0.08"))
        ax.text(x, y + 0.13, _filled(what, profile), ha="center", va="center", fontsize=8.5, zorder=3, gid=name)
        ax.text(x, y - 0.31, where, ha="center", va="center", fontsize=7.5, color="#555555", zorder=3, gid=name)
    for (start, end), (carried, corners) in ARROWS.items():
        _arrow(ax, start, end, _filled(carried, profile), corners)
    return figure


def _filled(text, profile):
    """Letters in braces by the profile's numbers; braces of formulas stay."""
    t, y, x = profile.grid()
    letters = {"B": profile.batch, "T": profile.frames, "S": profile.size, "N": t * y * x, "D": profile.width,
               "tokens": "all tokens in the sector" if profile.sector_aware else "all tokens"}
    for letter, number in letters.items():
        text = text.replace("{" + letter + "}", str(number))
    return text


def _arrow(ax, start, end, carried, corners):
    """From the edge of one box to the edge of another, along the axes; the words stand on the longest part."""
    centres = [BOXES[start][:2], *corners, BOXES[end][:2]]
    points = [_edge(start, centres[1]), *corners, _edge(end, centres[-2])]
    style = STYLES.get((start, end), "solid")
    ax.plot(*zip(*points[:-1], strict=True), color="black", linewidth=1, zorder=1)
    ax.annotate("", points[-1], points[-2], zorder=1, arrowprops={
        "arrowstyle": "-|>", "linestyle": style, "shrinkA": 0, "shrinkB": 0, "color": "black"})
    (x0, y0), (x1, y1) = max(itertools.pairwise(points), key=lambda part: math.dist(*part))
    ax.text((x0 + x1) / 2, (y0 + y1) / 2, carried, ha="center", va="center", fontsize=8, zorder=4,
            bbox={"fc": "white", "ec": "none", "pad": 1, "alpha": 0.9} if carried else None)


def _edge(name, towards):
    """Where a straight line from the centre of a box towards a point beside, above or below it leaves the box."""
    x, y, width, *_ = BOXES[name]
    if abs(towards[1] - y) < 1e-9:
        return (x + width / 2 if towards[0] > x else x - width / 2, y)
    return (x, y + HEIGHT / 2 if towards[1] > y else y - HEIGHT / 2)
