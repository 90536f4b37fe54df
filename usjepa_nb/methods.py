"""What is compared: the methods by name, the description of one run, and the untrained objective it starts from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from usjepa_nb import objectives, weights
from usjepa_nb.controls import FrameEncoder, ImageNet, Supervised, UNet
from usjepa_nb.profile import END_TO_END, ROOT, Profile

METHODS = {"prior": "shape prior", "random": "frozen random encoder", "initial": "initial weights, not adapted",
           "imagenet": "ImageNet ViT, frame by frame",
           "videomae": "VideoMAE", "vjepa": "V-JEPA", "vjepa_ll": "V-JEPA + LL", "finetuned": "fine-tuned",
           "teacher": "SALT's teacher, pixels under V-JEPA's masks", "salt": "SALT",
           "supervised": "supervised, end to end", "unet": "U-Net, end to end"}
UNTRAINED = ("random", "initial", "imagenet")
PRETRAINED = ("videomae", "vjepa", "vjepa_ll", "teacher", "salt")
ADAPTED = ("vjepa", "vjepa_ll", "finetuned")  # what λ and frozen blocks mean something for
# Settings that cannot change a run's weights, or (devices: each draws masks of its own) only as chance does, are left
# out of its description, so that it is not made twice.
NEVER = ("name", "unlabelled", "sampling", "accelerator", "one_pass", "compile", "devices", "log_every", "finetune_lr",
         "supervised_steps", "supervised_lr", "videomae_steps", "videomae_lr",
         "probe_epochs", "probe_min_steps", "probe_batch", "probe_lr", "probe_width")
OF_VJEPA = ("predictor_width", "predictor_depth", "predictor_heads", "init", "mask", "hidden", "short_range",
            "long_range", "target_layers", "centre", "beta", "variance", "pairs", "ll_on", "ema", "encoder_lr")
OF_VIDEOMAE = ("decoder_width", "decoder_depth", "decoder_heads", "decoder_positions", "init_videomae", "tube_ratio")
OF_LL = ("pairs", "ll_on")
OF_TEACHER = ("teacher_width", "teacher_depth", "teacher_heads", "teacher_steps")
OF_SALT = ("teacher", "init_student", *OF_TEACHER)
MASKS = ("mask", "hidden", "short_range", "long_range")
# What a method leaves out beside those: the settings of the others.
LEAVES = {"videomae": OF_VJEPA + OF_SALT, "vjepa": OF_VIDEOMAE + OF_LL + OF_SALT, "vjepa_ll": OF_VIDEOMAE + OF_SALT,
          "finetuned": OF_VIDEOMAE + OF_SALT, "initial": OF_VIDEOMAE + OF_LL + OF_SALT,
          "teacher": (*(k for k in OF_VJEPA if k not in MASKS), "decoder_positions", "init_videomae", "tube_ratio",
                      "teacher", "init_student", "width", "depth", "heads"),
          "salt": OF_VIDEOMAE + ("init", "ema", "encoder_lr", "teacher_steps")}


def describe(lab, method: str, lam: float = 1.0, freeze: int = 0, fraction: int = 100) -> dict:
    """The description that a run's folder is hashed from. For "finetuned", lam and freeze are those of the V-JEPA
    that it starts from. `fraction` counts where a run sees that share (%) of the training patients alone: their labels
    in what learns end to end, their images in pre-training where the profile says so (`unlabelled: fraction`).

    Raises:
        ValueError: an unknown method, or a lam or freeze that the method does not have.
    """
    if method not in METHODS or method == "prior":
        known = ", ".join(m for m in METHODS if m != "prior")
        raise ValueError(f"method {method!r} has no encoder: choose one of {known}")
    if not 0 <= lam <= 1 or (lam != 1 and method not in ("vjepa_ll", "finetuned", "salt")):
        raise ValueError(f"lam = {lam} is not possible for {method!r}: 0…1 for vjepa_ll and salt, 1 for all others")
    if freeze and method not in ADAPTED:
        raise ValueError(f"freeze = {freeze} is not possible for {method!r}: only V-JEPA freezes blocks, choose 0")
    p = lab.profile
    leave = NEVER + LEAVES.get(method, OF_VJEPA + OF_VIDEOMAE + OF_SALT)
    if method == "salt" and lam == 1:
        leave += OF_LL
    settings = {k: v for k, v in dataclasses.asdict(p).items() if k not in leave}
    few = method in END_TO_END or (p.unlabelled == "fraction" and fraction < 100 and method in PRETRAINED)
    if p.sampling == "balanced" and method in PRETRAINED:
        settings["sampling"] = p.sampling
    if method == "videomae":
        settings |= {"steps": p.videomae_steps, "lr": p.videomae_lr}
    if method == "teacher":
        settings |= {"steps": p.teacher_steps, "lr": p.videomae_lr}
    if method == "salt":
        settings["encoder_lr"] = 1.0
        if p.teacher == "pixels":
            settings["teacher"] = {k: describe(lab, "teacher")[k] for k in ("settings", "init")}
    if method in ADAPTED + ("initial",) and p.init == "videomae":
        settings["videomae"] = {k: describe(lab, "videomae")[k] for k in ("settings", "init")}
    if method == "imagenet":
        settings["model"] = f"{FrameEncoder.MODEL}, grey values as it learned them"
    if method == "finetuned":
        settings["base"] = {"steps": p.steps, "lr": p.lr, "encoder_lr": p.encoder_lr}
        settings["encoder_lr"] = 1.0
        if p.sampling == "balanced" or (p.unlabelled == "fraction" and fraction < 100):  # so is the V-JEPA below it
            settings["base"] |= {"sampling": p.sampling, "unlabelled": p.unlabelled}
    if method in END_TO_END:  # their decoder is trained with them
        settings |= {"steps": p.supervised_steps, "probe_width": p.probe_width,
                     "lr": p.finetune_lr if method == "finetuned" else p.supervised_lr}
    files = {key: contents(ROOT / getattr(p, key), (ROOT / getattr(p, key)).stat().st_mtime_ns)
             for key in ("init", "init_videomae", "teacher", "init_student")
             if key in settings and (ROOT / getattr(p, key)).is_file()}
    return {"method": method, "lam": float(lam), "freeze": freeze, "seed": lab.seed, "data": lab.store.data_hash,
            "code": version("usjepa-nb"), "init": files, "frames": lab.frames,
            "fraction": fraction if few else None, "settings": settings}


@functools.lru_cache
def contents(path: Path, changed: int) -> str:
    """What names the contents of a checkpoint, read once as long as its time of change stays: gigabytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def label(spec: dict) -> str:
    """A method's name as tables print it."""
    text = METHODS["vjepa_ll" if spec["lam"] < 1 else "vjepa"] if spec["method"] in ADAPTED else METHODS[spec["method"]]
    if spec["lam"] < 1:
        text += " + LL" * (spec["method"] == "salt")
        text += f" (λ = {spec['lam']:g})"
    if spec["freeze"]:
        text += f", {spec['freeze']} blocks frozen"
    return text + (f", {METHODS['finetuned']}" if spec["method"] == "finetuned" else "")


