"""Initial values of the tensors of a new model."""

import math

import numpy as np

from deltanet_ref.backends.interface import Backend
from deltanet_ref.model.config import Config
from deltanet_ref.model.tensors import expected_tensors
from deltanet_ref.model.weights import Weights

STANDARD_DEVIATION = 0.02  # of matrices; smaller for those that write into the residual stream, see below
TO_RESIDUAL = ("ssm_out.weight", "attn_output.weight", "ffn_down.weight")
DECAY = (1.0, 16.0)  # -ssm_a = exp(A_log), uniform
STEP_SIZE = (1e-3, 0.1)  # softplus(dt_bias), log-uniform; a state decays over 1 / (step size x decay) tokens


def new_model(config: Config, seed: int, backend: Backend, dtype: str = "float32") -> Weights:
    """Draw the tensors of a new model, dense arrays.

    matrices          normal, 0.02; ssm_out, attn_output, ffn_down 0.02 / sqrt(2 layers), because 2 layers of them are
                      added up in the residual stream (Radford et al. 2019, section 2.3)
    ssm_a, ssm_dt     decay uniform in [1, 16], step size log-uniform in [0.001, 0.1] (Gu and Dao 2023, section 3.6)
    convolution       uniform in +- 1 / sqrt(K);  norms 1
    """
    rng = np.random.default_rng(seed)
    drawn = {
        name: _initial(name, spec.shape, config, rng).astype(dtype) for name, spec in expected_tensors(config).items()
    }
    return Weights(config, drawn, dtype, backend)


def _initial(name, shape, config, rng):
    if name.endswith("ssm_a"):
        return -rng.uniform(*DECAY, shape)
    if name.endswith("ssm_dt.bias"):
        return np.log(np.expm1(np.exp(rng.uniform(*np.log(STEP_SIZE), shape))))  # softplus(this) = step size
    if name.endswith("ssm_conv1d.weight"):
        return rng.uniform(-1, 1, shape) / math.sqrt(config.linear_conv_kernel_dim)
    if len(shape) == 1:
        return np.ones(shape)
    residual = math.sqrt(2 * config.num_hidden_layers) if name.endswith(TO_RESIDUAL) else 1.0
    return rng.standard_normal(shape) * (STANDARD_DEVIATION / residual)
