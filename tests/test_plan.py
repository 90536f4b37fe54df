"""The plan: which runs a grid takes, what they come to, and what the command prints."""

import math

import pytest
from smoke_lab import shared_cache, smoke_lab

from usjepa_nb import grid, plan
from usjepa_nb.cost import Stage
from usjepa_nb.grid import Cell, Grid
from usjepa_nb.profile import load

P = load("smoke")
VJEPA, LL = Cell("vjepa"), Cell("vjepa_ll", 0.25)


def small(*cells, table1=(), fractions=(100, 10), seeds=1):
    return Grid("small", seeds, fractions, (1.0,), (0,), tuple(table1), tuple(cells))


def number(jobs, *stages):
    return sum(stage[0] in stages for stage, *_ in jobs)


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "DRAWS", 2)
        patch.setattr(plan, "SAMPLE", 3)
        yield


@pytest.fixture(scope="module")
def data(quick):
    return plan.look("smoke", P, "")


# --- which runs

def test_one_encoder_serves_all_shares_of_the_labels():
    jobs = plan.every(P, small(), [VJEPA])
    assert (number(jobs, "vjepa"), number(jobs, "features"), number(jobs, "probe")) == (1, 1, 2)


def test_what_learns_end_to_end_trains_at_every_share_and_needs_no_probe():
    jobs = plan.every(P, small(), [Cell("supervised"), Cell("unet")])
    assert (number(jobs, "supervised"), number(jobs, "unet"), len(jobs)) == (2, 2, 4)


def test_controls_train_nothing():
    jobs = plan.every(P, small(), [Cell("prior"), Cell("random"), Cell("imagenet")])
    assert number(jobs, *plan.TRAINED.values()) == 0 and number(jobs, "features") == 2
    assert number(jobs, "probe") == number(jobs, "imagenet") == 2


def test_fine_tuning_trains_its_vjepa_first_and_shares_it_with_the_table():
    alone = plan.every(P, small(), [Cell("finetuned")])
    assert (number(alone, "vjepa"), number(alone, "supervised"), number(alone, "probe")) == (1, 2, 0)
    assert alone < plan.every(P, small(), [Cell("finetuned"), VJEPA])
    assert number(plan.every(P, small(), [Cell("finetuned"), VJEPA]), "vjepa") == 1


def test_vjepa_that_starts_from_videomae_needs_one():
    own = P.replace(init="videomae")
    assert number(plan.every(own, small(), [VJEPA, LL]), "videomae") == 1
    assert number(plan.every(own, small(), [Cell("initial")]), "videomae") == 1
    assert number(plan.every(P, small(), [VJEPA, LL]), "videomae") == 0


def test_salt_needs_its_teacher_unless_a_file_is_given():
    jobs = plan.every(P.replace(teacher="pixels"), small(), [Cell("salt")])
    assert (number(jobs, "teacher"), number(jobs, "salt"), number(jobs, "probe")) == (1, 1, 2)
    assert number(plan.every(P.replace(teacher="weights/file.pt"), small(), [Cell("salt")]), "teacher") == 0


def test_pretraining_on_the_fraction_alone_is_done_for_each():
    few = P.replace(unlabelled="fraction")
    jobs = plan.every(few, small(fractions=(100, 50, 10)), [LL])
    assert number(jobs, "vjepa") == number(jobs, "features") == number(jobs, "probe") == 3


# --- what they come to

def test_totals_by_hand():
    found = {("vjepa", 0): Stage("V-JEPA", 10, 100.0, 0, ll=20.0),
             ("features", 0): Stage("features", 4, 3.0, 0),
             ("probe", 100): Stage("all", 5, 2.0, 0), ("probe", 10): Stage("few", 1, 2.0, 0)}
    p, g = P, small(VJEPA, table1=[VJEPA, LL], seeds=2)
    one, two, both = (plan.total(p, g, found, cells) for cells in (g.table1, g.table2, g.cells))
    assert one == both == {"trainings": 4, "probes": 8, "flops": 2 * 1800 + 2 * 2 * 24}
    assert two == {"trainings": 2, "probes": 4, "flops": 2 * 800 + 2 * 24}
    lines = plan.report(p, g, found, 10.0).splitlines()
    assert "time, minutes" in lines[-4] and lines[-1].split()[-1] == f"{(3600 + 96) / 10 / 60:.3g}"
    assert "20.00%" in lines[1] and lines[1].split()[-1] == "1.67"  # minutes: 1000 FLOPs at 10 a second
    unknown = plan.report(p, g, found, math.nan).splitlines()
    assert unknown[1].split()[-1] == unknown[-1].split()[-1] == "–"


