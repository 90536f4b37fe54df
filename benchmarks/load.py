"""Many readers of one file while it is made anew, and ten thousand sequences in the memory of one thousand.

    make load                                             both, into results/load.md (a few minutes on one core)
    python benchmarks/load.py --clients 30 --sequences 10000 --seconds 20 --out results/load.md

Readers: every client is a process that scrubs: it draws a sequence, shows one frame with its mask, then a clip, waits
as long as a hand does, and opens the file anew now and then. Every pixel is checked. A frame's grey value says whose
it is, which instant, and which making of the file; one value of two makings in one answer would be a torn read.

Memory: the highest resident memory of a process that converts and of one that trains, for a small and a large data set
that differ in nothing but the number of sequences.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from usjepa_nb.images import save_nifti
from usjepa_nb.phantom import write_text
from usjepa_nb.splits import PARTS
from usjepa_nb.store import Store, convert
from usjepa_nb.tables import commit

ROOT = Path(__file__).resolve().parents[1]
THINK = 0.02  # s between two positions of a slider
VIEWS = ("2CH", "4CH")


# --- a data set whose every pixel is known

def grey(number: int, view: str, instant, making: int):
    """Grey value of a frame, the same at every pixel."""
    return (7 * number + 3 * VIEWS.index(view) + 11 * np.asarray(instant) + 101 * making) % 250 + 5


def label(number: int, instant):
    return (number + np.asarray(instant)) % 4


def write_patient(root: Path, number: int, making: int, frames: int, side: int) -> None:
    """Both views of a patient in CAMUS's layout; EF names the making."""
    folder = root / "database_nifti" / f"patient{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    t = np.arange(frames)
    for view in VIEWS:
        stem, size = folder / f"{folder.name}_{view}_half_sequence", (frames, side, side)
        for end, values in (("", grey(number, view, t, making)), ("_gt", label(number, t))):
            volume = np.broadcast_to(values[:, None, None], size)
            save_nifti(f"{stem}{end}.nii", volume.astype(np.uint8), (0.5, 0.5), np.uint8)
        (folder / f"Info_{view}.cfg").write_text(f"ED: 1\nES: {frames}\nNbFrame: {frames}\nImageQuality: Good\n"
                                                 f"EF: {making}\nSex: F\nAge: 60\nFrameRate: 50\n")


