"""The gated delta rule as a layer of Qwen3.5: project, convolve, gate, recur, normalise, project.

V heads are in the tiled order of the GGUF file throughout.
"""
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deltanet_ref.model.layers.kind import Fields, Kind, Stage, TensorRow, size

PROJECTIONS = ("attn_qkv.weight", "attn_gate.weight", "ssm_beta.weight", "ssm_alpha.weight")
OUTPUT = "ssm_out.weight"

TENSORS = (
    TensorRow("attn_qkv.weight", "linear_attn.in_proj_qkv.weight", ("QKV", "D"), (0, "QK", "d_v"), linear=True),
    TensorRow("attn_gate.weight", "linear_attn.in_proj_z.weight", ("VALUE", "D"), (0, "0", "d_v"), linear=True),
    TensorRow("ssm_alpha.weight", "linear_attn.in_proj_a.weight", ("H_v", "D"), (0, "0", "1"), linear=True),
    TensorRow("ssm_beta.weight", "linear_attn.in_proj_b.weight", ("H_v", "D"), (0, "0", "1"), linear=True),
    TensorRow("ssm_conv1d.weight", "linear_attn.conv1d.weight", ("QKV", "K"), (0, "QK", "d_v"), value="squeeze"),
    TensorRow("ssm_a", "linear_attn.A_log", ("H_v",), (0, "0", "1"), value="minus_exp"),
    TensorRow("ssm_dt.bias", "linear_attn.dt_bias", ("H_v",), (0, "0", "1")),
    TensorRow("ssm_norm.weight", "linear_attn.norm.weight", ("d_v",)),
    TensorRow("ssm_out.weight", "linear_attn.out_proj.weight", ("D", "VALUE"), (1, "0", "d_v"), linear=True),
)
STAGES = (
    Stage("qkv", ("L", "QKV"), "projected: all of q, all of k, all of v", ("attn_qkv.weight",),
          v_heads=(1, "QK", "d_v")),
    Stage("z", ("L", "H_v", "d_v"), "projected: the output gate before SiLU", ("attn_gate.weight",),
          v_heads=(1, "0", "1")),
    Stage("b", ("L", "H_v"), "projected: the write strength before its sigmoid", ("ssm_beta.weight",),
          v_heads=(1, "0", "1")),
    Stage("a", ("L", "H_v"), "projected: the step size before its softplus", ("ssm_alpha.weight",),
          v_heads=(1, "0", "1")),
    Stage("conv", ("L", "QKV"), "causal convolution of qkv, then SiLU", ("ssm_conv1d.weight",),
          v_heads=(1, "QK", "d_v")),
    Stage("conv_state", ("K-1", "QKV"), "the last K-1 rows of qkv, zeros before the first token", gradient=False,
          v_heads=(1, "QK", "d_v")),
    Stage("q", ("L", "H_k", "d_k"), "conv's q, L2-normalised per head, not scaled"),
    Stage("k", ("L", "H_k", "d_k"), "conv's k, L2-normalised per head"),
    Stage("v", ("L", "H_v", "d_v"), "conv's v", v_heads=(1, "0", "1")),
    Stage("g", ("L", "H_v"), "log decay, -exp(A_log) softplus(a + dt_bias)", ("ssm_a", "ssm_dt.bias"),
          v_heads=(1, "0", "1")),
    Stage("beta", ("L", "H_v"), "write strength, sigmoid(b)", v_heads=(1, "0", "1")),
    Stage("o", ("L", "H_v", "d_v"), "output of the gated delta rule, scale d_k^-0.5 applied", v_heads=(1, "0", "1")),
    Stage("S", ("H_v", "d_k", "d_v"), "state of the delta rule after the last token", gradient=False,
          v_heads=(0, "0", "1")),
    Stage("o_gated", ("L", "H_v", "d_v"), "RMS norm of o per head, times SiLU(z)", ("ssm_norm.weight",),
          v_heads=(1, "0", "1")),
    Stage("mixer_out", ("L", "D"), "o_gated projected back", ("ssm_out.weight",), gradient=False),
)


