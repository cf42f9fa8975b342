"""THE table of conformance cases, and their inputs, which are bit-identical on every machine.

Inputs are computed from the raw 64-bit words of PCG64 (a stream that NumPy guarantees) using only integer operations
and + - * / and sqrt, which are correctly rounded; no exp, log or normal variate, whose last bit depends on the library.
Sums run in a fixed order. Every value is then rounded to float32, and in cases with the flag bf16-inputs q, k, v, beta
and do also to bfloat16 (the log decay g and states stay float32, as in every implementation).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from deltanet_ref.errors import InputError, shown

CHUNK = 64


@dataclass(frozen=True)
class Case:
    """One conformance case. Its id is "group/name"; operators.py has the arguments and outputs of its op."""

    id: str
    op: str
    sizes: dict = field(hash=False)  # letter of notation.py -> size
    flags: tuple  # keys of flags.FLAGS
    seed: int
    options: dict = field(default_factory=dict, hash=False)  # how the inputs differ from the default ones: see MAKERS

    @property
    def group(self) -> str:
        """The group of cases, the first part of the id."""
        return self.id.split("/")[0]

    @property
    def bf16(self) -> bool:
        """True when q, k, v, beta and do are bfloat16 numbers, so that a bfloat16 kernel can be tested with them."""
        return "bf16-inputs" in self.flags


# ---------------------------------------------------------------------------------------------------- the table


def _delta(name, sizes, flags, **options):
    """A dense case of the gated delta rule; sizes (B, L, H_k, H_v, d_k, d_v)."""
    return _delta_case(
        "delta", "gated_delta_rule", name, dict(zip(("B", "L", "H_k", "H_v", "d_k", "d_v"), sizes)), flags, options
    )


def _packed(name, lengths, sizes, flags, **options):
    """Packed sequences of the given lengths; sizes (H_k, H_v, d_k, d_v)."""
    sizes = dict(B=1, L=sum(lengths), **dict(zip(("H_k", "H_v", "d_k", "d_v"), sizes)))
    return _delta_case("packed", "gated_delta_rule", name, sizes, f"packed {flags}", options | {"lengths": lengths})


def _step(name, sizes, flags, **options):
    """One token of each sequence, without a token axis; sizes (B, H_k, H_v, d_k, d_v)."""
    sizes = dict(zip(("B", "H_k", "H_v", "d_k", "d_v"), sizes))
    return _delta_case(
        "step", "gated_delta_rule_step", name, sizes, f"single-token initial-state {flags}", {"S0": "random"} | options
    )


def _delta_case(group, op, name, sizes, flags, options):
    implied = []
    if sizes["d_k"] != sizes["d_v"]:
        implied.append("non-square")
    if sizes["H_k"] not in (1, sizes["H_v"]):
        implied.append("tiled-heads" if options.get("head_order") == "tiled" else "grouped-heads")
    if options.get("S0", "zero") != "zero" and "initial-state" not in flags:
        implied.append("initial-state")
    if options.get("dS_end", "zero") != "zero":
        implied.append("final-state-loss")
    if options.get("precision", "bfloat16") == "bfloat16":
        implied.append("bf16-inputs")
    else:
        implied.append("full-precision")
    if sizes.get("L", 1) > 2 * CHUNK:
        implied.append("three-chunks")
    return group, op, name, sizes, (*flags.split(), *implied), options


def _other(group, op):
    def case(name, sizes, flags, **options):
        return group, op, name, sizes, tuple(flags.split()), options

    return case


_conv, _gate = _other("conv", "causal_conv1d"), _other("gate", "decay_gate")
_l2, _rms, _gated_rms = _other("norm", "l2_norm"), _other("norm", "rms_norm"), _other("norm", "gated_rms_norm")
_rope, _attention = _other("rope", "rope"), _other("attention", "gated_attention")
_xent, _lora, _model = _other("loss", "cross_entropy"), _other("lora", "lora_linear"), _other("model", "qwen35")

BOTH = dict(S0="random", dS_end="random")

_TABLE = (
    # the gated delta rule, dense. The simplest first, so that the first failing case is the one to debug
    _delta("hand", (1, 2, 1, 1, 2, 3), "hand-computable", maker="hand"),
    _delta("one-token", (1, 1, 1, 2, 8, 4), "single-token"),
    _delta("one-token-state", (2, 1, 2, 4, 8, 4), "single-token", **BOTH, g=-0.75),
    _delta("plain", (1, 11, 2, 2, 8, 4), "plain"),
    _delta("initial-state", (1, 9, 1, 2, 8, 4), "", S0="random"),
    _delta("final-state-only", (1, 70, 1, 2, 8, 4), "", do="zero", dS_end="random"),
    _delta("square-state", (1, 7, 1, 2, 6, 6), "", **BOTH),
    _delta("grouped-heads", (1, 20, 2, 6, 8, 4), "", **BOTH),
    _delta("tiled-heads", (1, 21, 3, 6, 8, 4), "", **BOTH, head_order="tiled"),
    _delta("batch-rows", (3, 18, 1, 2, 8, 4), "batch-rows", **BOTH),
    _delta("batch-rows-chunks", (2, 75, 1, 2, 8, 4), "batch-rows", **BOTH),
    _delta("scale-one", (1, 13, 1, 2, 8, 4), "scale", scale=1.0),
    _delta("scale-other", (1, 67, 1, 2, 8, 4), "scale", scale=0.78125, dS_end="random"),
    _delta("wide-heads", (1, 10, 1, 1, 64, 32), "wide-heads", **BOTH),
    *(
        _delta(f"ragged-{L}", (1, L, 1, 2, 8, 4), "ragged", dS_end="random" if L % 2 else "zero")
        for L in (2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
    ),
    _delta("no-decay", (1, 71, 1, 2, 8, 4), "no-decay", **BOTH, g=0.0),
    _delta("strong-decay-20", (1, 68, 1, 2, 8, 4), "strong-decay", **BOTH, g=-20.0),
    _delta("strong-decay-120", (1, 66, 1, 2, 8, 4), "strong-decay", **BOTH, g=-120.0),
    _delta("mixed-decay", (1, 131, 1, 2, 8, 4), "mixed-decay", **BOTH, g="mixed"),
    _delta("beta-zero", (1, 19, 1, 2, 8, 4), "beta-0", **BOTH, beta=0.0),
    _delta("beta-one", (1, 73, 1, 2, 8, 4), "beta-1", **BOTH, beta=1.0),
    _delta("beta-two", (1, 69, 1, 2, 8, 4), "beta-2", **BOTH, beta=2.0),
    _delta("beta-edges", (1, 74, 1, 2, 8, 4), "beta-0 beta-1 beta-2", **BOTH, beta="edges"),
    _delta("repeated-keys", (1, 72, 1, 2, 8, 4), "repeated-keys", **BOTH, k="repeated", beta=1.0, g=0.0),
    _delta("repeated-keys-decay", (1, 62, 1, 2, 8, 4), "repeated-keys", dS_end="random", k="repeated"),
    _delta("orthogonal-keys", (1, 30, 1, 2, 8, 4), "orthogonal-keys", **BOTH, k="axes"),
    _delta("zero-keys", (1, 23, 1, 2, 8, 4), "zero-keys", **BOTH, k="zeros"),
    _delta("tiny-keys", (1, 22, 1, 2, 8, 4), "tiny-keys", **BOTH, k="tiny"),
    _delta("unequal-keys", (1, 34, 1, 2, 8, 4), "unequal-keys", **BOTH, k="unequal"),
    _delta("padding", (1, 29, 1, 2, 8, 4), "padding", **BOTH, padding=(3, 5)),
    _delta("three-chunks", (1, 150, 1, 2, 16, 8), "intermediates", intermediates=True),
    _delta("three-chunks-state", (1, 147, 1, 2, 16, 8), "intermediates", **BOTH, intermediates=True, g="strong"),
    _delta(
        "three-chunks-mixed", (1, 141, 2, 2, 8, 16), "intermediates mixed-decay", **BOTH, intermediates=True, g="mixed"
    ),
    _delta("everything", (2, 135, 2, 4, 8, 4), "batch-rows mixed-decay scale", **BOTH, g="mixed", scale=0.4375),
    _delta("full-precision", (1, 77, 1, 2, 16, 8), "", **BOTH, precision="float32"),
    _delta("near-solution", (1, 40, 1, 2, 16, 8), "near-solution", **BOTH, precision="float32", g=0.0, v="near"),
    _delta("wide-state", (1, 37, 1, 2, 8, 4), "wide-state", precision="float32", S0="wide", dS_end="random"),
    _delta("long", (1, 4099, 1, 2, 8, 4), "long", **BOTH, g="slow", sampled=True),
    _delta(
        "long-wide-state",
        (1, 4133, 1, 1, 8, 4),
        "long wide-state",
        precision="float32",
        S0="wide",
        dS_end="random",
        g="slow",
        sampled=True,
    ),
    # packed
    _packed("two", (5, 8), (1, 2, 8, 4), ""),
    _packed("state", (7, 12, 4), (2, 4, 8, 4), "", **BOTH),
    _packed("chunks", (70, 66), (1, 2, 8, 4), "", **BOTH),
    _packed("ragged", (1, 64, 3, 65, 2), (1, 2, 8, 4), "ragged", **BOTH),
    _packed("mixed-decay", (33, 31, 67), (1, 2, 8, 4), "mixed-decay", **BOTH, g="mixed"),
    # one token per call
    _step("plain", (1, 1, 2, 8, 4), ""),
    _step("heads", (3, 2, 6, 8, 4), "batch-rows", g=-0.75),
    _step("strong-decay", (2, 1, 2, 8, 4), "strong-decay batch-rows", g=-20.0, beta=1.0),
    # convolution and SiLU
    _conv("plain", dict(B=1, L=9, ch=6, K=4), "plain bf16-inputs"),
    _conv("state", dict(B=2, L=11, ch=6, K=4), "initial-state final-state-loss batch-rows bf16-inputs", state=True),
    _conv(
        "short", dict(B=2, L=2, ch=5, K=4), "ragged initial-state final-state-loss batch-rows bf16-inputs", state=True
    ),
    _conv(
        "packed",
        dict(B=1, L=13, ch=6, K=4),
        "packed initial-state final-state-loss bf16-inputs",
        state=True,
        lengths=(1, 7, 2, 3),
    ),
    _conv("full-precision", dict(B=1, L=33, ch=6, K=4), "full-precision", precision="float32"),
    # gates
    _gate("plain", dict(B=2, L=7, H_v=3), "plain bf16-inputs"),
    _gate("wide", dict(B=1, L=17, H_v=5), "gate-range full-precision", precision="float32", range=120.0),
    _gate("long", dict(B=1, L=70, H_v=3), "full-precision", precision="float32"),
    # norms
    _l2("l2", dict(B=2, L=3, H=2, d=8), "plain bf16-inputs"),
    _l2("l2-tiny", dict(B=1, L=6, H=1, d=8), "tiny-keys full-precision", precision="float32", rows="tiny"),
    _l2("l2-zero", dict(B=1, L=5, H=1, d=8), "zero-keys bf16-inputs", rows="zeros"),
    _rms("rms", dict(B=2, L=5, d=12), "plain bf16-inputs"),
    _rms("rms-weight-near-zero", dict(B=1, L=5, d=12), "norm-weight full-precision", precision="float32", w=0.0),
    _rms("rms-weight-near-one", dict(B=1, L=5, d=12), "norm-weight full-precision", precision="float32", w=1.0),
    _rms("rms-tiny", dict(B=1, L=6, d=12), "tiny-keys full-precision", precision="float32", rows="tiny"),
    _gated_rms("gated-rms", dict(B=2, L=5, d=12), "plain bf16-inputs"),
    _gated_rms("gated-rms-tiny", dict(B=1, L=6, d=12), "tiny-keys full-precision", precision="float32", rows="tiny"),
    # rotary
    _rope("partial", dict(B=2, L=7, H=3, d=16, R=4), "plain bf16-inputs"),
    _rope("far", dict(B=1, L=9, H=2, d=16, R=8), "long full-precision", precision="float32", start=5000, theta=1e7),
    _rope("sections", dict(B=1, L=11, H=2, d=32, R=24), "sections bf16-inputs", sections=(5, 4, 3), theta=1e6),
    # gated softmax attention
    _attention("plain", dict(B=1, L=9, M=9, H=2, H_kv=2, d=8), "plain bf16-inputs"),
    _attention("grouped", dict(B=2, L=11, M=11, H=6, H_kv=2, d=8), "grouped-heads batch-rows bf16-inputs"),
    _attention("past", dict(B=1, L=3, M=12, H=4, H_kv=2, d=8), "initial-state bf16-inputs"),
    _attention(
        "large-scores",
        dict(B=1, L=13, M=13, H=2, H_kv=1, d=8),
        "score-range full-precision",
        precision="float32",
        gain=25.0,
        offset=18.0,
    ),
    # cross-entropy
    _xent("plain", dict(n=6, V=11), "plain bf16-inputs"),
    _xent("ignored", dict(n=9, V=13), "ignored-labels bf16-inputs", ignored=True),
    _xent("all-ignored", dict(n=3, V=7), "ignored-labels bf16-inputs", ignored="all"),
    _xent("large-logits", dict(n=7, V=17), "score-range full-precision", precision="float32", gain=90.0),
    # LoRA
    _lora("plain", {"n": 5, "in": 7, "out": 6, "r": 2}, "plain bf16-inputs", scale=2.0),
    _lora("fresh", {"n": 5, "in": 7, "out": 6, "r": 3}, "fresh-adapter bf16-inputs", scale=0.5, b="zero"),
    _lora("full-precision", {"n": 9, "in": 24, "out": 10, "r": 4}, "full-precision", scale=1.25, precision="float32"),
    # a whole model: forward, loss and gradients, then decoding token by token
    _model("tiny", dict(B=2, L=19, prompt=12), "whole-model grouped-heads full-precision", precision="float32"),
)

CASES = {
    f"{group}/{name}": Case(f"{group}/{name}", op, sizes, flags, 1000 + 7 * number, options)
    for number, (group, op, name, sizes, flags, options) in enumerate(_TABLE)
}
GROUPS = tuple(dict.fromkeys(case.group for case in CASES.values()))


def select(patterns: Sequence[str] = ("delta/*",), dtype: str = "float32") -> list[Case]:
    """Cases whose id matches a pattern (shell wildcards; a group name means the whole group), in table order.

    With dtype bfloat16 only those with bf16-inputs. Raises InputError when nothing matches.
    """
    from fnmatch import fnmatchcase

    chosen = [
        case
        for case in CASES.values()
        if (case.bf16 or dtype != "bfloat16")
        and any(fnmatchcase(case.id, pattern) or case.group == pattern for pattern in patterns)
    ]
    if not chosen:
        raise InputError(
            f"no case matches {shown(' '.join(patterns))}; groups: {' '.join(GROUPS)}; "
            "`deltanet-ref vectors --list` lists the cases"
        )
    return chosen


# ------------------------------------------------------------------------------------ random numbers and rounding


class Draw:
    """Random float64 numbers from a seed, bit-identical on every machine."""

    def __init__(self, seed):
        self._bits = np.random.PCG64(seed)

    def uniform(self, shape, low=0.0, high=1.0):
        """low + (high - low) x, where x is a multiple of 2^-53 in [0, 1)."""
        words = self._bits.random_raw(math.prod(shape)).reshape(shape)
        return low + (high - low) * ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def bell(self, shape):
        """Mean 0, variance 1, |x| < 3.5: a scaled sum of four uniform numbers."""
        a, b, c, d = (self.uniform(shape, -1.0, 1.0) for _ in range(4))
        return ((a + b) + (c + d)) * math.sqrt(0.75)

    def pick(self, shape, values):
        """Each element is one of the values, with equal probability."""
        return np.asarray(values)[(self.uniform(shape) * len(values)).astype(np.int64)]


def float32(x: np.ndarray) -> np.ndarray:
    """Round to float32."""
    return np.asarray(x, np.float64).astype(np.float32)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round finite values to the nearest bfloat16, ties to even -> a float32 array."""
    bits = float32(x).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)


