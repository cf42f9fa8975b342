"""Quantises values to blocks of Q8_0, Q4_0, Q4_K, Q5_K and Q6_K with least-squares scales.

A block stores integers q and a scale, x ~ s q, or a scale and a minimum, x ~ s q - m. Two steps alternate, and each
lowers the squared error (Lloyd 1982): for given s and m the best q are the nearest integers; for given q the best s and
m are those of the regression of x on q. The result depends on the initial s; the best of several starts is kept. In the
K types the scales (and minima) of the sub-blocks of 256 values are integers too, in units of a float16: the unit is
rounded first, so that the scales and q compensate for its rounding. Q8_0 is plain rounding; its bytes are ggml's.

Layouts: ggml-common.h of github.com/ggml-org/ggml, block_q8_0 ... block_q6_K.
"""

import numpy as np

from deltanet_ref.errors import InputError

SUPERBLOCK = 256
# Initial scales: the range of x divided into this many more steps than q has. Chosen by measured error.
STARTS = (-0.75, -0.25, 0.0, 0.25, 0.75, 1.5)
ROUNDS = 2  # iterations of the two steps from each start


def q8_0(x: np.ndarray) -> np.ndarray:
    """x (n, 32) float32 -> (n, 34) uint8: d as float16, then 32 int8 with x ~ d q, d = max |x| / 127."""
    d = np.abs(x).max(axis=1) / np.float32(127)
    scaled = x * _inverse(d)[:, None]
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # halves away from zero, as C's roundf
    return np.concatenate([_half_bytes(d), q.astype(np.int8).view(np.uint8)], axis=1)


def q4_0(x: np.ndarray) -> np.ndarray:
    """x (n, 32) float32 -> (n, 18) uint8: d as float16, then 16 bytes with two q + 8 each, x ~ d q, q in -8..7."""
    d = _half(_fit_scale(x, -8, 7))
    q = (_nearest(x, d[:, None], -8, 7) + 8).astype(np.uint8)
    return np.concatenate([_half_bytes(d), q[:, :16] | q[:, 16:] << 4], axis=1)


