"""Nothing that a user types is run as a command, nothing goes out to the network, and JupyterLab asks who is there."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from smoke_lab import smoke_lab
from test_camus import write_lists, write_patient
from test_repository import texts

NASTY = """a b 'c' "d"; touch $CANARY; $(touch $CANARY) `touch $CANARY` & touch $CANARY | #e {f} {{g}}"""


# --- what is written

OPEN_DOORS = re.compile(
    r"""\b(token|password|hashed_password|required_token)\b\s*=\s*(''|""|False|$)"""
    r"|(disable_check_xsrf|allow_remote_access|allow_unauthenticated_access)\s*=\s*True"
    r"|allow_origin(_pat)?\s*=\s*\S|--ip[= ]['\"]?(0\.0\.0\.0|\*|::)", re.MULTILINE)


def test_jupyters_own_authentication_is_left_alone():
    for path, text in texts():
        if path.suffix != ".ipynb" and path.name != "test_security.py":
            assert not (found := OPEN_DOORS.search(text)), f"{path}: {found[0]}"


@pytest.mark.parametrize("line", [
    "jupyter-lab --ServerApp.token=", "c.IdentityProvider.token = ''", "--ServerApp.password=''", "--ip=0.0.0.0",
    "c.ServerApp.disable_check_xsrf = True", "--ServerApp.allow_origin='*'"])
def test_an_open_door_would_be_seen(line):
    assert OPEN_DOORS.search(line)


def sources():
    return [(path, ast.parse(text)) for path, text in texts() if path.suffix == ".py" and path.parent.name != "tests"]


def calls(tree):
    """(name as written, node) of every call."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def dangers(tree):
    """Calls that hand text to a shell or to Python, or that unpickle what they read."""
    for name, node in calls(tree):
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if given.get("shell", "False") != "False" or name in ("os.system", "os.popen", "subprocess.getoutput", "eval",
                                                              "exec", "pickle.load", "pickle.loads"):
            yield name
        if given.get("allow_pickle", "False") != "False" or (name == "torch.load"
                                                             and given.get("weights_only") != "True"):
            yield name
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            loader = given.get("Loader") or "".join(ast.unparse(a) for a in node.args[1:])
            if loader not in ("yaml.SafeLoader", "UniqueKeys"):  # the latter is a SafeLoader, see test_profile
                yield name


def test_no_text_is_run_and_no_file_is_unpickled():
    assert len(sources()) > 40
    for path, tree in sources():
        assert not (found := list(dangers(tree))), f"{path}: {found}"


@pytest.mark.parametrize("line", [
    "yaml.load(text)", "yaml.load(text, yaml.Loader)", "subprocess.run(text, shell=True)", "os.system(text)",
    "eval(text)", "torch.load(path)",
    "np.load(path, allow_pickle=True)", "torch.load(path, weights_only=False)"])
def test_a_danger_would_be_seen(line):
    assert len(list(dangers(ast.parse(line)))) == 1


def test_workflow_commands_quote_what_users_give():
    """In the Snakefile's shell commands DATA, PROFILE and GRID stand with :q, or in what shlex.quote made."""
    text = (ROOT / "Snakefile").read_text()
    assert not re.findall(r"{(?:DATA|PROFILE|GRID)}", re.sub(r'f"profiles/{PROFILE}\.yaml"', "", text))
    recipes = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t")]
    for line in recipes:
        assert not re.search(r"\$[({](?:DATA|PROFILE|GRID|SUMMARY|TFLOPS)[)}]", line), line


# --- what is done with a nasty name

RECORD = """#!{python}
import json, os, pathlib, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("FAILS", "nothing") in " ".join(sys.argv):
    sys.exit(1)
if "usjepa_nb.execute" in sys.argv:
    pathlib.Path(sys.argv[4]).write_text("")
"""


@pytest.fixture
def trap(tmp_path):
    """(environment, folder with a nasty name, function that gives the recorded calls and sees that nothing ran)."""
    folder, tools = tmp_path / "data" / NASTY, tmp_path / "repository" / ".venv" / "bin"
    tools.mkdir(parents=True)
    for number, part in enumerate(("train", "val", "test"), 1):
        write_patient(folder / "database_nifti", f"patient{number:04d}", seed=number)
        write_lists(folder, **{part: [f"patient{number:04d}"]})
    for name in ("python", "snakemake", "pip"):
        (tools / name).write_text(RECORD.format(python=sys.executable))
        (tools / name).chmod(0o755)
    canary, log = tmp_path / "canary", tmp_path / "calls"
    environment = os.environ | {"CANARY": str(canary), "CALLS": str(log), "PATH": f"{tools}:{os.environ['PATH']}"}

    def recorded():
        assert not canary.exists(), "a part of the name was run as a command"
        return [json.loads(line) for line in log.read_text().splitlines()]

    return environment, folder, recorded


