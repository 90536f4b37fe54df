"""ViT-L at the paper's settings on a GPU, unattended and within ten minutes: `python benchmarks/gpu.py`.

A step of the published structure and of ours with one switch after another, in one run and taking turns; what share of
the matrix rate that the same GPU shows in the same run a step sustains; several runs side by side; and what one
pre-training and the two tables would take, from these times. No weights are needed (they are random) and no data but
the phantom. The table is printed and kept as data_cache/gpu.json; a variant that fails is reported with its error, and
the rest goes on.
"""
import argparse
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from bench import SIZES, Ours, clips_like, compare, machine, vjepa
from published_structure import Step
from torch import Generator

from usjepa_nb import cost, grid, objectives, plan
from usjepa_nb.pretrain import ahead, compile_blocks
from usjepa_nb.probe import autocast
from usjepa_nb.profile import ROOT, Profile, load
from usjepa_nb.runs import write_text

SECTOR = {"sector_aware": True, "mask_rule": "random"}
# name -> settings of profile paper that differ, frozen blocks
VARIANTS = {
    "ours": ({}, 0),
    "+ both mask kinds in one pass": ({"one_pass": True}, 0),
    "+ compiled": ({"compile": True}, 0),
    "+ one pass, compiled": ({"one_pass": True, "compile": True}, 0),
    "+ one pass, compiled, in the sector": ({"one_pass": True, "compile": True, **SECTOR}, 0),
    "the same, 12 blocks frozen": ({"one_pass": True, "compile": True, **SECTOR}, 12),
    "the same, 16 blocks frozen": ({"one_pass": True, "compile": True, **SECTOR}, 16),
}


def matrix_rate(device: str, n: int = 8192, seconds: float = 2.0) -> float:
    """FLOP/s of bf16 matrix products of n × n."""
    n = n if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
            for _ in range(2))
    times, begun = [], time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times) < 5:
        times.append(compare({"it": lambda: [a @ b for _ in range(10)]}, 1, device)["it"] / 10)
    return 2 * n**3 / statistics.median(times)


def frozen(p: Profile, freeze: int, **changes) -> tuple[Profile, objectives.VJEPA]:
    """An objective of the paper's size with random weights, as `bench.vjepa` with frozen blocks."""
    p, objective = vjepa(p, **changes)
    if freeze:
        objective = objectives.VJEPA(p, p.frames, objective.encoder, 1.0, freeze)
    return p, objective


class Variant:
    """A step of ours, ready to be called: other masks every time, made a step ahead, both as in training."""

    def __init__(self, p: Profile, grey: torch.Tensor, device: str, changes: dict, freeze: int):
        self.p, objective = frozen(p, freeze, **changes)
        if self.p.compile:
            compile_blocks(objective)
        self.step, self.device = Ours(self.p, objective, device), device
        self.batches = ahead(lambda k: objective.prepare(grey, Generator().manual_seed(k)), range(1, sys.maxsize),
                             torch.device(device))

    def __call__(self) -> None:
        _, prepared = next(self.batches)
        self.step.take(prepared, autocast(self.p.precision, self.device))


def flops_of(p: Profile, grey: torch.Tensor, changes: dict, freeze: int) -> float:
    """FLOPs of a step without LL, which is not run, over four draws of masks."""
    p = p.replace(init="random", sector_aware=False, mask_rule="first").replace(**changes)
    stage = cost.training(p, p.frames, "vjepa", freeze, [grey.float().cpu()] * 4)
    return stage.flops - stage.ll


def side_by_side(runs: int, size: str, seconds: float, limit: float = 120) -> float:
    """Steps a second of `runs` processes on one GPU together; they measure when all of them are warm.

    Raises:
        RuntimeError: one of them failed, for want of memory perhaps, or they took longer than `limit` seconds.
    """
    command = [sys.executable, __file__, "--worker", str(seconds), "--size", size]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                 for _ in range(runs)]
    late = threading.Timer(limit, lambda: [p.kill() for p in processes])
    late.start()
    try:
        said = [p.stdout.readline() for p in processes]  # "warm", or nothing
        if all(said):
            for p in processes:
                print("go", file=p.stdin, flush=True)
            said = [p.communicate()[0].strip() for p in processes]
        if not all(said):
            raise RuntimeError(f"{said.count('')} of {runs} processes ended early")
        return sum(float(s.splitlines()[-1]) for s in said)
    finally:
        late.cancel()
        for p in processes:
            p.kill()


