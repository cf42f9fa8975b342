"""The same operators, faster. A backend is a module with the names of deltanet_ref.ops; an explicit choice is obeyed or
refused, never replaced in silence."""
from deltanet_ref import ops
from deltanet_ref.errors import InputError

BACKENDS = {"numpy": ops}


def get_backend(name):
    """The operators of a backend: "numpy" (deltanet_ref.ops itself), or "auto" for the fastest one there is.

    Raises InputError for a backend that this version does not have.
    """
    if name == "auto":
        name = "numpy"
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not in this version; use one of {', '.join(BACKENDS)} or auto")
    return BACKENDS[name]
