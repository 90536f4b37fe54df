"""A CAMUS tree -> one HDF5 file; clips out of it.

All sequences lie one after another in two flat uint8 datasets, `frames` and `masks` [N, S, S], so that a
clip is one contiguous slice; strides are taken in numpy (a strided slice inside h5py is 75-95 times slower).
Every frame is resized whole to S x S: nothing is cropped, the aspect ratio changes, so spacing is kept per
axis. For distances in millimetres the ED and ES masks are also kept at native size.
"""

import contextlib
import functools
import math
import os
import shutil
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
from filelock import FileLock

from usjepa_nb import camus, parts
from usjepa_nb.camus import CamusError
from usjepa_nb.clips import Clip, clip_index

__all__ = ["Clip", "Report", "Store", "clip_index", "convert"]

FORMAT, VERSION = "usjepa_nb store", 1


@dataclass
class Report:
    """What `convert` did: sequences made and reused, {file: sentence} refused, the note on the split."""

    converted: int = 0
    reused: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    note: str = ""


def convert(root, out, size, *, workers=2, seed=0, progress=True) -> Report:
    """Convert the CAMUS tree at `root` into the HDF5 file `out` with frames of `size` x `size` px.

    Workers put one file per sequence into `<out>.parts/`; at the end all go into a temporary file, which is
    moved to `out`. Stopped at any moment and run again it goes on; finished already it only looks. A sequence
    is made again when a name, size or time among its files changes. A second process waits for the first.

    Raises:
        CamusError: nothing could be converted, or `out` cannot be written (a bad sequence is only reported).
    """
    out, entries = Path(out), camus.scan(root)
    if size != int(size) or size < 1:
        raise ValueError(f"size must be a whole number of pixels, not {size}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{out}.lock"):
            return _convert(root, entries, out, int(size), workers, seed, progress)
    except BrokenProcessPool as error:
        raise CamusError(f"{out}: a worker process died: run it again with workers=1.") from error
    except OSError as error:
        raise CamusError(f"{out} could not be written ({error.strerror or error}): see that its folder is "
                         "writable and has space, then run it again; it goes on where it stopped.") from error


def _convert(root, entries, out, size, workers, seed, progress):
    for left in out.parent.glob(f"{out.name}.tmp*"):  # by a killed process: nobody else holds the lock
        left.unlink()
    folder = Path(f"{out}.parts")
    folder.mkdir(exist_ok=True)
    report, before, sources, todo = Report(), _made_before(out), {}, {}
    for entry in entries:
        report.refused.update(entry.left_out)
        mark = parts.mark(entry, size, VERSION)
        sources[mark] = before.get(mark) or functools.partial(parts.load, folder / f"{mark}.npz")
        if mark not in before and not parts.is_whole(folder / f"{mark}.npz"):
            todo[mark] = entry
    refusals = parts.make(todo.values(), [folder / f"{mark}.npz" for mark in todo], size,
                          workers=workers, progress=progress and bool(todo))
    for mark, refusal in zip(todo, refusals, strict=True):
        if refusal:
            report.refused.update([refusal])
            del sources[mark]
    if not sources:
        raise CamusError(f"{root}: no sequence could be converted. " + " ".join(report.refused.values()))
    report.converted = refusals.count(None)
    report.reused = len(sources) - report.converted
    rows, start = [load("row") for load in sources.values()], 0
    split, report.note = camus.splits(root, [row["patient"] for row in rows], seed)
    for mark, row in zip(sources, rows, strict=True):
        row.update(split=split[row["patient"]], start=start, mark=mark)
        start += row["length"]
    content = [[row[name] for name in ("patient", "view", "split", "sha256")] for row in rows]
    attrs = {"format": FORMAT, "version": VERSION, "size": size, "split_note": report.note,
             "made_from": os.fsencode(Path(root).resolve().name).decode("utf-8", "replace"),
             "data_hash": parts.digest([VERSION, size, report.note, content])}
    old = next(iter(before.values())).args[0] if before else None
    if list(before) != list(sources) or attrs["data_hash"] != old.data_hash:
        temporary = Path(f"{out}.tmp{os.getpid()}")
        _write(temporary, sources.values(), rows, attrs)
        if old:
            old.close()
        os.replace(temporary, out)
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _made_before(out):
    """{mark: function that loads it} of the file that is to be replaced."""
    try:
        store = Store(out)
    except CamusError:
        return {}
    return {mark: functools.partial(_load, store, i) for i, mark in enumerate(store.marks)}


def _load(store, i, what):
    return store.table.iloc[i].to_dict() if what == "row" else getattr(store, what)(i)


