"""README's table of what is where: every function, cell and test that it names is there, and belongs to the others."""

import importlib
import re

import nbformat
import pytest
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
TABLE = TEXT.split("## Equation → cell → function → test")[1].split("\n\n")[1].splitlines()[2:]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE]


def named(row):
    return re.findall(r"`([\w.]+)`", row[1])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_functions_exist_and_their_tests_name_them(row):
    tests = [ROOT / name for name in re.findall(r"`(tests/\w+\.py)`", row[3])]
    assert tests
    said = "\n".join(path.read_text() for path in tests)
    for name in named(row):
        module, *parts = name.split(".")
        found = importlib.import_module(f"usjepa_nb.{module}")
        for part in parts:
            found = getattr(found, part)
        assert callable(found), name
        assert re.search(rf"\b{parts[-1]}\b", said), f"{row[3]} never names {name}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_notebook_has_the_section_and_shows_the_module(row):
    number, *sections = re.findall(r"\d+", row[2])
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for section in sections:
        assert re.search(rf"^## {section}\b", text, re.MULTILINE), f"{path.name} has no section {section}"
    for name in named(row):
        module, *parts = name.split(".")
        assert re.search(rf"\b{parts[-1]}\b|\b{module}\b", text), f"{path.name} never names {name}"


def test_every_notebook_has_a_row():
    numbers = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert {row[2][:2] for row in ROWS} == numbers
