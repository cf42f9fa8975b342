"""What all kernels share: how they are compiled and run on threads, rows of strided arrays, a vectorised exponential.

Threads are Python's, and a kernel runs without the interpreter lock. Against numba's own parallel loops that
compiles in less than half the time, leaves no thread spinning where NumPy's BLAS wants the core (OpenMP), survives a
fork, lets a fast core take more tasks than a slow one, and starts in 5 to 20 us (OpenMP: 1 us spinning, 50 us asleep).
Tasks never add to the same sum, so results do not depend on who computes what.
"""
import math
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple

import numpy as np
from numba import carray, config, from_dtype, njit, types
from numba.core import cgutils, event
from numba.extending import intrinsic, overload

from deltanet_ref.errors import InputError

FAST = {"contract", "reassoc", "nsz", "arcp"}      # sums in any order; no assumption that numbers are finite
OPTIONS = dict(fastmath=FAST, error_model="numpy")         # a division that may raise would not be vectorised
INLINED = dict(**OPTIONS, forceinline=True)
FLOATS = {"f": types.float32, "d": types.float64}
BLOCK = 1 << 14                                    # elements that one task of an element-wise kernel works on
SHARES = 8                                         # a thread takes this part of what would be its tasks at a time

# Numba compiles again when the file of a kernel has changed. The functions that kernels share are in these files:
SHARED_FILES = [Path(__file__).with_name(name) for name in ("kernel.py", "blas.py", "vectors.py")]
SHARED_SOURCE = "_%08x" % zlib.crc32(b"".join(file.read_bytes() for file in SHARED_FILES))

# glibc returns a large array to the system when it is freed, and has the next one cleared, until it has seen the free of
# a larger one. So here is one; without it, 6 ms of a token after a short prompt (0.8B) go there.
np.empty(31 << 20, np.uint8)


class _FirstCompilation(event.Listener):
    """Tells on a terminal why the first run takes its time; kernels that are loaded from __pycache__ are no event."""
    told = False

    def on_start(self, event):
        if not self.told and sys.stderr.isatty():
            print("Compiling kernels for this machine, once: some 20 seconds ...", file=sys.stderr, flush=True)
        self.told = True

    def on_end(self, event):
        pass


event.register("numba:compile", _FirstCompilation())
number_of_threads = config.NUMBA_NUM_THREADS       # the environment's NUMBA_NUM_THREADS, or one for each core


def inlined(function):
    """Decorate a function for use in kernels, to become part of each kernel that calls it.

    As a function by itself it would be one code in the process that compiled it and another one, optimised twice, in
    the stored kernel: their last bits can differ.
    """
    return njit(**INLINED)(function)


def set_threads(n):
    """Run kernels on n threads from now on. Returns the number until now."""
    global number_of_threads
    before, number_of_threads = number_of_threads, n
    return before


def kernel(signature):
    """Decorate a function of (first, last, *args) that does tasks first .. last-1; call it as function(tasks, *args).
    function.work(tasks, *args) is the same as a piece of work for run_together.

    signature: a word for each of args. r3 is an array of 3 axes that is read, w3 one that is written, f a number; those
    are of the dtype of the first one, float32 or float64. i is a whole number, i1 an array of them; b2 is an array of
    records that is read. For each dtype and each kind of record numba compiles on the first call.
    To the compiler arrays have any strides, so that a view does not mean another compilation. Their last axis is
    contiguous all the same (an array that is read is copied where it is not), which `row` makes known.
    Compiled kernels stay in __pycache__.
    """
    words = signature.split()
    records = [i for i, word in enumerate(words) if word[0] == "b"]

    def decorate(function):
        function.__qualname__ += SHARED_SOURCE
        compiled = {}

        def work(tasks, *args):
            dtypes = (args[0].dtype, *[args[i].dtype for i in records])
            if dtypes not in compiled:
                types_of = [_numba_type(word, x, FLOATS[dtypes[0].char]) for word, x in zip(words, args)]
                compiled[dtypes] = njit([(types.int64, types.int64, *types_of)], nogil=True, cache=True,
                                        **OPTIONS)(function)
            args = [_contiguous_rows(x) if word[0] == "r" else x for word, x in zip(words, args)]
            return Work(tasks, compiled[dtypes], args)

        def call(tasks, *args):
            run_together([work(tasks, *args)])
        call.work = work
        return call
    return decorate


class Work(NamedTuple):
    """A kernel with its arguments."""
    tasks: int
    run: Callable             # (first, last, *args)
    args: list


