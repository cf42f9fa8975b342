"""Kernels of rows and elements (norms, convolution, gates, rotary embedding, embedding, AdamW) against ops in float64.

float32    each result within FACTOR noise floors (tests/tolerances.py), as the numba backend's
bfloat16   arguments are rounded to bfloat16 first, so the kernels read them exactly. They compute in float32 and round
           each result of that type once: half a unit of bfloat16 (2^-9) of each value, and FACTOR floors of float32.
           float32 results (gates, gradients of weights): the floors alone.
dx of norms  is a difference of two terms, which may cancel: 4 roundings of them more (`cancelling`). l2_norm's backward
           reads y, which is rounded: that too, in bfloat16.

The stand-in's fresh memory holds NaNs: a result that a kernel leaves out shows.
"""

from functools import partial
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.backends import cuda
from deltanet_ref.backends.cuda import causal_conv1d, gates, layout, norms
from deltanet_ref.backends.cuda.emulator import jobs
from deltanet_ref.errors import InputError
from tests.tolerances import STORED, assert_identical, assert_within, assert_within_floors, noise_floors, rounding

MODULES = ("adamw", "causal_conv1d", "embedding", "gates", "norms", "rope")
FACTOR = 4  # noise floors, as for the numba backend
HALF_UNIT = 2.0**-8  # what one rounding to bfloat16, of 8 significant bits, changes at most, relative

every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(scope="session")
def kernels(device):
    """The operators of this file on the device, under their names in ops."""
    functions = {}
    for module in MODULES:
        for name in cuda.MODULES[module].split():
            functions[name] = partial(getattr(import_module(f"deltanet_ref.backends.cuda.{module}"), name), device)
    return SimpleNamespace(**functions, device=device)


class Run:
    """An operator, forward and backward, as `function(backend, **arguments) -> {name: result}`, with its arguments.

    arguments   name -> float64 array
    wide        names of the arguments that are float32 for any dtype of activations; None is passed on
    """

    def __init__(self, function, wide="", **arguments):
        self.function, self.wide, self.arguments = function, wide.split(), arguments

    def rounded(self, dtype):
        """The arguments as the kernels read them, in float64."""
        return {name: None if x is None else x.astype(self.dtype(name, dtype)).astype(np.float64)
                for name, x in self.arguments.items()}  # fmt: skip

    def dtype(self, name, dtype):
        return np.dtype(np.float32) if name in self.wide else dtype

    def exact(self, arguments):
        return self.function(ops, **arguments)

    def on_device(self, kernels, dtype):
        """Results on the host, float64, and their dtypes."""
        arguments = {
            name: None if x is None else kernels.device.upload(x.astype(self.dtype(name, dtype)))
            for name, x in self.arguments.items()
        }
        results = self.function(kernels, **arguments)
        return {name: x.get().astype(np.float64) for name, x in results.items()}, {
            name: x.dtype for name, x in results.items()
        }

    def floors(self, dtype):
        """Noise floors of float32, by result."""
        names = [name for name, x in self.arguments.items() if x is not None]
        absent = {name: None for name, x in self.arguments.items() if x is None}
        rounded = self.rounded(dtype)
        return noise_floors(
            lambda arrays: list(self.exact(dict(zip(names, arrays)) | absent).values()),
            [rounded[name] for name in names],
            np.float32,
        )


def check(title, kernels, run, dtype, stored=HALF_UNIT, **more):
    """Compare a Run on the device with ops. stored: the rounding of activations in bfloat16; more: result -> what is
    added to its bound, as a function of the arguments and the dtype."""
    dtype = kernels.device.bf16 if dtype == "bfloat16" else np.dtype(np.float32)
    exact, floors = run.exact(run.rounded(dtype)), run.floors(dtype)
    got, dtypes = run.on_device(kernels, dtype)
    assert got.keys() == exact.keys()
    for (name, e), floor in zip(exact.items(), floors):
        label = f"{title}: {name}"
        wide = dtypes[name] == np.float32
        if wide and name not in more:
            assert_within_floors([label], [got[name]], [e], [floor], FACTOR)
            continue
        bound = FACTOR * floor + (0 if wide else stored * np.abs(e))
        assert_within(label, got[name], e, bound + (more[name](run.rounded(dtype), dtype) if name in more else 0))
    return dtypes


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def vector_of(dtype):
    """Values of 16 bytes."""
    return 4 if dtype == "float32" else 8


