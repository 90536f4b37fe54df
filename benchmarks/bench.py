"""Ratios of speed, measured in one run: `make bench`, or python benchmarks/bench.py [--only NAME …].

What is compared takes turns, several rounds, and medians are divided, so that a busy machine slows both. On a CPU one
thread is timed by its own CPU time; on a GPU the clock is read after it has come to rest. The table is printed and kept
as data_cache/bench.json; `--out results/bench.md` is the one of the repository.

    step      pre-training against the published structure (benchmarks/published_structure.py), whole and by part
    data      a clip from HDF5 against a raw memory map and against decoding NIfTI per item; augmentation; feeding
    probe     a probe step from cached features against features made again for every step
    making    the phantom, the conversion to HDF5, memory at its peak
"""
import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from published_structure import Step
from torch import Generator
from torch.nn import functional as F

from usjepa_nb import camus, objectives, phantom, probe, store, tables
from usjepa_nb.augment import augment, crop_and_flip
from usjepa_nb.clips import clip_index, resize_frame
from usjepa_nb.masking import sector_tokens
from usjepa_nb.pretrain import parameter_groups
from usjepa_nb.probe import autocast
from usjepa_nb.profile import ROOT, Profile, load
from usjepa_nb.runs import Lab, write_text

# size -> settings of profile paper that differ, frames of the clip
SIZES = {
    "ViT-Ti 112²×8": {"size": 112, "frames": 8, "width": 192, "depth": 12, "heads": 3, "predictor_width": 96,
                      "predictor_depth": 6, "predictor_heads": 3},
    "ViT-S 112²×16": {"size": 112, "width": 384, "depth": 12, "heads": 6, "predictor_width": 192, "predictor_depth": 6,
                      "predictor_heads": 6},
    "ViT-S 224²×16": {"width": 384, "depth": 12, "heads": 6, "predictor_width": 192, "predictor_depth": 6,
                      "predictor_heads": 6},
    "ViT-L 224²×16": {},
}
ALL_LEARN = {"init": "random", "sector_aware": False, "mask_rule": "first"}  # the published step


