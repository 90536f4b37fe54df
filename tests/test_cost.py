"""Counting a step: by hand, against real weights, and against what is known of the published ViT-L."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from usjepa_nb import cost, methods, probe
from usjepa_nb.profile import load
from usjepa_nb.vit import make_blocks

P = load("smoke")


def clips(seed=0, n=P.batch):
    return torch.randint(3, 256, (n, P.frames, P.size, P.size), generator=torch.Generator().manual_seed(seed)).float()


def real(method, lam=1.0, freeze=0):
    lab = SimpleNamespace(profile=P.replace(init="random", init_videomae="random"), frames=P.frames,
                          encoder=lambda name, **_: real(name))
    return methods.build(lab, {"method": method, "lam": lam, "freeze": freeze, "seed": 0, "fraction": None})


def counted(module, grey, p=P, labels=False):
    batch = (grey, torch.zeros_like(grey)) if labels else grey
    return cost.step(module, lambda: module(batch, torch.Generator().manual_seed(0))["loss"], p.precision)


def test_a_block_costs_what_a_pencil_says():
    D, K = 32, 10
    block = cost.fake(lambda: make_blocks(D, 1, 2)[0])
    x = torch.zeros(3, K, D, requires_grad=True)
    products = 2 * 12 * D * D * K  # qkv 3D², proj D², MLP 8D² multiply-adds a token
    attention = 2 * K * K * D  # a product of scores or of values
    assert cost.forward(lambda: block(x)) == 3 * (products + 2 * attention)
    # backward: every product twice; attention makes its scores again, then four products
    assert cost.step(block, lambda: block(x).sum(), "32-true").flops == 3 * (3 * products + (2 + 5) * attention)


@pytest.mark.parametrize("method, lam, freeze", [("videomae", 1, 0), ("vjepa", 1, 0), ("vjepa_ll", 0.25, 1),
                                                 ("teacher", 1, 0), ("salt", 0.25, 0), ("supervised", 1, 0),
                                                 ("unet", 1, 0)])
def test_fake_weights_cost_what_real_ones_cost(method, lam, freeze):
    labels = method in ("supervised", "unet")
    planned = counted(cost.objective(P, P.frames, method, lam, freeze), clips(), labels=labels)
    assert planned == counted(real(method, lam, freeze), clips(), labels=labels)


def test_kept_is_what_the_backward_pass_reads_weights_left_out():
    B = 5
    module = cost.fake(lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)))
    x = torch.zeros(B, 4)
    assert cost.step(module, lambda: module(x).sum(), "32-true").kept == 4 * B * (4 + 8 + 8)  # inputs of the layers


def test_state_is_weights_gradients_and_two_moments():
    module = cost.objective(P, P.frames, "vjepa_ll", 0.25, 1)
    weights = sum(p.numel() for p in module.parameters()) + sum(b.numel() for b in module.buffers())
    learned = [p for p in module.parameters() if p.requires_grad]
    by_hand = 4 * (weights + 3 * sum(p.numel() for p in learned) + len(learned))  # and AdamW's count of steps
    assert counted(module, clips()).state == by_hand


def test_ll_costs_its_head_and_frozen_blocks_save():
    def vjepa(*args):
        return counted(cost.objective(P, P.frames, *args), clips())
    plain, ll, frozen = vjepa("vjepa", 1.0, 0), vjepa("vjepa_ll", 0.25, 0), vjepa("vjepa_ll", 0.25, 1)
    assert ll.parts["head"] > 0 and plain.flops == ll.flops - ll.parts["head"]
    assert frozen.flops < ll.flops and frozen.state < ll.state and frozen.kept < ll.kept
    assert frozen.parts["target_encoder"] == ll.parts["target_encoder"] > 0


def test_half_precision_keeps_fewer_bytes_for_the_same_flops():
    wide = P.replace(width=128, depth=4)  # at 32 features the half copies of the weights would outweigh it
    full, half = (counted(cost.objective(wide, P.frames, "videomae"), clips(n=32), wide.replace(precision=name))
                  for name in ("32-true", "bf16-mixed"))
    assert full.flops == half.flops and full.state == half.state and half.kept < full.kept


def test_paper_is_counted_without_its_weights_and_agrees_with_the_published_code():
    p = load("paper")
    module = cost.objective(p, p.frames, "vjepa_ll", 0.25, 12)
    assert sum(q.numel() for q in module.predictor.parameters()) == 22_082_944  # as published
    assert sum(q.numel() for q in module.encoder.blocks[12:].parameters() if q.requires_grad) == 12 * 12_596_224
    c = counted(module, torch.zeros(p.batch, p.frames, p.size, p.size), p)
    assert c.flops == pytest.approx(10.29e12, rel=0.15)  # counted with the published code; masks differ by draw
    assert 0.40 < c.parts["target_encoder"] / c.flops < 0.50


def test_a_probe_takes_the_steps_that_fit_takes():
    grid, n = P.grid(), 20
    x = torch.randn(n + 4, 32, P.width, generator=torch.Generator().manual_seed(0))
    cache = SimpleNamespace(features=x.half(), seen=torch.ones(n + 4, 32, dtype=torch.bool))
    index = torch.arange(n + 4).numpy()
    p = P.replace(probe_epochs=2, probe_min_steps=1)
    masks = torch.ones(n + 4, P.frames, P.size, P.size, dtype=torch.uint8)
    fitted = probe.fit(cache, masks, index[:n], index[n:], grid, p, seed=0)
    planned = cost.probing(p, P.frames, P.width, "", n)
    assert planned.steps == fitted["history"][-1]["step"] == 6
    assert cost.probing(P, P.frames, P.width, "", 1).steps == P.probe_min_steps
    assert planned.state > 3 * cost.held(fitted["probe"])


@pytest.mark.parametrize("ll_on", ["predicted", "context", "unplaced"])
@pytest.mark.parametrize("method", ["vjepa", "salt"])
def test_what_ll_takes_is_what_a_step_without_it_does_not(method, ll_on):
    p = P.replace(ll_on=ll_on)
    both, without = cost.training(p, p.frames, method, 0, [clips()]), cost.objective(p, p.frames, method)
    assert both.ll > 0 and both.flops - both.ll == counted(without, clips(), p).flops


def test_a_variance_term_beside_padding_is_counted():
    p = P.replace(mask_rule="pad")
    plain, more = (counted(cost.objective(q, q.frames, "vjepa"), clips(), q) for q in (p, p.replace(variance=0.1)))
    assert more.flops > plain.flops and more.parts == plain.parts


def test_speed_is_measured_and_said():
    rate, words = cost.sustained(P, 16, "32-true", "cpu", seconds=0.05)
    assert 1e6 < rate < 1e15 and f"{rate / 1e12:.3g} TFLOP/s" in words and "16 tokens" in words
