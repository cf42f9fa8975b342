"""Traces of whole models: against HF's committed numbers; and diff, against mistakes planted one at a time."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import deltanet_ref as dr
from deltanet_ref import ops
from deltanet_ref.cli.main import main
from deltanet_ref.errors import InputError
from deltanet_ref.model.tensors import expected_tensors, hf_shape
from deltanet_ref.oracle.diff import diff_traces, drift
from deltanet_ref.oracle.trace import read_trace, trace, trace_table, write_trace
from tests import trace_faults
from tests.paths import FIXTURES
from tests.tolerances import relative
from tests.trace_faults import CONFIG, FAULTS, TOKENS

every_model = pytest.mark.parametrize("name", ["eq", "grouped"])
STORED = 1e-7  # the goldens are rounded to float32, 6e-8 relative


def golden_tokens(name):
    return json.loads((FIXTURES / name / "golden" / "tokens.json").read_text())["t65"]


def golden(name, file):
    return np.load(FIXTURES / name / "golden" / f"{file}.npz")


@pytest.fixture(scope="module")
def traces():
    """float64 traces of t65, backward included, of the fixtures' HF directories."""
    return {
        name: trace(
            dr.load_model(FIXTURES / name / "hf", backend="numpy", dtype="float64"), golden_tokens(name), backward=True
        )
        for name in ("eq", "grouped")
    }


@pytest.fixture(scope="module")
def ours():
    """The float64 trace of the random model in tests/trace_faults.py."""
    return trace_faults.run()


# ---- what a trace holds


@every_model
def test_a_trace_holds_every_name_of_the_table_in_its_order_and_shape(traces, name):
    trace, table = traces[name], traces[name].table()
    assert list(trace.tensors) == list(table)
    assert {n: x.shape for n, x in trace.tensors.items()} == {n: t.shape for n, t in table.items()}
    assert {x.dtype for x in trace.tensors.values()} == {np.dtype("float64")}


@every_model
def test_stream_logits_and_loss_equal_hf(traces, name):
    tensors, gold = traces[name].tensors, golden(name, "hf")
    assert relative(tensors["embed"], gold["t65/h0"]) < STORED
    for i in range(4):
        assert relative(tensors[f"blk.{i}.out"], gold[f"t65/h{i + 1}"]) < STORED
    assert relative(tensors["output_norm"], gold["t65/hnorm"]) < STORED
    assert relative(tensors["logits"], gold["t65/logits"]) < STORED
    assert float(tensors["loss"]) == pytest.approx(float(gold["t65/loss"]), rel=1e-12)


@every_model
def test_gradients_of_parameters_and_embeddings_equal_hf_in_hf_order(traces, name):
    trace, gold = traces[name], golden(name, "hf_grads")
    assert relative(trace.tensors["d.embed"], gold["t65/grad/inputs_embeds"]) < STORED
    for spec in expected_tensors(trace.config).values():
        gradient, A_log = trace.tensors[f"d.{spec.name}"], None
        if spec.value == "minus_exp":  # g is proportional to exp(A_log)
            block = spec.name.removesuffix("ssm_a")
            A_log = (trace.tensors[f"{block}g"] * trace.tensors[f"d.{block}g"]).sum(0)
        theirs = gold[f"t65/grad/{spec.hf_name}"]
        assert relative(gradient.reshape(hf_shape(spec)) if A_log is None else A_log, theirs) < STORED, spec.name


# parameter: the gradient at its output, its input. The weight's gradient is their product, which HF computed.
DELTA_MAPS = {
    "attn_qkv": ("qkv", "attn_norm"),
    "attn_gate": ("z", "attn_norm"),
    "ssm_beta": ("b", "attn_norm"),
    "ssm_alpha": ("a", "attn_norm"),
    "ssm_out": ("mid", "o_gated"),
}
ATTENTION_MAPS = {"attn_k": ("k_proj", "attn_norm"), "attn_v": ("v", "attn_norm"), "attn_output": ("mid", "o_gated")}
FFN_MAPS = {"ffn_gate": ("ffn_gate", "ffn_norm"), "ffn_up": ("ffn_up", "ffn_norm"), "ffn_down": ("out", "ffn_act")}


