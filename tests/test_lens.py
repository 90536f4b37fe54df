"""The lens: each kind of token holds what its name says, and a head's error is measured against the right baseline."""

import copy
from types import SimpleNamespace

import pytest
import torch
from smoke_lab import smoke_lab

from usjepa_nb import lens, losses, masking
from usjepa_nb.augment import standardise
from usjepa_nb.lens import SOURCES, Tokens, answering_zero, offset_error

GRID = (2, 3, 5)
ROOM = SimpleNamespace(grid=GRID, p=SimpleNamespace(pairs=100))  # all that an error needs of an objective


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def objective_of(lab, **changes):
    other = copy.copy(lab)
    other.profile = lab.profile.replace(**changes)
    return other.objective(other.spec("vjepa")).eval()


def pictures(lab):
    """Four clips, and four others with the same sector."""
    grey = torch.from_numpy(lab.clips(lab.store.rows("train")[:4])[0]).float()
    return grey, torch.where(grey > 2, 250 - grey / 2, grey)


def positions(seed, rule="random"):
    """Tokens that are their own positions, in [0, 1)."""
    masks = masking.multiblock(GRID, 6, generator(seed), blocks=2, scale=0.4, rule=rule)
    return Tokens(losses.position(masks.target, GRID) / torch.tensor(GRID), masks)


# --- tokens

@pytest.mark.parametrize("source, sees", [("predicted", True), ("predicted, encoder blanked", False),
                                          ("context", True), ("context, no image", False),
                                          ("context, no position", True), ("context, neither", False)])
def test_only_sources_that_look_at_the_image_depend_on_it(lab, source, sees):
    objective = objective_of(lab)
    first, second = (lens.tokens(objective, grey, source, generator()) for grey in pictures(lab))
    assert torch.equal(first.masks.target, second.masks.target)
    assert torch.equal(first.values, second.values) is not sees
    assert not first.values.requires_grad
    assert bool(first.values.std(1).mean() > 1e-3) is (source != "context, neither")  # places still differ


@pytest.mark.parametrize("rule", ["random", "pad"])
@pytest.mark.parametrize("source", SOURCES)
def test_tokens_lie_where_their_masks_say(lab, source, rule):
    objective, (grey, _) = objective_of(lab, mask_rule=rule), pictures(lab)
    allowed = masking.sector_tokens(grey, (2, 8, 8))
    masks = objective.masks(4, allowed, generator())[0]
    made = lens.tokens(objective, grey, source, generator())
    want = masks if source.startswith("predicted") else masks.swapped()
    assert torch.equal(made.masks.target, want.target) and torch.equal(made.masks.context, want.context)
    assert made.values.shape == (*want.target.shape, 32)
    assert (made.masks.target_valid is not None) == (rule == "pad")


def test_predicted_and_context_are_what_pre_training_computes(lab):
    objective, (grey, _) = objective_of(lab), pictures(lab)
    predicted, context = (lens.tokens(objective, grey, s, generator()) for s in ("predicted", "context"))
    with torch.no_grad():
        z = objective.encoder(standardise(grey), context.masks.target)
        assert torch.equal(context.values, z)
        assert torch.equal(predicted.values, objective.predictor(z, predicted.masks, 0))


def test_blanked_is_the_predictor_on_zeros(lab):
    objective, (grey, _) = objective_of(lab), pictures(lab)
    made = lens.tokens(objective, grey, "predicted, encoder blanked", generator())
    with torch.no_grad():
        want = objective.predictor(torch.zeros(*made.masks.context.shape, 32), made.masks, 0)
    assert torch.equal(made.values, want)


def test_tokens_without_a_position_do_not_depend_on_it(lab):
    """The same patch at another place gives the same token when its neighbours are the same, however they lie."""
    objective, (grey, _) = objective_of(lab, sector_aware=False), pictures(lab)
    here = lens.tokens(objective, grey, "context, no position", generator())
    with torch.no_grad():
        where = objective.encoder.pos_embed.clone()
        objective.encoder.pos_embed.copy_(where.flip(1))
    assert torch.equal(here.values, lens.tokens(objective, grey, "context, no position", generator()).values)
    assert not torch.equal(lens.tokens(objective, grey, "context", generator()).values, here.values)


