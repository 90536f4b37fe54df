"""The transformers: what they compute, how large they are, what is frozen; on grids that are not square."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from usjepa_nb import losses, masking
from usjepa_nb.masking import Masks
from usjepa_nb.vit import (
    Encoder,
    PixelDecoder,
    Predictor,
    TubeletEmbedding,
    gather,
    make_blocks,
    patchify,
    sincos1d,
    sincos3d,
)

GRID, TUBELET = (2, 3, 4), (2, 4, 3)
WIDTH, DEPTH, HEADS = 12, 3, 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(batch=3, channels=1, grid=GRID, seed=0):
    return torch.randn(batch, channels, *(n * p for n, p in zip(grid, TUBELET, strict=True)), generator=seeded(seed),
                       dtype=torch.float64)


def shaken(module, seed=1):
    """Every parameter drawn anew and large, so that nothing is right by being zero; double precision."""
    g = seeded(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.4 if p.ndim > 1 else 1))
    return module.double()


def encoder(**changes):
    return shaken(Encoder(GRID, TUBELET, WIDTH, DEPTH, HEADS, **changes))


def predictor(seed=2):
    return shaken(Predictor(GRID, WIDTH, 18, 2, 2), seed)


def padded(batch=3, seed=0):
    """Masks of clips that hide different numbers of tokens and have different sectors."""
    allowed = torch.rand(batch, math.prod(GRID[1:]), generator=seeded(seed)) < 0.8
    allowed[:, [0, -1]] = True
    masks = masking.multiblock(GRID, batch, seeded(seed), blocks=2, scale=0.25, rule="pad",
                               allowed=allowed.repeat(1, GRID[0]))
    assert not masks.context_valid.all() and not masks.target_valid.all()
    return masks


def alone(masks, b):
    """The masks of one clip, without padding."""
    return Masks(masks.context[b: b + 1, masks.context_valid[b]], masks.target[b: b + 1, masks.target_valid[b]])


# --- tokens ----------------------------------------------------------------------------------------------------------

def test_patchify_cuts_tubelets_in_t_y_x_order():
    x = clips(2, 3)
    patches = patchify(x, TUBELET)
    assert patches.shape == (2, 24, 3, *TUBELET)
    for n, (t, i, j) in enumerate(itertools.product(*map(range, GRID))):
        assert torch.equal(patches[:, n], x[:, :, 2 * t: 2 * t + 2, 4 * i: 4 * i + 4, 3 * j: 3 * j + 3])


@pytest.mark.parametrize("size", [(5, 12, 12), (4, 11, 12), (4, 12, 13)])
def test_patchify_refuses_what_does_not_divide(size):
    with pytest.raises(ValueError, match=f"{size[0]}×{size[1]}×{size[2]} does not divide into tubelets of 2×4×3"):
        patchify(torch.zeros(1, 1, *size), TUBELET)


def test_gather_picks_rows():
    tokens = torch.arange(24.0).view(2, 4, 3)
    picked = gather(tokens, torch.tensor([[3, 0], [1, 1]]))
    assert torch.equal(picked, torch.stack([tokens[0, [3, 0]], tokens[1, [1, 1]]]))
    assert torch.equal(gather(tokens[:1], torch.tensor([[3], [0]])), tokens[0, [3, 0]][:, None])


@pytest.mark.parametrize("channels", [1, 3])
def test_tubelet_embedding_is_a_conv3d(channels):
    embed = shaken(TubeletEmbedding(TUBELET, channels, WIDTH))
    conv = nn.Conv3d(channels, WIDTH, kernel_size=TUBELET, stride=TUBELET).double()
    conv.load_state_dict(embed.proj.state_dict())
    x, keep = clips(2, channels), torch.tensor([[0, 5, 23], [7, 8, 9]])
    expected = conv(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x, None), expected)
    torch.testing.assert_close(embed(x, keep), gather(expected, keep))


# --- positions -------------------------------------------------------------------------------------------------------

def test_sincos3d_is_the_published_vit_l_table():
    with np.load(Path(__file__).parent / "oracles" / "sincos3d_1024_8x14x14.npz") as oracle:
        rows, values, total = (oracle[k] for k in ("rows", "values", "total"))
    table = sincos3d((8, 14, 14), 1024)
    assert table.shape == (1, 1568, 1024)
    np.testing.assert_allclose(table[0, rows].numpy(), values, atol=1e-6)
    assert float(table.double().sum()) == pytest.approx(float(total), rel=1e-7)


def test_sincos3d_on_an_oblong_grid_by_hand():
    """Width 12: two frequencies (1 and 0.01) for each of t, y, x; sines before cosines."""
    row = sincos3d((2, 3, 5), 12)[0, 1 * 15 + 2 * 5 + 4]
    expected = [f(p * w) for p in (1, 2, 4) for f in (math.sin, math.cos) for w in (1, 0.01)]
    np.testing.assert_allclose(row.numpy(), expected, atol=1e-6)


def test_sincos1d_numbers_the_tokens():
    """Width 4: sin and cos of n and of n / 100, interleaved, as in VideoMAE."""
    table = sincos1d((1, 2, 5), 4)[0]
    expected = [[f(n * w) for w in (1, 0.01) for f in (math.sin, math.cos)] for n in range(10)]
    np.testing.assert_allclose(table.numpy(), expected, atol=1e-6)


def test_positions_are_neither_trained_nor_saved():
    model = encoder()
    assert not any("pos" in name for name in [*model.state_dict(), *dict(model.named_parameters())])


# --- dropping tokens, and padding ------------------------------------------------------------------------------------

def test_dropping_tokens_is_the_same_as_attending_to_no_other():
    """Tokens removed before the first block = all tokens present but invisible as keys."""
    model, x = encoder(), clips()
    keep = torch.stack([torch.randperm(24, generator=seeded(b))[:9].sort().values for b in range(3)])
    visible = torch.zeros(3, 24, dtype=torch.bool).scatter_(1, keep, True)
    everything = torch.arange(24).expand(3, -1)
    torch.testing.assert_close(model(x, keep), gather(model(x, everything, visible), keep), rtol=1e-10, atol=1e-10)


def test_no_mask_is_all_tokens():
    model, x = encoder(), clips()
    torch.testing.assert_close(model(x), model(x, torch.arange(24).expand(3, -1)))


def test_hidden_pixels_do_not_reach_the_context():
    model, x, masks = encoder(), clips(), padded()
    z = model(x, masks.context, masks.context_valid)
    y = x.clone()
    for b in range(3):
        seen = set(masks.context[b, masks.context_valid[b]].tolist())
        for n, (t, i, j) in enumerate(itertools.product(*map(range, GRID))):
            if n not in seen:
                y[b, :, 2 * t: 2 * t + 2, 4 * i: 4 * i + 4, 3 * j: 3 * j + 3] = 99
    valid = masks.context_valid
    assert torch.equal(z[valid], model(y, masks.context, valid)[valid])
    assert not torch.equal(z, model(y, masks.context, valid))  # padding does look at other pixels


def test_a_padded_batch_is_each_clip_alone():
    model, p, x, masks = encoder(), predictor(), clips(), padded()
    z = model(x, masks.context, masks.context_valid)
    e = p(z, masks, 1)
    target = gather(model(x), masks.target)
    total, count = 0, 0
    for b in range(3):
        own = alone(masks, b)
        z1 = model(x[b: b + 1], own.context)
        e1 = p(z1, own, 1)
        torch.testing.assert_close(z[b, masks.context_valid[b]], z1[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(e[b, masks.target_valid[b]], e1[0], rtol=1e-10, atol=1e-10)
        loss = losses.l_jepa(e1, gather(model(x[b: b + 1]), own.target))
        total, count = total + loss * own.target.shape[1], count + own.target.shape[1]
    torch.testing.assert_close(losses.l_jepa(e, target, masks.target_valid), total / count, rtol=1e-10, atol=0)


def test_padding_gives_the_gradients_of_each_clip_alone():
    x, masks = clips(), padded()

    def gradients(run):
        model, p = encoder(), predictor()
        run(model, p).backward()
        return torch.cat([q.grad.flatten() for q in [*model.parameters(), *p.parameters()] if q.grad is not None])

    def together(model, p):
        return (p(model(x, masks.context, masks.context_valid), masks).square() * masks.target_valid[..., None]).sum()

    def apart(model, p):
        return sum(p(model(x[b: b + 1], own.context), own).square().sum()
                   for b, own in ((b, alone(masks, b)) for b in range(3)))

    torch.testing.assert_close(gradients(together), gradients(apart), rtol=1e-8, atol=1e-8)


def test_a_padded_batch_through_videomae_is_each_clip_alone():
    model, x, masks = encoder(positions="sincos1d"), clips(), padded()
    decoder = shaken(PixelDecoder(GRID, TUBELET, WIDTH, 8, 2, 2), 5)
    out = decoder(model(x, masks.context, masks.context_valid), masks)
    assert out.shape == (*masks.target.shape, math.prod(TUBELET))
    total, count = 0, 0
    for b in range(3):
        own = alone(masks, b)
        one = decoder(model(x[b: b + 1], own.context), own)
        torch.testing.assert_close(out[b, masks.target_valid[b]], one[0], rtol=1e-10, atol=1e-10)
        loss = losses.l_pixel(one, losses.pixel_targets(x[b: b + 1], TUBELET, own.target))
        total, count = total + loss * own.target.shape[1], count + own.target.shape[1]
    loss = losses.l_pixel(out, losses.pixel_targets(x, TUBELET, masks.target), masks.target_valid)
    torch.testing.assert_close(loss, total / count, rtol=1e-10, atol=0)


# --- encoder, predictor, decoder -------------------------------------------------------------------------------------

def test_layers_are_the_outputs_before_the_last_norm():
    model, x = encoder(), clips()
    layers = model(x, layers=True)
    assert len(layers) == DEPTH
    torch.testing.assert_close(model.norm(layers[-1]), model(x))
    shallow = Encoder(GRID, TUBELET, WIDTH, 1, HEADS).double()
    shallow.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(("blocks.1", "blocks.2"))})
    torch.testing.assert_close(shallow(x, layers=True)[0], layers[0])


@pytest.mark.parametrize("grid", [(4, 3, 4), (2, 4, 4), (2, 3, 5)])
def test_clips_of_another_grid_are_refused(grid):
    """With kept tokens their positions would silently be those of the encoder's own grid."""
    with pytest.raises(ValueError, match=r"but this encoder has positions for \(2, 3, 4\)"):
        encoder()(clips(grid=grid), torch.tensor([[0]] * 3))


