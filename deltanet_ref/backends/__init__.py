"""The operators again, faster. backends/interface.py is the contract; an explicit choice is obeyed or refused, never
silently replaced."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

from deltanet_ref.backends.interface import Backend
from deltanet_ref.errors import InputError

CPU_BACKENDS = ("numpy", "numba")
BACKENDS = {  # imported on request: a module, or a function of it that returns the backend
    "numpy": ("deltanet_ref.ops", None),
    "numba": ("deltanet_ref.backends.numba_cpu", None),
    "cuda": ("deltanet_ref.backends.cuda", "card"),
    "cuda-emulated": ("deltanet_ref.backends.cuda", "emulated"),
}


def get_backend(name: str, dtype: str = "float32") -> Backend:
    """A backend by name.

    "numpy"          deltanet_ref.ops itself, the definition
    "numba"          kernels for the CPU, compiled on first use
    "cuda"           kernels for an NVIDIA card
    "cuda-emulated"  the same on the CPU, slow: for tests
    "auto"           cuda where there is a card, CuPy is installed and dtype is not float64; numba elsewhere

    Raises InputError for a name that this version does not have, and where something that it needs is missing.
    """
    if name == "auto":
        name = "cuda" if dtype != "float64" and has_card() and find_spec("cupy") else "numba"
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not in this version; use one of {', '.join(BACKENDS)} or auto")
    module, function = BACKENDS[name]
    module = import_module(module)
    return getattr(module, function)() if function else module


def has_card() -> bool:
    """Whether NVIDIA's driver is loaded and sees a card."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


@contextmanager
def threads(backend: Backend, n: int) -> Iterator[None]:
    """Inside the with block the backend runs on n threads: its own, or those of NumPy's BLAS where it has none."""
    if backend.set_threads is None:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(n):
            yield
        return
    before = backend.set_threads(n)
    try:
        yield
    finally:
        backend.set_threads(before)
