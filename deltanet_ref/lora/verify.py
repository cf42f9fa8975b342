"""Does an adapter fit a base model, and does it do anything: matched tensors, size of the update, effect on logits.

The norm of an update is that of B A without forming it: |B A|^2 = trace((B^T B) (A A^T)), in the Frobenius norm.
"""
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from deltanet_ref.errors import InputError, shown
from deltanet_ref.formats.tokenizer import load_tokenizer
from deltanet_ref.lora.adapter import fit, load_adapter, read_adapter
from deltanet_ref.lora.bridge import reorder
from deltanet_ref.lora.merge import merged
from deltanet_ref.model.load import text_model_name
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.tensors import linear_tensors

# Relative distances of logits, |x - y| / |y|. Two float32 passes of different order are 2e-7 .. 1e-6 apart on small
# models and a few times that on deep ones: an effect below NO_EFFECT is rounding, a difference beyond SAME is not.
NO_EFFECT, SAME = 1e-6, 1e-4
LOST = 0.5                  # of a merged model in a type that rounds more: this share of the adapter's own effect
# of llama.cpp, which rounds activations too where the base is quantised (5e-2 seen with 4 bits): on the base alone, and
# with the adapter this many times the distance on the base alone
ROUGH, TIMES_ROUNDING = 0.15, 3
STANDARD_ERRORS = 4         # by which one order of the heads must predict the prompts better than the other
_PATH = re.compile(r"(?P<prefix>.*?)layers\.(?P<layer>\d+)\.(?P<module>[\w.]+?)\.lora_")


@dataclass(frozen=True)
class Effect:
    """What the adapter changes in the next-token distributions of some prompts, over all their positions."""

    positions: int
    distance: float             # |adapted - base| / |base|, of the logits
    kl: float                   # mean KL(base || adapted), nats
    top1: float                 # share of positions whose likeliest token changes
    base_loss: float            # cross-entropy of the prompts themselves, nats per token
    adapted_loss: float
    other_order_loss: float | None      # with the V heads in another order that predicts better beyond doubt, or None
    merged_distance: float      # |merged - adapted| / |adapted|: W + B A as one matrix against both at run time


@dataclass(frozen=True)
class Report:
    """What verify found."""

    matched: list               # tensors
    unmatched: list             # names or reasons
    zero: list                  # matched tensors whose B A is zero
    sizes: dict                 # matched tensor -> |scale B A| / |W|
    effect: Effect | None       # None when the adapter cannot be attached, or logits are not finite
    problems: list              # each makes the check fail; one line with its likely cause
    others: dict                # name of another engine or file -> distance of its logits from ours


def verify(model, path, prompts, scale=1.0):
    """Holds an adapter (GGUF or PEFT) against a model (Qwen35 without adapters) -> Report.

    prompts: lists of token ids, each of two at least. Raises InputError for what is no LoRA adapter at all.
    """
    stored = read_adapter(path, model.config)
    found = fit(stored.factors, model.config, stored.strangers)
    unmatched = [*found.strangers, *found.missing, *found.misshapen, *found.infinite]
    good = [t for t in found.matched if not any(name.rsplit(".", 1)[0] == t for name in found.infinite)]
    sizes = {t: _relative_size(stored, t, model.weights[t], scale) for t in good}
    zero = [t for t in good if sizes[t] == 0]
    problems, effect = _misfits(found, model.config), None
    if not unmatched and good:
        adapter = load_adapter(path, model)
        with np.errstate(over="ignore", invalid="ignore"):         # of huge values; what is not finite is told
            effect = _effect(model, adapter, prompts, scale)
        problems += [NOT_FINITE] if effect is None else _failures(effect, zero, good, scale)
    return Report(good, unmatched, zero, sizes, effect, problems, {})


def compare(report, name, theirs, ours, limit, reason="computes something else"):
    """The report with the distance of another's outputs (arrays) from ours, and a problem when it is too large.

    limit: relative; SAME where that is larger. reason: of a distance that is too large.
    """
    distance, limit = _distance(theirs, ours), max(SAME, limit)
    problem = [f"{name} {reason}: its outputs are {distance:.1e} from ours (limit {limit:.0e})"]
    return replace(report, others=report.others | {name: distance},
                   problems=report.problems + (problem if not distance <= limit else []))


