"""What makes V-JEPA work at teaching scale, and whether it then beats its controls. Tables: `results/recipe.md`.

    python benchmarks/recipe.py tune  [--data CAMUS] [--seeds 0 1 2] [--only NAME ...]  one change at a time
    python benchmarks/recipe.py judge [--data CAMUS] [--seeds 0 1 2 3 4] [--size ti]    the frozen recipe, once
    python benchmarks/recipe.py follow [--data CAMUS] [--seeds 0 1 2]                   does LL guard good weights?
    python benchmarks/recipe.py report                                                  results/recipe.md

Tuning sees training patients only: a fifth of them is held out as an inner fold. Judging trains on the training
patients, chooses the probe's step on patients drawn from them, and scores the phantom's test patients or CAMUS's
official validation patients. Every run lies in the cache under its hash, so a stopped study goes on where it was.
"""
import argparse
import json
import tempfile
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock

from usjepa_nb import metrics, probe
from usjepa_nb.methods import END_TO_END
from usjepa_nb.runs import Lab, write_text
from usjepa_nb.segment import segmentation

RESULTS = Path(__file__).resolve().parents[1] / "results"
SIZE = {"patients": 240, "phantom_seed": 2000, "batch": 16, "videomae_steps": 3000, "videomae_lr": 1e-3,
        "steps": 600, "lr": 1e-3, "encoder_lr": 0.2, "log_every": 300, "init": "videomae", "init_videomae": "random"}

