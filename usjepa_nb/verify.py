"""Is a summary what data, runs and code give? `python -m usjepa_nb.verify FILE [--data CAMUS]` compares.

The masks on disk are scored anew; nothing is trained, unless --redo makes everything again in a folder of its own.
Seconds, machine and code may differ, what they give may not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from usjepa_nb import manifest, tables

REMEDY = "give the summary.json of a `make run` or `make table1`"
MAY_DIFFER = {"seconds", "commit", "machine", "command", "code", "lock", "packages"}
SINCE = {"settings", "grid_settings", "threads"}  # an older summary has not got them


def check(path: Path, data: str = "", cache: str = "data_cache", redo: bool = False) -> list[str]:
    """What in a summary.json differs from what is on disk, a sentence each; empty where it all holds.

    Args:
        redo: make what is not on disk, from the settings that the summary holds; an empty `cache` makes everything.

    Raises:
        OSError, ValueError: the file cannot be read as a summary.
    """
    try:
        said = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: cannot be read as JSON ({e}); copy it again, or {REMEDY}") from e
    said = said if isinstance(said, dict) else {}
    if lacking := {"profile", "grid", "seeds", "data", "data_hash", "rows", "table1"} - set(said):
        raise ValueError(f"{path}: is no summary of this package, it lacks {', '.join(sorted(lacking))}; {REMEDY}")
    seeds = said["seeds"]
    if not (isinstance(seeds, list) and seeds and type(seeds[0]) is int):
        raise ValueError(f"{path}: seeds = {seeds!r} is no list of seeds, of one at least; {REMEDY}")
    with tempfile.TemporaryDirectory() as folder:
        lab, grid = manifest.restore(said, Path(folder), data, cache)
        elsewhere = bool(data) and lab.store.data_hash == said["data_hash"]  # the name tells where its folder lies
        if lab.data_name != said["data"] and not elsewhere:
            return [f"{path}: is about {said['data']}, and this is {lab.data_name}; name the data set with --data"]
        if redo:
            g = lab.grid(grid)
            tables.collect(lab, g.cells, g.fractions, g.seeds)
        found = json.loads(json.dumps(tables.summary(lab, grid)))
    plain = sorted(found.keys() - MAY_DIFFER - {"rows", "table1", *["data"] * elsewhere} - (SINCE - said.keys()))
    complaints = [f"{key}: {said.get(key)!r} is said, {found[key]!r} is found" for key in plain
                  if said.get(key) != found[key]]
    for key in ("rows", "table1"):
        complaints += differing(key, said[key], found[key])
    return complaints


def differing(key: str, said: list[dict], found: list[dict]) -> list[str]:
    """Rows of a table that are not the same, bit for bit; seconds apart."""
    name = lambda row: (row["cell"], row["fraction"], row["seed"])  # noqa: E731
    there, out = {name(row): row for row in found}, []
    for row in said:
        other = there.pop(name(row), None)
        what = "{}, {} % of the labels, seed {}".format(*name(row))
        if other is None:
            out.append(f"{key}: {what} is not on disk")
        elif changed := [k for k in row if k != "seconds" and row[k] != other.get(k)]:
            k = changed[0]
            out.append(f"{key}: {what}: {k} is {row[k]} in the file and {other.get(k)} on disk")
    return out + [f"{key}: {c}, {f} % of the labels, seed {s} is on disk and not in the file" for c, f, s in there]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m usjepa_nb.verify", description=__doc__.split("\n")[0])
    parser.add_argument("summary", type=Path, nargs="+")
    parser.add_argument("--data", default="", help="the CAMUS folder, where it is not the phantom")
    parser.add_argument("--cache", default="data_cache")
    parser.add_argument("--redo", action="store_true", help="make data, runs and table again from what the summary "
                        "says, in a temporary folder (or in --cache, what is not there yet)")
    a = parser.parse_args(argv)
    wrong = False
    for path in a.summary:
        try:
            with tempfile.TemporaryDirectory() as fresh:
                redone = fresh if a.redo and a.cache == parser.get_default("cache") else a.cache
                complaints = check(path, a.data, redone, a.redo)
        except (OSError, ValueError) as error:
            complaints = [str(error)]
        print(*complaints or [f"{path}: every number is what data, runs and code give"], sep="\n")
        wrong |= bool(complaints)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
