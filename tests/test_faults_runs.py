"""Faults in parameters, notebooks, checkpoints, devices and runs. `faults.MATRIX` lists all cases and their tests."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from faults import ended, forked, kill_itself, on_call, sentence
from smoke_lab import shared_cache

from usjepa_nb import dataset, execute, grid, memory, methods, pretrain, probe, profile, weights
from usjepa_nb.profile import ProfileError
from usjepa_nb.runs import Lab
from usjepa_nb.segment import segmentation
from usjepa_nb.weights import WeightsError

FEW = {"patients": 3, "spacing": 2.0}  # of the phantom: quick to make
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The HDF5 file of three patients."""
    torch.set_num_threads(1)  # forked processes cannot use their parent's threads
    lab = Lab("smoke", cache=shared_cache(tmp_path_factory), **FEW)
    assert len(lab.store) == 6
    return lab.hdf5


@pytest.fixture
def make_lab(data, tmp_path):
    """A function that makes a lab on this data with a cache of its own; each lab remembers nothing."""
    def make(cache="cache", **options):
        (tmp_path / cache).mkdir(exist_ok=True)
        if not (tmp_path / cache / data.name).exists():
            (tmp_path / cache / data.name).symlink_to(data)
        return Lab("smoke", cache=tmp_path / cache, **FEW | options)

    return make