def adapted_logits(model, adapter, prompts, scale=1.0):
    """Logits (n, V) of every position of the prompts, one after the other; adapter None: those of the base."""
    name = model.attach(adapter, scale=scale) if adapter is not None else None
    try:
        lengths = [len(p) for p in prompts]
        return model.logits(np.concatenate(prompts)[None], cu_seqlens=np.cumsum([0, *lengths]))[0]
    finally:
        if name is not None:
            model.detach(name)


def log_softmax(x):
    """(n, V) -> (n, V), in float64."""
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def llama_log_probabilities(base, adapter, prompts, scales):
    """llama.cpp's log-probabilities (scales, prompts, V) after each prompt: float32 KV cache, no flash attention.

    base: a GGUF file; adapter: Adapter, which acts on every position at each of the scales (0: not at all). Raises
    InputError when the binding of llama.cpp, xllamacpp, is not installed.
    """
    try:
        import xllamacpp
    except ImportError:
        raise InputError("comparing with llama.cpp needs its binding: pip install xllamacpp") from None
    vocabulary, (letter,) = adapter.config.vocab_size, load_tokenizer(base).encode("a")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "adapter.gguf"
        replace(adapter, metadata={}).save_gguf(path)       # with invocation tokens it would wait for them
        p = xllamacpp.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel, p.warmup = str(base), max(256, 2 * max(map(len, prompts))), 1, False
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0)]
        server, rows = xllamacpp.Server(p), np.full((len(scales), len(prompts), vocabulary), -np.inf)
        for row, (scale, prompt) in zip(rows.reshape(-1, vocabulary), product(scales, prompts)):
            reply = server.handle_completions({      # a reply without text has no probabilities, so a letter is forced
                "prompt": [int(t) for t in prompt], "n_predict": 1, "temperature": -1.0, "n_probs": vocabulary,
                "logit_bias": [[letter, 1000.0]], "cache_prompt": False, "post_sampling_probs": False,
                "lora": [{"id": 0, "scale": float(scale)}]})
            reply = json.loads(reply) if isinstance(reply, str) else reply
            for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
    return rows


# ---- what does not fit, and why

NOT_FINITE = ("the logits with it are not finite: its values or the scale are too large, or the base has such logits "
              "itself")


def _misfits(found, config):
    """One line for each way in which the factors do not fit, with the likely cause."""
    problems = []
    if not (found.matched or found.missing or found.misshapen):
        problems.append("no tensor of the adapter belongs to this model")
    elif found.strangers:
        problems.append(f"half matching: {len(found.matched)} tensors match, {len(found.strangers)} things are beyond "
                        "scale B A on this model's linear layers")
    for kind, names in (("lacks the other factor", found.missing), ("is not finite", found.infinite)):
        problems += [f"{name} {kind}: the file is damaged" for name in names]
    if found.misshapen:
        problems.append(f"wrong base: {len(found.misshapen)} tensors have other shapes here, such as "
                        f"{found.misshapen[0]}: it was made for a model of another size")
    return problems + _causes(found.strangers, config)


def _causes(strangers, config):
    """Likely causes of names that match nothing: a prefix, the number or the kinds of layers."""
    known = {spec.hf_name.removesuffix(".weight") for spec in linear_tensors(config).values()}
    modules = {path.split(".", 3)[3] for path in known}
    prefixes, elsewhere = Counter(), []
    for name in strangers:
        match = _PATH.match(text_model_name(name.removeprefix("base_model.model.")))
        if not match:
            continue
        if f"model.layers.{match['layer']}.{match['module']}" in known and match["prefix"] != "model.":
            prefixes[match["prefix"]] += 1
        elif match["module"] in modules:
            elsewhere.append(f"layers.{match['layer']}.{match['module']}")
    causes = [f"wrong prefix: {count} names are of modules that this model has, under {shown(prefix)} instead of "
              "'model.' or 'model.language_model.': rename them" for prefix, count in prefixes.items()]
    if elsewhere:
        causes.append(f"wrong base: {elsewhere[0]} exists in other models of this family, not in this one: the number "
                      "or the kinds of layers differ")
    return causes


# ---- what it does

def _relative_size(stored, target, w, scale):
    """|scale alpha / r B A| / |W|."""
    a, b = (np.asarray(stored.factors[f"{target}.lora_{factor}"], np.float64) for factor in "ab")
    square = float(np.sum((b.T @ b) * (a @ a.T)))
    return abs(scale * stored.alphas[target] / len(a)) * math.sqrt(max(square, 0.0)) / float(np.linalg.norm(w))


