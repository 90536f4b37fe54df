"""Run one notebook with parameters, without a browser: ``python -m usjepa_nb.execute NOTEBOOK OUT -p seed 3``.

papermill does the work. Added here is what it lacks:

- a parameter that the notebook does not have is refused (papermill warns), and so is a value of another kind than
  the default;
- the output appears under its name only when the whole notebook has run; a failed one is kept as
  ``OUT.failed.ipynb``, so that what stands under OUT is always complete;
- a kernel that dies (killed, out of memory) and a file that cannot be read or written get one sentence, too;
- an exception inside a widget callback, which Jupyter hides in the state of the widget, fails the run;
- run timings and widget state are dropped, so that the output can be committed;
- whatever the locale, text is UTF-8, in this process and in the kernel;
- the kernel is this Python's own, whatever kernels the user has installed elsewhere.

The kernel works in the root of the repository. (JupyterLab and nbval start it in the notebook's own folder: a notebook
that must run in both takes its folders from ``usjepa_nb.execute.ROOT``, or from a parameter.)
"""

import argparse
import ast
import locale
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from nbformat import ValidationError
from nbformat.reader import NotJSONError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from usjepa_nb.kernel import PatientClient

ROOT = Path(__file__).resolve().parents[1]
WIDGETS = "application/vnd.jupyter.widget-state+json"
PLOTLY = "application/vnd.plotly.v1+json"


class NotebookError(Exception):
    """One sentence that says what is wrong and where."""


def typed(name: str, text: str, default):
    """The value written on the command line, as YAML reads it, of the same kind as the parameter's default.

    Where the default is a string the text is taken as it stands, so that a folder may be called ``2024`` or ``no``.

    Raises:
        NotebookError: if the value is of another kind than the default.
    """
    if isinstance(default, str):
        return text
    try:
        value = yaml.safe_load(text)
        if isinstance(default, float) and not isinstance(value, bool):
            return float(value)  # YAML takes 1e-3 for a string
    except yaml.YAMLError:
        value = ...  # of no kind
    except (TypeError, ValueError):
        pass
    if default is not None and type(value) is not type(default):
        raise NotebookError(f"parameter {name}: {text!r} is no {type(default).__name__} (default {default!r})")
    return value


def parameters_of(notebook: Path, given: list[tuple[str, str]]) -> dict:
    """``given`` names and texts as typed values for the parameters cell of ``notebook``.

    Raises:
        NotebookError: for a parameter that the notebook does not have or that is given twice; for a file that is no
            notebook.
    """
    try:
        known = papermill.inspect_notebook(notebook)
    except (NotJSONError, ValidationError, UnicodeDecodeError, AttributeError, KeyError) as error:
        raise NotebookError(f"{notebook}: is no notebook, or cut short; fetch it again") from error
    for name, _ in given:
        if [n for n, _ in given].count(name) > 1:
            raise NotebookError(f"parameter {name} is given twice; leave one of the two out")
        if name not in known:
            listed = ", ".join(known) or "none"
            raise NotebookError(f"{notebook}: no parameter {name!r}; it has: {listed}")
    return {name: typed(name, text, ast.literal_eval(known[name]["default"])) for name, text in given}


def hidden_errors(nb: nbformat.NotebookNode) -> list[str]:
    """Errors that widget callbacks raised: they stand in the state of an Output widget, not in a cell's output."""
    models = nb.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {}).values()
    outputs = [output for model in models for output in model["state"].get("outputs", [])]
    return [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]


