"""Converts a tokenizer between the files of an HF directory and GGUF metadata."""

import json
from pathlib import Path

from deltanet_ref.errors import InputError, shown
from deltanet_ref.formats.files import read_json
from deltanet_ref.formats.gguf import StringArray
from deltanet_ref.formats.tokenizer import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    PREFIX,
    TEMPLATE_NAMES,
    UNUSED,
    Tokenizer,
    special_tokens,
    tokenizer_metadata,
)


def read_tokenizer_files(directory: Path | str, vocab_size: int) -> dict:
    """Reads tokenizer.json and its companions -> GGUF's tokenizer.* metadata for an embedding of vocab_size rows.

    The ids of the special tokens come from tokenizer_config.json, else from config.json. Raises InputError.
    """
    directory = Path(directory)
    template = Tokenizer.from_hf(directory).chat_template
    metadata = tokenizer_metadata(read_json(directory / "tokenizer.json"), template, vocab_size)
    settings, config = (
        read_json(path) if path.exists() else {}
        for path in (directory / "tokenizer_config.json", directory / "config.json")
    )
    special = special_tokens(settings)
    for name, key in TEMPLATE_NAMES.items():
        text, number = special.get(name), config.get(f"{name}_id")
        if text in metadata[PREFIX + "tokens"]:
            number = metadata[PREFIX + "tokens"].index(text)
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < vocab_size:
            metadata[f"{PREFIX}{key}_token_id"] = number
    return metadata


def write_tokenizer_files(directory: Path | str, metadata: dict) -> None:
    """Writes GGUF's tokenizer.* metadata as tokenizer.json, tokenizer_config.json and, if present, chat_template.jinja.

    Raises InputError unless it holds a BPE vocabulary of a known kind.
    """
    directory = Path(directory)
    ggml = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    if ggml.get("pre") not in PRE_TOKENIZERS or not isinstance(ggml.get("tokens"), (list, StringArray)):
        raise InputError(
            f"the tokenizer {shown(ggml.get('pre'))} cannot be written for HF: known are those of "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    tokens, types = list(ggml["tokens"]), ggml["token_type"]
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(kind == CONTROL),
        }
        for i, (text, kind) in enumerate(zip(tokens, types))
        if kind not in (NORMAL, UNUSED)
    ]
    vocabulary = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PRE_TOKENIZERS[ggml["pre"]]},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: i for i, (text, kind) in enumerate(zip(tokens, types)) if kind == NORMAL},
            "merges": [merge.split(" ") for merge in ggml["merges"]],
        },
    }
    special = {
        name: tokens[ggml[f"{key}_token_id"]] for name, key in TEMPLATE_NAMES.items() if f"{key}_token_id" in ggml
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special
    (directory / "tokenizer.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
    if template := metadata.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, "utf-8", newline="")
