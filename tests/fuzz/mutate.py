"""Typical damage of files: mutate(raw, rng) -> bytes, determined by the state of rng."""

import json

NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    9,
    2**7 - 1,
    2**8 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 8,
    2**64 - 1,
)
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    65,
    2**31,
    2**63,
    10**400,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "a",
    "..",
    "../x",
    "\x00",
    "\ud800",
    "a = b",
    "(a|a)*$",
    [],
    {},
    [[]],
    [None],
    ["a", 1],
    {"a": "b"},
    [1] * 99,
)


def mutate(raw, rng, most=1 << 16):
    """One to three changes; of a JSON text two thirds change values, the others bytes."""
    for _ in range(int(rng.integers(1, 4))):
        changes = JSON_CHANGES if raw[:1] == b"{" and rng.random() < 2 / 3 else BYTE_CHANGES
        raw = changes[rng.integers(len(changes))](raw, rng)
    return raw[:most]


# ---- bytes


def place(raw, rng):
    """A position, uniform or near the start, where headers are."""
    return int(rng.integers(len(raw) + 1) * (rng.random() ** 3 if rng.random() < 0.5 else 1))


def flip(raw, rng):
    raw = bytearray(raw)
    for at in {place(raw, rng) for _ in range(rng.integers(1, 5))} - {len(raw)}:
        raw[at] ^= 1 << int(rng.integers(8))
    return bytes(raw)


def number(raw, rng):
    """A wrong count, length, offset, dimension or type."""
    size, at = int(rng.choice([1, 4, 8])), place(raw, rng)
    value = NUMBERS[rng.integers(len(NUMBERS))] % 256**size
    return raw[:at] + value.to_bytes(size, "little") + raw[at + size :]


def truncate(raw, rng):
    return raw[: place(raw, rng)]


def repeat(raw, rng):
    """Duplicate a piece: for example, a name twice."""
    at, size = place(raw, rng), int(rng.integers(1, 80))
    return raw[: at + size] + raw[at : at + size] + raw[at + size :]


def remove(raw, rng):
    at = place(raw, rng)
    return raw[:at] + raw[at + int(rng.integers(1, 40)) :]


def swap(raw, rng):
    """Overwrite one piece with another of the same length."""
    a, b, size = place(raw, rng), place(raw, rng), int(rng.integers(1, 40))
    piece = raw[b : b + size]
    return raw[:a] + piece + raw[a + len(piece) :]


BYTE_CHANGES = (flip, number, truncate, repeat, remove, swap)


# ---- JSON


def parsed(change):
    def changed(raw, rng):
        try:
            return json.dumps(change(json.loads(raw), rng)).encode()
        except (ValueError, RecursionError):  # no longer JSON, or nested too deeply
            return flip(raw, rng)

    return changed


def nodes(value):
    """(container, key) of every value in it."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [(value, key) for key, _ in pairs] + [node for _, child in pairs for node in nodes(child)]


def some_node(value, rng):
    found = nodes(value)
    return found[rng.integers(len(found))] if found else ({"": value}, "")


@parsed
def replace(value, rng):
    container, key = some_node(value, rng)
    container[key] = VALUES[rng.integers(len(VALUES))]
    return value


@parsed
def exchange(value, rng):
    (a, i), (b, j) = some_node(value, rng), some_node(value, rng)
    a[i] = b[j] if not nodes(b[j]) else 7  # a value, not a container that might contain the other
    return value


@parsed
def delete(value, rng):
    container, key = some_node(value, rng)
    del container[key]
    return value


@parsed
def rename(value, rng):
    container, key = some_node(value, rng)
    if isinstance(container, dict):
        container[str(VALUES[rng.integers(len(VALUES))])] = container.pop(key)
    return value


@parsed
def nest(value, rng):
    container, key = some_node(value, rng)
    for _ in range(int(rng.choice([1, 50, 300]))):
        container[key] = [container[key]]
    return value


JSON_CHANGES = (replace, replace, replace, exchange, delete, rename, nest)
