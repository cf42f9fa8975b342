"""Every operator of the conformance kit, computed by the CUDA kernels: outputs and gradients pass as any
implementation's would. The delta rule by `check` itself, in both dtypes; the others in float32 by their references in
the kit, with the backend's operators in place of ops; bfloat16 is judged in the operators' own tests.
"""

from unittest.mock import patch

import numpy as np
import pytest

from deltanet_ref.backends import get_backend
from deltanet_ref.cli.main import main
from deltanet_ref.oracle import operators
from deltanet_ref.oracle.cases import CASES, make_inputs
from deltanet_ref.oracle.compare import compare_case
from deltanet_ref.oracle.expected import expected
from deltanet_ref.oracle.operators import OPERATORS

OTHERS = [case for case in CASES.values() if case.group not in ("delta", "packed", "step", "model")]


@pytest.fixture(scope="module")
def backend():
    return get_backend("cuda-emulated")


class Uploading:
    """The backend's operators for arrays of the host, which are uploaded; results stay on the device."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        function = getattr(self.backend, name)

        def call(*arguments, **options):
            found = function(*map(self.upload, arguments), **{key: self.upload(x) for key, x in options.items()})
            return self.backend.to_host(found) if name == "cross_entropy_backward" else self.first_to_host(name, found)

        return call

    def first_to_host(self, name, found):
        """The loss as the reference of cross_entropy wants it."""
        return (self.backend.to_host(found[0]), found[1]) if name == "cross_entropy_forward" else found

    def upload(self, x):
        if isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.ndim:
            return self.backend.xp.asarray(x)
        if isinstance(x, list | tuple):
            parts = [self.upload(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
        return x


def compare(case, backend, outputs, gradients=True):
    outputs = {name: backend.to_host(x) for name, x in outputs.items()}
    result = compare_case(case, expected(case), outputs, dtype="float32", gradients=gradients)
    wrong = {name: stage for name, stage in result.stages.items() if stage.status != "ok"}
    assert result.status == "ok", f"{case.id}: {wrong}"


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.id)
def test_operators_pass_the_kit(backend, case):
    with patch.object(operators, "ops", Uploading(backend)):
        outputs = OPERATORS[case.op].reference(make_inputs(case))
    compare(case, backend, outputs)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.group == "step"], ids=lambda case: case.id)
def test_the_step_passes_the_kit(backend, case):
    x, up = make_inputs(case), backend.xp.asarray
    arrays = (up(x[name]) for name in ("q", "k", "v"))
    o, S = backend.gated_delta_rule_step(
        *arrays, g=up(x["g"]), beta=up(x["beta"]), S=up(x["S0"]), scale=x["scale"],
        head_order=case.options.get("head_order", "grouped"),
    )  # fmt: skip
    compare(case, backend, {"o": o, "S_end": S}, gradients=False)


def test_a_wrong_operator_is_noticed(backend):
    class Wrong(Uploading):
        def rope_forward(self, x, cos, sin):
            return self.backend.rope_forward(self.upload(x), self.upload(sin), self.upload(cos))

    case = next(case for case in OTHERS if case.op == "rope")
    with patch.object(operators, "ops", Wrong(backend)):
        outputs = OPERATORS[case.op].reference(make_inputs(case))
    with pytest.raises(AssertionError, match="rope/"):
        compare(case, backend, outputs)


@pytest.mark.parametrize("dtype, suffix", [("float32", ""), ("bfloat16", "_bfloat16")])
def test_check_passes_the_delta_rule(dtype, suffix, capsys):
    functions = [f"tests.cuda.kit:{name}{suffix}" for name in ("forward", "backward")]
    status = main(["check", functions[0], "--backward", functions[1], "--packed", "--dtype", dtype])
    assert status == 0, capsys.readouterr().out
