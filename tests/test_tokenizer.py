"""formats/tokenizer.py against ids of llama.cpp, HF and tiktoken, and against the tokenizers library itself."""

import gzip
import json
import random
import sys
import tracemalloc
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings, strategies as st

from deltanet_ref.errors import InputError
from deltanet_ref.formats.gguf import StringArray, read_gguf, write_gguf
from deltanet_ref.formats.tokenizer import PRE_TOKENIZERS, Tokenizer, load_tokenizer, tokenizer_metadata
from tests.paths import FIXTURES

HF = FIXTURES / "eq/hf"
STRINGS = json.loads((FIXTURES / "tokens.json").read_text())
REAL_STRINGS = json.loads((FIXTURES / "realvocab.json").read_text())
TINY = load_tokenizer(FIXTURES / "eq/eq-f32.gguf")
PIECES = [
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "<|im_end",
    "\u0338",
    "e\u0301",
    "\u0e19\u0e49",
    "'Ll",
    "\r\n",
    "   ",
    "12",
    "\u2163",
    "\U0001f469\u200d\U0001f467",
    "\ud55c\uad6d",
    "\ufeff",
    "\0",
]
TEXT = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(PIECES)), max_size=12).map("".join)


@pytest.fixture(scope="module")
def real_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "real.gguf"
    path.write_bytes(gzip.decompress((FIXTURES / "realvocab.gguf.gz").read_bytes()))
    return path


@pytest.fixture(scope="module")
def real(real_file):
    return load_tokenizer(real_file)


@pytest.mark.parametrize("path", ["eq/eq-f32.gguf", "eq/hf", "grouped/grouped-q8_0.gguf", "grouped/hf"])
def test_ids_are_those_of_llama_cpp_and_hf(path):
    tokenizer = load_tokenizer(FIXTURES / path)
    assert len(STRINGS) == 19
    for row in STRINGS:
        assert tokenizer.encode(row["text"]) == row["hf_parse"]
        assert tokenizer.encode(row["text"], normalize=None) == row["llama_parse"]
        assert tokenizer.encode(row["text"], parse_special=False) == row["hf_noparse"]
        assert tokenizer.encode(row["text"], parse_special=False, normalize=None) == row["llama_noparse"]
        assert tokenizer.decode(row["llama_parse"]) == row["llama_detok"]


def test_ids_on_the_real_vocabulary_are_those_of_tiktoken_and_llama_cpp(real):
    assert len(REAL_STRINGS) == 27 and real.vocab_size == 248320
    for row in REAL_STRINGS:
        assert real.encode(row["text"]) == row["ids"]
        assert real.encode(row["text"], normalize=None) == row["llama"]
        assert real.decode(row["ids"]) == row["nfc"]


def hf_ids(oracle, text, parse_special, normalize):
    oracle.normalizer = tokenizers.normalizers.NFC() if normalize else None
    oracle.encode_special_tokens = not parse_special
    return oracle.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(TEXT, st.booleans(), st.sampled_from(["NFC", None]))
@example("<think>\u0338", True, "NFC")  # NFC stops at a token: ">" and the solidus do not join
@example("a" * 100 + " " * 100, True, "NFC")
def test_ids_are_those_of_the_tokenizers_library(text, parse_special, normalize):
    oracle = tokenizers.Tokenizer.from_file(str(HF / "tokenizer.json"))
    assert TINY.encode(text, parse_special, normalize) == hf_ids(oracle, text, parse_special, normalize)


def test_ids_on_the_real_vocabulary_are_those_of_the_tokenizers_library(real, real_file):
    """Mixed scripts and code, in runs long enough for deep merging."""
    metadata = read_gguf(real_file).metadata
    tokens, merges = (list(metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "merges"))
    oracle = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    )
    oracle.pre_tokenizer = tokenizers.Tokenizer.from_file(str(HF / "tokenizer.json")).pre_tokenizer
    types = metadata["tokenizer.ggml.token_type"]
    oracle.add_tokens(
        [
            tokenizers.AddedToken(tokens[i], normalized=False, special=bool(types[i] == 3))
            for i in np.flatnonzero((types == 3) | (types == 4))
        ]
    )
    words = [word for row in REAL_STRINGS for word in row["text"].split(" ")] + PIECES
    rng = random.Random(4)
    for _ in range(200):
        text = rng.choice(["", " "]).join(rng.choices(words, k=rng.randint(1, 60)))
        for parse_special, normalize in ((True, "NFC"), (False, None)):
            assert real.encode(text, parse_special, normalize) == hf_ids(oracle, text, parse_special, normalize)


