"""Sigmoid, SiLU and softplus, stable for any real or complex argument. Derivation: docs/derivations/gates.md."""
import numpy as np


def sigmoid(x):
    """1 / (1 + exp(-x)) [gate.1], any shape, the dtype of x."""
    if np.iscomplexobj(x):
        positive = x.real > 0
        e = np.exp(np.where(positive, -x, x))                              # |e| <= 1 on both sides
        return np.where(positive, 1, e) / (1 + e)
    y = np.negative(x)
    with np.errstate(over="ignore"):                                       # exp(-x) = inf gives the correct 0
        np.exp(y, out=y)
    y += 1
    return np.divide(1, y, out=y)


def silu(x):
    """x sigmoid(x) [gate.3], any shape, the dtype of x."""
    y = sigmoid(x)
    y *= x
    return y


def silu_derivative(x):
    """s + x s (1 - s) with s = sigmoid(x) [gate.4], any shape, the dtype of x."""
    s = sigmoid(x)
    y = np.subtract(1, s)
    y *= x
    y += 1
    y *= s
    return y


def softplus(x):
    """log(1 + exp(x)) [gate.5], any shape, the dtype of x; its derivative is sigmoid(x)."""
    if not np.iscomplexobj(x):
        return np.logaddexp(x, 0)
    positive = x.real > 0
    e = np.exp(np.where(positive, -x, x))                                  # log(1 + e^x) = x + log(1 + e^-x)
    tail = 0.5 * np.log1p(e.real * (2 + e.real) + e.imag**2) + 1j * np.arctan2(e.imag, 1 + e.real)
    return np.where(positive, x, 0) + tail                                 # NumPy's complex log1p rounds 1 + e