@dataclass(frozen=True, kw_only=True)
class DeltaNetFields(Fields):
    """Configuration of the delta layers."""
    linear_num_key_heads: int = size("ssm.group_count", 16)
    linear_num_value_heads: int = size("ssm.time_step_rank", 32)
    linear_key_head_dim: int = size("ssm.state_size", 128)
    linear_value_head_dim: int                # GGUF: ssm.inner_size / ssm.time_step_rank
    linear_conv_kernel_dim: int = size("ssm.conv_kernel", 4)

    @property
    def linear_key_dim(self) -> int:
        """H_k d_k, the width of q (and of k)."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        """H_v d_v, the width of v (and of z and o)."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: q, k, v one after the other."""
        return 2 * self.linear_key_dim + self.linear_value_dim

    @classmethod
    def from_gguf(cls, keys):
        values = super().from_gguf(keys)
        inner, heads = keys.number("ssm.inner_size"), values["linear_num_value_heads"]
        if heads < 1 or inner % heads:
            keys.problems.append(f"{keys.full('ssm.inner_size')} {inner} is not a multiple of ssm.time_step_rank "
                                 f"{heads}")
        return values | {"linear_value_head_dim": inner // max(heads, 1)}

    @classmethod
    def from_hf(cls, text, problems):
        return super().from_hf(text, problems) | {"linear_value_head_dim": text.get("linear_value_head_dim", 128)}

    def to_gguf(self):
        return {"ssm.inner_size": np.uint32(self.linear_value_dim)}

    def to_hf(self):
        return {"linear_value_head_dim": self.linear_value_head_dim}

    def problems(self):
        if self.linear_num_value_heads % self.linear_num_key_heads:
            return [f"{self.linear_num_value_heads} delta value heads cannot share {self.linear_num_key_heads} key "
                    "heads: the first must be a multiple of the second"]
        return []


def sizes(c):
    """The letters of TENSORS and STAGES for one model."""
    return {"H_k": c.linear_num_key_heads, "H_v": c.linear_num_value_heads, "d_k": c.linear_key_head_dim,
            "d_v": c.linear_value_head_dim, "QK": 2 * c.linear_key_dim, "VALUE": c.linear_value_dim,
            "QKV": c.conv_channels, "K": c.linear_conv_kernel_dim, "K-1": c.linear_conv_kernel_dim - 1}


class DeltaNetState(NamedTuple):
    """What a delta layer carries from the tokens so far."""
    conv: np.ndarray          # (N_seq, K - 1, channels) the last inputs of the convolution
    S: np.ndarray             # (N_seq, H_v, d_k, d_v)


class DeltaNetCache(NamedTuple):
    """Kept by gated_deltanet_forward."""
    projections: tuple        # LinearCache of qkv, z, b, a
    conv: tuple
    q_norm: tuple
    k_norm: tuple
    gate: tuple
    delta: tuple
    norm: tuple
    out: tuple


def gated_deltanet_forward(x, layer, *, shared=None, state=None, cu_seqlens=None):
    """x (B, L, D) -> y (B, L, D), DeltaNetState after the last token, cache (None for a single token with state)."""
    c, ops = layer.config, layer.ops
    B, L, _ = x.shape
    # 1  project: qkv (B, L, 2 H_k d_k + H_v d_v), z (B, L, H_v d_v), b and a (B, L, H_v)
    (qkv, z, b, a), projections = layer.linear_maps_forward(PROJECTIONS, x)
    if L == 1 and state is not None and ops.delta_layer_step is not None:                     # 2 .. 6 at once
        o, conv, S = ops.delta_layer_step(
            qkv[:, 0], z[:, 0], b[:, 0], a[:, 0], state.conv, state.S, conv=layer["ssm_conv1d.weight"],
            decay=layer["ssm_a"], dt_bias=layer["ssm_dt.bias"], norm=layer["ssm_norm.weight"], eps=c.rms_norm_eps,
            head_order="tiled")
        y, _ = layer.linear_forward(OUTPUT, o.reshape(B, L, -1))
        return y, DeltaNetState(conv, S), None
    # 2  causal convolution along the tokens, each channel on its own, then SiLU
    layer.see(qkv=qkv, z=z, b=b, a=a)
    qkv, conv_state, conv = ops.causal_conv1d_forward(
        qkv, layer["ssm_conv1d.weight"], state=state and state.conv, cu_seqlens=cu_seqlens)
    q, k, v = split_heads(qkv, c)
    layer.see(conv=qkv, conv_state=conv_state, v=v)
    # 3  unit keys and queries
    q, q_norm = ops.l2_norm_forward(q)
    k, k_norm = ops.l2_norm_forward(k)
    # 4  the gates
    g, beta, gate = ops.decay_gate_forward(a, b, ops.xp.log(-layer["ssm_a"]), layer["ssm_dt.bias"])
    # 5  the recurrence
    if L == 1 and state is not None:
        o, S = ops.gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], g=g[:, 0], beta=beta[:, 0], S=state.S,
                                         head_order="tiled")
        o, delta = o[:, None], None
    else:
        o, S, delta = ops.gated_delta_rule_forward(q, k, v, g=g, beta=beta, S0=state and state.S,
                                                   head_order="tiled", cu_seqlens=cu_seqlens)
    # 6  normalise each head, gated by SiLU(z)
    layer.see(q=q, k=k, g=g, beta=beta, o=o, S=S)
    o, norm = ops.gated_rms_norm_forward(o, z.reshape(o.shape), layer["ssm_norm.weight"], c.rms_norm_eps)
    # 7  project back
    y, out = layer.linear_forward(OUTPUT, o.reshape(B, L, -1))
    layer.see(o_gated=o, mixer_out=y)
    cache = delta and DeltaNetCache(projections, conv, q_norm, k_norm, gate, delta, norm, out)
    return y, DeltaNetState(conv_state, S), cache


