"""deltanet-ref check: no alarm on correct implementations in any layout, and the right stage, case and place for the
mistakes planted in tests/oracle_kernels.py, which share no code with the catalogue."""

import functools
import json

import numpy as np
import pytest

from deltanet_ref.cli.main import main
from deltanet_ref.errors import InputError
from deltanet_ref.ops import gated_delta_rule as gdr
from deltanet_ref.oracle.cases import CASES, bfloat16, make_inputs, select
from deltanet_ref.oracle.check import judge
from deltanet_ref.oracle.chunk_by_chunk import chunk_by_chunk
from deltanet_ref.oracle.layouts import SWITCHES, make_layout
from deltanet_ref.oracle.noise import FACTOR
from deltanet_ref.oracle.operators import OPERATORS
from tests.oracle_kernels import chunked_forward, loop_backward, loop_forward

DENSE = [case for case in select() if "long" not in case.flags]


def wrong(report):
    return {result.case.id.split("/")[1]: result.first_bad["output"] for result in report.failed}


# ---- correct implementations


def test_a_float32_loop_over_tokens_passes_dense_and_packed_cases():
    report = judge(loop_forward, loop_backward, cases=select(["delta"]))
    assert report.ok and report.count("ok") == len(report.cases) == len(select(["delta"]))
    assert judge(loop_forward, cases=select(["packed"])).ok


@pytest.mark.parametrize("chunk", [8, 20, 32, 64, 100])
def test_a_float32_chunked_form_of_any_chunk_passes_with_room(chunk):
    forward = functools.partial(chunked_forward, chunk=chunk)
    report = judge(lambda *a, **k: forward(*a, **k)[:2], cases=DENSE)
    assert report.ok
    assert max(stage.error for r in report.cases for stage in r.stages.values()) < FACTOR["float32"] / 2


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_engine_itself_passes_at_every_precision(dtype):
    def backward(q, k, v, *, g, beta, S0, scale, do, dS_end):
        cache = gdr.chunk_forward(q, k, v, g=g, beta=beta, S0=S0, scale=scale)[2]
        return gdr.chunk_backward(do, dS_end, cache)

    report = judge(gdr.chunk_forward, backward, cases=select(["delta"], dtype), dtype=dtype)
    assert report.ok and len(report.cases) > 40


def test_a_bfloat16_kernel_passes_at_bfloat16_and_fails_at_float32():
    """Operands of every product rounded to bfloat16, float32 sums and state, outputs rounded."""

    def kernel(*args, **options):
        o, S, _ = chunked_forward(*args, matrix=bfloat16, **options)
        return bfloat16(o), S

    report = judge(kernel, cases=DENSE, dtype="bfloat16")
    assert report.ok and report.count("SKIP") == 3, "those with full-precision inputs"
    assert not judge(kernel, cases=[CASES["delta/plain"]]).ok


def test_intermediates_are_judged_where_they_are_given():
    cases = [case for case in DENSE if "intermediates" in case.flags]
    report = judge(functools.partial(chunked_forward, chunk=64), cases=cases)
    assert report.ok
    assert all(list(r.stages) == ["gc", "A", "T", "U", "W", "S", "V_new", "o", "S_end"] for r in report.cases)


def test_every_other_operator_passes_its_own_reference():
    for case in CASES.values():
        op = OPERATORS[case.op]
        if case.group in ("delta", "packed", "model"):
            continue

        def answer(names, args, options, x=None):
            x = dict(zip(op.args, args)) | options
            for name in op.incoming:
                x.setdefault(name, make_inputs(case)[name])
            x.setdefault("sections", None)
            y = op.reference(x)
            return tuple(y[name] for name in names)

        report = judge(
            lambda *a, **k: answer(op.outputs, a, k), lambda *a, **k: answer(op.gradients, a, k), cases=[case]
        )
        assert report.ok, (case.id, report.cases[0])


# ---- correct implementations in other layouts


