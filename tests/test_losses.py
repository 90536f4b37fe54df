"""The losses, against values worked out by hand and the algebra they claim."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from usjepa_nb import losses, masking
from usjepa_nb.losses import LocalisationHead, combined, delta, l_jepa, l_ll, l_pixel, pixel_targets, sample_pairs
from usjepa_nb.masking import Masks
from usjepa_nb.vit import Encoder, Predictor

FAST = settings(max_examples=50, deadline=None, derandomize=True)
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
GRID = (2, 3, 4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def features(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# --- Eq. 1 -----------------------------------------------------------------------------------------------------------

def test_l_jepa_by_hand():
    predicted, target = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 4.0], [3.0, 9.0]]])
    assert float(l_jepa(predicted, target)) == (1 + 2 + 0 + 5) / 4
    assert float(l_jepa(predicted, target, torch.tensor([[True, False]]))) == (1 + 2) / 2


def test_padding_does_not_count_in_l_jepa():
    predicted, target = features(2, 5, 3), features(2, 5, 3, seed=1)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    loss = l_jepa(predicted, target, valid)
    assert float(loss) == pytest.approx(float((predicted - target)[valid].abs().mean()))
    spoilt = torch.where(valid[..., None], predicted, torch.tensor(1e6))
    assert l_jepa(spoilt, target, valid) == loss


def test_smooth_l1_is_quadratic_below_beta():
    predicted, target = torch.tensor([[[0.5, 3.0]]]), torch.zeros(1, 1, 2)
    assert float(l_jepa(predicted, target, beta=1.0)) == (0.5 * 0.5**2 + (3 - 0.5)) / 2


def test_no_gradient_reaches_the_target():
    predicted, target = features(2, 4, 3).requires_grad_(), features(2, 4, 3, seed=1).requires_grad_()
    l_jepa(predicted, target).backward()
    assert target.grad is None
    torch.testing.assert_close(predicted.grad, (predicted - target).sign().detach() / 24)


def test_a_target_computed_by_the_encoder_itself_gets_no_gradient():
    """The same module as context encoder and as target: only the context path is trained."""
    encoder = Encoder(GRID, (1, 2, 2), 12, 1, 2)
    p = Predictor(GRID, 12, 12, 1, 2)
    clips, masks = features(2, 1, 2, 6, 8), masking.tube(GRID, 2, generator(), ratio=0.5)

    def gradient(target):
        encoder.zero_grad()
        l_jepa(p(encoder(clips, masks.context), masks), target()).backward()
        return encoder.patch_embed.proj.weight.grad.clone()

    def live():
        return encoder(clips, masks.target)

    with torch.no_grad():
        constant = live()
    assert torch.equal(gradient(live), gradient(lambda: constant))


# --- Eq. 2 -----------------------------------------------------------------------------------------------------------

def test_position_numbers_t_then_y_then_x():
    places = list(itertools.product(*map(range, GRID)))
    assert losses.position(torch.arange(24), GRID).tolist() == [list(p) for p in places]


def test_delta_by_hand():
    """From (1, 2, 3) to (0, 0, 1) on a 2 × 3 × 4 grid: ((1-0)/2, (2-0)/3, (3-1)/4)."""
    there, here = torch.tensor([[1 * 12 + 2 * 4 + 3]]), torch.tensor([[1]])
    torch.testing.assert_close(delta(there, here, GRID), torch.tensor([[[1 / 2, 2 / 3, 2 / 4]]]))


@FAST
@given(GRIDS, st.integers(0, 999))
def test_delta_is_antisymmetric_additive_and_within_one(grid, seed):
    a, b, c = torch.randint(math.prod(grid), (3, 2, 20), generator=generator(seed))
    d = delta(a, b, grid)
    assert d.shape == (2, 20, 3) and d.abs().max() < 1
    assert torch.equal(d, -delta(b, a, grid))
    assert not delta(a, a, grid).any()
    torch.testing.assert_close(d + delta(b, c, grid), delta(a, c, grid))
    assert torch.equal((d == 0).all(-1), a == b)  # only a token itself is nowhere away


# --- Eq. 3 -----------------------------------------------------------------------------------------------------------

@FAST
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 999))
def test_padding_is_never_drawn(batch, longest, seed):
    count = torch.randint(1, longest + 1, (batch,), generator=generator(seed))
    index = torch.zeros(batch, longest, dtype=torch.int64)
    valid = torch.arange(longest) < count[:, None]
    m1, m2 = sample_pairs(Masks(index, index, valid, valid), 50, generator(seed))
    for m in (m1, m2):
        assert m.shape == (batch, 50) and m.dtype == torch.int64
        assert m.min() >= 0 and (m < count[:, None]).all()


def test_every_masked_token_is_drawn_as_often():
    index = torch.zeros(2, 10, dtype=torch.int64)
    valid = torch.arange(10) < torch.tensor([[10], [4]])
    m1, m2 = sample_pairs(Masks(index, index, valid, valid), 20_000, generator())
    for m in (m1, m2):
        for row, n in zip(m, (10, 4), strict=True):
            assert np.allclose(torch.bincount(row, minlength=n) / 20_000, 1 / n, rtol=0.08)
    assert abs(np.corrcoef(m1[0], m2[0])[0, 1]) < 0.03  # the two members are independent


def test_pairs_are_drawn_among_the_masked_tokens_of_each_clip():
    masks = masking.tube(GRID, 3, generator(), ratio=0.5)
    m1, m2 = sample_pairs(masks, 100, generator(1))
    again = sample_pairs(masks, 100, generator(1))
    assert torch.equal(m1, again[0]) and torch.equal(m2, again[1])
    assert m1.max() == masks.target.shape[1] - 1 and not torch.equal(m1[0], m1[1])


def padded(*counts, longest=10):
    """Masks of so many real tokens each, then padding."""
    index = torch.zeros(len(counts), longest, dtype=torch.int64)
    valid = torch.arange(longest) < torch.tensor(counts)[:, None]
    return Masks(index, index, valid, valid)


@FAST
@given(st.lists(st.integers(2, 10), min_size=1, max_size=4), st.integers(1, 60), st.integers(0, 999))
def test_without_replacement_no_pair_comes_twice_and_no_token_meets_itself(counts, pairs, seed):
    m1, m2 = sample_pairs(padded(*counts), pairs, generator(seed), replacement=False)
    assert m1.shape == m2.shape == (len(counts), pairs) and m1.dtype == m2.dtype == torch.int64
    for a, b, n in zip(m1, m2, counts, strict=True):
        drawn = list(zip(a.tolist(), b.tolist(), strict=True))
        assert all(i != j and 0 <= i < n and 0 <= j < n for i, j in drawn)
        assert len(set(drawn)) == min(pairs, n * (n - 1))  # all different, or all there are


def test_without_replacement_every_ordered_pair_is_drawn_as_often():
    seen, g = torch.zeros(2, 5, 5), generator()
    for _ in range(3000):
        m1, m2 = sample_pairs(padded(5, 3), 4, g, replacement=False)
        for clip in range(2):
            seen[clip].index_put_((m1[clip], m2[clip]), torch.ones(()), accumulate=True)
    for clip, n in enumerate((5, 3)):
        share = seen[clip] / 3000 * n * (n - 1) / 4
        assert np.allclose(share[:n, :n], 1 - torch.eye(n), atol=0.15)
        assert not share[n:].any() and not share[:, n:].any()


def test_without_replacement_clips_and_seeds_differ_and_the_seed_decides():
    masks = masking.tube(GRID, 2, generator(), ratio=0.5)
    first, again, other = (sample_pairs(masks, 30, generator(s), replacement=False) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0][0], first[0][1])


class Zero(torch.nn.Module):
    """A head that always says 'no offset'."""

    def forward(self, e1, e2):
        return e1.new_zeros(*e1.shape[:-1], 3)


class Exact(torch.nn.Module):
    """A head that reads the positions off features that are the positions."""

    def forward(self, e1, e2):
        return (e1 - e2) / torch.tensor(GRID)


def test_eq_3_sums_the_three_axes():
    """For a head that says zero the loss is the mean squared length of delta: three times a mean over the axes."""
    masks = masking.tube(GRID, 2, generator(), ratio=0.5)
    loss = l_ll(Zero(), features(2, masks.target.shape[1], 5), masks, GRID, 100, generator(3))
    m1, m2 = sample_pairs(masks, 100, generator(3))
    truth = delta(masks.target.gather(1, m1), masks.target.gather(1, m2), GRID)
    torch.testing.assert_close(loss, (truth**2).sum(-1).mean())
    torch.testing.assert_close(loss, 3 * F.mse_loss(torch.zeros_like(truth), truth))


def test_a_head_that_knows_the_offset_has_no_loss():
    """Features and positions belong to the same token, and the difference has the right sign."""
    masks = masking.multiblock(GRID, 3, generator(), blocks=2, scale=0.3, rule="pad")
    e = losses.position(masks.target, GRID).float()
    assert float(l_ll(Exact(), e, masks, GRID, 200, generator())) < 1e-12
    assert float(l_ll(Exact(), e.flip(1), masks, GRID, 200, generator())) > 0.01


def test_padding_does_not_reach_the_localisation_loss():
    valid = torch.arange(6) < torch.tensor([[6], [3]])
    index = torch.tensor([[0, 3, 7, 11, 12, 23], [1, 2, 20, 4, 5, 6]])
    masks = Masks(index, index, valid, valid)
    e, head = features(2, 6, 5), LocalisationHead(5)
    spoilt = torch.where(valid[..., None], e, torch.tensor(torch.nan))
    loss = l_ll(head, e, masks, GRID, 60, generator(1))
    assert torch.equal(l_ll(head, spoilt, masks, GRID, 60, generator(1)), loss)
    # and the batch's loss is the mean of its clips' losses over the same pairs
    pairs = zip(index, e, *sample_pairs(masks, 60, generator(1)), strict=True)
    clips = [(head(f[a], f[b]) - delta(i[a], i[b], GRID)).square().sum(-1).mean() for i, f, a, b in pairs]
    torch.testing.assert_close(loss, sum(clips) / 2)


def test_head_is_three_layers_on_both_members():
    head = LocalisationHead(5, hidden=7)
    assert [tuple(m.weight.shape) for m in head.mlp if hasattr(m, "weight")] == [(7, 10), (7, 7), (3, 7)]
    e1, e2 = features(2, 4, 5), features(2, 4, 5, seed=1)
    w = [m for m in head.mlp if hasattr(m, "weight")]
    h = torch.cat([e1, e2], -1)
    h = w[2](F.gelu(w[1](F.gelu(w[0](h)))))
    torch.testing.assert_close(head(e1, e2), h)
    assert not torch.allclose(head(e1, e2), head(e2, e1))


# --- Eq. 4 -----------------------------------------------------------------------------------------------------------

def gradients(lam):
    """Both losses, the mixture, and its gradients to the predictions and to the head."""
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    head = LocalisationHead(5)
    torch.set_rng_state(torch_state)
    masks = masking.tube(GRID, 2, generator(), ratio=0.5)
    e = features(2, masks.target.shape[1], 5).requires_grad_()
    jepa = l_jepa(e, features(*e.shape, seed=1))
    ll = l_ll(head, e, masks, GRID, 100, generator(2))
    loss = combined(jepa, ll, lam)
    loss.backward()
    return jepa.detach(), ll.detach(), loss.detach(), e.grad, [p.grad for p in head.parameters()], (head, masks, e)


def test_lam_1_is_v_jepa_alone():
    jepa, ll, loss, grad, head, (_, _, e) = gradients(1)
    assert loss == jepa and ll > 0
    assert not any(g.any() for g in head)
    torch.testing.assert_close(grad, torch.autograd.grad(l_jepa(e, features(*e.shape, seed=1)), e)[0])


def test_lam_0_is_localisation_alone():
    _, ll, loss, grad, head, (module, masks, e) = gradients(0)
    assert loss == ll
    assert all(g.any() for g in head)
    torch.testing.assert_close(grad, torch.autograd.grad(l_ll(module, e, masks, GRID, 100, generator(2)), e)[0])


@pytest.mark.parametrize("lam", [0.9, 0.75, 0.5, 0.25])
def test_lam_mixes_losses_and_gradients_linearly(lam):
    jepa, ll, loss, grad, head, _ = gradients(lam)
    torch.testing.assert_close(loss, lam * jepa + (1 - lam) * ll)
    torch.testing.assert_close(grad, lam * gradients(1)[3] + (1 - lam) * gradients(0)[3])
    for mixed, whole in zip(head, gradients(0)[4], strict=True):
        torch.testing.assert_close(mixed, (1 - lam) * whole)


@pytest.mark.parametrize("lam", [0.9, 0.75, 0.5, 0.25])
def test_a_third_of_eq_3_is_eq_3_at_another_weight(lam):
    """A mean over the axes acts like lam' = lam / (lam + (1 - lam) / 3): the same loss up to one factor."""
    jepa, ll = torch.tensor(0.7), torch.tensor(0.4)
    other = lam / (lam + (1 - lam) / 3)
    ratio = combined(jepa, ll / 3, lam) / combined(jepa, ll, other)
    assert float(ratio) == pytest.approx(lam + (1 - lam) / 3, rel=1e-6)
    if lam == 0.25:
        assert other == 0.5


