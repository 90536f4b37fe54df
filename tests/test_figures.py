"""Figures hold what they were given: panels, outlines, colours, true proportions; nothing stays open."""

import io

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from PIL import Image

from usjepa_nb import figures
from usjepa_nb.camus import UNLABELLED

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (6, 24, 32), dtype=np.uint8)
MASKS = np.zeros((6, 24, 32), np.uint8)
MASKS[:, 4:12, 6:20], MASKS[:, 6:10, 9:16], MASKS[:, 13:20, 8:18] = 2, 1, 3
MASKS[2] = UNLABELLED
TUBELET = (2, 8, 4)  # grid (3, 3, 8): no two axes alike
GRID = (3, 3, 8)


def outlines(ax):
    """Colours of the outlines drawn in a panel."""
    return {tuple(contours.get_edgecolor()[0]) for contours in ax.collections}


def covers(ax):
    """RGBA of what lies over the frame of a panel."""
    return ax.get_images()[1].get_array()


def is_drawn(figure):
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figures.png(figure).startswith(b"\x89PNG")
    return figure


def token_sets():
    hidden = np.zeros(GRID, bool)
    hidden[0, :, :2] = hidden[2, 1, 5] = True
    outside = np.zeros(GRID, bool)
    outside[:, 0, 6:] = True
    visible = ~hidden & ~outside
    visible[1, 1, 1] = False  # belongs to none
    return visible, hidden, outside


def test_clip_strip_outlines_the_classes_that_are_there():
    figure = is_drawn(figures.clip_strip(FRAMES, MASKS, columns=4))
    axes = [ax for ax in figure.axes if ax.axison]
    assert len(axes) == 6
    wanted = {to_rgba(colour) for colour in figures.CLASS_COLOURS.values()}
    assert [outlines(ax) for ax in axes] == [wanted, wanted, set(), wanted, wanted, wanted]
    assert [ax.get_title() for ax in axes] == list("012345")
    assert np.array_equal(axes[5].get_images()[0].get_array(), FRAMES[5])


@pytest.mark.parametrize("spacing", [(1, 1), (0.5, 0.25), (0.3, 0.9)])
def test_pictures_have_the_proportions_of_the_body(spacing):
    for figure in (
        figures.clip_strip(FRAMES, MASKS, spacing=spacing),
        figures.overlay(FRAMES[0], MASKS[0], MASKS[1], spacing),
        figures.overlays_grid(FRAMES[:2], {"reference": MASKS[:2]}, [spacing] * 2),
        figures.error_maps(FRAMES, MASKS, MASKS, spacing),
        figures.token_masks(FRAMES, *token_sets(), TUBELET, spacing),
        figures.pca_tokens(RNG.random((*GRID, 5)), FRAMES, None, TUBELET, spacing),
        figures.offsets(FRAMES, np.array([[0, 70]]), np.zeros((1, 3)), np.zeros((1, 3)), TUBELET, spacing),
    ):
        figure.draw_without_rendering()
        for ax in figure.axes:
            if ax.axison:
                box = ax.get_window_extent()
                millimetres = 24 * spacing[0] / (32 * spacing[1])
                assert box.height / box.width == pytest.approx(millimetres, rel=0.01)


