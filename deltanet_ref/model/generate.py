"""Text from the model, one token at a time: prefill the prompt, sample, step, until the turn ends.

What the attached adapters ask for is respected: a prefix of the prompt, and the invocation tokens of an activated LoRA
(Greenewald et al. 2025). As in llama.cpp's server, an activated LoRA is active from the token before the last
occurrence of its invocation tokens in the prompt (PEFT: from their first token), and inactive if they do not occur.
"""
import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from deltanet_ref.errors import InputError, counted, shown
from deltanet_ref.model.qwen35 import PREFILL_TOKENS


def generate(model, prompt: str | Sequence[int], max_tokens: int = 128, temperature: float = 0.7, top_k: int = 20,
             top_p: float = 0.8, seed: int = 0, return_ids: bool = False,
             on_prefill: Callable[[int, int], None] | None = None) -> "Continuation":
    """The continuation of a prompt, an iterator over pieces of text; computed as they are asked for.

    prompt       text, which the prompt prefix of an attached adapter is put before; or token ids, used as they are
    max_tokens   maximum number of tokens to generate. Generation ends earlier at the model's end-of-turn token, which
                 is not part of the text, and where prompt and continuation fill the context (max_position_embeddings)
    temperature  0 takes the most likely token; otherwise logits are divided by it. The defaults of temperature, top_k
                 and top_p are those that Qwen publishes for answers without thinking
    top_k        sample among the k most likely tokens; 0 for all
    top_p        ... and among the fewest of these whose probabilities sum to at least p; 1 for all
    seed         of the sampling; the same seed gives the same text
    return_ids   iterate over token ids (the end-of-turn token is the last) instead of text
    on_prefill   called with (prompt tokens read, prompt tokens) after each prefill pass of up to PREFILL_TOKENS tokens
    raises       InputError, before anything is computed, for values out of range and for a prompt that is empty or
                 leaves no room in the context
    """
    if not (max_tokens >= 1 and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise InputError(f"`max_tokens` {max_tokens}, `temperature` {temperature}, `top_k` {top_k}, `top_p` {top_p}: "
                         "they must be at least 1, 0, 0, and above 0 up to 1")
    if model.tokenizer is None and (isinstance(prompt, str) or not return_ids):
        raise InputError("the model has no tokenizer: give token ids and `return_ids=True`")
    ids = (model.tokenizer.encode(prompt_prefix(model) + prompt) if isinstance(prompt, str)
           else [int(t) for t in prompt])
    if not ids:
        raise InputError("the prompt is empty")
    context = model.config.max_position_embeddings
    if len(ids) >= context:
        raise InputError(f"the prompt has {counted(len(ids), 'token')} and leaves no room in the model's context of "
                         f"{context:,}: shorten it")
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, rng=np.random.default_rng(seed))
    tokens = _tokens(model, ids, *invocation(model, ids), on_prefill, choose)
    return Continuation(tokens, len(ids), max_tokens, context - len(ids), model.tokenizer, return_ids)


class Continuation(Iterator):
    """An iterator over pieces of text, or token ids, that records how generation went.

    prompt_tokens  tokens of the prompt
    ids            tokens generated so far, the end-of-turn token included
    finish_reason  None until the end; then "stop" (end-of-turn token), "length" (max_tokens), or "context": prompt and
                   continuation fill the model's context
    """

    def __init__(self, tokens, prompt_tokens, max_tokens, room, tokenizer, return_ids):
        """tokens: endless iterator; room: tokens left in the context after the prompt."""
        self.prompt_tokens, self.ids, self.finish_reason = prompt_tokens, [], None
        stop = tokenizer.eos_ids if tokenizer else ()
        ids = self._until_the_end(tokens, stop, max_tokens, room)
        self._pieces = ids if return_ids else _text(ids, tokenizer, stop)

    def __next__(self):
        return next(self._pieces)

    def _until_the_end(self, tokens, stop, max_tokens, room):
        for token in tokens:
            self.ids.append(token)
            if token in stop:
                self.finish_reason = "stop"
            elif len(self.ids) == max_tokens:
                self.finish_reason = "length"
            elif len(self.ids) == room:
                self.finish_reason = "context"
            yield token
            if self.finish_reason:
                return


def prompt_prefix(model) -> str:
    """The text that the attached adapters require before a prompt, or "". Raises InputError if they disagree."""
    prefixes = {a.adapter.metadata["prompt_prefix"] for a in model.adapters.values()
                if a.adapter.metadata.get("prompt_prefix")}
    if len(prefixes) > 1:
        raise InputError(f"the attached adapters need different prompt prefixes, {shown(sorted(prefixes))}: attach one "
                         "of them")
    return next(iter(prefixes), "")


def invocation(model, ids: list[int]) -> tuple[str | None, int]:
    """The name of the attached activated LoRA and the position in ids where it becomes active; (None, 0) without one.

    That is the token before the last occurrence of its invocation tokens; len(ids) if they do not occur. Raises
    InputError if two are attached.
    """
    found = {name: list(a.adapter.metadata["invocation_tokens"]) for name, a in model.adapters.items()
             if a.adapter.metadata.get("invocation_tokens")}
    if len(found) > 1:
        raise InputError(f"{len(found)} activated LoRAs are attached ({', '.join(found)}): only one at a time can be "
                         "invoked")
    for name, tokens in found.items():
        starts = [i for i in range(len(ids) - len(tokens) + 1) if ids[i:i + len(tokens)] == tokens]
        return name, max(starts[-1] - 1, 0) if starts else len(ids)
    return None, 0


@contextmanager
def _inactive(model, name):
    """Inside the with block the adapter of this name, if any, is not attached."""
    attached = {name: model.adapters.pop(name)} if name else {}
    try:
        yield
    finally:
        model.adapters.update(attached)


def _tokens(model, ids, activated, start, on_prefill, choose):
    """Endless tokens after ids. activated: name of an activated LoRA, active from ids[start]; choose: logits -> id."""
    state, inactive = None, activated if start == len(ids) else None
    ends = sorted({*range(PREFILL_TOKENS, len(ids), PREFILL_TOKENS), start, len(ids)} - {0})
    for begin, end in zip([0, *ends], ends):
        with _inactive(model, activated if end <= start else None):
            logits, state = model.prefill(np.asarray(ids[begin:end]), state)
        if on_prefill:
            on_prefill(end, len(ids))
    while True:
        token = choose(model.backend.to_host(logits))
        yield token
        with _inactive(model, inactive):
            logits, state = model.step(token, state)


def _text(tokens, tokenizer, stop):
    """Text of tokens; a character that is spread over several tokens comes when it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        piece = "" if token in stop else decoder.decode(tokenizer.token_bytes(token))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def sample(logits: np.ndarray, temperature: float, top_k: int, top_p: float, rng: np.random.Generator) -> int:
    """One token from logits (V,): temperature, then top-k, then top-p."""
    if temperature == 0:
        return int(np.argmax(logits))
    order = _most_likely(logits, top_k or len(logits))
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    enough = np.searchsorted(np.cumsum(p), top_p) + 1                      # the fewest that sum to top_p
    p = p[:enough] / p[:enough].sum()
    return int(order[min(np.searchsorted(np.cumsum(p), rng.random(), side="right"), len(p) - 1)])


def _most_likely(logits, k):
    """The k most likely tokens in descending order, the lower id first among equals."""
    k = min(k, len(logits))
    candidates = np.flatnonzero(~(logits < np.partition(logits, -k)[-k]))  # at least k; all where a logit is nan
    return candidates[np.argsort(-logits[candidates], kind="stable")[:k]]
