"""Adapters switched between requests, and the effect of their metadata on generate."""

import numpy as np
import pytest
from gguf import GGUFReader

import deltanet_ref as dr
from deltanet_ref.cli.main import main
from deltanet_ref.errors import InputError
from deltanet_ref.model.generate import invocation, prompt_prefix
from tests.paths import FIXTURES

BASE, LORA = FIXTURES / "grouped" / "grouped-f32.gguf", FIXTURES / "grouped" / "lora.gguf"
PROMPT = [17, 401, 3, 250, 88, 9, 444, 120, 61, 5]
GREEDY = dict(max_tokens=8, temperature=0, return_ids=True)


@pytest.fixture
def model():
    return dr.load_model(BASE, backend="numpy")


def adapter(model, **metadata):
    adapter = dr.load_adapter(LORA, model)
    adapter.metadata = metadata
    return adapter


def greedy(model, prompt=PROMPT):
    return list(dr.generate(model, prompt, **GREEDY))


def test_adapters_are_switched_without_reloading(model):
    """Each request gives the logits of a fresh model with only these adapters."""
    a, b = adapter(model), adapter(model)
    alone = {}
    for name, attached in {"base": [], "a": [(a, 1.0)], "both": [(a, 0.5), (b, -1.25)]}.items():
        fresh = dr.load_model(BASE, backend="numpy")
        for x, scale in attached:
            fresh.attach(x, scale=scale)
        alone[name] = fresh.prefill(np.array(PROMPT))[0]
    for _ in range(2):
        assert np.array_equal(model.prefill(np.array(PROMPT))[0], alone["base"])
        model.attach(a, name="a")
        assert np.array_equal(model.prefill(np.array(PROMPT))[0], alone["a"])
        model.detach("a")
        names = [model.attach(a, scale=0.5), model.attach(b, scale=-1.25)]
        assert np.array_equal(model.prefill(np.array(PROMPT))[0], alone["both"])
        for name in names:
            model.detach(name)
    assert not np.allclose(alone["base"], alone["a"])


def test_a_prompts_state_is_never_continued_under_another_adapter(model):
    a, b, tokens = adapter(model), adapter(model), np.array(PROMPT)
    _, plain = model.prefill(tokens)
    model.attach(a, scale=0.5, name="a")
    _, adapted = model.prefill(tokens)
    model.step(3, adapted)
    with pytest.raises(InputError, match="other adapters.*process the prompt again"):
        model.step(3, plain)
    model.detach("a")
    with pytest.raises(InputError, match="other adapters"):
        model.step(3, adapted)
    for other, scale in ((a, 1.0), (b, 0.5)):
        name = model.attach(other, scale=scale)
        with pytest.raises(InputError, match="other adapters"):
            model.prefill(tokens, adapted)
        model.detach(name)
    model.attach(a, scale=0.5, name="again")
    model.step(3, adapted)
    model.attach(b)
    with pytest.raises(InputError, match="other adapters"):
        model.step(3, adapted)


def test_a_generation_does_not_go_on_under_another_adapter(model):
    running = dr.generate(model, PROMPT, **GREEDY)
    next(running)
    model.attach(adapter(model))
    with pytest.raises(InputError, match="other adapters"):
        next(running)


def test_the_prompt_prefix_is_put_before_text_but_not_before_ids(model):
    model.attach(adapter(model, prompt_prefix="Say: "))
    assert greedy(model, "a ship") == greedy(model, model.tokenizer.encode("Say: a ship"))
    assert greedy(model, "a ship") != greedy(model, model.tokenizer.encode("a ship"))
    model.attach(adapter(model, prompt_prefix="Sing: "))
    with pytest.raises(InputError, match="different prompt prefixes"):
        prompt_prefix(model)