def in_layout(layout):
    """loop_forward and loop_backward seen from the other side of a layout's switches."""

    def inside(q, k, v, g, beta, S0, scale, do=None, dS_end=None):
        heads_first = layout.order == "head"
        if heads_first:
            q, k, v, g, beta, do = (x if x is None else x.swapaxes(1, 2) for x in (q, k, v, g, beta, do))
        if layout.state == "vk":
            S0, dS_end = (x if x is None else x.swapaxes(2, 3) for x in (S0, dS_end))
        given_g = g
        if layout.gate == "decay":
            with np.errstate(divide="ignore"):
                g = np.maximum(np.log(g), -700)
        if layout.scale == "fixed":
            scale = q.shape[3] ** -0.5
        if layout.scale == "none":
            scale = 1.0
        raw_q, raw_k = q, k
        if layout.l2norm == "inside":
            q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        H_k, H_v = k.shape[2], v.shape[2]
        to_grouped = np.arange(H_v).reshape(-1, H_k).T.ravel() if layout.heads == "tiled" else np.arange(H_v)
        back = np.argsort(to_grouped)
        args = (q, k, v[:, :, to_grouped])
        options = dict(g=g[:, :, to_grouped], beta=beta[:, :, to_grouped], S0=S0[:, to_grouped], scale=scale)
        if do is None:
            o, S = loop_forward(*args, **options)
            o, S = o[:, :, back], S[:, back]
            return (o.swapaxes(1, 2) if heads_first else o), (S.swapaxes(2, 3) if layout.state == "vk" else S)
        incoming = dict(do=do[:, :, to_grouped], dS_end=dS_end[:, to_grouped])
        dq, dk, dv, dg, dbeta, dS0 = loop_backward(*args, **options, **incoming)
        dv, dg, dbeta, dS0 = dv[:, :, back], dg[:, :, back], dbeta[:, :, back], dS0[:, back]
        if layout.l2norm == "inside":
            dq, dk = (through_norm(d, x) for d, x in ((dq, raw_q), (dk, raw_k)))
        if layout.gate == "decay":
            dg = dg.astype(np.float64) / np.maximum(given_g.astype(np.float64), 1e-300)
        gradients = [dq, dk, dv, dg, dbeta]
        if heads_first:
            gradients = [x.swapaxes(1, 2) for x in gradients]
        return *gradients, (dS0.swapaxes(2, 3) if layout.state == "vk" else dS0)

    def forward(q, k, v, *, g, beta, S0, scale=None):
        return inside(q, k, v, g, beta, S0, scale)

    def backward(q, k, v, *, g, beta, S0, do, dS_end, scale=None):
        return inside(q, k, v, g, beta, S0, scale, do, dS_end)

    return forward, backward


def through_norm(dy, x):
    r = 1 / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
    return r * (dy - x * r * (x * r * dy).sum(-1, keepdims=True))


SINGLE = [{switch: value} for switch, values in SWITCHES.items() for value in values if value != "repeated"]
COMBINED = dict(state="vk", heads="tiled", order="head", scale="none", l2norm="inside", gate="decay")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("switches", [*SINGLE, COMBINED], ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()))
def test_a_correct_implementation_in_another_layout_raises_no_alarm(switches, dtype):
    layout = make_layout(**switches)
    report = judge(*in_layout(layout), cases=DENSE, layout=layout, dtype=dtype)
    assert report.ok, wrong(report)
    skipped = {result.case.id for result in report.cases if result.status == "SKIP"}
    if layout.scale != "fixed":
        assert not skipped
    else:
        assert skipped == {"delta/hand", "delta/scale-one", "delta/scale-other", "delta/everything"}
        assert "d_k ** -0.5" in report.cases[[r.status for r in report.cases].index("SKIP")].message


def test_an_undeclared_layout_is_an_alarm():
    """Each switch changes something: the kernels of the layout fail when it is not declared."""
    for switch, values in SWITCHES.items():
        for value in list(values)[1:]:
            if value != "repeated":
                assert not judge(*in_layout(make_layout(**{switch: value})), cases=DENSE).ok, (switch, value)


