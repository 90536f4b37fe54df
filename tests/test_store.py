"""The HDF5 file holds what the tree holds, whoever made it and however often the making was interrupted."""

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_camus import REAL, REAL_MHD, film, real, real_mhd, write_cfg, write_lists, write_nifti, write_patient
from torch.nn import functional as F

from usjepa_nb import camus, parts
from usjepa_nb.camus import UNLABELLED, CamusError
from usjepa_nb.clips import resize_frame, resize_mask
from usjepa_nb.store import Store, clip_index, convert


def make(root, out, size=8, **kwargs):
    return convert(root, out, size, **{"workers": 1, "progress": False} | kwargs)


@pytest.fixture
def tree(tmp_path):
    """Four patients: a film, one stored backwards without sequence masks, ED and ES only, nothing labelled."""
    root = tmp_path / "tree"
    nifti = root / "database_nifti"
    write_lists(root, train=["patient0001", "patient0002"], val=["patient0003"], test=["patient0004"])
    write_patient(nifti, "patient0001", "2CH")
    write_patient(nifti, "patient0002", "4CH", ED=7, ES=1, shape=(7, 20, 14), sequence_gt=False, seed=2)
    write_patient(nifti, "patient0003", "4CH", sequence=False, sequence_gt=False, EF=None, seed=3)
    write_patient(nifti, "patient0004", "4CH", sequence_gt=False, stills=False, stills_gt=False, seed=4)
    return root


@pytest.fixture
def store(tree, tmp_path):
    make(tree, tmp_path / "data.h5")
    with Store(tmp_path / "data.h5") as store:
        yield store


def leftovers(out):
    return sorted(p.name for p in out.parent.glob(f"{out.name}?*") if p.suffix != ".lock")


# --- which frames make a clip

@pytest.mark.parametrize(("length", "frames", "rule", "index"), [
    (64, 16, "step", list(range(0, 64, 4))),
    (20, 16, "step", [0, 4, 8, 12, 16] + [19] * 11),  # the paper's rule on a median CAMUS sequence
    (3, 4, "step", [0, 2, 2, 2]),
    (18, 4, "cover", [0, 6, 11, 17]),
    (10, 16, "cover", [0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8, 9]),
    (5, 1, "cover", [0]),
    (1, 4, "cover", [0, 0, 0, 0]),
    (2, 4, "cover", [0, 0, 1, 1]),
    (2, 4, "step", [0, 0, 1, 1]),
    (2, 8, "cover", [0] * 4 + [1] * 4)])
def test_clip_rules_by_hand(length, frames, rule, index):
    assert clip_index(length, frames, rule).tolist() == index


lengths = st.integers(1, 80)


@given(lengths, lengths, st.sampled_from(["cover", "step"]), st.integers(1, 9), st.floats(0, 1, exclude_max=True))
def test_a_clip_never_leaves_its_sequence_nor_runs_backwards(length, frames, rule, step, offset):
    index = clip_index(length, frames, rule, step, offset)
    assert index.shape == (frames,) and index.dtype.kind == "i"
    assert index.min() >= 0 and index.max() < length and (np.diff(index) >= 0).all()


@given(lengths, st.integers(2, 80))
def test_cover_without_offset_holds_both_ends_and_as_many_frames_as_it_can(length, frames):
    index = clip_index(length, frames)
    assert index[0] == 0 and index[-1] == length - 1 and len(set(index)) == min(length, frames)


@given(st.integers(3, 80), st.integers(2, 80), st.floats(0, 1, exclude_max=True))
def test_the_offset_moves_an_instant_by_less_than_a_stride_and_a_half_frame(length, frames, offset):
    moved = clip_index(length, frames, offset=offset) - clip_index(length, frames)
    assert moved.min() >= 0 and moved.max() <= np.ceil((length - 1) / (frames - 1))


@given(st.integers(1, 40), st.floats(0, 1, exclude_max=True), st.sampled_from(["cover", "step"]))
def test_of_two_frames_each_fills_one_half(half, offset, rule):
    assert clip_index(2, 2 * half, rule, 4, offset).tolist() == [0] * half + [1] * half


