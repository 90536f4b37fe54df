"""After a `make run` on the phantom: refresh what the repository shows of it. `make results` calls this.

Copies the result tables to results/<profile>/, draws the overlay of the README, and executes the committed notebooks in
place (their runs are on disk, so this takes minutes). Real data never comes here: there is no parameter for it, and
a table of other data is refused.
"""

import json
import shutil
import subprocess
import sys

import numpy as np

from usjepa_nb import figures
from usjepa_nb.profile import ROOT
from usjepa_nb.runs import Lab
from usjepa_nb.segment import segmentation


def overlay(lab: Lab):
    """Reference and predictions at ED, between and ES, for the test video of median DSC over all methods."""
    grid = lab.grid()
    shown = {"reference": None} | {c.id: segmentation(lab, c.method, max(grid.fractions), c.lam, c.freeze)
                                   for c in grid.table2 if c.method not in ("prior", "initial", "unet")}
    results = [s for s in shown.values() if s is not None]
    test = np.flatnonzero(np.isin(results[0].rows, lab.store.rows("test")))
    dsc = np.mean([s.scores.query("split == 'test' and which == 'best'").dsc.to_numpy() for s in results], axis=0)
    at = test[dsc.argsort()[len(dsc) // 2]]
    row = int(results[0].rows[at])
    instants = [0, lab.frames // 2, lab.frames - 1]
    frames, masks = (v[0][instants] for v in lab.clips(np.array([row])))
    columns = {name if s is None else s.scores.method.iloc[0]: masks if s is None else s.best[at][instants]
               for name, s in shown.items()}
    spacing = tuple(lab.store.table.loc[row, ["spacing_y", "spacing_x"]].astype(float))
    return figures.overlays_grid(frames, columns, [spacing] * 3, ["ED", "between", "ES"])


def main(profile: str = "tiny") -> None:
    lab = Lab(profile)
    folder, walk = ROOT / "results" / lab.profile.name, lab.cache / "runs" / lab.profile.name / "summary.json"
    if (data := json.loads(walk.read_text())["data"]) != lab.data_name:
        sys.exit(f"{walk} is a table of {data}: run `make run` without DATA, then this again")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(walk, folder)
    if (whole := lab.results("paper") / "summary.json").exists():  # of `make table1` and `make table2`
        shutil.copy(whole, folder / "tables.json")
    (folder / "overlay.png").write_bytes(figures.png(overlay(lab)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        subprocess.run([sys.executable, "-m", "usjepa_nb.execute", notebook, notebook], check=True, cwd=ROOT)


if __name__ == "__main__":
    main(*sys.argv[1:])
