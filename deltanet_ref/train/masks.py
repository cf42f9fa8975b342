"""Which tokens of a conversation the model itself would have produced, found from the chat template alone.

A template is a program; it does not mark which of its text the model writes and which the model is given. That can be
found out by rendering the conversation again with one message's content replaced by a sentinel: the text before the
sentinel is what the model is given before it writes that content.

    full      ...<|im_start|>assistant\n<think>\n\n</think>\n\nIt is dreich.<|im_end|>\n
    sentinel  ...<|im_start|>assistant\n<think>\n\n</think>\n\n@<|im_end|>\n            up to @: given, not trained

So an empty think block, which the template writes by itself, is not trained; a real one is, because then the two
renderings diverge inside the block, and the sentinel goes into the reasoning instead. The generation prompt is given
too. A turn ends with the tokenizer's end token, which is trained, so that the model learns to stop.

The text before the sentinel must be a prefix of the full rendering. A template whose earlier text depends on later
content has no such prefix and is refused.
"""

import unicodedata

import numpy as np

from deltanet_ref.errors import InputError

REMEDY = "Use rows of prompt and completion, or another template"
SENTINEL = "\ue000\uf8ff\ue000"  # private use characters: neither templates nor ordinary text contain them


def conversation_tokens(tokenizer, messages: list[dict], **options) -> tuple[np.ndarray, np.ndarray]:
    """Render a conversation with the tokenizer's chat template and mark what the model would have produced.

    messages  [{"role", "content", "reasoning_content"?, "tool_calls"?}]
    options   of the template: tools, add_generation_prompt, enable_thinking, ...
    returns   tokens (n,) int32, produced (n,) bool
    Raises InputError if the text that the model produces cannot be located, or a turn ends without an end token.
    """

    def render(messages, **changed):
        text = tokenizer.apply_chat_template(messages, **options | changed)
        return unicodedata.normalize("NFC", text)  # as encode does, so that positions here are positions there

    full = render(messages)
    if SENTINEL in full:
        raise InputError("the conversation contains U+E000 U+F8FF U+E000, which mark positions here: remove them")
    tokens = np.array(tokenizer.encode(full), np.int32)
    ends = np.cumsum([len(tokenizer.token_bytes(token)) for token in tokens])
    begins = ends - np.diff(ends, prepend=0)  # byte positions of each token in full
    if len(tokens) and ends[-1] != len(full.encode()):
        raise InputError("the conversation changes when it is encoded and decoded: the vocabulary lacks some bytes")
    produced = np.zeros(len(tokens), bool)

    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompt = _generation_prompt(render, messages, turns)
    for i in turns:
        start = _content_start(render, full, messages, i)
        # Where the template copies the content unchanged, the generation prompt may be what opens the think block
        for at in range(max(0, start - len(prompt)), start):
            if full.startswith(prompt, at):
                start = max(start, at + len(prompt))
        stop = _content_start(render, full, messages, i + 1) if i + 1 < len(messages) else len(full)
        first, last = np.searchsorted(begins, [_byte(full, start), _byte(full, stop)])
        end = next((t for t in range(first, last) if tokens[t] in tokenizer.eos_ids), None)
        if end is None:
            raise InputError(
                f"the chat template ends message {i + 1} (assistant) without an end token of the "
                f"tokenizer, so the model would never learn to stop. {REMEDY}"
            )
        produced[first : end + 1] = True
    return tokens, produced


def _content_start(render, full, messages, i):
    """Position in full where the text of message i begins: after everything that the template writes before it."""
    message = messages[i]
    plain = {key: value for key, value in message.items() if key != "reasoning_content"}
    trials = [plain | {"content": SENTINEL}]
    if message["role"] == "assistant":
        if isinstance(message.get("reasoning_content"), str):
            trials.append(message | {"reasoning_content": SENTINEL})
        elif isinstance(message.get("content"), str) and "</think>" in message["content"]:
            answer = message["content"].split("</think>")[-1]
            trials.append(plain | {"content": f"<think>\n{SENTINEL}\n</think>{answer}"})
    for trial in trials:
        before, sentinel, _ = render(messages[:i] + [trial] + messages[i + 1 :]).partition(SENTINEL)
        if sentinel and full.startswith(before):
            return len(before)
    raise InputError(
        f"the chat template does not show where message {i + 1} ({message['role']}) begins: the text that "
        f"it writes before the message depends on the message. {REMEDY}"
    )


def _generation_prompt(render, messages, turns):
    """The text that the template adds to prompt for an assistant's turn."""
    if not turns:
        return ""
    before = messages[: turns[-1]]
    asked, plain = render(before, add_generation_prompt=True), render(before, add_generation_prompt=False)
    if not asked.startswith(plain):
        raise InputError("the chat template changes earlier text when it adds a generation prompt")
    return asked[len(plain) :]


def _byte(text, position):
    return len(text[:position].encode())
