# SPDX-License-Identifier: Apache-2.0
"""DIS as published."""

import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.processes.base import Process, at
from numpyro_sbtm.core.processes.control import euler_steps, exact_steps, make_control
from numpyro_sbtm.core.processes.grids import vp_grid
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Gaussian, standard_normal

__all__ = ["dis_control"]


def dis_control(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
    integrator: str = "exact",
) -> Process:
    """Make DIS as published: the control of a variance-preserving diffusion, for comparison with `dis`.

    The score enters interpolated from the prior's to the target's. With h = ½ ∫ β over a step the kernels are
    exact, as in `dds` on another grid, or by Euler-Maruyama,

        F_k = N((1-h) x + 2h σ u, 2h σ²),      B_k = N(x_{k+1} / (1+h), 2h σ² / (1+h)²);

    B_k is the normalised kernel for which the published weights are right but for a constant.

    Args:
        net: as in `dis`, with one component.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the reference.
        score_clip: bound c on each coordinate of the score feature.
        integrator: 'exact' or 'euler'.

    Returns:
        The process.

    Raises:
        ValueError: for another integrator.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, section 3 and appendix A.9.

    Examples:
        >>> from numpyro_sbtm.core.processes.dis_control import dis_control
        >>> from numpyro_sbtm.networks import denoiser
        >>> dis_control(denoiser(8), 2, num_steps=4, integrator="euler").num_steps
        4
    """
    if integrator not in ("exact", "euler"):
        raise ValueError(f"`integrator` must be 'exact' or 'euler', got {integrator!r}.")
    signal = vp_grid(num_steps)
    control = make_control(net, signal, scale, score_clip)
    steps = (euler_steps if integrator == "euler" else exact_steps)(signal)
    late = np.arange(num_steps + 1) / num_steps

    def forward(
        params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        interpolated = at(late, k, x) * (score + x / scale**2) - x / scale**2
        return steps.forward(scale, k, x, control(params, k, x, interpolated)[0])

    def backward(
        params: Params, k: Int[Array, ""], x_next: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        del params, score
        return steps.backward(scale, k, x_next)

    prior = standard_normal(dim, scale)
    return Process(num_steps, lambda params: prior, forward, backward, lambda k, x: prior.log_prob(x), signal)