def _effect(model, adapter, prompts, scale):
    """Effect, or None when logits are not finite."""
    base, adapted = (adapted_logits(model, x, prompts, scale) for x in (None, adapter))
    if not (np.isfinite(base).all() and np.isfinite(adapted).all()):
        return None
    before, after = log_softmax(base), log_softmax(adapted)
    losses = {name: _losses(logits, prompts) for name, logits in (("base", base), ("adapted", adapted))}
    other = _better_order(model, adapter, prompts, scale, losses["adapted"])
    merged_model = Qwen35(model.config, MergedWeights(model.weights, [(adapter, scale)]), backend=model.backend)
    return Effect(
        positions=len(base), distance=_distance(adapted, base),
        kl=float(np.mean(np.sum(np.exp(before) * (before - after), axis=-1))),
        top1=float(np.mean(before.argmax(-1) != after.argmax(-1))),
        base_loss=float(losses["base"].mean()), adapted_loss=float(losses["adapted"].mean()), other_order_loss=other,
        merged_distance=_distance(adapted_logits(merged_model, None, prompts), adapted))


def _better_order(model, adapter, prompts, scale, losses):
    """The prompts' loss with the V heads reordered, if that is lower than losses (n,) beyond doubt, else None."""
    if model.config.linear_num_key_heads == model.config.linear_num_value_heads:
        return None
    orders = [replace(adapter, tensors=reorder(adapter.tensors, model.config, to=to)) for to in ("tiled", "grouped")]
    other = min((_losses(adapted_logits(model, x, prompts, scale), prompts) for x in orders), key=np.mean)
    gain = losses - other
    certain = gain.mean() > STANDARD_ERRORS * gain.std() / math.sqrt(len(gain))
    return float(other.mean()) if certain else None


def _failures(effect, zero, good, scale):
    if scale == 0:
        return ["no effect: the scale is 0"]
    if len(zero) == len(good):
        return ["no effect: B A is zero in every tensor: it was saved before it was trained, or lora_B was not loaded"]
    problems = []
    if not effect.distance > NO_EFFECT:
        problems.append(f"no effect: it changes the logits by {effect.distance:.1e}, which is rounding; its scale or "
                        "its training was too small")
    if not effect.merged_distance <= SAME:
        problems.append(f"merged and live differ by {effect.merged_distance:.1e} (limit {SAME:.0e})")
    other = effect.other_order_loss
    if other is not None and other < effect.base_loss:
        problems.append(f"wrong order of the V heads: the prompts' loss is {effect.adapted_loss:.3f} (base "
                        f"{effect.base_loss:.3f}), and {other:.3f} with the heads reordered: grouped order was fed to "
                        "a tiled base, or the reverse")
    return problems


class MergedWeights(Mapping):
    """model.weights.Weights, for forward passes, with adapters worked in: each sum is formed when it is used."""

    def __init__(self, weights, adapters):
        self._weights, self._adapters, self.dtype = weights, adapters, weights.dtype

    def __getitem__(self, name):
        w = self._weights[name]
        if not any(name in adapter.targets for adapter, _ in self._adapters):
            return w
        return merged(w, target=name, adapters=self._adapters).astype(self.dtype)

    def linear_forward(self, ops, names, x):
        return [ops.linear_forward(x, self[name]) for name in names]

    def rows(self, name, ids):
        return self._weights.rows(name, ids)        # of the embeddings, which no adapter changes

    def shape(self, name):
        return self._weights.shape(name)

    def __iter__(self):
        return iter(self._weights)

    def __len__(self):
        return len(self._weights)


def _losses(logits, prompts):
    """Cross-entropy of each token of the prompts given those before it, (n,) nats."""
    ends = np.cumsum([len(p) for p in prompts])
    rows = np.setdiff1d(np.arange(ends[-1]), ends - 1)
    return -log_softmax(logits)[rows, np.concatenate(prompts)[rows + 1]]


def _distance(x, reference):
    """|x - reference| / |reference|, in float64; beside a reference of zeros 0 for zeros and 1 for anything else."""
    difference = np.linalg.norm(np.subtract(x, reference, dtype=np.float64))
    size = np.linalg.norm(np.float64(reference))
    return float(difference / size) if size else float(difference > 0)
