"""Shared by the tests: where the repository is, and notebooks small enough to write down."""

from pathlib import Path

import hypothesis
import nbformat.v4 as v4
import pytest

ROOT = Path(__file__).resolve().parents[1]
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)  # the same examples each time, no clock
hypothesis.settings.load_profile("same")


@pytest.fixture
def notebook():
    """A function that makes a notebook: a cell ``"md ..."`` is prose, ``(source, tag)`` is tagged code."""

    def make(*cells):
        nb = v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3",
                                                      "language": "python"}})
        for cell in cells:
            source, tags = (cell, []) if isinstance(cell, str) else (cell[0], [cell[1]])
            new = v4.new_markdown_cell if source.startswith("md ") else v4.new_code_cell
            nb.cells.append(new(source.removeprefix("md "), metadata={"tags": tags}))
        return nb

    return make
