"""The fuzz targets themselves: their seeds, a short run of each kind, and every defect that fuzzing has found."""

import re

import pytest
from conftest import ROOT
from fuzz import run, targets
from hypothesis import given, settings
from hypothesis import strategies as st

TINY = (ROOT / "profiles" / "tiny.yaml").read_text()
SEEDS = {name: list(seeds()) for name, (_, seeds, _) in targets.TARGETS.items()}


def setting(key, value):
    """The profile tiny with one line changed."""
    return re.sub(rf"(?m)^{key}:.*$", f"{key}: {value}", TINY).encode()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_reach_the_reader(name):
    """Some are read, and none does what is not promised; what is empty is refused or read as empty."""
    target = targets.TARGETS[name][0]
    assert sum(target(data) for data in SEEDS[name]) >= 2
    target(b"")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(targets.TARGETS)), st.integers(0, 50), st.lists(
    st.tuples(st.integers(0, 2000), st.binary(max_size=6)), min_size=1, max_size=4), st.integers(0, 3000))
def test_damaged_seeds_are_read_or_refused(name, which, changes, length):
    """A few bytes replaced, the end cut off; without atheris this is all the fuzzing there is."""
    data = bytearray(SEEDS[name][which % len(SEEDS[name])])
    for at, new in changes:
        at %= len(data) + 1
        data[at:at + len(new)] = new
    targets.TARGETS[name][0](bytes(data[:max(1, length)] if length < 500 else data))


FOUND = [  # target, content: what once came through, or ended in another error
    ("profile", b"a: !!timestamp x"),  # AttributeError
    ("profile", b"a: !!bool x"),  # KeyError
    ("profile", b"a: !!int ''"),  # IndexError
    ("profile", b"a: !!float ''"),
    ("grid", b"a: !!timestamp x"),
    ("profile", setting("lr", "1" + "0" * 400)),  # OverflowError
    ("profile", setting("short_range", "[8, " + "9" * 400 + "]")),
    ("profile", b'"steps\\nx": 3'),  # two lines in one message
    ("cfg", b"ED: 1\nEF: in" + bytes(300) + b"f"),  # a page of quoted zeros
]


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found_is_refused_in_the_documented_way(name, data):
    assert targets.TARGETS[name][0](data) is (name == "cfg")  # of the cfg, ED is good


def test_a_reader_that_breaks_its_promise_is_noticed(monkeypatch):
    def careless(path):
        raise KeyError("header")

    monkeypatch.setattr(targets, "read_image", careless)
    with pytest.raises(KeyError):
        targets.nifti(b"x")
    with pytest.raises(AssertionError):
        targets.refused(ValueError("something is wrong"), targets.FOLDER / "file.nii")


def test_atheris_runs_a_target():
    pytest.importorskip("atheris")
    result = run.fuzz("lists", "-runs=200")
    assert result["executions"] >= 200 and result["crash"] == ""
