"""Compare this package with the published implementations on one oracle file: `python tests/check_oracle.py FILE`.

Prints the largest relative error of every output and exits with 1 beyond the tolerance. A file holds a checkpoint
in the published layout, a configuration of any size, clips, masks and the published code's outputs.
"""

from __future__ import annotations

import sys

import torch

import usjepa_nb  # noqa: F401  (before timm)
from usjepa_nb import losses, weights
from usjepa_nb.masking import Masks
from usjepa_nb.vit import Encoder, PixelDecoder, Predictor, gather

TOLERANCE = {"loss": 1e-6, "gradient norms": 1e-4}  # outputs: 1e-5


def relative(ours, reference) -> float:
    """Largest error relative to the largest reference value."""
    return float((ours.detach() - reference).abs().max() / reference.abs().max())


def shape(config: dict) -> dict:
    grid = (config["frames"] // config["tubelet"], *[config["img_size"] // config["patch"]] * 2)
    return {"grid": grid, "tubelet": (config["tubelet"], config["patch"], config["patch"])}


def vjepa(oracle: dict, path: str) -> dict[str, float]:
    c = oracle["config"]
    size = shape(c)
    kinds = len(oracle["masks_enc"])
    make = lambda: Encoder(**size, width=c["embed_dim"], depth=c["depth"], heads=c["num_heads"], channels=3)  # noqa: E731
    encoder, target_encoder = make(), make()
    predictor = Predictor(size["grid"], c["embed_dim"], c["predictor_dim"], c["predictor_depth"],
                          c.get("predictor_heads", c["num_heads"]), kinds)
    state = oracle["checkpoint"]
    for module, part in ((encoder, "encoder"), (target_encoder, "target_encoder"), (predictor, "predictor")):
        report = weights.Report(f"{path}[{part}]")
        weights.load_state(module, weights.strip(state[part], "module.", "backbone."), report)
        print(report)
    clips = oracle["clips"]
    with torch.no_grad():
        full = target_encoder(clips)
    normed = torch.nn.functional.layer_norm(full, full.shape[-1:])
    errors, total = {"target_full": relative(full, oracle["target_full"])}, 0
    for kind in range(kinds):
        masks = Masks(oracle["masks_enc"][kind], oracle["masks_pred"][kind])
        target = gather(normed, masks.target)
        z = encoder(clips, masks.context)
        predicted = predictor(z, masks, kind)
        total = total + losses.l_jepa(predicted, target) / kinds
        for name, value in (("targets", target), ("context", z), ("predictions", predicted)):
            errors[f"{name}[{kind}]"] = relative(value, oracle[name][kind])
    errors["loss"] = relative(total, oracle["loss"])
    total.backward()
    norms = {f"{part}.{k}": p.grad.norm() for part, module in (("encoder", encoder), ("predictor", predictor))
             for k, p in module.named_parameters()}
    names = sorted(oracle["grad_norms"])
    if names != sorted(norms):
        raise SystemExit(f"{path}: parameters differ: {sorted(set(names) ^ set(norms))[:5]}")
    reference = torch.stack([oracle["grad_norms"][n] for n in names])
    ours = torch.stack([norms[n] for n in names])
    errors["gradient norms"] = float(((ours - reference).abs() / reference.clamp(min=1e-6 * reference.max())).max())
    return errors


def videomae(oracle: dict, path: str) -> dict[str, float]:
    c = oracle["config"]
    size = shape(c)
    encoder = Encoder(**size, width=c["embed_dim"], depth=c["depth"], heads=c["num_heads"], channels=3,
                      positions="sincos1d")
    decoder = PixelDecoder(**size, encoder_width=c["embed_dim"], width=c["decoder_dim"], depth=c["decoder_depth"],
                           heads=c["decoder_heads"], channels=3)
    model = oracle["checkpoint"]["model"]
    for module, prefix, own in ((encoder, "encoder.", True), (decoder, "decoder.", False)):
        report = weights.Report(f"{path}[{prefix[:-1]}]")
        state = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith("encoder.") == own}
        weights.load_state(module, weights.join_qkv_bias(state, report), report)
        print(report)
    hidden = oracle["mask"]
    index = torch.arange(hidden.shape[1]).expand_as(hidden)
    masks = Masks(index[~hidden].view(len(hidden), -1), index[hidden].view(len(hidden), -1))
    with torch.no_grad():
        predicted = decoder(encoder(oracle["clips"], masks.context), masks)
        labels = losses.pixel_targets(oracle["clips"], size["tubelet"], masks.target)
        loss = losses.l_pixel(predicted, labels)
    return {"predictions": relative(predicted, oracle["predictions"]), "labels": relative(labels, oracle["labels"]),
            "loss": relative(loss, oracle["loss"])}


def check(path: str) -> dict[str, tuple[float, bool]]:
    """{output: (largest relative error, within the tolerance)}"""
    torch.manual_seed(0)  # the weights drawn here are overwritten
    oracle = weights.read(path)
    errors = (videomae if "mask" in oracle else vjepa)(oracle, path)
    return {name: (error, error <= TOLERANCE.get(name, 1e-5)) for name, error in errors.items()}


if __name__ == "__main__":
    results = check(sys.argv[1])
    for name, (error, fine) in results.items():
        print(f"{name:20s} {error:.1e} {'ok' if fine else 'BEYOND THE TOLERANCE'}")
    sys.exit(not all(fine for _, fine in results.values()))