def test_an_unknown_source_names_the_known_ones(lab):
    with pytest.raises(ValueError, match="source='target' is unknown: choose one of predicted, predicted, encoder bl"):
        lens.tokens(objective_of(lab), pictures(lab)[0], "target", generator())


# --- errors

@pytest.mark.parametrize("replacement", [True, False])
def test_positions_give_the_offset_away(replacement):
    train, test = positions(0), positions(1)
    error = offset_error(train, test, ROOM, 0, steps=150, replacement=replacement)
    assert error.shape == (3,) and not error.requires_grad
    assert (error < 0.3 * answering_zero(test, ROOM, 0)).all()


def test_padding_is_not_located():
    train, test = positions(0, "pad"), positions(1, "pad")
    clean = offset_error(train, test, ROOM, 0, steps=5)
    for t in (train, test):
        assert not t.masks.target_valid.all()
        t.values = torch.where(t.masks.target_valid[..., None], t.values, torch.nan)
    assert torch.equal(offset_error(train, test, ROOM, 0, steps=5), clean)


def test_offsets_of_other_pairs_teach_nothing():
    train, test = positions(0), positions(1)
    error = offset_error(train, test, ROOM, 0, steps=150, shuffled=True)
    assert (error > 0.9 * answering_zero(test, ROOM, 0)).all()


def test_tokens_without_position_teach_nothing():
    train, test = positions(0), positions(1)
    for t in (train, test):
        t.values = torch.randn(t.values.shape, generator=generator(5))
    assert offset_error(train, test, ROOM, 0, steps=150).sum() > 0.9 * answering_zero(test, ROOM, 0).sum()


def test_the_seed_alone_decides():
    train, test, before = positions(0), positions(1), torch.get_rng_state()
    first = offset_error(train, test, ROOM, 0, steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(offset_error(train, test, ROOM, 0, steps=5), first)
    assert not torch.equal(offset_error(train, test, ROOM, 1, steps=5), first)


def test_a_given_head_is_scored_as_it_is():
    test, head = positions(1), losses.LocalisationHead(3)
    before = copy.deepcopy(head.state_dict())
    error = offset_error(positions(0), test, ROOM, 0, head=head)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    assert torch.equal(offset_error(positions(2), test, ROOM, 0, head=head), error)  # whatever the training tokens

    class Exact(torch.nn.Module):
        def forward(self, e1, e2):
            return e1 - e2

    torch.testing.assert_close(offset_error(test, test, ROOM, 0, head=Exact()), torch.zeros(3), atol=1e-6, rtol=0)


def test_pairs_of_training_are_drawn_as_asked_and_those_of_scoring_always_alike(monkeypatch):
    asked, real = [], losses.sample_pairs

    def sample_pairs(masks, pairs, generator, replacement=True):
        asked.append((masks is test.masks, replacement))
        return real(masks, pairs, generator, replacement)

    monkeypatch.setattr(losses, "sample_pairs", sample_pairs)
    train, test = positions(0), positions(1)
    offset_error(train, test, ROOM, 0, steps=2, replacement=False)
    assert asked == [(False, False), (False, False), (True, True)]


def test_answering_zero_is_the_mean_offset_in_tokens():
    test = positions(1)
    m1, m2 = losses.sample_pairs(test.masks, 100, generator(7))
    a, b = (losses.position(test.masks.target.gather(1, m), GRID).flatten(0, 1).tolist() for m in (m1, m2))
    by_hand = [sum(abs(p[axis] - q[axis]) for p, q in zip(a, b, strict=True)) / len(a) for axis in range(3)]
    assert answering_zero(test, ROOM, 7).tolist() == pytest.approx(by_hand, rel=1e-5)
    assert 0.3 < by_hand[0] < by_hand[1] < by_hand[2]  # 2, 3 and 5 tokens long
