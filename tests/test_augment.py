"""Views of a clip: the same for all frames and for the labels, never mirrored, always the same from one generator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usjepa_nb import augment as module
from usjepa_nb.augment import affine, augment, crop_and_flip, standardise
from usjepa_nb.camus import UNLABELLED

FAST = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(batch=3, frames=4, height=24, width=24, seed=0):
    return torch.randint(256, (batch, frames, height, width), generator=generator(seed), dtype=torch.uint8)


def heart(batch=1, frames=3, size=48):
    """A bright square up on the left of a grey field, with label 1; frame 0 is not labelled."""
    x = torch.full((batch, frames, size, size), 60, dtype=torch.uint8)
    x[..., 12:22, 8:18] = 255
    labels = (x == 255).to(torch.uint8)
    labels[:, 0] = UNLABELLED
    return x, labels


def test_standardise_by_hand():
    x = standardise(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8))
    assert x.shape == (1, 1, 1, 1, 3) and x.dtype == torch.float32
    torch.testing.assert_close(x.flatten(), torch.tensor([-1.0, 0.0, 4.0]))


@FAST
@given(SEEDS, st.sampled_from([(24, 24), (16, 32)]))
def test_a_view_keeps_shape_range_and_seed(seed, size):
    x = clips(2, 3, *size)
    for view in (lambda g: augment(x, g)[0], lambda g: crop_and_flip(x, g)):
        before = torch.get_rng_state()
        out = view(generator(seed))
        assert out.shape == x.shape and out.dtype == torch.float32
        assert out.min() >= 0 and out.max() <= 255
        assert torch.equal(out, view(generator(seed)))
        assert not torch.equal(out, view(generator(seed + 1)))
        assert not torch.equal(out[0], augment(x[:1].expand(2, -1, -1, -1), generator(seed))[0][1])
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("view", [lambda x, g: augment(x, g)[0], crop_and_flip])
def test_all_frames_of_a_clip_are_seen_alike_and_clips_are_not(view):
    """Tissue motion has to stay motion: a still clip stays still."""
    still = clips(1, 1).expand(3, 5, -1, -1)
    out = view(still, generator())
    assert all(torch.equal(out[:, 0], out[:, t]) for t in range(5))
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])


@pytest.mark.parametrize("view", [lambda x, g: augment(x, g)[0], crop_and_flip])
def test_the_input_is_left_as_it_was(view):
    x = clips()
    before = x.clone()
    view(x, generator())
    assert torch.equal(x, before)


@FAST
@given(SEEDS)
def test_labels_move_with_the_picture(seed):
    """Inside the moved label all is bright, outside all is not, but for the edge that interpolation blurs."""
    x, labels = heart()
    out, moved = augment(x, generator(seed), labels, gamma=0, gain=0)
    assert moved.dtype == torch.uint8 and moved.shape == labels.shape
    bright, inside = out[0, 1] > 157, moved[0, 1] == 1
    assert inside.any()
    assert float((bright != inside).float().sum()) <= 0.15 * float(inside.sum())
    assert set(moved[:, 1:].unique().tolist()) <= {0, 1}
    assert set(moved[:, 0].unique().tolist()) <= {0, UNLABELLED}  # 0 where the view leaves the picture
    assert torch.equal(moved[:, 1], moved[:, 2])


def test_without_labels_the_view_is_the_same():
    x, labels = heart()
    with_labels, none = augment(x, generator(3), labels)[0], augment(x, generator(3))[1]
    assert none is None and torch.equal(with_labels, augment(x, generator(3))[0])


def test_a_heart_is_never_mirrored():
    theta = affine(5000, generator(), (0.6, 1.05), 0.2, 0.2)
    assert theta.shape == (5000, 2, 3)
    assert (torch.linalg.det(theta[:, :, :2]) > 0).all() and (theta[:, 0, 0] > 0).all() and (theta[:, 1, 1] > 0).all()


def test_views_zoom_turn_and_stretch_as_far_as_they_are_told():
    a = affine(5000, generator(), (0.6, 1.05), 0.2, 0.2)[:, :, :2].double()
    sx, sy = a[:, :, 0].norm(dim=1), a[:, :, 1].norm(dim=1)
    angle = torch.atan2(a[:, 1, 0], a[:, 0, 0])
    for values, low, high in ((sx, 0.6, 1.05), ((sy / sx).log(), -0.2, 0.2), (angle, -0.2, 0.2)):
        assert low <= values.min() + 1e-5 and values.max() - 1e-5 <= high
        assert values.min() < low + 0.02 * (high - low) and values.max() > high - 0.02 * (high - low)
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_a_zoomed_view_hardly_leaves_the_picture():
    """The centre may move by what the zoom leaves free (0.8 of it) and 0.08 of half a frame more, to either side."""
    theta = affine(5000, generator(), (0.5, 0.5), 0.0, 0.0)
    shift = theta[:, :, 2].abs()
    assert 0.45 < shift.max() <= 0.8 * 0.5 + 0.08 + 1e-6
    assert theta[:, :, 2].mean(0).abs().max() < 0.02


def test_gain_and_gamma_act_on_grey_values_alone(monkeypatch):
    """With the picture in place: 255 (g / 255)^gamma · gain, cut at white; one draw per clip."""
    def in_place(batch, *_):
        return torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(batch, -1, -1)

    monkeypatch.setattr(module, "affine", in_place)
    x = torch.linspace(0, 255, 64).view(1, 1, 8, 8).expand(200, 2, -1, -1)
    torch.testing.assert_close(augment(x, generator(), gamma=0, gain=0)[0], x, atol=1e-2, rtol=0)
    gained = augment(x, generator(), gamma=0, gain=0.25)[0][:, :, 4, 0] / x[:, :, 4, 0]
    assert torch.equal(gained[:, 0], gained[:, 1]) and 0.75 <= gained.min() < 0.77 and 1.23 < gained.max() <= 1.2501
    bent = augment(x, generator(), gamma=0.4, gain=0)[0][:, 0, 4, 0]
    power = (bent / 255).log() / (x[0, 0, 4, 0] / 255).log()
    assert np.exp(-0.4) - 1e-3 <= power.min() < 0.69 and 1.45 < power.max() <= np.exp(0.4) + 1e-3
    out = augment(x, generator())[0]
    assert (out.flatten(1).diff(dim=1)[:, :63] >= -1e-3).all() and out.max() == 255  # still ordered, cut at white


def test_the_published_view_mirrors_half_of_the_clips():
    """A ramp from left to right: its slope tells the mirror image."""
    ramp = torch.linspace(0, 255, 32).expand(400, 1, 32, 32)
    out = crop_and_flip(ramp, generator())
    slope = out[:, 0, 16, 24] - out[:, 0, 16, 8]
    assert slope.abs().min() > 1
    assert 0.42 < float((slope > 0).float().mean()) < 0.58


def test_the_published_view_crops_within_the_picture():
    """Area 0.3 to 1 of the frame: no black border ever comes in, and slopes give the size of the crop."""
    x = torch.full((300, 1, 128, 128), 200.0)
    inner = crop_and_flip(x, generator())[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 200.0))
    across = torch.linspace(0, 255, 128).expand(300, 1, 128, 128)
    sx, sy = (crop_and_flip(v, generator())[:, 0] for v in (across, across.transpose(2, 3)))
    sx = (sx[:, 64, 80] - sx[:, 64, 48]).abs() / (across[0, 0, 0, 80] - across[0, 0, 0, 48])
    sy = (sy[:, 80, 64] - sy[:, 48, 64]).abs() / (across[0, 0, 0, 80] - across[0, 0, 0, 48])
    area, ratio = sx * sy, sx / sy
    assert 0.29 < area.min() < 0.34 and 0.9 < area.max() < 1.01
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.36
