"""An operator written as named equations, any of which can be replaced.

The arguments of an equation name the values it needs: inputs, or the results of equations before it. So a form reads
like its derivation, and a known mistake is data: the name of a step and another equation for it. The replacement may
take the correct value of the step it replaces, again by name:

    NORM = steps(r=lambda x, eps: 1 / np.sqrt((x * x).sum(-1, keepdims=True) + eps),
                 y=lambda x, r: x * r)
    evaluate(NORM, {"x": x, "eps": 1e-6}, steps(r=lambda r: bfloat16(r)))["y"]
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple


class Step(NamedTuple):
    """One equation."""

    function: Callable
    takes: tuple  # names of its arguments


def steps(**equations: Callable) -> dict[str, Step]:
    """name=function -> name: Step, in this order; the parameters of a function name the values it takes."""
    return {name: Step(function, tuple(inspect.signature(function).parameters)) for name, function in equations.items()}


def evaluate(equations: dict[str, Step], values: dict, changes: dict[str, Step]) -> dict:
    """Add the result of each equation to values and return values; changes replace equations of the same name."""
    for name, (function, takes) in equations.items():
        change = changes.get(name)
        if change is not None:
            if name in change.takes:
                values[name] = function(*[values[argument] for argument in takes])
            function, takes = change
        values[name] = function(*[values[argument] for argument in takes])
    return values


def changed(values: dict, changes: dict[str, Step], **context) -> dict:
    """Copy of values with the changes to them; each takes its arguments from values as they are, then from context."""
    known = context | values
    return values | {
        name: change.function(*[known[argument] for argument in change.takes])
        for name, change in changes.items()
        if name in values
    }


class Form(NamedTuple):
    """An operator whose equations are evaluated once; results have the names of its outputs and gradients."""

    forward: dict[str, Step]
    backward: dict[str, Step]
    defaults: dict = {}  # inputs that a case may lack

    def run(self, x: dict, changes: dict[str, Step], gradients: bool) -> dict:
        """All values by name, those of the backward equations only with gradients."""
        values = evaluate(self.forward, changed(self.defaults | x, changes), changes)
        return evaluate(self.backward, values, changes) if gradients else values

    def names(self) -> set[str]:
        """What can be changed besides a case's inputs."""
        return {*self.defaults, *self.forward, *self.backward}
