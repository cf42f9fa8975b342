import ast
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import deltanet_ref as dr
from deltanet_ref.cli.main import COMMANDS, Parser, main
from deltanet_ref.cli.options import flag, with_flags
from deltanet_ref.errors import LONGEST, LONGEST_VALUE, counted
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from tests.paths import FIXTURES

MODEL = str(FIXTURES / "eq" / "eq-f32.gguf")
QUANTISED = str(FIXTURES / "quant" / "quant-Q4_K_M.gguf")
ADAPTER = str(FIXTURES / "eq" / "lora.gguf")
HF = FIXTURES / "eq" / "hf"
PACKAGE = Path(dr.__file__).parent
HANGS = 600  # seconds after which a process will never end: no machine is that slow
WORDS = ["alpha", "beta", "gamma", "delta", "rule", "gate"]
ROWS = [{"text": " ".join(np.random.default_rng(i).choice(WORDS, 9))} for i in range(13)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


def run(capsys, *words):
    """Exit status, stdout, stderr of the command line, in this process."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def process(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "deltanet_ref", *map(str, words)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


# ---- the main job


def test_train_writes_an_adapter_that_lowers_the_loss_of_a_quantised_model(capsys, tmp_path, data):
    output = tmp_path / "a.gguf"
    status, out, err = run(
        capsys,
        "train",
        QUANTISED,
        data,
        "-o",
        output,
        "--rank",
        4,
        "--alpha",
        8,
        "--steps",
        12,
        "--lr",
        0.01,
        "--batch-size",
        5,
        "--val-fraction",
        0.1,
        "--plot",
        tmp_path / "loss.png",
    )
    assert (status, err) == (0, "")
    for line in ("Trainable parameters: ", "Iter 1: Val loss ", "Iter 10: Train loss ", "Iter 12: Val loss ", "Saved "):
        assert line in out
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "data.jsonl", "loss.png"]
    losses = []
    for adapter in ([], ["--adapter", f"{output}=1.0"], ["--adapter", f"{output}=0"]):
        status, out, _ = run(capsys, "eval", QUANTISED, data, *adapter, "--json")
        losses.append(json.loads(out)["loss"])
    assert losses[1] < 0.8 * losses[0] and losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_same_command_writes_the_same_bytes(capsys, tmp_path, data):
    files = []
    for name in ("a.gguf", "b.gguf"):
        run(capsys, "train", MODEL, data, "-o", tmp_path / name, "--rank", 2, "--epochs", 1, "--seed", 4)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_eval_is_the_mean_over_tokens_of_the_models_losses(capsys, data):
    status, out, _ = run(capsys, "eval", MODEL, data, "--batch-size", 4, "--json")
    model = dr.load_model(MODEL, dtype="float64")
    (end,) = model.tokenizer.eos_ids
    rows = [model.tokenizer.encode(row["text"]) for row in ROWS]
    losses = [model.loss(np.array([ids + [end]]), np.array([ids + [end]])) for ids in rows]
    nats = sum(len(ids) * loss for ids, loss in zip(rows, losses))
    spelled = sum(len(row["text"].encode()) - len(model.tokenizer.token_bytes(ids[0])) for row, ids in zip(ROWS, rows))
    result = json.loads(out)
    assert result["tokens"] == sum(map(len, rows)) and result["bytes"] == spelled
    assert result["loss"] == pytest.approx(nats / sum(map(len, rows)), rel=1e-5)  # float32 against float64
    assert result["bits_per_byte"] == pytest.approx(nats / np.log(2) / spelled, rel=1e-5)
    assert f"perplexity    {result['perplexity']:.4g}" in run(capsys, "eval", MODEL, data)[1]


def test_eval_of_a_directory_takes_its_test_split(capsys, tmp_path):
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(capsys, "eval", MODEL, tmp_path)[1].startswith("2 examples")


def test_generate_streams_what_the_library_generates(capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("alpha beta")
    sampling = {"max_tokens": 12, "temperature": 8.0, "top_k": 90, "top_p": 0.98, "seed": 7}
    options = [word for name, value in sampling.items() for word in (flag(name), value)]
    status, out, err = run(capsys, "generate", MODEL, "-p", "alpha beta", *options)
    expected = "".join(dr.generate(dr.load_model(MODEL), "alpha beta", **sampling))
    assert (status, out) == (0, expected + "\n")
    assert "tokens/s" in err
    assert run(capsys, "generate", MODEL, "--prompt-file", tmp_path / "prompt.txt", *options)[1] == out
    assert run(capsys, "generate", MODEL, "-p", "alpha beta", *options, "--adapter", ADAPTER)[1] != out


def test_chat_asks_through_the_template(capsys, tmp_path):
    file = read_gguf(MODEL)
    thinking = (FIXTURES / "chat" / "Qwen3.5-4B.jinja").read_text()
    write_gguf(
        tmp_path / "thinks.gguf",
        file.metadata | {"tokenizer.chat_template": thinking},
        {name: (tensor.raw, tensor.type, tensor.shape) for name, tensor in file.tensors.items()},
    )
    model, asked = dr.load_model(MODEL), "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    for flags, prompt in (["--chat"], asked), (["--chat", "--no-thinking"], asked + "\n</think>\n\n"), ([], "Who?"):
        expected = "".join(dr.generate(model, prompt, max_tokens=8, temperature=9.0, top_k=0, seed=2))
        assert (
            run(
                capsys,
                "generate",
                tmp_path / "thinks.gguf",
                "-p",
                "Who?",
                "--max-tokens",
                8,
                "--temperature",
                9.0,
                "--top-k",
                0,
                "--seed",
                2,
                *flags,
            )[1]
            == expected + "\n"
        )


def test_adapters_stack_with_their_scales(capsys):
    model = dr.load_model(MODEL)
    for name, scale in (("a", 0.5), ("b", 1.0)):
        model.attach(dr.load_adapter(ADAPTER, model), scale=scale, name=name)
    expected = "".join(dr.generate(model, "alpha", max_tokens=10, temperature=0))
    out = run(
        capsys,
        "generate",
        MODEL,
        "-p",
        "alpha",
        "--max-tokens",
        10,
        "--temperature",
        0,
        "--adapter",
        f"{ADAPTER}=0.5",
        "--adapter",
        ADAPTER,
    )[1]
    assert out == expected + "\n"


def test_info_prints_shapes_types_and_template(capsys):
    status, out, _ = run(capsys, "info", QUANTISED, "--json")
    facts = json.loads(out)
    assert (status, facts["architecture"], facts["chat_template"]) == (0, "qwen35", True)
    assert facts["config"]["hidden_size"] == 256 and facts["tokenizer"]["end_tokens"] == ["<|im_end|>"]
    assert facts["parameters"] == sum(np.prod(tensor["shape"]) for tensor in facts["tensors"])
    assert set(facts["types"]) == {"F32", "Q4_K", "Q6_K"}
    # all tensor bytes of the file, which has its header and padding besides
    assert 0 < os.path.getsize(QUANTISED) - facts["bytes"] < 60_000
    text = run(capsys, "info", QUANTISED)[1]
    assert "Q6_K" in text and "blk.0" not in text
    assert "blk.0.attn_qkv.weight" in run(capsys, "info", QUANTISED, "--tensors")[1]


def test_info_of_an_adapter_in_either_form_and_of_a_directory(capsys):
    ggml, peft = (json.loads(run(capsys, "info", path, "--json")[1]) for path in (ADAPTER, FIXTURES / "eq" / "lora"))
    assert (ggml["alpha"], ggml["ranks"], len(ggml["targets"])) == (8.0, [4], 12)
    assert ggml.keys() == peft.keys()
    assert all(ggml[fact] == peft[fact] for fact in ("parameters", "alpha", "ranks", "bytes", "types"))
    assert len(peft["targets"]) == 12 and {"attn_qkv", "ffn_up"} < set(ggml["targets"])
    assert {"in_proj_qkv", "up_proj"} < set(peft["targets"])
    assert sorted(sorted(t["shape"]) for t in ggml["tensors"]) == sorted(sorted(t["shape"]) for t in peft["tensors"])
    facts = json.loads(run(capsys, "info", FIXTURES / "eq" / "hf", "--json")[1])
    assert facts["config"]["num_hidden_layers"] == 4


# ---- usage


@pytest.mark.parametrize("command", ["info", "generate", "train", "eval"])
def test_help_has_a_worked_example(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and f"usage: deltanet-ref {command}" in out
    assert f"\nexample:\n  deltanet-ref {command} " in out


def test_module_is_the_command_and_names_every_command():
    done = process("--help")
    out, err = done.communicate()
    assert (done.returncode, err) == (0, "")
    assert all(f"\n  {command} " in out for command in COMMANDS)


# ---- what a user is told


def library_modules():
    """The syntax trees of all modules outside the command line."""
    for folder in ("train", "model", "demo", "lora", "ops", "backends"):
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def test_the_library_has_no_command_line():
    for path, tree in library_modules():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not names & {"argparse", "add_arguments", "parser"}, path


def test_errors_of_training_name_no_flags():
    for path, tree in library_modules():
        raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)] if "lora" not in path.parts else []
        texts = [part.value for node in raised for part in ast.walk(node) if isinstance(part, ast.Constant)]
        assert not [text for text in texts if isinstance(text, str) and re.search(r"(^|\s)--[a-z]", text)], path


@pytest.mark.parametrize(
    "options, python, command",
    [
        ({"steps": 0}, "`steps` is 0", "--steps is 0"),
        ({"seq_len": 1}, "`seq_len` is 1, it must be from 2", "--seq-len is 1, it must be from 2"),
        (
            {"seq_len": 5},
            "more than `seq_len` 5: raise it, or cut with `truncate=True`",
            "more than --seq-len 5: raise it, or cut with --truncate",
        ),
        ({"val_fraction": 0.99}, "`val_fraction` 0.99 holds out", "--val-fraction 0.99 holds out"),
        ({"steps": 1, "epochs": 2}, "`steps` and `epochs` both", "--steps and --epochs both"),
    ],
)
def test_options_have_the_names_that_the_reader_uses(capsys, tmp_path, data, options, python, command):
    model = dr.load_model(MODEL)
    with pytest.raises(dr.InputError) as error:
        dr.train(model, dr.new_adapter(model, rank=2), data, **options)
    assert python in str(error.value) and "--" not in str(error.value)
    flags = [word for name, value in options.items() for word in (flag(name), value)]
    status, _, err = run(capsys, "train", MODEL, data, "-o", tmp_path / "a.gguf", *flags)
    assert status == 2 and command in err and "`" not in err


def test_only_options_of_the_command_become_flags():
    options = {"seq_len": 3, "mask_prompt": True}
    text = "`seq_len`, `mask_prompt=False`, `rank`, seq_len"
    assert with_flags(text, options) == "--seq-len, --no-mask-prompt, `rank`, seq_len"


def test_counts_agree_with_their_nouns(capsys, tmp_path):
    assert [counted(n, "tensor") for n in (0, 1, 2, 1000)] == ["0 tensors", "1 tensor", "2 tensors", "1,000 tensors"]
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0]))
    assert run(capsys, "eval", MODEL, tmp_path / "one.jsonl")[1].startswith("1 example, ")


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "command",
    [
        f"info {LONG}",
        f"generate {MODEL} -p x --backend {LONG}",
        f"fly{LONG}",
        f"generate {MODEL} -p x --top-p {LONG}",
        f"trace {MODEL} --tokens {LONG} -o t.safetensors",
        f"convert {MODEL} -o a.gguf --type {LONG}",
        f"generate {MODEL} -p x --{LONG}",
        f"generate {MODEL} -p x --adapter {ADAPTER}={LONG}",
    ],
    ids=lambda text: text[:40],
)
def test_a_long_argument_is_not_echoed_whole(capsys, command):
    status, _, err = run(capsys, *command.split())
    assert status == 2 and err.count("\n") == 1 and "xxx" in err and len(err) < LONGEST + 100


def test_a_long_value_of_a_file_is_not_echoed_whole(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": [{"from": LONG, "value": "x"}]}))
    status, _, err = run(capsys, "eval", MODEL, tmp_path / "rows.jsonl")
    assert status == 2 and "use one of human, user" in err and err.count("x") < LONGEST_VALUE + 20


@pytest.mark.parametrize(
    "command",
    [
        "info {name}",
        "generate {name} -p x",
        "convert {name} -o out.gguf",
        "merge {name} --adapter {adapter} -o out.gguf",
        "generate {model} -p x --adapter {name}",
    ],
)
def test_a_name_on_the_hub_says_where_to_get_the_model(capsys, command):
    name = "Qwen/Qwen3.5-0.8B"
    status, _, err = run(capsys, *command.format(name=name, model=MODEL, adapter=ADAPTER).split())
    assert status == 2 and f"hf download {name} --local-dir Qwen3.5-0.8B" in err
    for other in ("absent", "absent.gguf", "folder/absent.gguf", "a/b/c", "/Qwen/Qwen3.5-0.8B", "../Qwen3.5-0.8B"):
        assert "hub" not in run(capsys, "info", other)[2]


@pytest.mark.parametrize(
    "command, remedies",
    [
        (["train", MODEL, "{data}", "-o", "{d}/a.gguf"], "use --checkpoint, or a smaller --batch-size or --seq-len"),
        (["train", MODEL, "{data}", "-o", "{d}/a.gguf", "--checkpoint"], "use a smaller --batch-size or --seq-len"),
        (["eval", MODEL, "{data}"], "use a smaller --batch-size or --seq-len"),
        (["trace", MODEL, "-p", "x", "-o", "{d}/a.safetensors"], "use a smaller model or file"),
    ],
)
def test_without_memory_checkpointing_is_the_first_remedy(capsys, tmp_path, data, monkeypatch, command, remedies):
    def no_memory(args):
        raise MemoryError("Unable to allocate 7 GiB")

    for module in ("train", "evaluate", "trace"):
        monkeypatch.setattr(f"deltanet_ref.cli.{module}.load", no_memory)
    status, _, err = run(capsys, *(word.format(d=tmp_path, data=data) for word in command))
    assert status == 1 and err.endswith(f"out of memory (Unable to allocate 7 GiB): {remedies}\n")


def test_types_are_taken_as_info_prints_them(capsys, tmp_path):
    model = dr.load_model(QUANTISED)
    dr.new_adapter(model, rank=1, targets="ffn_up").save_gguf(tmp_path / "adapter.gguf")
    for command in (["convert", QUANTISED], ["merge", QUANTISED, "--adapter", tmp_path / "adapter.gguf"]):
        assert run(capsys, *command, "--type", "Q8_0", "-o", tmp_path / "a.gguf", "--force")[0] == 0
        assert "Q8_0" in json.loads(run(capsys, "info", tmp_path / "a.gguf", "--json")[1])["types"]
    for command, words in {"pretrain": "text --tokenizer t --steps 1 -o a.gguf", "routes": "m a data -o out"}.items():
        import_module(COMMANDS[command][0]).add_arguments(parser := Parser())
        assert parser.parse_args([*words.split(), "--type", "Q8_0"]).type == "q8_0"


# ---- the context, and long prompts


@pytest.fixture(scope="module")
def long_prompt(tmp_path_factory):
    """A file whose text has 1,020 tokens; the model's context is 1,024."""
    tokenizer, path = dr.load_tokenizer(MODEL), tmp_path_factory.mktemp("prompt") / "long.txt"
    text = tokenizer.decode(tokenizer.encode(" ".join(ROWS[i % 13]["text"] for i in range(200)))[:1020])
    assert len(tokenizer.encode(text)) == 1020
    path.write_text(text)
    return path


def test_generate_stops_at_the_end_of_the_context_and_says_so(capsys, long_prompt):
    status, _, err = run(
        capsys,
        "generate",
        MODEL,
        "--prompt-file",
        long_prompt,
        "--max-tokens",
        50,
        "--temperature",
        9,
        "--top-k",
        0,
        "--top-p",
        1,
    )
    assert status == 0 and err.startswith("4 tokens in ") and "to read 1,020 prompt tokens\n" in err
    assert "note: the model's context of 1,024 tokens is full" in err
    assert "context" not in run(capsys, "generate", MODEL, "-p", "alpha", "--max-tokens", 2)[2]


def test_a_prompt_that_fills_the_context_is_refused(capsys, long_prompt, tmp_path):
    (tmp_path / "longer.txt").write_text(long_prompt.read_text() + " alpha beta gamma")
    status, out, err = run(capsys, "generate", MODEL, "--prompt-file", tmp_path / "longer.txt")
    assert (status, out) == (2, "") and "leaves no room in the model's context of 1,024: shorten it" in err
    longer = (tmp_path / "longer.txt").read_text()
    status, _, err = run(capsys, "trace", MODEL, "-p", longer, "-o", tmp_path / "t.safetensors")
    assert status == 0 and "more than the model's context of 1,024" in err


def on_a_terminal(*words):
    """Exit status, stdout, and what stderr, a terminal, was sent."""
    ours, theirs = os.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "deltanet_ref", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # how Linux ends a terminal whose other side is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    out, _ = running.communicate()
    return running.returncode, out.decode(), shown.decode()


def test_a_long_prompt_and_a_long_evaluation_show_their_progress_on_a_terminal(long_prompt, data):
    status, out, shown = on_a_terminal("generate", MODEL, "--prompt-file", long_prompt, "--max-tokens", 1)
    assert status == 0 and re.search(r"reading the prompt.* 512/1020", shown) and "prompt" not in out
    status, out, shown = on_a_terminal("generate", MODEL, "-p", "alpha beta", "--max-tokens", 1)
    assert status == 0 and "reading the prompt" not in shown
    status, out, shown = on_a_terminal("eval", MODEL, data, "--batch-size", 5)
    assert status == 0 and re.search(r"evaluating.* 5/13", shown) and out.startswith("13 examples")


# ---- existing files


@pytest.fixture
def existing(tmp_path, capsys):
    """A file of each kind, by name."""
    (tmp_path / "model.gguf").write_bytes(open(MODEL, "rb").read())
    (tmp_path / "adapter.gguf").write_bytes(open(ADAPTER, "rb").read())
    (tmp_path / "notes.gguf").write_text("my notes")
    (tmp_path / "weights.safetensors").write_bytes((FIXTURES / "eq" / "hf" / "model.safetensors").read_bytes())
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "corpus.txt").write_text("a b c\n\n" * 99)
    assert run(capsys, "trace", MODEL, "--tokens", "3,4", "-o", tmp_path / "trace.safetensors")[0] == 0
    return tmp_path


