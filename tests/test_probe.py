"""The probe: what it sees, what it scores, what it keeps on disk, and that good features give good masks."""

import os
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lightning_fabric import Fabric
from torch import Generator
from torch.nn import functional as F

from usjepa_nb import controls, metrics, objectives, pretrain, probe
from usjepa_nb.camus import UNLABELLED
from usjepa_nb.masking import sector_tokens
from usjepa_nb.profile import load

GRID, TUBELET = (2, 4, 4), (2, 8, 8)  # of profile smoke: 4 frames of 32 × 32


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return objectives.make_encoder(load("smoke"), 4)


def fan(n=2, seed=0):
    """Grey clips with a bright half disk below the middle of the upper edge, black elsewhere: float [n, 4, 32, 32]."""
    y, x = np.mgrid[:32, :32]
    inside = (y ** 2 + (x - 15.5) ** 2 < 26 ** 2) & (np.abs(x - 15.5) < 2 + y)
    clips = np.random.default_rng(seed).integers(20, 255, (n, 4, 32, 32)) * inside
    return torch.from_numpy(clips).float()


def untrained(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return probe.SegmentationProbe(GRID, TUBELET, 8, 2, 16)


def pixels(tokens):
    """One value per token [n, 32] -> one per pixel [n, 4, 32, 32]."""
    x = tokens.view(-1, *GRID)
    for axis, n in enumerate(TUBELET, start=1):
        x = x.repeat_interleave(n, axis)
    return x


# --- features

def test_encoding_the_sector_is_encoding_everything_where_all_is_sector(encoder):
    grey = 20 + 200 * torch.rand(3, 4, 32, 32, generator=Generator().manual_seed(0))
    with torch.no_grad():
        (z, seen), (full, all_seen) = probe.encode(encoder, grey, True), probe.encode(encoder, grey, False)
    assert seen.all() and all_seen.all() and z.shape == (3, 32, 32)
    torch.testing.assert_close(z, full, atol=1e-5, rtol=1e-4)


def test_left_out_tokens_are_zeros_and_have_no_part_in_the_others(encoder):
    grey = fan(3)
    grey[1, :, 16:] = 0  # a smaller sector: this clip is padded in the batch
    with torch.no_grad():
        z, seen = probe.encode(encoder, grey, True)
        assert torch.equal(seen, sector_tokens(grey, TUBELET)) and len(set(seen.sum(1).tolist())) == 2
        assert (z[~seen] == 0).all() and (z[seen].abs().sum(-1) > 0).all()
        for i in range(3):
            alone, _ = probe.encode(encoder, grey[i:i + 1], True)
            torch.testing.assert_close(z[i], alone[0], atol=1e-5, rtol=1e-4)


def test_features_lie_at_their_tokens(encoder):
    grey = fan()
    with torch.no_grad():
        z, seen = probe.encode(encoder, grey, True)
        kept = seen[0].nonzero().T
        only = encoder(probe.standardise(grey[:1]), kept)
    torch.testing.assert_close(z[0, kept[0]], only[0], atol=1e-5, rtol=1e-4)


# --- the probe's output

@pytest.mark.parametrize("token", [0, 5, 16, 31])
def test_a_token_that_was_left_out_is_background_all_over(token):
    seen, head = torch.ones(2, 32, dtype=torch.bool), untrained()
    seen[1, token] = False
    with torch.no_grad():
        head.up2.bias.view(-1, probe.CLASSES)[:, 3] = 50.0  # every token that is seen says class 3
        out = head(torch.randn(2, 32, 8, generator=Generator().manual_seed(0)), seen)
    t, y, x = token // 16, token // 4 % 4, token % 4
    hole = np.s_[2 * t:2 * t + 2, 8 * y:8 * y + 8, 8 * x:8 * x + 8]
    labels = probe.classes(out)
    assert (labels[1][hole] == 0).all() and int((labels == 0).sum()) == 2 * 8 * 8 and (labels[0] == 3).all()
    loss = F.cross_entropy(out[1:, :, *hole], torch.full((1, 2, 8, 8), 3))
    assert torch.isfinite(loss) and loss > 10  # a label in there costs, but not infinitely


def test_the_probe_answers_for_every_pixel_and_looks_only_at_what_was_seen():
    head, generator = untrained(), Generator().manual_seed(1)
    z, seen = torch.randn(2, 32, 8, generator=generator), torch.rand(2, 32, generator=generator) < 0.6
    logits = head(z, seen)
    assert logits.shape == (2, 4, 4, 32, 32)
    spoilt = torch.where(seen[..., None], z, torch.full_like(z, 99.0))
    torch.testing.assert_close(head(spoilt, seen), logits)
    assert (logits.argmax(1)[~pixels(seen)] == 0).all()


def test_tokens_that_were_left_out_are_not_attended_to():
    head, z = untrained(), torch.randn(1, 32, 8, generator=Generator().manual_seed(1))
    seen = torch.rand(1, 32, generator=Generator().manual_seed(2)) < 0.6
    x = z[seen][None]  # as if there were no other tokens
    kv = head.norm1(x)
    x = x + head.attention(kv + head.query, kv, kv)[0]
    full = torch.zeros(1, 32, 8)
    full[seen] = (x + head.mlp(head.norm2(x)))[0]
    maps = head.up2(F.gelu(head.up1(full.view(2, 4, 4, 8).permute(0, 3, 1, 2))))  # [t, frame · class, 32, 32]
    by_hand = maps.reshape(4, 4, 32, 32).transpose(0, 1)[None]
    inside = pixels(seen)[:, None].expand_as(by_hand)
    torch.testing.assert_close(head(z, seen)[inside], by_hand[inside])


@pytest.mark.parametrize("patch, first", [(16, 4), (8, 4), (4, 2), (2, 2)])
def test_two_transposed_convolutions_bring_every_patch_back_to_pixels(patch, first):
    head = probe.SegmentationProbe((1, 2, 3), (2, patch, patch), 8, 2, 4)
    assert head.up1.stride == (first, first)
    assert head(torch.randn(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)).shape == (1, 4, 2, 2 * patch, 3 * patch)


def test_a_token_draws_its_own_pixels_and_frames():
    head = untrained()
    head.attention.out_proj.weight.data.zero_()  # leaves the way from a token to its own pixels
    z, seen = torch.randn(1, 32, 8, generator=Generator().manual_seed(0)), torch.ones(1, 32, dtype=torch.bool)
    changed = z.clone()
    changed[0, 22] += 1  # t 1, y 1, x 2
    difference = (head(z, seen) != head(changed, seen)).any(1)[0]
    assert difference.nonzero().min(0).values.tolist() == [2, 8, 16]
    assert difference.nonzero().max(0).values.tolist() == [3, 15, 23]


def test_the_scale_of_the_features_is_that_of_the_training_clips():
    head, generator = untrained(), Generator().manual_seed(0)
    z, seen = 5 + 3 * torch.randn(40, 32, 8, generator=generator), torch.rand(40, 32, generator=generator) < 0.5
    z[~seen] = 1e6
    z[..., 7] = 2.0  # a feature that never varies
    head.fit_scale(z.half(), seen)
    torch.testing.assert_close(head.mean[:7], torch.full((7,), 5.0), atol=0.4, rtol=0)
    torch.testing.assert_close(head.std[:7], torch.full((7,), 3.0), atol=0.3, rtol=0)
    assert torch.isfinite(head(z, seen)).all()


# --- loss and score

def test_unlabelled_pixels_have_no_part_in_the_loss():
    logits = torch.randn(1, 4, 2, 4, 4, generator=Generator().manual_seed(0), requires_grad=True)
    masks = torch.randint(4, (1, 2, 4, 4), generator=Generator().manual_seed(0)).byte()
    masks[0, 1] = UNLABELLED
    loss = probe.segmentation_loss(logits, masks)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :, 0], masks[:, 0].long()))
    loss.backward()
    assert (logits.grad[:, :, 1] == 0).all() and (logits.grad[:, :, 0] != 0).all()


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_the_loss_at_the_tokens_is_that_of_all_pixels(patch):
    generator = Generator().manual_seed(2)
    head = probe.SegmentationProbe((2, 3, 4), (2, patch, patch), 8, 2, 4)
    z, seen = torch.randn(3, 24, 8, generator=generator), torch.rand(3, 24, generator=generator) < 0.6
    assert len(set(seen.sum(1).tolist())) > 1  # some are padded
    masks = torch.randint(4, (3, 4, 3 * patch, 4 * patch), generator=generator).byte()  # also where nothing was seen
    masks[0, 1] = masks[2, :, 1] = UNLABELLED
    both = []
    for loss in (lambda: probe.segmentation_loss(head(z, seen), masks), lambda: head.loss(z, seen, masks)):
        head.zero_grad()
        loss().backward()
        both.append([loss().detach(), *(q.grad.clone() for q in head.parameters())])
    assert float(both[0][0]) > 3  # log 4 inside, 20 outside
    torch.testing.assert_close(both[1], both[0], rtol=1e-5, atol=1e-7)


