"""execute.py: parameters are checked, failures are loud and kept, outputs are whole and clean."""

import asyncio
import json
import os
import subprocess
import sys
from queue import Empty

import nbformat
import pytest
from conftest import ROOT

from usjepa_nb import execute, kernel

PARAMETERS = ('profile = "tiny"\nseed = 0  # any\nlr = 0.1  # per step\naugment = True\nlimit = None', "parameters")


@pytest.fixture
def saved(notebook, tmp_path):
    def save(*cells):
        nbformat.write(notebook(*cells), tmp_path / "a.ipynb")
        return tmp_path / "a.ipynb"

    return save


def run(source, *arguments, out="out/a.ipynb", **environment):
    """The command line in a process of its own, as Snakemake calls it."""
    done = subprocess.run(
        [sys.executable, "-m", "usjepa_nb.execute", source, source.parent / out, *arguments],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | environment,
    )
    return done, source.parent / out


def printed(path):
    nb = nbformat.read(path, as_version=4)
    return "".join(output.get("text", "") for cell in nb.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("3", 0, 3), ("no", True, False), ("1e-3", 0.1, 1e-3), ("2", 0.1, 2.0), ("", "x", ""),
        ("2024", "", "2024"), ("no", "", "no"), ("5", None, 5), ("null", None, None),
    ],
)  # fmt: skip
def test_a_value_takes_the_kind_of_its_default(text, default, value):
    got = execute.typed("p", text, default)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "default"), [("3.5", 0), ("many", 0), ("true", 0), ("1", True), ("fast", 0.1), ("yes", 0.1)]
)
def test_a_value_of_another_kind_is_refused_by_name(text, default):
    with pytest.raises(execute.NotebookError, match="parameter p"):
        execute.typed("p", text, default)


def test_an_unknown_parameter_is_refused_with_the_known_ones(saved):
    done, out = run(saved(PARAMETERS), "-p", "sed", "3")
    assert done.returncode == 1 and not out.exists()
    assert "'sed'" in done.stderr and "profile, seed, lr, augment, limit" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_missing_notebook_is_one_sentence(tmp_path):
    done, _ = run(tmp_path / "none.ipynb")
    assert done.returncode == 1 and done.stderr.strip().endswith("none.ipynb: no such notebook")


