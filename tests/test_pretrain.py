"""Training: the same again however often it is stopped, targets and EMA by the formula, monitors by hand."""

import contextlib
import copy
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from smoke_lab import beside, smoke_lab
from torch import nn
from torch.nn import functional as F

from usjepa_nb import objectives, pretrain, probe, weights
from usjepa_nb.augment import standardise
from usjepa_nb.masking import sector_tokens
from usjepa_nb.profile import load


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


def variant(lab, **changes):
    """The same lab with other settings (that leave the data alone)."""
    other = copy.copy(lab)
    other.profile = lab.profile.replace(**changes)
    return other


def objective_of(lab, method="vjepa_ll", freeze=0):
    return lab.objective(lab.spec(method, 0.25 if method == "vjepa_ll" else 1.0, freeze))


def train(lab, path, method="vjepa_ll", freeze=0, objective=None, batches=None, watch=None):
    """Train on the CPU from the checkpoint `path`, if any -> (objective, history)."""
    objective = objective or objective_of(lab, method, freeze)
    batches = batches or lab.batches(lab.store.rows("train"))
    rows = pretrain.train(objective, batches, lab.profile, path, seed=0, watch=watch,
                          fabric=Fabric(accelerator="cpu", devices=1))
    return objective, list(rows)


def same(a, b) -> bool:
    """Bit for bit, whatever the containers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def grey(lab, n=4, split="train"):
    return torch.from_numpy(lab.clips(lab.store.rows(split)[:n])[0]).float()


class Toy(objectives.Objective):
    """An objective of one weight and one bias: loss = (w · batch + b)²; `spoil` maps the loss."""

    def __init__(self, spoil=lambda loss, w: loss):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.spoil, self.seen = spoil, []

    def prepare(self, batch, generator):
        return batch

    def losses(self, prepared):
        return {"loss": self.spoil(self.layer(prepared).square().mean(), self.layer.weight)}

    def after_step(self, step):
        self.seen.append(step)


def ones(generator, n):
    return torch.ones(n, 1)


# --- the same again

@pytest.fixture(scope="module")
def undisturbed(lab, tmp_path_factory):
    """Method -> checkpoint of a run of 7 steps, saved every 2, that nobody disturbed."""
    folder, done = tmp_path_factory.mktemp("undisturbed"), {}
    for method in ("vjepa_ll", "videomae"):
        train(variant(lab, steps=7, log_every=2), folder / f"{method}.pt", method, watch=stds)
        done[method] = weights.read(folder / f"{method}.pt")
    return done


def stds(objective):
    return {"std": float(next(objective.features.parameters()).detach().std())}


@pytest.mark.parametrize("method", ["vjepa_ll", "videomae"])
def test_two_runs_agree_bit_for_bit(lab, undisturbed, tmp_path, method):
    torch.manual_seed(99)  # whatever happened before has no part in it
    random.seed(99), np.random.seed(99)
    train(variant(lab, steps=7, log_every=2), tmp_path / "again.pt", method, watch=stds)
    assert same(weights.read(tmp_path / "again.pt"), undisturbed[method])


def test_another_seed_is_another_run(lab, undisturbed, tmp_path):
    other = variant(lab, steps=7, log_every=2)
    objective = objective_of(lab)
    list(pretrain.train(objective, lab.batches(lab.store.rows("train")), other.profile, tmp_path / "c.pt", seed=1,
                        fabric=Fabric(accelerator="cpu", devices=1)))
    assert not same(weights.read(tmp_path / "c.pt")["encoder"], undisturbed["vjepa_ll"]["encoder"])


@pytest.mark.parametrize("method", ["vjepa_ll", "videomae"])
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_interrupted_at_any_steps_it_ends_as_if_it_had_not_been(lab, undisturbed, tmp_path_factory, method, stops):
    path = tmp_path_factory.mktemp("stopped") / "checkpoint.pt"
    real = lab.batches(lab.store.rows("train"))
    for stop in stops:
        left = iter(range(stop))

        def batches(generator, n, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(generator, n)

        try:
            train(variant(lab, steps=7, log_every=2), path, method, batches=batches, watch=stds)
        except KeyboardInterrupt:
            pass
    _, history = train(variant(lab, steps=7, log_every=2), path, method, watch=stds)
    assert same(weights.read(path), undisturbed[method]) and same(history, undisturbed[method]["history"])


KILLED = """
import sys, time
import smoke_lab
from usjepa_nb.runs import Lab
lab = Lab("smoke", cache=sys.argv[1], steps=12, videomae_steps=12, log_every=1)
real = lab.batches
def batches(rows, device):
    batch = real(rows, device)
    def slow(generator, n):
        time.sleep(0.1)
        return batch(generator, n)
    return slow
