"""The delta rule of the CUDA backend as the conformance kit calls it: NumPy arrays in and out, kernels in the emulator.

    python -m deltanet_ref check tests.cuda.kit:forward --backward tests.cuda.kit:backward --packed
    python -m deltanet_ref check tests.cuda.kit:forward_bfloat16 --backward tests.cuda.kit:backward_bfloat16 --packed \\
        --dtype bfloat16
"""

import numpy as np

from deltanet_ref.backends.cuda import delta_rule, stand_in
from deltanet_ref.backends.cuda.device import Device

device = Device(stand_in)


def forward(*arrays, **options):
    """o, S_end by the float32 kernels."""
    return _forward(np.float32, *arrays, **options)[0]


def backward(*arrays, **options):
    """The gradients by the float32 kernels."""
    return _backward(np.float32, *arrays, **options)


def forward_bfloat16(*arrays, **options):
    """o, S_end by the bfloat16 kernels; float32 arrays that hold bfloat16 numbers come in."""
    return _forward(device.bf16, *arrays, **options)[0]


def backward_bfloat16(*arrays, **options):
    """The gradients by the bfloat16 kernels."""
    return _backward(device.bf16, *arrays, **options)


def _forward(real, q, k, v, *, g, beta, S0, scale, cu_seqlens=None, head_order="grouped"):
    q, k, v = (device.upload(x, real) for x in (q, k, v))
    g, beta, S0 = (device.upload(x, np.float32) for x in (g, beta, S0))
    o, S_end, cache = delta_rule.gated_delta_rule_forward(
        device, q, k, v, g=g, beta=beta, S0=S0, scale=scale, cu_seqlens=cu_seqlens, head_order=head_order
    )
    return (o.get().astype(np.float32), S_end.get()), cache


def _backward(real, *arrays, do, dS_end, **options):
    _, cache = _forward(real, *arrays, **options)
    do, dS_end = device.upload(do, real), device.upload(dS_end, np.float32)
    return [x.get().astype(np.float32) for x in delta_rule.gated_delta_rule_backward(device, do, dS_end, cache)]
