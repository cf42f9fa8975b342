import gzip
import json

import numpy as np
import pytest

from deltanet_ref.errors import InputError
from deltanet_ref.formats.tokenizer import load_tokenizer
from deltanet_ref.train.masks import conversation_tokens
from tests.paths import FIXTURES

CASES = json.loads((FIXTURES / "chat" / "masks.json").read_text())
QWEN = (FIXTURES / "chat" / "Qwen3.5-4B.jinja").read_text()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The real vocabulary."""
    path = tmp_path_factory.mktemp("vocabulary") / "realvocab.gguf"
    path.write_bytes(gzip.decompress((FIXTURES / "realvocab.gguf.gz").read_bytes()))
    return load_tokenizer(path)


def produced(tokenizer, template, messages, **options):
    """The marked text, turn by turn."""
    tokenizer.chat_template = template
    tokens, mask = conversation_tokens(tokenizer, messages, **options)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_marked_tokens_equal_those_of_the_marked_template(tokenizer, case):
    tokenizer.chat_template = QWEN
    tokens, mask = conversation_tokens(tokenizer, case["messages"], **case["options"])
    assert tokens.tolist() == case["ids"]
    assert mask.astype(int).tolist() == case["mask"]


def test_thinking_between_tool_calls_is_dropped_by_a_later_question(tokenizer):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    messages = [
        user("Rain?"),
        assistant("<think>\nlook first\n</think>\n\n", tool_calls=[call]),
        {"role": "tool", "content": "grey"},
        assistant("Yes."),
    ]
    called = "<tool_call>\n<function=look>\n<parameter=at>\nsky\n</parameter>\n</function>\n</tool_call><|im_end|>"
    assert produced(tokenizer, QWEN, messages) == ["look first\n</think>\n\n" + called, "Yes.<|im_end|>"]
    # now the template leaves that thinking out, and the prefix up to the tool's answer renders differently than before
    assert produced(tokenizer, QWEN, messages + [user("Snow?"), assistant("No.")]) == [
        called,
        "Yes.<|im_end|>",
        "No.<|im_end|>",
    ]


def test_what_the_generation_prompt_opens_is_given_even_where_the_message_repeats_it(tokenizer):
    messages = [user("Hi"), assistant("<think>\nhm\n</think>\n\nHo"), user("Hi"), assistant("<thin>")]
    assert produced(tokenizer, CHATML, messages) == ["hm\n</think>\n\nHo<|im_end|>", "<thin><|im_end|>"]


def test_text_that_normalisation_shortens_keeps_its_place(tokenizer):
    decomposed = "e\u0301te\u0301"
    assert produced(tokenizer, QWEN, [user(decomposed * 5), assistant(decomposed)]) == ["\u00e9t\u00e9<|im_end|>"]


def test_template_whose_header_depends_on_the_answer_is_refused(tokenizer):
    counting = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ m.content | length }}")
    with pytest.raises(InputError, match="does not show where message 2 .assistant. begins"):
        produced(tokenizer, counting, [user("Hi"), assistant("Hello there")])


def test_template_without_end_of_turn_is_refused_even_if_a_later_turn_has_one(tokenizer):
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|im_end|>' if m.role == 'user' }}\n{% endfor %}"
    with pytest.raises(InputError, match="message 2 .assistant. without an end token"):
        produced(tokenizer, endless, [user("Hi"), assistant("Ho"), user("Hi"), assistant("Ho")])
