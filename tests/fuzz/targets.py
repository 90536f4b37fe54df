"""What is fuzzed: each reader of a file that comes from somewhere else, and what it may raise.

A target takes the bytes of one file. Whatever they are, the reader answers, or refuses in one documented way, with one
sentence that names the file. Anything else is a defect: it becomes a test beside the module's own, and is put right.
"""

import gzip
import itertools
import math
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import yaml

from usjepa_nb import camus, grid, profile, splits
from usjepa_nb.images import CamusError, read_image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
CFG = {"ED": 1, "ES": 6, "NbFrame": 6, "Sex": "F", "Age": 56, "ImageQuality": "Good", "EF": 54, "FrameRate": 48.4}
KEYS = {"ED": int, "ES": int, "NbFrame": int, "EF": float, "LVef": float, "Age": float, "FrameRate": float, "Sex": str,
        "ImageQuality": str}


def place(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(data)
    return path


def refused(error: Exception, path: Path) -> None:
    """See that a refusal is one line of reasonable length that names its file."""
    assert path.name in str(error) and "\n" not in str(error) and len(str(error)) < 600, str(error)


def cfg(data: bytes) -> bool:
    """Info_4CH.cfg, every key as `camus.read` asks for it."""
    path = place("patient0001/Info_4CH.cfg", data)
    read = 0
    for key, kind in KEYS.items():
        try:
            value = camus._cfg(path)(key, kind)
            assert isinstance(value, kind) and (kind is str or math.isfinite(value))
            read += 1
        except CamusError as error:
            refused(error, path)
    return read > 0


def lists(data: bytes) -> bool:
    """An official list; the other two are as they should be."""
    for part, name in (("val", "patient0002"), ("test", "patient0003")):
        place(f"tree/database_split/{splits.PARTS[part]}", name.encode())
    path = place(f"tree/database_split/{splits.PARTS['train']}", data)
    try:
        part, note = splits.splits(FOLDER / "tree", [f"patient{n:04d}" for n in range(1, 6)])
    except CamusError as error:
        assert "subgroup_" in str(error)
        refused(error, path if path.name in str(error) else path.with_name(splits.PARTS["test"]))
        return False
    assert set(part.values()) <= set(splits.PARTS) and note
    assert "set aside" in note or (part["patient0002"], part["patient0003"]) == ("val", "test")
    return True


def nifti(data: bytes) -> bool:
    """An image file, packed or not."""
    path = place("patient0001/patient0001_4CH_ED.nii", data)
    try:
        frames, spacing = read_image(path)
    except CamusError as error:
        refused(error, path)
        return False
    assert frames.ndim == 3 and frames.dtype == np.uint8 and frames.size and all(0 < mm < math.inf for mm in spacing)
    return True


def settings(data: bytes) -> bool:
    """A profile of one's own."""
    path = place("own.yaml", data)
    try:
        assert profile.load(str(path)).name == "own"
    except profile.ProfileError as error:
        assert "\n" not in str(error) and ("own.yaml" in str(error) or "'own'" in str(error)), str(error)
        return False
    return True


def cells(data: bytes) -> bool:
    """A grid of one's own."""
    path = place("cells.yaml", data)
    try:
        assert grid.load(str(path), 4).cells
    except grid.GridError as error:
        assert "\n" not in str(error) and "cells.yaml" in str(error), str(error)
        return False
    return True


def cfg_seeds():
    text = "\n".join(f"{key}: {value}" for key, value in CFG.items())
    yield from (s.encode() for s in (text, text.replace("EF", "LVef"), text.replace("\n", "\r\n"), "\ufeff" + text,
                                     "ED:1\nES:  2 \nNbFrame: 2", "ED: 1e3\nES: nan\nEF: inf\nAge: -1"))
    yield text.encode("utf-16")


def list_seeds():
    yield from (b"patient0001\npatient0004\n", b"patient0001\r\npatient0004", b"", b"patient0002",
                b"\xef\xbb\xbfpatient0001", b"patient1 patient2\tpatient5")


def nifti_seeds():
    """Small images of several kinds and shapes, packed and not."""
    for kind, shape in itertools.product((np.uint8, np.int16, np.float32, np.float64), ((5, 4), (5, 4, 1), (5, 4, 3))):
        values = (np.arange(math.prod(shape)) % 4).reshape(shape).astype(kind)
        image = nibabel.Nifti1Image(values, np.diag([-0.3, -0.3, 1, 1]))
        yield image.to_bytes()
        if shape == (5, 4, 3):
            yield gzip.compress(image.to_bytes(), mtime=0)


def settings_seeds():
    for path in sorted((ROOT / "profiles").glob("*.yaml")):
        yield path.read_bytes()
        yield yaml.safe_dump(yaml.safe_load(path.read_text())).encode()  # shorter: without comments
    yield b"steps: !!int 3\nlr: !!float 1e-3\nmask: &a tube\nclip_rule: *a\nshort_range: [8, 0.15]"


def cells_seeds():
    for path in sorted((ROOT / "grids").glob("*.yaml")):
        yield path.read_bytes()
        yield yaml.safe_dump(yaml.safe_load(path.read_text()), default_flow_style=True).encode()


WORDS = {
    "cfg": [*(f"{key}:" for key in KEYS), "nan", "inf", "1e999", "-1", "0x1", "\u0661", "9" * 20, "\r", "\ufeff"],
    "lists": ["patient", "patient0002", "patient0003", "\ufeff", "\u0661"],
    "nifti": ["n+1\0", "ni1\0", "\x1f\x8b"],
    "yaml": ["!!", "!!int", "!!float", "!!bool", "!!timestamp", "!!binary", "!!set", "!!omap", "!!pairs", "!!null",
             "<<: ", "&a", "*a", "? ", "- ", ": ", "{", "}", "[", "]", ".nan", ".inf", "2024-02-31", "1:99:99", "0b2",
             "0x", "~", "%YAML", "---", "9" * 400, "1/0"],
}
TARGETS = {  # name: (function, seeds, words)
    "cfg": (cfg, cfg_seeds, WORDS["cfg"]),
    "lists": (lists, list_seeds, WORDS["lists"]),
    "nifti": (nifti, nifti_seeds, WORDS["nifti"]),
    "profile": (settings, settings_seeds, WORDS["yaml"]),
    "grid": (cells, cells_seeds, WORDS["yaml"]),
}
