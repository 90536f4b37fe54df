"""A CAMUS tree on disk -> patients, views, frames, masks.

Both releases are read: NIfTI (`patient0001/patient0001_4CH_half_sequence.nii.gz`, the official lists in
`database_split/`) and MHD (`patient0001/patient0001_4CH_sequence.mhd`). A copy may be partial: one view, only
ED and ES, sequences without masks, patients absent. `overview` counts what is there; `read` refuses what is
damaged. CAMUS: Leclerc et al., IEEE TMI 38(9) 2198-2210, 2019; for research, not for redistribution.
"""

import hashlib
import itertools
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from usjepa_nb.images import (
    LABELS,
    UNLABELLED,
    CamusError,
    content,
    raw_of,
    read_grid,
    read_mask,
    read_onto,
    refuse,
    short,
)
from usjepa_nb.splits import PARTS, official, splits

__all__ = ["LABELS", "UNLABELLED", "CamusError", "Entry", "Sequence", "overview", "read", "scan", "splits"]

VIEWS = ("2CH", "4CH")
RELEASES = ((".nii.gz", ".nii"), (".mhd",))  # the first one found in a folder is read
ROLES = {f"{name}{gt}": f"{role}{gt}" for gt in ("", "_gt") for name, role in (
    ("ED", "ED"), ("ES", "ES"), ("half_sequence", "sequence"), ("sequence", "sequence"))}


@dataclass(frozen=True)
class Entry:
    """The files of one view of one patient, found but not yet read.

    `files`: role (cfg, ED, ES, sequence; images also with _gt and _raw) -> path. `problem`: why it cannot be
    read at all. `left_out`: {file: sentence} of files that have to be done without.
    """

    patient: str
    view: str
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    problem: CamusError | None = None
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Sequence:
    """One view of one patient from end-diastole, the first frame, to end-systole, the last; apex up."""

    patient: str
    view: str  # 2CH or 4CH
    frames: np.ndarray  # uint8 [T, H, W]
    masks: np.ndarray  # uint8 [T, H, W]: 0..3, UNLABELLED where there is no reference
    ed: int  # index into frames
    es: int
    spacing: tuple[float, float]  # (y, x), mm
    ef: float  # %: `EF` of the NIfTI release, `LVef` of the MHD release (they differ); NaN where unknown
    quality: str  # Good, Medium, Poor
    sex: str
    age: float  # years
    frame_rate: float  # frames/s; the MHD release does not tell: NaN
    ed_es_only: bool  # two frames, nothing between them
    was_reversed: bool  # stored ES -> ED, turned round here
    sha256: str  # of the content of all its files


def scan(root) -> list[Entry]:
    """All patients and views, sorted. `root` holds the patients' folders, or database_nifti/ that holds them.

    Raises:
        CamusError: no such folder, or no patient in it. (What is wrong with one patient, `read` tells.)
    """
    root = Path(root)
    found = (root, *root.glob("patient*"), *root.glob("*/patient*"))
    folders = sorted((p.name, p) for p in found if re.fullmatch(r"patient\d+", p.name) and p.is_dir())
    if not folders:
        raise CamusError(f"{root} holds no patient: give the folder with database_nifti/ or patient0001/.")
    every, homes, entries = [entry for _, folder in folders for entry in _entries(folder)], {}, {}
    for entry in every:
        homes.setdefault(entry.patient, set()).update(() if entry.problem else {entry.folder})
    for entry in every:
        if not entry.problem and (others := homes[entry.patient] - {entry.folder}):  # MHD: training/ and testing/
            twice = refuse(entry.folder, f"is there twice, also as {short(min(others))}",
                           f"keep only one of them, or read {entry.folder.parent.name}/ alone")
            entry = replace(entry, problem=twice)
        entries[entry.patient, entry.view] = entry
    return [entries[key] for key in sorted(entries)]


def _entries(folder):
    """The views in one patient's folder; one entry with a problem if it is shut, empty or nothing is well named."""
    try:
        names, entries = sorted(path.name for path in folder.iterdir()), []
    except OSError as error:
        problem = refuse(folder, f"cannot be opened ({error.strerror})", "make it readable")
        return [Entry(folder.name, "?", folder, {}, problem)]
    for view, suffixes in itertools.product(VIEWS, RELEASES):
        files, left_out = {}, {}
        for (name, role), suffix in itertools.product(ROLES.items(), suffixes):
            path = folder / f"{folder.name}_{view}_{name}{suffix}"
            if path.name not in names:
                continue
            raw = raw_of(path)
            if raw and not raw.is_file():
                no_data = refuse(path, f"has no {raw.name} beside it", "copy that file as well")
                left_out[no_data.file] = str(no_data)
            else:
                files.update({role: path, f"{role}_raw": raw} if raw else {role: path})
        if (files or left_out) and (not entries or entries[-1].view != view):
            files["cfg"] = folder / f"Info_{view}.cfg"
            entries.append(Entry(folder.name, view, folder, files, None, left_out))
    strays = [name for name in names if name.endswith((".nii.gz", ".nii", ".mhd")) and name[0] != "."]
    if not entries:
        problem = refuse(folder / strays[0], "is named after no view of this patient",
                         f"rename it ({folder.name}_4CH_ED.nii.gz and so on) or move it") if strays else \
            refuse(folder, "holds no image", "copy its files again, or delete it to go on without it")
        entries.append(Entry(folder.name, "?", folder, {}, problem))
    return entries