def test_fla_and_hf_calls_are_made_as_those_libraries_define_them():
    def fla(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        assert output_final_state
        return loop_forward(q, k, v, g=g, beta=beta, S0=initial_state, scale=scale)

    def hf(query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False):
        assert output_final_state and query.shape[2] == value.shape[2]
        return loop_forward(query, key, value, g=g, beta=beta, S0=initial_state, scale=query.shape[3] ** -0.5)

    assert judge(fla, cases=DENSE, layout=make_layout("fla")).ok
    report = judge(hf, cases=DENSE, layout=make_layout("hf"))
    assert report.ok and report.count("SKIP") == 4


def test_argument_order_and_return_order_are_declared_in_words():
    def odd(beta, g, v, k, q, *, state, c):
        o, S = loop_forward(q, k, v, g=g, beta=beta, S0=state, scale=c)
        return S, "a note", o

    layout = make_layout(call="beta, g, v, k, q, state=S0, c=scale", returns="S_end, _, o")
    assert judge(odd, cases=DENSE[:9], layout=layout).ok
    with pytest.raises(InputError, match="initial"):
        judge(odd, cases=DENSE[:1], layout=make_layout(call="q, k, v, initial"))
    with pytest.raises(InputError, match="not a list of arguments"):
        make_layout(call="q, k, 3 +")


# ---- planted mistakes, forward: (mistake, first wrong output, a case that must fail, cases that must still pass)

FORWARD = [
    ("read before write", "o", "one-token", "beta-zero"),
    ("error before decay", "o", "one-token-state", "no-decay one-token hand"),
    ("row 0's state for every row", "o", "batch-rows", "initial-state plain ragged-65"),
    ("beta at most 1", "o", "beta-two", "beta-one plain"),
    ("keys normalised inside", "o", "unequal-keys", "beta-zero"),
    ("keys normalised inside, 0/0", "o", "zero-keys", "orthogonal-keys"),
    ("first head's decay for all", "o", "plain", "wide-heads one-token"),
    ("forgets at chunk borders", "o", "ragged-65", "ragged-64 plain beta-zero"),
    ("decay clamped", "o", "strong-decay-20", "plain no-decay three-chunks"),
    ("half precision state", "o", "wide-state", "hand"),
    ("tail of 16 not written", "o", "ragged-17", "ragged-16 ragged-32 ragged-128"),
    ("heads modulo", "o", "grouped-heads", "plain ragged-65 three-chunks"),
]


@pytest.mark.parametrize("mistake, output, fails, passes", FORWARD, ids=[row[0] for row in FORWARD])
def test_a_planted_forward_mistake_is_found(mistake, output, fails, passes):
    report = judge(functools.partial(loop_forward, mistake=mistake), cases=DENSE)
    found = wrong(report)
    assert found[fails] == output
    assert not found.keys() & set(passes.split())
    assert report.first_stage()[0] == output


def test_the_first_bad_place_of_a_forward_mistake_is_the_first_token_that_it_touches():
    def at(mistake, name):
        report = judge(functools.partial(loop_forward, mistake=mistake), cases=[CASES[f"delta/{name}"]])
        return report.cases[0].first_bad

    assert at("forgets at chunk borders", "ragged-129") == dict(output="o", sequence=0, chunk=1, token=64, head=0)
    assert at("tail of 16 not written", "ragged-33") == dict(output="o", sequence=0, chunk=0, token=32, head=0)
    assert at("row 0's state for every row", "batch-rows") == dict(output="o", sequence=1, chunk=0, token=0, head=0)
    assert at("heads modulo", "grouped-heads") == dict(output="o", sequence=0, chunk=0, token=0, head=1)
    assert at("first head's decay for all", "plain")["head"] == 1


CHUNKED = [
    ("A without Gamma", "A"),
    ("T = I - A", "T"),
    ("W without decay", "W"),
    ("0/1 mask", "o"),
    ("decay not carried", "S"),
    ("V_new plus W S", "V_new"),
]


@pytest.mark.parametrize("mistake, stage", CHUNKED, ids=[row[0] for row in CHUNKED])
def test_a_planted_mistake_of_the_chunked_form_is_found_at_its_stage(mistake, stage):
    forward = functools.partial(chunked_forward, chunk=64, mistake=mistake)
    result = judge(forward, cases=[CASES["delta/three-chunks-state"]]).cases[0]
    assert result.first_bad["output"] == stage
    if stage == "S":
        assert result.first_bad == dict(output="S", sequence=0, chunk=1, token=None, head=0)


# ---- planted mistakes, backward

BACKWARD = [
    ("dS_end ignored", "dv", "final-state-only", "plain initial-state ragged-64 three-chunks"),
    ("dq without scale", "dq", "plain", "scale-one hand"),
    ("dv without beta", "dv", "plain", "beta-one"),
    ("dbeta without the read", "dbeta", "plain", "one-token"),
    ("dk without the erased part", "dk", "plain", "one-token beta-zero"),
    ("dS not through the erased part", "dv", "plain", "beta-zero"),
    ("dg without the decay", "dg", "one-token-state", "no-decay one-token"),
    ("dS not decayed at chunk borders", "dv", "ragged-65", "no-decay"),
    ("dS0 lost", "dS0", "one-token", "strong-decay-120"),
    ("dg of the second row from the first", "dg", "batch-rows", "plain grouped-heads"),
    ("one value head per key head", "dq", "grouped-heads", "wide-heads"),
    ("dq and dk swapped", "dq", "plain", ""),
]


@pytest.mark.parametrize("mistake, output, fails, passes", BACKWARD, ids=[row[0] for row in BACKWARD])
def test_a_planted_backward_mistake_is_found(mistake, output, fails, passes):
    report = judge(loop_forward, functools.partial(loop_backward, mistake=mistake), cases=DENSE)
    found = wrong(report)
    assert found[fails] == output
    assert not found.keys() & set(passes.split())
    assert not set(found.values()) & {"o", "S_end"}, "the forward was right"


def test_a_wrong_forward_is_the_first_stage_even_where_the_simplest_case_has_only_wrong_gradients():
    """Without a state the decay of a single token changes nothing but dS0."""
    report = judge(
        lambda q, k, v, *, g, **options: loop_forward(q, k, v, g=g / 2, **options),
        lambda q, k, v, *, g, **options: loop_backward(q, k, v, g=g / 2, **options),
        cases=DENSE[:8],
    )
    assert report.failed[0].first_bad["output"] == "dS0"
    assert report.first_stage()[0] == "o"
    stage = report.as_json()["summary"]["first_stage"]
    assert stage["output"] == "o" and wrong(report)[stage["case"].split("/")[1]] == "o"


def test_gradients_of_what_is_constant_in_A_and_T_are_not_judged():
    def backward(*args, **options):
        x = dict(zip(("q", "k", "v"), args)) | options
        y = chunk_by_chunk(x)
        column, row = np.arange(64), (np.arange(x["v"].shape[1]) % 64)[:, None, None]
        garbled = {name: np.where(spoilt(column, row), np.float32(7), y[name]) for name in ("dT", "dA")}
        return *(y[name] for name in ("dq", "dk", "dv", "dg", "dbeta", "dS0")), garbled

    case = CASES["delta/three-chunks-state"]
    for harmless in np.greater, np.equal:
        spoilt = harmless
        assert judge(loop_forward, backward, cases=[case]).ok
    spoilt = np.less
    (result,) = judge(loop_forward, backward, cases=[case]).cases
    assert [name for name, stage in result.stages.items() if stage.status != "ok"] == ["dT", "dA"]


def test_the_first_bad_place_of_a_backward_mistake_is_the_last_token_that_it_touches():
    """The backward pass meets the last token first: a gradient lost at a border shows at the token before it."""
    backward = functools.partial(loop_backward, mistake="dS not decayed at chunk borders")
    result = judge(loop_forward, backward, cases=[CASES["delta/ragged-129"]]).cases[0]
    assert result.first_bad == dict(output="dv", sequence=0, chunk=1, token=127, head=0)


def test_tf32_and_a_bfloat16_state_are_caught_where_float32_is_claimed():
    def tf32(x):
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)

    report = judge(lambda *a, **k: chunked_forward(*a, matrix=tf32, **k)[:2], cases=DENSE)
    assert {"near-solution", "wide-state", "full-precision", "plain"} <= wrong(report).keys()
    report = judge(functools.partial(loop_forward, mistake="half precision state"), cases=select(["delta/long*"]))
    assert wrong(report).keys() == {"long", "long-wide-state"}


