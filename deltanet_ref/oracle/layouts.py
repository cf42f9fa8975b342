"""Declared conventions of an implementation of the gated delta rule: converts cases to its layout, and answers back.

The kit's own conventions are those of notation.py. A layout changes values (decay instead of log decay, transposed
states, reordered heads) and names (arguments, returned values). A case that it cannot express is skipped with a reason.
"""

import ast
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from deltanet_ref.errors import InputError, shown
from deltanet_ref.notation import value_to_key_head
from deltanet_ref.ops.l2_norm import l2_norm_backward, l2_norm_forward
from deltanet_ref.oracle.cases import Case, make_inputs
from deltanet_ref.oracle.chunk_by_chunk import BACKWARD, FORWARD
from deltanet_ref.oracle.expected import Expected, compute, expected
from deltanet_ref.oracle.operators import DELTA, in_dtype

# switch: value -> its meaning for the implementation (help text of check). The first value is the kit's own.
SWITCHES = {
    "gate": {"log": "g is the log decay, <= 0", "decay": "g is the decay exp(g) itself, and dg its gradient"},
    "state": {"kv": "states are (N, H_v, d_k, d_v)", "vk": "states are (N, H_v, d_v, d_k)"},
    "heads": {
        "grouped": "value head h reads key head h // (H_v / H_k)",
        "tiled": "value head h reads key head h % H_k",
        "repeated": "q and k have H_v heads, each key head repeated for its value heads",
    },
    "order": {"token": "(B, L, H, ...)", "head": "(B, H, L, ...)"},
    "scale": {
        "argument": "scale is an argument",
        "fixed": "the callee always multiplies q by d_k ** -0.5",
        "none": "the callee does not scale q",
    },
    "l2norm": {
        "outside": "q and k are used as given",
        "inside": "the callee divides q and k by sqrt(sum x^2 + 1e-6); dq, dk are those of its arguments",
    },
}


@dataclass(frozen=True)
class Layout:
    """A value for each switch, and the calls: argument lists as Python text, VALUE or NAME=VALUE each.

    A VALUE is the kit's name of an input (q, k, v, g, beta, S0, scale, cu_seqlens, do, dS_end) or a literal.
    """

    gate: str = "log"
    state: str = "kv"
    heads: str = "grouped"
    order: str = "token"
    scale: str = "argument"
    l2norm: str = "outside"
    call: str | None = None  # None: the operator's own, see operators.Operator
    returns: str | None = None  # names in the order in which the callable returns them, "_" to ignore a value
    backward_call: str | None = None
    gradients: str | None = None
    packed: bool = True  # accepts cu_seqlens


LAYOUTS = {
    "own": Layout(),
    "hf": Layout(
        scale="fixed",
        heads="repeated",
        packed=False,
        call="q, k, v, g=g, beta=beta, initial_state=S0, output_final_state=True",
        backward_call="q, k, v, g=g, beta=beta, initial_state=S0, do=do, dS_end=dS_end",
    ),
    "fla": Layout(
        call="q, k, v, g, beta, scale=scale, initial_state=S0, output_final_state=True",
        backward_call="q, k, v, g, beta, scale=scale, initial_state=S0, do=do, dS_end=dS_end",
    ),
}
NAMES = {name: LAYOUTS[name] for name in ("hf", "fla")}


def make_layout(name: str = "own", **switches: str | None) -> Layout:
    """A named layout with some switches changed (None: unchanged). Raises InputError for unknown names and values."""
    if name not in LAYOUTS:
        raise InputError(f"`layout` is {shown(name)}: use {' or '.join(NAMES)}, or single switches")
    layout = replace(LAYOUTS[name], **{key: value for key, value in switches.items() if value is not None})
    for switch, values in SWITCHES.items():
        if getattr(layout, switch) not in values:
            raise InputError(f"`{switch}` is {shown(getattr(layout, switch))}: use {' or '.join(values)}")
    for option, text, names in (
        ("returns", layout.returns, (*DELTA.outputs, *FORWARD)),
        ("gradients", layout.gradients, (*DELTA.gradients, *BACKWARD)),
    ):
        if unknown := [name for name in returned(text, ()) if name not in (*names, "_")]:
            raise InputError(f"`{option}` has {shown(unknown[0])}: use {' '.join(names)}, and _ for any other value")
    for call in (layout.call, layout.backward_call):
        if call is not None:
            arguments(call)
    return layout


