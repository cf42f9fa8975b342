"""The catalogue as code: every known mistake that an operator can have, as a change of correct code, in two ways.

FORWARD spoils outputs, BACKWARD gradients alone. `python -m deltanet_ref.oracle.mutants` puts every mutant to the kit
and prints which mistakes suspects.py takes it for.
"""
import numpy as np

from deltanet_ref.oracle.mutants import delta_rule, other_operators
from deltanet_ref.oracle.mutants.edits import BASES, made

FORWARD = delta_rule.FORWARD + other_operators.FORWARD
BACKWARD = delta_rule.BACKWARD + other_operators.BACKWARD


def answers(edit, case, x):
    """{output or gradient: array} of a mutant on the inputs x of a case."""
    with np.errstate(all="ignore"):
        if case.op != "gated_delta_rule_step":
            return made(edit)(x)
        tokens = {name: x[name][:, None] for name in ("q", "k", "v", "g", "beta", "do")}
        y = made(edit)(x | tokens)
        return {name: value if name in ("S_end", "dS0") else value[:, 0] for name, value in y.items()}


def mistakes_of(op):
    """(FORWARD, BACKWARD) of one operator."""
    return tuple([mistake for mistake in table if op in BASES[mistake.a.base].ops] for table in (FORWARD, BACKWARD))
