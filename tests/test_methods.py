"""The methods: what names a run, what a table calls it, and which weights it starts from."""

import copy

import pytest
import torch
from smoke_lab import beside, smoke_lab

from usjepa_nb import linear, methods, objectives, weights
from usjepa_nb.dataset import digest
from usjepa_nb.pretrain import save, states
from usjepa_nb.vit import sincos3d

OTHER = {"predictor_width": 64, "predictor_depth": 2, "predictor_heads": 1, "init": "a.pt", "mask": "tube",
         "hidden": 0.6, "short_range": (7, 0.15), "long_range": (2, 0.6), "target_layers": 1, "centre": 0.0,
         "beta": 0.5, "variance": 0.1, "ema": 0.5, "encoder_lr": 0.5, "pairs": 99, "ll_on": "context",
         "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 1, "decoder_positions": "sincos1d",
         "init_videomae": "a.pt", "tube_ratio": 0.8, "width": 64, "batch": 2, "steps": 7, "lr": 0.5,
         "videomae_steps": 7, "videomae_lr": 0.5, "supervised_steps": 5, "supervised_lr": 0.5, "finetune_lr": 0.25,
         "probe_width": 8, "probe_lr": 0.5, "log_every": 1, "unlabelled": "fraction",
         "teacher": "a.pt", "init_student": "a.pt", "teacher_width": 64,
         "teacher_depth": 3, "teacher_heads": 4, "teacher_steps": 7}
LL, COMMON = {"pairs", "ll_on"}, {"width", "batch"}
SALT, MASKS = set(methods.OF_SALT), set(methods.MASKS)
NOT_SALTS = {"init", "ema", "encoder_lr"}
VJEPA = set(methods.OF_VJEPA) - LL
VIDEOMAE, LABELS = set(methods.OF_VIDEOMAE), {"supervised_steps", "probe_width"}
MATTERS = {  # method: what must make another run, what must not
    ("unet", 1.0): (COMMON | {"supervised_steps", "supervised_lr"},
                    VJEPA | LL | VIDEOMAE | {"steps", "lr", "finetune_lr"}),
    ("supervised", 1.0): (COMMON | LABELS | {"supervised_lr"}, VJEPA | LL | VIDEOMAE | {"steps", "lr", "finetune_lr"}),
    ("finetuned", 1.0): (COMMON | VJEPA | LABELS | {"finetune_lr", "steps", "lr"}, VIDEOMAE | {"supervised_lr"}),
    ("finetuned", 0.5): (COMMON | VJEPA | LL | LABELS | {"finetune_lr", "steps", "lr"}, VIDEOMAE | {"supervised_lr"}),
    ("vjepa", 1.0): (COMMON | VJEPA | {"steps", "lr"},
                     SALT | VIDEOMAE | LL | LABELS | {"supervised_lr", "finetune_lr"}),
    ("vjepa_ll", 0.5): (COMMON | VJEPA | LL | {"steps", "lr"}, VIDEOMAE | LABELS | {"supervised_lr", "finetune_lr"}),
    ("videomae", 1.0): (COMMON | VIDEOMAE | {"videomae_steps", "videomae_lr"},
                        VJEPA | LL | LABELS | {"steps", "lr", "supervised_lr", "finetune_lr"}),
    ("initial", 1.0): ({"width", "init"}, VIDEOMAE | LL | LABELS | {"supervised_lr", "finetune_lr"}),
    ("salt", 1.0): (COMMON | (VJEPA - NOT_SALTS) | SALT | {"steps", "lr", "videomae_lr", "decoder_width"},
                    LL | NOT_SALTS | LABELS | {"tube_ratio", "decoder_positions", "init_videomae", "videomae_steps"}),
    ("salt", 0.5): (COMMON | (VJEPA - NOT_SALTS) | SALT | LL | {"steps", "lr"}, NOT_SALTS | LABELS | {"tube_ratio"}),
    ("teacher", 1.0): ({"batch", "teacher_width", "teacher_depth", "teacher_heads", "teacher_steps", "videomae_lr",
                        "decoder_width"} | MASKS,
                       (VJEPA - MASKS) | LL | LABELS | {"steps", "lr", "width", "teacher", "init_student", "tube_ratio",
                                                        "videomae_steps"}),
    ("random", 1.0): ({"width"}, SALT | VJEPA | LL | VIDEOMAE | LABELS | {"supervised_lr", "finetune_lr"}),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Runs of two steps in a cache of this module's own."""
    return beside(smoke_lab(tmp_path_factory), tmp_path_factory.mktemp("methods"), steps=2, videomae_steps=2,
                  supervised_steps=2)


def variant(lab, **changes):
    other = copy.copy(lab)
    other.profile, other.loaded = lab.profile.replace(**changes), {}
    return other


def name(lab, method, lam=1.0, **options):
    return digest(lab.spec(method, lam, **options))


def same(a, b) -> bool:
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# --- what names a run

@pytest.mark.parametrize("method, lam", MATTERS)
def test_a_run_is_named_after_the_settings_that_shape_it_and_no_others(lab, method, lam):
    before = name(lab, method, lam)
    matters, does_not = MATTERS[method, lam]
    changed = {key for key, value in OTHER.items() if name(variant(lab, **{key: value}), method, lam) != before}
    assert matters <= changed and not changed & (does_not | {"probe_lr", "log_every", "unlabelled"})


@pytest.mark.parametrize("method, lam", MATTERS)
def test_labels_count_for_those_who_learn_from_them(lab, method, lam):
    assert (name(lab, method, lam, fraction=10) != name(lab, method, lam)) is (method in methods.END_TO_END)


def test_a_fine_tuned_run_is_named_after_the_v_jepa_that_it_starts_from(lab):
    names = {name(lab, "finetuned", lam, freeze=freeze) for lam in (1.0, 0.5, 0.25) for freeze in (0, 1)}
    assert len(names) == 6


@pytest.mark.parametrize("change", [{"sampling": "balanced"}, {"unlabelled": "fraction"}])
def test_a_fine_tuned_run_knows_what_its_v_jepa_saw(lab, change):
    assert name(variant(lab, **change), "finetuned", fraction=10) != name(lab, "finetuned", fraction=10)


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m not in (*methods.ADAPTED, "prior")])
def test_lam_and_frozen_blocks_are_refused_where_they_mean_nothing(lab, method):
    if method != "salt":
        with pytest.raises(ValueError, match=f"lam = 0.5 is not possible for '{method}'"):
            lab.spec(method, 0.5)
    with pytest.raises(ValueError, match=f"freeze = 1 is not possible for '{method}'"):
        lab.spec(method, freeze=1)


