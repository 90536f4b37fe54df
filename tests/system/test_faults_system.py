"""Disks that are full or read-only: `make test-system`.

Each test runs a script in a mount namespace of its own, with a small tmpfs at `disk`; both end with the script. That
takes root, or user namespaces; where neither is to be had the tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the helpers of the other tests

from faults import sentence, tree_of  # noqa: E402
from test_camus import write_patient  # noqa: E402

from usjepa_nb.store import Store, convert  # noqa: E402

SPACE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
MOUNT = 'mkdir -p "$1" && mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'
PRELUDE = """
import json, os, subprocess, sys
from pathlib import Path
disk, place = Path(sys.argv[1]), Path(sys.argv[2])
def remount(options):
    subprocess.run(["mount", "-o", "remount," + options, disk], check=True)
def fill(leave=0):
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        file.truncate(file.tell() - leave)
def names():
    return sorted(p.relative_to(disk).as_posix() for p in disk.rglob("*") if p.is_file() and p.name != "filler")
def attempt(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it worked"
"""


def possible() -> bool:
    """Whether a disk can be mounted here in a namespace of one's own."""
    if not all(map(shutil.which, ("unshare", "mount"))):
        return False
    trial = [*SPACE, "mount", "-t", "tmpfs", "tmpfs", "/tmp"]  # seen by this process alone
    return subprocess.run(trial, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not possible(), reason="no mount namespaces here: run it as root on Linux")


def on_disk(tmp_path, script, size="40m", status=0):
    """Run a script that sees a disk of this size -> what it prints last, as JSON."""
    command = [*SPACE, "sh", "-c", MOUNT, size, tmp_path / "disk", sys.executable, "-c", PRELUDE + script,
               tmp_path / "disk", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    assert done.returncode == status, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def tree(tmp_path):
    """Three patients whose frames fill 0.4 MB when they are converted."""
    for n in range(3):
        write_patient(tmp_path / "tree", f"patient{n:04d}", seed=n, stills=False, stills_gt=False, shape=(10, 80, 60))
    return tmp_path / "tree"


CONVERT = """
from usjepa_nb import store
work = lambda: store.convert(place / "tree", disk / "data.h5", 80, workers=1, progress=False)
"""


def test_a_conversion_on_a_full_disk_goes_on_when_there_is_space(tree, tmp_path):
    before = tree_of(tree)
    first, left, second, made = on_disk(tmp_path, CONVERT + """
fill(leave=60_000)
first, left = attempt(work), names()
(disk / "filler").unlink()
second = attempt(work)
(place / "made.h5").write_bytes((disk / "data.h5").read_bytes())
print(json.dumps([first, left, second, names()]))
""", "2m")
    sentence(first, r"CamusError: .*disk/data.h5 could not be written \(No space left on device", "has space, then")
    assert left and all(name.endswith((".npz", ".lock")) for name in left)  # parts that are whole
    assert second == "it worked" and made == ["data.h5", "data.h5.lock"]
    convert(tree, tmp_path / "here.h5", 80, workers=1, progress=False)
    assert (tmp_path / "made.h5").read_bytes() == (tmp_path / "here.h5").read_bytes() and tree_of(tree) == before


def test_a_disk_that_fills_while_hdf5_writes_costs_no_older_file(tree, tmp_path):
    """The look at the free space is made blind: somebody else takes it in between. HDF5 may die of that."""
    convert(tree, tmp_path / "older.h5", 8, workers=1, progress=False)
    died, whole, second = on_disk(tmp_path, CONVERT + """
(disk / "data.h5").write_bytes((place / "older.h5").read_bytes())
older = (disk / "data.h5").read_bytes()
child = os.fork()
if not child:
    store.parts.require_space = lambda *_: fill(leave=100_000)
    os._exit(attempt(work) == "it worked")
died = os.waitpid(child, 0)[1]
whole = (disk / "data.h5").read_bytes() == older
(disk / "filler").unlink()
second = attempt(work)
print(json.dumps([died, whole, [second, names()]]))
""", "3m")
    assert died != 256 and whole and second == ["it worked", ["data.h5", "data.h5.lock"]]


def test_what_a_run_saved_survives_a_full_disk(tmp_path):
    checkpoint, cache, text, left = on_disk(tmp_path, """
import numpy as np, torch
from usjepa_nb import pretrain, probe, runs, weights
from usjepa_nb.vit import Encoder
pretrain.save(disk / "checkpoint.pt", {"step": 1})
runs.write_text(disk / "history.csv", "step,loss")
encoder = Encoder((2, 4, 4), (2, 8, 8), width=32, depth=1, heads=2)
fill(leave=8192)
checkpoint = attempt(pretrain.save, disk / "checkpoint.pt", {"step": 2, "weights": torch.zeros(10**6)})
assert weights.read(disk / "checkpoint.pt") == {"step": 1}
cache = attempt(probe.Cache.write, disk / "features.h5", encoder, np.zeros((8, 4, 32, 32), np.uint8), False)
text = attempt(runs.write_text, disk / "history.csv", "x" * 10**6)
assert (disk / "history.csv").read_text() == "step,loss"
print(json.dumps([checkpoint, cache, text, names()]))
""", "2m")
    sentence(checkpoint, r"OSError: .*disk/checkpoint.pt could not be written \(", "then run it again; it goes on from")
    sentence(cache, r"OSError: .*No space left on device, 0 MB wanted: '.*disk'")
    sentence(text, "No space left on device")
    left = [name for name in left if not name.startswith("history.csv.")]  # `runs.write_text` leaves its part
    assert left == ["checkpoint.pt", "history.csv"]


def test_a_notebook_on_a_full_disk_leaves_the_older_one(tmp_path):
    status, said, left = on_disk(tmp_path, """
import nbformat.v4 as v4, nbformat
nb = v4.new_notebook(cells=[v4.new_code_cell("print('x' * 10**6)")])
nbformat.write(nb, place / "a.ipynb")
(disk / "a.ipynb").write_text("older")
fill(leave=8192)
command = [sys.executable, "-m", "usjepa_nb.execute", place / "a.ipynb", disk / "a.ipynb"]
done = subprocess.run(command, capture_output=True, text=True)
assert (disk / "a.ipynb").read_text() == "older"
(disk / "filler").unlink()
assert subprocess.run(command, capture_output=True, text=True).returncode == 0
assert len((disk / "a.ipynb").read_text()) > 10**6
print(json.dumps([done.returncode, done.stderr, names()]))
""", "6m")
    assert status == 1 and left == ["a.ipynb"]
    said = [line for line in said.splitlines() if "could not be written" in line]
    sentence(*said, r"disk/a.ipynb could not be written \(.*No space left on device", "has space, then run it again")


def test_a_read_only_disk_is_named(tree, tmp_path):
    """A tree on such a disk is read all the same; nothing can be written there."""
    messages, converted = on_disk(tmp_path, CONVERT + """
import shutil
from usjepa_nb.dataset import Dataset
shutil.copytree(place / "tree", disk / "tree")
(disk / "cache").mkdir()
remount("ro")
nb = json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
(place / "a.ipynb").write_text(nb)
command = [sys.executable, "-m", "usjepa_nb.execute", place / "a.ipynb", disk / "out" / "a.ipynb", "--prepare-only"]
done = subprocess.run(command, capture_output=True, text=True)
assert done.returncode == 1
report = store.convert(disk / "tree", place / "data.h5", 80, workers=1, progress=False)
print(json.dumps([[attempt(work), attempt(Dataset, "smoke", cache=disk / "cache"),
                   done.stderr], report.converted]))
""")
    conversion, lab, notebook = messages
    sentence(conversion, r"CamusError: .*data.h5 could not be written \(Read-only file system\)", "see that its fol")
    sentence(lab, r"OSError: cache = '.*disk/cache' is not possible: .*\(Read-only file system\); give another folder")
    sentence(notebook, r"disk/out/a.ipynb could not be written \(.*Read-only file system", "see that its folder is")
    assert converted == 3 and len(Store(tmp_path / "data.h5")) == 3


def test_a_checkpoint_on_a_read_only_disk_is_named(tmp_path):
    said = on_disk(tmp_path, """
from usjepa_nb import pretrain
remount("ro")
print(json.dumps(attempt(pretrain.save, disk / "checkpoint.pt", {})))
""")
    sentence(said, r"OSError: .*checkpoint.pt could not be written \(.*see that its folder is writable")
