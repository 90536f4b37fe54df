"""Exports: pictures with true proportions, films that loop, masks that lie on the patient's own file."""

import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from PIL import Image

from usjepa_nb import camus, export, figures, phantom
from usjepa_nb.images import UNLABELLED


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """One phantom patient; the 4CH sequence of this seed is stored from ES to ED, as some of CAMUS are."""
    folder = tmp_path_factory.mktemp("phantom")
    return phantom.make(folder / "tree", patients=1, seed=2, spacing=1.2, workers=1, progress=False)


@pytest.fixture(scope="module")
def clip():
    """Grey speckle [T, H, W] and a mask with all classes that is like none of its mirror images."""
    frames = np.random.default_rng(0).integers(40, 90, (5, 30, 50)).astype(np.uint8)
    masks = np.zeros_like(frames)
    masks[:, 4:16, 8:20], masks[:, 18:24, 8:14], masks[:, 6:10, 30:46] = 1, 3, 2
    masks[3:, 4:8] = 0
    return frames, masks


# --- names and files

def test_names_become_file_names():
    assert export.slug("V-JEPA + LL (λ = 0.25), 2 blocks frozen") == "v-jepa-ll-lam-0.25-2-blocks-frozen"
    assert export.slug("supervised, end to end") == "supervised-end-to-end"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.png"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), export.whole(target, ".png") as part:
        part.write_text("half")
        assert part.suffix == ".png" and part.parent == tmp_path
        1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and target.read_text() == "old"


@pytest.mark.parametrize("write", [
    lambda path, clip: export.picture(path, figures.overlay(clip[0][0], clip[1][0])),
    lambda path, clip: export.movie(path, *clip),
    lambda path, clip: export.nifti(path, clip[1], (1, 1))])
def test_another_suffix_is_refused(tmp_path, clip, write):
    with pytest.raises(ValueError, match=r"film\.avi cannot be written: give a name that ends in \."):
        write(tmp_path / "film.avi", clip)
    assert not list(tmp_path.iterdir())


def test_a_picture_is_what_the_notebook_shows(tmp_path, clip):
    figure = figures.overlay(clip[0][0], clip[1][0])
    path = export.picture(tmp_path / "new" / "a.png", figure)
    assert path.read_bytes() == figures.png(figure) and Image.open(path).format == "PNG"


# --- films

@pytest.mark.parametrize("spacing, size", [
    ((1, 1), (210, 350)), ((0.5, 1), (210, 700)), ((3, 1), (270, 150))])  # 30 x 50 px, then x 7, x 7, x 3
def test_pictures_have_true_proportions(clip, spacing, size):
    rgb = export.painted(clip[0][0], clip[1][0], spacing=spacing)
    assert rgb.shape == (*size, 3) and rgb.dtype == np.uint8
    assert rgb.shape[1] / rgb.shape[0] == pytest.approx(50 * spacing[1] / (30 * spacing[0]))


def test_every_class_lies_in_its_colour_where_its_mask_is():
    frame, mask = np.full((240, 320), 100, np.uint8), np.zeros((240, 320), np.uint8)
    mask[20:60, 10:60], mask[100:140, 10:60], mask[20:60, 200:300] = 1, 2, 3  # no symmetry
    rgb = export.painted(frame, mask, opacity=0.5)
    assert rgb.shape == (240, 320, 3) and (rgb[200, 200] == 100).all()
    for label, (y, x) in {1: (40, 30), 2: (120, 30), 3: (40, 250)}.items():
        colour = np.array([int(figures.CLASS_COLOURS[label][i:i + 2], 16) for i in (1, 3, 5)])
        np.testing.assert_allclose(rgb[y, x], (100 + colour) / 2, atol=1)
        outlined = (rgb == colour).all(-1)
        at_y, at_x = np.nonzero(mask == label)
        box = [at_y.min(), at_y.max(), at_x.min(), at_x.max()]
        found_y, found_x = np.nonzero(outlined)
        np.testing.assert_allclose([found_y.min(), found_y.max(), found_x.min(), found_x.max()], box, atol=1)


