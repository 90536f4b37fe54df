"""The inspector: a click and a control lead to the same pair, and every checkpoint answers for itself."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from smoke_lab import smoke_lab

from usjepa_nb import figures, lens, losses, pairs
from usjepa_nb.widgets import inspector


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


@pytest.fixture(scope="module")
def runs(lab):
    return {lam: lab.encoder("vjepa_ll" if lam < 1 else "vjepa", lam) for lam in (0.25, 1.0)}


@pytest.fixture
def widget(lab, runs, monkeypatch):
    monkeypatch.delenv("USJEPA_EXERCISE", raising=False)
    return inspector.Inspector(lab, runs[0.25].folder, lab.store.rows("val")[:2])


def press(widget, t, y, x):
    """The message that a browser sends for a click on tubelet (t, y, x)."""
    points = {"trace_indexes": [t], "point_indexes": [[y, x]], "xs": [x], "ys": [y]}
    widget.strip._js2py_pointsCallback = {"event_type": "plotly_click", "points": points}


def where(widget, index):
    return losses.position(torch.tensor(index), widget.grid).tolist()


def test_two_clicks_make_a_pair(widget):
    first, second = (int(v) for v in widget.places[[0, -1]])
    press(widget, *where(widget, first))
    assert widget.chosen["first"] == first and widget.controls["click"].value == "second"
    press(widget, *where(widget, second))
    assert widget.chosen == {"first": first, "second": second} and widget.controls["click"].value == "first"
    assert widget.pair.true.tolist() == (losses.delta(torch.tensor([first]), torch.tensor([second]), widget.grid)
                                         * torch.tensor(widget.grid)).tolist()
    assert f"{widget.pair.true[0, 0]:+.0f}" in widget.numbers.value


def test_the_controls_reach_the_same_pair(widget):
    area = widget.grid[1] * widget.grid[2]
    index = int(widget.places[-1])
    widget.controls["second slice"].value = index // area
    widget.controls["second place"].value = index % area
    assert widget.chosen["second"] == index


def test_a_click_beside_the_located_tokens_takes_the_nearest_and_says_so(widget):
    visible = next(i for i in range(int(np.prod(widget.grid))) if i not in widget.places.tolist())
    press(widget, *where(widget, visible))
    assert widget.chosen["first"] == pairs.nearest(widget.places, visible, widget.grid)
    assert "nearest" in widget.message.value


def test_arrows_and_boxes_stand_where_the_pair_is(widget):
    widget.choose(first=int(widget.places[0]), second=int(widget.places[-1]))
    (_, y1, x1), (t2, y2, x2) = (where(widget, widget.chosen[m]) for m in ("first", "second"))
    true, predicted = (a for a in widget.strip.layout.annotations if a.axref not in (None, "pixel"))
    assert (true.ax, true.ay, true.x, true.y) == (x2, y2, x1, y1)
    assert true.xref == widget.strip.data[t2].xaxis
    assert (predicted.x - x2, predicted.y - y2) == pytest.approx(widget.pair.predicted[0, [2, 1]].tolist())
    first, second = widget.strip.layout.shapes
    assert (first.x0, first.y0, second.x0, second.y0) == (x1 - 0.5, y1 - 0.5, x2 - 0.5, y2 - 0.5)
    assert first.line.dash != second.line.dash  # colour is not the only difference


def test_any_checkpoint_of_the_profile_is_on_the_menu_with_its_own_weights(lab, runs, widget):
    found = inspector.checkpoints(lab)
    assert set(found.values()) >= {run.folder for run in runs.values()}
    assert list(found.values()).index(runs[1.0].folder) < list(found.values()).index(runs[0.25].folder)
    loaded = inspector.load(lab, runs[0.25].folder)
    for a, b in zip(loaded.state_dict().values(), runs[0.25].objective.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    before = widget.pairs.predicted
    widget.controls["checkpoint"].value = runs[1.0].folder
    assert "fresh" in widget.message.value and "fresh" not in widget.numbers.value
    assert widget.pairs.predicted.shape == before.shape and not torch.equal(widget.pairs.predicted, before)


def test_a_run_with_other_tokens_is_left_out(lab, runs):
    other = smoke_copy(lab, size=64)
    assert inspector.checkpoints(other) == {}
    with pytest.raises(ValueError, match="no finished V-JEPA run"):
        inspector.Inspector(other, lab.cache / "nothing", lab.store.rows("val")[:1])


def smoke_copy(lab, **changes):
    import copy

    other = copy.copy(lab)
    other.profile = lab.profile.replace(**changes)
    return other


@pytest.mark.parametrize(("ll_on", "asked"), [
    ("predicted", ("predicted", "predicted, encoder blanked")), ("context", ("context", "context, no image")),
    ("unplaced", ("context, no position", "context, neither"))])
def test_without_the_image_is_the_loss_own_question_without_it(ll_on, asked):
    assert inspector.sources(SimpleNamespace(p=SimpleNamespace(ll_on=ll_on))) == asked


def test_without_the_image_the_tokens_are_the_lens_blanked_ones(lab, runs, widget):
    widget.controls["source"].value = 1
    grey = torch.from_numpy(widget.frames[:1]).float()
    blanked = lens.tokens(runs[0.25].objective, grey, "predicted, encoder blanked", torch.Generator().manual_seed(0))
    torch.testing.assert_close(widget.tokens.values, blanked.values)


def test_another_clip_changes_maps_and_list(widget):
    before = widget.maps.value, widget.listing.value
    widget.controls["clip"].value = 1
    assert widget.maps.value == figures.png(pairs.error_maps(widget.pairs, widget.grid, widget.unit)) != before[0]
    assert widget.listing.value != before[1]


def test_an_error_reaches_the_learner_and_who_moved_the_control(widget, monkeypatch):
    def breaks(*_):
        raise RuntimeError("no <clip>")

    monkeypatch.setattr(inspector.lens, "tokens", breaks)
    with pytest.raises(RuntimeError, match="no <clip>"):
        widget.controls["clip"].value = 1
    assert "RuntimeError: no &lt;clip&gt;" in widget.message.value


def test_exercise_moves_everything_and_comes_back(lab, runs, monkeypatch):
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    clicked = []
    click = inspector.Inspector.click
    monkeypatch.setattr(inspector.Inspector, "click", lambda self, *at: (clicked.append(at), click(self, *at)))
    w = inspector.Inspector(lab, runs[0.25].folder, lab.store.rows("val")[:2])
    assert len(clicked) == 2
    assert w.controls["checkpoint"].value == runs[0.25].folder
    assert w.controls["clip"].value == 0
    assert set(w.heads) > {(runs[0.25].folder, "predicted")}