READERS = {"init": {"vjepa", "vjepa_ll", "finetuned", "initial"}, "init_videomae": {"videomae"}, "teacher": {"salt"},
           "init_student": {"salt"}}


@pytest.mark.parametrize("key", READERS)
def test_another_file_under_the_same_name_is_another_run(lab, tmp_path, key):
    path, names = tmp_path / "start.pt", []
    mine = variant(lab, **{key: str(path)})
    for content in (b"one", b"two"):
        path.write_bytes(content)
        names.append({m: name(mine, m) for m, _ in MATTERS})
    assert {m for m in names[0] if names[0][m] != names[1][m]} == READERS[key]


def test_another_file_under_videomae_is_another_v_jepa_from_videomae(lab, tmp_path):
    path, names = tmp_path / "start.pt", []
    mine = variant(lab, init="videomae", init_videomae=str(path))
    for content in (b"one", b"two"):
        path.write_bytes(content)
        names.append({m: name(mine, m) for m in ("videomae", "vjepa", "vjepa_ll", "finetuned", "initial")})
    assert not set(names[0].values()) & set(names[1].values())


@pytest.mark.parametrize("method", ["vjepa", "vjepa_ll", "finetuned", "initial"])
def test_what_starts_from_videomae_is_named_after_its_settings(lab, method):
    mine = variant(lab, init="videomae")
    for key in {*methods.OF_VIDEOMAE, "videomae_steps", "videomae_lr"} - {"decoder_positions"}:
        assert name(variant(mine, **{key: OTHER[key]}), method) != name(mine, method), key
    for other in ("random", "supervised", "unet", "videomae"):
        assert name(mine, other) == name(lab, other)


# --- labels

@pytest.mark.parametrize("arguments, text", [
    (("vjepa",), "V-JEPA"), (("vjepa", 1.0, 1), "V-JEPA, 1 blocks frozen"),
    (("vjepa_ll", 0.25), "V-JEPA + LL (λ = 0.25)"), (("vjepa_ll", 0), "V-JEPA + LL (λ = 0)"),
    (("finetuned",), "V-JEPA, fine-tuned"),
    (("finetuned", 0.25, 1), "V-JEPA + LL (λ = 0.25), 1 blocks frozen, fine-tuned"),
    (("unet",), "U-Net, end to end"), (("initial",), "initial weights, not adapted"),
])
def test_a_label_says_which_run_it_is(lab, arguments, text):
    assert methods.label(lab.spec(*arguments)) == text


# --- where weights come from

