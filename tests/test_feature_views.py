"""Attention is the probe's own, similarity is the cosine, and a click does what the sliders do."""

import h5py
import numpy as np
import pytest
import torch
from plotly.callbacks import Points
from smoke_lab import smoke_lab

from usjepa_nb import figures, probe
from usjepa_nb.grid import Cell
from usjepa_nb.segment import labelled_rows, segmentation
from usjepa_nb.widgets import features
from usjepa_nb.widgets.tokens import TokenInspector

GRID, TUBELET, WIDTH = (2, 3, 4), (2, 8, 4), 12  # no two axes alike
N = 24


def view(seed=0, with_probe=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, N, WIDTH, generator=generator) * 3 + 1
    seen = torch.ones(3, N, dtype=torch.bool)
    seen[:, [0, 3, 12]] = False
    made = features.View(x * seen[..., None], seen)
    if with_probe:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made.probe = probe.SegmentationProbe(GRID, TUBELET, WIDTH, 3, 8)
            torch.nn.init.normal_(made.probe.query)
            torch.nn.init.normal_(made.probe.attention.in_proj_bias)
        made.probe.fit_scale(made.features, seen)
    return made


@pytest.fixture
def tokens():
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 24, 16), dtype=np.uint8)
    return features.Tokens({"A": view(0), "B": view(1)}, frames, np.full((3, 2), (0.5, 0.8)), ["p1", "p2", "p3"],
                           GRID, TUBELET)


@pytest.fixture(autouse=True)
def at_rest(monkeypatch):
    monkeypatch.delenv("USJEPA_EXERCISE", raising=False)


def test_weights_and_answers_are_those_of_the_probes_own_attention():
    made, asking = view(), [5, 23, 1]
    net, x, seen = made.probe, made.features[1], made.seen[1]
    kv = net.norm1((x - net.mean) / net.std * seen[:, None])
    with torch.no_grad():
        answer, weights = net.attention((kv + net.query)[None], kv[None], kv[None], key_padding_mask=~seen[None],
                                        average_attn_weights=False)
    ours = features.attention_weights(net, x, seen, asking)
    assert ours.shape == (3, 3, N)
    torch.testing.assert_close(ours, weights[0][:, asking], atol=1e-6, rtol=1e-5)
    values = torch.nn.functional.linear(kv, *(v.chunk(3)[2] for v in (net.attention.in_proj_weight,
                                                                      net.attention.in_proj_bias)))
    heads = values.view(N, 3, -1).transpose(0, 1)  # [heads, N, d]
    with torch.no_grad():
        again = net.attention.out_proj((ours @ heads).transpose(0, 1).flatten(1))
    torch.testing.assert_close(again, answer[0][asking], atol=1e-5, rtol=1e-4)


def test_similarity_is_one_with_itself_and_forgets_a_shared_direction():
    made = view()
    x, seen = made.features[0], made.seen[0]
    cosine = features.similarity(x, seen, 7)
    assert cosine[7] == pytest.approx(1, abs=1e-6) and cosine.abs().max() <= 1 + 1e-6
    shifted = (x + 100) * seen[:, None]  # 100 in every direction for every token that was seen
    torch.testing.assert_close(features.similarity(shifted, seen, 7)[seen], cosine[seen], atol=1e-4, rtol=1e-4)


def test_a_place_that_is_the_same_in_all_clips_has_nothing_left():
    made = view()
    made.features[:] = made.features[0]
    assert made.clip(2, residual=True).abs().max() < 1e-5
    assert made.clip(2).abs().max() > 1


def test_a_token_that_was_left_out_has_no_map(tokens):
    assert np.isnan(tokens.values("A", 0, "similarity", (0, 0, 0))).all()
    for kind in ("similarity", "attention", "attention 2"):
        found = tokens.values("A", 0, kind, (1, 2, 3))
        assert np.array_equal(np.isnan(found).ravel(), ~tokens.views["A"].seen[0].numpy())
    heads = [tokens.values("A", 0, f"attention {h}", (1, 2, 3)) for h in range(3)]
    np.testing.assert_allclose(np.mean(heads, 0), tokens.values("A", 0, "attention", (1, 2, 3)), rtol=1e-5)
    assert np.nansum(heads[0]) == pytest.approx(1, abs=1e-5)


def test_attention_is_offered_only_where_every_method_has_its_probe(tokens):
    assert [name for _, name in tokens.kinds][2:] == ["attention", "attention 0", "attention 1", "attention 2"]
    tokens.views["B"] = view(1, with_probe=False)
    assert [name for _, name in tokens.kinds] == ["similarity", "similarity residual"]


def test_words_say_what_the_map_holds():
    values = np.full((2, 1, 2), 0.25)
    text = features.describe(values, (1, 0, 0), "attention 1")
    assert "50% of its attention" in text and "spread over 4 of 4 tokens" in text
    values[0, 0, 1] = 0.9
    assert "most like (0, 0, 1), cosine 0.90; 33% of the others" in features.describe(values, (1, 0, 0), "similarity")
    assert "left out" in features.describe(np.full((2, 1, 2), np.nan), (1, 0, 0), "similarity")


