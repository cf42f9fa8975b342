"""The CUDA backend with operators of ops in place of those that do not exist yet, for tests of the others."""

from importlib.util import find_spec
from types import ModuleType

import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends import cuda
from deltanet_ref.model.qwen35 import HeadRows

# which results are float32 in a bfloat16 model, by position; None: all
WIDE = {
    "decay_gate_forward": (0, 1),
    "decay_gate_backward": (2, 3),
    "gated_delta_rule_forward": (1,),
    "gated_delta_rule_backward": (3, 4, 5),
    "gated_delta_rule_step": (1,),
    "rms_norm_backward": (1,),
    "gated_rms_norm_backward": (2,),
    "causal_conv1d_backward": (1,),
    "linear_cross_entropy_forward": (0,),
    "linear_cross_entropy_backward": (1,),
    "cross_entropy_forward": (0,),
    "embedding_backward": None,
    "adamw_update": None,
    "rope_tables": None,
}


def missing() -> list:
    """Operators whose modules do not exist."""
    return [
        name
        for module, names in cuda.MODULES.items()
        if find_spec(f"deltanet_ref.backends.cuda.{module}") is None
        for name in names.split()
    ]


def backend(device):
    """The backend on this device, and the names of the operators that come from ops."""
    absent, complete = missing(), dict(cuda.MODULES)
    cuda.MODULES.clear()
    cuda.MODULES.update({m: names for m, names in complete.items() if names.split()[0] not in absent})
    try:
        made = cuda.backend_of(device, "cuda-emulated", "emulated")
    finally:
        cuda.MODULES.clear()
        cuda.MODULES.update(complete)
    for name in absent:
        setattr(made, name, on_host(device, name))
    return made, absent


def on_host(device, name):
    """An operator of ops on float32 copies; results rounded as the kernels would."""
    operator = getattr(ops, name)

    def call(*args, **options):
        found = list(flat(args + tuple(options.values())))
        narrow = any(id(x) in NARROW or isinstance(x, device.xp.ndarray) and x.dtype == device.bf16 for x in found)
        real = device.bf16 if narrow else np.dtype("f4")
        if name == "adamw_update":
            p, g, m, v = (to_host(device, x) for x in args)
            operator(p, g, m, v, **options)
            for x, host in zip(args, (p, g, m, v), strict=True):
                x.set(host.astype(x.dtype))
            return None
        results = operator(*(to_host(device, x) for x in args), **{k: to_host(device, x) for k, x in options.items()})
        wide = WIDE.get(name, ())
        for x in flat((results,)) if narrow else ():
            NARROW[id(x)] = x
        if not isinstance(results, tuple) or hasattr(results, "_fields"):
            return to_device(device, results, np.dtype("f4") if wide is None or 0 in wide else real)
        return tuple(
            to_device(device, x, np.dtype("f4") if wide is None or i in wide else real) for i, x in enumerate(results)
        )

    return call


class Rows:
    """The head's rows on the host."""

    def __init__(self, device, rows):
        self.device, self.rows = device, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return to_host(self.device, self.rows[index])


NARROW = {}  # id of an array in a cache of ops -> the array, where activations are bfloat16


def flat(values):
    """Arrays anywhere in arguments, those of caches included."""
    for x in values:
        if isinstance(x, tuple | list):
            yield from flat(x)
        elif not isinstance(x, HeadRows):
            yield x


def to_host(device, x):
    if isinstance(x, device.xp.ndarray):
        return cuda.to_host(device, x)
    if isinstance(x, HeadRows):
        return Rows(device, x)
    return x


def to_device(device, x, dtype):
    """NumPy results as device arrays; caches and None as they are."""
    if isinstance(x, np.ndarray | np.floating) and not isinstance(x, ModuleType):
        return device.upload(np.asarray(x)).astype(dtype)
    return x