def test_an_activated_lora_acts_from_the_last_invocation_on(model):
    """Compared with two passes joined by the state: the base alone up to the token before the invocation, then base and
    adapter."""
    alora = adapter(model, invocation_tokens=[3, 250])
    prompt = [9, 3, 250, 17, 88, 3, 3, 250, 61, 5]
    _, state = model.prefill(np.array(prompt[:5]))
    model.attach(alora, name="x")
    assert invocation(model, prompt) == ("x", 5)
    logits, state = model.prefill(np.array(prompt[5:]), state)
    expected = []
    for _ in range(8):
        expected.append(int(np.argmax(logits)))
        logits, state = model.step(expected[-1], state)
    assert greedy(model, prompt) == expected[: len(greedy(model, prompt))] and list(model.adapters) == ["x"]
    model.adapters.clear()
    plain = greedy(model, prompt)
    model.attach(adapter(model))
    assert plain != expected != greedy(model, prompt)


def test_an_activated_lora_that_is_not_invoked_does_nothing(model):
    plain = greedy(model)
    model.attach(adapter(model, invocation_tokens=[250, 3]), name="x")
    assert invocation(model, PROMPT) == ("x", len(PROMPT))
    assert greedy(model) == plain and list(model.adapters) == ["x"]
    model.detach("x")
    model.attach(adapter(model, invocation_tokens=PROMPT[:2]))  # at the very beginning: as a plain LoRA
    activated = greedy(model)
    model.adapters.clear()
    model.attach(adapter(model))
    assert activated == greedy(model) != plain


def test_two_activated_loras_at_once_are_refused(model):
    for tokens in ([3], [250]):
        model.attach(adapter(model, invocation_tokens=tokens))
    with pytest.raises(InputError, match="2 activated LoRAs"):
        dr.generate(model, PROMPT)


def test_train_writes_the_metadata_that_it_is_given_and_no_other(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"text": "Say: a ship left the harbour"}\n')
    train = ["train", str(BASE), str(tmp_path / "data.jsonl"), "--rank", "1", "--steps", "1", "-o"]
    assert main([*train, str(tmp_path / "a.gguf"), "--task-name", "harbours", "--prompt-prefix", "Say: "]) == 0
    assert main([*train, str(tmp_path / "b.gguf")]) == 0
    fields = [{f.name: f.contents() for f in GGUFReader(tmp_path / f"{name}.gguf").fields.values()} for name in "ab"]
    assert fields[0].pop("adapter.lora.task_name") == "harbours"
    assert fields[0].pop("adapter.lora.prompt_prefix") == "Say: "
    assert fields[0].keys() == fields[1].keys()
    capsys.readouterr()
    assert (
        main(
            [
                "generate",
                str(BASE),
                "--adapter",
                str(tmp_path / "a.gguf"),
                "-p",
                "a ship",
                "--max-tokens",
                "3",
                "--temperature",
                "0",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        main(
            [
                "generate",
                str(BASE),
                "--adapter",
                str(tmp_path / "b.gguf"),
                "-p",
                "Say: a ship",
                "--max-tokens",
                "3",
                "--temperature",
                "0",
            ]
        )
        == 0
    )
    assert out == capsys.readouterr().out


@pytest.mark.parametrize("output", ["a.gguf", "peft"])
def test_a_text_that_is_not_unicode_is_refused_and_leaves_nothing(output, tmp_path, capsys):
    """The lone surrogate by which Python represents a byte of the command line that is not UTF-8."""
    assert (
        main(["convert", str(LORA), "-o", str(tmp_path / output), "--base", str(BASE), "--task-name", "a \udcff"]) == 2
    )
    assert "lone surrogate at character" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_command_line_respects_the_prefix_in_a_chat_too(model, tmp_path, capsys):
    adapter(model, prompt_prefix="Say: ").save_gguf(tmp_path / "a.gguf")
    adapter(model).save_gguf(tmp_path / "b.gguf")
    texts = []
    for options in (["-p", "a ship", "--adapter", "a"], ["-p", "Say: a ship", "--adapter", "b"]):
        options[-1] = str(tmp_path / f"{options[-1]}.gguf")
        assert main(["generate", str(BASE), "--chat", "--temperature", "0", "--max-tokens", "9", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
