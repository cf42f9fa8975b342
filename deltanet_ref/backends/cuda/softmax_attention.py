"""Causal grouped-query attention: kernels/softmax_attention.cu. Mathematics: docs/derivations/attention.md."""

from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops.sequences import sequence_boundaries
from deltanet_ref.ops.softmax_attention import _check_shapes

BLOCK = 16  # head sizes are padded to a multiple of this
LARGEST = 256  # head size: 16 rows of it fill a warp's registers
WARP, MEAN_WARPS = 32, 8


class Tiles(NamedTuple):
    """Rows of the tiles in shared memory. With head size 256 each kernel's tiles fit 99 KiB, the least of all cards."""

    forward_queries: int
    forward_keys: int
    dq_queries: int
    dq_keys: int
    dkv_keys: int
    dkv_queries: int


TILES = {"bfloat16": Tiles(64, 64, 64, 32, 32, 16), "float32": Tiles(64, 16, 32, 16, 16, 16)}


class SoftmaxAttentionCache(NamedTuple):
    """Kept by softmax_attention_forward; the probabilities are recomputed tile by tile. D is the padded head size."""

    q: object  # (B, L, H, D)
    k: object  # (B, M, H_kv, D)
    v: object  # (B, M, H_kv, D)
    o: object  # (B, L, H, D)
    peak: object  # (H, B L) float32: the largest score of the row
    total: object  # (H, B L) float32: sum over j of exp(score - peak)
    scale: float
    cu_seqlens: object  # (N_seq + 1,) int32 on the device, or None
    d: int  # head size of q and k
    d_v: int  # head size of v


def softmax_attention_forward(device, q, k, v, *, scale=None, cu_seqlens=None):
    """o, cache: arguments, returns and errors as ops.softmax_attention_forward; head sizes up to 256.

    q, k, v are all float32 or all bfloat16, and o is what they are.
    """
    _check(device, q, k, v, cu_seqlens)
    (B, L, H, d), d_v = q.shape, v.shape[3]
    scale = d**-0.5 if scale is None else float(scale)
    D = -(-max(d, d_v) // BLOCK) * BLOCK
    q, k, v = (_padded(device, x, D) for x in (q, k, v))
    o = device.empty(q.shape, q.dtype)
    peak, total = (device.empty((H, B * L), np.float32) for _ in range(2))
    if cu_seqlens is not None:
        cu_seqlens = device.upload(sequence_boundaries(B, L, cu_seqlens), np.int32)
    cache = SoftmaxAttentionCache(q, k, v, o, peak, total, scale, cu_seqlens, d, d_v)
    tiles = TILES[q.dtype.name]
    device.launch(
        _kernel(device, "softmax_attention_forward", cache, tiles.forward_queries + 2 * tiles.forward_keys),
        (H, _tiles(L, tiles.forward_queries, cache)),
        tiles.forward_queries // BLOCK * WARP,
        *(q, k, v, cu_seqlens, o, peak, total, *_sizes(cache), scale),
    )
    return _cut(device, o, d_v), cache


def softmax_attention_backward(device, do, cache):
    """dq, dk, dv: as ops.softmax_attention_backward. do has the dtype of q."""
    q, k, v, o, peak, total, scale, cu_seqlens, d, d_v = cache
    (B, L, H, D), (_, M, H_kv, _) = q.shape, k.shape
    do = _padded(device, do, D)
    mean = device.empty(peak.shape, np.float32)
    device.launch(
        _kernel(device, "softmax_attention_mean", cache, 0),
        -(-B * L * H // MEAN_WARPS),
        MEAN_WARPS * WARP,
        *(do, o, mean, B * L, H),
    )
    tiles, saved = TILES[q.dtype.name], (do, q, k, v, peak, total, mean, cu_seqlens)
    dq = device.empty(q.shape, q.dtype)
    device.launch(
        _kernel(device, "softmax_attention_dq", cache, 2 * (tiles.dq_queries + tiles.dq_keys)),
        (H, _tiles(L, tiles.dq_queries, cache)),
        tiles.dq_queries // BLOCK * WARP,
        *(*saved, dq, *_sizes(cache), scale),
    )
    if L == 0:
        dk, dv = device.zeros(k.shape, k.dtype), device.zeros(v.shape, v.dtype)
    else:
        dk, dv = device.empty(k.shape, k.dtype), device.empty(v.shape, v.dtype)
        passed = 4 * tiles.dkv_keys * tiles.dkv_queries
        device.launch(
            _kernel(device, "softmax_attention_dkv", cache, 2 * tiles.dkv_keys + 4 * tiles.dkv_queries, passed),
            (H_kv, _tiles(M, tiles.dkv_keys, cache)),
            tiles.dkv_keys // BLOCK * 2 * WARP,
            *(*saved, dk, dv, *_sizes(cache), scale),
        )
    return _cut(device, dq, d), _cut(device, dk, d), _cut(device, dv, d_v)


def _check(device, q, k, v, cu_seqlens):
    if q.dtype.name not in TILES or not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; all must be float32, or all bfloat16")
    _check_shapes(q, k, v, cu_seqlens)
    if max(q.shape[3], v.shape[3]) > LARGEST:
        raise InputError(f"head sizes are {q.shape[3]} and {v.shape[3]}; this backend has kernels up to {LARGEST}")


def _kernel(device, name, cache, rows, more=0):
    """The kernel for the cache's dtype and head size, with `rows` rows of tiles and `more` bytes of shared memory."""
    D, dtype = cache.q.shape[3], cache.q.dtype
    shared = rows * (D * dtype.itemsize + 16) + more  # tiles.cuh pads each row by 16 bytes
    macros = {field.upper(): n for field, n in TILES[dtype.name]._asdict().items()}
    return device.kernel("softmax_attention", name, shared, REAL=dtype, D=D, **macros)


def _tiles(length, rows, cache):
    """Tiles of `rows` rows in all sequences; of packed ones no more than this, whatever their lengths."""
    if cache.cu_seqlens is None:
        return cache.q.shape[0] * -(-length // rows)
    return length // rows + len(cache.cu_seqlens) - 1


def _sizes(cache):
    """sequences, L, M, tokens, H, H_kv, as the kernels take them."""
    B, L, H, _ = cache.q.shape
    sequences = B if cache.cu_seqlens is None else len(cache.cu_seqlens) - 1
    return sequences, L, cache.k.shape[1], B * L, H, cache.k.shape[2]


def _padded(device, x, D):
    """x with head size D: itself (in C order) if that is its head size, otherwise filled up with zeros."""
    if x.shape[3] == D:
        return device.contiguous(x)
    wide = device.zeros((*x.shape[:3], D), x.dtype)
    wide[..., : x.shape[3]] = x
    return wide


def _cut(device, x, d):
    """The first d numbers of each head."""
    return x if x.shape[3] == d else device.contiguous(x[..., :d])
