"""Compare this package with the published implementations on one oracle file: `python tests/check_oracle.py FILE`.

A file holds a checkpoint in the published V-JEPA or VideoMAE layout, `config`, clips, masks, and what the published
code made of them. Sizes are read off the tensors, so any will do; `config` is asked for attention heads alone, which no
tensor shows. Every recorded output is compared: its largest error relative to its largest value is printed, and the
exit status is 1 if one lies beyond the tolerance, has another shape, or cannot be compared, and 0 otherwise. What
the file does not record is said to be not compared.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

import usjepa_nb  # noqa: F401  (before timm)
from usjepa_nb import losses, weights
from usjepa_nb.masking import Masks
from usjepa_nb.vit import Encoder, PixelDecoder, Predictor, gather

TOLERANCE = {"loss": 1e-6, "grad_norms": 1e-4}  # the outputs themselves: 1e-5
INPUTS = ("checkpoint", "config", "clips", "masks_enc", "masks_pred", "mask")
VJEPA = ("target_full", "targets", "context", "predictions", "loss", "grad_norms")
VIDEOMAE = ("predictions", "labels", "loss", "grad_norms")


def relative(ours: Tensor, reference) -> float:
    """Largest error relative to the largest reference value; infinite where shapes differ (nothing is broadcast) or
    a value is no number."""
    ours, reference = ours.detach().double(), torch.as_tensor(reference, dtype=torch.float64)
    if ours.shape != reference.shape:
        return math.inf
    return no_number_is_far(float((ours - reference).abs().max() / (reference.abs().max() or 1.0)))


def no_number_is_far(error: float) -> float:
    return math.inf if math.isnan(error) else error


def relative_norms(ours: dict[str, Tensor], reference: dict) -> float:
    """Largest relative error of any gradient norm; norms below 1e-6 of the largest count as that."""
    names = sorted(reference)
    reference = torch.tensor([float(reference[n]) for n in names], dtype=torch.float64)
    errors = (torch.tensor([float(ours[n]) for n in names], dtype=torch.float64) - reference).abs()
    return no_number_is_far(float((errors / reference.clamp(min=1e-6 * (reference.max() or 1.0))).max()))


def heads(config: dict, width: int, *names: str) -> int:
    """The first of `names` that the configuration has."""
    for name in names:
        if name in config:
            if width % config[name]:
                raise ValueError(f"config: {name}={config[name]} does not divide the width {width}")
            return config[name]
    raise ValueError(f"config: none of {', '.join(names)} is there; attention heads cannot be read off the weights")


def depth(state: dict[str, Tensor], prefix: str) -> int:
    """Number of blocks, from the names `<prefix>.<layer>.…`."""
    return 1 + max((int(k.split(".")[1]) for k in state if k.startswith(prefix + ".")), default=-1)


def need(state: dict, name: str, what: str):
    if name not in state:
        raise ValueError(f"no {name!r} in {what}: {', '.join(map(str, list(state)[:8]))}")
    return state[name]


def fill(module, state: dict, name: str):
    """Strict loading with its report printed."""
    print(weights.load_state(module, state, weights.Report(name)))
    return module


def make_encoder(state: dict, clips: Tensor, config: dict, positions: str, name: str) -> Encoder:
    width, channels, *tubelet = need(state, "patch_embed.proj.weight", name).shape
    grid = tuple(n // size for n, size in zip(clips.shape[2:], tubelet, strict=True))
    encoder = Encoder(grid, tuple(tubelet), width, depth(state, "blocks"), heads(config, width, "num_heads", "heads"),
                      channels, positions)
    return fill(encoder, state, name)


def gradient_norms(**modules) -> dict[str, Tensor]:
    """Norms after `backward`, by "<module>.<parameter>"; no gradient is a norm of 0. VideoMAE's biases also apart."""
    norms = {}
    for part, module in modules.items():
        for name, p in module.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            norms[f"{part}.{name}"] = grad.norm()
            if name.endswith("attn.qkv.bias"):
                stem = f"{part}.{name}".removesuffix("qkv.bias")
                norms[stem + "q_bias"], _, norms[stem + "v_bias"] = (g.norm() for g in grad.chunk(3))
    return norms


def as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def vjepa(oracle: dict, path: str) -> dict:
    """Our values of everything in `VJEPA`; what the checkpoint does not allow is absent."""
    clips, config, state = oracle["clips"], oracle.get("config", {}), {}
    for part, module in oracle["checkpoint"].items():
        if isinstance(module, dict):
            state["target_encoder" if part == "ema_encoder" else part] = weights.strip(module, "module.", "backbone.")
    for part, other in (("encoder", "target_encoder"), ("target_encoder", "encoder")):
        if part not in state:
            print(f"{path}: no {part}; its {other} is used in its place")
            state[part] = need(state, other, "the checkpoint")
    encoder, target_encoder = (make_encoder(state[part], clips, config, "sincos3d", f"{path}[{part}]")
                               for part in ("encoder", "target_encoder"))
    with torch.no_grad():
        full = target_encoder(clips)
    ours = {"target_full": full, "targets": [], "context": []}
    normed = torch.nn.functional.layer_norm(full, full.shape[-1:])
    kinds = [Masks(c.long(), p.long()) for c, p in zip(as_list(need(oracle, "masks_enc", path)),
                                                       as_list(need(oracle, "masks_pred", path)), strict=True)]
    for masks in kinds:
        ours["targets"].append(gather(normed, masks.target))
        ours["context"].append(encoder(clips, masks.context))
    if "predictor" in state:
        width = need(state["predictor"], "predictor_embed.weight", f"{path}[predictor]").shape[0]
        tokens = sum(k.startswith("mask_tokens.") for k in state["predictor"])
        layers = depth(state["predictor"], "predictor_blocks")
        n = heads(config, width, "predictor_heads", "predictor_num_heads", "num_heads", "heads")
        predictor = fill(Predictor(encoder.grid, encoder.width, width, layers, n, tokens), state["predictor"],
                         f"{path}[predictor]")
        ours["predictions"] = [predictor(z, masks, kind % max(1, tokens))
                               for kind, (z, masks) in enumerate(zip(ours["context"], kinds, strict=True))]
        ours["loss"] = sum(map(losses.l_jepa, ours["predictions"], ours["targets"])) / len(kinds)
        ours["loss"].backward()
        ours["grad_norms"] = gradient_norms(encoder=encoder, predictor=predictor)
    return ours