@every_model
def test_activations_and_their_gradients_give_hfs_weight_gradients(traces, name):
    trace, gold = traces[name], golden(name, "hf_grads")
    specs = expected_tensors(trace.config)
    for i, kind in enumerate(trace.config.layer_types):

        def rows(tensor):
            return trace.tensors[tensor].reshape(65, -1)

        for weight, (y, x) in ((DELTA_MAPS if kind == "linear_attention" else ATTENTION_MAPS) | FFN_MAPS).items():
            theirs = gold[f"t65/grad/{specs[f'blk.{i}.{weight}.weight'].hf_name}"]
            assert relative(rows(f"d.blk.{i}.{y}").T @ rows(f"blk.{i}.{x}"), theirs) < STORED, (i, weight)
        if kind == "full_attention":
            dy = np.stack([trace.tensors[f"d.blk.{i}.{half}"] for half in ("q_proj", "gate")], 2).reshape(65, -1)
            theirs = gold[f"t65/grad/{specs[f'blk.{i}.attn_q.weight'].hf_name}"]
            assert relative(dy.T @ rows(f"blk.{i}.attn_norm"), theirs) < STORED


def test_states_and_caches_are_those_that_prefill_leaves():
    model = trace_faults.model()
    found, (_, state) = trace(model, TOKENS).tensors, model.prefill(TOKENS)
    for i in (0, 2):
        S = trace_faults.grouped_rows(state.blocks[i].S[0], 0, 1)
        np.testing.assert_array_equal(S, found[f"blk.{i}.S"])
        conv = trace_faults.grouped_rows(state.blocks[i].conv[0], trace_faults.QK, CONFIG.linear_value_head_dim, axis=1)
        np.testing.assert_array_equal(conv, found[f"blk.{i}.conv_state"])
    np.testing.assert_array_equal(state.blocks[1].k[0], found["blk.1.k"])
    np.testing.assert_array_equal(state.blocks[1].v[0], found["blk.1.v"])


def test_a_trace_changes_nothing_and_repeats_itself(ours):
    again = trace_faults.run()
    for name, x in ours.tensors.items():
        np.testing.assert_array_equal(x, again.tensors[name])
    loss, gradients = trace_faults.model().loss_and_grads(TOKENS[None], TOKENS[None])
    assert loss == ours.tensors["loss"]
    np.testing.assert_array_equal(gradients["blk.1.attn_q.weight"], ours.tensors["d.blk.1.attn_q.weight"])


def test_one_token_has_a_trace_and_no_loss():
    found = trace(trace_faults.model(), TOKENS[:1], backward=True).tensors
    assert found["loss"] == 0 and not found["d.embed"].any() and found["logits"].any()


@every_model
def test_an_attached_adapter_is_in_the_trace(name):
    model = dr.load_model(FIXTURES / name / "hf", backend="numpy", dtype="float64")
    model.attach(dr.load_adapter(FIXTURES / name / "lora.gguf", model))
    logits = trace(model, golden_tokens(name)).tensors["logits"]
    assert relative(logits, golden(name, "hf_lora")["t65/logits"]) < STORED


def test_a_file_gives_back_all_that_was_written(tmp_path, ours):
    path = tmp_path / "t.safetensors"
    write_trace(path, ours)
    back = read_trace(path)
    assert back._replace(tensors=None) == ours._replace(tensors=None)
    assert set(back.tensors) == set(ours.tensors)
    assert all(np.array_equal(np.reshape(back.tensors[name], x.shape), x) for name, x in ours.tensors.items())


def test_the_page_lists_every_name_with_its_shape_and_meaning():
    page = (Path(__file__).parents[1] / "docs" / "trace.md").read_text()
    documented = set(re.findall(r"^\| (\S+) +\| (.+?) +\| (.+?) +\|", page, re.M))
    table = [t for t in trace_table(CONFIG, 9).values() if not t.name.startswith("d.")]
    stages = {(re.sub(r"blk\.\d+\.", "", t.name), ", ".join(t.axes) or "()", t.meaning) for t in table}
    assert documented - {("name", "shape", "what it is")} == stages


# ---- diff: correct ones pass


def test_a_trace_equals_itself(ours):
    result = diff_traces(ours, ours)
    assert result.equal() and {(row.status, row.worst) for row in result.rows} == {("ok", 0)}


@every_model
def test_float32_equals_float64_at_the_tolerance_of_float32(traces, name):
    model = dr.load_model(FIXTURES / name / "hf", backend="numpy", dtype="float32")
    result = diff_traces(trace(model, golden_tokens(name), backward=True), traces[name])
    assert result.equal() and result.tolerance == 3e-5
    assert 0 < max(row.error for row in result.rows if not row.name.startswith("d."))


@every_model
def test_the_gguf_file_equals_the_hf_directory(traces, name):
    model = dr.load_model(FIXTURES / name / f"{name}-f32.gguf", backend="numpy", dtype="float64")
    # a GGUF rounds 1 + w and -exp(A_log) to float32
    assert diff_traces(trace(model, golden_tokens(name), backward=True), traces[name], tolerance=1e-6).equal()


