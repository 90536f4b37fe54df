"""Images in a folder as a task: UltraBench's data sets as `ultrabench` writes them, or any `<split>/<class>/*.png`.

UltraBench (Tupper & Gagné, TMLR 2025, `pip install ultrabench`) puts the images of a data set into `images/` and
describes them in `train.json`, `validation.json` and `test.json`: each a list of objects with the keys `image` (a path
within the folder), `label` (a number from 0) and more that differ from set to set: `patient` or `source` says whose
the image is (where neither is known it counts for itself), `pathology`, `class` or `image_quality` is the label in
words. An image is shown to the video encoder as a clip that stands still.
"""

from __future__ import annotations

import json
import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from usjepa_nb.clips import resize_frame
from usjepa_nb.tasks import Task, TaskError, still

NAMES = {"train": ("train", "training"), "val": ("validation", "val", "valid"), "test": ("test", "testing")}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
OWNERS = ("patient", "source")  # UltraBench's keys for whose the image is; images of AUL, GBCU and MMOTU have neither


def read(root: str | Path, size: int, frames: int, label: str = "label", regression: bool = False,
         patient: str = "") -> Task:
    """Read a task of images; each becomes a clip of `frames` equal frames of `size` × `size` px, resized whole.

    Args:
        label: which key of UltraBench's objects is asked for; in CAMUS `view` or `EF` would be others.
        regression: the label is a quantity, not a class.
        patient: for `<split>/<class>/*.png`, a regular expression whose match in the file's name says whose it is.

    Raises:
        TaskError: no such folder, no train or test part, a broken list, a label that is missing, an image that is
            not there or cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise TaskError(f"{root}: no such folder; give one with train.json and test.json, or with train/ and test/")
    lists = any((root / f"{name}.json").is_file() for names in NAMES.values() for name in names)
    found = from_lists(root, label, regression) if lists else from_folders(root, patient)
    if regression and not lists:
        raise TaskError(f"{root}: folders hold classes and no quantities; put the labels into train.json and test.json")
    for part in ("train", "test"):
        if not any(row[3] == part for row in found):
            raise TaskError(f"{root}: no images for the part {part!r}; give {part}.json (UltraBench) or "
                            f"{part}/<class>/*.png")
    paths, labels, groups, split = (list(column) for column in zip(*found, strict=True))
    if len(set(groups)) == len(groups):
        print(f"{root.name}: nothing says which images are of one patient, so each counts for itself; the intervals "
              "are too narrow where patients have several")
    members = {part: {g for g, s in zip(groups, split, strict=True) if s == part} for part in NAMES}
    for a, b in combinations(NAMES, 2):
        if both := sorted(members[a] & members[b]):
            print(f"{root.name}: patients in {a} and in {b} at once: {len(both)} ({both[0]}, …); read the scores with "
                  "that in mind, or split again by patient")
    images = np.stack([image(path, size) for path in paths])
    return Task(root.name, still(images, frames), np.array(labels, float if regression else str), np.array(groups),
                np.array(split))


def from_lists(root: Path, label: str, regression: bool) -> list[tuple]:
    """(path, label, group, part) of every image that UltraBench's JSON files name."""
    found = []
    for part, names in NAMES.items():
        for path in (root / f"{name}.json" for name in names if (root / f"{name}.json").is_file()):
            try:
                rows = json.loads(path.read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError) as e:
                raise TaskError(f"{path}: cannot be read as JSON ({e}); let `ultrabench` write it again") from e
            if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("image"), str)
                                                  for row in rows):
                raise TaskError(f'{path}: is not a list of objects with the key "image", as UltraBench writes it')
            for row in rows:
                if label not in row:
                    raise TaskError(f"{path}: {row['image']} has no {label!r}; its keys are {', '.join(row)}: choose "
                                    "one with --label (Open Kidney and PSFHS are for segmentation only)")
                owner = next((f"{row[key]}" for key in OWNERS if not unknown(row.get(key))), row["image"])
                found.append((root / row["image"], value(row[label], path, label, regression), owner, part))
    return found


def unknown(entry) -> bool:
    """Whether an entry of a list says nothing: null, NaN or an empty text."""
    return entry is None or entry == "" or (isinstance(entry, float) and math.isnan(entry))


def value(label, path: Path, key: str, regression: bool):
    """A label as text, or as a finite number for a regression; unknown ones become "" or nan."""
    if unknown(label):
        return math.nan if regression else ""
    if not regression:
        return str(label)
    try:
        number = float(label)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise TaskError(f"{path}: {key} = {label!r} is no finite number, so it cannot be regressed; correct it, leave "
                        "--regression out, or choose another --label")
    return number


def from_folders(root: Path, patient: str) -> list[tuple]:
    """(path, class, group, part) of every image in `<split>/<class>/`."""
    found = []
    try:
        re.compile(patient)
    except re.error as e:
        raise TaskError(f"--patient {patient!r} is no regular expression ({e}): correct it") from None
    for part, names in NAMES.items():
        for path in sorted(p for name in names for p in (root / name).glob("*/*") if p.suffix.lower() in SUFFIXES):
            match = re.search(patient, path.name) if patient else None
            if patient and not match:
                raise TaskError(f"{path}: its name has no match for --patient {patient!r}; correct the expression")
            owner = match[0] if match else path.relative_to(root).as_posix()
            found.append((path, path.parent.name, owner, part))
    return found


def image(path: Path, size: int) -> np.ndarray:
    """An image file as grey values, uint8 [size, size].

    Raises:
        TaskError: not there, or not readable.
    """
    try:
        with Image.open(path) as file:
            if file.mode[0] in "IF":
                raise ValueError(f"its pixels have more than 8 bits, {file.mode}: save it with 8")
            return resize_frame(np.asarray(file.convert("L")), size)
    except FileNotFoundError:
        raise TaskError(f"{path}: no such image, though its list names it; let `ultrabench` prepare the set again") \
            from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise TaskError(f"{path}: cannot be read as an image ({e}); copy it again, or take it out") from e