# ---- the operators, forward and backward


def l2_norm(b, x, dy):
    y, cache = b.l2_norm_forward(x, 1e-2)
    return {"y": y, "dx": b.l2_norm_backward(dy, cache)}


def rms_norm(b, x, w, dy):
    y, cache = b.rms_norm_forward(x, w, 1e-2)
    dx, dw = b.rms_norm_backward(dy, cache)
    return {"y": y, "dx": dx, "dw": dw}


def gated_rms_norm(b, x, z, w, dy):
    y, cache = b.gated_rms_norm_forward(x, z, w, 1e-2)
    dx, dz, dw = b.gated_rms_norm_backward(dy, cache)
    return {"y": y, "dx": dx, "dz": dz, "dw": dw}


def convolution(cu_seqlens, b, x, w, state, dy, dstate_end):
    y, state_end, cache = b.causal_conv1d_forward(x, w, state=state, cu_seqlens=cu_seqlens)
    dx, dw, dstate = b.causal_conv1d_backward(dy, dstate_end, cache)
    return {"y": y, "state_end": state_end, "dx": dx, "dw": dw, "dstate": dstate}


def decay_gate(b, a, b_, A_log, dt_bias, dg, dbeta):
    g, beta, cache = b.decay_gate_forward(a, b_, A_log, dt_bias)
    da, db, dA_log, ddt_bias = b.decay_gate_backward(dg, dbeta, cache)
    return {"g": g, "beta": beta, "da": da, "db": db, "dA_log": dA_log, "ddt_bias": ddt_bias}


def sigmoid_gate(b, o, gate, dy):
    y, cache = b.sigmoid_gate_forward(o, gate)
    do, dgate = b.sigmoid_gate_backward(dy, cache)
    return {"y": y, "do": do, "dgate": dgate}


def swiglu(b, gate, up, dy):
    y, cache = b.swiglu_forward(gate, up)
    dgate, dup = b.swiglu_backward(dy, cache)
    return {"y": y, "dgate": dgate, "dup": dup}


def rope(positions, rotary_dim, sections, b, x, dy):
    # ops gets the kernels' tables, which are float32: their rounding is rope_tables' matter
    tables = [t.astype(x.dtype if b is ops else np.float32) for t in
              ops.rope_tables(positions, rotary_dim, 1e4, sections, np.float32)]  # fmt: skip
    if b is not ops:
        tables = map(b.device.upload, tables)
    cos, sin = tables
    return {"y": b.rope_forward(x, cos, sin), "dx": b.rope_backward(dy, cos, sin)}


def embedding(tokens, b, w, dx):
    return {"x": b.embedding_forward(tokens, w), "dw": b.embedding_backward(dx, tokens, len(w))}


def adamw(b, p, g, m, v):
    if b is ops:
        p, m, v = p.copy(), m.copy(), v.copy()
    for t in (3, 4):
        b.adamw_update(p, g, m, v, t=t, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.2)
    return {"p": p, "m": m, "v": v}


# ---- norms


def widths(dtype):
    """For 16 and 32 lanes and a block, one and several packs, with accesses of one value and of 16 bytes."""
    V = vector_of(dtype)
    return [1, 13, 77, 257, 5 * V, 33 * V, 129 * V]


