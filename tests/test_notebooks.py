"""The committed notebooks: complete, clean, readable. (That they run is `make test-notebooks`.)"""

import ast
import re
import statistics

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMON = {"profile", "data", "cache", "seed"}  # every notebook has these; `make run` and `make test` inject them
PLACE = re.compile(r"(?<![\w.~/-])/(?:root|home|Users|work|tmp|opt|mnt|private|var)/\w+")


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]


def outputs_as_text(nb):
    """Everything in the outputs that is read as text (pictures left out)."""
    for cell in code_cells(nb):
        for output in cell.outputs:
            yield output.get("text", "")
            for kind, value in output.get("data", {}).items():
                if not kind.startswith("image/"):
                    yield str(value)


def execution(nb):
    """Executed from top to bottom in one go, without an error."""
    counts = [cell.execution_count for cell in code_cells(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"executed out of order: {counts}"
    for cell in code_cells(nb):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"In [{cell.execution_count}] shows {output.ename}"


def cleanness(nb):
    """No widget state, no run timings, no path of one machine, under 1 MB."""
    if "widgets" in nb.metadata:
        yield "widget state in the metadata"
    for metadata in [nb.metadata, *(cell.metadata for cell in nb.cells)]:
        if {"papermill", "execution"} & set(metadata):
            yield "run timings in the metadata"
    for text in outputs_as_text(nb):
        if match := PLACE.search(text):
            yield f"path of one machine in an output: {match[0]}"
    if len(nbformat.writes(nb)) >= 1_000_000:
        yield "1 MB or more"


def parameters(nb):
    """One cell tagged ``parameters`` that holds plain values only: anything derived there ignores an override."""
    tagged = [cell for cell in code_cells(nb) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells tagged parameters"
        return
    names = set()
    for statement in ast.parse(tagged[0].source).body:
        try:
            (target,) = statement.targets
            names.add(target.id)
            value = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            yield f"no plain value: {ast.unparse(statement)}"
            continue
        if not isinstance(value, str | int | float | bool | None):
            yield f"no scalar: {ast.unparse(statement)}"
    if COMMON - names:
        yield f"parameters lack {sorted(COMMON - names)}"
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in nb.cells):
        yield "committed with injected parameters"


def readability(nb):
    """Short cells, and prose that says why: a third of all words at least."""
    lengths = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in code_cells(nb)]
    if statistics.median(lengths) > 8:
        yield f"median code cell has {statistics.median(lengths)} lines (8)"
    if max(lengths) > 40:
        yield f"longest code cell has {max(lengths)} lines (40)"
    words = {"code": 0, "markdown": 0}
    for cell in nb.cells:
        words[cell.cell_type] = words.get(cell.cell_type, 0) + len(cell.source.split())
    if words["markdown"] * 2 < words["code"]:
        yield f"{words['markdown']} words of prose beside {words['code']} of code"


def headings(nb, wanted=("aim", "summary", "quiz")):
    """The anatomy that every notebook shares; a heading is ``# ...`` or bold words that open a line."""
    prose = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    found = " ".join(re.findall(r"^(?:#+ |\*\*)(.*)$", prose, re.MULTILINE)).lower()
    for word in wanted:
        if not re.search(rf"\b{word}\b", found):
            yield f"no heading {word!r}"


CHECKS = [execution, cleanness, parameters, readability, headings]


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks yet")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, check):
    if path.stem.startswith("90_") and check is headings:
        pytest.skip("solutions have no quiz")
    assert list(check(nbformat.read(path, as_version=4))) == []


def exercises(nb):
    """{name: source of its check cell} of the exercises in a notebook: cells that print "03a: right"."""
    found = {}
    for cell in code_cells(nb):
        for name in re.findall(r'"(\d\d[a-z]): right', cell.source):
            found[name] = cell.source
    return found


def test_every_exercise_is_solved_and_open():
    """Each notebook's exercise is a stub that its own check calls unattempted, and 90_solutions checks it."""
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    solutions = "\n".join(cell.source for cell in code_cells(notebooks.pop("90_solutions")))
    names = [name for nb in notebooks.values() for name in exercises(nb)]
    assert names and len(set(names)) == len(names)
    for stem, nb in notebooks.items():
        text = "".join(outputs_as_text(nb))
        for name in exercises(nb):
            assert f"def exercise_{name}(" in solutions and f'check("{name}")' in solutions, name
            assert f"{name}: not attempted yet" in text and name.startswith(stem[:2]), name


def good(notebook):
    nb = notebook(
        "md # 09 A notebook\n\n**Aim.** See that a notebook like this one passes every check made here.",
        ('profile = "tiny"  # tiny, small\ndata = ""\ncache = "data_cache"\nseed = -1', "parameters"),
        "md ## Summary\n\nIt does, and the reason is that nothing is wrong with it as far as anybody can see.",
        "seed + 1",
        "md ## Quiz\n\nWhat if not? Then one sentence says what is wrong, and the tests fail.",
    )
    for count, cell in enumerate(code_cells(nb), 1):
        cell.execution_count = count
    code_cells(nb)[1].outputs = [nbformat.v4.new_output("stream", text="0 of 1/2 in data_cache/runs/tiny")]
    return nb


def test_a_good_notebook_passes(notebook):
    assert [complaint for check in CHECKS for complaint in check(good(notebook))] == []


def spoil_order(nb):
    nb.cells[3].execution_count = 7


def spoil_never_run(nb):
    nb.cells[3].execution_count = None


def spoil_error(nb):
    nb.cells[3].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[])]


def spoil_state(nb):
    nb.metadata["widgets"] = {}


def spoil_timings(nb):
    nb.cells[3].metadata["execution"] = {"iopub.execute_input": "now"}


def spoil_path(nb):
    nb.cells[3].outputs[0].text = "saved to " + "/home" + "/me/runs"


def spoil_size(nb):
    nb.cells[3].outputs[0].text = "x" * 1_000_000


def spoil_derived_parameter(nb):
    nb.cells[1].source += "\nsteps = 2 * 3 + seed"


def spoil_missing_parameter(nb):
    nb.cells[1].source = nb.cells[1].source.replace("cache", "cash")


def spoil_untagged_parameters(nb):
    nb.cells[1].metadata["tags"] = []


def spoil_injected(nb):
    nb.cells[3].metadata["tags"] = ["injected-parameters"]


def spoil_long_cell(nb):
    nb.cells[3].source = "\n".join(f"a{i} = {i}" for i in range(41))


def spoil_prose(nb):
    nb.cells[3].source = "a = 1\n" * 60


def spoil_heading(nb):
    nb.cells[4].source = "What about a quiz?"


SPOILS = [value for name, value in sorted(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_notebook_is_caught(notebook, spoil):
    nb = good(notebook)
    spoil(nb)
    assert [complaint for check in CHECKS for complaint in check(nb)]
