"""The shape of a Qwen3.5 text model, read from GGUF metadata or from an HF config.json."""
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from deltanet_ref.errors import InputError, shown

ARCHITECTURE = "qwen35"
LAYER_TYPES = ("linear_attention", "full_attention")
MAX_LAYERS = 1000        # a count beyond this is damage; it must not become a list of that length

# field, GGUF key after "qwen35.", type: what both sides state as one number
GGUF_NUMBERS = (
    ("max_position_embeddings", "context_length", np.uint32),
    ("hidden_size", "embedding_length", np.uint32),
    ("intermediate_size", "feed_forward_length", np.uint32),
    ("num_attention_heads", "attention.head_count", np.uint32),
    ("num_key_value_heads", "attention.head_count_kv", np.uint32),
    ("rope_theta", "rope.freq_base", np.float32),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", np.float32),
    ("head_dim", "attention.key_length", np.uint32),
    ("linear_conv_kernel_dim", "ssm.conv_kernel", np.uint32),
    ("linear_key_head_dim", "ssm.state_size", np.uint32),
    ("linear_num_key_heads", "ssm.group_count", np.uint32),
    ("linear_num_value_heads", "ssm.time_step_rank", np.uint32),
)

# what HF's Qwen3_5TextConfig (transformers 5.23) takes where config.json is silent
HF_DEFAULTS = {
    "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
}
HF_ROPE_DEFAULTS = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": (11, 11, 10),
                    "rope_type": "default"}
HF_FIXED = {"hidden_act": "silu", "attention_bias": False, "attn_output_gate": True}     # nothing else is implemented


