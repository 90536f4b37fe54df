"""Faults in what one is given: files, folders, clocks, locales. `faults.MATRIX` lists all cases and their tests."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from faults import MATRIX, ended, forked, kill_itself, on_call, sentence
from test_camus import FRAMES, MASKS, VIDEO, film, people, replace, write_cfg, write_lists, write_nifti, write_patient

from usjepa_nb import camus, folder, store
from usjepa_nb.camus import CamusError
from usjepa_nb.dataset import Dataset
from usjepa_nb.store import Store
from usjepa_nb.tasks import TaskError

HERE = Path(__file__).parent
CFG = "Info_4CH.cfg"


def convert(root, out, **options):
    return store.convert(root, out, 8, **{"workers": 1, "progress": False} | options)


def leftovers(out):
    return sorted(p.name for p in out.parent.glob(f"{out.name}?*") if p.suffix != ".lock")


@pytest.fixture
def tree(tmp_path):
    """Two patients, each with a film, masks and stills."""
    for name, seed in (("patient0001", 1), ("patient0002", 2)):
        write_patient(tmp_path / "tree", name, seed=seed)
    return tmp_path / "tree"


@pytest.mark.parametrize("case", MATRIX)
def test_every_case_of_the_matrix_has_its_test(case):
    file, _, rest = MATRIX[case].partition("::")
    name, _, parameter = rest.rstrip("]").partition("[")
    text = (HERE / file).read_text(encoding="utf-8")
    functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert functions.count(name) == 1 and f'"{parameter}"' in f'{text} ""'


# --- images

def colour(folder):
    image = np.zeros((16, 12, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / VIDEO)


GT = VIDEO.replace(".nii", "_gt.nii")
KINDS = {
    "colour": (VIDEO, colour),
    "NaN in the mask": (GT, replace("half_sequence_gt", np.where(MASKS == 2, np.nan, MASKS))),
    "label 1.5": (GT, replace("half_sequence_gt", np.where(MASKS == 2, 1.5, MASKS))),
    "label 4 at ED": ("patient0001_4CH_ED_gt.nii.gz", lambda folder: [
        (folder / GT).unlink(), replace("ED_gt", np.where(MASKS[0] == 3, 4, MASKS[0]))(folder)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_and_labels_of_the_wrong_kind_are_refused(tree, tmp_path, kind):
    name, inject = KINDS[kind]
    inject(tree / "patient0001")
    report = convert(tree, tmp_path / "data.h5")
    assert list(report.refused) == [f"patient0001/{name}"] and report.converted == 1
    sentence(report.refused[f"patient0001/{name}"], name, r"0\.\.255|the label 4", ": download it again, or delete it")
    assert Store(tmp_path / "data.h5").table["patient"].tolist() == ["patient0002"]


@pytest.mark.parametrize("role", ["half_sequence", "ED"])  # the second is not shown, yet it is part of the content
@pytest.mark.parametrize("fault", ["a folder", "a dead link"])
def test_an_image_that_cannot_be_opened_costs_its_sequence_alone(tree, tmp_path, role, fault):
    image = tree / "patient0001" / f"patient0001_4CH_{role}.nii.gz"
    image.unlink()
    image.mkdir() if fault == "a folder" else image.symlink_to(tmp_path / "nowhere")
    report = convert(tree, tmp_path / "data.h5")
    assert list(report.refused) == [f"patient0001/{image.name}"] and report.converted == 1
    sentence(*report.refused.values(), r"cannot be opened \(", "make it a readable file, or delete it")
    image.rmdir() if fault == "a folder" else image.unlink()
    write_nifti(image, film(seed=1)[0][slice(None) if role == "half_sequence" else 0])
    assert convert(tree, tmp_path / "data.h5").converted == 1 and len(Store(tmp_path / "data.h5")) == 2


# --- permissions: in a process that has those of an ordinary user, whoever runs the tests

SHUT = """
import json, os, sys
from pathlib import Path
from usjepa_nb import store
root, out, what = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
mode = what.stat().st_mode
os.chmod(what, int(sys.argv[4], 8))
try:
    report = store.convert(root, out, 8, workers=1, progress=False)
    print(json.dumps([report.converted, report.refused]))
except store.CamusError as error:
    sys.exit(str(error))
finally:
    os.chmod(what, mode)