lab.batches = batches
lab.encoder(sys.argv[2], float(sys.argv[3]))
"""


@pytest.mark.parametrize("method, lam", [("vjepa_ll", 0.25), ("videomae", 1.0)])
def test_killed_at_a_random_moment_it_ends_as_if_it_had_not_been(lab, tmp_path, method, lam):
    cache, options = tmp_path / "killed run ß", {"steps": 12, "videomae_steps": 12, "log_every": 1}
    mine = beside(lab, cache, **options)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(cache), method, str(lam)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    folder = mine.folder(mine.spec(method, lam))
    while not (folder / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random() / 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = pretrain.steps_done(folder / "checkpoint.pt")
    assert process.returncode == -signal.SIGKILL and 1 <= before <= 12 and not (folder / "run.json").exists()
    run = mine.encoder(method, lam)
    other = beside(lab, tmp_path / "undisturbed", **options).encoder(method, lam)
    assert run.folder.name == other.folder.name and len(run.history) == 12
    assert (run.folder / "history.csv").read_bytes() == (other.folder / "history.csv").read_bytes()
    assert same(weights.read(run.folder / "checkpoint.pt"), weights.read(other.folder / "checkpoint.pt"))
    assert not list(folder.glob("*.part"))


# --- several processes

SEVERAL = """
import sys
from pathlib import Path
import smoke_lab, torch
from lightning_fabric import Fabric
from usjepa_nb import pretrain
from usjepa_nb.runs import Lab
fabric, out = Fabric(accelerator="cpu", devices=2, strategy="ddp"), Path(sys.argv[2])
fabric.launch()
lab = Lab("smoke", cache=sys.argv[1], steps=5, log_every=2)
def run(path, stop=None):
    objective = lab.objective(lab.spec("vjepa_ll", 0.25))
    rows = []
    batches = lab.batches(lab.store.rows("train"))
    for row in pretrain.train(objective, batches, lab.profile, path, seed=0, fabric=fabric):
        rows.append(row)
        if len(rows) == stop:
            break
    return {"state": objective.state_dict(), "history": rows}
