"""What rounding every activation to bfloat16 changes: the noise floors of a bfloat16 model, tensor by tensor."""

from types import SimpleNamespace

import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends.interface import OPERATORS

HALF_ULP = 2.0**-8  # of bfloat16, which has 8 significant bits

# results that are float32 in a bfloat16 model, by position (interface.py); None: all
WIDE = {
    "adamw_update": None,
    "causal_conv1d_backward": (1,),
    "cross_entropy_forward": (0,),
    "decay_gate_backward": (2, 3),
    "decay_gate_forward": (0, 1),
    "embedding_backward": None,
    "gated_delta_rule_backward": (3, 4, 5),
    "gated_delta_rule_forward": (1,),
    "gated_delta_rule_step": (1,),
    "gated_rms_norm_backward": (2,),
    "linear_backward_weight": None,
    "linear_cross_entropy_backward": (1,),
    "linear_cross_entropy_forward": (0,),
    "rms_norm_backward": (1,),
    "rope_tables": None,
    "to_host": None,
}


def rounding_ops(seed):
    """ops, where every activation that an operator returns moves by up to half a unit of bfloat16, at random."""
    rng = np.random.default_rng(seed)

    def moved(x, narrow):
        if narrow and isinstance(x, np.ndarray) and x.dtype.kind == "f":
            return x * (1 + HALF_ULP * rng.uniform(-1, 1, x.shape))
        return x

    def rounded(name):
        operator, wide = getattr(ops, name), WIDE.get(name, ())

        def call(*args, **options):
            results = operator(*args, **options)
            if name == "lora_forward":  # h in the cache, and the results that it adds to
                for i, y in enumerate(args[0] or ()):
                    if isinstance(y, np.ndarray):
                        y[...] = moved(y, any(u.map == i for u in args[2]))
                return results._replace(h=[moved(h, True) for h in results.h])
            if name == "lora_backward":
                return moved(results[0], True), results[1]
            if isinstance(results, tuple) and not hasattr(results, "_fields"):
                return tuple(moved(x, wide is not None and i not in wide) for i, x in enumerate(results))
            return moved(results, wide is not None and 0 not in wide)

        return call

    return SimpleNamespace(
        **{name: rounded(name) for name in OPERATORS if name != "to_host"},
        **{name: getattr(ops, name) for name in ("to_host", "name", "xp", "dtypes")},
        device=None,
        set_threads=None,
        stored=None,
        delta_layer_step=None,
        memory_of=None,
        run_step=None,
    )


def bfloat16_floors(compute, draws=4):
    """The noise floor of each result of compute(backend), a list of arrays: the largest norm of its change."""
    exact = compute(ops)
    moved = np.zeros(len(exact))
    for seed in range(draws):
        moved = np.maximum(
            moved, [np.linalg.norm(np.subtract(m, e)) for m, e in zip(compute(rounding_ops(seed)), exact, strict=True)]
        )
    return moved