def read(entry: Entry) -> Sequence:
    """One view of one patient.

    A half sequence is taken with its masks; if these are absent, ED_gt and ES_gt lie at frames ED and ES and
    the rest is UNLABELLED. Without a sequence, ED and ES make two frames. What is stored ES -> ED (ED > ES in
    the cfg) is turned round, and frames outside ED..ES (CAMUS has none) are cut off.

    Raises:
        CamusError: files missing, damaged or not matching each other (shape, spacing, axes); cfg incomplete.
    """
    if entry.problem:
        raise entry.problem
    files, cfg = entry.files, _cfg(entry.files["cfg"])
    hashes = [[role, hashlib.sha256(content(path)).hexdigest()] for role, path in sorted(files.items())]
    ed, es, ed_es_only = cfg("ED", int) - 1, cfg("ES", int) - 1, "sequence" not in files
    if not ed_es_only:
        frames, spacing, axes = read_grid(files["sequence"])
        if cfg("NbFrame", int) != len(frames):
            raise refuse(files["sequence"], f"has {len(frames)} frames, its cfg says {cfg('NbFrame')}")
        if ed == es or not (0 <= ed < len(frames) and 0 <= es < len(frames)):
            raise refuse(files["cfg"], f"has ED: {ed + 1} and ES: {es + 1} for {len(frames)} frames",
                         f"write two different frames of 1..{len(frames)}")
    elif "ED" in files and "ES" in files:
        frames, spacing, axes = read_grid(files["ED"])
        if len(frames) != 1:
            raise refuse(files["ED"], f"has {len(frames)} frames instead of one")
        frames, ed, es = np.concatenate([frames, read_onto(files["ES"], frames.shape, spacing, axes)]), 0, 1
    else:
        what = f"has neither a {entry.view} sequence nor both ED and ES"
        raise refuse(entry.folder, what, "copy what is missing from the same release")
    masks = np.full_like(frames, UNLABELLED)
    if not ed_es_only and "sequence_gt" in files:
        masks = read_mask(files["sequence_gt"], frames.shape, spacing, axes)
    else:
        for at, role in ((ed, "ED_gt"), (es, "ES_gt")):
            if role in files:
                masks[at] = read_mask(files[role], (1, *frames.shape[1:]), spacing, axes)[0]
    cut = slice(ed, es + 1) if ed < es else slice(ed, es - 1 if es else None, -1)
    frames, masks = np.ascontiguousarray(frames[cut]), np.ascontiguousarray(masks[cut])
    return Sequence(
        entry.patient, entry.view, frames, masks, 0, len(frames) - 1, spacing,
        cfg("LVef", float, cfg("EF", float, math.nan)), cfg("ImageQuality", str, ""), cfg("Sex", str, ""),
        cfg("Age", float, math.nan), cfg("FrameRate", float, math.nan), ed_es_only, ed > es,
        hashlib.sha256(repr(hashes).encode()).hexdigest())


def _cfg(path):
    """A function (key, kind, default) -> value of the `key: value` lines of a file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise refuse(path, "is missing", "copy it from the same release") from None
    except UnicodeDecodeError:
        raise refuse(path, "cannot be read as text", "save it as UTF-8, or copy it from the same release") from None
    except OSError as error:
        raise refuse(path, f"cannot be opened ({error.strerror})", "make it a readable file") from None
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def value(key, kind=str, default=None):
        if key not in values and default is not None:
            return default
        try:
            number = kind(values[key])
            if kind is str or math.isfinite(number):
                return number
        except (KeyError, ValueError, OverflowError):
            pass
        has = f"has {key}: {values[key]!r:.60}" if key in values else f"has no line {key}:"
        raise refuse(path, has, f"write a {'whole number' if kind is int else 'number such as 54.5'} there")

    return value


def overview(root, seed=0):
    """What is there: a pandas table with a row per official part and view, counting patients.

    `listed` in the official list, `found` and `missing` of these; of the found: with a `sequence`,
    `ed_es_only`, `reversed`, with `masks`; `used`: patients that `splits` puts in this part (its note is in
    `attrs["note"]`). Reads cfg files but no image.
    """
    import pandas as pd

    entries, listed = scan(root), official(root)
    part, note = splits(root, [e.patient for e in entries if e.view in VIEWS], seed)
    rows = []
    for name, view in itertools.product((*PARTS, "unlisted"), VIEWS):
        found = [e for e in entries if e.view == view and listed.get(e.patient, "unlisted") == name]
        count = sum(p == name for p in listed.values()) if name in PARTS else len(found)
        videos = [e for e in found if "sequence" in e.files]
        rows.append({"split": name, "view": view, "listed": count, "found": len(found),
                     "missing": count - len(found), "sequence": len(videos),
                     "ed_es_only": len(found) - len(videos), "reversed": sum(map(_is_reversed, videos)),
                     "masks": sum(any("_gt" in role for role in e.files) for e in found),
                     "used": sum(e.view == view and part[e.patient] == name for e in entries)})
    table = pd.DataFrame(rows[:None if rows[-1]["found"] or rows[-2]["found"] else -2])
    table.attrs["note"] = note
    return table


def _is_reversed(entry):
    try:
        cfg = _cfg(entry.files["cfg"])
        return cfg("ED", int) > cfg("ES", int)
    except CamusError:  # `read` will say so
        return False