def test_pre_tokenizer_regex_is_the_one_of_the_published_tokenizer():
    split = json.loads((HF / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]
    assert PRE_TOKENIZERS["qwen35"] == split["pattern"]["Regex"]


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_decoding_gives_back_the_text(text):
    assert TINY.decode(TINY.encode(text, normalize=None)) == text
    assert TINY.decode(TINY.encode(text)) == unicodedata.normalize("NFC", text) or "\u0338" in text


def test_token_bytes_join_to_the_text_and_cut_characters_show_as_replacement(real):
    ids = real.encode("emoji \U0001f469\u200d\U0001f467")
    assert b"".join(map(real.token_bytes, ids)).decode() == "emoji \U0001f469\u200d\U0001f467"
    assert real.decode(ids[:2]) == "emoji \ufffd"
    assert real.decode(np.array(ids)) == real.decode(ids)


def test_the_longest_of_the_added_tokens_wins():
    characters = [chr(c) for c in range(33, 127)]
    tokenizer = Tokenizer([*characters, "<a>", "<a>b", "a>b"], [*np.ones(94), 4, 4, 4], [], pre="qwen35")
    assert tokenizer.encode("<a>b<a>ca>b") == [95, 94, 66, 96]


def test_unused_rows_stand_for_nothing_and_foreign_ids_are_refused():
    assert TINY.decode([*TINY.encode("a"), 470, *TINY.encode("b")]) == "ab"
    for i in (-1, 480):
        with pytest.raises(InputError, match=f"the token {i} is not in the vocabulary of 480"):
            TINY.decode([i])


@pytest.mark.parametrize("path", ["eq/eq-f32.gguf", "eq/hf"])
def test_special_ids(path):
    tokenizer = load_tokenizer(FIXTURES / path)
    assert tokenizer.eos_ids == {448} and tokenizer.token_id("<think>") == 453 and tokenizer.token_id("no such") is None


def test_end_of_turn_and_end_of_sequence_both_end_a_generation(tmp_path):
    metadata = read_gguf(FIXTURES / "eq/eq-f32.gguf").metadata
    metadata |= {"tokenizer.ggml.eos_token_id": 449, "tokenizer.ggml.eot_token_id": 450}
    write_gguf(tmp_path / "a.gguf", metadata, {})
    assert load_tokenizer(tmp_path / "a.gguf").eos_ids == {449, 450, 448}


def test_the_real_vocabulary_is_decoded_once_and_not_before_it_is_used(real_file, monkeypatch):
    """Opening decodes the special tokens that the chat template may name; the first encode decodes each token and merge
    once, and those matched whole once more for each of two regexes; the next encode none.

    The peak memory of the first encode: the two dicts kept, by the sizes of their parts, and half as much again while a
    dict is enlarged."""
    decoded, decode = [], StringArray._decoded
    monkeypatch.setattr(
        StringArray,
        "_decoded",
        lambda self, starts, ends: (decoded.append(text) or text for text in decode(self, starts, ends)),
    )
    tokenizer = load_tokenizer(real_file)
    assert len(decoded) <= 3
    decoded.clear()
    tracemalloc.start()
    assert tokenizer.encode("Hello world") == [9419, 1814]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    metadata = read_gguf(real_file).metadata
    tokens, merges, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges", "token_type"))
    whole = np.count_nonzero(np.isin(types, [2, 3, 4])) + np.count_nonzero(types == 4)
    assert len(decoded) == len(tokens) + len(merges) + whole
    decoded.clear()
    tokenizer.encode("The second text needs no further string of the file.")
    assert not decoded
    kept = sum(
        sys.getsizeof(table) + sum(map(sys.getsizeof, table)) + sum(map(sys.getsizeof, table.values()))
        for table in (tokenizer._ids, tokenizer._ranks)
    )
    assert peak < 1.5 * kept, (peak, kept)


class Counted(dict):
    """A dict that counts how often it is asked for a key."""

    lookups = 0

    def get(self, key, default=None):
        self.lookups += 1
        return super().get(key, default)

    def __getitem__(self, key):
        self.lookups += 1
        return super().__getitem__(key)

    def __contains__(self, key):
        self.lookups += 1
        return super().__contains__(key)


@pytest.mark.parametrize("text", [" " * 2000, "a" * 2000, "ab" * 1000])
def test_the_work_of_merging_grows_with_the_length_of_a_run(text, real_file):
    """One pre-token of n bytes: n - 1 pairs are looked up at first, then at most two after each merge, which reduces
    the number of parts by one. A loop that looks up every pair again after each merge takes about n^2 / 2 lookups."""
    tokenizer = load_tokenizer(real_file)
    tokenizer._ranks = Counted(tokenizer._ranks)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) <= len(text) / 2
    assert 0 < tokenizer._ranks.lookups <= len(text) - 1 + 2 * (len(text) - len(ids))


def test_metadata_made_from_tokenizer_json_is_the_official_converters():
    official = read_gguf(FIXTURES / "eq/eq-f32.gguf").metadata
    template = (HF / "chat_template.jinja").read_text()
    made = tokenizer_metadata(json.loads((HF / "tokenizer.json").read_text()), template, 480)
    assert {key for key in official if key.startswith("tokenizer.")} == set(made)
    for key, value in made.items():
        assert (value == official[key]) if isinstance(value, (str, int)) else (list(value) == list(official[key])), key
    assert made["tokenizer.ggml.token_type"].dtype == np.int32