def cancelling(a, dtype):
    """Bound on what dx = r (dn - n mean(n . dn)) loses: roundings of the two terms that are subtracted, 4 of float32
    and, where n is the y of l2_norm in bfloat16, 2 of that."""
    dn = np.abs(a["dy"])
    if "w" in a:
        n, (_, r, _) = ops.rms_norm_forward(a["x"], np.ones_like(a["w"]), 1e-2)
        dn = dn * np.abs(a["w"]) * (np.abs(ops.silu(a["z"])) if "z" in a else 1)
        along = (np.abs(n) * dn).mean(-1, keepdims=True)
    else:
        n, (_, r) = ops.l2_norm_forward(a["x"], 1e-2)
        along = (np.abs(n) * dn).sum(-1, keepdims=True)
    second = np.abs(n) * along
    roundings = 4 * STORED["float32"] * (dn + second)
    if "w" not in a and dtype != np.float32:
        roundings = roundings + 2 * HALF_UNIT * second * (1 + HALF_UNIT)
    return r * roundings


@every_dtype
@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 5)], ids=str)
def test_norms_of_any_width_equal_ops(kernels, monkeypatch, dtype, number, shape):
    monkeypatch.setattr(norms, "PARTS", 3)  # blocks that sum dw: each goes through several rows
    d = widths(dtype)[number]
    x, z, dy = (random(*shape, d, seed=i) for i in range(3))
    w = random(d)

    check("l2_norm", kernels, Run(l2_norm, x=x, dy=dy), dtype, dx=cancelling)
    got = check("rms_norm", kernels, Run(rms_norm, "w", x=x, w=w, dy=dy), dtype, dx=cancelling)
    assert got["dw"] == np.float32
    check("gated_rms_norm", kernels, Run(gated_rms_norm, "w", x=x, z=z, w=w, dy=dy), dtype, dx=cancelling)


def test_norms_of_large_and_of_zero_rows(kernels):
    """A zero row gives zeros and finite gradients; rows of 1e15 do not overflow in float32."""
    x = random(3, 20)
    x[0], x[1] = 0, 1e15 * x[1]
    run = Run(l2_norm, x=x, dy=random(3, 20, seed=1))
    got, _ = run.on_device(kernels, np.dtype(np.float32))
    exact = run.exact(run.rounded(np.dtype(np.float32)))
    for row in range(3):
        for name in ("y", "dx"):
            e = exact[name][row]
            assert_within(f"row {row}: {name}", got[name][row], e, 4e-7 * np.abs(e).max())


# ---- strided rows


def views(device, shape, dtype):
    """Views with strides: their name, the view, and a copy in C order."""
    V = vector_of(dtype)
    real = device.bf16 if dtype == "bfloat16" else np.float32
    B, L, H, d = shape
    for name, wide, index in (
        ("features of a head", (B, L, H, 3 * d), np.s_[..., d : 2 * d]),
        ("heads of a token", (B, L, H + 4, d), np.s_[:, :, 1 : H + 1]),
        ("an odd offset", (B, L, H, d + V), np.s_[..., 1 : d + 1]),
        ("tokens of a row", (B, L + 2, H, d), np.s_[:, 1 : L + 1]),  # no single stride: copied
        ("in reverse", (B, L, H, d), np.s_[:, ::-1]),
    ):
        x = device.upload(random(*wide).astype(real))[index]
        yield name, x, device.upload(np.ascontiguousarray(x.get()))


