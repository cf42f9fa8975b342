"""What every operation owes: the right gradient, in the dtype that came in, as exact as that dtype allows."""
import numpy as np
import pytest

from deltanet_ref.oracle.derivative import complex_step_gradient
from tests.ops_cases import CASES, incoming, run

every_operation = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_operation
def test_backward_is_the_complex_step_derivative_of_forward(case):
    gradients = incoming(case)
    outputs, cache = case.forward(*case.arguments)
    found = case.backward(*gradients, cache)
    assert len(found) == len(case.arguments)
    for position, argument in enumerate(case.arguments):
        def projected(stepped):
            arguments = [x.astype(np.complex128) for x in case.arguments]
            arguments[position] = stepped
            return sum((d * y).sum() for d, y in zip(gradients, case.forward(*arguments)[0]))

        expected = complex_step_gradient(projected, argument)
        assert found[position].shape == argument.shape
        error = np.linalg.norm(found[position] - expected) / np.linalg.norm(expected)
        assert error < 1e-10, f"argument {position}: relative error {error:.1e}"     # both are exact but for rounding


@every_operation
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_results_have_the_dtype_of_the_arguments(case, dtype):
    results = run(case, [x.astype(dtype) for x in case.arguments], [d.astype(dtype) for d in incoming(case)])
    assert [x.dtype for x in results] == [np.dtype(dtype)] * len(results)


@every_operation
def test_float32_loses_no_more_than_rounding_its_arguments_would(case):
    # Noise floor: what rounding the arguments to float32 at random does to the float64 result, worst of eight, and
    # rounding the result itself. Measured over all cases: 1.5 floors at most; 4 leaves room for another BLAS or libm.
    rng = np.random.default_rng(0)
    half_ulp = np.finfo(np.float32).eps / 2
    arguments = [x.astype(np.float32) for x in case.arguments]
    gradients = [d.astype(np.float32) for d in incoming(case)]
    count = len(arguments)
    exact = run(case, [x.astype(np.float64) for x in arguments], [d.astype(np.float64) for d in gradients])
    floor = np.zeros(len(exact))
    for _ in range(8):
        moved = [x * (1 + half_ulp * rng.uniform(-1, 1, x.shape)) for x in map(np.float64, arguments + gradients)]
        moved = run(case, moved[:count], moved[count:])
        floor = np.maximum(floor, [np.linalg.norm(m - e) for m, e in zip(moved, exact)])
    floor += [half_ulp * np.linalg.norm(e) for e in exact]
    error = np.array([np.linalg.norm(f - e) for f, e in zip(run(case, arguments, gradients), exact)])
    assert (error <= 4 * floor).all(), f"error / floor of each result: {np.round(error / floor, 1)}"


@every_operation
def test_strided_arguments_give_the_same_as_contiguous_ones(case):
    def strided(x):
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan)
        wide[..., ::2] = x
        return wide[..., ::2]

    gradients = incoming(case)
    expected = run(case, case.arguments, gradients)
    found = run(case, [strided(x) for x in case.arguments], [strided(d) if d.ndim else d for d in gradients])
    for f, e in zip(found, expected):
        np.testing.assert_allclose(f, e, rtol=1e-13, atol=1e-13)           # another order of summation at most


@every_operation
def test_arguments_and_incoming_gradients_are_left_as_they_were(case):
    arguments, gradients = [x.copy() for x in case.arguments], incoming(case)
    before = [x.copy() for x in arguments + gradients]
    run(case, arguments, gradients)
    assert all(np.array_equal(x, y) for x, y in zip(arguments + gradients, before))


@every_operation
def test_backward_twice_gives_the_same_so_the_cache_is_not_spent(case):
    gradients = incoming(case)
    _, cache = case.forward(*case.arguments)
    first, second = case.backward(*gradients, cache), case.backward(*gradients, cache)
    assert all(np.array_equal(x, y) for x, y in zip(first, second))