def test_the_palette_of_a_png_keeps_colours_and_greys():
    """A colour of few pixels, as of a legend, must not be taken for its neighbour's, nor speckle be tinted."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:160, :160]
    frame = np.clip(128 + 60 * np.sin(x / 20) * np.cos(y / 15) + rng.normal(0, 15, x.shape), 0, 255).astype(np.uint8)
    mask = sum(c * ((y - j) ** 2 + (x - i) ** 2 < 900) for c, (j, i) in enumerate([(50, 50), (80, 110), (120, 60)], 1))
    filled = figures.overlay(frame, mask, np.roll(mask, 6, 1), opacity=0.5)
    marks, ((ax,),) = figures.panels(1, 1, width=5, ratio=0.8)
    ax.imshow(rng.integers(0, 256, (60, 60), np.uint8), cmap="gray")
    for k, colour in enumerate(figures.PALETTE.values()):
        ax.plot(60, 6 * k, "s", color=colour, clip_on=False)
    for figure in (filled, marks):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # every drawing would move it on
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        drawn, kept = (np.asarray(Image.open(io.BytesIO(b)).convert("RGB")).astype(int)
                       for b in (buffer.getvalue(), figures.png(figure)))
        assert abs(drawn - kept).max() < 20
        assert np.ptp(kept[np.ptp(drawn, axis=-1) == 0], axis=-1).max() == 0


def test_overlay_fills_the_mask_and_dashes_the_reference():
    ax = is_drawn(figures.overlay(FRAMES[0], MASKS[0], MASKS[1], opacity=0.5)).axes[0]
    assert tuple(covers(ax)[8, 12]) == to_rgba(figures.CLASS_COLOURS[1], 0.5)
    assert covers(ax)[0, 0, 3] == 0
    dashed = [contours.get_linestyle()[0][1] is not None for contours in ax.collections]
    assert dashed == [False] * 3 + [True] * 3
    alone = figures.overlay(FRAMES[0], MASKS[0])
    assert len(alone.axes[0].collections) == 3
    assert len(figures.overlay(FRAMES[2], MASKS[2]).axes[0].collections) == 0  # no reference, no outline


def test_overlays_grid_is_frames_by_methods():
    columns = {"reference": MASKS[:3], "V-JEPA": np.roll(MASKS[:3], 2, 1), "empty": np.zeros_like(MASKS[:3])}
    figure = is_drawn(figures.overlays_grid(FRAMES[:3], columns, row_titles=["a", "b", "c"]))
    assert len(figure.axes) == 3 * 4
    assert [ax.get_title() for ax in figure.axes[:4]] == ["frame", "reference", "V-JEPA", "empty"]
    assert [len(ax.collections) for ax in figure.axes[:4]] == [0, 3, 3, 0]


def test_error_maps_tell_three_errors_apart_and_pass_over_the_unlabelled():
    true, pred = np.zeros((2, 1, 4, 4), np.uint8)
    true[0, 0], pred[0, 0] = [1, 0, 2, 1], [0, 3, 1, 1]
    true[0, 1], pred[0, 1] = UNLABELLED, 1
    shown = covers(is_drawn(figures.error_maps(FRAMES[:1, :4, :4], pred, true)).axes[0])
    missed, added, wrong = (to_rgba(colour, 0.8) for colour in figures.ERROR_COLOURS.values())
    assert [tuple(pixel) for pixel in shown[0, :3]] == [missed, added, wrong]
    assert not shown[0, 3].any() and not shown[1:].any()


def test_every_token_is_of_one_kind():
    visible, hidden, outside = token_sets()
    kinds = figures.token_kinds(visible | hidden, hidden, outside | hidden)  # where sets overlap, hidden wins
    assert (np.sum(list(kinds.values()), axis=0) == 1).all()
    assert {kind: int(where.sum()) for kind, where in kinds.items()} == {
        "visible": 72 - 7 - 6 - 1, "hidden": 7, "outside": 6, "unused": 1,
    }  # fmt: skip


def test_token_masks_cover_what_is_hidden_slice_by_slice():
    visible, hidden, outside = token_sets()
    figure = is_drawn(figures.token_masks(FRAMES, visible, hidden, outside, TUBELET))
    assert len(figure.axes) == 3
    for t, ax in enumerate(figure.axes):
        assert np.array_equal(ax.get_images()[0].get_array(), FRAMES[2 * t])
        assert np.array_equal(covers(ax)[..., 3] > 0, ~visible[t])
        assert f"{hidden[t].sum()} hidden" in ax.get_title()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["visible 58", "hidden 7", "outside 6", "unused 1"]
    with pytest.raises(ValueError, match=r"\(3, 3, 8\).*\(3, 4, 4\)"):
        figures.token_masks(FRAMES, visible, hidden, outside, (2, 6, 8))


def test_offsets_point_from_the_second_token_to_the_first():
    pairs = np.array([[70, 9], [3, 20]])
    first, second = (np.stack(np.unravel_index(pairs[:, i], GRID), 1) for i in (0, 1))
    true = (first - second) / GRID  # Eq. 2
    figure = is_drawn(figures.offsets(FRAMES, pairs, true, true + np.array([0, 0, 1 / 8]), TUBELET))
    for ax, one, two in zip(figure.axes, first, second, strict=False):
        arrows = [text for text in ax.texts if hasattr(text, "arrow_patch")]
        middle = [(cell[1:] + 0.5) * (8, 4) - 0.5 for cell in (one, two)]
        assert arrows[0].xy == pytest.approx(middle[0][::-1])
        assert arrows[0].xyann == pytest.approx(middle[1][::-1])
        assert arrows[1].xy == pytest.approx(middle[0][::-1] + np.array([4, 0]))  # one token too far in x
        assert np.array_equal(ax.get_images()[0].get_array(), FRAMES[2 * two[0]])
        step = one - two
        assert f"true ({step[0]:+.1f}, {step[1]:+.1f}, {step[2]:+.1f})" in ax.get_title()


def test_pca_gives_two_groups_of_tokens_two_colours():
    features = RNG.normal(0, 0.01, (*GRID, 12))
    features[..., 4:, :] += RNG.normal(size=12)
    keep = np.ones(GRID, bool)
    keep[:, 0, 0] = False
    features[~keep] = 1e6  # a token without a feature must not matter
    figure = is_drawn(figures.pca_tokens(features, FRAMES, keep, TUBELET))
    assert len(figure.axes) == 6
    colours = covers(figure.axes[3])
    assert abs(colours[:, :4, 0][keep[0, :, :4]].mean() - colours[:, 4:, 0].mean()) > 0.8
    assert colours[0, 0, 3] == 0 and (colours[..., 3] == keep[0]).all()


def test_a_notebook_shows_a_figure_and_pyplot_holds_none():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = figures.clip_strip(FRAMES, MASKS)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert plt.get_fignums() == before


def test_the_same_picture_is_the_same_bytes():
    one, two = (figures.png(figures.overlay(FRAMES[0], MASKS[0])) for _ in range(2))
    assert one == two != figures.png(figures.overlay(FRAMES[1], MASKS[0]))