def _write(path, sources, rows, attrs):
    shape = (rows[-1]["start"] + rows[-1]["length"], attrs["size"], attrs["size"])
    parts.require_space(path.parent, 2 * math.prod(shape) + 32_000 * len(rows))
    try:
        with h5py.File(path, "w") as file:
            file.attrs.update(attrs)
            table = file.create_group("sequences", track_order=True)
            for name in rows[0]:
                column = np.array([row[name] for row in rows])
                table[name] = np.char.encode(column, "utf-8") if column.dtype.kind == "U" else column
            flat = {name: file.create_dataset(name, shape, np.uint8) for name in ("frames", "masks")}
            for i, (load, row) in enumerate(zip(sources, rows, strict=True)):
                for name, dataset in flat.items():
                    dataset[row["start"]:row["start"] + row["length"]] = load(name)
                if row["labelled"]:
                    file.create_dataset(f"native/{i}", data=load("native_masks"), compression="gzip")
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class Store(contextlib.AbstractContextManager):
    """A converted data set, read only; it may be pickled, and used by many processes at once.

    Attributes:
        size: S, px.
        data_hash: over the content of all sequences, their split, the size and the format.
        split_note: how patients were split.
        marks: which state of which files each row was made from.
        table: one row per sequence (pandas); spacing in mm per stored pixel, ef in %, age in years.

    Raises:
        CamusError: the file is absent, cut short, of another kind or of another version.
    """

    def __init__(self, path):
        self.path = Path(path)
        with self._whole():
            self._open()
            self.size = int(self._file.attrs["size"])
            self.data_hash, self.split_note = (self._file.attrs[name] for name in ("data_hash", "split_note"))
            columns = ((name, column[()]) for name, column in self._file["sequences"].items())
            self._columns = {name: np.char.decode(c, "utf-8") if c.dtype.kind == "S" else c for name, c in columns}
            self.marks = self._columns.pop("mark").tolist()
            shape = (int(self._columns["length"].sum()), self.size, self.size)
            if self._file["frames"].shape != shape or self._file["masks"].shape != shape:
                raise ValueError(f"its table wants {shape} pixels")
            self._pixels = {name: self._file[name].id.get_offset() for name in ("frames", "masks")}  # bytes

    @contextlib.contextmanager
    def _whole(self):
        try:
            yield
        except CamusError:
            raise
        except Exception as error:  # whatever HDF5 stumbles on in a damaged file
            what = f"{self.path} is cut short or no HDF5 file ({error})"
            raise CamusError(f"{what}: delete it and convert again.") from None

    def _open(self):
        if not self.path.is_file():
            raise CamusError(f"{self.path} is not there: make it with store.convert.")
        self._file = h5py.File(self.path, "r", locking=False)
        kind, version = (self._file.attrs.get(name) for name in ("format", "version"))
        if (kind, version) != (FORMAT, VERSION):
            self.close()
            raise CamusError(f"{self.path} is of another kind ({kind}, version {version}; wanted: {FORMAT}, "
                             f"version {VERSION}): give another file, or delete it and convert again.")

    def __reduce__(self):
        return Store, (self.path,)

    def __len__(self):
        return len(self.marks)

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._file.close()

    @functools.cached_property
    def table(self):
        import pandas as pd

        return pd.DataFrame(self._columns)

    @property
    def ed_es_only(self) -> bool:
        """True when every labelled sequence is an ED and an ES frame with nothing between."""
        only = self._columns["ed_es_only"][self._columns["labelled"]]
        return len(only) > 0 and bool(only.all())

    def rows(self, split=None, labelled=None) -> np.ndarray:
        """Row numbers of one part (train, val, test), with or without reference masks: int [n]."""
        keep = np.ones(len(self), bool)
        if split is not None:
            if split not in camus.PARTS:
                raise ValueError(f"split must be one of {', '.join(camus.PARTS)}, not {split!r}")
            keep &= self._columns["split"] == split
        if labelled is not None:
            keep &= self._columns["labelled"] == labelled
        return np.flatnonzero(keep)

    def _slice(self, name, i, first=0, last=None):
        start, length = (int(self._columns[column][i]) for column in ("start", "length"))
        with self._whole():
            return self._file[name][start + first:start + (length if last is None else last + 1)]

    def _pick(self, name, i, index):
        """Some frames of a sequence, read from their places in the file: there is nothing to unpack."""
        picked, frame = np.empty((len(index), self.size, self.size), np.uint8), self.size**2
        at = (index + int(self._columns["start"][i])) * frame + self._pixels[name]  # bytes
        cuts = [0, *(np.flatnonzero(index[1:] != index[:-1] + 1) + 1).tolist(), len(index)]  # runs of neighbours
        with self._whole():
            handle = self._file.id.get_vfd_handle()
            if any(os.preadv(handle, [picked[a:b]], int(at[a])) < (b - a) * frame for a, b in pairwise(cuts)):
                raise ValueError("pixels are missing")
        return picked

    def frames(self, i) -> np.ndarray:
        """uint8 [T, S, S], ED first, ES last."""
        return self._slice("frames", i)

    def ends(self, i) -> np.ndarray:
        """uint8 [2, S, S], the first frame (ED) and the last (ES)."""
        last = int(self._columns["length"][i]) - 1
        return np.concatenate([self._slice("frames", i, k, k) for k in (0, last)])

    def masks(self, i) -> np.ndarray:
        """uint8 [T, S, S]: 0..3, UNLABELLED where there is no reference."""
        return self._slice("masks", i)

    def native_masks(self, i) -> np.ndarray | None:
        """uint8 [2, h, w]: the ED and ES masks at native size; None where there is no reference."""
        with self._whole():
            return self._file[f"native/{int(i)}"][()] if self._columns["labelled"][i] else None

    def clip(self, i, frames, rule="cover", step=4, offset=0.0, masks=True) -> Clip:
        """A clip of `frames` frames of sequence `i`, on request without masks; `clip_index` explains the rules."""
        index = clip_index(int(self._columns["length"][i]), frames, rule, step, offset)
        return Clip(self._pick("frames", i, index), self._pick("masks", i, index) if masks else None, index,
                    1 + int(np.count_nonzero(index[1:] != index[:-1])))