def same(a, b):
    """Whether two checkpoints, or parts of them, are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


# --- parameters

@pytest.mark.parametrize(("options", "error", "words"), [
    ({"seed": -1}, ValueError, ["seed = -1 is not possible: choose a whole number from 0 to 4294967295"]),
    ({"seed": 2**32}, ValueError, ["seed = 4294967296 is not possible"]),
    ({"cache": __file__}, OSError, [r"cache = '.*test_faults_runs.py' is not possible", "give another folder"]),
    ({"cache": f"{__file__}/x"}, OSError, [r"cache = '.*py/x' is not possible.*\(Not a directory\)"]),
    ({"profile": "tyni"}, ProfileError, ["tyni.yaml: no such profile; choose one of .*tiny"]),
    ({"stpes": 3}, ProfileError, ["unknown setting stpes; see profiles/tiny.yaml"]),
])
def test_what_a_lab_is_given_is_checked(tmp_path, options, error, words):
    with pytest.raises(error) as caught:
        Lab(**{"profile": "smoke", "cache": tmp_path} | options)
    sentence(caught.value, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("load", "model"), [(profile.load, "profiles/smoke.yaml"),
                                             (lambda path: grid.load(path, 2), "grids/walk.yaml")])
def test_a_key_that_stands_twice_is_refused(tmp_path, load, model):
    text = (ROOT / model).read_text(encoding="utf-8")
    key = "steps" if "profile" in model else "seeds"
    (tmp_path / "own.yaml").write_text(f"{text}\n{key}: 9\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load(str(tmp_path / "own.yaml"))
    sentence(caught.value, rf"own.yaml: is not readable as YAML \({key} stands there twice\); compare it with")


def test_a_profile_of_another_editor_reads_the_same(tmp_path):
    text = (ROOT / "profiles" / "smoke.yaml").read_bytes()
    (tmp_path / "smoke.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert profile.load(str(tmp_path / "smoke.yaml")) == profile.load("smoke")


@pytest.fixture
def command(notebook, tmp_path, monkeypatch, capsys):
    """A function that runs `usjepa_nb.execute` on a notebook of these cells -> exit status, stderr, output folder."""
    for name in ("USJEPA_EXERCISE", "PYTHONHASHSEED", "PLOTLY_RENDERER", "TQDM_MININTERVAL", "JUPYTER_PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back at the end
    path, out = tmp_path / "a.ipynb", tmp_path / "out" / "a.ipynb"
    nbformat.write(notebook(("seed = 0\nlam = 0.5\ndata = ''", "parameters"), "print(seed)"), path)

    def run(*arguments, cells=None, content=None):
        if cells:
            nbformat.write(notebook(*cells), path)
        if content is not None:
            path.write_bytes(content(path.read_bytes()))
        try:
            status = execute.main([str(path), str(out), *arguments])
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err, out.parent

    return run


@pytest.mark.parametrize("fault", [
    pytest.param(("-p lamda 0.5", "no parameter 'lamda'; it has: seed, lam, data"), id="misspelt"),
    pytest.param(("-p lam 0,5", "parameter lam: '0,5' is no float"), id="decimal comma"),
    pytest.param(("-p seed 1.5", "parameter seed: '1.5' is no int"), id="no whole number"),
    pytest.param(("-p seed [1", r"parameter seed: '\[1' is no int"), id="no YAML"),
    pytest.param(("-p seed 1 -p seed 2", "parameter seed is given twice; leave one of the two out"), id="twice"),
])
def test_a_bad_command_is_refused_before_anything_runs(command, fault):
    arguments, words = fault
    status, said, out = command(*arguments.split())
    assert status == 1 and not out.exists()
    sentence(said, words)


@pytest.mark.parametrize("content", [lambda data: data[:300], lambda data: b"", lambda data: b"\xff\xfe" * 50,
                                     lambda data: b"{}", lambda data: b"[]"])
def test_a_file_that_is_no_notebook_is_named(command, content):
    status, said, out = command(content=content)
    assert status == 1 and not out.exists()
    sentence(said, r"a.ipynb: is no notebook, or cut short; fetch it again")


def test_an_output_that_cannot_be_written_is_named(command, tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")
    status, said, _ = command("--prepare-only")
    assert status == 1
    sentence(said, r"out/a.ipynb could not be written \(.*see that its folder is writable and has space, then run it")
    assert (tmp_path / "out").read_text() == "a file where a folder should be"


MAKE = shutil.which("make") and (ROOT / ".venv" / ".ready").exists()


@pytest.mark.skipif(not MAKE, reason="make, or the .venv that it uses, is not here")
@pytest.mark.parametrize(("arguments", "words"), [
    (["run", "PROFIL=smoke"], "there is no variable PROFIL; make knows .*PROFILE"),
    (["plan", "DATE=/x"], "there is no variable DATE"),
    (["run", "JOBS=many"], "JOBS is a number from 1 to 999: how many notebooks run side by side"),
    (["run", "JOBS=0"], "JOBS is a number from 1 to 999"),
    (["table1", "THREADS=-1"], "THREADS is a number from 1 to 999: how many threads each of them has"),
    (["run", "DATA=/no/such place"], "DATA: there is no folder or file /no/such place"),
    (["run", "DATA=README.md"], "DATA: README.md is one file, .* give the CAMUS folder, or make the tables"),
    (["plan", "PROFILE=tyni"], "tyni.yaml: no such profile; choose one of"),
])
def test_make_refuses_what_it_does_not_know(arguments, words):
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # as from a shell
    done = subprocess.run(["make", "--no-print-directory", "-o", ".venv/.ready", *arguments], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make: *** [")]
    assert len(said) == 1 and re.search(words, said[0]), said


# --- notebooks: killed, or run in another locale

def test_a_kernel_that_dies_is_told_in_one_sentence(command):
    status, said, out = command(cells=["print('so far')", "import os\nos.kill(os.getpid(), 9)", "print('never')"])
    assert status == 1
    said = [line for line in said.splitlines() if "a.ipynb" in line]  # papermill's log has a line of its own
    sentence(*said, "a.ipynb: the kernel died in cell 2, killed or out of memory: run it again, or take a smaller")
    assert [path.name for path in out.iterdir()] == ["a.failed.ipynb"]
    assert "so far" in (out / "a.failed.ipynb").read_text(encoding="utf-8")


def test_a_notebook_runs_under_any_locale(command, tmp_path):
    command("--prepare-only")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))} | {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    out = tmp_path / "Übung 心" / "a.ipynb"
    run = [sys.executable, "-m", "usjepa_nb.execute", tmp_path / "a.ipynb", out, "--prepare-only", "-p"]
    done = subprocess.run([*run, "data", "Übung λ"], env=env, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and str(out) in done.stdout.decode(), done.stderr.decode()[-900:]
    injected = nbformat.read(out, as_version=4).cells[1].source
    assert ast.literal_eval(injected.partition("data = ")[2].strip()) == "Übung λ"
    assert os.listdir(out.parent) == ["a.ipynb"]


TRAINS = ("from pathlib import Path\nimport time\nfrom usjepa_nb.runs import Lab\n"
          "lab = Lab('smoke', cache=cache, patients=3, spacing=2.0)\n"
          "for run in lab.training('vjepa'):\n"
          "    while hold and len(run.history) == 3: (Path(cache) / 'held').touch(); time.sleep(0.02)\n")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="wants Linux's /proc to see the kernel")
def test_a_killed_notebook_goes_on_and_ends_the_same(make_lab, notebook, tmp_path):
    lab, out = make_lab(), tmp_path / "out" / "a.ipynb"
    nbformat.write(notebook((f"cache = '{lab.cache}'\nhold = False", "parameters"), "print('begun')", TRAINS),
                   tmp_path / "a.ipynb")
    command = [sys.executable, "-m", "usjepa_nb.execute", tmp_path / "a.ipynb", out]
    process = subprocess.Popen([*command, "-p", "hold", "True"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (lab.cache / "held").exists() and process.poll() is None:
        time.sleep(0.05)
    (kernel,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{kernel}").exists() and time.monotonic() < deadline and \
            Path(f"/proc/{kernel}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.05)
    assert time.monotonic() < deadline  # the kernel does not outlive its parent, nor hold the run's lock
    folder = lab.folder(lab.spec("vjepa"))
    assert pretrain.steps_done(folder / "checkpoint.pt") == 3 and not (folder / "run.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "goes on where it stopped" in out.read_text(encoding="utf-8")
    assert os.listdir(out.parent) == ["a.ipynb"] and not list(folder.glob("*.part"))
    undisturbed = make_lab("undisturbed").encoder("vjepa").folder
    assert same(weights.read(folder / "checkpoint.pt"), weights.read(undisturbed / "checkpoint.pt"))


# --- runs: killed, twice at once

@forks
@pytest.mark.parametrize("save", [1, 2])
def test_killed_while_a_checkpoint_is_written_it_ends_the_same(make_lab, capsys, save):
    lab = make_lab()
    folder = lab.folder(lab.spec("vjepa_ll", 0.25))

    def half(content, part):
        Path(part).write_bytes(b"half of it")
        kill_itself()

    def work():
        torch.save = on_call(save, torch.save, half)
        lab.encoder("vjepa_ll", 0.25)

    assert ended(forked(work)) == -signal.SIGKILL
    assert pretrain.steps_done(folder / "checkpoint.pt") == 3 * (save - 1) and not (folder / "run.json").exists()
    assert [p.read_bytes() for p in folder.glob("*.part")] == [b"half of it"]
    capsys.readouterr()
    run = make_lab().encoder("vjepa_ll", 0.25)
    assert ("not on disk" if save == 1 else "goes on where it stopped") in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"checkpoint.pt", "history.csv", "run.json", "seconds", "lock"}
    other = make_lab("undisturbed").encoder("vjepa_ll", 0.25)
    assert same(weights.read(folder / "checkpoint.pt"), weights.read(other.folder / "checkpoint.pt"))
    assert run.history.equals(other.history)


def features_killed(lab):
    """Kill a process in the middle of the features of a random encoder; the run's folder."""
    folder = lab.folder(lab.spec("random"))

    def work():
        probe.encode = on_call(1, probe.encode)
        segmentation(lab, "random")

    assert ended(forked(work)) == -signal.SIGKILL
    assert not (folder / "features.h5").exists() and len(list(folder.glob("features.*.part"))) == 1
    return folder