def test_batch_axes_and_merged_heads_are_the_same_tensor(ours):
    flat = {name: x.reshape(1, len(x), -1) if x.ndim == 3 else x[None] for name, x in ours.tensors.items()}
    assert diff_traces(ours, ours._replace(tensors=flat)).equal()


def test_a_trace_in_tiled_order_is_brought_to_grouped(ours):
    H_k, R, d_v = 2, 3, CONFIG.linear_value_head_dim

    def tiled(name, x):
        axes = ours.table()[name].axes
        if "QKV" in axes:
            return trace_faults.tiled_columns(x, trace_faults.QK, d_v)
        if "H_v" not in axes:
            return x
        axis = axes.index("H_v")
        return (
            np.moveaxis(x, axis, 0)
            .reshape(H_k, R, -1)
            .swapaxes(0, 1)
            .reshape(H_k * R, *np.delete(x.shape, axis))
            .transpose(*range(1, axis + 1), 0, *range(axis + 1, x.ndim))
        )

    forward = {name: x for name, x in ours.tensors.items() if not name.startswith("d.")}
    theirs = ours._replace(tensors={name: tiled(name, x) for name, x in forward.items()}, head_order="tiled")
    assert diff_traces(ours._replace(tensors=forward), theirs).equal()
    assert not diff_traces(ours._replace(tensors=forward), theirs._replace(head_order="grouped")).equal()


# ---- diff: mistakes are found and named


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_found_where_it_is_and_named(ours, fault):
    tensor, words, plant = FAULTS[fault]
    result = diff_traces(ours, plant(ours))
    assert not result.equal()
    assert (result.first().name, result.first().status) == (tensor, "DIFF")
    assert words in result.reasons[0]
    order = list(ours.tensors)
    assert all(row.status == "ok" for row in result.rows[: order.index(tensor)])


@pytest.mark.parametrize(
    "tensor",
    ["embed", "blk.0.conv", "blk.0.g", "blk.0.o", "blk.1.q", "blk.2.S", "logits", "d.blk.0.k", "d.blk.1.attn_q.weight"],
)
def test_an_unknown_mistake_gets_no_reason(ours, tensor):
    x = ours.tensors[tensor]
    noise = np.random.default_rng(8).standard_normal(x.shape) * np.sqrt(np.mean(x * x))
    result = diff_traces(ours, ours._replace(tensors=ours.tensors | {tensor: x + noise}))
    assert (result.first().name, result.reasons) == (tensor, [])


def test_the_first_token_and_head_are_told(ours):
    o = ours.tensors["blk.2.o"].copy()
    o[64:, 4] += 0.1
    row = diff_traces(ours, ours._replace(tensors=ours.tensors | {"blk.2.o": o})).first()
    assert (row.name, row.token, row.head) == ("blk.2.o", 64, 4)
    assert row.where == "tokens 64 to 82 (64 is a multiple of 64), head 4 only"
    assert row.largest == pytest.approx(0.1)


def test_one_wrong_row_is_found_though_the_rms_error_of_its_tensor_is_allowed(ours):
    g = ours.tensors["blk.0.g"].copy()
    g[40, 3] += 15e-11 * np.sqrt(np.mean(g * g))
    result = diff_traces(ours, ours._replace(tensors=ours.tensors | {"blk.0.g": g}))
    row = result.first()
    assert (row.name, row.token, row.head, row.where) == ("blk.0.g", 40, 3, "token 40 only, head 3 only")
    assert row.error < result.tolerance == 1e-11


def test_missing_misshapen_and_nonfinite_tensors_are_told_apart(ours):
    theirs = dict(ours.tensors)
    del theirs["blk.0.beta"]
    theirs["blk.1.q"] = theirs["blk.1.q"][:, :5]
    theirs["blk.2.S"] = theirs["blk.2.S"].swapaxes(1, 2)
    theirs["output_norm"] = np.where(np.arange(len(TOKENS)) == 17, np.nan, 1)[:, None] * theirs["output_norm"]
    theirs["blk.0.betta"] = theirs["blk.0.g"]
    result = diff_traces(ours, ours._replace(tensors=theirs))
    status = {row.name: row for row in result.rows if row.status != "ok"}
    assert {name: row.status for name, row in status.items()} == {
        "blk.0.beta": "MISSING",
        "blk.1.q": "SHAPE",
        "blk.2.S": "SHAPE",
        "output_norm": "NONFINITE",
    }
    assert status["blk.2.S"].where == "(6, 5, 8) instead of (6, 8, 5): the axes are transposed"
    assert status["output_norm"].token == 17
    assert result.unknown == ["blk.0.betta"] and result.first().name == "blk.1.q"


