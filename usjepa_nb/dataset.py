"""One profile, one data set, one seed: the CAMUS tree (given, or the phantom), its HDF5 file, clips and batches."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import tempfile
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Generator, Tensor

from usjepa_nb import grid, parallel, phantom, store
from usjepa_nb.augment import augment, crop_and_flip
from usjepa_nb.camus import CamusError
from usjepa_nb.profile import ROOT, Profile, load
from usjepa_nb.tasks import group_weights


def digest(value) -> str:
    """A short name for a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def refuse_leaks(table: pd.DataFrame, where) -> None:
    """See that no patient is in two parts, under one name or (same files, or same `ends`) under two.

    Raises:
        CamusError: naming the patients.
    """
    for key in table.columns.intersection(["patient", "sha256", "ends"]):
        for names, parts in in_two_parts(table, key):
            raise CamusError(f"{where}: {' = '.join(names)} is in {' and '.join(parts)} at once, so scores would "
                             "mean nothing: correct the CAMUS folder, delete this file and convert again")


def in_two_parts(table: pd.DataFrame, key: str) -> Iterator[tuple]:
    """(patients, parts) of the rows that share a value of the column `key` and are not all in one part."""
    parts = table.groupby(key)["split"].nunique()
    for value in parts.index[parts > 1]:
        same = table[table[key] == value]
        yield same["patient"].unique(), same["split"].unique()


def with_pictures(opened: store.Store) -> pd.DataFrame:
    """The table of a store with hashes of the pixels, which stay when files are packed or described anew.

    Columns ED, ES: of that frame; ends: of both. A frame of one grey value tells nothing, so it is its row's own.
    """
    found = []
    for i in range(len(opened)):
        ends = opened.ends(i)
        found.append([hashlib.sha256(frame).hexdigest() if np.ptp(frame) else str(i) for frame in ends])
    ed, es = zip(*found, strict=True)
    return opened.table.assign(ED=ed, ES=es, ends=["".join(pair) for pair in found])