def rounding(case):
    """The rounding of the case's inputs: bfloat16 if it has the flag bf16-inputs, else float32."""
    return bfloat16 if case.bf16 else float32


def unit_rows(x):
    """x / sqrt(sum x^2), summed from the first feature to the last."""
    total = np.zeros(x.shape[:-1])
    for column in np.moveaxis(x, -1, 0):
        total = total + column * column
    return x / np.sqrt(total)[..., None]


# ----------------------------------------------------------------------------------------------------- delta rule


def _delta_inputs(case, draw):
    """Options k, g, beta, S0, do, dS_end name entries of the tables below; also v, scale, padding, lengths, maker."""
    s, options, cast = case.sizes, case.options, rounding(case)
    if options.get("maker") == "hand":
        return _hand_inputs()
    tokens = (s["B"], s["L"]) if "L" in s else (s["B"],)
    N_seq = len(options["lengths"]) if "lengths" in options else s["B"]
    key, value, head = (*tokens, s["H_k"], s["d_k"]), (*tokens, s["H_v"], s["d_v"]), (*tokens, s["H_v"])
    state = (N_seq, s["H_v"], s["d_k"], s["d_v"])
    x = {
        "q": cast(unit_rows(draw.bell(key))),
        "k": cast(KEYS[options.get("k", "unit")](draw, key)),
        "v": cast(draw.bell(value)),
    }
    x["g"] = float32(_row("g", LOG_DECAYS, options.get("g", "mild"), draw, head))
    x["beta"] = cast(_row("beta", BETAS, options.get("beta", "between"), draw, head))
    x["S0"] = float32(STATES[options.get("S0", "zero")](draw, state))
    x["scale"] = float(options.get("scale", 1 / math.sqrt(s["d_k"])))
    if "lengths" in options:
        x["cu_seqlens"] = np.cumsum([0, *options["lengths"]])
    x["do"] = cast(STATES[options.get("do", "random")](draw, value))
    x["dS_end"] = float32(STATES[options.get("dS_end", "zero")](draw, state))
    if "padding" in options:
        _pad(x, *options["padding"])
    if options.get("v") == "near":
        _near_solution(x, draw)
    return x


