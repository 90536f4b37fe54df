"""One sequence -> one small file of resized frames and masks, by several workers; it is whole or absent."""

import errno
import hashlib
import json
import os
import shutil
import tokenize
import zipfile
import zlib

import numpy as np

from usjepa_nb import camus, parallel
from usjepa_nb.clips import resize_frame, resize_mask

# What NumPy and zipfile raise for an .npz that is cut short, or in which any byte has changed.
DAMAGED = (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)


def digest(value) -> str:
    """A hash of a JSON-like value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def mark(entry, size, version) -> str:
    """A name for what an entry's files become; another as soon as one of them, the size or the version changes."""
    stats = {role: path.stat() for role, path in entry.files.items() if os.access(path, os.F_OK)}
    state = [[role, entry.files[role].name, s.st_size, s.st_mtime_ns] for role, s in sorted(stats.items())]
    return f"{entry.patient}_{entry.view}_{digest([version, size, str(entry.problem), state])[:16]}"


def make(entries, paths, size, *, workers, progress) -> list[tuple[str, str] | None]:
    """Make one part (.npz) per entry; for each entry None, or (file, sentence) where it was refused."""
    jobs = [(entry, path, size) for entry, path in zip(entries, paths, strict=True)]
    return parallel.run(_make, jobs, workers, desc="CAMUS", unit="sequence", disable=not progress)


def _make(entry, path, size):
    try:
        s = camus.read(entry)
    except camus.CamusError as error:
        return error.file, str(error)
    (height, width), (mm_y, mm_x) = s.frames.shape[1:], s.spacing
    row = {
        "patient": s.patient, "view": s.view, "split": "", "start": 0, "length": len(s.frames),
        "ed": s.ed, "es": s.es, "spacing_y": mm_y * height / size, "spacing_x": mm_x * width / size,
        "native_h": height, "native_w": width, "native_spacing_y": mm_y, "native_spacing_x": mm_x,
        "ef": s.ef, "quality": s.quality, "sex": s.sex, "age": s.age, "frame_rate": s.frame_rate,
        "labelled": bool((s.masks != camus.UNLABELLED).any()), "ed_es_only": s.ed_es_only,
        "was_reversed": s.was_reversed, "sha256": s.sha256}
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, row=json.dumps(row), native_masks=s.masks[[s.ed, s.es]],
                                frames=[resize_frame(frame, size) for frame in s.frames],
                                masks=[resize_mask(mask, size) for mask in s.masks])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path, what):
    """`frames`, `masks`, `native_masks`, or the `row` of the table (split and start are filled in later).

    Raises:
        OSError: absent or damaged.
    """
    try:
        with np.load(path) as part:
            return json.loads(str(part[what])) if what == "row" else part[what]
    except DAMAGED as e:
        why = str(e)[:99]  # zipfile would quote pages
        raise OSError(f"{path} cannot be read as a converted sequence ({why}): convert again, it is made anew") from e


def require_space(folder, needed):
    """Look before an HDF5 file of `needed` bytes is begun in `folder`: HDF5 itself crashes on a full disk.

    Raises:
        OSError: there is less.
    """
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"No space left on device, {needed / 1e6:.0f} MB wanted", str(folder))


def is_whole(path) -> bool:
    """Whether every member can be read: a part is absent, or cut short, when the machine went down."""
    try:
        return all(load(path, what) is not None for what in ("row", "native_masks", "frames", "masks"))
    except OSError:
        return False
