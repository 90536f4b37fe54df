"""The repository shows the phantom alone: a table of other data is refused before anything is copied."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
from conftest import ROOT

from usjepa_nb.runs import Lab


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """results/publish.py in a repository of its own, whose overlay and notebooks are only noted down."""
    spec = importlib.util.spec_from_file_location("publish", ROOT / "results" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_a.ipynb").write_text("{}")
    module.executed = []
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "Lab", lambda profile: Lab(profile, cache=tmp_path / "cache"))
    monkeypatch.setattr(module, "overlay", lambda lab: None)
    monkeypatch.setattr(module, "figures", SimpleNamespace(png=lambda figure: b"png"))
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(
        run=lambda command, **options: module.executed.append([str(word) for word in command[1:]])))
    return module


def summary(folder, data):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"data": data}))


@pytest.mark.parametrize("data", ["CAMUS-1a2b", "phantom-99x1.2mm", ""])
def test_a_table_of_other_data_is_refused_and_nothing_is_copied(publish, tmp_path, data):
    summary(tmp_path / "cache" / "runs" / "smoke", data)
    summary(tmp_path / "cache" / "notebooks" / "smoke-paper", "phantom-10x1.2mm")
    with pytest.raises(SystemExit) as refusal:
        publish.main("smoke")
    assert f"summary.json is a table of {data}: run `make run` without DATA, then this again" in refusal.value.code
    assert not (tmp_path / "results").exists() and publish.executed == []


def test_what_was_made_of_the_phantom_is_shown(publish, tmp_path):
    summary(tmp_path / "cache" / "runs" / "smoke", "phantom-10x1.2mm")
    publish.main("smoke")
    assert sorted(p.name for p in (tmp_path / "results" / "smoke").iterdir()) == ["overlay.png", "summary.json"]
    summary(tmp_path / "cache" / "notebooks" / "smoke-paper", "phantom-10x1.2mm")
    publish.main("smoke")
    assert json.loads((tmp_path / "results" / "smoke" / "tables.json").read_text()) == {"data": "phantom-10x1.2mm"}
    notebook = str(tmp_path / "notebooks" / "00_a.ipynb")
    assert publish.executed == [["-m", "usjepa_nb.execute", notebook, notebook]] * 2