def videomae(oracle: dict, path: str) -> dict:
    """Our values of everything in `VIDEOMAE`."""
    clips, config = oracle["clips"], oracle.get("config", {})
    model = weights.strip(oracle["checkpoint"]["model"], "module.")
    report = weights.Report(f"{path}[q_bias, v_bias]")
    model = weights.join_qkv_bias(model, report)
    print(f"{report.source}: {len(report.changed)} pairs joined, keys' bias zero")
    inside = weights.strip({k: v for k, v in model.items() if k.startswith("encoder.")}, "encoder.")
    rest = weights.strip({k: v for k, v in model.items() if not k.startswith("encoder.")}, "decoder.")
    encoder = make_encoder(inside, clips, config, "sincos1d", f"{path}[encoder]")
    width = need(rest, "encoder_to_decoder.weight", path).shape[0]
    decoder = PixelDecoder(encoder.grid, encoder.tubelet, encoder.width, width, depth(rest, "blocks"),
                           heads(config, width, "decoder_heads", "decoder_num_heads", "num_heads", "heads"),
                           encoder.channels)
    fill(decoder, rest, f"{path}[decoder]")
    hidden = need(oracle, "mask", path).bool().flatten(1)
    index = torch.arange(hidden.shape[1]).expand_as(hidden)
    masks = Masks(index[~hidden].view(len(hidden), -1), index[hidden].view(len(hidden), -1))
    ours = {"predictions": decoder(encoder(clips, masks.context), masks),
            "labels": losses.pixel_targets(clips, encoder.tubelet, masks.target)}
    ours["loss"] = losses.l_pixel(ours["predictions"], ours["labels"])
    ours["loss"].backward()
    norms = gradient_norms(encoder=encoder, decoder=decoder)
    for name in ("mask_token", "encoder_to_decoder.weight"):  # in the published model these stand beside the decoder
        norms[name] = norms.pop(f"decoder.{name}")
    return ours | {"grad_norms": norms}


def errors(oracle: dict, ours: dict, known: tuple[str, ...]) -> dict[str, float]:
    """Largest relative error of every recorded output; nan where we have nothing to put beside it."""
    found = {}
    for name, reference in oracle.items():
        if name in INPUTS:
            continue
        if name not in known:
            print(f"{name}: not known to this check, not compared")
        elif name == "grad_norms":
            reference = {k.replace("module.", "").replace("backbone.", ""): v for k, v in reference.items()}
            norms = ours.get(name, {})
            found |= {f"grad_norms {k}": math.nan for k in reference.keys() - norms.keys()}
            both = {k: v for k, v in reference.items() if k in norms}
            bare = {k for k, v in norms.items() if float(v) and not k.endswith(("q_bias", "v_bias"))} - reference.keys()
            bare = {k for k in bare if k.removesuffix("qkv.bias") + "q_bias" not in reference}
            if bare:
                print(f"{name}: {len(bare)} parameters are not in the file, not compared: {sorted(bare)[0]}, …")
            found[name] = relative_norms(norms, both) if both else math.nan
        elif isinstance(ours.get(name), list):
            pairs = dict(enumerate(as_list(reference)))
            for kind in range(max(len(pairs), len(ours[name]))):  # one of the two may lack a mask kind
                both = kind in pairs and kind < len(ours[name])
                found[f"{name}[{kind}]"] = relative(ours[name][kind], pairs[kind]) if both else math.nan
        else:
            found[name] = relative(ours[name], reference) if name in ours else math.nan
    for name in known:
        if name not in oracle:
            print(f"{name}: not in the file, not compared")
    return found


def check(path: str) -> dict[str, tuple[float, bool]]:
    """{output: (largest relative error, within the tolerance)}; the error is nan where nothing could be compared.

    Raises:
        ValueError: the file is not an oracle, does not fit our modules, or records no output.
    """
    oracle = weights.read(path)
    checkpoint = need(oracle, "checkpoint", path)
    need(oracle, "clips", path)
    is_videomae = "model" in checkpoint
    found = errors(oracle, (videomae if is_videomae else vjepa)(oracle, path), VIDEOMAE if is_videomae else VJEPA)
    if not found:
        raise ValueError("records no output, so nothing was compared")
    return {name: (error, error <= TOLERANCE.get(name, 1e-5)) for name, error in found.items()}


def main(arguments: list[str]) -> int | str:
    """The exit status: 0, 1, or a sentence (which Python prints, exiting with 1)."""
    if len(arguments) != 1:
        return "usage: python tests/check_oracle.py FILE"
    try:
        results = check(arguments[0])
    except ValueError as error:
        return str(error) if arguments[0] in str(error) else f"{arguments[0]}: {error}"
    for name, (error, fine) in results.items():
        verdict = "ok" if fine else "NOT COMPARED" if math.isnan(error) else "BEYOND THE TOLERANCE"
        print(f"{name:20s} {error:.1e} {verdict}")
    return int(not all(fine for _, fine in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
