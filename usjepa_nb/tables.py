"""The paper's two tables: scores of a grid's cells, over seeds, paired over patients, with whatever is missing.

`python -m usjepa_nb.tables PROFILE [SEED] [GRID] [DATA]` prints them and writes summary.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version

import numpy as np
import pandas as pd
import torch

from usjepa_nb import manifest, metrics
from usjepa_nb.grid import Cell
from usjepa_nb.memory import OutOfMemory
from usjepa_nb.methods import PRETRAINED, UNTRAINED
from usjepa_nb.pretrain import Diverged
from usjepa_nb.profile import ROOT
from usjepa_nb.runs import Lab, read_run, write_text
from usjepa_nb.segment import segmentation
from usjepa_nb.weights import WeightsError

PACKAGES = ("usjepa-nb", "torch", "timm", "lightning-fabric", "numpy", "scipy", "h5py", "nibabel")


def seeded(lab: Lab, seeds: int) -> list[Lab]:
    """The lab, and the same with the seeds that follow; data and store are shared."""
    _ = lab.store  # opened once, before it is copied
    labs = [copy.copy(lab) for _ in range(seeds)]
    for k, other in enumerate(labs):
        other.seed, other.loaded = lab.seed + k, {}
    return labs


def collect(lab: Lab, cells: Iterable[Cell], fractions: Iterable[int], seeds: int = 1,
            train: bool = True) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores per video of every cell, share of labels and seed, and what is missing.

    Args:
        train: make what is not on disk; else it is missing. Weights or a package that cannot be had, a training that
            diverges or that the memory is too small for make their cell missing, with the reason.

    Returns:
        scores: `segment.scores` with columns cell, lam, freeze, fraction, seed and seconds before it.
        missing: cell, fraction, seed, reason.
    """
    found, missing = [], []
    for one in seeded(lab, seeds):
        for cell in cells:
            reason = ""  # why this cell is missing
            for fraction in sorted(fractions, reverse=True):
                try:
                    s = None if reason else segmentation(one, cell.method, fraction, cell.lam, cell.freeze, train=train)
                except (WeightsError, Diverged, OutOfMemory, ImportError) as e:  # of this cell; the others go on
                    s, reason = None, str(e)
                if s is None:
                    missing.append({"cell": cell.id, "fraction": fraction, "seed": one.seed,
                                    "reason": reason or "not on disk"})
                    continue
                found.append(s.scores.assign(cell=cell.id, key=cell.method, lam=cell.lam, freeze=cell.freeze,
                                             fraction=fraction, seed=one.seed, seconds=s.seconds))
    if not found:
        first = missing[0]["reason"] if missing else "no cells were asked for"
        raise ValueError(f"there is nothing to show: {first}; run the cells first (make table1, make table2), or let "
                         'this train them: missing = "train"')
    return pd.concat(found, ignore_index=True), pd.DataFrame(missing, columns=["cell", "fraction", "seed", "reason"])


def per_seed(scores: pd.DataFrame, split: str, which: str = "best", score: str = "dsc") -> pd.Series:
    """One value per (method, fraction, patient, seed): the views of a patient averaged."""
    chosen = scores[(scores.split == split) & (scores.which == which)]
    return chosen.groupby(["method", "fraction", "patient", "seed"], sort=False)[score].mean()


def per_patient(scores: pd.DataFrame, split: str, which: str = "best", score: str = "dsc") -> pd.Series:
    """One value per (method, fraction, patient): the views of a patient averaged first, then the seeds."""
    values = per_seed(scores, split, which, score)
    return values.groupby(["method", "fraction", "patient"], sort=False).mean()


