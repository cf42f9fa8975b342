import copy
import json

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from deltanet_ref.errors import LONGEST, InputError
from deltanet_ref.formats.tokenizer import load_tokenizer
from deltanet_ref.train.batches import IGNORED, Example
from deltanet_ref.train.data import encode_dataset, encode_row, read_dataset
from tests.fuzz.mutate import nodes
from tests.paths import FIXTURES

TOKENIZER = load_tokenizer(FIXTURES / "eq" / "eq-f32.gguf")


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def trained(example):
    return TOKENIZER.decode(example.labels[example.labels != IGNORED])


CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"


@pytest.mark.parametrize(
    "row, text, learnt",
    [
        ({"text": "abc def"}, "abc def<|im_end|>", "abc def<|im_end|>"),
        ({"prompt": "abc", "completion": " def"}, "abc def<|im_end|>", " def<|im_end|>"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2\n\n3<|im_end|>", "3<|im_end|>"),
        ({"instruction": "Go.", "output": "ok"}, "Go.\n\nok<|im_end|>", "ok<|im_end|>"),
        ({"instruction": "Go.", "input": "", "output": "ok"}, "Go.\n\nok<|im_end|>", "ok<|im_end|>"),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
            CHAT,
            "Ho<|im_end|>",
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, CHAT, "Ho<|im_end|>"),
    ],
)
def test_each_kind_of_row_trains_on_what_its_table_says(row, text, learnt):
    example = encode_row(row, TOKENIZER)
    assert (TOKENIZER.decode(example.tokens), trained(example)) == (text, learnt)
    assert example.tokens.dtype == example.labels.dtype == np.int32
    assert trained(encode_row(row, TOKENIZER, mask_prompt=False)) == text


def test_prompt_is_encoded_as_generate_encodes_it():
    prompt, completion = "the qui", "ck brown"
    assert TOKENIZER.encode(prompt + completion) != TOKENIZER.encode(prompt) + TOKENIZER.encode(completion)
    example = encode_row({"prompt": prompt, "completion": completion}, TOKENIZER)
    assert example.tokens.tolist()[: len(TOKENIZER.encode(prompt))] == TOKENIZER.encode(prompt)


@pytest.mark.parametrize(
    "row, reason",
    [
        ([1], "must be a JSON object, this is a list"),
        ({}, "has no fields"),
        ({"question": "?"}, "has 'question'; a row needs text"),
        ({"text": ""}, "text is empty"),
        ({"text": 3}, "text must be text, it is a number"),
        ({"text": None}, "text must be text, it is null"),
        ({"prompt": "a"}, "completion is missing"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": [{"role": "user"}], "completion": "b"}, "prompt must be text, it is a list"),
        ({"completion": "a"}, "prompt is missing"),
        ({"instruction": "a"}, "output is missing"),
        ({"messages": []}, "must be a non-empty list"),
        ({"messages": "hello"}, "must be a non-empty list"),
        ({"messages": ["hello"]}, "message 1 needs a role"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "message 1 needs a role, one of system, user, assistant, tool",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, r"message 1 \(user\) has no content"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn from 'alien'"),
        ({"conversations": [{"from": "gpt", "text": "x"}]}, "value is missing"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, r"turn from \['human'\]; use one of human, user"),
        ({"conversations": [{"from": "x" * 10**7, "value": "x"}]}, r"turn from 'x{90,100}\.\.\.x{90,100}'; use one of"),
        ({"messages": [{"role": "assistant"}]}, r"message 1 \(assistant\) has no content"),
        (
            {"messages": [{"role": "assistant", "content": 7, "tool_calls": [1]}]},
            r"\(assistant\) has a number as content",
        ),
        ({"x" * 10**7: 1}, r"^has 'x{90,100}\.\.\.x{90,100}'; a row needs text"),
        ({"text": "\ud800"}, "lone surrogate"),
    ],
)
def test_bad_row_is_refused_with_its_reason(row, reason):
    with pytest.raises(InputError, match=reason):
        encode_row(row, TOKENIZER)


# One row of each kind, with every field that is looked at; any JSON value may stand in any place of them.
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
ROWS = [
    {"text": "abc"},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c"},
    {
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "<think>\nc\n</think>\nd", "reasoning_content": "c", "tool_calls": [CALL]},
            {"role": "tool", "content": "e"},
            {"role": "assistant", "content": "f"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": None},
]
WORDS = sorted({"</think>", "<|im_end|>", *(text for row in ROWS for text in json.dumps(row).split('"')[1::2])})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, 2**63, -1])
    | st.sampled_from(WORDS)
    | st.text(st.characters(), max_size=5)
)  # lone surrogates too
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed_rows(draw):
    """A good row in which up to three places hold another value, or nothing."""
    file = {"row": copy.deepcopy(draw(st.sampled_from(ROWS)))}
    for _ in range(draw(st.integers(1, 3))):
        places = nodes(file)
        container, key = places[draw(st.integers(0, len(places) - 1))]
        if container is file or draw(st.integers(0, 4)):
            container[key] = draw(JSON)
        else:
            del container[key]
    return file["row"]


