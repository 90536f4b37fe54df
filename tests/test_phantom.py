"""The phantom: the same bits, the layout of CAMUS, and physics that does what it claims."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

from usjepa_nb import anatomy, echo, phantom

SPACING = 1.2  # coarse pixels: the tests are about claims, not looks
SEED = 373  # its sequences are short


def digest(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def make(root, **changes):
    defaults = {"patients": 2, "seed": SEED, "spacing": SPACING, "workers": 1, "progress": False}
    return phantom.make(root, **defaults | changes)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make(tmp_path_factory.mktemp("phantom") / "tree")


@pytest.fixture(scope="module")
def beat():
    return echo.render(seed=1, number=1, view="4CH", quality="Good", spacing=0.6, frames=8)


# --- the data set ---------------------------------------------------------------------------------
def test_a_script_without_a_main_guard_makes_the_same_bits_with_two_workers(tree, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
print("read", flush=True)
from usjepa_nb import phantom
phantom.make(sys.argv[1], 2, {SEED}, spacing={SPACING}, workers=2, progress=False)
""")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, script, tmp_path / "again"], env=env, capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr
    assert digest(tmp_path / "again") == digest(tree)


def test_another_seed_gives_another_data_set(tree, tmp_path):
    other = make(tmp_path / "other", patients=1, seed=5)
    name = "database_nifti/patient0001/patient0001_4CH_ED.nii.gz"
    assert (other / name).read_bytes() != (tree / name).read_bytes()


@pytest.mark.parametrize("view", anatomy.VIEWS)
def test_files_are_those_of_camus(tree, view):
    folder = tree / "database_nifti" / "patient0002"
    assert len(list(folder.iterdir())) == 14
    text = (folder / f"Info_{view}.cfg").read_text()
    assert not text.endswith("\n")
    cfg = dict(line.split(": ") for line in text.split("\n"))
    assert list(cfg) == ["ED", "ES", "NbFrame", "Sex", "Age", "ImageQuality", "EF", "FrameRate"]
    images = {part: nib.load(folder / f"patient0002_{view}_{part}.nii.gz") for part in
              (f"{stem}{gt}" for stem in ("ED", "ES", "half_sequence") for gt in ("", "_gt"))}
    for part, image in images.items():
        values = np.asanyarray(image.dataobj)
        assert values.dtype == np.float32 and np.array_equal(values, values.round())
        assert values.min() >= 0 and values.max() <= (3 if part.endswith("_gt") else 255)
        step = image.header.get_zooms()[0]
        np.testing.assert_allclose(image.affine, np.diag([-step, -step, 1, 1]), rtol=1e-6)
        assert abs(step / SPACING - 1) < 0.035 and image.header.get_xyzt_units()[0] == "mm"
    video, masks = (np.asanyarray(images[f"half_sequence{gt}"].dataobj) for gt in ("", "_gt"))
    assert video.shape == masks.shape and video.shape[2] == int(cfg["NbFrame"]) and 10 <= video.shape[2] <= 42
    for part in ("ED", "ES"):  # cfg counts from 1
        k = int(cfg[part]) - 1
        np.testing.assert_array_equal(np.asanyarray(images[part].dataobj), video[..., k])
        np.testing.assert_array_equal(np.asanyarray(images[f"{part}_gt"].dataobj), masks[..., k])
        assert set(np.unique(masks[..., k])) == {0, 1, 2, 3}
    # Transposed, the apex is up: the ventricle lies above the atrium.
    assert np.nonzero(masks[..., 0].T == 1)[0].mean() < np.nonzero(masks[..., 0].T == 3)[0].mean()


def test_reader_of_the_real_data_reads_it(tree):
    camus = pytest.importorskip("usjepa_nb.camus")
    entries = camus.scan(tree)
    assert len(entries) == 4
    read = next(s for s in map(camus.read, entries) if (s.patient, s.view) == ("patient0001", "4CH"))
    memory = phantom.sequence(SEED, "4CH", spacing=SPACING)
    np.testing.assert_array_equal(read.frames, memory.frames)
    np.testing.assert_array_equal(read.masks, memory.masks)
    assert (read.ed, read.es, read.ef, read.quality) == (memory.ed, memory.es, memory.ef, memory.quality)
    assert (read.sex, read.age, read.frame_rate) == (memory.sex, memory.age, memory.frame_rate)
    np.testing.assert_allclose(read.spacing, memory.spacing, rtol=1e-6)