"""


def as_user(*command, **options):
    """Run a command for which permissions hold: root loses the two capabilities that pass them by."""
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root passes permissions by, and there is no setpriv to prevent it")
        without = "-dac_override,-dac_read_search"
        command = ("setpriv", f"--bounding-set={without}", f"--inh-caps={without}", *command)
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, **options)


@pytest.mark.parametrize(("what", "mode", "status", "words"), [
    ("tree/patient0001/" + VIDEO, "000", 0, ["half_sequence.nii.gz cannot be opened", "make it a readable"]),
    ("tree/patient0001/" + CFG, "000", 0, [r"cfg cannot be opened \(Permission denied\)", "make it a readable"]),
    ("tree/patient0001", "000", 0, [r"tree/patient0001 cannot be opened \(Permission denied\): make it readable"]),
    ("tree/patient0001", "444", 0, ["patient0001/Info_4CH.cfg cannot be opened"]),
    ("tree/database_split/subgroup_training.txt", "000", 1, ["subgroup_training.txt cannot be opened", "readable"]),
    ("out", "555", 1, [r"out/data.h5 could not be written \(Permission denied\)", "see that its folder is writable"]),
])
def test_without_permission_the_file_is_named_and_nothing_is_lost(tree, tmp_path, what, mode, status, words):
    write_lists(tree, train=["patient0001", "patient0002"], val=[], test=[])
    (tmp_path / "out").mkdir()
    before = sorted(p for p in tmp_path.rglob("*") if p.name != "data.h5.lock")
    done = as_user(sys.executable, "-c", SHUT, tree, tmp_path / "out" / "data.h5", tmp_path / what, mode)
    assert done.returncode == status, done.stderr
    if status:
        sentence(done.stderr, *words)
        assert [p for p in tmp_path.rglob("*.h5")] == []
        assert not [p for p in before if not p.exists()] and not list(tmp_path.rglob("*.tmp*"))
    else:
        converted, refused = json.loads(done.stdout)
        assert converted == 1 and len(refused) == 1
        sentence(*refused.values(), *words)
    assert convert(tree, tmp_path / "out" / "data.h5").refused == {}
    assert len(Store(tmp_path / "out" / "data.h5")) == 2


# --- patients, cfg, lists

@pytest.mark.parametrize("fault", ["empty", "cfg alone"])
def test_a_patient_without_images_is_reported(tree, tmp_path, fault):
    (tree / "patient0003").mkdir()
    if fault == "cfg alone":
        write_cfg(tree / "patient0003", "4CH")
    report = convert(tree, tmp_path / "data.h5")
    assert report.converted == 2 and list(report.refused) == ["tree/patient0003"]
    sentence(*report.refused.values(), "tree/patient0003 holds no image: copy its files again, or delete it")
    assert camus.overview(tree)["found"].sum() == 2
    shutil.rmtree(tree / "patient0001"), shutil.rmtree(tree / "patient0002")
    with pytest.raises(CamusError, match=r"no sequence could be converted. tree/patient0003 holds no image"):
        convert(tree, tmp_path / "none.h5")
    assert not (tmp_path / "none.h5").exists()


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n").encode(), lambda text: text.replace("\n", "\r").encode(),
    lambda text: text.encode("utf-8-sig"), lambda text: text.replace(": ", " :\t").encode() + b" \n\n",
    lambda text: (text + "\nNote: Übung").encode()])
def test_a_cfg_of_another_editor_reads_the_same(tmp_path, change):
    folder, _ = write_patient(tmp_path, ED=6, ES=1)
    wanted = camus.read(*camus.scan(tmp_path))
    (folder / CFG).write_bytes(change((folder / CFG).read_text()))
    read = camus.read(*camus.scan(tmp_path))
    names = ("ed", "es", "ef", "quality", "sex", "age", "frame_rate", "was_reversed")
    assert [getattr(read, name) for name in names] == [getattr(wanted, name) for name in names]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_cfg_in_another_encoding_is_refused_with_the_remedy(tree, tmp_path, encoding):
    cfg = tree / "patient0001" / CFG
    cfg.write_bytes((cfg.read_text() + "\nNote: Übung").encode(encoding))
    report = convert(tree, tmp_path / "data.h5")
    assert report.converted == 1
    sentence(*report.refused.values(), "patient0001/Info_4CH.cfg cannot be read as text: save it as UTF-8")


@pytest.mark.parametrize(("key", "text"), [("EF", "54,5"), ("FrameRate", "48,4"), ("Age", "56,0"), ("ES", "6,0")])
def test_a_decimal_comma_is_refused_and_not_misread(tree, tmp_path, key, text):
    write_cfg(tree / "patient0001", "4CH", **{key: text})
    report = convert(tree, tmp_path / "data.h5")
    assert report.converted == 1
    sentence(*report.refused.values(), f"{CFG} has {key}: '{text}': write a (whole number|number such as 54.5) there")


def test_an_official_list_that_is_missing_is_told(tmp_path):
    write_lists(tmp_path, train=people(1, 3), val=people(4, 4))
    part, note = camus.splits(tmp_path, people(1, 5))
    assert "database_split/subgroup_testing.txt is missing" in note and sorted(set(part.values())) == [
        "test", "train", "val"]
    write_lists(tmp_path, test=people(5, 5))
    assert "missing" not in camus.splits(tmp_path, people(1, 5))[1]


def test_a_list_that_is_no_list_is_quoted_briefly(tree, tmp_path):
    write_lists(tree, train=["patient0001"], test=[])
    (tree / "database_split" / "subgroup_testing.txt").write_bytes(bytes(range(33, 256)) * 50)
    with pytest.raises(CamusError) as caught:
        convert(tree, tmp_path / "data.h5")
    sentence(caught.value, r"database_split/subgroup_testing.txt has ", "write one patient0001 a line")
    assert not (tmp_path / "data.h5").exists()


def test_a_list_of_another_editor_reads_the_same(tmp_path):
    write_lists(tmp_path, train=people(1, 2), val=people(3, 3), test=people(4, 4))
    wanted = camus.splits(tmp_path, people(1, 4))
    for path in (tmp_path / "database_split").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert camus.splits(tmp_path, people(1, 4)) == wanted


def test_too_few_patients_are_counted_before_anything_is_trained(tmp_path):
    write_patient(tmp_path / "one")
    data = Dataset("smoke", tmp_path / "one", tmp_path / "cache")
    with pytest.raises(CamusError) as caught:
        data.clips(data.store.rows("val"))
    sentence(caught.value, r"one-\w+: a part of the split is empty", "nobody to spare", "three patients with masks")


def test_an_image_list_of_another_editor(tmp_path):
    rows = [{"image": "a.png", "label": 0}]
    (tmp_path / "train.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode().replace(b" ", b"\r\n"))
    (found,) = folder.from_lists(tmp_path, "label", False)
    assert found[0] == tmp_path / "a.png" and found[1] == "0"
    (tmp_path / "train.json").write_bytes(b"[" * 100_000)
    with pytest.raises(TaskError) as caught:
        folder.read(tmp_path, 8, 2)
    sentence(caught.value, "train.json: cannot be read as JSON", "let `ultrabench` write it again")


# --- places, clocks, locales

@pytest.mark.parametrize("name", ["a copy of CAMUS", "Übung 心 'n' \"$x\" {y}", os.fsdecode(b"caf\xe9"), "line\nbreak"])
def test_names_of_folders_do_not_matter(tree, tmp_path, name):
    try:
        shutil.copytree(tree, tmp_path / name / name)
    except OSError:
        pytest.skip("this file system does not take such a name")
    assert convert(tree, tmp_path / "plain.h5").converted == 2
    out = tmp_path / name / f"{name}.h5"
    report = convert(tmp_path / name / name, out)
    assert report.converted == 2 and not report.refused and leftovers(out) == []
    with Store(out) as odd, Store(tmp_path / "plain.h5") as plain:
        assert odd.data_hash == plain.data_hash and (odd.frames(1) == plain.frames(1)).all()
    (tmp_path / name / name / "patient0001" / CFG).unlink()
    sentence(*convert(tmp_path / name / name, out).refused.values(), "patient0001/Info_4CH.cfg is missing")


def test_clocks_and_zones_do_not_matter(tree, tmp_path, monkeypatch):
    """Times tell only whether a file has changed: no file is "newer" than another."""
    out, files = tmp_path / "data.h5", [p for p in tree.rglob("*") if p.is_file()]
    convert(tree, out)
    wanted = Store(out).data_hash
    for seconds in (time.time() + 1e9, -1e6, 0):
        for path in files:
            os.utime(path, (seconds, seconds))
        for zone, reused in (("Pacific/Kiritimati", 0), ("Pacific/Pago_Pago", 2), ("no/such", 2)):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert convert(tree, out).reused == reused and Store(out).data_hash == wanted
    monkeypatch.undo()
    time.tzset()
    write_cfg(tree / "patient0001", "4CH", EF=54.5)
    os.utime(tree / "patient0001" / CFG, (0, 0))  # as old as before, and not the same
    assert convert(tree, out).converted == 1 and Store(out).table["ef"].tolist() == [54.5, 54]


SPEAKS = """
import locale, sys
locale.setlocale(locale.LC_ALL, "")
from usjepa_nb import profile, store
assert profile.load(sys.argv[3]).lr == 0.001
report = store.convert(sys.argv[1], sys.argv[2], 8, workers=1, progress=False)
print(locale.localeconv()["decimal_point"], report.converted)
"""


@pytest.mark.parametrize("name", ["C", "de_DE.UTF-8", "de_DE.ISO-8859-1"])
def test_the_locale_does_not_matter(tree, tmp_path, name):
    root, point, (language, _, encoding) = tmp_path / "Übung 心", ".", name.partition(".")
    if encoding:
        if not shutil.which("localedef"):
            pytest.skip("no localedef here")
        made = subprocess.run(["localedef", "-i", language, "-f", encoding, tmp_path / name], capture_output=True)
        if made.returncode > 1 or not (tmp_path / name).is_dir():
            pytest.skip("the sources of this locale are not installed")
        point = ","
    tree.rename(root)
    (tmp_path / "own.yaml").write_text(re.sub(r"(?m)^lr: \S+", "lr: 0.001", (
        HERE.parent / "profiles" / "smoke.yaml").read_text(encoding="utf-8")), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))} | {
        "LC_ALL": name, "LOCPATH": str(tmp_path), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = tmp_path / "locale ü.h5"
    done = subprocess.run([sys.executable, "-c", SPEAKS, root, out, tmp_path / "own.yaml"], env=env, cwd=HERE.parent,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.split() == [point.encode(), b"2"], done.stderr.decode()[-900:]
    convert(root, tmp_path / "here.h5")
    assert out.read_bytes() == (tmp_path / "here.h5").read_bytes() and leftovers(out) == []


# --- processes and the HDF5 file

@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize("older", [False, True])
def test_killed_while_hdf5_is_written_nothing_is_lost(tree, tmp_path, call, older):
    out = tmp_path / "data.h5"
    if older:
        convert(tree, out)
        write_patient(tree, "patient0002", seed=9)  # it has to be written again
    before = out.read_bytes() if older else None

    def work():
        h5py.Dataset.__setitem__ = on_call(call, h5py.Dataset.__setitem__)
        convert(tree, out)

    assert ended(forked(work)) == -signal.SIGKILL
    assert (out.read_bytes() if older else None) == before and any(".tmp" in name for name in leftovers(out))
    report = convert(tree, out)
    assert (report.converted, report.reused) == (0, 2) and leftovers(out) == []  # the parts were made, and are kept
    convert(tree, tmp_path / "undisturbed.h5")
    assert out.read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()


def test_killing_is_what_the_hook_does():
    assert ended(forked(kill_itself)) == -signal.SIGKILL and ended(forked(lambda: None)) == 0


def without(name):
    def change(path):
        with h5py.File(path, "a") as file:
            del file[name]
    return change


def shorter(path):
    with h5py.File(path, "a") as file:
        frames = file["frames"][:-1]
        del file["frames"]
        file["frames"] = frames


def blot(start, stop):
    def change(path):
        data = bytearray(path.read_bytes())
        data[start:stop] = b"\xff" * (stop - start)
        path.write_bytes(data)
    return change


@pytest.mark.parametrize("change", [without("sequences"), without("sequences/length"), without("frames"),
                                    without("masks"), shorter, blot(8, 40), blot(100, 200), blot(400, 900)])
def test_a_file_that_is_damaged_inside_is_refused_and_made_again(tree, tmp_path, change):
    out = tmp_path / "data.h5"
    convert(tree, out)
    wanted = out.read_bytes()
    change(out)
    with pytest.raises(CamusError) as caught:
        Store(out).frames(0)
    sentence(caught.value, r"data.h5 is (cut short or no HDF5 file|of another kind) \(", "delete it and convert again")
    assert convert(tree, out).converted == 2 and out.read_bytes() == wanted


def test_native_masks_that_are_gone_are_named(tree, tmp_path):
    convert(tree, tmp_path / "data.h5")
    without("native")(tmp_path / "data.h5")
    with pytest.raises(CamusError) as caught:
        Store(tmp_path / "data.h5").native_masks(0)
    sentence(caught.value, "data.h5 is cut short or no HDF5 file", "delete it and convert again")


def test_a_file_cut_short_behind_ones_back_is_named(tree, tmp_path):
    out = tmp_path / "data.h5"
    convert(tree, out)
    with Store(out) as opened:
        os.truncate(out, 3000)
        with pytest.raises(CamusError) as caught:
            [opened.frames(i) for i in opened.rows()] and [opened.native_masks(i) for i in opened.rows()]
        sentence(caught.value, "data.h5 is cut short", "delete it and convert again")
    assert convert(tree, out).converted == 2 and (Store(out).frames(0)[:, 0, 0] >= 0).all()
    assert FRAMES.shape[0] == Store(out).table["length"][0]
