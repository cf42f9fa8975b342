"""Bad files give one clear error, quickly and in little memory: the corpus, mutated files, and each kind of damage."""

import json
import shutil
import signal
import struct
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from deltanet_ref.cli.main import main
from deltanet_ref.errors import InputError
from deltanet_ref.formats import tokenizer as tokenizers
from deltanet_ref.formats.files import read_json
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.formats.safetensors import INDEX, SINGLE, read_safetensors, write_safetensors
from deltanet_ref.formats.tokenizer import load_tokenizer
from tests.fuzz import readers
from tests.fuzz.__main__ import CORPUS
from tests.fuzz.mutate import mutate
from tests.test_gguf import array, file, key, string, tensor

SECONDS, MEGABYTES = 120, 24  # one file of a few kB: 6 MB at most, 0.1 s; the seconds only end what hangs
MUTATED = 60  # files of each kind


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    readers.make_good_files(directory := tmp_path_factory.mktemp("good"))
    return directory


@pytest.fixture
def work(good, tmp_path):
    return shutil.copytree(good, tmp_path / "work")


@contextmanager
def bounded(seconds=SECONDS, megabytes=MEGABYTES):
    """Fails if the block hangs or exceeds this much memory at any time."""

    def stop(signum, frame):
        raise AssertionError(f"not done after {seconds} s of CPU")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert peak < megabytes << 20, f"{peak >> 20} MiB"


@pytest.mark.parametrize("target", readers.TARGETS)
def test_good_files_pass_every_reader_made_for_them(target, good, work):
    for raw in readers.TARGETS[target].seeds(good):
        assert readers.read(target, work, raw)


@pytest.mark.parametrize("target", readers.TARGETS)
def test_the_corpus_gives_nothing_but_clear_errors(target, work):
    """Small inputs that the fuzzer kept, each because it reaches code that the others do not."""
    files = sorted((CORPUS / target).iterdir())
    assert files
    for path in files:
        with bounded():
            readers.read(target, work, path.read_bytes())


@pytest.mark.parametrize("target", readers.TARGETS)
def test_mutated_files_give_nothing_but_clear_errors(target, good, work):
    rng, seeds, accepted = np.random.default_rng(3), readers.TARGETS[target].seeds(good), 0
    for i in range(MUTATED):
        raw = mutate(seeds[i % len(seeds)], rng)
        accepted += readers.read(target, work, raw)
    assert 0 < accepted < MUTATED  # the damage is neither always fatal nor never


def refused(target, work, raw, reason):
    """Every reader of the target refuses these bytes, or the one that looks at the damage: some line has the reason."""
    lines = []
    for reader in readers.TARGETS[target].readers(work, raw):
        try:
            reader()
        except InputError as error:
            lines.append(str(error))
    assert any(reason in line for line in lines), lines


# ---- GGUF


def gguf(source, **changes):
    """A good file with other metadata (None: without the key) or tensors, written anew."""

    def build(good):
        file = read_gguf(good / source)
        metadata = file.metadata | {k: v for k, v in changes.items() if k != "tensors"}
        tensors = {t.name: (t.raw, t.type, t.shape) for t in file.tensors.values()} | changes.get("tensors", {})
        write_gguf(path := good / "changed.gguf", {k: v for k, v in metadata.items() if v is not None}, tensors)
        return path.read_bytes()

    return build


def alpha_and(name, dimensions, kind=Type.F32):
    return file(
        [
            key("general.type", 8, string("adapter")),
            key("general.architecture", 8, string("qwen35")),
            key("adapter.type", 8, string("lora")),
        ],
        [tensor(name, dimensions, kind)],
    )


