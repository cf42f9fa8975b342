"""formats/quants.py compared with blocks quantised and dequantised by ggml itself, and with the gguf package."""

import itertools
import struct

import gguf
import numpy as np
import pytest

from deltanet_ref.errors import InputError
from deltanet_ref.formats import quants
from deltanet_ref.formats.quants import (
    QUANTIZABLE,
    TYPES,
    dequantize,
    finite,
    quantize,
    rows,
    stored_bytes,
    stored_finite,
)
from tests.paths import FIXTURES

GGML = np.load(FIXTURES / "dequant.npz")
STORED = sorted({name.split("/")[0] for name in GGML.files})
Type = gguf.GGMLQuantizationType


def bits(values):
    return values.view(np.uint32 if values.dtype == np.float32 else np.uint64)


@pytest.mark.parametrize("name", STORED)
def test_dequantisation_is_ggmls_bit_for_bit(name):
    raw, expected = GGML[f"{name}/raw"], GGML[f"{name}/f32"]
    values = dequantize(raw, Type[name], expected.shape)
    assert values.dtype == np.float32 and np.array_equal(bits(values), bits(expected))
    wide = dequantize(raw.reshape(-1), Type[name], expected.shape, np.float64)
    assert wide.dtype == np.float64 and np.array_equal(bits(wide), bits(expected.astype(np.float64)))


@pytest.mark.parametrize("name", STORED)
def test_rows_are_those_of_the_whole(name):
    raw, expected = GGML[f"{name}/raw"], GGML[f"{name}/f32"]
    ids = np.array([3, 0, 3])
    some = rows(raw.reshape(-1), Type[name], expected.shape, ids)
    assert np.array_equal(dequantize(some, Type[name], (3, expected.shape[1])), expected[ids])


FITTED = ("Q4_0", "Q4_K", "Q5_K", "Q6_K")  # with least-squares scales, unlike ggml


@pytest.mark.parametrize("name", [name for name in STORED if Type[name] in QUANTIZABLE and name not in FITTED])
def test_quantisation_is_ggmls_bit_for_bit(name):
    raw = quantize(GGML[f"{name}/src"], Type[name])
    assert raw.dtype == np.uint8 and np.array_equal(raw, GGML[f"{name}/raw"].reshape(-1))


def rms(raw, kind, x):
    return np.sqrt(np.mean((gguf.quants.dequantize(raw.reshape(len(x), -1), kind) - x) ** 2))


@pytest.mark.parametrize("name", FITTED)
def test_fitted_scales_are_as_close_as_ggmls(name):
    """Measured against ggml's own blocks: 0.945, 0.987, 1.004 and 0.978 of its error."""
    x, kind = GGML[f"{name}/src"], Type[name]
    assert rms(quantize(x, kind), kind, x) <= 1.01 * rms(GGML[f"{name}/raw"], kind, x)


@pytest.mark.parametrize("name, steps", [("Q8_0", 254), ("Q4_0", 15), ("Q4_K", 15), ("Q5_K", 31), ("Q6_K", 63)])
def test_blocks_of_every_kind_lose_no_more_than_rounding(name, steps):
    """Zeros, a constant, one sign, an outlier, very small and very large values. Rounding to equal steps over the range
    -max..max of the row has the error span / steps / sqrt(12); values below 6e-8, float16's smallest, are lost."""
    kind, rng = Type[name], np.random.default_rng(3)
    x = rng.standard_normal((9, 256)).astype(np.float32)
    x[0], x[1], x[2], x[3] = 0, 0.7, np.abs(x[2]), -np.abs(x[3])
    x[4, 37], x[5], x[6], x[7] = 40, x[5] * 1e-30, x[6] * 1e-2, x[7] * 1e4
    span = 2 * np.abs(x).max(axis=1)
    values = dequantize(quantize(x, kind), kind, x.shape)
    error = np.sqrt(np.mean((values - x) ** 2, axis=1, dtype=np.float64))
    assert (error <= span / steps / 12**0.5 + 6e-8 * (span > 0)).all() and error[0] == 0