def test_flags_that_fail_are_those_of_the_mistake():
    report = judge(functools.partial(loop_forward, mistake="beta at most 1"), cases=DENSE)
    assert report.flags()[0].flag == "beta-2"
    report = judge(functools.partial(loop_forward, mistake="heads modulo"), cases=DENSE)
    assert {flag.flag for flag in report.flags()[:2]} == {"grouped-heads", "tiled-heads"}


# ---- answers of the wrong shape or dtype, missing answers, exceptions


def test_wrong_shapes_wrong_dtypes_and_missing_outputs_are_distinguished():
    cases = [CASES["delta/plain"], CASES["delta/batch-rows"]]

    def status(change, first_bad=True):
        result = judge(lambda *a, **k: change(*loop_forward(*a, **k)), cases=cases).cases[0]
        return result.status, first_bad and result.first_bad["output"], result

    assert status(lambda o, S: (o, S.swapaxes(2, 3)))[:2] == ("SHAPE", "S_end")
    stages = status(lambda o, S: (o, S.swapaxes(2, 3)))[2].stages
    assert stages["o"].status == "ok" and "must be (1, 2, 8, 4)" in stages["S_end"].message
    assert status(lambda o, S: (o,))[:2] == ("MISSING", "S_end")
    assert status(lambda o, S: o)[:2] == ("MISSING", "S_end")
    assert status(lambda o, S: (None, S))[:2] == ("MISSING", "o")
    assert status(lambda o, S: (o.astype(int), S))[:2] == ("SHAPE", "o")
    assert status(lambda o, S: (o.astype(complex), S))[:2] == ("SHAPE", "o")
    assert status(lambda o, S: (np.where(o == o[0, 3, 1, 2], np.nan, o), S))[:2] == ("NONFINITE", "o")
    assert status(lambda o, S: (np.where(o == o[0, 3, 1, 2], np.nan, o), S))[2].first_bad["token"] == 3
    assert status(lambda o, S: (o.astype(np.float64), S.astype(np.float64)), first_bad=None)[:2] == ("ok", None)