def without_traces(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook without run timings and widget state."""
    for metadata in [nb.metadata, *(cell.metadata for cell in nb.cells)]:
        for key in ("papermill", "execution", "widgets"):
            metadata.pop(key, None)
    return nb


def execute(notebook: Path, out: Path, parameters: dict, prepare_only: bool = False) -> nbformat.NotebookNode:
    """Inject ``parameters``, run every cell (or none, with ``prepare_only``) and write the result to ``out``.

    Raises:
        NotebookError: naming the cell that failed; the notebook as far as it came is kept beside ``out``.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out = out.absolute()  # papermill changes folder
    partial, failed = out.with_name(f".{out.stem}.partial.ipynb"), out.with_suffix(".failed.ipynb")
    try:
        nb = papermill.execute_notebook(
            notebook, partial, parameters, prepare_only=prepare_only, kernel_name="python3", cwd=ROOT,
            progress_bar=False, config=Config(KernelManager={"transport_encryption": "auto",
                                                             "client_factory": PatientClient}),
        )
        errors = hidden_errors(nb)
        reason = f"a widget callback raised {errors[0]}" if errors else None
    except PapermillExecutionError as error:
        nb = nbformat.read(partial, as_version=4)
        reason = f"cell {error.cell_index + 1} (In [{error.exec_count}]) raised {error.ename}: {error.evalue}"
    except DeadKernelError:
        nb = nbformat.read(partial, as_version=4)
        at = sum(cell.metadata["papermill"]["start_time"] is not None for cell in nb.cells)
        reason = f"the kernel died in cell {at}, killed or out of memory: run it again, or take a smaller profile"
    nbformat.write(without_traces(nb), partial)
    os.replace(partial, failed if reason else out)
    if reason:
        raise NotebookError(f"{notebook}: {reason} (kept as {failed})")
    failed.unlink(missing_ok=True)
    return nb


def for_html(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy in which plotly figures are drawn without a network, and widgets say that they need JupyterLab."""
    import plotly.io

    nb, seen = nbformat.from_dict(nb), False
    for output in (output for cell in nb.cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        if PLOTLY in data:
            figure = {key: data[PLOTLY][key] for key in ("data", "layout")}
            # plotly.js is 4.5 MB: once a file is enough
            data["text/html"] = plotly.io.to_html(figure, include_plotlyjs=not seen, full_html=False, validate=False)
            seen = True
        elif "application/vnd.jupyter.widget-view+json" in data:
            output["data"] = {"text/html": "<em>Interactive: run this notebook in JupyterLab.</em>"}
    return nb


def export_html(nb: nbformat.NotebookNode, out: Path) -> None:
    """Write the notebook as one HTML file with its figures inside."""
    from nbconvert import HTMLExporter

    # Without require.js, which would keep plotly.js from showing itself to the page.
    html, _ = HTMLExporter(require_js_url="").from_notebook_node(for_html(nb), {"metadata": {"name": out.stem}})
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, out)


def insist_on_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where the locale has another encoding (or none)."""
    if locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8") and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def set_environment() -> None:
    """What the kernel inherits."""
    os.environ.setdefault("USJEPA_EXERCISE", "1")  # widgets call their own callbacks once, so that errors surface
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # JSON in the notebook: small; for_html() draws it
    os.environ.setdefault("TQDM_MININTERVAL", "5")  # s
    here = str(Path(sys.prefix, "share", "jupyter"))  # the kernels of this Python come first
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [here, os.environ.get("JUPYTER_PATH")]))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m usjepa_nb.execute", description=__doc__.split("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="given")
    parser.add_argument("--prepare-only", action="store_true", help="inject the parameters, run nothing")
    parser.add_argument("--html", action="store_true", help="also write OUT as HTML")
    arguments = parser.parse_args(argv)
    set_environment()
    start = time.monotonic()
    try:
        if not arguments.notebook.is_file():
            raise NotebookError(f"{arguments.notebook}: no such notebook")
        parameters = parameters_of(arguments.notebook, arguments.given)
        nb = execute(arguments.notebook, arguments.out, parameters, arguments.prepare_only)
        if arguments.html:
            export_html(nb, arguments.out.with_suffix(".html"))
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{arguments.out} could not be written ({error}): see that its folder is writable and has space, then "
              "run it again", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    insist_on_utf8()
    sys.exit(main())