# name -> (what changes against the recipe, in words; method; its settings)
SCRATCH = {"init": "random", "steps": 1500, "encoder_lr": 1.0}
ADAPTED = {"init_videomae": "weights/videomae-phantom.pt"}
UNIFORM = {"lr": 5e-4, "encoder_lr": 1.0}
SAME = {"init": "recipe's VideoMAE"}  # of settings that VideoMAE has too, V-JEPA's alone changes
VARIANTS = {
    "random": ("frozen random encoder", "random", {}),
    "videomae": ("VideoMAE alone, positions (t, y, x)", "videomae", {}),
    "videomae-1d": ("VideoMAE alone, published positions 0…N-1", "videomae",
                    {"decoder_positions": "sincos1d", "init": "random"}),
    "shipped-videomae": ("shipped VideoMAE weights, phantom only, not adapted", "initial",
                         {"init": "weights/videomae-phantom.pt"}),
    "shipped-vjepa": ("shipped V-JEPA weights, phantom only, not adapted", "initial",
                      {"init": "weights/vjepa-phantom.pt"}),
    "adapted-videomae": ("VideoMAE from the shipped VideoMAE weights", "videomae", ADAPTED),
    "adapted-vjepa": ("V-JEPA from the shipped V-JEPA weights", "vjepa", {"init": "weights/vjepa-phantom.pt"}),
    "adapted-vjepa-step": ("the same on clips of every 4th frame, the last repeated (the paper's)", "vjepa",
                           {"init": "weights/vjepa-phantom.pt", "clip_rule": "step"}),
    "adapted": ("VideoMAE from the shipped weights, then V-JEPA", "vjepa", ADAPTED),
    "adapted-ll-0.25": ("the same with LL as in the paper, λ 0.25", "vjepa_ll", {**ADAPTED, "lam": 0.25}),
    "supervised": ("end to end from labels, lr 2e-3, 300 steps", "supervised", {}),
    "supervised-5e-4": ("end to end from labels, lr 5e-4", "supervised", {"supervised_lr": 5e-4}),
    "supervised-4e-3": ("end to end from labels, lr 4e-3", "supervised", {"supervised_lr": 4e-3}),
    "finetuned-4e-3": ("fine-tuned from V-JEPA, lr 4e-3", "finetuned", {**ADAPTED, "finetune_lr": 4e-3}),
    "unet-4e-3": ("MONAI's U-Net, lr 4e-3", "unet", {"supervised_lr": 4e-3}),
    "supervised-900": ("end to end from labels, lr 2e-3, 900 steps", "supervised", {"supervised_steps": 900}),
    "finetuned": ("fine-tuned from V-JEPA, lr 1e-3, 300 steps", "finetuned", ADAPTED),
    "finetuned-5e-4": ("fine-tuned from V-JEPA, lr 5e-4", "finetuned", {**ADAPTED, "finetune_lr": 5e-4}),
    "finetuned-2e-3": ("fine-tuned from V-JEPA, lr 2e-3", "finetuned", {**ADAPTED, "finetune_lr": 2e-3}),
    "finetuned-900": ("fine-tuned from V-JEPA, lr 2e-3, 900 steps", "finetuned",
                      {**ADAPTED, "finetune_lr": 2e-3, "supervised_steps": 900}),
    "unet": ("MONAI's U-Net, 300 steps", "unet", {}),
    "unet-900": ("MONAI's U-Net, 900 steps", "unet", {"supervised_steps": 900}),
    "recipe": ("the recipe: VideoMAE, then V-JEPA", "vjepa", {}),
    "last-layer": ("target: last layer, as published", "vjepa", {"target_layers": 1}),
    "not-centred": ("target: not centred", "vjepa", {"centre": 0.0}),
    "published-target": ("target: last layer, not centred, L1", "vjepa",
                         {"target_layers": 1, "centre": 0.0, "beta": 0.0}),
    "l1": ("L1 for smooth L1", "vjepa", {"beta": 0.0}),
    "blocks": ("masks: multi-block, as published", "vjepa", {"mask": "multiblock"}),
    "blocks-first": ("masks: multi-block, cut at their ends as published, so late tubelets are seen less", "vjepa",
                     {"mask": "multiblock", "mask_rule": "first", **SAME}),
    "hidden-50": ("masks: half of the places hidden", "vjepa", {"hidden": 0.5}),
    "hidden-85": ("masks: 85 % hidden", "vjepa", {"hidden": 0.85}),
    "all-tokens": ("tokens outside the sector kept", "vjepa",
                   {"sector_aware": False, **SAME}),
    "ema-998": ("EMA from 0.998, as published", "vjepa", {"ema": 0.998}),
    "frozen-teacher": ("EMA off: the target stays the initial weights; online encoder probed", "vjepa",
                       {"ema": 0.999999, "online": True}),
    "encoder-0.05": ("encoder: a twentieth of the learning rate", "vjepa", {"encoder_lr": 0.05}),
    "encoder-1": ("encoder: the same learning rate as the predictor", "vjepa", {"encoder_lr": 1.0}),
    "uniform-5e-4": ("one learning rate for all, 5e-4", "vjepa", UNIFORM),
    "uniform-1e-4": ("one learning rate for all, 1e-4", "vjepa", UNIFORM | {"lr": 1e-4}),
    "uniform-ema-998": ("one learning rate, 5e-4; EMA from 0.998", "vjepa", UNIFORM | {"ema": 0.998}),
    "uniform-frozen-teacher": ("one learning rate, 5e-4; EMA off, online encoder probed", "vjepa",
                               UNIFORM | {"ema": 0.999999, "online": True}),
    "uniform-ll-0.25": ("one learning rate, 5e-4; LL as in the paper, λ 0.25", "vjepa_ll", UNIFORM | {"lam": 0.25}),
    "lr-half": ("half the learning rate", "vjepa", {"lr": 5e-4}),
    "lr-double": ("twice the learning rate", "vjepa", {"lr": 2e-3}),
    "batch-4": ("batch of 4, four times the steps", "vjepa", {"batch": 4, "steps": 2400, **SAME}),
    "steps-300": ("half the steps", "vjepa", {"steps": 300}),
    "steps-1200": ("twice the steps", "vjepa", {"steps": 1200}),
    "predictor-small": ("predictor 48 wide, 1 deep", "vjepa", {"predictor_width": 48, "predictor_depth": 1}),
    "predictor-large": ("predictor 128 wide, 4 deep", "vjepa", {"predictor_width": 128, "predictor_depth": 4}),
    "mirrored": ("published augmentation, mirrored hearts", "vjepa", {"augmentation": "published", **SAME}),
    "no-augmentation": ("no augmentation", "vjepa", {"augmentation": "none", **SAME}),
    "variance": ("variance–covariance term, weight 0.1", "vjepa", {"variance": 0.1}),
    "scratch": ("from random weights, 1500 steps", "vjepa", SCRATCH),
    "scratch-blocks": ("from random weights, published masks", "vjepa", {**SCRATCH, "mask": "multiblock"}),
    "scratch-published": ("from random weights, published masks and target", "vjepa",
                          {**SCRATCH, "mask": "multiblock", "target_layers": 1, "centre": 0.0, "beta": 0.0}),
    "frozen-2": ("first 2 of 4 blocks frozen", "vjepa", {"freeze": 2}),
    "ll-0.25": ("LL as in the paper, λ 0.25", "vjepa_ll", {"lam": 0.25}),
    "ll-0.9": ("LL as in the paper, λ 0.9", "vjepa_ll", {"lam": 0.9}),
    "ll-context-0.25": ("LL on visible encoder tokens, λ 0.25", "vjepa_ll", {"lam": 0.25, "ll_on": "context"}),
    "ll-context-0.9": ("LL on visible encoder tokens, λ 0.9", "vjepa_ll", {"lam": 0.9, "ll_on": "context"}),
    "ll-unplaced-0.25": ("LL on visible tokens told no position, λ 0.25", "vjepa_ll",
                         {"lam": 0.25, "ll_on": "unplaced"}),
    "ll-unplaced-0.9": ("LL on visible tokens told no position, λ 0.9", "vjepa_ll", {"lam": 0.9, "ll_on": "unplaced"}),
}
# Does LL protect good weights that are adapted to few clips? A tenth of the clips, λ × frozen blocks of 4.
VARIANTS |= {f"few-{lam:g}-{freeze}": (f"adapted to a tenth of the clips, λ {lam:g}, {freeze} of 4 blocks frozen",
                                       "vjepa" if lam == 1 else "vjepa_ll", {"lam": lam, "freeze": freeze, "clips": 10})
             for lam in (1.0, 0.9, 0.25) for freeze in (0, 2, 3)}