whole = run(out / "whole.pt")
run(out / "stopped.pt", 3)
resumed = run(out / "stopped.pt")
torch.save({"whole": whole, "resumed": resumed}, out / f"rank{fabric.global_rank}.pt")
"""


@pytest.fixture(scope="module")
def several(lab, tmp_path_factory):
    """What the two processes of one run had at its end, and the folder."""
    out = tmp_path_factory.mktemp("several")
    (out / "script.py").write_text(SEVERAL)
    subprocess.run([sys.executable, out / "script.py", lab.cache, out], check=True, capture_output=True, timeout=300,
                   env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    return [weights.read(out / f"rank{rank}.pt") for rank in range(2)], out


def parameters(state):
    return {k: v for k, v in state.items() if not k.startswith("position_")}


def test_two_processes_end_with_the_same_weights(lab, several):
    ranks, out = several
    start = objective_of(lab).state_dict()
    first, second = (parameters(r["whole"]["state"]) for r in ranks)
    assert same(first, second) and not same(first, parameters(start))
    assert same(weights.read(out / "whole.pt")["encoder"],
                {k.removeprefix("encoder."): v for k, v in first.items() if k.startswith("encoder.")})


def test_two_processes_share_gradients_but_not_clips(several):
    first, second = (r["whole"]["history"] for r in several[0])
    assert [r["grad_norm"] for r in first] == [r["grad_norm"] for r in second] and len(first) == 5
    assert all(a["loss"] != b["loss"] for a, b in zip(first, second, strict=True))


def test_two_processes_resume_as_one_does(several):
    for rank in several[0]:
        assert same(parameters(rank["whole"]["state"]), parameters(rank["resumed"]["state"]))
    whole, resumed = (weights.read(several[1] / f"{n}.pt") for n in ("whole", "stopped"))
    assert same(whole, resumed)


# --- checkpoints

def test_the_parts_of_a_checkpoint_have_their_published_names(lab, undisturbed):
    assert set(undisturbed["vjepa_ll"]) == {"format", "step", "encoder", "target_encoder", "predictor", "head",
                                            "buffers", "positions", "features", "optimizer", "history"}
    assert set(undisturbed["vjepa_ll"]["buffers"]) == {"position_sum", "position_count"}
    assert {"encoder", "decoder"} < set(undisturbed["videomae"])
    assert [r["step"] for r in undisturbed["vjepa_ll"]["history"]] == list(range(1, 8))
    assert ["std" in r for r in undisturbed["vjepa_ll"]["history"]] == [False, True, False, True, False, True, True]


def test_every_tensor_that_training_changes_is_in_the_checkpoint(lab, tmp_path):
    objective, _ = train(variant(lab, steps=2), tmp_path / "c.pt")
    fresh = objective_of(lab)
    assert pretrain.resume(tmp_path / "c.pt", fresh)[0] == 2
    assert same(dict(fresh.state_dict()), dict(objective.state_dict()))
    assert not same(dict(objective_of(lab).state_dict()), dict(objective.state_dict()))


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed writing file"),
                                   OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pt"
    pretrain.save(path, {"step": 1})

    def half(content, part):
        Path(part).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError) as caught:
        pretrain.save(path, {"step": 2})
    if not isinstance(error, KeyboardInterrupt):
        assert caught.match(r"checkpoint.pt could not be written .*has space, then run it again")
    assert weights.read(path) == {"step": 1} and os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_killed_while_it_writes_the_old_checkpoint_is_still_there(tmp_path):
    path = tmp_path / "checkpoint.pt"
    pretrain.save(path, {"step": 1})
    child = os.fork()
    if not child:
        def killed(content, part):
            Path(part).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = killed
        pretrain.save(path, {"step": 2})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert weights.read(path) == {"step": 1}
    assert [p.read_bytes() for p in tmp_path.glob("*.part")] == [b"half of it"]


def test_a_damaged_checkpoint_is_named(lab, tmp_path):
    train(variant(lab, steps=2), tmp_path / "c.pt")
    (tmp_path / "c.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:-4000])
    with pytest.raises(weights.WeightsError, match=r"c.pt"):
        train(variant(lab, steps=2), tmp_path / "c.pt")


# --- fast ways that change nothing

def gradients(objective, batch):
    """Losses of one batch and the gradients of every weight."""
    out = objective(batch, torch.Generator().manual_seed(5))
    out["loss"].backward()
    return ({k: float(v.detach()) for k, v in out.items()},
            {n: v.grad.clone() for n, v in objective.named_parameters() if v.grad is not None})


@pytest.mark.parametrize("changes", [{}, {"mask_rule": "pad"}, {"sector_aware": False}, {"ll_on": "context"},
                                     {"ll_on": "unplaced"}, {"variance": 0.5}, {"target_layers": 1, "centre": 0.0}])
@pytest.mark.parametrize("freeze", [0, 1])
def test_both_mask_kinds_in_one_pass_give_the_same_losses_and_gradients(lab, changes, freeze):
    found = []
    for one_pass in (False, True):
        mine = variant(lab, mask="multiblock", one_pass=one_pass, **changes)
        objective, passes = objective_of(mine, freeze=freeze), []
        objective.predictor.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        found.append((*gradients(objective, grey(lab, 3)), len(passes)))
    (apart, g1, n1), (together, g2, n2) = found
    assert (n1, n2) == (2, 1) and together == pytest.approx(apart, rel=1e-5, abs=1e-6)
    assert g1.keys() == g2.keys()
    for name, g in g1.items():
        torch.testing.assert_close(g2[name], g, atol=1e-5 * float(g.abs().max()) + 1e-7, rtol=1e-3)


def test_frozen_blocks_have_one_copy_of_their_weights_no_gradient_and_no_moments(lab, tmp_path, monkeypatch):
    saved, save = [], pretrain.save
    monkeypatch.setattr(pretrain, "save", lambda path, file: saved.append(file["optimizer"]) or save(path, file))
    objective, _ = train(variant(lab, steps=3, log_every=2), tmp_path / "c.pt", freeze=1)
    shared = [objective.encoder.patch_embed, objective.encoder.blocks[0]]
    mirrored = [objective.target_encoder.patch_embed, objective.target_encoder.blocks[0]]
    for ours, theirs in zip(shared, mirrored, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a is b and not a.requires_grad and a.grad is None
    free = {id(p) for p in objective.encoder.blocks[1].parameters()}
    assert not free & {id(p) for p in objective.target_encoder.parameters()}  # what learns has an EMA of its own
    file = weights.read(tmp_path / "c.pt")
    learning = [p for p in objective.parameters() if p.requires_grad]
    assert [moments and len(moments["state"]) for moments in saved] == [len(learning), None]  # on the way, at the end
    kept = {file[part][name].untyped_storage().data_ptr() for part in ("encoder", "target_encoder")
            for name in file[part] if name.startswith(("blocks.0.", "patch_embed."))}
    assert len(kept) == len([*shared[0].parameters(), *shared[1].parameters()])  # and one copy on disk
    fresh = objective_of(variant(lab, steps=3), freeze=1)
    pretrain.resume(tmp_path / "c.pt", fresh)
    assert same(fresh.state_dict(), objective.state_dict())


def test_frozen_blocks_keep_nothing_for_the_backward_pass(lab):
    """What autograd holds between the passes falls with every frozen block."""
    held = []
    for freeze in (0, 1, 2):
        objective, kept = objective_of(lab, freeze=freeze), {}
        prepared = objective.prepare(grey(lab, 3), torch.Generator().manual_seed(5))
        weights_of = {t.untyped_storage().data_ptr() for t in (*objective.parameters(), *objective.buffers())}

        def pack(t, kept=kept, own=weights_of):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        masks = prepared.kinds[0]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            objective.encoder(prepared.clips, masks.context, masks.context_valid)
        held.append(sum(kept.values()))
    assert held[0] > 1.8 * held[1] and held[1] > 4 * held[2]  # two blocks, one, only the last norm


def test_the_loop_reads_numbers_back_once_a_look_and_not_once_a_step(tmp_path, monkeypatch):
    looks, real = [], pretrain.as_numbers
    monkeypatch.setattr(pretrain, "as_numbers", lambda rows: looks.append(len(rows)) or real(rows))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("a number was read back inside a step"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a number was read back inside a step"))
    rows = list(pretrain.train(Toy(), ones, load("smoke", steps=7, log_every=3), tmp_path / "c.pt", seed=0,
                               fabric=Fabric(accelerator="cpu")))
    assert looks == [3, 3, 1] and [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert all(isinstance(v, float | int) for r in rows for v in r.values())


def test_compiled_blocks_train_alike(lab, tmp_path):
    """Without a compiler on the machine the eager backend stands in: the graphs are still traced."""
    import torch._dynamo

    with pytest.MonkeyPatch.context() as patch:
        block = type(objective_of(lab).encoder.blocks[0])
        real = block.compile
        patch.setattr(block, "compile", lambda self, **how: real(self, backend="aot_eager", **how))
        _, compiled = train(variant(lab, steps=3, log_every=1, compile=True), tmp_path / "c.pt")
    torch._dynamo.reset()
    _, eager = train(variant(lab, steps=3, log_every=1), tmp_path / "e.pt")
    for a, b in zip(compiled, eager, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert list(weights.read(tmp_path / "c.pt")["encoder"]) == list(weights.read(tmp_path / "e.pt")["encoder"])


# --- batches made ahead

def test_on_a_gpu_the_next_batch_is_made_while_one_is_used_and_memory_waits_for_its_use(monkeypatch):
    said = []

    class Stream:
        def __init__(self, name="main"):
            self.name = name

        def record_event(self):
            event = f"{self.name} {sum(e.startswith(self.name) for e in said)}"
            said.append(event)
            return event

        def wait_event(self, event):
            said.append(f"[{self.name} waits for {event}]")

    main = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    made, used = [], []
    for step, batch in pretrain.ahead(lambda k: made.append(k) or f"batch {k}", range(3, 8), torch.device("cuda")):
        assert batch == f"batch {step}"
        used.append(step)
    assert made == used == [3, 4, 5, 6, 7]
    for k in range(5):  # a step begins when its batch is there
        assert said.index(f"side {k}") < said.index(f"[main waits for side {k}]")
    for k in range(2, 5):  # batch k may take the memory of batch k - 2, whose use has ended
        waits = said.index(f"[side waits for main {k - 2}]")
        assert said.index(f"main {k - 2}") < waits < said.index(f"side {k}")


# --- divergence

def test_a_loss_that_is_no_number_stops_with_a_remedy_and_leaves_the_last_good_checkpoint(lab, tmp_path):
    path, real = tmp_path / "c.pt", lab.batches(lab.store.rows("train"))
    calls = iter(range(1, 99))

    def batches(generator, n):
        return real(generator, n) * (math.nan if next(calls) == 5 else 1)

    shorter = variant(lab, steps=6, log_every=2, sector_aware=False, lr=0.002, clip=3.0)
    with pytest.raises(pretrain.Diverged, match=rf"step 5: loss nan.*lower lr \(0.002\) or clip \(3.0\). The last good "
                                                rf"checkpoint is {path}"):
        train(shorter, path, batches=batches)
    fresh = objective_of(shorter)
    step, history = pretrain.resume(path, fresh)
    assert step == 4 and len(history) == 4 and all(v.isfinite().all() for v in fresh.state_dict().values())
    train(shorter, path)  # and it goes on from there
    train(shorter, tmp_path / "undisturbed.pt")
    assert same(weights.read(path), weights.read(tmp_path / "undisturbed.pt"))


def test_a_gradient_that_is_no_number_stops_too(tmp_path):
    root = Toy(lambda loss, w: loss + (w * 0).abs().sqrt().sum())  # finite, with the slope 0 · inf
    with pytest.raises(pretrain.Diverged, match=r"step 1: loss \d.*gradient norm nan.*No checkpoint had been written"):
        list(pretrain.train(root, ones, load("smoke"), tmp_path / "c.pt", seed=0, fabric=Fabric(accelerator="cpu")))
    assert not list(tmp_path.iterdir())


# --- the loop

def test_schedules_by_hand(tmp_path, monkeypatch):
    made, decays = [], []
    real = torch.optim.AdamW

    def adamw(groups, **options):
        made.append(real(groups, **options))
        return made[0]

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    p = load("smoke", steps=10, warmup=0.2, lr=1.0e-2, lr_end=1.0e-4, weight_decay=0.04, weight_decay_end=0.4)
    toy = Toy()
    toy.after_step = lambda step: decays.append([g["weight_decay"] for g in made[0].param_groups])
    rows = list(pretrain.train(toy, ones, p, tmp_path / "c.pt", seed=0, fabric=Fabric(accelerator="cpu")))
    up = [1.0e-4 + (1.0e-2 - 1.0e-4) * k / 2 for k in range(2)]  # from lr / 100
    down = [1.0e-4 + (1.0e-2 - 1.0e-4) * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert [r["lr"] for r in rows] == pytest.approx(up + down)
    cosine = [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]
    assert [d[0] for d in decays] == pytest.approx(cosine) and [d[1] for d in decays] == [0.0] * 10
    assert made[0].param_groups[0]["betas"] == (0.9, p.beta2)


def test_the_loop_steps_clips_and_counts(tmp_path):
    p, sizes = load("smoke", steps=4, clip=0.5, log_every=3), []

    def batches(generator, n):
        sizes.append((n, generator.initial_seed()))
        return torch.ones(n, 1)

    toy = Toy()
    rows = list(pretrain.train(toy, batches, p, tmp_path / "c.pt", seed=7, fabric=Fabric(accelerator="cpu")))
    assert toy.seen == [r["step"] for r in rows] == [1, 2, 3, 4] and [s[0] for s in sizes] == [p.batch] * 4
    assert len({s[1] for s in sizes}) == 4 and rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["grad_norm"] > 0.5  # the norm before it is clipped
    assert pretrain.steps_done(tmp_path / "c.pt") == 4  # the last step is saved though 4 is no multiple of 3


def test_gradients_are_clipped_to_the_norm(tmp_path):
    norms, toy = [], Toy()
    toy.after_step = lambda step: None
    real = torch.optim.AdamW.step

    def step(self, *args, **options):
        norms.append(float(torch.cat([q.grad.flatten() for g in self.param_groups for q in g["params"]]).norm()))
        return real(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        list(pretrain.train(toy, ones, load("smoke", steps=2, clip=0.5), tmp_path / "c.pt", seed=0,
                            fabric=Fabric(accelerator="cpu")))
    assert norms == pytest.approx([0.5, 0.5], abs=1e-4)


def test_generators_of_steps_seeds_and_processes_differ():
    keys = [(seed, step, rank) for seed in (0, 1) for step in range(3) for rank in range(3)]
    first, second = ([torch.rand((), generator=pretrain.step_generator(*key)).item() for key in keys] for _ in "ab")
    assert len(set(first)) == len(keys) and first == second


@pytest.mark.parametrize("method", ["vjepa_ll", "videomae", "supervised"])
def test_weight_decay_falls_on_matrices_alone(lab, method):
    objective = objective_of(lab, method)
    groups = pretrain.parameter_groups(objective, 0.5)
    names = {id(p): n for n, p in objective.named_parameters()}
    assert all(g["decays"] is ("weight_decay" not in g) and g.get("weight_decay", 0) == 0 for g in groups)
    assert all(names[id(p)].startswith("encoder.") is (g["lr_scale"] == 0.5) for g in groups for p in g["params"])
    free_names, decayed = ({names[id(p)] for g in groups if g["decays"] is which for p in g["params"]}
                           for which in (False, True))
    norms_and_biases = {n for n, p in objective.named_parameters() if p.requires_grad
                        and (n.endswith("bias") or "norm" in n or n == "probe.query")}
    assert free_names == norms_and_biases
    assert decayed | free_names == {n for n, p in objective.named_parameters() if p.requires_grad}


def test_the_encoder_may_learn_slower_than_the_rest(lab, tmp_path):
    """Half the rate for the encoder: the first step of AdamW moves every weight by its own rate."""
    p = lab.profile.replace(steps=4, warmup=0.0, lr=1e-3, lr_end=1e-3, weight_decay=0.0, weight_decay_end=0.0,
                            encoder_lr=0.5, log_every=1)
    objective = objective_of(lab, "videomae")
    before = {n: v.detach().clone() for n, v in objective.named_parameters()}
    next(pretrain.train(objective, lab.batches(lab.store.rows("train")), p, tmp_path / "c.pt", seed=0,
                        fabric=Fabric(accelerator="cpu", devices=1)))
    moved = {n: float((v.detach() - before[n]).abs().max()) for n, v in objective.named_parameters()}
    assert moved["encoder.norm.weight"] == pytest.approx(5e-4, rel=1e-3)
    assert moved["decoder.norm.weight"] == pytest.approx(1e-3, rel=1e-3)


def test_frozen_weights_and_the_target_are_not_optimised(lab):
    objective = objective_of(lab, freeze=1)
    optimised = {id(p) for g in pretrain.parameter_groups(objective) for p in g["params"]}
    names = {n for n, p in objective.named_parameters() if id(p) in optimised}
    assert not any(n.startswith(("target_encoder", "encoder.patch_embed", "encoder.blocks.0")) for n in names)
    assert {n for n in names if n.startswith("encoder.blocks.1")}


# --- EMA

def test_ema_start_by_hand():
    assert objectives.ema_start(300) == pytest.approx(1 - 2 * 3.912023 / 300)  # ln 0.02 = -3.912023
    assert objectives.ema_start(5) == 0.0  # too short a run to keep anything
    assert objectives.ema_start(300, remains=0.5) == pytest.approx(1 - 2 * 0.693147 / 300)


@pytest.mark.parametrize("steps", [300, 3000, 60000])
def test_scaled_ema_leaves_about_the_share_it_says(steps):
    m = objectives.ema_start(steps)
    rising = m + (1 - m) * np.arange(1, steps + 1) / steps
    assert np.prod(rising) == pytest.approx(0.02, rel=0.15)
    published = 0.998 + 0.002 * np.arange(1, 301) / 300
    assert np.prod(published) == pytest.approx(0.74, abs=0.01) and 0.998 ** 300 == pytest.approx(0.55, abs=0.01)


@pytest.mark.parametrize("step, momentum", [(1, 0.91), (5, 0.95), (10, 1.0)])  # ema 0.9 rising to 1 over 10 steps
def test_the_target_follows_by_the_formula(lab, step, momentum):
    objective = objective_of(variant(lab, ema=0.9, steps=10))
    with torch.no_grad():
        for q in objective.encoder.parameters():
            q.add_(1.0)
    before = copy.deepcopy(objective.target_encoder.state_dict())
    online = copy.deepcopy(objective.encoder.state_dict())
    objective.after_step(step)
    for name, value in objective.target_encoder.state_dict().items():
        torch.testing.assert_close(value, momentum * before[name] + (1 - momentum) * online[name])
    assert same(dict(objective.encoder.state_dict()), dict(online))


def test_the_target_begins_as_a_copy_and_gets_no_gradient(lab):
    objective = objective_of(lab)
    assert same(dict(objective.encoder.state_dict()), dict(objective.target_encoder.state_dict()))
    assert objective.features is objective.target_encoder
    out = objective(grey(lab), pretrain.step_generator(0, 0))
    out["loss"].backward()
    assert all(q.grad is None and not q.requires_grad for q in objective.target_encoder.parameters())
    assert all(q.grad is not None for q in objective.encoder.parameters())
    assert any(q.grad.abs().max() > 0 for q in objective.encoder.parameters())


def test_frozen_blocks_do_not_move(lab, tmp_path):
    start = objective_of(lab, freeze=1)
    objective, _ = train(lab, tmp_path / "c.pt", freeze=1)
    for part in ("encoder", "target_encoder"):
        old, new = getattr(start, part), getattr(objective, part)
        assert same(dict(old.patch_embed.state_dict()), dict(new.patch_embed.state_dict()))
        assert same(dict(old.blocks[0].state_dict()), dict(new.blocks[0].state_dict()))
        assert not same(dict(old.blocks[1].state_dict()), dict(new.blocks[1].state_dict()))


def test_the_target_moves_where_nothing_is_frozen(lab, tmp_path):
    start = objective_of(lab)
    objective, _ = train(lab, tmp_path / "c.pt")
    moved = [not torch.equal(a, b) for a, b in zip(start.target_encoder.blocks.parameters(),
                                                   objective.target_encoder.blocks.parameters(), strict=True)]
    assert all(moved)


# --- targets

def test_published_targets_are_the_normalised_last_layer(lab):
    objective = objective_of(variant(lab, target_layers=1, centre=0.0, sector_aware=False))
    x = standardise(grey(lab))
    target = objective.targets(x, None)
    torch.testing.assert_close(target, F.layer_norm(objective.target_encoder(x), [32]))
    assert not target.requires_grad and float(target.mean(-1).abs().max()) < 1e-5
    assert float(objective.position_count.sum()) == 0


def test_averaged_targets_by_hand(lab):
    objective = objective_of(variant(lab, target_layers=2, centre=0.0))
    x = standardise(grey(lab))
    outputs = [o.numpy() for o in objective.target_encoder(x, layers=True)]
    scaled = [(o - o.mean(1, keepdims=True)) / np.sqrt(o.var(1, keepdims=True) + 1e-5) for o in outputs]
    mean = (scaled[0] + scaled[1]) / 2
    by_hand = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(objective.targets(x, None).numpy(), by_hand, atol=1e-4)


def sectors(*counts):
    """Tokens allowed per clip on the grid (2, 4, 4): scattered, as many as said. bool [B, 32]."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    allowed = torch.zeros(len(counts), 32, dtype=torch.bool)
    for row, count in zip(allowed, counts, strict=True):
        row[order[:count]] = True
    return allowed