def compare(values: pd.Series, pairs: Iterable[tuple[str, str]], fractions: Iterable[int]) -> pd.DataFrame:
    """Paired differences a - b over patients for each share of labels, `metrics.paired`, and Holm over all of them.

    Args:
        values: as `per_seed`. Each pair is compared on the seeds that both have, averaged first (a seed also chooses
            whose labels are used); a pair of which one side is missing is left out.
    """
    found, rows = {key: v.droplevel(["method", "fraction"]) for key, v in values.groupby(["method", "fraction"])}, []
    for f, (a, b) in ((f, pair) for f in fractions for pair in pairs):
        if {(a, f), (b, f)} <= found.keys():
            both = pd.concat([found[a, f], found[b, f]], axis=1, join="inner", keys=["a", "b"])
            if len(mean := both.groupby("patient").mean()):
                rows.append({"a": a, "b": b, "fraction": f, **metrics.paired(mean.a.to_numpy(), mean.b.to_numpy())})
    names = ["a", "b", "fraction", "difference", "low", "high", "d_z", "wilcoxon_p", "t_p", "n"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(holm_p=metrics.holm(table.wilcoxon_p))


def interval(values: pd.Series) -> pd.DataFrame:
    """Mean over patients and its 95 % bootstrap interval: columns method, fraction, dsc, lo, hi."""
    rows = []
    for (method, fraction), v in values.groupby(["method", "fraction"], sort=False):
        one = metrics.paired(v.to_numpy(), np.zeros(len(v)))
        rows.append({"method": method, "fraction": fraction, "dsc": v.mean(), "lo": one["low"], "hi": one["high"]})
    return pd.DataFrame(rows, columns=["method", "fraction", "dsc", "lo", "hi"])


def rows(scores: pd.DataFrame, cells: Iterable[Cell], split: str, which: str = "best") -> pd.DataFrame:
    """Mean ± SD over the videos of a split: a row per cell (in their order), share of labels and seed."""
    chosen = scores[(scores.split == split) & (scores.which == which)]
    at = {c.id: k for k, c in enumerate(cells)}
    chosen = chosen.assign(at=chosen.cell.map(at)).dropna(subset="at").sort_values("at", kind="stable")
    groups = chosen.groupby(["method", "cell", "key", "lam", "freeze", "fraction", "seed"], sort=False)
    means = groups[[*metrics.SCORES, "dsc_1", "dsc_2", "dsc_3", "dsc_ed", "dsc_es", "dsc_between", "seconds"]].mean()
    spread = groups[[*metrics.SCORES]].std().add_suffix("_sd")
    table = pd.concat([groups.size().rename("videos"), means, spread], axis=1).reset_index()
    return table.assign(split=split, probe=which)


def effects(scores: pd.DataFrame, cells: Iterable[Cell], fractions: Iterable[int]) -> pd.DataFrame:
    """What is asked of table 2, on test patients: pre-trained against random, LL against the same V-JEPA without it,
    and fine-tuned against from scratch. Columns as `compare`.
    """
    name = dict(scores[["cell", "method"]].drop_duplicates().to_numpy())
    asked = [(c.id, "random") for c in cells if c.method in PRETRAINED]
    asked += [(c.id, Cell("vjepa", 1.0, c.freeze).id) for c in cells if c.method == "vjepa_ll"]
    asked += [("finetuned", "supervised")]
    pairs = [(name[a], name[b]) for a, b in asked if {a, b} <= name.keys()]
    return compare(per_seed(scores, "test"), pairs, fractions)


def commit() -> str:
    """The commit of the checkout, with "+" where files differ from it; empty outside of one."""
    git = lambda *a: subprocess.run(["git", "-C", ROOT, *a], capture_output=True, text=True).stdout.strip()  # noqa: E731
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        return ""


def summary(lab: Lab, grid: str = "walk") -> dict:
    """Both tables of a grid from what is on disk, what is missing, provenance (`manifest`) and seconds per stage."""
    g = lab.grid(grid)
    scores, missing = collect(lab, g.cells, g.fractions, g.seeds, train=False)
    trained, threads = {}, set()
    for other in seeded(lab, g.seeds):
        for c in (c for c in g.cells if c.method not in (*UNTRAINED, "prior")):
            for f in g.fractions:  # most see all patients at every share
                spec = other.spec(c.method, c.lam, c.freeze, f)
                file = other.folder(spec) / "run.json"
                if file.exists():
                    name = f"train {c.id}" + (f" {f}%" if spec["fraction"] else "") + f" seed {other.seed}"
                    run = read_run(file)
                    trained[name], threads = run["seconds"], threads | {run.get("threads")}  # older runs did not say
    as_json = lambda table: json.loads(table.to_json(orient="records"))  # noqa: E731
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"profile": lab.profile.name, "grid": g.name, "data": lab.data_name, "data_hash": lab.store.data_hash,
            "ed_es_only": bool(lab.store.ed_es_only), "split": lab.store.split_note,
            "seeds": [lab.seed + k for k in range(g.seeds)], "commit": commit(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}" + (f", {gpu}" if gpu else ""),
            "versions": {p: version(p) for p in PACKAGES}, "seconds": trained,
            "threads": sorted(threads - {None}), "missing": as_json(missing),
            "effects": as_json(effects(scores, g.table2, g.fractions)),
            "table1": as_json(rows(scores, g.table1, "val")),
            "rows": as_json(rows(scores, g.table2, "test")), **manifest.manifest(lab, grid)}