LABELS = st.sampled_from([0, 1, 2, 3])


@given(hnp.arrays(np.uint8, (3, 2, 3, 4), elements=LABELS),
       hnp.arrays(np.uint8, (3, 2, 3, 4), elements=LABELS | st.just(UNLABELLED)))
@settings(deadline=None)
def test_mean_dice_is_the_mean_of_the_videos_scores(predicted, masks):
    videos = [metrics.video_scores(p, m)["dsc"]["mean"] for p, m in zip(predicted, masks, strict=True)]
    scored = [v for v in videos if not np.isnan(v)]
    found = probe.mean_dice(torch.from_numpy(predicted), torch.from_numpy(masks))
    assert found == pytest.approx(np.mean(scored), abs=1e-6) if scored else np.isnan(found)


def test_mean_dice_by_hand():
    masks = torch.tensor([[[[1, 1, 2, 0]]]]).byte()
    predicted = torch.tensor([[[[1, 2, 2, 0]]]]).byte()
    assert probe.mean_dice(predicted, masks) == pytest.approx((2 / 3 + 2 / 3) / 2)  # no atrium on either side
    masks[0, 0, 0, 1] = UNLABELLED
    assert probe.mean_dice(predicted, masks) == pytest.approx(1)


# --- the cache

def test_the_cache_holds_the_features_in_half_precision(tmp_path, encoder):
    grey = fan(5).byte().numpy()
    cache = probe.Cache.write(tmp_path / "features.h5", encoder, grey, True, batch=2)
    with torch.no_grad():
        parts = [probe.encode(encoder, torch.from_numpy(grey[i:i + 2]).float(), True) for i in (0, 2, 4)]
    assert torch.equal(cache.features, torch.cat([z for z, _ in parts]).half()) and cache.features.dtype == torch.half
    assert torch.equal(cache.seen, torch.cat([s for _, s in parts])) and cache.seen.dtype == torch.bool
    again = probe.Cache(tmp_path / "features.h5")
    assert torch.equal(again.features, cache.features) and torch.equal(again.seen, cache.seen)
    assert os.listdir(tmp_path) == ["features.h5"] and not encoder.training


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_cache_is_written_whole_or_not_at_all(tmp_path, encoder, monkeypatch, error):
    grey, path = fan(4).byte().numpy(), tmp_path / "features.h5"
    old = probe.Cache.write(path, encoder, grey[:1], True).features
    real, calls = probe.encode, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(probe, "encode", fails)
    with pytest.raises(type(error)):
        probe.Cache.write(path, encoder, grey, True, batch=2)
    assert len(calls) == 2 and os.listdir(tmp_path) == ["features.h5"]
    assert torch.equal(probe.Cache(path).features, old)