class Dataset:
    """The data half of a `runs.Lab`.

    Args:
        profile: name of a profile or path of a YAML file.
        data: a CAMUS folder, or the HDF5 file that was made of one; empty makes the phantom.
        cache: where data, runs and features are kept.
        seed: of labelled patients, initial weights, batches and probes.
        changes: single settings to override.

    Raises:
        ProfileError: see `profile.load`.
        ValueError: a seed that is out of range.
        OSError: no file can be made in `cache`.
    """

    def __init__(self, profile: str = "tiny", data: str = "", cache: str = "data_cache", seed: int = 0, **changes):
        self.profile: Profile = load(profile, **changes)
        self.data, self.seed = str(data), int(seed)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {seed} is not possible: choose a whole number from 0 to {2**32 - 1}")
        self.cache = ROOT / cache  # an absolute `cache` stays what it is
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.cache).close()  # sees permissions and read-only mounts alike
        except OSError as e:
            raise OSError(f"cache = {str(self.cache)!r} is not possible: no file can be made there ({e.strerror}); "
                          "give another folder") from e

    def about(self) -> None:
        """Print what the results of this notebook depend on: profile, data, seed, versions, device."""
        p = self.profile
        device = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        print(f"profile {p.name}: {p.frames} frames of {p.size}×{p.size} px, "
              f"tokens of {p.tubelet}×{p.patch}×{p.patch}, ViT {p.width} wide, {p.depth} deep; seed {self.seed}")
        print(f"data: {Path(self.data).name if self.data else 'synthetic phantom'}; {device}, "
              f"Python {platform.python_version()}, torch {torch.__version__}, timm {version('timm')}, "
              f"usjepa_nb {version('usjepa-nb')}")

    @property
    def device(self) -> str:
        """Where features and probes are computed: the GPU if there is one and the profile does not say "cpu".

        Raises:
            ProfileError: the profile says "cuda", and there is no GPU.
        """
        p = self.profile
        if p.accelerator == "cuda" and not torch.cuda.is_available():
            p.refuse("accelerator", "torch sees no GPU here; choose auto or cpu, or install torch for your GPU")
        return "cuda" if torch.cuda.is_available() and p.accelerator != "cpu" else "cpu"

    @property
    def tree(self) -> Path:
        """The CAMUS tree: the given folder, or the phantom, made on first use.

        Raises:
            CamusError: one HDF5 file is given instead.
        """
        if self.converted:
            raise CamusError(f"{self.data} holds frames of {self.profile.size} px, and this shows the files that they "
                             "were made of: give the CAMUS folder")
        if self.data:
            return Path(self.data)
        root = self.cache / self.data_name
        with FileLock(f"{root}.lock"):
            return phantom.make(root, self.profile.patients, self.profile.phantom_seed,
                                spacing=self.profile.spacing, workers=parallel.cores())

    @property
    def converted(self) -> bool:
        """Whether `data` is a converted file, as it is carried to a machine with a GPU."""
        return Path(self.data).is_file()

    @property
    def data_name(self) -> str:
        """A short name of the data set, for files, titles. Folders of one name differ in the suffix, files do not."""
        if self.converted:
            return Path(self.data).stem.removesuffix(f"-{self.profile.size}px")
        if self.data:
            return f"{Path(self.data).resolve().name}-{digest(str(Path(self.data).resolve()))[:4]}"
        p = self.profile
        return f"phantom-{p.patients}x{p.spacing:g}mm" + (f"-seed{p.phantom_seed}" if p.phantom_seed else "")

    @property
    def hdf5(self) -> Path:
        """Where the data set's one file lies."""
        return Path(self.data) if self.converted else self.cache / f"{self.data_name}-{self.profile.size}px.h5"

    def results(self, grid: str = "walk") -> Path:
        """Where the executed notebooks of a grid and its summary are put: no braces, which Snakemake would fill in."""
        parts = [self.profile.name, self.data_name if self.data else "", "" if grid == "walk" else Path(grid).stem]
        return self.cache / "notebooks" / "-".join(filter(None, parts)).translate(str.maketrans("{}", "()"))

    @cached_property
    def store(self) -> store.Store:
        """The data set as one HDF5 file, converted on first use.

        Raises:
            CamusError: nothing could be converted, a patient is in two parts, or a given file has another frame size.
        """
        if not self.converted and (not self.hdf5.exists() or self.data):
            report = store.convert(self.tree, self.hdf5, self.profile.size, workers=parallel.cores())
            for message in report.refused.values():
                print(f"refused: {message}")
            print(f"{self.hdf5.name}: {report.converted} sequences converted, {report.reused} reused, "
                  f"{len(report.refused)} refused")
        try:
            opened = store.Store(self.hdf5)
        except CamusError as e:
            if not self.converted:
                raise
            raise CamusError(f"{self.data} is no CAMUS folder, nor a whole file that this version converted from one: "
                             "give the folder, or convert and copy it again") from e
        if opened.size != self.profile.size:
            raise CamusError(f"{self.hdf5} holds frames of {opened.size} px, and profile {self.profile.name} takes "
                             f"{self.profile.size}: convert the CAMUS folder with this profile")
        table = with_pictures(opened)
        refuse_leaks(table, self.hdf5)
        for instant in ("ED", "ES"):
            for names, parts in in_two_parts(table, instant):
                print(f"{' and '.join(names)} share one {instant} frame, and are in {' and '.join(parts)}: one of them "
                      "is wrong in this copy; leave one out, or put both in one part")
        if opened.ed_es_only:
            print("ED/ES only: these clips are [ED, ED, ES, ES], not video; read every result below with that in mind")
        return opened

    def grid(self, name: str = "walk") -> grid.Grid:
        """The grid `name` for this profile's encoder, see `grid.load`."""
        return grid.load(name, self.profile.depth, initial=self.profile.init != "random")

    @property
    def frames(self) -> int:
        """Frames per clip: the profile's, or two tubelets where the data holds only ED and ES."""
        return 2 * self.profile.tubelet if self.store.ed_es_only else self.profile.frames

    def clips(self, rows: np.ndarray, generator: Generator | None = None,
              masks: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """Clips and masks of store rows, uint8 [n, T, S, S] each; a generator shifts instants within their stride."""
        if not len(rows):
            raise CamusError(f"{self.data_name}: a part of the split is empty ({self.store.split_note}); "
                             "three patients with masks are needed at least")
        p, cut = self.profile, []
        for i in rows:
            offset = 0.0 if generator is None else float(torch.rand((), generator=generator))
            cut.append(self.store.clip(int(i), self.frames, p.clip_rule, p.frame_step, offset, masks))
        return np.stack([c.frames for c in cut]), np.stack([c.masks for c in cut]) if masks else None

    def instants(self, row: int) -> tuple[int, int]:
        """Where the clip of a store row has the frames nearest to ED and ES."""
        p, meta = self.profile, self.store.table.loc[row]
        index = self.store.clip(int(row), self.frames, p.clip_rule, p.frame_step).index
        return tuple(int(np.abs(index - meta[name]).argmin()) for name in ("ed", "es"))

    def batches(self, rows: np.ndarray, device="cpu"):
        """A function (generator, n) -> augmented grey clips [n, T, S, S] drawn from store rows, for training.

        Bytes go to the device as they are; cropping and the rest is done there.

        Raises:
            ValueError: a row is not in the training part.
        """
        if others := sorted(set(self.store.table.loc[rows, "split"]) - {"train"}):
            raise ValueError(f"batches are for training, and some of these rows belong to {', '.join(others)}: "
                             'take store.rows("train")')
        view = {"mild": lambda x, g: augment(x, g)[0], "published": crop_and_flip, "none": lambda x, g: x.float()}
        view = view[self.profile.augmentation]
        table, weights = self.store.table.loc[rows], None
        if self.profile.sampling == "balanced":
            weights = group_weights(table["view"] + " " + table["quality"].astype(str))

        def batch(generator: Generator, n: int) -> Tensor:
            if weights is not None:
                drawn = torch.multinomial(weights, n, replacement=True, generator=generator)
            else:
                drawn = torch.randint(len(rows), (n,), generator=generator)
            chosen = rows[drawn.numpy()]
            stored = torch.from_numpy(self.clips(chosen, generator, masks=False)[0])
            return view(stored.to(device, non_blocking=True), generator)
        return batch

    def labelled(self, fraction: int = 100) -> np.ndarray:
        """Training rows of the first `fraction` % of the patients: nested, by patient, spread over image quality.

        Raises:
            ValueError: a fraction that is not in (0, 100].
        """
        if not 0 < fraction <= 100:
            raise ValueError(f"fraction = {fraction} % of the training patients is not possible: choose 1…100")
        table = self.store.table.loc[self.store.rows("train", labelled=True)]
        patients = table.drop_duplicates("patient").sort_values("patient")
        patients = patients.sample(frac=1, random_state=self.seed)
        rank = (patients.groupby("quality").cumcount() + 0.5) / patients.groupby("quality")["patient"].transform("size")
        order = patients["patient"].iloc[np.argsort(rank.to_numpy(), kind="stable")]
        chosen = set(order.iloc[:math.ceil(fraction * len(order) / 100)])
        return table.index[table["patient"].isin(chosen)].to_numpy()
