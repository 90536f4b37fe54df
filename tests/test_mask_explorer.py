"""The explorer shows the masks that training would draw, counts each token once, and shows what truncation starves."""

import dataclasses

import numpy as np
import pytest
import torch

from usjepa_nb import figures, masking
from usjepa_nb.widgets import mask_explorer
from usjepa_nb.widgets.mask_explorer import KINDS, Setting, counts, covered, picture, targets_by_slice, tokens

GRID, TUBELET = (4, 8, 6), (2, 4, 5)
INSIDE = torch.ones(6, *GRID, dtype=torch.bool)
INSIDE[:, :, :2, :2] = False
INSIDE = INSIDE.flatten(1)
CLIPS = np.random.default_rng(0).integers(3, 256, (4, 8, 32, 30), dtype=np.uint8)
CLIPS[..., :8, :10] = 0
EASY = {"scale": 0.1, "blocks": 3}


@pytest.fixture(autouse=True)
def at_rest(monkeypatch):
    monkeypatch.delenv("USJEPA_EXERCISE", raising=False)


def image(figure):
    """Pixels of a figure."""
    return figures.png(figure)


@pytest.mark.parametrize("rule", masking.RULES)
@pytest.mark.parametrize("sector", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_clip_shown_is_the_first_of_a_batch_of_masking(kind, sector, rule):
    setting = Setting(**EASY, rule=rule, sector=sector, seed=3)
    context, target, outside = tokens(setting, kind, GRID, INSIDE)
    how = {"allowed": INSIDE[:4] if sector else None, "rule": rule}
    g = torch.Generator().manual_seed(3)
    masks = (masking.tube(GRID, 4, g, ratio=0.9, **how) if kind == "tube"
             else masking.multiblock(GRID, 4, g, blocks=3, scale=0.1, **how))
    for index, valid, shown in ((masks.context, masks.context_valid, context),
                                (masks.target, masks.target_valid, target)):
        wanted = index[0] if valid is None else index[0][valid[0]]
        assert np.flatnonzero(shown).tolist() == wanted.tolist()
    assert outside.sum() == (16 if sector else 0)
    assert not (outside & (context | target)).any()


def test_every_slider_of_multiblock_reaches_it():
    first = tokens(Setting(**EASY), "multi-block", GRID, INSIDE)[1]
    for change in ({"blocks": 5}, {"scale": 0.3}, {"aspect": (3.0, 3.0)}, {"extent": 0.5}, {"seed": 1}):
        other = tokens(dataclasses.replace(Setting(**EASY), **change), "multi-block", GRID, INSIDE)[1]
        assert not np.array_equal(first, other), change
    few, many = (tokens(Setting(ratio=r), "tube", GRID, INSIDE)[1].sum() for r in (0.5, 0.9))
    assert few < many


def test_counts_by_hand():
    context, target, outside = (np.zeros((1, 2, 5), bool) for _ in range(3))
    context.flat[:2], target.flat[2:5], outside.flat[5:7] = True, True, True  # three of ten tokens cut away
    wanted = {"visible": 2, "hidden": 3, "outside": 2, "unused": 3, "share hidden": 3 / 8}
    assert counts(context, target, outside) == wanted


def test_truncation_starves_the_last_slice_and_the_other_rules_do_not():
    first, random, pad = (targets_by_slice(Setting(**EASY, batch=6), "multi-block", GRID, INSIDE, rule)
                          for rule in ("first", "random", "pad"))
    assert np.isclose(first[0], pad[0]) and first[-1] < 0.6 * pad[-1]
    assert np.ptp(pad) < 1e-9 and np.ptp(random) < 0.15 * random.mean()
    assert np.isclose(first.sum(), random.sum())  # both cut to the same number


def test_a_batch_of_one_loses_nothing():
    found = [targets_by_slice(Setting(**EASY, batch=1), "multi-block", GRID, INSIDE, rule) for rule in masking.RULES]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_covered_tokens_by_hand():
    frames = np.full((2, 4, 6), 255, np.uint8)
    context, target, outside = (np.zeros((2, 2, 2), bool) for _ in range(3))
    context[0], target[1], target[0, 0, 1], context[0, 0, 1] = True, True, True, False
    rgb = covered(frames, context, target, outside)
    assert rgb.shape == (4, 6 + 1 + 6, 3)
    orange = 0.25 + 0.75 * np.array(figures.to_rgba(figures.TOKEN_COLOURS["hidden"])[:3])
    assert np.allclose(rgb[:2, 3:6], orange) and np.allclose(rgb[:, 7:], orange)
    assert (rgb[2:, :7] == 1).all() and (rgb[:, :3] == 1).all()  # visible, and the gap


def test_pictures_follow_the_setting_and_name_their_counts():
    one = picture(CLIPS[0], INSIDE, TUBELET, Setting(**EASY))
    assert one.get_figwidth() <= 10
    assert image(one) == image(picture(CLIPS[0], INSIDE, TUBELET, Setting(**EASY)))
    assert image(one) != image(picture(CLIPS[0], INSIDE, TUBELET, Setting(**EASY, seed=1)))
    n = counts(*tokens(Setting(**EASY), "tube", GRID, INSIDE))
    written = {text.get_text() for ax in one.subfigs[1].axes for text in ax.texts}
    assert {str(n["visible"]), str(n["hidden"])} <= written


def test_long_clips_stand_in_two_rows():
    frames = np.repeat(CLIPS[0], 2, axis=0)  # eight time slices
    above = picture(frames, INSIDE.repeat(1, 2), TUBELET, Setting(**EASY)).subfigs[0]
    assert [len(ax.get_xticks()) for ax in above.axes] == [8, 8]
    assert len({round(ax.get_position().x0, 2) for ax in above.axes}) == 1


def test_an_impossible_setting_is_explained_where_the_clip_would_be():
    figure = picture(CLIPS[0], INSIDE, TUBELET, Setting(blocks=1, scale=1.0, aspect=(1.33, 1.34)))
    (message,) = (text.get_text() for text in figure.subfigs[0].axes[0].texts)
    assert "lower blocks or" in message
    assert figure.subfigs[0].axes[1].images  # the tube mask is still there


@pytest.mark.parametrize("call, said", [
    (lambda: Setting().draw("hexagon", GRID, torch.Generator(), INSIDE), "kind='hexagon' is unknown: choose one"),
    (lambda: Setting(batch=9).draw("tube", GRID, torch.Generator(), INSIDE), "batch=9, and there are 6 clips"),
])
def test_wrong_settings_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_controls_move_both_figures():
    box = mask_explorer.explorer(CLIPS, TUBELET, start=Setting(**EASY, batch=2))
    before, points = box.picture.value, len(box.solid.data[1].x)
    box.controls["scale"].value = 0.3
    assert box.picture.value != before and len(box.solid.data[1].x) != points
    setting = Setting(**EASY | {"scale": 0.3}, batch=2)
    n = counts(*tokens(setting, "multi-block", GRID, masking.sector_tokens(torch.from_numpy(CLIPS), TUBELET)))
    assert len(box.solid.data[1].x) == n["hidden"] and len(box.solid.data[2].x) == n["outside"]
    box.controls["solid_mask"].value = "tube"
    assert box.solid.layout.title.text == "tube"
    box.controls["seen_from"].value = "from above"
    assert box.solid.layout.scene.camera.eye.z == 2.2


def test_both_ends_of_all_controls_can_be_drawn(monkeypatch):
    monkeypatch.setattr(mask_explorer, "picture", lambda *_: figures.Figure(figsize=(1, 1)))
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    mask_explorer.explorer(CLIPS, TUBELET, start=Setting(**EASY, batch=2))
