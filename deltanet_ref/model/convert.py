"""Write base models from a GGUF file or an HF directory to either form, tensor by tensor, with changes on the way.

Matrices take the chosen type; norms, the convolution and other one-dimensional tensors stay float32, as in the official
converter. Tensors that are neither changed nor converted are copied byte for byte. A GGUF file written as GGUF, or an
HF directory written as HF, keeps what it holds in addition to the text model (vision, multi-token prediction). One
tensor at a time is in memory.
"""
import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as Type

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import atomic_directory, ensure_new_directory, ensure_writable, read_json
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.formats.quants import QUANTIZABLE, dequantize, quantize, stored_finite
from deltanet_ref.formats.safetensors import INDEX, SINGLE, write_safetensors
from deltanet_ref.formats.tokenizer_files import read_tokenizer_files, write_tokenizer_files
from deltanet_ref.model.load import listing, open_hf, weights_from_gguf
from deltanet_ref.model.tensors import expected_tensors, hf_shape, to_gguf_form, to_hf_form
from deltanet_ref.model.weights import not_finite

# --type: the type of the matrices, and llama.cpp's number for such a file
CHOICES = {"f32": (Type.F32, LlamaFileType.ALL_F32), "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
           "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16), "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
           "q6_k": (Type.Q6_K, LlamaFileType.MOSTLY_Q6_K), "q5_k": (Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
           "q4_k_m": (Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M), "q4_k": (Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
           "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0)}
FLOATS = (Type.F32, Type.F16, Type.BF16)            # what an HF directory can hold, under the same names in safetensors
# what llama-quantize uses for rows that are not whole blocks
FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0, Type.Q5_0: Type.F16, Type.Q5_1: Type.F16,
            Type.Q4_0: Type.F16, Type.Q8_0: Type.F16}
MORE_BITS = ("attn_v.weight", "attn_qkv.weight", "ffn_down.weight")      # Q6_K in some layers of a Q4_K_M file
COPIED_SUFFIXES = (".json", ".jinja", ".txt")       # of the files of an HF directory that are copied along


class Written(NamedTuple):
    """A tensor that was re-encoded in a type that cannot hold its values exactly."""
    name: str
    type: Type
    error: float               # |stored - exact| / |exact|, Frobenius norms
    change: float | None       # |exact - before| / |before|, of a changed tensor


class GGUFBase:
    """A base model in a GGUF file: config, notes, and its tensors by GGUF name, read on request."""

    def __init__(self, path):
        self.path, self.file = Path(path), read_gguf(path)
        self.config, _, self.notes = weights_from_gguf(self.file, "float32", ops)
        self.specs = expected_tensors(self.config)

    def type(self, name):
        """The stored type."""
        return self.file.tensors[name].type

    def read(self, name):
        """The tensor in GGUF's form: float32, or float64 where GGUF and HF store different values."""
        tensor = self.file.tensors[name]
        return dequantize(tensor.raw, tensor.type, tensor.shape, _working_dtype(self.specs[name]))

    def is_finite(self, name):
        """Whether the stored tensor holds neither NaN nor infinity."""
        return stored_finite(self.file.tensors[name].raw, self.type(name))


class HFBase:
    """The same interface for an HF directory."""

    def __init__(self, path):
        self.path = Path(path)
        self.config, self.stored, self.names, self.notes = open_hf(path)
        self.specs = expected_tensors(self.config)

    def type(self, name):
        dtype = self.stored.stored(self.names[name]).dtype
        return Type[dtype] if dtype in Type.__members__ and Type[dtype] in FLOATS else Type.F32

    def read(self, name):
        spec = self.specs[name]
        return to_gguf_form(self.stored[self.names[name]].astype(_working_dtype(spec)), spec, self.config)

    def is_finite(self, name):
        stored = self.stored.stored(self.names[name])
        return stored.dtype not in Type.__members__ or stored_finite(stored.raw, Type[stored.dtype])


def open_base(path):
    """GGUFBase for a GGUF file, HFBase for an HF directory, checked as load_model checks them; no tensor is read."""
    return HFBase(path) if Path(path).is_dir() else GGUFBase(path)


def writes_gguf(output):
    """Whether this output is a GGUF file (its name ends in .gguf) rather than an HF directory."""
    return Path(output).suffix == ".gguf"


def check_output(base, output, choice=None, changed=()):
    """Raises InputError for anything write_base would refuse; nothing is written."""
    ensure_writable(output) if writes_gguf(output) else ensure_new_directory(output)
    _types(base, output, choice, changed)


def write_base(base, output, choice=None, changes=None):
    """Writes a base model: to a GGUF file when output ends in .gguf, else to a new HF directory.

    base     GGUFBase or HFBase
    choice   a key of CHOICES, the type of the matrices; None keeps each tensor's own (quantised ones become f32 in HF)
    changes  GGUF name -> function of the tensor (float32, GGUF's form) that returns it changed
    returns  a Written for each tensor that was re-encoded with a loss
    raises   InputError: a type that the output or the quantisers do not support, an output that cannot be written, a
             tensor with NaN or infinity
    """
    for name in base.specs:
        if not base.is_finite(name):
            raise not_finite(f"{base.path}: {name}")
    changes = changes or {}
    types, losses = _types(base, output, choice, changes), []
    encode = partial(_encode, base, types, changes, losses)
    if writes_gguf(output):
        _write_gguf(base, output, choice, types, changes, encode)
    else:
        _write_hf(base, output, types, changes, encode)
    return losses


def hf_config(config, dtype: str, special: dict | None = None) -> dict:
    """config.json of the text-only HF model. special: eos_token_id and the like."""
    return config.to_hf() | {"dtype": dtype, "mtp_num_hidden_layers": 0} | (special or {})


# ---- types

def _types(base, output, choice, changed):
    """GGUF name -> the type it is written in; raises InputError for types that cannot be written."""
    if choice is not None and choice not in CHOICES:
        raise InputError(f"the type {choice!r} is unknown: use one of {', '.join(CHOICES)}")
    if writes_gguf(output):
        types = {name: _gguf_type(base, name, choice) for name in base.specs}
    else:
        if choice is not None and CHOICES[choice][0] not in FLOATS:
            raise InputError(f"an HF directory holds f32, f16 or bf16, not {choice}: choose an output name "
                             "that ends in .gguf")
        types = {name: _hf_type(base, name, choice) for name in base.specs}
    stuck = [f"{name} {types[name].name}" for name in changed if types[name] not in QUANTIZABLE]
    if stuck:
        raise InputError(f"{base.path}: " + listing("changed tensors have a type that cannot be written", stuck) +
                         f"; choose another: {', '.join(CHOICES)}")
    return types


def _gguf_type(base, name, choice):
    if not base.specs[name].is_matrix:
        return base.type(name) if choice is None and isinstance(base, GGUFBase) else Type.F32
    if choice is None:
        return base.type(name)
    return type_of_matrix(choice, base.specs[name], base.config)


def type_of_matrix(choice, spec, config):
    """The type of a matrix (a TensorSpec) in a GGUF file of type `choice`, as llama-quantize assigns it."""
    kind = CHOICES[choice][0]
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    if kind not in FLOATS and kind != Type.Q8_0 and spec.name == head:
        kind = Type.Q6_K
    if choice == "q4_k_m" and spec.name.endswith(MORE_BITS) and _has_more_bits(
            int(spec.name.split(".")[1]), config.num_hidden_layers):
        kind = Type.Q6_K
    while spec.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = FALLBACK[kind]
    return kind


def _has_more_bits(layer, layers):
    """Q4_K_M spends more bits on the first and the last eighth of the layers, and on every third one between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _hf_type(base, name, choice):
    kept = base.type(name) if base.type(name) in FLOATS else Type.F32
    return kept if choice is None or not base.specs[name].is_matrix else CHOICES[choice][0]


def _type_of_matrices(base, types):
    """The most common type of a matrix."""
    return Counter(types[name] for name, spec in base.specs.items() if spec.is_matrix).most_common(1)[0][0]


# ---- writing

def _encode(base, types, changes, losses, name, form=lambda x: x):
    """The bytes of one tensor; rounding losses are appended to losses. form: from GGUF's form to the one written."""
    x, change = base.read(name), None
    if name in changes:
        before, x = x, changes[name](x)
        change = _relative(x, before)
    x = form(x)
    try:
        raw = quantize(x, types[name])
    except InputError as error:
        raise InputError(f"{base.path}: {name}: {error}") from error
    if types[name] != Type.F32:
        error = _relative(dequantize(raw, types[name], x.shape), x)
        if error:
            losses.append(Written(name, types[name], error, change))
    return raw


def _write_gguf(base, path, choice, types, changes, encode):
    if isinstance(base, GGUFBase):
        metadata, stored = dict(base.file.metadata), base.file.tensors
    else:
        stored, metadata = {}, base.config.to_gguf_metadata() | {"general.name": base.path.resolve().name}
        if (base.path / "tokenizer.json").exists():
            metadata |= read_tokenizer_files(base.path, base.config.vocab_size)
        choice = choice or _type_of_matrices(base, types).name.lower()
    if choice is not None:
        metadata |= {"general.file_type": int(CHOICES[choice][1]), "general.quantization_version": 2}
    tensors = {}
    for name in stored or base.specs:
        kept = name in stored and name not in changes and stored[name].type == types.get(name, stored[name].type)
        tensors[name] = ((stored[name].raw, stored[name].type, stored[name].shape) if kept else
                         (partial(encode, name), types[name], base.specs[name].shape))
    write_gguf(path, metadata, tensors)


def _write_hf(base, directory, types, changes, encode):
    stored = base.stored if isinstance(base, HFBase) else {}
    names = base.names if stored else {name: spec.hf_name for name, spec in base.specs.items()}
    tensors = {name: _as_stored(stored, name) for name in stored}
    for name, spec in base.specs.items():
        if names[name] in tensors and name not in changes and tensors[names[name]][1] == types[name].name:
            continue
        form = partial(to_hf_form, spec=spec, config=base.config)
        tensors[names[name]] = partial(encode, name, form), types[name].name, hf_shape(spec)
    dtype = {Type.F32: "float32", Type.F16: "float16", Type.BF16: "bfloat16"}[_type_of_matrices(base, types)]
    with atomic_directory(directory) as temporary:
        if stored:
            _copy_other_files(base.path, temporary, dtype)
        else:
            metadata = base.file.metadata
            special = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
                       for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
            text = json.dumps(hf_config(base.config, dtype, special), indent=2)
            (temporary / "config.json").write_text(text + "\n", "utf-8")
            if "tokenizer.ggml.tokens" in metadata:
                write_tokenizer_files(temporary, metadata)
        write_safetensors(temporary / SINGLE, tensors, {"format": "pt"})


def _as_stored(stored, name):
    tensor = stored.stored(name)
    return tensor.raw, tensor.dtype, tensor.shape


def _copy_other_files(source, target, dtype):
    """config.json with its dtype updated, the tokenizer's files and other small ones."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in COPIED_SUFFIXES and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, target / path.name)
    config = read_json(source / "config.json")
    for part in (config, config.get("text_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _working_dtype(spec):
    return np.float64 if spec.value in ("one_plus", "minus_exp") else np.float32


def _relative(x, reference):
    """|x - reference| / |reference|."""
    size = np.linalg.norm(reference)
    return float(np.linalg.norm(np.subtract(x, reference)) / size) if size else float(np.linalg.norm(x) > 0)
