"""One step of AdamW on one array, constants as in torch.optim.AdamW.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
"""
import numpy as np


def adamw_update(p, g, m, v, *, t, lr, betas, eps, weight_decay):
    """Update p, m and v in place with the gradient g at step t = 1, 2, ...

        p <- p - lr weight_decay p
        m <- beta1 m + (1 - beta1) g                        m^ = m / (1 - beta1^t)
        v <- beta2 v + (1 - beta2) g^2                      v^ = v / (1 - beta2^t)
        p <- p - lr m^ / (sqrt(v^) + eps)

    p, g, m, v have the same shape; betas is (beta1, beta2); lr, eps and weight_decay are numbers.
    """
    beta1, beta2 = betas
    if weight_decay:
        p *= 1 - lr * weight_decay
    m += (1 - beta1) * (g - m)
    v *= beta2
    v += (1 - beta2) * g * g
    p -= lr / (1 - beta1**t) * m / (np.sqrt(v / (1 - beta2**t)) + eps)
