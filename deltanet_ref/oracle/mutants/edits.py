"""A mutant is correct code with a line changed: which functions can be changed, and how the changed ones are made.

The correct code stays where it is, in ops/ and in oracle/; an Edit holds its words as they are and as they must not be.
Words that are not found exactly once are an error, so that no mutant outlives the line that it changes.
"""
import functools
import inspect
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from deltanet_ref import ops
from deltanet_ref.ops import (causal_conv1d, cross_entropy, decay_gate, l2_norm, lora_linear, rms_norm, rope,
                              softmax_attention)
from deltanet_ref.ops.gated_delta_rule import arguments, chunk, recurrent, wy
from deltanet_ref.oracle import noise, operators
from deltanet_ref.oracle.cases import bfloat16
from deltanet_ref.oracle.chunk_by_chunk import chunk_by_chunk


class Base(NamedTuple):
    """Correct code."""
    ops: tuple                # the operators that it computes
    functions: tuple          # the first maps inputs to {output or gradient: array}, the others serve it
    chunk: str = ""           # the words that say how long a chunk is; empty where there are none
    changes: tuple = ()       # made in every edit of this base


DELTA = ("gated_delta_rule", "gated_delta_rule_step")
BASES = {
    "rule": Base(DELTA, (operators._delta, arguments.arguments, arguments.gradient_shapes, recurrent.recurrent_forward,
                         recurrent.recurrent_backward, recurrent.token_forward, recurrent.token_backward,
                         recurrent._read)),
    "chunks": Base(DELTA, (noise._chunked, chunk_by_chunk), "chunk=64"),
    "wy": Base(DELTA, (operators._delta, arguments.gradient_shapes, chunk.chunk_forward, chunk.chunk_backward,
                       chunk._decays, wy.wy_forward, wy.wy_backward, wy.decay_triangle, wy.log_decay_backward),
               "chunk_size=64", (("gdr.recurrent_forward", "gdr.chunk_forward"),
                                 ("gdr.recurrent_backward", "gdr.chunk_backward"))),
    "conv": Base(("causal_conv1d",), (operators._conv, causal_conv1d.causal_conv1d_forward,
                                      causal_conv1d.causal_conv1d_backward, causal_conv1d._correlate,
                                      causal_conv1d._correlate_backward_input,
                                      causal_conv1d._correlate_backward_weight)),
    "gate": Base(("decay_gate",), (operators._gate, decay_gate.decay_gate_forward, decay_gate.decay_gate_backward)),
    "l2": Base(("l2_norm",), (operators._l2_norm, l2_norm.l2_norm_forward, l2_norm.l2_norm_backward)),
    "rms": Base(("rms_norm",), (operators._rms_norm, rms_norm.rms_norm_forward, rms_norm.rms_norm_backward,
                                rms_norm._inverse_rms, rms_norm._normalised_backward)),
    "gated_rms": Base(("gated_rms_norm",), (operators._gated_rms_norm, rms_norm.gated_rms_norm_forward,
                                            rms_norm.gated_rms_norm_backward, rms_norm._inverse_rms,
                                            rms_norm._normalised_backward)),
    "rope": Base(("rope",), (operators._rope, rope.rope_tables, rope.rope_forward, rope.rope_backward)),
    "attention": Base(("gated_attention",), (operators._attention, softmax_attention.softmax_attention_forward,
                                             softmax_attention.softmax_attention_backward,
                                             softmax_attention.sigmoid_gate_forward,
                                             softmax_attention.sigmoid_gate_backward, softmax_attention._blocks,
                                             softmax_attention._scores)),
    "loss": Base(("cross_entropy",), (operators._cross_entropy, cross_entropy.cross_entropy_forward,
                                      cross_entropy.cross_entropy_backward)),
    "lora": Base(("lora_linear",), (operators._lora, lora_linear.lora_forward, lora_linear.lora_backward)),
}


class Edit(NamedTuple):
    """Changed code."""
    base: str                 # key of BASES
    changes: tuple            # (words as they are, words in their place), ...
    chunk: int = 64


def _edit(base):
    return lambda *changes: Edit(base, changes)


rule, chunks, wy_form, conv, gate, l2, rms, gated_rms, rotary, attention, loss, lora = map(_edit, BASES)


def tokens(*changes):
    """The chunked form in chunks of one token: the recurrence by other words."""
    return Edit("chunks", changes, chunk=1)


def becomes(words, **arrays):
    """These words with arrays of x changed: becomes(CALL, k=UNIT) normalises x["k"]."""
    wrong = words
    for name, text in arrays.items():
        wrong = wrong.replace(f'x["{name}"]', text.format(f'x["{name}"]'))
    return words, wrong


def put(words, text):
    """These words, the value of `name = value` changed: put(WRITE, "bfloat16({0})") rounds the state."""
    name, _, value = words.partition(" = ")
    return words, f"{name} = {text.format(f'({value})')}"


def swap(words, part, other=""):
    """These words with another part, or without it."""
    return words, words.replace(part, other)


@functools.lru_cache(None)
def made(edit):
    """The changed code as a function, inputs -> {output or gradient: array}; ValueError for words not found once."""
    base = BASES[edit.base]
    changes = (*base.changes, *edit.changes, (base.chunk, base.chunk.replace("64", str(edit.chunk)) + " "))
    source = "\n".join(inspect.getsource(function) for function in base.functions)
    for right, wrong in changes if base.chunk else changes[:-1]:
        if source.count(right) != 1 or right == wrong:
            raise ValueError(f"{edit.base} has {right!r} {source.count(right)} times, and it becomes {wrong!r}")
        source = source.replace(right, wrong)
    names = {"bfloat16": bfloat16, "tf32": tf32, "inverse_by_squaring": inverse_by_squaring}
    for function in base.functions:
        names |= function.__globals__
    exec(compile(source, f"<{edit.base}, changed>", "exec"), names)
    names["ops"] = names["gdr"] = SimpleNamespace(**vars(ops) | names)
    return names[base.functions[0].__name__]


def tf32(x):
    """Rounded to 10 bits after the leading one, as tensor cores do with float32 operands: nearest, ties away."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


def inverse_by_squaring(A, C):
    """(I + A)^-1 of a strictly lower A as (I - A) (I + A^2) (I + A^4) ..., exact with powers up to C >= rows of A.

    Where keys repeat, the powers grow like binomials, and their difference keeps no digit.
    """
    eye = np.eye(A.shape[-1], dtype=A.dtype)
    T, power, n = eye - A, A @ A, 2
    while n < C:
        T, power, n = T @ (eye + power), power @ power, 2 * n
    return T


class Mistake(NamedTuple):
    """A known mistake and two independent ways to make it, at another site, in another form, or of another size."""
    bug: int                  # number in catalogue.py
    title: str
    a: Edit
    b: Edit
    by: str = "value"         # "value": whoever makes it gets these numbers; "size": only errors as large as these
