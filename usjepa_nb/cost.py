"""What a step costs, counted before it is paid: FLOPs and memory of the real objectives with *fake* weights.

A fake tensor has a shape, a type and no values. Masks and clips keep their values, so that an objective takes a true
step; whatever meets a weight has none, so that a ViT-L is counted in seconds on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import pandas as pd
import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from usjepa_nb import methods, probe
from usjepa_nb.pretrain import parameter_groups
from usjepa_nb.probe import autocast
from usjepa_nb.profile import Profile
from usjepa_nb.vit import make_blocks

# torch's counter knows the fused attention of GPUs; this is that of CPUs, by the same formulas.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)}
FLOP = {"MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18}
BYTE = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SECOND = {"s": 1, "minutes": 60, "hours": 3600}


@dataclass
class Cost:
    """One optimiser step of one process."""

    flops: float
    parts: dict[str, float]  # FLOPs of the module's children
    state: int  # bytes that stay: weights (also the EMA copy), buffers, gradients, AdamW's moments
    kept: int  # bytes kept from the forward for the backward pass


def fake(make: Callable[[], nn.Module]) -> nn.Module:
    """The module that `make` builds, with fake weights; nothing is drawn, loaded or allocated."""
    with torch.device("meta"):
        module = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules():  # each once: encoders share what is frozen (`to_empty` would stumble over that)
            for name, v in part._parameters.items():
                part._parameters[name] = v if v is None else nn.Parameter(v.new_empty(v.shape, device="cpu"),
                                                                          v.requires_grad)
            for name, v in part._buffers.items():
                part._buffers[name] = v if v is None else v.new_empty(v.shape, device="cpu")
    return module


def counter() -> FlopCounterMode:
    """Counts matrix products, convolutions and attention, 2 FLOPs a multiply-add; element-wise work is left out."""
    return FlopCounterMode(display=False, custom_mapping=ATTENTION)


def held(module: nn.Module, *more: Tensor) -> int:
    """Bytes of a module's weights and buffers, and of other tensors."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers(), *more))


