"""The gated delta rule in PyTorch, with the signature of FLA's kernels, tested with the conformance kit:

    deltanet-ref check delta_rule_torch.py:delta_rule --layout fla --backward autograd

Replace the body with your kernel, and add --device cuda, --dtype bfloat16 and --packed where it supports them.
"""

import torch


def delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    """q, k (B, L, H_k, d_k), v (B, L, H_v, d_v), g, beta (B, L, H_v) -> o (B, L, H_v, d_v), S (B, H_v, d_k, d_v)."""
    dtype, groups = v.dtype, v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(groups, 2).float() for x in (q, k))  # value head h reads key head h // groups
    v, g, beta = (x.float() for x in (v, g, beta))
    S = initial_state.float() if initial_state is not None else v.new_zeros(*v.shape[::2], q.shape[3], v.shape[3])
    o = []
    for t in range(v.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        o.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(o, 1).to(dtype), S if output_final_state else None
