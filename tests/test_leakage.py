"""Who is tested is not learnt from: parts and shares of real and made-up data, planted leaks, and non-interference.

The last is the strongest claim here. Test patients are replaced by noise, and every weight, every choice and every
score of somebody else stays what it was, bit for bit. What is not used cannot leak.
"""

import ast
import gzip
import hashlib
import itertools
import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from smoke_lab import beside, smoke_lab
from test_camus import REAL, real, write_lists, write_patient
from test_runs import on
from toy_task import toy

from usjepa_nb import camus, heads, linear, phantom, probe, profile, splits, tables, tasks, weights
from usjepa_nb.camus import CamusError
from usjepa_nb.runs import Lab
from usjepa_nb.segment import fit_probe, labelled_rows, segmentation

PARTS = ("train", "val", "test")
TRAINED = [("videomae", 1.0), ("vjepa", 1.0), ("vjepa_ll", 0.25), ("salt", 1.0), ("supervised", 1.0), ("unet", 1.0),
           ("finetuned", 1.0)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


# --- parts and shares

def separated(part):
    """See that nobody is in two parts -> {part: patients}."""
    members = {name: {p for p, of in part.items() if of == name} for name in PARTS}
    assert all(members.values()) and set().union(*members.values()) == set(part)
    assert not any(a & b for a, b in itertools.combinations(members.values(), 2))
    return members


def shares_are_nested_and_of_training(data, table, seed):
    outside, before = set(table.loc[table["split"] != "train", "patient"]), set()
    for fraction in (1, 5, 10, 20, 50, 75, 100):
        patients = set(table.loc[data(seed).labelled(fraction), "patient"])
        assert before <= patients and patients and not patients & outside, (seed, fraction)
        before = patients
    assert before == set(table.loc[(table["split"] == "train") & table["labelled"], "patient"])


def test_parts_and_shares_of_the_phantom(lab):
    table = lab.store.table
    separated(dict(table[["patient", "split"]].to_numpy()))
    for seed in range(5):
        shares_are_nested_and_of_training(lambda s: Lab("smoke", cache=lab.cache, seed=s), table, seed)


@real
def test_parts_and_shares_of_real_patients():
    entries = [e for e in camus.scan(REAL) if not e.problem]
    part, _ = splits.splits(REAL, [e.patient for e in entries])
    listed, members = splits.official(REAL), separated(part)
    for name in PARTS:  # whoever is on a list is where the list says, unless that part had to be drawn
        here = {p for p in part if listed.get(p) == name}
        assert here <= members[name] or name == "train"
    quality = [camus._cfg(e.files["cfg"])("ImageQuality", str, "") for e in entries]
    table = pd.DataFrame({"patient": [e.patient for e in entries], "quality": quality, "labelled": True,
                          "split": [part[e.patient] for e in entries]})
    for seed in range(5):
        shares_are_nested_and_of_training(lambda s: on(table, s), table, seed)


@real
def test_of_all_real_patients_two_share_a_frame():
    """patient0033 and patient0068, both for training, hold the same ED frame and different ES frames and masks."""
    seen = {}
    for entry in camus.scan(REAL):
        for role in {"ED", "ES", "ED_gt", "ES_gt"} & set(entry.files):
            digest = hashlib.sha256(entry.files[role].read_bytes()).hexdigest()
            seen.setdefault((entry.view, role, digest), []).append(entry.patient)
    twice = [(key[1], names) for key, names in seen.items() if len(names) > 1]
    assert twice == [("ED", ["patient0033", "patient0068"])]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(3, 60), st.integers(0, 5))
def test_the_phantoms_lists_hold_everybody_once(patients, seed):
    names = [p for part in phantom.split(patients, seed).values() for p in part]
    assert sorted(names) == [f"patient{n:04d}" for n in range(1, patients + 1)]


@pytest.mark.parametrize("name", ["about.json", "about-ti.json"])
def test_shipped_weights_saw_nobody_that_a_profile_judges_by(name):
    about = json.loads((ROOT / "weights" / name).read_text())
    made_of = profile.load(about["profile"]).phantom_seed
    for path in sorted((ROOT / "profiles").glob("*.yaml")):
        if not path.stem.startswith("weights"):
            assert profile.load(path.stem).phantom_seed != made_of, path.name
    assert f"-seed{made_of}" in about["data"]


