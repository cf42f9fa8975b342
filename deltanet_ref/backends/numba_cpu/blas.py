"""Matrix products inside kernels, on strided parts of arrays, by SciPy's BLAS on one thread.

The threads are the kernels' own: a BLAS that splits a product over threads of its own waits for all of them inside
every product, spinning, and under other load one of them is not running (measured with two busy processes on two cores:
a product of 0.2 ms took 12 ms). SciPy's wheel has a library of its own, so NumPy's keeps its threads for other code.
Where both packages share one library it is limited to one thread, in the whole process.
"""
from pathlib import Path

import llvmlite.binding
import scipy.linalg.cython_blas  # noqa: F401 (loads the library)
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic
from threadpoolctl import ThreadpoolController

from deltanet_ref.backends.numba_cpu.compiler import inlined


def scipy_libraries():
    """threadpoolctl's controllers of the BLAS that SciPy calls; of every BLAS where SciPy's wheel brought none."""
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    own = [library for library in libraries
           if {"scipy.libs", "scipy"} & set(Path(library.filepath).parts[-3:])]    # Linux and Windows; macOS
    return own or libraries


for library in scipy_libraries():
    library.set_num_threads(1)

ROUTINES = ("sgemm", "dgemm", "sgemv", "dgemv", "strsm", "dtrsm")
for routine in ROUTINES:                           # by name, not by address: compiled kernels outlive the process
    llvmlite.binding.add_symbol(f"deltanet_ref_{routine}",
                                get_cython_function_address("scipy.linalg.cython_blas", routine))
PLAIN, TRANSPOSED, RIGHT, UPPER, UNIT = (ord(letter) for letter in "NTRUU")


@inlined
def gemm(alpha, A, B, beta, C):
    """C <- alpha A B + beta C. A (m, k), B (k, n), either with contiguous rows or columns; C (m, n) with contiguous
    rows.

    Fortran sees every array transposed, so the call computes C^T = B^T A^T.
    """
    m, n = C.shape
    how_A, step_A = _layout(A)
    how_B, step_B = _layout(B)
    _gemm(how_B, how_A, n, m, A.shape[1], alpha, B, step_B, A, step_A, beta, C, _layout(C)[1])


@inlined
def gemv(alpha, A, B, beta, C):
    """gemm of one row, A (1, k) and C (1, n), which does not copy B."""
    k, n = B.shape
    how, step_B = _layout(B)
    step_A = max(A.strides[1] // A.itemsize, 1)
    if how == PLAIN:
        _gemv(PLAIN, n, k, alpha, B, step_B, A, step_A, beta, C, 1)
    else:
        _gemv(TRANSPOSED, k, n, alpha, B, step_B, A, step_A, beta, C, 1)


@inlined
def solve(A, X):
    """X <- (I + A)^-1 X. A (c, c) is strictly lower, its other entries are not read; X (c, d) has contiguous rows."""
    _trsm(RIGHT, UPPER, PLAIN, UNIT, X.shape[1], len(A), A.dtype.type(1), A, _layout(A)[1], X, _layout(X)[1])


@inlined
def solve_transposed(A, X):
    """X <- (I + A)^-T X, for A and X as in solve."""
    _trsm(RIGHT, UPPER, TRANSPOSED, UNIT, X.shape[1], len(A), A.dtype.type(1), A, _layout(A)[1], X, _layout(X)[1])


@inlined
def _layout(A):
    """PLAIN if A's rows are contiguous, TRANSPOSED if its columns are, and the distance between them in elements."""
    if A.strides[1] == A.itemsize:
        return PLAIN, max(A.strides[0] // A.itemsize, A.shape[1], 1)
    return TRANSPOSED, max(A.strides[1] // A.itemsize, A.shape[0], 1)


def _routine(name):
    """A BLAS routine as a function for kernels. Every argument is passed by address: integers as 32 bits (of which a
    letter is the first byte), arrays as the address of their first element. The first array decides between s and d."""
    def codegen(context, builder, signature, args):
        dtype = next(t.dtype for t in signature.args if isinstance(t, types.Array))
        addresses = []
        for t, value in zip(signature.args, args):
            if isinstance(t, types.Array):
                address = context.make_array(t)(context, builder, value).data
            else:
                if isinstance(t, types.Integer):
                    value = builder.trunc(value, ir.IntType(32))
                address = cgutils.alloca_once_value(builder, value)
            addresses.append(builder.bitcast(address, cgutils.voidptr_t))
        prefix = {types.float32: "s", types.float64: "d"}[dtype]
        function_type = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t] * len(args))
        function = cgutils.get_or_insert_function(builder.module, function_type, f"deltanet_ref_{prefix}{name}")
        builder.call(function, addresses)
        return context.get_dummy_value()
    return codegen


@intrinsic
def _gemm(typing_context, how_A, how_B, m, n, k, alpha, A, step_A, B, step_B, beta, C, step_C):
    i, f = types.int64, A.dtype
    return types.void(i, i, i, i, i, f, A, i, B, i, f, C, i), _routine("gemm")


@intrinsic
def _gemv(typing_context, how, m, n, alpha, A, step_A, x, step_x, beta, y, step_y):
    i, f = types.int64, A.dtype
    return types.void(i, i, i, f, A, i, x, i, f, y, i), _routine("gemv")


@intrinsic
def _trsm(typing_context, side, triangle, how, diagonal, m, n, alpha, A, step_A, X, step_X):
    i, f = types.int64, A.dtype
    return types.void(i, i, i, i, i, i, f, A, i, X, i), _routine("trsm")