@pytest.mark.parametrize("base, lam, freeze", [("vjepa", 1.0, 0), ("vjepa_ll", 0.25, 1)])
def test_fine_tuning_starts_from_the_v_jepa_run_bit_for_bit(lab, base, lam, freeze):
    spec = lab.spec("finetuned", lam, freeze, 10)
    start, run = lab.objective(spec), lab.encoder(base, lam, freeze)
    assert same(start.encoder, run.encoder)
    assert not same(start.encoder, lab.encoder("random").encoder)
    assert same(start.probe, lab.objective(lab.spec("supervised")).probe)
    assert all(p.requires_grad for p in start.parameters())  # what was frozen then is not now
    before = copy.deepcopy(run.encoder.state_dict())
    tuned = lab.encoder("finetuned", lam, freeze, 10)
    assert not same(tuned.encoder, before) and same(run.encoder, before)  # a copy was tuned


def test_the_supervised_control_starts_from_random_weights_whatever_init(lab, tmp_path):
    mine = variant(lab, init=str(tmp_path / "none.pt"))
    assert same(mine.objective(mine.spec("supervised")).encoder, lab.encoder("random").encoder)
    assert same(mine.encoder("random").encoder, lab.encoder("random").encoder)


@pytest.mark.parametrize("method", ["initial", "vjepa"])
def test_encoder_target_and_predictor_come_from_the_file(lab, capsys, method):
    path = lab.encoder("vjepa").folder / "checkpoint.pt"
    file, mine = weights.read(path), variant(lab, init=str(path))
    objective = mine.objective(mine.spec(method))
    assert same(objective.encoder, file["target_encoder"]) and same(objective.target_encoder, file["target_encoder"])
    assert same(objective.predictor, file["predictor"])
    assert "at random" not in capsys.readouterr().out
    if method == "initial":
        run = mine.encoder("initial")
        assert same(run.encoder, file["target_encoder"]) and not len(run.history) and not run.encoder.training


def test_a_file_without_a_predictor_leaves_it_random_and_says_so(lab, tmp_path, capsys):
    file = weights.read(lab.encoder("vjepa").folder / "checkpoint.pt")
    torch.save({"target_encoder": file["target_encoder"]}, tmp_path / "encoder.pt")
    mine = variant(lab, init=str(tmp_path / "encoder.pt"))
    objective, fresh = mine.objective(mine.spec("vjepa_ll", 0.5, 1)), lab.objective(lab.spec("vjepa_ll", 0.5, 1))
    out = capsys.readouterr().out
    assert "encoder.pt: holds no predictor, which starts at random" in out and "0 missing, 0 left over" in out
    assert same(objective.encoder, file["target_encoder"]) and same(objective.target_encoder, file["target_encoder"])
    assert same(objective.predictor, fresh.predictor) and same(objective.head, fresh.head)
    assert [p.requires_grad for p in objective.parameters()] == [p.requires_grad for p in fresh.parameters()]


@pytest.mark.parametrize("method, lam", [("vjepa", 1.0), ("vjepa_ll", 0.5), ("initial", 1.0)])
def test_init_videomae_starts_from_the_videomae_run(lab, method, lam):
    mine = variant(lab, init="videomae")
    objective, run = mine.objective(mine.spec(method, lam)), mine.encoder("videomae")
    assert same(objective.encoder, run.encoder) and same(objective.target_encoder, run.encoder)
    assert not same(run.encoder, lab.encoder("random").encoder)
    assert not any(p.requires_grad for p in objective.target_encoder.parameters())
    if method != "initial":
        assert not same(mine.encoder(method, lam).encoder, run.encoder)  # and goes on from there


def test_a_videomae_run_may_be_given_by_its_checkpoint(lab):
    named, path = variant(lab, init="videomae"), lab.encoder("videomae").folder / "checkpoint.pt"
    given = variant(lab, init=str(path), teacher=str(path), teacher_width=lab.profile.width,
                    teacher_depth=lab.profile.depth, teacher_heads=lab.profile.heads)
    assert same(given.objective(given.spec("vjepa")).encoder, named.objective(named.spec("vjepa")).encoder)
    assert same(given.objective(given.spec("salt")).target_encoder, lab.encoder("videomae").encoder)


def test_init_videomae_leaves_videomae_and_random_alone(lab):
    mine = variant(lab, init="videomae")
    assert same(mine.encoder("random").encoder, lab.encoder("random").encoder)
    assert same(mine.objective(mine.spec("videomae")), lab.objective(lab.spec("videomae")))


@pytest.mark.parametrize("kind", ["sincos3d", "sincos1d"])
def test_the_positions_of_videomae_are_those_of_the_profile(lab, kind):
    mine = variant(lab, decoder_positions=kind)
    objective = mine.objective(mine.spec("videomae"))
    for part in (objective.encoder, objective.decoder):
        assert torch.equal(part.pos_embed, sincos3d((2, 4, 4), 32)) is (kind == "sincos3d")
    vjepa = mine.objective(mine.spec("vjepa"))
    assert torch.equal(vjepa.encoder.pos_embed, sincos3d((2, 4, 4), 32))


