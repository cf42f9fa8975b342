"""THE table of flags: for each property of a case the mistake that it catches, its effect, where it happened."""

from typing import NamedTuple


class Flag(NamedTuple):
    """A property of cases."""

    catches: str  # the mistake
    effect: str  # what users see
    where: str  # repository#number, as in catalogue.py
    bugs: tuple  # numbers in catalogue.py


FLAGS = {
    "plain": Flag("anything wrong in the rule itself", "every output is off", "anywhere", (7, 10, 28)),
    "hand-computable": Flag(
        "the rule itself, in numbers small enough for pencil and paper (worked out in README.md)",
        "every output is off",
        "anywhere",
        (7, 28, 33),
    ),
    "single-token": Flag(
        "error measured before the decay, output read before the write, one-token special paths",
        "decoding drifts from prefill",
        "fla#885",
        (28, 4),
    ),
    "non-square": Flag(
        "state stored (d_v, d_k) in one place and (d_k, d_v) in another; strides of the wrong axis",
        "wrong state, silently when d_k = d_v",
        "sgl-kernel-npu#640, sparkinfer#610, fla#776",
        (3, 7),
    ),
    "grouped-heads": Flag(
        "value head h reads key head h % H_k instead of h // (H_v / H_k); gradients of a shared key head not summed",
        "the model runs but generates nonsense",
        "shainet#204, sglang#36722, TensorRT-LLM#11810",
        (2, 32),
    ),
    "tiled-heads": Flag(
        "the grouped map instead of the file's tiled order",
        "the model runs but generates nonsense",
        "aprender#3527, llama.cpp#21125",
        (2, 23),
    ),
    "ragged": Flag(
        "a short last chunk: its gate read from the padding, rows beyond L written or rows left unwritten",
        "wrong for most lengths, right for multiples of the chunk",
        "sparkinfer#604, fla-npu#367, FlashQLA#28",
        (13,),
    ),
    "initial-state": Flag(
        "S0 ignored, reset, mis-indexed or transposed; its gradient lost",
        "a conversation is forgotten at every turn; state tuning does not learn",
        "sparkinfer#1071, vllm#55766, llama.cpp#20700, fla#1140",
        (3, 4, 14),
    ),
    "final-state-loss": Flag(
        "the gradient through S_end ignored",
        "training across segments is silently truncated",
        "fla-npu#312, fla#1140, fla#1141, fla#1146",
        (14, 11),
    ),
    "no-decay": Flag(
        "g = 0: 0 * inf, an absent gate left uninitialised",
        "NaN, or uninitialised memory",
        "fla#862, fla#863, fla-npu#448",
        (5, 6, 12),
    ),
    "strong-decay": Flag(
        "exp of positive differences overflows; gradient of g lost by cancellation",
        "NaN after thousands of steps, once a head has learned to forget",
        "executorch#21417, tt-metal#56550, TileOPs#366",
        (5, 6, 28, 29),
    ),
    "mixed-decay": Flag(
        "as strong-decay, with weak and strong decay in one chunk; cumulative sums not reset",
        "NaN or wrong decay",
        "fla#99, fla#389, FlashQLA#28, flashinfer#2768",
        (5, 6, 29),
    ),
    "beta-0": Flag("beta = 0 must not write", "the state changes in padding", "", (27, 17)),
    "beta-1": Flag("beta = 1 replaces what the key stored", "", "", (27,)),
    "beta-2": Flag("beta = 2 reflects; beta clamped to 1", "negative eigenvalues are lost", "", (27,)),
    "repeated-keys": Flag(
        "the triangular inverse by powers of A, whose entries grow like binomials",
        "wrong results on repetitive text only",
        "fla#537",
        (20,),
    ),
    "orthogonal-keys": Flag("A is nearly zero: shortcuts around it; keys interact that should not", "", "", (10,)),
    "zero-keys": Flag(
        "keys that are exactly zero: division by their norm", "NaN at padding", "fla#508, maxtext#5295", (8, 17)
    ),
    "tiny-keys": Flag(
        "rows of norm 1e-4 to 1e-2: eps inside or outside the root, on the sum or on the mean; rows normalised twice",
        "small rows scaled wrongly",
        "mlx-lm#1624, fla#508, maxtext#5295",
        (8,),
    ),
    "unequal-keys": Flag(
        "keys of different norms: a kernel that normalises keys itself", "wrong for any other model", "fla#508", (8,)
    ),
    "padding": Flag(
        "padding tokens (beta = 0, g = 0) before and after must not change anything",
        "results depend on the batch",
        "zml#754, maxtext#5295, transformers#46873",
        (17,),
    ),
    "packed": Flag(
        "state or convolution window leaks from one sequence into the next; a chunk spans two sequences",
        "training on packed data is silently wrong",
        "ms-swift#9565, NeMo Automodel#2147, slime#1686, fla#838",
        (1, 16),
    ),
    "bf16-inputs": Flag(
        "q, k, v, beta are bfloat16 numbers, so that a bfloat16 kernel can run the case unchanged", "", "", ()
    ),
    "full-precision": Flag(
        "inputs use all 24 bits: rounding them (TF32, bfloat16 gates) shows up",
        "float32 that is not float32",
        "TileOPs#460, vllm.cpp#3223, fla#693, fla#1205",
        (19, 34),
    ),
    "near-solution": Flag(
        "v is close to k S, so that few digits of v - k S remain: TF32 in its product",
        "float32 that is not float32",
        "TileOPs#460, vllm.cpp#3223, fla#1205",
        (19,),
    ),
    "long": Flag(
        "state kept in bfloat16 or float16; errors that accumulate; 32-bit indices",
        "benchmarks at 4k tokens collapse (MMLU 0.45 -> 0.15)",
        "ollama#15865, TensorRT-Model-Connect#725",
        (18, 26),
    ),
    "wide-state": Flag(
        "a state from 1e-3 to 1e3 kept in half precision",
        "small entries vanish",
        "ollama#15865, TensorRT-Model-Connect#725",
        (18,),
    ),
    "batch-rows": Flag(
        "gradients or strides of batch rows after the first",
        "training works with batch size 1 only",
        "unsloth-zoo#776, mlx#3483",
        (15,),
    ),
    "scale": Flag(
        "scale left out, applied twice, or fixed to d_k ** -0.5 whatever the argument",
        "logits too flat or too sharp",
        "mlx-lm#1799, mlx-lm#1823, shainet#176",
        (7,),
    ),
    "wide-heads": Flag("head sizes beyond one tile", "only small heads work", "fla#783", (26,)),
    "three-chunks": Flag(
        "what crosses two chunk boundaries: decay not carried, dS through (I - W^T K), dW across chunks",
        "short sequences work, long ones do not train",
        "flashinfer#2768, helion#1067, TileOPs#632, TileOPs#633",
        (11, 29),
    ),
    "intermediates": Flag(
        "gc, A, T, U, W, V_new, S and their gradients are judged too: which stage is wrong first",
        "",
        "shainet#170, NVlabs/GatedDeltaNet#14, fla#792",
        (10, 11),
    ),
    "gate-range": Flag(
        "softplus and sigmoid at large arguments: overflow, or A_log rounded",
        "NaN, or decays off by percents",
        "shainet#204, sglang#20741",
        (9, 5),
    ),
    "norm-weight": Flag(
        "1 + w or w; the weight before or after rounding",
        "every layer off by a factor",
        "mlx-lm#1623, lmdeploy#4790, vllm#35423, fla#155",
        (21,),
    ),
    "sections": Flag("several rotary axes, interleaved", "the model misreads images", "mobius#522, candle#3461", (30,)),
    "score-range": Flag(
        "softmax without its maximum subtracted; log of a probability that underflowed", "inf or NaN", "", (5, 35)
    ),
    "ignored-labels": Flag(
        "rows with label -100 counted in the mean, or with a gradient",
        "masked tokens are trained",
        "qvac-fabric b10069, NeMo#3738, marin#7237",
        (35, 36),
    ),
    "fresh-adapter": Flag(
        "b = 0: the update is zero, b has a gradient and a has none",
        "an adapter that never learns",
        "vllm#34186, TuFT#149",
        (24,),
    ),
    "whole-model": Flag(
        "how the parts are combined: order of norm and gate, interleaved q and gate, b and a swapped, SiLU missing",
        "plausible nonsense",
        "llmman#16, Arcaine#11",
        (22, 30, 21),
    ),
}
