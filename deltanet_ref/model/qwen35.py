"""Qwen3.5, the text model: embed, blocks, norm, head; forward and backward by hand.

Inside, tokens are one row (1, T) with cu_seqlens: a batch becomes its sequences one after the other, and padding is
removed before anything is computed. Arrays live on the backend (NumPy arrays unless it says otherwise); tokens, labels,
lengths and cu_seqlens are NumPy arrays.
"""
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.model.block import KEEP, block_backward, block_forward, block_forward_keeping
from deltanet_ref.model.layer import Attached, Gradients, Layer
from deltanet_ref.model.layers import MIXERS
from deltanet_ref.ops.sequences import sequence_boundaries

IGNORED = -100                # a label that is not trained, as in HF
PREFILL_TOKENS = 512          # tokens of one prefill pass


class State(NamedTuple):
    """What the model carries from the tokens so far, for B sequences of equal length. Functions return a new one."""
    position: int             # tokens so far
    blocks: tuple             # the state of each block's mixer
    attached: tuple           # (adapter, scale) of those that produced it; only they may continue it


class Packed(NamedTuple):
    """Sequences one after the other."""
    tokens: np.ndarray        # (T,)
    cu_seqlens: np.ndarray    # (N_seq + 1,)
    place: tuple              # index of each token in (B, L)


class ForwardCache(NamedTuple):
    """Kept by the forward pass for loss_and_grads."""
    blocks: dict              # block number -> what is kept of it, for the blocks that backward visits
    norm: tuple
    options: dict             # of all blocks: shared, cu_seqlens


class Same:
    """An object as part of a key: equal to itself alone, and to nothing once it is gone. The key does not keep it."""

    def __init__(self, it):
        self._it, self._hash = weakref.ref(it), id(it)

    def __eq__(self, other):
        return isinstance(other, Same) and self._it() is other._it() is not None

    def __hash__(self):
        return self._hash


class HeadRows:
    """The head as linear_cross_entropy takes it: rows are decoded on request."""

    def __init__(self, weights, name):
        self._weights, self._name = weights, name

    def __len__(self):
        return self._weights.shape(self._name)[0]

    def __getitem__(self, rows):
        return self._weights.rows(self._name, rows)


