"""Spoilt clips: inside the sector only, worse with severity, steady in time, the same from the same seed."""

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from usjepa_nb.corruptions import CORRUPTIONS, DB, SEVERITIES, Beams, corrupt, phasors

NAMES = list(CORRUPTIONS)


def sector_clip(seed=0, shape=(8, 48, 40)):
    """A clip that changes in time, lit in a triangle below the middle of its first row, black around it."""
    T, H, W = shape
    rng, (y, x) = np.random.default_rng(seed), np.indices((H, W))
    inside = np.abs(x - (W - 1) / 2) <= 0.45 * y + 0.5
    tissue = 60 + 100 * rng.random((6, 6)).repeat(-(-H // 6), 0).repeat(-(-W // 6), 1)[:H, :W]
    drift = np.linspace(0, 40, T)[:, None, None] + rng.uniform(-10, 10, (T, H, W))
    return ((tissue + drift) * inside).astype(np.uint8), inside


def changes(name, seed, clip):
    return [np.abs(corrupt(clip, name, s, seed).astype(float) - clip).mean() for s in (0, *SEVERITIES)]


def test_all_corruptions_of_the_field_are_there():
    assert NAMES == ["depth_attenuation", "acoustic_shadow", "haze", "speckle", "gain", "gamma", "contrast",
                     "frame_drop"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), severity=st.sampled_from(SEVERITIES), frames=st.integers(1, 9),
       height=st.integers(12, 40), width=st.integers(12, 40))
def test_only_the_sector_changes_and_the_seed_decides(name, seed, severity, frames, height, width):
    clip, inside = sector_clip(seed, (frames, height, width))
    before = clip.copy()
    spoilt = corrupt(clip, name, severity, seed)
    assert (clip == before).all()
    assert spoilt.dtype == np.uint8 and spoilt.shape == clip.shape
    assert (spoilt[:, ~inside] == 0).all()
    assert (corrupt(clip, name, severity, seed) == spoilt).all()
    assert (corrupt(clip, name, 0, seed) == clip).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_change_rises_with_severity(name, seed):
    clip, _ = sector_clip(seed)
    assert (np.diff(changes(name, seed, clip)) > 0).all()


@pytest.mark.parametrize("name", ["acoustic_shadow", "haze", "speckle", "frame_drop"])
def test_another_seed_is_another_fault(name):
    clip, _ = sector_clip()
    assert (corrupt(clip, name, 3, 0) != corrupt(clip, name, 3, 1)).any()


def test_severity_0_gives_a_copy():
    clip, _ = sector_clip()
    corrupt(clip, "gain", 0, 0)[:] = 0
    assert clip.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_black_clip_stays_black_and_a_thin_sector_is_no_trouble(name):
    clip = np.zeros((4, 16, 16), np.uint8)
    assert not corrupt(clip, name, 5, 0).any()
    clip[:, 3:, 7] = 99
    spoilt = corrupt(clip, name, 5, 0)
    assert not np.delete(spoilt, 7, 2).any() and not spoilt[:, :3].any()


def test_beams_start_in_the_middle_of_the_first_row_and_reach_the_deepest_point():
    _, inside = sector_clip()
    beams = Beams(inside)
    assert beams.depth[0, 19] == beams.depth[0, 20] == beams.depth[inside].min() < 0.02
    assert beams.depth[inside].max() == 1
    assert np.allclose(beams.angle, -beams.angle[:, ::-1], atol=1e-6)
    rim = [beams.angle[y, inside[y]][-1] for y in range(12, 44)]  # the last row's corners are cut by the picture
    assert min(rim) > 0.85 and max(rim) < 1.1


def test_depth_attenuation_equals_usaugment_on_amplitudes():
    """Reference from tests/oracles/usaugment_decay.py, which says how it was made."""
    with np.load(ROOT / "tests" / "oracles" / "usaugment_decay.npz") as file:
        grey, amplitude = file["grey"], file["amplitude"]
    assert len(np.unique(grey)) > 50
    expected = 255 + DB * 20 * np.log10(amplitude)
    assert expected.min() > 0
    assert np.abs(corrupt(grey[None], "depth_attenuation", 3, 0)[0] - expected).max() < 0.51


def test_depth_attenuation_takes_more_from_the_depth_and_nothing_at_the_probe():
    clip = np.full((2, 30, 31), 200, np.uint8)
    lost = 200.0 - corrupt(clip, "depth_attenuation", 2, 0)
    assert lost[0, 0, 15] == 0
    assert (np.diff(lost[0, :, 15]) > 0).any() and (np.diff(lost[0, :, 15]) >= 0).all()
    assert lost.max() == pytest.approx(11 * DB, abs=0.5)  # 11 dB


@pytest.mark.parametrize("seed", range(5))
def test_a_shadow_lies_behind_its_obstacle_at_one_angle_in_all_frames(seed):
    _, inside = sector_clip(shape=(5, 64, 64))
    clip = np.where(inside, 200, 0).astype(np.uint8)[None].repeat(5, 0)
    spoilt = corrupt(clip, "acoustic_shadow", 3, seed)
    assert (spoilt == spoilt[0]).all()
    angle, grey = Beams(inside).angle, spoilt[0]
    assert grey[:3][inside[:3]].min() > 190  # hardly anything is lost in front of the obstacle
    darkest = [angle[y, inside[y] & (grey[y] == grey[y, inside[y]].min())].mean() for y in range(24, 64)]
    assert np.ptp(darkest) < 0.1
    assert grey[inside].min() == pytest.approx(200 - 18 * DB, abs=3)
    beside = inside & (np.abs(angle - np.mean(darkest)) > 0.7)
    assert beside.any() and (grey[beside] == 200).mean() > 0.9


def test_haze_lifts_what_is_dark_and_hardly_moves():
    clip, inside = sector_clip()
    clip = (clip * 0.3).astype(np.uint8)
    spoilt = corrupt(clip, "haze", 4, 0).astype(float)
    assert (spoilt >= clip).all()
    bright = np.where(inside, 230, 0).astype(np.uint8)[None].repeat(8, 0)
    lifted = (corrupt(bright, "haze", 4, 0).astype(float) - bright)[:, inside].mean()
    assert lifted < 0.2 * (spoilt - clip)[:, inside].mean()
    veil = (spoilt - clip)[:, Beams(inside).depth < 0.4]
    assert np.corrcoef(corrupt(bright, "haze", 5, 0)[[0, 1]][:, inside])[0, 1] > 0.8
    assert veil.mean() > 10


def test_speckle_is_new_in_every_frame_and_keeps_the_mean_power():
    clip = np.full((6, 64, 64), 128, np.uint8)
    spoilt = corrupt(clip, "speckle", 2, 0).astype(float)
    assert abs(np.corrcoef(spoilt.reshape(6, -1)) - np.eye(6)).max() < 0.1
    power = (10 ** ((spoilt - 128) / DB / 10)).mean()
    assert power == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kept", [0.0, 0.95])
def test_phasors_have_power_1_and_the_memory_they_are_given(kept):
    z = phasors(np.random.default_rng(0), (12, 64, 64), kept)
    assert (np.abs(z) ** 2).mean() == pytest.approx(1, abs=1e-5)
    memory = (z[1:] * z[:-1].conj()).mean().real
    assert memory == pytest.approx(kept, abs=0.06)


def test_gain_gamma_and_contrast_by_hand():
    clip = np.array([[[0, 100, 200, 240]] * 4], np.uint8)
    clip[..., 0] = 4  # the sector begins above grey value 2
    assert corrupt(clip, "gain", 1, 0)[0, 0].tolist() == [25, 121, 221, 255]  # 5 dB = 21.25 grey values
    assert corrupt(clip, "gamma", 3, 0)[0, 0].tolist() == [0, 39, 157, 226]  # 255 (g / 255)^2
    assert corrupt(clip, "contrast", 2, 0)[0, 0].tolist() == [70, 118, 168, 188]  # half way to the mean, 136


def test_dropped_frames_show_the_last_that_came():
    clip = np.arange(10, 20, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    before = set(range(10, 20))
    for severity, arrived in zip(SEVERITIES, (8, 6, 5, 3, 1), strict=True):  # 9 frames may be lost: 2, 4, 5, 7, 9
        spoilt = corrupt(clip, "frame_drop", severity, 3)
        shown = spoilt[:, 0, 0].tolist()
        kept = set(shown)
        assert len(kept) == arrived and kept < before and shown[0] == 10
        assert all(value == max(k for k in kept if k <= 10 + t) for t, value in enumerate(shown))
        assert (spoilt == spoilt[:, :1, :1]).all()
        before = kept


@pytest.mark.parametrize(("frames", "name", "severity", "says"), [
    (np.zeros((2, 8, 8), np.uint8), "fog", 1, "name='fog'.*depth_attenuation, .*frame_drop"),
    (np.zeros((2, 8, 8), np.uint8), "haze", 6, "severity=6.*0.*5"),
    (np.zeros((2, 8, 8), np.uint8), "haze", 1.5, "severity=1.5"),
    (np.zeros((2, 8, 8), np.float32), "haze", 1, "float32.*uint8"),
    (np.zeros((1, 2, 8, 8), np.uint8), "haze", 0, r"\(1, 2, 8, 8\).*one clip"),
])
def test_what_cannot_be_spoilt_is_refused(frames, name, severity, says):
    with pytest.raises(ValueError, match=says):
        corrupt(frames, name, severity, 0)
