"""Writes the vectors (files under vectors/) from cases.py and the definition, and verifies stored ones against them.

A group of cases is GROUP.json (descriptions, the same text on every machine) and GROUP.safetensors (the numbers).
Inputs are bit-identical on every machine. Expected values are bit-identical on one machine; on others they may differ
by what a float64 implementation may be off.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors
from deltanet_ref.oracle.cases import CASES, GROUPS, Case, make_inputs
from deltanet_ref.oracle.expected import compute
from deltanet_ref.oracle.flags import FLAGS
from deltanet_ref.oracle.noise import FACTOR, FLOAT64_PER_FLOAT32, relative_error
from deltanet_ref.oracle.operators import OPERATORS

VERSION = 2  # of the vectors: incremented when an input or an expected value changes
SOURCE = "float64, token by token: deltanet_ref/ops/gated_delta_rule/recurrent.py and the operators beside it"
SUMS = "SHA256SUMS"


def write_vectors(directory: Path | str, groups: Sequence[str] = GROUPS) -> None:
    """Write the files of these groups, and SHA256SUMS (for `sha256sum -c`), into the directory, which is created."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for group in groups:
        metadata, tensors = make_group(group)
        write_safetensors(directory / f"{group}.safetensors", tensors, {"version": str(VERSION)})
        (directory / f"{group}.json").write_text(metadata, "utf-8")
        names += [f"{group}.json", f"{group}.safetensors"]
    sums = [f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(names)]
    (directory / SUMS).write_text("".join(sums), "utf-8")


def make_group(group: str) -> tuple[str, dict[str, np.ndarray]]:
    """The metadata (JSON text) and the tensors ("CASE-ID/TENSOR") of one group."""
    cases, tensors = [], {}
    for case in CASES.values():
        if case.group == group:
            entry, its_tensors = make_entry(case)
            cases.append(entry)
            tensors |= {f"{case.id}/{name}": array for name, array in its_tensors.items()}
    flags = dict.fromkeys(flag for entry in cases for flag in entry["flags"])
    metadata = {
        "$schema": "./schema.json",
        "version": VERSION,
        "group": group,
        "file": f"{group}.safetensors",
        "source": SOURCE,
        "factor": FACTOR,
        "flags": {flag: FLAGS[flag]._asdict() for flag in flags},
        "cases": cases,
    }
    return json.dumps(metadata, indent=1) + "\n", tensors


def make_entry(case: Case) -> tuple[dict, dict[str, np.ndarray]]:
    """The metadata and tensors (inputs, and those of Expected.tensors) of one case."""
    x, right = make_inputs(case), compute(case)
    op = OPERATORS[case.op]
    facts, tensors, parameters = {}, {}, {}
    digest = hashlib.sha256()
    for name, value in x.items():
        if not isinstance(value, np.ndarray):
            parameters[name] = value
            continue
        tensors[name] = value
        facts[name] = _facts("incoming" if name in op.incoming else "input", value)
        digest.update(value.tobytes())
    for name, value in right.values.items():
        role = "output" if name in op.outputs else "gradient" if name in op.gradients else "intermediate"
        facts[name] = _facts(role, value)
    tensors |= right.tensors()
    entry = {
        "id": case.id,
        "op": case.op,
        "sizes": case.sizes,
        "flags": list(case.flags),
        "seed": case.seed,
        "options": case.options,
        "parameters": parameters,
        "inputs_sha256": digest.hexdigest(),
        "tensors": facts,
    }
    if right.sample is not None:
        entry["sample"] = right.sample.tolist()
    return entry, tensors


def _facts(role, value):
    return {"role": role, "dtype": str(value.dtype), "shape": list(value.shape)}


def verify_vectors(directory: Path | str, groups: Sequence[str] = GROUPS) -> list[str]:
    """One line for each error in the vectors of a directory: sums, metadata, inputs, expected values."""
    directory = Path(directory)
    wrong = []
    for line in (directory / SUMS).read_text("utf-8").splitlines():
        digest, name = line.split()
        if hashlib.sha256((directory / name).read_bytes()).hexdigest() != digest:
            wrong.append(f"{name}: its sha256 is not the one in {SUMS}")
    for group in groups:
        metadata, tensors = make_group(group)
        if (directory / f"{group}.json").read_text("utf-8") != metadata:
            wrong.append(f"{group}.json: differs from the table of cases")
        stored = read_safetensors(directory / f"{group}.safetensors")
        for name in tensors.keys() ^ stored.keys():
            wrong.append(f"{group}.safetensors: {name} " + ("is missing" if name in tensors else "belongs to no case"))
        for name in tensors.keys() & stored.keys():
            wrong += _difference(name, stored[name], tensors)
    return wrong


def _difference(name, stored, tensors):
    made = np.asarray(tensors[name])
    if stored.shape != made.shape or stored.dtype != made.dtype:
        return [f"{name}: is {stored.dtype} {stored.shape}; expected {made.dtype} {made.shape}"]
    if f"{name}.scale" in tensors:
        floor = FLOAT64_PER_FLOAT32 * float(tensors[f"{name}.floor"][0])
        off = np.max(relative_error(stored, made, tensors[f"{name}.scale"]), initial=0.0) / floor
        return [] if off <= FACTOR["float64"] else [f"{name}: off by {off:.3g} noise floors of float64"]
    if name.endswith(".scale"):
        return [] if np.allclose(stored, made, rtol=1e-6) else [f"{name}: differs"]
    if name.endswith(".floor"):  # measured noise, which depends on the BLAS
        near = (stored <= 8 * made).all() and (made <= 8 * stored).all()
        return [] if near else [f"{name}: {stored} is not within a factor of 8 of {made}"]
    return [] if np.array_equal(stored, made) else [f"{name}: an input differs"]
