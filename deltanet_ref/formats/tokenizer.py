"""Text <-> token ids, and conversations -> text: byte-level BPE and the chat template of a GGUF or an HF directory.

The merging is ours, because the tokenizers library takes twice the time and memory to load 248,320 tokens (0.57 s and
199 MiB against 0.30 s and 100 MiB). That library provides the Unicode regex and NFC, and is the oracle in the tests.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property, lru_cache
from heapq import heappop, heappush
from operator import index
from pathlib import Path
from threading import Lock

import numpy as np
from tokenizers import Regex, normalizers, pre_tokenizers

from deltanet_ref.errors import InputError, shown
from deltanet_ref.formats.files import read_json, read_text, utf8
from deltanet_ref.formats.gguf import GGUFFile, StringArray, read_gguf

# Pre-tokenizers by GGUF name; the regex is the one in the model's tokenizer.json.
PRE_TOKENIZERS = {
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
PREFIX = "tokenizer.ggml."
NORMALIZERS = {"NFC": normalizers.NFC().normalize_str, None: str}
MOST_UNUSED = 1 << 16  # limit of unassigned ids below the largest one; real vocabularies have none
WORDS_KEPT = 1 << 16  # pre-tokens whose ids are cached
TEMPLATE_NAMES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}  # chat template's -> GGUF's
END_OF_TURN, PADDING = "<|im_end|>", "<|endoftext|>"
TEMPLATE_PROCESS = Path(__file__).with_name("template_process.py")
TEMPLATE_SECONDS, TEMPLATE_BYTES = 10, 1 << 29


def _byte_alphabet():
    """GPT-2's printable character for each byte (Radford et al. 2019): itself, or the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def load_tokenizer(path: Path | str) -> "Tokenizer":
    """Opens the tokenizer of a GGUF file (vocabulary-only files included) or of an HF directory. Raises InputError."""
    return Tokenizer.from_hf(path) if Path(path).is_dir() else Tokenizer.from_gguf(read_gguf(path))