@pytest.mark.parametrize("method, probed", [("vjepa", "target_encoder"), ("salt", "encoder"), ("videomae", "encoder")])
def test_a_checkpoint_says_which_encoder_is_probed(lab, tmp_path, method, probed):
    objective = lab.objective(lab.spec(method))
    with torch.no_grad():  # teacher and student apart
        for k, p in enumerate(objective.parameters()):
            p += 0.1 * (k + 1)
    save(tmp_path / "run.pt", states(objective))
    assert same(linear.load_encoder(str(tmp_path / "run.pt"), lab.profile, "sincos3d"), getattr(objective, probed))


@pytest.mark.parametrize("whole", [True, False])
def test_videomae_takes_encoder_and_decoder_from_a_published_file(lab, tmp_path, capsys, whole):
    p = lab.profile
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        other = objectives.VideoMAE(p, 4, objectives.make_encoder(p, 4, "sincos1d"))
    top = ("mask_token", "encoder_to_decoder.weight")
    model = {f"encoder.{k}": v for k, v in other.encoder.state_dict().items()}
    if whole:
        model |= {k if k in top else f"decoder.{k}": v for k, v in other.decoder.state_dict().items()}
    torch.save({"model": model}, tmp_path / "videomae.pth")
    mine = variant(lab, init_videomae=str(tmp_path / "videomae.pth"), decoder_positions="sincos1d")
    objective = mine.objective(mine.spec("videomae"))
    assert same(objective.encoder, other.encoder) and same(objective.decoder, other.decoder) is whole
    assert ("holds no decoder, which starts at random" in capsys.readouterr().out) is not whole


@pytest.mark.parametrize("positions", ["sincos1d", "sincos3d"])
def test_videomae_goes_on_from_a_checkpoint_of_its_own(lab, positions):
    own = variant(lab, decoder_positions=positions)
    trained = own.encoder("videomae").objective
    path = own.folder(own.spec("videomae")) / "checkpoint.pt"
    assert same(variant(own, init_videomae=str(path)).objective(own.spec("videomae")), trained)
    other = {"sincos1d": "sincos3d", "sincos3d": "sincos1d"}[positions]
    wrong = variant(lab, decoder_positions=other, init_videomae=str(path))
    with pytest.raises(weights.WeightsError, match=f"was trained with {positions} positions"):
        wrong.objective(wrong.spec("videomae"))


# --- the static teacher

def test_salts_teacher_learns_pixels_under_v_jepas_masks(lab, monkeypatch):
    teacher = variant(lab, mask="multiblock").objective(lab.spec("teacher"))
    asked = []
    monkeypatch.setattr(objectives, "jepa_masks", lambda *a, real=objectives.jepa_masks: asked.append(1) or real(*a))
    grey, _ = lab.clips(lab.store.rows("train")[:2])
    assert set(teacher(torch.from_numpy(grey).float(), torch.Generator().manual_seed(0))) == {"loss"} and asked
    assert torch.equal(teacher.encoder.pos_embed, sincos3d(teacher.grid, teacher.encoder.width))


def test_the_student_learns_from_the_trained_teacher_which_stays_as_it_is(lab):
    small = variant(lab, teacher_width=48, teacher_depth=1, teacher_heads=2)
    teacher, run = small.encoder("teacher").encoder, small.encoder("salt")
    assert same(run.objective.target_encoder, teacher) and len(teacher.blocks) == 1 and teacher.width == 48
    assert run.encoder is run.objective.encoder and run.encoder.width == lab.profile.width
    before = small.objective(small.spec("salt")).encoder
    assert not same(run.encoder, before)
    assert same(before, small.objective(small.spec("random")).encoder)  # the student starts from random weights
    assert run.objective.predictor.predictor_proj.out_features == 48


def test_any_checkpoint_can_be_the_teacher_and_the_students_start(lab):
    path = lab.folder(lab.spec("vjepa")) / "checkpoint.pt"
    wanted = lab.encoder("vjepa").encoder
    mine = variant(lab, teacher=str(path), init_student=str(path))
    salt = mine.objective(mine.spec("salt"))
    assert same(salt.target_encoder, wanted) and same(salt.encoder, wanted)
    assert not any(v.requires_grad for v in salt.target_encoder.parameters())


def test_ll_can_be_added_to_salt(lab):
    run = lab.encoder("salt", 0.25)
    assert run.label == "SALT + LL (λ = 0.25)" and run.history.ll.iloc[-1] > 0 and "lam0.25" in run.folder.name
    assert run.objective.head is not None and lab.encoder("salt").objective.head is None
