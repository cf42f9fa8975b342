"""Gated softmax attention as a layer of Qwen3.5: q, k normed per head, partial rotary, grouped queries, a sigmoid
gate."""
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import shown
from deltanet_ref.formats.values import is_text, is_whole
from deltanet_ref.model.layers.kind import Fields, Kind, Stage, TensorRow, shortest, size

PROJECTIONS = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
OUTPUT = "attn_output.weight"

TENSORS = (
    TensorRow("attn_q.weight", "self_attn.q_proj.weight", ("2 Q", "D"), linear=True),   # per head: d query, d gate rows
    TensorRow("attn_k.weight", "self_attn.k_proj.weight", ("KV", "D"), linear=True),
    TensorRow("attn_v.weight", "self_attn.v_proj.weight", ("KV", "D"), linear=True),
    TensorRow("attn_q_norm.weight", "self_attn.q_norm.weight", ("d",), value="one_plus"),
    TensorRow("attn_k_norm.weight", "self_attn.k_norm.weight", ("d",), value="one_plus"),
    TensorRow("attn_output.weight", "self_attn.o_proj.weight", ("D", "Q"), linear=True),
)
STAGES = (
    Stage("q_proj", ("L", "H", "d"), "projected: queries (a head's rows of attn_q: d of the query, d of the gate)",
          ("attn_q.weight",)),
    Stage("gate", ("L", "H", "d"), "projected: the output gate before its sigmoid"),
    Stage("k_proj", ("L", "H_kv", "d"), "projected: keys", ("attn_k.weight",)),
    Stage("v", ("L", "H_kv", "d"), "projected: values, which are the V cache too", ("attn_v.weight",)),
    Stage("q_norm", ("L", "H", "d"), "RMS norm of q_proj per head", ("attn_q_norm.weight",)),
    Stage("k_norm", ("L", "H_kv", "d"), "RMS norm of k_proj per head", ("attn_k_norm.weight",)),
    Stage("q", ("L", "H", "d"), "q_norm rotated to its position, not scaled"),
    Stage("k", ("L", "H_kv", "d"), "k_norm rotated to its position, which is the K cache too"),
    Stage("o", ("L", "H", "d"), "softmax attention"),
    Stage("o_gated", ("L", "H", "d"), "o times sigmoid(gate)"),
    Stage("mixer_out", ("L", "D"), "o_gated projected back", ("attn_output.weight",), gradient=False),
)
# what config.json may leave out of its rotary settings (HF's defaults), and the only values supported of two switches
ROPE_DEFAULTS = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": (11, 11, 10),
                 "rope_type": "default"}
FIXED = {"attention_bias": False, "attn_output_gate": True}


