# One rule: a notebook, executed by papermill with parameters. Notebooks keep their results in data_cache/runs under a
# hash of what made them, so the same result is never made twice, and jobs may run side by side.

PROFILE = config.get("profile", "tiny")
DATA = str(config.get("data", ""))
SEED = config.get("seed", 0)
from usjepa_nb.profile import load
from usjepa_nb.runs import Lab

lab = Lab(PROFILE, DATA, seed=SEED)
OUT = str(lab.results.relative_to(workflow.basedir))
HALF = lab.profile.freezes[-1]

# The walk, in order. Notebooks 04 and 05 only read what the encoders below trained.
WALK = ["00_start_here", "01_camus_to_hdf5", "02_tubelet_masking", "03_vjepa_localisation", "04_lambda_ablation",
        "05_probe_segmentation", "06_qualitative_overlays", "90_solutions"]

# Cells of the grid: the notebooks a learner opens, with other parameters.
GRID = {f"03_vjepa_localisation--lam{lam:g}-f{freeze}": f"-p lam {lam} -p freeze {freeze}"
        for freeze in lab.profile.freezes for lam in lab.profile.lams}
GRID |= {f"05_probe_segmentation--{m}": f"-p methods {m}" for m in ("videomae", "supervised")}


def needs(wildcards):
    """What must have run before a notebook, so that it finds its results ready."""
    name = wildcards.name
    if name.startswith("00_"):
        return []
    if name == "01_camus_to_hdf5":  # 00 makes the data
        return OUT + "/00_start_here.ipynb"
    if name.startswith("04_"):
        return expand(OUT + "/{n}.ipynb", n=[n for n in GRID if n.startswith("03_")])
    if name == "05_probe_segmentation":
        return expand(OUT + "/{n}.ipynb", n=GRID)
    if name == "06_qualitative_overlays":
        return OUT + "/05_probe_segmentation.ipynb"
    return OUT + "/01_camus_to_hdf5.ipynb"


rule all:
    input: expand(OUT + "/{n}.ipynb", n=WALK)  # no output: the table is printed every time
    shell: "python -m usjepa_nb.summary {PROFILE:q} {DATA:q} {SEED}"


rule notebook:
    input: needs
    output: OUT + "/{name}.ipynb"
    params:
        source=lambda w: w.name.split("--")[0],
        extra=lambda w: GRID.get(w.name, ""),
    shell:
        "OMP_NUM_THREADS=1 python -m usjepa_nb.execute notebooks/{params.source}.ipynb {output:q} --html "
        "-p profile {PROFILE:q} -p data {DATA:q} -p seed {SEED} {params.extra}"
