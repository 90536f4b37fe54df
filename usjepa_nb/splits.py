"""Who is for training, validation and test: the official lists, and a draw where they leave a part empty."""

import hashlib
import re
from pathlib import Path

from usjepa_nb.images import content, refuse

PARTS = {"train": "subgroup_training.txt", "val": "subgroup_validation.txt", "test": "subgroup_testing.txt"}


def official(root) -> dict[str, str]:
    """patient -> part by the lists in `database_split/`, in `root` or beside it; empty where there are none.

    Raises:
        CamusError: a list that cannot be opened, a line that is no patient, or a patient listed twice.
    """
    listed = {}
    for part, path in _lists(root).items():
        for line in content(path).decode("utf-8-sig", errors="replace").split() if path.exists() else ():
            if not re.fullmatch(r"patient\d+", line):
                raise refuse(path, f"has {line[:40]!r} in it", "write one patient0001 a line")
            if line in listed:
                raise refuse(path, f"lists {line}, which {PARTS[listed[line]]} lists already",
                             "delete one of the two lines, since nobody may be in two parts")
            listed[line] = part
    return listed


def _lists(root):
    """part -> where its official list would be."""
    root = Path(root)
    base = next((b for b in (root, root.parent) if (b / "database_split").is_dir()), root)
    return {part: base / "database_split" / name for part, name in PARTS.items()}


def splits(root, patients, seed=0) -> tuple[dict[str, str], str]:
    """patient -> "train" | "val" | "test", and a note on how that came about.

    Official parts are kept; who is on no list joins train. A part with nobody in it is drawn out of train: a
    tenth of all patients, at least one. Without lists, or with nobody of the official training list, all are
    drawn. A draw orders patients by a hash of seed and name: the same on every machine, and few change places
    when others come.

    Raises:
        CamusError: see `official`.
    """
    patients, listed = sorted(set(patients)), official(root)
    here = [p for p in patients if p in listed]
    absent = [path.name for path in _lists(root).values() if not path.exists()]
    some = len(absent) < len(PARTS)  # lists
    if any(listed[p] == "train" for p in here):
        part = {p: listed.get(p, "train") for p in patients}
        notes = [f"{len(here)} of {len(patients)} patients by the official lists"]
        if len(here) < len(patients):
            notes.append(f"{len(patients) - len(here)} on no list put in train")
    else:
        part = dict.fromkeys(patients, "train")
        notes = ["official lists set aside, nobody to train on" if here else
                 f"official lists set aside, none of the {len(listed)} they name is here" if some else
                 "no official lists"]
    if some:
        notes += [f"database_split/{name} is missing" for name in absent]
    for name in ("val", "test"):
        if name in part.values():
            continue
        train = sorted((p for p in patients if part[p] == "train"),
                       key=lambda p: hashlib.sha256(f"{seed} {p}".encode()).digest())
        drawn = train[:max(1, round(len(patients) / 10))][:len(train) - 1]
        part.update(dict.fromkeys(drawn, name))
        notes.append(f"{name} was empty, {len(drawn)} drawn from train (seed {seed})" if drawn
                     else f"{name} stays empty, there is nobody to spare")
    return part, "; ".join(notes)
