"""The inspector shows the masks, errors, volumes and EF that it was given, wherever its controls stand."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from smoke_lab import smoke_lab

from usjepa_nb import figures, metrics
from usjepa_nb.camus import UNLABELLED
from usjepa_nb.segment import segmentation
from usjepa_nb.widgets import overlays

SIZE, SPACING = (40, 30), (1.5, 2.0)  # px, mm


def heart(half_y, half_x):
    """A cavity with its ring, and an atrium below."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    cavity, wall = (((y - 16) / (half_y + by)) ** 2 + ((x - 15) / (half_x + by)) ** 2 < 1 for by in (0, 3))
    mask = np.where(cavity, 1, np.where(wall, 2, 0)).astype(np.uint8)
    mask[33:38, 10:20] = 3
    return mask


def beats():
    truth = np.stack([[heart(12 - k, 8 - k) for k in range(4)], [heart(11 - k, 7 - k) for k in range(4)]])
    smaller = np.stack([[heart(11 - k, 7 - k) for k in range(4)]] * 2)
    predicted = {("A", 100): truth, ("A", 10): smaller, ("B", 100): smaller, ("B", 10): np.zeros_like(truth)}
    frames = np.random.default_rng(0).integers(0, 256, truth.shape, dtype=np.uint8)
    return overlays.Beats(frames, truth, predicted, np.full((2, 2), SPACING), ["p1 2CH", "p2 4CH"],
                          np.array([[0, 3], [1, 2]]))


@pytest.fixture(autouse=True)
def at_rest(monkeypatch):
    monkeypatch.delenv("USJEPA_EXERCISE", raising=False)


def differ(figure):
    """Whether a line is drawn around what differs."""
    edges = [tuple(contours.get_edgecolor()[0]) for contours in figure.axes[0].collections]
    return to_rgba(overlays.ERROR) in edges


def test_volumes_and_ef_are_simpsons_at_the_videos_own_instants():
    b = beats()
    wanted = [metrics.simpson_volume(m, SPACING) for m in b.predicted["B", 100][1]]
    np.testing.assert_allclose(b.volumes(("B", 100), 1), wanted)
    ed, es = (metrics.simpson_volume(b.truth[1, k], SPACING) for k in (1, 2))  # the second video's ED is frame 1
    assert b.ejection_fraction(overlays.REFERENCE, 1) == pytest.approx(100 * (ed - es) / ed)
    by_hand = 4 / 3 * np.pi * (12 * 1.5) * (8 * 2.0) ** 2 / 1000  # an ellipsoid, its long axis along y
    assert b.volumes(overlays.REFERENCE, 0)[0] == pytest.approx(by_hand, rel=0.05)


def test_a_frame_without_reference_and_a_mask_without_cavity_have_no_volume():
    b = beats()
    b.truth[0, 1] = UNLABELLED
    assert np.isnan(b.volumes(overlays.REFERENCE, 0)).tolist() == [False, True, False, False]
    assert np.isnan(b.volumes(("B", 10), 0)).all() and np.isnan(b.ejection_fraction(("B", 10), 0))
    figure = overlays.picture(b, 0, "B", 10, 1, errors=True)
    assert not differ(figure)  # nothing to differ from
    assert "EF none, reference" in figure.axes[1].get_title() and figures.png(figure)


def test_titles_tell_frame_instant_score_and_ef():
    b = beats()
    figure = overlays.picture(b, 1, "B", 100, 2)
    assert "p2 4CH, frame 3 of 4 = ES" in figure.axes[0].get_title()
    wanted = np.mean([metrics.dsc(b.predicted["B", 100][1, 2], b.truth[1, 2], c) for c in metrics.CLASSES])
    assert f"DSC of this frame {wanted:.3f}" in figure.axes[0].get_title()
    ef = [b.ejection_fraction(key, 1) for key in (("B", 100), overlays.REFERENCE)]
    assert f"EF {ef[0]:.0f} %, reference {ef[1]:.0f} %" in figure.axes[1].get_title()
    assert overlays.picture(b, 1, "B", 100, 0).axes[0].get_title().startswith("p2 4CH, frame 1 of 4\n")


