import json

import numpy as np
import pytest

from deltanet_ref.errors import InputError
from deltanet_ref.formats.tokenizer import load_tokenizer
from deltanet_ref.train.batches import IGNORED, Example
from deltanet_ref.train.data import encode_dataset, encode_row, read_dataset
from tests.paths import FIXTURES

TOKENIZER = load_tokenizer(FIXTURES / "eq" / "eq-f32.gguf")


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def trained(example):
    return TOKENIZER.decode(example.labels[example.labels != IGNORED])


CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"


@pytest.mark.parametrize("row, text, learnt", [
    ({"text": "abc def"}, "abc def<|im_end|>", "abc def<|im_end|>"),
    ({"prompt": "abc", "completion": " def"}, "abc def<|im_end|>", " def<|im_end|>"),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2\n\n3<|im_end|>", "3<|im_end|>"),
    ({"instruction": "Go.", "output": "ok"}, "Go.\n\nok<|im_end|>", "ok<|im_end|>"),
    ({"instruction": "Go.", "input": "", "output": "ok"}, "Go.\n\nok<|im_end|>", "ok<|im_end|>"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, CHAT, "Ho<|im_end|>"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, CHAT, "Ho<|im_end|>"),
])
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


@pytest.mark.parametrize("row, reason", [
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
    ({"messages": []}, "list with something in it"),
    ({"messages": "hello"}, "list with something in it"),
    ({"messages": ["hello"]}, "each needs a role"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "each needs a role out of system, user, assistant, tool"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
    ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "a user message has no content"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "turn from 'alien'"),
    ({"conversations": [{"from": "gpt", "text": "x"}]}, "value is missing"),
    ({"text": "\ud800"}, "lone surrogate"),
])
def test_bad_row_is_refused_with_its_reason(row, reason):
    with pytest.raises(InputError, match=reason):
        encode_row(row, TOKENIZER)


def test_conversation_without_chat_template_is_refused():
    bare = load_tokenizer(FIXTURES / "eq" / "eq-f32.gguf")
    bare.chat_template = None
    with pytest.raises(InputError, match="needs a chat template"):
        encode_row({"messages": [{"role": "assistant", "content": "x"}]}, bare)


def test_first_fault_is_named_by_line_and_the_others_counted(tmp_path):
    path = write(tmp_path / "d.jsonl", {"text": "a"}, "", '{"text": ', "nonsense", {"text": "b"})
    with pytest.raises(InputError, match=r"d\.jsonl:3: not JSON: .* \(and 1 more lines with faults\)$"):
        read_dataset(path)
    rows = read_dataset(write(tmp_path / "e.jsonl", {"text": "a"}, {"txt": "a"}, {"text": ""}, {"text": ""}))["train"]
    with pytest.raises(InputError, match=r"e\.jsonl:2: has 'txt'.* \(and 2 more lines with faults\)$"):
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


@pytest.mark.parametrize("make, reason", [
    (lambda d: d / "absent", "no such file"),
    (lambda d: d, "holds none of train.jsonl, valid.jsonl, test.jsonl"),
    (lambda d: write(d / "d.jsonl", "", " "), "holds no rows"),
    (lambda d: write(d / "d.jsonl", "[" * 100_000), "nested too deeply"),
])
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
    with pytest.raises(InputError, match=f"d:2: {n} tokens are more than --seq-len {n - 1}: raise it, or give --trunc"):
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
