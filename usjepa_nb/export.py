"""Figures, films and masks as files, for slides and for other programs: PNG, GIF, MP4, NIfTI.

A file gets its name only when it is whole.
"""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from usjepa_nb import figures
from usjepa_nb.clips import resize_mask
from usjepa_nb.images import LABELS, save_nifti
from usjepa_nb.metrics import in_mm

LOWEST = 200  # px: lower frames are enlarged


def slug(text) -> str:
    """A method's name as part of a file's: "V-JEPA + LL (λ = 0.25)" -> "v-jepa-ll-lam-0.25"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower().replace("λ", "lam")).strip("-.")


@contextlib.contextmanager
def whole(path, *suffixes):
    """A temporary path beside `path`, which is moved there at the end, or removed after an error.

    Raises:
        ValueError: `path` ends in none of the suffixes.
    """
    path = Path(path)
    if not path.name.lower().endswith(suffixes):
        raise ValueError(f"{path.name} cannot be written: give a name that ends in {' or '.join(suffixes)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.part.{path.name}")  # the suffix stays: libraries choose the format by it
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def picture(path, figure) -> Path:
    """Write a matplotlib figure as PNG, small as in the notebooks (256 colours)."""
    with whole(path, ".png") as part:
        part.write_bytes(figures.png(figure))
    return Path(path)


def painted(frame, mask, reference=None, spacing=(1, 1), opacity=0.35) -> np.ndarray:
    """A frame with its mask filled and outlined, a reference in dashes, as `figures.overlay`, but pixel by pixel.

    Args:
        frame, mask, reference: uint8 [H, W].
        spacing: (y, x) in mm per pixel. The longer side of a pixel is stretched and low frames are enlarged
            (to `LOWEST` px at least), so that the picture has true proportions.

    Returns:
        uint8 [h, w, 3].

    Raises:
        ValueError: a spacing that is not finite and above 0.
    """
    y, x = (mm / min(spacing) for mm in in_mm(spacing))
    zoom = -(-LOWEST // round(frame.shape[0] * y))  # 1 for a frame that is high enough
    height, width = round(frame.shape[0] * y * zoom), round(frame.shape[1] * x * zoom)
    grey = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
    rgb, mask = np.repeat(grey[..., None], 3, 2).astype(float), resize_mask(mask, (height, width))
    colours = {label: 255 * np.array(to_rgb(colour)) for label, colour in figures.CLASS_COLOURS.items()}
    for label, colour in colours.items():
        rgb[mask == label] += opacity * (colour - rgb[mask == label])
    image = Image.fromarray(rgb.round().astype(np.uint8))
    draw, contours = ImageDraw.Draw(image), Figure().add_subplot()
    for outlined, dash, step in ((mask, 8, 8), (reference, 4, 8)):
        for label in [] if outlined is None else sorted(colours, reverse=True):  # the cavity last, as in figures
            inside = np.pad(resize_mask(outlined, (height, width)) == label, 1)  # closed at the border too
            for line in contours.contour(inside, [0.5]).allsegs[0] if inside.any() else []:
                for at in range(0, len(line) - 1, step):
                    draw.line([tuple(p) for p in line[at:at + dash + 1] - 1], tuple(colours[label].astype(int)))
    return np.asarray(image)


def movie(path, frames, masks, reference=None, spacing=(1, 1), fps=8, opacity=0.35) -> Path:
    """Write the beat with its masks as a film: a GIF that repeats for ever, or an MP4 where ffmpeg is found.

    Args:
        path: ends in .gif or .mp4.
        frames, masks, reference: uint8 [T, H, W]; the rest as in `painted`.
        fps: frames per second; a GIF counts time in 1/100 s and viewers slow down beyond 50.

    Raises:
        ValueError: another suffix, shapes that differ, a spacing or fps out of range.
        RuntimeError: an MP4 without ffmpeg.
    """
    for name, array in (("masks", masks), ("reference", masks if reference is None else reference)):
        if frames.ndim != 3 or not len(frames) or array.shape != frames.shape:
            raise ValueError(f"{name}: shape {array.shape} beside frames of {frames.shape}: give both one [T, H, W].")
    if not 0 < fps <= 50:
        raise ValueError(f"fps = {fps} is not possible: choose more than 0 and at most 50 frames per second.")
    with whole(path, ".gif", ".mp4") as part:
        encode = _mp4 if part.suffix.lower() == ".mp4" else _gif
        references = [None] * len(frames) if reference is None else reference
        encode(part, np.stack([painted(*trio, spacing, opacity)
                               for trio in zip(frames, masks, references, strict=True)]), fps)
    return Path(path)


def _gif(path, pictures, fps, greys=45):
    """One palette for all frames, so that nothing flickers: few greys, since speckle makes large files."""
    strip = Image.fromarray(np.concatenate(pictures))
    pure = [round(255 * part) for colour in figures.CLASS_COLOURS.values() for part in to_rgb(colour)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(strip.quantize(greys).getpalette()[:3 * greys] + pure)
    strip = strip.quantize(palette=palette, dither=Image.Dither.NONE)
    height = len(pictures[0])
    frames = [strip.crop((0, i * height, strip.width, (i + 1) * height)) for i in range(len(pictures))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(100 / fps) * 10, loop=0)


def _ffmpeg():
    """The ffmpeg program: the system's, or the one that the package imageio-ffmpeg brings."""
    if program := shutil.which("ffmpeg"):
        return program
    try:
        return importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()  # optional: no dependency of ours
    except (ImportError, RuntimeError):
        raise RuntimeError("An MP4 needs ffmpeg, and none is here: pip install imageio-ffmpeg, or give a name "
                           "that ends in .gif.") from None


