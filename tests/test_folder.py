"""Image tasks on disk: UltraBench's lists, plain class folders, and what is wrong with them in one sentence."""

import json

import numpy as np
import pytest
from PIL import Image
from ultrabench_set import ultrabench_set

from usjepa_nb import folder
from usjepa_nb.tasks import TaskError


def refused(path, *sentences, **arguments):
    with pytest.raises(TaskError) as error:
        folder.read(path, 32, 4, **arguments)
    message = str(error.value)
    assert "\n" not in message
    for sentence in sentences:
        assert sentence in message


@pytest.fixture
def root(tmp_path):
    return ultrabench_set(tmp_path / "fatty_liver_v1.0.1")


def rewrite(path, change):
    rows = json.loads(path.read_text())
    for row in rows:
        change(row)
    path.write_text(json.dumps(rows))


def test_an_ultrabench_set_becomes_a_task(root):
    task = folder.read(root, 32, 4)
    assert task.name == root.name and task.clips.shape == (60, 4, 32, 32) and not task.obstacle()
    assert [len(task.part(p)) for p in ("train", "val", "test")] == [36, 12, 12]
    assert task.classes.tolist() == ["0", "1"] and len(set(task.groups)) == 20
    row = json.loads((root / "test.json").read_text())[0]
    i = task.part("test")[0]
    assert (task.labels[i], task.groups[i]) == (str(row["label"]), str(row["patient"]))
    picture = Image.open(root / row["image"]).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    assert all((task.clips[i, t].numpy() == np.asarray(picture)).all() for t in range(4))


def test_another_key_can_be_asked_for(root):
    assert folder.read(root, 32, 4, "pathology").classes.tolist() == ["NFLD", "Normal"]
    task = folder.read(root, 32, 4, "steatosis", regression=True)
    assert task.regression and set(task.labels) <= set(range(0, 101))


def test_unknown_labels_are_left_out(root):
    rewrite(root / "train.json", lambda row: row.update(steatosis=float("nan") if row["label"] else None))
    assert len(folder.read(root, 32, 4, "steatosis").part("train")) == 0
    assert len(folder.read(root, 32, 4, "steatosis", regression=True).part("train")) == 0


def test_whose_an_image_is(root, capsys):
    folder.read(root, 32, 4)
    assert capsys.readouterr().out == ""
    for path in root.glob("*.json"):  # POCUS names the video instead
        rewrite(path, lambda row: row.update(source=f"video{row.pop('patient')}.mp4"))
    assert len(set(folder.read(root, 32, 4).groups)) == 20
    rewrite(root / "test.json", lambda row: row.update(source="video1.mp4"))
    folder.read(root, 32, 4)
    assert "patients in train and in test at once: 1 (video1.mp4, …)" in capsys.readouterr().out
    rewrite(root / "test.json", lambda row: row.update(patient=None))  # unknown is nobody's name
    assert "None" not in folder.read(root, 32, 4).groups
    capsys.readouterr()
    rewrite(root / "test.json", lambda row: row.update(patient=float("nan"), source=""))
    groups = folder.read(root, 32, 4).groups
    assert "nan" not in groups and len(set(groups)) == 16 + 12 and capsys.readouterr().out == ""
    for path in root.glob("*.json"):  # AUL, GBCU and MMOTU name nobody
        rewrite(path, lambda row: row.pop("source"))
    assert len(set(folder.read(root, 32, 4).groups)) == 60
    assert "nothing says which images are of one patient" in capsys.readouterr().out


@pytest.fixture
def plain(tmp_path):
    """tmp/organs/{training,valid,test}/{liver,lung}/case<i>_<k>.png, in colour and of several sizes."""
    rng = np.random.default_rng(0)
    for part, cases in (("training", range(4)), ("valid", range(4, 6)), ("test", range(6, 8))):
        for organ in ("liver", "lung"):
            where = tmp_path / "organs" / part / organ
            where.mkdir(parents=True)
            for case in cases:
                for k in range(2):
                    pixels = rng.integers(0, 256, (20 + case, 30, 3), np.uint8)
                    Image.fromarray(pixels).save(where / f"case{case}{organ}_{k}.png")
    return tmp_path / "organs"


def test_class_folders_become_a_task(plain, capsys):
    task = folder.read(plain, 32, 2)
    assert task.classes.tolist() == ["liver", "lung"] and task.clips.shape == (32, 2, 32, 32)
    assert [len(task.part(p)) for p in ("train", "val", "test")] == [16, 8, 8]
    assert len(set(task.groups)) == 32 and "too narrow" in capsys.readouterr().out
    named = folder.read(plain, 32, 2, patient=r"case\d+")
    assert set(named.groups) == {f"case{i}" for i in range(8)} and capsys.readouterr().out == ""


def test_a_set_without_validation_is_welcome(root):
    (root / "validation.json").unlink()
    assert not folder.read(root, 32, 4).obstacle()


def test_folders_that_are_no_task_are_refused(root, plain, tmp_path):
    refused(tmp_path / "none", "none: no such folder")
    refused(root / "images", "no images for the part 'train'", "train/<class>/*.png")
    refused(plain, "folders hold classes and no quantities", regression=True)
    refused(plain, "has no match for --patient 'x'", patient="x")
    refused(plain, "--patient '(' is no regular expression", patient="(")
    (root / "test.json").unlink()
    refused(root, "no images for the part 'test'; give test.json")


def test_broken_lists_are_refused(root):
    refused(root, "train.json", "has no 'view'; its keys are patient, image,", "--label", label="view")
    refused(root, "pathology = 'NFLD' is no finite number", label="pathology", regression=True)
    path = root / "train.json"
    whole = path.read_text()
    path.write_text(whole[:-40])
    refused(root, "train.json: cannot be read as JSON")
    for text in ("{}", "[1, 2]", '[{"label": 1}]', '[{"label": 1, "image": null}]'):
        path.write_text(text)
        refused(root, 'train.json: is not a list of objects with the key "image"')


@pytest.mark.parametrize("label", [float("inf"), "-inf", "1e999", pytest.param(10**400, id="huge")])
def test_a_quantity_that_is_not_finite_is_refused(root, label):
    rewrite(root / "train.json", lambda row: row.update(steatosis=label))
    refused(root, "train.json: steatosis = ", "is no finite number", "correct it", label="steatosis", regression=True)


def test_broken_images_are_refused(root):
    path = root / json.loads((root / "train.json").read_text())[0]["image"]
    whole = path.read_bytes()
    for cut in (0, 20, len(whole) // 2):
        path.write_bytes(whole[:cut])
        refused(root, path.name, "cannot be read as an image")
    Image.fromarray(np.full((20, 30), 4000, np.uint16)).save(path, "png")
    refused(root, path.name, "more than 8 bits")
    path.unlink()
    refused(root, path.name, "no such image, though its list names it")
