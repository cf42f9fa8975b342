"""Rows of JSONL files and the examples made of them.

| row                                          | tokens                              | trained on                      |
|----------------------------------------------|-------------------------------------|---------------------------------|
| {"text"}                                     | text + end                          | all                             |
| {"prompt", "completion"}                     | prompt + completion + end           | completion + end                |
| {"instruction", "input"?, "output"} (alpaca) | instruction, blank line, input,     | output + end                    |
|                                              | blank line + output + end           |                                 |
| {"messages", "tools"?}                       | by the model's chat template        | what the assistant produced     |
| {"conversations"} (ShareGPT)                 | the same, names translated          | the same                        |

"end" is the tokenizer's end token (end_token). Prompts and completions go in as they are, without chat template, and
are encoded apart: just so does generate encode a prompt. Special tokens in the text are parsed.
"""
import json
from pathlib import Path

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.formats.tokenizer import END_OF_TURN
from deltanet_ref.train.batches import IGNORED, Example
from deltanet_ref.train.masks import conversation_tokens

SPLITS = ("train", "valid", "test")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
                  "system": "system", "tool": "tool", "observation": "tool"}
ROLES = ("system", "user", "assistant", "tool")


def read_dataset(path):
    """Read a .jsonl file (all of it is "train"), or a directory with train.jsonl and maybe valid.jsonl and test.jsonl.

    returns split name -> [(source "file:line", row dict)]; blank lines are passed over
    Raises InputError naming the first line at fault and how many more there are.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if not path.is_dir():
        return {"train": _read_rows(path)}
    files = {split: path / f"{split}.jsonl" for split in SPLITS}
    if not any(file.is_file() for file in files.values()):
        raise InputError(f"{path}: holds none of {', '.join(f'{split}.jsonl' for split in SPLITS)}")
    return {split: _read_rows(file) for split, file in files.items() if file.is_file()}


def _read_rows(path):
    rows, faults = [], []
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((f"{path}:{number}", json.loads(line)))
            except json.JSONDecodeError as error:
                faults.append(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}")
            except RecursionError:
                faults.append(f"{path}:{number}: nested too deeply")
    _raise_first(faults)
    if not rows:
        raise InputError(f"{path}: holds no rows; write one JSON object to a line")
    return rows


def sequence_limit(seq_len, context, default):
    """The most tokens an example may have: seq_len, or default if that is None, within the model's context.

    Raises InputError when seq_len is out of range.
    """
    if seq_len is None:
        return min(default, context)
    if not 2 <= seq_len <= context:
        raise InputError(f"--seq-len is {seq_len}, it must be from 2 to the model's context of {context} tokens")
    return seq_len


def encode_dataset(rows, tokenizer, *, mask_prompt=True, seq_len=None, truncate=False):
    """Turn [(source, row)] into Examples; Examples in place of rows pass through, but their lengths are checked too.

    mask_prompt  False also trains on prompts, and on the whole text of conversations
    seq_len      most tokens an example may have
    truncate     cut longer ones instead of refusing them
    Raises InputError naming the first row at fault and how many more there are.
    """
    examples, faults = [], []
    for source, row in rows:
        try:
            example = row if isinstance(row, Example) else encode_row(row, tokenizer, source, mask_prompt)
            examples.append(_fit_length(example, seq_len, truncate))
        except InputError as error:
            faults.append(f"{source}: {error}")
    _raise_first(faults)
    return examples


def _raise_first(faults):
    if faults:
        raise InputError(faults[0] + (f" (and {len(faults) - 1} more lines with faults)" if len(faults) > 1 else ""))


def _fit_length(example, seq_len, truncate):
    n = len(example.tokens)
    if seq_len is not None and n > seq_len:
        if not truncate:
            raise InputError(f"{n} tokens are more than --seq-len {seq_len}: raise it, or give --truncate to cut")
        example = Example(example.tokens[:seq_len], example.labels[:seq_len], example.source)
    if not example.kept:
        cut = f" in the first {seq_len} of {n} tokens: raise --seq-len" if len(example.tokens) < n else ""
        raise InputError(f"nothing to train on{cut}")
    return example


def encode_row(row, tokenizer, source="", mask_prompt=True):
    """Turn one row into an Example, by the table above. Raises InputError (without the source) if it fits no kind."""
    if not isinstance(row, dict):
        raise InputError(f"a row must be a JSON object, this is {_kind(row)}")
    kind = next((kind for kind in ROW_KINDS if kind in row), None)
    if kind is None:
        found = ", ".join(map(repr, row)) or "no fields"
        raise InputError(f"has {found}; a row needs text, prompt and completion, messages, instruction and output, "
                         "or conversations")
    tokens, trained = ROW_KINDS[kind](row, tokenizer)
    if not mask_prompt:
        trained = np.ones(len(tokens), bool)
    labels = np.where(trained, tokens, IGNORED).astype(np.int32)
    return Example(tokens, labels, source)


def _text(row, tokenizer):
    return _prompt_and_completion(tokenizer, "", _string(row, "text"))


def _prompt_completion(row, tokenizer):
    return _prompt_and_completion(tokenizer, _string(row, "prompt", empty=True), _string(row, "completion"))


def _alpaca(row, tokenizer):
    parts = [_string(row, "instruction")] + ([_string(row, "input", empty=True)] if row.get("input") else [])
    return _prompt_and_completion(tokenizer, "".join(part + "\n\n" for part in parts), _string(row, "output"))


def _prompt_and_completion(tokenizer, prompt, completion):
    given, answer = tokenizer.encode(prompt), tokenizer.encode(completion) + [end_token(tokenizer)]
    return np.array(given + answer, np.int32), np.arange(len(given) + len(answer)) >= len(given)


def end_token(tokenizer):
    """The id that ends a document: of several end tokens, one that ends more than a turn."""
    ends = sorted(tokenizer.eos_ids, key=lambda token: (token == tokenizer.token_id(END_OF_TURN), token))
    if not ends:
        raise InputError("the tokenizer has no end token, so nothing would teach the model to stop: convert it again")
    return ends[0]


def _messages(row, tokenizer):
    return _conversation(tokenizer, _list(row, "messages"), row.get("tools"))


def _sharegpt(row, tokenizer):
    messages = []
    for turn in _list(row, "conversations"):
        role = turn.get("from") if isinstance(turn, dict) else None
        if role not in SHAREGPT_ROLES:
            raise InputError(f"conversations: turn from {role!r}; known are {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[role], "content": _string(turn, "value", empty=True)})
    return _conversation(tokenizer, messages, row.get("tools"))


def _conversation(tokenizer, messages, tools):
    if tokenizer.chat_template is None:
        raise InputError("a conversation needs a chat template, which this model lacks: "
                         "give rows of prompt and completion")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(f"messages: each needs a role out of {', '.join(ROLES)}")
        if message["role"] != "assistant" or not message.get("tool_calls"):
            if not isinstance(message.get("content"), (str, list)):
                raise InputError(f"messages: a {message['role']} message has no content")
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("messages: no assistant message, so nothing to train on")
    return conversation_tokens(tokenizer, messages, tools=tools)


def _string(row, field, empty=False):
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(f"{field} is missing" if field not in row else f"{field} must be text, it is {_kind(value)}")
    if not value and not empty:
        raise InputError(f"{field} is empty")
    return value


def _list(row, field):
    value = row[field]
    if not isinstance(value, list) or not value:
        raise InputError(f"{field} must be a list with something in it")
    return value


def _kind(value):
    return JSON_KINDS.get(type(value), "a number")


JSON_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
ROW_KINDS = {"messages": _messages, "conversations": _sharegpt, "instruction": _alpaca, "prompt": _prompt_completion,
             "completion": _prompt_completion, "text": _text}
