"""The operators again, faster. backends/interface.py is the contract; an explicit choice is obeyed or refused, never
silently replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from deltanet_ref.backends.interface import Backend
from deltanet_ref.errors import InputError

BACKENDS = {"numpy": "deltanet_ref.ops", "numba": "deltanet_ref.backends.numba_cpu"}  # imported on request


def get_backend(name: str) -> Backend:
    """The backend "numpy" (deltanet_ref.ops itself, the definition), "numba" (kernels for the CPU, compiled on first
    use), or "auto", which is numba.

    Raises InputError for a name that this version does not have.
    """
    if name == "auto":
        name = "numba"
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not in this version; use one of {', '.join(BACKENDS)} or auto")
    return import_module(BACKENDS[name])


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
