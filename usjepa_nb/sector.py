"""The ultrasound sector of a loop: found, cut out, everything else blacked; then into the project's HDF5 file.

Banners, scales and traces that are burnt into the pixels go with what lies outside the sector. Text inside the
sector is not removed; `suspects` looks for it.
"""

import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull

from usjepa_nb import store
from usjepa_nb.cine import Cine, CineError
from usjepa_nb.clips import clip_index
from usjepa_nb.images import LABELS, CamusError, save_nifti


def motion(frames) -> np.ndarray:
    """How much each pixel changes: its standard deviation over time, grey levels, float [H, W] (of [F, H, W])."""
    mean = frames.mean(0)
    square = np.einsum("thw,thw->hw", frames, frames, dtype=float) / len(frames)  # without a copy of all frames
    return np.sqrt(np.maximum(square - mean**2, 0))


def find(cine: Cine, threshold: float = 0.7, grow: int = 0) -> np.ndarray:
    """The ultrasound sector: the convex hull of the largest connected piece that moves, bool [H, W].

    Speckle changes with every frame; banners, scales and logos stand still, and a clock or an ECG trace is a piece of
    its own as long as it does not touch the sector.

    Args:
        threshold: grey levels of `motion` from which a pixel moves.
        grow: px that the hull is widened by; negative ones narrow it.

    Raises:
        CineError: hardly anything moves, or nothing is left.
    """
    moves = ndimage.binary_opening(motion(cine.frames) > threshold, np.ones((3, 3)))  # no lines, no single pixels
    if cine.region:
        top, bottom, left, right = cine.region
        moves[:top], moves[bottom:], moves[:, :left], moves[:, right:] = 0, 0, 0, 0
    pieces, _ = ndimage.label(moves)
    areas = np.bincount(pieces.ravel())[1:]
    if not len(areas) or areas.max() < 0.02 * moves.size:
        raise CineError(f"hardly anything moves by more than {threshold:g} grey levels, so no sector is found: "
                        "lower the threshold, or give a loop of a beating heart.")
    points = np.argwhere(pieces == 1 + areas.argmax())
    drawn = Image.new("1", moves.shape[::-1])
    ImageDraw.Draw(drawn).polygon([(x, y) for y, x in points[ConvexHull(points).vertices].tolist()], fill=1)
    change = ndimage.binary_dilation if grow > 0 else ndimage.binary_erosion
    sector = change(np.asarray(drawn), iterations=abs(grow)) if grow else np.array(drawn)
    if not sector.any():
        raise CineError(f"grow = {grow} leaves nothing of the sector: take a number nearer to 0.")
    return sector


def crop(cine: Cine, sector) -> Cine:
    """Black outside the sector [H, W], then cut to its bounding box; spacing and frame time stay."""
    rows, columns = (np.flatnonzero(sector.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return replace(cine, frames=np.where(sector[box], cine.frames[:, *box], np.uint8(0)), region=None)


def suspects(cine: Cine, sector, still: float = 0.7, bright: float = 40) -> np.ndarray:
    """Pixels in the sector that are bright (mean grey level) and stand still: perhaps text, bool [H, W].

    Text over moving tissue that lets it shine through is not found, nor is text as dark as blood.
    """
    return sector & (motion(cine.frames) < still) & (cine.frames.mean(0) > bright)


def windows(length: int, frames: int, step: int = 1) -> np.ndarray:
    """Clips of `frames` instants, `step` apart, that together hold every frame of a sequence: int [n, frames].

    A step too long for the sequence is shortened; a sequence shorter than a clip is one clip with frames repeated.
    """
    if length < frames:
        return clip_index(length, frames)[None]
    step = max(1, min(step, length // frames))
    span = frames * step
    starts = [*range(0, length - span, span), length - span]
    return np.array([[start + offset + step * k for k in range(frames)] for start in starts for offset in range(step)])


def slide(length: int, frames: int, step: int = 1) -> np.ndarray:
    """Clips in which every frame of a sequence takes every place once: int [length + (frames - 1) * step, frames].

    Before the first and after the last frame these are repeated, so the ends of the sequence come up more often.
    """
    first = np.arange(-(frames - 1) * step, length)
    return np.clip(first[:, None] + step * np.arange(frames), 0, length - 1)


def vote(masks, index, length: int) -> np.ndarray:
    """Masks of overlapping clips, uint8 [n, F, H, W], of frames `index` [n, F] -> the commonest label of each pixel.

    Returns:
        uint8 [length, H, W]; of labels equally common, the lowest.
    """
    counts = np.zeros((max(LABELS) + 1, length, *masks.shape[2:]), np.int32)
    for label, count in enumerate(counts):
        np.add.at(count, index, masks == label)
    return counts.argmax(0).astype(np.uint8)


def write(cines, out, size: int, view: str = "4CH") -> store.Store:
    """Put loops into an HDF5 file as `store.convert` makes it: one unlabelled sequence each, patient0001 and so on.

    They pass through a small tree in CAMUS's layout and its loader. The columns ed and es hold the first and the last
    frame, since nobody knows the instants; what is not known (spacing, frame rate, EF) is NaN.

    Raises:
        CineError: no loop, a view other than 2CH and 4CH, a spacing or frame time that is no number above 0, or it
            could not be written.
    """
    out, cines = Path(out), list(cines)
    if view not in ("2CH", "4CH") or not cines:
        raise CineError(f"{len(cines)} loops of the view {view!r} cannot be written: give one or more, and 2CH "
                        "or 4CH.")
    for cine in cines:
        if not all(0 < number < math.inf for number in (*(cine.spacing or (1, 1)), cine.frame_ms or 1)):
            raise CineError(f"a loop with the spacing {cine.spacing} mm and the frame time {cine.frame_ms} ms cannot "
                            "be written: give numbers above 0, or None for what is not known.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".own-", dir=out.parent) as folder:
            _write(cines, Path(folder), size, view)
            os.replace(Path(folder) / "own.h5", out)
    except CamusError as error:
        raise CineError(str(error)) from None
    except OSError as error:
        raise CineError(f"{out} could not be written ({error.strerror or error}): see that its folder is writable and "
                        "has space.") from None
    return store.Store(out)


def _write(cines, folder, size, view):
    tree, part = folder / "own", folder / "own.h5"
    for number, cine in enumerate(cines, 1):
        patient = tree / f"patient{number:04d}"
        patient.mkdir(parents=True)
        image = patient / f"{patient.name}_{view}_half_sequence.nii"
        save_nifti(image, cine.frames, cine.spacing or (1, 1), np.uint8)
        cfg = {"ED": 1, "ES": len(cine.frames), "NbFrame": len(cine.frames)}
        cfg |= {"FrameRate": 1000 / cine.frame_ms} if cine.frame_ms else {}
        (patient / f"Info_{view}.cfg").write_text("".join(f"{key}: {value}\n" for key, value in cfg.items()))
    report = store.convert(tree, part, size, workers=1, progress=False)
    if report.refused:
        raise CineError(" ".join(report.refused.values()))
    with h5py.File(part, "r+") as file:
        for axis in ("spacing_y", "spacing_x", "native_spacing_y", "native_spacing_x"):
            column = file["sequences"][axis]
            column[...] = np.where([cine.spacing is None for cine in cines], np.nan, column[()])
