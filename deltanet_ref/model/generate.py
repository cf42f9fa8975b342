"""Text from the model, one token at a time: prefill the prompt, sample, step, until the turn ends."""
import codecs

import numpy as np

from deltanet_ref.errors import InputError


def generate(model, prompt, max_tokens=128, temperature=0.7, top_k=20, top_p=0.8, seed=0, return_ids=False):
    """Iterator over the continuation of a prompt, in pieces of text as they come.

    prompt       text, or token ids
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
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
    if not ids:
        raise InputError("the prompt is empty")
    stop = model.tokenizer.eos_ids if model.tokenizer else ()
    tokens = _tokens(model, ids, max_tokens, temperature, top_k, top_p, np.random.default_rng(seed), stop)
    return tokens if return_ids else _text(tokens, model.tokenizer, stop)


def _tokens(model, ids, max_tokens, temperature, top_k, top_p, rng, stop):
    logits, state = model.prefill(np.asarray(ids))
    for count in range(1, max_tokens + 1):
        token = sample(logits, temperature, top_k, top_p, rng)
        yield token
        if token in stop or count == max_tokens:
            return
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
    scaled = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")[:top_k or None]             # the likeliest first
    p = np.exp(scaled[order] - scaled[order[0]])
    p /= p.sum()
    enough = np.searchsorted(np.cumsum(p), top_p) + 1                      # the fewest that reach top_p together
    p = p[:enough] / p[:enough].sum()
    return int(order[min(np.searchsorted(np.cumsum(p), rng.random(), side="right"), len(p) - 1)])