@forks
def test_killed_while_features_are_written_it_ends_the_same(make_lab):
    folder = features_killed(make_lab())
    again, other = segmentation(make_lab(), "random"), segmentation(make_lab("undisturbed"), "random")
    assert (again.best == other.best).all() and (again.last == other.last).all() and again.history == other.history
    a, b = probe.Cache(folder / "features.h5"), probe.Cache(next(make_lab("undisturbed").cache.rglob("features.h5")))
    assert torch.equal(a.features, b.features) and torch.equal(a.seen, b.seen)


@forks
def test_half_written_features_of_a_killed_process_are_cleared_away(make_lab):
    folder = features_killed(make_lab())
    segmentation(make_lab(), "random")
    assert not list(folder.glob("*.part"))


@forks
def test_two_processes_that_want_one_run_train_it_once(make_lab, tmp_path):
    lab = make_lab()

    def work(name):
        train = pretrain.train

        def seen(*args, **options):
            (tmp_path / name).touch()
            time.sleep(0.3)  # the other one gets to the lock
            return train(*args, **options)

        pretrain.train = seen
        lab.encoder("vjepa")

    both = [forked(lambda name=name: work(name)) for name in ("one", "two")]
    assert [ended(child) for child in both] == [0, 0]
    assert len([p for p in tmp_path.iterdir() if p.name in ("one", "two")]) == 1  # the other one loaded it
    other = make_lab("undisturbed").encoder("vjepa").folder
    assert same(weights.read(lab.folder(lab.spec("vjepa")) / "checkpoint.pt"), weights.read(other / "checkpoint.pt"))