def test_the_study_of_recipes_holds_its_parts_apart(lab, monkeypatch):
    """Tuning sees training patients alone; judging changes validation and test over and mixes nobody."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recipe

    official = lab.store.table["split"].to_numpy()
    inner = recipe.InnerFold("smoke", cache=lab.cache).store
    split = inner.table["split"].to_numpy()
    assert set(official[np.isin(split, ["train", "val"])]) == {"train"} and len(inner.rows("test")) == 0
    patients = [set(inner.table.loc[inner.rows(name), "patient"]) for name in ("train", "val")]
    assert all(patients) and not patients[0] & patients[1]
    judged = recipe.assign(beside(lab, lab.cache / "judged").store, pd.Series(official).replace(
        {"val": "test", "test": "val"}))
    assert (judged.table["split"] == np.where(official == "val", "test", np.where(official == "test", "val",
                                                                                  "train"))).all()


# --- planted leaks

@pytest.fixture
def tree(tmp_path):
    """Six patients of one view, two in each part."""
    root = tmp_path / "tree"
    for number in range(1, 7):
        write_patient(root / "database_nifti", f"patient{number:04d}", seed=number, shape=(6, 20, 16))
    lists(root, train=[1, 2], val=[3, 4], test=[5, 6])
    return root


def lists(root, **parts):
    write_lists(root, **{part: [f"patient{n:04d}" for n in numbers] for part, numbers in parts.items()})


def opened(root, tmp_path):
    return Lab("smoke", root, tmp_path / "cache").store


def under_another_name(root, old, new):
    """Copy a patient's folder; the files are renamed as well."""
    source, folder = (root / "database_nifti" / name for name in (old, new))
    shutil.copytree(source, folder)
    for path in folder.glob(f"{old}*"):
        path.rename(folder / path.name.replace(old, new))
    return folder


def test_an_honest_tree_is_opened(tree, tmp_path):
    assert opened(tree, tmp_path).table["split"].tolist() == ["train"] * 2 + ["val"] * 2 + ["test"] * 2


@pytest.mark.parametrize("disguise", ["none", "cfg", "packed", "no masks"])
@pytest.mark.parametrize("of", [6, 3])
def test_a_patient_copied_under_a_training_name_is_caught(tree, tmp_path, of, disguise):
    """As it is; with another line in its cfg; packed again, so that no byte of a file is the same; without masks."""
    folder = under_another_name(tree, f"patient{of:04d}", "patient0007")
    lists(tree, train=[1, 2, 7], val=[3, 4], test=[5, 6])
    if disguise == "cfg":
        (folder / "Info_4CH.cfg").write_text((folder / "Info_4CH.cfg").read_text() + "\nNote: copied")
    if disguise == "packed":
        for path in folder.glob("*.nii.gz"):
            path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=7))
    if disguise == "no masks":
        for path in folder.glob("*_gt.nii.gz"):
            path.unlink()
    part = "val" if of == 3 else "test"
    with pytest.raises(CamusError, match=rf"patient000{of} = patient0007 is in {part} and train at once, so scores "
                                         r"would mean nothing: correct the CAMUS folder"):
        opened(tree, tmp_path)


def test_one_view_of_a_test_patient_among_the_files_of_another_is_caught(tree, tmp_path):
    folder = tree / "database_nifti"
    for path in (folder / "patient0006").glob("patient0006*"):
        shutil.copy(path, folder / "patient0001" / path.name.replace("patient0006_4CH", "patient0001_2CH"))
    shutil.copy(folder / "patient0006" / "Info_4CH.cfg", folder / "patient0001" / "Info_2CH.cfg")
    with pytest.raises(CamusError, match="patient0001 = patient0006 is in train and test at once"):
        opened(tree, tmp_path)


def test_a_frame_that_two_patients_share_across_parts_is_told(tree, tmp_path, capsys):
    """As in CAMUS itself, where one ED frame is there under two names: a word, and no refusal."""
    folder = tree / "database_nifti"
    for name in ("patient0001", "patient0005"):
        (folder / name / f"{name}_4CH_half_sequence.nii.gz").unlink()
        (folder / name / f"{name}_4CH_half_sequence_gt.nii.gz").unlink()
    shutil.copy(folder / "patient0001" / "patient0001_4CH_ED.nii.gz", folder / "patient0005/patient0005_4CH_ED.nii.gz")
    opened(tree, tmp_path)
    assert "patient0001 and patient0005 share one ED frame, and are in train and test" in capsys.readouterr().out