def test_numbers_share_the_largest_unit_that_fits():
    assert plan.scaled("x", [5e9, 1.234e12, 4e14], plan.FLOP).to_list() == ["0.005", "1.23", "400"]
    assert plan.scaled("x", [5e9, 1.234e12], plan.FLOP).name == "x, TFLOP"
    assert plan.scaled("x", [math.nan, 30], plan.BYTE).to_list() == ["–", "0.0293"]
    assert plan.scaled("x", [59 * 3600, 7200 * 3600], plan.SECOND).to_list() == ["59", "7,200"]


# --- what it counts on

def test_clips_are_those_of_the_lab(tmp_path_factory, data):
    lab = smoke_lab(tmp_path_factory)
    camus, converted = (plan.look("smoke", P, str(there)) for there in (lab.tree, lab.hdf5))
    for looked in (data, camus, converted):
        assert looked.clips == {part: len(lab.store.rows(part, labelled=True)) for part in ("train", "val", "test")}
        assert [looked.train(f) for f in (100, 50, 10)] == [len(lab.labelled(f)) for f in (100, 50, 10)]
        assert looked.frames == lab.frames and [len(v) for v in looked.views] == [P.batch] * 2


def test_tokens_outside_the_sector_cost_nothing(data):
    whole = P.replace(sector_aware=False)
    inside, everywhere = (plan.stage(p, data, "vjepa", 0) for p in (P, whole))
    assert inside.flops - inside.ll < everywhere.flops - everywhere.ll and inside.ll == everywhere.ll
    assert plan.stage(P, data, "features", 0).flops < plan.stage(whole, data, "features", 0).flops


def test_without_sectors_nothing_is_rendered(monkeypatch):
    monkeypatch.setattr(plan, "Dataset", None)
    looked = plan.look("paper", load("paper"), "")
    assert looked.clips == {"train": 600, "val": 200, "test": 200} and looked.patients == 300


def test_the_stages_are_those_that_the_grid_needs(data):
    found = plan.stages(P, data, small(Cell("supervised"), Cell("imagenet"), Cell("salt"), LL))
    assert list(found) == [("teacher", 0), ("vjepa", 0), ("salt", 0), ("supervised", 0), ("features", 0),
                           ("features", 1), ("probe", 100), ("probe", 10), ("imagenet", 100), ("imagenet", 10)]
    assert found["imagenet", 100].flops > found["probe", 100].flops  # 384 features against 32
    assert all(s.flops > 0 and s.steps > 0 and s.state > 0 for s in found.values())


# --- the command

def test_it_prints_both_tables_at_a_readable_width(capsys, tmp_path_factory):
    lab = smoke_lab(tmp_path_factory)
    assert plan.main(["smoke", "--grid", "walk", "--data", str(lab.tree), "--tflops", "2"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    for words in ("V-JEPA + LL, 0/2 blocks frozen", "probe, 10 % of labels", "Table 1", "kept, ", "2 TFLOP/s"):
        assert words in text
    assert str(shared_cache(tmp_path_factory)) not in text


def test_the_largest_table_is_still_readable(data):
    g = grid.load("paper", 24)
    found = {s: Stage(f"probe on ImageNet, {s[1]} % of labels", 123456, 1.23e15, 1.23e10, 1.23e10, 1e12, 5e14)
             for s in {job[0] for job in plan.every(P, g, g.cells)}}
    text = plan.report(P, g, found, 1e9)
    assert max(map(len, text.splitlines())) <= 120


def test_a_gpu_that_is_not_there_has_no_speed(monkeypatch, data):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rate, words = plan.speed(load("paper"), data, None)
    assert math.isnan(rate) and "--tflops" in words


@pytest.mark.parametrize("arguments, words", [
    (["none"], "no such profile"), (["smoke", "--grid", "none"], "no such grid"),
    (["paper", "--data", "/nowhere"], "holds no patient")])
def test_a_bad_argument_gets_a_sentence(arguments, words, capsys):
    assert plan.main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_speeds_are_positive_numbers():
    for bad in (["0"], ["nan"], ["-1"]):
        with pytest.raises(SystemExit):
            plan.main(["smoke", "--tflops", *bad])


def test_the_paper_grid_is_what_the_command_plans_by_default():
    p = load("paper")
    g = grid.load("paper", p.depth, initial=True)
    jobs = plan.every(p, g, g.table1)
    assert number(jobs, "vjepa") == len(g.table1) and number(jobs, "probe") == len(g.table1) * len(g.fractions)