def gated_deltanet_backward(dy, layer, cache, grads, need_dx=True):
    """dx (B, L, D), or None unless needed; gradients of the layer's tensors go to grads."""
    ops = layer.ops
    B, L, _ = dy.shape
    # 7  project back
    do = layer.linear_backward(OUTPUT, dy, cache.out, grads)
    layer.see_gradients(o_gated=do)
    # 6  normalise each head, gated by SiLU(z)
    heads = (B, L, layer.config.linear_num_value_heads, layer.config.linear_value_head_dim)
    do, dz, dw = ops.gated_rms_norm_backward(do.reshape(heads), cache.norm, need_dw=grads.base)
    # 5  the recurrence
    dq, dk, dv, dg, dbeta, _ = ops.gated_delta_rule_backward(do, None, cache.delta)
    layer.see_gradients(o=do, z=dz, q=dq, k=dk, v=dv, g=dg, beta=dbeta)
    # 4  the gates
    da, db, dA_log, ddt_bias = ops.decay_gate_backward(dg, dbeta, cache.gate, need_dw=grads.base)
    # 3  unit keys and queries
    dk = ops.l2_norm_backward(dk, cache.k_norm)
    dq = ops.l2_norm_backward(dq, cache.q_norm)
    # 2  causal convolution, SiLU
    dqkv = ops.xp.concatenate([d.reshape(B, L, -1) for d in (dq, dk, dv)], -1)
    layer.see_gradients(a=da, b=db, conv=dqkv)
    dqkv, dconv, _ = ops.causal_conv1d_backward(dqkv, None, cache.conv, need_dw=grads.base)
    layer.see_gradients(qkv=dqkv)
    if grads.base:
        grads.add(layer.name("ssm_norm.weight"), dw)
        grads.add(layer.name("ssm_a"), dA_log / layer["ssm_a"])            # ssm_a = -exp(A_log)
        grads.add(layer.name("ssm_dt.bias"), ddt_bias)
        grads.add(layer.name("ssm_conv1d.weight"), dconv)
    # 1  project
    return layer.linear_maps_backward(PROJECTIONS, (dqkv, dz.reshape(B, L, -1), db, da), cache.projections, grads,
                                      need_dx)


def split_heads(qkv, c):
    """(B, L, 2 H_k d_k + H_v d_v) -> q, k (B, L, H_k, d_k), v (B, L, H_v, d_v)."""
    width = c.linear_key_dim
    return tuple(x.reshape(*x.shape[:2], heads, -1) for x, heads in (
        (qkv[..., :width], c.linear_num_key_heads), (qkv[..., width:2 * width], c.linear_num_key_heads),
        (qkv[..., 2 * width:], c.linear_num_value_heads)))


KIND = Kind(fields=DeltaNetFields, tensors=TENSORS, stages=STAGES, sizes=sizes, forward=gated_deltanet_forward,
            backward=gated_deltanet_backward, output=OUTPUT)
