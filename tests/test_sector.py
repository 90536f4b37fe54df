"""The sector of a loop: found, everything else blacked, nothing of the patient in the HDF5 file."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_loop import cone, dicom, loop, pictures, video

from usjepa_nb import cine, metrics, sector
from usjepa_nb.cine import Cine, CineError
from usjepa_nb.images import save_nifti


@pytest.fixture
def own():
    return Cine(loop()[0], (0.5, 0.3), 25.0, "made here")


def test_motion_is_the_standard_deviation(own):
    np.testing.assert_allclose(sector.motion(own.frames), own.frames.std(0), atol=1e-6)


def test_the_cone_is_found_and_banner_and_scale_are_not(own):
    _, letters = loop()
    found = sector.find(own)
    assert metrics.dsc(found.astype(np.uint8), cone().astype(np.uint8), 1) > 0.96
    assert not (found & letters).any() and not found[:, 150].any()


def test_a_moving_trace_beside_the_sector_is_left_out(own):
    frames = own.frames.copy()
    for k, frame in enumerate(frames):
        frame[112:118, 10 * k:10 * k + 12] = 255  # an ECG's running mark
    assert not sector.find(replace(own, frames=frames))[112:].any()


def test_grow_widens_and_narrows(own):
    narrow, plain, wide = (sector.find(own, grow=grow) for grow in (-3, 0, 3))
    assert (narrow <= plain).all() and (plain <= wide).all() and narrow.sum() < plain.sum() < wide.sum()


def test_a_region_bounds_the_search(own):
    found = sector.find(replace(own, region=(0, 60, 0, 160)))
    assert found[:60].any() and not found[60:].any()


def test_crop_blacks_all_but_the_sector(own):
    found = sector.find(own)
    cut = sector.crop(own, found)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    assert cut.frames.shape[1:] == (np.ptp(rows) + 1, np.ptp(columns) + 1) and cut.spacing == own.spacing
    inside = found[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    assert not cut.frames[:, ~inside].any()
    np.testing.assert_array_equal(cut.frames[:, inside], own.frames[:, found])


def test_text_in_the_sector_is_suspected(own):
    found = sector.find(own)
    assert not sector.suspects(own, found).any()
    own.frames[:, 70:80, 70:90] = 230
    found = sector.suspects(own, sector.find(own))
    assert found[70:80, 70:90].all() and found.sum() == 200


@pytest.mark.parametrize("options, complaint", [({"threshold": 200}, "hardly anything moves"),
                                                ({"grow": -80}, "leaves nothing")])
def test_no_sector_gets_one_sentence(own, options, complaint):
    with pytest.raises(CineError, match=complaint):
        sector.find(own, **options)


def test_a_loop_that_stands_still_has_no_sector(own):
    with pytest.raises(CineError, match="hardly anything moves"):
        sector.find(replace(own, frames=np.repeat(own.frames[:1], 5, 0)))


@given(st.integers(1, 60), st.integers(1, 16), st.integers(1, 20))
def test_windows_hold_every_frame(length, frames, step):
    index = sector.windows(length, frames, step)
    assert index.shape[1] == frames and set(index.ravel()) == set(range(length))
    assert (np.diff(index, axis=1) >= 0).all()
    if length >= frames:
        assert len(set(np.diff(index, axis=1).ravel())) <= 1 and 0 < np.diff(index, axis=1).max(initial=1) <= step


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 4))
def test_sliding_clips_show_every_frame_at_every_place(length, frames, step):
    index = sector.slide(length, frames, step)
    for place in index.T:
        assert set(place) == set(range(length))
    assert (np.diff(index, axis=1) <= step).all() and (np.diff(index, axis=1) >= 0).all()


def test_vote_is_the_commonest_label():
    index = np.array([[0, 1], [1, 2], [1, 1]])  # frame 1 is seen four times, the others once
    masks = np.array([[3, 1], [2, 3], [2, 1]], np.uint8)[..., None, None]
    np.testing.assert_array_equal(sector.vote(masks, index, 3).ravel(), [3, 1, 3])  # 1, 2, 2, 1: the lowest


def nifti(path, frames):
    save_nifti(path, frames, (0.5, 0.3))
    return path


@pytest.mark.parametrize("make", [
    lambda folder, film: dicom(folder / "Müller Änne.dcm", film),
    lambda folder, film: video(folder / "Müller Änne.avi", film),
    lambda folder, film: video(folder / "Müller Änne.mp4", film),
    lambda folder, film: nifti(folder / "Müller Änne.nii.gz", film),
    lambda folder, film: pictures(folder / "Müller Änne", film)], ids=["dicom", "avi", "mp4", "nifti", "pictures"])
def test_name_and_banner_are_not_in_the_hdf5(tmp_path, make):
    """Neither in any byte of the file, nor as pixels: with the letters of the banner or without, it is the same."""
    film, letters = loop()
    out = tmp_path / "eigene Daten" / "own.h5"
    read = cine.read(make(tmp_path, film))
    found = sector.find(read)
    with sector.write([sector.crop(read, found)], out, 48) as own:
        stored = own.frames(0)
    content = out.read_bytes()
    for word in ("Müller", "ller", "Änne", "nne.", "4711", "Klinik", "SECRET"):
        assert word.encode() not in content and word.encode("latin-1") not in content, word
    assert [p.name for p in out.parent.iterdir()] == ["own.h5"]
    assert not (found & letters).any()
    if not (tmp_path / "Müller Änne.mp4").exists():  # which is lossy
        film[:, letters] = 0
        nameless = Cine(film, None, None, "made here")
        with sector.write([sector.crop(nameless, sector.find(nameless))], tmp_path / "nameless.h5", 48) as own:
            np.testing.assert_array_equal(stored, own.frames(0))
    uncut = sector.write([read], tmp_path / "uncut.h5", 48).frames(0)
    assert uncut[:, :4, :20].max() > 60, "uncropped, the banner would be there: the test can fail"


def test_the_store_has_the_clip_and_what_is_known_of_it(tmp_path, own):
    with sector.write([own, replace(own, spacing=None, frame_ms=None)], tmp_path / "own.h5", 40) as made:
        row, unknown = made.table.iloc[0], made.table.iloc[1]
        assert (row["spacing_y"], row["spacing_x"]) == pytest.approx((0.5 * 120 / 40, 0.3 * 160 / 40))
        assert (row["native_spacing_y"], row["native_spacing_x"]) == pytest.approx((0.5, 0.3))
        assert row["frame_rate"] == 40 and np.isnan(unknown["frame_rate"])
        assert np.isnan(unknown[["spacing_y", "native_spacing_x"]].astype(float)).all()
        assert not row["labelled"] and np.isnan(row["ef"]) and row["length"] == 12
        assert made.clip(0, 8).frames.shape == (8, 40, 40)


def test_a_failed_write_leaves_the_old_file(tmp_path, own, monkeypatch):
    sector.write([own], tmp_path / "own.h5", 40).close()
    before = (tmp_path / "own.h5").read_bytes()

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(sector.os, "replace", full)
    with pytest.raises(CineError, match=r"own.h5 could not be written \(disk full\): see that its folder is writable"):
        sector.write([own, own], tmp_path / "own.h5", 40)
    assert (tmp_path / "own.h5").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with h5py.File(tmp_path / "own.h5") as file:
        assert file["frames"].shape == (12, 40, 40)


@pytest.mark.parametrize("loops, view", [(0, "4CH"), (1, "PLAX")])
def test_what_cannot_be_written_gets_one_sentence(tmp_path, own, loops, view):
    with pytest.raises(CineError, match="2CH or 4CH"):
        sector.write([own] * loops, tmp_path / "own.h5", 40, view)


@pytest.mark.parametrize("folder", ["a file", "a file/below"])
def test_a_folder_that_cannot_be_made_gets_one_sentence(tmp_path, own, folder):
    (tmp_path / "a file").touch()
    with pytest.raises(CineError, match=r"own.h5 could not be written \(.+\): see that its folder is writable"):
        sector.write([own], tmp_path / folder / "own.h5", 40)
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


@pytest.mark.parametrize("wrong", [{"spacing": (float("nan"), 0.5)}, {"spacing": (0.5, -0.5)}, {"spacing": (0, 1)},
                                   {"frame_ms": float("nan")}, {"frame_ms": -25.0}])
def test_a_spacing_or_frame_time_that_cannot_be_is_not_written(tmp_path, own, wrong):
    with pytest.raises(CineError, match="cannot be written: give numbers above 0, or None for what is not known"):
        sector.write([own, replace(own, **wrong)], tmp_path / "own.h5", 40)
    assert not list(tmp_path.iterdir())