def q6_k(x: np.ndarray) -> np.ndarray:
    """x (n, 256) float32 -> (n, 210) uint8: x ~ d c q, q in -32..31, c int8 for every 16 values, d float16."""
    x = x.reshape(-1, 16, 16)
    s = _fit_scale(x, -32, 31)
    d = _half(_extreme(s) / np.float32(-128))
    c = _nearest(s, d[:, None], -128, 127)
    q = (_nearest(x, (d[:, None] * c)[..., None], -32, 31) + 32).astype(np.uint8)
    # per half of 128 values: 64 bytes of low nibbles (values 0..63, then 64..127), then 32 bytes with the upper two
    # bits of four values each
    quarters = q.reshape(-1, 2, 4, 32)
    low = quarters[:, :, :2] & 15 | (quarters[:, :, 2:] & 15) << 4
    high = np.bitwise_or.reduce(quarters >> 4 << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    n = len(x)
    return np.concatenate(
        [low.reshape(n, 128), high.reshape(n, 64), c.astype(np.int8).view(np.uint8), _half_bytes(d)], axis=1
    )


def q4_k(x: np.ndarray) -> np.ndarray:
    """x (n, 256) float32 -> (n, 144) uint8: x ~ d c q - e m, q in 0..15, c and m in 0..63 for every 32 values."""
    header, q = _with_minima(x, 15)
    return np.concatenate([header, _nibbles(q)], axis=1)


def q5_k(x: np.ndarray) -> np.ndarray:
    """x (n, 256) float32 -> (n, 176) uint8: as q4_k, q in 0..31; the fifth bits of all sub-blocks share 32 bytes."""
    header, q = _with_minima(x, 31)
    fifth = np.bitwise_or.reduce(q >> 4 << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    return np.concatenate([header, fifth, _nibbles(q & 15)], axis=1)


def _nibbles(q):
    """(n, 8, 32) 4-bit integers -> (n, 128): sub-blocks 2i and 2i + 1 are the lower and upper nibbles of 32 bytes."""
    return (q[:, 0::2] | q[:, 1::2] << 4).reshape(-1, 128)


def _with_minima(x, top):
    """The header of Q4_K and Q5_K, (n, 16) bytes with d, e, c and m, and q (n, 8, 32) uint8 in 0..top."""
    x = x.reshape(-1, 8, 32)
    s, m = _fit_line(x, top)
    d, e = (_half(values.max(axis=1) / np.float32(63)) for values in (s, m))
    c, m = (_nearest(values, unit[:, None], 0, 63) for values, unit in ((s, d), (m, e)))
    q = _nearest(x + (e[:, None] * m)[..., None], (d[:, None] * c)[..., None], 0, top).astype(np.uint8)
    # 12 bytes hold 8 values c and 8 values m of 6 bits: bytes 0..7 the first four c and m, above them the upper two
    # bits of the last four c and m; bytes 8..11 the lower four bits of the last four c and m
    c, m = c.astype(np.uint8), m.astype(np.uint8)
    packed = [c[:, :4] | c[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, c[:, 4:] & 15 | m[:, 4:] << 4]
    return np.concatenate([_half_bytes(d), _half_bytes(e), *packed], axis=1), q


def _fit_scale(x, low, high):
    """s (...,) that minimises |x - s q|^2 over the last axis, q integers in low..high."""
    best = np.zeros(x.shape[:-1], np.float32)
    most = np.zeros(x.shape[:-1], np.float32)
    extreme = _extreme(x)
    for start in STARTS:
        s = extreme / np.float32(low - start)
        for _ in range(ROUNDS):
            q = _nearest(x, s[..., None], low, high)
            xq, qq = _dot(x, q), _dot(q, q)
            s = _ratio(xq, qq)
        gain = s * xq  # |x|^2 - |x - s q|^2
        best, most = np.where(gain > most, s, best), np.maximum(gain, most)
    return best


def _fit_line(x, top):
    """s >= 0 and m >= 0 (...,) that minimise |x - s q + m|^2 over the last axis, q integers in 0..top."""
    least = np.full(x.shape[:-1], np.inf, np.float32)
    best_s, best_m = np.zeros_like(least), np.zeros_like(least)
    n, x_sum = np.float32(x.shape[-1]), x.sum(axis=-1)
    bottom = np.minimum(x.min(axis=-1), 0)
    span = x.max(axis=-1) - bottom
    for start in STARTS:
        s, m = span / np.float32(top + start), -bottom
        for _ in range(ROUNDS):
            q = _nearest(x + m[..., None], s[..., None], 0, top)
            q_sum, xq, qq = q.sum(axis=-1), _dot(x, q), _dot(q, q)
            s = _ratio(n * xq - x_sum * q_sum, n * qq - q_sum * q_sum)
            m = (s * q_sum - x_sum) / n
            s = np.where(m < 0, _ratio(xq, qq), s)  # then the best line with m >= 0 has m = 0
            s, m = np.maximum(s, 0), np.maximum(m, 0)
        r = x + m[..., None] - s[..., None] * _nearest(x + m[..., None], s[..., None], 0, top)
        error = _dot(r, r)
        better = error < least
        best_s, best_m, least = (np.where(better, new, old) for new, old in ((s, best_s), (m, best_m), (error, least)))
    return best_s, best_m


def _nearest(x, s, low, high):
    """The integers q in low..high, as float32, with s q nearest to x; where s is 0, the one nearest to 0."""
    q = x * _inverse(s)
    np.rint(q, out=q)
    return np.clip(q, low, high, out=q)


def _extreme(x):
    """The value of largest magnitude along the last axis, signed."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)[..., 0]


def _dot(a, b):
    return np.einsum("...i,...i->...", a, b)


def _ratio(a, b):
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def _inverse(s):
    """1 / s, and 0 where that is not finite in float32."""
    with np.errstate(over="ignore", divide="ignore"):
        inverse = np.float32(1) / s
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half(d):
    """d rounded to float16, as float32. Raises InputError if it exceeds float16's range."""
    with np.errstate(over="ignore"):
        d = d.astype(np.float16).astype(np.float32)
    if not np.isfinite(d).all():
        raise InputError("values are too large for this type, or not finite: its scales are float16; use f32 or bf16")
    return d


def _half_bytes(d):
    """(n,) -> (n, 2) uint8, float16 little endian."""
    return _half(d).astype("<f2").view(np.uint8).reshape(-1, 2)