def worker(p: Profile, grey: torch.Tensor, device: str, seconds: float) -> float:
    step = Variant(p, grey, device, {"one_pass": True}, 0)
    compare({"warm": step}, 5, device)
    print("warm", flush=True)
    input()  # until the others are warm, too
    begun, n = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        compare({"it": step}, 1, device)
        n += 2  # compare's own first turn
    return n / (time.perf_counter() - begun)


def hours(p: Profile, seconds: dict[int, float]) -> dict[str, float]:
    """GPU-hours of one pre-training and of the trainings of Table 1 and 2, by the step times of 0, 12, 16 frozen."""
    g = grid.load("paper", p.depth, initial=True)
    each = {freeze: p.steps * s / 3600 for freeze, s in seconds.items()}
    table = lambda cells: sum(each.get(key[1], math.nan) for key, *_ in plan.every(p, g, cells) if key[0] == "vjepa")  # noqa: E731
    return {"one pre-training, nothing frozen": each[0], "V-JEPA's trainings of Table 1": table(g.table1),
            "V-JEPA's trainings of Table 2": table(g.table2)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES], default="ViT-L 224²×16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--variants", nargs="*", choices=[*VARIANTS], default=[*VARIANTS], help="some of the rows")
    parser.add_argument("--runs", type=int, nargs="*", default=[1, 2, 4], help="processes side by side; may be none")
    parser.add_argument("--worker", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "data_cache" / "gpu.json")
    a = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bf16-mixed" if device == "cuda" else "32-true"
    p = load("paper", **SIZES[a.size], precision=precision, one_pass=False, compile=False)
    grey = clips_like(p, p.batch, p.frames).to(device)
    if a.worker:
        print(worker(p, grey, device, a.worker))
        return
    rate = matrix_rate(device)
    out = {**machine(device), "size": a.size, "batch": p.batch, "precision": precision,
           "matrix TFLOP/s": rate / 1e12, "rows": [], "failed": {}}
    if device == "cpu":
        print("torch sees no GPU: these are times of this CPU, good for trying the script")

    def keep() -> None:
        a.out.parent.mkdir(exist_ok=True)
        write_text(a.out, json.dumps(out, indent=1))

    base, counted = Step(vjepa(p)[1], device), {}
    for name in a.variants:
        changes, freeze = VARIANTS[name]
        if freeze >= p.depth:
            continue
        try:
            mine, seeds = Variant(p, grey, device, changes, freeze), itertools.count(1)  # the same masks for both

            def published(step: Step = base, seeds: Iterator[int] = seeds) -> None:
                step(grey.float(), Generator().manual_seed(next(seeds)), autocast(precision, device))

            seconds = compare({"published": published, "mine": mine}, a.rounds, device)
            work = frozenset((changes | {"compile": False, "freeze": freeze}).items())
            flops = counted[work] = counted.get(work) or flops_of(p, grey, changes, freeze)
            peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else math.nan
            out["rows"].append({"variant": name, "frozen": freeze, "ms": 1e3 * seconds["mine"],
                                "published, ms": 1e3 * seconds["published"],
                                "times faster": seconds["published"] / seconds["mine"], "TFLOP a step": flops / 1e12,
                                "share of the matrix rate": flops / seconds["mine"] / rate, "peak, GiB, both": peak})
            print(pd.DataFrame(out["rows"][-1:]).to_string(index=False, float_format=lambda v: f"{v:.3g}"), flush=True)
        except Exception as error:  # reported, and the rest goes on
            out["failed"][name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{name} failed: {out['failed'][name]}", flush=True)
        finally:
            mine = None
            if device == "cuda":
                gc.collect()  # a compiled module holds itself
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        keep()
    by_frozen = {r["frozen"]: r["ms"] / 1e3 for r in out["rows"] if r["variant"].endswith(("sector", "frozen"))}
    if by_frozen.keys() >= {0, 12, 16}:
        out["hours in the sector"] = hours(p, by_frozen)
    base = published = None
    together = out["side by side, steps a second in all"] = {}
    if device == "cuda":
        torch.cuda.empty_cache()
    for runs in a.runs:
        try:
            together[str(runs)] = side_by_side(runs, a.size, 15 if device == "cuda" else 2)
        except (RuntimeError, OSError) as error:  # reported, and the rest goes on
            out["failed"][f"{runs} side by side"] = str(error)
        keep()
    print(json.dumps({k: v for k, v in out.items() if k != "rows"}, indent=1), f"kept as {a.out}", sep="\n")


if __name__ == "__main__":
    main()
