"""Low-rank updates with this backend's linear maps. Mathematics: ops/lora_linear.py."""
from deltanet_ref.backends.numba_cpu import linear
from deltanet_ref.ops import lora_linear


def lora_forward(ys, x, updates):
    """As ops.lora_forward."""
    return lora_linear.forward(linear, ys, x, updates)


def lora_backward(dys, cache, need_dx=True, trained=None):
    """As ops.lora_backward."""
    return lora_linear.backward(linear, dys, cache, need_dx, trained)
