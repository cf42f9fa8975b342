"""The gated delta rule on the device: the Python side of kernels/delta_rule_{forward,backward,step}.cu.

Head sizes are multiples of 16 in the kernels and at most 256 for d_k; others are padded with zeros here, by copies.
Columns of zeros in q and k, or in v, add columns of zeros to the state and change nothing else.
"""

from typing import NamedTuple

import numpy as np

from deltanet_ref.backends.cuda.layout import real as real_of, wide
from deltanet_ref.errors import InputError
from deltanet_ref.ops.gated_delta_rule.arguments import checked
from deltanet_ref.ops.gated_delta_rule.chunk import chunk_counts

LARGEST_D_K = 256  # 16 columns of the state are 16 d_k registers of a warp
GATES, STEP = 5, 32  # of delta_rule.cuh, delta_rule_backward.cu
BLOCKS_WANTED = 132  # at least as many blocks as an H100 has multiprocessors, where smaller blocks make that possible


class Shapes(NamedTuple):
    """What the launches of a call share."""

    real: np.dtype  # of q, k, v
    chunk: int  # tokens
    H_k: int
    H_v: int
    d_k: int  # padded
    d_v: int  # padded
    tiled: bool
    scale: float
    tokens: int
    sequences: int
    most_chunks: int  # of a sequence
    chunks: int  # of all sequences
    cu_seqlens: object  # (sequences + 1,) int32 on the device
    first_chunks: object  # (sequences + 1,) int32 on the device

    @property
    def column_warps(self) -> int:
        """Warps, of 16 columns of d_v each, in a block that walks along a sequence: the more, the fewer blocks read
        the same q and k; but not so many that multiprocessors have no block."""
        columns = self.d_v // 16
        fitting = [n for n in (1, 2, 4) if columns % n == 0]
        enough = [n for n in fitting if self.sequences * self.H_v * columns // n >= BLOCKS_WANTED]
        return max(enough, default=min(fitting[-1], 2))

    @property
    def macros(self) -> dict:
        return dict(REAL=self.real, CHUNK=self.chunk, D_K=self.d_k, COLUMN_WARPS=self.column_warps)


class DeltaRuleCache(NamedTuple):
    """Kept by gated_delta_rule_forward: its arguments. All else is recomputed, which costs less than a forward; kept,
    it would be six times the size of the arguments."""

    shapes: Shapes
    q: object  # (tokens, H_k, d_k) and so on, padded
    k: object
    v: object
    g: object
    beta: object
    S0: object  # (sequences, H_v, d_k, d_v) or None
    sizes: tuple  # B, L, d_k, d_v of the arguments


def gated_delta_rule_forward(
    device, q, k, v, *, g, beta, S0=None, scale=None, head_order="grouped", cu_seqlens=None, chunk_size=64
):
    """o, S_end, cache: arguments, returns and errors as ops.gated_delta_rule.chunk_forward.

    q, k, v and o have one dtype, float32 or bfloat16; g, beta, S0 and S_end are float32. chunk_size is only checked:
    the kernels have chunks of their own (64 or 32 tokens), and the result does not depend on them.
    """
    S0_shape = None if S0 is None else S0.shape
    boundaries, _, _ = checked(
        q, k, v, g=g, beta=beta, S0_shape=S0_shape, head_order=head_order, cu_seqlens=cu_seqlens
    )
    chunk_counts(boundaries, chunk_size)
    B, L, _, d_k = k.shape
    d_v = v.shape[3]
    real = real_of(device, q, k, v)
    wide(device, g, beta, S0)
    shapes = _shapes(device, real, k.shape, v.shape, scale, head_order, boundaries)
    arguments = (
        _padded(device, q, (shapes.d_k,)),
        _padded(device, k, (shapes.d_k,)),
        _padded(device, v, (shapes.d_v,)),
        device.contiguous(g),
        device.contiguous(beta),
        None if S0 is None else _padded(device, S0, (shapes.d_k, shapes.d_v)),
    )
    cache = DeltaRuleCache(shapes, *arguments, (B, L, d_k, d_v))
    P, T, gates = _triangles(device, cache)
    o = device.empty((B, L, shapes.H_v, shapes.d_v), real)
    S_end = device.empty((shapes.sequences, shapes.H_v, shapes.d_k, shapes.d_v), np.float32)
    _walk(
        device, "delta_rule_forward", "delta_rule_outputs", shapes, _outputs_memory(shapes),
        cache.q, cache.k, cache.v, P, T, gates, cache.S0, *_common(shapes), shapes.scale, o, S_end,
    )  # fmt: skip
    return _cut(device, o, d_v), _cut(device, S_end, d_k, d_v), cache


def gated_delta_rule_backward(device, do, dS_end, cache):
    """dq, dk, dv, dg, dbeta, dS0: as ops.gated_delta_rule.chunk_backward; dtypes as in forward, dS_end float32."""
    shapes, q, k, v, g, beta, S0, (B, L, d_k, d_v) = cache
    if do.shape != (B, L, shapes.H_v, d_v):
        raise InputError(f"do has shape {do.shape}; it must be that of o, {(B, L, shapes.H_v, d_v)}")
    state_shape = (shapes.sequences, shapes.H_v, d_k, d_v)
    if dS_end is not None and dS_end.shape != state_shape:
        raise InputError(f"dS_end has shape {dS_end.shape}; it must be that of S_end, {state_shape}")
    real, heads = real_of(device, do, q), (shapes.chunks, shapes.H_v)
    wide(device, dS_end)
    do = _padded(device, do, (shapes.d_v,))
    if dS_end is not None:
        dS_end = _padded(device, dS_end, (shapes.d_k, shapes.d_v))
    # the forward's steps that backward needs
    P, T, gates = _triangles(device, cache)
    V_new, states = device.empty(v.shape, real), device.empty((*heads, shapes.d_v, shapes.d_k), real)
    _walk(
        device, "delta_rule_forward", "delta_rule_states", shapes, 2 * _stage_memory(shapes),
        k, v, T, gates, S0, *_common(shapes), V_new, states,
    )  # fmt: skip
    # across chunks
    X, dv = device.empty(v.shape, real), device.empty(v.shape, real)
    dstates = device.empty(states.shape, real)
    dS0 = device.empty((shapes.sequences, shapes.H_v, shapes.d_k, shapes.d_v), np.float32)
    _walk(
        device, "delta_rule_backward", "delta_rule_state_gradients", shapes, _outputs_memory(shapes),
        q, k, P, T, gates, do, dS_end, *_common(shapes), shapes.scale, X, dv, dstates, dS0,
    )  # fmt: skip
    # inside each chunk
    dq, dk = (device.empty((B, L, shapes.H_v, shapes.d_k), real) for _ in range(2))
    dg, dbeta = (device.empty((B, L, shapes.H_v), np.float32) for _ in range(2))
    kernel = device.kernel(
        "delta_rule_backward", "delta_rule_gradients", _gradients_memory(shapes), **shapes.macros
    )
    device.launch(
        kernel, (shapes.most_chunks, shapes.H_v, shapes.sequences), 2 * shapes.chunk,
        q, k, v, do, V_new, X, states, dstates, gates, *_common(shapes), shapes.scale, dq, dk, dg, dbeta,
    )  # fmt: skip
    if shapes.H_v != shapes.H_k:
        dq, dk = (_sum_heads(device, x, shapes) for x in (dq, dk))
    return (
        _cut(device, dq, d_k), _cut(device, dk, d_k), _cut(device, dv, d_v), dg, dbeta, _cut(device, dS0, d_k, d_v),
    )  # fmt: skip


def gated_delta_rule_step(device, q, k, v, *, g, beta, S, scale=None, head_order="grouped"):
    """One token of each sequence: o, S, as ops.gated_delta_rule.recurrent_step; dtypes as in forward."""
    checked(
        q[:, None], k[:, None], v[:, None], g=g[:, None], beta=beta[:, None], S0_shape=S.shape, head_order=head_order,
        cu_seqlens=None,
    )  # fmt: skip
    (B, H_k, d_k), (H_v, d_v) = k.shape, v.shape[1:]
    real = real_of(device, q, k, v)
    wide(device, g, beta, S)
    o, S_new = device.empty(v.shape, real), device.empty(S.shape, np.float32)
    arrays = map(device.contiguous, (q, k, v, g, beta, S))
    device.launch(
        device.kernel("delta_rule_step", "delta_rule_step", REAL=real), (-(-d_v // 32), H_v, B), 256,
        *arrays, H_k, H_v, d_k, d_v, head_order == "tiled", float(d_k**-0.5 if scale is None else scale), o, S_new,
    )  # fmt: skip
    return o, S_new


# ---- steps


def _triangles(device, cache):
    """P, T^T (chunks, H_v, C, C) and gates (chunks, H_v, GATES, C)."""
    shapes = cache.shapes
    heads, C = (shapes.chunks, shapes.H_v), shapes.chunk
    P, T = (device.empty((*heads, C, C), shapes.real) for _ in range(2))
    gates = device.empty((*heads, GATES, C), np.float32)
    kernel = device.kernel("delta_rule_forward", "delta_rule_triangles", _triangles_memory(shapes), **shapes.macros)
    device.launch(
        kernel, (shapes.most_chunks, shapes.H_v, shapes.sequences), 2 * C,
        cache.q, cache.k, cache.g, cache.beta, shapes.cu_seqlens, shapes.first_chunks, shapes.H_k, shapes.H_v,
        shapes.tiled, shapes.scale, P, T, gates,
    )  # fmt: skip
    return P, T, gates


def _walk(device, file, name, shapes, shared, *arguments):
    """Launch a kernel that goes along the sequences: a block for each sequence, value head and slice of d_v."""
    warps = shapes.column_warps
    grid = (shapes.d_v // (16 * warps), shapes.H_v, shapes.sequences)
    device.launch(device.kernel(file, name, shared, **shapes.macros), grid, 32 * warps, *arguments)


def _common(shapes):
    return shapes.cu_seqlens, shapes.first_chunks, shapes.H_k, shapes.H_v, shapes.d_v, shapes.tiled


def _sum_heads(device, x, shapes):
    """(B, L, H_v, d_k) -> (B, L, H_k, d_k): the sum over the value heads of each key head."""
    y = device.empty((*x.shape[:2], shapes.H_k, shapes.d_k), shapes.real)
    kernel = device.kernel("delta_rule_backward", "delta_rule_sum_heads", **shapes.macros)
    blocks = -(-y.size * y.itemsize // (256 * 16))
    device.launch(kernel, blocks, 256, x, shapes.H_k, shapes.H_v, shapes.tiled, np.int64(y.size), y)
    return y


# ---- arguments


def _shapes(device, real, k_shape, v_shape, scale, head_order, boundaries):
    (B, L, H_k, d_k), (H_v, d_v) = k_shape, v_shape[2:]
    padded_d_k, padded_d_v = (-(-d // 16) * 16 for d in (d_k, d_v))
    if d_k > LARGEST_D_K:
        raise InputError(f"d_k is {d_k}; the CUDA kernels take up to {LARGEST_D_K}. Use the backend numba")
    # float32 tiles are twice as large, and a state of more than 128 rows leaves fewer registers
    chunk = 64 if real == device.bf16 and padded_d_k <= 128 else 32
    counts = chunk_counts(boundaries, chunk)
    return Shapes(
        real, chunk, H_k, H_v, padded_d_k, padded_d_v, head_order == "tiled",
        float(d_k**-0.5 if scale is None else scale), B * L, len(counts), int(counts.max()), int(counts.sum()),
        device.upload(boundaries, np.int32), device.upload(np.concatenate([[0], np.cumsum(counts)]), np.int32),
    )  # fmt: skip


def _padded(device, x, sizes):
    """x in C order, its last axes enlarged to sizes with zeros."""
    if x.shape[-len(sizes) :] == sizes:
        return device.contiguous(x)
    y = device.zeros((*x.shape[: -len(sizes)], *sizes), x.dtype)
    y[(..., *map(slice, x.shape[-len(sizes) :]))] = x
    return y


def _cut(device, x, *sizes):
    """The opposite: the leading part of the last axes."""
    if x.shape[-len(sizes) :] == sizes:
        return x
    return device.contiguous(x[(..., *map(slice, sizes))])


# ---- dynamic shared memory of the kernels, in bytes, as they carve it


def _tile(rows, columns, dtype):
    """tiles.cuh: rows of a tile are 16 bytes longer than their data."""
    return rows * (columns * np.dtype(dtype).itemsize + 16)


def _triangles_memory(s):
    return (
        _tile(s.chunk, s.chunk, np.float32) + _tile(s.chunk, 16, np.float32) + 4 * GATES * s.chunk
        + 2 * _tile(s.chunk, s.d_k, s.real)
    )  # fmt: skip


def _stage_memory(s):
    """struct Stage."""
    return (
        _tile(s.chunk, s.d_k, s.real) + _tile(s.chunk, s.chunk, s.real)
        + _tile(s.chunk, 16 * s.column_warps, s.real) + 4 * GATES * s.chunk
    )  # fmt: skip


def _outputs_memory(s):
    """Also of delta_rule_state_gradients."""
    return 2 * _stage_memory(s) + _tile(s.chunk, s.d_k, s.real) + _tile(s.chunk, s.chunk, s.real)


def _gradients_memory(s):
    slices = 5 * _tile(s.chunk, STEP, s.real) + 2 * _tile(STEP, STEP, s.real)
    pairs = 4 * s.chunk * (s.chunk + 1)
    return 4 * (GATES + 5) * s.chunk + 2 * _tile(s.chunk, s.chunk, s.real) + max(slices, pairs)