@pytest.mark.parametrize("layers", [1, 2])
def test_padding_does_not_leak_into_targets(lab, layers):
    objective = objective_of(variant(lab, target_layers=layers, centre=0.0))
    x, allowed = standardise(grey(lab, 3)), sectors(9, 30, 20)
    together = objective.targets(x, allowed)
    for i in range(3):
        alone = objective.targets(x[i:i + 1], allowed[i:i + 1])
        torch.testing.assert_close(together[i][allowed[i]], alone[0][allowed[i]], atol=1e-5, rtol=1e-4)
        picked = objective.target_encoder(x[i:i + 1], allowed[i].nonzero().T)  # these tokens and no flags at all
        if layers == 1:
            torch.testing.assert_close(alone[0][allowed[i]], F.layer_norm(picked, [32])[0], atol=1e-5, rtol=1e-4)


def test_what_lies_outside_the_sector_has_no_part_in_the_loss(lab):
    objective = objective_of(variant(lab, centre=0.0, mask_rule="pad"))
    clips = grey(lab)
    outside = ~sector_tokens(clips, (2, 8, 8)).view(4, 2, 4, 4)
    assert outside.any()
    pixels = outside.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noisy = torch.where(pixels & (clips <= 2), 2 * torch.rand(clips.shape), clips)  # still dark: same sector
    assert not torch.equal(noisy, clips)
    losses = [objective(c, pretrain.step_generator(0, 0))["loss"] for c in (clips, noisy)]
    torch.testing.assert_close(*losses)


