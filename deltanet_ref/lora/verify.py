"""Does an adapter match a base model, and what does it change: tensors, size of the update, effect on the logits.

The norm of an update is that of B A without forming it: |B A|^2 = trace((B^T B) (A A^T)), in the Frobenius norm.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deltanet_ref.errors import InputError, counted, shown
from deltanet_ref.lora import llama_cpp
from deltanet_ref.lora.adapter import Adapter, FactorMatch, load_adapter, match_factors, read_adapter
from deltanet_ref.lora.bridge import reorder
from deltanet_ref.lora.merge import merged
from deltanet_ref.model.load import listing, text_model_name
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.tensors import linear_tensors

# Relative distances |x - y| / |y| of logits. Float32 passes that sum in different orders differ by 2e-7 to 1e-6 on
# small models, by a few times that on deep ones. An effect below NO_EFFECT is rounding error, a difference above SAME
# is not.
NO_EFFECT, SAME = 1e-6, 1e-4
LOST = 0.5  # limit for a merged model whose type rounds more, as a share of the adapter's own effect
# llama.cpp also rounds activations where the base is quantised (5e-2 seen with 4 bits): the limit for the base alone,
# and the limit with the adapter as a multiple of the distance measured on the base alone
ROUGH, TIMES_ROUNDING = 0.15, 3
STANDARD_ERRORS = 4  # by which the other order of the heads must predict the prompts better
LONGEST_PATH = 1000  # characters of a name in which a module path is looked for
_PATH = re.compile(r"(?P<prefix>.*?)layers\.(?P<layer>\d+)\.(?P<module>[\w.]+?)\.lora_")


@dataclass(frozen=True)
class Effect:
    """What the adapter changes in the next-token distributions of the prompts, over all their positions."""

    positions: int
    distance: float  # |adapted - base| / |base|, of the logits
    kl: float  # mean KL(base || adapted), nats
    top1: float  # share of positions whose most likely token changes
    base_loss: float  # cross-entropy of the prompts themselves, nats per token
    adapted_loss: float
    other_order_loss: float | None  # with the V heads in another order, if that predicts significantly better
    merged_distance: float  # |merged - adapted| / |adapted|: W + B A as one matrix against both at run time


@dataclass(frozen=True)
class Verification:
    """The result of verify, and of the comparisons added to it."""

    matched: list  # tensors whose factors match
    unmatched: list  # names or reasons
    zero: list  # matched tensors whose B A is zero
    sizes: dict  # matched tensor -> |scale B A| / |W|
    effect: Effect | None  # None when the adapter cannot be attached, or logits are not finite
    problems: list  # one line each, with the likely cause; any problem fails the check
    distances: dict  # merged file or other engine -> relative distance of its outputs from ours
    llama_cpp: str  # "compared", or why it was not


def verify(model: Qwen35, path: Path | str, prompts: Sequence[Sequence[int]], scale: float = 1.0) -> Verification:
    """Checks an adapter (GGUF or PEFT) against a model without attached adapters.

    prompts: lists of at least two token ids. Raises InputError when path is not a LoRA adapter at all.
    """
    stored = read_adapter(path, model.config)
    found = match_factors(stored.factors, model.config, stored.unexpected)
    unmatched = [*found.unexpected, *found.missing, *found.misshapen, *found.not_finite]
    good = [t for t in found.matched if not any(name.rsplit(".", 1)[0] == t for name in found.not_finite)]
    sizes = {t: _relative_size(stored, t, model.weights[t], scale) for t in good}
    zero = [t for t in good if sizes[t] == 0]
    problems, effect = _mismatches(found, model.config), None
    if not unmatched and good:
        adapter = load_adapter(path, model)
        with np.errstate(over="ignore", invalid="ignore"):  # logits that are not finite become a problem below
            effect = _effect(model, adapter, prompts, scale)
        problems += [NOT_FINITE] if effect is None else _failures(effect, zero, good, scale)
    return Verification(good, unmatched, zero, sizes, effect, problems, {}, "not compared")


def with_comparison(
    verification: Verification,
    name: str,
    theirs: np.ndarray,
    ours: np.ndarray,
    limit: float,
    reason: str = "computes something else",
) -> Verification:
    """Adds the relative distance of theirs from ours, and a problem if it exceeds both limit and SAME.

    reason: what the problem says of `name`.
    """
    distance, limit = _distance(theirs, ours), max(SAME, limit)
    problem = [f"{name} {reason}: its outputs are {distance:.1e} from ours (limit {limit:.0e})"]
    return replace(
        verification,
        distances=verification.distances | {name: distance},
        problems=verification.problems + (problem if not distance <= limit else []),
    )


def with_merged(
    verification: Verification,
    name: str,
    other: Qwen35,
    model: Qwen35,
    adapter: Adapter,
    prompts: Sequence[Sequence[int]],
    scale: float = 1.0,
) -> Verification:
    """Adds the distance of `other`, a merged model, from model and adapter. Raises InputError: another vocabulary."""
    if other.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{name} has a vocabulary of {other.config.vocab_size}, the base model one of "
            f"{model.config.vocab_size}: give the model that was merged from this base"
        )
    theirs, ours = adapted_logits(other, None, prompts), adapted_logits(model, adapter, prompts, scale)
    if _is_float32(other):
        return with_comparison(verification, name, theirs, ours, SAME)
    return with_comparison(
        verification,
        name,
        theirs,
        ours,
        LOST * verification.effect.distance,
        "computes something else, or its type rounds more than the adapter changes",
    )


def with_llama_cpp(
    verification: Verification,
    base: Path | str,
    model: Qwen35,
    adapter: Adapter,
    prompts: Sequence[Sequence[int]],
    scale: float = 1.0,
) -> Verification:
    """Adds llama.cpp's distances, with and without the adapter, or the reason why they are missing.

    base: the file of the model. The log-probabilities of the token after each prompt are compared.
    """
    if not Path(base).is_file():
        return replace(verification, llama_cpp="not compared (it reads GGUF files only)")
    if not llama_cpp.installed():
        return replace(verification, llama_cpp=f"not installed ({llama_cpp.INSTALL}), not compared")
    try:
        theirs = llama_cpp.log_probabilities(base, adapter, prompts, (0.0, scale))
    except RuntimeError as error:
        problem = f"llama.cpp does not run the base with the adapter (its log is on stderr): {error}"
        return replace(verification, problems=[*verification.problems, problem], llama_cpp="failed, not compared")
    ours = [log_softmax(np.stack([adapted_logits(model, x, [p], scale)[-1] for p in prompts])) for x in (None, adapter)]
    exact, alone = _is_float32(model), "llama.cpp, base alone"
    verification = with_comparison(verification, alone, theirs[0], ours[0], 0 if exact else ROUGH)
    rounding = 0 if exact else TIMES_ROUNDING * verification.distances[alone]
    verification = with_comparison(verification, "llama.cpp, base and adapter", theirs[1], ours[1], rounding)
    return replace(verification, llama_cpp="compared")


def adapted_logits(
    model: Qwen35, adapter: Adapter | None, prompts: Sequence[Sequence[int]], scale: float = 1.0
) -> np.ndarray:
    """Logits (n, V) of all positions of the prompts, concatenated; adapter None: those of the base."""
    name = model.attach(adapter, scale=scale) if adapter is not None else None
    try:
        lengths = [len(p) for p in prompts]
        return model.logits(np.concatenate(prompts)[None], cu_seqlens=np.cumsum([0, *lengths]))[0]
    finally:
        if name is not None:
            model.detach(name)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """(n, V) -> (n, V), in float64."""
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _is_float32(model):
    """Whether every tensor is stored in float32 or better; otherwise llama.cpp rounds activations too."""
    return all(model.weights.stored_type(name).name in ("F32", "F64") for name in model.weights)


# ---- what does not match, and why

NOT_FINITE = (
    "the logits with the adapter are not finite: its values or the scale are too large, or the base's own "
    "logits are not finite"
)


def _mismatches(found: FactorMatch, config) -> list[str]:
    """One line for each way in which the factors do not match, with the likely cause."""
    problems = []
    if not (found.matched or found.missing or found.misshapen):
        problems.append("no tensor of the adapter belongs to a linear layer of this model")
    elif found.unexpected:
        problems.append(
            f"partial match: {len(found.matched)} matching, {len(found.unexpected)} other than LoRA "
            "factors of this model's linear layers"
        )
    problems += [f"{name} is missing, only its partner is there: the file is damaged" for name in found.missing]
    problems += [f"{name} holds NaN or infinity: the file is damaged" for name in found.not_finite]
    if found.misshapen:
        problems.append(
            f"wrong base: {listing('misshapen', found.misshapen, most=1)}; the adapter was made for a "
            "model of another size"
        )
    return problems + _causes(found.unexpected, config)


def _causes(names, config):
    """Likely causes of names that match nothing: another prefix, another number of layers, other kinds of layers."""
    known = {spec.hf_name.removesuffix(".weight") for spec in linear_tensors(config).values()}
    modules = {path.split(".", 3)[3] for path in known}
    prefixes, elsewhere = Counter(), []
    for name in names:
        match = _PATH.match(text_model_name(name[:LONGEST_PATH].removeprefix("base_model.model.")))
        if not match:
            continue
        if f"model.layers.{match['layer']}.{match['module']}" in known and match["prefix"] != "model.":
            prefixes[match["prefix"]] += 1
        elif match["module"] in modules:
            elsewhere.append(f"layers.{match['layer']}.{match['module']}")
    causes = [
        f"wrong prefix: {shown(prefix)} instead of 'model.' or 'model.language_model.' in "
        f"{counted(count, 'name')}: rename them"
        for prefix, count in prefixes.items()
    ]
    if elsewhere:
        causes.append(f"wrong base: this model has no {shown(elsewhere[0])}: the number or the kinds of layers differ")
    return causes


# ---- what it changes


def _relative_size(stored, target, w, scale):
    """|scale (alpha / r) B A| / |W|."""
    a, b = (np.asarray(stored.factors[f"{target}.lora_{factor}"], np.float64) for factor in "ab")
    square = float(np.sum((b.T @ b) * (a @ a.T)))
    update = abs(scale * stored.alphas[target] / len(a)) * math.sqrt(max(square, 0.0))
    return _ratio(update, float(np.linalg.norm(w)))


def _effect(model, adapter, prompts, scale):
    """Effect, or None when logits are not finite."""
    base, adapted = (adapted_logits(model, x, prompts, scale) for x in (None, adapter))
    if not (np.isfinite(base).all() and np.isfinite(adapted).all()):
        return None
    before, after = log_softmax(base), log_softmax(adapted)
    losses = {name: _losses(logits, prompts) for name, logits in (("base", base), ("adapted", adapted))}
    other = _better_order(model, adapter, prompts, scale, losses["adapted"])
    merged_model = Qwen35(model.config, MergedWeights(model.weights, [(adapter, scale)]))
    return Effect(
        positions=len(base),
        distance=_distance(adapted, base),
        kl=float(np.mean(np.sum(np.exp(before) * (before - after), axis=-1))),
        top1=float(np.mean(before.argmax(-1) != after.argmax(-1))),
        base_loss=float(losses["base"].mean()),
        adapted_loss=float(losses["adapted"].mean()),
        other_order_loss=other,
        merged_distance=_distance(adapted_logits(merged_model, None, prompts), adapted),
    )


def _better_order(model, adapter, prompts, scale, losses):
    """The prompts' loss with the V heads reordered, if it is significantly lower than losses (n,), else None."""
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
        return ["no effect: B A is zero in every tensor: the adapter was saved before training, or without lora_B"]
    problems = []
    if not effect.distance > NO_EFFECT:
        problems.append(
            f"no effect: the logits change by {effect.distance:.1e}, which is rounding error: the scale is "
            "too small, or training was too short"
        )
    if not effect.merged_distance <= SAME:
        problems.append(f"merged and live differ by {effect.merged_distance:.1e} (limit {SAME:.0e})")
    other = effect.other_order_loss
    if other is not None and other < effect.base_loss:
        problems.append(
            f"wrong order of the V heads: the prompts' loss is {effect.adapted_loss:.3f} (base "
            f"{effect.base_loss:.3f}), and {other:.3f} with the heads reordered: the adapter is in grouped "
            "order and the base in tiled order, or the reverse"
        )
    return problems


