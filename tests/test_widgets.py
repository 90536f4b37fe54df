"""Controls move the picture, errors reach whoever moved them, and nothing stays open."""

import ipywidgets
import numpy as np
import pytest

from usjepa_nb import charts, figures, widgets

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 20), dtype=np.uint8)
MASKS = np.zeros_like(FRAMES)
MASKS[:, 3:9, 4:10] = 1


def one_frame(frame, masked=True):
    return figures.clip_strip(FRAMES[frame : frame + 1], MASKS[frame : frame + 1] if masked else None)


def breaks_at_four(frame):
    if frame == 4:
        raise RuntimeError("no <frame>\n  four")
    return one_frame(frame)


@pytest.fixture(autouse=True)
def at_rest(monkeypatch):
    monkeypatch.delenv("USJEPA_EXERCISE", raising=False)


def test_moving_a_control_changes_the_picture():
    box = widgets.explore(one_frame, frame=(0, 4), masked=True)
    box.controls["frame"].value = 0
    first = box.picture.value
    assert first == figures.png(one_frame(0))
    box.controls["frame"].value = 3
    assert box.picture.value == figures.png(one_frame(3)) != first
    box.controls["masked"].value = False
    assert box.picture.value == figures.png(one_frame(3, False))


def test_controls_are_what_ipywidgets_makes_of_them():
    own = ipywidgets.BoundedIntText(1, 0, 3, description="mine")
    controls = {"some_number": (0, 4), "share": (0.0, 1.0, 0.1), "menu": ["a", "b"], "tick": True, "own": own}
    box = widgets.explore(lambda **values: one_frame(0), **controls)
    kinds = [ipywidgets.IntSlider, ipywidgets.FloatSlider, ipywidgets.Dropdown, ipywidgets.Checkbox]
    assert [type(widget) for widget in box.controls.values()] == [*kinds, ipywidgets.BoundedIntText]
    descriptions = [widget.description for widget in box.controls.values()]
    assert descriptions == ["some number", "share", "menu", "tick", "mine"]


def test_a_control_that_is_none_is_refused_by_name():
    with pytest.raises(ValueError, match="frame=None is no control"):
        widgets.explore(one_frame, frame=None)


def test_an_error_reaches_the_setter_and_the_learner():
    box = widgets.explore(breaks_at_four, frame=(0, 4))
    before = box.picture.value
    with pytest.raises(RuntimeError, match="four"):
        box.controls["frame"].value = 4
    assert "RuntimeError: no &lt;frame&gt; four" in box.message.value  # one line, not markup
    assert box.picture.value == before
    box.controls["frame"].value = 1
    assert box.message.value == ""
    assert box.picture.value == figures.png(one_frame(1))


def test_an_error_in_the_first_picture_stops_the_cell():
    with pytest.raises(RuntimeError, match="four"):
        widgets.explore(breaks_at_four, frame=ipywidgets.IntSlider(4, 0, 4))


def test_exercise_finds_an_error_at_an_end_that_nobody_moved_to(monkeypatch):
    widgets.explore(breaks_at_four, frame=(0, 4))  # quiet: starts in the middle
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    with pytest.raises(RuntimeError, match="four"):
        widgets.explore(breaks_at_four, frame=(0, 4))


def test_exercise_visits_both_ends_of_every_control_and_comes_back(monkeypatch):
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    seen = []

    def note(**values):
        seen.append(values)
        return one_frame(0)

    box = widgets.explore(
        note,
        number=(1, 9),
        span=ipywidgets.IntRangeSlider(value=(2, 5), min=0, max=7),
        menu=[("one", 10), ("two", 20), ("three", 30)],
        several=ipywidgets.SelectMultiple(options=["a", "b", "c"], value=["b"]),
        tick=False,
        text="left alone",
    )
    reached = {name: [values[name] for values in seen] for name in box.controls}
    assert {1, 9} <= set(reached["number"])
    assert {(0, 0), (7, 7)} <= set(reached["span"])
    assert {10, 30} <= set(reached["menu"])
    assert {("a",), ("c",)} <= set(reached["several"])
    assert {False, True} == set(reached["tick"])
    assert set(reached["text"]) == {"left alone"}
    assert seen[-1] == seen[0]


def test_plotly_figures_are_shown_without_figure_widgets():
    hidden = np.zeros((2, 3, 4), bool)
    hidden[0] = True

    def grid(flip):
        return charts.token_grid3d(hidden, ~hidden) if flip else charts.token_grid3d(~hidden, hidden)

    box = widgets.explore(grid, flip=False)
    (before,) = box.picture.outputs
    box.controls["flip"].value = True
    (after,) = box.picture.outputs
    assert before["data"].keys() == {"application/vnd.plotly.v1+json"}
    assert before != after


def test_pyplot_figures_are_closed():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()

    def learners(n):
        figure, ax = plt.subplots()
        ax.plot([0, n])
        return figure

    box = widgets.explore(learners, n=(0, 5))
    first = box.picture.value
    box.controls["n"].value = 5
    assert plt.get_fignums() == before
    assert box.picture.value != first


def test_scrub_shows_the_overlay_of_each_frame(monkeypatch):
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    reference = np.stack([np.roll(mask, i, 1) for i, mask in enumerate(MASKS)])
    box = widgets.scrub(FRAMES, MASKS, reference, (0.5, 0.4), titles=["ED", "1", "2", "3", "ES"])
    box.controls["frame"].value = 4
    box.controls["opacity"].value = 0.25
    wanted = figures.overlay(FRAMES[4], MASKS[4], reference[4], (0.5, 0.4), 0.25, "ES")
    assert box.picture.value == figures.png(wanted)
    assert (box.controls["frame"].min, box.controls["frame"].max) == (0, 4)
