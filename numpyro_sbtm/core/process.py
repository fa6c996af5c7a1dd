# SPDX-License-Identifier: Apache-2.0
"""Pairs of discrete Markov chains, forward (noise to posterior) and backward (posterior to noise).

Notation, used in every formula of this module: T steps; ``x_0`` is noise and ``x_T`` a draw. The
backward chain adds noise by exact Ornstein-Uhlenbeck steps with variance σ² at rest,

    B_k(x_k | x_{k+1}) = N(√(1-α_k) x_{k+1}, σ² α_k),

so that with A_k = ∏_{j≥k} (1-α_j) and A_T = 1, x_k given x_T is N(√A_k x_T, σ² (1-A_k)).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.target import Key, Params
from numpyro_sbtm.core.transition import Gaussian, Transition, standard_normal

__all__ = ["Net", "Process", "dis", "log_snr_grid"]


class Net(NamedTuple):
    """All that the mathematics knows of a network: any pair of pure functions.

    Attributes:
        init: ``(key, d) -> params``, a plain pytree of arrays.
        apply: ``(params, *inputs of one point) -> outputs of one point``; what the inputs and outputs
            are is the contract between a network and the function that takes it.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.process import Net
        >>> linear = Net(lambda key, d: jax.random.normal(key, (d, d)), lambda params, x: params @ x)
        >>> linear.apply(linear.init(jax.random.key(0), 3), jnp.ones(3)).shape
        (3,)
    """

    init: Callable[[Key, int], Params]
    apply: Callable[..., Any]


Chain = Callable[[Params, Int[Array, ""], Float[Array, " d"], Float[Array, " d"]], Transition]
"""``(params, k, x, score of the target at x) -> Transition``, for one point."""


class Process(NamedTuple):
    """Two discrete Markov chains on one grid.

    The target's score at every visited point is an argument, so that it is evaluated once and kept.

    Attributes:
        num_steps: the number of steps, T.
        init: the distribution of x_0.
        forward: F_k, the distribution of x_{k+1} given x_k.
        backward: B_k, the distribution of x_k given x_{k+1}.
    """

    num_steps: int
    init: Transition
    forward: Chain
    backward: Chain


def log_snr_grid(num_steps: int, low: float = -6.0, high: float = 7.5) -> np.ndarray:
    """Compute the shares A_0 < ... < A_T = 1 of the draw in the points of a path.

    The log signal-to-noise ratios ``log(A_k / (1-A_k))`` of the first T points are equally spaced.

    Args:
        num_steps: the number of steps, T >= 1.
        low: log signal-to-noise ratio of x_0.
        high: log signal-to-noise ratio of x_{T-1}.

    Returns:
        A, shape ``[T+1]``, in float64.

    Examples:
        >>> from numpyro_sbtm.core.process import log_snr_grid
        >>> log_snr_grid(2, -2.0, 2.0).round(3).tolist()
        [0.119, 0.881, 1.0]
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
    snr = np.linspace(low, high, num_steps) if num_steps > 1 else np.array([low])
    return np.append(1.0 / (1.0 + np.exp(-snr)), 1.0)


def dis(net: Net, dim: int, num_steps: int = 32, scale: float = 1.0, score_clip: float = 3.0) -> Process:
    """Make a time-reversed diffusion sampler (DIS) with exact Ornstein-Uhlenbeck kernels.

    The network predicts the mean D and the variance v of the end point x_T given x_k; then the step
    that is exact for a Gaussian x_T is

        F_k(x' | x) = N(c_K D + c_x x, σ² α_k (1-A_{k+1})/(1-A_k) + c_K² v),
        c_K = √A_{k+1} α_k / (1-A_k),      c_x = √(1-α_k) (1-A_{k+1}) / (1-A_k),
        D   = √A_k x + σ (m + gate s̃),      v   = σ² (1-A_k) exp(r),
        s̃   = clip(√A_k (1-A_k) (σ ∇log ρ(x) + x/σ), ±score_clip).

    With network outputs m = r = gate = 0 this is the exact time reversal for a target N(0, σ² I), at
    every number of steps. The score enters relative to that reference, so it vanishes there too.

    Args:
        net: ``apply(params, log_snr, x, s̃)`` returns ``(m, r, gate)`` of shapes ``[d]``, ``[d]``, ``[]``;
            ``log_snr`` depends on the step alone.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the noise.
        score_clip: bound on each coordinate of the score feature.

    Returns:
        The process; its weights are exact at any T.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, section 3 (DIS); Ho et al. (2020),
        arXiv:2006.11239, eq. 7 (the bridge between two noise levels).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.process import Net, dis
        >>> still = Net(lambda key, d: (), lambda p, t, x, s: (0 * x, 0 * x, jnp.zeros(())))
        >>> process = dis(still, dim=2, num_steps=4)
        >>> process.forward((), jnp.array(3), jnp.ones(2), -jnp.ones(2)).mean.shape
        (2,)
    """
    share = log_snr_grid(num_steps)
    alpha = 1.0 - share[:-1] / share[1:]
    noise = 1.0 - share  # (1-A_k): exact enough in float64, and only then rounded
    denoiser_weight = np.sqrt(share[1:]) * alpha / noise[:-1]
    point_weight = np.sqrt(1.0 - alpha) * noise[1:] / noise[:-1]
    bridge_var = scale**2 * alpha * noise[1:] / noise[:-1]
    log_snr = np.log(share[:-1]) - np.log(noise[:-1])

    def at(table: np.ndarray, k: Int[Array, ""], like: Float[Array, " d"]) -> Float[Array, ""]:
        return jnp.asarray(table, like.dtype)[k]

    def forward(
        params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        root, rest = at(np.sqrt(share), k, x), at(noise, k, x)
        relative = jnp.clip(root * rest * (scale * score + x / scale), -score_clip, score_clip)
        mean, log_var, gate = net.apply(params, at(log_snr, k, x), x / scale, relative)
        denoised = root * x + scale * (mean + gate * relative)
        var = scale**2 * rest * jnp.exp(log_var)
        weight = at(denoiser_weight, k, x)
        return Gaussian(
            weight * denoised + at(point_weight, k, x) * x,
            jnp.sqrt(at(bridge_var, k, x) + weight**2 * var),
        )

    def backward(
        params: Params, k: Int[Array, ""], x_next: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        del params, score
        std = jnp.full_like(x_next, at(scale * np.sqrt(alpha), k, x_next))
        return Gaussian(at(np.sqrt(1.0 - alpha), k, x_next) * x_next, std)

    return Process(num_steps, standard_normal(dim, scale), forward, backward)
