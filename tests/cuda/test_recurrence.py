"""The recurrence as a Numba kernel, in Numba's simulator, against the definition."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """if True:
    import sys
    import numpy as np
    from deltanet_ref.backends.cuda.recurrence import recurrence
    from deltanet_ref.ops import gated_delta_rule as gdr

    order, cu_seqlens = sys.argv[1], np.array([0, 4, 4, 5, 12])
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 12, 2, 3)) / 2
    v, g, beta = rng.standard_normal((12, 6, 5)), -rng.random((12, 6)), rng.random((12, 6))
    S, o = rng.standard_normal((4, 6, 3, 5)), np.full(v.shape, np.nan)
    arguments = (x[None] for x in (q, k, v))
    want, S_want, _ = gdr.recurrent_forward(
        *arguments, g=g[None], beta=beta[None], S0=S, scale=0.7, head_order=order, cu_seqlens=cu_seqlens)
    recurrence[(6, 4), 5](q, k, v, g, beta, S, 0.7, order == "tiled", cu_seqlens, o)
    print(np.abs(o - want[0]).max(), np.abs(S - S_want).max())
"""


@pytest.mark.parametrize("order", ["grouped", "tiled"])
def test_the_kernel_is_the_definition(order):
    """To the rounding of float64: the numbers are below 10, and each is the sum of at most 7 tokens' 3 terms."""
    simulator = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-c", PROGRAM, order]
    done = subprocess.run(command, cwd=ROOT, env=simulator, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(float(error) < 10 * 7 * 3 * 2.0**-53 for error in done.stdout.split())
