"""The linear probe: who is learned from, what stands beside it, and the command for a folder of images."""

import functools
import warnings

import numpy as np
import pytest
import torch
from toy_task import quantity, toy
from ultrabench_set import ultrabench_set

from usjepa_nb import heads, linear, probe
from usjepa_nb.objectives import make_encoder
from usjepa_nb.profile import load
from usjepa_nb.tasks import TaskError

P = load("smoke")


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_encoder(P, P.frames)


def vectors(task, seed=0):
    """Eight features of each clip, of which the first is its mean grey value."""
    x = np.random.default_rng(seed).normal(size=(len(task.labels), 8))
    x[:, 0] += task.clips.double().mean((1, 2, 3)).numpy() / 4
    return x


def test_frozen_features_are_the_encoders(encoder):
    task = toy()
    z, seen = linear.frozen(encoder, task.clips, True)
    assert z.shape == (48, 32, 32) and z.dtype == torch.float16 and seen.shape == (48, 32)
    with torch.no_grad():
        theirs, _ = probe.encode(encoder, task.clips[17:19].float(), True)
    torch.testing.assert_close(z[17:19].float(), theirs, atol=2e-3, rtol=2e-3)


def test_what_is_linear_in_the_features_is_found():
    task = toy(("train",) * 30 + ("test",) * 6)
    p, true = linear.fit(task, vectors(task)), task.targets(task.part("test"))
    assert p.shape == (12, 3) and np.allclose(p.sum(1), 1) and (p.argmax(1) == true).all()
    values = quantity(task)
    guess = linear.fit(values, vectors(values))
    assert np.abs(guess - values.labels[values.part("test")]).mean() < 15  # levels lie 66 apart


def test_only_training_patients_are_learned_from():
    for task in (toy(), quantity(toy())):
        x = vectors(task)
        before = linear.fit(task, x)
        other, rest = task.labels.copy(), task.split != "train"
        other[rest] = np.random.default_rng(0).permutation(other[rest])
        x[task.split == "val"] = 0
        changed = linear.Task(task.name, task.clips, other, task.groups, task.split)
        np.testing.assert_array_equal(before, linear.fit(changed, x))


def test_patients_are_kept_whole_when_the_penalty_is_chosen(monkeypatch):
    """With features that name the patient and labels by patient, folds that split patients would trust the features."""
    seen = []
    search = linear.GridSearchCV.fit

    def spy(self, x, y, groups):
        seen.extend((groups[a], groups[b]) for a, b in self.cv.split(x, y, groups))
        return search(self, x, y, groups=groups)

    monkeypatch.setattr(linear.GridSearchCV, "fit", spy)
    for task in (toy(), quantity(toy())):
        linear.fit(task, vectors(task))
    assert len(seen) == 4 + 5 and all(not set(a) & set(b) for a, b in seen)  # 4 patients of each class


def test_features_without_a_signal_are_not_trusted():
    """A feature that is noise gives the firmest hold, so the guess stays near the mean."""
    task = quantity(toy(("train",) * 30 + ("val",) * 3 + ("test",) * 9))
    x = np.random.default_rng(3).normal(size=(len(task.labels), 40))
    guess, mean = linear.fit(task, x), linear.constant(task)
    assert np.abs(guess - mean).max() < 0.1 * task.labels.std()


def test_the_constant_guess_looks_at_nothing():
    task = toy(("train",) * 7 + ("test",) * 3)
    np.testing.assert_allclose(linear.constant(task), [[3 / 7, 2 / 7, 2 / 7]] * 6)
    values = quantity(task)
    np.testing.assert_allclose(linear.constant(values), values.labels[:14].mean(), rtol=1e-6)


def test_a_rare_class_weighs_as_much():
    """Nine patients to two: the boundary lies between the classes' means, not at the larger class's edge."""
    labels = np.array(["usual"] * 18 + ["rare"] * 4 + ["usual"] * 8 + ["rare"] * 8)
    task = toy(("train",) * 11 + ("test",) * 8, labels=labels)
    x = np.random.default_rng(0).normal(size=(38, 1)) + 3.0 * (labels == "rare")[:, None]
    called = linear.fit(task, x).argmax(1)
    assert (called == task.targets(task.part("test"))).mean() > 0.85