def test_a_reference_is_dashed_and_one_without_labels_draws_nothing():
    frame, mask, reference = np.zeros((3, 240, 240), np.uint8)
    reference[60:180, 60:180] = 1
    plain, both = export.painted(frame, reference, opacity=0), export.painted(frame, mask, reference)
    solid, dashed = (int(rgb.any(-1).sum()) for rgb in (plain, both))
    assert 0.3 * solid < dashed < 0.8 * solid
    assert not export.painted(frame, mask, np.full_like(mask, UNLABELLED)).any()


def test_a_gif_loops_and_holds_every_frame(tmp_path, clip):
    path = export.movie(tmp_path / "beat.gif", *clip, reference=clip[1], spacing=(2, 1), fps=10)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["loop"], gif.info["duration"], gif.size) == (5, 0, 100, (200, 240))
        for at in range(5):
            gif.seek(at)
            expected = export.painted(clip[0][at], clip[1][at], clip[1][at], (2, 1)).astype(float)
            assert np.abs(np.asarray(gif.convert("RGB")) - expected).mean() < 3  # 128 colours
    assert [p.name for p in tmp_path.iterdir()] == ["beat.gif"]


@pytest.mark.parametrize("wrong", [
    {"masks": np.zeros((4, 30, 50), np.uint8)}, {"reference": np.zeros((5, 50, 30), np.uint8)},
    {"fps": 0}, {"fps": 51}, {"fps": float("nan")}])