def test_a_full_disk_is_seen_before_hdf5_is_begun(tmp_path, encoder, monkeypatch):
    grey = np.zeros((1000, 4, 32, 32), np.uint8)  # 1000 · 32 · (32 · 2 + 1) bytes of features and flags
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(h5py, "File", lambda *args: pytest.fail("HDF5 was begun"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2_079_999))
    with pytest.raises(OSError, match=r"No space left on device, 2 MB wanted.*" + str(tmp_path)):
        probe.Cache.write(tmp_path / "features.h5", encoder, grey, True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", [lambda data: data[:-50], lambda data: b"", lambda data: b"no HDF5" * 99])
def test_a_damaged_cache_is_named_with_the_remedy(tmp_path, encoder, damage):
    path = tmp_path / "features.h5"
    probe.Cache.write(path, encoder, fan().byte().numpy(), True)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=r"features.h5 cannot be read as cached features .*: delete it, it is made again"):
        probe.Cache(path)


# --- fitting

@pytest.fixture(scope="module")
def separable():
    """Twelve clips whose features say the class of each token, and the masks that go with them."""
    generator = Generator().manual_seed(0)
    labels = torch.randint(4, (12, 32), generator=generator)
    z = F.one_hot(labels, 8).float() + 0.1 * torch.randn(12, 32, 8, generator=generator)
    cache = SimpleNamespace(features=z.half(), seen=torch.ones(12, 32, dtype=torch.bool))
    return cache, pixels(labels).byte()