def test_what_is_missing_fails_unless_that_is_allowed(ours):
    theirs = ours._replace(tensors={name: x for name, x in ours.tensors.items() if name.endswith("out")})
    assert not diff_traces(ours, theirs).equal() and diff_traces(ours, theirs).first() is None
    assert diff_traces(ours, theirs, partial=True).equal()


# ---- drift


def test_a_correct_model_does_not_drift():
    directory = FIXTURES / "grouped" / "hf"
    narrow, wide = (dr.load_model(directory, backend="numpy", dtype=dtype) for dtype in ("float32", "float64"))
    rows = drift(narrow, wide, golden_tokens("grouped"))
    assert [row.layer for row in rows] == ["blk.0", "blk.1", "blk.2", "blk.3", "output_norm"]
    assert all(0 < row.decode < 2e-6 and 0 < row.dtype < 2e-6 for row in rows)  # README of the fixtures: 1.1e-6
    exact = drift(wide, wide, golden_tokens("grouped"))
    assert all(row.decode < 1e-13 and row.dtype == 0 for row in exact)


def test_a_wrong_decode_step_shows_as_drift_from_the_first_delta_layer_on():
    def step(q, k, v, *, g, beta, S, head_order):
        return ops.gated_delta_rule_step(q, k, v, g=g, beta=beta, S=1.001 * S, head_order=head_order)

    wrong, right = trace_faults.model(operators={"gated_delta_rule_step": step}), trace_faults.model()
    rows = drift(wrong, right, TOKENS)
    assert all(row.decode > 1e-5 and row.dtype == 0 for row in rows) and rows[0].decode_token > 0


# ---- the command line


def run(capsys, *words):
    capsys.readouterr()
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


@pytest.fixture
def files(tmp_path, ours):
    """Paths: ours, the same again, one without SiLU after the convolution, one that is partial."""
    wrong = FAULTS["no SiLU"][2](ours)
    partial = ours._replace(tensors={"logits": ours.tensors["logits"]})
    for name, it in (("ours", ours), ("same", ours), ("wrong", wrong), ("partial", partial)):
        write_trace(tmp_path / f"{name}.safetensors", it)
    return {path.stem: path for path in tmp_path.iterdir()}


def test_the_commands_write_and_compare_traces(capsys, tmp_path):
    model, ids = FIXTURES / "grouped" / "grouped-q8_0.gguf", "17,401,3,250,88,9"
    for dtype in ("float32", "float64"):
        status, out, err = run(
            capsys,
            "trace",
            model,
            "--tokens",
            ids,
            "--backward",
            "--dtype",
            dtype,
            "-o",
            tmp_path / f"{dtype}.safetensors",
        )
        assert (status, err) == (0, "") and "6 tokens" in out
    written = read_trace(tmp_path / "float32.safetensors")
    assert (written.tokens, written.dtype, written.model) == ([17, 401, 3, 250, 88, 9], "float32", str(model))
    status, out, err = run(capsys, "diff", tmp_path / "float32.safetensors", tmp_path / "float64.safetensors")
    assert (status, err) == (0, "") and out.endswith("225 ok: no divergence\n")


def test_a_text_is_traced_as_its_tokens(capsys, tmp_path):
    model = FIXTURES / "eq" / "eq-f32.gguf"
    assert run(capsys, "trace", model, "-p", "alpha beta", "-o", tmp_path / "t.safetensors")[0] == 0
    assert read_trace(tmp_path / "t.safetensors").tokens == dr.load_tokenizer(model).encode("alpha beta")


def test_diff_tells_the_first_divergence_and_its_reason(capsys, files):
    assert run(capsys, "diff", files["ours"], files["same"])[0] == 0
    status, out, _ = run(capsys, "diff", files["ours"], files["wrong"])
    assert status == 1
    assert "first divergence: blk.0.conv (causal convolution of qkv, then SiLU)" in out
    assert "likely: the SiLU after the convolution is missing" in out
    status, out, _ = run(capsys, "diff", files["ours"], files["wrong"], "--json")
    report = json.loads(out)
    assert status == 1 and report["summary"]["first"] == "blk.0.conv" and "SiLU" in report["summary"]["reasons"][0]
    assert [t["name"] for t in report["tensors"]] == list(trace_table(CONFIG, len(TOKENS)))


