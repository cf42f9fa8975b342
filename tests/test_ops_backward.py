"""What every operation owes: the right gradient, in the dtype that came in, as exact as that dtype allows."""

import numpy as np
import pytest

from deltanet_ref.oracle.derivative import complex_step_gradient
from tests.ops_cases import CASES, incoming, run
from tests.tolerances import assert_identical, assert_within_floors, noise_floors

every_operation = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

# Noise floors that one computation may lose: the floor counts one rounding of each argument and result, an operation
# also rounds its intermediates, a handful for each value (the longest chain, attention's softmax, has about ten, which
# add up as their square root). Two computations that are compared may lose it twice.
ONE, BOTH = 4, 8


def floors_of(case, arguments, gradients, dtype):
    """Noise floors of every output and gradient of a case."""
    n = len(arguments)
    return noise_floors(lambda x: run(case, x[:n], x[n:]), [*arguments, *gradients], dtype, draws=8)


@every_operation
def test_backward_is_the_complex_step_derivative_of_forward(case):
    gradients = incoming(case)
    outputs, cache = case.forward(*case.arguments)
    found = case.backward(*gradients, cache)
    assert len(found) == len(case.arguments)
    expected = []
    for position, argument in enumerate(case.arguments):

        def projected(stepped):
            arguments = [x.astype(np.complex128) for x in case.arguments]
            arguments[position] = stepped
            return sum((d * y).sum() for d, y in zip(gradients, case.forward(*arguments)[0]))

        expected.append(complex_step_gradient(projected, argument))
    floors = floors_of(case, case.arguments, gradients, np.float64)
    assert_within_floors(case.results[len(outputs) :], found, expected, floors[len(outputs) :], BOTH)


@every_operation
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_results_have_the_dtype_of_the_arguments(case, dtype):
    results = run(case, [x.astype(dtype) for x in case.arguments], [d.astype(dtype) for d in incoming(case)])
    assert {name: x.dtype for name, x in zip(case.results, results, strict=True)} == dict.fromkeys(case.results, dtype)


@every_operation
def test_float32_loses_no_more_than_rounding_its_arguments_would(case):
    arguments = [x.astype(np.float32) for x in case.arguments]
    gradients = [d.astype(np.float32) for d in incoming(case)]
    exact = run(case, [x.astype(np.float64) for x in arguments], [d.astype(np.float64) for d in gradients])
    floors = floors_of(case, arguments, gradients, np.float32)
    assert_within_floors(case.results, run(case, arguments, gradients), exact, floors, ONE)


@every_operation
def test_strided_arguments_give_the_same_as_contiguous_ones(case):
    """Up to another order of summation."""

    def strided(x):
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan)
        wide[..., ::2] = x
        return wide[..., ::2]

    gradients = incoming(case)
    expected = run(case, case.arguments, gradients)
    found = run(case, [strided(x) for x in case.arguments], [strided(d) if d.ndim else d for d in gradients])
    assert_within_floors(case.results, found, expected, floors_of(case, case.arguments, gradients, np.float64), BOTH)


@every_operation
def test_arguments_and_incoming_gradients_are_left_as_they_were(case):
    arguments, gradients = [x.copy() for x in case.arguments], incoming(case)
    before = [x.copy() for x in arguments + gradients]
    run(case, arguments, gradients)
    names = [*case.inputs.split(), *(f"d{name}" for name in case.outputs.split())]
    for name, x, y in zip(names, arguments + gradients, before, strict=True):
        assert_identical(name, x, y)


@every_operation
def test_backward_twice_gives_the_same_so_the_cache_is_not_spent(case):
    gradients = incoming(case)
    outputs, cache = case.forward(*case.arguments)
    first, second = case.backward(*gradients, cache), case.backward(*gradients, cache)
    for name, x, y in zip(case.results[len(outputs) :], first, second, strict=True):
        assert_identical(name, x, y)
