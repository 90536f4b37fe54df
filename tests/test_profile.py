"""Profiles: every shipped one is whole, and a bad setting is refused in one sentence that names it and its file."""

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from usjepa_nb.profile import FOLDER, Profile, ProfileError, load

SHIPPED = sorted(p.stem for p in FOLDER.glob("*.yaml"))
SMOKE = yaml.safe_load((FOLDER / "smoke.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def written(tmp_path):
    """A function that writes settings (smoke's, changed) to own.yaml and returns its path."""

    def write(drop=(), **changes):
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (SMOKE | changes).items() if k not in drop}))
        return str(path)

    return write


# --- what is shipped

def test_the_six_profiles_are_shipped():
    assert SHIPPED == ["paper", "small", "smoke", "tiny", "weights", "weights_ti"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_and_holds_all_keys_in_their_order(name):
    p = load(name)
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert list(yaml.safe_load(text)) == list(SMOKE) == [f.name for f in dataclasses.fields(Profile)][1:]
    assert p.name == name and all(type(getattr(p, k)) is float for k in ("lr", "ema", "spacing"))


@pytest.mark.parametrize("name", SHIPPED)
def test_no_key_stands_twice_in_a_shipped_file(name):
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    keys = [line.split(":")[0] for line in lines if line and line[0] not in "# "]
    assert len(keys) == len(set(keys)) == len(SMOKE)


def test_the_paper_profile_is_the_paper():
    p = load("paper")
    assert (p.width, p.depth, p.heads, p.patch, p.tubelet, p.size, p.frames) == (1024, 24, 16, 16, 2, 224, 16)
    assert p.grid() == (8, 14, 14) and p.tubelet_size == (2, 16, 16)
    assert (p.clip_rule, p.frame_step, p.target_layers, p.centre, p.beta) == ("step", 4, 1, 0.0, 0.0)


# --- by hand

def test_grid_and_overrides():
    p = load("smoke", frames=6, size=32)
    assert p.grid() == (3, 4, 4) and p.grid(4) == (2, 4, 4) and p.tubelet_size == (2, 8, 8)
    assert p.replace(steps=9).steps == 9 and load("smoke").steps == SMOKE["steps"]


def test_a_file_of_ones_own_gives_its_name(written):
    p = load(written(steps=7))
    assert (p.name, p.steps, p.lr) == ("own", 7, SMOKE["lr"])


def test_a_whole_number_may_stand_for_a_float_and_is_one_then(written):
    p = load(written(lr=1, long_range=[2, 1]))
    assert type(p.lr) is float and [type(v) for v in p.long_range] == [int, float]


# --- refusals; in each the file, the setting, and what to do

@pytest.mark.parametrize("change, message", [
    ({"stpes": 3}, r"own.yaml: unknown setting stpes; see profiles/tiny.yaml for all names"),
    ({"steps": "300"}, r"own.yaml: steps = '300' should be of type int"),
    ({"steps": 300.0}, r"own.yaml: steps = 300.0 should be of type int"),
    ({"steps": True}, r"own.yaml: steps = True should be of type int"),
    ({"steps": None}, r"own.yaml: steps = None should be of type int"),
    ({"lr": "1e-3"}, r"own.yaml: lr = '1e-3' should be of type float \(YAML reads 1e-3 as text: write 1.0e-3\)"),
    ({"lr": False}, r"own.yaml: lr = False should be of type float"),
    ({"sector_aware": 1}, r"own.yaml: sector_aware = 1 should be of type bool"),
    ({"init": 5}, r"own.yaml: init = 5 should be of type str"),
    ({"augmentation": False}, r"own.yaml: augmentation = False should be of type str"),  # YAML's "no"
    ({"short_range": [8]}, r"own.yaml: short_range = \[8\] should be of type tuple"),
    ({"short_range": [8, 0.15, 1]}, r"own.yaml: short_range = \[8, 0.15, 1\] should be of type tuple"),
    ({"short_range": [1.5, 0.15]}, r"own.yaml: short_range = \[1.5, 0.15\] should be of type tuple"),
])
def test_a_misspelt_or_mistyped_setting_is_named_with_its_file(written, change, message):
    with pytest.raises(ProfileError, match=message):
        load(written(**change))


@pytest.mark.parametrize("change, message", [
    ({"steps": 0}, "steps = 0 is not possible: it must be positive"),
    ({"batch": -4}, "batch = -4 is not possible: it must be positive"),
    ({"lr": -1.0e-3}, "lr = -0.001 is not possible"),
    ({"lr": math.nan}, "lr = nan is not possible"),
    ({"clip": math.inf}, "clip = inf is not possible"),
    ({"size": 60}, "size = 60 is not possible: it must be a multiple of patch"),
    ({"frames": 7}, "frames = 7 is not possible: it must be a multiple of tubelet"),
    ({"patch": 12, "size": 60}, "patch = 12 is not possible: it must be a power of two"),
    ({"warmup": 0.99, "steps": 10}, r"warmup = 0.99 is not possible: it leaves no step of steps \(10\)"),
    ({"warmup": 1.0}, r"warmup = 1.0 is not possible: it must lie in \[0, 1\)"),
    ({"ema": 1.0}, "ema = 1.0 is not possible"),
    ({"centre": 1.0}, "centre = 1.0 is not possible"),
    ({"beta2": 1.5}, "beta2 = 1.5 is not possible"),
    ({"tube_ratio": 90.0}, "tube_ratio = 90.0 is not possible"),
    ({"target_layers": 5}, r"target_layers = 5 is not possible: it must lie in 1…depth \(2\)"),
    ({"heads": 3}, "heads = 3 is not possible: a width of 32 does not divide into 3 heads"),
    ({"short_range": [0, 0.15]}, r"short_range = \(0, 0.15\) is not possible"),
    ({"long_range": [2, 1.5]}, r"long_range = \(2, 1.5\) is not possible"),
    ({"devices": 3}, r"batch = 4 is not possible: it must be a multiple of devices \(3\)"),
    ({"clip_rule": "covre"}, "clip_rule = 'covre' is not possible: choose one of cover, step"),
    ({"mask_rule": "last"}, "mask_rule = 'last' is not possible: choose one of random, first, pad"),
    ({"augmentation": "wild"}, "augmentation = 'wild' is not possible: choose one of none, mild, published"),
    ({"mask": "blocks"}, "mask = 'blocks' is not possible: choose one of multiblock, tube"),
    ({"ll_on": "encoder"}, "ll_on = 'encoder' is not possible: choose one of predicted, context, unplaced"),
    ({"decoder_positions": "learned"}, "decoder_positions = 'learned' is not possible: choose one of sincos1d, sincos"),
    ({"hidden": 1.0}, r"hidden = 1.0 is not possible: it must lie in \[0, 1\)"),
    ({"hidden": 0.0}, "hidden = 0.0 is not possible: it must be positive"),
    ({"variance": -0.1}, "variance = -0.1 is not possible: it must be positive"),
    ({"phantom_seed": -1}, "phantom_seed = -1 is not possible: it must be positive"),
    ({"videomae_steps": 0}, "videomae_steps = 0 is not possible: it must be positive"),
    ({"videomae_lr": 0.0}, "videomae_lr = 0.0 is not possible: it must be positive"),
    ({"finetune_lr": 0.0}, "finetune_lr = 0.0 is not possible: it must be positive"),
    ({"precision": "fp16"}, "precision = 'fp16' is not possible: choose one of 32-true"),
    ({"accelerator": "gpu"}, "accelerator = 'gpu' is not possible: choose one of auto, cpu, cuda"),
])
def test_a_setting_out_of_range_is_named_with_the_remedy(written, change, message):
    with pytest.raises(ProfileError, match=f"profile 'own': {message}"):
        load(written(**change))
    with pytest.raises(ProfileError, match=f"profile 'smoke': {message}"):
        load("smoke", **change)


@pytest.mark.parametrize("name", ["phantom_seed", "centre", "beta", "variance", "ema", "warmup", "lr_end",
                                  "weight_decay", "weight_decay_end", "probe_min_steps"])
def test_what_may_be_zero_may(name):
    assert getattr(load("smoke", **{name: 0}), name) == 0


@pytest.mark.parametrize("name, values", [("mask", ("multiblock", "tube")),
                                          ("ll_on", ("predicted", "context", "unplaced")),
                                          ("decoder_positions", ("sincos1d", "sincos3d"))])
def test_what_there_is_to_choose_may_be_chosen(name, values):
    assert tuple(getattr(load("smoke", **{name: value}), name) for value in values) == values


@pytest.mark.parametrize("name", list(SMOKE))
def test_a_missing_setting_is_named(written, name):
    with pytest.raises(ProfileError, match=rf"own.yaml: setting {name} is missing; see profiles/tiny.yaml"):
        load(written(drop=[name]))


@pytest.mark.parametrize("content, message", [
    (b"steps: [1, 2\nlr: {", "is not readable as YAML"),
    (b"\xff\xfe\x00steps", "is not readable as YAML"),
    (b"steps: 2024-02-31", "is not readable as YAML"),  # a date that does not exist
    (b"[" * 5000, "is not readable as YAML"),
    (b"steps: !!python/object/apply:os.getcwd []", "is not readable as YAML"),
    (b"", "holds no settings"),
    (b"- steps\n- lr\n", "holds no settings"),
    (b"just text", "holds no settings"),
    (b"1: 2", "unknown setting 1"),
])
def test_a_file_that_is_no_profile_is_named(tmp_path, content, message):
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=rf"own.yaml: {message}.*profiles/tiny.yaml"):
        load(str(path))