class Tokenizer:
    """Byte-level BPE and a chat template (a Jinja text, or None; settable). Its tables are built on first use."""

    def __init__(self, tokens, types, merges, *, pre, ends=(), special=None, chat_template=None):
        """tokens: sequence of str, indexed by id; types: (V,) int, as in tokenizer.ggml.token_type; merges: sequence of
        "left right", the best first; pre: a key of PRE_TOKENIZERS; ends: ids that end a generation; special: name in
        the chat template (eos_token, ...) -> text. Raises InputError for an unknown pre."""
        if pre not in PRE_TOKENIZERS:
            raise InputError(f"the pre-tokenizer {shown(pre)} is unknown: known are {', '.join(PRE_TOKENIZERS)}")
        self._tokens, self._types, self._merges, self._pre = tokens, np.asarray(types), merges, pre
        self._ends, self._special = ends, special or {}
        self.chat_template = chat_template

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> "Tokenizer":
        """From the metadata of a GGUF file. Raises InputError unless it holds a BPE vocabulary of a known kind."""
        ggml = {key.removeprefix(PREFIX): value for key, value in file.metadata.items() if key.startswith(PREFIX)}
        tokens, merges, types = (ggml.get(key) for key in ("tokens", "merges", "token_type"))
        if ggml.get("model") != "gpt2" or not isinstance(tokens, StringArray) or not isinstance(merges, StringArray):
            raise InputError(
                f"{file.path}: holds no byte-level BPE vocabulary (tokenizer.ggml.model 'gpt2', tokens, "
                "merges): use a file that has its tokenizer"
            )
        if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
            raise InputError(
                f"{file.path}: token_type must have {len(tokens)} integers, one per token: convert it again"
            )
        ids = {
            key: int(i)
            for key in ("bos", "eos", "eot", "padding")
            if isinstance(i := ggml.get(f"{key}_token_id"), (int, np.integer)) and 0 <= i < len(tokens)
        }
        special = {name: tokens[ids[key]] for name, key in TEMPLATE_NAMES.items() if key in ids}
        template = file.metadata.get("tokenizer.chat_template")
        try:
            return cls(
                tokens,
                types,
                merges,
                pre=str(ggml.get("pre")),
                special=special,
                ends=[ids[key] for key in ("eos", "eot") if key in ids],
                chat_template=template if isinstance(template, str) else None,
            )
        except InputError as e:
            raise InputError(f"{file.path}: {e}") from e

    @classmethod
    def from_hf(cls, directory: Path | str) -> "Tokenizer":
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja of an HF directory. Raises InputError."""
        directory = Path(directory)
        vocabulary, config = read_json(directory / "tokenizer.json"), {}
        if (directory / "tokenizer_config.json").exists():
            config = read_json(directory / "tokenizer_config.json")
        try:
            pre = _pre_tokenizer(vocabulary)
            tokens, types, merges = _vocabulary(vocabulary)
        except InputError as e:
            raise InputError(f"{directory / 'tokenizer.json'}: {e}") from e
        template, special = config.get("chat_template"), special_tokens(config)
        if (directory / "chat_template.jinja").exists():
            template = read_text(directory / "chat_template.jinja")
        elif isinstance(template, list):
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if not isinstance(template, str | None):
            raise InputError(f"{directory / 'tokenizer_config.json'}: chat_template is not a string: fetch it again")
        ends = [tokens.index(special["eos_token"])] if special.get("eos_token") in tokens else []
        return cls(tokens, types, merges, pre=pre, ends=ends, special=special, chat_template=template)

    @property
    def vocab_size(self) -> int:
        """V, the number of ids, unused ones included."""
        return len(self._tokens)

    @cached_property
    def eos_ids(self) -> set[int]:
        """Ids that end a generation: the vocabulary's end of sequence and end of turn, and <|im_end|>."""
        end_of_turn = self.token_id(END_OF_TURN)
        return {*self._ends} if end_of_turn is None else {*self._ends, end_of_turn}

    def encode(self, text: str, parse_special: bool = True, normalize: str | None = "NFC") -> list[int]:
        """Returns the token ids of text; no token is added at either end.

        parse_special=False: control tokens (<|im_end|>) are encoded as plain text; user-defined ones (<think>) stay
        tokens. normalize: "NFC" as HF, None as llama.cpp. Raises InputError for a text with a lone surrogate.
        """
        if normalize not in NORMALIZERS:
            raise InputError(f"normalize={shown(normalize)} is unknown: use 'NFC' (as HF) or None (as llama.cpp)")
        utf8(text)  # raises InputError for a lone surrogate
        ids = []
        for i, piece in enumerate(self._whole[bool(parse_special)].split(text)):
            if i % 2:  # re.split returns the matches at odd places
                ids.append(self._ids[piece])
            else:
                for word, _ in self._words.pre_tokenize_str(NORMALIZERS[normalize](piece)):
                    ids += self._word_ids(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids: special tokens by name, invalid UTF-8 as U+FFFD. Raises InputError: unknown id."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """Returns the bytes of a token, b"" for unused ids of a padded vocabulary. Raises InputError: unknown id."""
        if not 0 <= id < len(self._tokens):
            raise InputError(f"the token {shown(id)} is not in the vocabulary of {len(self._tokens)}")
        text, kind = self._tokens[int(id)], self._types[int(id)]
        if kind == UNUSED:
            return b""
        if kind == NORMAL and all(c in BYTE_OF for c in text):
            return bytes(BYTE_OF[c] for c in text)
        return text.encode()

    def token_id(self, text: str) -> int | None:
        """Returns the id of the token whose vocabulary entry is `text`, or None."""
        return self._ids.get(text)

    def apply_chat_template(
        self, messages: list, tools: list | None = None, add_generation_prompt: bool = False, **template_options
    ) -> str:
        """Renders a conversation as text, as HF does.

        messages: list of {"role", "content", ...}; tools: list of JSON schemas, or None; template_options are passed to
        the template by name (enable_thinking=False). Raises InputError if there is no template, if it fails, or if it
        exceeds TEMPLATE_SECONDS, TEMPLATE_BYTES or the length that template_process allows.
        """
        if not self.chat_template:
            raise InputError("this tokenizer has no chat template: set tokenizer.chat_template to a Jinja text")
        variables = (
            {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
            | self._special
            | template_options
        )
        return _template_process(os.getpid()).render(self.chat_template, variables)

    @cached_property
    def _ids(self):
        ids = {token: i for i, token in enumerate(self._tokens)}
        if len(ids) < len(self._tokens):
            twice = next(token for i, token in enumerate(self._tokens) if ids[token] != i)
            raise InputError(f"the vocabulary has the token {shown(twice)} twice: convert the model again")
        return ids

    @cached_property
    def _ranks(self):
        return {merge: rank for rank, merge in enumerate(self._merges)}

    @cached_property
    def _words(self):
        return pre_tokenizers.Split(Regex(PRE_TOKENIZERS[self._pre]), "isolated")

    @cached_property
    def _word_ids(self):
        return lru_cache(WORDS_KEPT)(self._merge)

    @cached_property
    def _whole(self):
        """parse_special -> the regex that splits text at the tokens that are matched whole."""
        kinds = {True: [USER_DEFINED, CONTROL, UNKNOWN], False: [USER_DEFINED]}
        return {
            parse_special: _alternatives([self._tokens[i] for i in np.flatnonzero(np.isin(self._types, kinds))])
            for parse_special, kinds in kinds.items()
        }

    def _merge(self, word):
        """BPE of one pre-token: merges the adjacent pair of the best rank, the leftmost first, until no pair has a rank
        (Sennrich et al. 2016, algorithm 1). A heap of candidate pairs makes this O(n log n)."""
        parts = [CHARACTER_OF[b] for b in word.encode()]
        before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
        proposals = []

        def propose(i):
            if i >= 0 and after[i] < len(parts):
                left, right = parts[i], parts[after[i]]
                rank = self._ranks.get(f"{left} {right}")
                if rank is not None:
                    heappush(proposals, (rank, i, left, right))

        for i in range(len(parts)):
            propose(i)
        while proposals:
            _, i, left, right = heappop(proposals)
            j = after[i]
            if parts[i] != left or j == len(parts) or parts[j] != right:
                continue  # stale: one of the two has been merged in the meantime
            parts[i], parts[j], after[i] = left + right, None, after[j]
            if after[i] < len(parts):
                before[after[i]] = i
            propose(before[i])
            propose(i)
        try:
            return [self._ids[part] for part in parts if part is not None]
        except KeyError as e:
            raise InputError(
                f"the vocabulary lacks {shown(e.args[0])}, which its merges produce: convert the model again"
            ) from e


def tokenizer_metadata(tokenizer_json: dict, chat_template: str | None = None, vocab_size: int | None = None) -> dict:
    """Converts HF's tokenizer.json to the tokenizer.* metadata that llama.cpp reads, for write_gguf.

    vocab_size: rows of the embedding; ids beyond the vocabulary are named [PADi] and marked unused. Raises InputError
    for a tokenizer of another kind.
    """
    tokens, types, merges = _vocabulary(tokenizer_json, vocab_size)
    metadata = {
        "model": "gpt2",
        "pre": _pre_tokenizer(tokenizer_json),
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
    }
    metadata |= {
        f"{name}_token_id": tokens.index(text)
        for name, text in (("eos", END_OF_TURN), ("padding", PADDING))
        if text in tokens
    }
    template = {"tokenizer.chat_template": chat_template} if chat_template else {}
    return {PREFIX + key: value for key, value in metadata.items()} | template


def special_tokens(config: dict) -> dict:
    """Name in the chat template (eos_token, ...) -> text, of the special tokens in tokenizer_config.json."""
    found = {name: config.get(name) for name in TEMPLATE_NAMES}
    found = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in found.items() if isinstance(token, str) and token}


def _pre_tokenizer(tokenizer_json):
    """The name of the pre-tokenizer whose regex is in tokenizer.json. Raises InputError."""
    found = json.dumps(tokenizer_json.get("pre_tokenizer"), ensure_ascii=False)
    for name, regex in PRE_TOKENIZERS.items():
        if json.dumps(regex, ensure_ascii=False) in found:
            return name
    raise InputError(f"the pre-tokenizer is unknown: known are those of {', '.join(PRE_TOKENIZERS)}")


def _vocabulary(tokenizer_json, vocab_size=None):
    """HF's tokenizer.json -> tokens (list), types (int32 array), merges (list of "left right"). Raises InputError."""
    try:
        model, added = tokenizer_json["model"], tokenizer_json["added_tokens"]
        if model["type"] != "BPE":
            raise InputError(f"the model is {shown(model['type'])}, expected BPE")
        kinds = {text: (index(i), NORMAL) for text, i in model["vocab"].items()}
        kinds |= {t["content"]: (index(t["id"]), CONTROL if t["special"] else USER_DEFINED) for t in added}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        "".join([*kinds, *merges]).encode()
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as e:
        raise InputError(
            f"is not a BPE tokenizer.json ({e} is missing, misplaced or not a string): fetch it again"
        ) from e
    ids = {i for i, _ in kinds.values()}
    size = vocab_size or max(ids, default=-1) + 1
    if not all(0 <= i < size for i in ids) or max(ids, default=0) > len(ids) + MOST_UNUSED:
        raise InputError(
            f"token ids {min(ids)}..{max(ids)} of {len(ids)} tokens do not fit a vocabulary of {size}: fetch it again"
        )
    if len(ids) < len(kinds):
        raise InputError(f"{len(kinds)} tokens share {len(ids)} ids: fetch it again")
    tokens, types = [f"[PAD{i}]" for i in range(size)], np.full(size, UNUSED, np.int32)
    for text, (i, kind) in kinds.items():
        tokens[i], types[i] = text, kind
    return tokens, types, merges


def _alternatives(texts):
    """A regex with one group that matches the longest of texts; it never matches if there are none."""
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")" if texts else "((?!))")


