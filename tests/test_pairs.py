"""Pairs: offsets are those of Eq. 2, units are worked out by hand, means and extremes are of the right pairs."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from usjepa_nb import losses, masking, pairs
from usjepa_nb.lens import Tokens
from usjepa_nb.profile import load

GRID = (2, 3, 5)
UNIT = {"frames": 4.0, "ms": 80.0, "y": 3.0, "x": 4.0}
AREA = 15




def located(rule="random", seed=0):
    """One clip whose tokens are their own positions, with padding or without."""
    masks = masking.multiblock(GRID, 2, torch.Generator().manual_seed(seed), blocks=2, scale=0.4, rule=rule)
    masks = masks.take(torch.tensor([0]))
    return Tokens(losses.position(masks.target, GRID) / torch.tensor(GRID), masks)


def knows(e1, e2):
    return e1 - e2


def some(true, predicted, first=None, second=None):
    n = len(true)
    at = [torch.zeros(n, dtype=torch.long) if v is None else torch.tensor(v) for v in (first, second)]
    return pairs.Pairs(*at, torch.tensor(true).float(), torch.tensor(predicted).float())


@pytest.mark.parametrize("rule", ["random", "pad"])
def test_true_offsets_are_eq_2_in_tokens_and_a_head_that_knows_makes_no_error(rule):
    tokens = located(rule)
    index = pairs.places(tokens)
    found = pairs.answer(knows, tokens, GRID, *pairs.every_pair(index))
    assert len(found.first) == len(index) * (len(index) - 1)
    torch.testing.assert_close(found.true, losses.delta(found.first, found.second, GRID) * torch.tensor(GRID))
    torch.testing.assert_close(found.predicted, found.true)
    assert found.error.max() < 1e-5


def test_an_offset_by_hand():
    index = torch.tensor([AREA + 1 * 5 + 4, 2 * 5 + 1])  # (1, 1, 4) and (0, 2, 1)
    tokens = Tokens(torch.zeros(1, 2, 3), SimpleNamespace(target=index[None], target_valid=None))
    found = pairs.answer(lambda a, b: torch.full((1, 3), 0.5), tokens, GRID, index[:1], index[1:])
    assert found.true.tolist() == [[1, -1, 3]]
    assert found.predicted.tolist() == [[1, 1.5, 2.5]]
    assert found.error.item() == pytest.approx((0 + 2.5 + 0.5) / 3)


def test_every_pair_meets_once_and_never_itself_and_many_are_sampled():
    index = torch.tensor([3, 7, 20, 11])
    both = list(zip(*(v.tolist() for v in pairs.every_pair(index)), strict=True))
    assert len(both) == len(set(both)) == 12 and all(a != b for a, b in both)
    assert {v for pair in both for v in pair} == {3, 7, 20, 11}
    drawn = list(zip(*(v.tolist() for v in pairs.every_pair(index, most=5)), strict=True))
    assert len(set(drawn)) == 5 and set(drawn) < set(both)


def test_the_nearest_token_is_of_the_same_slice_if_there_is_one():
    index = torch.tensor([AREA + 7, 0])
    assert pairs.nearest(index, 7, GRID) == 0  # (0, 1, 2): the slice counts more than the distance
    assert pairs.nearest(index, AREA + 14, GRID) == AREA + 7
    assert pairs.nearest(torch.tensor([AREA + 7]), 7, GRID) == AREA + 7


def lab_of(length, frame_rate, index):
    table = pd.DataFrame({"length": [length], "frame_rate": [frame_rate], "spacing_y": [0.5], "spacing_x": [0.75]})
    store = SimpleNamespace(table=table, clip=lambda *_: SimpleNamespace(index=np.array(index)))
    return SimpleNamespace(profile=load("smoke"), store=store, frames=len(index))


def test_units_by_hand():
    unit = pairs.one_token(lab_of(22, 50.0, [0, 7, 14, 21]), 0)  # tubelets of 2 frames, 7 apart, 20 ms each; 8 px
    assert unit == {"frames": 14, "ms": 280, "y": 4, "x": 6}
    unknown = pairs.one_token(lab_of(22, float("nan"), [0, 7, 14, 21]), 0)
    assert unknown["frames"] == 14 and math.isnan(unknown["ms"])
    only_ed_es = pairs.one_token(lab_of(2, 50.0, [0, 0, 1, 1]), 0)
    assert only_ed_es["frames"] == 1 and math.isnan(only_ed_es["ms"])


def test_lengths_in_the_image_leave_time_out():
    assert pairs.in_plane(torch.tensor([[9.0, 1.0, 1.0], [0.0, 0.0, 2.0]]), UNIT).tolist() == [5, 8]


def test_means_by_key_with_one_that_never_comes():
    mean = pairs.mean_by(torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0, 4.0]), 3)
    assert mean[[0, 2]].tolist() == [1, 3] and mean[1].isnan()


def test_the_numbers_of_one_pair():
    shown = pairs.numbers(some([[1, -1, 2]], [[1.5, -1, 1]]), UNIT)
    assert shown["error"].tolist() == ["+40 ms, +2.0 frames", "+0.0 mm", "-4.0 mm"]
    assert shown["true (tokens)"].tolist() == ["+1", "-1", "+2"]
    assert shown["error (tokens)"].tolist() == ["+0.50", "+0.00", "-1.00"]
    no_rate = pairs.numbers(some([[1, -1, 2]], [[1.5, -1, 1]]), UNIT | {"ms": float("nan")})
    assert no_rate["error"].iloc[0] == "+2.0 frames"


def test_extremes_are_the_largest_and_smallest_errors():
    off = [[0, 0, 0.3], [0, 0, 3], [0, 0, 0], [1.5, 0, 0]]
    listed = pairs.extremes(some([[0, 0, 0]] * 4, off, first=[16, 1, 2, 3]), GRID, UNIT, n=1)
    assert listed.index.tolist() == ["hardest 1", "easiest 1"]
    assert listed["first (t, y, x)"].tolist() == ["(0, 0, 1)", "(0, 0, 2)"]
    assert listed["error (tokens)"].tolist() == [1, 0]
    assert listed["in the image (mm)"].tolist() == [12, 0]


def test_maps_draw_what_answering_zero_and_the_head_cost():
    true, first = [[0, 0, 1], [0, 0, 1], [1, 0, 2]], [1, 1, AREA + 2]
    figure = pairs.error_maps(some(true, [[0, 0, 1], [0, 0, 2], [0.5, 0, 2]], first), GRID, UNIT)
    near, time, place = figure.axes[:3]
    assert near.lines[0].get_ydata().tolist() == [4, 8]  # mm: the distance itself
    assert near.lines[1].get_ydata().tolist() == [2, 0]
    assert time.lines[0].get_ydata().tolist() == [0, 4] and time.lines[1].get_ydata().tolist() == [0, 2]  # frames
    drawn = place.images[0].get_array()
    assert drawn[0, 1] == 2 and drawn[0, 2] == 0 and np.ma.masked_invalid(drawn).mask[2].all()