def write_tree(root: Path, sequences: int, frames: int = 6, side: int = 24) -> Path:
    patients = range(1, sequences // 2 + 1)
    for number in patients:
        write_patient(root, number, 0, frames, side)
    (root / "database_split").mkdir(exist_ok=True)
    for part, of in (("train", (0, 1, 2, 3, 4, 5, 6, 7)), ("val", (8,)), ("test", (9,))):
        names = [f"patient{n:04d}\n" for n in patients if n % 10 in of]
        (root / "database_split" / PARTS[part]).write_text("".join(names))
    return root


# --- readers

def scrub(path: Path, seconds: float, seed: int, queue) -> None:
    """One client: (kind of access, ms, was it all right) of everything it did."""
    rng, done = np.random.default_rng(seed), []
    end, left, store = time.perf_counter() + seconds, 0, None

    def timed(kind, call):
        begun = time.perf_counter()
        try:
            value, right = call(), True
        except Exception as error:
            value, right = f"{type(error).__name__}: {error}", False
        done.append((kind, 1000 * (time.perf_counter() - begun), right, "" if right else value))
        return value if right else None

    while time.perf_counter() < end:
        if not left:  # the file may be another one by now
            if store is not None:
                store.close()
            store, left = timed("open", lambda: Store(path)), 25
            if store is None:
                left = 0
                continue
        left -= 1
        i = int(rng.integers(len(store)))
        row = {name: column[i] for name, column in store._columns.items()}
        number, making, length = int(row["patient"][7:]), int(row["ef"]), int(row["length"])
        t = int(rng.integers(length))
        for kind, call, instants in (
                ("frame and mask", lambda: (store._slice("frames", i, t, t), store._slice("masks", i, t, t)), [t]),  # noqa: B023
                ("clip of 16", lambda: (lambda c: (c.frames, c.masks, c.index))(store.clip(i, 16)), None)):  # noqa: B023
            if (answer := timed(kind, call)) is None:
                continue
            at = answer[2] if instants is None else instants
            whole = (answer[0] == grey(number, row["view"], at, making)[:, None, None]).all() and \
                (answer[1] == label(number, at)[:, None, None]).all()
            if not whole:
                done[-1] = (*done[-1][:2], False, f"torn: row {i}, making {making}")
        time.sleep(THINK)
    queue.put(done)


def readers(path: Path, clients: int, seconds: float, meanwhile) -> tuple[pd.DataFrame, int]:
    """What all clients did, while `meanwhile()` is called again and again in this process; how often it was."""
    context = multiprocessing.get_context("fork")
    queue, rounds = context.Queue(), 0
    processes = [context.Process(target=scrub, args=(path, seconds, seed, queue)) for seed in range(clients)]
    for process in processes:
        process.start()
    end = time.perf_counter() + seconds
    while meanwhile and time.perf_counter() < end:
        meanwhile()
        rounds += 1
    rows = [row for _ in processes for row in queue.get(timeout=seconds + 300)]
    for process in processes:
        process.join()
        if process.exitcode:
            rows.append(("client", 0.0, False, f"ended with {process.exitcode}"))
    return pd.DataFrame(rows, columns=["access", "ms", "right", "error"]), rounds


def scrubbing(folder: Path, clients: int, seconds: float, sequences: int = 20) -> pd.DataFrame:
    """Latencies of `clients` readers, alone and while the same file is made anew with other content."""
    tree, out, tables = write_tree(folder / "tree", sequences, 20, 96), folder / "data.h5", []
    making = 0

    def again():
        nonlocal making
        making += 1
        for number in range(1, sequences // 2 + 1):
            write_patient(tree, number, making % 100, 20, 96)
        report = convert(tree, out, 96, workers=1, progress=False)
        assert report.converted == sequences and not report.refused, report

    convert(tree, out, 96, workers=1, progress=False)
    for name, meanwhile in (("alone", None), ("while it is made anew", again)):
        rows, rounds = readers(out, clients, seconds, meanwhile)
        for access, group in rows.groupby("access", sort=False):
            quantiles = group.ms.quantile([0.5, 0.95, 0.99])
            tables.append({"file": name if not meanwhile else f"{name} ({rounds} times)", "access": access,
                           "reads": len(group), "median ms": quantiles[0.5], "95 %": quantiles[0.95],
                           "99 %": quantiles[0.99], "longest": group.ms.max(),
                           "wrong or failed": int((~group.right).sum())})
        for error in rows.loc[~rows.right, "error"].unique()[:5]:
            print(error, file=sys.stderr)
    return pd.DataFrame(tables)


# --- memory

def peak() -> float:
    """MB: the highest resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stage(what: str, tree: str, cache: str) -> None:
    """One stage in a process of its own; prints what it took as JSON."""
    from usjepa_nb.runs import Lab

    lab = Lab("smoke", tree, cache, steps=60, videomae_steps=60, log_every=60, probe_min_steps=20)
    before, begun = peak(), time.perf_counter()
    if what == "convert":
        convert(lab.tree, lab.hdf5, 32, progress=False)
    else:
        rows = len(lab.store)
        if what == "train":
            lab.encoder("vjepa")
        if what == "probe":
            from usjepa_nb.segment import segmentation

            segmentation(lab, "random")
        assert rows
    print(json.dumps({"before": before, "process": peak(), "seconds": time.perf_counter() - begun}))


STAGES = {"convert": "convert", "open": "open and check the file", "train": "pre-train (V-JEPA, 60 steps)",
          "probe": "probe (labels of all patients)"}


def memory(folder: Path, small: int, large: int) -> pd.DataFrame:
    """Highest memory of each stage, for both data sets, in fresh processes."""
    rows = {}
    for sequences in (small, large):
        begun = time.perf_counter()
        tree = write_tree(folder / f"tree{sequences}", sequences)
        print(f"{sequences} sequences written in {time.perf_counter() - begun:.0f} s", flush=True)
        for what, words in STAGES.items():
            command = [sys.executable, __file__, "stage", what, str(tree), str(folder / f"cache{sequences}")]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                sys.exit(done.stderr)
            took = json.loads(done.stdout.strip().splitlines()[-1])
            print(sequences, words, took, flush=True)
            rows.setdefault(words, {})[sequences] = took
        shutil.rmtree(tree)
    out = []
    for words, by in rows.items():
        a, b = by[small], by[large]
        out.append({"stage": words, "before, MB": b["before"], f"{small} sequences, MB": a["process"],
                    f"{large} sequences, MB": b["process"], "ratio": b["process"] / a["process"],
                    "more for each 1,000, MB": (b["process"] - a["process"]) / (large - small) * 1000,
                    f"s, {large}": b["seconds"]})
    return pd.DataFrame(out)


# --- report

def machine() -> str:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("h5py", "numpy", "pandas", "torch"))
    return (f"{model or platform.machine()}, {os.cpu_count()} cores (shared); "
            f"Python {platform.python_version()}, {packages}")


def main() -> None:
    if sys.argv[1:2] == ["stage"]:
        return stage(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=20, help="that the clients read, in each of two rounds")
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "load.md")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reads = scrubbing(Path(folder), a.clients, a.seconds)
        print(reads.to_string(index=False, float_format="%.2f"), flush=True)
        grows = memory(Path(folder), a.sequences // 10, a.sequences)
        print(grows.to_string(index=False, float_format="%.2f"))
    wrong = int(reads["wrong or failed"].sum())
    text = (f"# Load\n\n`python benchmarks/load.py --clients {a.clients} --seconds {a.seconds:g} "
            f"--sequences {a.sequences}` on {machine()}, commit {commit()}. "
            "What is measured, and how, says `benchmarks/load.py`.\n\n"
            f"## {a.clients} processes read one file\n\n{reads.to_markdown(index=False, floatfmt='.2f')}\n\n"
            f"{reads['reads'].sum()} reads, every pixel checked, {wrong} wrong or failed.\n\n"
            f"## Highest memory of a process\n\n{grows.to_markdown(index=False, floatfmt='.2f')}\n\n"
            "\"before\" is what the imported packages take. A probe holds its clips, masks and features in memory "
            "(`segment.fit_probe`, `probe.Cache`), and so does what learns end to end (`runs.Lab.train`); the other "
            "stages hold the table of sequences alone.\n")
    write_text(a.out, text)
    if wrong:
        sys.exit(f"{wrong} reads were wrong or failed")


if __name__ == "__main__":
    main()
