"""formats/safetensors.py against the safetensors library, and with damaged files."""

import json
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deltanet_ref.errors import InputError
from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors
from tests.paths import FIXTURES


def test_reads_what_the_library_reads():
    theirs = load_file(FIXTURES / "eq/hf/model.safetensors")
    for path in (FIXTURES / "eq/hf/model.safetensors", FIXTURES / "eq/hf"):
        ours = read_safetensors(path)
        assert set(ours) == set(theirs) and len(ours) == len(theirs)
        for name, values in theirs.items():
            assert ours[name].dtype == values.dtype and np.array_equal(ours[name], values)
            assert ours.shape(name) == values.shape
    assert ours.metadata == {"format": "pt"}


def test_the_library_reads_what_is_written(tmp_path):
    rng = np.random.default_rng(2)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "t": rng.standard_normal((7, 2)).T,
        "i": np.arange(9),
        "h": rng.standard_normal(4).astype(np.float16),
        "b": np.array([True, False]),
        "n": np.array(2.5),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    theirs, ours = load_file(tmp_path / "a.safetensors"), read_safetensors(tmp_path / "a.safetensors")
    for name, values in tensors.items():
        for read in (theirs[name], ours[name]):
            assert (read.dtype, read.shape) == (values.dtype, values.shape) and np.array_equal(read, values)
    with safe_open(tmp_path / "a.safetensors", "numpy") as f:
        assert f.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def stored(name, dtype, shape, raw):
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(raw)]}}).encode()
    return struct.pack("<Q", len(header)) + header + raw


def test_bf16_is_read_as_the_float32_of_the_same_value(tmp_path):
    numbers = [1.0, -2.5, 3.140625, 1e-30, 5.0, 6.0]
    raw = b"".join(struct.pack("<f", x)[2:] for x in numbers)
    (tmp_path / "a.safetensors").write_bytes(stored("w", "BF16", [2, 3], raw))
    values = read_safetensors(tmp_path / "a.safetensors")["w"]
    expected = [struct.unpack("<f", b"\0\0" + struct.pack("<f", x)[2:])[0] for x in numbers]
    assert values.dtype == np.float32 and values.shape == (2, 3) and values.ravel().tolist() == expected


def test_dtype_that_is_not_read_is_named_with_its_tensor(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(stored("w", "F8_E4M3", [3], bytes(3)))
    with pytest.raises(InputError, match="'w' has the unsupported type F8_E4M3: convert it"):
        read_safetensors(tmp_path / "a.safetensors")["w"]


def shards(directory, index):
    save_file({"a": np.arange(3.0)}, directory / "one.safetensors")
    save_file({"b": np.arange(5.0)}, directory / "two.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_one_mapping(tmp_path):
    shards(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    read = read_safetensors(tmp_path)
    assert {name: read[name].tolist() for name in read} == {"a": [0, 1, 2], "b": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize(
    "index, reason",
    [
        (
            {"weight_map": {"a": "one.safetensors", "c": "two.safetensors", "d": "one.safetensors"}},
            "shards lack tensors that the index lists: c, d",
        ),
        ({"weight_map": {"a": "three.safetensors"}}, "three.safetensors: cannot be read"),
        ({"weight_map": {"a": 7}}, "not a safetensors index"),
        ({"weight_map": ["a"]}, "not a safetensors index"),
        ({}, "not a safetensors index"),
        ([], "expected a JSON object"),
        *(
            ({"weight_map": {"a": name}}, "not a .safetensors file of this directory")
            for name in (
                "../one.safetensors",
                "/etc/passwd",
                "..",
                "a/../one.safetensors",
                r"..\one.safetensors",
                "one.bin",
            )
        ),
    ],
)
def test_an_inconsistent_index_is_refused(index, reason, tmp_path):
    shards(tmp_path, index)
    with pytest.raises(InputError, match=reason):
        read_safetensors(tmp_path)


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(InputError, match="cannot be read"):
            read_safetensors(path)


def test_random_damage_never_escapes_as_another_error(tmp_path):
    good = (FIXTURES / "eq/hf/model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    rng, path, opened = np.random.default_rng(5), tmp_path / "m.safetensors", 0
    for trial in range(200):
        raw = bytearray(good)
        for place in rng.integers(0 if trial % 2 else 8, header, 1):
            raw[place] = rng.integers(256)
        if trial % 3 == 0:
            raw = raw[: rng.integers(0, len(raw))]
        path.write_bytes(raw)
        try:
            tensors = read_safetensors(path)
            for name in tensors:
                tensors[name]
            opened += 1
        except InputError as e:
            assert "\n" not in str(e)
    assert 10 < opened < 190