def _tiny_rows(draw, shape):
    """Rows of norm 1e-4, 1e-3, 1e-2 and 1 in turn."""
    size = np.resize([1e-4, 1e-3, 1e-2, 1.0], shape[1])
    return unit_rows(draw.bell(shape)) * size.reshape(-1, *(1,) * (len(shape) - 2))


def _zero_rows(draw, shape):
    """Every third row exactly zero."""
    x = unit_rows(draw.bell(shape))
    x[:, ::3] = 0
    return x


KEYS = {
    "unit": lambda draw, shape: unit_rows(draw.bell(shape)),
    "repeated": lambda draw, shape: np.broadcast_to(unit_rows(draw.bell((shape[0], 1, *shape[2:]))), shape),
    "axes": lambda draw, shape: np.eye(shape[-1])[np.arange(shape[1]) % shape[-1]][None, :, None] * np.ones(shape),
    "zeros": _zero_rows,
    "tiny": _tiny_rows,
    "unequal": lambda draw, shape: unit_rows(draw.bell(shape)) * draw.uniform((*shape[:-1], 1), 0.3, 1.25),
}
RATES = (0.1, 0.02, 0.5, 0.004, 0.25, 0.05)  # cycled through the heads
MIXED = (0.0,) * 4 + (-1e-3,) * 4 + (-0.0625,) * 8 + (-0.625,) * 4 + (-5.0, -20.0, -80.0, -120.0)
LOG_DECAYS = {
    "mild": lambda draw, shape: -draw.uniform(shape, 0.0, 2.0) * np.resize(RATES, shape[-1]),
    "strong": lambda draw, shape: -draw.uniform(shape, 0.0, 2.0) * np.resize((2.0, 0.25), shape[-1]),
    "slow": lambda draw, shape: -draw.uniform(shape, 0.0, 1 / 512) * np.resize((0.25, 1.0), shape[-1]),
    "mixed": lambda draw, shape: draw.pick(shape, MIXED),
}
BETAS = {
    "between": lambda draw, shape: draw.uniform(shape, 0.05, 0.95),
    "edges": lambda draw, shape: draw.pick(shape, (0.0, 1.0, 2.0)),
}
STATES = {
    "zero": lambda draw, shape: np.zeros(shape),
    "random": lambda draw, shape: draw.bell(shape),
    "wide": lambda draw, shape: draw.bell(shape) * draw.pick((*shape[:-1], 1), (1e-3, 1e-1, 10.0, 1e3)),
}