TEXTS = np.arange(3, dtype=np.int32)  # where a text belongs
GGUF_FILES = {
    "a number of quantised blocks without an axis": (file(tensors=[tensor(dimensions=(), kind=Type.Q8_0)]), "blocks"),
    "dimensions whose product overflows": (file(tensors=[tensor(dimensions=(2**32, 2**32, 2))]), "ends at byte"),
    "a count of 2^60 keys": (file(n_keys=2**60), "truncated"),
    "an array of 2^62 numbers": (file([key("a", 9, array(2**62, 4))]), "truncated"),
    "arrays in arrays": (file([key("a", 9, array(1, 9, array(1, 9, array(1, 4, bytes(4)))))]), "array of arrays"),
    "a type that is an array": (gguf("model.gguf", **{"general.type": TEXTS}), "not 'model'"),
    "an architecture that is an array": (gguf("model.gguf", **{"general.architecture": TEXTS}), "the architecture is"),
    "a rope scaling that is an array": (gguf("model.gguf", **{"qwen35.rope.scaling.type": TEXTS}), "rope.scaling"),
    "sections that are texts": (gguf("model.gguf", **{"qwen35.rope.dimension_sections": ["a", "b"]}), "list of counts"),
    "2^31 layers": (gguf("model.gguf", **{"qwen35.block_count": np.uint32(2**31)}), "layers"),
    "a layer size of 0": (gguf("model.gguf", **{"qwen35.embedding_length": np.uint32(0)}), "positive integer"),
    "tokens that are a number": (gguf("model.gguf", **{"tokenizer.ggml.tokens": np.uint32(7)}), "vocabulary"),
    "token types that are fractions": (
        gguf("model.gguf", **{"tokenizer.ggml.token_type": np.full(12, np.nan, np.float32)}),
        "token_type",
    ),
    "the same token twice": (gguf("model.gguf", **{"tokenizer.ggml.tokens": ["a"] * 12}), "'a' twice"),
    "a factor without an axis": (alpha_and("blk.0.ffn_up.weight.lora_a", ()), "missing"),
    "a factor of no tensor": (alpha_and(".lora_a", (3,)), "would do nothing"),
    "a task name that is a number": (gguf("adapter.gguf", **{"adapter.lora.task_name": 7}), "task_name"),
    "invocation tokens that are texts": (
        gguf("adapter.gguf", **{"adapter.alora.invocation_tokens": ["a", "b"]}),
        "invocation tokens",
    ),
    "an alpha that is not a number": (gguf("adapter.gguf", **{"adapter.lora.alpha": np.float32(np.nan)}), "alpha"),
}


@pytest.mark.parametrize("case", GGUF_FILES)
def test_a_gguf_file_with(case, good, work):
    raw, reason = GGUF_FILES[case]
    raw = raw(good) if callable(raw) else raw
    with bounded():
        refused("gguf", work, raw, reason)


def test_names_cannot_write_to_the_terminal(tmp_path):
    (tmp_path / "a.gguf").write_bytes(file(tensors=[tensor("\x1b[2J\n\u202e", (3,))]))
    with pytest.raises(InputError) as error:
        readers.model(tmp_path / "a.gguf")
    error = InputError(f"unexpected: \x1b[2J\n\u202e{'x' * 10**6}")
    assert str(error).isprintable() and r"\x1b[2J \u202ex" in str(error) and len(str(error)) < 10_000


def test_names_that_are_no_errors_cannot_write_to_the_terminal_either(good, tmp_path, capsys):
    bad, path = "\x1b[2J\u202e", tmp_path / "a.gguf"
    build = gguf(
        "adapter.gguf",
        tensors={f"blk.7.{bad}.weight.lora_a": np.ones((2, 3), np.float32)},
        **{"adapter.lora.task_name": f"{bad}\nt"},
    )
    path.write_bytes(build(good))
    base = str(good / "model.gguf")
    for command, status in (
        (["info", str(path), "--tensors"], 0),
        (["verify", base, str(path), "-p", "abba"], 1),
        (["convert", str(path), "-o", str(tmp_path / "b.gguf"), "--base", base, "--drop", bad], 0),
    ):
        assert main(command) == status
        output = "".join(capsys.readouterr())
        assert "\\x1b[2J" in output and output.replace("\n", "").isprintable()


# ---- safetensors


def safetensors(header, data=b""):
    header = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(header)) + header.encode() + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = json.dumps(entry([1], 0, 4))
SAFETENSORS_FILES = {
    "nothing": (b"", "not a safetensors file"),
    "a header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file"),
    "a header past the end": (safetensors({})[:-1], "not a safetensors file"),
    "offsets past the end": (safetensors({"a": entry([2], 0, 8)}, bytes(4)), "not a safetensors file"),
    "offsets that overlap": (
        safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
        "not a safetensors file",
    ),
    "a hole": (safetensors({"a": entry([1], 4, 8)}, bytes(8)), "not a safetensors file"),
    "a shape that is not the offsets'": (safetensors({"a": entry([3], 0, 4)}, bytes(4)), "not a safetensors file"),
    "a shape that overflows": (safetensors({"a": entry([2**62, 4], 0, 0)}), "not a safetensors file"),
    "a shape of 2^62 times nothing": (safetensors({"a": entry([0, 2**62], 0, 0)}), "has the shape"),
    "65 axes": (safetensors({"a": entry([1] * 65, 0, 4)}, bytes(4)), "has the shape"),
    "an unknown type": (safetensors({"a": entry([1], 0, 4, "F31")}, bytes(4)), "not a safetensors file"),
    "the same name twice": (safetensors(f'{{"a": {ONE}, "a": {ONE}}}', bytes(4)), "'a' appears twice"),
    "values nested for ever": (safetensors('{"a":' + "[" * 10**5), "not a safetensors file"),
    "a factor's name with a sign of the settings": (safetensors({"a = b": entry([1], 0, 4)}, bytes(4)), "nothing"),
}