def rest(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds: of this process's own work on a CPU, on the wall once a GPU has come to rest."""
    rest(device)
    return time.process_time() if device == "cpu" else time.perf_counter()


def compare(variants: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each variant; they take turns, after a first turn that does not count."""
    times = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            begun = clock(device)
            variant()
            if turn:
                times[name].append(clock(device) - begun)
    return {name: statistics.median(values) for name, values in times.items()}


def rows(what: str, seconds: dict[str, float], baseline: str, unit: str = "") -> list[dict]:
    """A table row per variant with its ratio to the baseline."""
    return [{"what": what, "variant": name, "ms": 1000 * s, "times faster": seconds[baseline] / s, "per": unit}
            for name, s in seconds.items()]


def clips_like(p: Profile, n: int, frames: int) -> torch.Tensor:
    """Phantom clips, uint8 [n, frames, S, S], enlarged to the size asked for."""
    with tempfile.TemporaryDirectory() as folder:
        tree = phantom.make(Path(folder) / "tree", 4, 0, spacing=1.2)
        store.convert(tree, Path(folder) / "clips.h5", 64)
        with store.Store(Path(folder) / "clips.h5") as opened:
            cut = np.stack([opened.clip(i % len(opened), frames).frames for i in range(n)])
    return F.interpolate(torch.from_numpy(cut).float(), (p.size, p.size), mode="bilinear").round().byte()


class Ours:
    """A step as `pretrain.train` takes it on a CPU; a GPU has the batch prepared meanwhile (`gpu.Variant`)."""

    def __init__(self, p: Profile, objective: objectives.VJEPA, device: str):
        self.p, self.objective = p, objective.to(device)
        self.optimizer = torch.optim.AdamW(parameter_groups(objective), lr=1e-5, fused=True)

    def __call__(self, grey: torch.Tensor, generator: Generator, autocast: torch.autocast) -> torch.Tensor:
        return self.take(self.objective.prepare(grey, generator), autocast)

    def take(self, prepared: objectives.Prepared, autocast: torch.autocast) -> torch.Tensor:
        with autocast:
            loss = self.objective(prepared)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.p.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(1)
        return loss.detach()


def vjepa(p: Profile, **changes) -> tuple[Profile, objectives.VJEPA]:
    p = p.replace(**ALL_LEARN | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return p, objectives.VJEPA(p, p.frames, objectives.make_encoder(p, p.frames), 1.0, 0)


def step(size: str, rounds: int) -> list[dict]:
    """One optimiser step at batch 4: published structure, ours at equal mathematics, ours in the sector alone."""
    p = load("paper", **SIZES[size], precision="32-true", one_pass=False, compile=False)
    grey = clips_like(p, p.batch, p.frames)
    inside = float(sector_tokens(grey, p.tubelet_size).float().mean())
    _, base = vjepa(p)
    steps = {"published structure": Step(base), "ours, all tokens": Ours(*vjepa(p), "cpu"),
             f"ours, in the sector ({100 * inside:.0f} % of the tokens)":
                 Ours(*vjepa(p, sector_aware=True, mask_rule="random"), "cpu")}
    cast = lambda: autocast(p.precision, "cpu")  # noqa: E731
    seconds = compare({n: lambda s=s: s(grey.float(), Generator().manual_seed(1), cast()) for n, s in steps.items()},
                      rounds)
    whole = rows(f"step, {size}", seconds, "published structure", "step of 4 clips")
    return whole + parts(p, size, grey, rounds)


def parts(p: Profile, size: str, grey: torch.Tensor, rounds: int) -> list[dict]:
    """The same by part. A forward and backward pass counts as one."""
    _, objective = vjepa(p)
    theirs, ours = Step(objective), Ours(*vjepa(p), "cpu")
    grey = grey.float()
    a, b = theirs.model, ours.objective
    prepared = b.prepare(grey, Generator().manual_seed(1))
    x3, x, masks = prepared.clips.repeat(1, 3, 1, 1, 1), prepared.clips, prepared.kinds[0]
    with torch.no_grad():
        z = b.encoder(x, masks.context)
    both = lambda f: lambda: f().square().mean().backward()  # noqa: E731

    def no_grad(f):
        with torch.no_grad():
            return f()

    def ema():
        with torch.no_grad():
            for theirs_, mine in zip(a.encoder.parameters(), a.target_encoder.parameters(), strict=True):
                mine.mul_(0.998).add_((1 - 0.998) * theirs_)

    for model in (a, b):  # gradients for the optimisers
        model.zero_grad()
        for q in model.parameters():
            if q.requires_grad:
                q.grad = torch.zeros_like(q)
    pairs = {
        "target": (lambda: no_grad(lambda: a.target_encoder(x3)), lambda: no_grad(lambda: b.target_encoder(x))),
        "context, short range": (both(lambda: a.encoder(x3, masks.context)), both(lambda: b.encoder(x, masks.context))),
        "embedding of the context": (both(lambda: a.encoder.proj(x3)),
                                     both(lambda: b.encoder.patch_embed(x, masks.context))),
        "predictor, short range": (both(lambda: a.predictor(z, masks, 0)), both(lambda: b.predictor(z, masks, 0))),
        "optimiser": (theirs.optimizer.step, ours.optimizer.step),
        "EMA": (ema, lambda: b.after_step(1)),
    }
    out = []
    for name, (published, mine) in pairs.items():
        seconds = compare({"published structure": published, "ours, all tokens": mine}, rounds)
        out += rows(f"{size}: {name}", seconds, "published structure")
    return out


def data(rounds: int, size: int = 224, frames: int = 16) -> list[dict]:
    """A clip of 16 frames at the paper's size, chosen and read in three ways, and its augmentation.

    Clips are read in random order, as a training reads them, from 50 MB: more than most processors' caches hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = phantom.make(Path(folder) / "tree", 32, 0, spacing=0.6)
        store.convert(tree, Path(folder) / "clips.h5", size)
        opened, entries = store.Store(Path(folder) / "clips.h5"), camus.scan(tree)
        length, starts = (opened.table[column].tolist() for column in ("length", "start"))
        raw = np.memmap(Path(folder) / "raw", np.uint8, "w+", shape=(sum(length), size, size))
        for i, start in enumerate(starts):
            raw[start:start + length[i]] = opened.frames(i)
        order = np.random.default_rng(0).permutation(len(opened)).tolist()

        def mapped():
            for i in order:
                np.ascontiguousarray(raw[starts[i] + clip_index(length[i], frames)])

        def from_hdf5():
            for i in order:
                opened.clip(i, frames, masks=False)

        def decoded():
            for i in order[:8]:
                native = camus.read(entries[i]).frames
                np.stack([resize_frame(native[k], size) for k in clip_index(length[i], frames)])

        seconds = compare({"raw memory map": mapped, "HDF5": from_hdf5, "NIfTI, decoded per item": decoded}, rounds)
        clips = torch.from_numpy(np.stack([opened.clip(i, frames).frames for i in range(4)]))
        opened.close()
    read = {name: s / (8 if "NIfTI" in name else len(order)) for name, s in seconds.items()}
    out = rows("a clip", read, "NIfTI, decoded per item", "16 frames of 224²")
    views = {"published: three float channels": lambda: published_view(clips, Generator().manual_seed(0)),
             "one channel, the published view": lambda: crop_and_flip(clips, Generator().manual_seed(0)),
             "one channel, the mild view": lambda: augment(clips, Generator().manual_seed(0))}
    return out + rows("augmentation", compare(views, rounds), next(iter(views)), "4 clips of 16 frames of 224²")


def published_view(clips: torch.Tensor, generator: Generator) -> torch.Tensor:
    """Random resized crop and mirror as the published loader does it: floats of three channels, clip by clip."""
    out, (H, W) = [], clips.shape[-2:]
    draw = lambda low, high: float(torch.empty(()).uniform_(low, high, generator=generator))  # noqa: E731
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for clip in clips:
        rgb = clip[..., None].expand(-1, -1, -1, 3).float().permute(3, 0, 1, 2)  # [3, T, H, W]
        area, ratio = draw(0.3, 1.0), draw(0.75, 1.35)
        h, w = (min(n, round(n * math.sqrt(area * r))) for n, r in ((H, 1 / ratio), (W, ratio)))
        top, left = round(draw(0, H - h)), round(draw(0, W - w))
        view = F.interpolate(rgb[..., top:top + h, left:left + w], (H, W), mode="bilinear", align_corners=False)
        view = view.flip(-1) if draw(0, 1) < 0.5 else view
        out.append((view / 255 - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1))
    return torch.stack(out)


def feeding(rounds: int) -> list[dict]:
    """Clips a second: read and augmented, against what a step of profile tiny consumes."""
    lab = Lab("tiny")
    objective = lab.objective(lab.spec("vjepa"))
    draw, ours = lab.batches(lab.store.rows("train")), Ours(lab.profile, objective, "cpu")
    batch = draw(Generator().manual_seed(0), lab.profile.batch)
    cast = lambda: autocast("32-true", "cpu")  # noqa: E731
    seconds = compare({"a step consumes": lambda: ours(batch, Generator().manual_seed(1), cast()),
                       "reading and augmenting feeds": lambda: draw(Generator().manual_seed(1), lab.profile.batch)},
                      rounds)
    return rows("profile tiny", seconds, "a step consumes", f"batch of {lab.profile.batch}")


def probing(size: str, rounds: int) -> list[dict]:
    """A probe step at batch 4 from cached features of the sector, against the frozen encoder on all every time."""
    p = load("paper", **SIZES[size], precision="32-true", one_pass=False, compile=False)
    grey = clips_like(p, p.probe_batch, p.frames)
    encoder = objectives.make_encoder(p, p.frames).eval()
    head = probe.SegmentationProbe(p.grid(), p.tubelet_size, p.width, p.heads, p.probe_width)
    masks = torch.zeros(grey.shape, dtype=torch.uint8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4, fused=True)  # as `probe.fit`
    with torch.no_grad():
        features, seen = probe.encode(encoder, grey.float(), True)
    cached = features.half()

    def learn(features, seen):
        head.loss(features, seen, masks).backward()
        optimizer.step()
        optimizer.zero_grad()

    def again():
        with torch.no_grad():
            z = probe.encode(encoder, grey.float(), False)
        learn(*z)

    seconds = compare({"features made again": again, "features from the cache": lambda: learn(cached, seen)}, rounds)
    return rows(f"probe step, {size}", seconds, "features made again", "4 clips")


def making(rounds: int) -> list[dict]:
    """Seconds a patient for the phantom and its conversion: on the wall, since a worker does it."""
    out = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            times = [time.perf_counter()]
            tree = phantom.make(Path(folder) / "tree", 4, 0, spacing=0.6, workers=1)
            times.append(time.perf_counter())
            store.convert(tree, Path(folder) / "clips.h5", 64, workers=1)
            out.append(np.diff([*times, time.perf_counter()]) / 4)
    phantom_s, convert_s = np.median(out, 0)
    return [{"what": "making", "variant": name, "ms": 1000 * s, "times faster": math.nan, "per": "patient, two views"}
            for name, s in (("phantom", phantom_s), ("conversion to HDF5, 64²", convert_s))]


def peak_memory() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)


def machine(device: str) -> dict:
    """Where this was measured."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line), cpu)
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **gpu,
            "python": platform.python_version(), "torch": torch.__version__, "commit": tables.commit()}


def as_text(content: dict) -> str:
    """The file's content as a page to read."""
    where = ", ".join(f"{k} {v}" for k, v in content.items() if k not in ("rows", "cpu"))
    cell = lambda v: v if isinstance(v, str) else "–" if math.isnan(v) else f"{float(f'{v:.3g}'):g}"  # noqa: E731
    table = pd.DataFrame(content["rows"]).map(cell).to_markdown(index=False, disable_numparse=True)
    return (f"# Speed\n\n`make bench` on {content['cpu']}: {where}. Medians of turns taken in one run; the rows "
            f"are explained in [`benchmarks/bench.py`](../benchmarks/bench.py). Ratios are against the row that says 1."
            f"\n\n{table}\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("step", "data", "probe", "making"), default=[])
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=[*SIZES][:3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "data_cache" / "bench.json")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    found, chosen = [], lambda name: not a.only or name in a.only

    def add(more: list[dict]) -> None:
        found.extend(more)
        print(pd.DataFrame(more).to_string(index=False, float_format=lambda v: f"{v:.3g}"), flush=True)
        content = {**machine("cpu"), "peak GiB": round(peak_memory(), 2), "rounds": a.rounds, "rows": found}
        a.out.parent.mkdir(exist_ok=True)
        write_text(a.out, as_text(content) if a.out.suffix == ".md" else json.dumps(content, indent=1))

    if chosen("data"):
        add(data(a.rounds))
        add(feeding(a.rounds))
    if chosen("making"):
        add(making(min(a.rounds, 3)))
    for size in a.sizes:
        rounds = max(2, a.rounds // 2) if "224" in size else a.rounds
        if chosen("probe"):
            add(probing(size, rounds))
        if chosen("step"):
            add(step(size, rounds))
    print(f"peak memory {peak_memory():.2f} GiB; kept as {a.out}")


if __name__ == "__main__":
    main()