@dataclass(frozen=True, kw_only=True)
class AttentionFields(Fields):
    """Configuration of the attention layers."""
    num_attention_heads: int = size("attention.head_count", 16)
    num_key_value_heads: int = size("attention.head_count_kv", 4)
    head_dim: int = size("attention.key_length", 256)
    rope_theta: float = size("rope.freq_base", kind=np.float32)
    partial_rotary_factor: float              # GGUF: rope.dimension_count / attention.key_length
    mrope_section: tuple                      # frequencies that follow the t, h and w position (text: all equal)

    @property
    def rotary_dim(self) -> int:
        """Features of an attention head that rotary positions rotate."""
        return int(self.head_dim * self.partial_rotary_factor + 1e-6)      # the factor may be a rounded quotient

    @classmethod
    def from_gguf(cls, keys):
        values = super().from_gguf(keys)
        if keys.number("attention.value_length", default=values["head_dim"]) != values["head_dim"]:
            keys.problems.append(f"{keys.full('attention.value_length')} differs from key_length {values['head_dim']}")
        if not is_text(keys.get("rope.scaling.type", "none"), "none"):
            keys.problems.append(f"{keys.full('rope.scaling.type')} is not supported")
        sections = keys.get("rope.dimension_sections", ROPE_DEFAULTS["mrope_section"])
        if not isinstance(sections, (tuple, np.ndarray)) or not all(map(is_whole, sections[:3])):
            keys.problems.append(f"{keys.full('rope.dimension_sections')} must be a list of counts")
            sections = ()
        rotary = keys.number("rope.dimension_count")
        return values | {"partial_rotary_factor": rotary / max(values["head_dim"], 1),
                         "mrope_section": tuple(int(n) for n in list(sections)[:3])}

    @classmethod
    def from_hf(cls, text, problems):
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            problems.append(f"rope_parameters is {shown(rope)}, not an object")
            rope = {}
        rope = {key: rope.get(key, text.get(key, default)) for key, default in ROPE_DEFAULTS.items()}
        problems += [f"{key} {shown(text[key])} is not supported, only {value!r}" for key, value in FIXED.items()
                     if text.get(key, value) != value]
        if rope.pop("rope_type") != "default":
            problems.append("scaled rotary positions (rope_type other than 'default') are not supported")
        if isinstance(rope["mrope_section"], (list, tuple)):
            rope["mrope_section"] = tuple(rope["mrope_section"])
        else:
            problems.append(f"mrope_section is {shown(rope['mrope_section'])}, not a list")
        return super().from_hf(text, problems) | rope

    def to_gguf(self):
        return {"attention.value_length": np.uint32(self.head_dim), "rope.dimension_count": np.uint32(self.rotary_dim),
                "rope.dimension_sections": np.array([*self.mrope_section, 0], np.int32)}

    def to_hf(self):
        return {"rope_parameters": {"rope_type": "default", "rope_theta": shortest(self.rope_theta),
                                    "partial_rotary_factor": self.partial_rotary_factor,
                                    "mrope_section": list(self.mrope_section), "mrope_interleaved": True}} | FIXED

    def problems(self):
        found = []
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} "
                         "key/value heads: the first must be a multiple of the second")
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            found.append(f"{self.rotary_dim} of {self.head_dim} features per head are rotated: the number must be even "
                         "and at most head_dim")
        if len(self.mrope_section) != 3 or not all(is_whole(n) and 0 <= n < 2 ** 31 for n in self.mrope_section):
            found.append(f"mrope_section is {list(self.mrope_section)}, it must be three counts")
        return found


def sizes(c):
    """The letters of TENSORS and STAGES for one model."""
    H, H_kv, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    return {"H": H, "H_kv": H_kv, "d": d, "Q": H * d, "2 Q": 2 * H * d, "KV": H_kv * d}


def rope_tables(config, ops, positions, dtype):
    """cos, sin (L, rotary / 2) of the positions (L,): once for all attention layers."""
    return ops.rope_tables(positions, config.rotary_dim, config.rope_theta, config.mrope_section, dtype)


# ---- the KV cache

class KeysValues(NamedTuple):
    """Keys (after norm and rotary) and values of the P tokens so far."""
    k: np.ndarray             # (B, P, H_kv, d)
    v: np.ndarray             # (B, P, H_kv, d)


class AttentionState(KeysValues):
    """A KV cache that grows in place while it is the newest view of its buffer; otherwise it is copied."""
    buffer = None

    def append(self, k, v, xp):
        """AttentionState with k and v (B, L, H_kv, d) behind these; xp: the backend's array module."""
        P, M = self.k.shape[1], self.k.shape[1] + k.shape[1]
        buffer = self.buffer if self.buffer and self.buffer.reserve(P, M) else KVBuffer(self, M, xp)
        buffer.k[:, P:M], buffer.v[:, P:M] = k, v
        longer = AttentionState(buffer.k[:, :M], buffer.v[:, :M])
        longer.buffer = buffer
        return longer