def test_pictures_that_show_nothing_are_no_leak(tree, tmp_path):
    """Two black sequences are equal, and are not the same heart."""
    from test_camus import write_nifti

    for name in ("patient0001", "patient0006"):
        folder = tree / "database_nifti" / name
        frames = np.zeros((6, 20, 16))
        frames[3, 4, 5] = int(name[-1])
        write_nifti(folder / f"{name}_4CH_half_sequence.nii.gz", frames)
    assert len(opened(tree, tmp_path)) == 6


def test_a_shifted_list_is_caught(tree, tmp_path):
    """Every test patient's number one too low: the first of them is a validation patient now."""
    lists(tree, test=[4, 5])
    with pytest.raises(CamusError, match=r"subgroup_testing\.txt lists patient0004, which "
                       r"subgroup_validation\.txt lists already"):
        opened(tree, tmp_path)


def test_shifting_all_lists_is_another_data_set_and_no_old_run_is_taken(tree, tmp_path):
    before = Lab("smoke", tree, tmp_path / "cache")
    folders = [before.folder(before.spec(method)) for method in ("vjepa", "random", "unet")]
    lists(tree, train=[2, 3], val=[4, 5], test=[6, 1])
    after = Lab("smoke", tree, tmp_path / "cache")
    assert after.store.data_hash != before.store.data_hash
    assert not {after.folder(after.spec(method)) for method in ("vjepa", "random", "unet")} & set(folders)


def test_a_line_lost_from_a_list_is_told(tree, tmp_path, capsys):
    """Nobody can know that it was there; that somebody is on no list stands in note and summary."""
    lists(tree, test=[6])
    assert "5 of 6 patients by the official lists; 1 on no list put in train" in opened(tree, tmp_path).split_note


def test_patients_that_a_folder_of_images_shares_are_refused_without_the_switch(tmp_path, capsys, monkeypatch):
    from PIL import Image

    rng, root = np.random.default_rng(0), tmp_path / "organs"
    for part, organ, case in itertools.product(("train", "test"), ("liver", "lung"), range(3)):
        (root / part / organ).mkdir(parents=True, exist_ok=True)
        name = f"case{case if (part, case) == ('test', 0) else f'{part}{case}'}{organ}.png"
        if (part, organ, case) == ("train", "lung", 1):
            name = "case0lung.png"  # also in test
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(root / part / organ / name)
    call = [str(root), "--profile", "smoke", "--patient", r"case(train|test)?\d+(liver|lung)", "--ways", "mean-pooled"]
    assert linear.main(call) == 1
    out = capsys.readouterr()
    assert "case0lung is in more than one part" in out.err and "--shared-patients" in out.err
    assert linear.main([*call, "--shared-patients"]) == 0
    assert "patients in train and in test at once: 1 (case0lung, …)" in capsys.readouterr().out


# --- nothing that is tested has a part in what is learnt

@pytest.fixture(scope="module")
def spoilt(lab, tmp_path_factory):
    """The lab on a copy of its data in which all test patients but one are noise, with other labels and another EF.

    Which pixels are lit stays, so that batches are padded alike and sums come in the same order.
    """
    folder = tmp_path_factory.mktemp("spoilt")
    shutil.copy(lab.hdf5, folder / lab.hdf5.name)
    rng, table = np.random.default_rng(0), lab.store.table
    test = table[table["split"] == "test"]
    rows = test.index[test["patient"] != test["patient"].iloc[0]]
    with h5py.File(folder / lab.hdf5.name, "r+") as file:
        for row in rows:
            at = slice(table["start"][row], table["start"][row] + table["length"][row])
            frames = file["frames"][at]
            file["frames"][at] = np.where(frames > 2, rng.integers(3, 256, frames.shape), frames)
            file["masks"][at] = rng.integers(0, 4, frames.shape)
            file[f"native/{row}"][...] = rng.integers(0, 4, file[f"native/{row}"].shape)
            file["sequences/ef"][row] = 100 - file["sequences/ef"][row]
    return Lab("smoke", cache=folder), rows