@pytest.mark.parametrize("case", SAFETENSORS_FILES)
def test_a_safetensors_file_with(case, work):
    raw, reason = SAFETENSORS_FILES[case]
    with bounded():
        refused("safetensors", work, raw, reason)


def test_a_decay_beyond_all_numbers_is_a_decay_to_nothing(work):
    path = work / "hf" / SINGLE
    tensors = dict(read_safetensors(path))
    name = "model.layers.0.linear_attn.A_log"
    write_safetensors(path, tensors | {name: np.full_like(tensors[name], 1000)})
    assert readers.read("safetensors", work, path.read_bytes())


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "..",
        "sub/../../outside.safetensors",
        "..\\outside.safetensors",
        "",
        "a\0.safetensors",
    ],
)
def test_an_index_cannot_name_files_elsewhere(name, work):
    shutil.copy(work / "hf" / SINGLE, work / "outside.safetensors")
    names = dict.fromkeys(read_safetensors(work / "hf"), name)
    (work / "hf" / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match="not a .safetensors file of this directory|cannot be read"):
        read_safetensors(work / "hf")


# ---- JSON


def changed(source, **changes):
    """A good JSON file with other top-level values, written as JSON has it: NaN and Infinity too."""
    return lambda good: json.dumps(read_json(good / source) | changes).encode()


def tokenizer_with(**changes):
    model = {**readers.TOKENIZER["model"], **changes.pop("model", {})}
    return json.dumps(readers.TOKENIZER | changes | {"model": model}).encode()


def added(**changes):
    return tokenizer_with(added_tokens=[{"id": 9, "content": "<x>", "special": True} | changes])


PEFT, HF = "peft/adapter_config.json", "hf/config.json"
JSON_FILES = {
    "nothing": ("config", b"", "JSON"),
    "a list": ("config", b"[]", "expected a JSON object"),
    "bytes that are no text": ("config", b"\xff\xfe{", "not UTF-8"),
    "100,000 brackets": ("config", b'{"a":' + b"[" * 10**5, "JSON"),
    "300 levels": ("config", b'{"layer_types":' + b"[" * 300 + b"]" * 300 + b"}", "deeper than 100"),
    "a name twice": ("config", b'{"model_type": 1, "model_type": 2}', "appears twice"),
    "a number of 10^5 digits": ("config", b'{"vocab_size": ' + b"9" * 10**5 + b"}", "JSON"),
    "rope parameters in a list": ("config", changed(HF, rope_parameters=[1]), "rope_parameters"),
    "rotary sections of 2^63": (
        "config",
        changed(HF, rope_parameters={"mrope_section": [2**63, 0, 0]}),
        "mrope_section",
    ),
    "a size of 10^400": ("config", changed(HF, hidden_size=10**400), "positive integer"),
    "a size that is NaN": ("config", changed(HF, rms_norm_eps=float("nan")), "positive number"),
    "10^9 layers": ("config", changed(HF, num_hidden_layers=10**9), "num_hidden_layers"),
    "an index of brackets": ("index", b'{"weight_map":' + b"[" * 10**5, "JSON"),
    "an index of numbers": ("index", b'{"weight_map": {"a": 7}}', "not a safetensors index"),
    "a rank of 10^400": ("adapter_config", changed(PEFT, r=10**400), "rank"),
    "a rank that is infinite": ("adapter_config", changed(PEFT, r=float("inf")), "rank"),
    "an alpha of 10^400": ("adapter_config", changed(PEFT, lora_alpha=10**400, use_rslora=True), "alpha"),
    "an alpha that is a list": ("adapter_config", changed(PEFT, lora_alpha=[1]), "alpha"),
    "patterns in a list": ("adapter_config", changed(PEFT, rank_pattern=["a"]), "not an object"),
    "a pattern that is no regular expression": (
        "adapter_config",
        changed(PEFT, rank_pattern={"(": 2}),
        "cannot be read",
    ),
    "invocation tokens that are texts": (
        "adapter_config",
        changed(PEFT, alora_invocation_tokens=["a"]),
        "invocation tokens",
    ),
    "invocation tokens that are a number": (
        "adapter_config",
        changed(PEFT, alora_invocation_tokens=1e308),
        "invocation tokens",
    ),
    "a token id that is a text": ("tokenizer", added(id="9"), "not a BPE"),
    "a token id of 10^9": ("tokenizer", added(id=10**9), "do not fit"),
    "a token id below 0": ("tokenizer", added(id=-1), "do not fit"),
    "two tokens of one id": ("tokenizer", added(id=0), "share"),
    "a token that is a number": ("tokenizer", added(content=7), "not a BPE"),
    "a token that is no text of Unicode": ("tokenizer", added(content="\ud800"), "not a BPE"),
    "merges that are numbers": ("tokenizer", tokenizer_with(model={"merges": [[1, 2]]}), "not a BPE"),
    "merges that make what is no token": ("tokenizer", tokenizer_with(model={"merges": ["a b", "Ġ b"]}), "lacks"),
    "a pre-tokenizer that is unknown": ("tokenizer", tokenizer_with(pre_tokenizer={"Regex": "(a|a)*$"}), "unknown"),
    "a template that is a number": ("tokenizer_config", b'{"chat_template": 7}', "not a string"),
    "templates without a text": (
        "tokenizer_config",
        b'{"chat_template": [{"name": "default", "template": []}]}',
        "string",
    ),
    "a template that is no text of Unicode": ("tokenizer_config", b'{"chat_template": "\\ud800"}', "lone surrogate"),
    "templates that are numbers": ("tokenizer_config", b'{"chat_template": [1, {}]}', "no chat template"),
}