def test_run_injects_works_in_the_root_and_leaves_no_traces(saved, tmp_path):
    """A kernel of the same name in the user's home, which could not even start, is passed by."""
    fake = tmp_path / "home" / "kernels" / "python3"
    fake.mkdir(parents=True)
    kernel = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
    (fake / "kernel.json").write_text(json.dumps(kernel))
    source = saved(
        PARAMETERS,
        "import os, sys\nexercise = os.environ['USJEPA_EXERCISE']\n"
        "print(os.getcwd(), sys.executable, seed, lr, profile, exercise, sep='|')",
        "import ipywidgets\nipywidgets.IntSlider()",
        "import plotly.graph_objects as go\ngo.Figure(go.Scatter(y=[1, 2])).show()",
    )
    done, out = run(
        source, "-p", "seed", "3", "-p", "lr", "1e-3", "--html",
        JUPYTER_PATH=str(tmp_path / "home"), JUPYTER_DATA_DIR=str(tmp_path / "home"),
        JUPYTER_PREFER_ENV_PATH="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # jupyter_client interrupts a kernel before it asks it to stop; a slow one is still busy with its last reply then
    assert done.stderr.replace("[IPKernelApp] ERROR | KeyboardInterrupt caught in kernel.\n", "") == ""
    assert printed(out).strip().split("|") == [str(ROOT), sys.executable, "3", "0.001", "tiny", "1"]
    nb = nbformat.read(out, as_version=4)
    assert [cell.execution_count for cell in nb.cells] == [1, 2, 3, 4, 5]
    assert "papermill" not in out.read_text() and "iopub" not in out.read_text()
    assert "widgets" not in nb.metadata
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.html", "a.ipynb"]
    html = out.with_suffix(".html").read_text()
    assert "Plotly.newPlot" in html and "run this notebook in JupyterLab" in html
    assert "require.min.js" not in html  # it would hide plotly.js from the page


def test_plotly_js_is_put_in_once(notebook):
    nb = notebook("fig", "fig")
    figure = {"data": [{"type": "scatter", "y": [1, 2]}], "layout": {}}
    for cell in nb.cells:
        cell.outputs = [nbformat.v4.new_output("display_data", {execute.PLOTLY: figure})]
    first, second = (cell.outputs[0].data["text/html"] for cell in execute.for_html(nb).cells)
    assert len(first) > 1_000_000 > 100_000 > len(second)
    assert "text/html" not in nb.cells[0].outputs[0].data  # the notebook itself stays small


def test_a_failing_cell_is_named_and_the_notebook_kept_beside_the_older_result(saved, tmp_path):
    source = saved(PARAMETERS, "print('so far')", "1 / 0", "print('never')")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.ipynb").write_text("older")
    done, out = run(source)
    assert done.returncode == 1 and out.read_text() == "older"
    assert "cell 3 (In [3]) raised ZeroDivisionError: division by zero" in done.stderr
    said = [line for line in done.stderr.splitlines() if "[IPKernelApp]" not in line]  # its farewell when stopped early
    assert len(said) == 1
    assert "so far" in printed(out.with_suffix(".failed.ipynb"))
    assert "never" not in printed(out.with_suffix(".failed.ipynb"))
    good, _ = run(saved(PARAMETERS))  # the same notebook, put right
    assert good.returncode == 0
    assert [path.name for path in out.parent.iterdir()] == ["a.ipynb"]


def test_an_error_inside_a_widget_callback_fails_the_run(saved):
    source = saved(
        "import ipywidgets\ndef draw(x):\n    if x: raise ValueError('boom')\n"
        "slider = ipywidgets.IntSlider()\n"
        "ipywidgets.VBox([slider, ipywidgets.interactive_output(draw, {'x': slider})])",
        "slider.value = 3",
    )
    done, out = run(source)
    assert done.returncode == 1 and not out.exists()
    assert "a widget callback raised ValueError: boom" in done.stderr


@pytest.mark.parametrize("timeout", [None, 30])
def test_a_reply_whose_notification_was_lost_is_found(monkeypatch, timeout):
    """The socket has a message, but the wait that was on when it came is not woken."""
    waits = []

    class Socket:
        async def poll(self, milliseconds):
            waits.append(milliseconds)
            if len(waits) > 1:
                return 1
            await asyncio.sleep(3600 if milliseconds is None else milliseconds / 1000)
            return 0

    async def reply(self):
        return {"content": "there"}

    monkeypatch.setattr(kernel, "LOOK", 0.05)
    monkeypatch.setattr(kernel.PatientChannel, "_recv", reply)
    channel = object.__new__(kernel.PatientChannel)
    channel.socket = Socket()
    assert asyncio.run(asyncio.wait_for(channel.get_msg(timeout), 10)) == {"content": "there"}


def test_a_wait_that_is_over_says_so(monkeypatch):
    class Socket:
        async def poll(self, milliseconds):
            await asyncio.sleep(milliseconds / 1000)
            return 0

    monkeypatch.setattr(kernel, "LOOK", 0.05)
    channel = object.__new__(kernel.PatientChannel)
    channel.socket = Socket()
    with pytest.raises(Empty):
        asyncio.run(channel.get_msg(0.2))


def test_notebooks_are_executed_by_such_a_client(saved, monkeypatch, tmp_path):
    clients, begin = [], kernel.PatientClient.start_channels
    monkeypatch.setattr(kernel.PatientClient, "start_channels",
                        lambda self, *a, **k: (clients.append(self), begin(self, *a, **k))[1])
    execute.execute(saved("6 * 7"), tmp_path / "out.ipynb", {})
    assert clients and isinstance(clients[0].shell_channel, kernel.PatientChannel)


def test_prepare_only_runs_nothing_and_keeps_what_nbval_compares(saved):
    """nbval skips cells without an execution count, so counts and outputs have to survive."""
    source = saved(PARAMETERS, "# NBVAL_CHECK_OUTPUT\n6 * 7", "# NBVAL_CHECK_OUTPUT\nseed")
    assert run(source)[0].returncode == 0
    done, out = run(source.parent / "out" / "a.ipynb", "-p", "seed", "5", "--prepare-only", out="b/a.ipynb")
    assert done.returncode == 0, done.stderr
    nb = nbformat.read(out, as_version=4)
    assert "seed = 5" in nb.cells[1].source and "injected-parameters" in nb.cells[1].metadata.tags
    assert [cell.outputs[0].data["text/plain"] for cell in nb.cells[2:]] == ["42", "0"]
    assert [cell.execution_count for cell in nb.cells] == [1, None, 2, 3]
    checked = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env", out],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 1 and "1 failed, 3 passed" in checked.stdout  # seed is 5 now, 0 was committed