def test_objects_and_outputs_missing_everywhere_have_no_suspect():
    cases = DENSE[:9]
    report = judge(lambda *a, **k: (o for o in loop_forward(*a, **k)), cases=cases)
    assert {result.status for result in report.cases} == {"ERROR"} and report.suspects == []
    assert "not an array" in report.cases[0].message
    report = judge(lambda *a, **k: (None, loop_forward(*a, **k)[1]), cases=cases)
    assert {result.status for result in report.cases} == {"MISSING"} and report.suspects == []

    def other_slots(*args, **options):
        dq, dk, dv, *rest = loop_backward(*args, **options)
        return dv, dk, dq, *rest

    slots = judge(loop_forward, other_slots, cases=DENSE)
    assert slots.suspects[0][0] == 32
    without_dS0 = judge(loop_forward, lambda *a, **k: loop_backward(*a, **k)[:5], cases=DENSE)
    assert without_dS0.suspects[0][0] == 14


def test_an_exception_of_many_lines_is_one_line():
    def verbose(*args, **options):
        raise ValueError("first\n\n  second " + "and so on " * 100)

    message = judge(verbose, cases=DENSE[:1]).cases[0].message
    assert message.startswith("ValueError: first second and so on") and "\n" not in message and len(message) < 400


def test_a_callable_that_raises_costs_only_its_case():
    def picky(q, k, v, **options):
        if q.shape[1] == 64:
            raise ValueError("64 is not supported")
        return loop_forward(q, k, v, **options)

    report = judge(picky, cases=DENSE)
    assert {r.case.id for r in report.failed} == {"delta/ragged-64"}
    assert report.failed[0].status == "ERROR" and "64 is not supported" in report.failed[0].message
    assert report.count("ok") == len(DENSE) - 1


