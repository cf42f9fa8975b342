"""How accurate an output can be: the scale of each of its rows, and its noise floor.

An output x is compared with the float64 value e as

    error = max |x - e| / (scale * floor)          it passes when error <= FACTOR[precision]

scale   one number per row (per token and head; per tensor if it has neither): the size of the terms that were summed.
        Their rounding is unavoidable, so a row that is small by cancellation is not judged relative to its own size.
floor   one number per output and precision: the largest |x - e| / scale of the definition and of the chunked form when
        they run in that precision.
"""

import numpy as np

from deltanet_ref import ops
from deltanet_ref.notation import value_to_key_head
from deltanet_ref.oracle.cases import CHUNK, Case, Draw, bfloat16
from deltanet_ref.oracle.chunk_by_chunk import chunk_by_chunk
from deltanet_ref.oracle.operators import OPERATORS, in_dtype

FACTOR = {"float32": 16, "bfloat16": 8, "float64": 16}  # kernels differ in summation order, chunks, fused products
FLOAT64_PER_FLOAT32 = 2.0**-29  # ratio of the unit roundoffs, and so of the floors
PRECISIONS = {"float32": 2.0**-24, "bfloat16": 2.0**-9}  # unit roundoffs, the lower bounds of floors
SMALLEST_TERM = 2.0**-20  # lower bound of a scale computed from terms, relative to the largest of the tensor
SMALLEST_ROW = 2.0**-7  # the same where the scale is just the largest entry of the row
UNDERFLOW = 1e-30  # lower bound of all scales: float32 underflows below it


def scales(case: Case, x: dict, y: dict) -> dict[str, np.ndarray]:
    """The scale of each row of each output, gradient and intermediate: name -> float64 array over its leading axes.

    x, y  inputs and outputs in float64
    """
    axes = OPERATORS[case.op].outputs | OPERATORS[case.op].gradients
    terms = {}
    if case.op == "gated_delta_rule":
        terms = delta_rule_scales(x, y)
    elif case.op == "gated_delta_rule_step":
        by_token = [name for name in (*"qkvg", "beta", *axes) if "S" not in name] + ["do"]
        row = {name: (x | y)[name][:, None] for name in by_token}
        terms = delta_rule_scales(x | row, y | row)
        terms = {name: s if "S" in name else s[:, 0] for name, s in terms.items()}
    out = {}
    for name, value in y.items():
        if name in terms:
            s, smallest = terms[name], SMALLEST_TERM
        else:
            letters = axes.get(name, "sthf" if value.ndim < 5 else "schff")
            s = np.abs(value).max(
                axis=tuple(axis for axis, letter in enumerate(letters[: value.ndim]) if letter == "f")
            )
            smallest = SMALLEST_ROW
        out[name] = np.maximum(s, max(smallest * np.max(s, initial=0.0), UNDERFLOW))
    return out


def delta_rule_scales(x: dict, y: dict) -> dict[str, np.ndarray]:
    """Size of the terms of each output of the rule, from the largest entries so far, M of the state and N of dS.

    |x| is the length of a row. Per token and value head:
        o      scale |q| M                       dq  scale |do| M
        dv     |k| N                             dbeta  sqrt(d_v) |k| N (max |v| + |k| M)
        dk     beta (|v| + sqrt(d_v) |k| M) N + |dv| M
        dg     |dg| + sum_i |q_i dq_i| + sum_i |k_i dk_i|, since dg is small by cancellation under strong decay
        dgc    the scale of dg here and at the next token
        S_end  M at the end                      dS0  N at the start
    M and N shrink with the decay and grow with each write; those of dq and dk are summed over the value heads of a key
    head.
    """
    B, L, H_v, d_v = x["v"].shape
    H_k = x["k"].shape[2]
    heads = value_to_key_head(H_k, H_v, x.get("head_order", "grouped"))
    cu = x.get("cu_seqlens", np.arange(B + 1) * L)
    q, k, v, do = (a.reshape(B * L, *a.shape[2:]) for a in (x["q"][:, :, heads], x["k"][:, :, heads], x["v"], x["do"]))
    g, beta = (a.reshape(B * L, H_v) for a in (x["g"], x["beta"]))
    M, N = np.zeros((B * L, H_v)), np.zeros((B * L, H_v))
    M_end, N_start = np.zeros((len(cu) - 1, H_v)), np.zeros((len(cu) - 1, H_v))

    def largest(S):
        return np.abs(S).max((-2, -1))

    for n, (start, stop) in enumerate(zip(cu, cu[1:])):
        S, m = x["S0"][n], largest(x["S0"][n])
        for t in range(start, stop):
            S = np.exp(g[t])[:, None, None] * S
            u = beta[t][:, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], S))
            S = S + k[t][:, :, None] * u[:, None, :]
            M[t] = m = np.maximum(np.exp(g[t]) * m, largest(S))
        M_end[n] = m
        dS, m = x["dS_end"][n], largest(x["dS_end"][n])
        for t in reversed(range(start, stop)):
            dS = dS + x["scale"] * q[t][:, :, None] * do[t][:, None, :]
            N[t] = m = np.maximum(m, largest(dS))
            dv = beta[t][:, None] * np.einsum("hk,hkv->hv", k[t], dS)
            decay = np.exp(g[t])
            dS, m = decay[:, None, None] * (dS - k[t][:, :, None] * dv[:, None, :]), decay * m
        N_start[n] = np.maximum(m, largest(dS))

    def length(a):
        return np.sqrt((a * a).sum(-1))

    def of_key_heads(a):
        return np.stack([a[:, heads == h].sum(1) for h in range(H_k)], 1)

    def shaped(a):
        return a.reshape(B, L, -1)

    K, dv, root = length(k), y["dv"].reshape(v.shape), np.sqrt(d_v)
    dq_terms, dk_terms = (np.abs(x[name] * y[f"d{name}"]).sum(-1)[:, :, heads] for name in ("q", "k"))
    dg = np.abs(y["dg"]) + dq_terms + dk_terms
    return {
        "o": shaped(x["scale"] * length(q) * M),
        "S_end": M_end,
        "dq": shaped(of_key_heads(x["scale"] * length(do) * M)),
        "dk": shaped(of_key_heads(beta * (length(v) + root * K * M) * N + length(dv) * M)),
        "dv": shaped(K * N),
        "dbeta": shaped(root * K * N * (np.abs(v).max(-1) + K * M)),
        "dg": dg,
        "dgc": dg + np.roll(dg, -1, 1),
        "dS0": N_start,
    }


