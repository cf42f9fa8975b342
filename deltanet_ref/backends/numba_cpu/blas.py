"""Matrix products inside kernels, on strided parts of arrays, by the BLAS that SciPy brings.

Why SciPy's: inside a kernel the heads are the threads, so the BLAS must run on one. NumPy's wheel has a library of its
own, which multiplies the large matrices between the kernels and keeps its threads. (Where the two packages share one
library, kernels call it with all its threads: right, but slower than it could be.)
"""
from pathlib import Path

import llvmlite.binding
import scipy.linalg.cython_blas  # noqa: F401 (loads the library)
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic
from threadpoolctl import ThreadpoolController

from deltanet_ref.backends.numba_cpu.kernel import inlined

for library in ThreadpoolController().lib_controllers:
    if {"scipy.libs", "scipy"} & set(Path(library.filepath).parts[-3:]):           # Linux and Windows; macOS
        library.set_num_threads(1)

ROUTINES = ("sgemm", "dgemm", "strsm", "dtrsm")
for routine in ROUTINES:                           # a name rather than an address: compiled kernels outlive the process
    llvmlite.binding.add_symbol(f"deltanet_ref_{routine}",
                                get_cython_function_address("scipy.linalg.cython_blas", routine))
PLAIN, TRANSPOSED, RIGHT, UPPER, UNIT = (ord(letter) for letter in "NTRUU")


@inlined
def gemm(alpha, A, B, beta, C):
    """C <- alpha A B + beta C. A (m, k), B (k, n), either one a transpose; C (m, n) with contiguous rows.

    Fortran sees every array transposed, so it is asked for C^T = B^T A^T.
    """
    m, n = C.shape
    how_A, step_A = _layout(A)
    how_B, step_B = _layout(B)
    _gemm(how_B, how_A, n, m, A.shape[1], alpha, B, step_B, A, step_A, beta, C, _layout(C)[1])


@inlined
def solve(A, X):
    """X <- (I + A)^-1 X for strictly lower A (c, c), no other entry of which is read; X (c, d) with contiguous rows."""
    _trsm(RIGHT, UPPER, PLAIN, UNIT, X.shape[1], len(A), A.dtype.type(1), A, _layout(A)[1], X, _layout(X)[1])


@inlined
def solve_transposed(A, X):
    """X <- (I + A)^-T X, likewise."""
    _trsm(RIGHT, UPPER, TRANSPOSED, UNIT, X.shape[1], len(A), A.dtype.type(1), A, _layout(A)[1], X, _layout(X)[1])


@inlined
def _layout(A):
    """Whether A's rows or its columns are contiguous, and how far apart they are, in elements."""
    if A.strides[1] == A.itemsize:
        return PLAIN, max(A.strides[0] // A.itemsize, A.shape[1])
    return TRANSPOSED, max(A.strides[1] // A.itemsize, A.shape[0])


def _routine(name):
    """A BLAS routine as a function for kernels: every argument goes by address, whole numbers as 32 bits (a letter is
    its first byte), of an array the address of its first element. The first array decides between s and d."""
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
def _trsm(typing_context, side, triangle, how, diagonal, m, n, alpha, A, step_A, X, step_X):
    i, f = types.int64, A.dtype
    return types.void(i, i, i, i, i, i, f, A, i, X, i), _routine("trsm")