P = load("smoke", probe_epochs=1, probe_min_steps=120, probe_batch=4, probe_lr=1.0e-2)
TRAIN, VAL, TEST = np.arange(8), np.arange(8, 10), np.arange(10, 12)


@pytest.fixture(scope="module")
def fitted(separable):
    return probe.fit(*separable, TRAIN, VAL, GRID, P, seed=0)


def test_half_precision_gives_nearly_the_same(encoder, separable, fitted, tmp_path):
    """bf16 where the profile asks for it: features to two percent, and a probe that segments as well."""
    grey = fan(3).byte().numpy()
    full, half = (probe.Cache.write(tmp_path / f"{p}.h5", encoder, grey, True, precision=p).features.float()
                  for p in ("32-true", "bf16-mixed"))
    assert 0 < (full - half).abs().mean() < 0.02 * full.abs().mean()
    cache, masks = separable
    again = probe.fit(cache, masks, TRAIN, VAL, GRID, P.replace(precision="bf16-mixed"), seed=0)
    both = [probe.mean_dice(probe.predict(f["probe"], cache.features[TEST], cache.seen[TEST]), masks[TEST])
            for f in (fitted, again)]
    assert both[1] > both[0] - 0.05 and not states_equal(fitted["last"], again["last"])


def test_features_that_tell_the_classes_apart_give_good_masks(separable, fitted):
    cache, masks = separable
    predicted = probe.predict(fitted["probe"], cache.features[TEST], cache.seen[TEST])
    assert predicted.dtype == torch.uint8 and predicted.shape == (2, 4, 32, 32)
    assert probe.mean_dice(predicted, masks[TEST]) > 0.97
    assert fitted["history"][-1]["loss"] < 0.2


