"""Does V-JEPA need a moving teacher? EMA, SALT and VideoMAE from random weights under one budget of steps.

    python benchmarks/static_teacher.py run [--data CAMUS] [--seeds 0 1 2]   rows of results/static_teacher_*.json
    python benchmarks/static_teacher.py report                               results/static_teacher.md

Judged by what notebook 07 shows: segmentation with 10 and 100 % of the labels, linear probes, corrupted clips; all on
test patients. FLOPs are counted (`usjepa_nb.cost`), a teacher's own training included where it is trained here.
Every run lies in the cache under its hash, so a stopped study goes on where it was.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock

from usjepa_nb import bootstrap, cost, linear, robustness, tables, tasks
from usjepa_nb.runs import Lab, write_text
from usjepa_nb.segment import predictor, segmentation

RESULTS = Path(__file__).resolve().parents[1] / "results"
SIZE = {"patients": 240, "phantom_seed": 2000, "batch": 16, "lr": 1e-3, "videomae_lr": 1e-3, "log_every": 250,
        "init": "random", "init_videomae": "random", "encoder_lr": 1.0, "steps": 1000, "videomae_steps": 1000}
TWO_STAGES = {"steps": 500, "teacher_steps": 500}

# name -> (words, method, λ, settings that differ, trained beforehand elsewhere)
METHODS = {
    "random": ("frozen random encoder", "random", 1.0, {}),
    "videomae": ("VideoMAE", "videomae", 1.0, {}),
    "vjepa": ("V-JEPA, EMA teacher", "vjepa", 1.0, {}),
    "teacher": ("SALT's teacher alone, pixels under V-JEPA's masks", "teacher", 1.0, TWO_STAGES),
    "salt": ("SALT, half the steps for each stage", "salt", 1.0, TWO_STAGES),
    "salt-small": ("SALT, teacher 64 wide and 2 deep", "salt", 1.0,
                   {**TWO_STAGES, "teacher_width": 64, "teacher_depth": 2}),
    "salt-ll": ("SALT + LL, λ 0.25", "salt", 0.25, TWO_STAGES),
    "salt-domain": ("SALT, teacher: the shipped VideoMAE weights", "salt", 1.0,
                    {"teacher": "weights/videomae-phantom.pt"}),
}
SEVERITIES = (1, 3, 5)
WAYS = ("mean-pooled",)


def flops(lab: Lab, method: str, lam: float) -> float:
    """FLOPs of a run's training, its teacher's included where that is trained here."""
    if method == "random":
        return 0.0
    draw = lab.batches(lab.store.rows("train"))
    batches = [draw(torch.Generator().manual_seed(k), lab.profile.batch) for k in range(2)]
    stage = cost.training(lab.profile, lab.frames, method, 0, batches)
    own = (stage.flops - (stage.ll if lam == 1 else 0)) * stage.steps
    return own + (flops(lab, "teacher", 1.0) if method == "salt" and lab.profile.teacher == "pixels" else 0.0)


def evaluate(lab: Lab, method: str, lam: float) -> dict:
    """Scores on test patients: DSC, linear probes, DSC under corruptions (clips of every fourth test patient)."""
    run = lab.encoder(method, lam)
    row = {}
    for fraction in (10, 100):
        scores = segmentation(lab, method, fraction, lam).scores
        chosen = scores[(scores.split == "test") & (scores.which == "best")]
        row[f"dsc_{fraction}"] = float(chosen.groupby("patient").dsc.mean().mean())
    asked = tasks.possible(tasks.camus_tasks(lab))
    for (task, encoder, _), guess in linear.study(asked, {"it": run.encoder}, lab.profile, WAYS).items():
        one = next(t for t in asked if t.name == task)
        for r in bootstrap.evaluate(one, guess, seed=lab.seed).itertuples():
            row[f"{task} {r.score}" + ("" if encoder == "it" else ", constant")] = [r.value, r.low, r.high]
    test = lab.store.rows("test", labelled=True)
    patients = np.sort(lab.store.table.loc[test, "patient"].unique())[::4]
    test = test[lab.store.table.loc[test, "patient"].isin(patients).to_numpy()]
    clips, masks = lab.clips(test)
    spoilt = robustness.robustness({method: predictor(lab, run)}, clips, masks,
                                   lab.store.table.loc[test, ["patient", "view"]], severities=SEVERITIES, seed=lab.seed)
    means = spoilt.groupby(["corruption", "severity"]).dsc.mean()
    return row | {"corrupted": [[c, int(s), float(v)] for (c, s), v in means.items()]}


def run(data: str, seeds: list[int], only: list[str]) -> None:
    out = RESULTS / f"static_teacher_{'real' if data else 'phantom'}.json"
    known = lambda: json.loads(out.read_text())["rows"] if out.exists() else []  # noqa: E731
    for seed in seeds:
        for name in only or METHODS:
            if any(r["name"] == name and r["seed"] == seed for r in known()):
                continue
            words, method, lam, changes = METHODS[name]
            lab = Lab("tiny", data, seed=seed, **SIZE | changes)
            end = lab.encoder(method, lam).history
            end = end.dropna().iloc[-1] if len(end) else {}
            row = {"name": name, "words": words, "seed": seed, "steps": 0 if method == "random" else steps(lab, method),
                   "flops": flops(lab, method, lam), **evaluate(lab, method, lam),
                   **{k: float(end[k]) for k in ("loss", "jepa", "zero", "rank", "position_share") if k in end}}
            print({k: v for k, v in row.items() if k != "corrupted"}, flush=True)
            content = {"data": lab.data_name, "data_hash": lab.store.data_hash,
                       "ed_es_only": bool(lab.store.ed_es_only), "settings": SIZE, "severities": SEVERITIES,
                       "commit": tables.commit()}
            with FileLock(lab.cache / f"{out.stem}.lock"):  # seeds may run side by side
                write_text(out, json.dumps(content | {"rows": [*known(), row]}, indent=1))


def steps(lab: Lab, method: str) -> int:
    """Optimiser steps of a run, its teacher's included where that is trained here."""
    p = lab.profile
    own = {"videomae": p.videomae_steps, "teacher": p.teacher_steps}.get(method, p.steps)
    return own + (p.teacher_steps if method == "salt" and p.teacher == "pixels" else 0)


