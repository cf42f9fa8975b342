"""The conventions of this project, once.

Sizes   B batch, L tokens, C chunk, N chunks, H_k key heads, H_v value heads, d_k, d_v head sizes, D hidden,
        F feed-forward, V vocabulary, K convolution kernel, r LoRA rank.
        T, U, W, S are always matrices, so the time axis is L.

The gated delta rule, per value head, decay first and then the error [delta.1..4]:

    S~  = exp(g_t) S_{t-1}                      g_t <= 0 is the LOG decay; S is (d_k, d_v)
    u_t = beta_t (v_t - k_t S~)                 beta_t = sigmoid(b_t)
    S_t = S~ + outer(k_t, u_t)
    o_t = scale q_t S_t                         scale = d_k ** -0.5, once

The caller L2-normalises q and k: x / sqrt(sum(x^2) + 1e-6), eps on the SUM.

One thing, five names:

    paper         HF (Qwen3.5)            FLA             GGUF (llama.cpp)     here
    q_t, k_t      in_proj_qkv, conv1d     q, k            attn_qkv, ssm_conv1d q, k
    v_t           in_proj_qkv, conv1d     v               attn_qkv, ssm_conv1d v
    alpha_t       exp(g)                  exp(g)          -                    exp(g)
    log alpha_t   g                       g               gate                 g
    beta_t        in_proj_b, sigmoid      beta            ssm_beta             beta
    -             in_proj_a               -               ssm_alpha            a
    -             A_log                   A_log           log(-ssm_a)          A_log
    -             dt_bias                 dt_bias         ssm_dt.bias          dt_bias
    S_t           recurrent_state         state (K, V)    ssm state            S (d_k, d_v)
    output gate   in_proj_z               gate            attn_gate            z
    norm weight   1 + weight              weight          weight (1 + w)       w (1 + w formed on loading)

Head order: value head h reads key head h // (H_v / H_k) in grouped order (HF, FLA), h % H_k in tiled order (GGUF).
"""

import numpy as np

from deltanet_ref.errors import InputError

HEAD_ORDERS = ("grouped", "tiled")


def value_to_key_head(H_k, H_v, head_order):
    """The key head that each value head reads, an int array (H_v,).

    Raises InputError when H_v is not a multiple of H_k or the order is unknown.
    """
    if H_k < 1 or H_v < 1 or H_v % H_k:
        raise InputError(f"{H_v} value heads cannot share {H_k} key heads: H_v must be a multiple of H_k")
    if head_order not in HEAD_ORDERS:
        raise InputError(f"head_order {head_order!r} is unknown: use 'grouped' (HF, FLA) or 'tiled' (GGUF)")
    heads = np.arange(H_v)
    return heads // (H_v // H_k) if head_order == "grouped" else heads % H_k