def test_arguments_may_be_overwritten():
    def destroys(q, k, v, *, g, beta, S0, scale):
        answer = loop_forward(q, k, v, g=g, beta=beta, S0=S0, scale=scale)
        for x in (q, k, v, g, beta, S0):
            x[:] = np.nan
        return answer

    assert judge(destroys, loop_backward, cases=DENSE[:6]).ok


# ---- the command line

KERNELS = "tests.oracle_kernels"


def command(capsys, *words):
    status = main(["check", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


def test_the_json_is_what_the_contract_says(capsys):
    status, report, _ = command(
        capsys, f"{KERNELS}:loop_forward", "--backward", f"{KERNELS}:loop_backward", "--cases", "delta/[a-p]*"
    )
    assert status == 0
    summary = report["summary"]
    assert summary["suspects"] == [] and summary["failed"] == summary["skipped"] == summary["errors"] == 0
    assert summary["passed"] == len(report["cases"]) > 10
    assert f"{KERNELS}.loop_forward" in summary["provenance"] and "numpy" in summary["provenance"]
    assert all(case["status"] == "ok" and case["first_bad"] is None and case["flags"] for case in report["cases"])


def test_a_failure_is_exit_status_1_and_names_the_place(capsys, tmp_path):
    (tmp_path / "kernel.py").write_text(
        "from tests.oracle_kernels import loop_forward\n"
        "def forward(*a, **k):\n    print('noise on stdout')\n"
        "    return loop_forward(*a, mistake='tail of 16 not written', **k)\n"
    )
    status, report, _ = command(capsys, f"{tmp_path}/kernel.py:forward", "--cases", "delta/ragged-1*")
    assert status == 1 and report["summary"]["failed"] == 4 and report["summary"]["passed"] == 2
    ragged_15 = next(case for case in report["cases"] if case["id"] == "delta/ragged-15")
    assert ragged_15["first_bad"] == dict(output="o", sequence=0, chunk=0, token=0, head=0)
    assert main(["check", f"{tmp_path}/kernel.py:forward", "--cases", "delta/ragged-1*"]) == 1
    out = capsys.readouterr().out
    assert "first wrong stage: o, in delta/ragged-15" in out
    assert "2 of 6 cases pass, 4 fail; forward only at float32" in out


def broken(*args, **options):
    raise LookupError("broken\nin the kit")


def test_an_error_while_ranking_suspects_is_exit_status_3_and_the_verdict_is_printed(capsys, tmp_path, monkeypatch):
    (tmp_path / "kernel.py").write_text(
        "from tests.oracle_kernels import loop_forward\n"
        "def forward(*a, **k):\n    return loop_forward(*a, mistake='tail of 16 not written', **k)\n"
    )
    monkeypatch.setattr("deltanet_ref.oracle.suspects.rank", broken)
    words = [f"{tmp_path}/kernel.py:forward", "--cases", "delta/ragged-1*"]
    assert main(["check", *words]) == 3
    out, err = capsys.readouterr()
    assert "first wrong stage: o, in delta/ragged-15" in out and "2 of 6 cases pass, 4 fail" in out
    assert "suspects could not be ranked" in out and "no known mistake" not in out
    line, rest = err.split("\n", 1)
    assert "while ranking suspects: LookupError: broken in the kit (test_oracle_check.py:" in line
    assert "not a verdict" in line and "report it" in line and rest.startswith("Traceback")
    status, report, err = command(capsys, *words)
    assert status == 3 and report["summary"]["failed"] == 4 and report["summary"]["suspects"] == []
    assert "ranking suspects" in report["summary"]["internal_error"]


@pytest.mark.parametrize(
    "broken_part, words",
    [
        ("deltanet_ref.oracle.check.compare_case", []),
        ("deltanet_ref.ops.gated_delta_rule.recurrent_forward", ["--scale", "none"]),  # which computes what is expected
    ],
)
def test_any_other_error_of_the_kit_is_exit_status_3_too(capsys, monkeypatch, broken_part, words):
    monkeypatch.setattr(broken_part, broken)
    status, report, err = command(capsys, f"{KERNELS}:loop_forward", "--cases", "delta/plain", *words)
    assert status == 3 and report is None
    assert "internal error of the conformance kit while checking: LookupError: broken in the kit" in err


def test_an_error_of_the_kit_in_the_worker_is_not_a_verdict_on_the_callable(capsys, tmp_path):
    (tmp_path / "kernel.py").write_text(
        "from deltanet_ref.oracle import runners\nrunners.OPERATORS = {}\ndef forward(*a, **k):\n    return None\n"
    )
    status, report, err = command(capsys, f"{tmp_path}/kernel.py:forward", "--cases", "delta/plain")
    assert status == 3 and report is None
    assert "while calling the implementation on delta/plain: KeyError" in err


def test_hanging_and_dying_callables_cost_only_their_case(capsys, tmp_path):
    """10 s are a thousand times what the other cases need, so that load does not make them late."""
    (tmp_path / "kernel.py").write_text(
        "import os, time\nfrom tests.oracle_kernels import loop_forward\n"
        "def forward(q, k, v, **o):\n"
        "    if q.shape[1] == 15: time.sleep(600)\n"
        "    if q.shape[1] == 16: os.abort()\n"
        "    if q.shape[1] == 17: os._exit(0)\n"
        "    return loop_forward(q, k, v, **o)\n"
    )
    status, report, _ = command(capsys, f"{tmp_path}/kernel.py:forward", "--timeout", 10, "--cases", "delta/ragged-1?")
    found = {case["id"].split("-")[1]: case["status"] for case in report["cases"]}
    assert status == 1
    assert {L: s for L, s in found.items() if s != "ok"} == {"15": "TIMEOUT", "16": "ERROR", "17": "ERROR"}
    assert "SIGABRT" in next(case["message"] for case in report["cases"] if case["id"].endswith("-16"))


@pytest.mark.parametrize(
    "words, says",
    [
        (["nowhere:forward"], "cannot be imported"),
        ([f"{KERNELS}:nothing"], "cannot be imported"),
        ([f"{KERNELS}:np"], "not a function"),
        (["loop_forward"], "module:function"),
        ([f"{KERNELS}:loop_forward", "--backward", "nowhere:b"], "cannot be imported"),
        ([f"{KERNELS}:loop_forward", "--backward", "autograd"], "needs a framework"),
        ([f"{KERNELS}:loop_forward", "--array", "cupy"], "--array cupy"),
        ([f"{KERNELS}:loop_forward", "--cases", "delta/none"], "no case matches"),
        ([f"{KERNELS}:loop_forward", "--call", "q, k,, v"], "not a list of arguments"),
        ([f"{KERNELS}:loop_forward", "--call", "q, k, v, gate=gate"], "'gate'"),
        ([f"{KERNELS}:loop_forward", "--returns", "S_end, final"], "has 'final'"),
        ([f"{KERNELS}:loop_forward", "--timeout", "0"], "--timeout"),
        ([f"{KERNELS}:loop_forward", "--layout", "nobody's"], "invalid choice"),
        ([], "give one of"),
        ([f"{KERNELS}:loop_forward", "--results", "here"], "give one of"),
        (["--exec", "cat"], "{in}"),
        (["--exec", "no-such-program {in} {out}"], "cannot be found"),
        (["--exec", f"{__file__} {{in}} {{out}}"], "chmod +x"),
        (["--exec", "cat '{in} {out}"], "No closing quotation"),
        ([f"{KERNELS}:loop_forward", "--timeout", "nan"], "--timeout"),
        (["--exec", "cat {in} {out}", "--backward", "autograd"], "--backward"),
        (["--results", "no-such-directory"], "is not a directory"),
    ],
)
def test_bad_usage_is_one_line_and_exit_status_2(capsys, words, says):
    status, report, err = command(capsys, *words)
    assert status == 2 and report is None
    assert says in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["check", "vectors"])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    help_text = capsys.readouterr().out
    assert end.value.code == 0 and f"deltanet-ref {command} " in help_text.split("examples:")[1]
    if command == "check":
        assert "3  an internal error of the kit" in help_text