def _row(name, table, choice, draw, shape):
    """The table's entry, or a constant. A constant log decay is multiplied by a random factor in [1, 1.0625)."""
    if not isinstance(choice, float):
        return table[choice](draw, shape)
    return choice * (1 + draw.uniform(shape, 0.0, 0.0625)) if name == "g" else np.full(shape, choice)


def _hand_inputs():
    """Two tokens, one head, d_k = 2, d_v = 3: small enough to work out by hand (oracle/README.md does)."""
    x = {"q": [[1, 0], [1, 1]], "k": [[1, 0], [0.5, 0.5]], "v": [[2, 4, -2], [3, 1, 0]], "do": [[1, 0, 0], [0, 1, -1]]}
    x = {name: float32(rows)[None, :, None] for name, rows in x.items()}
    x["g"], x["beta"] = float32([[[0.0], [0.0]]]), float32([[[1.0], [0.5]]])
    x["S0"], x["scale"] = np.zeros((1, 1, 2, 3), np.float32), 1.0
    x["dS_end"] = np.zeros((1, 1, 2, 3), np.float32)
    return {name: x[name] for name in ("q", "k", "v", "g", "beta", "S0", "scale", "do", "dS_end")}


def _pad(x, left, right):
    """Turn tokens at both ends into padding, which must have no effect: beta = 0, g = 0, do = 0; q, k, v unchanged."""
    for name, neutral in (("beta", 0), ("g", 0), ("do", 0)):
        x[name][:, :left] = neutral
        x[name][:, x[name].shape[1] - right :] = neutral


