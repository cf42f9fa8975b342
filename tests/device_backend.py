"""A deliberately minimal backend whose arrays NumPy cannot touch, as those of a GPU.

It has the required operators of backends/interface.py and no optional capability. Its arrays wrap NumPy's, and any
NumPy function or implicit conversion raises: a model that runs on them uses only the backend's operators and array
module.
"""

import inspect
import operator
from types import SimpleNamespace

import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends.interface import OPERATORS, OPTIONAL
from deltanet_ref.model.qwen35 import HeadRows


class DeviceArray:
    """An array that lives elsewhere. Its arithmetic works; NumPy functions on it raise TypeError."""

    __array_ufunc__ = None

    def __init__(self, host):
        self.host = host

    def __array__(self, *args, **options):
        raise TypeError("NumPy converts a device array")

    def __array_function__(self, function, *args):
        raise TypeError(f"np.{function.__name__} is called with a device array")

    shape, dtype, ndim, size = (
        property(lambda self, name=name: getattr(self.host, name)) for name in ("shape", "dtype", "ndim", "size")
    )

    def __getattr__(self, name):
        """Methods such as reshape and sum, and T."""
        member = getattr(self.host, name)
        return lifted(member) if callable(member) else wrapped(member)

    def __getitem__(self, index):
        return wrapped(self.host[unwrapped(index)])

    def __setitem__(self, index, value):
        self.host[unwrapped(index)] = unwrapped(value)

    def __len__(self):
        return len(self.host)

    def __float__(self):
        return float(self.host)

    def __bool__(self):
        return bool(self.host)


def _forward(name):
    function = getattr(operator, name)
    return lambda self, other: wrapped(function(self.host, unwrapped(other)))


def _reflected(name):
    function = getattr(operator, name)
    return lambda self, other: wrapped(function(unwrapped(other), self.host))


for name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "matmul",
    "pow",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "iadd",
    "isub",
    "imul",
    "itruediv",
):
    setattr(DeviceArray, f"__{name}__", _forward(name))
for name in ("add", "sub", "mul", "truediv", "matmul"):
    setattr(DeviceArray, f"__r{name}__", _reflected(name))
DeviceArray.__neg__ = lambda self: DeviceArray(-self.host)
DeviceArray.__hash__ = None


class Rows:
    """The head's rows, which the model decodes on request, for an operator on the host."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return unwrapped(self.rows[index])


def unwrapped(x, in_cache=False):
    """The same with NumPy arrays in place of device arrays. A floating-point array of the host must not arrive here,
    except within a cache (a named tuple), which only the operators look into."""
    if isinstance(x, DeviceArray):
        return x.host
    if isinstance(x, np.ndarray) and x.dtype.kind in "fc" and not in_cache:
        raise TypeError("a floating-point array of the host reaches the device")
    if isinstance(x, tuple | list):
        is_cache = hasattr(x, "_fields")
        parts = [unwrapped(part, in_cache or is_cache) for part in x]
        return type(x)(*parts) if is_cache else type(x)(parts)
    return Rows(x) if isinstance(x, HeadRows) else x


def wrapped(x):
    """Results as device arrays; caches (named tuples) stay as they are."""
    if isinstance(x, np.ndarray):
        return DeviceArray(x)
    if isinstance(x, tuple | list) and not hasattr(x, "_fields"):
        return type(x)(map(wrapped, x))
    return x


def lifted(function):
    """A NumPy function for device arrays."""

    def call(*args, **options):
        return wrapped(function(*map(unwrapped, args), **{name: unwrapped(x) for name, x in options.items()}))

    return call


class ArrayModule:
    """NumPy's functions for device arrays; asarray alone takes an array of the host."""

    ndarray = DeviceArray

    @staticmethod
    def asarray(x, dtype=None):
        return DeviceArray(np.array(x.host if isinstance(x, DeviceArray) else x, dtype, copy=None))

    def __getattr__(self, name):
        return lifted(getattr(np, name))


def with_signature_of(function):
    """`function` for device arrays, under its own signature."""
    call = lifted(function)
    call.__signature__ = inspect.signature(function)
    return call


def to_host(x):
    return x.host if isinstance(x, DeviceArray) else np.asarray(x)


BACKEND = SimpleNamespace(
    **{name: with_signature_of(getattr(ops, name)) for name in OPERATORS if name != "to_host"},
    **dict.fromkeys(OPTIONAL),
    name="device",
    xp=ArrayModule(),
    dtypes=ops.dtypes,
    to_host=to_host,
)
