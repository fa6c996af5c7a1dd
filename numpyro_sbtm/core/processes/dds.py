# SPDX-License-Identifier: Apache-2.0
"""The denoising diffusion sampler."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.processes.control import exact_steps, make_control
from numpyro_sbtm.core.processes.grids import cosine_grid
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Gaussian, standard_normal

__all__ = ["dds"]


def dds(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
    learn_variance: bool = True,
) -> Process:
    """Make a denoising diffusion sampler (DDS): exponential integrator, cosine⁴ grid.

        F_k = N(√(1-α_k) x + σ α_k u, σ² α_k exp(r)),      B_k = N(√(1-α_k) x_{k+1}, σ² α_k).

    Args:
        net: as in `dis`, with one component.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the reference.
        score_clip: bound c on each coordinate of the score feature.
        learn_variance: learn r; False for the paper's fixed variance.

    Returns:
        The process.

    Reference:
        Vargas, Grathwohl & Doucet (2023), Denoising diffusion samplers, arXiv:2302.13834, section 3.

    Examples:
        >>> from numpyro_sbtm.core.processes.dds import dds
        >>> from numpyro_sbtm.networks import denoiser
        >>> dds(denoiser(8), 2, num_steps=4).num_steps
        4
    """
    signal = cosine_grid(num_steps)
    control, steps = make_control(net, signal, scale, score_clip), exact_steps(signal)

    def forward(
        params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        u, log_var = control(params, k, x, score)
        kernel = steps.forward(scale, k, x, u)
        return kernel._replace(std=kernel.std * jnp.exp(0.5 * log_var)) if learn_variance else kernel

    def backward(
        params: Params, k: Int[Array, ""], x_next: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        del params, score
        return steps.backward(scale, k, x_next)

    prior = standard_normal(dim, scale)
    return Process(num_steps, lambda params: prior, forward, backward, lambda k, x: prior.log_prob(x), signal)