WRITES = {
    "train": "train {model} {data} --rank 2 --steps 1 -o {d}/",
    "convert a base": "convert {model} -o {d}/",
    "convert an adapter": "convert {adapter} --base {model} -o {d}/",
    "merge": "merge {model} --adapter {adapter} -o {d}/",
    "pretrain": "pretrain {d}/corpus.txt --tokenizer {tokenizer} --steps 1 -o {d}/",
    "demo": "demo -o {d}/",
    "trace": "trace {model} --tokens 5,6,7 -o {d}/",
}
REFUSED = [(command, name) for command in WRITES if command != "trace" for name in ("model.gguf", "notes.gguf")]
REFUSED += [(command, "adapter.gguf") for command in ("convert a base", "merge", "pretrain")]
REFUSED += [("trace", "weights.safetensors")]


def write_over(capsys, existing, data, command, name, *more):
    words = WRITES[command].format(model=MODEL, adapter=ADAPTER, data=data, d=existing, tokenizer=HF)
    return run(capsys, *(words + name).split(), *more)


@pytest.mark.parametrize("command, name", REFUSED)
def test_an_existing_file_is_not_overwritten(capsys, existing, data, command, name):
    before = (existing / name).read_bytes()
    status, _, err = write_over(capsys, existing, data, command, name)
    assert status == 2 and f"{name}: exists already" in err and "--force" in err
    assert (existing / name).read_bytes() == before