def shown(content: dict) -> pd.DataFrame:
    """A row per method, means over seeds: budget, DSC, linear probes, mean corruption error (random encoder = 100)."""
    rows = pd.DataFrame(content["rows"])
    spoilt = pd.DataFrame([{"method": r["name"], "seed": r["seed"], "corruption": c, "severity": s, "dsc": v}
                           for r in content["rows"] for c, s, v in r["corrupted"]])
    errors = pd.concat([robustness.corruption_error(g, "random")[["mCE"]] for _, g in spoilt.groupby("seed")
                        if "random" in set(g.method)]).groupby(level=0).mean()
    probes = [c for c in rows if " " in c and "constant" not in c]
    values = rows[probes].map(lambda v: v[0] if isinstance(v, list) else np.nan)
    constant = rows[[f"{c}, constant" for c in probes]].map(lambda v: v[0] if isinstance(v, list) else np.nan).mean()
    table = pd.concat([rows[["name", "words", "steps", "flops", "dsc_10", "dsc_100"]], values], axis=1)
    means = table.groupby(["name", "words"], sort=False).mean().reset_index("words")
    means.insert(1, "seeds", rows.groupby("name").seed.nunique())
    guess = pd.Series({"words": "a constant guess", **constant.rename(lambda c: c.removesuffix(", constant"))})
    means = pd.concat([means.join(errors).assign(flops=lambda t: t.flops / 1e12), guess.to_frame("constant").T])
    return means.rename(columns={"words": "method", "flops": "TFLOPs", "dsc_10": "DSC, 10 %", "dsc_100": "DSC, 100 %",
                                 "ef MAE": "ef MAE (points)"})


def report() -> None:
    parts = []
    for data, where in (("phantom", "phantom (video)"), ("real", "real frames (ED/ES only)")):
        if (path := RESULTS / f"static_teacher_{data}.json").exists():
            table = shown(json.loads(path.read_text()))
            table = table.astype({c: float for c in table if c != "method"})
            table = table.astype(object).where(table.notna(), None)
            form = [".0f" if c in ("seeds", "steps") else ".3f" for c in table]
            parts += [f"### {where}\n", table.to_markdown(index=False, floatfmt=form, missingval="–"), ""]
    title = ("# A moving teacher, a static one, or pixels\n\nMade by `benchmarks/static_teacher.py`; means over seeds, "
             "test patients; mCE: mean corruption error on every fourth of them, severities 1, 3 and 5, random "
             "encoder = 100, lower is better. Steps and TFLOPs count a teacher that is trained here, not the training "
             "of shipped weights.\n\n")
    write_text(RESULTS / "static_teacher.md", title + "\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--data", default="", help="a CAMUS folder or its converted file; without it the phantom")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=[], help="names of methods")
    a = parser.parse_args()
    report() if a.what == "report" else run(a.data, a.seeds, a.only)


if __name__ == "__main__":
    main()
