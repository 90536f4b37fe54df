# Two commands: `make run` and `make test`. The first call of either sets up .venv (once, about 5 minutes).
#
#   make run                 every notebook in order, at profile tiny, on the synthetic data set
#   make run DATA=<folder>   the same on a copy of CAMUS        PROFILE=small   JOBS=4 (notebooks side by side)
#                            THREADS=4 (of each; the numbers in results/ are those of one)
#   make table1, make table2 the paper's tables, whole (grids/paper.yaml; another: GRID=...), in the same way; here
#                            DATA= may also be the one HDF5 file that was made of such a folder
#   make plan PROFILE=paper  what such tables would cost: FLOPs, memory, hours
#   make lab                 JupyterLab on notebook 00
#   make test                all tests (test-unit, then test-notebooks)
#   make test-browser        every notebook in JupyterLab in a headless Chromium, every widget moved (NOTEBOOK=03: one)
#   make book                the notebooks as a static site in data_cache/book (LINKS=1 follows links to other sites)
#   make test-system         full and read-only disks: a small one is mounted for each test (root, or user namespaces)
#   make test-slurm          the grid on a SLURM of one node that is started for it (Debian; about 12 minutes)
#   make verify              is the result table what data, runs and code give? (another file: SUMMARY=...)
#   make weights             pre-train the weights that weights/ ships again (about half an hour, and the data)
#   make bench               ratios of speed, also as data_cache/bench.json (about 7 minutes)
#   make fuzz                the readers on damaged files, SECONDS=30 for each
#   make load                30 readers of one file while it is converted, and the memory that 10,000 sequences take
#   make lock, make licences the versions of all packages with their hashes; their licences
#   make lint                ruff
#   make clean               caches of tools; `make clean-all` also .venv and everything in data_cache

PROFILE ?= tiny
DATA ?=
GRID ?= paper
JOBS ?= 2
THREADS ?= 1
TORCH ?= cpu
# The first of the two that is new enough.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# What users give is text to make and to the shell: it goes to the recipes in the environment and is never a command.
override DATA := $(value DATA)
override PROFILE := $(value PROFILE)
override GRID := $(value GRID)
override SUMMARY := $(value SUMMARY)
override TFLOPS := $(value TFLOPS)
override NOTEBOOK := $(value NOTEBOOK)
override LINKS := $(value LINKS)
export DATA PROFILE GRID SUMMARY TFLOPS NOTEBOOK LINKS

# A misspelt variable is refused: make itself would take the default in silence.
KNOWN := PROFILE DATA GRID JOBS THREADS TORCH PYTHON WHERE SUMMARY TFLOPS NOTEBOOK LINKS SECONDS UPGRADE
STRANGE := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$(filter-out $(KNOWN),$v)))
$(if $(strip $(STRANGE)),$(error there is no variable $(strip $(STRANGE)); make knows $(KNOWN)))
NUMBERS := $(shell seq 999)
number = $(if $(filter 1-,$(words $($1))-$(filter-out $(NUMBERS),$($1))),$($1),$(error $1 is a number from 1 to 999: how \
many $(if $(filter JOBS,$1),notebooks run side by side,threads each of them has)))
# Texts are UTF-8, whatever the locale.
export PYTHONUTF8 := 1

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SMOKE := data_cache/smoke
# Kernels and workers share the cores; one thread each.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: run table1 table2 plan results weights lab test test-unit test-notebooks test-browser book test-slurm test-system verify bench fuzz load lock licences lint \
	clean clean-all setup
.DEFAULT_GOAL := run

setup: $(READY)

# Everything by its hash and nothing beside the list (requirements.lock), then torch, then this package. The stamp is
# touched when everything is in; an interrupted set-up goes on where it stopped.
$(READY): pyproject.toml requirements.lock constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "Python 3.11 or newer is needed; install it, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up .venv (2.7 GB, about 5 minutes, once) ..."
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear .venv
	@$(PIP) install --require-hashes --no-deps -r requirements.lock
	@case "$(TORCH)-$$(uname)" in gpu-*) ;; \
	cpu-Linux) ! $(PIP) install --dry-run --no-deps --report - -c constraints.txt torch | grep '"nvidia-' >/dev/null || \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu --no-deps -c constraints.txt torch torchvision || \
	{ echo "No CPU build of torch could be had (CONTRIBUTING.md, Set-up); with the GPU build: make TORCH=gpu"; exit 1; } ;; \
	cpu-*) ;; \
	*) echo "TORCH is cpu or gpu, not $(TORCH)"; exit 1 ;; esac
	@$(PIP) install $(if $(filter gpu,$(TORCH)),,--no-deps) -c constraints.txt torch torchvision
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $(READY)

# The versions of everything: requirements.lock, constraints.txt, environment.yml. UPGRADE=1 takes newer ones.
lock:
	@test -x $(BIN)/uv || { test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear .venv; $(PIP) install -c constraints.txt uv; }
	@UPGRADE=$(UPGRADE) $(BIN)/python dependencies/lock.py