@pytest.mark.parametrize(
    "command, name, more",
    [
        ("train", "adapter.gguf", []),
        ("convert an adapter", "adapter.gguf", []),
        ("trace", "trace.safetensors", []),
        ("merge", "empty.gguf", []),
        ("convert a base", "model.gguf", ["--force"]),
        ("train", "notes.gguf", ["--force"]),
        ("trace", "weights.safetensors", ["--force"]),
    ],
)
def test_the_same_kind_of_small_result_and_what_is_forced_are_replaced(capsys, existing, data, command, name, more):
    before = (existing / name).stat().st_ino
    status, _, err = write_over(capsys, existing, data, command, name, *more)
    assert status == 0, err
    assert (existing / name).stat().st_ino != before  # another file took the name


@pytest.mark.parametrize(
    "command",
    [
        "convert {d}/model.gguf -o {d}/model.gguf --force",
        "train {d}/model.gguf {data} -o {d}/model.gguf --force",
        "merge {d}/model.gguf --adapter {d}/adapter.gguf -o {d}/adapter.gguf --force",
    ],
)
def test_not_even_force_overwrites_an_input(capsys, existing, data, command):
    status, _, err = run(capsys, *command.format(d=existing, data=data).split())
    assert status == 2 and "is an input too" in err


# ---- bad input: status 2, one line on stderr, nothing written


