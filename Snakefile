# One rule: a notebook, executed by papermill with parameters. Notebooks keep their results in data_cache/runs under a
# hash of what made them, so the same result is never made twice, and jobs may run side by side, on one machine or many.
#
#   all              the walk, in order, with the cells that it compares (grids/walk.yaml)
#   cells, table1_cells, table2_cells   cells of a grid: one encoder, and its probes at every share of labels
#   table1, table2   the reports: notebooks 04 and 05 on what the cells left; what is missing is shown as missing

import shlex

from usjepa_nb.dataset import Dataset
from usjepa_nb.profile import END_TO_END

PROFILE = config.get("profile", "tiny")
DATA = str(config.get("data", ""))
SEED = int(config.get("seed", 0))
GRID = str(config.get("grid", "walk"))
THREADS = int(config.get("threads", 1))  # of each job; with another number sums round differently

lab = Dataset(PROFILE, DATA, seed=SEED)
grid = lab.grid(GRID)
OUT = str(lab.results(GRID).relative_to(workflow.basedir))
SEEDS = range(SEED, SEED + grid.seeds)

# The walk, in order.
WALK = ["00_start_here", "01_camus_to_hdf5", "02_tubelet_masking", "03_vjepa_localisation", "04_lambda_ablation",
        "05_probe_segmentation", "06_qualitative_overlays", "07_static_teacher", "08_your_own_ultrasound",
        "90_solutions"]
TRAIN, PROBE = "03_vjepa_localisation", "05_probe_segmentation"
DATASET = [] if lab.converted else OUT + "/00_start_here.ipynb"  # the phantom and the HDF5 file are made there

# Jobs of the grid: a notebook of the walk with other parameters. V-JEPA is trained in 03, everything is probed in 05.
trains = {f"{TRAIN}--{c.id}-s{s}": f"-p lam {c.lam} -p freeze {c.freeze} -p deep False -p seed {s}"
          for c in grid.cells if c.method in ("vjepa", "vjepa_ll") for s in SEEDS}
base = ["random"] if any(c.method == "random" for c in grid.table2) else []  # every cell is shown beside it
probes = {f"{PROBE}--{c.id}-s{s}": f"-p cells {','.join(dict.fromkeys([*base, c.id]))} -p grid {shlex.quote(GRID)} -p seed {s}"
          for c in grid.cells if c.method != "prior" for s in SEEDS}
# What the walk's own 03, 04 and 05 make on their way. Long trainings get jobs of their own there too, side by side.
SHORT = lab.profile.steps <= 1000
OWN = {"vjepa_ll-lam0.25-f0", *(["vjepa-lam1-f0", "videomae"] if SHORT else [])}
OWN_PROBES = {c.id for c in grid.cells if c.method not in (*END_TO_END, "videomae")} | OWN
YARDSTICKS = [c for c in grid.table2 if c.method in ("random", "initial")]
cell_of = lambda job: job.partition("--")[2].rpartition("-s")[0]


def jobs(cells):
    """Notebooks that make these cells."""
    return expand(OUT + "/{n}.ipynb", n=[n for n in (*trains, *probes) if cell_of(n) in {c.id for c in cells}])


def beside(names):
    """Those of the jobs that run beside the walk's own notebooks; of another grid all."""
    return [n for n in names if GRID != "walk" or cell_of(n) not in (OWN if n.startswith(TRAIN) else OWN_PROBES)]


def needs(wildcards):
    """What must have run before a notebook, so that it finds its results ready."""
    name, _, cell = wildcards.name.partition("--")
    made = lambda names: expand(OUT + "/{n}.ipynb", n=names)
    if name.startswith(("00_", "90_")):  # 90 checks the exercises and needs no data
        return []
    if name == PROBE and cell:
        before = [f"{TRAIN}--{cell.replace('finetuned', 'vjepa-lam1-f0')}",  # fine-tuning starts from V-JEPA
                  f"{PROBE}--random-s{cell.rpartition('-s')[2]}" if not cell.startswith("random-s") else ""]
        return made([n for n in beside(before) if n in trains | probes]) or DATASET
    if name == TRAIN and lab.profile.init == "videomae":  # V-JEPA goes on from there
        videomae = f"{PROBE}--videomae-s{cell.rpartition('-s')[2] or SEED}"
        return made([n for n in beside(probes) if n == videomae]) or DATASET
    if name.startswith("04_"):
        return made([TRAIN, *beside(trains)])
    if name.startswith(("07_", "08_")):  # compares with V-JEPA, takes its features
        return made([n for n in beside(trains) if "--vjepa-lam1-f0-" in n] or [TRAIN])
    if name == PROBE:
        return made(["04_lambda_ablation", *beside(probes)])
    if name.startswith("06_"):
        return made([PROBE])
    return DATASET


rule all:
    input: expand(OUT + "/{n}.ipynb", n=WALK)  # no output: the table is printed every time
    shell: "python -m usjepa_nb.tables {PROFILE:q} {SEED} {GRID:q} {DATA:q}"


rule cells:
    input: jobs(grid.cells)


rule table1_cells:
    input: jobs([*grid.table1, *YARDSTICKS])


rule table2_cells:
    input: jobs(grid.table2)


# The reports name no output: they are made every time, of whatever is there.
REPORT = ("OMP_NUM_THREADS=1 python -m usjepa_nb.execute notebooks/{params.source}.ipynb {OUT:q}/{rule}.ipynb --html "
          "-p profile {PROFILE:q} -p grid {GRID:q} -p missing show -p seed {SEED} {params.data} && "
          "python -m usjepa_nb.tables {PROFILE:q} {SEED} {GRID:q} {DATA:q}")
GIVEN = f"-p data {shlex.quote(DATA)}" if DATA else ""  # from a function: in a string braces would be filled in


rule table1:
    params: source="04_lambda_ablation", data=lambda w: GIVEN
    shell: REPORT


rule table2:
    params: source=PROBE, data=lambda w: GIVEN
    shell: REPORT


rule notebook:
    input:
        needs,
        settings=PROFILE if PROFILE.endswith((".yaml", ".yml")) else f"profiles/{PROFILE}.yaml",
        source=lambda w: f"notebooks/{w.name.split('--')[0]}.ipynb",
    output: OUT + "/{name}.ipynb"
    priority: lambda w: 4 if w.name.startswith("00_") else 3 if "--supervised" in w.name else \
        2 if w.name.startswith(("03_", "04_")) else 1 if w.name.startswith(("05_", "07_")) else 0
        # what others wait for first, and the longest
    params:
        extra=lambda w: (trains | probes).get(w.name, f"--html -p seed {SEED}"), data=lambda w: GIVEN,
        converted=lab.converted and lab.hdf5.stat().st_mtime_ns,  # another file of that name: its jobs run again
    threads: THREADS
    shell:
        "USJEPA_EXERCISE=0 OMP_NUM_THREADS={THREADS} python -m usjepa_nb.execute {input.source} {output:q} -p profile {PROFILE:q} "
        "{params.extra} {params.data}"