def assign(store, split):
    """Give the rows of an open store other parts; the file stays as it is."""
    store._columns["split"] = store.table["split"] = np.asarray(split, str)
    return store


class InnerFold(Lab):
    """A lab whose validation part is a fifth of the training patients; the other parts are not to be seen."""

    @cached_property
    def store(self):
        store = Lab.store.func(self)
        table, split = store.table, store.table["split"].to_numpy().astype(object)
        patients = np.sort(table.loc[split == "train", "patient"].unique())
        held = np.random.default_rng(7).permutation(patients)[:len(patients) // 5]
        split[split != "train"] = "unused"
        split[table["patient"].isin(held).to_numpy()] = "val"
        return assign(store, split)

    def spec(self, *args, **options):
        return super().spec(*args, **options) | {"part": "inner fold"}


class FewClips(InnerFold):
    """An inner fold whose V-JEPA sees the clips of a tenth of the patients alone."""

    def batches(self, rows, device="cpu"):
        return super().batches(self.labelled(10), device)

    def spec(self, method, *args, **options):
        spec = super().spec(method, *args, **options)
        return spec | {"clips": 10} if method in ("vjepa", "vjepa_ll") else spec

    def encoder(self, method, *args, **options):
        if method == "videomae":  # the good weights saw them all
            self.batches = super().batches
        try:
            return super().encoder(method, *args, **options)
        finally:
            self.__dict__.pop("batches", None)


class Judged(Lab):
    """A lab scored on CAMUS's official validation patients (its test part is elsewhere): val and test change places."""

    @cached_property
    def store(self):
        store = Lab.store.func(self)
        if self.data:
            assign(store, store.table["split"].replace({"val": "test", "test": "val"}))
        return store

    def spec(self, *args, **options):
        return super().spec(*args, **options) | {"part": "judged"}


def per_patient(lab, method, fraction, split, **what) -> pd.Series:
    """Mean DSC of each patient of a split, with the last probe: no step is chosen on those who are scored."""
    scores = segmentation(lab, method, fraction, **what).scores
    return scores[(scores.split == split) & (scores.which == "last")].groupby("patient")["dsc"].mean()


def read(out: Path) -> list[dict]:
    return json.loads(out.read_text()) if out.exists() else []


def add(out: Path, row: dict, lab: Lab) -> None:
    """Print a row and put it at the end of a file that other processes write too."""
    print(row, flush=True)
    with FileLock(lab.cache / f"{out.stem}.lock"):
        write_text(out, json.dumps([*read(out), row], indent=1))


def tune(data, seeds, only):
    out = RESULTS / f"recipe_tune_{'real' if data else 'phantom'}.json"
    for seed in seeds:
        for name in only:
            if any(r["name"] == name and r["seed"] == seed for r in read(out)):
                continue
            words, method, changes = VARIANTS[name]
            what = {k: v for k, v in changes.items() if k in ("lam", "freeze", "online")}
            settings = SIZE | {k: v for k, v in changes.items() if k not in (*what, "clips")}
            if changes.get("init") == SAME["init"]:
                good = InnerFold("tiny", data, seed=seed, **SIZE).encoder("videomae")
                settings["init"] = str(good.folder / "checkpoint.pt")
            lab = (FewClips if "clips" in changes else InnerFold)("tiny", data, seed=seed, **settings)
            run = lab.encoder(method, what.get("lam", 1.0), what.get("freeze", 0))
            if "clip_rule" in changes:  # of pre-training alone: what is probed and scored are the same clips for all
                method = "initial"
                lab = InnerFold("tiny", data, seed=seed, **SIZE | {"init": str(run.folder / "checkpoint.pt")})
            dsc, all_labels = (per_patient(lab, method, f, "val", **what) for f in (10, 100))
            end = run.history.dropna().iloc[-1] if len(run.history) else {}
            row = {"name": name, "words": words, "seed": seed, "dsc": float(dsc.mean()),
                   "dsc_100": float(all_labels.mean()), "patients": len(dsc),
                   **{k: float(end[k]) for k in ("jepa", "zero", "ll", "rank", "position_share") if k in end}}
            add(out, row, lab)


# Where adapting does harm: a tenth of the clips, one learning rate for all, from VideoMAE that began with the shipped
# weights (rows with start "random": with random ones). (λ, frozen blocks of 4), and when to look.
FOLLOWED = [(1.0, 0), (0.25, 0), (1.0, 2), (0.25, 2), (1.0, 3), (0.25, 3)]
FOLLOW = SIZE | ADAPTED | UNIFORM | {"steps": 800, "log_every": 100}
LOOKS = (0, 100, 200, 400, 800)


def score_now(lab, encoder) -> float:
    """Mean DSC on the inner fold of a probe that learns from 10 % of the labels, whatever state the encoder is in."""
    p, train, val = lab.profile, lab.labelled(10), lab.store.rows("val", labelled=True)
    grey, masks = lab.clips(np.concatenate([train, val]))
    with tempfile.TemporaryDirectory() as folder:
        cache = probe.Cache.write(Path(folder) / "features.h5", encoder, grey, p.sector_aware, lab.device)
    fitted = probe.fit(cache, torch.from_numpy(masks), np.arange(len(train)), np.arange(len(train), len(grey)),
                       p.grid(lab.frames), p, seed=lab.seed, device=lab.device)
    return fitted["history"][-1]["val_dsc"]


def follow(data, seeds):
    out = RESULTS / f"recipe_follow_{'real' if data else 'phantom'}.json"
    for seed in seeds:
        for lam, freeze in FOLLOWED:
            lab = FewClips("tiny", data, seed=seed, **FOLLOW)
            key = {"start": "shipped", "lam": lam, "freeze": freeze, "seed": seed}
            looked = {row["step"] for row in read(out) if key.items() <= row.items()}
            if LOOKS[-1] in looked:
                continue
            good = lab.encoder("videomae")
            for run in chain([good], lab.training("vjepa" if lam == 1 else "vjepa_ll", lam, freeze)):
                step = 0 if run is good else len(run.history)
                if step not in LOOKS or step in looked:
                    continue
                looked.add(step)
                add(out, key | {"step": step, "dsc": score_now(lab, run.encoder)}, lab)
            if left := sorted(set(LOOKS) - looked):
                print(f"λ {lam:g}, {freeze} frozen, seed {seed}: its weights after {left} steps are gone; delete "
                      f"{lab.folder(lab.spec('vjepa' if lam == 1 else 'vjepa_ll', lam, freeze))} to look again")


# The frozen recipe: VideoMAE from the shipped weights, then V-JEPA, both on the training patients of the data judged.
RECIPE = SIZE | ADAPTED | {"supervised_lr": 2e-3, "finetune_lr": 2e-3}
# The same with a ViT-Tiny, `--size ti`. What learns from labels is not tuned at this size, and not judged.
SIZES = {"": {}, "ti": {"width": 192, "depth": 12, "heads": 3, "predictor_depth": 4, "predictor_heads": 3,
                        "decoder_heads": 3, "videomae_lr": 5e-4, "precision": "bf16-mixed",
                        "init_videomae": "weights/videomae-phantom-ti.pt"}}
# method -> what `segmentation` takes, and the settings that differ
JUDGED = {"prior": ({}, {}), "random": ({}, {}), "videomae": ({}, {}), "vjepa": ({}, {}),
          "vjepa_ll": ({"lam": 0.25}, {}), "vjepa_ll 0.9": ({"lam": 0.9}, {}),
          "initial": ({}, {"init": "weights/vjepa-phantom{}.pt"}),
          "finetuned": ({}, {}), "supervised": ({}, {}), "unet": ({}, {})}
FRACTIONS = (10, 20, 50, 100)


def judge(data, seeds, only, size):
    suffix = f"-{size}" if size else ""
    out = RESULTS / f"recipe_judge_{'real' if data else 'phantom'}{suffix}.csv"
    rows = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=["method", "seed", "fraction", "patient", "dsc"])
    for seed in seeds:
        for name in only:
            what, changes = JUDGED[name]
            changes = {k: v.format(suffix) for k, v in changes.items()}
            lab = Judged("tiny", data, seed=seed, **RECIPE | SIZES[size] | changes)
            for fraction in FRACTIONS:
                if ((rows.method == name) & (rows.seed == seed) & (rows.fraction == fraction)).any():
                    continue
                dsc = per_patient(lab, name.split()[0], fraction, "test", **what)
                print(f"{name} {fraction} % seed {seed}: {dsc.mean():.3f}", flush=True)
                new = pd.DataFrame({"method": name, "seed": seed, "fraction": fraction, "patient": dsc.index,
                                    "dsc": dsc.round(5).to_numpy()})
                with FileLock(lab.cache / f"{out.stem}.lock"):  # others may write too
                    rows = pd.concat([pd.read_csv(out) if out.exists() else rows, new], ignore_index=True)
                    write_text(out, rows.to_csv(index=False))


