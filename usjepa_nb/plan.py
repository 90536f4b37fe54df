"""Before you pay: what the tables of a grid take in FLOPs, memory and time, before the first run is begun.

`python -m usjepa_nb.plan PROFILE [--grid NAME] [--tflops X [X32]] [--data CAMUS]` prints it; `cost` does the counting.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Generator, Tensor

from usjepa_nb import camus, cost, grid, phantom, profile
from usjepa_nb.anatomy import VIEWS
from usjepa_nb.controls import FrameEncoder
from usjepa_nb.cost import BYTE, FLOP, SECOND, Stage, scaled
from usjepa_nb.dataset import Dataset
from usjepa_nb.grid import Cell, Grid, GridError
from usjepa_nb.masking import sector_tokens
from usjepa_nb.methods import END_TO_END, PRETRAINED
from usjepa_nb.profile import Profile, ProfileError
from usjepa_nb.splits import PARTS

DRAWS = 8  # batches, each with its own masks, over which a step of pre-training is averaged
SAMPLE = 6  # patients whose sectors are looked at
TRAINED = {"teacher": "teacher", "videomae": "videomae", "vjepa": "vjepa", "vjepa_ll": "vjepa", "salt": "salt",
           "supervised": "supervised", "finetuned": "supervised", "unet": "unet"}  # method -> stage
ASSUMES = (f"Counted: matrix products, convolutions and attention of real steps (2 FLOPs a multiply-add), over {DRAWS} "
           "batches of masks. target, LL: share of the target encoder and of the localisation loss. state: weights, "
           "EMA copy, gradients, AdamW's moments, exact. kept: what autograd holds for the backward pass, an estimate "
           "of activations; the peak is higher. Times are lower bounds: data, masks, optimiser, monitors and scoring "
           "come on top.")


@dataclass
class Data:
    """How many labelled clips there are, and what some of them look like."""

    patients: int  # for training
    clips: dict[str, int]  # train, val, test -> labelled clips
    frames: int  # of a clip
    stored: Tensor  # some clips, uint8 [n, T, S, S]
    views: list[Tensor]  # DRAWS batches as pre-training sees them, float [B, T, S, S]
    note: str

    def train(self, fraction: int) -> int:
        """Training clips at a share (%) of the patients, if every patient has as many."""
        return round(self.clips["train"] * math.ceil(fraction * self.patients / 100) / self.patients)


def look(name: str, p: Profile, data: str) -> Data:
    """Count the patients of a CAMUS folder, of its converted file, or of the phantom, and look at SAMPLE of them where
    sectors matter.

    Raises:
        CamusError: nobody there to train on.
    """
    frames, batch = p.frames, p.batch // p.devices
    if converted := Path(data).is_file():
        lab = Dataset(name, data)
        table, frames = lab.store.table, lab.frames
        clips = {k: int((table["labelled"] & (table["split"] == k)).sum()) for k in PARTS}
        train = table["patient"][lab.store.rows("train", labelled=True)].unique()
    elif data:
        entries = [e for e in camus.scan(data) if any("_gt" in role for role in e.files)]
        part, _ = camus.splits(data, [e.patient for e in entries])
        clips = {k: sum(part[e.patient] == k for e in entries) for k in PARTS}
        train = list(dict.fromkeys(e.folder for e in entries if part[e.patient] == "train"))
        frames = frames if any("sequence" in e.files for e in entries) else 2 * p.tubelet
    else:
        lists = {f"subgroup_{k}.txt": names for k, names in phantom.split(p.patients, p.phantom_seed).items()}
        clips, train = {k: len(VIEWS) * len(lists[file]) for k, file in PARTS.items()}, lists[PARTS["train"]]
    if not len(train):
        raise camus.CamusError(f"{data} has no training patient with masks: give a larger part of CAMUS.")
    note = f"{len(train)} training patients; clips with labels: " + ", ".join(f"{n} {k}" for k, n in clips.items())
    if not p.sector_aware:  # then no value of a pixel matters
        blank = torch.zeros(batch, frames, p.size, p.size)
        return Data(len(train), clips, frames, blank.byte(), [blank] * DRAWS, note)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        if not converted:
            few = Path(folder) / "few"
            few.mkdir()
            for patient in train[:SAMPLE] if data else ():
                (few / patient.name).symlink_to(patient.resolve())
            lab = Dataset(name, str(few) if data else "", folder, patients=SAMPLE)
        rows = lab.store.rows("train")
        if converted:
            rows = rows[table["patient"][rows].isin(train[:SAMPLE]).to_numpy()]
        draw = lab.batches(rows)
        views = [draw(Generator().manual_seed(k), batch) for k in range(DRAWS)]
        stored = torch.from_numpy(lab.clips(rows)[0])
        lab.store.close()
    return Data(len(train), clips, frames, stored, views, f"{note}; sectors of {len(rows)} clips looked at")


def jobs(p: Profile, cell: Cell, fraction: int) -> set[tuple]:
    """What a cell takes at a share (%) of the labels: {(stage, cell, % of the patients seen)}. Cells share some.

    A stage is (what, number): a training and its frozen blocks; the "features" of one of our encoders (0) or of
    ImageNet's (1); a "probe", or the one on "imagenet", and its share of the labels.
    """
    m = cell.method
    if m == "prior":
        return set()
    seen = fraction if m in END_TO_END or (m in PRETRAINED and p.unlabelled == "fraction") else 100
    start = Cell("prior")  # nothing
    if m == "finetuned":
        start = grid.adapted(cell.lam, cell.freeze)
    elif (p.init == "videomae" and m in ("initial", "vjepa", "vjepa_ll")) or (p.teacher == "pixels" and m == "salt"):
        start = Cell("teacher" if m == "salt" else "videomae")
    found = {job for job in jobs(p, start, seen) if job[0][0] in TRAINED.values()}
    if m in TRAINED:
        found.add(((TRAINED[m], cell.freeze if m in grid.FROZEN else 0), cell, seen))
    if m not in END_TO_END:
        found |= {(("features", int(m == "imagenet")), cell, seen),
                  (("imagenet" if m == "imagenet" else "probe", fraction), cell, seen)}
    return found


def every(p: Profile, g: Grid, cells: Iterable[Cell]) -> set[tuple]:
    """Jobs of several cells at all shares of the labels; what they share comes once."""
    return {job for cell in cells for fraction in g.fractions for job in jobs(p, cell, fraction)}


def stage(p: Profile, data: Data, what: str, number: int) -> Stage:
    """Count one stage of `jobs`."""
    if what in TRAINED.values():
        batches = data.views
        if what in END_TO_END:
            clips = [data.stored[(torch.arange(len(v)) + k) % len(data.stored)] for k, v in enumerate(batches)]
            batches = [(c, torch.zeros_like(c)) for c in clips]
        masked = p.mask == "multiblock" and what not in ("videomae", *END_TO_END)  # other masks are all of one size
        vary = masked or (p.sector_aware and what != "unet")
        return cost.training(p, data.frames, what, number, batches if vary else batches[:1])
    if number == 1 or what == "imagenet":
        encoder = cost.fake(lambda: FrameEncoder(p, data.frames, pretrained=False))
    else:
        encoder = cost.objective(p, data.frames, "random").features
    if what == "features":
        name = f"features{' of ImageNet' * number} (step: a clip)"
        return cost.features(p, data.stored, encoder, name, sum(data.clips.values()))
    name = f"probe{' on ImageNet' * (what == 'imagenet')}, {number} % of labels"
    return cost.probing(p, data.frames, encoder.width, name, data.train(number))


def stages(p: Profile, data: Data, g: Grid) -> dict[tuple, Stage]:
    """Every stage that the grid needs, counted: trainings, features, probes."""
    order = [*dict.fromkeys(TRAINED.values()), "features", "probe", "imagenet"]
    key = lambda s: (order.index(s[0]), -s[1] if s[0] in ("probe", "imagenet") else s[1])  # noqa: E731
    return {s: stage(p, data, *s) for s in sorted({job[0] for job in every(p, g, g.cells)}, key=key)}


def total(p: Profile, g: Grid, found: dict[tuple, Stage], cells: Iterable[Cell]) -> dict:
    """All that the cells take over the grid's seeds: number of trainings and of probes, FLOPs."""
    todo, flops = every(p, g, cells), 0.0
    for key, cell, _ in todo:
        s = found[key]
        flops += g.seeds * s.steps * (s.flops - (s.ll if cell.lam == 1 else 0))
    trainings, probes = (g.seeds * sum(key[0] in names for key, *_ in todo)
                         for names in (TRAINED.values(), ("probe", "imagenet")))
    return {"trainings": trainings, "probes": probes, "flops": flops}


