"""The tables hold what is on disk, say what is not, pair over patients, and come out the same again."""

import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from smoke_lab import beside, smoke_lab

from usjepa_nb import controls, dataset, memory, pretrain, segment, tables, verify
from usjepa_nb.grid import Cell
from usjepa_nb.runs import Lab
from usjepa_nb.segment import segmentation

GRID = {"seeds": 1, "fractions": [100, 10], "table1": {"lams": [1, 0.25], "frozen": [0]},
        "table2": {"controls": ["prior", "random", "unet", "finetuned"],
                   "methods": ["supervised", "videomae", "vjepa", "vjepa_ll"], "lam": 0.25, "frozen": [0]}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("grids") / "mine.yaml"
    path.write_text(yaml.safe_dump(GRID))
    return str(path)


def made(lab, grid_file):
    g = lab.grid(grid_file)
    tables.collect(lab, g.cells, g.fractions)
    return tables.write(lab, grid_file)


@pytest.fixture(scope="module")
def written(lab, grid_file, tmp_path_factory):
    """A lab whose cells are all made, and what `write` says of it."""
    own = beside(lab, tmp_path_factory.mktemp("root") / "data_cache")
    Lab("smoke", cache=own.cache, steps=7).encoder("vjepa")  # runs that are none of this table's business
    Lab("smoke", cache=own.cache, seed=5).encoder("videomae")
    return own, made(own, grid_file)


def test_the_summary_names_data_seeds_code_and_machine(written, grid_file):
    own, content = written
    assert set(content) == {"profile", "grid", "data", "data_hash", "ed_es_only", "split", "seeds", "commit", "machine",
                            "versions", "seconds", "threads", "missing", "effects", "table1", "rows",
                            "command", "settings", "grid_settings", "code", "lock", "packages"}
    assert (content["profile"], content["grid"], content["seeds"]) == ("smoke", "mine", [0])
    assert content["threads"] == [torch.get_num_threads()]
    assert content["data_hash"] == own.store.data_hash and content["versions"]["torch"] == torch.__version__
    assert json.loads((own.results(grid_file) / "summary.json").read_text()) == content
    assert not (own.cache / "runs" / "smoke" / "summary.json").exists()  # that one is the walk's


def test_rows_are_cells_by_shares_of_the_labels(written):
    _, content = written
    got = [(r["key"], r["lam"], r["fraction"]) for r in content["rows"]]
    cells = [("prior", 1), ("random", 1), ("unet", 1), ("finetuned", 1), ("supervised", 1), ("videomae", 1),
             ("vjepa", 1), ("vjepa_ll", 0.25)]
    assert got == [(*c, f) for c in cells for f in (100, 10)] and content["missing"] == []
    assert {(r["seed"], r["split"], r["probe"], r["videos"]) for r in content["rows"]} == {(0, "test", "best", 4)}
    assert [(r["cell"], r["fraction"], r["split"]) for r in content["table1"]] == [
        (c, f, "val") for c in ("vjepa-lam1-f0", "vjepa_ll-lam0.25-f0") for f in (100, 10)]


def test_a_row_is_the_mean_and_sd_over_test_videos(written):
    own, content = written
    scores = segmentation(own, "vjepa_ll", 10, 0.25).scores
    chosen = scores[(scores["split"] == "test") & (scores["which"] == "best")]
    row = content["rows"][-1]
    assert row["dsc"] == pytest.approx(np.mean(chosen["dsc"])) and row["ppv"] == pytest.approx(np.mean(chosen["ppv"]))
    assert row["dsc_sd"] == pytest.approx(np.std(chosen["dsc"], ddof=1)) and row["dsc_es"] == chosen["dsc_es"].mean()


def test_effects_are_paired_differences_of_what_was_asked(written):
    _, content = written
    got = [(r["a"], r["b"], r["fraction"]) for r in content["effects"]]
    random, ll = "frozen random encoder", "V-JEPA + LL (λ = 0.25)"
    assert got == [(a, b, f) for f in (100, 10) for a, b in (
        ("VideoMAE", random), ("V-JEPA", random), (ll, random), (ll, "V-JEPA"),
        ("V-JEPA, fine-tuned", "supervised, end to end"))]
    mean = {r["cell"]: r["dsc"] for r in content["rows"] if r["fraction"] == 100}  # as many videos of each patient
    assert content["effects"][0]["difference"] == pytest.approx(mean["videomae"] - mean["random"])


def test_seconds_are_those_of_these_cells(written):
    own, content = written
    assert set(content["seconds"]) == {f"train {c} seed 0" for c in (
        "vjepa-lam1-f0", "vjepa_ll-lam0.25-f0", "videomae", *(f"{m} {f}%" for m in ("unet", "finetuned", "supervised")
                                                              for f in (100, 10)))}
    run = json.loads((own.folder(own.spec("videomae")) / "run.json").read_text())
    assert content["seconds"]["train videomae seed 0"] == run["seconds"]


def test_pretraining_on_the_patients_of_a_share_counts_at_every_share(lab, grid_file, tmp_path):
    own = beside(lab, tmp_path / "cache")
    own.profile = own.profile.replace(unlabelled="fraction")
    for fraction in (100, 10):
        folder = own.folder(own.spec("videomae", fraction=fraction))
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"seconds": fraction, "threads": 1}))
    found = tables.summary(own, grid_file)["seconds"]
    assert found == {"train videomae seed 0": 100, "train videomae 10% seed 0": 10}


