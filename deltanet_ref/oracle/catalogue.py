"""The known mistakes of Gated DeltaNet implementations, numbered. Facts from public issue threads, in our own words.

mutants/ has those that an operator can have as code; suspects.py compares a failure with them.
"""

from typing import NamedTuple


class KnownMistake(NamedTuple):
    """A mistake that several implementations had."""

    title: str
    sentence: str  # what goes wrong, or the cheapest check that detects it
    where: str  # repository#number


CATALOGUE = {
    1: KnownMistake(
        "state leaks across packed sequences",
        "The recurrent or convolution state of one packed sequence leaks into the next; packed results must equal "
        "those of separate runs.",
        "ms-swift#9565, NeMo Automodel#2147, slime#1686, fla#838 #1088 #1184",
    ),
    2: KnownMistake(
        "value heads read the wrong key head",
        "The maps h // (H_v / H_k) and h % H_k are confused; they agree only if H_k is 1 or H_v.",
        "shainet#204, sglang#36722, aprender#3527, TensorRT-LLM#11810",
    ),
    3: KnownMistake(
        "state transposed",
        "S is stored or loaded as (d_v, d_k); no shape check fails if the two sizes are equal.",
        "sgl-kernel-npu#640, sparkinfer#610, fla#776",
    ),
    4: KnownMistake(
        "initial state ignored, reset or mis-indexed",
        "S0 is not used, or used for the wrong sequence; run(0..L) must equal run(0..s) followed by run(s..L).",
        "sparkinfer#1071, vllm#55766, llama.cpp#20700 #21681",
    ),
    5: KnownMistake(
        "exp overflows",
        "exp(gc_i) * exp(-gc_j), or exp of a difference above the diagonal, instead of exp(gc_i - gc_j) on "
        "the triangle.",
        "executorch#21417, tt-metal#56550, fla#99 #104 #389 #463 #652",
    ),
    6: KnownMistake(
        "gradient of the gate wrong under strong decay",
        "dg is a difference of large sums, or is divided by a decay that has underflowed.",
        "FlashQLA#28, TileOPs#366, fla-npu#448",
    ),
    7: KnownMistake(
        "scale of q missing or applied twice",
        "o is too large or too small by d_k ** 0.5; the state is right.",
        "mlx-lm#1799 #1823, shainet#176",
    ),
    8: KnownMistake(
        "eps of the L2 norm in the wrong place",
        "eps inside or outside the root, on the mean or the sum; rows normalised twice; the backward divides by zero "
        "at a zero row.",
        "mlx-lm#1624, fla#508, maxtext#5295",
    ),
    9: KnownMistake(
        "A_log exponentiated again, or rounded",
        "ssm_a already holds -exp(A_log); A_log in bfloat16 changes every decay.",
        "shainet#204, sglang#20741",
    ),
    10: KnownMistake(
        "the matrix A without its decays, or wrongly masked",
        "A needs Gamma, strictly below the diagonal; the scores need Gamma including the diagonal, not a 0/1 mask.",
        "shainet#170, NVlabs/GatedDeltaNet#14 #15, fla#792 #794 #623, llama.cpp#19305",
    ),
    11: KnownMistake(
        "a term of the backward is missing",
        "dS through what is erased (I - W^T K), dW across chunks, or dA through the inverse.",
        "TileOPs#632 #633",
    ),
    12: KnownMistake("absent gate left uninitialised", "g = None must be g = 0.", "fla#862 #863"),
    13: KnownMistake(
        "tail of the last chunk",
        "The last gate is read from the padding, or the tail is not written.",
        "sparkinfer#604, fla-npu#367, FlashQLA#28",
    ),
    14: KnownMistake(
        "gradients of the states lost",
        "dS_end is ignored, or dS0 is not returned.",
        "fla-npu#312, fla#1140 #1141 #1146",
    ),
    15: KnownMistake(
        "batch rows after the first",
        "Gradients, strides or states of row 0 are used for every row.",
        "unsloth-zoo#776, mlx#3483",
    ),
    16: KnownMistake(
        "convolution backward with several sequences or strides", "dw and dstate mix sequences.", "fla#955 #871 #844"
    ),
    17: KnownMistake(
        "padding changes the state",
        "Padding tokens write or decay; beta and g must be 0 there.",
        "zml#754, maxtext#5295, transformers#46873",
    ),
    18: KnownMistake(
        "state kept in half precision",
        "The state is bfloat16 or float16 between tokens or chunks; its error accumulates.",
        "ollama#15865, TensorRT-Model-Connect#725",
    ),
    19: KnownMistake(
        "TF32 in a float32 path",
        "Matrix products round their operands to 11 significant bits.",
        "TileOPs#460, vllm.cpp#3223, fla#1205",
    ),
    20: KnownMistake(
        "triangular inverse by squaring",
        "Powers of A grow beyond what the precision resolves where keys repeat within a chunk.",
        "fla#537",
    ),
    21: KnownMistake(
        "norm offset, order or dtype",
        "w instead of 1 + w, the gate before the norm, or rounding before the weight.",
        "mlx-lm#1623, lmdeploy#4790, vllm#35423, fla#155",
    ),
    22: KnownMistake(
        "parts of the layer mixed up",
        "No SiLU after the convolution, q and gate not interleaved, or b and a swapped.",
        "llmman#16, Arcaine#11",
    ),
    23: KnownMistake(
        "V heads of an exported adapter not permuted",
        "The LoRA factors must be reordered like the dense weight.",
        "llama.cpp#21125 #24627 #28324 #27019",
    ),
    24: KnownMistake(
        "adapter applied to nothing",
        "A key prefix does not match, so no tensor is adapted.",
        "vllm#34186 #39369, sglang#30499, TuFT#149, SkyRL#2093",
    ),
    25: KnownMistake(
        "the compiler or backend breaks the kernel",
        "The same source gives right results on one device and wrong ones on another.",
        "fla#640 #983, llama.cpp#29183",
    ),
    26: KnownMistake("index overflow or grid limit", "Indices of large shapes wrap around.", "fla#783 #803 #1077"),
    27: KnownMistake("beta at 0, 1 or 2", "An edge value of beta takes a wrong code path.", ""),
    28: KnownMistake(
        "steps of the rule in the wrong order",
        "The error is measured before the decay, or o is read before the write.",
        "fla#885",
    ),
    29: KnownMistake(
        "decay across chunks",
        "The decay is not carried to the next chunk, or its cumulative sum is not reset.",
        "flashinfer#2768, helion#1067",
    ),
    30: KnownMistake(
        "attention layers", "Partial rotary, rotary sections, or the number of MTP layers.", "mobius#522, candle#3461"
    ),
    31: KnownMistake("the path under test never ran", "A fallback ran in its place.", "fla#1131, unsloth-zoo#754"),
    32: KnownMistake(
        "gradients in the wrong slots", "The right gradients are returned in the wrong order.", "FlashQLA#10, fla#1140"
    ),
    33: KnownMistake(
        "g and beta swapped",
        "Both are (B, L, H), so no shape check fails.",
        "FLA's two naive functions differ in order",
    ),
    34: KnownMistake(
        "beta or g rounded before use", "The gates pass through bfloat16 where float32 is claimed.", "fla#693"
    ),
    35: KnownMistake(
        "cross-entropy backward with ignored labels",
        "Ignored rows get a gradient, or count in the mean.",
        "qvac-fabric b10069",
    ),
    36: KnownMistake("empty or wrong loss mask", "No token is trained, or the prompt is.", "NeMo#3738, marin#7237"),
}
