# SPDX-License-Identifier: Apache-2.0
"""Controlled Monte Carlo diffusion."""

import jax.numpy as jnp
import numpy as np

from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.processes.base import Process, at
from numpyro_sbtm.core.processes.control import make_control
from numpyro_sbtm.core.processes.grids import check_num_steps
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Gaussian, standard_normal

__all__ = ["cmcd"]


def cmcd(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
    duration: float = 4.0,
) -> Process:
    """Make controlled Monte Carlo diffusion (CMCD): annealed Langevin, corrected in both directions.

    The path of densities is π_k ∝ N(0, σ² I)^(1-β_k) ρ^β_k with β_k = k / T. With a = exp(-duration / T) the
    reference's part of the drift is integrated exactly:

        F_k = N(a x + σ (1-a) (β_k s̃(x) + u(x, k)), σ² (1-a²)),
        B_k = N(a x' + σ (1-a) (β_{k+1} s̃(x') - u(x', k+1)), σ² (1-a²)),      x' = x_{k+1}.

    One network serves both: the solution is unique.

    Args:
        net: as in `dis`, with one component.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the prior.
        score_clip: bound c on each coordinate of the score feature.
        duration: Langevin time, in relaxation times of the prior.

    Returns:
        The process.

    Reference:
        Vargas et al. (2024), Transport meets variational inference, arXiv:2307.01050.

    Examples:
        >>> from numpyro_sbtm.core.processes.cmcd import cmcd
        >>> from numpyro_sbtm.networks import denoiser
        >>> cmcd(denoiser(8), 2, num_steps=4).num_steps
        4
    """
    check_num_steps(num_steps)
    if not duration > 0:
        raise ValueError(f"`duration` must be positive, got {duration}.")
    beta = np.arange(num_steps + 1) / num_steps
    keep = float(np.exp(-duration / num_steps))
    control = make_control(net, beta, scale, score_clip)

    def step(sign: float, params: Params, k, x, score) -> Gaussian:  # type: ignore[no-untyped-def]
        u, _ = control(params, k, x, score)
        drift = at(beta, k, x) * control.feature(x, score) + sign * u
        return Gaussian(
            keep * x + scale * (1.0 - keep) * drift, jnp.full_like(x, scale * (1.0 - keep**2) ** 0.5)
        )

    prior = standard_normal(dim, scale)
    return Process(
        num_steps,
        lambda params: prior,
        lambda params, k, x, score: step(1.0, params, k, x, score),
        lambda params, k, x_next, score: step(-1.0, params, k + 1, x_next, score),
        lambda k, x: prior.log_prob(x),
        beta,
    )
