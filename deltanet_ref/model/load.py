"""Read a GGUF file or an HF directory: (Config, Weights, notes), or one error that lists everything wrong with it."""
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from deltanet_ref.errors import LONGEST_VALUE, InputError, counted, shortened
from deltanet_ref.formats.files import read_json
from deltanet_ref.formats.gguf import read_gguf
from deltanet_ref.formats.safetensors import read_safetensors
from deltanet_ref.model.config import ARCHITECTURE, Config
from deltanet_ref.model.tensors import expected_tensors, hf_shape, to_gguf_form, wide_dtype
from deltanet_ref.model.weights import Weights

# what a checkpoint may hold in addition to the text model: (pattern, what it is)
_SKIPPED_GGUF = ((r"(v|mm)\.", "vision"), (r"blk\.\d+\.nextn\.", "multi-token prediction"))
_SKIPPED_HF = ((r"(model\.)?visual\.", "vision"), (r"mtp\.", "multi-token prediction"))


def weights_from_gguf(file, dtype, backend, mode: str = "mapped") -> tuple[Config, Weights, list]:
    """The text model in an opened GGUF file (a GGUFFile); nothing is decoded yet.

    dtype: the name of one of backend.dtypes; backend and mode as of Weights. Returns (Config, Weights,
    notes: list of str). Raises InputError: another architecture, or every tensor that is missing, unexpected or of the
    wrong shape.
    """
    dtype = model_dtype(dtype, backend)
    if not file.tensors:
        raise InputError(f"{file.path}: contains no tensors (a vocabulary-only file?): pass the model's own GGUF")
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    config = _config(file.path, Config.from_gguf, file.metadata, found)
    blocks = config.num_hidden_layers + int(file.metadata.get(f"{ARCHITECTURE}.nextn_predict_layers", 0))
    mtp = "|".join(str(i) for i in range(config.num_hidden_layers, blocks))
    notes = _skip(found, _SKIPPED_GGUF + (((rf"blk\.({mtp})\.", "multi-token prediction"),) if mtp else ()))
    expected = expected_tensors(config)
    _check(file.path, {name: spec.shape for name, spec in expected.items()}, found)
    weights = Weights(config, {name: file.tensors[name] for name in expected}, dtype, backend, mode)
    for name, spec in expected.items():
        if spec.value == "minus_exp" and not bool((weights[name] < 0).all()):
            raise InputError(f"{file.path}: {name} must hold -exp(A_log), which is negative; it has other values: "
                             "convert the model again")
    return config, weights, notes


def weights_from_hf(directory, dtype, backend) -> tuple[Config, Weights, list]:
    """Reads an HF directory (config.json, *.safetensors) and converts each tensor to GGUF's form in the model's dtype.

    Accepts the names of the text-only model and of the multimodal model. Returns and raises as weights_from_gguf.
    """
    dtype = model_dtype(dtype, backend)
    config, stored, names, notes = open_hf(directory)
    dense = {name: np.ascontiguousarray(to_gguf_form(stored[names[name]].astype(wide_dtype(dtype)), spec, config))
             for name, spec in expected_tensors(config).items()}
    return config, Weights(config, dense, dtype, backend), notes


def open_hf(directory):
    """Opens an HF directory and checks that its tensors form a model; none is converted yet.

    Returns (Config, SafeTensors, GGUF name -> name in the checkpoint, notes). Raises as weights_from_gguf.
    """
    directory = Path(directory)
    config = _config(directory, Config.from_hf, read_json(directory / "config.json"))
    stored = read_safetensors(directory)
    found = {name: stored.shape(name) for name in stored}
    notes = _skip(found, _SKIPPED_HF)
    origin = {text_model_name(name): name for name in found}
    found = {name: found[origin[name]] for name in origin}
    if config.tie_word_embeddings and "lm_head.weight" in found:       # as HF's own loader: tied only if it is a copy
        head, table = (origin.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if table and np.array_equal(stored[head], stored[table]):
            del found["lm_head.weight"]
        else:
            config = replace(config, tie_word_embeddings=False)
    expected = expected_tensors(config)
    _check(directory, {spec.hf_name: hf_shape(spec) for spec in expected.values()}, found)
    return config, stored, {name: origin[spec.hf_name] for name, spec in expected.items()}, notes


def read_config(path):
    """The Config of a GGUF file or an HF directory; no tensor is read. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        return _config(path, Config.from_hf, read_json(path / "config.json"))
    file = read_gguf(path)
    return _config(path, Config.from_gguf, file.metadata, {name: t.shape for name, t in file.tensors.items()})


def model_dtype(dtype, backend):
    """np.dtype of a name in backend.dtypes; raises InputError for any other."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name in backend.dtypes:
        return backend.dtypes[name]
    choices = " or ".join(map(repr, backend.dtypes))
    if name in ("float64", "bfloat16"):
        other = "numba" if name == "float64" else "cuda"
        raise InputError(f"backend {backend.name!r} does not compute in {name}: use {choices}, or backend={other!r}")
    raise InputError(f"dtype {name!r} is unknown: use {choices}")


def text_model_name(name):
    """The text-only HF model's name for a tensor or module of the multimodal one; other names are returned
    unchanged."""
    for prefix, text_prefix in (("model.language_model.", "model."), ("language_model.model.", "model."),
                                ("language_model.lm_head.", "lm_head."), ("language_model.", "model.")):
        if name.startswith(prefix):
            return text_prefix + name[len(prefix):]
    return name


def listing(kind, names, most=8):
    """'3 missing: a, b, c', with at most `most` names; '' for an empty list."""
    names = [shortened(name, LONGEST_VALUE) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {kind}: {', '.join(names[:most])}{more}" if names else ""


def _config(where, read, *arguments):
    try:
        return read(*arguments)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _skip(found, patterns):
    """Removes the tensors that match a pattern from found; returns one note for each kind removed."""
    counts = {}
    for name in list(found):
        kind = next((kind for pattern, kind in patterns if re.match(pattern, name)), None)
        if kind:
            del found[name]
            counts[kind] = counts.get(kind, 0) + 1
    return [f"{counted(count, f'{kind} tensor')} skipped: only the text model is used"
            for kind, count in counts.items()]


def _check(where, expected, found):
    """Raises InputError that lists every tensor that is missing, unexpected or of the wrong shape. Both: dict name ->
    shape."""
    wrong = [f"{name} is {tuple(found[name])}, not {shape}" for name, shape in expected.items()
                 if name in found and tuple(found[name]) != shape]
    problems = [listing("missing", [name for name in expected if name not in found]),
                listing("unexpected", [name for name in found if name not in expected]),
                listing("with the wrong shape", wrong)]
    if any(problems):
        raise InputError(f"{where}: the tensors do not form a Qwen3.5 model: " + "; ".join(p for p in problems if p))
