"""The attentive probe and fine-tuning: left-out tokens, what is learned, what is left alone."""

import copy

import numpy as np
import pytest
import torch
from toy_task import quantity, toy

from usjepa_nb import heads
from usjepa_nb.objectives import make_encoder
from usjepa_nb.profile import load


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_encoder(load("smoke"), 4)


@pytest.fixture
def needle():
    """A task and its features: the label stands in one token, elsewhere for every clip, marked by the first feature."""
    task = toy(("train",) * 40 + ("val",) * 10 + ("test",) * 10, classes=("dark", "white"))
    n = len(task.labels)
    z, seen = drawn(n, 6, 16), torch.ones(n, 6, dtype=torch.bool)
    at = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(1))
    z[torch.arange(n), at, 0] = 10.0
    z[torch.arange(n), at, 1] = 10.0 * torch.from_numpy(task.targets(np.arange(n))) - 5
    return task, z, seen


def test_mean_pool_counts_seen_tokens_only():
    z, seen = drawn(2, 3, 4), torch.tensor([[True, False, True], [True, True, True]])
    expected = torch.stack([(z[0, 0] + z[0, 2]) / 2, z[1].mean(0)])
    torch.testing.assert_close(heads.mean_pool(z * seen[..., None], seen), expected)
    torch.testing.assert_close(heads.mean_pool(z, seen), expected)
    assert heads.mean_pool(z.half(), seen).dtype == torch.float32


def test_left_out_tokens_have_no_part_in_the_attentive_answer():
    probe, z = heads.AttentiveProbe(8, 2, 3).eval(), drawn(2, 5, 8)
    seen = torch.tensor([[True] * 3 + [False] * 2] * 2)
    other = torch.where(seen[..., None], z, 99.0)
    assert probe(z, seen).shape == (2, 3)
    torch.testing.assert_close(probe(z, seen), probe(other, seen))
    torch.testing.assert_close(probe(z, seen), probe(z[:, :3], seen[:, :3]))
    assert not torch.allclose(probe(z, seen), probe(z, torch.ones_like(seen)), atol=1e-3)


def test_the_attentive_probe_finds_a_needle(needle):
    task, z, seen = needle
    p = heads.attentive(task, z, seen, 2, steps=120, lr=2e-3)
    assert p.shape == (20, 2) and np.allclose(p.sum(1), 1, atol=1e-5)
    assert (p.argmax(1) == task.targets(task.part("test"))).mean() >= 0.9


def test_encoders_of_any_scale_are_probed_alike(needle):
    task, z, seen = needle
    a, b = (heads.attentive(task, scale * z + shift, seen, 2, steps=20) for scale, shift in ((1, 0), (1000, 500)))
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_the_seed_decides(needle):
    task, z, seen = needle
    state = torch.random.get_rng_state()
    a, b, c = (heads.attentive(task, z, seen, 2, steps=5, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)
    assert torch.equal(state, torch.random.get_rng_state())


def test_values_are_regressed_in_their_unit():
    task = quantity(toy())
    z = drawn(48, 6, 8) / 4
    z[..., 0] += torch.from_numpy(task.labels - 100).float()[:, None] / 60
    guess = heads.attentive(task, z, torch.ones(48, 6, dtype=torch.bool), 2, steps=120, lr=2e-3)
    error = np.abs(guess - task.labels[task.part("test")]).mean()
    assert guess.shape == (12,) and error < 20  # levels lie 66 apart


def test_validation_chooses_the_step_and_test_labels_have_no_part(needle):
    """Where the validation labels say the opposite every step is worse there, so an early, unsure one is kept."""
    task, z, seen = needle
    first = heads.attentive(task, z, seen, 2, steps=10, seed=0)
    scrambled = copy.deepcopy(task)
    scrambled.labels[task.part("test")] = scrambled.labels[task.part("test")][::-1]
    np.testing.assert_array_equal(first, heads.attentive(scrambled, z, seen, 2, steps=10, seed=0))
    against, without = copy.deepcopy(task), copy.deepcopy(task)
    val = task.part("val")
    against.labels[val] = np.where(task.labels[val] == "dark", "white", "dark")
    without.split[val] = "unused"
    sure = [heads.attentive(t, z, seen, 2, steps=100, lr=2e-3).max(1).mean() for t in (against, without)]
    assert sure[0] < sure[1] - 0.1


def test_fine_tuning_learns_and_leaves_the_given_encoder_alone(encoder):
    task, before = toy(classes=("dark", "white")), copy.deepcopy(encoder.state_dict())
    p = heads.fine_tuned(task, encoder, False, steps=40, lr=5e-3)
    assert (p.argmax(1) == task.targets(task.part("test"))).all()
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_fine_tuning_moves_the_encoders_weights(encoder):
    """With the encoder held (rate 0) the outcome differs, so its weights did move."""
    task = toy(classes=("dark", "white"))
    frozen = copy.deepcopy(encoder).requires_grad_(False)  # as V-JEPA's target encoder comes
    held, free = (heads.fine_tuned(task, frozen, False, steps=10, encoder_lr=r) for r in (0.0, 1.0))
    assert not np.allclose(held, free, atol=1e-3)
    np.testing.assert_array_equal(free, heads.fine_tuned(task, encoder, False, steps=10, encoder_lr=1.0))
