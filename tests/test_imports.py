"""The direction of imports: every import in the package, those inside functions included, against one table."""

import ast
import sys
from collections import deque
from pathlib import Path

import pytest

import deltanet_ref

PACKAGE = Path(deltanet_ref.__file__).parent

# A layer may import itself and the layers after the colon, directly or through others; nothing else of the package.
BASIC = {"errors", "version", "notation", "formats", "ops"}
LIBRARY = BASIC | {"backends", "model", "lora", "train", ""}  # "" is deltanet_ref/__init__.py
LAYERS = {
    "errors": set(),
    "version": set(),
    "notation": {"errors"},
    "formats": {"errors"},
    "ops": {"notation", "errors"},
    "backends": BASIC,
    "model": BASIC,
    "lora": BASIC | {"model"},
    "oracle": BASIC | {"model", "lora"},  # not backends: the judge and the judged
    "train": BASIC | {"model", "lora", "backends"},
    "": LIBRARY,
    "demo": LIBRARY,
    "cli": LIBRARY | {"demo", "oracle"},
    "__main__": LIBRARY | {"demo", "oracle", "cli"},
}

# Packages that only these modules (or everything below them) may import.
ONLY_IN = {
    "numba": {"backends"},
    "llvmlite": {"backends"},
    "scipy": {"backends"},
    "cupy": {"backends", "oracle.runners"},
    "torch": {"oracle.runners", "oracle.hf_hook", "oracle.examples"},
    "jax": {"oracle.runners"},
    "argparse": {"cli", "__main__", "oracle.mutants.__main__"},
    "rich": {"cli", "demo", "train.report"},
    "matplotlib": {"cli", "train.report"},
}
# The mathematics needs nothing but these.
OPS_NEED = {"numpy"} | sys.stdlib_module_names


def module_name(path):
    """deltanet_ref/ops/rope.py -> "ops.rope"; deltanet_ref/__init__.py -> ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module):
    return module.partition(".")[0]


def imports(module):
    """What a module imports: {full name: line}, submodules by their own name, and modules named in strings."""
    found = {}
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from .x import y
                package = f"deltanet_ref.{module}".rstrip(".").split(".")
                is_package = MODULES[module].name == "__init__.py"
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *filter(None, [base])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            names = [name for name in names if name == base or ours(name) in MODULES]
            if len(names) > 1 and ours(base) == "":
                names = names[1:]  # `from deltanet_ref import ops` is ops
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ours(node.value) in MODULES:
            names = [node.value] if node.value != "deltanet_ref" else []  # import_module("deltanet_ref.ops")
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def ours(name):
    """The name inside the package, or None for another package's."""
    return "" if name == "deltanet_ref" else name[13:] if name.startswith("deltanet_ref.") else None


GRAPH = {module: imports(module) for module in MODULES}


def chains(start):
    """Shortest chain of imports from a module to each module of ours that it reaches."""
    chain, queue = {start: [start]}, deque([start])
    while queue:
        module = queue.popleft()
        for name in GRAPH[module]:
            target = ours(name)
            if target in MODULES and target not in chain:
                chain[target] = [*chain[module], target]
                queue.append(target)
    return chain


def described(chain):
    steps = [
        f"deltanet_ref.{a}:{GRAPH[a][f'deltanet_ref.{b}'.rstrip('.')]}".replace("ref.:", "ref:")
        for a, b in zip(chain, chain[1:])
    ]
    return " -> ".join([*steps, f"deltanet_ref.{chain[-1]}".rstrip(".")])


def test_every_module_has_a_layer():
    assert {layer(module) for module in MODULES} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_reaches_only_the_layers_below_it(name):
    wrong = {}
    for module in MODULES:
        if layer(module) == name:
            for target, chain in chains(module).items():
                if layer(target) not in LAYERS[name] | {name}:
                    forbidden = layer(target) or "deltanet_ref itself"
                    if len(chain) < len(wrong.get(forbidden, [*chain, ""])):
                        wrong[forbidden] = chain
    assert not wrong, "\n".join(
        f"{name or 'deltanet_ref'} must not reach {target}: {described(chain)}" for target, chain in wrong.items()
    )


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_only_where_it_may_be(package):
    wrong = [
        f"deltanet_ref.{module}:{line} imports {name}"
        for module, found in GRAPH.items()
        for name, line in found.items()
        if name.partition(".")[0] == package
        and not any(module == place or module.startswith(f"{place}.") for place in ONLY_IN[package])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_mathematics_needs_numpy_only():
    wrong = [
        f"deltanet_ref.{module}:{line} imports {name}"
        for module, found in GRAPH.items()
        if layer(module) == "ops"
        for name, line in found.items()
        if ours(name) is None and name.partition(".")[0] not in OPS_NEED
    ]
    assert not wrong, "\n".join(wrong)