def bad_file(tmp_path, data):
    """Files with something wrong in them, by name."""
    model = open(MODEL, "rb").read()
    (tmp_path / "notgguf.gguf").write_bytes(b"hello" * 99)
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "cut.gguf").write_bytes(model[:300_000])
    (tmp_path / "header.gguf").write_bytes(model[:3000])
    (tmp_path / "llama.gguf").write_bytes(model.replace(b"qwen35", b"llama5"))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "fields.jsonl").write_text('{"txt": "a"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "alpha beta " * 900}))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "data.gguf").write_text(open(data).read())


TRAIN = "train {model} {data} -o {d}/out.gguf"
BAD = [
    ("", "no command given"),
    ("--nonsense", "unrecognized arguments"),
    ("fly", "invalid choice: 'fly'"),
    ("train {model} {data}", "-o/--output"),
    ("info", "MODEL"),
    ("info {d}/absent.gguf", "absent.gguf"),
    ("info {d}", "config.json"),
    ("info {d}/notgguf.gguf", "not a GGUF"),
    ("info {d}/empty.gguf", "not a GGUF"),
    ("info {d}/cut.gguf", "truncated"),
    ("info {d}/header.gguf", "truncated"),
    ("info {d}/llama.gguf", "llama5"),
    ("generate {d}/llama.gguf -p x", "llama5"),
    ("generate {adapter} -p x", "lora.gguf"),
    ("generate {model}", "one of the arguments"),
    ("generate {model} -p x --prompt-file y", "not allowed with"),
    ("generate {model} -p ''", "prompt is empty"),
    ("generate {model} -p x --max-tokens 0", "--max-tokens 0"),
    ("generate {model} -p x --top-p two", "invalid float value: 'two'"),
    ("generate {model} --prompt-file {d}/absent.txt", "absent.txt"),
    ("generate {model} --prompt-file {d}", "directory"),
    ("generate {model} --prompt-file {d}/latin.txt", "not UTF-8"),
    ("generate {model} -p x --adapter {model}", "LoRA"),
    ("generate {model} -p x --adapter {d}/absent.gguf", "absent.gguf"),
    ("generate {model} -p x --adapter {adapter}=lots", "'lots' is not a finite number"),
    ("generate {model} -p x --backend abacus", "abacus"),
    ("generate {model} -p x --dtype int8", "int8"),
    ("generate {model} -p x --threads 0", "--threads is 0"),
    ("eval {model} {d}/absent.jsonl", "no such file"),
    ("eval {model} {d}/long.jsonl", "--truncate"),
    ("eval {model} {data} --batch-size 0", "--batch-size is 0"),
    ("eval {model} {data} --seq-len 0", "--seq-len is 0"),
    (TRAIN.replace("{model}", "{d}/cut.gguf"), "truncated"),
    (TRAIN.replace("{data}", "{d}/absent.jsonl"), "no such file"),
    (TRAIN.replace("{data}", "{d}/empty.jsonl"), "contains no rows"),
    (TRAIN.replace("{data}", "{d}/broken.jsonl"), "broken.jsonl:2: not JSON"),
    (TRAIN.replace("{data}", "{d}/fields.jsonl"), "fields.jsonl:1: has 'txt'"),
    (TRAIN.replace("{data}", "{d}/long.jsonl"), "long.jsonl:1: "),
    (TRAIN + " --seq-len 9999", "context of 1024"),
    (TRAIN + " --steps 0", "--steps is 0"),
    (TRAIN + " --rank 0", "rank"),
    (TRAIN + " --alpha 0", "alpha"),
    (TRAIN + " --alpha nan", "alpha"),
    (TRAIN + " --targets nonsense", "nonsense"),
    (TRAIN + " --lr -1", "--lr is -1"),
    (TRAIN + " --plot {d}/plot.doc", "plot.doc"),
    (TRAIN + " --plot {d}/absent/plot.png", "does not exist"),
    ("train {model} {data} -o {d}/out.bin", "must end in .gguf"),
    ("train {model} {data} -o {d}/absent/out.gguf", "does not exist"),
    ("train {model} {data} -o {d}/folder.gguf", "not a regular file"),
    ("train {model} {data} -o /proc/out.gguf", "/proc"),  # nobody, not even root, can make a file there
    ("train {model} {d}/data.gguf -o {d}/data.gguf", "is an input too"),
]


@pytest.mark.parametrize("command, reason", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(capsys, tmp_path, data, command, reason):
    bad_file(tmp_path, data)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in os.listdir(tmp_path)}
    words = [word.format(d=tmp_path, model=MODEL, adapter=ADAPTER, data=data).strip("'") for word in command.split()]
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith("deltanet-ref: error: ") and err.count("\n") == 1 and reason in err
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in os.listdir(tmp_path)} == before


