"""The same operators, faster. A backend is a module with the names of deltanet_ref.ops; an explicit choice is obeyed or
refused, never replaced in silence."""
from contextlib import contextmanager
from importlib import import_module

from deltanet_ref.errors import InputError

BACKENDS = {"numpy": "deltanet_ref.ops", "numba": "deltanet_ref.backends.numba_cpu"}       # imported when asked for


def get_backend(name):
    """The operators of a backend: "numpy" (deltanet_ref.ops itself), "numba" (kernels for the CPU, compiled when first
    used), or "auto", which is numba.

    Raises InputError for a backend that this version does not have.
    """
    if name == "auto":
        name = "numba"
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not in this version; use one of {', '.join(BACKENDS)} or auto")
    return import_module(BACKENDS[name])


@contextmanager
def threads(backend, n):
    """Inside the with block NumPy's BLAS and the backend's kernels run on n threads."""
    from threadpoolctl import threadpool_limits

    set_kernels = getattr(backend, "set_threads", lambda n: n)          # ops has no kernels
    before = set_kernels(n)
    try:
        with threadpool_limits(n):
            yield
    finally:
        set_kernels(before)