def run_together(works):
    """Every task of every Work, by this thread and those that are free to help, at the price of one start."""
    tasks = sum(work.tasks for work in works)
    step = max(1, tasks // (SHARES * number_of_threads))
    parts = [(work.run, first, min(first + step, work.tasks), work.args)
             for work in works for first in range(0, work.tasks, step)]
    wanted = min(number_of_threads, len(parts)) - 1
    left = iter(parts)                             # next() on it is atomic
    helping, errors = [], []                       # a lock for each helper that has begun, held until it is done

    def take_parts():
        for run, first, last, args in left:
            run(first, last, *args)

    def help():
        done = Lock()
        done.acquire()
        helping.append(done)                       # before it takes a part: one that begins late takes none
        try:
            take_parts()
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    if wanted > 0:
        helpers.ask(help, wanted)
    take_parts()
    for done in helping:
        done.acquire()
    if errors:
        raise errors[0]


class Helpers:
    """Threads that do what they are asked to. A ThreadPoolExecutor would take twice as long to start them."""

    def __init__(self):
        self.jobs, self.threads, self.starting = SimpleQueue(), 0, Lock()

    def ask(self, job, times):
        """Let job() be called by so many threads; it is not waited for."""
        with self.starting:
            for _ in range(times - self.threads):
                Thread(target=self._work, name="kernel", daemon=True).start()
                self.threads += 1
        for _ in range(times):
            self.jobs.put(job)

    def _work(self):
        while True:
            self.jobs.get()()


helpers = Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=helpers.__init__)       # the child has none of the threads


def _numba_type(word, x, dtype):
    scalar = types.int64 if word[0] == "i" else from_dtype(x.dtype) if word[0] == "b" else dtype
    return scalar if len(word) == 1 else types.Array(scalar, int(word[1]), "A", readonly=word[0] != "w")


def _contiguous_rows(x):
    return x if x.strides[-1] == x.itemsize else x.copy()


def same_float(*arrays):
    """Raise InputError unless all arrays are float32, or all float64; None is left out."""
    dtypes = {np.asarray(x).dtype for x in arrays if x is not None}
    if len(dtypes) != 1 or min(dtypes).char not in FLOATS:
        raise InputError("the numba backend computes in float32 or in float64, all arguments alike; these are "
                         f"{' and '.join(sorted(map(str, dtypes)))}: convert them, or use the numpy backend")


def heads(x):
    """x (..., H, d) as (T, H, d): a view where the strides allow it."""
    return x.reshape(-1, *(1, *x.shape)[-2:])


def blocks_of(x):
    """How many tasks of about BLOCK elements the rows of x (..., d) make."""
    return -(-x.size // x.shape[-1] // max(1, BLOCK // x.shape[-1]))


@inlined
def rows_of(x, first, last):
    """The rows of blocks first .. last-1, as numbers t H + h."""
    rows = max(1, BLOCK // x.shape[2])
    return range(first * rows, min(last * rows, x.shape[0] * x.shape[1]))


@inlined
def row(x, *index):
    """x[index], whose single axis is contiguous though the compiler cannot know it."""
    return carray(_pointer(x, index), (x.shape[-1],))


@intrinsic
def _pointer(typing_context, x, index):
    """The address of x[index, 0]."""
    def codegen(context, builder, signature, args):
        array = context.make_array(x)(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, array.strides)
        offset = context.get_constant(types.intp, 0)
        for i, stride in zip(cgutils.unpack_tuple(builder, args[1]), strides):
            offset = builder.add(offset, builder.mul(i, stride))
        return cgutils.pointer_add(builder, array.data, offset)
    return types.CPointer(x.dtype)(x, index), codegen


def exp(x):
    """e^x inside kernels. float32: vectorised, to 2 ulp, 0 below -87.7 and never infinite. float64: libm's."""
    raise NotImplementedError("for kernels only")


@overload(exp, jit_options=INLINED)
def _exp(x):
    return (lambda x: _exp_float32(x)) if x == types.float32 else (lambda x: math.exp(x))


LARGEST, SMALLEST = np.float32(88.37), np.float32(-88.03)          # beyond them n would be 128 and -128
LOG2_E = np.float32(1 / math.log(2))
LN2 = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)       # in two parts, the first of 10 bits
C2, C3, C4, C5, C6 = (np.float32(1 / math.factorial(n)) for n in range(2, 7))
ONE, BIAS, MANTISSA = np.float32(1), np.int32(127), np.int32(23)


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
