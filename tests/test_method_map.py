"""The map names what exists, shows the shapes of the profile, and keeps its words inside its boxes."""

import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg

from usjepa_nb.method_map import ARROWS, BOXES, method_map
from usjepa_nb.profile import load


def texts(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


def test_every_box_names_a_notebook_and_modules_that_exist():
    for *_, where in BOXES.values():
        numbers, modules = where.split(" · ")
        for number in numbers.split(", "):
            assert list((ROOT / "notebooks").glob(f"{number}_*.ipynb")), where
        for module in modules.split(", "):
            assert (ROOT / "usjepa_nb" / f"{module}.py").is_file(), where


def test_every_arrow_joins_two_boxes_and_every_box_is_joined():
    assert {name for ends in ARROWS for name in ends} == set(BOXES)


def test_the_target_gets_weights_and_gives_features_and_nothing_flows_back():
    into = {start for start, end in ARROWS if end == "target"}
    assert into == {"clip", "context"} and ARROWS["context", "target"][0].startswith("EMA")
    assert not [end for start, end in ARROWS if start == "masks" and end == "target"]
    assert ("target", "frozen") in ARROWS and ("context", "frozen") not in ARROWS


@pytest.mark.parametrize("name", ["tiny", "small", "paper"])
def test_the_shapes_are_those_of_the_profile(name):
    profile = load(name)
    t, y, x = profile.grid()
    said = " ".join(text.get_text() for text in texts(method_map(profile)))
    assert f"[{profile.batch}, 1, {profile.frames}, {profile.size}, {profile.size}]" in said
    assert f"[{profile.batch}, {t * y * x}, {profile.width}]" in said
    assert not [letter for letter in "BTSND" if "{" + letter + "}" in said]


def test_boxes_are_apart_and_their_words_inside():
    figure = method_map(load("paper"))
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = {patch.get_gid(): patch.get_window_extent(renderer) for patch in figure.axes[0].patches if patch.get_gid()}
    assert set(boxes) == set(BOXES)
    for name, box in boxes.items():
        assert not [other for other in boxes if other != name and box.overlaps(boxes[other])], name
    for text in texts(figure):
        extent = text.get_window_extent(renderer)
        if text.get_gid():
            box = boxes[text.get_gid()]
            assert box.x0 < extent.x0 and extent.x1 < box.x1 and box.y0 < extent.y0 and extent.y1 < box.y1, text
        else:  # words on an arrow, titles
            assert not [name for name, box in boxes.items() if box.overlaps(extent)], text
