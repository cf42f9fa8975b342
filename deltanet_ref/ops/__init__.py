"""The operators of the model, each forward with its backward, in NumPy. This module is the reference backend
(backends/interface.py lists what a backend must have)."""
import numpy as np

from deltanet_ref.ops.adamw import adamw_update
from deltanet_ref.ops.causal_conv1d import causal_conv1d_backward, causal_conv1d_forward
from deltanet_ref.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from deltanet_ref.ops.decay_gate import decay_gate_backward, decay_gate_forward
from deltanet_ref.ops.elementwise import sigmoid, silu, silu_derivative, softplus
from deltanet_ref.ops.embedding import embedding_backward, embedding_forward
from deltanet_ref.ops.gated_delta_rule import (
    chunk_backward as gated_delta_rule_backward,
    chunk_forward as gated_delta_rule_forward,
    recurrent_step as gated_delta_rule_step,
)
from deltanet_ref.ops.l2_norm import l2_norm_backward, l2_norm_forward
from deltanet_ref.ops.linear import linear_backward_input, linear_backward_weight, linear_forward
from deltanet_ref.ops.linear_cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from deltanet_ref.ops.lora_linear import lora_backward, lora_forward
from deltanet_ref.ops.rms_norm import (
    gated_rms_norm_backward,
    gated_rms_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from deltanet_ref.ops.rope import rope_backward, rope_forward, rope_tables
from deltanet_ref.ops.softmax_attention import (
    sigmoid_gate_backward,
    sigmoid_gate_forward,
    softmax_attention_backward,
    softmax_attention_forward,
)
from deltanet_ref.ops.swiglu import swiglu_backward, swiglu_forward

name, xp = "numpy", np
dtypes = {name: np.dtype(name) for name in ("float32", "float64")}
# optional capabilities that it lacks
device = set_threads = stored = delta_layer_step = memory_of = held_memory = run_step = clipped_adamw_update = None


def to_host(x):
    """The array itself: NumPy's arrays are on the host."""
    return np.asarray(x)