@given(st.binary(max_size=80) | st.text(alphabet="steplr:[]{}-&*!|>%@?#'\" \n019.e", max_size=80).map(str.encode))
def test_no_content_of_a_file_raises_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"fuzz.yaml: "):
        load(str(path))


def test_an_unknown_profile_names_those_there_are():
    with pytest.raises(ProfileError, match=r"big.yaml: no such profile; choose one of paper, small, smoke, tiny, "
                       "weights, weights_ti, or"):
        load("big")
    with pytest.raises(ProfileError, match=r"no such profile"):
        load(str(Path("nowhere") / "own.yaml"))


def test_overrides_are_checked_like_the_file():
    with pytest.raises(ProfileError, match=r"smoke.yaml: unknown setting stpes"):
        load("smoke", stpes=3)
    with pytest.raises(ProfileError, match=r"steps = '3' should be of type int"):
        load("smoke", steps="3")
    with pytest.raises(ProfileError, match=r"profile 'smoke' has no setting a, stpes; see profiles/tiny.yaml"):
        load("smoke").replace(stpes=3, a=1)
    with pytest.raises(ProfileError, match=r"steps = 0 is not possible"):
        load("smoke").replace(steps=0)


def test_v_jepa_cannot_start_from_a_videomae_that_counts_its_tokens():
    with pytest.raises(ProfileError, match=r"init = 'videomae' is not possible: .*decoder_positions to sincos3d"):
        load("smoke", init="videomae", decoder_positions="sincos1d")
