"""The same again: in another place, another order, side by side, and from nothing but what a summary says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from smoke_lab import beside, smoke_lab

from usjepa_nb import grid, manifest, pretrain, tables, verify
from usjepa_nb.profile import load
from usjepa_nb.runs import Lab

GRID = {"seeds": 1, "fractions": [100, 20], "table1": {"lams": [1, 0.25], "frozen": ["1/2"]},
        "table2": {"controls": ["prior", "random"], "methods": ["supervised", "videomae", "vjepa"], "lam": 0.25,
                   "frozen": [0]}}

MAKE = """
import sys
from usjepa_nb import tables
from usjepa_nb.runs import Lab
profile, cache, grid, turn, part = sys.argv[1:]
lab = Lab(profile, cache=cache)
g = lab.grid(grid)
cells = g.cells[::-1] if turn == "back" else g.cells
fractions = g.fractions[::-1] if turn == "back" else g.fractions
parts = {"all": cells, "even": cells[::2], "odd": cells[1::2]}
tables.collect(lab, parts[part], fractions, g.seeds)
"""


def make(cache, profile, grid_file, turn="on", part="all", **environment):
    """Start a process that makes cells of the grid; one thread, as the workflow does it."""
    return subprocess.Popen([sys.executable, "-c", MAKE, str(profile), str(cache), str(grid_file), turn, part],
                            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A profile and a grid of one's own, which lie nowhere near the repository's."""
    folder = tmp_path_factory.mktemp("own")
    settings = yaml.safe_load((ROOT / "profiles" / "smoke.yaml").read_text())
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings | {"patients": 5, "phantom_seed": 5, "steps": 5}))
    (folder / "cells.yaml").write_text(yaml.safe_dump(GRID))
    return folder / "mine.yaml", folder / "cells.yaml"


@pytest.fixture(scope="module")
def first(files, tmp_path_factory):
    """(cache, summary.json) of a table that one process made in the grid's order, data and all."""
    profile, cells = files
    cache = tmp_path_factory.mktemp("first") / "data_cache"
    finish(make(cache, profile, cells))
    lab = Lab(str(profile), cache=cache)
    tables.write(lab, str(cells))
    return cache, lab.results(str(cells)) / "summary.json"


def same_but(one, two, *may_differ):
    """See that two summaries are equal, bit for bit, but for these keys; seconds apart."""
    one, two = (json.loads(json.dumps(s)) for s in (one, two))
    for content in (one, two):
        for row in content["rows"] + content["table1"]:
            row.pop("seconds")
        for key in ("seconds", *may_differ):
            content.pop(key)
    assert one == two


def test_backwards_and_side_by_side_the_table_is_the_same_bit_for_bit(files, first, tmp_path):
    """A fresh cache, the same data made anew; two processes at once, cells and shares in the other order."""
    profile, cells = files
    finish(*(make(tmp_path / "cache", profile, cells, "back", part, PYTHONHASHSEED=str(k))
             for k, part in enumerate(("even", "odd"))))
    content = tables.summary(Lab(str(profile), cache=tmp_path / "cache"), str(cells))
    assert content["missing"] == [] and len(content["rows"]) == 2 * len(Lab(str(profile)).grid(str(cells)).table2)
    same_but(content, json.loads(first[1].read_text()), "code", "commit")  # somebody may be writing meanwhile


def test_a_table_is_made_again_from_its_summary_alone(first, tmp_path, capsys):
    """Profile and grid are gone, the cache is another, and what comes out is the same, bit for bit."""
    _, summary = first
    alone = tmp_path / "summary.json"
    shutil.copy(summary, alone)
    process = subprocess.run([sys.executable, "-m", "usjepa_nb.verify", str(alone), "--redo", "--cache",
                              str(tmp_path / "empty")], cwd=ROOT, capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    assert f"{alone}: every number is what data, runs and code give" in process.stdout
    assert "not on disk, training now" in process.stdout  # it was not just looked up
    content = json.loads(alone.read_text())
    content["rows"][3]["dsc"] += 1e-9
    alone.write_text(json.dumps(content))
    (complaint,) = verify.check(alone, cache=tmp_path / "empty")
    assert "dsc is" in complaint


def test_other_settings_give_another_table(first, tmp_path):
    """What the summary says is what is done: with one setting changed by hand nothing on disk fits."""
    cache, summary = first
    content = json.loads(summary.read_text())
    content["settings"]["lr"] *= 2
    (tmp_path / "summary.json").write_text(json.dumps(content))
    complaints = verify.check(tmp_path / "summary.json", cache=cache)
    assert any("vjepa" in line and "is not on disk" in line for line in complaints)


def test_the_manifest_says_what_is_needed(files, first):
    profile, _ = files
    said = json.loads(first[1].read_text())
    assert said["command"] == "make table1 table2 GRID=cells.yaml PROFILE=mine" and said["grid_settings"] == GRID
    assert said["settings"] | {"name": "mine"} == {k: list(v) if isinstance(v, tuple) else v
                                                   for k, v in vars(load(str(profile))).items()}
    assert said["seeds"] == [0] and said["packages"].get("torch", "2.13.0") == torch.__version__
    assert len(said["code"]) == len(said["lock"]) == 64 and said["data_hash"] and said["commit"] is not None


def test_the_command_names_a_folder_and_not_its_place(tmp_path):
    lab = Lab("smoke", tmp_path / "my CAMUS", tmp_path / "cache")
    assert manifest.command(lab, "walk") == "make run PROFILE=smoke 'DATA=my CAMUS'"
    assert str(tmp_path) not in json.dumps(manifest.command(lab, str(tmp_path / "own.yaml")))


def test_the_code_hash_knows_of_every_change(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "usjepa_nb", tmp_path / "usjepa_nb", ignore=shutil.ignore_patterns("__pycache__"))
    before = manifest.code()
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    assert manifest.code() == before  # wherever it lies
    module = tmp_path / "usjepa_nb" / "widgets" / "__init__.py"
    module.write_text(module.read_text() + "\n")
    assert manifest.code() != before


def test_another_version_of_a_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    (tmp_path / "constraints.txt").write_text("numpy==1.0\nno-such-package==1\nyaml-of-nobody==2\n")
    assert list(manifest.packages()) == ["numpy"]


def test_an_older_summary_goes_by_the_names_of_profile_and_grid(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(pretrain, "train", lambda *a, **k: pytest.fail("nothing is trained here"))
    lab = beside(smoke_lab(tmp_path_factory), tmp_path / "cache")
    content = json.loads(json.dumps(tables.summary(lab)))
    for key in ("settings", "grid_settings", "code", "lock", "packages", "command"):
        content.pop(key)
    (tmp_path / "summary.json").write_text(json.dumps(content))
    assert verify.check(tmp_path / "summary.json", cache=tmp_path / "cache") == []


def test_a_grid_is_read_from_where_it_lies(tmp_path):
    assert grid.read("walk") == yaml.safe_load((ROOT / "grids" / "walk.yaml").read_text())
    with pytest.raises(grid.GridError, match="no such grid"):
        grid.read(str(Path(tmp_path, "none.yaml")))