@pytest.fixture(scope="module")
def honest(lab, tmp_path_factory):
    return beside(lab, tmp_path_factory.mktemp("honest"))


def same_files(one, two, pattern):
    """Files of two run folders hold the same tensors, bit for bit -> how many files there were."""
    names = sorted(path.name for path in one.glob(pattern))
    assert names == sorted(path.name for path in two.glob(pattern))
    for name in names:
        flat = [torch.utils._pytree.tree_leaves(weights.read(folder / name)) for folder in (one, two)]
        for a, b in zip(*flat, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a
    return len(names)


@pytest.mark.parametrize("fraction", [100, 10])
@pytest.mark.parametrize(("method", "lam"), [("random", 1.0), *TRAINED])
def test_test_patients_have_no_part_in_weights_steps_and_other_scores(honest, spoilt, method, lam, fraction):
    noisy, rows = spoilt
    made = [segmentation(one, method, fraction, lam) for one in (honest, noisy)]
    folders = [one.folder(one.spec(method, lam, fraction=fraction)) for one in (honest, noisy)]
    assert folders[0].name == folders[1].name
    assert same_files(*folders, "checkpoint.pt") == (method != "random")
    assert made[0].history == made[1].history  # losses, and the looks at validation patients that choose a step
    others = ~np.isin(made[0].rows, rows)
    assert 0 < (~others).sum() < others.sum()
    for which in ("best", "last"):
        one, two = (getattr(m, which) for m in made)
        assert (one[others] == two[others]).all() and (one[~others] != two[~others]).any()
    tested = made[0].scores.assign(row=np.tile(made[0].rows, 2))["row"].isin(rows).to_numpy()
    pd.testing.assert_frame_equal(made[0].scores[~tested], made[1].scores[~tested])
    if method not in ("supervised", "unet", "finetuned"):
        probes = [fit_probe(one, one.encoder(method, lam), labelled_rows(one), fraction)[1] for one in (honest, noisy)]
        for which in ("best", "last"):
            assert all(torch.equal(v, probes[1][which][k]) for k, v in probes[0][which].items())


def test_the_table_that_chooses_lambda_is_made_of_validation_patients(honest, spoilt):
    """Table 1 is the same under another set of test patients; table 2 is not."""
    content = []
    for one in (honest, spoilt[0]):
        tables.collect(one, one.grid("walk").table1, [100])
        content.append(tables.summary(one, "walk"))
    for name, same in (("table1", True), ("rows", False)):
        one, two = ([{k: v for k, v in row.items() if k != "seconds"} for row in c[name]] for c in content)
        assert one and (one == two) is same


@pytest.mark.parametrize("way", linear.WAYS)
def test_test_patients_have_no_part_in_linear_probes_and_heads(honest, spoilt, way):
    """All three ways, all four tasks: what is said of the one patient who is left as he was does not change."""
    noisy, p = spoilt[0], honest.profile
    known = {"view", "ef", "phase", "quality"}
    kept = honest.store.table.loc[honest.store.rows("test"), "patient"].iloc[0]
    seen = set()
    for one, two in zip(tasks.camus_tasks(honest), tasks.camus_tasks(noisy), strict=True):
        if one.obstacle() or two.obstacle():
            continue
        answers = []
        for lab, task in ((honest, one), (noisy, two)):
            encoder = lab.encoder("random").encoder
            if way == "fine-tuned":
                answers.append(heads.fine_tuned(task, encoder, p.sector_aware, steps=6))
                continue
            features = linear.frozen(encoder, task.clips, p.sector_aware)
            answers.append(linear.fit(task, linear.mean_pool(*features).numpy()) if way == "mean-pooled" else
                           heads.attentive(task, *features, p.heads, steps=10))
        same = one.groups[one.part("test")] == kept
        assert same.any() and not same.all()
        assert (answers[0][same] == answers[1][same]).all(), one.name
        assert (answers[0][~same] != answers[1][~same]).any(), one.name
        seen.add(one.name)
    assert len(seen) >= 3 and seen <= known


def test_validation_patients_choose_and_do_not_teach(honest, lab, tmp_path):
    """Other labels of validation patients: the last probe is the same, and what is looked at is not."""
    shutil.copy(lab.hdf5, tmp_path / lab.hdf5.name)
    with h5py.File(tmp_path / lab.hdf5.name, "r+") as file:
        for row in lab.store.rows("val"):
            at = slice(lab.store.table["start"][row], lab.store.table["start"][row] + lab.store.table["length"][row])
            file["masks"][at] = file["masks"][at][::-1, ::-1]
    other = Lab("smoke", cache=tmp_path)
    one, two = (segmentation(which, "random", 10) for which in (honest, other))
    assert (one.last == two.last).all()
    assert [h["loss"] for h in one.history] == [h["loss"] for h in two.history]
    assert [h["val_dsc"] for h in one.history] != [h["val_dsc"] for h in two.history]


@pytest.mark.parametrize("fraction", [10, 100])
def test_labels_outside_the_share_have_no_part(lab, honest, tmp_path, fraction):
    """Labels of training patients beyond the share, and of the test part, replaced: the probe's weights stay."""
    shutil.copy(lab.hdf5, tmp_path / lab.hdf5.name)
    keep = [*honest.labelled(fraction), *honest.store.rows("val")]
    with h5py.File(tmp_path / lab.hdf5.name, "r+") as file:
        for row, meta in lab.store.table.drop(index=keep).iterrows():
            at = slice(meta["start"], meta["start"] + meta["length"])
            file["masks"][at] = np.random.default_rng(row).integers(0, 4, file["masks"][at].shape)
    probes = [fit_probe(which, which.encoder("random"), labelled_rows(which), fraction)[1]
              for which in (honest, Lab("smoke", cache=tmp_path))]
    for which in ("best", "last"):
        assert all(torch.equal(v, probes[1][which][k]) for k, v in probes[0][which].items())


def test_these_tests_would_notice(honest, spoilt, monkeypatch):
    """A careless probe, which also learns from the last clip it is given, is found out."""
    careful = probe.fit
    monkeypatch.setattr(probe, "fit", lambda cache, masks, train, *a, **o: careful(
        cache, masks, np.append(train, len(masks) - 1), *a, **o))
    one, two = (fit_probe(which, which.encoder("random"), labelled_rows(which), 10)[1] for which in (honest, spoilt[0]))
    assert any(not torch.equal(v, two["last"][k]) for k, v in one["last"].items())
    assert one["history"] != two["history"]


# --- the named switch

SCORING = {"segment.py": "labelled_rows", "tasks.py": "camus_tasks"}  # who may ask for test rows, to score them


def calls_of_rows(path):
    """(function, split asked for) of each `.rows(...)` of a store in a module."""
    tree = ast.parse(path.read_text())
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "rows" \
                    and isinstance(node.func.value, ast.Attribute) and node.func.value.attr == "store":
                yield function.name, node.args[0] if node.args else None


def test_the_package_never_asks_for_rows_without_naming_their_part():
    """`rows()` alone would give everybody. A constant "train" or "val" is fine; others may score, by name."""
    asked = 0
    for path in sorted((ROOT / "usjepa_nb").rglob("*.py")):
        for name, part in calls_of_rows(path):
            asked += 1
            plain = isinstance(part, ast.Constant) and part.value in ("train", "val")
            assert plain or SCORING.get(path.name) == name, f"{path.name}: {name} asks for {part and ast.unparse(part)}"
    assert asked >= 6


def test_an_end_to_end_method_learns_from_its_share_alone(lab):
    """`Lab.train` draws from `labelled` or from `batches`, which refuses others; there is no third way in."""
    with pytest.raises(ValueError, match="some of these rows belong to test"):
        lab.batches(lab.store.rows("test"))
    with pytest.raises(ValueError, match="some of these rows belong to test, val"):
        lab.batches(np.arange(len(lab.store)))
    assert set(lab.store.table.loc[lab.labelled(100), "split"]) == {"train"}


def test_a_task_says_who_is_in_two_parts():
    task = toy()
    assert task.shared() == []
    groups = task.groups.copy()
    groups[-1] = groups[0]
    task.groups = groups
    assert task.shared() == ["p0"]