@pytest.mark.parametrize("case", JSON_FILES)
def test_json_with(case, good, work):
    target, raw, reason = JSON_FILES[case]
    raw = raw(good) if callable(raw) else raw
    with bounded():
        refused(target, work, raw, reason)


def test_a_special_token_without_a_text_is_as_none(work):
    (work / "hf" / "tokenizer_config.json").write_text('{"eos_token": {}, "pad_token": [1], "bos_token": 7}')
    assert load_tokenizer(work / "hf").eos_ids == {9}


def test_a_pattern_that_takes_for_ever_is_stopped(work, monkeypatch):
    monkeypatch.setattr("deltanet_ref.lora.bridge._PATTERN_SECONDS", 1)
    raw = changed(PEFT, rank_pattern={"(.*|.*)*!": 2})(work)
    with bounded():
        refused("adapter_config", work, raw, "takes more than 1 s")


def test_a_pattern_of_peft_is_matched_as_peft_does(work):
    raw = changed(PEFT, alpha_pattern={r"layers\.(0|7)\..*": 6.0})(work)
    (work / PEFT).write_bytes(raw)
    adapter = readers.open_adapter(work / "peft", readers.CONFIG)
    was = readers.open_adapter(work / "adapter.gguf", readers.CONFIG)
    for target in was.targets:  # one alpha, so that the rest is in B: 2 = 6 / 3
        ratio = 2 if target.startswith("blk.0.") else 1
        product = adapter.scale(target) * adapter.tensors[f"{target}.lora_b"]
        np.testing.assert_allclose(product, ratio * was.scale(target) * was.tensors[f"{target}.lora_b"], rtol=2e-3)


def test_a_template_file_that_is_no_text_is_refused(work):
    (work / "hf" / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_tokenizer(work / "hf")


# ---- templates


@pytest.fixture
def impatient(monkeypatch):
    """A template has a second and 128 MiB."""
    monkeypatch.setattr(tokenizers, "TEMPLATE_SECONDS", 1)
    monkeypatch.setattr(tokenizers, "TEMPLATE_BYTES", 128 << 20)
    tokenizers._template_process.cache_clear()
    yield
    tokenizers._template_process.cache_clear()


TEMPLATES = {
    "a loop of 10^10 rounds": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power that takes for ever": "{{ 10 ** (10 ** 10) }}",
    "a string that doubles": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x*2 %}{% endfor %}",
    "a string of 10^12": "{{ 'a' * 10 ** 12 }}",
    "a width of 10^12": "{{ 'a'.ljust(10 ** 12) }}",
    "a format of 10^12": "{{ '%1000000000000d' % 1 }}",
    "an answer of 50 million": "{{ 'a' * (5 * 10 ** 7) }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nested for ever": "{{ " + "(" * 10**4 + "1" + ")" * 10**4 + " }}",
    "Python's classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "Python's globals": "{{ raise_exception.__globals__.sys }}",
    "a module": "{{ cycler.__init__.__globals__.os.getcwd() }}",
    "an attribute by filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "a format of attributes": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "another file": "{% include '/etc/passwd' %}",
    "another template": "{% import 'os' as os %}",
    "a change of the conversation": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_with(case, impatient, work):
    with bounded():
        refused("template", work, TEMPLATES[case].encode(), "the chat template")


def test_a_stopped_template_does_not_stop_the_next(impatient, work):
    tokenizer = load_tokenizer(work / "hf")
    for _ in range(2):
        tokenizer.chat_template = TEMPLATES["a power that takes for ever"]
        with bounded(), pytest.raises(InputError, match="stopped: it took more than 1 s or 128 MiB"):
            tokenizer.apply_chat_template([])
        tokenizer.chat_template = "{{ messages | length }}"
        assert tokenizer.apply_chat_template([1, 2]) == "2"