def test_base_model_is_never_the_output(capsys, tmp_path, data):
    link = tmp_path / "link.gguf"
    link.symlink_to(MODEL)
    status, _, err = run(capsys, "train", MODEL, data, "-o", link)
    assert status == 2 and "is an input too" in err


def test_diverging_training_is_status_1_and_keeps_the_old_adapter(capsys, tmp_path, data):
    output = tmp_path / "a.gguf"
    output.write_bytes(open(ADAPTER, "rb").read())
    status, _, err = run(capsys, "train", MODEL, data, "-o", output, "--lr", 1e30, "--steps", 9, "--rank", 2)
    assert status == 1 and err.count("\n") == 1 and "lower the learning rate" in err
    assert output.read_bytes() == open(ADAPTER, "rb").read()


# ---- runs that are cut off


def long_run(data, output):
    """A training that saves after each step and would take minutes; returns when it has begun."""
    training = process("train", MODEL, data, "-o", output, "--steps", 99_999, "--save-every", 1, "--rank", 2)
    while not output.exists():
        assert training.poll() is None, training.stderr.read()
        time.sleep(0.01)
    return training


def test_killed_training_leaves_a_whole_adapter(tmp_path, data):
    model, output = dr.load_model(MODEL), tmp_path / "a.gguf"
    for pause in np.linspace(0.0, 0.05, 4):  # several moments between and within saves
        output.unlink(missing_ok=True)
        training = long_run(data, output)
        time.sleep(pause)
        training.kill()
        training.communicate()
        assert dr.load_adapter(output, model).rank("blk.0.attn_qkv.weight") == 2


def test_disk_that_fills_up_while_saving_keeps_the_old_adapter(tmp_path, data):
    output = tmp_path / "a.gguf"
    output.write_bytes(open(ADAPTER, "rb").read())
    limit = 20_000  # bytes that a file may have, less than the adapter
    training = process(
        "train",
        MODEL,
        data,
        "-o",
        output,
        "--steps",
        1,
        "--rank",
        4,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, err = training.communicate(timeout=HANGS)
    assert training.returncode == 2 and err.count("\n") == 1 and "a.gguf" in err
    assert output.read_bytes() == open(ADAPTER, "rb").read()
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "data.jsonl"]


def test_interrupt_saves_the_adapter_and_says_so(tmp_path, data):
    output = tmp_path / "a.gguf"
    training = long_run(data, output)
    training.send_signal(signal.SIGINT)
    out, err = training.communicate(timeout=HANGS)
    assert training.returncode == 130
    assert err.startswith("Interrupted after ") and err.count("\n") == 1 and "Saved " in out
    assert np.any(dr.load_adapter(output, dr.load_model(MODEL)).tensors["blk.0.attn_qkv.weight.lora_b"])