def test_every_encoder_stands_beside_the_constant_guess(encoder):
    tasks = [toy(), quantity(toy())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning of scikit-learn's or numpy's reaches the reader
        predicted = linear.study(tasks, {"random": encoder}, P, ("mean-pooled",))
        table = linear.table(tasks, predicted)
    assert list(predicted) == [("toy", "none", "constant"), ("level", "none", "constant"),
                               ("toy", "random", "mean-pooled"), ("level", "random", "mean-pooled")]
    assert table["task"].tolist() == ["toy", "toy", "level", "level"]
    assert table.loc[1, "macro-F1"] == "1.00 [1.00, 1.00]"
    assert table.loc[0, "AUROC"] == "0.50 [0.50, 0.50]" and table["patients"].tolist() == [6] * 4
    x = heads.mean_pool(*linear.frozen(encoder, tasks[0].clips, P.sector_aware)).numpy()
    np.testing.assert_array_equal(predicted["toy", "random", "mean-pooled"], linear.fit(tasks[0], x))


def test_all_three_ways_give_probabilities(encoder, monkeypatch):
    task = toy(("train",) * 4 + ("test",) * 2, classes=("dark", "white"))
    for name in ("attentive", "fine_tuned"):
        monkeypatch.setattr(heads, name, functools.partial(getattr(heads, name), steps=3))
    predicted = linear.study([task], {"random": encoder}, P, linear.WAYS)
    assert [way for _, _, way in predicted] == ["constant", *linear.WAYS]
    assert all(p.shape == (4, 2) and np.allclose(p.sum(1), 1, atol=1e-5) for p in predicted.values())


def test_an_unknown_way_is_refused(encoder):
    with pytest.raises(ValueError, match="max-pooled: no way to probe; choose from mean-pooled, attentive, fine-tuned"):
        linear.study([toy()], {"random": encoder}, P, ("max-pooled",))


# --- the command

def test_the_command_prints_the_table(tmp_path, encoder, capsys):
    root = ultrabench_set(tmp_path / "fatty_liver_v1.0.1")
    torch.save({"target_encoder": encoder.state_dict(), "positions": "sincos3d"}, tmp_path / "mine.pt")
    command = [str(root), "--weights", str(tmp_path / "mine.pt"), "--profile", "smoke", "--ways", "mean-pooled"]
    assert linear.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mine.pt[target_encoder]" in lines[0] and "0 missing, 0 left over" in lines[0]
    rows = [line.split()[:3] for line in lines if line.lstrip().startswith("fatty_liver")]
    assert rows == [["fatty_liver_v1.0.1", *r] for r in (
        ["none", "constant"], ["random", "mean-pooled"], ["mine", "mean-pooled"])]
    assert "1.00 [1.00, 1.00]" in next(line for line in lines if "random mean-pooled" in line)  # brightness is easy
    # the same weights twice: a paired difference of nothing
    assert [line for line in lines if line.startswith("mine - random")] == [
        f"mine - random, mean-pooled, {score}: +0.00 [+0.00, +0.00]" for score in ("macro-F1", "AUROC")]


def test_checkpoints_of_one_name_are_told_apart_by_their_folders():
    assert linear.named(["runs/a.pt", "b.pt"]) == {"a": "runs/a.pt", "b": "b.pt"}
    both = ["runs/a/checkpoint.pt", "runs/b/checkpoint.pt"]
    assert linear.named(both) == dict(zip(["a/checkpoint", "b/checkpoint"], both, strict=True))
    assert list(linear.named(["runs/random.pt"])) == ["runs/random"]  # not the control of that name
    with pytest.raises(TaskError, match="two files are called b/x"):
        linear.named(["a/b/x.pt", "c/b/x.pt"])


@pytest.mark.parametrize("arguments, sentence", [
    (["{}/none"], "none: no such folder"),
    (["{}/set", "--profile", "huge"], "no such profile"),
    (["{}/set", "--seed", "-1"], "--seed -1 is not possible: choose a whole number from 0 to 4294967295"),
    (["{}/set", "--seed", str(2**32)], "--seed 4294967296 is not possible: choose a whole number from 0 to"),
    (["{}/set", "--profile", "smoke", "--weights", "{}/none.pt"], "none.pt: no such checkpoint"),
    (["{}/set", "--profile", "smoke", "--label", "scan_mask"], "set: one training patient only for the class"),
    (["{}/set", "--profile", "smoke", "--label", "organ"], "has no 'organ'"),
])
def test_the_command_says_what_is_wrong(tmp_path, capsys, arguments, sentence):
    ultrabench_set(tmp_path / "set", patients=20, images=1)
    assert linear.main([a.format(tmp_path) for a in arguments]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_a_classifier_names_the_classes_that_fit_gives(encoder):
    task = toy()
    predict, test = linear.classifier(task, encoder, P), task.part("test")
    probabilities = linear.fit(task, heads.mean_pool(*linear.frozen(encoder, task.clips, P.sector_aware)).numpy())
    assert (predict(task.clips[test].numpy()) == task.classes[probabilities.argmax(1)]).all()
    assert set(predict(torch.zeros(3, 4, 32, 32, dtype=torch.uint8))) <= set(task.classes)
