"""The grid: which encoders and which shares of labels the paper's tables compare, read from `grids/<name>.yaml`.

A profile says how a run is made, a grid which runs are made. A cell is one encoder; every share of labels is a probe
on it (or, for what learns end to end, a training of its own).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from usjepa_nb.profile import END_TO_END, ROOT, read_yaml

FOLDER = ROOT / "grids"
CONTROLS = ("prior", "random", "initial", "imagenet", *END_TO_END)
FROZEN = ("vjepa", "vjepa_ll")  # methods that come once for each number of frozen blocks
TABLES = {"table1": {"lams", "frozen"}, "table2": {"controls", "methods", "lam", "frozen"}}


class GridError(ValueError):
    """A grid that cannot be run; the message names the file, the line and the remedy."""


@dataclass(frozen=True)
class Cell:
    """One encoder of a table; its fields are the arguments of `segment.segmentation`."""

    method: str
    lam: float = 1.0
    freeze: int = 0  # blocks

    @property
    def id(self) -> str:
        """Its name on command lines and in files, as `vjepa_ll-lam0.25-f2`."""
        return f"{self.method}-lam{self.lam:g}-f{self.freeze}" if self.method in FROZEN else self.method


@dataclass(frozen=True)
class Grid:
    """Cells of the two tables for an encoder of a certain depth."""

    name: str
    seeds: int
    fractions: tuple[int, ...]  # % of the training patients, falling
    lams: tuple[float, ...]  # of table 1, falling
    freezes: tuple[int, ...]  # of table 1, blocks
    table1: tuple[Cell, ...]
    table2: tuple[Cell, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every encoder once; those of table 1 first."""
        return tuple(dict.fromkeys(self.table1 + self.table2))

    def named(self, names: str) -> tuple[Cell, ...]:
        """The cells called `names` (divided by commas, by id or by method), or all of table 2.

        Raises:
            GridError: a name that the grid does not have.
        """
        if names == "all":
            return self.table2
        wanted = [n.strip() for n in names.split(",")]
        for n in wanted:
            if not any(n in (c.id, c.method) for c in self.cells):
                raise GridError(f"grid {self.name!r} has no cell {n!r}; it has {', '.join(c.id for c in self.cells)}")
        return tuple(c for c in self.cells if c.id in wanted or c.method in wanted)


def adapted(lam: float, freeze: int) -> Cell:
    """V-JEPA, with LL where lam < 1."""
    return Cell("vjepa_ll" if lam < 1 else "vjepa", lam, freeze)


def file(name: str) -> Path:
    """Where a grid lies: `grids/<name>.yaml`, or a YAML file of one's own."""
    return Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"


def read(name: str):
    """What the file of a grid holds, unchecked.

    Raises:
        GridError: no such file, or not YAML.
    """
    path = file(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise GridError(f"{path}: no such grid; choose one of {known}, or give the path of a YAML file")
    return read_yaml(path, GridError, "grids/paper.yaml")


def load(name: str, depth: int, initial: bool = True) -> Grid:
    """Read `grids/<name>.yaml`, or a YAML file of your own, for an encoder of `depth` blocks.

    Args:
        initial: whether V-JEPA starts from weights of its own; else the control "initial" is "random" and left out.

    Raises:
        GridError: no such file, not YAML, or an unknown, missing or impossible value.
    """
    path, values = file(name), read(name)
    see_keys(path, "", values, {"seeds", "fractions", *TABLES})
    for table, keys in TABLES.items():
        see_keys(path, table + ": ", values[table], keys)
    one, two = values["table1"], values["table2"]
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)  # noqa: E731
    see(path, "seeds", values["seeds"], lambda v: type(v) is int and v >= 1, "a whole number from 1")
    see_all(path, "fractions", values["fractions"], lambda v: type(v) is int and 1 <= v <= 100, "% in 1…100")
    see_all(path, "table1: lams", one["lams"], lambda v: number(v) and 0 <= v <= 1, "in 0…1")
    see(path, "table2: lam", two["lam"], lambda v: number(v) and 0 <= v < 1, "in 0…1, below 1")
    see_all(path, "table2: controls", two["controls"], CONTROLS.__contains__, f"among {', '.join(CONTROLS)}", none=True)
    methods = ("supervised", "videomae", "salt", *FROZEN)
    see_all(path, "table2: methods", two["methods"], methods.__contains__, f"among {', '.join(methods)}")
    blocks = {}
    for k, t in (("table1", one), ("table2", two)):
        shares = [share(path, k, v) for v in see_list(path, f"{k}: frozen", t["frozen"])]
        blocks[k] = tuple(dict.fromkeys(round(v * depth) for v in shares))
    lams = tuple(sorted(map(float, set(one["lams"])), reverse=True))
    left_out = FROZEN if initial else (*FROZEN, "initial")
    table2 = [Cell(m) for m in dict.fromkeys(two["controls"] + two["methods"]) if m not in left_out]
    table2 += [adapted(lam, f) for f in blocks["table2"] for m, lam in (("vjepa", 1.0), ("vjepa_ll", float(two["lam"])))
               if m in two["methods"]]
    return Grid(path.stem, values["seeds"], tuple(sorted(set(values["fractions"]), reverse=True)), lams,
                blocks["table1"], tuple(adapted(lam, f) for f in blocks["table1"] for lam in lams), tuple(table2))


def see_keys(path: Path, where: str, values, keys: set[str]) -> None:
    """See that a mapping has these keys and no other."""
    if not isinstance(values, dict) or values.keys() != keys:
        odd = sorted(map(str, values.keys() ^ keys)) if isinstance(values, dict) else [where or "everything"]
        raise GridError(f"{path}: {where}{', '.join(odd)} is unknown or missing; compare it with grids/paper.yaml")


def see(path: Path, key: str, value, right, words: str) -> None:
    if not right(value):
        raise GridError(f"{path}: {key} = {value!r} is not possible: it must be {words}")


def see_list(path: Path, key: str, values, none: bool = False) -> list:
    see(path, key, values, lambda v: isinstance(v, list) and (v or none), "a list that is not empty")
    return values


def see_all(path: Path, key: str, values, right, words: str, none: bool = False) -> None:
    for value in see_list(path, key, values, none):
        see(path, key, value, lambda v: not isinstance(v, list | dict) and right(v), words)


def share(path: Path, table: str, value) -> Fraction:
    """A share of the blocks as written, 0 or 1/2 or 0.5."""
    try:
        number = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        number = Fraction(-1)
    see(path, f"{table}: frozen", value, lambda v: 0 <= number <= 1, "a share in 0…1, as 1/2")
    return number
