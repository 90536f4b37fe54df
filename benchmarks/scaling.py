"""How the cost of a step grows: python benchmarks/scaling.py writes results/scaling.json, which notebook 03 draws.

One setting of profile tiny at a time, everything else as it is; random weights, all tokens. Seconds are medians that
take turns (see bench.py). The floor is what the counted FLOPs would take at the rate of large matrix products, measured
in the same run: no code can be faster.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench import Ours, compare, machine
from torch import Generator

from usjepa_nb import objectives
from usjepa_nb.cost import counter
from usjepa_nb.probe import autocast
from usjepa_nb.profile import ROOT, load
from usjepa_nb.runs import write_text

GROWS = {"size": (32, 48, 64, 96, 128), "frames": (4, 8, 16, 32), "depth": (2, 4, 8, 16), "batch": (2, 4, 8, 16)}
PATIENTS = (60, 450, 5000)  # phantom of tiny, CAMUS, a hospital's archive
CLIPS_A_PATIENT, EPOCHS = 2, 300


def step_of(**changes):
    """A step of profile tiny with other settings, ready to be called, and its number of tokens."""
    p = load("tiny", **{"sector_aware": False, "init": "random", "target_layers": 2, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = objectives.VJEPA(p, p.frames, objectives.make_encoder(p, p.frames), 1.0, 0)
    grey = torch.randint(0, 256, (p.batch, p.frames, p.size, p.size), generator=Generator().manual_seed(0)).float()
    ours = Ours(p, objective, "cpu")
    t, y, x = p.grid()
    return lambda: ours(grey, Generator().manual_seed(1), autocast("32-true", "cpu")), t * y * x


def matrix_rate(n: int = 1024) -> float:
    """FLOP/s of float32 products of n × n on one thread."""
    a, b = torch.randn(2, n, n, generator=Generator().manual_seed(0))
    seconds = statistics.median(compare({"it": lambda: a @ b}, 1)["it"] for _ in range(9))
    return 2 * n**3 / seconds


def together(rank: int, processes: int, steps: int, file: str) -> None:
    """A process of several that train the same run: an equal share of the batch each, gradients averaged."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    p = load("tiny", sector_aware=False, init="random")
    torch.manual_seed(0)
    objective = objectives.VJEPA(p, p.frames, objectives.make_encoder(p, p.frames), 1.0, 0)
    model = torch.nn.parallel.DistributedDataParallel(objective)
    grey = torch.randint(0, 256, (p.batch // processes, p.frames, p.size, p.size)).float()
    optimizer = torch.optim.AdamW([q for q in objective.parameters() if q.requires_grad], lr=1e-5, fused=True)
    times = []
    for k in range(steps + 1):
        begun = time.perf_counter()
        model(objective.prepare(grey, Generator().manual_seed(k)))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(1)
        times.append(time.perf_counter() - begun)
    if rank == 0:
        Path(f"{file}.s").write_text(str(statistics.median(times[1:])))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "scaling.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rate, rows, base = matrix_rate(), [], load("tiny")
    for name, values in GROWS.items():
        made = {v: step_of(**{name: v}) for v in values}
        seconds = compare({v: step for v, (step, _) in made.items()}, a.rounds)
        for v, (step, tokens) in made.items():
            with counter() as flops:
                step()
            rows.append({"grows": name, "value": v, "tokens": tokens, "s": seconds[v],
                         "GFLOP": flops.get_total_flops() / 1e9, "floor, s": flops.get_total_flops() / rate})
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    own = next(r["s"] for r in rows if r["grows"] == "batch" and r["value"] == base.batch)
    run = [{"patients": n, "hours": n * CLIPS_A_PATIENT * EPOCHS / base.batch * own / 3600} for n in PATIENTS]
    processes = []
    for n in (1, 2):
        file = a.out.with_name(f".group{n}")
        mp.spawn(together, (n, 6 * a.rounds, str(file.resolve())), n)
        processes.append({"processes": n, "s, on the wall": float(Path(f"{file}.s").read_text())})
        for left in (file, Path(f"{file}.s")):
            left.unlink(missing_ok=True)
    content = {**machine("cpu"), "matrix GFLOP/s": rate / 1e9, "rows": rows, "epochs": EPOCHS, "runs": run,
               "processes": processes}
    write_text(a.out, json.dumps(content, indent=1))
    print(processes, run)


if __name__ == "__main__":
    main()
