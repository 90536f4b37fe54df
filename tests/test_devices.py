"""What a GPU is asked to do, on a machine that has none: no operation on tensors of two devices, and no number that is
read back inside a training step. The other device is pretended (`elsewhere`), so every machine checks it."""

import contextlib

import numpy as np
import pytest
import torch
from elsewhere import THERE, Device, Elsewhere
from smoke_lab import smoke_lab
from torch import Generator

from usjepa_nb import controls, heads, linear, objectives, pretrain, probe, segment, tasks
from usjepa_nb.runs import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # not so: it is copied


@pytest.fixture(autouse=True)
def kernels_of_a_gpu(monkeypatch):
    """torch's "meta" has neither autocast nor fused optimisers."""
    real = torch.optim.AdamW.__init__
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda *a, **k: real(*a, **k | {"fused": False}))
    monkeypatch.setattr(probe, "autocast", lambda precision, device: contextlib.nullcontext())


def objective_of(method, p, frames):
    """Objectives, from random weights."""
    torch.manual_seed(0)
    encoder = objectives.make_encoder(p, frames)
    return {"vjepa": lambda: objectives.VJEPA(p, frames, encoder, 1.0, 0),
            "vjepa_ll": lambda: objectives.VJEPA(p, frames, encoder, 0.25, 1),
            "salt": lambda: objectives.SALT(p, frames, encoder, 0.25, 0, objectives.make_encoder(p, frames)),
            "videomae": lambda: objectives.VideoMAE(p, frames, encoder),
            "teacher": lambda: objectives.PixelTeacher(p, frames, encoder),
            "supervised": lambda: controls.Supervised(p, frames, encoder),
            "unet": lambda: controls.UNet((4, 8))}[method]()


def step(objective, batch, seed=0, device=None):
    """One training step as `pretrain.train` takes it -> its loss, and what was read back between the two ends."""
    generator = Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(objective))
    prepared = objective.prepare(batch, generator)
    if device:
        device.reads.clear()
    out = objective(prepared)
    out["loss"].backward()
    torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    optimizer.step()
    objective.after_step(1)
    reads = list(device.reads) if device else []
    return {k: float(v.detach()) for k, v in out.items()}, reads


@pytest.mark.parametrize(("method", "changes"), [
    ("vjepa", {}), ("vjepa", {"mask": "multiblock", "one_pass": True}), ("vjepa", {"sector_aware": False}),
    ("vjepa", {"target_layers": 1, "centre": 0.0, "beta": 0.0, "variance": 0.1}),
    ("vjepa", {"variance": 0.1, "mask_rule": "pad"}),
    ("vjepa_ll", {}), ("vjepa_ll", {"ll_on": "context", "mask": "multiblock"}), ("vjepa_ll", {"mask_rule": "pad"}),
    ("vjepa_ll", {"ll_on": "unplaced"}),
    ("salt", {}), ("videomae", {}), ("teacher", {}), ("supervised", {}), ("supervised", {"sector_aware": False}),
    ("unet", {}),
])
def test_a_step_stays_on_the_device_and_reads_nothing_back(lab, method, changes):
    p = lab.profile.replace(**changes)
    clips, masks = (torch.from_numpy(v) for v in lab.clips(lab.labelled(100)[:4]))
    batch = (clips, masks) if method in ("supervised", "unet") else clips.float()
    here, _ = step(objective_of(method, p, lab.frames), batch)
    with Device() as device:
        objective = objective_of(method, p, lab.frames).to(THERE)
        moved = tuple(v.to(THERE) for v in batch) if isinstance(batch, tuple) else batch.to(THERE)
        there, reads = step(objective, moved, device=device)
    assert all(isinstance(v, Elsewhere) for v in objective.state_dict().values())
    assert there == pytest.approx(here, rel=1e-6)
    assert reads == []


@pytest.mark.parametrize("augmentation", ["mild", "published", "none"])
def test_batches_are_augmented_on_the_device(lab, augmentation):
    changed = Lab("smoke", cache=lab.cache, augmentation=augmentation)
    rows = changed.store.rows("train")
    here = changed.batches(rows)(Generator().manual_seed(0), 4)
    with Device() as device:
        there = changed.batches(rows, THERE)(Generator().manual_seed(0), 4)
        assert isinstance(there, Elsewhere) and device.reads == []
        assert (there.cpu() - here).abs().max() < 1e-3


def test_features_probe_and_predictions(lab, tmp_path, monkeypatch):
    """What a frozen encoder is worth, computed elsewhere: the same features, the same probe, the same masks."""
    p = lab.profile
    train, val = lab.labelled(100), lab.store.rows("val", labelled=True)
    grey, masks = lab.clips(np.concatenate([train, val]))
    encoder = lab.encoder("random").encoder

    def worth(folder, device):
        folder.mkdir()
        cache = probe.Cache.write(folder / "f.h5", encoder, grey, p.sector_aware, device)
        fitted = probe.fit(cache, torch.from_numpy(masks), np.arange(len(train)), np.arange(len(train), len(grey)),
                           p.grid(lab.frames), p, seed=0, device=device)
        assert type(fitted["probe"].mean) is (torch.Tensor if device == "cpu" else Elsewhere)
        return cache.features, fitted["history"], probe.predict(fitted["probe"], cache.features, cache.seen)

    features, history, predicted = worth(tmp_path / "here", "cpu")
    with Device():
        far, far_history, far_predicted = worth(tmp_path / "there", "meta")
    assert torch.allclose(features.float(), far.float(), atol=2e-3)
    assert (predicted != far_predicted).float().mean() < 1e-3
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in far_history], rel=1e-4)


@pytest.mark.parametrize("method", ["random", "supervised"])
def test_any_clips_are_segmented(lab, monkeypatch, method):
    run, clips = lab.encoder(method), lab.clips(lab.labelled(100)[:3])[0]
    here = segment.predictor(lab, run)(clips)
    monkeypatch.setattr(Lab, "device", "meta")
    with Device():
        there = segment.predictor(lab, run)(clips)
    assert type(there) is np.ndarray and (here != there).mean() < 1e-3


def test_tasks_are_learned(lab):
    task = next(t for t in tasks.possible(tasks.camus_tasks(lab)) if t.name == "view")
    encoder = lab.encoder("random").encoder
    ways = {"frozen": lambda device: linear.frozen(encoder, task.clips, True, device)[0].float().numpy(),
            "attentive": lambda device: heads.attentive(task, *linear.frozen(encoder, task.clips, True), 2, steps=5,
                                                        device=device),
            "fine-tuned": lambda device: heads.fine_tuned(task, encoder, True, steps=3, device=device)}
    for way in ways.values():
        with Device():
            there = way("meta")
        assert type(there) is np.ndarray and there == pytest.approx(way("cpu"), abs=1e-3)