@dataclass(frozen=True)
class Config:
    """Every size of the model, under HF's field names. Checked when made: InputError lists all that is wrong."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    mrope_section: tuple          # frequencies that follow the t, h and w position (text: all three are equal)
    layer_types: tuple            # per layer: "linear_attention" (Gated DeltaNet) or "full_attention"
    tie_word_embeddings: bool
    max_position_embeddings: int

    def __post_init__(self):
        problems = [
            f"{f.name} is {shown(getattr(self, f.name))}, it must be a positive "
            f"{'integer' if f.type is int else 'number'}"
            for f in fields(self) if f.type in (int, float) and not _positive(getattr(self, f.name), f.type)]
        _raise(problems)
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} "
                            "key/value heads: the first must be a multiple of the second")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            problems.append(f"{self.linear_num_value_heads} delta value heads cannot share "
                            f"{self.linear_num_key_heads} key heads: the first must be a multiple of the second")
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            problems.append(f"{self.rotary_dim} of {self.head_dim} features per head are rotated: the number must be "
                            "even and at most head_dim")
        if len(self.mrope_section) != 3 or not all(_whole(n) and 0 <= n < 2 ** 31 for n in self.mrope_section):
            problems.append(f"mrope_section is {list(self.mrope_section)}, it must be three counts")
        if len(self.layer_types) != self.num_hidden_layers:
            problems.append(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        if unknown := sorted({str(t) for t in self.layer_types} - set(LAYER_TYPES)):
            problems.append(f"layer types {unknown} are unknown: use {' or '.join(LAYER_TYPES)}")
        _raise(problems)

    @property
    def rotary_dim(self):
        """Features of an attention head that rotary positions turn."""
        return int(self.head_dim * self.partial_rotary_factor + 1e-6)      # the factor may be a rounded quotient

    @property
    def linear_key_dim(self):
        """H_k d_k, the width of q (and of k) in a delta layer."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self):
        """H_v d_v, the width of v (and of z and o) in a delta layer."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self):
        """Channels of the causal convolution: q, k, v one after the other."""
        return 2 * self.linear_key_dim + self.linear_value_dim

    @classmethod
    def from_gguf(cls, metadata, shapes=None):
        """Reads the `qwen35.*` keys of a GGUF file (keys of the official converter).

        metadata: key -> value. shapes: tensor name -> shape (rows first); they give the vocabulary where no key does,
        and tied embeddings (no output.weight). Raises InputError: another architecture, or all bad keys at once.
        """
        shapes = shapes or {}
        if not is_text(metadata.get("general.type", "model"), "model"):
            raise InputError(f"this GGUF holds a {metadata['general.type']}, not a model: pass the base model's file")
        architecture = metadata.get("general.architecture")
        if not is_text(architecture, ARCHITECTURE):
            raise InputError(f"the architecture is {shown(architecture)}: only dense Qwen3.5 models ({ARCHITECTURE!r}) "
                             "are supported")
        problems = []

        def number(key, kind=np.uint32, default=None):
            value = metadata.get(f"{ARCHITECTURE}.{key}", default)
            if value is None:
                problems.append(f"{ARCHITECTURE}.{key} is missing")
            elif not (_whole(value) if kind is np.uint32 else _real(value)):
                problems.append(f"{ARCHITECTURE}.{key} is {shown(value)}, not a number")
            else:
                return int(value) if kind is np.uint32 else float(value)
            return 1

        values = {field: number(key, kind) for field, key, kind in GGUF_NUMBERS}
        blocks, mtp_blocks = number("block_count"), number("nextn_predict_layers", default=0)
        layers = blocks - mtp_blocks
        if not 0 < layers <= blocks <= MAX_LAYERS:
            problems.append(f"{blocks} blocks less {mtp_blocks} for multi-token prediction leave {layers} layers")
            _raise(problems)
        values["num_hidden_layers"] = layers
        recurrent = metadata.get(f"{ARCHITECTURE}.attention.recurrent_layers")
        if recurrent is None:
            values["layer_types"] = _every(number("full_attention_interval", default=4), layers)
        elif not isinstance(recurrent, np.ndarray) or len(recurrent) not in (layers, blocks):
            problems.append(f"{ARCHITECTURE}.attention.recurrent_layers must have {layers} entries, one per layer")
        else:
            values["layer_types"] = tuple(LAYER_TYPES[0 if r else 1] for r in list(recurrent)[:layers])
        inner, heads = number("ssm.inner_size"), values["linear_num_value_heads"]
        if heads < 1 or inner % heads:
            problems.append(f"{ARCHITECTURE}.ssm.inner_size {inner} is not a multiple of ssm.time_step_rank {heads}")
        if number("attention.value_length", default=values["head_dim"]) != values["head_dim"]:
            problems.append(f"{ARCHITECTURE}.attention.value_length differs from key_length {values['head_dim']}")
        if not is_text(metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "none"), "none"):
            problems.append(f"{ARCHITECTURE}.rope.scaling.type is not supported")
        sections = metadata.get(f"{ARCHITECTURE}.rope.dimension_sections", HF_ROPE_DEFAULTS["mrope_section"])
        if not isinstance(sections, (tuple, np.ndarray)) or not all(map(_whole, sections[:3])):
            problems.append(f"{ARCHITECTURE}.rope.dimension_sections must be a list of counts")
        rotary = number("rope.dimension_count")
        tokens = metadata.get("tokenizer.ggml.tokens")
        table = shapes.get("token_embd.weight") or (len(tokens) if isinstance(tokens, Sequence) else 0,)
        vocabulary = number("vocab_size", default=table[0])
        _raise(problems)
        return cls(**values, vocab_size=vocabulary, linear_value_head_dim=inner // heads,
                   partial_rotary_factor=rotary / max(values["head_dim"], 1),
                   mrope_section=tuple(int(n) for n in list(sections)[:3]),
                   tie_word_embeddings="output.weight" not in shapes)

    @classmethod
    def from_hf(cls, config):
        """Reads an HF config.json (a dict): model_type qwen3_5_text, or qwen3_5 with its text_config.

        Absent keys take HF's defaults; rotary keys may be nested in rope_parameters or flat. Raises InputError.
        """
        model_type = config.get("model_type")
        text = config.get("text_config") if model_type == "qwen3_5" else config
        if model_type not in ("qwen3_5", "qwen3_5_text") or not isinstance(text, dict):
            raise InputError(f"config.json has model_type {shown(model_type)}: only dense Qwen3.5 models (qwen3_5_text, "
                             "or qwen3_5 with a text_config) are supported")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise InputError(f"rope_parameters of config.json is {shown(rope)}, not an object")
        rope = {key: rope.get(key, text.get(key, default)) for key, default in HF_ROPE_DEFAULTS.items()}
        problems = [f"{key} {shown(text[key])} is not supported, only {shown(value)}" for key, value in HF_FIXED.items()
                    if text.get(key, value) != value]
        if rope.pop("rope_type") != "default":
            problems.append("scaled rotary positions (rope_type other than 'default') are not supported")
        if text.get("num_experts"):
            problems.append("mixture-of-experts models are not supported")
        values = {key: text.get(key, default) for key, default in HF_DEFAULTS.items()}
        layers, layer_types = values["num_hidden_layers"], text.get("layer_types")
        if not _whole(layers) or not 0 < layers <= MAX_LAYERS:
            problems.append(f"num_hidden_layers is {shown(layers)}")
            _raise(problems)
        if layer_types is None:
            layer_types = _every(text.get("full_attention_interval", 4), layers)
        for key, value in (("layer_types", layer_types), ("mrope_section", rope["mrope_section"])):
            if not isinstance(value, (list, tuple)):
                problems.append(f"{key} is {shown(value)}, not a list")
        _raise(problems)
        tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        return cls(**values, **rope | {"mrope_section": tuple(rope["mrope_section"])}, layer_types=tuple(layer_types),
                   tie_word_embeddings=tied)

    def to_gguf_metadata(self):
        """The keys that the official converter writes for this shape, as NumPy scalars of the types it uses."""
        delta = np.array([t == "linear_attention" for t in self.layer_types])
        interval = int(np.argmin(delta)) + 1        # the first attention layer ends the first period ...
        if self.layer_types != _every(interval, self.num_hidden_layers):
            interval = 4                            # ... where an interval fits; recurrent_layers says it in any case
        keys = {
            "block_count": np.uint32(self.num_hidden_layers),
            **{key: kind(getattr(self, field)) for field, key, kind in GGUF_NUMBERS},
            "attention.value_length": np.uint32(self.head_dim),
            "ssm.inner_size": np.uint32(self.linear_value_dim),
            "attention.recurrent_layers": delta,
            "full_attention_interval": np.uint32(interval),
            "rope.dimension_count": np.uint32(self.rotary_dim),
            "rope.dimension_sections": np.array([*self.mrope_section, 0], np.int32),
        }
        return {"general.architecture": ARCHITECTURE, "general.type": "model",
                **{f"{ARCHITECTURE}.{key}": value for key, value in keys.items()}}


def _every(interval, layers):
    """Layer types where every interval-th layer is attention and the others are delta layers."""
    if not _positive(interval, int):
        raise InputError(f"full_attention_interval is {shown(interval)}, it must be a positive integer")
    return tuple(LAYER_TYPES[(i + 1) % interval == 0] for i in range(layers))


def is_text(value, text):
    """Whether a value of GGUF metadata, which may be an array, is this text."""
    return isinstance(value, str) and value == text


def _whole(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _real(value):
    return _whole(value) or isinstance(value, (float, np.floating))


def _positive(value, kind):
    return (_whole(value) if kind is int else _real(value)) and 0 < value < 2 ** 31


def _raise(problems):
    if problems:
        raise InputError("the model's configuration cannot be used: " + "; ".join(problems))