@pytest.mark.parametrize("wrong", [
    {"rule": "Cover"}, {"length": 0}, {"frames": 0}, {"step": 0}, {"offset": 1.0}, {"offset": -0.1},
    {"offset": float("nan")}])
def test_clip_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        clip_index(**{"length": 9, "frames": 4} | wrong)


# --- resizing

@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)),
              elements=st.sampled_from([0, 1, 2, 3, UNLABELLED])), st.integers(1, 24))
def test_resizing_invents_no_label(mask, size):
    small = resize_mask(mask, size)
    assert small.shape == (size, size) and small.dtype == np.uint8 and set(small.flat) <= set(mask.flat)


@given(arrays(np.uint8, (9, 9), elements=st.sampled_from([0, 1, 2, 3, UNLABELLED])))
def test_the_same_size_changes_nothing(mask):
    assert (resize_mask(mask, 9) == mask).all() and (resize_frame(mask, 9) == mask).all()


@given(arrays(np.uint8, st.tuples(st.integers(2, 12), st.integers(2, 12)), elements=st.integers(0, 3)),
       st.integers(12, 40), st.integers(12, 40))
def test_enlarging_is_linear_in_each_class_as_torch_does_it(mask, height, width):
    shares = F.one_hot(torch.from_numpy(mask).long(), 4).permute(2, 0, 1)[None].double()
    shares = F.interpolate(shares, (height, width), mode="bilinear", align_corners=False)[0].numpy()
    large = resize_mask(mask, (height, width))
    assert large.shape == (height, width) and large.dtype == np.uint8
    assert (np.take_along_axis(shares, large[None].astype(int), 0)[0] > shares.max(0) - 1e-6).all()  # ties are free


def test_a_mask_keeps_its_shape_and_a_thin_wall_its_area():
    quarters = np.kron([[0, 1], [3, UNLABELLED]], np.ones((24, 40))).astype(np.uint8)
    assert (resize_mask(quarters, 8) == np.kron([[0, 1], [3, UNLABELLED]], np.ones((4, 4)))).all()
    yy, xx = np.mgrid[:400, :600] / np.array([400, 600])[:, None, None]
    ring = (np.abs(np.hypot(yy - 0.5, xx - 0.5) - 0.3) < 0.03).astype(np.uint8)
    assert abs(resize_mask(ring, 64).mean() / ring.mean() - 1) < 0.05


def test_frames_are_antialiased():
    stripes = np.tile(np.array([0, 200], np.uint8), (64, 32))
    grey = resize_frame(stripes, 8).astype(int)  # one column in eight, taken as it is, would be all 0 or all 200
    assert np.abs(grey - 100).max() <= 5


# --- tree -> HDF5

def test_the_file_holds_what_the_tree_holds(tree, store):
    sequences = [camus.read(entry) for entry in camus.scan(tree)]
    assert len(store) == len(sequences) == 4 and store.size == 8
    for i, s in enumerate(sequences):
        row = store.table.iloc[i]
        assert (store.frames(i) == [resize_frame(frame, 8) for frame in s.frames]).all()
        assert (store.masks(i) == [resize_mask(mask, 8) for mask in s.masks]).all()
        assert row["length"] == len(s.frames) and (row["ed"], row["es"]) == (0, len(s.frames) - 1)
        for name in ("patient", "view", "quality", "sex", "age", "frame_rate", "ed_es_only", "was_reversed", "sha256"):
            assert row[name] == getattr(s, name)
        np.testing.assert_equal(row["ef"], s.ef)
        assert (row["native_h"], row["native_w"]) == s.frames.shape[1:]
        assert row["spacing_y"] * 8 == pytest.approx(0.5 * row["native_h"])
        assert row["spacing_x"] * 8 == pytest.approx(0.25 * row["native_w"])
        if row["labelled"]:
            assert (store.native_masks(i) == s.masks[[s.ed, s.es]]).all()
    assert store.table["labelled"].tolist() == [True, True, True, False] and store.native_masks(3) is None
    assert store.table["was_reversed"].tolist() == [False, True, False, False]
    assert store.table["split"].tolist() == ["train", "train", "val", "test"]
    assert store.split_note == "4 of 4 patients by the official lists"


