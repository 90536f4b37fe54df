"""Checkpoints in: every key is used or the file is refused, by name and with a remedy."""

import math
import os

import pytest
import torch

from usjepa_nb import weights
from usjepa_nb.augment import standardise
from usjepa_nb.vit import Encoder, PixelDecoder, Predictor, sincos1d, sincos3d
from usjepa_nb.weights import WeightsError

GRID, TUBELET, WIDTH, DEPTH, HEADS = (2, 3, 4), (2, 4, 3), 12, 2, 3
WRAP = "module.backbone."


def encoder(seed=0, channels=3, positions="sincos3d", grid=GRID, depth=DEPTH, width=WIDTH):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return noisy(Encoder(grid, TUBELET, width, depth, HEADS, channels, positions))


def predictor(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return noisy(Predictor(GRID, WIDTH, 18, 1, 2))


def decoder(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return noisy(PixelDecoder(GRID, TUBELET, WIDTH, 8, 1, 2, channels=3))


def noisy(module):
    """No parameter at its start value, so that a key which is not loaded shows."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape))
    return module


def wrapped(module, **more):
    return {WRAP + k: v for k, v in (module.state_dict() | more).items()}


def split_bias(state):
    """Our state in VideoMAE's form: `q_bias` and `v_bias` in place of `qkv.bias`."""
    out = {}
    for k, v in state.items():
        if k.endswith("attn.qkv.bias"):
            out[k.replace("qkv.bias", "q_bias")], _, out[k.replace("qkv.bias", "v_bias")] = v.chunk(3)
        else:
            out[k] = v
    return out


@pytest.fixture
def save(tmp_path):
    def write(content, name="weights.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name
    return write


def published_vjepa(**changes):
    return {"encoder": wrapped(encoder(1), pos_embed=sincos3d(GRID, WIDTH)), "target_encoder": wrapped(encoder(2)),
            "predictor": wrapped(predictor(3), predictor_pos_embed=sincos3d(GRID, 18)), "opt": {"state": {}},
            "epoch": 300, "loss": 0.4, "batch_size": 2, "world_size": 1, "lr": 1e-6} | changes


def published_videomae():
    top = ("mask_token", "encoder_to_decoder.weight")
    inner = {f"encoder.{k}": v for k, v in split_bias(encoder(1).state_dict()).items()}
    inner |= {k if k in top else f"decoder.{k}": v for k, v in split_bias(decoder(2).state_dict()).items()}
    return {"model": inner, "epoch": 1599}


def same(a, b, skip=()):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if not k.endswith(skip))


# --- the published layouts -------------------------------------------------------------------------------------------

def test_v_jepa_loads_the_target_encoder_unless_told_otherwise(save):
    path, model, p = save(published_vjepa()), encoder(7), predictor(7)
    reports = weights.load(path, model, predictor=p)
    assert same(model, encoder(2)) and same(p, predictor(3))
    assert [r.source for r in reports] == ["weights.pt[target_encoder]", "weights.pt[predictor]"]
    assert sorted(reports[0].used) == sorted(model.state_dict())
    assert "predictor_pos_embed: equal to the computed table" in str(reports[1])
    weights.load(path, model, part="encoder")
    assert same(model, encoder(1))


def test_the_report_counts_keys_and_names_what_was_left_alone(save):
    text = str(weights.load(save(published_vjepa()), encoder(7))[0])
    count = len(encoder().state_dict())
    assert text.startswith(f"weights.pt[target_encoder]: {count} keys used, 0 missing, 0 left over\n")
    assert "not asked for: batch_size, encoder, epoch, loss, lr, opt, predictor, world_size" in text
    assert f"attention heads are not in the file: {HEADS}" in text  # no tensor shows them


def test_v_jepa_2_1_calls_its_target_ema_encoder(save):
    file = published_vjepa()
    file["ema_encoder"] = file.pop("target_encoder")
    model = encoder(7)
    (report,) = weights.load(save(file), model)
    assert same(model, encoder(2)) and report.source == "weights.pt[ema_encoder]"


def test_videomae_biases_are_joined_with_zeros_for_the_keys(save):
    model, d = encoder(7, positions="sincos1d"), decoder(7)
    reports = weights.load(save(published_videomae()), model, decoder=d)
    assert same(model, encoder(1), skip="qkv.bias") and same(d, decoder(2), skip="qkv.bias")
    for ours, theirs in ((model, encoder(1)), (d, decoder(2))):
        for own, block in zip(ours.blocks, theirs.blocks, strict=True):
            q, _, v = block.attn.qkv.bias.detach().chunk(3)
            assert torch.equal(own.attn.qkv.bias.detach(), torch.cat([q, torch.zeros(len(q)), v]))
    assert [len(r.changed) for r in reports] == [2, 1] and "keys' bias zero" in str(reports[1])


def test_videomae_says_that_its_decoder_was_not_asked_for(save):
    (report,) = weights.load(save(published_videomae()), encoder(7, positions="sincos1d"))
    assert f"not asked for: {len(decoder().state_dict()) + 1} keys of the decoder" in str(report)


def test_our_own_layout_loads(save):
    own = {"format": 1, "step": 5, "encoder": encoder(1).state_dict(), "target_encoder": encoder(2).state_dict(),
           "predictor": predictor(3).state_dict(), "optimizer": {}, "history": [{"loss": 1.0}]}
    model, p = encoder(7), predictor(7)
    weights.load(save(own), model, predictor=p)
    assert same(model, encoder(2)) and same(p, predictor(3))
    own = {"encoder": encoder(1, positions="sincos1d").state_dict(), "decoder": decoder(2).state_dict()}
    model, d = encoder(7, positions="sincos1d"), decoder(7)
    weights.load(save(own), model, decoder=d)
    assert same(model, encoder(1)) and same(d, decoder(2))


@pytest.mark.parametrize("named, taken", [("encoder", 1), ("target_encoder", 2), (None, 2), ([], 2)])
def test_the_encoder_is_the_one_that_the_file_says_is_probed(save, named, taken):
    file = {"encoder": encoder(1).state_dict(), "target_encoder": encoder(2).state_dict(), "features": named}
    model = encoder(7)
    weights.load(save(file), model)
    assert same(model, encoder(taken))
    weights.load(save(file), model, part="encoder")  # unless another is asked for
    assert same(model, encoder(1))


def test_the_parts_of_a_file_are_named(save):
    assert {"encoder", "target_encoder", "predictor"} <= weights.parts(save(published_vjepa()))
    assert weights.parts(save({"target_encoder": wrapped(encoder(2))})) == {"target_encoder"}
    assert weights.parts(save({"target_encoder": {"predictor.weight": torch.zeros(1)}})) == {"target_encoder"}
    for prefix in ("", "module."):
        inner = {prefix + k: v for k, v in published_videomae()["model"].items()}
        assert {"encoder", "decoder"} <= weights.parts(save({"model": inner}))
        alone = {k: v for k, v in inner.items() if k.startswith(prefix + "encoder.")}
        assert weights.parts(save({"model": alone})) == {"model", "encoder"}
    assert weights.parts(save({"model": torch.zeros(3)})) == {"model"}


def test_parts_of_a_file_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"none.pt: no such checkpoint"):
        weights.parts(tmp_path / "none.pt")


def test_loaded_weights_are_those_that_compute(save):
    model, clips = encoder(7), torch.randn(1, 3, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    weights.load(save(published_vjepa()), model)
    assert torch.equal(model(clips), encoder(2)(clips))


# --- refused ---------------------------------------------------------------------------------------------------------

REMEDY = "Set width, depth, heads and patch in the profile to the checkpoint's"


def refused(path, *sentences, **arguments):
    """Loading is refused with one sentence that names the file, and nothing of the encoder is touched."""
    model = arguments.pop("model", None) or encoder(7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        weights.load(path, model, **arguments)
    message = str(error.value)
    assert path.name in message and "\n" not in message
    for sentence in sentences:
        assert sentence in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "patch_embed.proj.bias", "blocks.1.attn.qkv.bias",
                                  "norm.weight"])
def test_a_missing_key_is_refused(save, name):
    file = published_vjepa()
    del file["target_encoder"][WRAP + name]
    for channels in (1, 3):
        refused(save(file), f"1 missing ({name})", REMEDY, model=encoder(7, channels=channels))


def test_a_key_left_over_is_refused(save):
    file = published_vjepa()
    file["target_encoder"][WRAP + "blocks.0.attn.relative"] = torch.zeros(3)
    refused(save(file), "1 left over (blocks.0.attn.relative)", REMEDY)


def test_a_key_by_another_name_is_missing_and_left_over(save):
    file = published_vjepa()
    file["target_encoder"][WRAP + "fc_norm.weight"] = file["target_encoder"].pop(WRAP + "norm.weight")
    refused(save(file), "1 missing (norm.weight)", "1 left over (fc_norm.weight)")


def test_a_key_of_another_shape_is_refused(save):
    file = published_vjepa()
    file["target_encoder"][WRAP + "norm.weight"] = torch.ones(WIDTH, 1)
    refused(save(file), "1 of another shape (norm.weight (12, 1) for (12,))", REMEDY)


def test_a_model_of_another_size_is_refused(save):
    path = save(published_vjepa())
    refused(path, "12 missing", model=encoder(7, depth=3))
    refused(path, "12 left over", model=encoder(7, depth=1))
    refused(path, "of another shape", ", …", model=encoder(7, width=24))


def test_two_keys_that_become_one_are_refused(save):
    """`module.x` beside `x`: which one would it have been?"""
    twin = {"norm.weight": torch.zeros(WIDTH)}
    for state in (wrapped(encoder(2)) | twin, twin | wrapped(encoder(2))):
        refused(save(published_vjepa(target_encoder=state)), "1 left over (module.backbone.norm.weight)")
    file = published_videomae()
    file["model"]["norm.weight"] = torch.zeros(8)
    model = encoder(7, positions="sincos1d")
    with pytest.raises(WeightsError, match=r"\[decoder\].*1 left over"):
        weights.load(save(file), model, decoder=decoder(7))


@pytest.mark.parametrize("drop", ["q_bias", "v_bias"])
def test_half_a_pair_of_biases_is_refused(save, drop):
    file = published_videomae()
    del file["model"][f"encoder.blocks.1.attn.{drop}"]
    left = {"q_bias": "v_bias", "v_bias": "q_bias"}[drop]
    refused(save(file), "missing (blocks.1.attn.qkv.bias)", f"left over (blocks.1.attn.{left})",
            model=encoder(7, positions="sincos1d"))


def test_biases_in_both_forms_are_refused(save):
    file = published_videomae()
    file["model"]["encoder.blocks.0.attn.qkv.bias"] = torch.zeros(3 * WIDTH)
    refused(save(file), "2 left over (blocks.0.attn.q_bias, blocks.0.attn.v_bias)",
            model=encoder(7, positions="sincos1d"))


def test_a_fine_tuned_videomae_without_its_prefix_is_refused(save):
    refused(save({"model": split_bias(encoder(1).state_dict())}), "[encoder]", "missing",
            model=encoder(7, positions="sincos1d"))


def test_another_position_table_is_refused(save):
    file = published_vjepa(target_encoder=wrapped(encoder(2), pos_embed=sincos1d(GRID, WIDTH)))
    refused(save(file), "pos_embed is not the fixed sine-cosine table of this model", "positions")


def test_the_position_table_of_another_grid_is_replaced_and_this_is_said(save):
    file = published_vjepa(target_encoder=wrapped(encoder(2), pos_embed=sincos3d((2, 2, 2), WIDTH)))
    (report,) = weights.load(save(file), encoder(7))
    assert "pos_embed: another grid, replaced by the computed table" in str(report)


def test_an_encoder_with_the_other_kind_of_positions_is_refused(save):
    """VideoMAE's file holds no table, and V-JEPA's may not: the keys would fit, and every token would be elsewhere."""
    refused(save(published_videomae()), "trained with sincos1d positions", 'build it with positions="sincos1d"')
    refused(save(published_vjepa()), "trained with sincos3d positions", model=encoder(7, positions="sincos1d"))
    ours = {"encoder": encoder(1).state_dict(), "decoder": decoder(2).state_dict()}
    refused(save(ours), "trained with sincos1d positions", part="encoder")


def test_a_part_that_is_not_there_is_refused(save):
    refused(save({"state_dict": {}, "epoch": 3}), "holds state_dict, epoch but no 'target_encoder'", "(model)")
    refused(save({}), "holds nothing but no 'target_encoder'")
    path = save({"target_encoder": wrapped(encoder(2))})
    with pytest.raises(WeightsError, match=r"weights.pt\[predictor\].*missing"):
        weights.load(path, encoder(7), predictor=predictor(7))
    with pytest.raises(WeightsError, match=r"weights.pt\[predictor\].*missing"):
        weights.load(save(published_videomae()), encoder(7, positions="sincos1d"), predictor=predictor(7))


@pytest.mark.parametrize("part", [torch.zeros(3), {WRAP + "norm.weight": 1.0}, "weights"])
def test_a_part_that_is_no_set_of_tensors_is_refused(save, part):
    refused(save({"target_encoder": part}), "'target_encoder' is not a set of named tensors", "state_dict()")


def test_a_file_that_is_no_set_of_parts_is_refused(save):
    refused(save(torch.zeros(3)), "holds a Tensor", "torch.save(")
    refused(save([1, 2]), "holds a list")


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, zipped):
    path, trace = tmp_path / "evil.pt", tmp_path / "it-ran"
    torch.save(published_vjepa(extra=Code(trace)), path, _use_new_zipfile_serialization=zipped)
    refused(path, "could run code on loading", "ask its author for a file of tensors only")
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(tmp_path, share, zipped):
    path = tmp_path / "cut.pt"
    torch.save(published_vjepa(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    refused(path, "fetch it again")


def test_a_page_saved_in_place_of_a_file_is_refused(tmp_path):
    path = tmp_path / "page.pt"
    path.write_text("<html>404</html>")
    refused(path, "no checkpoint", "fetch it again")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "vitl16.pth.tar", "no such checkpoint; put the file there or set `init: random`")


def test_a_folder_is_refused(tmp_path):
    refused(tmp_path, "cannot be read as a checkpoint")


# --- three colours into one grey -------------------------------------------------------------------------------------

def test_a_colour_encoder_folds_exactly_into_a_grey_one(save):
    """On the same frames: three equal channels, ImageNet-normalised, against one channel as we standardise it."""
    grey = torch.randint(256, (2, 4, 12, 12), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    colour, folded = (model.requires_grad_(False) for model in (encoder(2), encoder(7, channels=1)))
    (report,) = weights.load(save(published_vjepa()), folded)
    assert "three colour channels folded into one grey channel" in str(report)
    theirs, ours = colour((grey[:, None] / 255 - mean) / std), folded(standardise(grey))
    assert float((theirs - ours).abs().max() / theirs.abs().max()) < 1e-5
    naive = encoder(7, channels=1).requires_grad_(False)
    naive.load_state_dict(colour.state_dict() | {
        "patch_embed.proj.weight": colour.patch_embed.proj.weight.sum(1, keepdim=True)})
    assert float((theirs - naive(standardise(grey))).abs().max() / theirs.abs().max()) > 0.01  # a sum alone will not do


def test_a_head_of_three_channels_answers_for_one_grey_channel(save):
    """Published VideoMAE gives red, green and blue of every pixel, in this order; grey is one value."""
    three, grey, path = decoder(3), PixelDecoder(GRID, TUBELET, WIDTH, 8, 1, 2, channels=1), save(published_videomae())
    reports = [weights.load(path, encoder(7, positions="sincos1d"), decoder=d)[1] for d in (three, grey)]
    assert [any("head.weight: the means" in line for line in r.changed) for r in reports] == [False, True]
    assert same(grey.blocks, three.blocks)
    with torch.no_grad():
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        colours = three.head(x).unflatten(-1, (-1, 3))  # of every pixel
        torch.testing.assert_close(grey.head(x), colours.mean(-1), atol=1e-5, rtol=1e-4)


def test_fold_grey_by_hand():
    """One weight of 1 on the red channel: (g - 0.485) / 0.229 = w (g - 0.2) / 0.2 + b for every g."""
    weight, bias = torch.zeros(1, 3, 1, 1, 1), torch.tensor([4.0])
    weight[0, 0] = 1
    w, b = weights.fold_grey(weight, bias)
    assert w.shape == (1, 1, 1, 1, 1)
    assert math.isclose(float(w), 0.2 / 0.229, rel_tol=1e-6)
    assert math.isclose(float(b), 4 + (0.2 - 0.485) / 0.229, rel_tol=1e-6)


def test_a_grey_checkpoint_does_not_fit_a_colour_encoder(save):
    refused(save({"target_encoder": wrapped(encoder(2, channels=1))}), "patch_embed.proj.weight (12, 1, 2, 4, 3)")
