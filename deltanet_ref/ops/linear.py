"""Linear maps, row by row. Derivation: docs/derivations/linear-and-lora.md."""
from deltanet_ref.errors import InputError


def linear_forward(x, w):
    """y = x w^T [linear.1].

    x (..., in), w (out, in) -> y (..., out). Raises InputError when the inner sizes differ.
    """
    if x.shape[-1] != w.shape[1]:
        raise InputError(f"x has {x.shape[-1]} features and w is {w.shape}; w must be (out, {x.shape[-1]})")
    return (_rows(x) @ w.T).reshape(*x.shape[:-1], len(w))


def linear_add(y, x, w):
    """y += x w^T, in place. x (..., in), w (out, in), y (..., out)."""
    y += linear_forward(x, w)


def linear_backward_input(dy, w):
    """dx = dy w [linear.3]. dy (..., out), w (out, in) -> dx (..., in)."""
    return (_rows(dy) @ w).reshape(*dy.shape[:-1], w.shape[1])


def linear_backward_weight(dy, x):
    """dw = dy^T x, summed over all rows [linear.4]. dy (..., out), x (..., in) -> dw (out, in)."""
    return _rows(dy).T @ _rows(x)


def _rows(x):
    return x.reshape(-1, x.shape[-1])