def test_columns_stand_in_the_order_in_which_one_reads_them(store):
    assert list(store.table)[:7] == ["patient", "view", "split", "start", "length", "ed", "es"]


def test_rows_are_chosen_by_part_and_by_labels(store):
    assert store.rows().tolist() == [0, 1, 2, 3]
    assert store.rows("train").tolist() == [0, 1] and store.rows("test", labelled=True).tolist() == []
    assert store.rows(labelled=False).tolist() == [3]
    with pytest.raises(ValueError, match="'valid'"):
        store.rows("valid")


def test_ed_es_only_means_every_labelled_sequence(tree, tmp_path, store):
    assert not store.ed_es_only
    for name in ("patient0001", "patient0002"):
        shutil.rmtree(tree / "database_nifti" / name)
    make(tree, tmp_path / "few.h5")
    with Store(tmp_path / "few.h5") as few:
        assert few.ed_es_only  # the film that is left has no masks
    shutil.rmtree(tree / "database_nifti" / "patient0003")
    make(tree, tmp_path / "few.h5")
    assert not Store(tmp_path / "few.h5").ed_es_only


@pytest.mark.parametrize("rule", ["cover", "step"])
def test_a_clip_is_what_its_index_says(store, rule):
    for i in store.rows():
        clip = store.clip(i, 5, rule, step=2, offset=0.4)
        assert (clip.index == clip_index(len(store.frames(i)), 5, rule, 2, 0.4)).all()
        assert (clip.frames == store.frames(i)[clip.index]).all()
        assert (clip.masks == store.masks(i)[clip.index]).all()
        assert clip.distinct == len(set(clip.index))


