"""Checkpoints in: published V-JEPA and VideoMAE files, and our own, into our modules, key by key, with a report.

A key that is missing, left over or of another shape is an error, never a silence: VideoMAE keeps the attention
biases apart (`q_bias`, `v_bias`, no bias for keys), and a loader that overlooks this leaves them at zero unnoticed.
"""

from __future__ import annotations

import contextlib
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from usjepa_nb.augment import MEAN, STD
from usjepa_nb.vit import POSITIONS, Encoder, PixelDecoder, Predictor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what published encoders expect
ENCODERS = {"target_encoder", "ema_encoder", "encoder"}  # in V-JEPA's layouts


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


@dataclass
class Report:
    """What was done with every key of a checkpoint part."""

    source: str
    used: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # used, but in another form, with the reason
    notes: list[str] = field(default_factory=list)  # what the file does not say, or was not asked for

    def __str__(self) -> str:
        notes = "".join(f"\n  {c}" for c in self.changed + self.notes)
        return f"{self.source}: {len(self.used)} keys used, 0 missing, 0 left over{notes}"


def read(path: str | Path, remedy: str = "fetch it again") -> dict:
    """Read a checkpoint. Only tensors and plain containers are accepted: a file that carries code is refused.

    Args:
        remedy: what to do about a damaged file.

    Raises:
        WeightsError: not there, truncated, or not loadable as pure data.
    """
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise WeightsError(f"{path}: no such checkpoint; put the file there or set `init: random`") from e
    except pickle.UnpicklingError as e:
        raise WeightsError(f"{path}: refused, it is no checkpoint, or it holds more than tensors and could run code on "
                           f"loading; {remedy}, or ask its author for a file of tensors only") from e
    except (RuntimeError, EOFError, OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "truncated?"
        raise WeightsError(f"{path}: cannot be read as a checkpoint ({reason}); {remedy}") from e
    if not isinstance(file, dict):
        raise WeightsError(f"{path}: holds a {type(file).__name__}, not the named parts of a checkpoint; "
                           "save it as torch.save({'target_encoder': encoder.state_dict()}, path)")
    return file


@contextlib.contextmanager
def restoring(path: str | Path) -> Iterator[None]:
    """While a run takes up its own checkpoint `path`: parts that are missing or of another size get one sentence.

    Raises:
        WeightsError: naming the file and the remedy.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        if isinstance(e, WeightsError):
            raise
        reason = f"no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())[:160]
        raise WeightsError(f"{path}: is not the checkpoint of this run ({reason}); delete it, and the run starts "
                           "again") from e


def strip(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Remove wrappers' prefixes ("module.", "backbone.") from the names.

    Where two names would become one, both stay as they are, so that `load_state` reports one as left over.
    """
    short = {name: name for name in state}
    for prefix in prefixes:
        short = {name: new.removeprefix(prefix) for name, new in short.items()}
    uses = Counter(short.values())
    return {new if uses[new] == 1 else name: state[name] for name, new in short.items()}


def join_qkv_bias(state: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """VideoMAE's `q_bias`, `v_bias` -> `qkv.bias`, with zeros for the keys. Half a pair stays, to be refused."""
    state = dict(state)
    for name in [k for k in state if k.endswith("attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        if stem + "v_bias" not in state or stem + "qkv.bias" in state:
            continue
        q, v = state.pop(name), state.pop(stem + "v_bias")
        state[stem + "qkv.bias"] = torch.cat([q, torch.zeros_like(v), v])
        report.changed.append(f"{stem}q_bias, v_bias -> {stem}qkv.bias, keys' bias zero")
    return state


def fold_grey(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Three-channel tubelet weights [D, 3, t, p, q] -> one channel [D, 1, t, p, q], exactly.

    A grey frame g fed three times is (g - mean_c) / std_c per channel; ours is (g - MEAN) / STD once. Both are
    affine in g, so the sum over channels folds into one weight and a corrected bias.
    """
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    w = weight.double()
    folded = (w * STD / std).sum(1, keepdim=True)
    shift = (w * (MEAN - mean) / std).sum((1, 2, 3, 4))
    return folded.to(weight.dtype), (bias.double() + shift).to(bias.dtype)


def fold_head(value: Tensor) -> Tensor:
    """VideoMAE's head (weight or bias) [pixels · 3, …] -> [pixels, …]: of a grey frame all channels want the same."""
    return value.unflatten(0, (-1, 3)).mean(1)


def load_state(module: nn.Module, state: dict[str, Tensor], report: Report) -> Report:
    """Copy `state` into `module`; every name and shape must match. Fixed position tables are checked, not copied."""
    state = dict(state)
    for name, table in module.named_buffers():
        if (stored := state.pop(name, None)) is not None:
            same = stored.shape == table.shape
            if same and not torch.allclose(stored.to(table), table, atol=1e-4):
                raise WeightsError(f"{report.source}: its {name} is not the fixed sine-cosine table of this model; "
                                   "choose the matching `positions`")
            report.changed.append(f"{name}: {'equal to' if same else 'another grid, replaced by'} the computed table")
            report.used.append(name)
    weight, bias = (state.get(f"patch_embed.proj.{name}") for name in ("weight", "bias"))
    grey = isinstance(module, Encoder) and module.channels == 1
    if grey and weight is not None and bias is not None and weight.shape[1:2] == (3,):
        state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = fold_grey(weight, bias)
        report.changed.append("patch_embed.proj: three colour channels folded into one grey channel")
    own = module.state_dict()
    for name in ("head.weight", "head.bias") if isinstance(module, PixelDecoder) else ():
        if name in state and len(state[name]) == 3 * len(own[name]):
            state[name] = fold_head(state[name])
            report.changed.append(f"{name}: the means of its three colour channels")
    missing, left = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
              for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or left or shapes:
        parts = [f"{n} {what} ({', '.join(sorted(names)[:3])}{', …' if n > 3 else ''})" for what, names in
                 (("missing", missing), ("left over", left), ("of another shape", shapes)) if (n := len(names))]
        raise WeightsError(f"{report.source}: does not fit this model: {'; '.join(parts)}. "
                           "Set width, depth, heads and patch in the profile to the checkpoint's")
    module.load_state_dict(state)
    report.used += list(state)
    return report


def load(path: str | Path, encoder: Encoder, *, predictor: Predictor | None = None,
         decoder: PixelDecoder | None = None, part: str | None = None) -> list[Report]:
    """Load a published V-JEPA or VideoMAE checkpoint, or one of ours, and report on every key.

    Args:
        part: for V-JEPA layouts, which encoder: "target_encoder" (named "ema_encoder" in V-JEPA 2.1) or "encoder"; by
            default the one that the file says is probed (ours do), else the target, else the only one there is.
        predictor, decoder: filled too when given.

    Raises:
        WeightsError: unreadable, of an unknown layout, or not fitting.
    """
    file = read(path)
    if "model" in file:  # VideoMAE: one state with encoder.*, decoder.*, mask_token, encoder_to_decoder
        inner = strip(tensors(file, "model", path), "module.")
        own = {k.removeprefix("encoder."): v for k, v in inner.items() if k.startswith("encoder.")}
        rest = strip({k: v for k, v in inner.items() if not k.startswith("encoder.")}, "decoder.")
        found = [(encoder, own, "encoder"), (predictor, {}, "predictor"), (decoder, rest, "decoder")]
        others = [] if decoder else [f"{len(rest)} keys of the decoder"]
    else:
        probed = file.get("features")
        part = part or (probed if isinstance(probed, str) else "encoder" if ENCODERS & file.keys() == {"encoder"} else
                        "target_encoder")
        part = "ema_encoder" if part == "target_encoder" and "ema_encoder" in file else part
        if part not in file:
            raise WeightsError(f"{path}: holds {', '.join(map(str, file)) or 'nothing'} but no {part!r}; "
                               "expected V-JEPA's (target_encoder, encoder, predictor) or VideoMAE's (model)")
        found = [(module, tensors(file, name, path) if module else {}, name) for module, name in
                 ((encoder, part), (predictor, "predictor"), (decoder, "decoder"))]
        others = sorted(map(str, file.keys() - {name for module, _, name in found if module}))
    positions = "sincos1d" if {"model", "decoder"} & file.keys() else "sincos3d"  # published files hold no table
    positions = file.get("positions", positions)  # ours name it
    if positions not in list(POSITIONS):  # a list: what a file names need not be hashable
        raise WeightsError(f"{path}: names its positions {positions!r}; {' and '.join(POSITIONS)} are known")
    table = POSITIONS[positions](encoder.grid, encoder.width)
    if not torch.allclose(encoder.pos_embed.float().cpu(), table, atol=1e-2):
        raise WeightsError(f"{path}: was trained with {positions} positions, which this encoder does not have; "
                           f'build it with positions="{positions}"')
    reports = []
    for module, state, name in found:
        if module is not None:
            report = Report(f"{Path(path).name}[{name}]")
            state = join_qkv_bias(strip(state, "module.", "backbone."), report)
            reports.append(load_state(module, state, report))
    reports[0].notes.append(f"attention heads are not in the file: {encoder.heads}, as in the profile")
    if others:
        reports[0].notes.append(f"not asked for: {', '.join(others)}")
    return reports


def parts(path: str | Path) -> set[str]:
    """Names of what a checkpoint holds; in VideoMAE's layout "encoder" and "decoder" share one state."""
    file = read(path)
    model = file.get("model")
    return set(file) | {k.removeprefix("module.").split(".")[0] for k in (model if isinstance(model, dict) else ())}


def tensors(file: dict, name: str, path: str | Path) -> dict[str, Tensor]:
    """The part `name` of a checkpoint (empty if absent), which has to be tensors by name."""
    state = file.get(name, {})
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path}: its {name!r} is not a set of named tensors; save the module's state_dict() there")
    return state
