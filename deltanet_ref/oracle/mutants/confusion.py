"""How well suspects.py distinguishes the mistakes: the kit judges every mutant, and ranks it by the other realisation.

So no mutant is compared with itself. The cases have other seeds than the vectors, and the delta rule another layout.
"""
from dataclasses import replace
from typing import NamedTuple

from deltanet_ref.oracle.cases import CASES
from deltanet_ref.oracle.check import examine
from deltanet_ref.oracle.layouts import Layout, make_layout
from deltanet_ref.oracle.mutants import BACKWARD, FORWARD, answers
from deltanet_ref.oracle.mutants.mutations import Mistake
from deltanet_ref.oracle.operators import OPERATORS
from deltanet_ref.oracle.runners import Answer
from deltanet_ref.oracle.suspects import rank

TURNED = make_layout(state="vk", order="head")
TOKENS = 80                   # longer cases of the delta rule run only if they are listed in LONG
LONG = ("delta/three-chunks-state", "delta/everything", "packed/ragged")
NEW_SEED = 100_003            # added to the seeds of the vectors


class Mutant:
    """A runner (runners.py) with a mutant as the implementation. gradients: whether it has a backward."""

    def __init__(self, mutation, gradients):
        self.mutation, self.gradients = mutation, gradients
        self.provenance = f"a mutant of {mutation.form}"

    def run(self, case, inputs, layout):
        """The mutant's Answer to a case."""
        y = answers(self.mutation, case, _turned(inputs, layout), self.gradients)
        op = OPERATORS[case.op]
        names = op.outputs | op.gradients if self.gradients else op.outputs
        return Answer(_turned({name: y[name] for name in names}, layout))


def _turned(arrays, layout):
    """From the kit's own layout to TURNED, and back."""
    if layout == Layout():
        return arrays
    states, others = ("S0", "S_end", "dS0", "dS_end"), ("scale", "cu_seqlens")
    return {name: x if name in others else x.swapaxes(2, 3) if name in states else x.swapaxes(1, 2)
            for name, x in arrays.items()}


class Trial(NamedTuple):
    """How the kit judged one mutant."""
    mistake: Mistake
    realisation: str          # "a" or "b", of the mutant; it was ranked by the other one
    failed: int               # number of cases
    suspects: list            # as rank returns them

    @property
    def place(self) -> int | None:
        """1 if the true number is the first suspect; None if it is not among them."""
        bugs = [bug for bug, _, _ in self.suspects]
        return bugs.index(self.mistake.bug) + 1 if self.mistake.bug in bugs else None


def cases_for(op: str) -> list:
    """The cases at other seeds that mutants of this operator run on."""
    return [replace(case, seed=case.seed + NEW_SEED) for case in CASES.values()
            if case.op == op and (case.sizes.get("L", 1) <= TOKENS or case.id in LONG)]


def trial(mistake: Mistake, realisation: str) -> Trial:
    """Judge one mutant and rank its suspects."""
    mutation = getattr(mistake, realisation)
    op = mutation.ops[0]
    report = examine(Mutant(mutation, mistake in BACKWARD), cases_for(op), dtype="float32",
                     layout=TURNED if op == "gated_delta_rule" else Layout())
    return Trial(mistake, realisation, len(report.failed), rank(report, "b" if realisation == "a" else "a"))


def main():
    """Print a line for every mutant, then the totals."""
    trials = []
    for mistake in FORWARD + BACKWARD:
        for realisation in "ab":
            trials.append(trial(mistake, realisation))
            print(row(trials[-1]), flush=True)
    print(f"\n{len(FORWARD) + len(BACKWARD)} mistakes, {len(BACKWARD)} of them in the backward; "
          f"{sum(t.failed > 0 for t in trials)} of {len(trials)} mutants caught; the true number is first for "
          f"{sum(t.place == 1 for t in trials)}, among the first three for {sum((t.place or 9) <= 3 for t in trials)}")


def row(trial):
    """One line of the table."""
    others = "  ".join(f"#{bug} {score:.2f}" for bug, _, score in trial.suspects[:3])
    return (f"#{trial.mistake.bug:<3}{trial.realisation}  {trial.mistake.title:66.66} {trial.failed:3} fail  "
            f"{trial.place or '-':>2}  {others}")
