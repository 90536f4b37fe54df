"""What holds the repository together: dependency lists that agree, clean files, one way to run the tests."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name):
    """Package names are equal up to case and ``-_.`` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines):
    """``{canonical name: version}``; every line must be an exact pin."""
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!-]+)", line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {canonical(match[1]): match[2] for match in matches}


def names(requirements):
    return {canonical(re.match(r"[A-Za-z0-9._-]+", line)[0]) for line in requirements}


def constraints():
    return pins((ROOT / "constraints.txt").read_text().splitlines())


def locked():
    """``{canonical name: its lines}`` of requirements.lock."""
    found = re.findall(r"^(?=[A-Za-z0-9])(?:.+\\\n)*.+$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    blocks = {canonical(re.match(r"[A-Za-z0-9._-]+", block)[0]): block for block in found}
    assert len(blocks) == len(found)
    return blocks


def tracked():
    """Files that are, or will be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("no git here")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts():
    return [(path, path.read_text()) for path in tracked() if b"\0" not in path.read_bytes()]


def test_conda_and_pip_users_get_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    options = [line for line in pip if line.startswith("-")]
    packages = pins([line for line in pip if not line.startswith("-")])
    assert environment["name"] == "usjepa-nb"
    assert "python=3.11" in conda and "pip" in conda
    assert options == ["-c constraints.txt", "-e ."]
    assert set(packages) == names(PROJECT["dependencies"])
    assert packages == {name: constraints()[name] for name in packages}


def test_pyproject_is_loose_and_everything_it_names_is_locked():
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    assert not [line for line in wanted if re.match(r"[^;]*(==|<)", line)]
    assert names(wanted) - {"torch"} <= set(locked()), "run `make lock`"


def test_every_locked_package_has_a_version_and_hashes_of_its_files():
    for name, block in locked().items():
        first, *hashes = re.split(r" \\\n *", block)
        assert re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.!]+( ; .+)?", first), first
        assert hashes and all(re.fullmatch(r" *--hash=sha256:[0-9a-f]{64}", line) for line in hashes), name


def test_constraints_are_the_lock_without_hashes_with_torch_and_torchvision_which_come_apart():
    versions = {name: re.match(r"[^=]+==([^ ]+)", block)[1] for name, block in locked().items()}
    assert constraints() == versions | {"torch": "2.13.0", "torchvision": "0.28.0"}
    assert not [name for name in constraints() if name.startswith(("nvidia", "cuda", "triton"))]


def test_set_up_takes_what_is_locked_by_its_hash_and_nothing_beside_it():
    makefile = (ROOT / "Makefile").read_text()
    recipes = [line for line in makefile.splitlines() if line.startswith("\t")]
    installs = [line for line in recipes if re.search(r"(PIP\)|pip) install", line)]
    assert "\t@$(PIP) install --require-hashes --no-deps -r requirements.lock" in installs
    assert "\t@$(PIP) install --no-deps --no-build-isolation -e ." in installs
    others = [line for line in installs if "requirements.lock" not in line and " -e ." not in line]
    assert others and all("-c constraints.txt" in line and ("torch" in line or line.endswith("uv; }"))
                          for line in others), others


def test_the_licence_of_every_locked_package_is_known():
    rows = re.findall(r"^\| ([a-z0-9-]+) \| ([^ |]+) \| ([^|]+?) \| ([^|]+?) \|$",
                      (ROOT / "dependencies" / "LICENCES.md").read_text(), re.MULTILINE)
    assert {row[0]: row[1] for row in rows[1:]} == constraints(), "run `make licences`"
    for name, _, licence, source in rows:
        assert licence.strip(" -") and licence.upper() not in ("UNKNOWN", "NONE", "OTHER") and source.strip(), name


def test_a_package_that_says_nothing_of_its_licence_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "dependencies"))
    monkeypatch.syspath_prepend(str(tmp_path))
    import licences

    for name, lines in (("silent", ""), ("spoken", "License-Expression: ISC\n"), ("old", "License: MIT\n"),
                        ("sorted", "Classifier: License :: OSI Approved :: BSD License\n"),
                        ("unknown", "License: UNKNOWN\n")):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\n"
                                                                     f"Version: 1.0\n{lines}\n")
    found = {name: licences.of(name) for name in ("silent", "spoken", "old", "sorted", "unknown", "absent")}
    assert found == {"silent": ("", ""), "spoken": ("ISC", "expression"), "old": ("MIT", "licence line"),
                     "sorted": ("BSD License", "classifier"), "unknown": ("", ""), "absent": ("", "")}


def test_every_import_is_declared():
    """A package that only comes along with another may go again."""
    distributions = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
    jupyter = {"nbformat", "nbclient", "jupyter_client", "traitlets", "IPython"}  # come with jupyterlab
    declared = names(PROJECT["dependencies"])
    for path in (ROOT / "usjepa_nb").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for name in {module.split(".")[0] for module in modules} - jupyter - {"usjepa_nb"}:
                known = name in sys.stdlib_module_names or canonical(distributions.get(name, name)) in declared
                assert known, f"{path.name} imports {name}, which pyproject.toml does not name"


def test_no_address_of_a_package_registry():
    """Where packages come from is the machine's configuration; the files name packages only."""
    forbidden = re.compile(r"--(extra-)?index(-url)?\b|--find-links|\bfile://\S*(?:simple|wheels|pypi)|"
                           r"\.(?:org|com|io)/simple|pythonhosted")
    setup = {"pyproject.toml", "requirements.lock", "constraints.txt", "environment.yml", "Makefile", "Snakefile",
             "run", "ci.yml", ".pre-commit-config.yaml"}
    for path, text in texts():
        if path.name in setup:
            assert "://" not in text, path
        if path.name != "test_repository.py":
            assert not forbidden.search(text), f"{path}: {forbidden.search(text)[0]}"


def test_no_path_of_one_machine():
    place = re.compile(r"(?<![\w.~/-])/(?:root|home|Users|work|opt|mnt)/\w+")
    for path, text in texts():
        if path.suffix != ".ipynb" and path.parent.name != "tests":
            assert not place.search(text), f"{path}: {place.search(text)[0]}"


def test_no_camus_file_and_nothing_large():
    for path in tracked():
        assert not path.name.endswith((".nii", ".nii.gz", ".mhd", ".raw", ".h5", ".hdf5", ".dcm")), path
        assert path.stat().st_size < (25e6 if path.parent.name == "weights" else 4e6), path


def test_the_cache_is_ignored_but_there():
    assert [path.name for path in tracked() if path.parent == ROOT / "data_cache"] == [".gitkeep"]


def test_modules_are_short():
    for path in (ROOT / "usjepa_nb").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) <= 220, f"{path.name}: {len(lines)} lines that are not blank"