@every_dtype
def test_views_give_the_bits_of_contiguous_arrays(kernels, dtype):
    device, V = kernels.device, vector_of(dtype)
    shape = 2, 3, 5, 2 * V
    real = device.bf16 if dtype == "bfloat16" else np.dtype(np.float32)
    w = device.upload(random(2 * V).astype(np.float32))
    dy = device.upload(random(*shape, seed=1).astype(real))
    o = device.upload(random(*shape, seed=2).astype(real))
    tables = [device.upload(random(3, V, seed=i).astype(np.float32)) for i in range(2)]
    for name, view, copy in views(device, shape, dtype):
        for label, run in {
            "l2_norm": lambda x: l2_norm(kernels, x, dy),
            "l2_norm, dy": lambda x: l2_norm(kernels, o, x),
            "rms_norm": lambda x: rms_norm(kernels, x, w, dy),
            "gated_rms_norm, x": lambda x: gated_rms_norm(kernels, x, o, w, dy),
            "gated_rms_norm, z": lambda x: gated_rms_norm(kernels, o, x, w, dy),
            "sigmoid_gate": lambda x: sigmoid_gate(kernels, o, x, dy),
            "swiglu": lambda x: swiglu(kernels, o, x, dy),
            "rope": lambda x: {"y": kernels.rope_forward(x, *tables)},
        }.items():
            got, want = run(view), run(copy)
            for result in want:
                g, w_ = got[result].get(), want[result].get()
                if name == "an odd offset":  # one value an access: sums in another order
                    g, w_ = g.astype(np.float64), w_.astype(np.float64)
                    unit = 2 * HALF_UNIT if want[result].dtype == device.bf16 else 0
                    assert_within(f"{label}, {name}: {result}", g, w_, unit * np.abs(w_) + 1e-6 * np.abs(w_).max())
                else:
                    assert_identical(f"{label}, {name}: {result}", g, w_)


def test_slices_of_heads_and_features_are_not_copied(kernels):
    copied = set()
    for name, x, _ in views(kernels.device, (2, 3, 5, 8), "float32"):
        if layout.rows(kernels.device, x).memory.data.ptr != x.data.ptr:
            copied.add(name)
    assert copied == {"tokens of a row", "in reverse"}


# ---- convolution

DENSE = [1, 2, 15, 16, 17, 33, 70]  # tokens, around the runs of 16 and 32
PACKED = [
    [0, 0, 1, 3, 3, 20, 37, 40, 70, 70],  # empty first, last and within; shorter than the kernel; across runs
    [0, 16, 32, 64],  # boundaries of sequences and of runs coincide
    [0, 15, 17, 31, 33],  # and nearly
]


@every_dtype
@pytest.mark.parametrize("tokens", [*DENSE, *PACKED], ids=str)
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "zeros"])
def test_convolution_of_any_length_equals_ops(kernels, monkeypatch, dtype, tokens, with_state):
    monkeypatch.setattr(causal_conv1d, "PARTS", 2)
    cu = None if isinstance(tokens, int) else np.array(tokens)
    B, L = (2, tokens) if cu is None else (1, tokens[-1])
    N_seq, V = B if cu is None else len(cu) - 1, vector_of(dtype)
    for channels, K in ((3 * V, 4), (5, 4), (3, 3), (7, 1)):
        x, dy = (random(B, L, channels, seed=i) for i in range(2))
        state, dstate_end = (random(N_seq, K - 1, channels, seed=i) if with_state else None for i in range(2))
        arguments = dict(x=x, w=random(channels, K), state=state, dy=dy, dstate_end=dstate_end)
        check(f"{channels} channels, K {K}", kernels, Run(partial(convolution, cu), "w", **arguments), dtype)


@every_dtype
def test_convolution_of_more_channels_than_a_block_has_equals_ops(kernels, dtype):
    channels = 129 * vector_of(dtype)
    x, dy, w = random(1, 3, channels), random(1, 3, channels, seed=1), random(channels, 4)
    run = Run(partial(convolution, None), "w", x=x, w=w, state=None, dy=dy, dstate_end=None)
    check("convolution", kernels, run, dtype)


# ---- gates


@every_dtype
@pytest.mark.parametrize("heads", [1, 3, 16, 300])
@pytest.mark.parametrize("L", [1, 2, 51])
def test_decay_gate_equals_ops(kernels, monkeypatch, dtype, heads, L):
    """Gates from nearly open to closed: softplus from e^-30 to 30, decays to exp(-400)."""
    monkeypatch.setattr(gates, "PARTS", 3)
    B = 2
    a, b = 10 * random(B, L, heads), 10 * random(B, L, heads, seed=1)
    arguments = dict(a=a, b_=b, A_log=random(heads), dt_bias=random(heads, seed=1))
    arguments |= dict(dg=random(B, L, heads, seed=2), dbeta=random(B, L, heads, seed=3))
    got = check("decay_gate", kernels, Run(decay_gate, "A_log dt_bias dg dbeta", **arguments), dtype)
    assert got["g"] == got["beta"] == np.float32


