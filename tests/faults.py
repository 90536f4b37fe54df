"""The fault matrix: what may go wrong, and the test that makes it go wrong. Helpers that the tests share.

Each test injects its fault and looks at three things: the message (one sentence that names the file or the parameter,
and the remedy), the exit status where there is a process, and what is left on disk. `test_faults_data.py` sees to it
that every test named here exists.
"""

import os
import re
import signal
import time

D, R, S = "test_faults_data.py", "test_faults_runs.py", "system/test_faults_system.py"
CAMUS, STORE, RUNS = "test_camus.py", "test_store.py", "test_runs.py"
FAULT = f"{CAMUS}::test_a_fault_is_refused_with_the_files_name_and_the_remedy"

MATRIX = {
    # images
    "NIfTI cut short": f"{FAULT}[truncated gz]",
    "NIfTI corrupt": f"{FAULT}[corrupt gz]",
    "NIfTI empty": f"{FAULT}[empty]",
    "NIfTI whose header lies about its size": f"{FAULT}[huge header]",
    "NIfTI replaced by a web page": f"{FAULT}[no NIfTI]",
    "NIfTI with random bytes changed": f"{CAMUS}::test_random_damage_never_ends_in_another_error",
    "MHD without RAW": f"{STORE}::test_an_mhd_sequence_without_raw_is_in_the_report_each_time",
    "RAW cut short or empty": f"{CAMUS}::test_a_raw_file_that_is_too_short_is_refused",
    "MHD header cut short": f"{CAMUS}::test_a_damaged_mhd_header_is_refused",
    "wrong dtype: complex": f"{FAULT}[complex]",
    "wrong dtype: 16 bit": f"{FAULT}[16 bit]",
    "wrong dtype: colour": f"{D}::test_pixels_and_labels_of_the_wrong_kind_are_refused[colour]",
    "NaN pixels": f"{FAULT}[NaN]",
    "NaN in a mask": f"{D}::test_pixels_and_labels_of_the_wrong_kind_are_refused[NaN in the mask]",
    "labels between two classes": f"{D}::test_pixels_and_labels_of_the_wrong_kind_are_refused[label 1.5]",
    "unknown label in the sequence's mask": f"{FAULT}[unknown label]",
    "unknown label in the ED mask": f"{D}::test_pixels_and_labels_of_the_wrong_kind_are_refused[label 4 at ED]",
    "mask of another size": f"{FAULT}[mask of other size]",
    "fewer masks than frames": f"{FAULT}[masks missing]",
    "ED and ES of two sizes": f"{CAMUS}::test_stills_that_do_not_match_are_refused",
    "mask or ES of another spacing, or flipped": f"{CAMUS}::test_a_file_on_another_grid_than_its_frames_is_refused",
    "MHD without a spacing": f"{CAMUS}::test_an_mhd_header_that_tells_no_spacing_is_refused",
    "NIfTI in metres": f"{CAMUS}::test_the_unit_of_a_nifti_is_honoured",
    "image that is a folder": f"{D}::test_an_image_that_cannot_be_opened_costs_its_sequence_alone[a folder]",
    "image that is a dead link": f"{D}::test_an_image_that_cannot_be_opened_costs_its_sequence_alone[a dead link]",
    "file without read permission": f"{D}::test_without_permission_the_file_is_named_and_nothing_is_lost",
    # patients, views, cfg, split
    "view missing": f"{CAMUS}::test_one_table_tells_what_a_partial_copy_holds",
    "files named after another patient": f"{CAMUS}::test_files_named_after_another_patient_are_refused",
    "patient folder empty": f"{D}::test_a_patient_without_images_is_reported[empty]",
    "patient folder with a cfg alone": f"{D}::test_a_patient_without_images_is_reported[cfg alone]",
    "cfg missing": f"{FAULT}[no cfg]",
    "cfg is binary": f"{FAULT}[cfg is binary]",
    "cfg with CRLF, CR, BOM, blanks": f"{D}::test_a_cfg_of_another_editor_reads_the_same",
    "cfg in Latin-1 or UTF-16": f"{D}::test_a_cfg_in_another_encoding_is_refused_with_the_remedy",
    "cfg with decimal commas": f"{D}::test_a_decimal_comma_is_refused_and_not_misread",
    "ED or ES out of range": f"{FAULT}[ES is beyond the end]",
    "ED equal to ES": f"{FAULT}[ED is ES]",
    "NbFrame other than the frames": f"{FAULT}[frames missing]",
    "patient twice": f"{CAMUS}::test_a_patient_that_is_there_twice_is_refused_and_others_are_read",
    "patient in two folders": f"{CAMUS}::test_views_from_two_folders_are_not_put_together_as_one_patient",
    "official lists that name nobody here": f"{CAMUS}::test_lists_that_name_nobody_here_are_told_from_no_lists",
    "patient in two official lists": f"{CAMUS}::test_lists_that_would_leak_or_make_no_sense_are_refused",
    "patient in two parts of the file": f"{RUNS}::test_a_patient_in_two_parts_is_caught",
    "official lists missing": f"{CAMUS}::test_without_training_patients_all_are_drawn",
    "one official list missing": f"{D}::test_an_official_list_that_is_missing_is_told",
    "official list that is binary": f"{D}::test_a_list_that_is_no_list_is_quoted_briefly",
    "official list with CRLF and BOM": f"{D}::test_a_list_of_another_editor_reads_the_same",
    "nobody left for validation": f"{D}::test_too_few_patients_are_counted_before_anything_is_trained",
    "image list with BOM, or nested without end": f"{D}::test_an_image_list_of_another_editor",
    # places, clock, locale
    "paths with blanks, non-ASCII, no UTF-8": f"{D}::test_names_of_folders_do_not_matter",
    "file times in the future, before 1970; TZ": f"{D}::test_clocks_and_zones_do_not_matter",
    "LC_ALL=C, German decimal commas, PYTHONUTF8=0": f"{D}::test_the_locale_does_not_matter",
    "notebook run under LC_ALL=C": f"{R}::test_a_notebook_runs_under_any_locale",
    # disk and processes
    "read-only folder": f"{D}::test_without_permission_the_file_is_named_and_nothing_is_lost",
    "read-only mount": f"{S}::test_a_read_only_disk_is_named",
    "read-only mount under a checkpoint": f"{S}::test_a_checkpoint_on_a_read_only_disk_is_named",
    "disk full in a conversion": f"{S}::test_a_conversion_on_a_full_disk_goes_on_when_there_is_space",
    "disk full behind HDF5's back": f"{S}::test_a_disk_that_fills_while_hdf5_writes_costs_no_older_file",
    "disk full at a checkpoint, features, history": f"{S}::test_what_a_run_saved_survives_a_full_disk",
    "disk full under a notebook": f"{S}::test_a_notebook_on_a_full_disk_leaves_the_older_one",
    "two processes convert one tree": f"{STORE}::test_two_processes_at_once_end_with_one_good_file",
    "two processes train one run": f"{R}::test_two_processes_that_want_one_run_train_it_once",
    "kill -9 while sequences are converted": f"{STORE}::test_a_killed_conversion_goes_on_and_ends_with_the_same_file",
    "kill -9 while the HDF5 file is written": f"{D}::test_killed_while_hdf5_is_written_nothing_is_lost",
    "kill -9 while the phantom is made": "test_phantom.py::test_a_killed_run_leaves_no_half_patient_and_is_completed",
    "kill -9 while a checkpoint is written": f"{R}::test_killed_while_a_checkpoint_is_written_it_ends_the_same",
    "kill -9 while features are written": f"{R}::test_killed_while_features_are_written_it_ends_the_same",
    "kill -9 during a papermill run": f"{R}::test_a_killed_notebook_goes_on_and_ends_the_same",
    "kernel dies": f"{R}::test_a_kernel_that_dies_is_told_in_one_sentence",
    "kernel's reply comes unnoticed": "test_execute.py::test_a_reply_whose_notification_was_lost_is_found",
    "worker dies": f"{STORE}::test_a_dead_worker_is_told",
    # files of our own
    "HDF5 cut short": f"{STORE}::test_a_file_cut_short_is_refused_and_made_again",
    "HDF5 cut short while it is open": f"{D}::test_a_file_cut_short_behind_ones_back_is_named",
    "HDF5 damaged inside": f"{D}::test_a_file_that_is_damaged_inside_is_refused_and_made_again",
    "features cut short": "test_probe.py::test_a_damaged_cache_is_named_with_the_remedy",
    "segmentation cut short": f"{R}::test_a_damaged_segmentation_is_named_with_the_remedy",
    "checkpoint cut short": "test_weights.py::test_a_truncated_file_is_refused",
    "published checkpoint of another size": "test_weights.py::test_a_model_of_another_size_is_refused",
    "run's checkpoint of another size or kind": f"{R}::test_a_checkpoint_of_another_run_is_named_with_the_remedy",
    "run.json empty or cut short": f"{R}::test_a_description_that_is_damaged_is_named_and_made_again",
    "checkpoint that carries code": "test_weights.py::test_code_in_a_file_is_refused_and_does_not_run",
    "code in any file of a run": f"{R}::test_code_in_a_file_of_a_run_does_not_run",
    # parameters and devices
    "profile key misspelt": "test_profile.py::test_a_misspelt_or_mistyped_setting_is_named_with_its_file",
    "profile key out of range": "test_profile.py::test_a_setting_out_of_range_is_named_with_the_remedy",
    "profile or grid key twice": f"{R}::test_a_key_that_stands_twice_is_refused",
    "profile with CRLF and BOM": f"{R}::test_a_profile_of_another_editor_reads_the_same",
    "notebook parameter misspelt": f"{R}::test_a_bad_command_is_refused_before_anything_runs[misspelt]",
    "notebook parameter of another kind": f"{R}::test_a_bad_command_is_refused_before_anything_runs[decimal comma]",
    "notebook parameter out of range": f"{R}::test_what_a_lab_is_given_is_checked",
    "notebook cut short": f"{R}::test_a_file_that_is_no_notebook_is_named",
    "Make variable misspelt or out of range": f"{R}::test_make_refuses_what_it_does_not_know",
    "no GPU where one was asked for": f"{R}::test_a_gpu_that_is_not_there_is_not_replaced_in_silence",
    "out of memory in a training": f"{R}::test_a_training_that_needs_too_much_memory_names_the_settings",
    "out of memory in features": f"{R}::test_features_that_need_too_much_memory_name_the_settings",
}


def sentence(text: str, *words: str) -> str:
    """See that a message is one line of readable length, with these words in it."""
    text = str(text).strip()
    assert "\n" not in text and "Traceback" not in text and 20 < len(text) < 500, text
    for word in words:
        assert re.search(word, text), f"{word!r} is not in {text!r}"
    return text


def forked(function) -> int:
    """Start a process that calls the function and ends; its id."""
    child = os.fork()
    if not child:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def ended(child: int, seconds: float = 120) -> int:
    """How a forked process ended: its exit status, or minus the signal."""
    deadline = time.monotonic() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def kill_itself(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(number: int, function, act=kill_itself):
    """The function, which calls `act` in place of its call of that number (from 1)."""
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        return (act if len(calls) == number else function)(*args, **kwargs)

    return called


def tree_of(folder) -> dict:
    """What is in a folder: {relative path: content}."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