@pytest.mark.parametrize("name", FITTED)
def test_pieces_quantised_by_several_threads_are_the_blocks_one_by_one(name, monkeypatch):
    x = np.random.default_rng(4).standard_normal((7, 512)).astype(np.float32)
    whole = quantize(x, Type[name])
    monkeypatch.setattr(quants, "PIECE", 768)
    assert np.array_equal(quantize(x, Type[name]), whole)
    assert np.array_equal(np.concatenate([quantize(row, Type[name]) for row in x]), whole)


@pytest.mark.parametrize(
    "name, values",
    [("F16", [70000.0]), ("F16", [np.inf]), ("Q8_0", [9e6]), ("Q4_K", [np.nan]), ("Q6_K", [-np.inf]), ("Q4_0", [1e7])],
)
def test_values_that_a_type_cannot_hold_are_refused(name, values):
    x = np.zeros((2, 256), np.float32)
    x[1, : len(values)] = values
    with pytest.raises(InputError, match="too large|not finite"):
        quantize(x, Type[name])


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_dequantises_as_the_gguf_package_does(kind):
    """Random blocks with three axes, including the types that dequant.npz lacks (IQ1, IQ2, IQ3, ternary, 4-bit)."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(int(kind)).integers(0, 256, (2, 3, 5 * size), np.uint8)
    with np.errstate(all="ignore"):  # random scales may be inf or nan
        expected = raw.view(np.float64) if kind == Type.F64 else gguf.quants.dequantize(raw, kind)
        values = dequantize(raw.reshape(-1), kind, (2, 3, 5 * block), expected.dtype)
    assert np.array_equal(bits(values), bits(np.ascontiguousarray(expected)))


def test_the_tables_list_every_type_that_the_gguf_package_supports():
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        for table, attempt in [
            (TYPES, lambda: gguf.quants.dequantize(np.zeros((2, size), np.uint8), kind)),
            (QUANTIZABLE, lambda: gguf.quants.quantize(np.ones((2, block), np.float32), kind)),
        ]:
            try:
                attempt()
                possible = True
            except NotImplementedError:
                possible = kind == Type.F64 or table is QUANTIZABLE and kind.name in FITTED  # ours
            assert possible == (kind in table), kind.name


def test_bf16_is_the_upper_half_of_float32():
    numbers = [1.0, -2.5, 3.140625, 1e-30]
    raw = b"".join(struct.pack("<f", x)[2:] for x in numbers)
    expected = [struct.unpack("<f", b"\0\0" + struct.pack("<f", x)[2:])[0] for x in numbers]
    assert dequantize(np.frombuffer(raw, np.uint8), Type.BF16, (4,)).tolist() == expected


def test_f32_is_a_view():
    raw = np.arange(5 * 3, dtype=np.float32).view(np.uint8)
    values = dequantize(raw, Type.F32, (5, 3))
    assert np.shares_memory(values, raw) and values[1].tolist() == [3, 4, 5]


def test_strided_and_scalar_tensors():
    raw = np.arange(24, dtype=np.float32).view(np.uint8).reshape(6, 16)[::2]
    assert dequantize(raw, Type.F32, (3, 4)).tolist() == np.arange(24).reshape(6, 4)[::2].tolist()
    assert dequantize(quantize(np.float64([2.5]), Type.F32), Type.F32, ()) == 2.5


@pytest.mark.parametrize("kind", [Type.Q8_K, Type.Q8_1, Type.I8])
def test_type_that_cannot_be_read_is_named(kind):
    with pytest.raises(InputError, match=kind.name):
        dequantize(np.zeros(stored_bytes(kind, (2, 256)), np.uint8), kind, (2, 256))


def test_type_that_cannot_be_written_is_named():
    with pytest.raises(InputError, match="IQ4_XS"):
        quantize(np.zeros((2, 256)), Type.IQ4_XS)


def test_bytes_and_shape_must_agree():
    with pytest.raises(InputError, match="68 bytes, 67 were given"):
        dequantize(np.zeros(67, np.uint8), Type.Q8_0, (2, 32))
    with pytest.raises(InputError, match="whole Q8_0 blocks of 32"):
        dequantize(np.zeros(68, np.uint8), Type.Q8_0, (4, 16))
    with pytest.raises(InputError, match="whole Q4_0 blocks of 32"):
        quantize(np.zeros((2, 33)), Type.Q4_0)


# --- values that are not finite ------------------------------------------------------------------------------------


def finite_blocks(kind, n):
    """n blocks of random bytes, (n, size), chosen to decode to finite values."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(int(kind)).integers(0, 256, (4 * n, size), np.uint8)
    return raw[decoded_finite(raw, kind)][:n].copy()


