"""Linear maps and low-rank updates: their products, strides and scales.

A product accumulates in float32 and rounds once to its result's dtype. Its error is at most the accumulation's,
(in + 1) 2^-24 of the sum of |terms|, and half a unit in the last place of the result.
"""

import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.backends.cuda import linear, lora_linear, stand_in
from deltanet_ref.ops.lora_linear import Update

UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}  # half a unit in the last place, relative


def bound(exact, terms, inner, dtype):
    """Of the error of a product of `inner` terms with sum of |terms|."""
    return (inner + 1) * 2.0**-24 * terms + UNIT[dtype] * np.abs(exact) * 1.01 + 1e-37


@pytest.fixture(params=["float32", "bfloat16"])
def draw(request, device):
    """shape -> (array of the device, the same numbers in float64)."""
    rng = np.random.default_rng(5)

    def array(*shape):
        host = rng.standard_normal(shape).astype(device.bf16 if request.param == "bfloat16" else np.float32)
        return device.upload(host), host.astype(np.float64)

    array.dtype = request.param
    return array


def check(name, result, exact, terms, inner, dtype):
    assert result.dtype.name == dtype, f"{name} is {result.dtype}"
    error, limit = np.abs(result.get().astype(np.float64) - exact), bound(exact, terms, inner, dtype)
    assert (error <= limit).all(), f"{name}: error {error.max():.3g}, limit there {limit.ravel()[error.argmax()]:.3g}"


@pytest.mark.parametrize("shape", [(1, 1, 5, 3), (2, 3, 7, 4), (1, 65, 130, 33)])
def test_linear_maps_equal_ops(device, draw, shape):
    B, L, n_in, n_out = shape
    (x, x64), (w, w64), (dy, dy64) = draw(B, L, n_in), draw(n_out, n_in), draw(B, L, n_out)
    absolute = [np.abs(a) for a in (x64, w64, dy64)]
    check("y", linear.linear_forward(device, x, w), ops.linear_forward(x64, w64),
          ops.linear_forward(absolute[0], absolute[1]), n_in, draw.dtype)  # fmt: skip
    check("dx", linear.linear_backward_input(device, dy, w), ops.linear_backward_input(dy64, w64),
          ops.linear_backward_input(absolute[2], absolute[1]), n_out, draw.dtype)  # fmt: skip
    check("dw", linear.linear_backward_weight(device, dy, x), ops.linear_backward_weight(dy64, x64),
          ops.linear_backward_weight(absolute[2], absolute[0]), B * L, "float32")  # fmt: skip


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("view", ["whole", "slice", "transposed", "every second", "reversed"])
def test_products_of_views(device, draw, transpose_a, transpose_b, view):
    m, k, n = 5, 7, 3
    operands, exact = [], []
    for (rows, columns), transpose in (((m, k), transpose_a), ((k, n), transpose_b)):
        rows, columns = (columns, rows) if transpose else (rows, columns)
        if view == "slice":
            whole = [x[1:, 2:-1] for x in draw(rows + 1, columns + 3)]
        elif view == "transposed":
            whole = [x.T for x in draw(columns, rows)]
        elif view == "every second":
            whole = [x[::2, ::2] for x in draw(2 * rows, 2 * columns)]
        elif view == "reversed":
            whole = [x[::-1] for x in draw(rows, columns)]
        else:
            whole = draw(rows, columns)
        operands.append(whole[0])
        exact.append(whole[1].T if transpose else whole[1])
    c, c64 = draw(m, n + 2)
    terms = np.abs(exact[0]) @ np.abs(exact[1])
    result = device.matmul(*operands, transpose_a, transpose_b)
    check("a b", result, exact[0] @ exact[1], terms, k, draw.dtype)
    device.matmul(*operands, transpose_a, transpose_b, out=c[:, 1:-1], accumulate=True, alpha=-0.5)
    expected = c64[:, 1:-1] - 0.5 * exact[0] @ exact[1]
    check("c - a b / 2", c[:, 1:-1], expected, terms + np.abs(c64[:, 1:-1]), k, draw.dtype)
    assert (c.get()[:, [0, -1]] == c64[:, [0, -1]]).all(), "the product writes outside its result"


def test_lora_equals_ops(device, draw):
    B, L, n_in, outs = 1, 9, 6, (5, 8)
    x, x64 = draw(B, L, n_in)
    ys, dys = [draw(B, L, n) for n in outs], [draw(B, L, n) for n in outs]
    updates, updates64 = [], []
    for i, rank, scale in ((0, 2, 0.5), (1, 3, -2.0), (1, 1, 1.0)):
        (a, a64), (b, b64) = draw(rank, n_in), draw(outs[i], rank)
        updates.append(Update(i, a, b, scale))
        updates64.append(Update(i, a64, b64, scale))
    results64 = [y64.copy() for _, y64 in ys]
    cache64 = ops.lora_forward(results64, x64, updates64)
    cache = lora_linear.lora_forward(device, [y for y, _ in ys], x, updates)
    # h is rounded once more, and so is y after each update
    unit = UNIT[draw.dtype]
    for i, ((y, _), exact) in enumerate(zip(ys, results64, strict=True)):
        error = np.abs(y.get().astype(np.float64) - exact).max()
        assert error < 8 * unit * np.abs(exact).max() * 4, f"y {i}: {error:.3g}"
    for trained in ([True, True, True], [False, True, False]):
        dx, factors = lora_linear.lora_backward(device, [dy for dy, _ in dys], cache, True, trained)
        dx64, factors64 = ops.lora_backward([dy for _, dy in dys], cache64, True, trained)
        assert dx.dtype == x.dtype
        assert np.abs(dx.get() - dx64).max() < 16 * unit * np.abs(dx64).max()
        for pair, pair64 in zip(factors, factors64, strict=True):
            assert (pair is None) == (pair64 is None)
            for name, d, exact in zip(("da", "db"), pair or (), pair64 or (), strict=False):
                assert d.dtype == np.float32
                assert np.abs(d.get() - exact).max() < 16 * unit * np.abs(exact).max(), name
    assert lora_linear.lora_backward(device, [dy for dy, _ in dys], cache, False, [False] * 3) == (None, [None] * 3)


def test_products_are_captured_with_a_workspace_of_ours(device):
    """The workspace is set after the stream, before anything is captured; CuPy's own product is refused."""
    a = device.upload(np.eye(3, dtype=np.float32))
    device.matmul(a, a)  # on the default stream
    stream = stand_in.cuda.Stream(non_blocking=True)
    with stream:
        device.matmul(a, a)
        stream.begin_capture()
        b = device.matmul(a, a, alpha=2.0)
        with pytest.raises(NotImplementedError, match="stream capture"):
            a @ a
        graph = stream.end_capture()
        assert np.isnan(b.get()).all()
        graph.launch()
    assert (b.get() == 2 * np.eye(3)).all()


def test_products_of_other_dtypes_are_refused(device):
    a, h = device.zeros((2, 2), np.float32), device.zeros((2, 2), device.bf16)
    with pytest.raises(TypeError, match="no product of float32 and bfloat16"):
        device.matmul(a, h)
    with pytest.raises(TypeError, match="into bfloat16"):
        device.matmul(a, a, out_dtype=device.bf16)
