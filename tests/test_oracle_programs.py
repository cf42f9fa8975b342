"""check --exec and --results: programs in any language and files computed elsewhere, correct and broken."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import deltanet_ref.oracle
from deltanet_ref.cli.main import main
from deltanet_ref.oracle.cases import CASES, make_inputs, select
from deltanet_ref.oracle.exchange import FORMATS, read_answers, write_case
from deltanet_ref.oracle.expected import expected
from tests.oracle_kernels import loop_backward, loop_forward
from tests.tolerances import assert_identical

EXAMPLES = Path(deltanet_ref.oracle.__file__).parent / "examples"
NAMES = ("o", "S_end", "dq", "dk", "dv", "dg", "dbeta", "dS0")


def check(capsys, *words):
    capsys.readouterr()
    status = main(["check", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


@pytest.fixture(scope="module")
def c_program(tmp_path_factory):
    """The C example, compiled as the README says, with every warning an error."""
    program = tmp_path_factory.mktemp("c") / "delta_rule"
    subprocess.run(
        [
            shutil.which("cc") or "gcc",
            "-std=c99",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-O2",
            "-o",
            program,
            EXAMPLES / "delta_rule.c",
            "-lm",
        ],
        check=True,
    )
    return program


def test_the_c_example_passes_every_case_forward_and_backward(capsys, c_program):
    status, report, _ = check(capsys, "--exec", f"{c_program} {{in}} {{out}}")
    assert status == 0 and report["summary"]["passed"] == len(select()) and report["summary"]["gradients"]
    assert "sha256" in report["summary"]["provenance"]


def test_a_mistake_in_the_c_example_is_found(capsys, tmp_path):
    """Each edit makes one line of its source wrong, and names the output that must be reported first."""
    source = (EXAMPLES / "delta_rule.c").read_text()
    for right, wrong, output in (
        ("error[j] -= k[i] * S[i * s.dv + j];", "error[j] -= k[i] * S[i * s.dv + j] / decay;", "o"),
        ("dS[i * s.dv + j] *= decay;", "", "dv"),
        ("h / (s.H_v / s.H_k)", "h % s.H_k", "o"),
    ):
        assert source.count(right) == 1
        (tmp_path / "wrong.c").write_text(source.replace(right, wrong))
        subprocess.run(["cc", "-O2", "-o", tmp_path / "wrong", tmp_path / "wrong.c", "-lm"], check=True)
        status, report, _ = check(
            capsys, "--exec", f"{tmp_path / 'wrong'} {{in}} {{out}}", "--cases", "delta/grouped-heads", "delta/hand"
        )
        assert status == 1
        case = next(case for case in report["cases"] if case["id"] == "delta/grouped-heads")
        assert case["first_bad"]["output"] == output, wrong


def program(tmp_path, body, files="from deltanet_ref.oracle.exchange import read_answers, write_case"):
    """The command of a Python program that answers a case; `body` may change the answers `y`, or fail."""
    path = tmp_path / "program.py"
    path.write_text(
        textwrap.dedent("""
        import os, sys, time
        import numpy as np
        sys.path.insert(0, os.getcwd())
        FILES
        from tests.oracle_kernels import loop_backward, loop_forward
        x = read_answers(sys.argv[1])
        axes = {"g": 3, "beta": 3, "scale": 1}
        x = {name: a.reshape((1,) * (axes.get(name, 4) - a.ndim) + a.shape) for name, a in x.items()}
        scale = float(x.pop("scale")[0])
        d = {name: x.pop(name) for name in ("do", "dS_end")}
        args = [x.pop(name) for name in "qkv"]
        y = dict(zip(("o", "S_end"), loop_forward(*args, **x, scale=scale)))
        y |= dict(zip(("dq", "dk", "dv", "dg", "dbeta", "dS0"), loop_backward(*args, **x, scale=scale, **d)))
        L = args[0].shape[1]
        """).replace("FILES", files)
        + textwrap.dedent(body)
        + "\nwrite_case(sys.argv[2], y)\n"
    )
    return f"{sys.executable} {path} {{in}} {{out}}"


@pytest.mark.parametrize("format", FORMATS)
def test_programs_read_and_write_every_format(capsys, tmp_path, format):
    status, report, _ = check(
        capsys, "--exec", program(tmp_path, ""), "--format", format, "--cases", "delta/grouped-heads", "delta/one*"
    )
    assert status == 0 and report["summary"]["passed"] == 3 and report["summary"]["gradients"]


def test_a_broken_program_fails_only_its_own_case(capsys, tmp_path):
    plain_numpy = "read_answers, write_case = lambda path: dict(np.load(path)), lambda path, y: np.savez(path, **y)"
    command = program(
        tmp_path,
        """
        if L == 15: sys.exit("out of registers")
        if L == 17: os.abort()
        if L == 31: del y["S_end"]
        if L == 32: y["o"] = y["o"][:, :-1]
        if L == 33: y["dg"][0, 20, 1] = np.nan
        if L == 63: y["dv"] = y["dv"].astype(np.int64)
        if L == 64: open(sys.argv[2], "wb").write(b"not tensors"); sys.exit()
        if L == 65:
            write_case(sys.argv[2], y)
            os.truncate(sys.argv[2], os.path.getsize(sys.argv[2]) - 50)
            sys.exit()
        if L == 127: sys.exit()
        if L == 128: del y["dk"]
        """,
        plain_numpy,
    )
    status, report, _ = check(
        capsys, "--exec", command, "--format", "npz", "--timeout", 300, "--cases", "delta/ragged-*"
    )
    found = {int(case["id"].split("-")[1]): case for case in report["cases"]}
    assert status == 1
    assert {L: case["status"] for L, case in found.items()} == {
        2: "ok",
        15: "ERROR",
        16: "ok",
        17: "ERROR",
        31: "MISSING",
        32: "SHAPE",
        33: "NONFINITE",
        63: "SHAPE",
        64: "ERROR",
        65: "ERROR",
        127: "ERROR",
        128: "MISSING",
        129: "ok",
    }
    assert "out of registers" in found[15]["message"] and "SIGABRT" in found[17]["message"]
    assert "wrote no answer" in found[127]["message"] and "cannot be read" in found[65]["message"]
    assert found[31]["first_bad"]["output"] == "S_end" and found[128]["first_bad"]["output"] == "dk"
    assert found[33]["first_bad"] == dict(output="dg", sequence=0, chunk=0, token=20, head=1)
    assert "must be (1, 32, 2, 4)" in found[32]["message"] and "float" in found[63]["message"]
    assert report["summary"] | dict(passed=3, failed=5, errors=5) == report["summary"]


def test_a_program_that_does_not_end_is_a_verdict_too(capsys):
    status, report, _ = check(capsys, "--exec", "sh -c 'sleep 600' {in} {out}", "--timeout", 1, "--cases", "delta/one*")
    assert status == 1 and [case["status"] for case in report["cases"]] == ["TIMEOUT"] * 2


def test_a_program_without_gradients_is_judged_forward_only(capsys, tmp_path):
    command = program(tmp_path, "y = {name: y[name] for name in ('o', 'S_end')}")
    status, report, _ = check(capsys, "--exec", command, "--cases", "delta/plain")
    assert status == 0 and not report["summary"]["gradients"]


# ---- files computed elsewhere


def answers(case, forward_mistake=None):
    x = make_inputs(case)
    d = {name: x.pop(name) for name in ("do", "dS_end")}
    q, k, v = (x.pop(name) for name in "qkv")
    return dict(zip(NAMES, (*loop_forward(q, k, v, **x, mistake=forward_mistake), *loop_backward(q, k, v, **x, **d))))


@pytest.fixture
def results(tmp_path):
    for case in select(["delta/ragged-1*"]):
        path = tmp_path / f"{case.id}.npz"
        path.parent.mkdir(exist_ok=True)
        write_case(path, answers(case))
    return tmp_path


def test_results_from_files_pass(capsys, results):
    status, report, _ = check(capsys, "--results", results, "--cases", "delta/ragged-1*")
    assert status == 0 and report["summary"]["passed"] == 6


def test_missing_and_wrong_results_have_different_statuses(capsys, results):
    (results / "delta/ragged-15.npz").unlink()
    write_case(results / "delta/ragged-16.npz", answers(CASES["delta/ragged-17"]))
    write_case(results / "delta/ragged-17.npz", answers(CASES["delta/ragged-17"], "tail of 16 not written"))
    data = (results / "delta/ragged-127.npz").read_bytes()
    (results / "delta/ragged-127.npz").write_bytes(data[: len(data) // 2])
    (results / "delta/ragged-128.npz").unlink()
    np.savez(results / "delta/ragged-128.npz", o=np.array([object()]))
    status, report, _ = check(capsys, "--results", results, "--cases", "delta/ragged-1*")
    found = {int(case["id"].split("-")[1]): case for case in report["cases"]}
    assert status == 1
    assert {L: case["status"] for L, case in found.items()} == {
        15: "MISSING",
        16: "SHAPE",
        17: "DIFF",
        127: "ERROR",
        128: "ERROR",
        129: "ok",
    }
    assert found[17]["first_bad"] == dict(output="o", sequence=0, chunk=0, token=16, head=0)


def test_a_directory_without_any_result_is_bad_usage(capsys, tmp_path):
    status, _, err = check(capsys, "--results", tmp_path)
    assert status == 2 and "delta/hand.safetensors" in err


# ---- exported vectors


@pytest.mark.parametrize("format", FORMATS)
def test_exported_cases_hold_the_inputs_and_the_expected_values(capsys, tmp_path, format):
    assert main(["vectors", "--out", str(tmp_path), "--format", format, "--cases", "delta/grouped-heads", "conv"]) == 0
    capsys.readouterr()
    case = CASES["delta/grouped-heads"]
    inputs, right = (read_answers(tmp_path / f"{case.id}.{part}.{format}") for part in ("in", "expected"))
    for name, value in make_inputs(case).items():
        assert_identical(f"input {name}", inputs[name].ravel(), np.ravel(value))
    for name, value in expected(case).values.items():
        assert_identical(name, right[name].ravel(), value.ravel())
        assert right[f"{name}.floor"].shape == (2,)
    assert (tmp_path / f"conv/packed.in.{format}").exists()


def test_the_list_names_every_case_and_explains_its_flags(capsys):
    assert main(["vectors", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in CASES)
    assert "keys that are exactly zero" in out and main(["vectors", "--list", "--cases", "nothing"]) == 2
