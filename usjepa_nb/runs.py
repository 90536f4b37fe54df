"""Runs on disk: ask for data, an encoder or a segmentation, and get it loaded or made, and be told which.

A run's folder is named by a hash of everything that shaped it, so notebooks, papermill and Snakemake share results
without talking to each other. Nothing else remembers state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from lightning_fabric import Fabric
from torch import Generator, Tensor

from usjepa_nb import phantom, pretrain, probe, store, weights
from usjepa_nb.augment import augment, crop_and_flip
from usjepa_nb.profile import ROOT, Profile, load
from usjepa_nb.vit import Encoder

METHODS = {"random": "frozen random encoder", "videomae": "VideoMAE", "vjepa": "V-JEPA", "vjepa_ll": "V-JEPA + LL",
           "supervised": "supervised, end to end", "prior": "shape prior"}
NOT_TRAINING = ("name", "probe_epochs", "probe_min_steps", "probe_batch", "probe_lr", "supervised_steps",
                "supervised_lr", "fractions", "lams", "freezes", "accelerator", "devices", "log_every")


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@dataclass
class Run:
    """One encoder: its folder, what it is, its training history and the encoder to be probed."""

    folder: Path
    spec: dict
    encoder: Encoder
    history: pd.DataFrame
    objective: torch.nn.Module | None = None

    @property
    def label(self) -> str:
        return label(self.spec)


def label(spec: dict) -> str:
    """A method's name as tables print it."""
    text = METHODS[spec["method"]]
    if spec["method"] == "vjepa_ll":
        text += f" (λ = {spec['lam']:g})"
    return text + (f", {spec['freeze']} blocks frozen" if spec["freeze"] else "")