# --- files of a run

def other_size(file):
    file["encoder"] = {k: v[:1] for k, v in file["encoder"].items()}


CHECKPOINTS = {"another size": other_size, "no encoder": lambda file: file.pop("encoder"),
               "no step": lambda file: file.pop("step"),
               "another optimiser": lambda file: file.update(step=4, optimizer={}),
               "finished, of a shorter run": lambda file: file.update(step=4),
               "no buffers": lambda file: file.update(encoder={})}


@pytest.mark.parametrize("change", CHECKPOINTS)
def test_a_checkpoint_of_another_run_is_named_with_the_remedy(make_lab, change):
    lab = make_lab()
    path = lab.encoder("vjepa").folder / "checkpoint.pt"
    (path.parent / "run.json").unlink()  # so that it would go on from there
    file = weights.read(path)
    CHECKPOINTS[change](file)
    torch.save(file, path)
    before = path.read_bytes()
    with pytest.raises(WeightsError) as caught:
        make_lab().encoder("vjepa")
    sentence(caught.value, "checkpoint.pt: is not the checkpoint of this run", "delete it, and the run starts again")
    assert path.read_bytes() == before
    path.unlink()
    assert len(make_lab().encoder("vjepa").history) == 6


def test_a_description_that_is_damaged_is_named_and_made_again(make_lab):
    lab = make_lab()
    described = lab.encoder("vjepa").folder / "run.json"
    whole = json.loads(described.read_text())
    for damaged in ("", described.read_text()[:40]):
        described.write_text(damaged)
        with pytest.raises(OSError) as caught:
            make_lab().encoder("vjepa")
        sentence(caught.value, "run.json cannot be read", "delete it, and the run goes on from its checkpoint")
        described.unlink()
        assert len(make_lab().encoder("vjepa").history) == 6
        assert json.loads(described.read_text()) | {"seconds": 0} == whole | {"seconds": 0}


@pytest.mark.parametrize("error", [KeyError("encoder"), RuntimeError("size mismatch\n\tfor a"), ValueError("a group")])
def test_restoring_puts_any_misfit_into_one_sentence(tmp_path, error):
    with pytest.raises(WeightsError) as caught, weights.restoring(tmp_path / "c.pt"):
        raise error
    sentence(caught.value, "c.pt: is not the checkpoint of this run", "delete it, and the run starts again")
    with pytest.raises(WeightsError, match=r"^as it was$"), weights.restoring("c.pt"):
        raise WeightsError("as it was")
    with pytest.raises(KeyboardInterrupt), weights.restoring("c.pt"):
        raise KeyboardInterrupt


def test_a_damaged_checkpoint_of_ones_own_is_not_to_be_fetched(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"c.pt: cannot be read as a checkpoint \(truncated\?\); delete it$"):
        weights.read(tmp_path / "c.pt", "delete it")


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.mark.parametrize("what", ["checkpoint.pt", "segmentation.npz", "part.npz"])
def test_code_in_a_file_of_a_run_does_not_run(make_lab, tmp_path, what):
    lab, trace = make_lab(), tmp_path / "it-ran"
    evil = np.array([Code(trace)], dtype=object)
    if what == "checkpoint.pt":
        path = lab.encoder("vjepa").folder / what
        torch.save(weights.read(path) | {"extra": Code(trace)}, path)
        with pytest.raises(WeightsError, match=r"checkpoint.pt: refused, .*could run code on loading"):
            make_lab().encoder("vjepa")
    elif what == "segmentation.npz":
        segmentation(lab, "random")
        path = next(lab.cache.rglob("segmentation-*.npz"))
        np.savez(path, best=evil, last=evil, history=evil, seconds=evil)
        with pytest.raises((ValueError, OSError), match="pickle"):
            segmentation(make_lab(), "random")
    else:
        np.savez(tmp_path / what, row=evil)
        with pytest.raises(OSError, match="pickle"):
            dataset.store.parts.load(tmp_path / what, "row")
    assert not trace.exists()


