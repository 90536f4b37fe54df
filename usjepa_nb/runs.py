"""Runs on disk: ask for an encoder and get it loaded or trained, and be told which.

A run's folder is named by a hash of everything that shaped it, so notebooks, papermill and Snakemake share results
without talking to each other. Nothing else remembers state.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import find_free_network_port

from usjepa_nb import memory, methods, parallel, pretrain, probe
from usjepa_nb.dataset import Dataset, digest
from usjepa_nb.methods import label
from usjepa_nb.vit import Encoder


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_run(path: Path) -> dict:
    """A run's description, and what it took, from its run.json.

    Raises:
        OSError: damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise OSError(f"{path} cannot be read ({e}): delete it, and the run goes on from its checkpoint") from e


@dataclass
class Run:
    """One encoder: its folder, what it is, its training history and the encoder to be probed."""

    folder: Path
    spec: dict
    encoder: Encoder | None  # None for a method without one, as the U-Net
    history: pd.DataFrame
    objective: torch.nn.Module | None = None

    @property
    def label(self) -> str:
        return label(self.spec)


class Lab(Dataset):
    """Everything a notebook needs, for one profile, one data set and one seed: data (`Dataset`) and encoders."""

    def __init__(self, profile: str = "tiny", data: str = "", cache: str = "data_cache", seed: int = 0, **changes):
        super().__init__(profile, data, cache, seed, **changes)
        self.loaded: dict[str, Run] = {}

    def __getstate__(self) -> dict:
        """For other processes: without the encoders, which they load themselves."""
        return {**self.__dict__, "loaded": {}}

    def spec(self, method: str, lam: float = 1.0, freeze: int = 0, fraction: int = 100) -> dict:
        """The description that a run's folder is hashed from, see `methods.describe`."""
        return methods.describe(self, method, lam, freeze, fraction)

    def folder(self, spec: dict) -> Path:
        parts = [spec["method"], f"lam{spec['lam']:g}" if spec["lam"] < 1 else "",
                 f"f{spec['freeze']}" if spec["freeze"] else "",
                 f"{spec['fraction']}pc" if spec["fraction"] else "", f"s{spec['seed']}", digest(spec)]
        return self.cache / "runs" / self.profile.name / "-".join(p for p in parts if p)

    def objective(self, spec: dict) -> torch.nn.Module:
        """The untrained objective of a run, see `methods.build`."""
        return methods.build(self, spec)

    def encoder(self, method: str, lam: float = 1.0, freeze: int = 0, fraction: int = 100) -> Run:
        """An encoder of the method, loaded from disk or else trained, with a line that says which.

        Args:
            fraction: share (%) of the training patients, where a run sees no others, see `methods.describe`.
        """
        spec = self.spec(method, lam, freeze, fraction)
        key = digest(spec)
        if key not in self.loaded:
            *_, self.loaded[key] = self.training(method, lam, freeze, fraction)
        return self.loaded[key]

    def trained(self, method: str, lam: float = 1.0, freeze: int = 0, fraction: int = 100) -> bool:
        """Whether `encoder` would find its run finished on disk."""
        return (self.folder(self.spec(method, lam, freeze, fraction)) / "run.json").exists()

    def training(self, method: str, lam: float = 1.0, freeze: int = 0, fraction: int = 100) -> Iterator[Run]:
        """The same, step by step for live figures: yields the run every `log_every` steps; the last is finished."""
        spec = self.spec(method, lam, freeze, fraction)
        folder, objective = self.folder(spec), self.objective(spec)
        folder.mkdir(parents=True, exist_ok=True)
        if method in methods.UNTRAINED:
            yield Run(folder, spec, objective.encoder.eval(), pd.DataFrame(), objective.eval())
            return
        with FileLock(folder / "lock"):  # a second process that wants the same run waits, then loads it
            for left in folder.glob("checkpoint.*.part"):  # by a killed process: nobody else holds the lock
                left.unlink()
            finished, devices = folder / "run.json", self.profile.devices
            if finished.exists() and (folder / "checkpoint.pt").exists():
                pass
            elif devices == 1:
                yield from self.train(spec, folder, objective)
            else:
                port = find_free_network_port()
                parallel.run(one_of_several, [(self, spec, rank, port) for rank in range(devices)], devices,
                             disable=True)
            _, rows = pretrain.resume(folder / "checkpoint.pt", objective)
        seconds = read_run(finished)["seconds"]
        print(f"{label(spec)}: {spec['settings']['steps']} steps, trained in {seconds:.0f} s [{folder.name}]")
        yield Run(folder, spec, objective.eval().features, pd.DataFrame(rows), objective)

    def train(self, spec: dict, folder: Path, objective: torch.nn.Module) -> Iterator[Run]:
        """Run the loop, from the checkpoint if there is one, and leave checkpoint.pt, history.csv and run.json."""
        checkpoint = folder / "checkpoint.pt"
        p = self.profile.replace(steps=spec["settings"]["steps"], lr=spec["settings"]["lr"],
                                 encoder_lr=spec["settings"].get("encoder_lr", 1.0))
        print(f"{label(spec)}: " + ("goes on where it stopped" if checkpoint.exists() else "not on disk, training now"),
              f"[{folder.name}]")
        # On a login node of a cluster Fabric advises srun; Snakemake is what starts jobs there.
        warnings.filterwarnings("ignore", "The `srun` command is available on your system but is not used")
        fabric = Fabric(accelerator=self.device, devices=p.devices, precision=p.precision)
        fabric.launch()
        watched = torch.from_numpy(self.clips(self.store.rows("val")[:32])[0]).float()

        def watch(module):
            if module.features is None:
                return {}
            with torch.no_grad():
                z, seen = probe.encode(module.features, watched.to(fabric.device), p.sector_aware)
            return pretrain.monitors(z[:, seen.all(0)])

        if spec["method"] in methods.END_TO_END:
            grey, masks = (torch.from_numpy(v) for v in self.clips(self.labelled(spec["fraction"])))

            def batches(generator, n):
                index = torch.randint(len(grey), (n,), generator=generator)
                return grey[index], masks[index]
        else:
            few = spec["fraction"]  # None: all of them, with and without labels
            batches = self.batches(self.labelled(few) if few else self.store.rows("train"), fabric.device)
        rows, begun, first, spent = [], time.time(), pretrain.steps_done(checkpoint), folder / "seconds"
        before = float(spent.read_text()) if first and spent.exists() else 0.0  # a stopped run's, up to its checkpoint
        steps = pretrain.train(objective, batches, p, checkpoint, seed=spec["seed"], fabric=fabric, watch=watch)
        for row in memory.during(steps, label(spec), memory.TRAINING):
            rows.append(row)
            if len(rows) >= first and (len(rows) % p.log_every == 0 or len(rows) == p.steps):  # older rows: no weights
                if first < len(rows) <= first + p.log_every < p.steps:
                    left = (time.time() - begun) / (len(rows) - first) * (p.steps - len(rows))
                    print(f"{label(spec)}: about {left / 60:.1f} minutes to go on this machine")
                history = pd.DataFrame(rows)
                if fabric.is_global_zero:
                    write_text(folder / "history.csv", history.to_csv(index=False))
                    write_text(spent, str(before + time.time() - begun))
                yield Run(folder, spec, objective.features, history, objective)
        objective.to("cpu")
        if fabric.is_global_zero:
            took = {"seconds": before + time.time() - begun, "threads": torch.get_num_threads()}
            write_text(folder / "run.json", json.dumps(spec | took, indent=1))


def one_of_several(lab: Lab, spec: dict, rank: int, port: int) -> None:
    """Train as process `rank` of the profile's `devices`; Fabric finds its place in the environment, as with torchrun.

    Started by `parallel.run` and not by Fabric, which in a notebook can only fork, and a fork cannot use a GPU that
    its parent has looked at.
    """
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
        for _ in lab.train(spec, lab.folder(spec), lab.objective(spec)):
            pass
    torch.distributed.destroy_process_group()
