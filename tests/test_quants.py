"""formats/quants.py against blocks that ggml itself quantised and dequantised, and against the gguf package."""
import struct

import gguf
import numpy as np
import pytest

from deltanet_ref.errors import InputError
from deltanet_ref.formats.quants import QUANTIZABLE, TYPES, dequantize, quantize, rows, stored_bytes
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


@pytest.mark.parametrize("name", [name for name in STORED if Type[name] in QUANTIZABLE])
def test_quantisation_is_ggmls_bit_for_bit(name):
    raw = quantize(GGML[f"{name}/src"], Type[name])
    assert raw.dtype == np.uint8 and np.array_equal(raw, GGML[f"{name}/raw"].reshape(-1))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_dequantises_as_the_gguf_package_does(kind):
    """Random blocks of three axes; also the types that dequant.npz lacks (IQ1, IQ2, IQ3, ternary, 4-bit floats)."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(int(kind)).integers(0, 256, (2, 3, 5 * size), np.uint8)
    with np.errstate(all="ignore"):     # random scales may be inf or nan
        expected = raw.view(np.float64) if kind == Type.F64 else gguf.quants.dequantize(raw, kind)
        values = dequantize(raw.reshape(-1), kind, (2, 3, 5 * block), expected.dtype)
    assert np.array_equal(bits(values), bits(np.ascontiguousarray(expected)))


def test_the_tables_list_all_that_the_gguf_package_can():
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        for table, attempt in [(TYPES, lambda: gguf.quants.dequantize(np.zeros((2, size), np.uint8), kind)),
                               (QUANTIZABLE, lambda: gguf.quants.quantize(np.ones((2, block), np.float32), kind))]:
            try:
                attempt()
                possible = True
            except NotImplementedError:
                possible = kind == Type.F64     # plain, ours
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
