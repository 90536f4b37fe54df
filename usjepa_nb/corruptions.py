"""Bad echoes on purpose: what spoils an ultrasound clip, in five severities each.

A B-mode picture is log-compressed: its grey values are decibels. What happens to the sound is therefore done in dB
(a loss is a subtraction, two echoes add as powers), what happens on the screen is done to grey values. All of it acts
inside the sector only, along beams and depths found from the clip itself.

`usaugment` 1.0.1 (Tupper and Gagné 2025, arXiv:2501.13193) has depth attenuation, shadow and haze, and is not used:
it treats grey values as amplitudes and wants them as floats (given uint8, attenuation returns black and haze white);
its shadow is a blob anywhere in the picture, not what lies behind an obstacle; it draws from NumPy's global state; and
it brings nine more packages, OpenCV among them, for three formulas. Its decay with depth is ours too, on amplitudes,
and tested equal; the band of haze has its shape (both from Østvik et al. 2021).
"""

import functools

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from usjepa_nb.masking import sector

SEVERITIES = (1, 2, 3, 4, 5)
DB = 255 / 60  # grey values per dB: black to white spans 60 dB, a usual setting (CAMUS does not tell its own)
CORRUPTIONS = {}  # name -> function (frames, severity, rng) -> frames


class Beams:
    """Where a clip was scanned: seen bool [H, W], its sector; depth, 0 at the probe to 1; angle, -1 to 1 across.

    The probe is taken to be at the middle of the sector's first row; lengths are those of stored pixels.
    """

    def __init__(self, seen):
        y, x = np.nonzero(seen)
        down, right = np.indices(seen.shape, np.float32)
        down, right = down - y[0], right - x[y == y[0]].mean()
        radius, angle = np.hypot(down, right), np.arctan2(right, down)
        self.seen = seen
        self.depth = radius / max(radius[seen].max(), 1)
        self.angle = angle / max(np.quantile(np.abs(angle[seen]), 0.98), 0.01)  # the rim, less what is ragged


def corruption(*amounts):
    """Put a function (grey float [T, H, W], amount, rng, beams) -> grey into `CORRUPTIONS`.

    Args:
        amounts: what severities 1 to 5 mean. Random numbers do not depend on them, so that from one seed the same
            fault gets worse.
    """

    def register(spoil):
        @functools.wraps(spoil)
        def corrupted(frames, severity, rng):
            seen = sector(torch.from_numpy(frames)[None])[0].numpy()
            if not seen.any():  # a black clip
                return frames.copy()
            beams = Beams(seen)
            grey = spoil(frames.astype(np.float32), amounts[SEVERITIES.index(severity)], rng, beams)
            return np.where(seen, np.rint(np.clip(grey, 0, 255)).astype(np.uint8), frames)

        CORRUPTIONS[spoil.__name__] = corrupted
        return corrupted

    return register


