"""The faults that minicnn is to survive, and the tests that make each one happen."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What happens, and the tests, each as path below tests/ and name.
FAULTS = {
    1: ("NaN or Inf in data or loss", (
        "test_train.py::test_a_non_finite_loss_names_step_and_layer",
        "test_train.py::test_a_non_finite_gradient_names_step_and_parameter",
        "cli/test_cli_train.py::test_a_nan_ends_the_run_and_the_epochs_before_it_are_kept",
        "ops/test_vector.py::test_nan_and_inf_propagate",
        "ops/test_conv2d.py::test_nan_and_inf_reach_the_output",
    )),
    2: ("wrong rank, channels, dtype", (
        "ops/test_conv2d.py::test_bad_input_is_named",
        "ops/test_linear.py::test_bad_input_is_named",
        "test_backend.py::test_bad_arrays_are_named",
    )),
    3: ("kernel larger than the padded input", (
        "ops/test_conv2d.py::test_bad_input_is_named",
        "ops/test_max_pool2d.py::test_bad_input_is_named",
    )),
    4: ("stride, dilation or groups of 0 or less, negative padding", (
        "ops/test_conv2d.py::test_bad_input_is_named",
        "test_shapes.py::test_bad_pairs_are_named",
    )),
    5: ("empty batch", (
        "ops/test_conv2d.py::test_empty_batch",
        "ops/test_batch_norm.py::test_empty_batch_in_evaluation",
        "ops/test_batch_norm.py::test_bad_input_is_named",
    )),
    6: ("label out of range, float label", (
        "ops/test_cross_entropy.py::test_bad_input_is_named",
    )),
    7: ("transposed, negative-stride, Fortran-order input", (
        "ops/test_conv2d.py::test_memory_layout_changes_no_bit",
        "ops/test_cross_entropy.py::test_memory_layout_changes_no_bit",
        "ops/test_batch_norm.py::test_memory_layout_changes_no_bit",
    )),
    8: ("read-only input", (
        "faults/test_fault_arrays.py::test_read_only_input_works_and_no_input_is_changed",
        "faults/test_fault_arrays.py::test_read_only_columns",
    )),
    9: ("big-endian array", (
        "test_backend.py::test_as_arrays_converts_layout_and_byte_order_only",
    )),
    10: ("float16 or integer input", ("test_backend.py::test_bad_arrays_are_named",)),
    11: ("index outside an array inside Numba", (
        "faults/test_fault_arrays.py::test_kernels_stay_inside_their_arrays",
        "faults/test_fault_memory.py::test_no_kernel_leaves_its_arrays",
        "ops/test_vector.py::test_every_access_is_checked_on_request",
    )),
    12: ("sizes that overflow int64", (
        "faults/test_fault_arrays.py::test_sizes_that_no_memory_holds_are_refused_at_once",
        "faults/test_fault_arrays.py::test_a_shape_whose_product_wraps_to_zero",
        "test_shapes.py::test_sizes_are_python_integers_that_do_not_wrap",
    )),
    13: ("truncated, bit-flipped or HTML .gz data file", (
        "data/test_idx.py::test_every_1000th_cut_of_a_gz",
        "data/test_idx.py::test_every_flipped_bit_of_a_gz",
        "data/test_idx.py::test_no_gzip_in_a_gz",
    )),
    14: ("IDX longer than its header says", ("data/test_idx.py::test_damage_is_named",)),
    15: ("corrupt safetensors", (
        "faults/test_fault_files.py::"
        "test_made_up_safetensors_are_refused_before_memory_is_asked_for",
        "test_checkpoint.py::test_a_cut_file_is_refused",
        "test_checkpoint_training.py::test_a_cut_checkpoint_is_refused",
    )),
    16: ("one flipped bit in a weight", (
        "test_checkpoint.py::test_one_flipped_bit_in_any_tensor_is_noticed",
        "test_checkpoint_training.py::test_a_flipped_bit_anywhere_changes_nothing",
        "faults/test_fault_files.py::test_random_damage_is_noticed",
    )),
    17: ("a pickle in a data or weight file", (
        "data/test_idx.py::test_pickle_is_not_executed",
        "data/test_mnist.py::test_served_pickle_is_not_executed",
        "test_checkpoint.py::test_a_pickle_is_not_executed",
        "faults/test_fault_files.py::test_a_pickle_in_place_of_a_checkpoint_is_not_executed",
    )),
    18: ("download cut, wrong hash, no network", (
        "data/test_mnist.py::test_next_mirror_is_tried",
        "data/test_mnist.py::test_no_mirror_left",
        "data/test_mnist.py::test_wrong_hash_shows_both",
    )),
    19: ("disk full at a checkpoint", (
        "faults/test_fault_files.py::test_a_full_disk_keeps_the_last_checkpoint",
        "faults/test_fault_files.py::test_a_file_that_may_not_grow_keeps_the_last_checkpoint",
        "faults/test_fault_files.py::test_a_disk_without_room_is_noticed_before_the_first_update",
        "cli/test_cli_train.py::test_a_full_disk_leaves_the_epochs_before_it_whole",
    )),
    20: ("output folder unwritable", (
        "faults/test_fault_files.py::test_another_users_folder_is_refused_at_the_start",
        "faults/test_fault_files.py::test_an_immutable_folder_is_refused_at_the_start",
        "cli/test_cli_train.py::test_an_unwritable_folder_is_refused_before_any_work",
    )),
    21: ("SIGKILL in a checkpoint", (
        "faults/test_fault_files.py::test_kills_lose_nothing",
        "data/test_idx.py::test_kill_leaves_the_old_or_the_new_file",
    )),
    22: ("leftover temporary files", (
        "test_runs.py::test_what_killed_writes_left_is_swept_at_the_start",
        "test_files.py::test_remains_of_a_killed_write_are_swept_after_a_day",
    )),
    23: ("SIGINT, SIGTERM in an epoch", (
        "faults/test_fault_processes.py::test_a_signal_in_an_update",
        "test_interrupts.py::test_ctrl_c_in_an_update_leaves_no_half_of_it",
        "cli/test_cli_resume.py::test_a_signal_in_an_update_and_then_resume",
    )),
    24: ("im2col does not fit memory", (
        "faults/test_fault_arrays.py::test_a_convolution_whose_columns_do_not_fit_memory",
        "faults/test_fault_arrays.py::"
        "test_columns_that_do_not_fit_memory_are_refused_with_their_size",
    )),
    25: ("Numba cache folder unwritable", (
        "faults/test_fault_processes.py::"
        "test_without_a_cache_folder_kernels_run_with_one_warning",
        "ops/test_compiler.py::test_a_damaged_cache_is_passed_over",
        "ops/test_compiler.py::test_a_cache_whose_files_were_mixed_up_is_passed_over",
    )),
    26: ("two Python threads in kernels", (
        "ops/test_conv2d_numba.py::test_two_python_threads_get_right_results",
        "faults/test_fault_arrays.py::test_threads_that_train_at_once",
    )),
    27: ("fork after a parallel kernel", (
        "faults/test_fault_arrays.py::test_a_fork_after_a_kernel_is_refused_clearly",
    )),
    28: ("CuPy absent or no device", (
        "test_backend.py::test_gpu_without_cupy_says_what_to_install",
        "test_backend.py::test_gpu_without_a_device_says_so",
        "cli/test_cli_train.py::test_cuda_without_cupy_says_what_is_missing",
    )),
    29: ("GPU out of memory", (
        "gpu/test_parts.py::test_a_batch_that_is_too_large_is_taken_in_parts",
        "gpu/test_parts.py::test_what_cannot_be_taken_in_parts_is_refused",
        "gpu/test_parts.py::test_not_even_one_sample_fits",
        "gpu/test_parts.py::test_memory_is_given_back_before_parts_are_tried",
    )),
    30: ("two runs in one folder", (
        "test_locks.py::test_the_second_process_is_told_of_the_first",
        "test_runs.py::test_only_a_run_is_resumed_and_by_one_process",
    )),
}  # fmt: skip


def test_every_fault_has_a_number_and_a_place():
    assert FAULTS.keys() == set(range(1, 31))


@pytest.mark.parametrize("number", FAULTS)
def test_its_tests_exist(number):
    what, tests = FAULTS[number]
    assert what
    assert tests
    for test in tests:
        path, name = test.split("::")
        text = (ROOT / "tests" / path).read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), test
