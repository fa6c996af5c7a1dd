# SPDX-License-Identifier: Apache-2.0
"""The general bridge."""

from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.processes.control import exact_steps, make_control
from numpyro_sbtm.core.processes.grids import log_snr_grid
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Gaussian, standard_normal

__all__ = ["bridge"]


def bridge(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
) -> Process:
    """Make the general bridge: both drifts learned, both kernels in density form.

        F_k = N(√(1-α_k) x + σ α_k u(x, k), σ² α_k),
        B_k = N(√(1-α_k) x_{k+1} + σ α_k v(x_{k+1}, k+1), σ² α_k).

    No divergence of a network is needed, since both densities are known. The solution is not unique.

    Args:
        net: `pair` of a net as in `dis`, with one component: its parameters are a pair.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the prior.
        score_clip: bound c on each coordinate of the score feature.

    Returns:
        The process.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, section 2 (the general bridge).

    Examples:
        >>> from numpyro_sbtm.core.net import pair
        >>> from numpyro_sbtm.core.processes.bridge import bridge
        >>> from numpyro_sbtm.networks import denoiser
        >>> bridge(pair(denoiser(8)), 2, num_steps=4).num_steps
        4
    """
    signal = log_snr_grid(num_steps)
    control, steps = make_control(net, signal, scale, score_clip), exact_steps(signal)

    def forward(
        params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        return steps.forward(scale, k, x, control(params[0], k, x, score)[0])

    def backward(
        params: Params, k: Int[Array, ""], x_next: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        return steps.backward(scale, k, x_next, control(params[1], k + 1, x_next, score)[0])

    prior = standard_normal(dim, scale)
    return Process(num_steps, lambda params: prior, forward, backward, lambda k, x: prior.log_prob(x), signal)