def report(p: Profile, g: Grid, found: dict[tuple, Stage], rate: float) -> str:
    """The table of the stages and that of the paper's tables, as text. `rate`: FLOP/s, nan if unknown."""
    rows = list(found.values())
    percent = lambda part, of, digits: f"{part / of:.{digits}%}" if part else ""  # noqa: E731
    one = [scaled("a step", (s.flops for s in rows), FLOP),
           pd.Series([percent(s.target, s.flops, 0) for s in rows], name="target"),
           pd.Series([percent(s.ll, s.flops, 2) for s in rows], name="LL"),
           pd.Series([s.steps for s in rows], name="steps"),
           scaled("in all", (s.steps * s.flops for s in rows), FLOP),
           scaled("state", (s.state for s in rows), BYTE),
           scaled("kept", (s.kept for s in rows), BYTE),
           scaled("time", (s.steps * s.flops / rate for s in rows), SECOND)]
    tables = {"Table 1": g.table1, "Table 2": g.table2, "both": g.cells}
    sums = [total(p, g, found, cells) for cells in tables.values()]
    two = [pd.Series([s[name] for s in sums], name=name) for name in ("trainings", "probes")]
    two += [scaled("in all", (s["flops"] for s in sums), FLOP),
            scaled("time", (s["flops"] / rate for s in sums), SECOND)]
    named = ((one, [s.name for s in rows]), (two, list(tables)))
    return "\n\n".join(pd.concat(columns, axis=1).set_axis(names).to_string() for columns, names in named)


