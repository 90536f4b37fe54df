"""A profile: every setting of a run, with its unit, read from `profiles/<name>.yaml` and checked.

`tiny` (two CPU cores), `small` (one GPU) and `paper` (the paper's settings) differ in settings only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]  # of the checkout
FOLDER = ROOT / "profiles"
END_TO_END = ("supervised", "finetuned", "unet")  # methods that learn from labels and bring their own decoder


class ProfileError(ValueError):
    """A setting that does not exist or is out of range; the message names it, its file and the remedy."""


@dataclass(frozen=True)
class Profile:
    """Settings. Meaning and unit of each stand in `profiles/tiny.yaml`; field order is that of the file."""

    name: str
    # data
    patients: int
    phantom_seed: int
    spacing: float
    size: int
    frames: int
    clip_rule: str
    frame_step: int
    # model
    tubelet: int
    patch: int
    width: int
    depth: int
    heads: int
    predictor_width: int
    predictor_depth: int
    predictor_heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_positions: str
    init: str
    init_videomae: str
    # masks
    mask: str
    hidden: float
    short_range: tuple[int, float]
    long_range: tuple[int, float]
    tube_ratio: float
    mask_rule: str
    sector_aware: bool
    # objective
    target_layers: int
    centre: float
    beta: float
    variance: float
    pairs: int
    ll_on: str
    # pre-training
    augmentation: str
    unlabelled: str
    sampling: str
    batch: int
    steps: int
    warmup: float
    lr: float
    encoder_lr: float
    lr_end: float
    weight_decay: float
    weight_decay_end: float
    beta2: float
    clip: float
    ema: float
    videomae_steps: int
    videomae_lr: float
    # static teacher
    teacher: str
    teacher_width: int
    teacher_depth: int
    teacher_heads: int
    teacher_steps: int
    init_student: str
    # probe
    probe_epochs: int
    probe_min_steps: int
    probe_batch: int
    probe_lr: float
    probe_width: int
    supervised_steps: int
    supervised_lr: float
    finetune_lr: float
    # machine
    precision: str
    accelerator: str
    one_pass: bool
    compile: bool
    devices: int
    log_every: int

    def __post_init__(self):
        choices = {"clip_rule": ("cover", "step"), "mask": ("multiblock", "tube"),
                   "ll_on": ("predicted", "context", "unplaced"), "decoder_positions": ("sincos1d", "sincos3d"),
                   "mask_rule": ("random", "first", "pad"),
                   "augmentation": ("none", "mild", "published"), "unlabelled": ("all", "fraction"),
                   "sampling": ("uniform", "balanced"),
                   "precision": ("32-true", "bf16-mixed"), "accelerator": ("auto", "cpu", "cuda")}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                self.refuse(key, f"choose one of {', '.join(allowed)}")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            may_be_zero = f.name in ("phantom_seed", "centre", "beta", "variance", "ema", "warmup", "lr_end",
                                     "weight_decay", "weight_decay_end", "probe_min_steps")
            if isinstance(value, int | float) and not isinstance(value, bool) and \
                    (not 0 <= value < math.inf or (value == 0 and not may_be_zero)):
                self.refuse(f.name, "it must be positive")
        if self.size % self.patch or self.frames % self.tubelet:
            self.refuse("size" if self.size % self.patch else "frames", "it must be a multiple of "
                        + ("patch" if self.size % self.patch else "tubelet"))
        if self.patch & (self.patch - 1):
            self.refuse("patch", "it must be a power of two (the probe goes back to pixels by doubling)")
        if self.batch % self.devices:
            self.refuse("batch", f"it must be a multiple of devices ({self.devices})")
        for key in ("short_range", "long_range"):
            if getattr(self, key)[0] < 1 or not 0 < getattr(self, key)[1] <= 1:
                self.refuse(key, "it is [blocks, share of the area of each], at least 1 and in (0, 1]")
        for key in ("centre", "warmup", "ema", "hidden", "tube_ratio", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                self.refuse(key, "it must lie in [0, 1)")
        for key in ("steps", "videomae_steps", "teacher_steps", "supervised_steps"):
            if round(self.warmup * getattr(self, key)) >= getattr(self, key):
                self.refuse("warmup", f"it leaves no step of {key} ({getattr(self, key)}) after the warm-up")
        if self.init == "videomae" and self.decoder_positions != "sincos3d":
            self.refuse("init", "V-JEPA's positions are (t, y, x): set decoder_positions to sincos3d for VideoMAE too")
        if not 1 <= self.target_layers <= self.depth:
            self.refuse("target_layers", f"it must lie in 1…depth ({self.depth})")
        for width, heads in ((self.width, self.heads), (self.predictor_width, self.predictor_heads),
                             (self.decoder_width, self.decoder_heads), (self.teacher_width, self.teacher_heads)):
            if width % heads:
                self.refuse("heads", f"a width of {width} does not divide into {heads} heads")

    def refuse(self, key: str, remedy: str):
        raise ProfileError(f"profile {self.name!r}: {key} = {getattr(self, key)!r} is not possible: {remedy}")

    @property
    def tubelet_size(self) -> tuple[int, int, int]:
        """Pixels of one token along (t, y, x)."""
        return self.tubelet, self.patch, self.patch

    def grid(self, frames: int | None = None) -> tuple[int, int, int]:
        """Tokens along (t, y, x) of a clip of `frames` frames (the profile's when None)."""
        return (frames or self.frames) // self.tubelet, self.size // self.patch, self.size // self.patch

    def replace(self, **changes) -> Profile:
        unknown = changes.keys() - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise ProfileError(f"profile {self.name!r} has no setting {', '.join(sorted(unknown))}; "
                               "see profiles/tiny.yaml for all names")
        return dataclasses.replace(self, **changes)


def load(name: str, **changes) -> Profile:
    """Read `profiles/<name>.yaml`, or a YAML file of your own; `changes` override single settings.

    Raises:
        ProfileError: no such file, not YAML, unknown, missing, mistyped or impossible settings.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise ProfileError(f"{path}: no such profile; choose one of {known}, or give the path of a YAML file")
    values = read_yaml(path, ProfileError, "profiles/tiny.yaml")
    if not isinstance(values, dict):
        raise ProfileError(f"{path}: holds no settings; compare it with profiles/tiny.yaml")
    values |= changes
    fields = {f.name: f.type for f in dataclasses.fields(Profile) if f.name != "name"}
    if unknown := sorted(" ".join(str(key).split()) for key in values.keys() - fields.keys()):
        raise ProfileError(f"{path}: unknown setting {', '.join(unknown)}; see profiles/tiny.yaml for all names")
    if missing := sorted(fields.keys() - values.keys()):
        raise ProfileError(f"{path}: setting {', '.join(missing)} is missing; see profiles/tiny.yaml")
    return Profile(path.stem, **{k: typed(path, k, v, fields[k]) for k, v in values.items()})


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands there twice; YAML would silently take the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, error: type[ValueError], model: str):
    """What a YAML file holds.

    Raises:
        error: not readable as YAML; the message names the file to compare it with.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except Exception as e:  # whatever the parser stumbles on: `!!bool x` is a KeyError to it
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise error(f"{path}: is not readable as YAML ({reason}); compare it with {model}") from e


def real(value: float) -> float:
    """A number as a float; a whole number beyond all floats as infinity, which no setting may be."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def typed(path: Path, key: str, value, kind: str):
    """Check a YAML value against a field's annotation; whole numbers may stand for floats, lists for tuples."""
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        kinds = kind[len("tuple["):-1].split(", ")
        if len(kinds) == len(value) and all(type(v).__name__ == k or (type(v) is int and k == "float")
                                            for v, k in zip(value, kinds, strict=True)):
            return tuple(real(v) if k == "float" else v for v, k in zip(value, kinds, strict=True))
    elif kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return real(value)
    elif type(value).__name__ == kind:
        return value
    raise ProfileError(f"{path}: {key} = {value!r} should be of type {kind} (YAML reads 1e-3 as text: write 1.0e-3)")
