"""The gated delta rule as a walk over chunks, forward and back.

A form holds the equations of one chunk (steps.py); with chunks of one token it is the recurrence. The walk cuts
sequences into chunks, carries the state from chunk to chunk, and assembles the results.
"""

from typing import NamedTuple

import numpy as np

from deltanet_ref.notation import value_to_key_head
from deltanet_ref.oracle.steps import Step, changed, evaluate, steps


def unrounded(x):
    """x itself: the rounding of operands that are not rounded."""
    return x


def product(operand):
    """The matrix product with `operand` applied to both operands: the rounding of a tensor core."""
    return lambda a, b: operand(a) @ operand(b)


def sum_over_value_heads(key_head, H_k):
    """A function (B, L, H_v, d) -> (B, L, H_k, d): the sum over the value heads that read each key head."""

    def shared(rows):
        out = np.zeros((*rows.shape[:2], H_k, rows.shape[3]), rows.dtype)
        for h, key in enumerate(key_head):
            out[:, :, key] += rows[:, :, h]
        return out

    return shared


DEFAULTS = {"head_order": "grouped", "cu_seqlens": None, "operand": unrounded}

CALL = steps(  # once
    key_head=lambda q, v, head_order: value_to_key_head(q.shape[2], v.shape[2], head_order),
    q_rows=lambda q, key_head: q[:, :, key_head],  # (B, L, H_v, d_k)
    k_rows=lambda k, key_head: k[:, :, key_head],
    do_rows=lambda do, scale: scale * do,
    dot=lambda operand: product(operand),
    dot_back=lambda operand: product(operand),  # of the backward
    shared=lambda k, key_head: sum_over_value_heads(key_head, k.shape[2]),
)
FIRST = steps(S_first=lambda S0: S0)  # before each sequence; `previous`: the last state of the one before
LAST = steps(dS_last=lambda dS_end: dS_end)  # before its backward; `following`: dS0 of the sequence after it
DONE = steps(dS_first=lambda dS: dS)  # after its backward, with the values of its first chunk
ROWS = {"Q": "q_rows", "K": "k_rows", "V": "v", "G": "g", "Beta": "beta", "dO": "do_rows"}
RESULTS = ("o", "S_end", "dq", "dk", "dv", "dg", "dbeta", "dS0")


class DeltaForm(NamedTuple):
    """The equations of one chunk of C tokens; arrays (B, H_v, C, ...), states (B, H_v, d_k, d_v).

    They may take the inputs, the results of CALL, and
    carried    the state after the chunk before, or S_first
    S0, dS_end of this sequence
    n, at      the chunk's number in its sequence, and its first token
    start      the first token of the sequence
    chunk      the number of tokens of a full chunk
    full       whether this is one
    """

    forward: dict[str, Step]  # Q, K, V, G, Beta, carried -> Out and S_next, the state after the chunk
    backward: dict[str, Step]  # everything before, dO and dS_next -> dQ, dK, dV, dG, dBeta and dS
    padded: bool = False  # short chunks are filled up with rows of zeros: beta = 0 writes nothing, g = 0 keeps all
    chunk: int | None = None  # the only length of a chunk; None: any

    def run(self, x: dict, changes: dict[str, Step], gradients: bool, chunk: int = 64) -> dict:
        """o and S_end, and with gradients dq, dk, dv, dg, dbeta, dS0 in the shapes of their inputs."""
        return walk(self, x, changes, gradients, self.chunk or chunk)[0]

    def names(self) -> set[str]:
        """What can be changed besides a case's inputs."""
        return {*DEFAULTS, *CALL, *FIRST, *LAST, *DONE, *self.forward, *self.backward, *RESULTS}


def walk(form, x, changes, gradients, chunk):
    """The results of DeltaForm.run, and the list of all values of each chunk, sequence after sequence."""
    call = evaluate(CALL, changed(DEFAULTS | x, changes), changes)
    sequences, S_end, dS0 = [], [], []
    previous = following = None
    for state, start, stop in _sequences(call):
        here = call | {"S0": call["S0"][state], "dS_end": call["dS_end"][state], "chunk": chunk, "start": start}
        carried = evaluate(FIRST, here | {"previous": previous}, changes)["S_first"]
        chunks = []
        for n, at in enumerate(range(start, stop, chunk)):
            values = here | {"n": n, "at": at, "carried": carried, "full": at + chunk <= stop}
            for name, rows in ROWS.items():
                values[name] = _rows(call[rows], slice(at, min(at + chunk, stop)), chunk if form.padded else 0)
            carried = evaluate(form.forward, values, changes)["S_next"]
            chunks.append(values)
        previous = carried
        S_end.append(carried)
        sequences.append((here, chunks))
    every = [values for _, chunks in sequences for values in chunks]
    out = {"o": by_token(every, "Out", call), "S_end": np.concatenate(S_end)}
    if gradients:
        for here, chunks in reversed(sequences):
            carried = evaluate(LAST, here | {"following": following}, changes)["dS_last"]
            for values in reversed(chunks):
                values["dS_next"] = carried
                carried = evaluate(form.backward, values, changes)["dS"]
            following = evaluate(DONE, (chunks[0] if chunks else here) | {"dS": carried}, changes)["dS_first"]
            dS0.insert(0, following)
        out |= {name: call["shared"](by_token(every, rows, call)) for name, rows in (("dq", "dQ"), ("dk", "dK"))}
        out |= {name: by_token(every, rows, call) for name, rows in (("dv", "dV"), ("dg", "dG"), ("dbeta", "dBeta"))}
        out["dS0"] = np.concatenate(dS0)
    return changed(out, changes, **call), every


def _sequences(call):
    """(which states, first token, end) of each sequence; a dense batch goes all rows at once."""
    cu = call["cu_seqlens"]
    if cu is None:
        return [(slice(None), 0, call["v"].shape[1])]
    return [(slice(n, n + 1), int(start), int(stop)) for n, (start, stop) in enumerate(zip(cu, cu[1:]))]


def _rows(x, tokens, length):
    """(B, L, H, ...) -> (B, H, C, ...) for these tokens, with zeros up to at least `length` rows."""
    rows = x[:, tokens].swapaxes(1, 2)
    missing = length - rows.shape[2]
    return rows if missing <= 0 else np.pad(rows, [(0, missing if axis == 2 else 0) for axis in range(rows.ndim)])


def by_token(chunks, name, call):
    """A value of all chunks, (B, H, C, ...) each -> (B, L, H, ...) without padding."""
    rows = [values[name].swapaxes(1, 2) for values in chunks]
    ends = [*(values["at"] for values in chunks[1:]), call["v"].shape[1]]
    return np.concatenate([row[:, : end - values["at"]] for row, values, end in zip(rows, chunks, ends)], 1)