def speed(p: Profile, data: Data, given: float | None) -> tuple[float, str]:
    """FLOP/s, given (in TFLOP/s) or measured on the device at hand, and a sentence on its origin."""
    if given:
        return given * 1e12, f"Time: at {given:g} TFLOP/s in {p.precision}, as given."
    device = "cuda" if torch.cuda.is_available() and p.accelerator != "cpu" else "cpu"
    if p.accelerator == "cuda" and device == "cpu":
        return math.nan, ("Time: unknown, the profile asks for a GPU and torch sees none here; give --tflops X for a "
                          "device that sustains X TFLOP/s.")
    seen = sector_tokens(data.stored.float(), p.tubelet_size).sum(1).max() if p.sector_aware else \
        math.prod(p.grid(data.frames))
    rate, words = cost.sustained(p, int(seen), p.precision, device)
    return rate, f"Time: at {words}."


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m usjepa_nb.plan", description=__doc__.split("\n")[0])
    parser.add_argument("profile", nargs="?", default="tiny")
    parser.add_argument("--grid", default="paper", help="name of a grid, or path of a YAML file (paper)")
    parser.add_argument("--data", default="", metavar="CAMUS",
                        help="a CAMUS folder, or its converted file (the phantom)")
    parser.add_argument("--tflops", type=float, metavar="X",
                        help="TFLOP/s that a device sustains in the profile's precision (measured on this machine)")
    given = parser.parse_args(argv)
    if given.tflops is not None and not 0 < given.tflops < math.inf:
        parser.error("--tflops takes a positive number")
    try:
        p = profile.load(given.profile)
        g = grid.load(given.grid, p.depth, initial=p.init != "random")
        data = look(given.profile, p, given.data)
        found = stages(p, data, g)
    except (ProfileError, GridError, camus.CamusError) as error:
        print(error, file=sys.stderr)
        return 1
    rate, words = speed(p, data, given.tflops)
    each = f" on {p.devices} devices (trainings: numbers of one)" if p.devices > 1 else ""
    head = (f"Profile {p.name}, grid {g.name}, {g.seeds} seed{'s' * (g.seeds > 1)}; {data.frames} frames of "
            f"{p.size}×{p.size} px, batch {p.batch}{each}, {p.precision}; {data.note}.")
    print(textwrap.fill(head, 118), report(p, g, found, rate), sep="\n\n", end="\n\n")
    print(textwrap.fill(words, 118), textwrap.fill(ASSUMES, 118), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
