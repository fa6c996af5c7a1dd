# SPDX-License-Identifier: Apache-2.0
"""The path integral sampler."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.processes.base import Process, at
from numpyro_sbtm.core.processes.control import make_control
from numpyro_sbtm.core.processes.grids import check_num_steps
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Gaussian, Pinned

__all__ = ["pis"]


def pis(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
    denoise: bool = True,
) -> Process:
    """Make a path integral sampler (PIS): a Brownian motion from the origin, with exact bridge kernels.

    With τ_k = k / T and Δ = 1 / T, uncontrolled paths end in the reference N(0, σ² I). The backward chain is
    the Brownian bridge to the origin, B_k = N((τ_k / τ_{k+1}) x_{k+1}, σ² Δ τ_k / τ_{k+1}). The forward is

        F_k = N(x + σ Δ u, σ² Δ)                                             (the papers' control), or
        F_k = N(x + w (D - x), σ² Δ (1-τ_{k+1}) / (1-τ_k) + w² σ² (1-τ_k) exp(r)),    w = Δ / (1-τ_k),

    the bridge to an end point that the network predicts, with mean D = x + σ √(1-τ_k) u.

    Args:
        net: as in `dis`, with one component.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the reference.
        score_clip: bound c on each coordinate of the score feature.
        denoise: predict the end point, with its variance; False for the papers' control.

    Returns:
        The process.

    Raises:
        ValueError: for values out of range.

    Reference:
        Zhang & Chen (2022), Path integral sampler, arXiv:2111.15141; Richter & Berner (2024),
        arXiv:2307.01198, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Target, simulate
        >>> from numpyro_sbtm.core.processes.pis import pis
        >>> from numpyro_sbtm.networks import denoiser
        >>> net = denoiser(8)
        >>> target = Target(lambda x: -0.5 * jnp.sum(x**2), 2)
        >>> params = net.init(jax.random.key(0), 2)
        >>> path = simulate(pis(net, 2, num_steps=4), params, target, jax.random.key(0))
        >>> round(float(path.log_weight), 3)  # log(2 pi), on every path
        1.838
    """
    check_num_steps(num_steps)
    time = np.arange(num_steps + 1) / num_steps
    step = 1.0 / num_steps
    left = 1.0 - time[:-1]
    control = make_control(net, time, scale, score_clip)

    def forward(
        params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        u, log_var = control(params, k, x, score)
        if not denoise:
            return Gaussian(x + scale * step * u, jnp.full_like(x, scale * step**0.5))
        weight = at(step / left, k, x)
        bridge_var = at(step * (left - step) / left, k, x)
        end_var = weight**2 * at(left, k, x) * jnp.exp(log_var)
        mean = x + weight * scale * jnp.sqrt(at(left, k, x)) * u
        return Gaussian(mean, scale * jnp.sqrt(jnp.maximum(bridge_var, 0.0) + end_var))

    def backward(
        params: Params, k: Int[Array, ""], x_next: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Pinned:
        del params, score
        ratio = at(time[:-1] / time[1:], k, x_next)
        return Pinned(ratio * x_next, jnp.full_like(x_next, scale * step**0.5) * jnp.sqrt(ratio))

    def marginal(k: Int[Array, ""], x: Float[Array, " d"]) -> Float[Array, ""]:
        return Pinned(jnp.zeros_like(x), jnp.full_like(x, scale) * jnp.sqrt(at(time, k, x))).log_prob(x)

    origin = Pinned(jnp.zeros(dim), jnp.zeros(dim))
    return Process(num_steps, lambda params: origin, forward, backward, marginal, time)
