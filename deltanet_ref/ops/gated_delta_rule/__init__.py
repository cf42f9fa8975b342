"""The gated delta rule: recurrent.py defines it; wy.py and chunk.py compute the same by matrix products."""
from deltanet_ref.ops.gated_delta_rule.chunk import chunk_backward, chunk_forward
from deltanet_ref.ops.gated_delta_rule.recurrent import recurrent_backward, recurrent_forward, recurrent_step

__all__ = ["recurrent_forward", "recurrent_backward", "recurrent_step", "chunk_forward", "chunk_backward"]