def cannot_express(layout: Layout, case: Case, x: dict) -> str | None:
    """Why this layout cannot express the case with inputs x, or None."""
    if case.op != "gated_delta_rule":
        return None if layout == Layout() else f"layouts apply to the gated delta rule only, not to {case.op}"
    if "cu_seqlens" in x and not layout.packed:
        return "this layout does not support packed sequences"
    fixed = 1 / math.sqrt(case.sizes["d_k"])
    if layout.scale == "fixed" and abs(x["scale"] - fixed) > 1e-12:
        return f"its scale is {x['scale']:g}, but this layout fixes the scale to d_k ** -0.5"
    return None


def put(layout: Layout, case: Case) -> tuple[dict, Expected]:
    """Convert a case to this layout: its inputs, name -> array or number; and its expected values in the kit's own."""
    x = make_inputs(case)
    if layout.l2norm == "outside" and layout.scale != "none":
        right = expected(case)
    else:
        right = _expected_of(layout, case, x)
    if case.op != "gated_delta_rule":
        return x, right
    y = dict(x)
    order = _value_order(layout, case)
    for name, axis in {"v": 2, "g": 2, "beta": 2, "do": 2, "S0": 1, "dS_end": 1}.items():
        y[name] = np.take(y[name], order, axis)
    if layout.heads == "repeated":
        y["q"], y["k"] = (np.repeat(y[name], case.sizes["H_v"] // case.sizes["H_k"], axis=2) for name in ("q", "k"))
    if layout.gate == "decay":
        y["g"] = np.exp(y["g"], dtype=np.float64)  # rounded once, to the dtype passed on
    if layout.state == "vk":
        y |= {name: np.ascontiguousarray(y[name].swapaxes(-1, -2)) for name in ("S0", "dS_end")}
    if layout.order == "head":
        y |= {name: np.ascontiguousarray(y[name].swapaxes(1, 2)) for name in ("q", "k", "v", "g", "beta", "do")}
    if layout.scale != "argument":
        del y["scale"]
    return y, right


def take(layout: Layout, case: Case, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert outputs from this layout to the kit's own. Arrays of a wrong shape are left for compare_case to reject.

    Intermediates are kept only if the layout leaves heads, states and values unchanged.
    """
    if case.op != "gated_delta_rule":
        return outputs
    names = [*DELTA.outputs, *DELTA.gradients]
    own = replace(layout, call=None, returns=None, backward_call=None, gradients=None, gate="log", packed=True)
    y = dict(outputs) if own == Layout() else {name: outputs[name] for name in names if name in outputs}
    if layout.order == "head":
        _change(y, ("o", "dq", "dk", "dv", "dg", "dbeta"), lambda a: a.swapaxes(1, 2) if a.ndim > 2 else a)
    if layout.state == "vk":
        _change(y, ("S_end", "dS0"), lambda a: a.swapaxes(-1, -2) if a.ndim > 1 else a)
    if layout.heads == "repeated":
        _change(y, ("dq", "dk"), lambda a: _sum_repeated(a, case.sizes["H_k"], case.sizes["H_v"]))
    back = np.argsort(_value_order(layout, case))
    for name, axis in {"o": 2, "dv": 2, "dg": 2, "dbeta": 2, "S_end": 1, "dS0": 1}.items():
        _change(y, (name,), lambda a: np.take(a, back, axis) if a.shape[axis : axis + 1] == back.shape else a)
    if layout.gate == "decay":
        g = make_inputs(case)["g"]
        decay = np.exp(g, dtype=np.float64)
        _change(y, ("dg",), lambda a: a * decay if a.shape == g.shape else a)  # d/dg = exp(g) d/d exp(g)
    return y


def _value_order(layout, case):
    """order[i] = the value head of the case that is at position i in the layout."""
    H_k, H_v = case.sizes["H_k"], case.sizes["H_v"]
    wanted = "tiled" if layout.heads == "tiled" else "grouped"
    if case.options.get("head_order", "grouped") == wanted:
        return np.arange(H_v)
    tiled_place = np.argsort(value_to_key_head(H_k, H_v, "tiled"), kind="stable")  # of each head in grouped order
    return tiled_place if wanted == "grouped" else np.argsort(tiled_place)


def _sum_repeated(a, H_k, H_v):
    return a.reshape(*a.shape[:2], H_k, H_v // H_k, *a.shape[3:]).sum(3) if a.ndim == 4 and a.shape[2] == H_v else a


def _change(y, names, function):
    for name in names:
        if name in y:
            y[name] = function(y[name])


def rule_inputs(layout: Layout, x: dict) -> tuple[dict, dict]:
    """The inputs as the rule receives them inside a callee of this layout, and {"q", "k": cache of their norm}."""
    if layout.scale == "none":
        x = x | {"scale": 1.0}
    if layout.l2norm == "outside":
        return x, {}
    wide = in_dtype(x, np.float64)
    norms = {name: l2_norm_forward(wide[name]) for name in ("q", "k")}
    return wide | {name: y for name, (y, _) in norms.items()}, {name: cache for name, (_, cache) in norms.items()}


def through_norms(y: dict, caches: dict, sample: np.ndarray | None = None) -> dict:
    """Outputs of the rule with dq and dk passed back through the callee's norms; wrong shapes are left unchanged.

    caches  from rule_inputs
    sample  tokens that the outputs are given for; None: all
    """
    y = dict(y)
    for name, cache in caches.items():
        rows = type(cache)(*(a if sample is None else a[:, sample] for a in cache))
        if y[f"d{name}"].shape == rows.y.shape:
            y[f"d{name}"] = l2_norm_backward(y[f"d{name}"], rows)
    return y


def _expected_of(layout, case, x):
    """Expected values when the callee normalises q and k itself, or does not scale q: computed now, scales included."""
    x, caches = rule_inputs(layout, x)
    right = compute(case, x)
    scale = dict(right.scales)
    for name, (_, r) in caches.items():
        r = r if right.sample is None else r[:, right.sample]
        scale[f"d{name}"] = scale[f"d{name}"] * r[..., 0] * 2  # dx = r (dy - y (y . dy)), two terms like dy
    return right._replace(values=through_norms(right.values, caches, right.sample), scales=scale)


def arguments(call: str) -> list[tuple]:
    """Parse a call's text: [(keyword or None, name of an input or None, literal)]. Raises InputError."""
    try:
        node = ast.parse(f"f({call})", mode="eval").body
        pairs = [(None, arg) for arg in node.args] + [(keyword.arg, keyword.value) for keyword in node.keywords]
        return [
            (keyword, value.id, None)
            if isinstance(value, ast.Name) and value.id not in ("True", "False", "None")
            else (keyword, None, ast.literal_eval(value))
            for keyword, value in pairs
        ]
    except (SyntaxError, ValueError, AttributeError) as error:
        raise InputError(
            f"the call {shown(call)} is not a list of arguments such as 'q, k, v, beta, g, state=S0'"
        ) from error


def call_with(call: str, inputs: dict) -> tuple[list, dict]:
    """Positional and keyword arguments of the call. Raises InputError if it names an input that the case lacks."""
    positional, keywords = [], {}
    for keyword, name, literal in arguments(call):
        if name is not None and name not in inputs:
            raise InputError(f"the call {shown(call)} needs {name!r}; available are {', '.join(inputs)}")
        value = literal if name is None else inputs[name]
        if keyword is None:
            positional.append(value)
        else:
            keywords[keyword] = value
    return positional, keywords


def forward_call(layout, op, inputs):
    """Text of the forward call: the layout's, or the operator's own; cu_seqlens= is added for packed cases."""
    return _call(layout.call, op, inputs, ())


def backward_call(layout, op, inputs):
    """The same for the backward, which also takes the incoming gradients."""
    return _call(layout.backward_call, op, inputs, op.incoming)


def _call(text, op, inputs, incoming):
    if text is None:
        options = [name for name in (*op.options, *incoming) if name in inputs and name != "cu_seqlens"]
        text = ", ".join([*op.args, *(f"{name}={name}" for name in options)])
    if "cu_seqlens" in inputs and "cu_seqlens" not in text:
        text += ", cu_seqlens=cu_seqlens"
    return text


def returned(text: str | None, names: Iterable[str]) -> list[str]:
    """Names of the returned values in order: those in the text (comma-separated), or the given ones."""
    return list(names) if text is None else [name.strip() for name in text.split(",")]
