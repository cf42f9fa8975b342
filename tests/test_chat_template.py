"""Chat templates against conversations that HF rendered, and what a template from a foreign file may not do."""

import gzip
import json
import re

import pytest

from deltanet_ref.errors import InputError
from deltanet_ref.formats.template_process import LONGEST
from deltanet_ref.formats.tokenizer import Tokenizer, load_tokenizer
from tests.paths import FIXTURES

CASES = json.loads((FIXTURES / "chat/cases.json").read_text())
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "real.gguf"
    path.write_bytes(gzip.decompress((FIXTURES / "realvocab.gguf.gz").read_bytes()))
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = (FIXTURES / "chat/Qwen3.5-4B.jinja").read_text()
    return tokenizer


@pytest.fixture
def tiny():
    return load_tokenizer(FIXTURES / "eq/eq-f32.gguf")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_published_template_renders_as_hf_does(case, published):
    text = published.apply_chat_template(case["messages"], **case["options"])
    assert text == case["text"]
    assert published.encode(text) == case["ids"]


@pytest.mark.parametrize("path", ["eq/eq-f32.gguf", "eq/hf"])
def test_template_comes_with_the_model(path):
    tokenizer = load_tokenizer(FIXTURES / path)
    turns = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert tokenizer.apply_chat_template(TURNS) == turns
    assert tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_may_lie_in_tokenizer_config(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((FIXTURES / "eq/hf/tokenizer.json").read_bytes())
    for template in ("one", [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]):
        config = {"chat_template": template, "eos_token": {"content": "<|endoftext|>"}, "bos_token": None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.apply_chat_template([]) == "one" and tokenizer.eos_ids == {449, 448}
    (tmp_path / "chat_template.jinja").write_text("its own file")
    assert load_tokenizer(tmp_path).apply_chat_template([]) == "its own file"


@pytest.mark.parametrize(
    "template, text",
    [
        ("{% if true %}\n  {% set x = 1 %}\n  a{{ x }}\n{% endif %}\nb", "  a1\nb"),  # blocks leave no lines
        ("{{ {'a': 'é<&>', 'b': [1, none]} | tojson }}", '{"a": "é<&>", "b": [1, null]}'),  # no HTML, no \u escapes
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}", '{\n "b": 1,\n "a": 2\n}'),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "hi"),
        ("{{ eos_token }}{{ pad_token }}{{ bos_token is defined }}", "<|im_end|><|endoftext|>False"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ mood }}", "TrueTrueFalsegood"),
    ],
)
def test_template_environment_is_hfs(template, text, tiny):
    tiny.chat_template = template
    assert tiny.apply_chat_template(TURNS, mood="good") == text


def test_template_knows_the_time(tiny):
    tiny.chat_template = "{{ strftime_now('%Y-%m-%d') }}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", tiny.apply_chat_template([]))


def test_tools_reach_the_template(tiny):
    tiny.chat_template = "{% for t in tools %}{{ t | tojson }};{% endfor %}"
    assert tiny.apply_chat_template([], tools=[{"name": "f"}, {"name": "g"}]) == '{"name": "f"};{"name": "g"};'


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "No messages provided."),
        ([{"role": "assistant", "content": "x"}], "No user query found in messages."),
        ([*TURNS, {"role": "king", "content": "x"}], "Unexpected message role."),
        ([*TURNS, {"role": "system", "content": "x"}], "System message must be at the beginning."),
        ([{"role": "user", "content": 7}], "Unexpected content type."),
        (["hi"], "chat template refuses"),
        (7, "chat template refuses"),
        (
            [
                *TURNS[:1],
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            ],
            "chat template refuses",
        ),
    ],
)
def test_conversation_that_the_template_refuses_is_one_line(messages, reason, published):
    with pytest.raises(InputError, match=re.escape(reason)) as e:
        published.apply_chat_template(messages)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}\n",
        "{{ 1 / 0 }}",
        "{{ undefined.x }}",
        "{% include 'x' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_template_that_fails_or_reaches_out_is_refused(template, tiny):
    tiny.chat_template = template
    with pytest.raises(InputError, match="chat template") as e:
        tiny.apply_chat_template(list(TURNS))
    assert "\n" not in str(e.value)


def test_a_rendered_conversation_may_have_2_to_the_21_characters(tiny):
    for size, refused in ((LONGEST, False), (LONGEST + 1, True)):
        tiny.chat_template = f"{{{{ 'a' * {size - 9} }}}}{{{{ 'b' * 9 }}}}"
        if refused:
            with pytest.raises(InputError, match="chat template .* returns more than 2,097,152 characters"):
                tiny.apply_chat_template([])
        else:
            assert len(tiny.apply_chat_template([])) == size


def test_an_endless_template_is_stopped_before_it_takes_the_memory(tiny):
    tiny.chat_template = "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}"  # 1 GB: half is allowed
    with pytest.raises(InputError, match="returns more than 2,097,152 characters"):
        tiny.apply_chat_template([])


def test_missing_template_is_reported(published):
    with pytest.raises(InputError, match="no chat template: set"):
        Tokenizer(["a"], [1], [], pre="qwen35").apply_chat_template(TURNS)
