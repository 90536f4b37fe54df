"""Write the licence of every package that this one brings with it: `make licences` -> dependencies/LICENCES.md.

A package says it in its own metadata: as an SPDX expression, in a classifier, in a line of words, or in the first line
of its licence file, taken in this order. What no metadata say stands in `BY_HAND` and `ELSEWHERE`, read by a person.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, files, metadata
from pathlib import Path

from lock import ROOT, TORCH, blocks, version_of, write

OUT = Path(__file__).with_name("LICENCES.md")
# name: (licence, where it was read)
BY_HAND = {
    "imageio-ffmpeg": ("BSD-2-Clause; the ffmpeg program in its wheels: GPL-3.0-or-later", "metadata, `ffmpeg -L`"),
}
ELSEWHERE = {  # needed on other systems alone, so that their metadata are not at hand
    "appnope": ("BSD-2-Clause", "expression"),
    "colorama": ("BSD License", "classifier"),
    "httpx2-jsfetch": ("BSD-3-Clause", "expression"),
    "pyreadline3": ("BSD License", "classifier"),
    "pywinpty": ("MIT License", "classifier"),
}
HEADER = """# Licences of the dependencies

Written by `make licences` from the metadata of the packages in `requirements.lock`, and of torch and torchvision. With
`make setup TORCH=gpu` torch also brings NVIDIA's libraries (`nvidia-*`, `cuda-*`), which have NVIDIA's own licence
terms, and triton (MIT).

| package | version | licence | read from |
|---|---|---|---|
"""


def of(name: str) -> tuple[str, str]:
    """(licence, where it was read) of a package; ("", "") where nobody knows."""
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return ELSEWHERE.get(name, ("", ""))
    if name in BY_HAND:
        return BY_HAND[name]
    if expression := about.get("License-Expression"):
        return expression, "expression"
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or ()
                   if c.startswith("License :: ") and c != "License :: OSI Approved"]
    if classifiers:
        return "; ".join(dict.fromkeys(classifiers)), "classifier"
    words = (about.get("License") or "").strip()
    if words and words.upper() != "UNKNOWN" and "\n" not in words and len(words) < 100:
        return words, "licence line"
    for file in files(name) or ():
        if ".dist-info" in str(file) and re.search(r"licen[cs]e|copying", file.name, re.IGNORECASE):
            if first := next((line.strip() for line in file.read_text().splitlines() if line.strip()), ""):
                return first, "licence file"
    return "", ""


def table() -> list[tuple[str, str, str, str]]:
    """(package, version, licence, where it was read) of everything that is locked, torch and torchvision."""
    locked = {name: version_of(block) for name, block in blocks((ROOT / "requirements.lock").read_text()).items()}
    return [(name, version, *of(name)) for name, version in sorted((locked | TORCH).items())]


def main() -> int:
    """Write the file; returns the exit code, 1 where a licence is not known."""
    rows = table()
    write(OUT, HEADER + "".join(f"| {' | '.join(re.sub(r'[|]', '/', cell) for cell in row)} |\n" for row in rows))
    unknown = [row[0] for row in rows if not row[2]]
    if unknown:
        print(f"no licence is known of {', '.join(unknown)}: read it in the package's own files and add it to BY_HAND "
              f"(or ELSEWHERE) in {Path(__file__).name}, or do without the package", file=sys.stderr)
    return int(bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
