"""verify: what it reports of good adapters, which causes it names for bad ones, and what it compares with."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

import deltanet_ref as dr
from deltanet_ref.cli.main import main
from deltanet_ref.errors import InputError
from deltanet_ref.lora import llama_cpp
from deltanet_ref.lora.bridge import reorder
from deltanet_ref.lora.merge import merge
from deltanet_ref.lora.verify import adapted_logits, log_softmax, verify, with_comparison, with_llama_cpp, with_merged
from tests.paths import FIXTURES
from tests.test_adapter import edit_peft

TOKENS = [[17, 401, 3, 3, 250, 88, 9, 444, 120, 61, 5], [5, 17, 80, 31]]


def model(name):
    return dr.load_model(FIXTURES / name / f"{name}-f32.gguf", backend="numpy")


@pytest.fixture(scope="module")
def grouped():
    return model("grouped")


def failing(report, *parts):
    assert report.problems and all(part in "; ".join(report.problems) for part in parts), report.problems


def test_sizes_and_effect_are_those_of_the_dense_update_and_of_both_runs(grouped):
    report = verify(grouped, FIXTURES / "grouped" / "lora", TOKENS, scale=0.5)
    assert not report.problems and not report.unmatched and not report.zero and len(report.matched) == 31
    adapter = dr.load_adapter(FIXTURES / "grouped" / "lora", grouped)
    for target in ("blk.0.attn_qkv.weight", "blk.3.attn_q.weight"):
        a, b = (adapter.tensors[f"{target}.lora_{f}"].astype(np.float64) for f in "ab")
        dense = np.linalg.norm(0.5 * 8 / 4 * b @ a) / np.linalg.norm(grouped.weights[target])
        assert report.sizes[target] == pytest.approx(dense, rel=1e-6)
    plain = [grouped.logits(np.array([p]))[0] for p in TOKENS]
    grouped.attach(adapter, scale=0.5, name="a")
    adapted = [grouped.logits(np.array([p]))[0] for p in TOKENS]
    grouped.detach("a")
    p, q = (log_softmax(np.concatenate(x)) for x in (plain, adapted))
    effect = report.effect
    assert effect.positions == 15 and effect.kl == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), 1)), rel=1e-4)
    assert effect.top1 == np.mean(p.argmax(1) != q.argmax(1))
    losses = [-log_softmax(x)[np.arange(len(t) - 1), t[1:]] for x, t in zip(adapted, TOKENS)]
    assert effect.adapted_loss == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    assert effect.merged_distance < 3e-6 and not grouped.adapters


def test_an_adapter_without_effect_fails(grouped, tmp_path):
    dr.new_adapter(grouped, rank=2).save_gguf(tmp_path / "new.gguf")
    report = verify(grouped, tmp_path / "new.gguf", TOKENS)
    failing(report, "no effect: B A is zero in every tensor")
    assert len(report.zero) == 31 and report.effect.kl == 0
    failing(verify(grouped, FIXTURES / "grouped" / "lora", TOKENS, scale=0.0), "the scale is 0")
    weak = dr.load_adapter(FIXTURES / "grouped" / "lora", grouped)
    weak.alpha = 1e-8
    weak.save_gguf(tmp_path / "weak.gguf")
    failing(verify(grouped, tmp_path / "weak.gguf", TOKENS), "which is rounding")


@pytest.mark.filterwarnings("error")
def test_values_too_large_for_float32_are_judged_without_a_warning(grouped, tmp_path):
    def report(value):
        lora = dr.load_adapter(FIXTURES / "grouped" / "lora", grouped)
        names = [f"blk.3.ffn_down.weight.lora_{factor}" for factor in "ab"]
        lora.tensors = {name: np.full_like(lora.tensors[name], value) for name in names}
        lora.save_gguf(tmp_path / "a.gguf")
        return verify(grouped, tmp_path / "a.gguf", TOKENS)

    failing(report(1e30), "the logits with the adapter are not finite")
    effect = report(1e11).effect  # their squares overflow in the last norm: every logit is 0, merged or live
    assert effect.adapted_loss == pytest.approx(np.log(grouped.config.vocab_size))
    assert effect.distance == pytest.approx(1) and effect.merged_distance == 0


def peft_with(tmp_path, rename):
    source = FIXTURES / "grouped" / "lora"
    weights = {rename(key): x for key, x in load_file(source / "adapter_model.safetensors").items()}
    return edit_peft(source, tmp_path / "peft", weights)


@pytest.mark.parametrize(
    "old, new, parts",
    [
        (
            "model.model.layers",
            "model.transformer.layers",
            ["no tensor", "wrong prefix: 'transformer.'", "in 62 names"],
        ),
        (
            "model.model.layers.1.",
            "model.layers.1.",
            ["partial match: 23 matching, 16", "wrong prefix: ''", "in 16 names"],
        ),
        (
            ".layers.3.",
            ".layers.7.",
            ["partial match", "this model has no 'layers.7.", "number or the kinds of layers"],
        ),
        ("layers.3.self_attn", "layers.0.self_attn", ["partial match: 27", "no 'layers.0.self_attn"]),
        ("q_proj.lora_B", "q_proj.lora_C", ["q.weight.lora_b is missing, only its partner"]),
    ],
)
def test_names_that_do_not_match_fail_with_the_likely_cause(grouped, tmp_path, old, new, parts):
    report = verify(grouped, peft_with(tmp_path, lambda key: key.replace(old, new)), TOKENS)
    failing(report, *parts)
    assert report.unmatched and report.effect is None


def test_an_adapter_of_another_shape_names_the_base():
    report = verify(model("eq"), FIXTURES / "grouped" / "lora", TOKENS)
    failing(report, "wrong base: 9 misshapen: blk.")
    assert len(report.matched) == 22


TEXT = "The ship left the harbour before the morning, and nobody on the quay saw her go; the wind was from the east."


@pytest.fixture(scope="module")
def trained(grouped):
    """An adapter that has learned TEXT, on the delta layers."""
    adapter = dr.new_adapter(grouped, rank=4, alpha=8, targets="attn_qkv,attn_gate,ssm_out,ssm_beta", seed=1)
    dr.train(grouped, adapter, [{"text": TEXT}], steps=25, lr=1e-2, batch_size=1, eval_every=0)
    grouped.adapters.clear()
    return adapter


def test_grouped_order_fed_to_a_tiled_base_is_found(grouped, trained, tmp_path):
    prompts = [grouped.tokenizer.encode(TEXT)]
    trained.save_gguf(tmp_path / "good.gguf")
    good = verify(grouped, tmp_path / "good.gguf", prompts)
    assert not good.problems and good.effect.adapted_loss < good.effect.base_loss - 1
    trained.save_peft(tmp_path / "peft")
    assert not verify(grouped, tmp_path / "peft", prompts).problems
    wrong = type(trained)(trained.config, reorder(trained.tensors, trained.config, to="grouped"), trained.alpha)
    wrong.save_gguf(tmp_path / "wrong.gguf")
    report = verify(grouped, tmp_path / "wrong.gguf", prompts)
    failing(report, "wrong order of the V heads", "adapter is in grouped order and the base in tiled")
    assert report.effect.other_order_loss == pytest.approx(good.effect.adapted_loss, rel=1e-5)


def test_a_weight_of_zeros_has_a_relative_update_of_one():
    zeroed = model("eq")
    zeroed.weights["blk.1.ffn_up.weight"] = np.zeros(zeroed.weights.shape("blk.1.ffn_up.weight"))
    sizes = verify(zeroed, FIXTURES / "eq" / "lora", TOKENS).sizes
    assert sizes["blk.1.ffn_up.weight"] == 1 != sizes["blk.0.ffn_up.weight"]


@pytest.mark.parametrize("name", ["layers.1." * 10**6, "layers." + "1" * 10**7 + ".self_attn.q_proj.lora_A.weight"])
def test_a_name_of_megabytes_takes_no_time_and_is_not_repeated(grouped, tmp_path, name):
    """Looking for a module path in the whole name would take 10^12 steps: the test would not end."""
    tensors = load_file(FIXTURES / "grouped" / "lora" / "adapter_model.safetensors")
    tensors[f"base_model.model.{name}"] = np.ones((2, 2), np.float32)
    peft = edit_peft(FIXTURES / "grouped" / "lora", tmp_path / "peft", tensors)
    report = verify(grouped, peft, TOKENS)
    failing(report, "partial match: 31 matching, 1 other")
    assert max(map(len, report.problems)) < 2000


# ---- comparisons with other outputs


@pytest.fixture(scope="module")
def verified(grouped):
    return verify(grouped, FIXTURES / "grouped" / "lora", TOKENS)


def test_other_outputs_are_compared_within_what_their_rounding_allows(verified):
    x = np.ones((2, 3))
    assert not with_comparison(verified, "same", x * (1 + 1e-6), x, limit=0).problems
    assert with_comparison(verified, "off", x * 1.001, x, limit=0).problems
    assert not with_comparison(verified, "rounded", x * 1.001, x, limit=2e-3).problems
    failing(
        with_comparison(verified, "lost", x * 1.003, x, limit=2e-3),
        "lost computes something else: its outputs are 3.0e-03",
    )
    failing(with_comparison(verified, "nan", x * np.nan, x, limit=2e-3), "nan")


def test_a_merged_model_with_another_vocabulary_is_refused(grouped, verified):
    other = model("eq")
    other.config = replace(other.config, vocab_size=481)
    with pytest.raises(InputError, match="m.gguf has a vocabulary of 481, the base model one of 480"):
        with_merged(verified, "m.gguf", other, grouped, None, TOKENS)


def test_llama_cpp_is_compared_or_the_reason_is_given(grouped, verified, monkeypatch):
    """A stand-in returns this engine's own outputs, and those of another scale; tests/peers runs the real one."""
    base, adapter = FIXTURES / "grouped" / "grouped-f32.gguf", dr.load_adapter(FIXTURES / "grouped" / "lora", grouped)

    def engine(factor):
        def outputs(path, adapter, prompts, scales):
            return np.stack(
                [
                    log_softmax(np.stack([adapted_logits(grouped, adapter, [p], factor * scale)[-1] for p in prompts]))
                    for scale in scales
                ]
            )

        return outputs

    def compared(path=base):
        return with_llama_cpp(verified, path, grouped, adapter, TOKENS, 0.5)

    assert verified.llama_cpp == "not compared"
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    absent = compared()
    assert absent.llama_cpp == "not installed (pip install xllamacpp), not compared"
    assert not absent.distances and not absent.problems
    assert compared(FIXTURES / "grouped" / "hf").llama_cpp == "not compared (it reads GGUF files only)"

    monkeypatch.setattr(llama_cpp, "installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "log_probabilities", engine(1.0))
    same = compared()
    assert same.llama_cpp == "compared" and not same.problems
    assert set(same.distances.values()) == {0.0} and len(same.distances) == 2
    monkeypatch.setattr(llama_cpp, "log_probabilities", engine(1.01))
    other = compared()
    failing(other, "llama.cpp, base and adapter computes something else")
    assert other.distances["llama.cpp, base alone"] == 0 and len(other.problems) == 1

    def broken(*arguments):
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(llama_cpp, "log_probabilities", broken)
    failed = compared()
    failing(failed, "llama.cpp does not run the base with the adapter", "no such architecture")
    assert failed.llama_cpp == "failed, not compared"


def test_the_command_exits_with_1_for_a_bad_adapter_and_compares_a_merged_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)  # tests/peers compares with llama.cpp
    base, lora = FIXTURES / "eq" / "eq-f32.gguf", FIXTURES / "eq" / "lora"
    merge(base, [(lora, 0.5)], tmp_path / "m.gguf")
    assert main(["verify", str(base), f"{lora}=0.5", "-p", "a ship", "--merged", str(tmp_path / "m.gguf")]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nok\n") and "llama.cpp: not installed (pip install xllamacpp), not compared\n" in out
    assert all(x in out for x in ("matched   31\n", "layer 3", f"  {tmp_path / 'm.gguf'}\n"))
    merged = str(tmp_path / "m.gguf")
    assert main(["verify", str(base), str(lora), "-p", "a ship", "--merged", merged, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"] and "computes something else" in report["problems"][0]
    assert list(report["distances"]) == [merged] and report["llama_cpp"].startswith("not installed")
    assert main(["verify", str(base), str(FIXTURES / "grouped" / "lora")]) == 1
    out = capsys.readouterr().out
    assert "FAILED: wrong base" in out and "llama.cpp: not compared\n" in out
    for arguments, match in (
        (["-p", "a"], "the prompt 'a' has fewer than two tokens"),
        (["--prompts", "absent"], "absent"),
    ):
        assert main(["verify", str(base), str(lora), *arguments]) == 2 and match in capsys.readouterr().err


def test_prompts_are_cut_to_the_models_context(capsys, monkeypatch):
    from deltanet_ref.cli import verify as command

    def load_with_context_of_5(args, load=command.load):
        model = load(args)
        model.config = replace(model.config, max_position_embeddings=5)
        return model

    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    monkeypatch.setattr(command, "load", load_with_context_of_5)
    base, lora = FIXTURES / "eq" / "eq-f32.gguf", FIXTURES / "eq" / "lora"
    main(["verify", str(base), str(lora), "-p", TEXT, "--json"])
    assert json.loads(capsys.readouterr().out)["effect"]["positions"] == 5