def _near_solution(x, draw):
    """v_t = k_t S + a small number, so that the error v - k S loses most of its digits. Requires g = 0: no exp."""
    k, v, beta = (x[name].astype(np.float64) for name in ("k", "v", "beta"))
    S = x["S0"].astype(np.float64)
    heads = v.shape[2] // k.shape[2]
    for t in range(v.shape[1]):
        key = np.repeat(k[:, t], heads, 1)  # (B, H_v, d_k)
        read = np.zeros(v.shape[:1] + v.shape[2:])
        for i in range(k.shape[3]):
            read = read + key[..., i, None] * S[..., i, :]
        x["v"][:, t] = float32(read + draw.bell(read.shape) * 2.0**-8)
        S = S + key[..., None] * (beta[:, t, :, None] * (x["v"][:, t] - read))[..., None, :]


# --------------------------------------------------------------------------------------------------- other operators


def _conv_inputs(case, draw):
    s, cast = case.sizes, rounding(case)
    lengths = case.options.get("lengths")
    N_seq = len(lengths) if lengths else s["B"]
    state = (N_seq, s["K"] - 1, s["ch"])
    carried = draw.bell if case.options.get("state") else np.zeros
    x = {
        "x": cast(draw.bell((s["B"], s["L"], s["ch"]))),
        "w": cast(draw.bell((s["ch"], s["K"]))),
        "state": cast(carried(state)),
    }
    if lengths:
        x["cu_seqlens"] = np.cumsum([0, *lengths])
    return x | {"dy": cast(draw.bell(x["x"].shape)), "dstate_end": cast(carried(state))}