def test_predictions_follow_their_positions_whatever_the_order():
    p, masks = predictor(), masking.tube(GRID, 2, seeded(), ratio=0.5)
    z = torch.randn(2, masks.context.shape[1], WIDTH, generator=seeded(), dtype=torch.float64)
    e = p(z, masks)
    order = torch.randperm(masks.target.shape[1], generator=seeded(3))
    torch.testing.assert_close(p(z, Masks(masks.context, masks.target[:, order])), e[:, order])
    assert (e[:, :1] - e).abs().amax(-1)[:, 1:].min() > 1e-3  # and each position has its own


def test_each_mask_kind_has_its_own_token():
    p, masks = predictor(), masking.tube(GRID, 1, seeded(), ratio=0.5)
    z = torch.zeros(1, masks.context.shape[1], WIDTH, dtype=torch.float64)
    first, second = p(z, masks, 0), p(z, masks, 1)
    assert not torch.allclose(first, second)
    with torch.no_grad():
        p.mask_tokens[1].copy_(p.mask_tokens[0])
    assert torch.equal(p(z, masks, 1), first)


# --- size and start --------------------------------------------------------------------------------------------------

def vit_l():
    with torch.device("meta"):
        return Encoder((8, 14, 14), (2, 16, 16), 1024, 24, 16, channels=3)


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_vit_l_has_as_many_parameters_as_published():
    model = vit_l()
    assert trainable(model) == 303_885_312
    assert {trainable(b) for b in model.blocks} == {12_596_224}
    with torch.device("meta"):
        assert trainable(Predictor((8, 14, 14), 1024, 384, 12, 12)) == 22_082_944


