"""The committed vectors: their form, that they are reproducible, and that their values are right: by complex step, by
50-digit arithmetic and by hand."""

import hashlib
import json

import jsonschema
import mpmath
import numpy as np
import pytest

from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors
from deltanet_ref.oracle.cases import CASES, GROUPS, bfloat16, float32, make_inputs
from deltanet_ref.oracle.catalogue import CATALOGUE
from deltanet_ref.oracle.chunk_by_chunk import BACKWARD, FORWARD
from deltanet_ref.oracle.derivative import complex_step_gradient
from deltanet_ref.oracle.expected import VECTORS, expected
from deltanet_ref.oracle.flags import FLAGS
from deltanet_ref.oracle.make_vectors import VERSION, verify_vectors, write_vectors
from deltanet_ref.oracle.noise import relative_error
from deltanet_ref.oracle.operators import OPERATORS, in_dtype
from tests.oracle_kernels import expand

METADATA = {group: json.loads((VECTORS / f"{group}.json").read_text()) for group in GROUPS}


# ---- form


@pytest.mark.parametrize("group", GROUPS)
def test_metadata_is_valid_and_describes_every_tensor(group):
    jsonschema.Draft202012Validator(json.loads((VECTORS / "schema.json").read_text())).validate(METADATA[group])
    tensors = read_safetensors(VECTORS / METADATA[group]["file"])
    described = set()
    for case in METADATA[group]["cases"]:
        assert set(case["flags"]) <= METADATA[group]["flags"].keys()
        digest = hashlib.sha256()
        for name, facts in case["tensors"].items():
            tensor = tensors[f"{case['id']}/{name}"]
            assert list(tensor.shape) == facts["shape"] and str(tensor.dtype) == facts["dtype"]
            described.add(f"{case['id']}/{name}")
            if facts["role"] in ("input", "incoming"):
                digest.update(tensor.tobytes())
            else:
                described |= {f"{case['id']}/{name}.scale", f"{case['id']}/{name}.floor"}
        assert digest.hexdigest() == case["inputs_sha256"]
    assert described == set(tensors)


def test_the_schema_rejects_invalid_metadata():
    validator = jsonschema.Draft202012Validator(json.loads((VECTORS / "schema.json").read_text()))
    for break_it in (
        lambda m: m.pop("source"),
        lambda m: m["cases"][0]["tensors"]["x"].update(role="guess"),
        lambda m: m["cases"][0].update(op="unknown"),
        lambda m: m["flags"]["plain"].pop("catches"),
    ):
        metadata = json.loads(json.dumps(METADATA["conv"]))
        break_it(metadata)
        assert not validator.is_valid(metadata)


