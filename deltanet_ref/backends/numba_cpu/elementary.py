"""Elementary functions inside kernels; exp in a form that LLVM vectorises."""
import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from deltanet_ref.backends.numba_cpu.compiler import INLINED, inlined

LARGEST, SMALLEST = np.float32(88.37), np.float32(-88.03)          # beyond them n would be 128 and -128
LOG2_E = np.float32(1 / math.log(2))
LN2 = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)       # in two parts, the first of 10 bits
C2, C3, C4, C5, C6 = (np.float32(1 / math.factorial(n)) for n in range(2, 7))
ONE, BIAS, MANTISSA = np.float32(1), np.int32(127), np.int32(23)


def exp(x):
    """e^x inside kernels. float32: vectorised, within 2 ulp, 0 below -87.7 and never infinite. float64: libm's."""
    raise NotImplementedError("for kernels only")


@overload(exp, jit_options=INLINED)
def _exp(x):
    return (lambda x: _exp_float32(x)) if x == types.float32 else (lambda x: math.exp(x))


@njit(**{**INLINED, "fastmath": {"contract"}})                       # reordering would undo the two parts of ln 2
def _exp_float32(x):
    """2^n e^r with n whole and |r| <= ln 2 / 2."""
    clipped = LARGEST if x > LARGEST else SMALLEST if x < SMALLEST else x
    n = np.rint(clipped * LOG2_E)
    r = (clipped - n * LN2[0]) - n * LN2[1]
    e_r = ONE + r * (ONE + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * C6)))))
    return e_r * np.int32((np.int32(n) + BIAS) << MANTISSA).view(np.float32)           # n = -127 makes it 0


def sigmoid(x):
    """1 / (1 + exp(-x)) inside kernels."""
    raise NotImplementedError("for kernels only")


@overload(sigmoid, jit_options=INLINED)
def _sigmoid(x):
    one = np.float32(1) if x == types.float32 else 1.0                     # a plain 1 would make it float64
    return lambda x: one / (one + exp(-x))


@inlined
def softplus(x):
    """log(1 + e^x) of a float64, without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def silu_derivative(x, s):
    """SiLU'(x) for s = sigmoid(x), inside kernels."""
    raise NotImplementedError("for kernels only")


@overload(silu_derivative, jit_options=INLINED)
def _silu_derivative(x, s):
    one = np.float32(1) if x == types.float32 else 1.0
    return lambda x, s: s + x * s * (one - s)