class KVBuffer:
    """An over-allocated buffer of keys and values; a state that is continued twice gets a second one."""

    def __init__(self, state, used, xp):
        B, P, H_kv, d = state.k.shape
        shape = (B, used + used // 4 + 64, H_kv, d)
        self.k, self.v = xp.empty(shape, state.k.dtype), xp.empty(shape, state.v.dtype)
        self.k[:, :P], self.v[:, :P] = state
        self.used, self.lock = used, Lock()

    def reserve(self, P, M):
        """Reserve slots P .. M - 1; False if they do not exist or are already used."""
        with self.lock:
            if P != self.used or M > self.k.shape[1]:
                return False
            self.used = M
            return True


# ---- forward and backward

class AttentionCache(NamedTuple):
    """Kept by gated_attention_forward."""
    projections: tuple        # LinearCache of q with its gate, k, v
    q_norm: tuple
    k_norm: tuple
    rope: tuple               # cos, sin (L, rotary / 2)
    attention: tuple
    gate: tuple
    out: tuple


def gated_attention_forward(x, layer, *, shared, state=None, cu_seqlens=None):
    """x (B, L, D) -> y (B, L, D), AttentionState with these tokens appended, cache. shared: rope_tables' cos, sin."""
    c, ops = layer.config, layer.ops
    B, L, _ = x.shape
    # 1  project; attn_q holds, head by head, d query rows and d gate rows
    (q_gate, k_proj, v), projections = layer.linear_maps_forward(PROJECTIONS, x)
    q_gate = q_gate.reshape(B, L, c.num_attention_heads, 2 * c.head_dim)
    q_proj, gate_proj = q_gate[..., :c.head_dim], q_gate[..., c.head_dim:]
    k_proj = k_proj.reshape(B, L, c.num_key_value_heads, c.head_dim)
    v = v.reshape(k_proj.shape)
    # 2  norm per head
    q, q_norm = ops.rms_norm_forward(q_proj, layer["attn_q_norm.weight"], c.rms_norm_eps)
    k, k_norm = ops.rms_norm_forward(k_proj, layer["attn_k_norm.weight"], c.rms_norm_eps)
    layer.see(q_proj=q_proj, gate=gate_proj, k_proj=k_proj, v=v, q_norm=q, k_norm=k)
    # 3  rotary on the first rotary_dim features of each head
    q, k = ops.rope_forward(q, *shared), ops.rope_forward(k, *shared)
    # 4  attention over the past and these tokens
    state = AttentionState(k, v) if state is None else state.append(k, v, ops.xp)
    o, attention = ops.softmax_attention_forward(q, state.k, state.v, cu_seqlens=cu_seqlens)
    # 5  gate
    layer.see(q=q, k=k, o=o)
    o, gate = ops.sigmoid_gate_forward(o, gate_proj)
    # 6  project back
    y, out = layer.linear_forward(OUTPUT, o.reshape(B, L, -1))
    layer.see(o_gated=o, mixer_out=y)
    return y, state, AttentionCache(projections, q_norm, k_norm, shared, attention, gate, out)


def gated_attention_backward(dy, layer, cache, grads, need_dx=True):
    """dx (B, L, D), or None unless needed; gradients of the layer's tensors go to grads."""
    c, ops = layer.config, layer.ops
    B, L, _ = dy.shape
    # 6  project back
    do = layer.linear_backward(OUTPUT, dy, cache.out, grads).reshape(B, L, c.num_attention_heads, c.head_dim)
    layer.see_gradients(o_gated=do)
    # 5  gate
    do, dgate = ops.sigmoid_gate_backward(do, cache.gate)
    # 4  attention
    dq, dk, dv = ops.softmax_attention_backward(do, cache.attention)
    layer.see_gradients(o=do, gate=dgate, q=dq, k=dk, v=dv)
    # 3  rotary
    dq, dk = ops.rope_backward(dq, *cache.rope), ops.rope_backward(dk, *cache.rope)
    layer.see_gradients(q_norm=dq, k_norm=dk)
    # 2  norm per head
    dk, dw_k = ops.rms_norm_backward(dk, cache.k_norm, need_dw=grads.base)
    dq, dw_q = ops.rms_norm_backward(dq, cache.q_norm, need_dw=grads.base)
    layer.see_gradients(q_proj=dq, k_proj=dk)
    if grads.base:
        grads.add(layer.name("attn_q_norm.weight"), dw_q)
        grads.add(layer.name("attn_k_norm.weight"), dw_k)
    # 1  project
    projected = [d.reshape(B, L, -1) for d in (ops.xp.concatenate([dq, dgate], -1), dk, dv)]
    return layer.linear_maps_backward(PROJECTIONS, projected, cache.projections, grads, need_dx)


KIND = Kind(fields=AttentionFields, tensors=TENSORS, stages=STAGES, sizes=sizes, forward=gated_attention_forward,
            backward=gated_attention_backward, output=OUTPUT, shared=rope_tables)
