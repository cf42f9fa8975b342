"""Matrix products by cuBLAS, through a handle of our own.

CuPy's products are not used: they are refused while a stream captures, and they give no float32 result for bfloat16
operands. The handle is ours because CuPy sets the stream of its own at every product, which would also reset the
workspace. The order of the calls matters: stream first, then workspace; with a workspace that it was given cuBLAS
allocates nothing, so that its calls can be captured.

Products accumulate in float32; float32 operands are multiplied in float32 (never TF32). cuBLAS uses no atomics unless
asked to, so that results are the same from run to run.
"""

import ctypes
from typing import NamedTuple

WORKSPACE = 32 << 20  # bytes; NVIDIA's recommendation for Hopper, more than older cards need
CUDA_TYPES = {"float32": 0, "bfloat16": 14}  # cudaDataType_t: CUDA_R_32F, CUDA_R_16BF
COMPUTE_32F = 68  # cublasComputeType_t
DEFAULT_ALGORITHM = -1  # cublasGemmAlgo_t
NOT_TRANSPOSED, TRANSPOSED = 0, 1  # cublasOperation_t


class BlasError(RuntimeError):
    """cuBLAS returned a status that is not success."""


class Matrix(NamedTuple):
    """A matrix as cuBLAS takes it: rows of `stride` elements, to be read transposed or not."""

    array: object  # keeps the memory
    transposed: bool
    stride: int


class Blas:
    """A cuBLAS handle for one device."""

    def __init__(self, xp, library):
        """library: libcublas, loaded by ctypes, or the stand-in's."""
        self.xp, self.library = xp, library
        self._handle, self._stream, self._workspace = None, None, None

    def product(self, a, b, out, *, transpose_a=False, transpose_b=False, alpha=1.0, accumulate=False) -> None:
        """out = alpha op(a) op(b), or out += ... with accumulate. 2-D arrays; out has contiguous rows."""
        self._check(a, b, out, transpose_a, transpose_b)
        (m, n), k = out.shape, a.shape[0 if transpose_a else 1]
        if 0 in (m, n):
            return
        A, B, C = self._matrix(a, transpose_a), self._matrix(b, transpose_b), _rows(out)
        self._prepare()
        # cuBLAS stores columns: to it our out is (n, m), the product of op(b)^T and op(a)^T
        self._call(
            "cublasGemmEx",
            self._handle,
            ctypes.c_int(TRANSPOSED if B.transposed else NOT_TRANSPOSED),
            ctypes.c_int(TRANSPOSED if A.transposed else NOT_TRANSPOSED),
            *map(ctypes.c_int, (n, m, k)),
            ctypes.byref(ctypes.c_float(alpha)),
            *self._operand(B),
            *self._operand(A),
            ctypes.byref(ctypes.c_float(1.0 if accumulate else 0.0)),
            *self._operand(C),
            ctypes.c_int(COMPUTE_32F),
            ctypes.c_int(DEFAULT_ALGORITHM),
        )

    def _check(self, a, b, out, transpose_a, transpose_b):
        inner = a.shape[0 if transpose_a else 1], b.shape[1 if transpose_b else 0]
        outer = a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]
        if inner[0] != inner[1] or out.shape != outer:
            raise ValueError(f"product of {a.shape} and {b.shape} into {out.shape}, {transpose_a=}, {transpose_b=}")
        types = [x.dtype.name for x in (a, b, out)]
        if types[0] != types[1] or types not in (["float32"] * 3, ["bfloat16"] * 3, ["bfloat16"] * 2 + ["float32"]):
            raise TypeError(f"cuBLAS has no product of {types[0]} and {types[1]} into {types[2]}")

    def _matrix(self, x, transposed):
        """x where it lies if rows or columns are contiguous, or a copy."""
        if not _has_rows(x):
            if _has_rows(x.T):
                x, transposed = x.T, not transposed
            else:
                x = self.xp.ascontiguousarray(x)
        return Matrix(x, transposed, _stride(x))

    def _operand(self, matrix):
        array = matrix.array
        return ctypes.c_void_p(array.data.ptr), ctypes.c_int(CUDA_TYPES[array.dtype.name]), ctypes.c_int(matrix.stride)

    def _prepare(self):
        """The handle on the current stream, with its workspace."""
        stream = self.xp.cuda.get_current_stream().ptr
        if self._handle is None:
            self._handle = ctypes.c_void_p()
            self._call("cublasCreate_v2", ctypes.byref(self._handle))
            self._workspace = self.xp.cuda.alloc(WORKSPACE)
        if stream != self._stream:
            self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(stream))
            place = ctypes.c_void_p(self._workspace.ptr)
            self._call("cublasSetWorkspace_v2", self._handle, place, ctypes.c_size_t(WORKSPACE))
            self._stream = stream

    def _call(self, name, *args):
        status = getattr(self.library, name)(*args)
        if status:
            raise BlasError(f"{name} returned status {status}")


def _has_rows(x):
    """Whether each row is contiguous and rows do not overlap. A stride along an axis of one element means nothing."""
    rows, columns = x.shape
    row, column = x.strides
    return (columns <= 1 or column == x.itemsize) and (rows <= 1 or row >= columns * x.itemsize)


def _stride(x):
    """Elements from one row to the next."""
    return x.strides[0] // x.itemsize if x.shape[0] > 1 else max(1, x.shape[1])


def _rows(out):
    if not _has_rows(out):
        raise ValueError(f"a result {out.shape} with strides {out.strides} has no contiguous rows")
    return Matrix(out, False, _stride(out))


def load():
    """libcublas of the CUDA wheels or the system, as CuPy finds it."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