COMPARED = [(m, "random") for m in ("videomae", "vjepa", "vjepa_ll", "vjepa_ll 0.9", "initial")] + [
    ("vjepa", "videomae"), ("vjepa_ll", "vjepa"), ("vjepa_ll 0.9", "vjepa"), ("vjepa", "supervised"),
    ("finetuned", "supervised"), ("supervised", "unet"), ("finetuned", "unet")]


def comparisons(rows: pd.DataFrame, compared=COMPARED) -> pd.DataFrame:
    """Paired differences per patient, after averaging each patient's scores over the seeds that both methods have."""
    out = []
    for a, b in compared:
        for fraction in FRACTIONS:
            one, two = (rows[(rows.method == m) & (rows.fraction == fraction)].set_index(["patient", "seed"])["dsc"]
                        for m in (a, b))
            both = pd.concat([one, two], axis=1, join="inner", keys=["a", "b"])
            if len(both):
                mean = both.groupby("patient").mean()
                out.append({"a": a, "b": b, "% of labels": fraction, "seeds": both.index.unique("seed").size,
                            **metrics.paired(mean["a"].to_numpy(), mean["b"].to_numpy())})
    table = pd.DataFrame(out)
    return table.assign(holm=metrics.holm(table.wilcoxon_p)) if len(table) else table