def _mp4(path, pictures, fps):
    height, width = pictures.shape[1:3]
    command = [_ffmpeg(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
               "-r", f"{fps:g}", "-i", "-", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", str(path)]
    done = subprocess.run(command, input=pictures.tobytes(), capture_output=True, check=False)
    if done.returncode:
        why = " ".join(done.stderr.decode(errors="replace").split())[-200:]
        raise RuntimeError(f"ffmpeg could not make an MP4 ({why}): give a name that ends in .gif.")


def in_sequence(masks, index, length, was_reversed=False) -> np.ndarray:
    """Masks of a clip -> one for every frame of the patient's file: that of the nearest frame of the clip.

    Args:
        masks: uint8 [F, H, W]; `index`: int [F], which frames of the sequence (ED first) they belong to.
        length: frames of the sequence.
        was_reversed: the file runs from ES to ED (`camus.Sequence` knows).

    Returns:
        uint8 [length, H, W] in the file's order; halfway between two frames the earlier one counts.
    """
    nearest = np.abs(np.arange(length)[:, None] - np.asarray(index)).argmin(1)
    return masks[nearest][::-1 if was_reversed else 1]


def nifti(path, masks, spacing) -> Path:
    """Write masks as NIfTI in CAMUS's own layout, so that they lie on the patient's file in any viewer.

    Args:
        path: ends in .nii.gz or .nii.
        masks: uint8 [T, H, W], or [H, W] for one instant, at native size, in the order of the patient's file.
        spacing: native (y, x) in mm per pixel.

    Raises:
        ValueError: another suffix or shape, a spacing that is not finite and above 0, or a value that is no label
            (UNLABELLED among them).
    """
    masks = np.asarray(masks)
    if masks.ndim not in (2, 3) or masks.dtype.kind not in "ui" or not masks.size:
        raise ValueError(f"masks are {masks.dtype} of shape {masks.shape}: give whole numbers, [T, H, W] or [H, W].")
    if unknown := sorted(set(np.unique(masks).tolist()) - set(LABELS)):
        raise ValueError(f"masks hold the value {unknown[0]}: write only frames whose pixels are 0 to {max(LABELS)}.")
    with whole(path, ".nii.gz", ".nii") as part:
        save_nifti(part, masks, in_mm(spacing), np.uint8)
    return Path(path)