def repository(tmp_path):
    """A folder with the Makefile, set up already."""
    root = tmp_path / "repository"
    shutil.copy(ROOT / "Makefile", root)
    for name in ("pyproject.toml", "requirements.lock", "constraints.txt"):
        (root / name).write_text("")
    (root / ".venv" / ".ready").touch()
    return root


@pytest.mark.parametrize("variable", ["DATA", "DATA, a file", "PROFILE", "GRID"])
def test_make_passes_a_nasty_name_on_as_it_is(trap, tmp_path, variable):
    environment, folder, recorded = trap
    variable, _, file = variable.partition(", ")
    value = str(folder) + ("-32px.h5" if file else "") if variable == "DATA" else NASTY
    if file:
        folder.with_name(f"{folder.name}-32px.h5").touch()
    done = subprocess.run(["make", "table1", f"{variable}={value}", "JOBS=2", "THREADS=3"], cwd=repository(tmp_path),
                          env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(recorded()) == 2
    for call in recorded():  # snakemake reads a value as YAML, so that a folder is given as YAML quotes it
        assert call[call.index("--cores") + 1] == "6" and "threads=3" in call
        (given,) = [word.partition("=")[2] for word in call if word.startswith(f"{variable.lower()}=")]
        assert (yaml.safe_load(given) if variable == "DATA" else given) == value


def test_make_says_in_words_that_there_is_no_such_folder(trap, tmp_path):
    environment, _, _ = trap
    root = repository(tmp_path)
    for target in ("run", "table1"):
        done = subprocess.run(["make", target, f"DATA=nowhere {NASTY}"], cwd=root, env=environment, text=True,
                              capture_output=True)
        assert done.returncode and f"DATA: there is no folder or file nowhere {NASTY}" in done.stdout
    assert not (tmp_path / "canary").exists() and not (tmp_path / "calls").exists()


# Later notebooks come first where the scheduler is free, so that an order kept is one that they asked for.
LATE_FIRST = '\n\nworkflow.get_rule("notebook").priority = lambda w: 2 * int(w.name[:2]) - ("--" in w.name)\n'


@pytest.fixture
def workflow(trap, tmp_path):
    """A function that calls make with snakemake itself -> exit status, executed notebooks, calls for a table.

    Only `python` is one that notes down what it is asked for. Notebooks are {name: parameters}, in their order.
    """
    environment, _, recorded = trap
    root = repository(tmp_path)
    for name in ("usjepa_nb", "profiles", "grids", "notebooks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "Snakefile").write_text((ROOT / "Snakefile").read_text() + LATE_FIRST)
    (root / ".venv" / "bin" / "snakemake").write_text(f'#!/bin/sh\nexec {sys.executable} -m snakemake "$@"\n')

    def run(*arguments, **more):
        done = subprocess.run(["make", *arguments, "PROFILE=smoke"], cwd=root, capture_output=True, text=True,
                              env=environment | {"PYTHONPATH": str(root)} | more)
        calls = [call for call in recorded() if "usjepa_nb.execute" in call]
        notebooks = {Path(call[3]).stem: {call[i + 1]: call[i + 2] for i, word in enumerate(call) if word == "-p"}
                     for call in calls}
        assert len(notebooks) == len(calls), done.stderr[-2000:]  # none is executed twice
        assert all(Path(call[2]).stem in call[3] or call[3].endswith(("table1.ipynb", "table2.ipynb"))
                   for call in calls)
        return done.returncode, notebooks, [call for call in recorded() if "usjepa_nb.tables" in call]

    return run


def test_the_walk_passes_a_nasty_name_on_as_it_is_and_goes_in_order(workflow, trap):
    """The data is made first, cells are trained before they are compared, and every cell has its own parameters."""
    _, folder, _ = trap
    status, notebooks, (table,) = workflow("run", f"DATA={folder}")
    assert status == 0 and table == ["-m", "usjepa_nb.tables", "smoke", "0", "walk", str(folder)]
    cells = {"05_probe_segmentation--supervised-s0": {"cells": "random,supervised", "grid": "walk", "seed": "0"}}
    walk = {path.stem: {"seed": "0"} for path in (ROOT / "notebooks").glob("*.ipynb")}
    every = {"profile": "smoke", "data": str(folder)}
    assert notebooks == {name: own | every for name, own in (walk | cells).items()}
    order = [name for name in notebooks if name != "90_solutions"]  # which needs no data, and may come first
    assert order[0] == "00_start_here"
    after = lambda later, *first: order.index(later) > max(map(order.index, first))  # noqa: E731
    assert after("04_lambda_ablation", "03_vjepa_localisation")
    assert after("05_probe_segmentation", "04_lambda_ablation", *cells)
    assert after("06_qualitative_overlays", "05_probe_segmentation")
    assert all(after(name, "03_vjepa_localisation") for name in ("07_static_teacher", "08_your_own_ultrasound"))


@pytest.mark.parametrize(("table", "methods"), [
    ("table1", {"random", "vjepa-lam1-f0", "vjepa_ll-lam0.25-f0"}),
    ("table2", {"random", "vjepa-lam1-f0", "vjepa_ll-lam0.25-f0", "videomae", "supervised"})])
def test_the_tables_of_the_walk_have_a_job_for_every_cell(workflow, table, methods):
    """Also for those that the walk's notebooks make on their way (initial weights: at smoke there are none)."""
    status, notebooks, _ = workflow(table, "GRID=walk")
    trained = {f"03_vjepa_localisation--{m}-s0" for m in methods if m.startswith("vjepa")}
    assert not status
    assert {*notebooks} == {"00_start_here", table, *trained, *(f"05_probe_segmentation--{m}-s0" for m in methods)}


def test_a_cell_that_fails_costs_the_others_nothing_and_the_table_is_printed(workflow, tmp_path):
    grid = tmp_path / "two seeds.yaml"
    grid.write_text(yaml.safe_dump({
        "seeds": 2, "fractions": [100], "table1": {"lams": [0.25], "frozen": ["1/2"]},
        "table2": {"controls": ["random"], "methods": ["vjepa"], "lam": 0.25, "frozen": [0]}}))
    status, notebooks, (table,) = workflow("table1", f"GRID={grid}", FAILS="-p lam 0.25 -p freeze 1 -p deep False "
                                                                           "-p seed 0")
    assert status and table == ["-m", "usjepa_nb.tables", "smoke", "0", str(grid)]
    every, wanted = {"profile": "smoke"}, {"00_start_here": {"seed": "0"}}
    train, probe = "03_vjepa_localisation--{}", "05_probe_segmentation--{}"
    cell = "vjepa_ll-lam0.25-f1"  # of table 1; that of table 2 is not asked for
    for seed in ("0", "1"):
        wanted[train.format(f"{cell}-s{seed}")] = {"lam": "0.25", "freeze": "1", "deep": "False", "seed": seed}
        wanted[probe.format(f"random-s{seed}")] = {"cells": "random", "grid": str(grid), "seed": seed}
    wanted[probe.format(f"{cell}-s1")] = {"cells": f"random,{cell}", "grid": str(grid), "seed": "1"}  # 0: no encoder
    wanted["table1"] = {"grid": str(grid), "missing": "show", "seed": "0"}
    assert notebooks == {name: own | every for name, own in wanted.items()}
    order = [*notebooks]
    assert order[0] == "00_start_here" and order[-1] == "table1"
    assert order.index(probe.format(f"{cell}-s1")) > max(map(order.index, (train.format(f"{cell}-s1"),
                                                                           probe.format("random-s1"))))


def test_git_is_asked_without_a_shell(tmp_path, monkeypatch):
    """The one program that the package starts by itself."""
    from usjepa_nb import tables

    place = tmp_path / NASTY
    place.mkdir()
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.setattr(tables, "ROOT", place)
    assert tables.commit() == "" and not (tmp_path / "canary").exists()


# --- what goes out

GUARD = '''
"""Whoever looks for or calls a machine that is not this one is noted down and refused."""
import ipaddress, os, socket

def local(host):
    try:
        return host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def refuse(host):
    with open(os.environ["CALLED_OUT"], "a") as file:
        file.write(f"{host}\\n")
    raise OSError(101, "Network is unreachable")

def guarded(real):
    def connect(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not local(address[0]):
            refuse(address[0])
        return real(self, address, *rest)
    return connect

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
real_lookup = socket.getaddrinfo

def getaddrinfo(host, *rest, **options):
    name = host.decode() if isinstance(host, bytes) else host
    if name != socket.gethostname() and not local(name):
        refuse(name)
    return real_lookup(host, *rest, **options)

socket.getaddrinfo = getaddrinfo
'''
CUT = [shutil.which("unshare"), "--map-root-user", "--net", "--", sys.executable, "-c", """
import fcntl, os, socket, struct, sys
with socket.socket() as s:  # a new network namespace has its own loopback, switched off
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 1 | 64))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
os.execvp(sys.argv[1], sys.argv[1:])
"""]


@pytest.fixture
def offline(tmp_path):
    """(command prefix, environment, function that gives the hosts called): the network cut where the system allows it,
    and in any case a guard in every Python that is started."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    called = tmp_path / "called"
    called.touch()
    path = os.pathsep.join(filter(None, [str(tmp_path / "guard"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "CALLED_OUT": str(called)}
    cut = CUT if CUT[0] and subprocess.run([*CUT, "true"], capture_output=True).returncode == 0 else []
    return cut, environment, lambda: called.read_text().split()


def test_the_guard_holds(offline):
    """Loopback is open; another machine, by name or by number, is noted and refused."""
    cut, environment, called = offline
    code = ("import socket\n"
            "with socket.create_server(('127.0.0.1', 0)) as s: socket.create_connection(s.getsockname()).close()\n"
            "for place in [('192.0.2.1', 9), ('example.invalid', 80)]:\n"
            "    try: socket.create_connection(place, 1)\n"
            "    except OSError as error: print(error.strerror)\n")
    done = subprocess.run([*cut, sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["Network is unreachable"] * 2, done.stderr
    assert called() == ["192.0.2.1", "example.invalid"]


def test_the_first_notebook_and_a_training_need_no_network(offline, tmp_path, tmp_path_factory):
    """00 through the command that `make run` uses, and a method that is trained, probed and scored."""
    cut, environment, called = offline
    cache = smoke_lab(tmp_path_factory).cache
    command = [*cut, sys.executable, "-m", "usjepa_nb.execute", str(ROOT / "notebooks" / "00_start_here.ipynb"),
               str(tmp_path / "00.ipynb"), "-p", "profile", "smoke", "-p", "cache", str(cache), "-p", "seed", "0"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "00.ipynb").exists(), done.stderr[-2000:]
    code = ("import sys; from usjepa_nb.runs import Lab; from usjepa_nb.segment import segmentation\n"
            "print(len(segmentation(Lab('smoke', cache=sys.argv[1], seed=11), 'vjepa').scores))")
    done = subprocess.run([*cut, sys.executable, "-c", code, str(cache)], env=environment, capture_output=True,
                          text=True)
    assert done.stdout.split()[-1:] == ["16"], done.stderr[-2000:]
    assert called() == []


# --- who may come in

def test_the_lab_that_make_starts_asks_for_its_token(tmp_path):
    """With the words of the Makefile's recipe, on loopback: without the token nothing is told, with it all is."""
    (recipe,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "jupyter-lab" in line and "@" in line]
    words = recipe.partition("jupyter-lab")[2].split()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")} | {
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    command = [sys.executable, "-m", "jupyterlab", *words, "--no-browser", f"--port={port}", "--port-retries=0"]
    if os.geteuid() == 0:
        command.append("--allow-root")  # of this test alone
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        runtime = tmp_path / "runtime"
        for _ in range(600):
            if found := list(runtime.glob("jpserver-*.json")) if runtime.exists() else []:
                break
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.1)
        about = json.loads(found[0].read_text())
        assert len(about["token"]) >= 32 and about["hostname"] in ("localhost", "127.0.0.1")
        for token, status in (("", 403), ("wrong", 403), (about["token"], 200)):
            request = urllib.request.Request(f"{about['url']}api/contents", headers={"Authorization": f"token {token}"})
            assert answer(request) == status
    finally:
        server.terminate()
        server.wait(30)


def answer(request):
    for _ in range(50):
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:  # it writes its file a little before it listens
            time.sleep(0.1)