def test_the_vectors_are_at_most_8_mb_and_their_sums_are_right():
    assert sum(path.stat().st_size for path in VECTORS.iterdir()) <= 8e6
    sums = dict(line.split()[::-1] for line in (VECTORS / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {path.name for path in VECTORS.iterdir()} - {"SHA256SUMS", "schema.json"}
    assert all(hashlib.sha256((VECTORS / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())


def test_every_flag_is_documented_and_used_and_refers_to_the_catalogue():
    used = {flag for case in CASES.values() for flag in case.flags}
    assert used == FLAGS.keys()
    assert all(flag.catches and set(flag.bugs) <= CATALOGUE.keys() for flag in FLAGS.values())
    required = """hand-computable non-square grouped-heads tiled-heads ragged single-token initial-state
        final-state-loss no-decay strong-decay mixed-decay beta-0 beta-1 beta-2 repeated-keys orthogonal-keys
        zero-keys tiny-keys padding packed bf16-inputs long wide-state batch-rows""".split()
    assert set(required) <= used


def test_there_are_lengths_around_every_power_of_two():
    lengths = {case.sizes["L"] for case in CASES.values() if case.group == "delta"}
    assert {n + d for n in (16, 32, 64, 128) for d in (-1, 0, 1)} | {1, 2} <= lengths
    assert max(lengths) > 4096


def test_cases_have_the_properties_that_their_flags_claim():
    for case in CASES.values():
        if case.group != "delta":
            continue
        x, s = make_inputs(case), case.sizes
        assert ("non-square" in case.flags) == (s["d_k"] != s["d_v"])
        assert ("initial-state" in case.flags) == bool(x["S0"].any())
        assert ("final-state-loss" in case.flags) == bool(x["dS_end"].any())
        assert (x["g"] <= 0).all()
        if "bf16-inputs" in case.flags:
            for name in ("q", "k", "v", "beta", "do"):
                np.testing.assert_array_equal(bfloat16(x[name]), x[name])
        if "near-solution" in case.flags:
            error = np.abs(x["dS_end"]).max(), expected(case).values["S_end"] - x["S0"]
            assert np.abs(error[1]).max() < 0.05
        if "orthogonal-keys" in case.flags:
            assert set(np.unique(x["k"])) == {0, 1}


# ---- reproducible


def test_regenerated_vectors_equal_the_committed_ones():
    """Bit for bit on the machine that made them; elsewhere within the noise floors that verify_vectors allows."""
    assert verify_vectors(VECTORS) == []


def test_files_written_twice_are_byte_identical(tmp_path):
    for run in ("first", "second"):
        write_vectors(tmp_path / run, ["packed", "step", "conv", "model"])
    assert (tmp_path / "first" / "SHA256SUMS").read_text() == (tmp_path / "second" / "SHA256SUMS").read_text()


def test_verification_finds_one_changed_number(tmp_path):
    for path in VECTORS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "conv.safetensors").read_bytes())
    data[-5] ^= 16  # in the exponent of the last but one float32
    (tmp_path / "conv.safetensors").write_bytes(data)
    wrong = verify_vectors(tmp_path, ["conv"])
    assert len(wrong) == 2 and "sha256" in wrong[0] and "conv/" in wrong[1]


@pytest.mark.parametrize("floors, lines", [(8, 0), (24, 1)])
def test_verification_allows_the_noise_of_float64_and_nothing_more(tmp_path, floors, lines):
    write_vectors(tmp_path, ["conv"])
    tensors = dict(read_safetensors(tmp_path / "conv.safetensors").items())
    name = next(name for name in tensors if name.endswith("/dx"))
    scale = tensors[f"{name}.scale"].astype(np.float64)
    tensors[name] = tensors[name] + floors * 2.0**-29 * tensors[f"{name}.floor"][0] * scale[..., None]
    write_safetensors(tmp_path / "conv.safetensors", tensors, {"version": str(VERSION)})
    wrong = [line for line in verify_vectors(tmp_path, ["conv"]) if "sha256" not in line]
    assert len(wrong) == lines and all(line.startswith(f"{name}: off by 2") for line in wrong)


def test_inputs_are_the_same_bits_on_every_machine():
    """They use only raw bits, + - * / and sqrt, none of which depends on a library's rounding."""
    x = make_inputs(CASES["delta/plain"])
    digest = hashlib.sha256(b"".join(a.tobytes() for a in x.values() if isinstance(a, np.ndarray))).hexdigest()
    entry = next(case for case in METADATA["delta"]["cases"] if case["id"] == "delta/plain")
    assert digest == entry["inputs_sha256"]


def test_bfloat16_rounds_to_nearest_ties_to_even():
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, -(1 + 2**-8 + 2**-20), 3.0e38, 0.0])
    np.testing.assert_array_equal(
        bfloat16(x), float32([1, 1, 1 + 2**-6, 1, -(1 + 2**-7), 3.0e38, 0.0])[:5].tolist() + bfloat16(x[5:]).tolist()
    )
    assert (bfloat16(x).view(np.uint32) & 0xFFFF == 0).all()


# ---- right values: by hand


def test_the_hand_computable_case_equals_the_calculation_in_the_readme():
    y = expected(CASES["delta/hand"]).values
    np.testing.assert_array_equal(y["o"][0, :, 0], [[2, 4, -2], [3, 3.5, -1.5]])
    np.testing.assert_array_equal(y["S_end"][0, 0], [[2.5, 3.75, -1.75], [0.5, -0.25, 0.25]])
    np.testing.assert_array_equal(y["dq"][0, 1, 0], [5.5, -0.5])
    np.testing.assert_array_equal(y["dk"][0, 1, 0], [-4, -1])
    np.testing.assert_array_equal(y["dv"][0, 1, 0], [0, 0.5, -0.5])
    assert y["dg"][0, 1, 0] == 4.5 and y["dbeta"][0, 1, 0] == -2


# ---- right values: by complex step