@pytest.mark.parametrize("blocks, left", [(0, 303.9), (12, 151.2), (16, 100.8), (24, 0.0)])
def test_freezing_takes_the_tubelet_embedding_along(blocks, left):
    """Counting the embedding as trainable would leave 152.7 M and 102.3 M."""
    model = vit_l()
    model.freeze(blocks)
    assert trainable(model) / 1e6 == pytest.approx(left, abs=0.05)


def test_no_backward_pass_goes_into_frozen_blocks():
    model, x = encoder(), clips()
    model.freeze(2)
    layers = model(x, layers=True)
    assert [h.requires_grad for h in layers] == [False, False, True]
    model(x).square().sum().backward()
    assert {n.split(".")[0] + "." + n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None} == {
        "blocks.2", "norm.weight", "norm.bias"}


@pytest.mark.parametrize("blocks", [-1, DEPTH + 1])
def test_freezing_more_than_there_is_is_refused(blocks):
    with pytest.raises(ValueError, match=rf"freeze={blocks}: choose 0…{DEPTH}"):
        encoder().freeze(blocks)


def test_mask_tokens_start_at_zero():
    assert not any(t.any() for t in Predictor(GRID, WIDTH, 18, 1, 2).mask_tokens)


def test_a_block_1024_wide_starts_as_published():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (block,) = make_blocks(1024, 1, 16)
        embedding = TubeletEmbedding((2, 16, 16), 3, 1024)
    for weight, std in ((block.attn.qkv.weight, 0.02), (block.mlp.fc1.weight, 0.02), (embedding.proj.weight, 0.02),
                        (block.attn.proj.weight, 0.02 / math.sqrt(2)), (block.mlp.fc2.weight, 0.02 / math.sqrt(2))):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.01)
    assert not any(p.any() for n, p in block.named_parameters() if n.endswith("bias"))


def test_residual_branches_start_smaller_the_deeper_they_are():
    """The last layers of both branches of block l are divided by sqrt(2 l), at any width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = make_blocks(192, 6, 3)
    for layer, block in enumerate(blocks, start=1):
        base = float(block.attn.qkv.weight.detach().std())
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert float(weight.detach().std()) == pytest.approx(base / math.sqrt(2 * layer), rel=0.03)
        assert float(block.mlp.fc1.weight.detach().std()) == pytest.approx(base, rel=0.03)


def test_norms_have_the_published_epsilon():
    models = encoder(), predictor(), PixelDecoder(GRID, TUBELET, WIDTH, 8, 1, 2)
    assert {m.eps for model in models for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
