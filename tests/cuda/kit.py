"""The delta rule of the CUDA backend as the conformance kit calls it: NumPy arrays in and out, kernels in the emulator.

python -m deltanet_ref check tests.cuda.kit:forward --backward tests.cuda.kit:backward --packed
python -m deltanet_ref check tests.cuda.kit:forward_bf16 --backward tests.cuda.kit:backward_bf16 --packed --dtype bfloat16
"""

import functools

import numpy as np

from deltanet_ref.backends.cuda import delta_rule, stand_in
from deltanet_ref.backends.cuda.device import Device

device = Device(stand_in)


def _on_device(real, q, k, v, g, beta, S0):
    q, k, v = (stand_in.asarray(np.asarray(x, real)) for x in (q, k, v))
    return (q, k, v), {n: stand_in.asarray(np.asarray(x, np.float32)) for n, x in dict(g=g, beta=beta, S0=S0).items()}


def _forward(real, q, k, v, *, g, beta, S0, scale, cu_seqlens=None, head_order="grouped"):
    arrays, gates = _on_device(real(), q, k, v, g, beta, S0)
    return delta_rule.gated_delta_rule_forward(
        device, *arrays, **gates, scale=scale, cu_seqlens=cu_seqlens, head_order=head_order
    )


def run_forward(real, *arrays, **options):
    o, S_end, _ = _forward(real, *arrays, **options)
    return o.get().astype(np.float32), S_end.get()


def run_backward(real, *arrays, do, dS_end, **options):
    _, _, cache = _forward(real, *arrays, **options)
    do, dS_end = stand_in.asarray(np.asarray(do, real())), stand_in.asarray(np.asarray(dS_end, np.float32))
    return [x.get().astype(np.float32) for x in delta_rule.gated_delta_rule_backward(device, do, dS_end, cache)]


def float32():
    return np.float32


def bfloat16():
    return device.bf16


forward, backward = (functools.partial(f, float32) for f in (run_forward, run_backward))
forward_bf16, backward_bf16 = (functools.partial(f, bfloat16) for f in (run_forward, run_backward))
