"""A CAMUS tree is read as it is meant, a partial copy too; what is damaged is refused by name."""

import gzip
import math
import re
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from usjepa_nb import camus
from usjepa_nb.camus import UNLABELLED, CamusError

REAL, REAL_MHD = (Path(__file__).parents[2] / "shared" / name for name in ("camus", "camus_mhd"))


def write_nifti(path, array, dtype=np.float32, spacing=(0.5, 0.25), signs=(-1, -1)):
    """[T, H, W] or [H, W] as CAMUS stores it: float32, (x, y[, t]), negative affine; spacing is (y, x)."""
    affine = np.diag([signs[0] * spacing[1], signs[1] * spacing[0], 1, 1])
    nibabel.save(nibabel.Nifti1Image(np.asarray(array, dtype).T, affine), path)


def write_mhd(path, array, spacing=(0.5, 0.25), signs=(1, 1)):
    image = SimpleITK.GetImageFromArray(np.asarray(array, np.uint8))
    image.SetSpacing((spacing[1], spacing[0], 1.54))
    image.SetDirection(np.diag([*signs, 1.0]).ravel())
    SimpleITK.WriteImage(image, str(path))


def write_cfg(folder, view, **lines):
    lines = {"ED": 1, "ES": 6, "NbFrame": 6, "Sex": "F", "Age": 56, "ImageQuality": "Good", "EF": 54,
             "FrameRate": 48.4} | lines
    text = "\n".join(f"{key}: {value}" for key, value in lines.items() if value is not None)
    (folder / f"Info_{view}.cfg").write_text(text)