class MergedWeights(Mapping):
    """model.weights.Weights with adapters merged in, for forward passes only; each sum is formed when it is used."""

    def __init__(self, weights, adapters):
        self._weights, self._adapters, self.backend = weights, adapters, weights.backend
        self.dtype, self.wide_dtype = weights.dtype, weights.wide_dtype

    def __getitem__(self, name):
        w = self._weights[name]
        if not any(name in adapter.targets for adapter, _ in self._adapters):
            return w
        return merged(w, target=name, adapters=self._adapters).astype(self.dtype)

    def linear_forward(self, names, x):
        return [self.backend.linear_forward(x, self[name]) for name in names]

    def embedding_forward(self, name, tokens):
        return self._weights.embedding_forward(name, tokens)  # no adapter changes it

    def rows(self, name, ids):
        return self._weights.rows(name, ids)

    def shape(self, name):
        return self._weights.shape(name)

    def __iter__(self):
        return iter(self._weights)

    def __len__(self):
        return len(self._weights)


def _losses(logits, prompts):
    """Cross-entropy of each token of the prompts but their first, given the tokens before it: (n,) nats."""
    ends = np.cumsum([len(p) for p in prompts])
    rows = np.setdiff1d(np.arange(ends[-1]), ends - 1)
    return -log_softmax(logits)[rows, np.concatenate(prompts)[rows + 1]]


def _distance(x, reference):
    """|x - reference| / |reference|, in float64."""
    return _ratio(
        float(np.linalg.norm(np.subtract(x, reference, dtype=np.float64))), float(np.linalg.norm(np.float64(reference)))
    )


def _ratio(norm, reference):
    """norm / reference; for a reference of zero 0 if norm is zero too, else 1."""
    return norm / reference if reference else float(norm > 0)