def test_made_a_second_time_the_table_is_the_same_bit_for_bit(lab, written, grid_file, tmp_path):
    torch.manual_seed(5)
    second, first = made(beside(lab, tmp_path / "second"), grid_file), copy.deepcopy(written[1])
    for content in (first, second):
        assert content.pop("seconds")
        assert all(row.pop("seconds") >= 0 for row in content["rows"] + content["table1"])
    assert first == second


def test_what_is_missing_is_said_and_never_made_up(lab, grid_file, tmp_path, monkeypatch):
    own = beside(lab, tmp_path / "cache")
    segmentation(own, "random", 100)
    monkeypatch.setattr(segment, "segment", lambda *a: pytest.fail("it was asked to make nothing"))
    content = tables.write(own, grid_file)
    assert [(r["key"], r["fraction"]) for r in content["rows"]] == [("prior", 100), ("prior", 10), ("random", 100)]
    assert content["table1"] == [] and len(content["missing"]) == 13
    assert {"cell": "random", "fraction": 10, "seed": 0, "reason": "not on disk"} in content["missing"]
    with pytest.raises(ValueError, match="there is nothing to show: not on disk; run the cells first"):
        tables.collect(own, [Cell("vjepa")], [100], train=False)


def test_weights_that_cannot_be_had_are_missing_with_the_reason(lab, tmp_path, monkeypatch):
    asked = []

    def unreachable(*args, **kwargs):
        asked.append(args)
        raise OSError("no such host")

    monkeypatch.setattr(controls.timm, "create_model", unreachable)
    scores, missing = tables.collect(beside(lab, tmp_path / "cache"), [Cell("random"), Cell("imagenet")], [100, 10])
    assert set(scores.cell) == {"random"} and len(asked) == 1  # the other share is not tried again
    assert missing.reason.str.contains("weights could not be had .no such host.; connect").all() and len(missing) == 2


def test_each_seed_is_a_training_of_its_own_on_the_same_data(lab, tmp_path):
    own = beside(lab, tmp_path / "cache", seed=3)
    scores, _ = tables.collect(own, [Cell("random")], [100], seeds=2)
    assert set(scores.seed) == {3, 4} and own.seed == 3
    first, second = (scores[scores.seed == s].dsc.to_numpy() for s in (3, 4))
    assert len(first) == len(second) == 16 and (first != second).any()


def by_hand():
    rows = [(m, f, p, v, s, base + 0.01 * k) for k, p in enumerate("abcd") for m, f, base in
            (("x", 100, 0.5), ("y", 100, 0.4), ("x", 10, 0.3)) for v in ("2CH", "4CH") for s in (0, 1)]
    table = pd.DataFrame(rows, columns=["method", "fraction", "patient", "view", "seed", "dsc"])
    table["dsc"] += 0.1 * (table.view == "4CH") + 0.02 * table.seed
    return table.assign(split="test", which="best")


def test_patients_are_averaged_over_views_then_seeds():
    values = tables.per_patient(by_hand(), "test")
    assert values["x", 100, "a"] == pytest.approx(0.5 + 0.05 + 0.01) and len(values) == 12
    lopsided = by_hand().drop(0)  # one view of one seed is gone: seeds still count alike
    assert tables.per_patient(lopsided, "test")["x", 100, "a"] == pytest.approx(((0.6) + (0.5 + 0.6) / 2 + 0.02) / 2)