def _gate_inputs(case, draw):
    s, cast = case.sizes, rounding(case)
    tokens, reach = (s["B"], s["L"], s["H_v"]), case.options.get("range", 3.0)
    return {
        "a": cast(draw.uniform(tokens, -reach, reach)),
        "b": cast(draw.uniform(tokens, -reach, reach)),
        "A_log": float32(draw.uniform(tokens[2:], -3.0, 2.75)),
        "dt_bias": float32(draw.uniform(tokens[2:], -4.0, 1.0)),
        "dg": float32(draw.bell(tokens)),
        "dbeta": cast(draw.bell(tokens)),
    }


ROWS = {"random": lambda draw, shape: draw.bell(shape), "tiny": _tiny_rows, "zeros": _zero_rows}


def _norm_inputs(case, draw):
    s, cast, options = case.sizes, rounding(case), case.options
    shape = tuple(s[letter] for letter in ("B", "L", "H", "d") if letter in s)
    x = {"x": cast(ROWS[options.get("rows", "random")](draw, shape))}
    if case.op == "gated_rms_norm":
        x["z"] = cast(draw.bell(shape))
    if case.op != "l2_norm":
        x["w"] = cast(options.get("w", 1.0) + draw.bell(shape[-1:]) * (1 / 64 if "w" in options else 0.5))
    return x | {"eps": 1e-6, "dy": cast(draw.bell(shape))}


