"""The known mistakes of Gated DeltaNet implementations, numbered. Facts from public issue threads, in our own words.

mutants/ holds those that an operator can have as code; suspects.py compares a failure with them.
"""
from typing import NamedTuple


class Mistake(NamedTuple):
    title: str
    sentence: str             # what goes wrong, and the cheapest way to see it
    where: str                # repository#number


CATALOGUE = {
    1: Mistake("state leaks across packed sequences",
        "The recurrent or convolution state of one packed sequence reaches the next: packed must equal separate "
        "runs.", "ms-swift#9565, NeMo Automodel#2147, slime#1686, fla#838 #1088 #1184"),
    2: Mistake("value heads read the wrong key head",
        "The map h // (H_v / H_k) and the map h % H_k are confused; they agree only when H_k = H_v.",
        "shainet#204, sglang#36722, aprender#3527, TensorRT-LLM#11810"),
    3: Mistake("state transposed", "S is stored or loaded as (d_v, d_k); nothing complains when the two are equal.",
        "sgl-kernel-npu#640, sparkinfer#610, fla#776"),
    4: Mistake("initial state ignored, reset or mis-indexed",
        "S0 does not enter, or enters the wrong sequence: run(0..L) must equal run(0..s), then run(s..L).",
        "sparkinfer#1071, vllm#55766, llama.cpp#20700 #21681"),
    5: Mistake("exp overflows",
        "exp(gc_i) * exp(-gc_j), or exp of a difference above the diagonal, in place of exp(gc_i - gc_j) on the "
        "triangle.", "executorch#21417, tt-metal#56550, fla#99 #104 #389 #463 #652"),
    6: Mistake("gradient of the gate wrong under strong decay",
        "dg comes from a difference of large sums, or is divided by a decay that has vanished.",
        "FlashQLA#28, TileOPs#366, fla-npu#448"),
    7: Mistake("scale of q missing or applied twice",
        "o is off by d_k ** 0.5 one way or the other; the state is right.", "mlx-lm#1799 #1823, shainet#176"),
    8: Mistake("eps of the L2 norm in the wrong place",
        "Inside or outside the root, on the mean or the sum, or normalised twice; backward divides by zero at a "
        "zero row.", "mlx-lm#1624, fla#508, maxtext#5295"),
    9: Mistake("A_log exponentiated again, or rounded",
        "ssm_a holds -exp(A_log) already; A_log in bfloat16 moves every decay.", "shainet#204, sglang#20741"),
    10: Mistake("the matrix A without its decays, or wrongly masked",
        "The Gram matrix needs Gamma, strictly below the diagonal; the scores need Gamma on it, not a 0/1 mask.",
        "shainet#170, NVlabs/GatedDeltaNet#14 #15, fla#792 #794 #623, llama.cpp#19305"),
    11: Mistake("a path of the backward is missing",
        "dS through the erased part (I - W^T K), dW across chunks, or dA through the inverse.", "TileOPs#632 #633"),
    12: Mistake("absent gate left uninitialised", "g = None must be g = 0.", "fla#862 #863"),
    13: Mistake("tail of the last chunk", "The last gate is read from the padding, or the tail is not written.",
        "sparkinfer#604, fla-npu#367, FlashQLA#28"),
    14: Mistake("gradients of the states lost", "dS_end is ignored, or dS0 is not returned.",
        "fla-npu#312, fla#1140 #1141 #1146"),
    15: Mistake("batch rows after the first", "Gradients, strides or states of row 0 are used for every row.",
        "unsloth-zoo#776, mlx#3483"),
    16: Mistake("convolution backward with several sequences or strides", "dw and dstate mix sequences.",
        "fla#955 #871 #844"),
    17: Mistake("padding changes the state", "Padding tokens write or decay; beta and g must be 0 there.",
        "zml#754, maxtext#5295, transformers#46873"),
    18: Mistake("state kept in half precision", "bfloat16 or float16 between tokens or chunks; the error adds up.",
        "ollama#15865, TensorRT-Model-Connect#725"),
    19: Mistake("TF32 in a float32 path", "Matrix products round their operands to 11 bits.",
        "TileOPs#460, vllm.cpp#3223, fla#1205"),
    20: Mistake("triangular inverse by squaring",
        "Powers of A overflow their precision where keys repeat within a chunk.", "fla#537"),
    21: Mistake("norm offset, order or dtype", "w for 1 + w, the gate before the norm, rounding before the weight.",
        "mlx-lm#1623, lmdeploy#4790, vllm#35423, fla#155"),
    22: Mistake("parts of the layer mixed up",
        "SiLU after the convolution missing, q and gate not interleaved, b and a swapped.", "llmman#16, Arcaine#11"),
    23: Mistake("V heads of an exported adapter not permuted",
        "The factors must be reordered as the dense weight is.", "llama.cpp#21125 #24627 #28324 #27019"),
    24: Mistake("adapter applied to nothing", "A key prefix does not match, and no tensor is adapted.",
        "vllm#34186 #39369, sglang#30499, TuFT#149, SkyRL#2093"),
    25: Mistake("the compiler or backend breaks the kernel",
        "The same source is right on one device and wrong on another.", "fla#640 #983, llama.cpp#29183"),
    26: Mistake("index overflow or grid limit", "Large shapes wrap around.", "fla#783 #803 #1077"),
    27: Mistake("beta at 0, 1 or 2", "Edge values of beta take a wrong path.", ""),
    28: Mistake("steps of the rule in the wrong order",
        "The error is measured before the decay, or o is read before the write.", "fla#885"),
    29: Mistake("decay across chunks", "The decay is not carried to the next chunk, or its sum is not reset.",
        "flashinfer#2768, helion#1067"),
    30: Mistake("attention layers", "Partial rotary, sections, or the number of MTP layers.",
        "mobius#522, candle#3461"),
    31: Mistake("the path under test never ran", "A fallback answered in its place.", "fla#1131, unsloth-zoo#754"),
    32: Mistake("gradients in the wrong slots", "The right numbers are returned under other names.",
        "FlashQLA#10, fla#1140"),
    33: Mistake("g and beta swapped", "Both are (B, L, H), so nothing complains.",
        "FLA's two naive functions differ in order"),
    34: Mistake("beta or g rounded before use", "The gates go through bfloat16 where float32 is claimed.", "fla#693"),
    35: Mistake("cross-entropy backward with ignored labels", "Ignored rows get a gradient, or the mean counts them.",
        "qvac-fabric b10069"),
    36: Mistake("empty or wrong loss mask", "Nothing, or the prompt, is trained.", "NeMo#3738, marin#7237"),
}
