"""Own loops: every kind of file gives frames, spacing and time where it has them; bad ones one sentence."""

import numpy as np
import pytest
from own_loop import NAME, dicom, loop, pictures, video
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import JPEGLossless

from usjepa_nb import cine
from usjepa_nb.cine import CineError
from usjepa_nb.images import save_nifti

FOLDER = "Frau Müller, 2. Aufnahme"  # blanks, umlauts, a dot


@pytest.fixture
def here(tmp_path):
    (tmp_path / FOLDER).mkdir()
    return tmp_path / FOLDER


def test_dicom_gives_frames_spacing_time_and_region(here):
    film, _ = loop()
    found = cine.read(dicom(here / "Schleife äöü.dcm", film, region=(10, 5, 149, 118)))
    np.testing.assert_array_equal(found.frames, film)
    assert found.spacing == pytest.approx((0.5, 0.3))  # (y, x), and cm became mm
    assert found.frame_ms == 25 and found.region == (5, 119, 10, 150) and found.note == ""


def test_dicom_without_a_suffix_is_known_by_its_content(here):
    film, _ = loop()
    np.testing.assert_array_equal(cine.read(dicom(here / "IM0001", film)).frames, film)


def test_dicom_colour_becomes_grey_and_16_bits_become_8(here):
    film, _ = loop()
    rgb = np.stack([film, film // 2, film // 4], -1)
    grey = cine.read(dicom(here / "rgb.dcm", rgb)).frames
    expected = np.stack([np.asarray(Image.fromarray(frame).convert("L")) for frame in rgb])
    assert np.abs(grey.astype(int) - expected).max() <= 1  # Pillow's own grey, up to rounding
    deep = film.astype(np.uint16) * 16 + 7
    found = cine.read(dicom(here / "deep.dcm", deep, BitsStored=12, HighBit=11)).frames
    np.testing.assert_array_equal(found, np.rint(deep * (255 / 4095)))
    inverted = cine.read(dicom(here / "inverted.dcm", film, PhotometricInterpretation="MONOCHROME1")).frames
    np.testing.assert_array_equal(inverted, 255 - film)


def test_a_region_beyond_the_picture_gives_no_spacing_and_says_so(here):
    found = cine.read(dicom(here / "a.dcm", loop()[0], region=(0, 0, 319, 239)))
    assert found.spacing is None and found.region is None
    assert "row 239, column 319" in str(found) and "spacing unknown" in str(found)


def test_spacing_that_is_no_centimetre_or_zero_is_unknown(here):
    path = dicom(here / "a.dcm", loop()[0], delta=(0.0, 0.0))
    assert cine.read(path).spacing is None
    dataset = dcmread(path)
    dataset.SequenceOfUltrasoundRegions[0].PhysicalDeltaX = dataset.SequenceOfUltrasoundRegions[0].PhysicalDeltaY = 0.02
    dataset.SequenceOfUltrasoundRegions[0].PhysicalUnitsXDirection = 4  # seconds: an M-mode
    dataset.save_as(path)
    assert cine.read(path).spacing is None


def test_pixel_spacing_counts_where_there_is_no_region(here):
    assert cine.read(dicom(here / "a.dcm", loop()[0], region=None, PixelSpacing=[0.4, 0.2])).spacing == (0.4, 0.2)


def test_frame_time_from_a_vector_or_a_rate(here):
    film, _ = loop(3)
    assert cine.read(dicom(here / "a.dcm", film, FrameTime=None, FrameTimeVector=[0, 20, 40])).frame_ms == 30
    assert cine.read(dicom(here / "b.dcm", film, FrameTime=None, CineRate=50)).frame_ms == 20
    assert cine.read(dicom(here / "c.dcm", film, FrameTime=None)).frame_ms is None
    assert cine.read(dicom(here / "d.dcm", film, FrameTime=None, FrameTimeVector=[20])).frame_ms is None


@pytest.mark.parametrize("wrong", ["-25", "nan", "inf"])
def test_a_frame_time_that_cannot_be_is_unknown_and_told(here, wrong):
    found = cine.read(dicom(here / "a.dcm", loop()[0]))  # a good one, whose frame time is changed in the file
    raw = (here / "a.dcm").read_bytes()
    assert raw.count(b"DS\x04\x0025.0") == 1 and found.frame_ms == 25
    (here / "a.dcm").write_bytes(raw.replace(b"DS\x04\x0025.0", b"DS\x04\x00" + wrong.ljust(4).encode()))
    found = cine.read(here / "a.dcm")
    assert found.frame_ms is None and found.spacing == pytest.approx((0.5, 0.3))
    assert found.note == f"its frame time of {wrong} ms cannot be, so it is unknown"
    assert cine.read(dicom(here / "b.dcm", loop()[0], FrameTime=-25, CineRate=50)).frame_ms == 20
    both = cine.read(dicom(here / "c.dcm", loop()[0], region=(0, 0, 319, 239), FrameTime=-25)).note
    assert "spacing is not taken; its frame time of -25 ms" in both


def test_of_several_regions_the_largest_with_tissue_in_two_dimensions_counts(here):
    """PS3.3 C.8.5.5: format 1 is 2-D, 3 a waveform; data type 1 is tissue, 2 colour flow, 10 an ECG."""
    def region(corners, mm, spatial=1, data=1):
        path = dicom(here / "region.dcm", loop(2)[0], region=corners, delta=(mm / 10, mm / 10))
        (found,) = dcmread(path).SequenceOfUltrasoundRegions
        found.RegionSpatialFormat, found.RegionDataType = spatial, data
        return found

    small, large = region((90, 80, 149, 109), 0.2), region((10, 5, 89, 104), 0.4)
    flow, trace = region((0, 0, 159, 119), 0.7, data=2), region((0, 0, 159, 119), 0.9, spatial=3)
    for order in ([small, large, flow, trace], [trace, flow, large, small]):
        found = cine.read(dicom(here / "a.dcm", loop()[0], SequenceOfUltrasoundRegions=order))
        assert found.region == (5, 105, 10, 90) and found.spacing == pytest.approx((0.4, 0.4))
    found = cine.read(dicom(here / "b.dcm", loop()[0], SequenceOfUltrasoundRegions=[flow, trace]))
    assert found.region is None and found.spacing is None


def test_a_region_without_its_corners_leaves_the_frames(here):
    path = dicom(here / "a.dcm", loop()[0])
    dataset = dcmread(path)
    del dataset.SequenceOfUltrasoundRegions[0].RegionLocationMaxY1
    dataset.save_as(path)
    found = cine.read(path)
    assert len(found.frames) == len(loop()[0]) and found.spacing is None and found.region is None
    assert "cannot be read" in found.note and "RegionLocationMaxY1" in found.note


def test_the_bundled_example_is_read_without_network():
    path = get_testdata_file("examples_ybr_color.dcm", download=False)
    found = cine.read(path)
    assert found.frames.shape == (30, 240, 320) and found.spacing is None and "column 595" in found.note
    assert found.frame_ms == pytest.approx(33.333)


def test_attributes_are_named_and_their_values_are_not(here):
    table = cine.attributes(dicom(here / "a.dcm", loop()[0])).set_index("attribute")
    assert table.loc["PatientName", "filled"] and table.loc["PatientName", "used for"] == ""
    assert table.loc["FrameTime", "used for"] == "frame time" and table.loc["Rows", "used for"] == "pixels"
    assert (table.loc[[name for name in table.index if name.startswith("private")], "used for"] == "").all()
    assert NAME.split("^")[0] not in table.to_string() and "4711" not in table.to_string()


def test_nothing_of_the_patient_is_in_a_cine(here):
    text = repr(cine.read(dicom(here / "Müller.dcm", loop()[0])))
    assert not [word for word in ("ller", "4711", "Klinik", "SECRET") if word in text]


@pytest.mark.parametrize("suffix, off", [(".avi", 0), (".mp4", 3)])
def test_video(here, suffix, off):
    film = np.repeat(np.repeat(loop()[0][:, ::4, ::4], 4, 1), 4, 2)  # coarse grains survive H.264
    found = cine.read(video(here / f"Schleife äöü{suffix}", film))
    assert found.frames.shape == film.shape and found.frame_ms == pytest.approx(50) and found.spacing is None
    assert np.abs(found.frames.astype(float) - film).mean() <= off  # 0 stays 0 and 255 stays 255, not 16 and 235


FAST = {"output_params": ["-movflags", "+faststart"]}  # the index stands first, as in files made for the web


@pytest.mark.parametrize("name, options", [("a.avi", {}), ("b.avi", {"codec": "mjpeg", "pix_fmt_out": "yuvj420p"}),
                                           ("a.mp4", FAST), ("a.mov", FAST), ("a.mkv", {})])
def test_a_video_cut_short_says_so(here, name, options):
    path = video(here / name, loop(40)[0], fps=29.97, **options)
    assert len(cine.read(path).frames) == 40 and not cine.read(path).note
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    found = cine.read(path)
    assert 10 < len(found.frames) < 40
    for one in (found, cine.given(found, mm_per_pixel=0.5, frame_ms=20)):
        assert "its header tells of more frames, so it may be cut short: copy it again" in str(one)


def test_an_avi_whose_header_tells_no_length_is_read(here):
    """Of a recording that was not closed: 0, or all bits set."""
    path = video(here / "a.avi", loop(5)[0])
    for length in (bytes(4), b"\xff" * 4):
        path.write_bytes(path.read_bytes()[:4] + length + path.read_bytes()[8:])
        assert len(cine.read(path).frames) == 5


def test_nifti_keeps_pixels_that_are_not_square(here):
    film, _ = loop()
    save_nifti(here / "Schleife.nii.gz", film, (0.5, 0.3))
    found = cine.read(here / "Schleife.nii.gz")
    np.testing.assert_array_equal(found.frames, film)
    assert found.spacing == pytest.approx((0.5, 0.3)) and found.frame_ms is None


def test_pictures_are_sorted_by_number(here):
    film, _ = loop()
    folder = pictures(here / "Bilder äöü", film)
    (folder / "notes.txt").write_text("not a picture")
    np.testing.assert_array_equal(cine.read(folder).frames, film)


def broken(path, content=b"no pictures here" * 100):
    path.write_bytes(content)
    return path


def half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return path


def lossless(path):
    """A loop in a compression that pydicom itself cannot decode."""
    from pydicom.encaps import encapsulate

    dicom(path, loop(2)[0])
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = JPEGLossless
    dataset.PixelData = encapsulate([b"\xff\xd8", b"\xff\xd8"])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    return path


def one_of_another_size(folder):
    pictures(folder, loop()[0])
    Image.new("L", (20, 20)).save(folder / "frame_5.png")
    return folder


def sixteen_bits(folder):
    folder.mkdir()
    Image.fromarray(np.full((20, 20), 4000, np.uint16)).save(folder / "1.png")
    return folder


def deep_nifti(path):
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.full((9, 9, 3), 4000, np.uint16), np.eye(4)), path)
    return path


