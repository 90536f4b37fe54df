"""How long a learner waits for the first figure of each notebook, from the start of its kernel.

    python benchmarks/first_figure.py [--profile tiny] [NUMBER …]

Run it after `make run`, on an idle machine: the runs that a notebook shows are then on disk, as they are for a reader
who opens it the second time. Cells run in order until one shows a picture, a plotly figure or a widget's picture.
"""

import argparse
import asyncio
import time
from pathlib import Path

import pandas as pd
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from usjepa_nb.execute import ROOT

FIGURES = ("image/png", "image/svg+xml", "application/vnd.plotly.v1+json")


async def seconds(path: Path, profile: str) -> tuple[float, int]:
    """Until the first figure is there, and the number of its code cell (from 1)."""
    nb = parameterize_notebook(load_notebook_node(str(path)), {"profile": profile})
    client = NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    begun, number = time.perf_counter(), 0
    async with client.async_setup_kernel():
        for index, cell in enumerate(nb.cells):
            if cell.cell_type != "code":
                continue
            number += 1
            await client.async_execute_cell(cell, index)
            if any(kind in output.get("data", {}) for output in cell.outputs for kind in FIGURES):
                return time.perf_counter() - begun, number
    raise SystemExit(f"{path.name} shows no figure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="00 01 …; all")
    parser.add_argument("--profile", default="tiny")
    a = parser.parse_args()
    rows = []
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        if not a.numbers or path.name[:2] in a.numbers:
            took, cell = asyncio.run(seconds(path, a.profile))
            rows.append({"notebook": path.stem, "s to the first figure": took, "code cell": cell})
            print(f"{path.stem}: {took:.1f} s (code cell {cell})", flush=True)
    worst = pd.DataFrame(rows).iloc[:, 1].max()
    print(f"longest: {worst:.1f} s; the bar is 10 s")


if __name__ == "__main__":
    main()
