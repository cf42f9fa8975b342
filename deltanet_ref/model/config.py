"""The shape of a Qwen3.5 text model, read from GGUF metadata or from an HF config.json."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from deltanet_ref.errors import InputError, shown
from deltanet_ref.formats.values import is_real, is_text, is_whole
from deltanet_ref.model.layers import FEED_FORWARDS, MIXERS
from deltanet_ref.model.layers.kind import Fields, shortest, size

ARCHITECTURE = "qwen35"       # of GGUF files; the prefix of their keys
HF_TEXT, HF_MULTIMODAL = "qwen3_5_text", "qwen3_5"         # model_type of config.json
MAX_LAYERS = 1000             # a count beyond this is damage; it must not become a list of that length


class GGUFKeys:
    """Metadata under "<architecture>.", and the problems found while reading it."""

    def __init__(self, metadata: Mapping, architecture: str):
        self.metadata, self.architecture, self.problems = metadata, architecture, []

    def full(self, key):
        """The key with its architecture, as the file has it."""
        return f"{self.architecture}.{key}"

    def get(self, key, default=None):
        """The value of a key, of any type."""
        return self.metadata.get(self.full(key), default)

    def number(self, key, kind=np.uint32, default=None):
        """An int or float; where there is none, a problem, and 1."""
        value = self.get(key, default)
        if value is None:
            self.problems.append(f"{self.full(key)} is missing")
        elif not (is_whole(value) if kind is np.uint32 else is_real(value)):
            self.problems.append(f"{self.full(key)} is {shown(value)}, not a number")
        else:
            return int(value) if kind is np.uint32 else float(value)
        return 1


@dataclass(frozen=True, kw_only=True)
class ModelFields(Fields):
    """What does not belong to a kind of layer."""
    hidden_size: int = size("embedding_length", 4096)
    max_position_embeddings: int = size("context_length", 32768)
    rms_norm_eps: float = size("attention.layer_norm_rms_epsilon", 1e-6, np.float32)

    def to_hf(self):
        return {"rms_norm_eps": shortest(self.rms_norm_eps)}


PARTS = (ModelFields, *(kind.fields for kind in (*FEED_FORWARDS.values(), *MIXERS.values())))


@dataclass(frozen=True, kw_only=True)
class Config(*PARTS):
    """Every size of the model, under HF's field names. Checked when made: InputError lists all that is wrong."""
    vocab_size: int
    num_hidden_layers: int
    layer_types: tuple            # of each layer a key of layers.MIXERS, such as "linear_attention" (Gated DeltaNet)
    mlp_layer_types: tuple = ()   # of each layer a key of layers.FEED_FORWARDS; () means "dense" for all
    tie_word_embeddings: bool

    def __post_init__(self):
        problems = [
            f"{f.name} is {shown(getattr(self, f.name))}, it must be a positive "
            f"{'integer' if f.type is int else 'number'}"
            for f in fields(self) if f.type in (int, float) and not _positive(getattr(self, f.name), f.type)]
        _raise(problems)
        for part in PARTS:
            problems += part.problems(self)
        for field, types, known in (("layer_types", self.layer_types, MIXERS),
                                    ("mlp_layer_types", self.feed_forward_types, FEED_FORWARDS)):
            if len(types) != self.num_hidden_layers:
                problems.append(f"{field} has {len(types)} entries for {self.num_hidden_layers} layers")
            if unknown := sorted({str(t) for t in types} - set(known)):
                problems.append(f"{field} {unknown} are unknown: use {' or '.join(known)}")
        _raise(problems)

    @property
    def feed_forward_types(self) -> tuple:
        """mlp_layer_types with an entry for each layer."""
        return self.mlp_layer_types or ("dense",) * self.num_hidden_layers

    @classmethod
    def from_gguf(cls, metadata: Mapping, shapes: Mapping | None = None) -> "Config":
        """Reads the architecture's keys of a GGUF file (keys of the official converter).

        metadata: key -> value. shapes: tensor name -> shape (rows first); they give the vocabulary where no key does,
        and tied embeddings (no output.weight). Raises InputError: another architecture, or all bad keys at once.
        """
        shapes = shapes or {}
        if not is_text(metadata.get("general.type", "model"), "model"):
            raise InputError(f"general.type of this GGUF is {shown(metadata['general.type'])}, not 'model': pass the "
                             "base model's file")
        architecture = metadata.get("general.architecture")
        if not is_text(architecture, ARCHITECTURE):
            raise InputError(f"the architecture is {shown(architecture)}: only dense Qwen3.5 models ({ARCHITECTURE!r}) "
                             "are supported")
        keys = GGUFKeys(metadata, ARCHITECTURE)
        blocks, mtp_blocks = keys.number("block_count"), keys.number("nextn_predict_layers", default=0)
        layers = blocks - mtp_blocks
        if not 0 < layers <= blocks <= MAX_LAYERS:
            keys.problems.append(f"{blocks} blocks less {mtp_blocks} for multi-token prediction leave {layers} layers")
            _raise(keys.problems)
        values = {"num_hidden_layers": layers}
        for part in PARTS:
            values |= part.from_gguf(keys)
        recurrent = keys.get("attention.recurrent_layers")
        if recurrent is None:
            values["layer_types"] = _every(keys.number("full_attention_interval", default=4), layers)
        elif not isinstance(recurrent, np.ndarray) or len(recurrent) not in (layers, blocks):
            keys.problems.append(f"{keys.full('attention.recurrent_layers')} must have {layers} entries, one per layer")
        else:
            values["layer_types"] = tuple("linear_attention" if r else "full_attention"
                                          for r in list(recurrent)[:layers])
        tokens = metadata.get("tokenizer.ggml.tokens")
        table = shapes.get("token_embd.weight") or (len(tokens) if isinstance(tokens, Sequence) else 0,)
        values["vocab_size"] = keys.number("vocab_size", default=table[0])
        _raise(keys.problems)
        return cls(**values, tie_word_embeddings="output.weight" not in shapes)

    @classmethod
    def from_hf(cls, config: Mapping) -> "Config":
        """Reads an HF config.json (a dict): model_type qwen3_5_text, or qwen3_5 with its text_config.

        Absent keys take HF's defaults; rotary keys may be nested in rope_parameters or flat. Raises InputError.
        """
        model_type = config.get("model_type")
        text = config.get("text_config") if model_type == HF_MULTIMODAL else config
        if model_type not in (HF_MULTIMODAL, HF_TEXT) or not isinstance(text, dict):
            raise InputError(f"config.json has model_type {shown(model_type)}: only dense Qwen3.5 models ({HF_TEXT}, "
                             f"or {HF_MULTIMODAL} with a text_config) are supported")
        problems = ["mixture-of-experts models are not supported"] if text.get("num_experts") else []
        values = {"vocab_size": text.get("vocab_size", 248320)}
        for part in PARTS:
            values |= part.from_hf(text, problems)
        layers = values["num_hidden_layers"] = text.get("num_hidden_layers", 32)
        if not is_whole(layers) or not 0 < layers <= MAX_LAYERS:
            problems.append(f"num_hidden_layers is {shown(layers)}")
            _raise(problems)
        layer_types = text.get("layer_types")
        if layer_types is None:
            layer_types = _every(text.get("full_attention_interval", 4), layers)
        mlp_layer_types = text.get("mlp_layer_types") or ()
        for key, value in (("layer_types", layer_types), ("mlp_layer_types", mlp_layer_types)):
            if not isinstance(value, (list, tuple)):
                problems.append(f"{key} is {shown(value)}, not a list")
        _raise(problems)
        tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        return cls(**values, layer_types=tuple(layer_types), mlp_layer_types=tuple(mlp_layer_types),
                   tie_word_embeddings=tied)

    def to_gguf_metadata(self) -> dict:
        """The keys that the official converter writes for this shape, as NumPy scalars of the types it uses.

        Raises InputError for kinds of layers that this architecture of GGUF cannot express.
        """
        foreign = {*self.layer_types, *self.feed_forward_types} - {"linear_attention", "full_attention", "dense"}
        if foreign:
            raise InputError(f"a GGUF file of architecture {ARCHITECTURE!r} cannot hold layers of type "
                             f"{', '.join(sorted(foreign))}: write an HF directory")
        delta = np.array([t == "linear_attention" for t in self.layer_types])
        interval = int(np.argmin(delta)) + 1        # the first attention layer ends the first period ...
        if self.layer_types != _every(interval, self.num_hidden_layers):
            interval = 4                            # ... where an interval fits; recurrent_layers says it in any case
        keys = {"block_count": np.uint32(self.num_hidden_layers), "attention.recurrent_layers": delta,
                "full_attention_interval": np.uint32(interval)}
        for part in PARTS:
            keys |= {f.metadata["gguf"]: f.metadata["kind"](getattr(self, f.name)) for f in fields(part) if f.metadata}
            keys |= part.to_gguf(self)
        return {"general.architecture": ARCHITECTURE, "general.type": "model",
                **{f"{ARCHITECTURE}.{key}": value for key, value in keys.items()}}

    def to_hf(self) -> dict:
        """The entries of the text model's config.json that describe this shape."""
        entries = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": HF_TEXT, "vocab_size": self.vocab_size,
                   "num_hidden_layers": self.num_hidden_layers, "layer_types": list(self.layer_types),
                   "tie_word_embeddings": self.tie_word_embeddings}
        if self.mlp_layer_types:
            entries["mlp_layer_types"] = list(self.mlp_layer_types)
        for part in PARTS:
            entries |= {f.name: getattr(self, f.name) for f in fields(part) if f.metadata} | part.to_hf(self)
        return entries


def _every(interval, layers):
    """Layer types where every interval-th layer is attention and the others are delta layers."""
    if not _positive(interval, int):
        raise InputError(f"full_attention_interval is {shown(interval)}, it must be a positive integer")
    return tuple("full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers))


def _positive(value, kind):
    return (is_whole(value) if kind is int else is_real(value)) and 0 < value < 2 ** 31


def _raise(problems):
    if problems:
        raise InputError("the model's configuration cannot be used: " + "; ".join(problems))