def step(module: nn.Module, loss: Callable[[], Tensor], precision: str) -> Cost:
    """Forward, backward and AdamW's step of a fake module, counted.

    `kept` has every storage once that autograd holds between the two passes, weights left out. What lives shorter is
    not in it, so the peak is higher.

    Args:
        loss: runs the module.
    """
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if (key := t.untyped_storage()._cdata) not in own:
            kept[key] = t.untyped_storage().nbytes()
        return t

    module.zero_grad()
    with counter() as flops:
        with autocast(precision, "cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = loss()
        value.backward()
    optimizer = torch.optim.AdamW(parameter_groups(module))
    optimizer.step()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    moments = [v for state in optimizer.state.values() for v in state.values()]
    modules, me = flops.get_flop_counts(), type(module).__name__
    parts = {name: sum(modules.get(f"{me}.{name}", {}).values()) for name, _ in module.named_children()}
    return Cost(flops.get_total_flops(), parts, held(module, *gradients, *moments), sum(kept.values()))


@torch.no_grad()
def forward(run: Callable[[], object]) -> int:
    """FLOPs of what `run` does, without a backward pass."""
    with counter() as flops:
        run()
    return flops.get_total_flops()


def sustained(p: Profile, tokens: int, precision: str, device: str, seconds: float = 2) -> tuple[float, str]:
    """FLOP/s that the device keeps up over one encoder block, forward and backward, and words on what was measured.

    A block is what a step spends most of its time on and does fastest: real steps add masks, data, the optimiser and
    many small operations. After a repeat that warms up, the median over `seconds` of repeats is taken. A CPU gets
    fewer clips where a repeat would take long.
    """
    x = torch.zeros(1, tokens, p.width, requires_grad=True)
    block = fake(lambda: make_blocks(p.width, 1, p.heads)[0])
    per_clip = step(block, lambda: block(x).sum(), precision).flops
    clips = p.batch // p.devices
    if device == "cpu":
        clips = max(1, min(clips, int(2e10 / per_clip)))
    with torch.random.fork_rng(devices=[]):
        block = make_blocks(p.width, 1, p.heads)[0].to(device)
    noise = torch.randn(clips, tokens, p.width, generator=Generator().manual_seed(0)).to(device)  # zeros run faster
    x = noise.clone().requires_grad_()

    def repeat():
        with autocast(precision, device):
            y = block(x)
        y.backward(noise)

    repeat()
    timer = Timer("repeat()", globals={"repeat": repeat}, num_threads=torch.get_num_threads())
    rate = clips * per_clip / timer.blocked_autorange(min_run_time=seconds).median
    name = torch.cuda.get_device_name() if device == "cuda" else f"this CPU ({torch.get_num_threads()} threads)"
    return rate, (f"{rate / 1e12:.3g} TFLOP/s in {precision}, measured on {name} over one encoder block, forward and "
                  f"backward, {clips} clips of {tokens} tokens")


@dataclass
class Stage:
    """One training, the features of one encoder, or one probe."""

    name: str
    steps: int
    flops: float  # of a step
    state: float  # bytes, see `Cost`
    kept: float = math.nan
    ll: float = 0.0  # FLOPs of a step that are the localisation loss
    target: float = 0.0  # FLOPs of a step that are the target encoder


def objective(p: Profile, frames: int, method: str, lam: float = 1.0, freeze: int = 0) -> nn.Module:
    """A method's objective with fake weights, from no checkpoint."""
    p = p.replace(init="random", init_videomae="random", init_student="random", teacher="pixels")
    lab = SimpleNamespace(profile=p, frames=frames, encoder=lambda method, **_: methods.build(lab, spec(method)))
    spec = lambda method, **more: {"method": method, "lam": 1.0, "freeze": 0, "seed": 0, "fraction": None} | more  # noqa: E731
    return fake(lambda: methods.build(lab, spec(method, lam=lam, freeze=freeze)))


def training(p: Profile, frames: int, method: str, freeze: int, batches: Iterable) -> Stage:
    """A training of a method; "vjepa" and "salt" are counted with LL, whose share is known apart.

    Args:
        batches: what the objective takes; FLOPs are averaged over them, each with its own masks, memory is the largest.
    """
    name, steps = {"videomae": ("VideoMAE", p.videomae_steps),
                   "teacher": ("SALT's teacher", p.teacher_steps), "salt": ("SALT + LL", p.steps),
                   "vjepa": (f"V-JEPA + LL, {freeze}/{p.depth} blocks frozen", p.steps),
                   "supervised": ("ViT and probe, end to end", p.supervised_steps),
                   "unet": ("U-Net, end to end", p.supervised_steps)}[method]
    with_ll, batches = method in ("vjepa", "salt"), list(batches)

    def count(method, lam=1.0):
        module = objective(p, frames, method, lam, freeze)
        for k, batch in enumerate(tqdm(batches, desc=f"counting {name}", leave=False)):
            loss = lambda batch=batch, k=k: module(batch, Generator().manual_seed(k))["loss"]  # noqa: E731
            yield step(module, loss, p.precision)

    counted = [*count("vjepa_ll" if method == "vjepa" else method, 0.5 if with_ll else 1.0)]
    mean = lambda values: sum(values) / len(counted)  # noqa: E731
    ll, target = (mean(c.parts.get(part, 0) for c in counted) for part in ("head", "target_encoder"))
    if with_ll and p.ll_on == "unplaced":  # LL has a pass of the encoder to itself
        ll = mean(c.flops for c in counted) - mean(c.flops for c in count(method))
    return Stage(name, steps, mean(c.flops for c in counted), counted[0].state, max(c.kept for c in counted),
                 ll, target)


def features(p: Profile, clips: Tensor, encoder: nn.Module, name: str, number: int) -> Stage:
    """An encoder over `number` clips, of which some are given, uint8 [n, T, S, S]; a step is a clip."""
    flops = forward(lambda: probe.encode(encoder, clips.float(), p.sector_aware)) / len(clips)
    return Stage(name, number, flops, held(encoder))


def probing(p: Profile, frames: int, width: int, name: str, clips: int) -> Stage:
    """A probe on cached features [N, width] of `clips` labelled clips, see `probe.fit`."""
    grid, B = p.grid(frames), p.probe_batch
    x, seen = torch.zeros(B, math.prod(grid), width).half(), torch.ones(B, math.prod(grid), dtype=torch.bool)
    masks = torch.zeros(B, frames, p.size, p.size, dtype=torch.uint8)
    module = fake(lambda: probe.SegmentationProbe(grid, p.tubelet_size, width, p.heads, p.probe_width))
    c = step(module, lambda: module.loss(x, seen, masks), p.precision)
    steps = max(p.probe_epochs * math.ceil(clips / B), p.probe_min_steps)
    return Stage(name, steps, c.flops, c.state, c.kept)


def scaled(name: str, values: Iterable[float], units: dict[str, float]) -> pd.Series:
    """Numbers as text of three digits, all in the largest unit that leaves the largest at 1 or more; nan is a dash."""
    values = pd.Series(list(values), dtype=float)
    unit = max((u for u in units if units[u] <= values.max()), key=units.get, default=next(iter(units)))
    text = [f"{v:,.0f}" if v >= 100 else "–" if math.isnan(v) else f"{v:.3g}" for v in values / units[unit]]
    return pd.Series(text, name=f"{name}, {unit}")