def test_the_context_of_a_clip_is_the_same_in_any_batch(lab, monkeypatch):
    objective, calls = objective_of(variant(lab, mask_rule="pad")), []
    real = objective.predictor.forward

    def predictor(z, masks, kind):
        calls.append((z, masks))
        return real(z, masks, kind)

    monkeypatch.setattr(objective.predictor, "forward", predictor)
    clips = grey(lab, 8)
    objective(clips, pretrain.step_generator(0, 0))
    assert len(calls) == 2 and any(not masks.context_valid.all() for _, masks in calls)
    for z, masks in calls:
        for i, valid in enumerate(masks.context_valid):
            alone = objective.encoder(standardise(clips[i:i + 1]), masks.context[i:i + 1, valid])
            torch.testing.assert_close(z[i][valid], alone[0], atol=1e-5, rtol=1e-4)


def test_centring_keeps_a_running_mean_per_position_and_takes_it_off(lab):
    centred = objective_of(variant(lab, target_layers=1, centre=0.5, sector_aware=False))
    x = standardise(grey(lab))
    h = centred.target_encoder(x)
    centred.targets(x, None)
    target = centred.targets(x[:2], None)
    total, count = 0.5 * h.sum(0) + h[:2].sum(0), 0.5 * 4 + 2
    torch.testing.assert_close(centred.position_sum[0], total)
    assert torch.equal(centred.position_count, torch.full((1, 32, 1), count))
    torch.testing.assert_close(target, F.layer_norm(h[:2] - total / (count + 1), [32]), atol=1e-5, rtol=1e-4)


