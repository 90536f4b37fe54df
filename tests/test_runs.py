"""Runs on disk, the data behind them and segmentations: made once, found again, and nothing let in."""

import copy
import dataclasses
import json
import math
import os
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from smoke_lab import beside, smoke_lab

from usjepa_nb import dataset, methods, metrics, pretrain, probe, runs, segment, store, weights
from usjepa_nb.camus import UNLABELLED, CamusError
from usjepa_nb.dataset import Dataset
from usjepa_nb.profile import Profile, ProfileError
from usjepa_nb.runs import Lab
from usjepa_nb.segment import segmentation

ROOT = dataset.ROOT


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


@pytest.fixture
def mine(lab, tmp_path):
    """The same data with an empty cache of its own."""
    return beside(lab, tmp_path / "own cache ü")


def again(lab, **options):
    """A lab that remembers nothing, on the same cache."""
    return Lab("smoke", cache=lab.cache, **options)


def with_settings(lab, **changes):
    other = copy.copy(lab)
    other.profile, other.loaded = lab.profile.replace(**changes), {}
    return other


def forbidden(*args, **kwargs):
    pytest.fail("this was on disk already")


# --- dataset: where things are

def test_a_relative_cache_lies_in_the_repository_wherever_one_works(tmp_path, monkeypatch):
    (tmp_path / "root").mkdir(), (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(dataset, "ROOT", tmp_path / "root")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Lab("smoke", cache="some/cache").cache == tmp_path / "root" / "some" / "cache"
    assert (tmp_path / "root" / "some" / "cache").is_dir() and os.listdir() == []
    assert Lab("smoke", cache=tmp_path / "absolute").cache == tmp_path / "absolute"


def test_the_repository_is_where_the_package_lies():
    assert (ROOT / "usjepa_nb" / "dataset.py").samefile(dataset.__file__) and (ROOT / "profiles").is_dir()


def test_data_sets_have_names_of_their_own(tmp_path):
    first, second = (Lab("smoke", tmp_path / who / "CAMUS", tmp_path / "cache") for who in ("a", "b"))
    names = {first.data_name, second.data_name, Lab("smoke", cache=tmp_path / "cache").data_name}
    assert len(names) == 3 and first.data_name.startswith("CAMUS-") and "phantom-10x1.2mm" in names
    assert first.hdf5 == tmp_path / "cache" / f"{first.data_name}-32px.h5"
    assert first.results().name == f"smoke-{first.data_name}" and first.results() != second.results()
    assert first.tree == tmp_path / "a" / "CAMUS"


def test_one_converted_file_is_a_data_set(lab, tmp_path):
    """Carried to another machine it gives the same clips and runs; what it was made of is missing."""
    carried = tmp_path / lab.hdf5.name
    shutil.copy(lab.hdf5, carried)
    there = Lab("smoke", carried, tmp_path / "cache")
    assert there.store.path == carried and there.data_name == lab.data_name and not list((tmp_path / "cache").iterdir())
    assert all(there.spec(method) == lab.spec(method) for method in ("vjepa", "supervised"))
    assert (there.clips(there.store.rows("val"))[0] == lab.clips(lab.store.rows("val"))[0]).all()
    with pytest.raises(CamusError, match=r"holds frames of 32 px, and this shows the files .* the CAMUS folder"):
        _ = there.tree
    with pytest.raises(CamusError, match="holds frames of 32 px, and profile smoke takes 64: convert the CAMUS folder"):
        _ = Lab("smoke", carried, tmp_path / "cache", size=64).store
    carried.write_bytes(carried.read_bytes()[:5000])
    with pytest.raises(CamusError, match=r"32px.h5 is no CAMUS folder, nor a whole file .* convert and copy it again"):
        _ = Lab("smoke", carried, tmp_path / "cache").store
    assert carried.exists()


def test_about_names_profile_data_seed_and_versions(lab, capsys):
    lab.about()
    text = capsys.readouterr().out
    assert "profile smoke: 4 frames of 32×32 px, tokens of 2×8×8, ViT 32 wide, 2 deep; seed 0" in text
    assert f"torch {torch.__version__}" in text and "synthetic phantom" in text


def test_clips_are_cut_by_the_profiles_rule(lab):
    frames, masks = lab.clips(np.array([3, 1]))
    assert frames.shape == masks.shape == (2, 4, 32, 32) and frames.dtype == masks.dtype == np.uint8
    want = lab.store.clip(1, 4, "cover")
    assert (frames[1] == want.frames).all() and (masks[1] == want.masks).all()
    stepped, _ = with_settings(lab, clip_rule="step", frame_step=3).clips(np.array([1]))
    assert (stepped[0] == lab.store.frames(1)[[0, 3, 6, 9]]).all()


@pytest.mark.parametrize("augmentation", ["none", "mild", "published"])
def test_batches_depend_on_the_generator_alone(lab, augmentation):
    batch = with_settings(lab, augmentation=augmentation).batches(lab.store.rows("train"))
    first, second, third = (batch(pretrain.step_generator(0, step), 5) for step in (0, 0, 1))
    assert first.shape == (5, 4, 32, 32) and first.dtype == torch.float
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert 0 <= first.min() and 100 < first.max() <= 255


def test_ed_es_data_makes_clips_of_two_tubelets_and_says_so(lab, tmp_path, capsys):
    changed = edited(lab, tmp_path, ed_es_only=lambda column: np.ones_like(column))
    assert changed.frames == with_settings(changed, frames=16).frames == 4
    assert "ED/ES only" in capsys.readouterr().out


# --- dataset: who may be learnt from

def on(table, seed=0):
    """A Dataset on a table alone."""
    made = Dataset.__new__(Dataset)

    def rows(split=None, labelled=None):
        keep = np.ones(len(table), bool)
        if split:
            keep &= table["split"] == split
        if labelled is not None:
            keep &= table["labelled"] == labelled
        return np.flatnonzero(keep)

    made.__dict__.update(seed=seed, store=SimpleNamespace(table=table, rows=rows))
    return made


@st.composite
def tables(draw):
    """Patients with one or two views, in one part each, of any quality, labelled or not."""
    lines = []
    for number in range(draw(st.integers(1, 25))):
        split = draw(st.sampled_from(["train"] * 3 + ["val", "test"]))
        for view in draw(st.sampled_from([["2CH", "4CH"], ["4CH"]])):
            lines.append({"patient": f"patient{number:04d}", "view": view, "split": split,
                          "quality": draw(st.sampled_from(["Good", "Medium", "Poor", ""])),
                          "labelled": draw(st.booleans()), "sha256": f"{number}{view}"})
    return pd.DataFrame(lines)


@settings(max_examples=30, deadline=None)
@given(tables(), st.integers(0, 9))
def test_labelled_patients_are_of_training_nested_whole_and_at_least_one(table, seed):
    data = on(table, seed)
    dataset.refuse_leaks(table, "no file")
    trained = set(table["patient"][(table["split"] == "train") & table["labelled"]])
    before = set()
    for fraction in (1, 5, 10, 20, 33.3, 50, 99, 100):
        rows = data.labelled(fraction)
        patients = set(table.loc[rows, "patient"])
        assert (table.loc[rows, "split"] == "train").all() and table.loc[rows, "labelled"].all()
        assert not patients & set(table["patient"][table["split"] != "train"])
        whole = table.index[table["patient"].isin(patients) & table["labelled"] & (table["split"] == "train")]
        assert rows.tolist() == whole.tolist()  # every labelled view of theirs, in order
        assert before <= patients and len(patients) == math.ceil(fraction * len(trained) / 100)
        before = patients
    assert before == trained


def cohort(n):
    quality = ["Good"] * (n // 2) + ["Medium"] * (n // 4) + ["Poor"] * (n - n // 2 - n // 4)
    return pd.DataFrame({"patient": [f"p{k:03d}" for k in range(n)], "split": "train", "labelled": True,
                         "quality": quality})


@pytest.mark.parametrize("fraction, patients", [(7, 7), (55, 55), (56, 56), (0.5, 1), (100, 100)])
def test_a_fraction_is_exact(fraction, patients):
    assert len(on(cohort(100)).labelled(fraction)) == patients  # 7 / 100 · 100 is a little more than 7 in floats


def test_few_labels_are_spread_over_image_quality():
    for seed in range(5):
        table = cohort(100)
        counts = table.loc[on(table, seed).labelled(20), "quality"].value_counts()
        assert counts.to_dict() == {"Good": 10, "Medium": 5, "Poor": 5}


def test_another_seed_chooses_other_patients():
    chosen = {tuple(on(cohort(100), seed).labelled(10)) for seed in range(6)}
    assert len(chosen) == 6


@pytest.mark.parametrize("fraction", [0, -10, 101, math.nan])
def test_a_fraction_that_is_none_is_refused(lab, fraction):
    with pytest.raises(ValueError, match=r"fraction = .* is not possible: choose 1…100"):
        lab.labelled(fraction)


def edited(lab, folder, **columns):
    """A lab on a copy of the HDF5 file in which columns were changed by hand."""
    folder.mkdir(exist_ok=True)
    shutil.copy(lab.hdf5, folder / lab.hdf5.name)
    with h5py.File(folder / lab.hdf5.name, "r+") as file:
        for name, change in columns.items():
            file["sequences"][name][...] = change(file["sequences"][name][()])
    return Lab("smoke", cache=folder)


def put(index, value):
    def change(column):
        column[index] = value
        return column
    return change


def test_a_patient_in_two_parts_is_caught(lab, tmp_path):
    assert lab.store.table.loc[[0, 1], "split"].tolist() == ["train", "train"]
    planted = edited(lab, tmp_path, split=put(1, b"test"))
    with pytest.raises(CamusError, match=r"phantom-10x1.2mm-32px.h5: patient0001 is in train and test at once.*delete "
                                         r"this file and convert again"):
        planted.encoder("random")


def test_a_patient_under_two_names_in_two_parts_is_caught(lab, tmp_path):
    train, test = lab.store.rows("train")[0], lab.store.rows("test")[0]
    planted = edited(lab, tmp_path, sha256=lambda column: put(test, column[train])(column))
    with pytest.raises(CamusError, match=r"patient0001 = patient0002 is in train and test at once"):
        segmentation(planted, "prior")


def test_the_same_files_twice_within_one_part_are_no_leak(lab, tmp_path):
    a, b = lab.store.rows("train")[[0, 2]]
    assert len(edited(lab, tmp_path, sha256=lambda column: put(b, column[a])(column)).store) == 20


@pytest.mark.parametrize("split", ["val", "test"])
def test_batches_of_other_parts_are_refused(lab, split):
    with pytest.raises(ValueError, match=rf"some of these rows belong to {split}: take store.rows\(\"train\"\)"):
        lab.batches(np.append(lab.store.rows("train"), lab.store.rows(split)[0]))


@pytest.mark.parametrize("method", ["videomae", "vjepa_ll", "supervised"])
def test_no_training_looks_at_a_test_clip(mine, monkeypatch, method):
    looked, real = set(), store.Store.clip

    def clip(self, i, *args, **options):
        looked.add(self.table["split"][i])
        return real(self, i, *args, **options)

    monkeypatch.setattr(store.Store, "clip", clip)
    mine.encoder(method, 0.25 if method == "vjepa_ll" else 1.0)
    assert looked == {"train", "val"}  # validation clips for the monitors


def test_the_probe_learns_from_training_and_chooses_by_validation(mine, monkeypatch):
    seen, real = {}, probe.fit

    def fit(cache, masks, train, val, *args, **options):
        seen.update(masks=masks, train=train, val=val)
        return real(cache, masks, train, val, *args, **options)

    monkeypatch.setattr(probe, "fit", fit)
    made = segmentation(mine, "random", 10)
    for part, rows in (("train", mine.labelled(10)), ("val", mine.store.rows("val", labelled=True))):
        assert (seen["masks"][seen[part]].numpy() == mine.clips(rows)[1]).all()
    assert len(seen["train"]) == 2 and len(seen["val"]) == 4 and len(made.rows) == 8


# --- runs: what a folder is named after

CHANGED = {"patients": 11, "phantom_seed": 1, "spacing": 0.5, "size": 64, "frames": 8, "clip_rule": "step",
           "frame_step": 2, "tubelet": 1, "patch": 16, "width": 64, "depth": 3, "heads": 4,
           "predictor_width": 64, "predictor_depth": 2,
           "predictor_heads": 1, "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 1,
           "decoder_positions": "sincos1d", "init": "a.pt", "init_videomae": "a.pt", "mask": "tube", "hidden": 0.6,
           "short_range": (7, 0.15), "long_range": (2, 0.6), "tube_ratio": 0.8,
           "mask_rule": "first", "sector_aware": False, "target_layers": 1, "centre": 0.0, "beta": 0.5, "variance": 0.1,
           "pairs": 99, "ll_on": "context",
           "augmentation": "none", "batch": 2, "steps": 7, "warmup": 0.2, "lr": 0.5, "encoder_lr": 0.5,
           "lr_end": 0.1, "weight_decay": 0.1,
           "weight_decay_end": 0.1, "beta2": 0.9, "clip": 2.0, "ema": 0.5, "videomae_steps": 7,
           "videomae_lr": 0.5, "precision": "bf16-mixed", "sampling": "balanced", "teacher": "a.pt",
           "init_student": "a.pt", "teacher_width": 64, "teacher_depth": 3, "teacher_heads": 4, "teacher_steps": 7}
OWN_BUDGET = ("steps", "lr", "videomae_steps", "videomae_lr")
UNCHANGED = {"probe_epochs": 2, "probe_min_steps": 7, "probe_batch": 4, "probe_lr": 0.5, "probe_width": 8,
             "supervised_steps": 5, "supervised_lr": 0.5, "finetune_lr": 0.5,
             "unlabelled": "fraction", "accelerator": "cpu", "one_pass": True, "compile": True, "devices": 2,
             "log_every": 1}


def test_every_setting_is_either_of_training_or_not():
    assert CHANGED.keys() | UNCHANGED.keys() | {"name"} == {f.name for f in dataclasses.fields(Profile)}


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_of_training_makes_another_folder(lab, name):
    other = with_settings(lab, **{name: CHANGED[name]})
    salts = methods.OF_SALT
    concerned = {"vjepa": name not in methods.OF_VIDEOMAE + methods.OF_LL + salts + ("videomae_steps", "videomae_lr"),
                 "vjepa_ll": name not in methods.OF_VIDEOMAE + salts + ("videomae_steps", "videomae_lr"),
                 "videomae": name not in methods.OF_VJEPA + salts + ("steps", "lr"),
                 "supervised": name not in methods.OF_VJEPA + methods.OF_VIDEOMAE + salts + OWN_BUDGET + ("sampling",)}
    for method, changes in concerned.items():
        lam = 0.25 if method == "vjepa_ll" else 1.0
        assert (other.folder(other.spec(method, lam)) != lab.folder(lab.spec(method, lam))) is changes, method


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_setting_of_probe_grid_or_machine_does_not(lab, name):
    other = with_settings(lab, **{name: UNCHANGED[name]})
    for method in ("vjepa", "videomae", "random"):
        assert other.folder(other.spec(method)) == lab.folder(lab.spec(method))


@pytest.mark.parametrize("name", ["supervised_steps", "supervised_lr", "probe_width"])
def test_what_shapes_the_supervised_control_names_its_folder(lab, name):
    other = with_settings(lab, **{name: UNCHANGED[name]})
    assert other.folder(other.spec("supervised")) != lab.folder(lab.spec("supervised"))


def test_method_seed_data_and_labels_make_other_folders(lab, tmp_path):
    specs = [lab.spec("vjepa"), lab.spec("videomae"), lab.spec("random"), lab.spec("vjepa_ll", 0.25),
             lab.spec("vjepa_ll", 0.5), lab.spec("vjepa", freeze=1), lab.spec("supervised"),
             lab.spec("supervised", fraction=10), again(lab, seed=1).spec("vjepa"), lab.spec("vjepa") | {"data": "x"}]
    folders = {lab.folder(s) for s in specs}
    assert len(folders) == len(specs) and {f.parent for f in folders} == {lab.cache / "runs" / "smoke"}
    assert lab.folder(lab.spec("vjepa", fraction=10)) == lab.folder(lab.spec("vjepa"))  # labels have no part in it


def test_a_whole_number_names_the_same_run(lab):
    assert lab.folder(lab.spec("vjepa", 1)) == lab.folder(lab.spec("vjepa", 1.0))
    assert lab.folder(lab.spec("vjepa_ll", 0)) == lab.folder(lab.spec("vjepa_ll", 0.0))


@pytest.mark.parametrize("arguments, message", [
    (("vjepaa",), "method 'vjepaa' has no encoder: choose one of random, initial, imagenet, videomae, vjepa, vjepa_ll, "
                  "finetuned, teacher, salt, supervised, unet"),
    (("prior",), r"method 'prior' has no encoder"),
    (("vjepa", 0.25), r"lam = 0.25 is not possible for 'vjepa': 0…1 for vjepa_ll and salt, 1 for all others"),
    (("vjepa_ll", 1.5), r"lam = 1.5 is not possible"),
    (("videomae", 1.0, 1), r"freeze = 1 is not possible for 'videomae': only V-JEPA freezes blocks, choose 0"),
    (("vjepa", 1.0, 3), r"freeze=3: .*0…2"),
    (("supervised", 1.0, 0, 0), r"fraction = 0 % of the training patients is not possible"),
])
def test_an_encoder_that_cannot_be_is_refused(mine, arguments, message):
    with pytest.raises(ValueError, match=message):
        mine.encoder(*arguments)


def test_labels_are_those_of_the_tables(lab):
    assert methods.label(lab.spec("vjepa_ll", 0.25, 1)) == "V-JEPA + LL (λ = 0.25), 1 blocks frozen"
    assert [methods.label(lab.spec(m)) for m in ("random", "videomae", "vjepa", "supervised")] == [
        "frozen random encoder", "VideoMAE", "V-JEPA", "supervised, end to end"]


def test_initial_weights_come_from_the_seed_alone(lab):
    first = lab.objective(lab.spec("vjepa")).state_dict()
    torch.manual_seed(77)
    before = torch.get_rng_state()
    second = lab.objective(lab.spec("vjepa")).state_dict()
    other = again(lab, seed=1)
    assert all(torch.equal(first[k], second[k]) for k in first) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(other.objective(other.spec("vjepa")).state_dict()["encoder.blocks.0.attn.qkv.weight"],
                           first["encoder.blocks.0.attn.qkv.weight"])


def test_an_encoder_may_start_from_a_checkpoint(mine, tmp_path, capsys):
    trained = mine.encoder("vjepa")
    source = trained.folder / "checkpoint.pt"
    started = with_settings(mine, init=str(source))
    objective = started.objective(started.spec("vjepa"))
    assert "keys used, 0 missing, 0 left over" in capsys.readouterr().out
    want = weights.read(source)["target_encoder"]
    assert all(torch.equal(v, want[k]) for k, v in objective.encoder.state_dict().items())
    absent = with_settings(mine, init=str(tmp_path / "none.pt"))
    with pytest.raises(weights.WeightsError, match=r"none.pt: no such checkpoint; .* set `init: random`"):
        absent.encoder("vjepa")


# --- runs: made once

def test_the_second_call_loads_without_training(mine, capsys, monkeypatch):
    first = mine.encoder("vjepa_ll", 0.25)
    assert "V-JEPA + LL (λ = 0.25): not on disk, training now" in capsys.readouterr().out
    files = {f.name: f.stat().st_mtime_ns for f in first.folder.iterdir()}
    assert {"checkpoint.pt", "history.csv", "run.json"} <= set(files) and mine.encoder("vjepa_ll", 0.25) is first
    monkeypatch.setattr(pretrain, "train", forbidden)
    second = again(mine).encoder("vjepa_ll", 0.25)
    assert "6 steps, trained in" in (out := capsys.readouterr().out) and "training now" not in out
    for name in ("checkpoint.pt", "history.csv", "run.json"):
        assert (first.folder / name).stat().st_mtime_ns == files[name]
    assert not second.encoder.training and second.label == "V-JEPA + LL (λ = 0.25)"
    for a, b in zip(first.encoder.parameters(), second.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
    pd.testing.assert_frame_equal(first.history, second.history)


def test_a_run_is_told_as_it_goes_and_described_at_the_end(mine):
    seen = [(len(run.history), run.spec["method"]) for run in mine.training("vjepa")]
    assert seen == [(3, "vjepa"), (6, "vjepa"), (6, "vjepa")]  # log_every 3, six steps, then the finished run
    folder = mine.folder(mine.spec("vjepa"))
    described = json.loads((folder / "run.json").read_text())
    assert described.pop("threads") == torch.get_num_threads()
    assert described.pop("seconds") > 0 and described == json.loads(json.dumps(mine.spec("vjepa")))
    history = pd.read_csv(folder / "history.csv")
    assert {"step", "lr", "grad_norm", "loss", "jepa", "ll", "zero", "std", "rank", "position_share"} == set(history)
    assert history["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert history["rank"].notna().tolist() == [False, False, True] * 2


def test_the_probed_encoder_is_the_target_of_the_checkpoint(mine):
    run = mine.encoder("vjepa")
    file = weights.read(run.folder / "checkpoint.pt")
    assert all(torch.equal(v, file["target_encoder"][k]) for k, v in run.encoder.state_dict().items())
    assert any(not torch.equal(v, file["encoder"][k]) for k, v in run.encoder.state_dict().items())


def test_a_random_encoder_is_never_trained(mine, monkeypatch):
    monkeypatch.setattr(pretrain, "train", forbidden)
    first, second = mine.encoder("random"), again(mine).encoder("random")
    start = mine.objective(mine.spec("vjepa")).encoder  # the weights that training starts from
    for a, b, c in zip(first.encoder.parameters(), second.encoder.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_an_interrupted_run_is_not_taken_for_finished(mine, monkeypatch):
    with monkeypatch.context() as patch:
        def stops(*args, **options):
            yield {"step": 1, "std": 0.0}
            raise KeyboardInterrupt

        patch.setattr(pretrain, "train", stops)
        with pytest.raises(KeyboardInterrupt):
            mine.encoder("vjepa")
    assert not mine.loaded and not (mine.folder(mine.spec("vjepa")) / "run.json").exists()
    assert len(mine.encoder("vjepa").history) == 6


def test_the_seconds_of_a_stopped_run_count_while_its_checkpoint_is_there(mine):
    folder, took = mine.folder(mine.spec("vjepa")), lambda: json.loads((folder / "run.json").read_text())["seconds"]
    stopped = mine.training("vjepa")
    next(stopped)
    stopped.close()
    assert 0 < float((folder / "seconds").read_text()) < 1000
    (folder / "seconds").write_text("1000")
    mine.encoder("vjepa")
    assert 1000 < took() < 2000
    (folder / "checkpoint.pt").unlink()
    again(mine).encoder("vjepa")
    assert 0 < took() < 1000


def test_a_half_written_checkpoint_of_a_killed_process_is_cleared_away(mine):
    folder = mine.folder(mine.spec("vjepa"))
    folder.mkdir(parents=True)
    (folder / "checkpoint.123.part").write_bytes(b"half of it")
    mine.encoder("vjepa")
    assert not list(folder.glob("*.part"))


def test_a_checkpoint_that_was_deleted_is_made_again(mine, capsys):
    first = mine.encoder("vjepa")
    (first.folder / "checkpoint.pt").unlink()
    second = again(mine).encoder("vjepa")
    assert capsys.readouterr().out.count("training now") == 2
    assert all(torch.equal(a, b) for a, b in zip(first.encoder.parameters(), second.encoder.parameters(), strict=True))


def test_a_damaged_checkpoint_is_named(mine):
    path = mine.encoder("vjepa").folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(weights.WeightsError, match=r"checkpoint.pt: "):
        again(mine).encoder("vjepa")


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    runs.write_text(tmp_path / "a.json", "old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        runs.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named_with_the_remedy(mine):
    other = with_settings(mine, accelerator="cuda")
    with pytest.raises(ProfileError, match=r"accelerator = 'cuda' is not possible: torch sees no GPU here; choose"):
        other.encoder("vjepa")


def test_two_processes_train_one_run(mine):
    """devices: 2 starts two processes; what they leave is loaded here like any other run."""
    several = with_settings(mine, devices=2, accelerator="cpu", steps=4)
    run = several.encoder("vjepa_ll", 0.25)
    assert run.history["step"].tolist() == [1, 2, 3, 4] and (run.folder / "run.json").exists()
    assert not list(run.folder.glob("*.part"))
    start = several.objective(run.spec).encoder
    assert not all(torch.equal(a, b) for a, b in zip(start.parameters(), run.encoder.parameters(), strict=True))
    alone = with_settings(beside(mine, mine.cache.parent / "alone"), steps=4).encoder("vjepa_ll", 0.25)
    assert alone.folder.name == run.folder.name and alone.history["lr"].tolist() == run.history["lr"].tolist()
    assert alone.history["loss"][0] != run.history["loss"][0]  # of other clips: two of the four


# --- segmentations

def test_a_segmentation_is_made_once(mine, monkeypatch):
    first = segmentation(mine, "vjepa", 100)
    files = list(mine.folder(mine.spec("vjepa")).glob("segmentation-*"))
    monkeypatch.setattr(segment, "segment", forbidden)
    second = segmentation(again(mine), "vjepa", 100)
    assert len(files) == 1 and (first.best == second.best).all() and (first.last == second.last).all()
    assert first.history == second.history and first.seconds == second.seconds
    pd.testing.assert_frame_equal(first.scores, second.scores)


def test_features_are_computed_once_for_all_shares_of_the_labels(mine, monkeypatch):
    segmentation(mine, "random", 100)
    monkeypatch.setattr(probe.Cache, "write", forbidden)
    segmentation(mine, "random", 10)
    assert len(list(mine.folder(mine.spec("random")).glob("segmentation-*.npz"))) == 2


def test_other_probe_settings_are_another_segmentation_of_the_same_encoder(mine, monkeypatch):
    segmentation(mine, "vjepa", 100)
    monkeypatch.setattr(pretrain, "train", forbidden)
    for changes in ({"probe_lr": 0.5}, {"probe_width": 8}):
        segmentation(with_settings(mine, **changes), "vjepa", 100)
    segmentation(mine, "vjepa", 100, online=True)
    folder = mine.folder(mine.spec("vjepa"))
    assert len(list(folder.glob("segmentation-*.npz"))) == 4
    assert sorted(f.name for f in folder.glob("features*")) == ["features-online.h5", "features.h5"]
    target, online = (probe.Cache(folder / f"features{which}.h5").features for which in ("", "-online"))
    assert not torch.equal(target, online)


def test_scores_are_those_of_each_video(mine):
    made = segmentation(mine, "random", 100)
    table = mine.store.table
    assert table.loc[made.rows, "split"].tolist() == ["val"] * 4 + ["test"] * 4
    assert made.best.shape == made.last.shape == (8, 4, 32, 32) and made.best.dtype == np.uint8
    assert len(made.scores) == 16 and set(made.scores["method"]) == {"frozen random encoder"}
    for which, predicted in (("best", made.best), ("last", made.last)):
        line = made.scores[made.scores["which"] == which].iloc[5]
        want = metrics.video_scores(predicted[5], mine.clips(made.rows[5:6])[1][0])
        assert all(line[key] == table.loc[made.rows[5], key] for key in ("patient", "view", "split", "quality"))
        assert line["dsc"] == want["dsc"]["mean"] and line["recall"] == want["recall"]["mean"]
        assert line["dsc_2"] == want["dsc"][2] and line["jaccard_3"] == pytest.approx(want["jaccard"][3], nan_ok=True)


def test_predictions_are_the_probes_on_the_encoders_features(mine):
    made, run = segmentation(mine, "random", 100), mine.encoder("random")
    p = mine.profile
    train = mine.labelled(100)
    grey, masks = mine.clips(np.concatenate([train, made.rows]))
    cache = probe.Cache.write(mine.cache / "own.h5", run.encoder, grey, True)
    n = len(train)
    fitted = probe.fit(cache, torch.from_numpy(masks), np.arange(n), np.arange(n, n + 4), p.grid(4), p, seed=0)
    assert (probe.predict(fitted["probe"], cache.features[n:], cache.seen[n:]).numpy() == made.best).all()
    assert fitted["history"] == made.history


def test_the_supervised_control_brings_its_own_probe(mine, monkeypatch):
    monkeypatch.setattr(probe, "fit", forbidden)
    made = segmentation(mine, "supervised", 10)
    run = mine.encoder("supervised", fraction=10)
    assert "-10pc-" in run.folder.name and len(run.history) == mine.profile.supervised_steps
    with torch.no_grad():
        features = probe.encode(run.encoder, torch.from_numpy(mine.clips(made.rows)[0]).float(), True)
    want = probe.predict(run.objective.probe, *features).numpy()
    assert (want == made.best).all() and (made.best == made.last).all() and made.history == []


def test_the_supervised_control_sees_the_labels_of_its_share_alone(mine, monkeypatch):
    given_rows, real = [], Lab.labelled

    def labelled(self, fraction=100):
        given_rows.append(fraction)
        return real(self, fraction)

    monkeypatch.setattr(Lab, "labelled", labelled)
    mine.encoder("supervised", fraction=10)
    assert given_rows == [10]


@pytest.mark.parametrize("method, options", [("unet", {}), ("finetuned", {}),
                                             ("finetuned", {"lam": 0.25, "freeze": 1})])
def test_end_to_end_methods_segment_once_and_are_loaded_then(mine, monkeypatch, method, options):
    monkeypatch.setattr(probe, "fit", forbidden)
    first = segmentation(mine, method, 10, **options)
    run = mine.encoder(method, fraction=10, **options)
    assert len(run.history) == mine.profile.supervised_steps and "-10pc-" in run.folder.name
    assert ("std" in run.history) is (method != "unet") and (run.encoder is None) is (method == "unet")
    assert first.best.shape == (8, 4, 32, 32) and first.best.dtype == np.uint8 and (first.best == first.last).all()
    with torch.no_grad():
        want = run.objective.logits(torch.from_numpy(mine.clips(first.rows)[0]).float()).argmax(1)
    assert (want.numpy() == first.best).all() and set(first.scores["method"]) == {run.label}
    with monkeypatch.context() as patch:
        patch.setattr(segment, "segment", forbidden)
        assert (segmentation(again(mine), method, 10, **options).best == first.best).all()
    monkeypatch.setattr(pretrain, "train", forbidden)
    second = again(mine).encoder(method, fraction=10, **options).objective
    assert not second.training
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in run.objective.state_dict().items())


def test_two_processes_train_with_tube_masks_too(mine):
    several = with_settings(mine, devices=2, accelerator="cpu", steps=2, mask="tube", ll_on="context", variance=0.1)
    assert several.encoder("vjepa_ll", 0.25).history["step"].tolist() == [1, 2]


def test_damaged_features_are_named(mine):
    folder = mine.encoder("random").folder
    (folder / "features.h5").write_bytes(b"cut short")
    with pytest.raises(OSError, match=r"features.h5 cannot be read as cached features .*: delete it"):
        segmentation(mine, "random")


@pytest.mark.parametrize("method", ["random", "unet"])
def test_a_predictor_draws_what_the_segmentation_holds_and_is_kept(mine, monkeypatch, method):
    made = segmentation(mine, method, 10)
    clips, _ = mine.clips(made.rows)
    assert (segment.predictor(mine, mine.encoder(method, fraction=10), 10)(clips) == made.best).all()
    monkeypatch.setattr(probe, "fit", forbidden)
    monkeypatch.setattr(pretrain, "train", forbidden)
    second = again(mine)
    predict = segment.predictor(second, second.encoder(method, fraction=10), 10)
    assert (predict(clips[:3]) == made.best[:3]).all() and predict(255 - clips).shape == made.best.shape


def test_a_predictor_does_so_in_half_precision_too(mine):
    half = with_settings(mine, precision="bf16-mixed")
    made = segmentation(half, "random", 10)
    clips, _ = half.clips(made.rows)
    assert (segment.predictor(half, half.encoder("random"), 10)(clips) == made.best).all()


def test_a_run_that_goes_on_is_not_shown_with_weights_of_another_step(mine):
    stopped = mine.training("vjepa")
    at_three = next(stopped).encoder.state_dict()
    at_three = {k: v.clone() for k, v in at_three.items()}
    stopped.close()
    seen = [(len(run.history), run.encoder) for run in again(mine).training("vjepa")]
    assert [n for n, _ in seen] == [3, 6, 6]
    done = [(len(run.history), run.encoder) for run in again(mine).training("vjepa")]
    assert [n for n, _ in done] == [6]
    lost = mine.folder(mine.spec("vjepa")) / "run.json"  # as if stopped between its last checkpoint and its end
    lost.unlink()
    assert [len(run.history) for run in again(mine).training("vjepa")] == [6, 6]


def test_what_is_not_on_disk_is_not_made_where_that_was_asked(mine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(segment, "segment", forbidden)
        assert segmentation(mine, "random", train=False) is None
    made = segmentation(mine, "random")
    found = segmentation(mine, "random", train=False)
    assert (found.best == made.best).all() and segmentation(mine, "prior", train=False).scores.shape[0] == 16


def test_balanced_sampling_draws_every_group_equally_often(mine, monkeypatch):
    rows = mine.store.rows("train")
    table = mine.store.table.loc[rows]
    kept = np.concatenate([rows[(table["view"] == "2CH").to_numpy()][:1], rows[(table["view"] == "4CH").to_numpy()]])
    drawn, real = [], Lab.clips
    monkeypatch.setattr(Lab, "clips", lambda self, r, *a, **k: drawn.extend(r) or real(self, r, *a, **k))
    for sampling, low, high in (("balanced", 0.3, 0.7), ("uniform", 0.0, 0.3)):
        drawn.clear()
        several = with_settings(mine, sampling=sampling)
        one_group = np.array(["Good"] * len(several.store.table))
        monkeypatch.setitem(several.store.table, "quality", one_group)
        several.batches(kept)(torch.Generator().manual_seed(0), 200)
        assert low <= np.mean(np.array(drawn) == kept[0]) <= high, sampling


def test_pretraining_may_see_the_patients_of_the_fraction_only(mine, monkeypatch):
    few = with_settings(mine, unlabelled="fraction", steps=1, videomae_steps=1)
    seen, real = [], Lab.batches
    monkeypatch.setattr(Lab, "batches", lambda self, rows, *a: seen.append(list(rows)) or real(self, rows, *a))
    for method in ("vjepa", "videomae"):
        assert few.folder(few.spec(method, fraction=10)) != few.folder(few.spec(method))
        assert few.folder(few.spec(method)) == mine.folder(with_settings(mine, steps=1, videomae_steps=1).spec(method))
        few.encoder(method, fraction=10)
    assert seen == [list(mine.labelled(10))] * 2 and len(seen[0]) < len(mine.store.rows("train"))
    assert mine.folder(mine.spec("vjepa", fraction=10)) == mine.folder(mine.spec("vjepa"))
    started = with_settings(few, init="videomae")
    assert started.spec("vjepa", fraction=10)["fraction"] == 10
    started.encoder("vjepa", fraction=10)
    assert seen[-1] == seen[0]


def test_scores_tell_ed_and_es_from_the_frames_between(mine):
    s = segmentation(mine, "random")
    row = int(s.rows[3])
    ed, es = mine.instants(row)
    meta = mine.store.table.loc[row]
    index = mine.store.clip(row, mine.frames, mine.profile.clip_rule, mine.profile.frame_step).index
    assert (index[ed], index[es]) == (meta["ed"], meta["es"])  # the rule "cover" holds both
    _, masks = mine.clips(s.rows[3:4])
    line = s.scores.query("which == 'best'").iloc[3]
    want = metrics.video_scores(s.best[3][es:es + 1], masks[0][es:es + 1])["dsc"]["mean"]
    assert line["dsc_es"] == pytest.approx(want)
    between = [k for k in range(mine.frames) if k not in (ed, es)]
    assert line["dsc_between"] == pytest.approx(
        metrics.video_scores(s.best[3][between], masks[0][between])["dsc"]["mean"])


def test_ed_es_pairs_have_no_frames_between(mine, monkeypatch):
    """Such a clip is [ED, ED, ES, ES]: its second frame is ED again."""
    clip = type(mine.store).clip

    def pair(self, i, frames, rule, step, *rest, **named):
        found = clip(self, i, frames, rule, step, *rest, **named)
        found.index = np.repeat(found.index[[0, -1]], frames // 2)
        return found

    made = segmentation(mine, "random")
    monkeypatch.setattr(type(mine.store), "clip", pair)
    again_scored = segment.scores(mine, made.spec, made.rows, made.best, made.last)
    _, masks = mine.clips(made.rows)
    ed = [metrics.mean_dsc(p[:1], m[:1]) for which in (made.best, made.last)
          for p, m in zip(which, masks, strict=True)]
    assert again_scored.dsc_between.isna().all() and again_scored.dsc_ed.tolist() == pytest.approx(ed)
    assert made.scores.dsc_between.notna().any()


def test_the_shape_prior_is_the_commonest_label_of_each_pixel():
    masks = np.array([[[[1, 2, 0, UNLABELLED]]], [[[1, 3, 0, UNLABELLED]]], [[[2, 3, 1, 3]]]], np.uint8)  # [3, 1, 1, 4]
    asked = []
    fake = SimpleNamespace(labelled=lambda fraction: asked.append(fraction) or np.arange(3),
                           clips=lambda rows: (None, masks))
    guess = segment.shape_prior(fake, np.arange(5), 20)
    assert asked == [20] and guess.shape == (5, 1, 1, 4) and guess.dtype == np.uint8
    assert (guess == np.array([1, 3, 0, 3])).all()  # a pixel without a label has no vote


def test_the_shape_prior_is_the_same_for_every_video_and_looks_at_no_image(mine, monkeypatch):
    monkeypatch.setattr(Lab, "encoder", forbidden)
    made = segmentation(mine, "prior", 100)
    assert (made.best == made.best[0]).all() and made.best is made.last and set(made.best.flat) == {0, 1, 2, 3}
    assert not (mine.cache / "runs").exists() and set(made.scores["method"]) == {"shape prior"}
    few = segmentation(mine, "prior", 10)
    assert not (few.best[0] == made.best[0]).all()