class _TemplateProcess:
    """Runs formats/template_process.py, and restarts it after a template has ended it."""

    def __init__(self):
        self._lock, self._child = Lock(), None

    def render(self, template, variables):
        """Returns the text. Raises InputError."""
        try:
            request = json.dumps([template, variables])
        except (TypeError, ValueError, RecursionError) as e:
            raise InputError(f"the conversation cannot be passed to the chat template as JSON: {e}") from e
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._child = subprocess.Popen(
                    [sys.executable, "-P", TEMPLATE_PROCESS, str(TEMPLATE_SECONDS), str(TEMPLATE_BYTES)],
                    text=True,
                    encoding="utf-8",
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )  # Ctrl-C must not reach it
            with suppress(BrokenPipeError):
                print(request, file=self._child.stdin, flush=True)
            answer = self._child.stdout.readline()
            if not answer:
                self._child.wait()
                raise InputError(
                    f"the chat template was stopped: it took more than {TEMPLATE_SECONDS} s or "
                    f"{TEMPLATE_BYTES >> 20} MiB"
                )
        text, refusal = json.loads(answer)
        if refusal:
            raise InputError(f"the chat template refuses this conversation: {refusal}")
        return text


@lru_cache(maxsize=1)
def _template_process(pid):
    """The renderer owned by this pid; a forked process starts its own."""
    return _TemplateProcess()
