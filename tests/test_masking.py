"""What is hidden and what is predicted, on grids that are not square."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from usjepa_nb import masking
from usjepa_nb.masking import Masks, multiblock, rectangle, sector, sector_tokens, tube

FAST = settings(max_examples=60, deadline=None, derandomize=True)
GRIDS = st.tuples(st.integers(1, 4), st.integers(3, 8), st.integers(3, 8))
SEEDS = st.integers(0, 10_000)
SHORT, LONG = {"blocks": 8, "scale": 0.15}, {"blocks": 2, "scale": 0.7}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def allowed_tokens(grid, batch, seed):
    """A random sector for each clip, the same at every time; two opposite corners always belong to it."""
    floor = torch.rand(batch, grid[1] * grid[2], generator=generator(seed)) < 0.8
    floor[:, [0, -1]] = True
    return floor.repeat(1, grid[0])


def draw(kind, grid, batch, seed, rule, allowed=None):
    if kind == "tube":
        return tube(grid, batch, generator(seed), ratio=0.6, allowed=allowed, rule=rule)
    return multiblock(grid, batch, generator(seed), blocks=2, scale=0.2, allowed=allowed, rule=rule)


def sets(index, valid):
    """One set of real tokens per clip."""
    valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    return [set(i[v].tolist()) for i, v in zip(index, valid, strict=True)]


KINDS = st.sampled_from(["multiblock", "tube"])


@FAST
@given(KINDS, GRIDS, st.integers(1, 5), SEEDS, st.booleans())
def test_pad_keeps_every_token_once(kind, grid, batch, seed, everywhere):
    allowed = None if everywhere else allowed_tokens(grid, batch, seed)
    masks = draw(kind, grid, batch, seed, "pad", allowed)
    wanted = sets(torch.arange(math.prod(grid)).expand(batch, -1), allowed)
    context, target = sets(masks.context, masks.context_valid), sets(masks.target, masks.target_valid)
    for b in range(batch):
        assert context[b] and target[b]
        assert not context[b] & target[b]
        assert context[b] | target[b] == wanted[b]
        assert len(context[b]) == masks.context_valid[b].sum() and len(target[b]) == masks.target_valid[b].sum()
    # no column of padding alone, and padding only behind what is real
    assert masks.context_valid.any(0).all() and masks.target_valid.any(0).all()
    for valid in (masks.context_valid, masks.target_valid):
        assert (valid[:, :-1] >= valid[:, 1:]).all()
    assert masks.valid.shape[1] == masks.context.shape[1] + masks.target.shape[1]
    assert torch.equal(masks.valid, torch.cat([masks.context_valid, masks.target_valid], 1))


@FAST
@given(KINDS, GRIDS, st.integers(1, 5), SEEDS, st.booleans(), st.sampled_from(["random", "first"]))
def test_cut_rules_keep_as_many_tokens_as_the_smallest_clip_has(kind, grid, batch, seed, everywhere, rule):
    allowed = None if everywhere else allowed_tokens(grid, batch, seed)
    padded, cut = (draw(kind, grid, batch, seed, r, allowed) for r in ("pad", rule))
    assert cut.context_valid is None and cut.target_valid is None and cut.valid is None
    for name in ("context", "target"):
        index, whole, valid = getattr(cut, name), getattr(padded, name), getattr(padded, name + "_valid")
        assert index.shape == (batch, int(valid.sum(1).min()))
        for kept, every in zip(sets(index, None), sets(whole, valid), strict=True):
            assert len(kept) == index.shape[1] and kept <= every
        if rule == "first":
            assert torch.equal(index, whole[:, :index.shape[1]])


@FAST
@given(KINDS, GRIDS, st.integers(1, 4), SEEDS, st.sampled_from(masking.RULES))
def test_indices_are_sorted_and_within_the_grid(kind, grid, batch, seed, rule):
    masks = draw(kind, grid, batch, seed, rule)
    for index, valid in ((masks.context, masks.context_valid), (masks.target, masks.target_valid)):
        assert index.dtype == torch.int64 and index.min() >= 0 and index.max() < math.prod(grid)
        for b in range(batch):
            row = index[b] if valid is None else index[b][valid[b]]
            assert (row.diff() > 0).all()


@FAST
@given(KINDS, GRIDS, st.integers(1, 4), SEEDS, st.sampled_from(masking.RULES))
def test_same_generator_same_mask_whatever_the_global_seed(kind, grid, batch, seed, rule):
    first, before = draw(kind, grid, batch, seed, rule), torch.get_rng_state()
    torch.rand(7)
    second = draw(kind, grid, batch, seed, rule)
    torch.set_rng_state(before)
    draw(kind, grid, batch, seed, rule)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.context, second.context) and torch.equal(first.target, second.target)


@pytest.mark.parametrize("kind", ["multiblock", "tube"])
def test_clips_and_seeds_differ(kind):
    masks = [draw(kind, (2, 7, 9), 2, seed, "pad").target for seed in range(2)]
    assert not torch.equal(masks[0][0], masks[0][1]) and not torch.equal(masks[0], masks[1])


# --- multi-block -----------------------------------------------------------------------------------------------------

@FAST
@given(GRIDS, st.integers(1, 5), SEEDS, st.floats(0.1, 0.6))
def test_one_block_is_a_solid_rectangle_through_the_whole_clip(grid, batch, seed, scale):
    t, y, x = grid
    masks = multiblock(grid, batch, generator(seed), blocks=1, scale=scale, rule="pad")
    hidden = torch.zeros(batch, t * y * x, dtype=torch.bool)
    for b, tokens in enumerate(sets(masks.target, masks.target_valid)):
        hidden[b, list(tokens)] = True
    hidden = hidden.view(batch, t, y, x)
    assert (hidden == hidden[:, :1]).all()
    sizes = set()
    for floor in hidden[:, 0]:
        rows, cols = floor.any(1).nonzero().flatten(), floor.any(0).nonzero().flatten()
        h, w = int(rows[-1] - rows[0] + 1), int(cols[-1] - cols[0] + 1)
        assert int(floor.sum()) == h * w  # solid
        sizes.add((h, w))
    assert len(sizes) == 1  # one size per batch


def test_blocks_have_the_area_and_the_aspect_ratios_of_v_jepa():
    grid, areas, ratios = (1, 90, 120), [], []
    for seed in range(200):
        masks = multiblock(grid, 1, generator(seed), blocks=1, scale=0.15, rule="pad")
        place = masks.target[0]
        h, w = (int(v.max() - v.min() + 1) for v in (place // 120, place % 120))
        areas.append(h * w / (90 * 120))
        ratios.append(h / w)
    assert np.allclose(areas, 0.15, rtol=0.04)
    assert 0.75 * 0.97 < min(ratios) < 0.8 and 1.45 < max(ratios) < 1.5 * 1.03


def test_masks_hide_as_much_as_the_published_collator():
    """FACTS of the published code on 8 × 14 × 14: 72-77 % of the tokens used at batch 24, 85-86 % at batch 4."""
    for batch, low, high in ((24, 0.70, 0.79), (4, 0.84, 0.87)):
        for size in (SHORT, LONG):
            g = generator(0)
            used = [masks.context.shape[1] + masks.target.shape[1] for masks in
                    (multiblock((8, 14, 14), batch, g, rule="first", **size) for _ in range(200))]
            assert low < np.mean(used) / 1568 < high


def per_slice(rule, batch, draws):
    """Mean number of short-range targets in each of 8 time slices."""
    g, count = generator(0), torch.zeros(8)
    for _ in range(draws):
        masks = multiblock((8, 14, 14), batch, g, rule=rule, **SHORT)
        count += torch.bincount((masks.target // 196).flatten(), minlength=8) / batch / draws
    return count


@pytest.mark.parametrize("batch, last", [(4, 45), (24, 11)])
def test_first_drops_the_latest_tubelets_as_published(batch, last):
    """The published code keeps 123 (122) targets in the first slice and 45 (11) in the last, at batch 4 (24)."""
    count = per_slice("first", batch, 100)
    assert count[0] == pytest.approx(123, abs=3) and count[-1] == pytest.approx(last, abs=4)
    assert (count.diff() <= 0).all()


def test_random_favours_no_time():
    count = per_slice("random", 4, 100)
    assert float(count.max() / count.min()) < 1.02


def test_random_favours_no_place():
    """Of the tokens that could be kept, the early and the late half of each slice are kept equally often."""
    chosen = torch.zeros(2, 1000, dtype=torch.bool)
    chosen[0], chosen[1, ::10] = True, True
    g = generator(0)
    kept = torch.stack([rectangle(chosen, "random", g)[0][0] for _ in range(200)])
    halves = torch.bincount((kept >= 500).long().flatten())
    assert abs(float(halves[0] / halves.sum()) - 0.5) < 0.02


def test_clips_without_context_or_target_are_drawn_again():
    """A block of 2 × 2 on a 3 × 3 floor whose sector is one row and one corner often hides all or nothing of it."""
    allowed = torch.zeros(40, 9, dtype=torch.bool)
    allowed[:, :2] = True
    masks = multiblock((1, 3, 3), 40, generator(0), blocks=1, scale=0.4, allowed=allowed, rule="pad")
    assert masks.context_valid.any(1).all() and masks.target_valid.any(1).all()


def test_blocks_that_leave_no_context_are_refused():
    with pytest.raises(ValueError, match=r"1 blocks of scale 1.0 on a 3×5 grid .* lower blocks or scale"):
        multiblock((2, 3, 5), 1, generator(), blocks=1, scale=1.0, aspect=(0.6, 0.6))


def test_unknown_rule_names_the_known_ones():
    with pytest.raises(ValueError, match="rule='last' is unknown: choose one of random, first, pad"):
        multiblock((2, 4, 4), 1, generator(), blocks=1, scale=0.3, rule="last")


def test_rectangle_by_hand():
    chosen = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]]).bool()
    assert rectangle(chosen, "first", generator())[0].tolist() == [[1, 2], [0, 4]]
    index, valid = rectangle(chosen, "pad", generator())
    assert index[0].tolist() == [1, 2, 4] and index[1, :2].tolist() == [0, 4]
    assert valid.tolist() == [[True, True, True], [True, True, False]]


def test_moving_masks_keeps_what_is_not_padded():
    index = torch.arange(3)[None]
    assert Masks(index, index).to("cpu").valid is None
    moved = Masks(index, index, index > 0, index > 1).to("meta")
    assert {v.device.type for v in vars(moved).values()} == {"meta"}


def test_swapped_masks_exchange_context_and_target_with_their_padding():
    masks = draw("multiblock", (2, 5, 7), 3, 0, "pad", allowed_tokens((2, 5, 7), 3, 0))
    other = masks.swapped()
    assert other.context is masks.target and other.target is masks.context
    assert other.context_valid is masks.target_valid and other.target_valid is masks.context_valid
    assert vars(other.swapped()) == vars(masks)
    cut = draw("tube", (2, 5, 7), 3, 0, "random").swapped()
    assert cut.valid is None and cut.context.shape[1] > cut.target.shape[1]  # 60 % of the places were hidden


# --- tube ------------------------------------------------------------------------------------------------------------

@FAST
@given(GRIDS, st.integers(1, 4), SEEDS, st.sampled_from([0.25, 0.5, 0.75, 0.9]), st.sampled_from(masking.RULES))
def test_tube_hides_the_same_share_at_every_time(grid, batch, seed, ratio, rule):
    t, y, x = grid
    masks = tube(grid, batch, generator(seed), ratio=ratio, rule=rule)
    count = min(max(1, int(y * x * ratio)), y * x - 1)
    assert masks.target.shape == (batch, t * count) and masks.context.shape == (batch, t * (y * x - count))
    for row in masks.target:
        slices = row.view(t, count)
        assert torch.equal(slices % (y * x), (slices[:1] % (y * x)).expand(t, -1))
        assert torch.equal(slices // (y * x), torch.arange(t)[:, None].expand(-1, count))


def test_tube_of_the_paper_hides_176_of_196():
    assert tube((8, 14, 14), 1, generator()).target.shape == (1, 8 * 176)


def test_tube_ratio_is_of_the_sector():
    allowed = torch.zeros(2, 40, dtype=torch.bool)
    allowed[0, :10], allowed[1, 10:30] = True, True
    masks = tube((1, 5, 8), 2, generator(), ratio=0.9, allowed=allowed, rule="pad")
    assert masks.target_valid.sum(1).tolist() == [9, 18] and masks.context_valid.sum(1).tolist() == [1, 2]


@pytest.mark.parametrize("ratio, hidden", [(0.0, 1), (1.0, 23)])
def test_tube_always_hides_and_shows_something(ratio, hidden):
    assert tube((1, 4, 6), 1, generator(), ratio=ratio).target.shape == (1, hidden)


def test_tube_reaches_every_place():
    seen = torch.cat([tube((1, 4, 6), 8, generator(s), ratio=0.5).target.flatten() for s in range(5)])
    assert torch.bincount(seen, minlength=24).min() > 0


def test_tube_on_a_single_place_is_refused():
    allowed = torch.zeros(1, 18, dtype=torch.bool)
    allowed[0, [4, 13]] = True
    with pytest.raises(ValueError, match="1 places in the sector, a tube mask needs 2"):
        tube((2, 3, 3), 1, generator(), allowed=allowed)


# --- sector ----------------------------------------------------------------------------------------------------------

def test_dark_blood_inside_the_sector_belongs_to_it():
    clips = torch.zeros(1, 2, 3, 6)
    clips[0, 0, 1, 1] = 200  # the left wall is bright at one time,
    clips[0, 1, 1, 4] = 3  # the right wall at another
    clips[0, 0, 2, 0] = 2  # not brighter than the level
    assert sector(clips)[0].int().tolist() == [[0] * 6, [0, 1, 1, 1, 1, 0], [0] * 6]


@FAST
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 7)),
                  elements=st.sampled_from([0, 0, 0, 2, 3, 255])))
def test_sector_spans_from_the_first_to_the_last_bright_pixel_of_a_row(clips):
    lit = (clips > 2).any(1)
    expected = np.zeros_like(lit)
    for b, row in np.ndindex(lit.shape[:2]):
        bright = lit[b, row].nonzero()[0]
        if len(bright):
            expected[b, row, bright[0]: bright[-1] + 1] = True
    assert np.array_equal(sector(torch.from_numpy(clips)).numpy(), expected)


def test_sector_tokens_by_hand():
    """Tubelets of 2 × 4 × 5: a token counts when more than 5 % of its 20 places are in the sector: two, not one."""
    clips = torch.zeros(1, 4, 8, 15)
    clips[0, 0, 1, 6:8] = 255  # y 0, x 1
    clips[0, 3, 7, 14] = 255  # y 1, x 2: one pixel of 20 is 5 %, not more
    tokens = sector_tokens(clips, (2, 4, 5)).view(2, 2, 3)
    assert tokens[0].tolist() == [[False, True, False], [False] * 3]
    assert torch.equal(tokens[0], tokens[1])  # the sector is that of the clip, not of a moment
    assert sector_tokens(clips, (2, 4, 5), share=0.04).view(2, 2, 3)[0].int().tolist() == [[0, 1, 0], [0, 0, 1]]


def test_a_black_clip_keeps_all_tokens_and_its_neighbour_does_not():
    clips = torch.zeros(2, 2, 4, 8, dtype=torch.uint8)
    clips[1, :, :, :4] = 99
    assert sector_tokens(clips, (2, 4, 4)).tolist() == [[True, True], [True, False]]


def test_tokens_outside_the_sector_are_neither_context_nor_target():
    clips = torch.zeros(3, 4, 24, 32)
    clips[:, :, :, 8:24] = 100
    allowed = sector_tokens(clips, (2, 8, 8))
    for rule in masking.RULES:
        masks = multiblock((2, 3, 4), 3, generator(), blocks=2, scale=0.2, allowed=allowed, rule=rule)
        for index, valid in ((masks.context, masks.context_valid), (masks.target, masks.target_valid)):
            assert all(token % 4 in (1, 2) for tokens in sets(index, valid) for token in tokens)


# --- blocks that end -------------------------------------------------------------------------------------------------

def test_a_block_of_half_the_extent_is_a_solid_box_of_half_the_slices():
    begins = set()
    for seed in range(20):
        masks = multiblock((6, 8, 9), 1, generator(seed), blocks=1, scale=0.2, extent=0.5, rule="pad")
        hidden = torch.zeros(6 * 8 * 9, dtype=torch.bool)
        hidden[masks.target[0]] = True
        times, rows, cols = hidden.view(6, 8, 9).nonzero().T
        assert len(times) == math.prod(int(v.max() - v.min() + 1) for v in (times, rows, cols))
        assert int(times.max() - times.min() + 1) == 3
        begins.add(int(times.min()))
    assert begins == {0, 1, 2, 3}


def test_a_block_spans_one_slice_at_least():
    masks = multiblock((6, 8, 9), 1, generator(), blocks=1, scale=0.2, extent=0.01)
    assert len((masks.target[0] // 72).unique()) == 1


def test_blocks_through_the_whole_clip_draw_no_beginning():
    """The published mask takes the same numbers from its generator as it did before a block could end."""
    g = generator(5)
    multiblock((6, 8, 9), 2, g, blocks=3, scale=0.1, rule="pad")
    by_hand = generator(5)
    torch.empty(()).uniform_(0.75, 1.5, generator=by_hand)
    for _ in range(2):
        torch.randint(5, (2, 3, 1), generator=by_hand)
    assert torch.equal(g.get_state(), by_hand.get_state())


@pytest.mark.parametrize("extent", [0.0, -1.0, 1.5])
def test_an_extent_that_is_no_share_is_refused(extent):
    with pytest.raises(ValueError, match=rf"extent={extent} is no share of a clip's time slices"):
        multiblock((2, 4, 4), 1, generator(), blocks=1, scale=0.3, extent=extent)