def spread(v: pd.Series) -> str:
    return f"{v.mean():.3f} ({v.min():.3f}–{v.max():.3f}, {len(v)})"


def report():
    parts = []
    for data in ("phantom", "real"):
        tuned = RESULTS / f"recipe_tune_{data}.json"
        where = {"phantom": "phantom (video)", "real": "real frames (ED/ES only)"}[data]
        if tuned.exists():
            t = pd.DataFrame(json.loads(tuned.read_text()))
            t = t.reindex(columns=t.columns.union(["jepa", "zero", "rank", "position_share", "dsc_100"]))
            t["at"] = t.name.map(list(VARIANTS).index)
            g = t.sort_values(["at", "seed"]).groupby("name", sort=False)
            shown = pd.DataFrame({"change": g.words.first(), "seeds": g.size(), "DSC, 10 % of labels": g.dsc.mean(),
                                  "DSC, 100 %": g.dsc_100.mean(),
                                  "10 %, each seed": g.dsc.agg(lambda v: " ".join(f"{x:.3f}" for x in v)),
                                  "JEPA loss / zero": g.jepa.mean() / g.zero.mean(), "rank": g["rank"].mean(),
                                  "position share": g.position_share.mean()})
            shown = shown.astype(object).where(shown.notna(), None)
            parts += [f"### Tuning: {where}\n", shown.to_markdown(floatfmt=".3f", missingval="–"), ""]
        if (followed := RESULTS / f"recipe_follow_{data}.json").exists():
            t = pd.DataFrame(json.loads(followed.read_text()))
            cells = t.groupby(["start", "freeze", "lam", "step"]).dsc.agg(spread).unstack()
            cells = cells.sort_index(ascending=[False, True, False])
            parts += [f"### Adapting to a tenth of the clips, followed: {where}\n",
                      "Mean DSC with 10 % of the labels on the inner fold (lowest and highest seed, seeds) after so\n"
                      "many steps; rows: the weights that VideoMAE began with, frozen blocks of 4, λ.\n",
                      cells.reset_index().to_markdown(index=False), ""]
        for judged in [f for f in (RESULTS / f"recipe_judge_{data}{s}.csv" for s in ("", "-ti")) if f.exists()]:
            rows, network = pd.read_csv(judged), ", ViT-Tiny" if judged.stem.endswith("-ti") else ""
            per_seed = rows.groupby(["method", "fraction", "seed"]).dsc.mean()
            cells = per_seed.groupby(["method", "fraction"]).agg(spread).unstack()
            parts += [f"### Judged once: {where}, {rows.patient.nunique()} patients{network}\n",
                      "Mean DSC over patients and seeds (lowest and highest seed, seeds), columns: % of labels.\n",
                      cells.loc[[m for m in JUDGED if m in cells.index]].to_markdown(), ""]
            table = comparisons(rows)
            if network:
                small = pd.read_csv(RESULTS / f"recipe_judge_{data}.csv")
                small["method"] += ", 128 × 4"
                pairs = [(m, f"{m}, 128 × 4") for m in JUDGED]
                table = pd.concat([table, comparisons(pd.concat([rows, small]), pairs)])
                table["holm"] = metrics.holm(table.wilcoxon_p)
            table["95 % interval"] = [f"[{lo:+.3f}, {hi:+.3f}]" for lo, hi in zip(table.low, table.high, strict=True)]
            parts += ["Paired over patients, seeds averaged first; Wilcoxon, Holm-corrected over this table.\n",
                      table[["a", "b", "% of labels", "seeds", "difference", "95 % interval", "wilcoxon_p", "holm"]]
                      .to_markdown(index=False, floatfmt=("", "", "", "", "+.3f", "", ".2g", ".2g")), ""]
    path = RESULTS / "recipe.md"
    before, _, rest = path.read_text().partition("<!-- tables -->")
    after = rest.partition("<!-- /tables -->")[2]
    write_text(path, f"{before}<!-- tables -->\n\n" + "\n".join(parts) + f"\n<!-- /tables -->{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "follow", "judge", "report"))
    parser.add_argument("--data", default="", help="a CAMUS folder or its converted file; without it the phantom")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", help="names of variants or methods")
    parser.add_argument("--size", choices=[*SIZES], default="", help="of the network that is judged (tiny's)")
    a = parser.parse_args()
    known = {"tune": [*VARIANTS], "judge": [m for m in JUDGED if not (a.size and m in END_TO_END)]}.get(a.what, [])
    if strange := [name for name in a.only or () if name not in known]:
        parser.error(f"--only: {a.what} has no row {strange[0]!r}; it has {', '.join(known) or 'none to choose from'}")
    if a.size and a.what != "judge":
        parser.error("--size is for judge")
    if a.what == "report":
        report()
    elif a.what == "follow":
        follow(a.data, a.seeds)
    elif a.what == "tune":
        tune(a.data, a.seeds, a.only or known)
    else:
        judge(a.data, a.seeds, a.only or known, a.size)


if __name__ == "__main__":
    main()
