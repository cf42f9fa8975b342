"""Derivatives exact to rounding, without autodiff: the complex step.

For f analytic and real on the real axis, Im f(x + i h) / h = f'(x) + O(h^2). Nothing is subtracted, so with h = 1e-30
the result is exact to rounding (Squire and Trapp 1998, "Using complex variables to estimate derivatives").
"""

from collections.abc import Callable

import numpy as np


def complex_step_gradient(f: Callable, x: np.ndarray, h: float = 1e-30) -> np.ndarray:
    """Gradient of the scalar f at x, with one evaluation of f per element of x.

    f   maps a complex128 array shaped like x to a complex scalar
    x   real array
    returns float64, shape of x
    """
    x = np.asarray(x, np.float64)
    gradient = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        stepped = x.astype(np.complex128)
        stepped[index] += 1j * h
        gradient[index] = np.imag(f(stepped)) / h
    return gradient