def test_g_and_beta_are_relatively_accurate_where_they_vanish(kernels):
    """x = -40 .. 40: relative errors count, for g near 0 as for 1 - beta near 0 in db."""
    a = np.linspace(-40, 40, 81).reshape(1, 81, 1)
    zero, one = np.zeros(1), np.ones((1, 81, 1))
    run = Run(decay_gate, "A_log dt_bias dg dbeta", a=a, b_=a, A_log=zero, dt_bias=zero, dg=one, dbeta=one)
    got, _ = run.on_device(kernels, np.dtype(np.float32))
    exact = run.exact(run.rounded(np.dtype(np.float32)))
    for name in ("g", "beta", "da"):
        assert_within(name, got[name], exact[name], 1e-6 * np.abs(exact[name]))
    x = a.ravel()
    db = (1 / (1 + np.exp(-x)) / (1 + np.exp(x))).reshape(a.shape)  # ops loses 1 - beta above 36
    assert_within("db", got["db"], db, 1e-6 * db)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), (2, 9, 88), (3, 2104)], ids=str)
def test_swiglu_and_sigmoid_gate_equal_ops(kernels, dtype, shape):
    a, b, dy = (s * random(*shape, seed=i) for i, s in enumerate((3, 1, 1)))
    check("swiglu", kernels, Run(swiglu, gate=a, up=b, dy=dy), dtype)
    check("sigmoid_gate", kernels, Run(sigmoid_gate, o=b, gate=a, dy=dy), dtype)


def test_gates_of_large_numbers_stay_finite(kernels):
    x = np.array([[-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30]])
    one = np.ones_like(x)
    got, _ = Run(swiglu, gate=x, up=one, dy=one).on_device(kernels, np.dtype(np.float32))
    assert_within("y", got["y"], np.maximum(x, 0), 1e-7 * np.abs(x))
    assert_within("dgate", got["dgate"], (x > 0) + 0.5 * (x == 0), 1e-6)


# ---- rotary embedding


@every_dtype
@pytest.mark.parametrize("d, half", [(7, 3), (6, 3), (40, 8), (40, 0), (32, 16)])
def test_rope_equals_ops(kernels, dtype, d, half):
    L, sections = 6, (1, 1, 1)
    positions = np.array([np.arange(L), [0, 7, 7, 9, 4, 100], [0, 8, 6, 5, 4, 3]])
    x, dy = (random(2, L, 3, d, seed=i) for i in range(2))
    check("rope", kernels, Run(partial(rope, positions, 2 * half, sections), x=x, dy=dy), dtype)


@every_dtype
def test_rope_tables_are_those_of_ops_in_float32(kernels, dtype):
    """Rounded once from float64, at positions where a float32 angle would be wrong in its second digit."""
    positions = np.array([0, 1, 1000, 262143])
    real = kernels.device.bf16 if dtype == "bfloat16" else np.float32
    got = kernels.rope_tables(positions, 64, 1e7, dtype=real)
    for name, g, w in zip(("cos", "sin"), got, ops.rope_tables(positions, 64, 1e7, dtype=np.float32)):
        assert_identical(name, g.get(), w)


# ---- embedding


@every_dtype
@pytest.mark.parametrize("D", [1, 13, 24, 264])
def test_embedding_equals_ops(kernels, dtype, D):
    tokens = np.array([[4, 0, 4, 6, 3] * 5, [6, 4, 0, 4, 4] * 5])  # more uses than warps, and tokens without any
    run = Run(partial(embedding, tokens), w=random(9, D), dx=random(*tokens.shape, D))
    assert check("embedding", kernels, run, dtype, stored=0)["dw"] == np.float32