def test_a_reversed_sequence_is_stored_from_es_to_ed(tmp_path):
    frames = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((3, 4, 5), np.uint8)
    d = {"frames": frames, "masks": 0 * frames, "reverse": True, "spacing": 0.6, "sex": "F", "age": 50,
         "quality": "Good", "ef": 55.4, "frame_rate": 50.0}
    phantom.write_view(tmp_path, "p_4CH", "4CH", d)
    assert (tmp_path / "Info_4CH.cfg").read_text().startswith("ED: 3\nES: 1\nNbFrame: 3\n")
    assert nib.load(tmp_path / "p_4CH_ED.nii.gz").get_fdata().max() == 0
    video = nib.load(tmp_path / "p_4CH_half_sequence.nii.gz").get_fdata()
    assert video.shape == (5, 4, 3) and video[0, 0].tolist() == [2, 1, 0]


def test_some_of_many_are_reversed_and_lengths_spread_as_in_camus():
    draws = [echo.draw_acquisition(np.random.default_rng(i)) for i in range(2000)]
    frames = np.array([d["frames"] for d in draws])
    assert 0.02 < np.mean([d["reverse"] for d in draws]) < 0.06
    assert frames.min() >= 10 and frames.max() <= 42 and 17 <= np.median(frames) <= 20
    assert all(33 <= d["frame_rate"] <= 86 for d in draws)


@pytest.mark.parametrize(("patients", "sizes"), [(1, (1, 0, 0)), (3, (1, 1, 1)), (60, (36, 12, 12))])
def test_split_is_60_20_20_and_covers_everybody_once(patients, sizes):
    parts = phantom.split(patients, seed=0)
    assert tuple(len(parts[k]) for k in ("training", "validation", "testing")) == sizes
    listed = sorted(name for names in parts.values() for name in names)
    assert listed == [f"patient{n:04d}" for n in range(1, patients + 1)]


# --- interrupted, repeated, misused ---------------------------------------------------------------
def test_only_what_is_missing_is_made_again_with_the_same_bits(tmp_path, tree):
    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    before = {p: p.stat().st_mtime_ns for p in root.glob("database_nifti/*/*.nii.gz")}
    shutil.rmtree(root / "database_nifti" / "patient0002")
    make(root)
    assert digest(root) == digest(tree)
    kept = [p for p in before if "patient0002" not in p.name]
    assert kept and all(p.stat().st_mtime_ns == before[p] for p in kept)


