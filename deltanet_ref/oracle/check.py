"""Run the cases on an implementation and report what passes, what fails first, which flags, which known mistakes.

report = judge(forward, backward)             # NumPy callables, as DESIGN section 5 describes them
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from deltanet_ref.oracle.cases import make_inputs, select
from deltanet_ref.oracle.compare import CaseResult, compare_case, pipeline
from deltanet_ref.oracle.layouts import Layout, cannot_express, put, take
from deltanet_ref.oracle.make_vectors import VERSION
from deltanet_ref.oracle.noise import FACTOR
from deltanet_ref.oracle.operators import OPERATORS
from deltanet_ref.oracle.runners import Callables
from deltanet_ref.version import __version__

FAILED, BROKEN = ("DIFF", "SHAPE", "MISSING", "NONFINITE"), ("ERROR", "TIMEOUT")


class FlagVerdict(NamedTuple):
    """How many cases with a flag fail, compared with the cases without it."""

    flag: str
    failed: int
    cases: int
    failed_without: int
    cases_without: int


@dataclass
class ConformanceReport:
    """The results of all cases, and what they say about the implementation."""

    cases: list = field(repr=False)  # of CaseResult, in the order of the table
    dtype: str
    gradients: bool  # whether they were judged
    provenance: str  # what ran, and on which device
    layout: Layout  # of the implementation
    _suspects: list = field(default=None, repr=False)

    @property
    def failed(self) -> list:
        """Results of the cases with a wrong answer or none."""
        return [result for result in self.cases if result.status in FAILED + BROKEN]

    def count(self, *statuses: str) -> int:
        """The number of cases with one of these statuses."""
        return sum(result.status in statuses for result in self.cases)

    @property
    def ok(self) -> bool:
        """Nothing failed and something passed."""
        return not self.failed and self.count("ok") > 0

    @property
    def suspects(self) -> list:
        """[(number in catalogue.py, title, score)], the likeliest first; empty if nothing failed or nothing fits."""
        if self._suspects is None and self.failed:
            from deltanet_ref.oracle import suspects

            self._suspects = suspects.rank(self)
        return self._suspects or []

    def without_suspects(self) -> "ConformanceReport":
        """The same results with no suspects, for when ranking them fails."""
        return replace(self, _suspects=[])

    def flags(self) -> list[FlagVerdict]:
        """The flags whose cases fail clearly more often than the others, the clearest first.

        bf16-inputs is left out: it says what a case is suitable for, not what it finds. Cases without an answer do not
        count.
        """
        judged = [result for result in self.cases if result.status in ("ok", *FAILED)]
        verdicts = []
        for flag in dict.fromkeys(flag for result in judged for flag in result.case.flags):
            inside = [result.status != "ok" for result in judged if flag in result.case.flags]
            outside = [result.status != "ok" for result in judged if flag not in result.case.flags]
            if any(inside) and outside and flag != "bf16-inputs":
                verdicts.append(FlagVerdict(flag, sum(inside), len(inside), sum(outside), len(outside)))

        def lift(v):
            return v.failed / v.cases - v.failed_without / v.cases_without

        return sorted((v for v in verdicts if lift(v) > 0.25), key=lift, reverse=True)

    def first_stage(self) -> tuple[str, CaseResult] | None:
        """(output, CaseResult): the wrong output that comes first in pipeline order, and the simplest case with it."""
        wrong = [(result.first_bad["output"], result) for result in self.cases if result.first_bad]
        return min(wrong, key=lambda stage: pipeline(stage[1].case.op).index(stage[0]), default=None)

    def summary(self) -> str:
        """One line: what passed, at which precision, the versions of the kit, and what ran."""

        what = "forward and backward" if self.gradients else "forward only"
        counts = [f"{self.count('ok')} of {len(self.cases)} cases pass"]
        counts += [
            f"{n} {word}"
            for n, word in (
                (self.count(*FAILED), "fail"),
                (self.count(*BROKEN), "end in error"),
                (self.count("SKIP"), "skipped"),
            )
            if n
        ]
        return (
            f"{', '.join(counts)}; {what} at {self.dtype}; deltanet_ref {__version__}, vectors {VERSION}; "
            f"ran {self.provenance}"
        )

    def as_json(self) -> dict:
        """The form that DESIGN section 5 fixes, with additions; numbers that are not finite are null."""
        suspects = [{"bug": bug, "title": title, "score": score} for bug, title, score in self.suspects]
        stage = self.first_stage()
        return {
            "summary": {
                "passed": self.count("ok"),
                "failed": self.count(*FAILED),
                "skipped": self.count("SKIP"),
                "errors": self.count(*BROKEN),
                "suspects": suspects,
                "dtype": self.dtype,
                "factor": FACTOR[self.dtype],
                "gradients": self.gradients,
                "vectors": VERSION,
                "provenance": self.provenance,
                "first_stage": stage and {"output": stage[0], "case": stage[1].case.id},
                "flags": [verdict._asdict() for verdict in self.flags()],
            },
            "cases": [_case_json(result) for result in self.cases],
        }


def _case_json(result):
    stages = {
        name: {"status": stage.status, "error": stage.error if abs(stage.error) < float("inf") else None}
        for name, stage in result.stages.items()
    }
    return {
        "id": result.case.id,
        "status": result.status,
        "flags": list(result.case.flags),
        "first_bad": result.first_bad,
        "message": explanation(result),
        "stages": stages,
    }


def explanation(result: CaseResult) -> str:
    """Why a case has its status, if words say more than the numbers; else an empty text."""
    return result.message or next((stage.message for stage in result.stages.values() if stage.message), "")


def judge(
    forward,
    backward=None,
    *,
    cases: list | None = None,
    dtype: str = "float32",
    layout: Layout | None = None,
    array: str = "numpy",
    device: str | None = None,
) -> ConformanceReport:
    """Run the cases on Python callables in this process.

    forward   forward(q, k, v, *, g, beta, S0, scale) -> (o, S_end[, dict of intermediates])
    backward  backward(q, k, v, *, g, beta, S0, scale, do, dS_end) -> (dq, dk, dv, dg, dbeta, dS0), "autograd", or None
    cases     list of Case; None for the dense cases of the delta rule. Other operators: see operators.py
    dtype     float32, bfloat16 or float64
    layout    layouts.Layout, None for the kit's own
    raises    InputError if the layout's calls do not fit the cases; what the callables raise is their result
    """
    runner = Callables(forward, backward, array=array, device=device, dtype=dtype)
    return examine(
        runner,
        select(dtype=dtype) if cases is None else cases,
        dtype=dtype,
        layout=layout or Layout(),
        gradients=backward is not None,
    )


def examine(
    runner, cases: list, *, dtype: str, layout: Layout, gradients: bool | None = None, progress=lambda case: None
) -> ConformanceReport:
    """Run the cases on a runner (runners.py).

    gradients  whether they are judged; None: if the answer to any case has one
    progress   called with each case before it runs
    """
    results, answered, devices = {}, {}, set()
    for case in cases:
        progress(case)
        reason = cannot_express(layout, case, make_inputs(case))
        if dtype == "bfloat16" and not case.bf16:
            reason = "its inputs are not bfloat16 numbers"
        if reason:
            results[case.id] = CaseResult(case, "SKIP", {}, {}, None, reason)
            continue
        inputs, right = put(layout, case)
        answer = runner.run(case, inputs, layout)
        if answer.outputs is None:
            results[case.id] = CaseResult(case, answer.status, {}, {}, right, answer.message)
        else:
            answered[case.id] = right, take(layout, case, answer.outputs)
            devices.add(answer.device)
    if gradients is None:
        gradients = any(
            OPERATORS[case.op].gradients.keys() & answered[case.id][1].keys() for case in cases if case.id in answered
        )
    for case in cases:
        if case.id in answered:
            right, outputs = answered[case.id]
            results[case.id] = compare_case(case, right, outputs, dtype=dtype, gradients=gradients)
    device = " and ".join(sorted(devices - {""}))
    return ConformanceReport(
        [results[case.id] for case in cases],
        dtype,
        gradients,
        runner.provenance + (f" with {device}" if device else ""),
        layout,
    )
