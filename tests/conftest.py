"""Which tests the targets of the Makefile leave out (tests/test_selection.py holds that each name exists), and how
hypothesis draws."""

import pytest
from hypothesis import settings

# The same examples on every machine and in every run; --hypothesis-profile=default draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# Left to `make test-long`: minutes on one core.
LONG = ["test_oracle_mutants.py::test_every_mutant_is_caught_and_nearly_all_are_among_the_first_three_suspects"]

# Left out of `make test-fast`: seconds each, for training runs, programs started per case, kernels compiled anew.
SLOW = [
    "test_adapters_at_runtime.py",
    "test_demo.py",
    "test_oracle_check.py",
    "test_oracle_mutants.py",
    "test_oracle_programs.py",
    "test_routes.py",
    "test_train_lora.py",
    "test_readers.py",
    "test_cli.py",
    "test_backend_numba.py::test_a_kernel_just_compiled_computes_the_bits_of_a_stored_one",
    "test_numba_quants.py::test_products_equal_those_with_the_decoded_values_in_float64",
    "test_numba_quants.py::test_every_type_decodes_as_in_the_gguf_package_bit_for_bit",
    "test_numba_quants.py::test_a_processor_that_cannot_convert_or_shuffle_decodes_the_same_bits",
    "test_delta_rule.py::test_backward_is_the_complex_step_derivative",
    "test_merge.py::test_the_peak_memory_is_a_few_tensors",
    "test_oracle_vectors.py::test_regenerated_vectors_equal_the_committed_ones",
    "test_oracle_vectors.py::test_gradients_equal_the_complex_step_of_the_forward",
    "test_oracle_vectors.py::test_values_and_gradients_equal_50_digit_arithmetic",
    "test_trace.py::test_a_mistake_is_found_where_it_is_and_named",
    "test_ops_elementwise.py::test_elementwise_functions_are_exact_over_the_whole_range",
    "test_pretrain.py::test_pretrain_learns_a_text_and_writes_a_model_that_loads",
    "test_tokenizer.py::test_the_real_vocabulary_is_decoded_once_and_not_before_it_is_used",
    "test_tokenizer.py::test_the_work_of_merging_grows_with_the_length_of_a_run",
    "test_numba_quants.py::test_several_tensors_at_once_give_the_bits_of_one_at_a_time_on_any_number_of_threads",
    "test_verify.py::test_grouped_order_fed_to_a_tiled_base_is_found",
]


def pytest_collection_modifyitems(items):
    for item in items:
        names = {item.path.name, f"{item.path.name}::{getattr(item, 'originalname', item.name)}"}
        for marker, tests in (("long", LONG), ("slow", SLOW)):
            if names & set(tests):
                item.add_marker(getattr(pytest.mark, marker))
