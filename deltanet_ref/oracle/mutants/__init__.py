"""The catalogue as code: every known mistake that an operator can have, as replaced equations, in two ways.

FORWARD changes outputs, BACKWARD gradients alone. `python -m deltanet_ref.oracle.mutants` runs every mutant through the
kit and prints which mistakes suspects.py takes it for.
"""
import numpy as np

from deltanet_ref.oracle.mutants import delta_rule, other_operators
from deltanet_ref.oracle.mutants.mutations import Mistake, Mutation

FORWARD = delta_rule.FORWARD + other_operators.FORWARD
BACKWARD = delta_rule.BACKWARD + other_operators.BACKWARD


def answers(mutation: Mutation, case, x: dict, gradients: bool) -> dict:
    """{output: array} of a mutant on the inputs x of a case, and its gradients if they are wanted."""
    with np.errstate(all="ignore"):
        if case.op != "gated_delta_rule_step":
            return mutation.run(x, gradients)
        tokens = {name: x[name][:, None] for name in ("q", "k", "v", "g", "beta", "do")}
        y = mutation.run(x | tokens, gradients)
        return {name: value if name in ("S_end", "dS0") else value[:, 0] for name, value in y.items()}


def mistakes_of(op: str) -> tuple[list[Mistake], list[Mistake]]:
    """(FORWARD, BACKWARD) of one operator."""
    return tuple([mistake for mistake in table if op in mistake.a.ops] for table in (FORWARD, BACKWARD))