def test_neither_place_nor_workers_nor_time_matter(tree, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(tree, moved, copy_function=shutil.copy)  # without times
    for file in moved.rglob("*.cfg"):
        os.utime(file, (1, 1))
    shutil.copytree(tree, tmp_path / "same" / "tree")
    for name, root, workers in (("one", tree, 1), ("two", tmp_path / "same" / "tree", 2), ("moved", moved, 1)):
        make(root, tmp_path / f"{name}.h5", workers=workers)
    one, two, moved = (Store(tmp_path / f"{name}.h5") for name in ("one", "two", "moved"))
    assert one.path.read_bytes() == two.path.read_bytes()
    assert one.data_hash == moved.data_hash and one.table.equals(moved.table)
    make(tree, tmp_path / "size.h5", size=9)
    write_patient(tree / "database_nifti", "patient0001", "2CH", seed=9)
    make(tree, tmp_path / "content.h5")
    assert len({Store(tmp_path / f"{name}.h5").data_hash for name in ("one", "size", "content")}) == 3


def test_what_is_done_is_reused_and_what_changed_is_made_again(tree, tmp_path):
    out = tmp_path / "data.h5"

    def counts(**kwargs):
        report = make(tree, out, **kwargs)
        return report.converted, report.reused

    assert counts() == (4, 0)
    before = out.stat()
    assert counts() == (0, 4) and out.stat().st_mtime_ns == before.st_mtime_ns and leftovers(out) == []
    write_patient(tree / "database_nifti", "patient0001", "2CH", seed=7)
    assert counts() == (1, 3)
    write_cfg(tree / "database_nifti" / "patient0001", "2CH", EF=55)  # as many bytes as before
    assert counts() == (1, 3) and Store(out).table["ef"][0] == 55
    write_patient(tree / "database_nifti", "patient0000", "4CH")
    assert counts() == (1, 4)
    shutil.rmtree(tree / "database_nifti" / "patient0002")
    assert counts() == (0, 4)
    make(tree, tmp_path / "fresh.h5")
    assert (tmp_path / "fresh.h5").read_bytes() == out.read_bytes()
    assert counts(size=9) == (4, 0)


def test_another_draw_is_written_without_converting_again(tree, tmp_path):
    shutil.rmtree(tree / "database_split")
    out, drawn = tmp_path / "data.h5", set()
    for seed in range(6):
        assert make(tree, out, seed=seed).converted == (0 if seed else 4)
        with Store(out) as store:
            assert f"seed {seed}" in store.split_note
            drawn.add(tuple(store.table["split"]))
    assert len(drawn) > 1


def test_a_bad_sequence_is_reported_and_the_rest_converts(tree, tmp_path):
    bad = tree / "database_nifti" / "patient0001" / "patient0001_2CH_half_sequence.nii.gz"
    bad.write_bytes(bad.read_bytes()[:100])
    for workers in (1, 2):
        out = tmp_path / f"{workers}.h5"
        report = make(tree, out, workers=workers)
        assert list(report.refused) == [f"patient0001/{bad.name}"] and report.converted == 3
        assert "download it again" in report.refused[f"patient0001/{bad.name}"]
        assert Store(out).table["patient"].tolist() == ["patient0002", "patient0003", "patient0004"]
    again = make(tree, out)
    assert again.reused == 3 and again.refused == report.refused
    write_nifti(bad, film()[0])
    assert make(tree, out).converted == 1 and len(Store(out)) == 4


def test_a_patient_that_turns_up_twice_later_is_no_longer_taken(tree, tmp_path):
    make(tree, tmp_path / "data.h5")
    shutil.copytree(tree / "database_nifti" / "patient0002", tree / "old" / "patient0002")
    report = make(tree, tmp_path / "data.h5")
    assert "patient0002 is there twice" in " ".join(report.refused.values())
    assert "patient0002" not in Store(tmp_path / "data.h5").table["patient"].tolist()


def test_when_nothing_converts_there_is_no_file_but_a_sentence(tmp_path):
    folder, _ = write_patient(tmp_path / "tree")
    (folder / "Info_4CH.cfg").unlink()
    with pytest.raises(CamusError, match=r"no sequence could be converted.*Info_4CH.cfg is missing"):
        make(tmp_path / "tree", tmp_path / "data.h5")
    assert not (tmp_path / "data.h5").exists()


def test_an_mhd_sequence_without_raw_is_in_the_report_each_time(tmp_path):
    folder, _ = write_patient(tmp_path / "tree", ending=".mhd", sequence_gt=False)
    (folder / "patient0001_4CH_sequence.raw").unlink()
    for converted in (1, 0):
        report = make(tmp_path / "tree", tmp_path / "data.h5")
        assert report.converted == converted and list(report.refused) == ["patient0001/patient0001_4CH_sequence.mhd"]


def test_a_raw_file_that_comes_later_is_taken_in(tmp_path):
    folder, _ = write_patient(tmp_path / "tree", ending=".mhd")
    raw = folder / "patient0001_4CH_sequence.raw"
    data = raw.read_bytes()
    raw.unlink()
    make(tmp_path / "tree", tmp_path / "data.h5")
    raw.write_bytes(data)
    report = make(tmp_path / "tree", tmp_path / "data.h5")
    assert report.converted == 1 and not report.refused and Store(tmp_path / "data.h5").table["length"][0] == 6


# --- interrupted, twice at once, on a bad disk

SCRIPT = """
import sys
from usjepa_nb.store import convert
report = convert(sys.argv[1], sys.argv[2], 64, workers=int(sys.argv[3]), progress=False)
print(report.converted, report.reused)
"""


def start(tmp_path, root, out, workers):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, script, root, out, str(workers)], env=env, stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def long_tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("long")
    for n in range(12):
        write_patient(root, f"patient{n:04d}", ending=".nii", stills=False, stills_gt=False,
                      shape=(20, 300, 200), seed=n)
    return root


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="wants Linux's /proc to see the workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_goes_on_and_ends_with_the_same_file(tmp_path, long_tree, workers):
    out = tmp_path / "data.h5"
    process = start(tmp_path, long_tree, out, workers)
    while not list(Path(f"{out}.parts").glob("*.npz")) and process.poll() is None:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists() and len(children) >= workers - 1
    deadline = time.monotonic() + 60
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, children))  # no worker waits for a parent that is gone
    (tmp_path / "data.h5.tmp123").write_bytes(b"of a process killed while it wrote")
    report = make(long_tree, out, size=64)
    assert report.reused >= 1 and report.converted >= 1 and report.reused + report.converted == 12
    make(long_tree, tmp_path / "undisturbed.h5", size=64)
    assert out.read_bytes() == (tmp_path / "undisturbed.h5").read_bytes() and leftovers(out) == []


