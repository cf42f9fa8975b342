"""formats/gguf.py and files.py against the gguf package and llama.cpp's converted files, and with damaged files."""

import gzip
import os
import signal
import struct
import subprocess
import sys
import tracemalloc

import gguf
import numpy as np
import pytest

from deltanet_ref.errors import InputError
from deltanet_ref.formats import gguf as gguf_module
from deltanet_ref.formats.files import atomic_write, ensure_writable
from deltanet_ref.formats.gguf import StringArray, read_gguf, write_gguf
from tests.paths import FIXTURES

FILES = [
    "eq/eq-f32.gguf",
    "eq/lora.gguf",
    "grouped/grouped-f16.gguf",
    "quant/quant-Q4_K_M.gguf",
    "quant/quant-q8_0.gguf",
]
UINT32, STRING, ARRAY = 4, 8, 9  # GGUF value types
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def plain(value):
    """A metadata value as Python objects, as the gguf package's reader returns it."""
    if isinstance(value, StringArray):
        return list(value)
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def oracle_metadata(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("name", FILES)
def test_reads_what_the_gguf_package_reads(name):
    ours, theirs = read_gguf(FIXTURES / name), gguf.GGUFReader(FIXTURES / name)
    assert {key: plain(value) for key, value in ours.metadata.items()} == oracle_metadata(theirs)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (mine.shape, mine.type, mine.nbytes) == (tuple(t.shape.tolist()[::-1]), t.tensor_type, t.n_bytes)
        assert mine.raw.tobytes() == t.data.tobytes()


def test_tensor_table_is_the_one_llama_cpp_lists():
    tensors = read_gguf(FIXTURES / "grouped/grouped-f32.gguf").tensors
    listed = (FIXTURES / "grouped/grouped-f32.gguf.dump.txt").read_text().split("tensor(s)\n")[1].splitlines()
    assert len(listed) == len(tensors) == 56
    for line, tensor in zip(listed, tensors.values()):
        shape, kind, name = (part.strip() for part in line.split(":", 1)[1].split("|")[1:])
        dimensions = [int(n) for n in shape.split(",")]
        assert (name, kind) == (tensor.name, tensor.type.name)
        assert dimensions == [*tensor.shape[::-1], *[1] * (4 - len(tensor.shape))]


@pytest.mark.parametrize("name", FILES)
def test_rewriting_gives_the_bytes_of_the_official_converter(name, tmp_path):
    file = read_gguf(FIXTURES / name)
    write_gguf(tmp_path / "copy.gguf", file.metadata, {t.name: (t.raw, t.type, t.shape) for t in file.tensors.values()})
    assert (tmp_path / "copy.gguf").read_bytes() == (FIXTURES / name).read_bytes()


def test_the_gguf_package_reads_what_is_written(tmp_path):
    metadata = {
        "general.architecture": "qwen35",
        "general.alignment": 64,
        "empty": "",
        "text": "Zażółć\n日本",
        "yes": True,
        "no": np.bool_(False),
        "int": 4_000_000_000,
        "float": 0.1,
        "u8": np.uint8(200),
        "i8": np.int8(-7),
        "u16": np.uint16(60000),
        "i16": np.int16(-3),
        "i32": np.int32(-5),
        "u64": np.uint64(2**63 + 5),
        "i64": np.int64(-(2**40)),
        "f64": np.float64(0.1),
        "strings": ["a", "", "日本"],
        "ints": [3, -2, 1],
        "floats": [0.5, 0.1],
        "bools": [True, False, True],
        "array": np.arange(5, dtype=np.uint16),
        "doubles": np.array([0.1, 1e300]),
    }
    rng = np.random.default_rng(3)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((2, 3, 7)).astype(np.float16),
        "transposed": rng.standard_normal((5, 9)).astype(np.float32).T,
        "vector": np.arange(11, dtype=np.int32),
        "double": rng.standard_normal(13),
        "quantised": (rng.integers(0, 256, 2 * 3 * 34, np.uint8), Q8_0, (2, 96)),
    }
    write_gguf(tmp_path / "a.gguf", metadata, tensors)
    theirs, ours = gguf.GGUFReader(tmp_path / "a.gguf"), read_gguf(tmp_path / "a.gguf")
    assert theirs.data_offset % 64 == 0 and theirs.alignment == 64
    expected = {key: plain(value) for key, value in metadata.items()}
    expected |= {"float": float(np.float32(0.1)), "floats": [0.5, float(np.float32(0.1))]}
    assert oracle_metadata(theirs) == expected
    assert {key: plain(value) for key, value in ours.metadata.items()} == expected
    kinds = {key: theirs.fields[key].types[-1].name for key in metadata if not key.startswith("general.")}
    assert kinds == {
        "empty": "STRING",
        "text": "STRING",
        "yes": "BOOL",
        "no": "BOOL",
        "int": "UINT32",
        "float": "FLOAT32",
        "u8": "UINT8",
        "i8": "INT8",
        "u16": "UINT16",
        "i16": "INT16",
        "i32": "INT32",
        "u64": "UINT64",
        "i64": "INT64",
        "f64": "FLOAT64",
        "strings": "STRING",
        "ints": "INT32",
        "floats": "FLOAT32",
        "bools": "BOOL",
        "array": "UINT16",
        "doubles": "FLOAT64",
    }
    for t in theirs.tensors:
        if t.name == "quantised":
            assert (t.tensor_type, t.shape.tolist()) == (Q8_0, [96, 2])
            assert t.data.tobytes() == tensors[t.name][0].tobytes()
        else:
            assert t.data.dtype == tensors[t.name].dtype and np.array_equal(t.data, tensors[t.name])