# --- collapse --------------------------------------------------------------------------------------------------------

def spread(z, valid=None):
    return float(losses.variance_covariance(z, valid))


def test_decorrelated_features_of_unit_variance_cost_nothing():
    x = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * math.sqrt(3 / 4)  # variance 1 over n - 1
    assert spread(x.view(2, 2, 2)) == pytest.approx(0, abs=1e-9)
    assert spread(2 * x.view(2, 2, 2) + 5) == pytest.approx(0, abs=1e-9)  # a hinge: more is no worse, nor a mean


def test_constant_features_cost_the_whole_hinge():
    assert spread(torch.full((2, 3, 5), 7.0)) == pytest.approx(1 - math.sqrt(1e-4))


def test_variance_and_covariance_by_hand():
    """Two features with variances 1/4 and 1 and covariance 1/2: hinge (1/2 + 0) / 2, covariance 2 · (1/4) / 2 / 25."""
    a = torch.tensor([1.0, 1, -1, -1]) * math.sqrt(3 / 4)
    z = torch.stack([a / 2, a], -1).view(1, 4, 2)
    assert spread(z) == pytest.approx(0.25 + 0.25 / 25, abs=1e-4)


def test_padding_does_not_count_in_the_variance():
    z, valid = features(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    assert spread(torch.where(valid[..., None], z, torch.nan), valid) == pytest.approx(spread(z[valid][None]))


# --- VideoMAE --------------------------------------------------------------------------------------------------------

def test_pixel_targets_by_hand():
    """One tubelet of 1 × 1 × 2 pixels, values 1 and 3: mean 2, deviation sqrt(2) (over n - 1), hence -+ 1 / sqrt(2)."""
    clips = torch.tensor([[[[[1.0, 3.0, 5.0, 5.0]]]]])
    labels = pixel_targets(clips, (1, 1, 2), torch.tensor([[1, 0]]))
    expected = torch.tensor([[[0.0, 0.0], [-1 / math.sqrt(2), 1 / math.sqrt(2)]]])
    torch.testing.assert_close(labels, expected, atol=2e-6, rtol=0)


def test_pixel_targets_are_standardised_per_channel_with_the_channel_last():
    clips = features(2, 3, 4, 6, 9) * torch.tensor([1, 10, 100]).view(3, 1, 1, 1) + 5
    index = torch.tensor([[0, 17], [5, 6]])
    labels = pixel_targets(clips, (2, 2, 3), index).view(2, 2, 2, 2, 3, 3)  # pt, ph, pw, C
    torch.testing.assert_close(labels.mean((2, 3, 4)), torch.zeros(2, 2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(labels.flatten(2, 4).std(2), torch.ones(2, 2, 3), atol=1e-5, rtol=0)
    cube = clips[0, :, 2:4, 4:6, 6:9]  # token 17, the last of a 2 × 3 × 3 grid
    cube = (cube - cube.mean((1, 2, 3), keepdim=True)) / cube.std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(labels[0, 1], cube.permute(1, 2, 3, 0), atol=1e-4, rtol=1e-4)


def test_gain_and_offset_of_a_clip_do_not_change_its_pixel_targets():
    clips, index = features(1, 1, 2, 4, 6), torch.arange(4)[None]
    torch.testing.assert_close(pixel_targets(clips, (1, 2, 3), index), pixel_targets(3 * clips - 7, (1, 2, 3), index),
                               atol=1e-4, rtol=1e-4)


def test_l_pixel_by_hand_and_without_padding():
    predicted, target = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 4.0], [3.0, 9.0]]])
    assert float(l_pixel(predicted, target)) == (1 + 4 + 0 + 25) / 4
    assert float(l_pixel(predicted, target, torch.tensor([[True, False]]))) == (1 + 4) / 2


def test_losses_leave_the_global_seed_alone():
    masks, before = masking.tube(GRID, 2, generator(), ratio=0.5), torch.get_rng_state()
    sample_pairs(masks, 10, generator())
    assert torch.equal(torch.get_rng_state(), before)
