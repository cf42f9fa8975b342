"""The oracle and its peers torch and HF: their functions raise no alarm, their autograd agrees with our gradients."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import deltanet_ref.oracle
from deltanet_ref.cli.main import main
from deltanet_ref.oracle.cases import CASES, select
from deltanet_ref.oracle.check import judge
from deltanet_ref.oracle.layouts import make_layout

HF = "transformers.models.qwen3_5.modeling_qwen3_5"
EXAMPLE = Path(deltanet_ref.oracle.__file__).parent / "examples" / "delta_rule_torch.py"
SHORT = [case for case in select() if "long" not in case.flags]


def check(capsys, *words):
    capsys.readouterr()
    status = main(["check", *map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("function", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hf_functions_raise_no_alarm(capsys, function, dtype):
    status, report = check(
        capsys,
        f"{HF}:{function}",
        "--layout",
        "hf",
        "--backward",
        "autograd",
        "--dtype",
        dtype,
        "--timeout",
        120,
        "--cases",
        "delta/[!l]*",
    )
    assert status == 0, [
        (case["id"], case["status"], case["first_bad"], case["message"])
        for case in report["cases"]
        if case["status"] not in ("ok", "SKIP")
    ]
    assert {case["id"] for case in report["cases"] if case["status"] == "SKIP"} == {
        "delta/hand",
        "delta/scale-one",
        "delta/scale-other",
        "delta/everything",
    }
    assert function in report["summary"]["provenance"] and "torch" in report["summary"]["provenance"]


def test_hf_functions_pass_a_long_case_forward(capsys):
    status, report = check(
        capsys, f"{HF}:torch_chunk_gated_delta_rule", "--layout", "hf", "--cases", "delta/long*", "--timeout", 120
    )
    assert status == 0 and report["summary"]["passed"] == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_torch_example_passes(capsys, dtype):
    status, report = check(
        capsys,
        f"{EXAMPLE}:delta_rule",
        "--layout",
        "fla",
        "--backward",
        "autograd",
        "--dtype",
        dtype,
        "--timeout",
        120,
        "--cases",
        "delta/[!lr]*",
    )
    assert status == 0 and report["summary"]["failed"] == 0 and report["summary"]["passed"] > 25


def in_float64(q, k, v, *, g, beta, S0, scale):
    """The rule for torch autograd, in the dtype of its arguments."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    S, o = S0, []
    for t in range(v.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        u = beta[:, t, :, None] * (v[:, t] - (k[:, t, :, None] @ S)[:, :, 0])
        S = S + k[:, t][..., None] * u[:, :, None]
        o.append(scale * (q[:, t, :, None] @ S)[:, :, 0])
    return torch.stack(o, 1), S


def test_expected_values_equal_torch_autograd_in_float64():
    """At float64 the kit's tolerance is 16 times float64's own noise: about 1e-15 of the terms."""
    report = judge(in_float64, "autograd", cases=SHORT, dtype="float64", array="torch")
    assert report.ok, [(result.case.id, result.first_bad) for result in report.failed]
    assert report.count("ok") == len(SHORT) and report.gradients


def conv(x, w, *, state, cu_seqlens=None):
    starts = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    y, ends = [], []
    for n, (a, b) in enumerate(zip(starts, starts[1:])):
        padded = torch.cat([state if cu_seqlens is None else state[n : n + 1], x[:, a:b]], 1)
        y.append(F.silu(F.conv1d(padded.mT, w[:, None], groups=len(w))).mT)
        ends.append(padded[:, padded.shape[1] - (w.shape[1] - 1) :])
    return torch.cat(y, 1), torch.cat(ends)


def attention(q, k, v, gate, *, scale):
    group, past = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    visible = torch.ones(q.shape[1], k.shape[2], dtype=torch.bool).tril(past)
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible, scale=scale).transpose(1, 2)
    return o * torch.sigmoid(gate)


TORCH = {
    "causal_conv1d": conv,
    "decay_gate": lambda a, b, A_log, dt_bias: (-A_log.exp() * F.softplus(a + dt_bias, threshold=1e9), b.sigmoid()),
    "l2_norm": lambda x, *, eps: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps),
    "rms_norm": lambda x, w, *, eps: F.rms_norm(x, w.shape, w, eps),
    "gated_rms_norm": lambda x, z, w, *, eps: F.rms_norm(x, w.shape, w, eps) * F.silu(z),
    "gated_attention": attention,
    "cross_entropy": lambda logits, labels: torch.nan_to_num(F.cross_entropy(logits, labels)),
    "lora_linear": lambda x, w, a, b, *, scale: F.linear(x, w) + scale * F.linear(F.linear(x, a), b),
}


@pytest.mark.parametrize("op", TORCH)
def test_the_other_operators_equal_torch_in_float64_gradients_too(op):
    cases = [case for case in CASES.values() if case.op == op]
    report = judge(TORCH[op], "autograd", cases=cases, dtype="float64", array="torch")
    assert report.ok and report.gradients, [(r.case.id, r.first_bad, r.message) for r in report.failed]


def test_a_detached_state_is_found_through_autograd():
    """The commonest torch mistake: S0 without a gradient, and a final state without one."""

    def detached(q, k, v, **options):
        return in_float64(q, k, v, **options | {"S0": options["S0"].detach()})

    report = judge(detached, "autograd", cases=SHORT, dtype="float64", array="torch")
    assert {result.first_bad["output"] for result in report.failed} == {"dS0"}
    report = judge(
        lambda *a, **k: (in_float64(*a, **k)[0], in_float64(*a, **k)[1].detach()),
        "autograd",
        cases=[CASES["delta/final-state-only"], CASES["delta/plain"]],
        dtype="float64",
        array="torch",
    )
    assert [result.status for result in report.cases] == ["DIFF", "ok"]


def test_a_layout_of_torch_functions_finds_out_that_they_take_tensors(capsys):
    """--layout fla without --array: torch, because the callable's module uses it."""
    status, report = check(capsys, f"{EXAMPLE}:delta_rule", "--layout", "fla", "--cases", "delta/plain")
    assert status == 0 and "torch" in report["summary"]["provenance"]
    assert judge(in_float64, cases=[CASES["delta/plain"]], array="torch", layout=make_layout()).ok
