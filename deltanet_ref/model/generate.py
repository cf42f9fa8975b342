"""Text from the model, one token at a time: prefill the prompt, sample, step, until the turn ends.

What the attached adapters ask for is respected: a prefix of the prompt, and the invocation tokens of an activated LoRA
(Greenewald et al. 2025). As in llama.cpp's server, it acts from the token before their last occurrence in the prompt on
(PEFT: from their first token on), and not at all where they do not occur.
"""
import codecs
from contextlib import contextmanager

import numpy as np

from deltanet_ref.errors import InputError


def generate(model, prompt, max_tokens=128, temperature=0.7, top_k=20, top_p=0.8, seed=0, return_ids=False):
    """Iterator over the continuation of a prompt, in pieces of text as they come.

    prompt       text, which the prefix that an adapter asks for is put before; or token ids, taken as they are
    max_tokens   the most tokens to produce; the model's end-of-turn token ends earlier and is not shown
    temperature  0 takes the likeliest token; otherwise logits are divided by it. The defaults of temperature, top_k and
                 top_p are those that Qwen publishes for answers without thinking
    top_k        sample among the k likeliest tokens; 0 for all
    top_p        ... and among the fewest tokens whose probabilities reach p together; 1 for all
    seed         of the sampling: the same seed gives the same text
    return_ids   iterate over token ids (the end-of-turn token is the last) instead of text
    raises       InputError for an empty prompt or values out of range, before anything is computed
    """
    if max_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise InputError(f"max_tokens {max_tokens}, temperature {temperature}, top_k {top_k}, top_p {top_p}: they must be "
                         "at least 1, 0, 0, and above 0 up to 1")
    if model.tokenizer is None and (isinstance(prompt, str) or not return_ids):
        raise InputError("the model has no tokenizer: give token ids and return_ids=True")
    ids = (model.tokenizer.encode(prompt_prefix(model) + prompt) if isinstance(prompt, str)
           else [int(t) for t in prompt])
    if not ids:
        raise InputError("the prompt is empty")
    stop = model.tokenizer.eos_ids if model.tokenizer else ()
    tokens = _tokens(model, ids, *invocation(model, ids), max_tokens, temperature, top_k, top_p,
                     np.random.default_rng(seed), stop)
    return tokens if return_ids else _text(tokens, model.tokenizer, stop)


def prompt_prefix(model):
    """The text that the attached adapters want before a prompt, or "". Raises InputError when they disagree."""
    prefixes = {a.adapter.metadata["prompt_prefix"] for a in model.adapters.values()
                if a.adapter.metadata.get("prompt_prefix")}
    if len(prefixes) > 1:
        raise InputError(f"the attached adapters ask for different prompt prefixes, {sorted(prefixes)}: attach one of "
                         "them")
    return next(iter(prefixes), "")


def invocation(model, ids):
    """The attached activated LoRA's name and where in ids it begins to act; (None, 0) when there is none attached.

    That is the token before the last occurrence of its invocation tokens, len(ids) when they do not occur. Raises
    InputError for two of them at once.
    """
    found = {name: list(a.adapter.metadata["invocation_tokens"]) for name, a in model.adapters.items()
             if a.adapter.metadata.get("invocation_tokens")}
    if len(found) > 1:
        raise InputError(f"{len(found)} activated LoRAs are attached ({', '.join(found)}): one at a time can be "
                         "invoked")
    for name, tokens in found.items():
        starts = [i for i in range(len(ids) - len(tokens) + 1) if ids[i:i + len(tokens)] == tokens]
        return name, max(starts[-1] - 1, 0) if starts else len(ids)
    return None, 0


@contextmanager
def _resting(model, name):
    """The adapter of this name, if any, does not act for the moment."""
    attached = {name: model.adapters.pop(name)} if name else {}
    try:
        yield
    finally:
        model.adapters.update(attached)


def _tokens(model, ids, activated, start, max_tokens, temperature, top_k, top_p, rng, stop):
    state, resting = None, activated if start == len(ids) else None
    if start:
        with _resting(model, activated):
            logits, state = model.prefill(np.asarray(ids[:start]))
    if start < len(ids):
        logits, state = model.prefill(np.asarray(ids[start:]), state)
    for count in range(1, max_tokens + 1):
        token = sample(logits, temperature, top_k, top_p, rng)
        yield token
        if token in stop or count == max_tokens:
            return
        with _resting(model, resting):
            logits, state = model.step(token, state)


def _text(tokens, tokenizer, stop):
    """Bytes of tokens as text; a character that is spread over several tokens comes when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        piece = "" if token in stop else decoder.decode(tokenizer.token_bytes(token))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def sample(logits, temperature, top_k, top_p, rng):
    """One token from logits (V,): temperature, then top-k, then top-p."""
    if temperature == 0:
        return int(np.argmax(logits))
    logits = np.asarray(logits)
    order = _likeliest(logits, top_k or len(logits))
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    enough = np.searchsorted(np.cumsum(p), top_p) + 1                      # the fewest that reach top_p together
    p = p[:enough] / p[:enough].sum()
    return int(order[min(np.searchsorted(np.cumsum(p), rng.random(), side="right"), len(p) - 1)])


def _likeliest(logits, k):
    """The k likeliest tokens, the likeliest first, the lower id first among equals."""
    k = min(k, len(logits))
    candidates = np.flatnonzero(~(logits < np.partition(logits, -k)[-k]))  # at least k; all where a logit is nan
    return candidates[np.argsort(-logits[candidates], kind="stable")[:k]]
