"""Two BLAS libraries on one thread each: SciPy's for products inside kernels, on strided parts of arrays; NumPy's for
the large products between kernels (linear.py).

Threads already share the tasks of a kernel, so SciPy's library is limited for good. NumPy's also serves the rest of the
process, and is limited only while this backend multiplies. Where the two packages share one library (their wheels do
not), it is limited for good.
"""
from pathlib import Path
from threading import Lock

import llvmlite.binding
import scipy.linalg.cython_blas  # noqa: F401 (loads the library)
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic
from threadpoolctl import ThreadpoolController

from deltanet_ref.backends.numba_cpu.compiler import inlined


def _limit(library, n):
    """Let a library compute on n threads, whichever Python thread calls this.

    threadpoolctl accepts OpenBLAS's number from the first Python thread that sets one, and ignores all others (3.8).
    """
    if library.internal_api == "openblas" and library.threading_layer == "pthreads":
        names = [f"{first}openblas_set_num_threads{last}" for first in ("", "scipy_") for last in ("", "64_", "_64")]
        next(getattr(library.dynlib, name) for name in names if hasattr(library.dynlib, name))(n)
    else:
        library.set_num_threads(n)


class _OnOneThread:
    """Context in which libraries compute on one thread. Several threads may be in it; the last to leave restores."""

    def __init__(self, libraries):
        self.libraries, self.lock, self.inside, self.limited = libraries, Lock(), 0, []

    def __enter__(self):
        with self.lock:
            if self.inside == 0:
                numbers = [(library, library.get_num_threads()) for library in self.libraries]
                self.limited = [(library, n) for library, n in numbers if n > 1]
                for library, _ in self.limited:
                    _limit(library, 1)
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for library, n in self.limited:
                    _limit(library, n)


_libraries = ThreadpoolController().select(user_api="blas").lib_controllers
_scipy = [library for library in _libraries
          if {"scipy.libs", "scipy"} & set(Path(library.filepath).parts[-3:])] or _libraries       # Linux, macOS
for library in _scipy:
    _limit(library, 1)
numpy_on_one_thread = _OnOneThread([library for library in _libraries if library not in _scipy])

ROUTINES = ("sgemm", "dgemm", "strsm", "dtrsm")
for routine in ROUTINES:                           # by name, not by address: compiled kernels outlive the process
    llvmlite.binding.add_symbol(f"deltanet_ref_{routine}",
                                get_cython_function_address("scipy.linalg.cython_blas", routine))
PLAIN, TRANSPOSED, RIGHT, UPPER, UNIT = (ord(letter) for letter in "NTRUU")


@inlined
def gemm(alpha, A, B, beta, C):
    """C <- alpha A B + beta C. A (m, k), B (k, n), each with contiguous rows or columns; C (m, n) with contiguous rows.

    Fortran sees every array transposed, so the call computes C^T = B^T A^T.
    """
    m, n = C.shape
    how_A, step_A = _layout(A)
    how_B, step_B = _layout(B)
    _gemm(how_B, how_A, n, m, A.shape[1], alpha, B, step_B, A, step_A, beta, C, _layout(C)[1])


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
def _trsm(typing_context, side, triangle, how, diagonal, m, n, alpha, A, step_A, X, step_X):
    i, f = types.int64, A.dtype
    return types.void(i, i, i, i, i, i, f, A, i, X, i), _routine("trsm")