def build(lab, spec: dict) -> nn.Module:
    """The untrained objective of a run; weights are drawn from the run's seed, or come from where `init` says."""
    p, method = lab.profile, spec["method"]
    if method == "finetuned":
        base = lab.encoder("vjepa_ll" if spec["lam"] < 1 else "vjepa", spec["lam"], spec["freeze"],
                           spec["fraction"]).encoder
    elif p.init == "videomae" and method in ("initial", "vjepa", "vjepa_ll"):
        base = lab.encoder("videomae", fraction=spec["fraction"] or 100).encoder
    elif method == "salt" and p.teacher == "pixels":
        base = lab.encoder("teacher", fraction=spec["fraction"] or 100).encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["seed"])
        if method == "unet":
            return UNet()
        if method == "imagenet":
            return ImageNet(p, lab.frames)
        if method == "videomae":
            objective = objectives.VideoMAE(p, lab.frames, objectives.make_encoder(p, lab.frames, p.decoder_positions))
            return fill(objective, p.init_videomae, decoder=objective.decoder)
        if method == "teacher":
            return objectives.PixelTeacher(p, lab.frames, objectives.make_encoder(as_teacher(p), lab.frames))
        encoder = objectives.make_encoder(p, lab.frames)
        if method == "salt":
            teacher = objectives.make_encoder(as_teacher(p), lab.frames)
            if p.teacher == "pixels":
                teacher.load_state_dict(base.state_dict())
            else:
                print(*weights.load(ROOT / p.teacher, teacher), sep="\n")
            return fill(objectives.SALT(p, lab.frames, encoder, spec["lam"], 0, teacher), p.init_student)
        if method in ("supervised", "finetuned"):  # supervised: from random weights; the paper does not say
            objective = Supervised(p, lab.frames, encoder)
            if method == "finetuned":
                encoder.load_state_dict(base.state_dict())
            return objective
        objective = objectives.VJEPA(p, lab.frames, encoder, spec["lam"], spec["freeze"])
    if method != "random" and p.init == "videomae":
        encoder.load_state_dict(base.state_dict())
        objective.target_encoder.load_state_dict(base.state_dict())
        return objective
    return objective if method == "random" else fill(objective, p.init, predictor=objective.predictor)


def as_teacher(p: Profile) -> Profile:
    """The profile with the teacher's encoder in place of the student's."""
    return p.replace(width=p.teacher_width, depth=p.teacher_depth, heads=p.teacher_heads,
                     target_layers=min(p.target_layers, p.teacher_depth))


def fill(objective: nn.Module, init: str, **parts: nn.Module) -> nn.Module:
    """Fill encoder (and predictor or decoder) from the checkpoint `init`, reporting every key; "random" leaves all.

    A file of an encoder alone is welcome: the other part then starts at random, and the report says so.
    """
    if init != "random":
        there = weights.parts(ROOT / init)
        for name in parts.keys() - there:
            print(f"{init}: holds no {name}, which starts at random")
        part = None if isinstance(objective, objectives.VJEPA) else "encoder"  # None: the one that is probed
        known = {k: v for k, v in parts.items() if k in there}
        print(*weights.load(ROOT / init, objective.encoder, part=part, **known), sep="\n")
        if isinstance(objective, objectives.VJEPA) and not isinstance(objective, objectives.SALT):
            objective.target_encoder.load_state_dict(objective.encoder.state_dict())
    return objective
