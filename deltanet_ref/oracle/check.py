"""Cases put to an implementation, and the verdict: what passes, what fails first, which flags, which known mistake.

    report = judge(forward, backward)             # NumPy callables, as DESIGN section 5 describes them
"""
from dataclasses import dataclass, field
from typing import NamedTuple

from deltanet_ref.oracle.cases import make_inputs, select
from deltanet_ref.oracle.compare import CaseResult, compare_case, pipeline
from deltanet_ref.oracle.layouts import Layout, cannot_express, put, take
from deltanet_ref.oracle.make_vectors import VERSION
from deltanet_ref.oracle.noise import FACTOR
from deltanet_ref.oracle.operators import OPERATORS
from deltanet_ref.oracle.runners import Callables

FAILED, BROKEN = ("DIFF", "SHAPE", "MISSING", "NONFINITE"), ("ERROR", "TIMEOUT")


class FlagVerdict(NamedTuple):
    """How the cases of a flag fare beside those without it."""
    flag: str
    failed: int
    cases: int
    failed_without: int
    cases_without: int


@dataclass
class Report:
    cases: list = field(repr=False)   # of CaseResult, in the order of the table
    dtype: str
    gradients: bool           # whether they were judged
    provenance: str           # what answered, and on which device
    layout: Layout            # of the implementation
    _suspects: list = field(default=None, repr=False)

    @property
    def failed(self):
        """Cases with a wrong answer or none."""
        return [result for result in self.cases if result.status in FAILED + BROKEN]

    def count(self, *statuses):
        return sum(result.status in statuses for result in self.cases)

    @property
    def ok(self):
        """Nothing failed and something passed."""
        return not self.failed and self.count("ok") > 0

    @property
    def suspects(self):
        """[(number in catalogue.py, title, score)], the likeliest first; empty when nothing failed or nothing fits."""
        from deltanet_ref.oracle import suspects

        if self._suspects is None:
            self._suspects = suspects.rank(self) if self.failed else []
        return self._suspects

    def flags(self):
        """The flags that fail clearly more often than the cases without them, the clearest first.

        bf16-inputs is left out: it says what a case can be put to, not what it brings out. Cases without an answer are.
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

    def first_stage(self):
        """(output, CaseResult): of all that is wrong anywhere the first in pipeline order, and the simplest such case."""
        wrong = [(result.first_bad["output"], result) for result in self.cases if result.first_bad]
        return min(wrong, key=lambda stage: pipeline(stage[1].case.op).index(stage[0]), default=None)

    def summary(self):
        """One line: what passed, at which precision, which kit, and what really ran."""
        from deltanet_ref.version import __version__

        what = "forward and backward" if self.gradients else "forward only"
        counts = [f"{self.count('ok')} of {len(self.cases)} cases pass"]
        counts += [f"{n} {word}" for n, word in ((self.count(*FAILED), "fail"), (self.count(*BROKEN), "end in error"),
                                                 (self.count("SKIP"), "skipped")) if n]
        return (f"{', '.join(counts)}; {what} at {self.dtype}; deltanet_ref {__version__}, vectors {VERSION}; "
                f"ran {self.provenance}")

    def as_json(self):
        """The form that DESIGN section 5 fixes, with more beside it; numbers that are not finite are null."""
        suspects = [{"bug": bug, "title": title, "score": score} for bug, title, score in self.suspects]
        stage = self.first_stage()
        return {"summary": {"passed": self.count("ok"), "failed": self.count(*FAILED), "skipped": self.count("SKIP"),
                            "errors": self.count(*BROKEN), "suspects": suspects, "dtype": self.dtype,
                            "factor": FACTOR[self.dtype], "gradients": self.gradients, "vectors": VERSION,
                            "provenance": self.provenance,
                            "first_stage": stage and {"output": stage[0], "case": stage[1].case.id},
                            "flags": [verdict._asdict() for verdict in self.flags()]},
                "cases": [_case_json(result) for result in self.cases]}


def _case_json(result):
    stages = {name: {"status": stage.status, "error": stage.error if abs(stage.error) < float("inf") else None}
              for name, stage in result.stages.items()}
    return {"id": result.case.id, "status": result.status, "flags": list(result.case.flags),
            "first_bad": result.first_bad, "message": explanation(result), "stages": stages}


def explanation(result):
    """Why a case has its status, where a sentence says more than the numbers."""
    return result.message or next((stage.message for stage in result.stages.values() if stage.message), "")


def judge(forward, backward=None, *, cases=None, dtype="float32", layout=None, array="numpy", device=None):
    """Put the cases to Python callables in this process; Report.

    forward   forward(q, k, v, *, g, beta, S0, scale) -> (o, S_end[, dict of intermediates])
    backward  backward(q, k, v, *, g, beta, S0, scale, do, dS_end) -> (dq, dk, dv, dg, dbeta, dS0), "autograd", or None
    cases     list of Case; None for the dense cases of the delta rule. Other operators: see operators.py
    dtype     float32, bfloat16 or float64
    layout    layouts.Layout, None for the kit's own
    """
    runner = Callables(forward, backward, array=array, device=device, dtype=dtype)
    return examine(runner, select(dtype=dtype) if cases is None else cases, dtype=dtype, layout=layout or Layout(),
                   gradients=backward is not None)


def examine(runner, cases, *, dtype, layout, gradients=None, progress=lambda case: None):
    """Report of a runner (runners.py) on the cases.

    gradients  whether they are judged; None: when an answer of any case has one
    progress   called with each case before it runs
    """
    results, answered, devices = {}, {}, set()
    for case in cases:
        progress(case)
        reason = cannot_express(layout, case, make_inputs(case))
        if dtype == "bfloat16" and not case.bf16:
            reason = "its inputs are no bfloat16 numbers"
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
        gradients = any(OPERATORS[case.op].gradients.keys() & answered[case.id][1].keys()
                        for case in cases if case.id in answered)
    for case in cases:
        if case.id in answered:
            right, outputs = answered[case.id]
            results[case.id] = compare_case(case, right, outputs, dtype=dtype, gradients=gradients)
    device = " and ".join(sorted(devices - {""}))
    return Report([results[case.id] for case in cases], dtype, gradients,
                  runner.provenance + (f" with {device}" if device else ""), layout)
