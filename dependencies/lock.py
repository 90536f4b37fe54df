"""Write down the exact version of every package: `make lock` (UPGRADE=1 takes the newest that fit).

pyproject.toml says what is needed; uv works out the rest, for every system. Three files follow from that, and are not
edited by hand:

    requirements.lock   every package with the hashes of its files; what `make setup` installs
    constraints.txt     the same versions without hashes, and torch and torchvision, which come apart (CONTRIBUTING.md)
    environment.yml     its pip section: the direct dependencies

Versions stay as constraints.txt has them, unless asked otherwise.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = {"torch": "2.13.0", "torchvision": "0.28.0"}  # they go together; each machine takes its own build of them
GPU = ("nvidia-", "cuda-", "triton")  # what torch's CUDA build brings: `make setup TORCH=gpu` lets pip fetch it
TOOLS = ("pip", "setuptools", "uv")  # what set-up itself works with
HEADER = """# Every package, for every system, with the hashes of its files: `make lock` writes, `make setup` reads it.
# torch and torchvision come apart (CONTRIBUTING.md): their versions stand in constraints.txt.
"""


def write(path, text):
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def canonical(name):
    """Package names are equal up to case and ``-_.`` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def compiled(upgrade: bool) -> str:
    """What uv makes of pyproject.toml, both parts, with the tools of set-up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = "\n".join(f"{name}=={version}" for name, version in TORCH.items()) + "\n"
    if not upgrade:
        old = (ROOT / "constraints.txt").read_text().splitlines()
        known += "\n".join(line for line in old if canonical(line.partition("==")[0]) not in TORCH)
    part = ROOT / f".constraints.{os.getpid()}.part"
    part.write_text(known)
    command = ["uv", "pip", "compile", "pyproject.toml", "-", "--extra", "dev", "--constraints", str(part),
               "--universal", "--python-version", project["requires-python"].removeprefix(">="), "--quiet",
               "--generate-hashes", "--fork-strategy", "fewest", "--no-header", "--no-annotate"]
    try:
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, input="\n".join(TOOLS), text=True,
                              stdout=subprocess.PIPE)
    finally:
        part.unlink()
    if done.returncode:
        sys.exit("uv found no versions that fit together (above): loosen pyproject.toml, or take newer ones: "
                 "make lock UPGRADE=1")
    return done.stdout


def blocks(text: str) -> dict[str, str]:
    """{canonical name: its lines} of a file with hashes."""
    found = re.findall(r"^(?=[A-Za-z0-9])(?:.+\\\n)*.+$", text, re.MULTILINE)
    return {canonical(re.match(r"[A-Za-z0-9._-]+", block)[0]): block for block in found}


def version_of(block: str) -> str:
    return re.match(r"[^=]+==([^ ;\\]+)", block)[1]


def environment(text: str, versions: dict[str, str]) -> str:
    """environment.yml with the direct dependencies of pyproject.toml at these versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[A-Za-z0-9._-]+", line)[0] for line in project["dependencies"]]
    head, mark, _ = text.partition("      - -e .\n")
    return head + mark + "".join(f"      - {name}=={versions[canonical(name)]}\n" for name in names)


def main() -> None:
    packages = {name: block for name, block in blocks(compiled(os.environ.get("UPGRADE", "") == "1")).items()
                if name not in TORCH and not name.startswith(GPU)}
    versions = {name: version_of(block) for name, block in packages.items()} | TORCH
    write(ROOT / "requirements.lock", HEADER + "".join(f"{block}\n" for block in packages.values()))
    write(ROOT / "constraints.txt", "".join(f"{name}=={versions[name]}\n" for name in sorted(versions)))
    write(ROOT / "environment.yml", environment((ROOT / "environment.yml").read_text(), versions))
    print(f"requirements.lock: {len(packages)} packages")


if __name__ == "__main__":
    main()