licences: $(READY)
	@$(BIN)/python dependencies/licences.py

# --nolock: a killed run leaves no lock that the next one stumbles over; the runs have locks of their own.
WHERE = --cores $$(($(call number,JOBS) * $(call number,THREADS)))
SNAKEMAKE = PATH="$(CURDIR)/$(BIN):$$PATH" snakemake
HOW = $(WHERE) --rerun-incomplete --nolock --quiet all --config "profile=$$PROFILE" threads=$(call number,THREADS) $${data:+"data=$$data"}
# Snakemake reads values as YAML, where a '#' would begin a comment: the folder goes in YAML's quotes (and in
# blanks, without which it would take off the quotes first).
THERE = test -z "$$DATA" || test -e "$$DATA" || { echo "DATA: there is no folder or file $$DATA"; exit 1; }; \
	data="$$DATA"; test -z "$$data" || data=" '$$(printf %s "$$(CDPATH= cd -- "$$(dirname "$$data")" && pwd)/$$(basename "$$data")" | \
	sed "s/'/''/g")' "

run: $(READY)
	@test ! -f "$$DATA" || { echo "DATA: $$DATA is one file, and make run shows what it was made of; give the" \
	"CAMUS folder, or make the tables"; exit 1; }; $(THERE); $(SNAKEMAKE) $(HOW)

# A cell that fails is reported, and the rest goes on; the table then says what is missing. On a cluster:
# make table1 WHERE="--profile profiles/slurm"
table1 table2: $(READY)
	@$(THERE); $(SNAKEMAKE) $@_cells --keep-going $(HOW) "grid=$$GRID" || failed=1; \
	$(SNAKEMAKE) $@ $(HOW) "grid=$$GRID" && exit $${failed:-0}

plan: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m usjepa_nb.plan "$$PROFILE" --grid "$$GRID" $${DATA:+--data "$$DATA"} \
	$${TFLOPS:+--tflops "$$TFLOPS"}

# What the repository shows of a finished `make run`: results/tiny and the outputs of the committed notebooks.
results: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python results/publish.py "$$PROFILE"

weights: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python weights/publish.py "$$PROFILE"

lab: $(READY)
	@$(BIN)/jupyter-lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

test: test-unit test-notebooks

test-unit: $(READY)
	@$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile tests

# Parameters in, then each notebook once: nbval runs every cell and compares those marked NBVAL_CHECK_OUTPUT.
test-notebooks: $(READY)
	@rm -rf $(SMOKE) && mkdir -p $(SMOKE)
	@set -e; for notebook in notebooks/*.ipynb; do test -e "$$notebook" || { echo "no notebooks yet"; exit 0; }; \
	$(BIN)/python -m usjepa_nb.execute "$$notebook" "$(SMOKE)/$${notebook##*/}" --prepare-only \
	-p profile smoke -p cache "$(CURDIR)/$(SMOKE)/cache" -p seed 0; done; \
	USJEPA_EXERCISE=1 PYTHONHASHSEED=0 PLOTLY_RENDERER=plotly_mimetype $(ONE_THREAD) \
	PYTHONPATH=tests $(BIN)/python -m pytest -p nbval_again --nbval-lax --nbval-current-env --nbval-cell-timeout 600 -n 2 --dist loadscope $(SMOKE)

# As a learner has it: JupyterLab behind its token, a Chromium (installed where there is none), keys and clicks.
test-browser: $(READY)
	@$(ONE_THREAD) $(BIN)/python -m pytest -n 0 -v -s tests/browser/check_notebooks.py -k "$$NOTEBOOK"

book: $(READY)
	@$(BIN)/python book/build.py

# Mounts are made in a namespace of the test's own and end with it.
test-system: $(READY)
	@$(ONE_THREAD) $(BIN)/python -m pytest -n 0 tests/system

# A real SLURM of one node on loopback (Debian; root only to install it), with a job that is killed half-way.
test-slurm: $(READY)
	@$(BIN)/python tests/slurm/one_node.py

verify: $(READY)
	@$(BIN)/python -m usjepa_nb.verify "$${SUMMARY:-data_cache/runs/$$PROFILE/summary.json}" $${DATA:+--data "$$DATA"}

# Each target for SECONDS=30; atheris is for Linux.
fuzz: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py $(or $(SECONDS),30)

bench: $(READY)
	@$(ONE_THREAD) $(BIN)/python benchmarks/bench.py

load: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/load.py

lint: $(READY)
	@$(BIN)/ruff check .

clean:
	@echo "removing .snakemake, $(SMOKE), .pytest_cache, .ruff_cache, .hypothesis, __pycache__ (data_cache and .venv stay)"
	@rm -rf .snakemake $(SMOKE) .pytest_cache .ruff_cache .hypothesis
	@find usjepa_nb tests -name __pycache__ -type d -exec rm -rf {} +

clean-all: clean
	@echo "removing .venv and everything in data_cache"
	@find data_cache -mindepth 1 ! -name .gitkeep -delete
	@rm -rf .venv *.egg-info