def film(length=6, height=12, width=16, seed=0):
    """Frames that tell their number (pixel 0, 0) and which way is up (bright top left), and masks that move."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(60, 100, (length, height, width))
    frames[:, :3, :4] = 200
    frames[:, 0, 0] = np.arange(length)
    masks = np.zeros_like(frames)
    for t in range(length):
        masks[t, 2 + t % 4:10, 4:12], masks[t, 10:, 4:12], masks[t, 4 + t % 4:10, 6:10] = 2, 3, 1
    return frames, masks


def write_patient(root, name="patient0001", view="4CH", *, ending=".nii.gz", sequence=True, sequence_gt=True,
                  stills=True, stills_gt=True, seed=0, shape=(6, 12, 16), **cfg):
    """One view of one patient; the film runs ED -> ES unless the cfg says otherwise. Returns (folder, film)."""
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    frames, masks = film(*shape, seed)
    cfg = {"ED": 1, "ES": len(frames), "NbFrame": len(frames)} | cfg
    write_cfg(folder, view, **cfg)
    write = write_mhd if ending == ".mhd" else write_nifti
    half = "sequence" if ending == ".mhd" else "half_sequence"
    for role, images, wanted in ((half, frames, sequence), (f"{half}_gt", masks, sequence_gt)):
        if wanted:
            write(folder / f"{name}_{view}_{role}{ending}", images)
    for role in ("ED", "ES"):
        t = cfg[role] - 1
        still = slice(t, t + 1) if ending == ".mhd" else t
        if stills:
            write(folder / f"{name}_{view}_{role}{ending}", frames[still])
        if stills_gt:
            write(folder / f"{name}_{view}_{role}_gt{ending}", masks[still])
    return folder, (frames, masks)


def write_lists(root, **parts):
    (root / "database_split").mkdir(parents=True, exist_ok=True)
    for part, patients in parts.items():
        (root / "database_split" / camus.PARTS[part]).write_text("".join(f"{p}\n" for p in patients))


def read_only_one(root):
    (entry,) = camus.scan(root)
    return camus.read(entry)


def numbers(sequence):
    return sequence.frames[:, 0, 0].tolist()


# --- what is there is read as it is meant

def test_a_half_sequence_is_upright_in_order_and_in_millimetres(tmp_path):
    _, (frames, masks) = write_patient(tmp_path)
    s = read_only_one(tmp_path)
    assert (s.frames == frames).all() and (s.masks == masks).all()
    assert s.frames.dtype == s.masks.dtype == np.uint8 and s.frames.flags.c_contiguous
    assert s.frames.shape == (6, 12, 16) and s.spacing == (0.5, 0.25)  # (y, x)
    assert (s.patient, s.view, s.ed, s.es, s.was_reversed, s.ed_es_only) == ("patient0001", "4CH", 0, 5, False, False)
    assert (s.ef, s.quality, s.sex, s.age, s.frame_rate) == (54, "Good", "F", 56, 48.4)


def test_a_sequence_stored_from_es_to_ed_is_turned_round_with_its_masks(tmp_path):
    _, (frames, masks) = write_patient(tmp_path, ED=6, ES=1)
    s = read_only_one(tmp_path)
    assert s.was_reversed and (s.ed, s.es) == (0, 5)
    assert (s.frames == frames[::-1]).all() and (s.masks == masks[::-1]).all()


@pytest.mark.parametrize(("ed", "es", "kept"), [(2, 5, [1, 2, 3, 4]), (5, 2, [4, 3, 2, 1]), (3, 1, [2, 1, 0])])
def test_frames_outside_ed_to_es_are_cut_off(tmp_path, ed, es, kept):
    write_patient(tmp_path, ED=ed, ES=es)
    s = read_only_one(tmp_path)
    assert numbers(s) == kept and (s.ed, s.es) == (0, len(kept) - 1)


@pytest.mark.parametrize(("ed", "es"), [(1, 6), (6, 1)])
def test_without_sequence_masks_those_of_ed_and_es_are_laid_at_their_frames(tmp_path, ed, es):
    _, (_, masks) = write_patient(tmp_path, sequence_gt=False, ED=ed, ES=es)
    s = read_only_one(tmp_path)
    assert (s.masks[0] == masks[ed - 1]).all() and (s.masks[-1] == masks[es - 1]).all()
    assert (s.masks[1:-1] == UNLABELLED).all()


def test_ed_and_es_alone_are_two_frames_and_missing_masks_are_unlabelled(tmp_path):
    write_patient(tmp_path, sequence=False, sequence_gt=False)
    s = read_only_one(tmp_path)
    assert numbers(s) == [0, 5] and s.ed_es_only and (s.ed, s.es) == (0, 1) and s.masks.max() == 3
    (tmp_path / "patient0001" / "patient0001_4CH_ES_gt.nii.gz").unlink()
    s = read_only_one(tmp_path)
    assert s.masks[0].max() == 3 and (s.masks[1] == UNLABELLED).all()


def test_ed_and_es_alone_need_no_turning_round(tmp_path):
    write_patient(tmp_path, sequence=False, sequence_gt=False, ED=6, ES=1)
    s = read_only_one(tmp_path)
    assert numbers(s) == [5, 0] and not s.was_reversed


def test_what_the_cfg_does_not_tell_is_nan_or_empty(tmp_path):
    write_patient(tmp_path, EF=None, Age=None, FrameRate=None, Sex=None, ImageQuality=None)
    s = read_only_one(tmp_path)
    assert all(math.isnan(x) for x in (s.ef, s.age, s.frame_rate)) and s.sex == s.quality == ""


def test_the_mhd_release_reads_like_the_nifti_release(tmp_path):
    _, (frames, masks) = write_patient(tmp_path, ending=".mhd", EF=None, FrameRate=None, LVef=63.2)
    s = read_only_one(tmp_path)
    assert (s.frames == frames).all() and (s.masks == masks).all() and s.spacing == (0.5, 0.25)
    assert s.ef == 63.2 and math.isnan(s.frame_rate)


def test_an_mhd_sequence_without_raw_is_reported_and_ed_es_are_read(tmp_path):
    folder, _ = write_patient(tmp_path, ending=".mhd", sequence_gt=False)
    (folder / "patient0001_4CH_sequence.raw").unlink()
    (entry,) = camus.scan(tmp_path)
    assert list(entry.left_out) == ["patient0001/patient0001_4CH_sequence.mhd"]
    assert "patient0001_4CH_sequence.raw" in entry.left_out["patient0001/patient0001_4CH_sequence.mhd"]
    assert numbers(camus.read(entry)) == [0, 5]


@pytest.mark.parametrize("where", ["database_nifti", ".", "training"])
def test_the_root_may_hold_the_patients_or_the_folder_that_holds_them(tmp_path, where):
    root = tmp_path / "Écho data"  # a blank and a letter beyond ASCII
    write_patient(root / where)
    write_patient(root / where, view="2CH")
    write_patient(root / where, "patient0002", "2CH")
    wanted = [("patient0001", "2CH"), ("patient0001", "4CH"), ("patient0002", "2CH")]
    for given_root in (root, root / where):
        assert [(e.patient, e.view) for e in camus.scan(given_root)] == wanted
    assert [(e.patient, e.view) for e in camus.scan(str(root / where / "patient0002"))] == wanted[2:]


def test_unpacked_files_and_what_a_mac_leaves_behind_do_not_disturb(tmp_path):
    folder, (frames, _) = write_patient(tmp_path, stills=False, stills_gt=False)
    packed = folder / "patient0001_4CH_half_sequence.nii.gz"
    (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    (folder / f"._{packed.name}").write_bytes(b"")
    cfg = folder / "Info_4CH.cfg"
    cfg.write_bytes(b"\xef\xbb\xbf" + cfg.read_bytes().replace(b"\n", b"\r\n"))
    assert (read_only_one(tmp_path).frames == frames).all()


def test_the_hash_follows_content_not_place(tmp_path):
    one, two, three = (tmp_path / name for name in "abc")
    for root, seed in ((one, 0), (two, 0), (three, 1)):
        write_patient(root, seed=seed, ending=".mhd")
    first, second, other = (read_only_one(root).sha256 for root in (one, two, three))
    assert first == second != other


# --- what is damaged is refused, by name, in one sentence with a remedy

def replace(name, array, **kwargs):
    return lambda folder: write_nifti(folder / f"patient0001_4CH_{name}.nii.gz", array, **kwargs)


def change_bytes(name, change):
    def fault(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return fault


def change_header(offset, data):
    def change(packed):
        raw = gzip.decompress(packed)
        return gzip.compress(raw[:offset] + data + raw[offset + len(data):])

    return change_bytes(VIDEO, change)


VIDEO, CFG = "patient0001_4CH_half_sequence.nii.gz", "Info_4CH.cfg"
FRAMES, MASKS = film()
SPOILT = FRAMES.astype(float)
FAULTS = {
    "empty": (VIDEO, change_bytes(VIDEO, lambda data: b""), "damaged"),
    "truncated gz": (VIDEO, change_bytes(VIDEO, lambda data: data[:-200]), "cut short"),
    "corrupt gz": (VIDEO, change_bytes(VIDEO, lambda data: data[:300] + b"\0" * 60 + data[360:]), "damaged"),
    "no NIfTI": (VIDEO, change_bytes(VIDEO, lambda data: gzip.compress(b"<html>404</html>" * 99)), "damaged"),
    "pixels cut": (VIDEO, change_bytes(VIDEO, lambda d: gzip.compress(gzip.decompress(d)[:-9])), "cut short"),
    "huge header": (VIDEO, change_header(42, b"\xff\x7f\xff\x7f\xff\x7f"), "bytes for"),
    "negative header": (VIDEO, change_header(42, b"\xff\xff"), "damaged"),
    "spacing": (VIDEO, change_header(80, np.array([0, np.nan], "<f4").tobytes()), "spacing"),
    "spacing 0": (VIDEO, change_header(80, bytes(4)), "spacing"),
    "NaN": (VIDEO, replace("half_sequence", np.where(FRAMES == 200, np.nan, FRAMES)), "0..255"),
    "infinite": (VIDEO, replace("half_sequence", np.where(FRAMES == 200, np.inf, FRAMES)), "0..255"),
    "too bright": (VIDEO, replace("half_sequence", FRAMES * 2), "0..255"),
    "negative": (VIDEO, replace("half_sequence", FRAMES - 1), "0..255"),
    "fractions": (VIDEO, replace("half_sequence", FRAMES + 0.5), "0..255"),
    "complex": (VIDEO, replace("half_sequence", FRAMES, dtype=np.complex64), "0..255"),
    "16 bit": (VIDEO, replace("half_sequence", FRAMES * 100, dtype=np.int16), "0..255"),
    "four axes": (VIDEO, replace("half_sequence", np.stack([FRAMES] * 2)), "shape"),
    "a line": (VIDEO, replace("half_sequence", FRAMES[0, 0]), "shape"),
    "frames missing": (VIDEO, replace("half_sequence", FRAMES[:-1]), "5 frames"),
    "unknown label": (VIDEO.replace(".nii", "_gt.nii"), replace("half_sequence_gt", MASKS + 4), "label 7"),
    "mask of other size": (VIDEO.replace(".nii", "_gt.nii"), replace("half_sequence_gt", MASKS[:, 1:]), "shape"),
    "masks missing": (VIDEO.replace(".nii", "_gt.nii"), replace("half_sequence_gt", MASKS[1:]), "shape"),
    "no cfg": (CFG, lambda folder: (folder / CFG).unlink(), "missing"),
    "cfg is binary": (CFG, change_bytes(CFG, lambda data: b"\xff\xfe\x80" * 40), "cannot be read"),
    "no ES": (CFG, lambda folder: write_cfg(folder, "4CH", ES=None), "no line ES:"),
    "ES is a word": (CFG, lambda folder: write_cfg(folder, "4CH", ES="last"), "'last'"),
    "no NbFrame": (CFG, lambda folder: write_cfg(folder, "4CH", NbFrame=None), "no line NbFrame:"),
    "EF is a word": (CFG, lambda folder: write_cfg(folder, "4CH", EF="fair"), "'fair'"),
    "ED is 0": (CFG, lambda folder: write_cfg(folder, "4CH", ED=0), "ED: 0"),
    "ES is beyond the end": (CFG, lambda folder: write_cfg(folder, "4CH", ES=7), "ES: 7"),
    "ED is ES": (CFG, lambda folder: write_cfg(folder, "4CH", ED=6), "ED: 6 and ES: 6"),
}


def refused(root):
    with pytest.raises(CamusError) as caught:
        read_only_one(root)
    message = str(caught.value)
    assert "\n" not in message and ": " in message and message.endswith(".") and len(message) < 400
    assert message.startswith(caught.value.file)
    return caught.value.file, message


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_with_the_files_name_and_the_remedy(tmp_path, fault):
    name, inject, words = FAULTS[fault]
    folder, _ = write_patient(tmp_path)
    inject(folder)
    file, message = refused(tmp_path)
    assert file == f"patient0001/{name}" and words in message


@pytest.mark.parametrize(("name", "array"), [
    ("ES", FRAMES[0, 1:]), ("ES", FRAMES[:2]), ("ES_gt", MASKS[0, :, 1:]), ("ED_gt", MASKS[:2])])
def test_stills_that_do_not_match_are_refused(tmp_path, name, array):
    folder, _ = write_patient(tmp_path, sequence=False, sequence_gt=False)
    replace(name, array)(folder)
    file, message = refused(tmp_path)
    assert file == f"patient0001/patient0001_4CH_{name}.nii.gz" and "shape" in message


OFF = [({"spacing": (0.5, 0.26)}, r"a pixel spacing of \(0.5, 0.26\) mm \(y, x\) where its frames have \(0.5, 0.25\)"),
       ({"spacing": (1.0, 0.5)}, "pixel spacing"), ({"signs": (1, -1)}, "axes that run RP .* its frames run LP"),
       ({"signs": (-1, 1)}, "axes that run LA")]


@pytest.mark.parametrize(("off", "words"), OFF)
@pytest.mark.parametrize("role", ["half_sequence_gt", "ES", "ED_gt", "ES_gt"])
def test_a_file_on_another_grid_than_its_frames_is_refused(tmp_path, role, off, words):
    """Of the same shape, yet its pixels lie elsewhere: an EF or a distance of the two would be wrong."""
    folder, _ = write_patient(tmp_path, sequence="half" in role, sequence_gt="half" in role)
    array = {"half_sequence_gt": MASKS, "ES": FRAMES[5], "ED_gt": MASKS[0], "ES_gt": MASKS[5]}[role]
    replace(role, array)(folder)
    read_only_one(tmp_path)
    replace(role, array, **off)(folder)
    file, message = refused(tmp_path)
    assert file == f"patient0001/patient0001_4CH_{role}.nii.gz" and re.search(words, message)


@pytest.mark.parametrize(("off", "words"), [({"spacing": (0.25, 0.25)}, "pixel spacing"),
                                            ({"signs": (-1, 1)}, "axes that run RP")])
def test_an_mhd_mask_on_another_grid_than_its_frames_is_refused(tmp_path, off, words):
    folder, _ = write_patient(tmp_path, ending=".mhd", sequence=False, sequence_gt=False)
    write_mhd(folder / "patient0001_4CH_ES_gt.mhd", MASKS[5:], **off)
    file, message = refused(tmp_path)
    assert file == "patient0001/patient0001_4CH_ES_gt.mhd" and words in message


def test_a_spacing_that_was_rounded_and_an_axis_that_is_not_told_are_read(tmp_path):
    folder, (_, masks) = write_patient(tmp_path, sequence=False, sequence_gt=False)
    replace("ES_gt", masks[5], spacing=(0.502, 0.249))(folder)
    plain = nibabel.Nifti1Image(masks[0].astype(np.uint8).T, None)
    plain.header.set_zooms((0.25, 0.5))
    nibabel.save(plain, folder / "patient0001_4CH_ED_gt.nii.gz")
    assert (read_only_one(tmp_path).masks == masks[[0, 5]]).all()


def test_ed_of_two_frames_is_refused_by_its_own_name(tmp_path):
    folder, _ = write_patient(tmp_path, sequence=False, sequence_gt=False)
    replace("ED", FRAMES[:2])(folder)
    assert refused(tmp_path) == ("patient0001/patient0001_4CH_ED.nii.gz", "patient0001/patient0001_4CH_ED.nii.gz has 2 "
                                 "frames instead of one: download it again, or delete it to go on without it.")


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("unknown", 1), ("meter", 1e-3), ("micron", 1e3)])
def test_the_unit_of_a_nifti_is_honoured(tmp_path, unit, factor):
    folder, (_, masks) = write_patient(tmp_path)
    image = nibabel.Nifti1Image(masks.astype(np.uint8).T, np.diag([-0.25 * factor, -0.5 * factor, 1, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, folder / VIDEO)
    assert read_only_one(tmp_path).spacing == (0.5, 0.25)


@pytest.mark.parametrize(("line", "spacing"), [("ElementSize = 0.25 0.5 1.54\n", (0.5, 0.25)), ("", None)])
def test_an_mhd_header_that_tells_no_spacing_is_refused(tmp_path, line, spacing):
    """ITK takes 1 mm then."""
    folder, _ = write_patient(tmp_path, ending=".mhd", sequence_gt=False, stills_gt=False)
    header = folder / "patient0001_4CH_sequence.mhd"
    header.write_text(re.sub("ElementSpacing.*\n", line, header.read_text()))
    if spacing:
        assert read_only_one(tmp_path).spacing == spacing
    else:
        assert refused(tmp_path)[1] == (f"patient0001/{header.name} has no line ElementSpacing: write its mm there, or "
                                        "delete it to go on without it.")


def test_ed_without_es_is_refused(tmp_path):
    folder, _ = write_patient(tmp_path, sequence=False, sequence_gt=False)
    (folder / "patient0001_4CH_ES.nii.gz").unlink()
    assert "neither" in refused(tmp_path)[1]


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b""])
def test_a_raw_file_that_is_too_short_is_refused(tmp_path, change):
    folder, _ = write_patient(tmp_path, ending=".mhd")
    change_bytes("patient0001_4CH_sequence.raw", change)(folder)
    assert refused(tmp_path)[0] == "patient0001/patient0001_4CH_sequence.mhd"


def test_a_damaged_mhd_header_is_refused(tmp_path):
    folder, _ = write_patient(tmp_path, ending=".mhd")
    change_bytes("patient0001_4CH_sequence.mhd", lambda data: data[:60])(folder)
    assert refused(tmp_path)[0] == "patient0001/patient0001_4CH_sequence.mhd"


def test_a_patient_that_is_there_twice_is_refused_and_others_are_read(tmp_path):
    for where in ("database_nifti", "copy"):
        write_patient(tmp_path / where)
    write_patient(tmp_path / "database_nifti", "patient0002")
    twice, once = camus.scan(tmp_path)
    with pytest.raises(CamusError, match=r"database_nifti/patient0001 is there twice, also as copy/patient0001"):
        camus.read(twice)
    assert camus.read(once).patient == "patient0002"


def test_views_from_two_folders_are_not_put_together_as_one_patient(tmp_path):
    """As where training/ and testing/ both count from patient0001."""
    for where, name, view in (("training", "patient0001", "2CH"), ("testing", "patient0001", "4CH"),
                              ("testing", "patient0002", "4CH")):
        write_patient(tmp_path / where, name, view)
    (tmp_path / "training" / "patient0002").mkdir()  # holds nothing, so that the other one is good
    read, told = [], []
    for entry in camus.scan(tmp_path):
        try:
            read.append((camus.read(entry).patient, entry.view))
        except CamusError as error:
            told.append(str(error))
    assert read == [("patient0002", "4CH")]
    assert told[:2] == [
        f"{one}/patient0001 is there twice, also as {other}/patient0001: keep only one of them, or read {one}/ alone."
        for one, other in (("training", "testing"), ("testing", "training"))] and "holds no image" in told[2]
    assert [e.problem for e in camus.scan(tmp_path / "testing")] == [None, None]


def test_files_named_after_another_patient_are_refused(tmp_path):
    folder, _ = write_patient(tmp_path, "patient0002")
    folder.rename(tmp_path / "patient0001")
    assert "named after no view of this patient" in refused(tmp_path)[1]


def test_a_folder_that_may_not_be_opened_is_refused_and_others_are_read(tmp_path, monkeypatch):
    for name in ("patient0001", "patient0002"):
        write_patient(tmp_path, name)
    listing = Path.iterdir

    def shut(path):
        if path.name == "patient0001":
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", shut)
    first, second = camus.scan(tmp_path)
    with pytest.raises(CamusError, match="patient0001 cannot be opened"):
        camus.read(first)
    assert camus.read(second).patient == "patient0002"


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_a_root_without_patients_is_refused(tmp_path, make):
    make(tmp_path / "root")
    with pytest.raises(CamusError, match="holds no patient"):
        camus.scan(tmp_path / "root")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
       st.sampled_from([CFG, "patient0001_4CH_half_sequence.nii"]))
def test_random_damage_never_ends_in_another_error(changes, name):
    with tempfile.TemporaryDirectory() as root:
        folder, _ = write_patient(root, ending=".nii", stills=False, stills_gt=False)
        data = bytearray((folder / name).read_bytes())
        for at, byte in changes:
            data[at % len(data)] = byte
        (folder / name).write_bytes(data)
        try:
            s = read_only_one(root)
        except CamusError:
            return
        assert s.frames.shape == s.masks.shape and len(s.frames) == s.es + 1 > 1


# --- parts

def people(first, last):
    return [f"patient{n:04d}" for n in range(first, last + 1)]


def test_official_parts_are_kept(tmp_path):
    write_lists(tmp_path, train=people(1, 6), val=people(7, 8), test=people(9, 9))
    part, note = camus.splits(tmp_path, people(2, 9))
    assert part == dict.fromkeys(people(2, 6), "train") | dict.fromkeys(people(7, 8), "val") | {"patient0009": "test"}
    assert note == "8 of 8 patients by the official lists"
    assert camus.splits(tmp_path / "database_nifti", people(2, 9))[0] == part  # the lists lie beside it


@pytest.mark.parametrize(("listed", "words"), [
    (["patient1", "patient2"], "official lists set aside, none of the 2 they name is here; val was empty, 1 drawn"),
    ([], "official lists set aside, none of the 0 they name is here"), (None, "no official lists; val was empty")])
def test_lists_that_name_nobody_here_are_told_from_no_lists(tmp_path, listed, words):
    if listed is not None:
        write_lists(tmp_path, train=listed, val=[], test=[])
    part, note = camus.splits(tmp_path, people(1, 6))
    assert note.startswith(words) and "missing" not in note and set(part.values()) == set(camus.PARTS)


def test_an_empty_part_is_drawn_from_train_and_the_note_says_so(tmp_path):
    write_lists(tmp_path, train=people(1, 400), val=people(401, 450), test=people(451, 500))
    part, note = camus.splits(tmp_path, people(1, 50) + people(401, 410))
    parts = list(part.values())
    assert (parts.count("train"), parts.count("val"), parts.count("test")) == (44, 10, 6)
    assert all(part[p] == "val" for p in people(401, 410))
    assert note == "60 of 60 patients by the official lists; test was empty, 6 drawn from train (seed 0)"
    assert camus.splits(tmp_path, people(1, 50) + people(401, 410), seed=1)[0] != part


def test_who_is_on_no_list_joins_train(tmp_path):
    write_lists(tmp_path, train=people(1, 2), val=people(3, 3), test=people(4, 4))
    part, note = camus.splits(tmp_path, people(1, 5))
    assert part["patient0005"] == "train" and "1 on no list put in train" in note


@pytest.mark.parametrize("lists", [{}, {"test": people(1, 20)}])
def test_without_training_patients_all_are_drawn(tmp_path, lists):
    write_lists(tmp_path, **lists)
    part, note = camus.splits(tmp_path, people(1, 20))
    parts = list(part.values())
    assert (parts.count("train"), parts.count("val"), parts.count("test")) == (16, 2, 2)
    assert "lists" in note and "val was empty, 2" in note and "test was empty, 2" in note


@pytest.mark.parametrize(("count", "wanted"), [(1, "train"), (2, "train val"), (3, "test train val")])
def test_few_patients_are_trained_on_first(tmp_path, count, wanted):
    part, note = camus.splits(tmp_path, people(1, count))
    assert " ".join(sorted(set(part.values()))) == wanted and ("stays empty" in note) == (count < 3)


def test_few_change_places_when_one_more_comes(tmp_path):
    before, after = (camus.splits(tmp_path, people(1, n))[0] for n in (200, 201))
    assert sum(before[p] != after[p] for p in before) <= 2


@pytest.mark.parametrize(("lists", "words"), [
    ({"train": ["patient0001", "patient0001"]}, "which subgroup_training.txt lists already"),
    ({"train": ["patient0001"], "test": ["patient0001"]}, "subgroup_testing.txt lists patient0001"),
    ({"train": ["patient0001", "patient2;"]}, "'patient2;'")])
def test_lists_that_would_leak_or_make_no_sense_are_refused(tmp_path, lists, words):
    write_lists(tmp_path, **lists)
    with pytest.raises(CamusError, match=words):
        camus.splits(tmp_path, people(1, 3))


@given(st.lists(st.sampled_from(["train", "val", "test", None]), min_size=1, max_size=40), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_everybody_is_in_one_part_and_official_val_and_test_are_not_trained_on(listed, seed):
    patients = people(1, len(listed))
    with tempfile.TemporaryDirectory() as root:
        write_lists(Path(root), **{name: [p for p, part in zip(patients, listed, strict=True) if part == name]
                                   for name in camus.PARTS})
        part, _ = camus.splits(root, patients[::-1], seed)
        assert part == camus.splits(root, patients, seed)[0]
    assert sorted(part) == patients and set(part.values()) <= set(camus.PARTS) and "train" in part.values()
    if "train" in listed:
        for patient, official in zip(patients, listed, strict=True):
            assert official not in ("val", "test") or part[patient] == official


def test_one_table_tells_what_a_partial_copy_holds(tmp_path):
    write_lists(tmp_path, train=people(1, 4), val=people(5, 6), test=people(7, 7))
    root = tmp_path / "database_nifti"
    write_patient(root, "patient0001", "2CH")
    write_patient(root, "patient0001", "4CH", ED=6, ES=1)
    write_patient(root, "patient0002", "4CH", sequence=False, sequence_gt=False)
    write_patient(root, "patient0005", "4CH", stills=False, stills_gt=False, sequence_gt=False)
    write_patient(root, "patient0099", "4CH")
    table = camus.overview(tmp_path).set_index(["split", "view"])
    columns = ["listed", "found", "missing", "sequence", "ed_es_only", "reversed", "masks"]
    assert table.loc[("train", "2CH"), columns].tolist() == [4, 1, 3, 1, 0, 0, 1]
    assert table.loc[("train", "4CH"), columns].tolist() == [4, 2, 2, 1, 1, 1, 2]
    assert table.loc[("val", "4CH"), columns].tolist() == [2, 1, 1, 1, 0, 0, 0]
    assert table.loc[("test", "4CH"), columns].tolist() == [1, 0, 1, 0, 0, 0, 0]
    assert table.loc[("unlisted", "4CH"), columns].tolist() == [1, 1, 0, 1, 0, 0, 1]
    assert table.loc[(slice(None), "4CH"), "used"].tolist() == [2, 1, 1, 0]  # one of train is drawn for test
    assert "test was empty, 1 drawn" in table.attrs["note"]


# --- the real thing, where it is at hand

real = pytest.mark.skipif(not REAL.is_dir(), reason="no copy of CAMUS beside the repository")
real_mhd = pytest.mark.skipif(not REAL_MHD.is_dir(), reason="no MHD copy of CAMUS beside the repository")


@real
def test_real_frames_stand_upright_and_are_not_mirrored():
    across = []
    for s in (camus.read(e) for e in camus.scan(REAL)[:20]):
        sector, mask = s.frames[0] > 0, s.masks[0]
        assert sector[:20].sum() < sector[150:170].sum()  # the sector opens downwards
        assert np.argwhere(mask == 1)[:, 0].mean() < np.argwhere(mask == 3)[:, 0].mean()  # apex up
        across.append(np.argwhere(mask == 1)[:, 1].mean() / mask.shape[1])
        assert s.ed_es_only and s.spacing == (0.308, 0.308)
    assert 0.52 < np.mean(across) < 0.56  # four chambers: the left ventricle lies right of the middle


@real
def test_the_real_half_sequence_is_read_without_masks():
    (entry,) = [e for e in camus.scan(REAL) if "sequence" in e.files]
    s = camus.read(entry)
    assert s.frames.shape == (15, 422, 512) and (s.masks == UNLABELLED).all() and not s.ed_es_only


@real
def test_the_real_copy_is_counted():
    table = camus.overview(REAL).set_index(["split", "view"])
    assert table.loc[("train", "4CH"), ["listed", "found", "ed_es_only"]].tolist() == [400, 250, 250]
    assert table.loc[("test", "4CH"), ["found", "missing", "used"]].tolist() == [0, 50, 30]


@real
@real_mhd
def test_both_releases_show_the_same_frame():
    nifti = next(camus.read(e) for e in camus.scan(REAL) if e.patient == "patient0001" and e.view == "4CH")
    mhd = next(camus.read(e) for e in camus.scan(REAL_MHD) if e.view == "4CH")
    assert mhd.spacing == (0.154, 0.308)
    assert (mhd.frames[:, ::2] == nifti.frames).all()  # the NIfTI release holds every second row
    assert (mhd.masks[:, ::2] == nifti.masks).mean() > 0.99


@real_mhd
def test_the_missing_raw_of_the_real_mhd_copy_is_reported():
    entries = camus.scan(REAL_MHD)
    assert [(e.view, list(e.left_out)) for e in entries] == [
        (view, [f"patient0001/patient0001_{view}_sequence.mhd"]) for view in ("2CH", "4CH")]
    assert all(camus.read(e).ef == 63.2 for e in entries)
