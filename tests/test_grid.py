"""A grid names every cell once, counts blocks for the encoder at hand, and refuses what cannot be run."""

import pytest
import yaml

from usjepa_nb import grid
from usjepa_nb.grid import Cell, GridError

GOOD = {"seeds": 2, "fractions": [10, 100], "table1": {"lams": [0.25, 1], "frozen": [0, "1/2"]},
        "table2": {"controls": ["random"], "methods": ["videomae", "vjepa", "vjepa_ll"], "lam": 0.5, "frozen": [0]}}


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "own.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)
    return write


def test_the_paper_grid_is_the_papers_with_our_ends_and_controls():
    g = grid.load("paper", 24)
    assert g.lams == (1, 0.9, 0.75, 0.5, 0.25, 0) and g.freezes == (0, 12, 16) and g.fractions == (100, 50, 20, 10)
    assert len(g.table1) == 18 and {(c.lam, c.freeze) for c in g.table1} == {(a, b) for a in g.lams for b in g.freezes}
    methods = [c for c in g.table2 if c.method not in grid.CONTROLS or c.method == "supervised"]
    assert len(methods) == 8 and {c.lam for c in methods} == {1, 0.25}
    assert {"prior", "random", "imagenet", "unet"} <= {c.method for c in g.table2}


@pytest.mark.parametrize("depth, blocks", [(24, (0, 12, 16)), (12, (0, 6, 8)), (4, (0, 2, 3)), (2, (0, 1))])
def test_shares_of_blocks_are_the_same_at_every_depth(depth, blocks):
    assert grid.load("paper", depth).freezes == blocks


def test_cells_stand_once_and_lambda_one_is_plain_vjepa(written):
    g = grid.load(written(GOOD), 4)
    assert g.table1 == (Cell("vjepa"), Cell("vjepa_ll", 0.25), Cell("vjepa", 1.0, 2), Cell("vjepa_ll", 0.25, 2))
    assert g.table2 == (Cell("random"), Cell("videomae"), Cell("vjepa"), Cell("vjepa_ll", 0.5))
    assert g.cells == g.table1 + (Cell("random"), Cell("videomae"), Cell("vjepa_ll", 0.5)) and g.seeds == 2
    assert [c.id for c in g.table1] == ["vjepa-lam1-f0", "vjepa_ll-lam0.25-f0", "vjepa-lam1-f2", "vjepa_ll-lam0.25-f2"]
    assert len({c.id for c in grid.load("paper", 24).cells}) == len(grid.load("paper", 24).cells)


def test_cells_are_called_by_id_or_method(written):
    g = grid.load(written(GOOD), 4)
    assert g.named("all") == g.table2 and g.named("random, vjepa-lam1-f2") == (Cell("vjepa", 1.0, 2), Cell("random"))
    assert g.named("vjepa") == (Cell("vjepa"), Cell("vjepa", 1.0, 2))
    with pytest.raises(GridError, match="no cell 'vjepa3'; it has vjepa-lam1-f0, "):
        g.named("random,vjepa3")


def test_initial_is_left_out_where_it_is_random():
    assert Cell("initial") in grid.load("walk", 4).table2 and Cell("initial") not in grid.load("walk", 4, False).table2


def changed(table, **values):
    return GOOD | {table: GOOD[table] | values} if table else GOOD | values


@pytest.mark.parametrize("content, message", [
    ("a: [", "is not readable as YAML"), ("[]", "everything is unknown or missing"), ("", "everything is unknown"),
    (changed("", seed=1), "own.yaml: seed is unknown or missing"), (changed("table1", lam=1), "table1: lam is unknown"),
    ({k: v for k, v in GOOD.items() if k != "table2"}, "table2 is unknown or missing"),
    (changed("", table1=3), "table1: "), (changed("", seeds=True), "seeds = True"),
    (changed("", seeds=0), "seeds = 0 is not possible: it must be a whole number"),
    (changed("", fractions=[]), r"fractions = \[\] is not possible: it must be a list"),
    (changed("", fractions=[0]), "fractions = 0 is not possible: it must be % in 1…100"),
    (changed("", fractions=[50.5]), "fractions = 50.5"), (changed("", fractions=[[5]]), r"fractions = \[5\]"),
    (changed("table1", lams=[1.5]), "table1: lams = 1.5 is not possible: it must be in 0…1"),
    (changed("table1", lams=[True]), "table1: lams = True"), (changed("table1", lams=0.5), "table1: lams = 0.5"),
    (changed("table1", frozen=["3/2"]), "table1: frozen = '3/2' is not possible: it must be a share"),
    (changed("table1", frozen=["1/0"]), "table1: frozen = '1/0'"),
    (changed("table1", frozen=["half"]), "frozen = 'half'"),
    (changed("table1", frozen=[None]), "frozen = None"), (changed("table2", frozen=[-1]), "table2: frozen = -1"),
    (changed("table2", lam=1), "table2: lam = 1 is not possible"), (changed("table2", lam="x"), "table2: lam = 'x'"),
    (changed("table2", controls=["ouija"]), "table2: controls = 'ouija' is not possible: it must be among prior, "),
    (changed("table2", controls=[{"a": 1}]), "table2: controls = {'a': 1}"),
    (changed("table2", methods=["random"]), "table2: methods = 'random' is not possible"),
])
def test_what_cannot_be_run_is_named(written, content, message):
    with pytest.raises(GridError, match=message):
        grid.load(written(content), 4)


def test_an_unknown_grid_lists_the_known():
    with pytest.raises(GridError, match="no such grid; choose one of paper, walk"):
        grid.load("papre", 4)