def test_partial_allows_what_is_missing_and_all_lists_every_tensor(capsys, files):
    status, out, _ = run(capsys, "diff", files["ours"], files["partial"])
    assert status == 1 and "no divergence, but tensors are missing" in out
    status, out, _ = run(capsys, "diff", files["ours"], files["partial"], "--partial", "--all")
    assert status == 0 and all(f"\n{name} " in out for name in trace_table(CONFIG, len(TOKENS)))


def test_drift_is_reported_by_layer(capsys):
    words = ["diff", "--drift", FIXTURES / "eq" / "eq-f32.gguf", "-p", "alpha beta gamma delta"]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "") and "blk.3" in out and "all within tolerance" in out
    status, out, _ = run(capsys, *words, "--json", "--tolerance", 1e-12)
    report = json.loads(out)
    assert status == 1 and not report["passed"] and len(report["layers"]) == 5


BAD = [
    ("trace {model} --tokens 1,2", "-o/--output"),
    ("trace {model} -o {d}/t.safetensors", "one of the arguments"),
    ("trace {model} --tokens 1,x -o {d}/t.safetensors", "write ids separated by commas"),
    ("trace {model} --tokens 1,999999 -o {d}/t.safetensors", "token 999999"),
    ("trace {model} -p '' -o {d}/t.safetensors", "prompt is empty"),
    ("trace {model} --tokens 1 -o {d}/t.gguf", "must end in .safetensors"),
    ("trace {model} --tokens 1 -o {d}/absent/t.safetensors", "does not exist"),
    ("trace {d}/absent.gguf --tokens 1 -o {d}/t.safetensors", "absent.gguf"),
    ("diff {d}/ours.safetensors", "two traces"),
    ("diff {d}/ours.safetensors {d}/absent.safetensors", "absent.safetensors"),
    ("diff {d}/ours.safetensors {hf}", "is not a trace"),
    ("diff {d}/ours.safetensors {d}/cut.safetensors", "cut.safetensors"),
    ("diff {d}/ours.safetensors {d}/damaged.safetensors", "damaged or incomplete"),
    ("diff {d}/ours.safetensors {d}/others.safetensors", "different tokens"),
    ("diff {d}/ours.safetensors {d}/layers.safetensors", "different models"),
    ("diff {d}/ours.safetensors {d}/names.safetensors", "no tensor in common"),
    ("diff {d}/ours.safetensors {d}/heads.safetensors", "head_order is 'hf'"),
    ("diff {d}/ours.safetensors {d}/int8.safetensors", "'int8'"),
    ("diff {d}/ours.safetensors {d}/ours.safetensors --tolerance 0", "--tolerance is 0"),
    ("diff {d}/ours.safetensors {d}/ours.safetensors --tolerance x", "--tolerance"),
    ("diff --drift {model}", "needs --tokens or -p"),
    ("diff --drift {d}/absent.gguf --tokens 1", "absent.gguf"),
]


@pytest.mark.parametrize("command, reason", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, ours, command, reason):
    small = ours._replace(tensors={"loss": ours.tensors["loss"]})
    write_trace(tmp_path / "ours.safetensors", small)
    write_trace(tmp_path / "others.safetensors", small._replace(tokens=ours.tokens[::-1]))
    write_trace(tmp_path / "names.safetensors", small._replace(tensors={"l": ours.tensors["loss"]}))
    write_trace(tmp_path / "heads.safetensors", small._replace(head_order="hf"))
    write_trace(tmp_path / "int8.safetensors", small._replace(dtype="int8"))
    other = replace(CONFIG, layer_types=("linear_attention",) * 3)
    write_trace(tmp_path / "layers.safetensors", small._replace(config=other))
    whole = (tmp_path / "ours.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:40])
    (tmp_path / "damaged.safetensors").write_bytes(whole.replace(b"hidden_size", b"hidden_sise"))
    words = [
        word.format(d=tmp_path, model=FIXTURES / "eq" / "eq-f32.gguf", hf=FIXTURES / "eq" / "hf").strip("'")
        for word in command.split()
    ]
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("deltanet-ref: error: ") and err.count("\n") == 1 and reason in err
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize("command", ["trace", "diff"])
def test_help_has_a_worked_example(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0 and f"\nexample:\n  deltanet-ref {command} " in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [[], [3, 61], [[1, 2]]])
def test_no_tokens_and_tokens_outside_the_vocabulary_are_refused(tokens):
    with pytest.raises(InputError):
        trace(trace_faults.model(), tokens)