def test_a_film_of_other_shapes_or_speed_is_refused(tmp_path, clip, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        export.movie(tmp_path / "a.gif", **{"frames": clip[0], "masks": clip[1]} | wrong)
    with pytest.raises(ValueError, match="masks"):
        export.movie(tmp_path / "a.gif", clip[0][:0], clip[1][:0])
    assert not list(tmp_path.iterdir())


def test_an_mp4_without_ffmpeg_says_what_to_install(tmp_path, clip, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(RuntimeError, match=r"pip install imageio-ffmpeg, or give a name that ends in \.gif"):
        export.movie(tmp_path / "a.mp4", *clip)
    assert not list(tmp_path.iterdir())


def test_ffmpeg_gets_the_pixels_of_all_frames(tmp_path, clip, monkeypatch):
    """A stand-in for the program keeps what it is told and given (whoever has the real one: the next test)."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" > "$0.args"\nfor last; do :; done\n/bin/cat > "$last"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    path = export.movie(tmp_path / "a.mp4", *clip, fps=12.5)
    pictures = np.frombuffer(path.read_bytes(), np.uint8).reshape(5, 210, 350, 3)
    assert (pictures[2] == export.painted(clip[0][2], clip[1][2])).all()
    told = (program.parent / "ffmpeg.args").read_text()
    assert "-s 350x210 -r 12.5" in told and told.strip().endswith(".mp4")
    program.write_text("#!/bin/sh\necho no such encoder >&2\nexit 1\n")
    path.unlink()
    with pytest.raises(RuntimeError, match=r"no such encoder.*ends in \.gif"):
        export.movie(path, *clip)
    assert [p.name for p in tmp_path.iterdir()] == ["bin"]


def test_an_mp4_can_be_read_back(tmp_path, clip):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    reader = imageio_ffmpeg.read_frames(str(export.movie(tmp_path / "a.mp4", *clip, fps=10)))
    about, frames = next(reader), list(reader)
    assert (about["size"], about["fps"], len(frames)) == ((350, 210), 10, 5)
    first = np.frombuffer(frames[0], np.uint8).reshape(210, 350, 3).astype(float)
    assert np.abs(first - export.painted(clip[0][0], clip[1][0])).mean() < 8  # lossy


# --- masks

def test_the_nearest_frame_of_the_clip_lends_its_mask():
    masks = np.array([1, 2, 3], np.uint8)[:, None, None]
    assert export.in_sequence(masks, [0, 2, 6], 8).ravel().tolist() == [1, 1, 2, 2, 2, 3, 3, 3]
    assert export.in_sequence(masks, [0, 2, 6], 8, was_reversed=True).ravel().tolist() == [3, 3, 3, 2, 2, 2, 1, 1]
    assert export.in_sequence(masks[[0, 0, 2, 2]], [0, 0, 1, 1], 2).ravel().tolist() == [1, 3]  # ED/ES only


@pytest.mark.parametrize("view", camus.VIEWS)
def test_masks_lie_on_the_patients_own_files(tree, tmp_path, view):
    """The reference masks as read, written again, are the phantom's `_gt` files: voxels, affine, order of frames."""
    entry = next(e for e in camus.scan(tree) if e.view == view)
    s = camus.read(entry)
    assert s.was_reversed == (view == "4CH")
    every = export.in_sequence(s.masks, np.arange(len(s.masks)), len(s.masks), s.was_reversed)
    for role, masks in (("sequence", every), ("ED", s.masks[s.ed]), ("ES", s.masks[s.es])):
        path = export.nifti(tmp_path / f"{role}.nii.gz", masks, s.spacing)
        mine, own, gt = (nib.load(p) for p in (path, entry.files[role], entry.files[f"{role}_gt"]))
        assert mine.get_data_dtype() == np.uint8 and mine.shape == own.shape == gt.shape
        for other in (own, gt):
            assert np.array_equal(mine.affine, other.affine)
            assert mine.header.get_zooms() == other.header.get_zooms()
            assert [int(mine.header[f"{k}form_code"]) for k in "qs"] == [1, 1]
        voxels = np.asanyarray(mine.dataobj)
        assert np.array_equal(voxels, np.asanyarray(gt.dataobj)) and set(np.unique(voxels)) == {0, 1, 2, 3}
        for axis in range(voxels.ndim):  # so a mirrored one, in space or in time, would be noticed
            assert not np.array_equal(voxels, np.flip(voxels, axis))
        itk, theirs = (SimpleITK.ReadImage(str(p)) for p in (path, entry.files[role]))
        assert [itk.GetOrigin(), itk.GetSpacing(), itk.GetDirection()] == [
            theirs.GetOrigin(), theirs.GetSpacing(), theirs.GetDirection()]
        SimpleITK.Cast(theirs, SimpleITK.sitkUInt8) + itk  # raises where they are not in one place


def test_camus_own_reader_takes_an_export_for_a_reference(tree, tmp_path, clip):
    entry = next(e for e in camus.scan(tree) if e.view == "4CH")
    folder = tmp_path / "tree" / entry.patient
    shutil.copytree(entry.folder, folder)
    s = camus.read(entry)
    masks = np.zeros_like(s.masks)
    masks[:, 10:40, 5:20], masks[-1, 50:60, 30:70] = 1, 3  # asymmetric in y, x and time
    stored = export.in_sequence(masks, np.arange(len(masks)), len(masks), s.was_reversed)
    export.nifti(folder / entry.files["sequence_gt"].name, stored, s.spacing)
    again = camus.read(next(e for e in camus.scan(tmp_path / "tree") if e.view == "4CH"))
    assert np.array_equal(again.masks, masks) and again.spacing == s.spacing


def test_pixels_that_are_not_square_keep_their_axes(tmp_path, clip):
    image = nib.load(export.nifti(tmp_path / "a.nii", clip[1], (0.154, 0.308)))
    assert image.shape == (50, 30, 5)
    np.testing.assert_allclose(image.affine, np.diag([-0.308, -0.154, 1, 1]), rtol=1e-6)


@pytest.mark.parametrize("spacing", [(np.nan, 1), (1, np.inf), (0, 1)])
@pytest.mark.parametrize("write", [
    lambda path, clip, spacing: export.painted(clip[0][0], clip[1][0], spacing=spacing),
    lambda path, clip, spacing: export.movie(path / "a.gif", *clip, spacing=spacing),
    lambda path, clip, spacing: export.nifti(path / "a.nii", clip[1], spacing)])
def test_a_spacing_that_is_none_is_refused(tmp_path, clip, write, spacing):
    with pytest.raises(ValueError, match=r"^spacing = \(.*\) is not possible: give \(y, x\) in mm per pixel, both"):
        write(tmp_path, clip, spacing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong, message", [
    (np.full((2, 3, 4), UNLABELLED, np.uint8), "value 255"), (np.zeros((2, 3, 4)), "whole numbers"),
    (np.zeros((2, 3, 4, 5), np.uint8), "shape"), (np.zeros((0, 3, 4), np.uint8), "shape")])
def test_what_is_no_mask_is_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        export.nifti(tmp_path / "a.nii.gz", wrong, (1, 1))
    assert not list(tmp_path.iterdir())