def test_classes_that_are_not_chosen_are_neither_drawn_nor_counted():
    b = beats()
    only = overlays.picture(b, 0, "B", 100, 0, classes=(3,), errors=True)
    covers = only.axes[0].get_images()[1].get_array()
    assert covers[16, 15, 3] == 0 and tuple(covers[35, 15]) == to_rgba(figures.CLASS_COLOURS[3], 0.35)
    assert "DSC of this frame 1.000, 0.0% of its pixels differ" in only.axes[0].get_title() and not differ(only)
    assert differ(overlays.picture(b, 0, "B", 100, 0, classes=(1,), errors=True))
    assert not differ(overlays.picture(b, 0, "B", 100, 0, classes=(1,)))
    assert "no such class" in overlays.picture(b, 0, "B", 100, 0, classes=()).axes[0].get_title()


def test_the_line_goes_around_what_differs():
    b = beats()
    b.predicted["A", 100] = b.truth.copy()
    b.predicted["A", 100][0, 0, 2:5, 3:7] = 3  # an island
    figure = overlays.picture(b, 0, "A", 100, 0, errors=True)
    (line,) = [c for c in figure.axes[0].collections if tuple(c.get_edgecolor()[0]) == to_rgba(overlays.ERROR)]
    points = np.concatenate([path.vertices for path in line.get_paths()])
    assert points.min(0) == pytest.approx([2.5, 1.5]) and points.max(0) == pytest.approx([6.5, 4.5])
    assert f"{12 / (SIZE[0] * SIZE[1]):.1%} of its pixels differ" in figure.axes[0].get_title()


def test_every_control_is_exercised_and_comes_back(monkeypatch):
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    b, asked, picture = beats(), [], overlays.picture
    monkeypatch.setattr(overlays, "picture", lambda *a: asked.append(a[1:]) or picture(*a))
    box = overlays.inspect(b, 1, "A", 10, 1)
    video, method, fraction, frame, classes, opacity, errors = (set(v) for v in zip(*asked, strict=True))
    assert video == {0, 1} and method == {"A", "B"} and fraction == {10, 100} and frame >= {0, 1, 2, 3}
    assert {(1,), (3,), (1, 2, 3)} == classes and opacity >= {0.0, 1.0} and errors == {False, True}
    assert box.picture.value == figures.png(picture(b, 1, "A", 10, 1))


def test_buttons_go_to_the_instants_of_the_video_that_is_shown():
    b = beats()
    box = overlays.inspect(b, 0, "B", 100, 2)
    box.jumps["ES"].click()
    assert box.controls["frame"].value == 3
    box.controls["video"].value = 1
    box.jumps["ED"].click()
    assert box.controls["frame"].value == 1
    assert box.picture.value == figures.png(overlays.picture(b, 1, "B", 100, 1))


def test_a_result_that_is_missing_is_called_so():
    b = beats()
    del b.predicted["B", 10]
    figure = overlays.picture(b, 0, "B", 10, 0, errors=True)
    assert "not on disk" in figure.axes[0].get_title() and "EF none, reference" in figure.axes[1].get_title()
    assert not differ(figure) and (figure.axes[0].get_images()[1].get_array()[..., 3] == 0).all()


def test_gather_finds_each_rows_own_masks(tmp_path_factory):
    lab = smoke_lab(tmp_path_factory)
    found, rows = segmentation(lab, "random"), lab.store.rows("test", labelled=True)[::-1]
    b = overlays.gather(lab, rows, {("random", 100): found})
    scores = found.scores.query("split == 'test' and which == 'best'").dsc.to_numpy()[::-1]
    for k, wanted in enumerate(scores):
        assert metrics.mean_dsc(b.predicted["random", 100][k], b.truth[k]) == pytest.approx(wanted, nan_ok=True)
    first = lab.store.table.loc[rows[0]]
    assert b.names[0] == f"{first['patient']} {first['view']}"
    assert b.spacings[0].tolist() == [first.spacing_y, first.spacing_x]
    assert tuple(b.instants[0]) == lab.instants(rows[0]) == (0, lab.frames - 1)