def test_pairs_are_compared_where_both_are_there():
    table = tables.compare(tables.per_seed(by_hand(), "test"), [("x", "y"), ("x", "z")], (100, 10))
    assert table[["a", "b", "fraction"]].values.tolist() == [["x", "y", 100]]
    assert table.difference[0] == pytest.approx(0.1) and table.n[0] == 4 and table.holm_p[0] == table.wilcoxon_p[0]


def test_pairs_are_compared_on_the_seeds_that_both_have():
    whole = by_hand()
    gone = tables.per_seed(whole[(whole.method == "x") | (whole.seed == 1)], "test")
    table = tables.compare(gone, [("x", "y")], (100,))
    assert table.difference[0] == pytest.approx(0.1) and table.n[0] == 4  # seed 0 lies .02 lower for both
    apart = tables.per_seed(whole[(whole.method == "x") == (whole.seed == 1)], "test")
    assert tables.compare(apart, [("x", "y")], (100,)).empty


def test_intervals_hold_the_mean_of_each_method_and_share():
    bands = tables.interval(tables.per_patient(by_hand(), "test"))
    assert bands[["method", "fraction"]].values.tolist() == [["x", 100], ["y", 100], ["x", 10]]
    assert ((bands.lo < bands.dsc) & (bands.dsc < bands.hi)).all() and bands.dsc[0] == pytest.approx(0.575)


def test_a_cell_that_fails_is_missing_and_the_others_go_on(lab, tmp_path, monkeypatch):
    def too_large(*args, **kwargs):
        raise memory.OutOfMemory("U-Net: not enough memory")

    real = tables.segmentation
    monkeypatch.setattr(tables, "segmentation",
                        lambda lab, method, *a, **k: (too_large if method == "unet" else real)(lab, method, *a, **k))
    scores, missing = tables.collect(beside(lab, tmp_path / "cache"), [Cell("unet"), Cell("random")], [100, 10])
    assert set(scores.cell) == {"random"} and set(scores.fraction) == {100, 10}
    assert set(missing.reason) == {"U-Net: not enough memory"} and list(missing.fraction) == [100, 10]


def test_a_table_without_anybody_in_it_says_why(written, grid_file, monkeypatch, capsys):
    own, content = written
    nobody = [r | {"n": 0, "difference": None, "low": None, "high": None} for r in content["effects"][:1]]
    table = own.store.table
    monkeypatch.setattr(own.store, "table", table.assign(labelled=table["labelled"] & (table["split"] != "test")))
    tables.show(own, content | {"rows": [], "effects": nobody}, grid_file)
    text = capsys.readouterr().out
    assert "Table 2 is empty: no test video has reference masks (" in text and "Table 1: mean DSC" in text
    assert f"{nobody[0]['a']} minus" not in text


def test_the_tables_are_printed_with_where_they_lie(written, grid_file, monkeypatch, capsys):
    own, content = written
    monkeypatch.setattr(dataset, "ROOT", own.cache.parent)
    monkeypatch.setattr(pretrain, "train", lambda *a, **k: pytest.fail("nothing is trained here"))
    assert tables.main(["smoke", "0", grid_file]) == 0
    text = capsys.readouterr().out
    assert "Table 2: mean DSC over 4 test videos (phantom-10x1.2mm, video, one seed)" in text and "Table 1" in text
    first = content["effects"][0]
    assert f"100 %  {first['a']} minus frozen random encoder: {first['difference']:+.3f} [" in text
    assert "DSC, 100 % of labels" in text and text.index("100 %") < text.index("10 %")
    assert f"{content['rows'][0]['dsc']:.3f}" in text and "data_cache/notebooks/smoke-mine/summary.json" in text


@pytest.mark.parametrize("arguments, words", [
    (["none"], "no such profile"), (["smoke", "0", "none"], "no such grid"), (["smoke", "-1"], "seed = -1"),
    (["smoke", "0", "walk", "/nowhere"], "holds no patient")])
def test_a_bad_argument_gets_a_sentence(arguments, words, capsys):
    if arguments[1:2] == ["-1"]:
        arguments = ["--", *arguments]
    assert tables.main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


# --- verify