def test_version_2_is_read(tmp_path):
    raw = bytearray((FIXTURES / "eq/lora.gguf").read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    (tmp_path / "v2.gguf").write_bytes(raw)
    assert list(read_gguf(tmp_path / "v2.gguf").tensors) == list(read_gguf(FIXTURES / "eq/lora.gguf").tensors)


@pytest.mark.parametrize("value", [-1, 2**32, [], [1, 2.5], [1, "a"], [2**40], None, 1j, {"a": 1}, np.zeros((2, 3))])
def test_values_that_metadata_cannot_hold_are_refused(value, tmp_path):
    with pytest.raises(InputError, match="'key'"):
        write_gguf(tmp_path / "a.gguf", {"key": value}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("n" * 64, np.zeros(3, np.float32)),
        ("a", np.zeros(3, np.complex64)),
        ("a", (np.zeros(33, np.uint8), Q8_0, (32,))),
        ("a", (np.zeros(34, np.uint8), Q8_0, (31,))),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused(name, tensor, tmp_path):
    with pytest.raises(InputError):
        write_gguf(tmp_path / "a.gguf", {}, {name: tensor})
    assert not list(tmp_path.iterdir())


# --- damaged files -------------------------------------------------------------------------------------------------


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind=UINT32, value=struct.pack("<I", 7)):
    return string(name) + struct.pack("<I", kind) + value


def tensor(name="t", dimensions=(3,), kind=F32, offset=0):
    return string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def file(keys=(), tensors=(), data=64, version=3, n_keys=None, n_tensors=None, magic=b"GGUF"):
    header = (
        magic
        + struct.pack(
            "<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
        )
        + b"".join(keys)
        + b"".join(tensors)
    )
    return header + bytes(-len(header) % 32 + data)


def array(n, kind, content=b""):
    return struct.pack("<IQ", kind, n) + content


DAMAGED = {
    "empty": (b"", "not a GGUF"),
    "one byte": (b"G", "not a GGUF"),
    "other file": (b"PK\3\4" + bytes(99), "not a GGUF"),
    "magic alone": (b"GGUF", "truncated"),
    "version 1": (file(version=1), "version 1"),
    "version 4": (file(version=4), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "huge key count": (file(n_keys=2**60), "truncated"),
    "huge tensor count": (file(n_tensors=2**64 - 1), "truncated"),
    "more keys than there are": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + key("a") + bytes(12), "truncated"),
    "key twice": (file([key("a"), key("a")]), "'a' appears twice"),
    "key not UTF-8": (file([key(b"\xff\xfe")]), "not UTF-8"),
    "value not UTF-8": (file([key("a", STRING, string(b"\xc3"))]), "not UTF-8"),
    "huge key length": (file([struct.pack("<Q", 2**63) + b"a"], n_keys=1), "truncated"),
    "huge string": (file([key("a", STRING, struct.pack("<Q", 2**64 - 8))]), "truncated"),
    "unknown value type": (file([key("a", 13)]), "unknown type 13"),
    "unknown array type": (file([key("a", ARRAY, array(1, 77))]), "unknown type 77"),
    "nested arrays": (file([key("a", ARRAY, array(1, ARRAY, array(1, UINT32, bytes(4))))]), "array of arrays"),
    "huge array": (file([key("a", ARRAY, array(2**62, UINT32))]), "truncated"),
    "huge string array": (file([key("a", ARRAY, array(2**61, STRING))]), "truncated"),
    "string array past the end": (
        file([key("a", ARRAY, array(2, STRING, struct.pack("<Qs", 1000, b"x")))]),
        "truncated",
    ),
    "string array of huge lengths": (
        file([key("a", ARRAY, array(2, STRING, struct.pack("<QQ", 2**63, 2**64 - 1)))]),
        "truncated",
    ),
    "last string past the end": (file([key("a", ARRAY, array(1, STRING, struct.pack("<Q", 10**6)))]), "truncated"),
    "alignment 0": (file([key("general.alignment", value=bytes(4))]), "alignment"),
    "alignment 24": (file([key("general.alignment", value=struct.pack("<I", 24))]), "alignment"),
    "alignment a string": (file([key("general.alignment", STRING, string("32"))]), "alignment"),
    "one part of a split file": (file([key("split.count", value=struct.pack("<I", 3))]), "--merge"),
    "split count a string": (file([key("split.count", STRING, string("x"))]), "--merge"),
    "tensor twice": (file(tensors=[tensor("t"), tensor("t", offset=32)]), "'t' appears twice"),
    "tensor name not UTF-8": (file(tensors=[tensor(b"\x80")]), "not UTF-8"),
    "5 dimensions": (file(tensors=[tensor(dimensions=(1, 1, 1, 1, 1))]), "5 dimensions"),
    "2^32 - 1 dimensions": (file(tensors=[string("t") + struct.pack("<I", 2**32 - 1)], n_tensors=1), "dimensions"),
    "dimension 0": (file(tensors=[tensor(dimensions=(3, 0))]), "shape"),
    "dimensions overflow 64 bits": (file(tensors=[tensor(dimensions=(2**32, 2**32, 2**32))]), "ends at byte"),
    "dimensions overflow to a small product": (file(tensors=[tensor(dimensions=(2**63, 2, 3))]), "ends at byte"),
    "data past the end": (file(tensors=[tensor(dimensions=(17,))]), "ends at byte"),
    "offset past the end": (file(tensors=[tensor(offset=2**63)]), "offset"),
    "offset unaligned": (file(tensors=[tensor("a"), tensor("b", offset=12)]), "offset 12, expected 32"),
    "ranges overlap": (file(tensors=[tensor("a"), tensor("b")]), "offset 0, expected 32"),
    "unknown tensor type": (file(tensors=[tensor(kind=4)]), "'t' has the unknown type 4"),
    "rows are not whole blocks": (file(tensors=[tensor(dimensions=(33,), kind=Q8_0)]), "blocks of 32"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_one_clear_line(case, tmp_path):
    raw, reason = DAMAGED[case]
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(InputError) as e:
        read_gguf(tmp_path / "bad.gguf")
    assert str(e.value).startswith(f"{tmp_path / 'bad.gguf'}: ") and reason in str(e.value) and "\n" not in str(e.value)


LONG = "x" * 10**6
LONG_VALUES = {
    "key twice": file([key(LONG), key(LONG)]),
    "key of unknown type": file([key(LONG, 13)]),
    "alignment": file([key("general.alignment", STRING, string(LONG))]),
    "split count": file([key("split.count", STRING, string(LONG))]),
    "tensor twice": file(tensors=[tensor(LONG), tensor(LONG, offset=32)]),
    "tensor of unknown type": file(tensors=[tensor(LONG, kind=4)]),
    "tensor past the end": file(tensors=[tensor(LONG, dimensions=(999,))]),
}


@pytest.mark.parametrize("case", LONG_VALUES)
def test_a_long_value_of_a_file_is_not_repeated_in_full(case, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(LONG_VALUES[case])
    with pytest.raises(InputError) as e:
        read_gguf(tmp_path / "bad.gguf")
    assert len(str(e.value)) < 600


def test_the_builder_of_damaged_files_makes_a_good_one(tmp_path):
    (tmp_path / "good.gguf").write_bytes(file([key("a"), key("b", STRING, string("x"))], [tensor(dimensions=(5, 3))]))
    good = read_gguf(tmp_path / "good.gguf")
    assert good.metadata == {"a": 7, "b": "x"} and good.tensors["t"].shape == (3, 5)


def test_missing_file_and_directory_are_refused(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_gguf(path)


def test_string_array_that_is_not_utf8_is_refused_when_it_is_decoded(tmp_path):
    (tmp_path / "a.gguf").write_bytes(file([key("a", ARRAY, array(2, STRING, string("ok") + string(b"\xff")))]))
    strings = read_gguf(tmp_path / "a.gguf").metadata["a"]
    assert strings[0] == "ok"
    for use in (list, lambda s: s[1], lambda s: s[:]):
        with pytest.raises(InputError, match="not UTF-8"):
            use(strings)


def test_string_array_is_a_sequence(tmp_path):
    words = ["x", "", "日本", "y" * 300]
    write_gguf(tmp_path / "a.gguf", {"words": words}, {})
    strings = read_gguf(tmp_path / "a.gguf").metadata["words"]
    assert (list(strings), strings[-1], strings[1:3], len(strings)) == (words, words[-1], words[1:3], 4)
    assert "日本" in strings and strings.index("日本") == 2
    with pytest.raises(IndexError):
        strings[4]


def test_random_damage_never_escapes_as_another_error(tmp_path):
    """Byte flips, runs of 0xFF and truncations over the header of a real file; what still opens must be readable."""
    good = (FIXTURES / "eq/eq-f32.gguf").read_bytes()
    header = gguf.GGUFReader(FIXTURES / "eq/eq-f32.gguf").data_offset
    rng, path, opened = np.random.default_rng(11), tmp_path / "m.gguf", 0
    for trial in range(500):
        raw = bytearray(good[: header + 4096] if trial % 2 else good)
        # Half of the damage goes to the region after the vocabulary, where keys and tensors are dense.
        for place in rng.integers(0 if trial % 4 < 2 else 8000, header, rng.integers(1, 4)):
            raw[place] = rng.choice([0, 1, 0x7F, 0xFF, rng.integers(256)])
            if trial % 5 == 0:
                raw[place : place + 8] = b"\xff" * 8
        if trial % 3 == 0:
            raw = raw[: rng.integers(0, header)]
        path.write_bytes(raw)
        try:
            file = read_gguf(path)
            for value in file.metadata.values():
                plain(value)
            assert all(t.raw.size == t.nbytes for t in file.tensors.values())
            opened += 1
        except InputError as e:
            assert str(e).startswith(str(path)) and "\n" not in str(e)
    assert 20 < opened < 480  # the damage is neither always fatal nor never


def test_counts_allocate_nothing_before_they_are_checked(tmp_path):
    path = tmp_path / "a.gguf"
    for case in ("huge key count", "huge tensor count", "huge array", "huge string array", "huge string"):
        path.write_bytes(DAMAGED[case][0])
        tracemalloc.start()
        with pytest.raises(InputError):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_the_strings_of_the_real_vocabulary_are_not_decoded_with_the_header(tmp_path, monkeypatch):
    """495,876 tokens and merges. Reading the header decodes the keys and the strings outside arrays, and takes memory
    for one 8-byte position per array element: twice that while the list grows, and 1 MiB for all else. The strings
    themselves would take 25 MB."""
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(gzip.decompress((FIXTURES / "realvocab.gguf.gz").read_bytes()))
    decoded, string = [], gguf_module._Header.string
    monkeypatch.setattr(gguf_module._Header, "string", lambda header: decoded.append(string(header)) or decoded[-1])
    monkeypatch.setattr(StringArray, "_decoded", lambda self, starts, ends: pytest.fail("an array was decoded"))
    tracemalloc.start()
    metadata = read_gguf(path).metadata
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    n = len(metadata["tokenizer.ggml.tokens"]) + len(metadata["tokenizer.ggml.merges"])
    assert n == 248320 + 247556 and peak < 2 * 8 * n + (1 << 20)
    assert decoded == [text for key, value in metadata.items() for text in (key, value) if isinstance(text, str)]


# --- atomic writing --------------------------------------------------------------------------------------------------


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError):
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


def test_killed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    program = """if True:
        import os, signal, sys
        from deltanet_ref.formats.files import atomic_write
        with atomic_write(sys.argv[1]) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a"], env=environment)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "a").read_text() == "old"


def test_atomic_write_follows_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_unwritable_places_are_refused_before_work(tmp_path):
    for path in (tmp_path / "none" / "a", tmp_path, os.devnull, tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match=r"(does not exist|not a regular file|cannot be written)"):
            ensure_writable(path)
        with pytest.raises(InputError), atomic_write(path):
            raise AssertionError("the block was entered")
    ensure_writable(tmp_path / "fine")
    assert not list(tmp_path.iterdir())
