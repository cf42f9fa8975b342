"""Random arguments of the gated delta rule for the tests: sizes pairwise different, every head and row its own."""

import numpy as np

from deltanet_ref.ops.gated_delta_rule import recurrent_backward, recurrent_forward
from deltanet_ref.ops.l2_norm import l2_norm_forward
from tests.tolerances import half_ulp, noise_floors, rounding

SIZES = dict(B=2, L=11, H_k=2, H_v=6, d_k=5, d_v=3)


def delta_rule_arguments(seed, *, B, L, H_k, H_v, d_k, d_v, N_seq=None, decay=1.0):
    """q, k, v and a dict of g, beta, S0 in float64; then do and dS_end. q, k have unit rows, g is in [-decay, 0]."""
    rng = np.random.default_rng(seed)
    q, k = (l2_norm_forward(rng.standard_normal((B, L, H_k, d_k)))[0] for _ in range(2))
    v = rng.standard_normal((B, L, H_v, d_v))
    state = (N_seq or B, H_v, d_k, d_v)
    gates = dict(g=-decay * rng.random((B, L, H_v)), beta=rng.random((B, L, H_v)), S0=rng.standard_normal(state))
    return q, k, v, gates, rng.standard_normal(v.shape), rng.standard_normal(state)


RESULTS = ("o", "S_end", "dq", "dk", "dv", "dg", "dbeta", "dS0")


def definition(q, k, v, gates, do, dS_end, **options):
    """RESULTS of the recurrence in float64, whatever the dtype of the arguments."""
    q, k, v, do, dS_end = (x.astype(np.float64) for x in (q, k, v, do, dS_end))
    o, S_end, cache = recurrent_forward(q, k, v, **{n: x.astype(np.float64) for n, x in gates.items()}, **options)
    return dict(zip(RESULTS, (o, S_end, *recurrent_backward(do, dS_end, cache))))


def rule_floors(q, k, v, gates, do, dS_end, dtype, *, chunk_size=0, draws=2, **options):
    """Noise floors of RESULTS (tests/tolerances.py); with chunk_size those of the chunked form.

    Added are two roundings that no perturbation of the arguments shows. Where beta is about 1 the state is replaced by
    v, and what it was cancels, as does its gradient in the backward: both are rounded at the size that they had. And a
    chunk's decay ratios are exp(gc_i - gc_j), differences of sums of up to chunk_size log decays: relative to the ratio
    they are off by eps times the largest of those sums, which the recurrence never forms.
    """

    def results(x):
        return list(definition(*x[:3], dict(zip(gates, x[3:6])), *x[6:], **options).values())

    arguments = [q, k, v, *gates.values(), do, dS_end]
    state, dstate = (np.linalg.norm(a) + np.linalg.norm(b) for a, b in ((gates["S0"], v), (dS_end, do)))
    both = state * dstate / max(gates["g"].size, 1) ** 0.5  # a product of the two for each token and head
    replaced = np.array([state, state, both, both, dstate, both, both, dstate])
    floors = noise_floors(results, arguments, dtype, draws) + half_ulp(dtype) * replaced
    sums = np.cumsum(np.pad(gates["g"], ((0, 0), (chunk_size, 0), (0, 0))), 1, np.float64)
    largest = np.abs(sums[:, chunk_size:] - sums[:, : sums.shape[1] - chunk_size]).max(initial=0) if chunk_size else 0
    return floors + rounding(largest, dtype) * np.array([np.linalg.norm(x) for x in results(arguments)])


def worst_element(measure, q, k, v, gates, do, dS_end, dtype, draws=4):
    """How far the worst element of measure(RESULTS) moves when the arguments move as for noise_floors."""
    rng, exact = np.random.default_rng(0), measure(definition(q, k, v, gates, do, dS_end))
    largest = 0.0
    for _ in range(draws):
        x = [a * (1 + half_ulp(dtype) * rng.uniform(-1, 1, a.shape)) for a in (q, k, v, *gates.values(), do, dS_end)]
        moved = measure(definition(*x[:3], dict(zip(gates, x[3:6])), *x[6:]))
        largest = max(largest, np.abs(moved - exact).max())
    return largest
