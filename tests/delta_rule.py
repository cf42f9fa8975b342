"""Random arguments of the gated delta rule for the tests: sizes pairwise different, every head and row its own."""
import numpy as np

from deltanet_ref.ops.l2_norm import l2_norm_forward

SIZES = dict(B=2, L=11, H_k=2, H_v=6, d_k=5, d_v=3)


def delta_rule_arguments(seed, *, B, L, H_k, H_v, d_k, d_v, N_seq=None, decay=1.0):
    """q, k, v and a dict of g, beta, S0 in float64; then do and dS_end. q, k have unit rows, g is in [-decay, 0]."""
    rng = np.random.default_rng(seed)
    q, k = (l2_norm_forward(rng.standard_normal((B, L, H_k, d_k)))[0] for _ in range(2))
    v = rng.standard_normal((B, L, H_v, d_v))
    state = (N_seq or B, H_v, d_k, d_v)
    gates = dict(g=-decay * rng.random((B, L, H_v)), beta=rng.random((B, L, H_v)), S0=rng.standard_normal(state))
    return q, k, v, gates, rng.standard_normal(v.shape), rng.standard_normal(state)


def relative(a, b):
    """Norm of the difference over the norm of b; infinite when a has a number that is not finite."""
    assert np.shape(a) == np.shape(b), f"{np.shape(a)} is not {np.shape(b)}"
    if not np.isfinite(a).all():
        return np.inf
    return float(np.linalg.norm(np.subtract(a, b)) / max(np.linalg.norm(b), 1e-300))
