"""Own ultrasound -> frames, spacing and frame time, and nothing else.

Read are a DICOM cine, a video file, NIfTI, and a folder of pictures. Names, dates, private elements and the name of the
file stay where they are: a `Cine` has no place for them. What is burnt into the pixels, `sector` takes care of.
"""

import math
import re
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from usjepa_nb.images import AGAIN, CamusError, read_image

VIDEOS = (".avi", ".mp4", ".m4v", ".mov", ".mkv", ".wmv", ".mpg", ".mpeg", ".webm", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
KINDS = f"a DICOM cine, a video ({', '.join(VIDEOS)}), NIfTI (.nii, .nii.gz) or a folder of pictures"
MOST = 1000  # frames: a loop of some beats, not an hour
LUMA = np.array([0.299, 0.587, 0.114])  # grey of red, green, blue (ITU-R BT.601, as Pillow has it)
USED = {"FrameTime": "frame time", "FrameTimeVector": "frame time", "CineRate": "frame time",
        "PixelSpacing": "spacing", "SequenceOfUltrasoundRegions": "spacing, place of the picture"}


class CineError(ValueError):
    """One sentence: which file, what is wrong, the remedy."""


@dataclass
class Cine:
    """A loop of one view, and all that is carried over of it."""

    frames: np.ndarray  # uint8 [F, H, W], grey
    spacing: tuple[float, float] | None  # (y, x) in mm per pixel; None: not known
    frame_ms: float | None  # ms from one frame to the next; None: not known
    source: str  # the kind of file, not its name
    region: tuple[int, int, int, int] | None = None  # top, bottom, left, right, px, where a DICOM says it
    note: str = ""  # what was odd: spacing or time, of a video its length

    def __str__(self):
        frames, height, width = self.frames.shape
        mm = "spacing unknown" if self.spacing is None else "{:.3f} × {:.3f} mm per pixel (y, x)".format(*self.spacing)
        ms = "frame time unknown" if self.frame_ms is None else f"{self.frame_ms:.1f} ms per frame"
        return f"{self.source}: {frames} frames of {height} × {width} px, {mm}, {ms}{self.note and '; ' + self.note}"


def read(path) -> Cine:
    """Read a loop; colour becomes grey (BT.601), more than 8 bits of a DICOM are scaled to 0..255.

    NIfTI and pictures with more than 8 bits are refused: they do not tell how many of them are used.

    Raises:
        CineError: nothing there, another kind of file, shut, damaged, no plugin for its compression, fewer than two
            frames or more than `MOST`, pictures of different size.
    """
    try:
        path = Path(path).expanduser()
        if path.is_dir():
            reader = _read_folder
        elif not path.is_file():
            raise CineError(f"{path}: no such file or folder; give {KINDS}.")
        elif path.name.lower().endswith((".nii", ".nii.gz")):
            reader = _read_nifti
        elif path.suffix.lower() in VIDEOS:
            reader = _read_video
        else:  # DICOM files have .dcm, another suffix or none
            reader = _read_dicom
        cine = reader(path)
    except (OSError, RuntimeError) as error:  # shut; ~somebody who is not there
        why = getattr(error, "strerror", None) or _why(error).rstrip(".")
        raise CineError(f"{path} cannot be opened ({why}): make it readable, or write its whole path.") from None
    if not 2 <= len(cine.frames) <= MOST:
        remedy = "give a loop" if len(cine.frames) < 2 else f"cut out some beats, at most {MOST} frames"
        raise CineError(f"{path.name} has {_count(len(cine.frames))}: {remedy}.")
    return cine


def given(cine: Cine, mm_per_pixel: float = 0.0, frame_ms: float = 0.0) -> Cine:
    """The loop with what its owner knows better than the file: mm per pixel, both ways, and ms between frames.

    0 keeps what the file says. A video's own rate is how fast it plays, which need not be how fast it was taken.

    Raises:
        CineError: a number below 0 or no finite one.
    """
    changes, notes = {}, [cine.note] if cine.note and (not mm_per_pixel or cine.source == "video") else []
    for name, value in (("mm_per_pixel", mm_per_pixel), ("frame_ms", frame_ms)):
        if not 0 <= value < math.inf:
            raise CineError(f"{name} = {value} cannot be: give a number above 0, or 0 for what the file says.")
    if mm_per_pixel:
        changes["spacing"] = (float(mm_per_pixel),) * 2
        notes.append("spacing measured or given by hand")
    if frame_ms:
        changes["frame_ms"] = float(frame_ms)
        notes.append("frame time given by hand")
    return replace(cine, **changes, note="; ".join(notes))


def _count(frames):
    return "a single frame" if frames == 1 else "no frame" if not frames else f"more than {MOST} frames"


def _why(error):
    return " ".join(str(error).split())[:160] or type(error).__name__


def _read_dicom(path):
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError
    from pydicom.pixels import iter_pixels

    try:
        dataset = dcmread(path)
    except InvalidDicomError:
        raise CineError(f"{path.name} is of no kind that is read here: give {KINDS}.") from None
    except Exception as error:  # whatever a parser stumbles on in a damaged file
        raise CineError(f"{path.name} is cut short or damaged ({_why(error)}): copy it again.") from None
    if "PixelData" not in dataset:
        raise CineError(f"{path.name} has no frame: it is a DICOM file without pictures; give the loop itself.")
    try:
        count = int(dataset.get("NumberOfFrames") or 1)
    except (TypeError, ValueError) as error:
        raise CineError(f"{path.name} has a NumberOfFrames that is no whole number ({_why(error)}): export it "
                        "again.") from None
    if count == 1 or count > MOST:  # `read` says so, and nothing is decoded for it
        return Cine(np.empty((min(count, MOST + 1), 1, 1), np.uint8), None, None, "DICOM")
    try:
        frames = np.stack([_grey(frame, dataset) for frame in iter_pixels(dataset)])
    except RuntimeError as error:  # pydicom: no decoder for this transfer syntax
        kind = dataset.file_meta.TransferSyntaxUID.name
        raise CineError(f"{path.name} is compressed as {kind}, and that could not be decoded ({_why(error)}): pip "
                        "install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or export it uncompressed or as "
                        "MP4.") from None
    except Exception as error:
        raise CineError(f"{path.name} is cut short or damaged ({_why(error)}): copy it again.") from None
    try:
        return Cine(frames, *_calibration(dataset, frames.shape))
    except (AttributeError, TypeError, ValueError) as error:  # the frames are good all the same
        return Cine(frames, None, None, "DICOM", None,
                    f"what it says of pixel size and time cannot be read ({_why(error)}), so both are unknown")


def _grey(frame, dataset):
    """A decoded frame (YBR is RGB by now) -> uint8 [H, W]."""
    kind, most = dataset.PhotometricInterpretation, 2.0 ** dataset.BitsStored - 1
    if kind == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        frame = apply_color_lut(frame, dataset)
        most = np.iinfo(frame.dtype).max
    grey = (frame @ LUMA if frame.ndim == 3 else frame) * (255 / most)
    return np.clip(np.rint(255 - grey if kind == "MONOCHROME1" else grey), 0, 255).astype(np.uint8)


def _calibration(dataset, shape):
    """Spacing, frame time, "DICOM", region and note.

    PS3.3 C.8.5.5: a region of spatial format 1 (2-D) and data type 1 (tissue) is a B-mode picture; PhysicalDelta is in
    cm per pixel where the unit is 3. A box beyond the picture was written for a picture of another size, so neither the
    box nor its spacing can be used.
    """
    _, height, width = shape
    regions = [r for r in dataset.get("SequenceOfUltrasoundRegions") or []
               if (r.get("RegionSpatialFormat"), r.get("RegionDataType")) == (1, 1)]
    spacing, region, note = dataset.get("PixelSpacing"), None, ""
    if regions:
        chosen = max(regions, key=lambda r: (r.RegionLocationMaxY1 - r.RegionLocationMinY0)
                     * (r.RegionLocationMaxX1 - r.RegionLocationMinX0))
        bottom, right = chosen.RegionLocationMaxY1 + 1, chosen.RegionLocationMaxX1 + 1
        if bottom > height or right > width:
            spacing = None
            note = (f"its region ends at row {bottom - 1}, column {right - 1}, beyond the picture: it was written for "
                    "another size, so its spacing is not taken")
        else:
            region = (chosen.RegionLocationMinY0, bottom, chosen.RegionLocationMinX0, right)
            if all(chosen.get(f"PhysicalUnits{axis}Direction") == 3 for axis in "XY"):
                spacing = [abs(10 * float(chosen.get(f"PhysicalDelta{axis}") or 0)) for axis in "YX"]
    if spacing is not None and not all(math.isfinite(mm) and mm > 0 for mm in map(float, spacing)):
        spacing = None
    times = [float(ms) for ms in np.atleast_1d(dataset.get("FrameTimeVector") or [])][1:]  # of one value: a number
    rate = float(dataset.get("CineRate") or 0)
    said = [float(dataset.get("FrameTime") or 0), sum(times) / len(times) if times else 0, 1000 / rate if rate else 0]
    ms = next((ms for ms in said if 0 < ms < math.inf), None)
    if ms is None and any(said):
        odd = f"its frame time of {next(filter(None, said)):g} ms cannot be, so it is unknown"
        note = f"{note}; {odd}" if note else odd
    return tuple(map(float, spacing)) if spacing else None, ms, "DICOM", region, note


def attributes(path):
    """What a DICOM file says beside its pixels: a pandas table with `attribute`, `filled`, `used for`; no values.

    What has nothing under `used for` is dropped. Attributes of group 0028 describe the pixels and are used to decode
    them.
    """
    import pandas as pd
    from pydicom import dcmread

    rows = []
    for element in dcmread(path, stop_before_pixels=True):
        name = element.keyword or f"private {element.tag}"
        used = USED.get(name, "pixels" if element.tag.group == 0x0028 else "")
        rows.append({"attribute": name, "filled": bool(element.value or element.value == 0), "used for": used})
    return pd.DataFrame(rows)


def _read_video(path):
    import imageio_ffmpeg

    stream = imageio_ffmpeg.read_frames(str(path), pix_fmt="gray", bits_per_pixel=8)
    try:
        about = next(stream)
        width, height = about["size"]
        frames = [np.frombuffer(frame, np.uint8).reshape(height, width) for frame in islice(stream, MOST + 1)]
    except Exception as error:
        raise CineError(f"{path.name} cannot be read as a video ({_why(error)[-100:]}): copy it again, or export it as "
                        "MP4 (H.264).") from None
    finally:
        stream.close()
    with path.open("rb") as file:  # of an AVI that was cut, ffmpeg shortens the duration, but its header has the bytes
        size = int.from_bytes(file.read(8)[4:], "little") if path.suffix.lower() == ".avi" else 0
    # WMV, MPEG and GIF that were cut tell nothing; nor does the duration beside sound, which may go on for longer
    fps = about.get("fps") or 0
    wanted = 0 if "audio_codec" in about else (about.get("duration", 0) - 0.01) * fps  # the duration is rounded
    cut = path.stat().st_size < 0.95 * size < 4e9 or len(frames) < min(0.95 * wanted - 2, MOST)
    note = "its header tells of more frames, so it may be cut short: copy it again" if cut else ""  # or of another rate
    frames = np.stack(frames) if frames else np.empty((0, height, width), np.uint8)
    return Cine(frames, None, 1000 / fps if fps else None, "video", note=note)


def _read_nifti(path):
    try:
        frames, spacing = read_image(path)
    except CamusError as error:
        raise CineError(f"{str(error).removesuffix(f': {AGAIN}.')}: copy it again, or save it as one grey loop of 8 "
                        "bits (0..255) with its spacing.") from None
    return Cine(frames, spacing, None, "NIfTI")


def _read_folder(path):
    def natural(name):  # 2 before 10
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]

    files = sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES and p.name[0] != "."),
                   key=lambda p: natural(p.name))
    frames = []
    for file in files[:MOST + 1]:
        try:
            with Image.open(file) as image:
                deep = image.mode[0] in "IF" and image.mode
                frames.append(np.asarray(image.convert("L")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CineError(f"{file.name} cannot be read as a picture ({_why(error)}); copy it again, or take it out "
                            f"of {path.name}.") from None
        if deep:
            raise CineError(f"{file.name} has pixels of more than 8 bits ({deep}): scale them to 0..255, save 8 bits.")
        if frames[-1].shape != frames[0].shape:
            raise CineError(f"{file.name} has {frames[-1].shape} px (y, x) where {files[0].name} has "
                            f"{frames[0].shape}: give a folder with the frames of one loop.")
    return Cine(np.stack(frames) if frames else np.empty((0, 1, 1), np.uint8), None, None, "folder of pictures")
