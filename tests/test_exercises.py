"""Every exercise: its check takes the solution, calls the empty function unattempted, and refuses a wrong answer."""

import re

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT


def code(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def cell_with(cells, text):
    """The one cell that holds `text`."""
    (found,) = [cell for cell in cells if text in cell]
    return found


NOTEBOOKS = {path.name[:2]: code(path) for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
SOLUTIONS = NOTEBOOKS.pop("90")
EXERCISES = {name: cells for cells in NOTEBOOKS.values() for cell in cells
             for name in re.findall(r'"(\d\d\w): right', cell)}


@pytest.fixture
def names():
    """What stands above the check in notebook 90: imports, parameters; and no solution yet."""
    namespace = {}
    for cell in SOLUTIONS:
        if not re.search(r"def exercise_|^check\(", cell, re.MULTILINE):
            exec(cell, namespace)
    return namespace


def off_by_a_little(value):
    """A wrong answer of the right kind."""
    if isinstance(value, tuple | list):
        return type(value)(off_by_a_little(part) for part in value)
    if isinstance(value, bool | np.bool_):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, np.ndarray | torch.Tensor) and value.dtype in (bool, torch.bool):
        return ~value
    return value + 1


def test_there_are_exercises_in_the_notebooks_and_no_solution_without_one():
    assert {"00", "01", "02", "03", "04", "05", "06", "07"} <= {name[:2] for name in EXERCISES}
    assert set(re.findall(r"def exercise_(\w+)\(", "\n".join(SOLUTIONS))) == set(EXERCISES)
    assert set(re.findall(r'^check\("(\w+)"\)', "\n".join(SOLUTIONS), re.MULTILINE)) == set(EXERCISES)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes(name, names, capsys):
    exec(cell_with(SOLUTIONS, f"def exercise_{name}("), names)
    exec(cell_with(EXERCISES[name], f'"{name}: right'), names)
    assert capsys.readouterr().out.startswith(f"{name}: right")


@pytest.mark.parametrize("name", EXERCISES)
def test_the_empty_function_does_not_pass(name, names, capsys):
    exec(cell_with(EXERCISES[name], f"def exercise_{name}("), names)
    exec(cell_with(EXERCISES[name], f'"{name}: right'), names)
    assert capsys.readouterr().out == f"{name}: not attempted yet\n"


@pytest.mark.parametrize("name", EXERCISES)
def test_a_wrong_answer_is_refused(name, names, capsys):
    exec(cell_with(SOLUTIONS, f"def exercise_{name}("), names)
    solution = names[f"exercise_{name}"]
    names[f"exercise_{name}"] = lambda *given: off_by_a_little(solution(*given))
    with pytest.raises(AssertionError):
        exec(cell_with(EXERCISES[name], f'"{name}: right'), names)
    assert "right" not in capsys.readouterr().out
