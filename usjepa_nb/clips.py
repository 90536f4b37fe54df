"""Which frames make a clip, and how a frame and a mask become S x S."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass
class Clip:
    """F frames of one sequence."""

    frames: np.ndarray  # uint8 [F, S, S]
    masks: np.ndarray | None  # uint8 [F, S, S]
    index: np.ndarray  # int [F], which frames of the sequence they are
    distinct: int  # how many of these differ


def clip_index(length, frames, rule="cover", step=4, offset=0.0) -> np.ndarray:
    """Which of `length` frames make a clip of `frames`: int [frames], never decreasing.

    "step" is the paper's rule: every `step`-th from the first on, the last repeated when the sequence ends.
    "cover" spreads the instants evenly from the first frame (ED) to the last (ES); `offset` in [0, 1) moves
    them later by that share of their distance (it has no part in "step"). Of two frames, ED fills the first
    half and ES the second under both rules, since a tubelet spans two frames and should not mix them.

    Raises:
        ValueError: another rule; a length, number or step below 1; an offset outside [0, 1).
    """
    if rule not in ("cover", "step"):
        raise ValueError(f"rule must be 'cover' or 'step', not {rule!r}")
    if min(length, frames, step) < 1 or not 0 <= offset < 1:
        got = f"{length=}, {frames=}, {step=}, {offset=}"
        raise ValueError(f"length, frames and step must be at least 1 and offset in [0, 1), not {got}")
    k = np.arange(frames)
    if length == 2:
        return 2 * k // frames
    at = k * step if rule == "step" else (k + offset) * (length - 1) / max(frames - 1, 1)
    return np.minimum(np.floor(at + 0.5), length - 1).astype(int)


def resize_frame(frame, size) -> np.ndarray:
    """uint8 [H, W] -> [size, size], bilinear and antialiased (Pillow widens its filter when it shrinks)."""
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(mask, size) -> np.ndarray:
    """uint8 labels [H, W] -> [size, size] or size = (height, width), smaller or larger.

    Each label's area is resized like a frame, the largest wins: labels are names and have no values in between.
    """
    height, width = (size, size) if np.ndim(size) == 0 else map(int, size)
    labels = np.flatnonzero(np.bincount(mask.ravel())).astype(np.uint8)
    if len(labels) == 1:
        return np.full((height, width), labels[0])
    areas = (Image.fromarray((mask == label).astype(np.float32)) for label in labels)
    shares = [np.asarray(area.resize((width, height), Image.Resampling.BILINEAR)) for area in areas]
    return labels[np.argmax(shares, axis=0)]
