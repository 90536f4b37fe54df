"""A CAMUS data set made from moving scatterers, so that everything runs without the real one.

`anatomy` draws hearts and moves them, `echo` makes ultrasound of them; here they become the files of CAMUS.
"""
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from usjepa_nb import parallel
from usjepa_nb.anatomy import VIEWS
from usjepa_nb.echo import QUALITY, render
from usjepa_nb.images import save_nifti

VERSION = 2  # raise it whenever the same arguments would give other bits


def write_patient(number, root, seed, spacing):
    """Write both views of one patient; the folder gets its name only when it is whole."""
    name = f"patient{number:04d}"
    final = root / "database_nifti" / name
    try:
        with tempfile.TemporaryDirectory(dir=root / ".partial") as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            for view in VIEWS:
                write_view(folder, f"{name}_{view}", view, render(seed, number, view, spacing=spacing))
            os.rename(folder, final)
    except OSError:
        if not final.is_dir():  # else another process was faster; its bits are the same
            raise


def write_view(folder, stem, view, d):
    """The six images and the cfg of one view, as CAMUS names and orders them."""
    for suffix, images in (("", d["frames"]), ("_gt", d["masks"])):
        stored = images[::-1] if d["reverse"] else images
        for part, volume in (("half_sequence", stored), ("ED", images[0]), ("ES", images[-1])):
            save_nifti(folder / f"{stem}_{part}{suffix}.nii.gz", volume, (d["spacing"],) * 2)
    total = len(d["frames"])
    ed, es = (total, 1) if d["reverse"] else (1, total)
    facts = {"ED": ed, "ES": es, "NbFrame": total, "Sex": d["sex"], "Age": d["age"],
             "ImageQuality": d["quality"], "EF": round(d["ef"]), "FrameRate": d["frame_rate"]}
    (folder / f"Info_{view}.cfg").write_text("\n".join(f"{key}: {value}" for key, value in facts.items()))


def write_text(path, text):
    """Write all of a file or nothing of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, path)


def claim(root, **facts):
    """Mark `root` as this phantom, or refuse it: one folder never holds two data sets."""
    marker, text = root / "phantom.cfg", "".join(f"{key}: {value}\n" for key, value in facts.items())
    if marker.exists():
        there = dict(line.split(": ", 1) for line in marker.read_text().splitlines() if ": " in line)
        changed = [f"{k} {there.get(k)}, not {v}" for k, v in facts.items() if there.get(k) != str(v)]
        if changed:
            raise ValueError(f"{root} holds another phantom ({'; '.join(changed)}): choose a new folder.")
    elif any((root / name).exists() for name in ("database_nifti", "database_split")):
        raise ValueError(f"{root} holds data that are not a phantom's (no phantom.cfg): choose a new folder.")
    (root / ".partial").mkdir(parents=True, exist_ok=True)
    write_text(marker, text)
    for name in ("database_nifti", "database_split"):
        (root / name).mkdir(exist_ok=True)


def split(patients, seed):
    """About 60 / 20 / 20 % of the patients, drawn at random -> dict of lists of names."""
    order = np.random.default_rng([seed, patients]).permutation(patients) + 1
    cuts = [round(0.2 * patients), 2 * round(0.2 * patients)]
    return {part: [f"patient{n:04d}" for n in sorted(numbers)] for part, numbers in
            zip(("testing", "validation", "training"), np.split(order, cuts), strict=True)}


def make(root, patients=60, seed=0, *, spacing=0.6, workers=2, progress=True):
    """Write a synthetic data set in the layout of the CAMUS NIfTI release; patients already there are kept.

    Args:
        root: Folder to hold database_nifti/ and database_split/; new, or made by the same call before.
        patients: How many; the same patient number looks the same in a larger set.
        seed: Chooses the whole data set, bit for bit, whatever `workers` is.
        spacing: Pixel size, mm (each patient differs from it by up to 3 %); CAMUS has 0.308.
        workers: Processes.
        progress: Show a bar.

    Returns:
        root as a Path.

    Raises:
        ValueError: patients, spacing or workers out of range, or root holds something else.
    """
    root = Path(root)
    if patients < 1 or workers < 1 or not 0.1 <= spacing <= 2:
        raise ValueError(f"patients={patients}, workers={workers}: at least 1; spacing={spacing}: 0.1-2 mm.")
    claim(root, what="synthetic echocardiography in the layout of CAMUS, no patient data", version=VERSION,
          seed=seed, patients=patients, spacing=float(spacing))
    todo = [n for n in range(1, patients + 1) if not (root / f"database_nifti/patient{n:04d}").is_dir()]
    parallel.run(write_patient, [(number, root, seed, spacing) for number in todo], workers,
                 desc="phantom", unit="patient", disable=not (progress and todo))
    for part, names in split(patients, seed).items():
        write_text(root / f"database_split/subgroup_{part}.txt", "\n".join(names))
    shutil.rmtree(root / ".partial", ignore_errors=True)  # what killed runs left behind
    return root


def sequence(seed, view, quality=None, *, spacing=0.6, frames=None):
    """The view "2CH" or "4CH" of data set `seed`'s first patient, in memory -> camus.Sequence, ED first."""
    from usjepa_nb.camus import Sequence
    if view not in VIEWS or quality not in (None, *QUALITY):
        raise ValueError(f"view={view!r} must be in {VIEWS}, quality={quality!r} in {(*QUALITY, None)}.")
    d = render(seed, 1, view, quality, spacing, frames)
    spacing, reverse = (d.pop("spacing"),) * 2, d.pop("reverse")
    return Sequence(**d | {"ef": float(round(d["ef"]))}, patient="patient0001", view=view, spacing=spacing,
                    ed=0, es=len(d["frames"]) - 1, ed_es_only=False, was_reversed=reverse, sha256="")
