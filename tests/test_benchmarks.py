"""The baseline of the benchmarks does the same work, and the table says what was measured."""

import importlib
import json
import sys

import pytest
import torch
from conftest import ROOT
from smoke_lab import smoke_lab
from torch import Generator


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def load(name):
    return importlib.import_module(name)


def test_the_baseline_gives_the_same_loss_and_gradients(lab):
    """Else its time would tell nothing."""
    bench, published = load("bench"), load("published_structure")
    _, objective = bench.vjepa(lab.profile.replace(mask="multiblock", target_layers=1, centre=0.0, beta=0.0))
    step = published.Step(objective)
    grey = torch.from_numpy(lab.clips(lab.store.rows("train")[:3])[0]).float()
    out = objective(grey, Generator().manual_seed(3))
    out["loss"].backward()
    prepared = objective.prepare(grey, Generator().manual_seed(3))
    loss = step.model(grey, prepared.kinds)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(out["loss"].detach()), rel=1e-5)
    theirs = dict(step.model.named_parameters())
    for name, v in objective.named_parameters():
        if v.grad is not None and "patch_embed" not in name:
            torch.testing.assert_close(theirs[name].grad, v.grad, atol=1e-6, rtol=1e-3)
    ours, three = objective.encoder.patch_embed.proj.weight.grad, theirs["encoder.proj.weight"].grad
    torch.testing.assert_close(three.mean(1, keepdim=True), ours, atol=1e-6, rtol=1e-3)  # three equal channels


def test_the_baseline_moves_to_a_device_whole(lab):
    """A tensor that is neither a parameter nor a buffer would stay behind."""
    bench, published = load("bench"), load("published_structure")
    model = published.Step(bench.vjepa(lab.profile)[1]).model
    assert not [name for m in model.modules() for name, v in vars(m).items() if isinstance(v, torch.Tensor)]
    assert {v.device.type for v in model.to("meta").state_dict().values()} == {"meta"}


def test_the_baseline_learns_and_moves_its_target(lab):
    bench, published = load("bench"), load("published_structure")
    _, objective = bench.vjepa(lab.profile.replace(mask="multiblock", target_layers=1, centre=0.0, beta=0.0))
    step = published.Step(objective)
    before = [v.clone() for v in step.model.target_encoder.parameters()]
    grey = torch.from_numpy(lab.clips(lab.store.rows("train")[:3])[0]).float()
    logs = [step(grey, Generator().manual_seed(3), bench.autocast("32-true", "cpu")) for _ in range(2)]
    assert logs[1]["loss"] < logs[0]["loss"] and len(logs[0]) > 20  # every norm is in the log
    moved = [not torch.equal(a, b) for a, b in zip(before, step.model.target_encoder.parameters(), strict=True)]
    assert all(moved)


def test_variants_take_turns_and_medians_are_divided(monkeypatch):
    bench, turns, now = load("bench"), [], [0.0]
    monkeypatch.setattr(bench, "clock", lambda device: now[0])

    def takes(name, seconds):
        def work():
            turns.append(name)
            now[0] += next(seconds)
        return work

    found = bench.compare({"a": takes("a", iter([9, 2, 4, 100])), "b": takes("b", iter([9, 1, 1, 1]))}, 3)
    assert turns == ["a", "b"] * 4 and found == {"a": 4, "b": 1}  # the first turn warms up
    table = bench.rows("x", found, "a")
    assert [r["times faster"] for r in table] == [1, 4] and [r["ms"] for r in table] == [4000, 1000]


def test_the_page_of_the_repository_says_what_was_measured_and_where():
    bench = load("bench")
    rows = [*bench.rows("a clip", {"slow": 0.1, "fast": 0.05}, "slow", "clip"),
            {"what": "making", "variant": "phantom", "ms": 1234.0, "times faster": float("nan"), "per": "patient"}]
    text = bench.as_text({**bench.machine("cpu"), "peak GiB": 1.5, "rounds": 5, "rows": rows})
    assert f"torch {torch.__version__}" in text and "peak GiB 1.5" in text
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    assert cells == [["what", "variant", "ms", "times faster", "per"], ["a clip", "slow", "100", "1", "clip"],
                     ["a clip", "fast", "50", "2", "clip"], ["making", "phantom", "1230", "–", "patient"]]


def test_bench_prints_ratios_and_keeps_them(tmp_path, capsys, monkeypatch):
    bench = load("bench")
    threads = torch.get_num_threads()
    monkeypatch.setitem(bench.SIZES, "tiny", {"size": 32, "frames": 4, "patch": 8, "width": 32, "depth": 2, "heads": 2,
                                              "predictor_width": 24, "predictor_depth": 1, "predictor_heads": 2,
                                              "target_layers": 1})
    bench.main(["--only", "step", "probe", "--sizes", "tiny", "--rounds", "1", "--out", str(tmp_path / "bench.json")])
    torch.set_num_threads(threads)
    kept = json.loads((tmp_path / "bench.json").read_text())
    what = {r["what"] for r in kept["rows"]}
    assert {"step, tiny", "tiny: optimiser", "tiny: EMA", "probe step, tiny"} <= what
    assert kept["torch"] == torch.__version__ and kept["peak GiB"] > 0 and all(r["ms"] > 0 for r in kept["rows"])
    assert "published structure" in capsys.readouterr().out