# ---- AdamW


@pytest.mark.parametrize("shape", [(1,), (5, 7), (3, 8), (1028,)], ids=str)
def test_adamw_equals_ops(kernels, shape):
    p, g, m, v = (random(*shape, seed=i) for i in range(4))
    check("adamw", kernels, Run(adamw, "p g m v", p=p, g=g, m=m, v=v**2), "float32")


# ---- sums of parts


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 77])
@pytest.mark.parametrize("columns", [1, 31, 32, 33])
def test_column_sums_add_every_row(device, count, columns):
    parts = random(count, columns).astype(np.float32)
    exact, magnitude = parts.astype(np.float64).sum(0), np.abs(parts).sum(0)
    got = layout.column_sums(device, device.upload(parts)).get()
    assert_within("sums", got, exact, rounding(count, np.float32) * magnitude)


# ---- all of them


def runs():
    """One Run of each operator, with several blocks and a rest."""
    x = {i: random(2, 9, 3, 13, seed=i) for i in range(4)}
    rows = dict(x=x[0], dy=x[1])
    conv = dict(x=random(1, 40, 5), w=random(5, 4), state=random(4, 3, 5), dy=random(1, 40, 5, seed=1))
    gate = {n: 3 * random(2, 20, 3, seed=i) for i, n in enumerate(("a", "b_", "dg", "dbeta"))}
    tokens = np.array([3, 1, 3, 0] * 5)
    return {
        "l2_norm": Run(l2_norm, **rows),
        "rms_norm": Run(rms_norm, "w", **rows, w=random(13)),
        "rms_norm-block": Run(rms_norm, "w", x=random(7, 516), dy=random(7, 516, seed=1), w=random(516)),
        "l2_norm-block": Run(l2_norm, x=random(7, 516), dy=random(7, 516, seed=1)),
        "gated_rms_norm": Run(gated_rms_norm, "w", **rows, z=x[2], w=random(13)),
        "gated_rms_norm-block": Run(
            gated_rms_norm, "w", x=random(7, 516), z=random(7, 516), dy=random(7, 516, seed=1), w=random(516)
        ),
        "causal_conv1d": Run(
            partial(convolution, np.array([0, 3, 3, 22, 40])), "w", **conv, dstate_end=random(4, 3, 5, seed=1)
        ),
        "decay_gate": Run(decay_gate, "A_log dt_bias dg dbeta", **gate, A_log=random(3), dt_bias=random(3, seed=1)),
        "sigmoid_gate": Run(sigmoid_gate, o=x[0], gate=x[1], dy=x[2]),
        "swiglu": Run(swiglu, gate=x[0], up=x[1], dy=x[2]),
        "rope": Run(partial(rope, np.arange(9), 6, None), **rows),
        "embedding": Run(partial(embedding, tokens), w=random(5, 40), dx=random(20, 40)),
        "adamw": Run(adamw, "p g m v", p=x[0], g=x[1], m=x[2], v=x[3] ** 2),
    }


RUNS = runs()
every_operator = pytest.mark.parametrize("name", RUNS)


@every_operator
def test_results_do_not_depend_on_the_order_of_threads_nor_leave_their_arrays(kernels, monkeypatch, name):
    """No race for ThreadSanitizer, no access beyond an array or misaligned for the other two, and every barrier is
    needed: without it something is reported, or numbers change."""
    monkeypatch.setattr(norms, "PARTS", 2)
    monkeypatch.setattr(gates, "PARTS", 2)
    with jobs.recording() as launches:
        RUNS[name].on_device(kernels, np.dtype(np.float32))
    for build in ("thread", "address"):
        for found in jobs.run(launches, build).findings:
            pytest.fail(f"{build}: {found.kind} in {found.file}:{found.line}\n{found.text}")
    unnoticed = [site for site, noticed in jobs.switch_off_each(launches).items() if not noticed]
    assert not unnoticed, f"not needed: {unnoticed}"


