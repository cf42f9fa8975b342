"""A device: its arrays, its kernels, their launches. The array module is CuPy, or stand_in for tests on a CPU."""

import functools
import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltanet_ref.backends.cuda import blas
from deltanet_ref.errors import InputError

KERNELS = Path(__file__).parent / "kernels"
C_TYPES = {"float32": "float", "bfloat16": "__nv_bfloat16", "float64": "double"}


class Kernel(NamedTuple):
    """A compiled entry point and the dynamic shared memory of its launches, in bytes."""

    function: object
    shared: int


class Device:
    """What the operators of this backend compute with; each takes it as its first parameter.

    xp    the array module: CuPy or stand_in
    bf16  ml_dtypes.bfloat16 as a NumPy dtype
    """

    def __init__(self, xp):
        self.xp = xp
        self._modules, self._kernels = {}, {}
        self._uploads = None

    @functools.cached_property
    def bf16(self) -> np.dtype:
        """bfloat16 as a NumPy dtype. ml_dtypes is imported on first use: CuPy needs it, the other backends do not."""
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)

    # ---- arrays

    def empty(self, shape, dtype):
        """An array that is not initialised."""
        return self.xp.empty(shape, dtype)

    def zeros(self, shape, dtype):
        """An array of zeros."""
        return self.xp.zeros(shape, dtype)

    def contiguous(self, x):
        """x itself if it is in C order, or a copy that is."""
        return x if x.flags.c_contiguous else self.xp.ascontiguousarray(x)

    def upload(self, host_array, dtype=None, make=None):
        """A NumPy array, or anything that becomes one, as an array of the device; with make, make(host_array) is.

        What depends on an input of a step that becomes a graph (graph.py) is given as the input itself, whole, and
        make, so that it can be made and uploaded again for other inputs.
        """
        if self._uploads is not None:
            return self._uploads(host_array, dtype, make)
        return self.xp.asarray(on_host(host_array, dtype, make))

    @contextmanager
    def uploading(self, uploads):
        """Inside the with block upload is uploads, called with the same arguments."""
        self._uploads = uploads
        try:
            yield
        finally:
            self._uploads = None

    @functools.cached_property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a block of this card may have."""
        return self.xp.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]

    def free_memory(self) -> int:
        """Bytes that can be allocated."""
        self.xp.get_default_memory_pool().free_all_blocks()
        return self.xp.cuda.runtime.memGetInfo()[0]

    def held_memory(self) -> int:
        """Bytes that the pool has taken from the device, at most: it returns none unless memory runs out."""
        return self.xp.get_default_memory_pool().total_bytes()

    # ---- matrix products

    @functools.cached_property
    def _blas(self):
        """cuBLAS, loaded at the first product; the stand-in has its own."""
        return blas.Blas(self.xp, self.xp.cublas if hasattr(self.xp, "cublas") else blas.load())

    def matmul(self, a, b, transpose_a=False, transpose_b=False, out=None, out_dtype=None, accumulate=False, alpha=1.0):
        """alpha op(a) op(b), op being the transpose where asked for; accumulated in float32.

        a, b        2-D, both float32 or both bfloat16; views with contiguous rows or columns are not copied
        out         the array to write (or, with accumulate, to add to), with contiguous rows; a new one if None
        out_dtype   of a new one: the dtype of a, or float32
        """
        if out is None:
            shape = a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]
            out = self.empty(shape, a.dtype if out_dtype is None else out_dtype)
        self._blas.product(
            a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, alpha=alpha, accumulate=accumulate
        )
        return out

    # ---- kernels

    def kernel(self, file: str, name: str, shared: int = 0, **macros) -> Kernel:
        """The entry point `name` of kernels/FILE.cu, compiled once for each set of macros.

        shared  bytes of dynamic shared memory
        macros  -D definitions: numbers, text, or a dtype, which becomes its C type (REAL=np.float32)
        """
        key = file, name, shared, frozenset(macros.items())
        if key not in self._kernels:
            self._kernels[key] = self._compile(file, name, shared, macros)
        return self._kernels[key]

    def _compile(self, file, name, shared, macros):
        if shared > self.shared_limit:
            raise InputError(
                f"{name} needs {shared:,} bytes of shared memory for these sizes, a block of this card has "
                f"{self.shared_limit:,}: use bfloat16, or backend='numba'"
            )
        macros = tuple((macro, self._macro(value)) for macro, value in sorted(macros.items()))
        if (file, macros) not in self._modules:  # its entry points are compiled together
            options = ("-std=c++17", f"-I{KERNELS}", *(f"-D{macro}={value}" for macro, value in macros))
            self._modules[file, macros] = self.xp.RawModule(code=source(file), options=options)
        function = self._modules[file, macros].get_function(name)
        if shared > function.max_dynamic_shared_size_bytes:  # the limit is the function's, not that of one launch
            function.max_dynamic_shared_size_bytes = shared
        return Kernel(function, shared)

    def _macro(self, value):
        if isinstance(value, bool):
            return str(int(value))
        return str(value) if isinstance(value, str | int | float | np.integer) else C_TYPES[np.dtype(value).name]

    def launch(self, kernel: Kernel, grid, block, *args) -> None:
        """Launch on the current stream; an empty grid launches nothing (CuPy would make it one block).

        grid, block  ints or tuples of up to three
        args         arrays of the device, in C order; None, a null pointer; int, passed as int32; float, as float32;
                     NumPy scalars as they are (np.int64 for long long)
        """
        grid, block = _triple(grid), _triple(block)
        if 0 not in grid:
            kernel.function(grid, block, tuple(map(self._argument, args)), shared_mem=kernel.shared)

    def _argument(self, x):
        if isinstance(x, self.xp.ndarray):
            if not x.flags.c_contiguous:
                raise ValueError(f"an argument {x.shape} with strides {x.strides} is not in C order: use contiguous")
            return x
        if x is None or isinstance(x, np.generic):
            return x
        if isinstance(x, bool | int):
            return np.int32(x)  # raises OverflowError for what does not fit
        if isinstance(x, float):
            return np.float32(x)
        raise TypeError(f"a kernel cannot take {type(x).__name__}")


def on_host(host_array, dtype, make) -> np.ndarray:
    """A copy in C order of what Device.upload uploads."""
    return np.array(host_array if make is None else make(host_array), dtype, order="C")


def _triple(n):
    return (*map(int, n if isinstance(n, tuple) else (n,)), 1, 1)[:3]


def source(file: str) -> str:
    """The text of kernels/FILE.cu, with a digest of all headers at its end.

    CuPy caches compiled code by the text of the source and the options: without the digest it would not notice a
    changed header.
    """
    headers = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(KERNELS.glob("*.cuh")))).hexdigest()
    return f'#line 1 "{file}.cu"\n{(KERNELS / f"{file}.cu").read_text()}\n// headers: {headers}\n'