def test_pictures_hold_the_values_in_true_proportions(tokens):
    figure = tokens.heat("B", 1, "attention", (1, 2, 3))
    wanted = tokens.values("B", 1, "attention", (1, 2, 3))
    for t in range(2):
        np.testing.assert_array_equal(figure.axes[2 + t].get_images()[0].get_array().filled(np.nan), wanted[t])
    assert [len(ax.patches) for ax in figure.axes[:4]] == [0, 1, 0, 1]  # the asking token is framed in its slice
    assert figure.axes[4].get_ylabel() == "share of the attention"
    assert tokens.heat("B", 1, "similarity", (1, 2, 3)).axes[4].get_ylabel() == "cosine"
    colours = tokens.colours("A", 0, 0)
    rgba = colours.axes[1].get_images()[0].get_array()
    assert (rgba[0, 0] == 0).all() and rgba[0, 1, 3] == 1  # token 0 was left out
    for drawn in (figure, colours):
        drawn.draw_without_rendering()
        box = drawn.axes[0].get_window_extent()
        assert box.height / box.width == pytest.approx(24 * 0.5 / (16 * 0.8), rel=0.01)


def test_a_click_is_a_move_of_the_sliders(tokens):
    box = TokenInspector(tokens, (0, 1, 1), "B")
    box.controls["show"].value = "attention 1"
    wanted = tokens.values("B", 0, "attention 1", (0, 1, 1))[0]
    np.testing.assert_array_equal(box.figure.data[2].z.astype(float), wanted)
    assert box.figure.data[2].z[0, 0] is None and "NaN" not in box.figure.to_json()  # a token that was left out
    # what JupyterLab sends for a click on the heat map of slice 1, at y = 2, x = 3 (here a pixel of that token)
    box.figure.data[3]._dispatch_on_click(Points([[2, 3]], [3.4], [1.6]), None)
    assert box.token == (1, 2, 3) and box.controls["x"].value == 3
    wanted = tokens.values("B", 0, "attention 1", (1, 2, 3))[1]
    np.testing.assert_array_equal(box.figure.data[3].z.astype(float), wanted)
    assert {(s.xref, s.yref, s.x0, s.y0) for s in box.figure.layout.shapes} == {("x2", "y2", 2.5, 1.5),
                                                                                ("x4", "y4", 2.5, 1.5)}
    box.figure.data[0]._dispatch_on_click(Points([], [], []), None)  # a click beside the pixels
    assert box.token == (1, 2, 3)
    box.controls["clip"].value = 2
    np.testing.assert_array_equal(box.figure.data[1].z, tokens.frames[2][2])
    wanted = tokens.values("B", 2, "attention 1", (1, 2, 3))
    assert features.describe(wanted, (1, 2, 3), "attention") in box.message.value


def test_exercise_moves_every_control_and_clicks(tokens, monkeypatch):
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    asked, values = [], tokens.values
    monkeypatch.setattr(tokens, "values", lambda *which: asked.append(which) or values(*which))
    box = TokenInspector(tokens, (1, 2, 3))
    assert {m for m, *_ in asked} == {"A", "B"} and {c for _, c, *_ in asked} == {0, 2}
    assert {k for *_, k, _ in asked} == {"similarity", "attention 2"}
    assert (1, 0, 0) in {token for *_, token in asked} and box.token == (1, 2, 3)

    def broken(self, t, points):
        raise RuntimeError("no such click")

    monkeypatch.setattr(TokenInspector, "click", broken)
    with pytest.raises(RuntimeError, match="no such click"):
        TokenInspector(tokens, (1, 2, 3))


def test_features_and_probe_are_found_where_notebook_05_left_them(tmp_path_factory):
    lab, cell = smoke_lab(tmp_path_factory), Cell("random")
    found = segmentation(lab, "random")
    rows = labelled_rows(lab)[[1, -1, 0]]  # not in the order of the file
    run, p = lab.encoder("random"), lab.profile
    view = features.load(lab, cell, rows)
    z, seen = probe.encode(run.encoder, torch.from_numpy(lab.clips(rows)[0]).float(), p.sector_aware)
    torch.testing.assert_close(view.features, z.detach(), atol=5e-3, rtol=5e-3)  # kept in half precision
    assert torch.equal(view.seen, seen)
    predicted = probe.predict(view.probe, view.features.half(), view.seen)
    assert np.array_equal(predicted, found.best[[1, -1, 0]])
    with h5py.File(run.folder / "features.h5") as file:
        assert len(file["features"]) == len(lab.labelled()) + len(labelled_rows(lab))
    with pytest.raises(FileNotFoundError, match="videomae: no features"):
        features.load(lab, Cell("videomae"), rows)
    assert figures.png(features.Tokens({"random": view}, lab.clips(rows)[0], np.ones((3, 2)), ["a", "b", "c"],
                                       p.grid(lab.frames), p.tubelet_size).colours("random", 0, 0, residual=True))