@pytest.fixture(scope="module", params=["ChatML", "Qwen3.5"])
def templated(request):
    """A tokenizer with a short chat template, and one with the published template."""
    tokenizer = load_tokenizer(FIXTURES / "eq" / "eq-f32.gguf")
    if request.param == "Qwen3.5":
        tokenizer.chat_template = (FIXTURES / "chat" / "Qwen3.5-4B.jinja").read_text()
    return tokenizer


@settings(max_examples=400, deadline=None)
@given(row=changed_rows(), mask_prompt=st.booleans())
@example(row={"conversations": [{"from": ["human"], "value": "a"}]}, mask_prompt=True)
@example(row={"messages": [{"role": "assistant", "content": ["</think>"]}]}, mask_prompt=True)
def test_any_json_in_any_place_of_a_row_is_an_example_or_a_clear_line(templated, row, mask_prompt):
    row = json.loads(json.dumps(row))
    try:
        (made,) = encode_dataset([("row 1", row)], templated, mask_prompt=mask_prompt, seq_len=512)
    except InputError as error:
        assert str(error).startswith("row 1: ") and str(error).isprintable() and len(str(error)) <= LONGEST
    else:
        assert made.kept and len(made.tokens) == len(made.labels) <= 512


def test_conversation_without_chat_template_is_refused():
    bare = load_tokenizer(FIXTURES / "eq" / "eq-f32.gguf")
    bare.chat_template = None
    with pytest.raises(InputError, match="needs a chat template"):
        encode_row({"messages": [{"role": "assistant", "content": "x"}]}, bare)


def test_first_fault_is_named_by_line_and_the_others_counted(tmp_path):
    path = write(tmp_path / "d.jsonl", {"text": "a"}, "", '{"text": ', "nonsense", {"text": "b"})
    with pytest.raises(InputError, match=r"d\.jsonl:3: not JSON: .* \(and 1 more faulty row\)$"):
        read_dataset(path)
    rows = read_dataset(write(tmp_path / "e.jsonl", {"text": "a"}, {"txt": "a"}, {"text": ""}, {"text": ""}))["train"]
    with pytest.raises(InputError, match=r"e\.jsonl:2: has 'txt'.* \(and 2 more faulty rows\)$"):
        encode_dataset(rows, TOKENIZER)


def test_blank_lines_windows_ends_and_byte_order_mark_are_no_faults(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \r\n{"text": "b\xc3\xa9"}')
    assert read_dataset(path) == {"train": [(f"{path}:1", {"text": "a"}), (f"{path}:4", {"text": "b\u00e9"})]}


def test_directory_is_read_by_splits(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})
    write(tmp_path / "test.jsonl", {"text": "b"})
    texts = {split: [row["text"] for _, row in rows] for split, rows in read_dataset(tmp_path).items()}
    assert texts == {"train": ["a"], "test": ["b"]}


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda d: d / "absent", "no such file"),
        (lambda d: d, "contains none of train.jsonl, valid.jsonl, test.jsonl"),
        (lambda d: write(d / "d.jsonl", "", " "), "contains no rows"),
        (lambda d: write(d / "d.jsonl", "[" * 100_000), "nested too deeply"),
        (lambda d: write(d / "d.jsonl", '{"text": ' + "7" * 5000 + "}"), "d.jsonl:1: not usable: Exceeds the limit"),
    ],
)
def test_data_that_is_not_there_is_refused(tmp_path, make, reason):
    with pytest.raises(InputError, match=reason):
        read_dataset(make(tmp_path))


def test_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps({"text": "\u00e9"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_dataset(path)


def test_longer_example_is_refused_or_cut_as_asked():
    rows = [("d:1", {"text": "abc"}), ("d:2", {"prompt": "abc " * 9, "completion": "abcdef " * 3})]
    example = encode_row(rows[1][1], TOKENIZER)
    n, prompt = len(example.tokens), len(TOKENIZER.encode(rows[1][1]["prompt"]))
    assert len(encode_dataset(rows, TOKENIZER, seq_len=n)[1].tokens) == n
    with pytest.raises(InputError, match=f"d:2: {n} tokens are more than `seq_len` {n - 1}: raise it, or cut with"):
        encode_dataset(rows, TOKENIZER, seq_len=n - 1)
    cut = encode_dataset(rows, TOKENIZER, seq_len=n - 1, truncate=True)[1]
    assert cut.labels.tolist() == example.labels.tolist()[: n - 1]
    with pytest.raises(InputError, match=f"d:2: nothing to train on in the first {prompt} of {n} tokens"):
        encode_dataset(rows, TOKENIZER, seq_len=prompt, truncate=True)


def test_examples_pass_through_but_must_train_something():
    good = Example(np.array([3, 4, 5], np.int32), np.array([IGNORED, 4, 5], np.int32), "")
    assert encode_dataset([("row 1", good)], TOKENIZER) == [good]
    first_only = good._replace(labels=np.array([3, IGNORED, IGNORED], np.int32))  # nothing precedes the first token
    with pytest.raises(InputError, match="row 1: nothing to train on"):
        encode_dataset([("row 1", first_only)], TOKENIZER)