@pytest.mark.parametrize("damage", [lambda data: data[:-60], lambda data: b"", lambda data: b"no zip" * 50,
                                    lambda data: data[:99] + bytes(9) + data[108:]])  # zlib notices this one
def test_a_damaged_segmentation_is_named_with_the_remedy(make_lab, damage):
    lab = make_lab()
    wanted = segmentation(lab, "random").best
    path = next(lab.cache.rglob("segmentation-*.npz"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError) as caught:
        segmentation(make_lab(), "random")
    sentence(caught.value, "segmentation-100pc-.*npz cannot be read", "delete it, it is made again")
    path.unlink()
    assert (segmentation(make_lab(), "random").best == wanted).all()


# --- devices

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("ask", [lambda lab: lab.about(), lambda lab: segmentation(lab, "random"),
                                 lambda lab: lab.encoder("vjepa")])
def test_a_gpu_that_is_not_there_is_not_replaced_in_silence(make_lab, ask):
    lab = make_lab(accelerator="cuda")
    with pytest.raises(ProfileError) as caught:
        ask(lab)
    sentence(caught.value, "accelerator = 'cuda' is not possible: torch sees no GPU here; choose auto or cpu")
    assert not [path for path in lab.cache.rglob("*") if path.name in ("features.h5", "checkpoint.pt", "run.json")]


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8.00 "
                                 "GiB of which 1.20 GiB is free.\nSee documentation for Memory Management.")


def test_a_training_that_needs_too_much_memory_names_the_settings(make_lab, monkeypatch):
    lab = make_lab()
    folder = lab.folder(lab.spec("vjepa"))
    with monkeypatch.context() as patch:
        def build(lab, spec, build=methods.build):
            made = build(lab, spec)
            made.encoder.forward = on_call(9, made.encoder.forward, out_of_memory)  # not at the first step
            return made

        patch.setattr(methods, "build", build)
        with pytest.raises(memory.OutOfMemory) as caught:
            lab.encoder("vjepa")
    sentence(caught.value, r"V-JEPA: not enough memory \(allocate 2.50 GiB\): lower batch, freeze more encoder blocks",
             "precision to bf16-mixed")
    assert not (folder / "run.json").exists() and not list(folder.glob("*.part"))
    make_lab().encoder("vjepa")
    other = make_lab("undisturbed").encoder("vjepa").folder
    assert same(weights.read(folder / "checkpoint.pt"), weights.read(other / "checkpoint.pt"))


def test_features_that_need_too_much_memory_name_the_settings(make_lab, monkeypatch):
    lab = make_lab()
    with monkeypatch.context() as patch:
        patch.setattr(probe, "encode", out_of_memory)
        with pytest.raises(memory.OutOfMemory) as caught:
            segmentation(lab, "random")
    sentence(caught.value, r"random encoder: not enough memory \(allocate 2.50 GiB\): .*accelerator to cpu")
    assert not [path for path in lab.cache.rglob("*") if path.suffix in (".part", ".npz") or path.name == "features.h5"]
    assert segmentation(lab, "random").best.shape[0] == 4


def test_the_allocator_of_the_cpu_is_understood_and_other_errors_pass():
    """The demand is real: 4 EiB are more than any machine has."""
    with pytest.raises(memory.OutOfMemory) as caught, memory.remedy("step 3", memory.TRAINING):
        torch.empty(1 << 60)
    sentence(caught.value, "^step 3: not enough memory", "lower batch, freeze more encoder blocks .* bf16-mixed")
    with pytest.raises(memory.OutOfMemory, match="not enough memory"), memory.remedy("step 3", memory.TRAINING):
        raise MemoryError
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"), memory.remedy("step 3", memory.TRAINING):
        raise RuntimeError("shapes do not fit")

    def rows():
        yield 1
        out_of_memory()

    steps = memory.during(rows(), "V-JEPA", memory.TRAINING)
    assert next(steps) == 1
    with pytest.raises(memory.OutOfMemory, match=r"^V-JEPA: .*allocate 2.50 GiB"):
        next(steps)