class Lab:
    """Everything a notebook needs, for one profile, one data set and one seed.

    Args:
        profile: name of a profile or path of a YAML file.
        data: a CAMUS folder; empty makes the phantom.
        cache: where data, runs and features are kept.
        seed: of the phantom's split, the initial weights, the batches and the probes.
        changes: single settings to override.
    """

    def __init__(self, profile: str = "tiny", data: str = "", cache: str = "data_cache", seed: int = 0, **changes):
        self.profile: Profile = load(profile, **changes)
        self.data, self.seed = str(data), int(seed)
        self.cache = ROOT / cache  # an absolute `cache` stays what it is
        self.cache.mkdir(parents=True, exist_ok=True)

    def about(self) -> None:
        """Print what the results of this notebook depend on: profile, data, seed, versions, device."""
        p = self.profile
        device = torch.cuda.get_device_name() if torch.cuda.is_available() and p.accelerator != "cpu" else "CPU"
        print(f"profile {p.name}: {p.frames} frames of {p.size}×{p.size} px, tokens of {p.tubelet}×{p.patch}×{p.patch}, "
              f"ViT {p.width} wide, {p.depth} deep; seed {self.seed}")
        print(f"data: {Path(self.data).name if self.data else 'synthetic phantom'}; {device}, "
              f"Python {platform.python_version()}, torch {torch.__version__}, timm {version('timm')}, "
              f"usjepa_nb {version('usjepa-nb')}")

    # -- data ---------------------------------------------------------------------------------------------------

    @property
    def tree(self) -> Path:
        """The CAMUS tree: the given folder, or the phantom, made on first use."""
        if self.data:
            return Path(self.data)
        root = self.cache / self.data_name
        with FileLock(f"{root}.lock"):
            return phantom.make(root, self.profile.patients, seed=0, spacing=self.profile.spacing)

    @property
    def data_name(self) -> str:
        """A short name of the data set, for files and titles; two folders of one name differ in the suffix."""
        if self.data:
            return f"{Path(self.data).resolve().name}-{digest(str(Path(self.data).resolve()))[:4]}"
        return f"phantom-{self.profile.patients}x{self.profile.spacing:g}mm"

    @property
    def hdf5(self) -> Path:
        """Where the data set's one file lies."""
        return self.cache / f"{self.data_name}-{self.profile.size}px.h5"

    @property
    def results(self) -> Path:
        """Where `make run` puts the executed notebooks and the summary."""
        return self.cache / "notebooks" / (self.profile.name + (f"-{self.data_name}" if self.data else ""))

    @cached_property
    def store(self) -> store.Store:
        """The data set as one HDF5 file, converted on first use."""
        if not self.hdf5.exists() or self.data:
            report = store.convert(self.tree, self.hdf5, self.profile.size)
            for message in report.refused.values():
                print(f"refused: {message}")
            print(f"{self.hdf5.name}: {report.converted} sequences converted, {report.reused} reused, "
                  f"{len(report.refused)} refused")
        opened = store.Store(self.hdf5)
        if opened.ed_es_only:
            print("ED/ES only: these clips are [ED, ED, ES, ES], not video; read every result below with that in mind")
        return opened

    @property
    def frames(self) -> int:
        """Frames per clip: the profile's, or two tubelets where the data holds only ED and ES."""
        return 2 * self.profile.tubelet if self.store.ed_es_only else self.profile.frames

    def clips(self, rows: np.ndarray, generator: Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Clips and masks of store rows, uint8 [n, T, S, S] each; a generator shifts the instants within their stride."""
        p, cut = self.profile, []
        for i in rows:
            offset = 0.0 if generator is None else float(torch.rand((), generator=generator))
            cut.append(self.store.clip(int(i), self.frames, p.clip_rule, p.frame_step, offset))
        return np.stack([c.frames for c in cut]), np.stack([c.masks for c in cut])

    def batches(self, rows: np.ndarray):
        """A function (generator, n) -> augmented grey clips [n, T, S, S] drawn from store rows."""
        view = {"mild": lambda x, g: augment(x, g)[0], "published": crop_and_flip, "none": lambda x, g: x.float()}
        view = view[self.profile.augmentation]

        def batch(generator: Generator, n: int) -> Tensor:
            chosen = rows[torch.randint(len(rows), (n,), generator=generator).numpy()]
            return view(torch.from_numpy(self.clips(chosen, generator)[0]), generator)
        return batch

    def labelled(self, fraction: int = 100) -> np.ndarray:
        """Training rows of the first `fraction` % of the patients: nested, by patient, spread over image quality."""
        table = self.store.table.loc[self.store.rows("train", labelled=True)]
        patients = table.drop_duplicates("patient").sort_values("patient")
        patients = patients.sample(frac=1, random_state=self.seed)
        rank = (patients.groupby("quality").cumcount() + 0.5) / patients.groupby("quality")["patient"].transform("size")
        order = patients["patient"].iloc[np.argsort(rank.to_numpy(), kind="stable")]
        chosen = set(order.iloc[:math.ceil(fraction / 100 * len(order))])
        return table.index[table["patient"].isin(chosen)].to_numpy()

    # -- encoders -----------------------------------------------------------------------------------------------

    def spec(self, method: str, lam: float = 1.0, freeze: int = 0, fraction: int = 100) -> dict:
        """The description that a run's folder is hashed from."""
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown: choose one of {', '.join(METHODS)}")
        settings = {k: v for k, v in dataclasses.asdict(self.profile).items() if k not in NOT_TRAINING}
        if method == "supervised":
            settings["steps"], settings["lr"] = self.profile.supervised_steps, self.profile.supervised_lr
        return {"method": method, "lam": lam, "freeze": freeze, "seed": self.seed, "data": self.store.data_hash,
                "frames": self.frames, "fraction": fraction if method == "supervised" else None, "settings": settings}

    def folder(self, spec: dict) -> Path:
        parts = [spec["method"], f"lam{spec['lam']:g}" if spec["method"] == "vjepa_ll" else "",
                 f"f{spec['freeze']}" if spec["freeze"] else "",
                 f"{spec['fraction']}pc" if spec["fraction"] else "", f"s{spec['seed']}", digest(spec)]
        return self.cache / "runs" / self.profile.name / "-".join(p for p in parts if p)

    def objective(self, spec: dict) -> torch.nn.Module:
        """The untrained objective of a run; weights are drawn from the run's seed, or loaded from `init`."""
        p = self.profile
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec["seed"])
            if spec["method"] == "videomae":
                encoder = self.initial(pretrain.make_encoder(p, self.frames, "sincos1d"), p.init_videomae)
                return pretrain.VideoMAE(p, self.frames, encoder)
            encoder = pretrain.make_encoder(p, self.frames)
            if spec["method"] == "supervised":
                return probe.Supervised(p, self.frames, encoder)  # from random weights; the paper does not say
            if spec["method"] != "random":
                encoder = self.initial(encoder, p.init)
            return pretrain.VJEPA(p, self.frames, encoder, spec["lam"], spec["freeze"])

    @staticmethod
    def initial(encoder: Encoder, init: str) -> Encoder:
        """Fill the encoder from the checkpoint `init`, reporting every key; "random" leaves it as drawn."""
        if init != "random":
            print(*weights.load(ROOT / init, encoder), sep="\n")
        return encoder

    def encoder(self, method: str, lam: float = 1.0, freeze: int = 0, fraction: int = 100) -> Run:
        """An encoder of the method, loaded from disk or else trained, with a line that says which."""
        run = None
        for run in self.training(method, lam, freeze, fraction):
            pass
        return run

    def training(self, method: str, lam: float = 1.0, freeze: int = 0, fraction: int = 100) -> Iterator[Run]:
        """Train step by step (for live figures): yields the run every `log_every` steps; the last one is finished."""
        spec = self.spec(method, lam, freeze, fraction)
        folder = self.folder(spec)
        folder.mkdir(parents=True, exist_ok=True)
        objective = self.objective(spec)
        if method == "random":
            yield Run(folder, spec, objective.encoder, pd.DataFrame(), objective)
            return
        with FileLock(folder / "lock"):
            yield from self.locked_training(spec, folder, objective)

    def locked_training(self, spec: dict, folder: Path, objective: torch.nn.Module) -> Iterator[Run]:
        checkpoint = folder / "checkpoint.pt"
        p = self.profile.replace(steps=spec["settings"]["steps"], lr=spec["settings"]["lr"])
        done = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else None
        print(f"{label(spec)}: " + (f"loaded, trained before in {done['seconds']:.0f} s" if done else
              f"continues from {checkpoint}" if checkpoint.exists() else f"training {p.steps} steps now"), f"[{folder.name}]")
        fabric = Fabric(accelerator=p.accelerator, devices=p.devices, precision=p.precision)
        watched = torch.from_numpy(self.clips(self.store.rows("val")[:32])[0]).float()

        def watch(module):
            module.features.eval()
            with torch.no_grad():
                z, seen = probe.encode(module.features, watched.to(fabric.device), p.sector_aware)
            return pretrain.monitors(z[:, seen.all(0)])

        if spec["method"] == "supervised":
            grey, masks = (torch.from_numpy(v) for v in self.clips(self.labelled(spec["fraction"])))

            def batches(generator, n):
                index = torch.randint(len(grey), (n,), generator=generator)
                return grey[index], masks[index]
        else:
            batches = self.batches(self.store.rows("train"))
        rows, begun = [], time.time()
        for row in pretrain.train(objective, batches, p, checkpoint, seed=spec["seed"], fabric=fabric, watch=watch):
            rows.append(row)
            if "std" in row and not done:
                history = pd.DataFrame(rows)
                write_text(folder / "history.csv", history.to_csv(index=False))
                yield Run(folder, spec, objective.features, history, objective)
        if not done:
            write_text(folder / "run.json", json.dumps({**spec, "seconds": time.time() - begun}, indent=1))
        objective.eval().to("cpu")
        yield Run(folder, spec, objective.features, pd.DataFrame(rows), objective)