def test_a_script_without_a_main_guard_runs_once(tmp_path, tree):
    process = start(tmp_path, tree, tmp_path / "data.h5", 2)
    try:
        assert process.communicate(timeout=120)[0] == b"4 0\n" and process.returncode == 0
    finally:
        process.kill()


def test_two_processes_at_once_end_with_one_good_file(tmp_path, long_tree):
    out = tmp_path / "data.h5"
    both = [start(tmp_path, long_tree, out, 1) for _ in range(2)]
    counts = sorted(tuple(map(int, process.communicate()[0].split())) for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert counts == [(0, 12), (12, 0)] and leftovers(out) == []
    make(long_tree, tmp_path / "alone.h5", size=64)
    assert out.read_bytes() == (tmp_path / "alone.h5").read_bytes()


@pytest.mark.parametrize("damage", [lambda data: data[:-50], lambda data: data[:300] + bytes(20) + data[320:]])
def test_a_part_damaged_by_a_power_cut_is_made_again(tree, tmp_path, monkeypatch, damage):
    out = tmp_path / "data.h5"
    with monkeypatch.context() as patch:
        patch.delattr("usjepa_nb.store._write")  # all parts are made, the file is not
        with pytest.raises(NameError):
            make(tree, out)
    part = sorted(Path(f"{out}.parts").glob("*.npz"))[1]
    part.write_bytes(damage(part.read_bytes()))
    report = make(tree, out)
    assert (report.converted, report.reused) == (1, 3)


def test_a_part_with_a_byte_changed_is_no_longer_whole_or_reads_the_same(tmp_path):
    path, frames = tmp_path / "part.npz", np.arange(512, dtype=np.uint8).reshape(2, 16, 16)
    np.savez_compressed(path, row='{"ed": 0}', native_masks=frames % 4, frames=frames, masks=frames % 3)
    data, damaged = path.read_bytes(), 0
    assert parts.is_whole(path) and not parts.is_whole(tmp_path / "none.npz")
    for at in range(0, len(data), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1:])
        if parts.is_whole(path):
            assert parts.load(path, "row") == {"ed": 0} and (parts.load(path, "frames") == frames).all()
        else:
            damaged += 1
    assert damaged > len(data) / 6
    with pytest.raises(OSError, match=r"none.npz cannot be read as a converted sequence .*: convert again"):
        parts.load(tmp_path / "none.npz", "row")


@pytest.mark.parametrize("where", ["numpy.savez_compressed", "h5py.Dataset.__setitem__", "shutil.disk_usage"])
def test_a_full_disk_leaves_no_half_file_and_says_what_to_do(tree, tmp_path, monkeypatch, where):
    out = tmp_path / "data.h5"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(CamusError, match=r"data.h5 could not be written \(No space.*goes on where it stopped"):
            make(tree, out)
    assert not out.exists() and leftovers(out) == ["data.h5.parts"]
    assert not [p for p in Path(f"{out}.parts").iterdir() if p.suffix != ".npz"]
    assert len(make(tree, out).refused) == 0 and len(Store(out)) == 4