SMALL = [
    case
    for case in CASES.values()
    if case.op != "qwen35" and case.sizes.get("L", 1) <= 23 and case.id not in ("delta/wide-heads",)
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_gradients_equal_the_complex_step_of_the_forward(case):
    """Exact up to rounding: 1e-12 of the scale, at 40 elements of each gradient."""
    op, right = OPERATORS[case.op], expected(case)
    x = in_dtype(make_inputs(case), np.float64) | {k: v for k, v in case.options.items() if k == "head_order"}
    tolerance = 1e-12 if "delta" in case.op else 1e-11  # elsewhere the scale is the row's own size
    rng = np.random.default_rng(case.seed)
    for gradient in op.gradients:
        name = gradient[1:]
        chosen = rng.permutation(x[name].size)[:40]

        def loss(values):
            moved = x[name].astype(np.complex128)
            moved.flat[chosen] = values
            y = op.reference(in_dtype(x, np.complex128) | {name: moved})
            return sum((y[output] * x[d]).sum() for output, d in zip(op.outputs, op.incoming))

        exact = complex_step_gradient(loss, x[name].flat[chosen])
        want = right.values[gradient]
        scale = np.broadcast_to(
            right.scales[gradient].reshape(
                right.scales[gradient].shape + (1,) * (want.ndim - right.scales[gradient].ndim)
            ),
            want.shape,
        )
        off = np.abs(exact - want.flat[chosen]) / scale.flat[chosen]
        assert off.max() < tolerance, gradient


with_intermediates = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if "intermediates" in case.flags], ids=lambda case: case.id
)


def chunked_loss(x, chunk, bump):
    """The chunked form in complex128, with one named intermediate of chunk bump["chunk"] shifted by bump[name]."""
    q, k = expand(x["q"], x["v"]), expand(x["k"], x["v"])
    S, loss = x["S0"].astype(np.complex128), 0

    def moved(name, value, n):
        return value + bump[name] if bump.get("chunk") == n and name in bump else value

    for n, start in enumerate(range(0, q.shape[1], chunk)):
        t = slice(start, start + chunk)
        Q, K, V, b, dO = (a[:, t].swapaxes(1, 2) for a in (q, k, x["v"], x["beta"][..., None], x["do"]))
        S = moved("S", S, n)
        gc = moved("gc", np.cumsum(x["g"][:, t].swapaxes(1, 2), -1), n)
        C = gc.shape[2]
        Gamma = np.where(
            np.tri(C, dtype=bool),
            np.exp(
                np.minimum((gc[..., :, None] - gc[..., None, :]).real, 0)
                + 1j * (gc[..., :, None] - gc[..., None, :]).imag
            ),
            0,
        )
        A = moved("A", np.tril(b * (K @ K.swapaxes(2, 3)) * Gamma, -1), n)
        T = moved("T", np.linalg.inv(np.eye(C) + A), n)
        U = moved("U", T @ (b * V), n)
        W = moved("W", T @ (b * np.exp(gc)[..., None] * K), n)
        V_new = moved("V_new", U - W @ S, n)
        o = x["scale"] * (np.exp(gc)[..., None] * Q @ S + (Q @ K.swapaxes(2, 3) * Gamma) @ V_new)
        loss = loss + (o * dO).sum()
        S = np.exp(gc[..., -1])[..., None, None] * S + (np.exp(gc[..., -1:] - gc)[..., None] * K).swapaxes(2, 3) @ V_new
    return loss + (S * x["dS_end"]).sum()


@with_intermediates
def test_gradients_of_the_intermediates_equal_the_complex_step(case):
    """Each named gradient at 4 elements of the middle chunk, where the last chunk contributes too."""
    x = in_dtype(make_inputs(case), np.float64)
    right, rng, n, C = expected(case), np.random.default_rng(7), 1, 64
    for gradient in BACKWARD:
        name = gradient[1:]
        want = right.values[gradient][:, n] if name == "S" else right.values[gradient][:, C : 2 * C].swapaxes(1, 2)
        scale = np.abs(want).max()
        for _ in range(4):
            place = [rng.integers(size) for size in want.shape]
            if name in "AT":  # T has a diagonal, A has none
                place[3] = rng.integers(place[2] + 1) if name == "T" else rng.integers(max(place[2], 1))
                place[2] = max(place[2], 1) if name == "A" else place[2]
            place = tuple(place)
            step = np.zeros(want.shape, np.complex128)
            step[place] = 1e-30j
            exact = chunked_loss(x, C, {name: step, "chunk": n}).imag / 1e-30
            assert abs(exact - want[place]) < 1e-11 * scale, (gradient, place)