def test_metadata_made_from_tokenizer_json_loads_back(tmp_path):
    hf = json.loads((HF / "tokenizer.json").read_text())
    write_gguf(tmp_path / "a.gguf", tokenizer_metadata(hf, "{{ messages }}"), {})
    tokenizer = load_tokenizer(tmp_path / "a.gguf")
    assert tokenizer.vocab_size == 455 and tokenizer.chat_template == "{{ messages }}"
    assert [tokenizer.encode(row["text"]) for row in STRINGS] == [row["hf_parse"] for row in STRINGS]
    with pytest.raises(InputError, match="do not fit a vocabulary of 400"):
        tokenizer_metadata(hf, vocab_size=400)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"pre": "llama-bpe"}, "'llama-bpe' is unknown: known are qwen35"),
        ({"pre": None}, "known are qwen35"),
        ({"pre": np.arange(3)}, "known are qwen35"),
        ({"model": "llama"}, "no byte-level BPE"),
        ({"model": None}, "no byte-level BPE"),
        ({"tokens": None}, "no byte-level BPE"),
        ({"tokens": 7}, "no byte-level BPE"),
        ({"merges": np.arange(3)}, "no byte-level BPE"),
        ({"token_type": None}, "token_type"),
        ({"token_type": 1}, "token_type"),
        ({"token_type": np.ones(479, np.int32)}, "token_type"),
    ],
)
def test_vocabulary_that_is_not_known_is_refused(changes, reason, tmp_path):
    metadata = read_gguf(FIXTURES / "eq/eq-f32.gguf").metadata
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    write_gguf(tmp_path / "a.gguf", {key: value for key, value in metadata.items() if value is not None}, {})
    with pytest.raises(InputError, match=reason) as e:
        load_tokenizer(tmp_path / "a.gguf")
    assert str(e.value).startswith(f"{tmp_path / 'a.gguf'}: ") and "\n" not in str(e.value)


def test_special_ids_out_of_range_are_ignored(tmp_path):
    metadata = read_gguf(FIXTURES / "eq/eq-f32.gguf").metadata
    metadata |= {"tokenizer.ggml.eos_token_id": 10**6, "tokenizer.ggml.eot_token_id": "x"}
    metadata |= {"tokenizer.chat_template": 5}
    write_gguf(tmp_path / "a.gguf", metadata, {})
    tokenizer = load_tokenizer(tmp_path / "a.gguf")
    assert tokenizer.eos_ids == {448} and tokenizer.chat_template is None


def test_merges_beyond_the_vocabulary_are_refused():
    characters = [chr(c) for c in range(33, 127)]
    tokenizer = Tokenizer(characters, np.ones(94), ["a b"], pre="qwen35")
    assert tokenizer.encode("ba") == [65, 64]
    with pytest.raises(InputError, match="lacks 'ab'"):
        tokenizer.encode("ab")


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "pre-tokenizer is unknown"),
        (
            lambda hf: hf["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
            "pre-tokenizer is unknown",
        ),
        (lambda hf: hf["model"].update(type="Unigram"), "Unigram"),
        (lambda hf: hf["model"].pop("merges"), "'merges'"),
        (lambda hf: hf["model"]["vocab"].update(far=10**12), "do not fit"),
        (lambda hf: hf["added_tokens"].append({}), "'content' is missing"),
        (lambda hf: hf["added_tokens"][0].update(id=-3), "do not fit"),
    ],
)
def test_tokenizer_json_that_is_not_known_is_refused(text, reason, tmp_path):
    if callable(text):
        hf = json.loads((HF / "tokenizer.json").read_text())
        text(hf)
        text = json.dumps(hf)
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=reason) as e:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(e.value)


@pytest.mark.parametrize("damage", ["pre", "token"])
def test_a_long_value_of_a_file_is_not_repeated_in_full(damage, tmp_path):
    metadata, long = read_gguf(FIXTURES / "eq/eq-f32.gguf").metadata, "x" * 10**6
    twice = [long, long, *metadata["tokenizer.ggml.tokens"][2:]]
    metadata |= {"tokenizer.ggml.pre": long} if damage == "pre" else {"tokenizer.ggml.tokens": twice}
    write_gguf(tmp_path / "a.gguf", metadata, {})
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path / "a.gguf").encode("ab")
    assert len(str(error.value)) < 600


def test_text_and_options_that_cannot_be_encoded_are_refused():
    with pytest.raises(InputError, match="lone surrogate at character 3"):
        TINY.encode("abc\ud800")
    with pytest.raises(InputError, match="'NFKC' is unknown"):
        TINY.encode("a", normalize="NFKC")