def corrupt(frames, name, severity, seed):
    """One clip, spoilt.

    Args:
        frames: uint8 [T, H, W]; they are left as they are.
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5; 0 changes nothing.
        seed: of the place of a shadow, of noise and so on: an int, or a sequence such as ``(seed, clip)``.

    Returns:
        uint8 [T, H, W], unchanged outside the sector.

    Raises:
        ValueError: no such corruption or severity; frames of another type or shape.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"name={name!r} is no corruption: choose one of {', '.join(CORRUPTIONS)}.")
    if severity not in (0, *SEVERITIES):
        raise ValueError(f"severity={severity!r} is not possible: choose 0 (nothing) to 5 (worst).")
    if frames.dtype != np.uint8 or frames.ndim != 3:
        raise ValueError(f"frames are {frames.dtype} of shape {frames.shape}: give one clip, uint8 [T, H, W].")
    return frames.copy() if severity == 0 else CORRUPTIONS[name](frames, severity, np.random.default_rng(seed))


def phasors(rng, shape, kept=0.0):
    """Unresolved reflectors that interfere: complex [T, H, W] of mean power 1 and independent from cell to cell.

    `kept`: the correlation of a frame with the one before.
    """
    cell = shape[1] / 120, shape[2] / 64  # SD of a resolution cell: finer along the beam than across it
    noise = gaussian_filter(rng.standard_normal((2, *shape), np.float32), (0, 0, *cell))
    for t in range(1, shape[0]):
        noise[:, t] = kept * noise[:, t - 1] + np.sqrt(1 - kept**2) * noise[:, t]
    return (noise[0] + 1j * noise[1]) / np.sqrt((noise**2).sum(0).mean())


@corruption(6, 11, 16, 21, 26)  # dB lost at the deepest point
def depth_attenuation(grey, loss, rng, beams):
    """Too little sound comes back from the depth: amplitude decays exponentially with the range."""
    return grey - DB * loss * beams.depth


@corruption((8, 0.1), (13, 0.15), (18, 0.2), (23, 0.25), (28, 0.3))  # dB; width (SD) in half sectors
def acoustic_shadow(grey, shadow, rng, beams):
    """A rib or the lung near the probe: the beams behind it stay dark, in all frames at the same angle."""
    (loss, width), start, middle = shadow, rng.uniform(0.05, 0.2), rng.uniform(-0.6, 0.6)
    behind = 1 / (1 + np.exp((start - beams.depth) / 0.03))
    return grey - DB * loss * behind * np.exp(-0.5 * ((beams.angle - middle) / width) ** 2)


@corruption(-38, -33, -28, -23, -18)  # dB below white, where the haze is thickest
def haze(grey, level, rng, beams):
    """Clutter: echoes of chest wall and side lobes lie as a veil over a band of depths and hardly move."""
    ring = -0.5 * ((beams.depth - rng.uniform(0.2, 0.6)) / rng.uniform(0.15, 0.25)) ** 2  # log of the amplitude
    looks = np.mean([np.abs(phasors(rng, grey.shape, 0.95)) ** 2 for _ in range(4)], 0)  # power of a blurred veil
    neper = DB * 10 / np.log(10)  # grey values per unit of log power; powers add
    return neper * np.logaddexp(grey / neper, (255 + DB * level) / neper + np.log(looks + 1e-6) + 2 * ring)


@corruption(0.25, 0.45, 0.7, 1.0, 2.0)  # amplitude of the added echoes relative to the tissue's own
def speckle(grey, amplitude, rng, beams):
    """More speckle, new in every frame: each cell interferes with random echoes in proportion to its own."""
    return grey + DB * 20 * np.log10(np.abs(1 + amplitude * phasors(rng, grey.shape)) / np.hypot(1, amplitude) + 1e-6)


@corruption(5, 10, 15, 20, 25)  # dB
def gain(grey, more, rng, beams):
    """Overall gain turned up too far: blood turns grey, walls saturate."""
    return grey + DB * more


@corruption(1.3, 1.6, 2.0, 2.5, 3.2)  # exponent
def gamma(grey, exponent, rng, beams):
    """A grey map that hides what is weak: white stays white, mid-tones sink."""
    return 255 * (grey / 255) ** exponent


@corruption(0.7, 0.5, 0.35, 0.25, 0.18)  # contrast that is left
def contrast(grey, left, rng, beams):
    """A washed-out screen: all grey values move towards the clip's mean."""
    mean = grey[:, beams.seen].mean()
    return mean + left * (grey - mean)


@corruption(0.2, 0.4, 0.6, 0.8, 1.0)  # share of the frames after the first
def frame_drop(grey, share, rng, beams):
    """Frames are lost, and the last one that came is shown again; at 5 only the first one came."""
    count = len(grey) - 1
    arrived = np.r_[True, rng.permutation(count) >= round(share * count)]
    return grey[np.maximum.accumulate(np.where(arrived, np.arange(len(grey)), 0))]