def test_centred_targets_have_no_mean_per_position_left(lab):
    shares = {}
    for centre in (0.0, 0.99):
        objective = objective_of(variant(lab, target_layers=1, centre=centre, sector_aware=False))
        x = standardise(grey(lab, 12))
        for _ in range(100):
            target = objective.targets(x, None)
        shares[centre] = float(target.mean(0).square().mean() / target.square().mean())
    assert shares[0.99] < 0.1 < 0.5 < shares[0.0]


def test_centring_counts_a_token_only_where_it_was_seen(lab):
    objective = objective_of(variant(lab, target_layers=1, centre=0.5))
    allowed = sectors(9, 30)
    objective.targets(standardise(grey(lab, 2)), allowed)
    assert torch.equal(objective.position_count[0, :, 0], allowed.sum(0).float())
    assert (objective.position_sum[0][~allowed.any(0)] == 0).all()


# --- the objective

def test_lam_1_has_no_head_and_no_second_loss(lab):
    objective = objective_of(lab, "vjepa")
    out = objective(grey(lab), pretrain.step_generator(0, 0))
    assert objective.head is None and "head" not in pretrain.states(objective)
    assert float(out["ll"]) == 0 and out["loss"] == out["jepa"]


def test_eq_4_mixes_the_losses(lab):
    objective = objective_of(lab)
    out = objective(grey(lab), pretrain.step_generator(0, 0))
    assert out["ll"] > 0
    torch.testing.assert_close(out["loss"], 0.25 * out["jepa"] + 0.75 * out["ll"])