def _rope_inputs(case, draw):
    s, cast, options = case.sizes, rounding(case), case.options
    positions = np.arange(s["L"]) + options.get("start", 0)
    if "sections" in options:  # (3, L): time, height, width
        positions = np.stack([positions, positions // 3 + 2, positions % 5])
    shape = (s["B"], s["L"], s["H"], s["d"])
    return {
        "x": cast(draw.bell(shape)),
        "positions": positions,
        "rotary_dim": s["R"],
        "theta": options.get("theta", 1e4),
        "sections": options.get("sections"),
        "dy": cast(draw.bell(shape)),
    }


def _attention_inputs(case, draw):
    s, cast = case.sizes, rounding(case)
    query, past = (s["B"], s["L"], s["H"], s["d"]), (s["B"], s["M"], s["H_kv"], s["d"])
    q, k = draw.bell(query) * case.options.get("gain", 1.0), draw.bell(past)
    if "offset" in case.options:  # increases every score by offset^2 scale
        q[..., 0] = k[..., 0] = case.options["offset"]
    return {
        "q": cast(q),
        "k": cast(k),
        "v": cast(draw.bell(past)),
        "gate": cast(draw.bell(query)),
        "scale": 1 / math.sqrt(s["d"]),
        "dy": cast(draw.bell(query)),
    }


def _cross_entropy_inputs(case, draw):
    s, cast, options = case.sizes, rounding(case), case.options
    labels = draw.pick((s["n"],), np.arange(s["V"]))
    if options.get("ignored"):
        labels[slice(None) if options["ignored"] == "all" else slice(0, None, 3)] = -100
    return {"logits": cast(draw.bell((s["n"], s["V"])) * options.get("gain", 2.0)), "labels": labels, "dloss": 0.75}


def _lora_inputs(case, draw):
    s, cast, options = case.sizes, rounding(case), case.options
    b = np.zeros if options.get("b") == "zero" else draw.bell
    return {
        "x": cast(draw.bell((s["n"], s["in"]))),
        "w": cast(draw.bell((s["out"], s["in"])) * 0.5),
        "a": cast(draw.bell((s["r"], s["in"])) * 0.5),
        "b": cast(b((s["out"], s["r"]))),
        "scale": options["scale"],
        "dy": cast(draw.bell((s["n"], s["out"]))),
    }


TINY_MODEL = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    partial_rotary_factor=0.25,
    mrope_section=(1, 1, 0),
    tie_word_embeddings=False,
    max_position_embeddings=64,
    layer_types=("linear_attention", "linear_attention", "linear_attention", "full_attention"),
)


def tiny_config():
    """The Config of the model case."""
    from deltanet_ref.model.config import Config

    return Config(**TINY_MODEL)


def _model_inputs(case, draw):
    """tokens, labels, and every weight under its GGUF name, with values large enough that every part matters."""
    from deltanet_ref.model.tensors import expected_tensors

    s = case.sizes
    tokens = draw.pick((s["B"], s["L"]), np.arange(TINY_MODEL["vocab_size"]))
    labels = tokens.copy()
    labels[0, :4] = -100
    weights = {}
    for name, spec in expected_tensors(tiny_config()).items():
        if name.endswith("ssm_a"):
            weights[name] = float32(-draw.uniform(spec.shape, 0.05, 2.0))
        elif len(spec.shape) == 1:
            weights[name] = float32(draw.bell(spec.shape) * 0.25 + (0.0 if name.endswith("bias") else 1.0))
        else:
            weights[name] = float32(draw.bell(spec.shape) / math.sqrt(spec.shape[1]))
    return {"tokens": tokens, "labels": labels, "prompt": s["prompt"], **weights}


MAKERS = {
    "gated_delta_rule": _delta_inputs,
    "gated_delta_rule_step": _delta_inputs,
    "causal_conv1d": _conv_inputs,
    "decay_gate": _gate_inputs,
    "l2_norm": _norm_inputs,
    "rms_norm": _norm_inputs,
    "gated_rms_norm": _norm_inputs,
    "rope": _rope_inputs,
    "gated_attention": _attention_inputs,
    "cross_entropy": _cross_entropy_inputs,
    "lora_linear": _lora_inputs,
    "qwen35": _model_inputs,
}


def make_inputs(case: Case) -> dict:
    """The inputs and incoming gradients of a case: name -> float32 or int64 array, Python number, or None."""
    return MAKERS[case.op](case, Draw(case.seed))