@with_intermediates
def test_intermediates_satisfy_their_defining_equations(case):
    x, y = in_dtype(make_inputs(case), np.float64), expected(case).values
    k = expand(x["k"], x["v"])
    L = k.shape[1]
    for start in range(0, L, 64):
        t = slice(start, min(start + 64, L))
        C = t.stop - start
        gc, A, T, U, W, V_new = (y[name][0, t].swapaxes(0, 1) for name in ("gc", "A", "T", "U", "W", "V_new"))
        A, T = A[..., :C], T[..., :C]
        K, V, b = k[0, t].swapaxes(0, 1), x["v"][0, t].swapaxes(0, 1), x["beta"][0, t].T[..., None]
        S = y["S"][0, start // 64]
        i, j = np.tril_indices(C, -1)
        np.testing.assert_allclose(gc, np.cumsum(x["g"][0, t].T, -1), rtol=1e-14)
        np.testing.assert_allclose(
            A[:, i, j], (b * (K @ K.swapaxes(1, 2)))[:, i, j] * np.exp(gc[:, i] - gc[:, j]), rtol=1e-9, atol=1e-14
        )
        np.testing.assert_allclose((np.eye(C) + A) @ T, np.eye(C) + np.zeros_like(A), atol=1e-12)
        np.testing.assert_allclose((np.eye(C) + A) @ U, b * V, atol=1e-12)
        np.testing.assert_allclose((np.eye(C) + A) @ W, b * np.exp(gc)[..., None] * K, atol=1e-12)
        np.testing.assert_allclose(V_new, U - W @ S, atol=1e-12)
    assert set(FORWARD) < y.keys()


# ---- right values: in 50-digit arithmetic


@pytest.mark.parametrize("name", ["hand", "one-token-state", "plain", "initial-state", "square-state", "scale-one"])
def test_values_and_gradients_equal_50_digit_arithmetic(name):
    """The recurrence in 50 digits; gradients at 6 elements by central differences of step 1e-15, exact to 25 digits."""
    case = CASES[f"delta/{name}"]
    x, right = in_dtype(make_inputs(case), np.float64), expected(case)
    rng = np.random.default_rng(3)
    with mpmath.workdps(50):
        o, S_end, _ = exact_rule(x)
        for output, value in (("o", o), ("S_end", S_end)):
            assert relative_error(value.astype(np.float64), right.values[output], right.scales[output]).max() < 1e-15
        for gradient in OPERATORS[case.op].gradients:
            moved = gradient[1:]
            for flat in rng.permutation(x[moved].size)[:6]:
                losses = []
                for sign in (1, -1):
                    y = dict(x) | {moved: REAL(x[moved])}
                    y[moved].flat[flat] += sign * mpmath.mpf("1e-15")
                    losses.append(exact_rule(y)[2])
                slope = float((losses[0] - losses[1]) / mpmath.mpf("2e-15"))
                want = right.values[gradient]
                assert abs(slope - want.flat[flat]) <= 1e-13 * max(1, np.abs(want).max())


REAL = np.frompyfunc(mpmath.mpf, 1, 1)


def exact_rule(x):
    """o, S_end and the loss <o, do> + <S_end, dS_end> by the recurrence, in mpmath arithmetic."""
    q, k, v, g, beta, S0, do, dS_end = (REAL(x[name]) for name in ("q", "k", "v", "g", "beta", "S0", "do", "dS_end"))
    q, k, scale = expand(q, v), expand(k, v), mpmath.mpf(x["scale"])
    o, S_end = np.zeros(v.shape, object), S0.copy()
    for b in range(v.shape[0]):
        for h in range(v.shape[2]):
            S = S0[b, h]
            for t in range(v.shape[1]):
                S = S * mpmath.exp(g[b, t, h])
                S = S + np.outer(k[b, t, h], beta[b, t, h] * (v[b, t, h] - k[b, t, h] @ S))
                o[b, t, h] = scale * (q[b, t, h] @ S)
            S_end[b, h] = S
    return o, S_end, (o * do).sum() + (S_end * dS_end).sum()
