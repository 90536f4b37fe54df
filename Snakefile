# One rule: a notebook, executed by papermill with parameters. Notebooks keep their results in data_cache/runs under a
# hash of what made them, so the same result is never made twice, and jobs may run side by side.

import shlex

from usjepa_nb.dataset import Dataset

PROFILE = config.get("profile", "tiny")
DATA = str(config.get("data", ""))
SEED = config.get("seed", 0)

lab = Dataset(PROFILE, DATA, seed=SEED)
OUT = str(lab.results.relative_to(workflow.basedir))

# The walk, in order.
WALK = ["00_start_here", "01_camus_to_hdf5", "02_tubelet_masking", "03_vjepa_localisation", "04_lambda_ablation",
        "05_probe_segmentation", "06_qualitative_overlays", "90_solutions"]

# Cells of the grid: notebooks of the walk with other parameters, side by side. 04 and 05 then find their runs ready.
ABLATION = {f"03_vjepa_localisation--lam{lam:g}-f{freeze}": f"-p lam {lam} -p freeze {freeze} -p deep False"
            for freeze in lab.profile.freezes for lam in lab.profile.lams if (lam, freeze) != (0.25, 0)}
GRID = ABLATION | {f"05_probe_segmentation--{m}": f"-p methods {m}"
                   for m in ("videomae", *lab.profile.end_to_end)}
END_TO_END = [f"05_probe_segmentation--{m}" for m in lab.profile.end_to_end if m != "finetuned"]


def needs(wildcards):
    """What must have run before a notebook, so that it finds its results ready."""
    name = wildcards.name
    if name.startswith("00_"):
        return []
    if name == "01_camus_to_hdf5":  # 00 makes the data
        return OUT + "/00_start_here.ipynb"
    if name.endswith("--finetuned"):  # starts from V-JEPA
        return expand(OUT + "/{n}.ipynb", n=[n for n in ABLATION if n.endswith("--lam1-f0")] or "01_camus_to_hdf5")
    if name.startswith("04_"):
        return expand(OUT + "/{n}.ipynb", n=["03_vjepa_localisation", *ABLATION])
    if name in ("05_probe_segmentation", "06_qualitative_overlays"):
        return expand(OUT + "/{n}.ipynb", n=["04_lambda_ablation", *GRID])
    return OUT + "/01_camus_to_hdf5.ipynb"


rule all:
    input: expand(OUT + "/{n}.ipynb", n=WALK)  # no output: the table is printed every time
    shell: "python -m usjepa_nb.summary {PROFILE:q} {SEED} {DATA:q}"


rule notebook:
    input:
        needs,
        settings=PROFILE if PROFILE.endswith((".yaml", ".yml")) else f"profiles/{PROFILE}.yaml",
        source=lambda w: f"notebooks/{w.name.split('--')[0]}.ipynb",
    output: OUT + "/{name}.ipynb"
    priority: lambda w: 2 if w.name in END_TO_END else 1 if w.name.startswith("03_") else 0  # the longest first
    params:
        extra=lambda w: GRID.get(w.name, "") + (f" -p data {shlex.quote(DATA)}" if DATA else ""),
    shell:
        "OMP_NUM_THREADS=1 python -m usjepa_nb.execute {input.source} {output:q} --html "
        "-p profile {PROFILE:q} -p seed {SEED} {params.extra}"