@pytest.fixture
def honest(written, grid_file, monkeypatch):
    """A summary as it was written, and its cache; the grid is found under its name."""
    own, content = written
    monkeypatch.setattr(pretrain, "train", lambda *a, **k: pytest.fail("nothing is trained here"))
    return own, json.loads(json.dumps(content | {"grid": grid_file}))


def complaints(own, content, path):
    path.write_text(json.dumps(content))
    return verify.check(path, cache=str(own.cache))


def test_an_honest_summary_holds(honest, tmp_path, monkeypatch, capsys):
    own, content = honest
    found = complaints(own, content, tmp_path / "summary.json")
    assert found == [f"grid: {content['grid']!r} is said, 'mine' is found"]  # a file of one's own goes by its path
    content["seconds"], content["commit"] = {}, "other"
    monkeypatch.setattr(verify, "MAY_DIFFER", verify.MAY_DIFFER | {"grid"})
    assert complaints(own, content, tmp_path / "summary.json") == []
    assert verify.main([str(tmp_path / "summary.json"), "--cache", str(own.cache)]) == 0
    assert "every number is what data, runs and code give" in capsys.readouterr().out


@pytest.mark.parametrize("spoil, says", [
    (lambda c: c["rows"][3].update(dsc=c["rows"][3]["dsc"] + 1e-9), "rows: random, 10 % of the labels, seed 0: dsc is"),
    (lambda c: c["table1"].pop(), "table1: vjepa_ll-lam0.25-f0, 10 % of the labels, seed 0 is on disk and not in the"),
    (lambda c: c["rows"].append(c["rows"][0] | {"cell": "magic"}), "magic, 100 % of the labels, seed 0 is not on disk"),
    (lambda c: c.update(data_hash="0"), "data_hash: '0' is said"),
    (lambda c: c["versions"].update(torch="1.0"), "versions: "),
    (lambda c: c.update(data="phantom-9x1.2mm"), "is about phantom-9x1.2mm, and this is phantom-10x1.2mm"),
])
def test_what_was_tampered_with_is_named(honest, tmp_path, monkeypatch, spoil, says):
    own, content = honest
    monkeypatch.setattr(verify, "MAY_DIFFER", verify.MAY_DIFFER | {"grid"})
    spoil(content)
    (one,) = complaints(own, content, tmp_path / "summary.json")
    assert says in one


def test_what_is_no_summary_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    assert verify.main([str(path), str(tmp_path / "none.json")]) == 1
    text = capsys.readouterr().out
    assert "is no summary of this package, it lacks data, " in text and "none.json" in text
    path.write_text("5")
    assert verify.main([str(path)]) == 1 and "is no summary of this package" in capsys.readouterr().out
    (tmp_path / "deep.json").write_text("[" * 100_000)
    path.write_text('{"rows": [')
    assert verify.main([str(path), str(tmp_path / "deep.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and f"{path}: cannot be read as JSON (" in lines[0] and "deep.json: cannot be" in lines[1]
    assert all("give the summary.json of a `make run`" in line for line in lines)


@pytest.mark.parametrize("seeds", [[], 0, None, ["0"]])
def test_a_summary_without_a_seed_is_refused(honest, tmp_path, seeds):
    own, content = honest
    with pytest.raises(ValueError, match=r"summary.json: seeds = .* is no list of seeds, of one at least; give the"):
        complaints(own, content | {"seeds": seeds}, tmp_path / "summary.json")


def test_data_may_have_moved_since_and_other_data_is_named(lab, tmp_path, capsys):
    """The name of a folder tells where it lies; what counts is its content."""
    there, here = tmp_path / "there" / "CAMUS", tmp_path / "here" / "CAMUS"
    shutil.copytree(lab.tree, there), shutil.copytree(lab.tree, here)
    made, path, cache = Lab("smoke", there, tmp_path / "one"), tmp_path / "summary.json", str(tmp_path / "two")
    path.write_text(json.dumps(tables.summary(made)))
    assert "--data" in verify.check(path, cache=str(lab.cache))[0]  # the phantom is something else
    assert Lab("smoke", here, cache).data_name != made.data_name
    capsys.readouterr()
    assert verify.main([str(path), "--data", str(here), "--cache", cache]) == 0
    assert f"{path}: every number is what" in capsys.readouterr().out
    shutil.rmtree(sorted(here.rglob("patient*"))[0])
    assert verify.main([str(path), "--data", str(here), "--cache", cache]) == 1
    assert f"{path}: is about {made.data_name}, and this is CAMUS-" in capsys.readouterr().out
