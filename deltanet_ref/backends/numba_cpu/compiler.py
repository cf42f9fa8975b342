"""How kernels are compiled: numba's options, the signature of a kernel in words, and what makes numba compile again."""
import sys
import zlib
from pathlib import Path

import numpy as np
from numba import from_dtype, njit, types
from numba.core import event

from deltanet_ref.backends.numba_cpu.threads import Work, run_together

FAST = {"contract", "reassoc", "nsz", "arcp"}      # sums in any order; no assumption that numbers are finite
OPTIONS = dict(fastmath=FAST, error_model="numpy")         # a division that may raise would not be vectorised
INLINED = dict(**OPTIONS, forceinline=True)
FLOATS = {"f": types.float32, "d": types.float64}

# Numba compiles a stored kernel again when the kernel's own file has changed. The functions that kernels share are in
# other files, so a checksum of all files is part of each kernel's name.
SOURCES = sorted(Path(__file__).parent.glob("*.py"))
SHARED_SOURCE = f"_{zlib.crc32(b''.join(file.read_bytes() for file in SOURCES)):08x}"


class _Notice(event.Listener):
    """Announces on a terminal that compilation has begun, once for each dtype. Loading a stored kernel is no event."""
    announced = set()

    def __init__(self, dtype):
        self.dtype = dtype

    def on_start(self, event):
        if self.dtype not in self.announced and sys.stderr.isatty():
            print(f"Compiling the {self.dtype} kernels for this processor, once: 20 to 60 seconds ...", file=sys.stderr,
                  flush=True)
        self.announced.add(self.dtype)

    def on_end(self, event):
        pass


def inlined(function):
    """Decorate a function for use in kernels; each kernel that calls it contains a copy.

    If it were not inlined, the freshly compiled and the stored kernel could differ in the last bit: the stored one has
    been optimised twice.
    """
    return njit(**INLINED)(function)


def kernel(signature: str):
    """Decorate a function of (first, last, *args) that does tasks first .. last-1; call it as function(tasks, *args).
    function.work(tasks, *args) is the same as a Work for run_together.

    signature: a word for each of args. r3 is an array of 3 axes that is read, w3 one that is written, f a number; those
    have the dtype of the first one, float32 or float64. i is an integer, i1 an integer array; b2 is an array of
    records that is read. Each dtype and each kind of record is compiled on its first call and stored in __pycache__.

    To the compiler, arrays have any strides, so that a view does not mean another compilation. The last axis of a
    written array must be contiguous, and `row` relies on it; arrays that are read are copied where their rows are not
    contiguous, overlap or run backwards, which a BLAS could not express.
    """
    words = signature.split()
    records = [i for i, word in enumerate(words) if word[0] == "b"]

    def decorate(function):
        function.__qualname__ += SHARED_SOURCE
        compiled = {}

        def work(tasks, *args):
            dtypes = (args[0].dtype, *[args[i].dtype for i in records])
            if dtypes not in compiled:
                compiled[dtypes] = _compiled(function, words, args)
            return Work(tasks, compiled[dtypes], [_readable(word, x) for word, x in zip(words, args)])

        def call(tasks, *args):
            run_together([work(tasks, *args)])
        call.work = work
        return call
    return decorate


def _compiled(function, words, args):
    dtype = args[0].dtype
    types_of = [_numba_type(word, x, FLOATS[dtype.char]) for word, x in zip(words, args)]
    with event.install_listener("numba:compile", _Notice(dtype)):
        return njit([(types.int64, types.int64, *types_of)], nogil=True, cache=True, **OPTIONS)(function)


def _numba_type(word, x, dtype):
    scalar = types.int64 if word[0] == "i" else from_dtype(x.dtype) if word[0] == "b" else dtype
    return scalar if len(word) == 1 else types.Array(scalar, int(word[1]), "A", readonly=word[0] != "w")


def _readable(word, x):
    """x, or a copy with contiguous rows."""
    return x if word[0] != "r" or x.flags.c_contiguous or _has_rows(x) else np.ascontiguousarray(x)


def _has_rows(x):
    """Whether the last axis is contiguous and the strides of the others are at least a row."""
    *outer, last = x.strides
    return last == x.itemsize and all(s >= x.shape[-1] * last or n == 1 for s, n in zip(outer, x.shape))
