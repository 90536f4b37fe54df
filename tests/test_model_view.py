"""The view is what a training batch holds; repeats, phases, sector and mirror are what they are called."""

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from smoke_lab import smoke_lab

from usjepa_nb import augment, clips, figures, masking
from usjepa_nb.camus import UNLABELLED
from usjepa_nb.widgets import model_view
from usjepa_nb.widgets.model_view import cavity, picture, see, side, view


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


@pytest.fixture(autouse=True)
def at_rest(monkeypatch):
    monkeypatch.delenv("USJEPA_EXERCISE", raising=False)


@pytest.mark.parametrize("augmentation", ["mild", "published", "none"])
def test_the_view_is_the_one_of_the_training_batches(tmp_path_factory, augmentation):
    """A batch draws its row and the offset first; from there on both have the same generator."""
    lab = smoke_lab(tmp_path_factory, augmentation=augmentation)
    p, row = lab.profile, lab.store.rows("train")[2:3]
    batch = lab.batches(row)(generator(4), 1)
    g = generator(4)
    torch.randint(1, (1,), generator=g)
    clip = lab.store.clip(int(row[0]), lab.frames, p.clip_rule, p.frame_step, float(torch.rand((), generator=g)))
    assert torch.equal(view(clip.frames, augmentation, g)[0], batch)


def test_the_input_is_the_standardised_view_with_its_sector(lab):
    row = int(lab.store.rows("train")[1])
    seen = see(lab, row, "cover", offset=0.3, augmentation="mild", seed=7)
    grey, _ = view(lab.store.clip(row, lab.frames, "cover", offset=0.3).frames, "mild", generator(7))
    assert np.array_equal(seen.x, augment.standardise(grey)[0, 0].numpy())
    assert np.array_equal(seen.inside.ravel(), masking.sector_tokens(grey, lab.profile.tubelet_size)[0].numpy())


def test_repeats_and_phases_are_those_of_the_clip_index(lab):
    row = int(lab.store.rows("train")[0])
    length = int(lab.store.table.length[row])
    for rule, step, offset in (("step", 8, 0.0), ("step", 1, 0.0), ("cover", 4, 0.5)):
        seen = see(lab, row, rule, step, offset)
        assert np.array_equal(seen.index, clips.clip_index(length, lab.frames, rule, step, offset))
        assert (~seen.repeated).sum() == len(set(seen.index)) and not seen.repeated[0]
        assert np.allclose(seen.phase, 100 * seen.index / (length - 1))
    whole = see(lab, row, "cover").phase
    assert whole[0] == 0 and whole[-1] == 100


def test_mirrored_views_are_found(lab):
    frames = np.zeros((2, 24, 24), np.uint8)
    frames[:, :, :4] = 200  # something on the left alone
    found = set()
    for seed in range(12):
        wide = augment.crop_and_flip(torch.from_numpy(frames)[None], generator(seed),
                                     scale=(1.0, 1.0), ratio=(1.0, 1.0))[0, 0]  # the same flips, nothing cropped
        _, mirrored = view(frames, "published", generator(seed))
        assert mirrored == bool(wide[:, -4:].mean() > wide[:, :4].mean())
        found.add(mirrored)
    assert found == {False, True}
    assert not view(frames, "mild", generator())[1] and not view(frames, "none", generator())[1]


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="augmentation='wild' is unknown: choose one of none, mild, published"):
        view(np.zeros((2, 8, 8), np.uint8), "wild", generator())


def test_cavity_and_side_by_hand():
    masks = np.zeros((3, 4, 10), np.uint8)
    masks[0, 1:3, 6:8], masks[2] = 1, UNLABELLED
    assert np.allclose(cavity(masks, (5.0, 2.0)), [0.4, 0, np.nan], equal_nan=True)
    assert side(masks[0]) == 70 and side(masks[0][:, ::-1]) == 30 and np.isnan(side(masks[1]))


def texts(figure):
    return " | ".join(text.get_text() for text in figure.findobj(Text))


def test_the_picture_names_repeats_sector_and_sides(lab):
    row = int(lab.store.rows("train")[0])
    seen, length = see(lab, row, "step", 30), int(lab.store.table.length[row])
    figure = picture(lab, row, "step", 30)
    said = texts(figure)
    assert figure.get_figwidth() <= 10
    assert f"{len(set(seen.index))} of {lab.frames} frames distinct" in said
    assert f"{seen.inside.mean():.0%} of the tokens in the sector" in said
    assert said.count(" again") - said.count("frame again") == seen.repeated.sum() > 0
    assert f"{length - 1} again" in said and "0: 0 %" in said
    left = side(lab.store.masks(row)[0])
    assert f"stored: LV centre at {left:.0f} %" in said and f"flipped: LV centre at {100 - left:.0f} %" in said


@pytest.mark.parametrize("column, value", [("frame_rate", np.nan), ("ed_es_only", True)])
def test_a_sequence_without_masks_or_known_times_is_drawn_on_frames(lab, monkeypatch, column, value):
    row = int(lab.store.rows("train")[0])
    table = lab.store.table.copy()
    assert "time (ms)" in texts(picture(lab, row))
    table[column] = value
    monkeypatch.setitem(lab.store.__dict__, "table", table)
    monkeypatch.setattr(lab.store, "masks", lambda i: np.full_like(lab.store.frames(i), UNLABELLED))
    said = texts(picture(lab, row))
    assert "frame of the sequence" in said and "LV cavity" not in said and "LV centre" not in said


def test_controls_move_the_picture(lab):
    rows = lab.store.rows("train")[:3]
    box = model_view.explorer(lab, rows, "none")
    assert [value for _, value in box.controls["row"].options] == rows.tolist()
    assert isinstance(box.controls["row"], ipywidgets.Dropdown)
    box.controls["rule"].value = "step"
    box.controls["row"].value = int(rows[2])
    step = box.controls["step"].value
    assert box.picture.value == figures.png(picture(lab, int(rows[2]), "step", step, 0, "none", 0))


def test_both_ends_of_all_controls_can_be_drawn(lab, monkeypatch):
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    monkeypatch.setattr(figures, "png", lambda figure: b"")
    model_view.explorer(lab, lab.store.rows("train"))