def test_a_killed_run_leaves_no_half_patient_and_is_completed(tmp_path, tree):
    root = tmp_path / "killed"
    code = f"""
import os, signal, sys
from usjepa_nb import phantom
save, calls = phantom.save_nifti, []
def dying(*args):
    calls.append(args)
    if len(calls) == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args)
phantom.save_nifti = dying
phantom.make(sys.argv[1], 2, {SEED}, spacing={SPACING}, workers=1, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code, str(root)], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in (root / "database_nifti").iterdir()] == ["patient0001"]  # 12 images, then dead
    assert list((root / ".partial").rglob("patient0002_*"))  # the half patient is outside the data set
    assert digest(make(root)) == digest(tree)


@pytest.mark.parametrize("change", [{"seed": 5}, {"patients": 4}, {"spacing": 0.9}])
def test_other_arguments_on_the_same_folder_are_refused(tree, change):
    before = digest(tree)
    with pytest.raises(ValueError, match=f"another phantom .*{next(iter(change))}.*new folder"):
        make(tree, **change)
    assert digest(tree) == before


def test_a_tree_of_an_older_version_is_refused(tmp_path, tree):
    root = tmp_path / "old"
    shutil.copytree(tree, root)
    marker = root / "phantom.cfg"
    marker.write_text(marker.read_text().replace(f"version: {phantom.VERSION}", "version: 1"))
    with pytest.raises(ValueError, match=f"another phantom .version 1, not {phantom.VERSION}.*new folder"):
        make(root)


def test_never_writes_into_a_data_set_that_is_not_its_own(tmp_path):
    (tmp_path / "database_nifti").mkdir()
    with pytest.raises(ValueError, match="not a phantom's"):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["database_nifti"]


@pytest.mark.parametrize("bad", [{"patients": 0}, {"workers": 0}, {"spacing": 0}])
def test_bad_arguments_are_named(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(tmp_path / "new", **bad)
    assert not (tmp_path / "new").exists()


def test_sequence_names_a_wrong_view_or_quality():
    with pytest.raises(ValueError, match="3CH"):
        phantom.sequence(0, "3CH")
    with pytest.raises(ValueError, match="Awful"):
        phantom.sequence(0, "2CH", "Awful")


# --- geometry and motion --------------------------------------------------------------------------
def hearts(seed):
    patient = anatomy.draw_patient(np.random.default_rng(seed))
    return [anatomy.Heart(np.random.default_rng([seed, i]), patient, v) for i, v in enumerate(anatomy.VIEWS)]


def test_ef_of_a_known_shape():
    """A cylinder of 30 mm that shortens by 20 % and narrows by a half keeps 0.8 * 0.25 of its volume."""
    class Cylinder:
        length, axial = 80.0, 0.2

        def boundaries(self, c):
            return anatomy.Y, np.full((2, len(anatomy.Y)), 15.0 * (1 - 0.5 * c)), None

    assert anatomy.ejection_fraction([Cylinder(), Cylinder()]) == pytest.approx(100 * (1 - 0.8 * 0.25))


def test_ef_in_the_cfg_is_that_of_the_masks():
    """Disks counted in pixels of both views, across the long axis: volume = pi/4 * sum of d_2CH * d_4CH."""
    pair = hearts(3)
    step = 0.25
    y, x = np.mgrid[-20:150:step, -70:70:step]
    volume = []
    for c in (0, 1):
        rows = []
        for heart in pair:
            widths = (heart.labels(x, y, c) == 1).sum(1) * step
            widths = widths[widths > 0]
            even = np.interp(np.linspace(0, 1, 300), np.linspace(0, 1, len(widths)), widths)
            rows.append((even, len(widths) * step))
        volume.append((rows[0][0] * rows[1][0]).mean() * max(rows[0][1], rows[1][1]))
    assert anatomy.ejection_fraction(pair) == pytest.approx(100 * (1 - volume[1] / volume[0]), abs=1.0)


def test_ef_spreads_over_patients():
    ef = [anatomy.ejection_fraction(hearts(seed)) for seed in range(200)]
    assert 45 < np.median(ef) < 60 and min(ef) < 30 and max(ef) > 65 and 0 < min(ef) and max(ef) < 90


def test_place_and_locate_are_inverse():
    heart, rng = hearts(0)[0], np.random.default_rng(0)
    x, y, pose = rng.uniform(-60, 60, 500), rng.uniform(-20, 150, 500), (3.0, 25.0, 0.2)
    np.testing.assert_allclose(heart.locate(*heart.place(x, y, pose), pose), (x, y), atol=1e-9)


@pytest.mark.parametrize("c", [0.0, 0.4, 1.0])
def test_scatterers_and_masks_move_together(c):
    """Every scatterer keeps the label it was born with: tissue never crosses the contour."""
    heart, sector, pose = hearts(2)[1], (140.0, 0.65), np.array([0.0, 25.0, 0.1])
    tissue = echo.Tissue(np.random.default_rng(0), heart, sector, pose, 5.0)
    born = heart.labels(*tissue.move(0.0), 0.0)
    assert np.mean(heart.labels(*tissue.move(c), c) == born) > 0.995


def test_mitral_valve_is_ajar_at_ed_in_most_and_shut_by_es():
    """Measured as the gap between the two leaflets' tips; the leaflets never leave the ventricle."""
    gaps = []
    for seed in range(40):
        heart, rng = hearts(seed)[1], np.random.default_rng(seed)
        valve = anatomy.Leaflets(rng, heart, 6.0)
        for c in (0.0, 1.0):
            x, y = valve.move(c)
            assert (y <= heart.length * (1 - heart.axial * c)).all()
            tips = [x[(valve.side == k) & (valve.along > 0.95)].mean() for k in (0, 1)]
            gaps.append(tips[1] - tips[0])
    at_ed, at_es = np.reshape(gaps, (-1, 2)).T
    assert np.mean(at_ed > 8) > 0.5 and np.median(at_es) < 3 and (at_es < at_ed + 1).all()


def test_cavity_lies_a_little_right_of_the_middle():
    """In CAMUS, 4CH at ED: right of it in 88 % of patients."""
    right = []
    for seed in range(100):
        heart = hearts(seed)[1]
        _, pose = anatomy.draw_pose(np.random.default_rng(seed), heart)
        right.append(heart.place(0.0, 0.55 * heart.length, pose)[0])
    assert 0.75 < np.mean(np.array(right) > 0) < 0.98


def test_cavity_shrinks_and_atrium_fills(beat):
    area = {k: (beat["masks"] == k).sum((1, 2)) for k in (1, 3)}
    assert np.all(np.diff(area[1]) < 0) and area[3][-1] > area[3][0]


def test_wall_keeps_its_volume():
    """Shell of revolution, mid-ventricle: integral of (outer^2 - inner^2) dy stays, so the wall thickens."""
    heart = hearts(1)[0]
    middle = (anatomy.Y > 0.2 * heart.length) & (anatomy.Y < 0.7 * heart.length)
    volume, thickness = [], []
    for c in (0, 1):
        y1, inner, outer = heart.boundaries(c)
        volume.append(((outer ** 2 - inner ** 2) * np.gradient(y1))[:, middle].sum())
        thickness.append((outer - inner)[:, middle].mean())
    assert volume[1] == pytest.approx(volume[0], rel=0.01) and thickness[1] > thickness[0]