def relative_error(got: np.ndarray, want: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """|got - want| / scale, elementwise; scale has the leading axes of want. 0 where equal, even at scale 0."""
    difference = np.abs(np.asarray(got, np.float64) - want)
    scale = scale.reshape(scale.shape + (1,) * (want.ndim - scale.ndim))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / scale)


def floors(case: Case, x: dict, y: dict, scale: dict) -> dict[str, dict[str, float]]:
    """The noise floor of each output: name -> {"float32": floor}, plus "bfloat16" if the case is for bfloat16.

    x, y  inputs and outputs in float64; scale  scales(case, x, y)
    """
    out = {}
    for precision, smallest in PRECISIONS.items():
        if precision == "bfloat16" and not case.bf16:
            continue
        for attempt in ATTEMPTS[precision](case, x):
            for name, want in y.items():
                if name in attempt:
                    error = float(np.max(relative_error(attempt[name], want, scale[name]), initial=0.0))
                    out.setdefault(name, {}).setdefault(precision, smallest)
                    out[name][precision] = max(out[name][precision], error)
    return out


def _float32_attempts(case, x):
    """The definition in float32. For the delta rule also the chunked form with several chunk lengths, since the chunk
    boundaries decide how large sums of strong log decays grow. For the other operators, inputs perturbed by rounding.
    """
    yield OPERATORS[case.op].reference(in_dtype(x, np.float32))
    if case.op == "gated_delta_rule":
        yield chunk_by_chunk(in_dtype(x, np.float32), chunk=CHUNK)
        outputs = OPERATORS[case.op].outputs | OPERATORS[case.op].gradients
        for chunk in (16, 48, 128):
            y = chunk_by_chunk(in_dtype(x, np.float32), chunk=chunk)
            yield {name: y[name] for name in outputs}
    else:
        yield from _with_perturbed_inputs(case, x, PRECISIONS["float32"])
    if case.op == "gated_attention":
        yield _fused_attention(in_dtype(x, np.float32))


def _bfloat16_attempts(case, x):
    """The chunked form with both operands of every product rounded; for the other operators, inputs perturbed by
    rounding. Outputs are rounded to bfloat16, except states, dg and the loss."""
    if case.op == "gated_delta_rule":
        attempts = [chunk_by_chunk(in_dtype(x, np.float32), chunk=CHUNK, operand=bfloat16)]
    else:
        attempts = _with_perturbed_inputs(case, x, PRECISIONS["bfloat16"])
    for attempt in attempts:
        yield {
            name: value if name in ("S_end", "dS0", "dg", "loss") else bfloat16(value)
            for name, value in attempt.items()
        }


def _with_perturbed_inputs(case, x, roundoff):
    """The definition in float64, three times, with each input perturbed by up to the roundoff of its precision, as by a
    kernel that is exact for nearly these inputs. Log decays and states stay float32 next to bfloat16 inputs.
    """
    for n in (1, 2, 3):
        draw = Draw(case.seed + n)
        yield OPERATORS[case.op].reference(
            {
                name: a * (1 + draw.uniform(a.shape, -roundoff, roundoff))
                if isinstance(a, np.ndarray) and a.dtype.kind == "f" and name not in ("g", "S0", "dS_end")
                else a
                for name, a in x.items()
            }
        )


def _fused_attention(x):
    """Gradients as fused kernels compute them: the log-sum-exp of a row is kept as one number, which costs P digits."""
    o, cache = ops.softmax_attention_forward(x["q"], x["k"], x["v"], scale=x["scale"])
    cache = cache._replace(peak=cache.peak + np.log(cache.total), total=np.ones_like(cache.total))
    do, _ = ops.sigmoid_gate_backward(x["dy"], ops.sigmoid_gate_forward(o, x["gate"])[1])
    return dict(zip(("dq", "dk", "dv"), ops.softmax_attention_backward(do, cache)))


ATTEMPTS = {"float32": _float32_attempts, "bfloat16": _bfloat16_attempts}