def words_for_a_number(path):
    """A loop whose NumberOfFrames is a word."""
    raw = dicom(path, loop(2)[0]).read_bytes()
    assert raw.count(b"IS\x02\x002 ") == 1
    path.write_bytes(raw.replace(b"IS\x02\x002 ", b"IS\x02\x00x "))
    return path


def shut(folder, monkeypatch):
    """A folder that may not be listed, root or not."""
    def iterdir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(folder), "iterdir", iterdir)
    return folder


def no_pixels(path):
    dicom(path, loop(2)[0])
    dataset = dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)
    return path


@pytest.mark.filterwarnings("ignore:Invalid value for VR IS")
@pytest.mark.parametrize("make, complaint", [
    (lambda here: here / "absent.dcm", "no such file or folder; give a DICOM cine"),
    (lambda here: broken(here / "report.pdf"), "report.pdf is of no kind that is read here"),
    (lambda here: broken(here / "a.dcm"), "a.dcm is of no kind"),
    (lambda here: broken(here / "empty.dcm", b""), "empty.dcm"),
    (lambda here: no_pixels(here / "a.dcm"), "without pictures"),
    (lambda here: dicom(here / "still.dcm", loop(1)[0]), "still.dcm has a single frame: give a loop"),
    (lambda here: dicom(here / "long.dcm", loop(2)[0], NumberOfFrames=5000), "more than 1000 frames: cut out"),
    (lambda here: half(dicom(here / "half.dcm", loop()[0])), "half.dcm is cut short or damaged"),
    (lambda here: lossless(here / "a.dcm"), "pip install pylibjpeg"),
    (lambda here: broken(here / "a.mp4"), "a.mp4 cannot be read as a video"),
    (lambda here: video(here / "a.avi", loop(1)[0]), "a single frame"),
    (lambda here: broken(here / "a.nii.gz"), "a.nii.gz is cut short or damaged"),
    (lambda here: here, "has no frame: give a loop"),
    (lambda here: pictures(here / "one", loop(1)[0]), "one has a single frame"),
    (lambda here: one_of_another_size(here / "a"), r"frame_5.png has \(20, 20\) px"),
    (lambda here: sixteen_bits(here / "b"), r"1.png has pixels of more than 8 bits \(I;16\): scale them to 0..255"),
    (lambda here: deep_nifti(here / "a.nii"), r"a.nii holds values other .*: copy it again, or save it as .* 8 bits"),
    (lambda here: words_for_a_number(here / "a.dcm"), "a.dcm has a NumberOfFrames that is no whole number .*: export"),
    (lambda here: "~nosuchuser/a.dcm", "^~nosuchuser/a.dcm cannot be opened .*: make it readable, or write its whole"),
    (lambda here: broken(pictures(here / "c", loop(3)[0]) / "frame_2.png").parent, "frame_2.png cannot be read"),
])
def test_bad_input_gets_one_sentence(here, make, complaint):
    path = make(here)
    with pytest.raises(CineError, match=complaint) as error:
        cine.read(path)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_folder_that_may_not_be_opened_gets_one_sentence(here, monkeypatch):
    with pytest.raises(CineError, match=r"2. Aufnahme cannot be opened \(Permission denied\): make it readable"):
        cine.read(shut(here, monkeypatch))


def test_what_is_given_by_hand_counts_and_zero_keeps_what_the_file_says(here):
    film = cine.read(dicom(here / "a.dcm", loop()[0]))
    assert cine.given(film) == film
    known = cine.given(film, frame_ms=20)
    assert (known.frame_ms, known.spacing) == (20, film.spacing) and "frame time given by hand" in str(known)
    odd = cine.read(dicom(here / "b.dcm", loop()[0], region=(0, 0, 319, 239)))  # its note is about the spacing
    measured = cine.given(odd, 0.4)
    assert (measured.spacing, measured.frame_ms) == ((0.4, 0.4), 25)
    assert "written for another size" in cine.given(odd, frame_ms=20).note and "another size" not in measured.note
    for bad in ({"frame_ms": -1}, {"mm_per_pixel": float("nan")}):
        with pytest.raises(CineError, match=f"{next(iter(bad))} = .*: give a number above 0"):
            cine.given(film, **bad)