def test_hdf5_is_not_begun_where_it_cannot_be_ended(tree, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(CamusError, match=r"No space left on device, 0 MB wanted"):
            make(tree, tmp_path / "data.h5")
    assert make(tree, tmp_path / "data.h5").reused == 4


def test_a_dead_worker_is_told(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("usjepa_nb.parts._make", lambda *job: os._exit(9))
    with pytest.raises(CamusError, match=r"data.h5: a worker process died: run it again with workers=1"):
        make(tree, tmp_path / "data.h5", workers=2)


def test_a_folder_that_cannot_be_written_is_named(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CamusError, match=r"file/data.h5 could not be written"):
        make(tree, tmp_path / "file" / "data.h5")


@pytest.mark.parametrize("size", [0, -8, 9.5])
def test_a_size_that_is_no_number_of_pixels_is_refused(tree, tmp_path, size):
    with pytest.raises(ValueError, match="size"):
        make(tree, tmp_path / "data.h5", size=size)


# --- opening

def damage(store, change):
    store.close()
    store.path.write_bytes(change(store.path.read_bytes()))


@pytest.mark.parametrize("change", [
    lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: data[:20], lambda data: b"",
    lambda data: b"no HDF5" * 99])
def test_a_file_cut_short_is_refused_and_made_again(tree, store, change):
    damage(store, change)
    with pytest.raises(CamusError, match=r"data.h5 is cut short or no HDF5 file .*: delete it and convert again"):
        Store(store.path)
    assert make(tree, store.path).converted == 4 and len(Store(store.path)) == 4


@pytest.mark.parametrize("attrs", [{}, {"format": "usjepa_nb store", "version": 99}, {"format": "x", "version": 1}])
def test_another_kind_or_version_of_file_is_refused(tmp_path, attrs):
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update(attrs)
    with pytest.raises(CamusError, match=r"data.h5 is of another kind"):
        Store(path)


def test_an_absent_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(CamusError, match=r"none.h5 is not there: make it with store.convert"):
        Store(tmp_path / "none.h5")


def checksum(store, i):
    return int(store.frames(i).sum()), store.native_masks(i).sum() if store.native_masks(i) is not None else None


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_store_is_pickled_forked_and_used_by_many_at_once(store):
    wanted = [checksum(store, i) for i in store.rows()]
    copy = pickle.loads(pickle.dumps(store))
    assert [checksum(copy, i) for i in copy.rows()] == wanted and copy.table.equals(store.table)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(checksum, [store] * 4, range(4))) == wanted  # pickled
    forked = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: forked.put([checksum(store, i) for i in range(4)]))  # inherited
    child.start()
    assert forked.get(timeout=60) == wanted
    child.join()


def test_an_open_store_outlives_the_conversion_that_replaces_its_file(tree, store):
    wanted = store.frames(0)
    write_patient(tree / "database_nifti", "patient0001", "2CH", seed=7)
    make(tree, store.path)
    assert (store.frames(0) == wanted).all() and not (Store(store.path).frames(0) == wanted).all()


# --- the real thing, where it is at hand

@real
@real_mhd
def test_real_copies_convert(tmp_path):
    some = tmp_path / "some"
    for name in ("patient0001", "patient0006", "patient0500"):
        (some / "database_nifti").mkdir(parents=True, exist_ok=True)
        (some / "database_nifti" / name).symlink_to(REAL / "database_nifti" / name)
    (some / "database_split").symlink_to(REAL / "database_split")
    report = make(some, tmp_path / "real.h5", size=64)
    with Store(tmp_path / "real.h5") as store:
        assert (report.converted, report.refused) == (4, {}) and store.ed_es_only
        assert store.table["length"].tolist() == [2, 2, 15, 2]
        assert store.table["labelled"].tolist() == [True, True, False, True]
        for i in store.rows(labelled=True):
            native, stored = store.native_masks(i), store.masks(i)
            for label in camus.LABELS:  # a label's share of the picture survives resizing
                assert (stored == label).mean() == pytest.approx((native == label).mean(), rel=0.05)
    report = make(REAL_MHD, tmp_path / "mhd.h5", size=64)
    assert report.converted == 2 and len(report.refused) == 2
    nifti, mhd = Store(tmp_path / "real.h5"), Store(tmp_path / "mhd.h5")
    assert mhd.table["spacing_y"][1] == pytest.approx(nifti.table["spacing_y"][0], rel=1e-6)
    assert np.abs(mhd.frames(1).astype(int) - nifti.frames(0)).mean() < 3
