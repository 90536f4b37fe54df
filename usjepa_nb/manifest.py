"""What a table was made by, in enough words to make it again: settings, code, packages and the command.

`manifest` goes into every summary.json; `restore` turns it back into a lab and a grid, wherever the profile and the
grid of that name have gone since. `python -m usjepa_nb.verify FILE --redo` makes the table again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from usjepa_nb import grid
from usjepa_nb.profile import ROOT
from usjepa_nb.runs import Lab, write_text


def code() -> str:
    """A hash of the package's sources: unlike a commit it knows of changes that nobody has committed."""
    sha = hashlib.sha256()
    for path in sorted((ROOT / "usjepa_nb").rglob("*.py")):
        sha.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()


def packages() -> dict[str, str]:
    """What is installed in another version than constraints.txt says, as torch's CPU build (2.13.0+cpu)."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, wanted = line.partition("==")
        try:
            if (here := version(name)) != wanted:
                found[name] = here
        except PackageNotFoundError:  # for another system, or for developers
            pass
    return found


def command(lab: Lab, name: str) -> str:
    """What to type; of a CAMUS folder only its name, since its place is that of one machine."""
    words = ["make", "run"] if name == "walk" else ["make", "table1", "table2", f"GRID={Path(name).name}"]
    words += [f"PROFILE={lab.profile.name}"] + [f"DATA={Path(lab.data).name}"] * bool(lab.data)
    return " ".join(map(shlex.quote, words))


def manifest(lab: Lab, name: str = "walk") -> dict:
    """Settings of profile and grid, hashes of the code and of the list of packages, and the command."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(lab.profile).items()}
    del settings["name"]
    lock = ROOT / "requirements.lock"
    return {"command": command(lab, name), "settings": settings, "grid_settings": grid.read(name), "code": code(),
            "lock": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "", "packages": packages()}


def restore(said: dict, folder: Path, data: str = "", cache: str = "data_cache") -> tuple[Lab, str]:
    """The lab and the grid file of a summary, whose settings are written into `folder`.

    Raises:
        ValueError: the settings are not possible for this version of the package (ProfileError, GridError).
    """
    names = []
    for key, content in (("profile", "settings"), ("grid", "grid_settings")):
        if content not in said:  # an older summary: the profile and the grid of that name
            names.append(said[key])
            continue
        names.append(str(folder / f"{Path(said[key]).stem}-{key}" / f"{Path(said[key]).stem}.yaml"))
        Path(names[-1]).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(names[-1]), yaml.safe_dump(said[content], sort_keys=False))
    return Lab(names[0], data, cache, said["seeds"][0]), names[1]
