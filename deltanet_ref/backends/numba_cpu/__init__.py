"""The operators on the CPU, in kernels on several threads, under the names of deltanet_ref.ops.

For float32 and float64 inputs each kernel matches the op of the same name up to rounding; other dtypes raise
InputError. The bits of a result are the same in every run and for any number of threads, except attention's dk and dv,
which are sums over more parts when there are more threads than sequences and key heads.

Importing this package changes the process: freed memory stays with it (malloc.py), and SciPy's BLAS runs on one thread
(blas.py).

    compiler, threads, arrays, elementary, blas, vectors, malloc      parts that kernels share
    all others                                                        kernels, named as in ops
"""
from types import SimpleNamespace

from deltanet_ref.backends.numba_cpu.adamw import adamw_update
from deltanet_ref.backends.numba_cpu.causal_conv1d import causal_conv1d_backward, causal_conv1d_forward
from deltanet_ref.backends.numba_cpu.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
)
from deltanet_ref.backends.numba_cpu.delta_layer import delta_layer_step
from deltanet_ref.backends.numba_cpu.delta_rule import (
    gated_delta_rule_backward,
    gated_delta_rule_forward,
    gated_delta_rule_step,
)
from deltanet_ref.backends.numba_cpu.gates import (
    decay_gate_backward,
    decay_gate_forward,
    sigmoid_gate_backward,
    sigmoid_gate_forward,
    swiglu_backward,
    swiglu_forward,
)
from deltanet_ref.backends.numba_cpu.linear import linear_backward_input, linear_backward_weight, linear_forward
from deltanet_ref.backends.numba_cpu.lora_linear import lora_backward, lora_forward
from deltanet_ref.backends.numba_cpu.malloc import keep_freed_memory
from deltanet_ref.backends.numba_cpu.norms import (
    gated_rms_norm_backward,
    gated_rms_norm_forward,
    l2_norm_backward,
    l2_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from deltanet_ref.backends.numba_cpu.quants import (
    FEW,
    decodes,
    dequantize,
    stored_embedding_forward,
    stored_linear_backward_input,
    stored_linear_forward,
)
from deltanet_ref.backends.numba_cpu.rope import rope_backward, rope_forward
from deltanet_ref.backends.numba_cpu.softmax_attention import softmax_attention_backward, softmax_attention_forward
from deltanet_ref.backends.numba_cpu.threads import set_threads
from deltanet_ref.ops import dtypes, embedding_backward, embedding_forward, rope_tables, to_host, xp

keep_freed_memory()
name, device, memory_of, held_memory, run_step, clipped_adamw_update = "numba", None, None, None, None, None
stored = SimpleNamespace(few_rows=FEW, decodes=decodes, resident=lambda tensor: tensor, dequantize=dequantize,
                         embedding_forward=stored_embedding_forward, linear_forward=stored_linear_forward,
                         linear_backward_input=stored_linear_backward_input)