def write(lab: Lab, grid: str = "walk") -> dict:
    """Write `summary` to summary.json in the folder of the executed notebooks, and return it."""
    content, folder = summary(lab, grid), lab.results(grid)
    folder.mkdir(parents=True, exist_ok=True)
    for where in [folder] + [lab.cache / "runs" / lab.profile.name] * (grid == "walk"):
        write_text(where / "summary.json", json.dumps(content, indent=1))
    return content


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m usjepa_nb.tables", description=__doc__.split("\n")[0])
    for name, default, words in (("profile", "tiny", "name, or path of a YAML file"), ("seed", 0, "of the first runs"),
                                 ("grid", "walk", "name, or path of a YAML file"),
                                 ("data", "", "a CAMUS folder or its converted file; without it the phantom")):
        parser.add_argument(name, nargs="?", default=default, type=type(default), help=words)
    a = parser.parse_args(argv)
    try:
        lab = Lab(a.profile, a.data, seed=a.seed)
        show(lab, write(lab, a.grid), a.grid)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def show(lab: Lab, content: dict, grid: str) -> None:
    """Print what `write` returned."""
    kind = "ED/ES only" if lab.store.ed_es_only else "video"
    seeds = f"{len(content['seeds'])} seeds" if len(content["seeds"]) > 1 else "one seed"
    for key, part, split, title in (("table1", "val", "validation", "Table 1"), ("rows", "test", "test", "Table 2")):
        table = pd.DataFrame(content[key])
        if part not in set(lab.store.table.query("labelled")["split"]):
            print(f"\n{title} is empty: no {split} video has reference masks ({lab.store.split_note})")
        if not len(table) or (key == "table1" and grid == "walk"):
            continue
        shown = table.groupby(["method", "fraction"], sort=False).dsc.mean().unstack()
        shown = shown[sorted(shown.columns, reverse=True)].rename(columns=lambda f: f"DSC, {f} % of labels")
        print(f"\n{title}: mean DSC over {table.videos.iloc[0]} {split} videos ({lab.data_name}, {kind}, {seeds}):\n")
        print(shown.to_string(float_format=lambda v: f"{v:.3f}", na_rep="missing"))
    if content["effects"]:
        print("\nPaired differences over test patients, mean [95 % interval]:\n")
    for r in content["effects"]:
        if not r["n"]:
            continue
        bounds = f"[{r['low']:+.3f}, {r['high']:+.3f}]" if r["n"] > 1 else "(one patient)"
        print(f"{r['fraction']:4d} %  {r['a']} minus {r['b']}: {r['difference']:+.3f} {bounds}")
    for (cell, reason), g in pd.DataFrame(content["missing"] or {"cell": [], "reason": []}).groupby(["cell", "reason"]):
        print(f"missing: {cell} ({len(g)} of its scores): {reason}")
    where = lab.results(grid)
    where = where.relative_to(lab.cache.parent) if where.is_relative_to(lab.cache.parent) else where
    print(f"\nExecuted notebooks and their HTML: {where}\nThe same table with all scores: {where / 'summary.json'}")


if __name__ == "__main__":
    sys.exit(main())
