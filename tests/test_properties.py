"""What holds whatever the input: masks, sampling, resizing, scores, offsets, and training that is stopped anywhere.

The properties of single functions stand with their module's tests; here are those that join modules, or that ask an
independent library. One core needs about ten seconds.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lightning_fabric import Fabric
from scipy import ndimage
from torch import nn

from usjepa_nb import losses, masking, metrics, objectives, pretrain, profile, tasks, weights
from usjepa_nb.camus import UNLABELLED
from usjepa_nb.clips import clip_index, resize_frame, resize_mask
from usjepa_nb.vit import gather, patchify

FAST = settings(max_examples=40, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
GRIDS = st.tuples(st.integers(1, 4), st.integers(2, 7), st.integers(2, 9)).filter(lambda g: g[1] != g[2])
SEEDS = st.integers(0, 2**31)


def generator(seed):
    return torch.Generator().manual_seed(seed)


# --- masks: every token of the sector once, in context or target, and none beside it

def sector_clips(grid, batch, seed, tubelet=(2, 4, 4)):
    """Grey clips of that grid whose lit area is a band of columns, two or three tokens wide, elsewhere in each clip."""
    t, y, x = (n * size for n, size in zip(grid, tubelet, strict=True))
    clips = torch.zeros(batch, t, y, x)
    for b, clip in enumerate(clips):
        left = int(torch.randint(0, grid[2] - 1, (), generator=generator(seed + b)))
        clip[:, :, left * tubelet[2]:(left + 2 + b % 2) * tubelet[2]] = 90
    return clips


@FAST
@given(st.sampled_from(["multiblock", "tube"]), GRIDS, st.integers(1, 4), SEEDS, st.booleans(),
       st.sampled_from(masking.RULES))
def test_masks_cover_the_sector_and_never_overlap(kind, grid, batch, seed, aware, rule):
    """By counting, with `gather` on numbered tokens: what a mask picks is what its indices say, each token once."""
    tubelet = (2, 4, 4)
    clips = sector_clips(grid, batch, seed, tubelet)
    allowed = masking.sector_tokens(clips, tubelet) if aware else None
    p = profile.load("smoke", mask_rule=rule, mask=kind, hidden=0.5, short_range=(3, 0.1), long_range=(1, 0.2))
    try:
        drawn = objectives.jepa_masks(p, grid, batch, allowed, generator(seed))
    except ValueError as error:  # a sector too small for blocks is refused by name, and never half hidden
        assert "leave no context or no target" in str(error)
        assume(False)
    inside = torch.ones(batch, math.prod(grid), dtype=torch.bool) if allowed is None else allowed
    assert not aware or not inside.all() or grid[2] <= 3
    numbered = torch.arange(1.0, math.prod(grid) + 1).repeat(batch, 1)[..., None]
    assert len(drawn) == (1 if kind == "tube" else 2)
    for masks in drawn:
        counts = torch.zeros(batch, math.prod(grid), dtype=torch.int64)
        for index, valid in ((masks.context, masks.context_valid), (masks.target, masks.target_valid)):
            valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
            assert (valid.sum(1) > 0).all()
            assert torch.equal(gather(numbered, index)[..., 0].long(), index + 1)
            counts.scatter_add_(1, index, valid.long())
        assert counts.max() == 1  # nobody twice: not within a mask, not in both
        assert not counts[~inside].any()  # nobody from beyond the sector
        if rule == "pad":
            assert torch.equal(counts.bool(), inside)  # and nobody forgotten
        else:  # cut to the shortest: equal lengths, and the shortest clip loses nothing
            for name in ("context", "target"):
                whole = getattr(objectives.jepa_masks(p.replace(mask_rule="pad"), grid, batch, allowed,
                                                      generator(seed))[0], f"{name}_valid").sum(1)
                assert getattr(drawn[0], name).shape == (batch, int(whole.min()))


@FAST
@given(GRIDS, st.integers(1, 3), SEEDS)
def test_tokens_of_the_sector_are_those_that_are_lit(grid, batch, seed):
    clips = sector_clips(grid, batch, seed)
    lit = patchify(clips[:, None], (2, 4, 4)).flatten(2).amax(-1) > 0
    assert torch.equal(masking.sector_tokens(clips, (2, 4, 4)), lit)


# --- sampling

@FAST
@given(st.integers(1, 90), st.integers(1, 40), st.sampled_from(["cover", "step"]), st.integers(1, 9),
       st.floats(0, 1, exclude_max=True))
def test_a_clip_stays_in_its_sequence_and_loses_no_end(length, frames, rule, step, offset):
    index = clip_index(length, frames, rule, step, offset)
    assert index.shape == (frames,) and index[0] >= 0 and index[-1] < length and (np.diff(index) >= 0).all()
    if rule == "step" and length != 2:  # the paper's rule: every step-th frame, then the last one again and again
        assert index.tolist() == [min(k * step, length - 1) for k in range(frames)]
    if rule == "cover" and offset == 0 and 1 < frames:
        assert index[0] == 0 and index[-1] == length - 1
    if rule == "cover":  # neighbours are one stride apart, to a frame
        assert np.diff(index).max(initial=0) <= math.ceil((length - 1) / max(frames - 1, 1)) or length == 2


@FAST
@given(st.lists(st.sampled_from("ABCD"), min_size=1, max_size=30), SEEDS)
def test_weighted_sampling_reaches_every_row_and_no_other(groups, seed):
    chances = tasks.group_weights(groups)
    assert len(chances) == len(groups) and chances.min() > 0 and chances.sum() == pytest.approx(1)
    drawn = torch.multinomial(chances, 50, replacement=True, generator=generator(seed))
    assert 0 <= drawn.min() and drawn.max() < len(groups)
    by_group = {g: float(chances[[k for k, other in enumerate(groups) if other == g]].sum()) for g in set(groups)}
    assert list(by_group.values()) == pytest.approx([1 / len(by_group)] * len(by_group))


# --- resizing and back

@st.composite
def blobs(draw):
    """A mask of a few large regions, each at least a quarter of the frame wide."""
    height, width = draw(st.integers(40, 90)), draw(st.integers(40, 90))
    labels = draw(st.lists(st.sampled_from([0, 1, 2, 3, UNLABELLED]), min_size=4, max_size=4))
    y, x = draw(st.integers(height // 4, 3 * height // 4)), draw(st.integers(width // 4, 3 * width // 4))
    mask = np.empty((height, width), np.uint8)
    mask[:y, :x], mask[:y, x:], mask[y:, :x], mask[y:, x:] = labels
    return mask


@FAST
@given(blobs(), st.integers(32, 64))
def test_large_regions_keep_their_labels_there_and_back(mask, size):
    there = resize_mask(mask, size)
    back = resize_mask(there, mask.shape)
    assert set(there.flat) == set(back.flat) == set(mask.flat)
    deep = np.ones(mask.shape, bool)  # what is further than two small pixels from another label
    reach = [math.ceil(2 * n / size) for n in mask.shape]
    for label in set(mask.flat):
        deep &= ~ndimage.binary_dilation(mask != label, np.ones([2 * r + 1 for r in reach])) | (mask != label)
    assert (back[deep] == mask[deep]).all()
    for label in set(mask.flat):  # no label gains or loses more than its outline
        assert abs((there == label).mean() - (mask == label).mean()) <= 4 / size


@FAST
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30)),
                  elements=st.sampled_from([0, 1, 2, 3, UNLABELLED])),
       st.tuples(st.integers(1, 24), st.integers(1, 24)))
def test_any_mask_at_any_size_holds_labels_of_its_own_alone(mask, shape):
    small = resize_mask(mask, shape)
    assert small.shape == shape and set(small.flat) <= set(mask.flat)
    assert set(resize_mask(small, mask.shape).flat) <= set(small.flat)


@FAST
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30))), st.integers(1, 40))
def test_a_resized_frame_stays_within_its_greys(frame, size):
    resized = resize_frame(frame, size)
    assert resized.shape == (size, size) and frame.min() <= resized.min() and resized.max() <= frame.max()


# --- scores and distances, by scikit-learn and by distance maps

PAIRS = st.tuples(st.integers(1, 3), st.integers(2, 12), st.integers(2, 12)).flatmap(lambda shape: st.tuples(
    hnp.arrays(np.uint8, shape, elements=st.integers(0, 3)),
    hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, 3, UNLABELLED]))))


@FAST
@given(PAIRS)
def test_scores_agree_with_scikit_learn(pair):
    from sklearn import metrics as theirs

    pred, true = pair
    known = true != UNLABELLED
    library = {"dsc": theirs.f1_score, "jaccard": theirs.jaccard_score, "ppv": theirs.precision_score,
               "recall": theirs.recall_score}
    scores = metrics.video_scores(pred, true)
    for name, label in itertools.product(library, metrics.CLASSES):
        sides = [m[known].ravel() == label for m in (true, pred)]
        if any(side.any() for side in sides):
            assert scores[name][label] == pytest.approx(library[name](*sides, zero_division=0))
        else:
            assert math.isnan(scores[name][label])
    there = [c for c in metrics.CLASSES if not math.isnan(scores["dsc"][c])]
    if there:
        macro = theirs.f1_score(true[known], pred[known], labels=there, average="macro", zero_division=0)
        assert scores["dsc"]["mean"] == pytest.approx(macro) == metrics.mean_dsc(pred, true)


@settings(FAST, max_examples=15)
@given(hnp.arrays(bool, (2, 14, 11)), st.floats(0.2, 2), st.floats(0.2, 2))
def test_surface_distances_agree_with_distance_maps(pair, sy, sx):
    """Oracle: SciPy's exact Euclidean distance map of the other outline, read off at the points of one."""
    pred, true = (side.astype(np.uint8) for side in pair)
    assume(pred.any() and true.any())
    edges = [side & ~ndimage.binary_erosion(side) for side in pair]
    away = [ndimage.distance_transform_edt(~edge, sampling=(sy, sx)) for edge in edges]
    there, back = away[1][edges[0]], away[0][edges[1]]
    rows = metrics.surface_distances(pred, true, (sy, sx), labels=(1,))
    assert rows["hd"][1] == pytest.approx(max(there.max(), back.max()), rel=1e-4)
    assert rows["hd95"][1] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-4, abs=1e-6)
    assert rows["assd"][1] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-4, abs=1e-6)
    other = metrics.surface_distances(true, pred, (sy, sx), labels=(1,))
    assert all(other[name][1] == pytest.approx(rows[name][1], rel=1e-6) for name in rows)


