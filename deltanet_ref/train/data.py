"""Rows of JSONL files and the examples made of them.

| row                                          | tokens                              | trained on                      |
|----------------------------------------------|-------------------------------------|---------------------------------|
| {"text"}                                     | text + end                          | all                             |
| {"prompt", "completion"}                     | prompt + completion + end           | completion + end                |
| {"instruction", "input"?, "output"} (alpaca) | instruction, blank line, input,     | output + end                    |
|                                              | blank line + output + end           |                                 |
| {"messages", "tools"?}                       | by the model's chat template        | what the assistant produced     |
| {"conversations"} (ShareGPT)                 | the same, names translated          | the same                        |

"end" is the tokenizer's end token (end_token). Prompts and completions are used as they are, without the chat template,
and are encoded separately, exactly as generate encodes a prompt. Special tokens in the text are parsed.

A row comes from outside: any of its fields may hold any JSON value. Rows that do not fit raise InputError.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deltanet_ref.errors import InputError, counted, json_kind, shown
from deltanet_ref.formats.tokenizer import END_OF_TURN
from deltanet_ref.train.batches import IGNORED, Example
from deltanet_ref.train.masks import conversation_tokens

SPLITS = ("train", "valid", "test")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
ROLES = ("system", "user", "assistant", "tool")


def read_dataset(path: Path | str) -> dict[str, list]:
    """Read a .jsonl file (the split "train"), or a directory with train.jsonl, valid.jsonl, test.jsonl or some of them.

    returns split name -> [(source "file:line", JSON value)]; blank lines are skipped
    Raises InputError naming the first faulty line and the number of others.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if not path.is_dir():
        return {"train": _read_rows(path)}
    files = {split: path / f"{split}.jsonl" for split in SPLITS}
    if not any(file.is_file() for file in files.values()):
        raise InputError(f"{path}: the directory contains none of {', '.join(f'{split}.jsonl' for split in SPLITS)}")
    return {split: _read_rows(file) for split, file in files.items() if file.is_file()}


def _read_rows(path):
    rows, faults = [], []
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
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
            except ValueError as error:  # an integer of more digits than Python converts
                faults.append(f"{path}:{number}: not usable: {error}")
    _raise_first(faults)
    if not rows:
        raise InputError(f"{path}: contains no rows; write one JSON object per line")
    return rows


def sequence_limit(seq_len: int | None, context: int, default: int) -> int:
    """The maximum number of tokens of an example: seq_len, or by default min(default, context).

    Raises InputError unless 2 <= seq_len <= context.
    """
    if seq_len is None:
        return min(default, context)
    if not 2 <= seq_len <= context:
        raise InputError(f"`seq_len` is {seq_len}, it must be from 2 to the model's context of {context} tokens")
    return seq_len


def encode_dataset(
    rows: Iterable, tokenizer, *, mask_prompt: bool = True, seq_len: int | None = None, truncate: bool = False
) -> list[Example]:
    """Turn [(source, row)] into Examples. A row may be an Example already; its length is checked too.

    mask_prompt  False also trains on prompts, and on the whole text of conversations
    seq_len      maximum number of tokens of an example; None for no limit
    truncate     cut longer examples instead of refusing them
    Raises InputError naming the first faulty row and the number of others.
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
        more = f" (and {counted(len(faults) - 1, 'more faulty row')})" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)


def _fit_length(example, seq_len, truncate):
    n = len(example.tokens)
    if seq_len is not None and n > seq_len:
        if not truncate:
            raise InputError(f"{n} tokens are more than `seq_len` {seq_len}: raise it, or cut with `truncate=True`")
        example = Example(example.tokens[:seq_len], example.labels[:seq_len], example.source)
    if not example.kept:
        cut = f" in the first {seq_len} of {n} tokens: raise `seq_len`" if len(example.tokens) < n else ""
        raise InputError(f"nothing to train on{cut}")
    return example


def encode_row(row, tokenizer, source: str = "", mask_prompt: bool = True) -> Example:
    """Turn one row, any JSON value, into an Example by the table above.

    Raises InputError, whose text does not name the source, if the row does not fit the table.
    """
    if not isinstance(row, dict):
        raise InputError(f"a row must be a JSON object, this is {json_kind(row)}")
    kind = next((kind for kind in ROW_KINDS if kind in row), None)
    if kind is None:
        found = ", ".join(shown(name) for name in list(row)[:8]) or "no fields"
        raise InputError(
            f"has {found}; a row needs text, prompt and completion, messages, instruction and output, or conversations"
        )
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


def end_token(tokenizer) -> int:
    """The id of the token that ends a document: of several end tokens, not the one that ends a turn."""
    ends = sorted(tokenizer.eos_ids, key=lambda token: (token == tokenizer.token_id(END_OF_TURN), token))
    if not ends:
        raise InputError("the tokenizer has no end token, so the model would never learn to stop: convert it again")
    return ends[0]


def _messages(row, tokenizer):
    return _conversation(tokenizer, _list(row, "messages"), row.get("tools"))


def _sharegpt(row, tokenizer):
    messages = []
    for turn in _list(row, "conversations"):
        role = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in SHAREGPT_ROLES:
            raise InputError(f"conversations: turn from {shown(role)}; use one of {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[role], "content": _string(turn, "value", empty=True)})
    return _conversation(tokenizer, messages, row.get("tools"))


def _conversation(tokenizer, messages, tools):
    if tokenizer.chat_template is None:
        raise InputError(
            "a conversation needs a chat template, which this model lacks: use rows of prompt and completion"
        )
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(f"messages: message {i} needs a role, one of {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and message["role"] == "assistant" and message.get("tool_calls"):
            continue  # a call alone
        if not isinstance(content, (str, list)):
            raise InputError(
                f"messages: message {i} ({message['role']}) "
                + ("has no content" if content is None else f"has {json_kind(content)} as content")
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("messages: no assistant message, so nothing to train on")
    return conversation_tokens(tokenizer, messages, tools=tools)


def _string(row, field, empty=False):
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(f"{field} must be text, it is {json_kind(value)}" if field in row else f"{field} is missing")
    if not value and not empty:
        raise InputError(f"{field} is empty")
    return value


def _list(row, field):
    value = row[field]
    if not isinstance(value, list) or not value:
        raise InputError(f"{field} must be a non-empty list")
    return value


ROW_KINDS = {
    "messages": _messages,
    "conversations": _sharegpt,
    "instruction": _alpaca,
    "prompt": _prompt_completion,
    "completion": _prompt_completion,
    "text": _text,
}