def test_both_ci_files_call_make_test():
    assert "make --no-print-directory test" in (ROOT / ".ci" / "run").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert "make test" in [step.get("run") for step in workflow["jobs"]["test"]["steps"]]


def test_ruff_finds_nothing():
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    found = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_importing_the_package_is_cheap():
    code = "import sys, usjepa_nb; print(sorted({'torch', 'timm', 'numpy', 'torchvision'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_figure_does_not_wait_for_a_grammar_that_checks_nothing():
    code = "import usjepa_nb, plotly.io, nbformat, sys; print('jsonschema' in sys.modules, 'lark' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"


def test_timm_imports_after_the_package():
    code = "import usjepa_nb, timm, torchvision, torch; print(torch.ops.torchvision.nms)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "nms" in done.stdout, done.stderr


def test_operators_are_declared_only_where_the_extension_cannot_load(tmp_path):
    """A file that is no library stands for an extension that cannot load; torch's own library for one that can."""
    code = (
        "import torch, pathlib, sys, shutil; from usjepa_nb._torchvision import declare_operators\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "library = next((pathlib.Path(torch.__file__).parent / 'lib').glob('libshm.*'))\n"
        "(folder / '_C.so').symlink_to(library)\n"
        "print(declare_operators(folder))\n"
        "(folder / '_C.so').unlink(); (folder / '_C.so').write_text('broken')\n"
        "print(declare_operators(folder)); print(torch.ops.torchvision.qnms)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[:2] == ["False", "True"], done.stderr
