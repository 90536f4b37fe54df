"""Pre-train and write the weights that this repository ships: `make weights`, with PROFILE=weights_ti the larger pair.

VideoMAE from random weights, then V-JEPA from those (profile `weights`), on synthetic patients only. The files have the
layouts of the published checkpoints (half precision), so that the same loader reads both.
"""
import json
import sys
from pathlib import Path

import torch

from usjepa_nb.objectives import VJEPA
from usjepa_nb.pretrain import save
from usjepa_nb.runs import Lab

HERE = Path(__file__).parent


def half(state: dict, prefix: str = "") -> dict:
    return {prefix + name: value.half() for name, value in state.items()}


def split_qkv_bias(state: dict) -> dict:
    """`qkv.bias` -> VideoMAE's `q_bias`, `v_bias`. Softmax does not see a bias of the keys, so nothing is lost."""
    out = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.bias"):
            stem, (q, _, v) = name.removesuffix("qkv.bias"), value.chunk(3)
            out |= {stem + "q_bias": q, stem + "v_bias": v}
        else:
            out[name] = value
    return out


def published(objective: torch.nn.Module) -> dict:
    """The objective's weights in the published layout of its kind."""
    if isinstance(objective, VJEPA):
        return {part: half(getattr(objective, part).state_dict(), "module.backbone.")
                for part in ("target_encoder", "predictor")}
    decoder = split_qkv_bias(objective.decoder.state_dict())
    top = ("mask_token", "encoder_to_decoder.weight")
    model = half(split_qkv_bias(objective.encoder.state_dict()), "encoder.")
    model |= {name if name in top else f"decoder.{name}": value.half() for name, value in decoder.items()}
    return {"model": model, "positions": objective.p.decoder_positions}


def main(profile: str = "weights") -> None:
    profile = profile if profile.startswith("weights") else "weights"  # `make` passes tiny where nothing is asked for
    lab, suffix = Lab(profile), profile.removeprefix("weights").replace("_", "-")
    seconds = {}
    for method in ("videomae", "vjepa"):
        run = lab.encoder(method)
        seconds[method] = round(json.loads((run.folder / "run.json").read_text())["seconds"])
        path = HERE / f"{method}-phantom{suffix}.pt"
        save(path, published(run.objective))
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    about = {"profile": lab.profile.name, "data": lab.data_name, "data_hash": lab.store.data_hash, "seed": lab.seed,
             "seconds": seconds}
    (HERE / f"about{suffix}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
