"""What CAMUS asks of a probe, what cannot be asked, and drawing groups equally often."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from smoke_lab import smoke_lab
from toy_task import quantity, toy

from usjepa_nb.tasks import Task, camus_tasks, group_weights, possible, still


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


@pytest.fixture(scope="module")
def tasks(lab):
    return {task.name: task for task in camus_tasks(lab)}


def test_camus_has_four_tasks_and_labels_are_the_stores(lab, tasks):
    assert list(tasks) == ["view", "quality", "ef", "phase"]
    assert tasks["view"].clips is tasks["quality"].clips is tasks["ef"].clips  # encoded once
    table, task = lab.store.table, tasks["quality"]
    for i in range(len(task.labels)):
        row = table[(table["patient"] == task.groups[i]) & (table["view"] == tasks["view"].labels[i])].iloc[0]
        assert (task.labels[i], task.split[i], tasks["ef"].labels[i]) == (row["quality"], row["split"], row["ef"])
        np.testing.assert_array_equal(task.clips[i], lab.clips([row.name])[0][0])


def test_phase_is_asked_of_clips_that_stand_still(lab, tasks):
    task, table = tasks["phase"], lab.store.table
    assert len(task.labels) == 2 * len(lab.store) and task.clips.shape[1] == lab.frames
    assert (task.clips == task.clips[:, :1]).all()
    patient, (ed, es) = task.groups[0], task.clips[:2, 0]
    assert task.labels[:2].tolist() == ["ED", "ES"] and task.groups[1] == patient
    own = [lab.store.frames(i) for i in table.index[table["patient"] == patient]]
    assert any(np.array_equal(f[0], ed) and np.array_equal(f[-1], es) for f in own)


def test_no_patient_of_a_task_is_in_two_parts(tasks):
    for task in tasks.values():
        parts = [set(task.groups[task.part(p)]) for p in ("train", "val", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 10


def test_unknown_labels_are_in_no_part():
    task = toy()
    task.labels[[0, 30]] = ""
    assert 0 not in task.part("train") and 1 in task.part("train") and len(task.part("test")) == 12
    values = quantity(task)
    values.labels[47] = np.nan
    assert values.part("test").tolist() == list(range(36, 47))


def test_targets_number_the_classes_in_order():
    task = toy()
    assert task.classes.tolist() == ["dark", "grey", "white"]
    assert task.targets(np.arange(6)).tolist() == [0, 0, 1, 1, 2, 2]
    assert quantity(task).targets(np.arange(48)).dtype == np.float32


def test_what_cannot_be_asked_is_said_and_skipped(capsys):
    good, labels = toy(), toy().labels.copy()
    one = toy(classes=("4CH",), name="view")
    lonely, strange = labels.copy(), labels.copy()
    lonely[:2], lonely[2:] = "rare", "usual"
    strange[-1] = "blue"
    nobody = Task("ef", good.clips, np.full(48, np.nan), good.groups, good.split)
    single = quantity(toy(("train", "test")))
    tasks = [good, one, toy(labels=lonely), toy(labels=strange), nobody, single]
    assert possible(tasks) == [good]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "skipped: view: all training clips are 4CH, so there is nothing to tell apart",
        "skipped: toy: one training patient only for the class rare; two are the least to learn from",
        "skipped: toy: validation or test hold blue, which no training clip shows",
        "skipped: ef: 0 labelled clips to train on and 0 to test on; both need some",
        "skipped: level: one training patient only; two are the least to learn from",
    ]


def test_a_still_is_the_image_at_every_instant():
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 5), np.uint8)
    clips = still(frames, 4)
    assert clips.shape == (3, 4, 5, 5) and clips.dtype == torch.uint8
    assert all((clips[:, t].numpy() == frames).all() for t in range(4))
    assert clips.untyped_storage().nbytes() == frames.nbytes  # not copied


@given(st.lists(st.sampled_from(["2CH", "4CH", "liver"]), min_size=1, max_size=40))
def test_every_group_gets_the_same_chance(groups):
    w, groups = group_weights(groups).numpy(), np.array(groups)
    shares = [w[groups == g].sum() for g in set(groups)]
    assert np.allclose(shares, 1 / len(shares)) and np.isclose(w.sum(), 1)
    assert all(len(set(w[groups == g])) == 1 for g in set(groups))


def test_drawn_by_weight_a_rare_group_comes_as_often():
    groups = np.array(["heart"] * 95 + ["lung"] * 5)
    drawn = torch.multinomial(group_weights(groups), 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert abs((groups[drawn.numpy()] == "lung").mean() - 0.5) < 0.03
    assert len(set(drawn.tolist())) > 95  # within a group everyone is drawn