def decoded_finite(blocks, kind):
    """Whether the gguf package decodes each block to finite values only, (n,) bool."""
    with np.errstate(all="ignore"):
        values = blocks.view(np.float64) if kind == Type.F64 else gguf.quants.dequantize(blocks, kind)
    return np.isfinite(values.reshape(len(blocks), -1)).all(axis=1)


@pytest.mark.parametrize("kind", TYPES)
def test_a_block_that_decodes_to_nan_or_infinity_is_found_wherever_it_is(kind, monkeypatch):
    """Each byte and each pair of bytes in turn is set to a limit of a field: the largest finite values, infinities and
    NaN of float16 and bfloat16, and of 8-bit scales. Decoding determines the expected answer. The tensor is examined in
    four pieces; blocks that are not finite are placed in the first, a middle and the last one."""
    monkeypatch.setattr(quants, "SCANNED", 3 * gguf.GGML_QUANT_SIZES[kind][1])
    monkeypatch.setattr(quants, "DECODED", 3 * gguf.GGML_QUANT_SIZES[kind][1])
    good = finite_blocks(kind, 11)
    assert len(good) == 11 and stored_finite(good.reshape(-1), kind)
    values = [bytes([x]) for x in (0x7F, 0xFF, 252, 253, 254)] + [
        struct.pack("<H", x) for x in (0x7C00, 0xFC00, 0x7E01, 0xFFFF, 0x7BFF, 0xFBFF, 0x7F80, 0xFF80, 0x7F7F, 0x8000)
    ]
    size = good.shape[1]
    changed = np.repeat(good[:1], len(values) * size, axis=0)
    for row, (value, at) in zip(changed, itertools.product(values, range(size))):
        row[at : at + len(value)] = np.frombuffer(value, np.uint8)[: size - at]
    judged = decoded_finite(changed, kind)
    assert judged.any() and judged.all() == (kind == Type.NVFP4)  # whose scales are never NaN or infinite
    for block, expected in zip(changed, judged):
        for place in (0, 5, 10) if not expected else (5,):
            raw = good.copy()
            raw[place] = block
            assert stored_finite(raw.reshape(-1), kind) == expected, (place, block.tolist())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_array_with_nan_or_infinity_is_found_at_any_place_and_stride(dtype, monkeypatch):
    monkeypatch.setattr(quants, "SCANNED", 256)
    x = np.random.default_rng(5).standard_normal((7, 46)).astype(dtype)
    limits = np.finfo(dtype)
    x[0, 0], x[3, 17], x[6, 45], x[2, 2], x[5, 5] = limits.max, limits.min, -0.0, limits.smallest_subnormal, limits.tiny

    def views(x):
        return x, x.T, x[::-1, ::3], x.reshape(-1)[::3]

    assert all(map(finite, views(x))) and finite(np.zeros((0, 3), dtype)) and finite(dtype(2.5))
    for value, place in itertools.product((np.nan, -np.nan, np.inf, -np.inf), ((0, 0), (3, 18), (6, 45))):
        bad = x.copy()
        bad[place] = value
        assert [finite(view) for view in views(bad)] == [np.isfinite(view).all() for view in views(bad)]
        assert not finite(bad)
    assert not finite(dtype(np.inf))


def test_a_type_that_cannot_be_read_is_not_called_finite():
    with pytest.raises(InputError, match="Q8_K cannot be read"):
        stored_finite(np.zeros(292, np.uint8), Type.Q8_K)