def masked(monkeypatch, objective, clips, zeros=False):
    """What the objective returns, and the context features and masks that its predictor was given."""
    calls, real = [], objective.predictor.forward

    def predictor(z, masks, kind):
        calls.append((z, masks))
        return real(z, masks, kind) * (not zeros)

    with monkeypatch.context() as patch:
        patch.setattr(objective.predictor, "forward", predictor)
        return objective(clips, pretrain.step_generator(0, 0)), calls


def test_short_and_long_range_are_two_kinds_of_masks(lab, monkeypatch):
    (_, first), (_, second) = masked(monkeypatch, objective_of(lab), grey(lab))[1]
    assert not torch.equal(first.target[0], second.target[0])


@pytest.mark.parametrize("share, places", [(0.5, 8), (0.7, 11)])
def test_a_tube_mask_is_one_kind_and_hides_the_same_places_at_every_time(lab, monkeypatch, share, places):
    objective = objective_of(variant(lab, mask="tube", hidden=share, sector_aware=False))
    (_, masks), = masked(monkeypatch, objective, grey(lab))[1]
    assert masks.target.shape == (4, 2 * places) and masks.context.shape == (4, 2 * (16 - places))
    early, late = masks.target.view(4, 2, places).unbind(1)
    assert torch.equal(early + 16, late) and not torch.equal(early[0], early[1])