@every_operator
def test_the_same_bits_in_every_run(kernels, name):
    first, second = (RUNS[name].on_device(kernels, np.dtype(np.float32))[0] for _ in range(2))
    for result in first:
        assert_identical(f"{name}: {result}", second[result], first[result])


def test_backward_of_weights_is_left_out_where_it_is_not_needed(kernels):
    upload = kernels.device.upload
    x, w = upload(random(2, 3, 8).astype(np.float32)), upload(random(8).astype(np.float32))
    for forward, backward, arguments in (
        ("rms_norm_forward", "rms_norm_backward", (x, w, 1e-6)),
        ("gated_rms_norm_forward", "gated_rms_norm_backward", (x, x, w, 1e-6)),
        ("causal_conv1d_forward", "causal_conv1d_backward", (x, upload(random(8, 4).astype(np.float32)))),
        ("decay_gate_forward", "decay_gate_backward", (x, x, w, w)),
    ):
        *outputs, cache = getattr(kernels, forward)(*arguments)
        incoming = [x] if "norm" in backward else [x, None] if "conv" in backward else [x, x]
        with_dw, without = (getattr(kernels, backward)(*incoming, cache, need_dw=need) for need in (True, False))
        for i, (full, g) in enumerate(zip(with_dw, without)):
            if g is not None:
                assert_identical(f"{backward}, result {i}", g.get(), full.get())
        assert any(g is None for g in without)


def test_shapes_are_refused_as_ops_refuses_them(kernels):
    x, w = np.ones((2, 3, 2, 4), np.float32), np.ones(4, np.float32)
    tokens = np.array([0, 9])
    for call in (
        lambda o, x, w: o.swiglu_forward(x, x[1:]),
        lambda o, x, w: o.sigmoid_gate_forward(x, x[:, 1:]),
        lambda o, x, w: o.rms_norm_forward(x, w[1:], 1e-6),
        lambda o, x, w: o.gated_rms_norm_forward(x, x[1:], w, 1e-6),
        lambda o, x, w: o.rope_forward(x, w[None], w[None]),
        lambda o, x, w: o.decay_gate_forward(x, x, w, w[1:]),
        lambda o, x, w: o.causal_conv1d_forward(x[0], w[None]),
        lambda o, x, w: o.causal_conv1d_forward(x[0], x[0, :, 0].T, state=x[0, :2]),
        lambda o, x, w: o.causal_conv1d_forward(x[0], x[0].reshape(4, 6), cu_seqlens=np.array([0, 2])),
        lambda o, x, w: o.embedding_forward(tokens, x[0, 0]),
        lambda o, x, w: o.rope_tables(tokens, 3, 1e4),
    ):
        messages = []
        for backend, arrays in ((ops, (x, w)), (kernels, map(kernels.device.upload, (x, w)))):
            with pytest.raises(InputError) as raised:
                call(backend, *arrays)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def test_other_dtypes_are_refused_with_the_remedy(kernels):
    upload, bf16 = kernels.device.upload, kernels.device.bf16
    x, w = np.ones((2, 3, 2, 8)), np.ones(8)
    for message, call in (
        ("float64", lambda: kernels.swiglu_forward(upload(x), upload(x))),
        ("bfloat16 and float32", lambda: kernels.swiglu_forward(upload(x, bf16), upload(x, np.float32))),
        ("float32 in the.*not bfloat16", lambda: kernels.rms_norm_forward(upload(x, bf16), upload(w, bf16), 1e-6)),
        ("int32", lambda: kernels.l2_norm_forward(upload(x, np.int32))),
        ("not float64", lambda: kernels.rope_tables(np.arange(3), 4, 1e4, dtype=np.float64)),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_what_adamw_cannot_update_in_place_is_refused(kernels):
    p = kernels.device.upload(np.ones((4, 6), np.float32))
    with pytest.raises(InputError, match="in place"):
        kernels.adamw_update(p.T, p.T, p.T, p.T, t=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0)