class Qwen35:
    """A model ready to run.

    config     model.config.Config, HF's field names
    weights    model.weights.Weights: GGUF tensor name -> array, V heads tiled; its backend computes the model
    tokenizer  formats.tokenizer.Tokenizer, or None
    notes      what loading left out, one line each
    """

    def __init__(self, config, weights, *, tokenizer=None, notes=(), adapters: dict | None = None,
                 observe: Callable | None = None):
        """adapters: name -> layer.Attached, shared with another model; observe: as of Layer."""
        self.config, self.weights, self.backend = config, weights, weights.backend
        self.tokenizer, self.notes = tokenizer, list(notes)
        self.dtype = weights.dtype
        self.adapters = {} if adapters is None else adapters
        self.layers = [Layer(i, config, weights, self.adapters, observe) for i in range(config.num_hidden_layers)]
        self.head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
        self._observed = observe is not None
        self._observe = observe or (lambda name, array: None)

    def observed(self, observe: Callable) -> "Qwen35":
        """The same model, its weights and adapters shared, that passes its stages to observe(name, array).

        Names are those of a trace: "embed", "blk.0.q", "output_norm", and "d.blk.0.q" for a gradient. Arrays have the
        model's form (batch axis first, value heads tiled) and may be overwritten after the call.
        """
        return Qwen35(self.config, self.weights, tokenizer=self.tokenizer, adapters=self.adapters, observe=observe)

    # ---- adapters

    def attach(self, adapter, scale: float = 1.0, name: str | None = None, trainable: bool = False) -> str:
        """Apply an adapter, in addition to those attached already. Returns its name.

        Raises InputError when it does not fit the model, the name is taken, or another adapter is trainable already.
        """
        self._check_fits(adapter)
        name = name or f"adapter{len(self.adapters)}"
        if name in self.adapters:
            raise InputError(f"an adapter named {name!r} is attached already; detach it or choose another name")
        if trainable and any(attached.trainable for attached in self.adapters.values()):
            raise InputError("another adapter is attached as trainable; only one can be")
        self.adapters[name] = Attached(adapter, scale, trainable)
        return name

    def detach(self, name: str):
        """Remove an attached adapter and return it. Raises InputError for a name that is not attached."""
        if name not in self.adapters:
            raise InputError(f"no adapter named {name!r} is attached; attached: {sorted(self.adapters) or 'none'}")
        return self.adapters.pop(name).adapter

    def _check_fits(self, adapter):
        wrong = []
        for target in {name.rsplit(".lora_", 1)[0] for name in adapter.tensors}:
            factors = (adapter.tensors.get(f"{target}.lora_{factor}") for factor in "ab")
            a, b = (() if factor is None else factor.shape for factor in factors)
            fits = target in self.weights and len(a) == 2 and b[1:] == a[:1]
            if not fits or (b[0], a[1]) != self.weights.shape(target):
                wrong.append(target)
        if wrong:
            raise InputError(f"the adapter does not fit this model in {len(wrong)} tensor(s), such as {min(wrong)}: "
                             "it was made for another base")

    def _trained(self):
        attached = list(self.adapters.values())
        chosen = [a for a in attached if a.trainable] or attached
        if len(chosen) != 1:
            raise InputError(f"wrt='lora' needs one trainable adapter, or exactly one attached; {len(attached)} are "
                             "attached")
        return chosen[0]

    # ---- forward

    def logits(self, tokens, lengths=None, cu_seqlens=None):
        """Next-token logits (B, L, V); zero in the padding.

        tokens (B, L) int; lengths (B,) for right padding; or cu_seqlens (N_seq + 1,) for packed sequences, B = 1
        """
        tokens = self._tokens(tokens)
        packed = self._pack(tokens, lengths, cu_seqlens)
        h, _ = self._forward(packed, keep_from=None)
        return self._unpacked(self._head_logits(h)[0], packed, tokens.shape)

    def hidden_states(self, tokens, lengths=None, cu_seqlens=None):
        """The embeddings, every block's output and the last norm's: num_hidden_layers + 2 arrays (B, L, D)."""
        tokens = self._tokens(tokens)
        packed = self._pack(tokens, lengths, cu_seqlens)
        states, names = [], {"embed", "output_norm", *(layer.name("out") for layer in self.layers)}
        self.observed(lambda name, h: states.append(h[0]) if name in names else None)._forward(packed, keep_from=None)
        return [self._unpacked(h, packed, tokens.shape) for h in states]

    def _unpacked(self, rows, packed, shape):
        """Rows (T, n) of packed tokens at their places in (B, L, n); zero in the padding."""
        xp = self.backend.xp
        out = xp.zeros((*shape, rows.shape[-1]), self.dtype)
        out[tuple(map(xp.asarray, packed.place))] = rows
        return out

    def _head_logits(self, h):
        return self.weights.linear_forward([self.head], h)[0]

    def loss(self, tokens, labels, lengths=None, cu_seqlens=None):
        """Mean cross-entropy over the labels that are not ignored, in nats.

        labels (B, L), aligned with tokens: the label at t is the target of the tokens before t (the shift happens
        inside and never crosses sequences); -100 is ignored. 0.0 when all are.
        """
        packed, targets = self._pack_with_targets(tokens, labels, lengths, cu_seqlens)
        h, _ = self._forward(packed, keep_from=None)
        loss, _ = self._head_loss(h, targets, grads=None)
        return float(loss)

    def _forward(self, packed, keep_from, keep=None):
        """Hidden states (1, T, D) after the last norm, and the ForwardCache of the blocks from keep_from on (None: of
        no block); keep, one of block.KEEP, sets what each of them keeps."""
        h = self._embed(packed.tokens[None])
        lengths = np.diff(packed.cu_seqlens)
        positions = np.arange(len(packed.tokens)) - np.repeat(packed.cu_seqlens[:-1], lengths)
        options, blocks = dict(shared=self._shared(positions), cu_seqlens=packed.cu_seqlens), {}
        for layer in self.layers:
            if keep_from is not None and layer.index >= keep_from:
                h, blocks[layer.index] = block_forward_keeping(keep, h, layer, **options)
            else:
                h = block_forward(h, layer, **options)[0]
        h, norm = self._final_norm(h)
        return h, ForwardCache(blocks, norm, options)

    def _embed(self, tokens):
        h = self.weights.embedding_forward("token_embd.weight", tokens)
        self._observe("embed", h)
        return h

    def _final_norm(self, h):
        h, norm = self.backend.rms_norm_forward(h, self.weights["output_norm.weight"], self.config.rms_norm_eps)
        self._observe("output_norm", h)
        return h, norm

    def _shared(self, positions):
        """For each block what its mixer shares with the others of its kind at these positions (L,)."""
        kinds = {name: MIXERS[name] for name in self.config.layer_types}
        shared = {name: kind.shared and kind.shared(self.config, self.backend, positions, self.weights.wide_dtype)
                  for name, kind in kinds.items()}
        return [shared[name] for name in self.config.layer_types]

    # ---- backward

    def loss_and_grads(self, tokens, labels, lengths=None, wrt="all", cu_seqlens=None, keep="products"):
        """The loss and its gradient with respect to every base tensor ("all") or to the adapter's factors ("lora").

        Arguments as for loss. Returns loss, {GGUF tensor name: array}; factors are named "<tensor>.lora_a" and
        ".lora_b". The gradient of a tied token_embd.weight includes the head's part. With "lora" only what the factors
        need is computed.

        keep: what each block keeps between forward and backward: "everything" (nothing is computed twice), "products"
        (no product with a weight is computed twice), or "inputs" (checkpointing: every block is computed twice). The
        gradients are equal to the bit; model/block.py lists the memory.

        Raises InputError for an unknown wrt or keep, and for "lora" without exactly one trainable or attached adapter.
        """
        if wrt not in ("all", "lora"):
            raise InputError(f"wrt={wrt!r} is unknown: use 'all' (every base tensor) or 'lora' (the adapter's factors)")
        if keep not in KEEP:
            raise InputError(f"keep={keep!r} is unknown: use {', '.join(map(repr, KEEP))}")
        trained = self._trained() if wrt == "lora" else None
        packed, targets = self._pack_with_targets(tokens, labels, lengths, cu_seqlens)

        def step(tokens, targets):
            return self._loss_and_grads(packed._replace(tokens=tokens), targets, trained, keep)

        if self.backend.run_step is None or trained is None or self._observed:
            loss, grads = step(packed.tokens, targets)
        else:
            attached = list(self.adapters.values())
            arrays = [x for a in attached for x in a.adapter.tensors.values()]
            key = (Same(self.weights), self.weights.version, keep, packed.cu_seqlens.tobytes(),
                   (targets >= 0).tobytes(), *((a.scale, a is trained) for a in attached), *map(Same, arrays))
            loss, grads = self.backend.run_step(key, dict(tokens=packed.tokens, targets=targets), step)
        return float(loss), grads

    def _loss_and_grads(self, packed, targets, trained, keep):
        """loss, gradients as arrays of the backend; trained: the Attached adapter, or None for the base."""
        grads = Gradients(base=trained is None, trained=trained)
        lowest = self._lowest_block(grads)
        h, cache = self._forward(packed, keep_from=lowest, keep=keep)
        loss, dh = self._head_loss(h, targets, grads)
        self._observe("d.output_norm", dh)
        dh, dw = self.backend.rms_norm_backward(dh, cache.norm, need_dw=grads.base)
        if grads.base:
            grads.add("output_norm.weight", dw)
        for layer in reversed(self.layers[lowest:]):
            dh = block_backward(dh, layer, cache.blocks.pop(layer.index), grads,
                                need_dx=grads.base or layer.index > lowest, **cache.options)
        if grads.base:
            self._observe("d.embed", dh)
            grads.add("token_embd.weight",
                      self.backend.embedding_backward(dh, packed.tokens[None], self.config.vocab_size))
        return loss, dict(grads)

    def _lowest_block(self, grads):
        """The first block with a gradient to collect, where backward ends."""
        wanted = (layer.index for layer in self.layers
                  if grads.wanted(layer, layer.mixer.linear_maps + layer.feed_forward.linear_maps))
        return next(wanted, len(self.layers))

    def _head_loss(self, h, targets, grads):
        """Cross-entropy of the head on h (1, T, D), one block of the vocabulary at a time.

        grads None: only the loss. Otherwise loss and dh; the head's gradient goes to grads when the base is trained.
        """
        head = HeadRows(self.weights, self.head)
        loss, cache = self.backend.linear_cross_entropy_forward(h[0], head, targets, need_gradient=grads is not None)
        if grads is None:
            return loss, None
        dh, dw = self.backend.linear_cross_entropy_backward(1.0, cache, need_dw=grads.base)
        if grads.base:
            grads.add(self.head, dw)
        return loss, dh[None]

    # ---- token by token

    def prefill(self, tokens, state=None):
        """Process tokens (L,) or (B, L) after those already in state; returns the last token's logits (V,) or (B, V),
        state.

        Raises InputError for no tokens, tokens outside the vocabulary, or a state of other adapters.
        """
        tokens = np.asarray(tokens)
        batch = self._tokens(tokens[None] if tokens.ndim == 1 else tokens)
        self._check_range(batch)
        if not batch.shape[1]:
            raise InputError("prefill needs at least one token")
        for start in range(0, batch.shape[1], PREFILL_TOKENS):
            h, state = self._continue(batch[:, start:start + PREFILL_TOKENS], state)
        logits = self._head_logits(h[:, -1:])[:, 0]
        return (logits[0] if tokens.ndim == 1 else logits), state

    def step(self, token, state):
        """Process one token, an int or (B,), by the recurrence; returns the next logits (V,) or (B, V), and the
        state."""
        token = np.asarray(token)
        logits, state = self.prefill(token.reshape(-1, 1), state)
        return (logits[0] if token.ndim == 0 else logits), state

    def _continue(self, tokens, state):
        B, L = tokens.shape
        attached = tuple((a.adapter, a.scale) for a in self.adapters.values())
        if state is None:
            state = State(0, (None,) * len(self.layers), attached)
        _check_same_adapters(state.attached, attached)
        shared = self._shared(state.position + np.arange(L))
        h, blocks = self._embed(tokens), []
        for layer, past in zip(self.layers, state.blocks, strict=True):
            h, past, _ = block_forward(h, layer, shared=shared, state=past)
            blocks.append(past)
        h, _ = self._final_norm(h)
        return h, State(state.position + L, tuple(blocks), attached)

    # ---- arguments

    def _tokens(self, tokens):
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise InputError(f"tokens must be integers of shape (B, L); they are {tokens.dtype} {tokens.shape}")
        return tokens

    def _check_range(self, tokens):
        wrong = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if len(wrong):
            raise InputError(f"token {wrong[0]} is outside the vocabulary of {self.config.vocab_size}")

    def _pack(self, tokens, lengths, cu_seqlens):
        """(B, L) without its padding -> Packed."""
        B, L = tokens.shape
        if cu_seqlens is not None:
            if lengths is not None:
                raise InputError("give lengths (padded rows) or cu_seqlens (packed), not both")
            cu = sequence_boundaries(B, L, cu_seqlens)
            place = (np.zeros(L, np.int64), np.arange(L))
        else:
            lengths = np.full(B, L) if lengths is None else np.asarray(lengths)
            if lengths.shape != (B,) or (lengths < 0).any() or (lengths > L).any():
                raise InputError(f"lengths must be {B} integers from 0 to {L}; they are {lengths.tolist()}")
            cu = np.concatenate([[0], np.cumsum(lengths)])
            place = np.nonzero(np.arange(L) < lengths[:, None])
        flat = tokens[place]
        if not len(flat):
            raise InputError("there are no tokens")
        self._check_range(flat)
        return Packed(flat, cu, place)

    def _pack_with_targets(self, tokens, labels, lengths, cu_seqlens):
        """Packed, and for each token the label of the next one in its sequence (-100 for the last)."""
        tokens, labels = self._tokens(tokens), np.asarray(labels)
        if labels.shape != tokens.shape:
            raise InputError(f"labels have shape {labels.shape}, tokens {tokens.shape}; they must be aligned")
        packed = self._pack(tokens, lengths, cu_seqlens)
        targets = np.append(labels[packed.place][1:], IGNORED)
        ends = packed.cu_seqlens[1:] - 1
        targets[ends[ends >= 0]] = IGNORED
        return packed, targets


def _check_same_adapters(before, now):
    """Raises InputError when a state would be continued under other adapters than those that produced it. Only an
    activated LoRA may be added: before its invocation tokens the base alone acts."""
    def without(some, others):
        return [adapter for adapter, scale in some if not any(adapter is a and scale == s for a, s in others)]

    joined = [adapter for adapter in without(now, before) if "invocation_tokens" not in adapter.metadata]
    if joined or without(before, now):
        raise InputError("this state was produced with other adapters, or other scales, than those attached now: "
                         "process the prompt again with state=None")