def test_a_tube_mask_hides_its_share_of_the_sector(lab, monkeypatch):
    objective, clips = objective_of(variant(lab, mask="tube", hidden=0.5, mask_rule="pad")), grey(lab)
    (_, masks), = masked(monkeypatch, objective, clips)[1]
    counts = sector_tokens(clips, (2, 8, 8)).sum(1)
    assert torch.equal(masks.target_valid.sum(1), counts // 2 // 2 * 2)  # of each frame, then two frames
    assert torch.equal(masks.context_valid.sum(1), counts - masks.target_valid.sum(1))


@pytest.mark.parametrize("rule", ["random", "pad"])
@pytest.mark.parametrize("ll_on", ["predicted", "context", "unplaced"])
def test_the_localisation_loss_falls_on_the_tokens_asked_for(lab, ll_on, rule):
    objective = objective_of(variant(lab, ll_on=ll_on, mask_rule=rule))
    objective(grey(lab), pretrain.step_generator(0, 0))["ll"].backward()

    def moved(part):
        return any(q.grad is not None and q.grad.any() for q in part.parameters())

    assert moved(objective.head) and moved(objective.encoder.blocks) and moved(objective.encoder.patch_embed)
    assert moved(objective.predictor) is (ll_on == "predicted")


def test_located_context_tokens_lie_where_they_are_visible(lab, monkeypatch):
    objective, located = objective_of(variant(lab, ll_on="context", mask_rule="pad")), []
    real = objectives.losses.l_ll
    monkeypatch.setattr(objectives.losses, "l_ll", lambda head, e, masks, *rest: located.append((e, masks)) or
                        real(head, e, masks, *rest))
    _, calls = masked(monkeypatch, objective, grey(lab))
    for (z, masks), (e, places) in zip(calls, located, strict=True):
        assert e is z and torch.equal(places.target, masks.context)
        assert torch.equal(places.target_valid, masks.context_valid)


def test_located_tokens_without_a_position_leave_the_other_losses_alone(lab, monkeypatch):
    told, untold = (objective_of(variant(lab, ll_on=ll_on, variance=0.3)) for ll_on in ("context", "unplaced"))
    placed, real = [], told.encoder.forward
    monkeypatch.setattr(type(untold.encoder), "forward", lambda self, *a, placed_=placed, **k: placed_.append(
        k.get("placed", True)) or real.__func__(self, *a, **k))
    a, b = (o(grey(lab), pretrain.step_generator(0, 0)) for o in (told, untold))
    assert all(torch.equal(a[k], b[k]) for k in ("jepa", "zero")) and not torch.equal(a["ll"], b["ll"])
    assert placed.count(False) == 2  # once for each kind of mask, in the second objective


@pytest.mark.parametrize("rule", ["random", "pad"])
def test_the_variance_term_is_added_by_its_weight(lab, monkeypatch, rule):
    objective = objective_of(variant(lab, variance=0.3, mask_rule=rule))
    out, calls = masked(monkeypatch, objective, grey(lab))
    spread = sum(objectives.losses.variance_covariance(z, masks.context_valid) for z, masks in calls) / 2
    assert spread > 0
    torch.testing.assert_close(out["loss"], 0.25 * out["jepa"] + 0.75 * out["ll"] + 0.3 * spread)
    without = objective_of(variant(lab, mask_rule=rule))(grey(lab), pretrain.step_generator(0, 0))
    assert all(torch.equal(out[k], without[k]) for k in ("jepa", "ll", "zero")) and out["loss"] > without["loss"]


@pytest.mark.parametrize("rule", ["random", "pad"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_predicting_zero_costs_what_zero_says(lab, monkeypatch, beta, rule):
    objective = objective_of(variant(lab, beta=beta, mask_rule=rule), "vjepa")
    out, _ = masked(monkeypatch, objective, grey(lab), zeros=True)
    torch.testing.assert_close(out["jepa"], out["zero"])
    other = objective_of(variant(lab, beta=1.0 - beta, mask_rule=rule), "vjepa")
    assert abs(masked(monkeypatch, other, grey(lab))[0]["zero"] - out["zero"]) > 0.1


def test_videomae_hides_tubes_and_predicts_their_pixels(lab):
    objective = objective_of(lab, "videomae")
    out = objective(grey(lab), pretrain.step_generator(0, 0))
    assert set(out) == {"loss"} and objective.features is objective.encoder
    assert 0.3 < out["loss"] < 5  # about 1: the targets have unit variance and the decoder knows nothing yet


def test_training_lowers_the_loss(lab, tmp_path):
    longer = variant(lab, steps=40, log_every=40, augmentation="none", lr=2.0e-3)
    for method in ("vjepa_ll", "videomae"):
        _, rows = train(longer, tmp_path / f"{method}.pt", method)
        key = "ll" if method == "vjepa_ll" else "loss"
        assert np.mean([r[key] for r in rows[-5:]]) < 0.9 * np.mean([r[key] for r in rows[:5]])


# --- monitors, by hand

def test_collapsed_features():
    found = pretrain.monitors(torch.ones(4, 6, 8))
    assert found["std"] == 0 and found["position_share"] == 0


def test_features_that_only_know_where_they_are():
    found = pretrain.monitors(torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1))
    assert found["position_share"] == pytest.approx(1) and found["rank"] == pytest.approx(1, abs=1e-3)
    assert found["std"] > 0.5


def test_isotropic_noise_has_full_rank_and_no_position():
    found = pretrain.monitors(torch.randn(40, 100, 16, generator=torch.Generator().manual_seed(0)))
    assert found["rank"] == pytest.approx(16, abs=0.1) and found["std"] == pytest.approx(1, abs=0.02)
    assert found["position_share"] == pytest.approx(1 / 40, rel=0.2)  # the mean of 40 draws is not quite 0


def test_rank_counts_directions_and_weighs_them():
    x = torch.zeros(2, 2, 8)  # content ±1 along two axes, one at each position
    x[0, 0, 0], x[1, 0, 0], x[0, 1, 3], x[1, 1, 3] = 1, -1, 1, -1
    assert pretrain.monitors(x)["rank"] == pytest.approx(2, rel=1e-4)
    assert pretrain.monitors(x)["position_share"] == 0
    x[:, 1] = 0
    assert pretrain.monitors(x)["rank"] == pytest.approx(1, rel=1e-4)
    x[0, 1, 3], x[1, 1, 3] = 3 ** -0.5, -(3 ** -0.5)  # variances 3 : 1
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert pretrain.monitors(x)["rank"] == pytest.approx(math.exp(entropy), rel=1e-4)


def test_position_share_by_hand():
    x = torch.tensor([[[1.0], [5.0]], [[3.0], [7.0]]])  # means 2 and 6: variance 4 of (1, 5, 3, 7)'s 5
    assert pretrain.monitors(x)["position_share"] == pytest.approx(4 / 5)


# --- what is shared with the probe

def test_watching_does_not_disturb_training(lab, tmp_path):
    def watch(objective):
        z, seen = probe.encode(objective.features, grey(lab), True)
        return pretrain.monitors(z[:, seen.all(0)].detach())

    watched, rows = train(variant(lab, log_every=1), tmp_path / "a.pt", watch=watch)
    alone, _ = train(variant(lab, log_every=3), tmp_path / "b.pt")
    assert same(dict(watched.state_dict()), dict(alone.state_dict()))
    assert all({"std", "rank", "position_share"} < set(r) for r in rows)
