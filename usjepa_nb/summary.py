"""The result table of a walk: `python -m usjepa_nb.summary PROFILE [SEED] [DATA]` prints it and writes summary.json."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd

from usjepa_nb.methods import END_TO_END
from usjepa_nb.metrics import SCORES
from usjepa_nb.runs import Lab, write_text
from usjepa_nb.segment import segmentation

PACKAGES = ("usjepa-nb", "torch", "timm", "lightning-fabric", "numpy", "scipy", "h5py", "nibabel")


def methods(lab: Lab) -> list[dict]:
    """The rows of the table: controls first, then what is pre-trained. λ is the profile's best in the paper, 0.25."""
    lam = min(lab.profile.lams, key=lambda v: abs(v - 0.25))
    first = [] if lab.profile.init == "random" else [{"method": "initial"}]
    labels = [{"method": m} for m in lab.profile.end_to_end]
    return [{"method": "prior"}, {"method": "random"}, *first, *labels,
            {"method": "videomae"}, {"method": "vjepa"}, {"method": "vjepa_ll", "lam": lam}]


def row(lab: Lab, what: dict, fraction: int, split: str = "test", which: str = "best") -> dict:
    """Mean ± SD over the videos of a split, for one method and one share of the labels."""
    s = segmentation(lab, fraction=fraction, **what)
    chosen = s.scores[(s.scores.split == split) & (s.scores.which == which)]
    numbers = {f"{name}{suffix}": float(value) for name in SCORES for suffix, value in
               (("", chosen[name].mean()), ("_sd", chosen[name].std()))}
    classes = {c: float(chosen[c].mean()) for c in ("dsc_1", "dsc_2", "dsc_3")}
    return {"method": s.scores.method.iloc[0], "key": what["method"], "lam": what.get("lam", 1.0), "fraction": fraction,
            "seed": lab.seed, "split": split, "probe": which, "videos": len(chosen), **numbers, **classes,
            "seconds": s.seconds}


def table(lab: Lab, split: str = "test", which: str = "best") -> pd.DataFrame:
    """The table of the README: every method at the largest and the smallest share of labels."""
    fractions = sorted({max(lab.profile.fractions), min(lab.profile.fractions)}, reverse=True)
    return pd.DataFrame([row(lab, what, f, split, which) for f in fractions for what in methods(lab)])


def write(lab: Lab) -> pd.DataFrame:
    """Write `data_cache/runs/<profile>/summary.json` with rows, provenance and seconds per stage."""
    rows = table(lab)
    runs = lab.cache / "runs" / lab.profile.name
    trained = {f.parent: json.loads(f.read_text()) for f in sorted(runs.glob("*/run.json"))}
    stages = {f"train {r['method']} lam{r['lam']:g} f{r['freeze']}" + (f" {r['fraction']}%" if r["fraction"] else ""):
              r["seconds"] for folder, r in trained.items()  # not those of other data, seeds or settings
              if folder == lab.folder(lab.spec(r["method"], r["lam"], r["freeze"], r["fraction"] or 100))}
    stages |= {f"probe {r.key} {r.fraction}%": r.seconds for r in rows.itertuples() if r.key not in END_TO_END}
    content = {"profile": lab.profile.name, "data": lab.data_name, "data_hash": lab.store.data_hash,
               "ed_es_only": bool(lab.store.ed_es_only), "split": lab.store.split_note, "seed": lab.seed,
               "machine": f"{platform.machine()}, Python {platform.python_version()}",
               "versions": {p: version(p) for p in PACKAGES}, "seconds": stages,
               "rows": json.loads(rows.to_json(orient="records"))}
    lab.results.mkdir(parents=True, exist_ok=True)
    for folder in (runs, lab.results):  # the latest of this profile, and the one of this data set
        write_text(folder / "summary.json", json.dumps(content, indent=1))
    return rows


def main(profile: str = "tiny", seed: str = "0", data: str = "") -> None:
    lab = Lab(profile, data, seed=int(seed))
    rows = write(lab)
    shown = rows.pivot(index="method", columns="fraction", values="dsc").loc[rows.method.unique()]
    shown = shown[sorted(shown.columns, reverse=True)].rename(columns=lambda f: f"DSC, {f} % of labels")
    kind = "ED/ES only" if lab.store.ed_es_only else "video"
    print(f"\nMean DSC over {rows.videos.iloc[0]} test videos ({lab.data_name}, {kind}, one seed):\n")
    print(shown.to_string(float_format=lambda v: f"{v:.3f}" if np.isfinite(v) else "–"))
    where = lab.results.relative_to(lab.cache.parent) if lab.results.is_relative_to(lab.cache.parent) else lab.results
    print(f"\nExecuted notebooks and their HTML: {where}\nThe same table: "
          f"{where.parents[1] / 'runs' / lab.profile.name / 'summary.json'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
