"""A mutant is a form with some equations replaced; a mistake is a title and two mutants that make it independently."""
import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deltanet_ref.oracle.mutants.forms import CHUNKED_FORMS, FORMS
from deltanet_ref.oracle.operators import OPERATORS
from deltanet_ref.oracle.steps import Step, steps


class Mutation(NamedTuple):
    """Replaced equations of a form."""
    form: str                 # key of FORMS
    changes: tuple = ()       # (name of an input, a step or a result, Step), ...
    chunk: int = 64           # tokens per chunk of CHUNKED_FORMS

    @property
    def ops(self) -> tuple:
        """The operators that the form computes."""
        return FORMS[self.form][1]

    @property
    def any_chunk(self) -> bool:
        """Whether the mistake can be made in chunks of another length."""
        return self.form in CHUNKED_FORMS and self.chunk > 1

    def run(self, x: dict, gradients: bool) -> dict:
        """What the mutant answers to inputs x: name -> array; gradients only if they are wanted."""
        options = {"chunk": self.chunk} if self.form in CHUNKED_FORMS else {}
        return FORMS[self.form][0].run(x, dict(self.changes), gradients, **options)


class Mistake(NamedTuple):
    """A known mistake and two independent ways to make it: in another form, in another step, or of another size."""
    bug: int                  # number in catalogue.py
    title: str
    a: Mutation
    b: Mutation
    by: str = "value"         # "value": both give the same numbers; "size": only errors of the same size


def mutations_of(form: str, chunk: int = 64) -> Callable[..., Mutation]:
    """A function that makes Mutations of a form: step=equation, ..., after groups of changes (each, without).

    It raises ValueError for a name that the form does not have, so that every change changes something.
    """
    known = FORMS[form][0].names().union(*({*op.args, *op.options, *op.incoming}
                                           for op in map(OPERATORS.get, FORMS[form][1])))

    def mutation(*groups: dict, **equations: Callable) -> Mutation:
        changes = functools.reduce(operator.or_, groups, {}) | steps(**equations)
        if unknown := changes.keys() - known:
            raise ValueError(f"{form} has no {', '.join(sorted(unknown))}")
        return Mutation(form, tuple(changes.items()), chunk)
    return mutation


def each(function: Callable, *names: str, also: tuple = ()) -> dict[str, Step]:
    """The same change to several values: function(value, *also)."""
    return {name: Step(function, (name, *also)) for name in names}


def without(*names: str) -> dict[str, Step]:
    """These terms left out: zeros in their place."""
    return each(lambda x: 0 * x, *names)


rule, chunks, padded = (mutations_of(form) for form in ("rule", "chunks", "padded"))
tokens = mutations_of("chunks", chunk=1)       # the recurrence by other equations


def loop_and_chunks(*groups, **equations) -> tuple[Mutation, Mutation]:
    """The same change in the loop over tokens and in the chunked form."""
    return rule(*groups, **equations), chunks(*groups, **equations)


def both_chunked(*groups, **equations) -> tuple[Mutation, Mutation]:
    """The same change in both chunked forms."""
    return chunks(*groups, **equations), padded(*groups, **equations)


# ---- what happens to arrays in several mistakes

def float16(x):
    """Rounded to float16, held in float32."""
    return x.astype(np.float16).astype(np.float32)


def cut_to_bfloat16(x):
    """Cut, not rounded."""
    return (np.float32(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


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


def row_0_for_all(x):
    """The first row of the batch in place of every row."""
    return np.broadcast_to(x[:1], x.shape)


def row_0_alone(x):
    """Zeros in every row of the batch but the first."""
    return x * (np.arange(len(x)) == 0).reshape(-1, *(1,) * (x.ndim - 1))
