"""What would have fitted into memory: the words for a step that did not."""

import numpy as np

LEAST_TOKENS = 16


def what_fits(model, tokens: int, keep: str) -> str:
    """Words on a LoRA step of this many tokens that ran out of memory: what it needs, what is free, what fits.

    Measures steps of an eighth and a quarter of the tokens; what a step needs grows linearly with them, and so it does
    if a model's attention does not store its weights. keep: as of model.loss_and_grads
    """
    parts = []
    for kept, words in ((keep, ""), *([("inputs", " with checkpointing")] if keep != "inputs" else [])):
        needed, free, fitting = _measured(model, tokens, kept)
        if not parts:
            parts.append(f"a step of {tokens:,} tokens needs about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
        parts.append(f"about {min(fitting, tokens):,} tokens fit{words}")
    return "; ".join(parts)


def _measured(model, tokens, keep):
    """(bytes that a step needs, bytes that are free, tokens that fit)."""
    sizes = [max(LEAST_TOKENS, tokens // 8), max(2 * LEAST_TOKENS, tokens // 4)]
    needs = []
    for n in sizes:
        ids = np.zeros((1, n), np.int64)
        step = lambda ids=ids: model.loss_and_grads(ids, ids, wrt="lora", keep=keep)  # noqa: E731
        need, free = model.backend.memory_of(step)
        needs.append(need)
    slope = (needs[1] - needs[0]) / (sizes[1] - sizes[0])
    fixed = needs[0] - slope * sizes[0]
    return fixed + slope * tokens, free, max(0, int((free - fixed) / slope))