def test_features_that_tell_nothing_do_not(separable):
    cache, masks = separable
    noise = torch.randn(12, 32, 8, generator=Generator().manual_seed(1)).half()
    blind = probe.fit(SimpleNamespace(features=noise, seen=cache.seen), masks, TRAIN, VAL, GRID, P, seed=0)
    assert probe.mean_dice(probe.predict(blind["probe"], noise[TEST], cache.seen[TEST]), masks[TEST]) < 0.5


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_fitting_again_gives_the_same_bits_whatever_happened_before(separable, fitted):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = probe.fit(*separable, TRAIN, VAL, GRID, P, seed=0)
    assert again["history"] == fitted["history"] and torch.equal(torch.get_rng_state(), before)
    assert states_equal(again["best"], fitted["best"]) and states_equal(again["last"], fitted["last"])
    other = probe.fit(*separable, TRAIN, VAL, GRID, P, seed=1)
    assert not states_equal(other["last"], fitted["last"])


def test_best_is_the_first_of_the_best_on_validation_and_last_is_last(separable):
    cache, masks = separable
    swapped = masks.clone()
    swapped[VAL] = (swapped[VAL] + 1) % 4  # learning the training clips makes validation worse
    out = probe.fit(cache, swapped, TRAIN, VAL, GRID, P, seed=0)
    scores = [h["val_dsc"] for h in out["history"]]
    assert scores.index(max(scores)) < len(scores) - 1
    assert states_equal(dict(out["probe"].state_dict()), out["best"]) and not states_equal(out["best"], out["last"])
    for which, score in (("best", max(scores)), ("last", scores[-1])):
        out["probe"].load_state_dict(out[which])
        assert probe.mean_dice(probe.predict(out["probe"], cache.features[VAL], cache.seen[VAL]), swapped[VAL]) == score


def test_clips_that_are_neither_trained_nor_validated_on_have_no_influence(separable, fitted):
    cache, masks = separable
    spoilt = SimpleNamespace(features=cache.features.clone(), seen=cache.seen.clone())
    spoilt.features[TEST], spoilt.seen[TEST[0], 5] = 100.0, False
    wrong = masks.clone()
    wrong[TEST] = 2
    assert states_equal(probe.fit(spoilt, wrong, TRAIN, VAL, GRID, P, seed=0)["last"], fitted["last"])


@pytest.mark.parametrize("epochs, least, steps, looks", [(5, 0, 10, 5), (1, 7, 7, 3), (30, 7, 60, 10)])
def test_steps_and_looks_by_hand(separable, epochs, least, steps, looks):
    out = probe.fit(*separable, TRAIN, VAL, GRID, P.replace(probe_epochs=epochs, probe_min_steps=least), seed=0)
    found = [h["step"] for h in out["history"]]  # 8 clips in batches of 4: an epoch has two steps
    assert found[-1] == steps and looks <= len(found) <= looks + 1


@pytest.mark.parametrize("train, val, message", [(0, 2, "not 0 and 2"), (8, 0, "not 8 and 0")])
def test_without_clips_to_learn_or_choose_by_it_says_so(separable, train, val, message):
    with pytest.raises(ValueError, match=message + ": give the data set more patients"):
        probe.fit(*separable, TRAIN[:train], VAL[:val], GRID, P, seed=0)


# --- the supervised control

def test_supervised_training_learns_encoder_and_probe_together(tmp_path, encoder):
    p = load("smoke", steps=40, lr=3.0e-3, log_every=40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = controls.Supervised(p, 4, objectives.make_encoder(p, 4))
    before = {k: v.clone() for k, v in objective.named_parameters()}
    grey = fan(4)
    masks = (grey.mean(1, keepdim=True) > 90).byte().expand(-1, 4, -1, -1).clone()
    masks[:, 1] = UNLABELLED
    rows = list(pretrain.train(objective, lambda g, n: (grey.byte(), masks), p, tmp_path / "c.pt", seed=0,
                               fabric=Fabric(accelerator="cpu", devices=1)))
    assert np.mean([r["loss"] for r in rows[-5:]]) < 0.6 * rows[0]["loss"]
    moved = {k for k, v in objective.named_parameters() if not torch.equal(v, before[k])}
    assert moved == set(before) and objective.features is objective.encoder