# --- offsets

@FAST
@given(GRIDS, SEEDS)
def test_offsets_are_antisymmetric_and_lead_back(grid, seed):
    """From a token by its offset times the grid one comes to the other token; turned round, back again."""
    a, b, c = torch.randint(math.prod(grid), (3, 2, 15), generator=generator(seed))
    there, back = losses.delta(a, b, grid), losses.delta(b, a, grid)
    assert torch.equal(there, -back) and there.abs().max() < 1
    torch.testing.assert_close(there + losses.delta(b, c, grid) + losses.delta(c, a, grid), torch.zeros(2, 15, 3))
    steps = (there * torch.tensor(grid)).round().long()
    assert torch.equal(losses.position(b, grid) + steps, losses.position(a, grid))


# --- training stopped anywhere is training not stopped

class Stopped(BaseException):
    """A kill, as the loop sees it."""


class Toy(objectives.Objective):
    """An objective with all that a real one has: an encoder, a frozen copy that follows it, a buffer, and chance."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder, self.target_encoder = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3))

    def prepare(self, batch, generator):
        return batch, torch.rand(len(batch), 2, generator=generator)

    def losses(self, prepared):
        batch, noise = prepared
        self.seen += batch.sum(0)
        return {"loss": (self.encoder(batch) - self.target_encoder(batch) - noise).square().mean()}

    @torch.no_grad()
    def after_step(self, step):
        for slow, fast in zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True):
            slow.lerp_(fast, 1 / (step + 1))


def trained(path, steps, log_every, stops=()):
    """Train to the end, stopped on the way before each step k of `stops`, counted anew after every resumption."""
    p = profile.load("smoke", steps=steps, log_every=log_every)
    for stop in (*stops, None):
        left, objective = itertools.count(), Toy()

        def batches(generator, n, left=left, stop=stop):
            if next(left) == stop:
                raise Stopped
            return torch.rand(n, 3, generator=generator)

        try:
            history = list(pretrain.train(objective, batches, p, path, seed=3,
                                          fabric=Fabric(accelerator="cpu", devices=1)))
        except Stopped:
            pass
    return weights.read(path), history


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


@settings(FAST, max_examples=25)
@given(st.integers(2, 9), st.integers(1, 4), st.data())
def test_resumed_at_random_steps_is_as_uninterrupted(tmp_path_factory, steps, log_every, data):
    stops = data.draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=3))
    folder = tmp_path_factory.mktemp("toy")
    whole, resumed = (trained(folder / f"{len(s)}.pt", steps, log_every, s) for s in ((), stops))
    assert torch.utils._pytree.tree_structure(whole) == torch.utils._pytree.tree_structure(resumed)
    assert whole[0]["step"] == steps == len(whole[1]) and whole[0]["optimizer"] is None  # finished
    for a, b in zip(leaves(whole), leaves(resumed), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a


def test_a_resumption_that_forgets_something_would_be_noticed(tmp_path, monkeypatch):
    whole, _ = trained(tmp_path / "whole.pt", 6, 1)
    real = pretrain.resume
    monkeypatch.setattr(pretrain, "resume", lambda path, objective, *_: real(path, objective))
    forgetful, _ = trained(tmp_path / "forgetful.pt", 6, 1, [3])
    assert not torch.equal(whole["encoder"]["weight"], forgetful["encoder"]["weight"])