# --- speckle and quality --------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_speckle_moves_with_the_tissue(seed):
    """Speckle of the myocardium correlates better at the same material points than at the same pixels."""
    heart, sector, pose, spacing = hearts(seed)[1], (140.0, 0.65), np.array([0.0, 28.0, 0.05]), 0.4
    scanner = echo.Scanner(np.random.default_rng(seed), sector, spacing, "Good")
    tissue = echo.Tissue(np.random.default_rng(seed), heart, sector, pose, 5.0)
    places, speckles = [], []
    for c in (0.0, 0.15):
        scanner.old = None  # no persistence: it would tie the same pixels together
        places.append(heart.place(*tissue.move(c), pose))
        frame = scanner.image(*places[-1], tissue.weight).astype(float)
        speckles.append(frame - gaussian_filter(frame, 3 / spacing))  # anatomy out
    wall = (heart.labels(*tissue.move(0.0), 0.0) == 2) & (np.hypot(*places[0]) < 120)
    wall &= np.all([np.abs(np.arctan2(*p)) < 0.6 for p in places], axis=0)

    def at(speckle, place):
        return map_coordinates(speckle, [(place[i][wall] - grid[0, 0]) / spacing
                                         for i, grid in ((1, scanner.z), (0, scanner.x))], order=1)

    still, moved = (np.corrcoef(at(speckles[0], places[0]), at(speckles[1], p))[0, 1] for p in places)
    assert moved > still + 0.2, (still, moved)


def test_blood_is_renewed_and_tissue_mostly_kept():
    heart = hearts(0)[1]
    tissue = echo.Tissue(np.random.default_rng(0), heart, (140.0, 0.65), np.array([0.0, 25.0, 0.0]), 5.0)
    before = tissue.weight.copy()
    tissue.renew()
    changed = tissue.weight != before
    assert changed[tissue.blood].all() and changed[~tissue.blood].mean() == pytest.approx(0.04, abs=0.01)


def test_worse_quality_has_less_contrast():
    contrast = {}
    for quality in echo.QUALITY:
        steps = []
        for number in range(1, 5):
            d = echo.render(7, number, "4CH", quality, SPACING, 2)
            frame, mask = d["frames"][0].astype(float), d["masks"][0]
            seen = frame > 0
            steps.append(frame[(mask == 2) & seen].mean() - frame[(mask == 1) & seen].mean())
        contrast[quality] = np.mean(steps)
    assert contrast["Good"] > contrast["Medium"] > contrast["Poor"] > 0


def test_endocardium_is_a_gradient_not_a_step():
    """Mean grey level rises over several mm across the contour: no 1 mm holds half of the whole rise."""
    profiles = []
    for number in range(1, 7):
        d = echo.render(3, number, "4CH", "Good", 0.6, 2)
        frame, mask = d["frames"][0].astype(float), d["masks"][0]
        depth = 0.6 * (distance_transform_edt(mask != 1) - distance_transform_edt(mask == 1))
        near = np.isin(mask, (1, 2)) & (frame > 0)
        profiles.append([frame[near & (depth >= a) & (depth < a + 1)].mean() for a in range(-6, 6)])
    profile = np.mean(profiles, 0)
    rise = profile[-1] - profile[0]
    assert rise > 25 and np.diff(profile).max() < 0.5 * rise


def test_an_echo_fades_by_es_only_as_its_drift_says():
    heart, pose = hearts(0)[1], np.array([0.0, 25.0, 0.0])
    tissue = echo.Tissue(np.random.default_rng(0), heart, (140.0, 0.65), pose, 5.0)
    np.testing.assert_array_equal(tissue.echoes(0.0), tissue.weight)
    np.testing.assert_allclose(tissue.echoes(1.0), tissue.weight * 10 ** (tissue.drift / 20), rtol=1e-5)


def test_a_single_scatterer_shows_where_it_is():
    scanner = echo.Scanner(np.random.default_rng(0), (120.0, 0.65), 0.5, "Good")
    frame = scanner.image(np.array([10.0]), np.array([70.0]), np.array([1.0]))
    assert 100 < frame.max() < 255
    z, x = (t[np.unravel_index(frame.argmax(), frame.shape)] for t in (scanner.z, scanner.x))
    assert abs(x - 10) < 1.0 and abs(z - 70) < 1.0


def test_outside_the_sector_is_black(beat):
    frames = beat["frames"]
    z, x = np.indices(frames.shape[1:])
    x = x - (frames.shape[2] - 1) / 2
    outside = (np.abs(np.arctan2(x, z + 0.5)) > np.radians(46)) | (np.hypot(x, z) > frames.shape[1] + 1)
    assert outside.any() and (frames[:, outside] == 0).all()
    assert 0.5 < (frames[0] > 0).mean() < 0.6  # 0.54 in CAMUS
