"""Pre-training: the one loop, its checkpoints and its monitors. What it trains is an objective (see `objectives`).

The loop does not know which objective it runs. Every random choice of step k comes from a generator seeded with
(seed, k), so a resumed run is the same run.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from lightning_fabric import Fabric
from timm.models.vision_transformer import Block
from timm.scheduler import CosineLRScheduler
from torch import Generator, Tensor, nn
from tqdm import tqdm

from usjepa_nb import weights
from usjepa_nb.profile import Profile
from usjepa_nb.vit import Encoder

AGAIN = "delete it, and the run starts again"  # what to do about a damaged checkpoint


class Diverged(RuntimeError):
    """The loss is no longer a number; the last good checkpoint stays on disk."""


def step_generator(seed: int, step: int, rank: int = 0) -> Generator:
    """The generator of one step of one process. A running generator's state would have to be saved; this need not."""
    return Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)


def parameter_groups(module: nn.Module, encoder_lr: float = 1.0) -> list[dict]:
    """No weight decay on biases and other 1-D parameters; `lr_scale` of the encoder's (timm's schedulers read it)."""
    groups = []
    for scale, mine in ((encoder_lr, True), (1.0, False)):
        params = [p for name, p in module.named_parameters() if p.requires_grad and name.startswith("encoder.") is mine]
        groups += [{"params": [p for p in params if p.ndim > 1], "lr_scale": scale, "decays": True},
                   {"params": [p for p in params if p.ndim <= 1], "lr_scale": scale, "decays": False,
                    "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def compile_blocks(objective: nn.Module) -> None:
    """Compile every block in place (names of parameters stay), once for any number of tokens.

    All blocks share one function, and with masks, gradients and autocast on and off it needs more graphs than torch's
    default of eight, past which it would go on uncompiled without an error.
    """
    torch._dynamo.config.recompile_limit = 64
    for part in objective.modules():
        if isinstance(part, Block):
            part.compile(dynamic=True)


@torch.no_grad()
def monitors(features: Tensor) -> dict[str, float]:
    """Is it collapsing? Features [B, N, D] of several clips on the same grid ->

    std: mean standard deviation of a feature (0 = every token alike).
    rank: effective rank, exp(entropy of the covariance spectrum), once each position's mean is removed.
    position_share: share of the variance that the token's position alone explains (1 = content does not matter).
    """
    x = features.float()
    mean = x.mean(0, keepdim=True)
    content = (x - mean).flatten(0, 1)
    spectrum = torch.linalg.eigvalsh(content.T @ content).clamp(min=0)
    share = spectrum / spectrum.sum().clamp(min=1e-12)
    total = x.flatten(0, 1).var(0, unbiased=False).mean()
    return {"std": float(x.flatten(0, 1).std(0).mean()),
            "rank": float(torch.exp(-(share * (share + 1e-12).log()).sum())),
            "position_share": float(mean[0].var(0, unbiased=False).mean() / total.clamp(min=1e-12))}


def train(objective: nn.Module, batches: Callable[[Generator, int], object], p: Profile, path: Path, *, seed: int,
          fabric: Fabric, watch: Callable[[nn.Module], dict] | None = None) -> Iterator[dict]:
    """The loop: writes `path` every `log_every` steps and at the end, and then yields their history rows, one a step.

    Args:
        batches: (generator, batch size) -> what the objective takes, for pre-training grey clips [B, T, H, W].
        path: checkpoint; when it exists, training continues from it, exactly as if never interrupted (a GPU
            may add up in another order).
        watch: extra columns for the history (monitors), computed every `log_every` steps.

    Raises:
        Diverged: loss or gradients not finite.
        OSError: a checkpoint cannot be written.
        WeightsError: the checkpoint is another run's, or that of a shorter one which has ended.
    """
    if p.compile:
        compile_blocks(objective)
    optimizer = torch.optim.AdamW(parameter_groups(objective, p.encoder_lr), lr=p.lr, betas=(0.9, p.beta2),
                                  weight_decay=p.weight_decay, fused=True)
    warmup = round(p.warmup * p.steps)  # warmup_prefix: the cosine begins where the warm-up ends: the peak is reached
    schedule = CosineLRScheduler(optimizer, t_initial=p.steps - warmup, lr_min=p.lr_end, warmup_t=warmup,
                                 warmup_lr_init=p.lr / 100, warmup_prefix=True, t_in_epochs=False)
    model, optimizer = fabric.setup(objective, optimizer)
    # after setup: it moves weights to the device, not AdamW's state
    start, rows = resume(path, objective, optimizer, p.steps)
    yield from rows

    def prepared(step: int):
        generator = step_generator(seed, step, fabric.global_rank)
        return objective.prepare(fabric.to_device(batches(generator, p.batch // fabric.world_size)), generator)

    new = []  # rows since the last look: their numbers stay on the device, reading one back would stop it
    for step, batch in tqdm(ahead(prepared, range(start, p.steps), fabric.device), initial=start, total=p.steps,
                            desc=path.parent.name, disable=not fabric.is_global_zero):
        schedule.step_update(step)
        share = (1 + math.cos(math.pi * step / p.steps)) / 2  # from 1 to 0
        for group in optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = p.weight_decay_end + (p.weight_decay - p.weight_decay_end) * share
        out = model(batch)
        fabric.backward(out["loss"])
        norm = fabric.clip_gradients(model, optimizer, max_norm=p.clip, error_if_nonfinite=False)
        new.append({"step": step + 1, "lr": optimizer.param_groups[-1]["lr"], "grad_norm": norm} |
                   {k: v.detach() for k, v in out.items()})
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step + 1)
        if (step + 1) % p.log_every == 0 or step + 1 == p.steps:
            new = as_numbers(new)
            refuse_divergence(new, p, path)
            new[-1] |= watch(objective) if watch else {}
            rows += new
            if fabric.is_global_zero:
                moments = optimizer.state_dict() if step + 1 < p.steps else None  # half of the file, of no more use
                save(path, {"format": 1, "step": step + 1, **states(objective), "optimizer": moments, "history": rows})
            yield from new
            new = []


def ahead(make: Callable[[int], object], steps: range, device: torch.device) -> Iterator[tuple[int, object]]:
    """(step, make(step)) in order. For a GPU the next one is made, on a stream of its own, while this one is in use."""
    if device.type != "cuda":
        yield from ((step, make(step)) for step in steps)
        return
    stream = torch.cuda.Stream(device)

    def on_stream(step: int, used: torch.cuda.Event | None) -> tuple[object, torch.cuda.Event]:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            if used is not None:  # the memory of what was made two steps ago may be given out again: it is in no use
                stream.wait_event(used)
            return make(step), stream.record_event()

    with ThreadPoolExecutor(1) as one:
        waiting, used = one.submit(on_stream, steps[0], None) if steps else None, None
        for step in steps:
            made, ready = waiting.result()
            if step + 1 < steps.stop:
                waiting = one.submit(on_stream, step + 1, used)
            torch.cuda.current_stream(device).wait_event(ready)
            yield step, made
            used = torch.cuda.current_stream(device).record_event()


def as_numbers(rows: list[dict]) -> list[dict]:
    """Rows with tensors of one number each -> with numbers, in one read from the device."""
    keys = [k for k, v in rows[0].items() if isinstance(v, Tensor)]
    numbers = torch.stack([torch.stack([row[k].double() for k in keys]) for row in rows]).tolist()
    return [row | dict(zip(keys, values, strict=True)) for row, values in zip(rows, numbers, strict=True)]


def refuse_divergence(rows: list[dict], p: Profile, path: Path) -> None:
    """
    Raises:
        Diverged: a loss or a gradient norm is not finite.
    """
    for row in rows:
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            kept = f"The last good checkpoint is {path}" if path.exists() else "No checkpoint had been written yet"
            raise Diverged(f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}: training "
                           f"diverged; lower lr ({p.lr}) or clip ({p.clip}). {kept}")


def states(objective: nn.Module) -> dict:
    """State per part, in the layout of the published checkpoints: encoder, target_encoder, predictor, …

    `features` names the part that is probed: V-JEPA's target, but SALT's student.
    """
    parts = {name: module.state_dict() for name, module in objective.named_children()}
    parts["buffers"] = dict(objective.named_buffers(recurse=False))
    if isinstance(encoder := getattr(objective, "encoder", None), Encoder):  # its position table is not stored
        parts["positions"] = encoder.positions
    for name, module in objective.named_children():
        if module is getattr(objective, "features", None):
            parts["features"] = name
    return parts


def resume(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer | None = None,
           steps: int = 0) -> tuple[int, list[dict]]:
    """Load the checkpoint `path` if it exists -> (steps done, history so far); AdamW's state if it ends before `steps`.

    Raises:
        WeightsError: it is another run's, or that of a run which ended before `steps`.
    """
    if not path.exists():
        return 0, []
    file = weights.read(path, AGAIN)
    with weights.restoring(path):
        for name, module in objective.named_children():
            module.load_state_dict(file[name])
        for name, buffer in objective.named_buffers(recurse=False):
            buffer.copy_(file["buffers"][name])
        if optimizer is not None and file["step"] < steps:
            if file["optimizer"] is None:
                raise ValueError(f"it ended after {file['step']} steps")
            optimizer.load_state_dict(file["optimizer"])
        return file["step"], file["history"]


def steps_done(path: Path) -> int:
    """Steps that the checkpoint `path` holds; 0 when there is none."""
    with weights.restoring(path):
        return weights.read(path, AGAIN)["step"] if path.exists() else 0


def save(path: Path, content: dict) -> None:
    """Write a checkpoint whole or not at all: to a temporary name, then moved."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch turns a full disk into a RuntimeError
        raise OSError(f"{path} could not be written ({str(e).splitlines()[0]}): see that its folder is writable and "
                      "has space, then run it again; it goes on from the last checkpoint") from e
    finally:
        with contextlib.suppress(OSError):  # of a read-only disk, which says so already
            part.unlink(missing_ok=True)
