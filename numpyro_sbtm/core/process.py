# SPDX-License-Identifier: Apache-2.0
"""Pairs of discrete Markov chains, forward (noise to posterior) and backward (posterior to noise).

Notation, used in every formula of this module: T steps; ``x_0`` is noise and ``x_T`` a draw. The
backward chain adds noise by exact Ornstein-Uhlenbeck steps with variance σ² at rest,

    B_k(x_k | x_{k+1}) = N(√(1-α_k) x_{k+1}, σ² α_k),

so that with A_k = ∏_{j≥k} (1-α_j) and A_T = 1, x_k given x_T is N(√A_k x_T, σ² (1-A_k)).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.mixture import Mixture, moments, normal
from numpyro_sbtm.core.target import Key, Params
from numpyro_sbtm.core.transition import Gaussian, Transition

__all__ = ["Net", "Process", "at", "check_num_steps", "dis", "log_snr_grid"]


class Net(NamedTuple):
    """All that the mathematics knows of a network: any pair of pure functions.

    Attributes:
        init: ``(key, d) -> params``, a plain pytree of arrays.
        apply: ``(params, *inputs of one point) -> outputs of one point``; what the inputs and outputs
            are is the contract between a network and the function that takes it.
        features: ``(params, *inputs of one point) -> φ``, shape ``[p]``, where ``params`` is a vector whose
            last p d entries are an output layer: ``apply`` gives Θᵀφ, with Θ these entries as a matrix of
            shape ``[p, d]``. None: there is no such layer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.process import Net
        >>> linear = Net(lambda key, d: jax.random.normal(key, (d, d)), lambda params, x: params @ x)
        >>> linear.apply(linear.init(jax.random.key(0), 3), jnp.ones(3)).shape
        (3,)
    """

    init: Callable[[Key, int], Params]
    apply: Callable[..., Any]
    features: Callable[..., Float[Array, " p"]] | None = None


Chain = Callable[[Params, Int[Array, ""], Float[Array, " d"], Float[Array, "*s d"]], Transition]
"""``(params, k, x, score of the target at x) -> Transition``, for one point; of two scores where the process
has `Process.look`."""


class Process(NamedTuple):
    """Two discrete Markov chains on one grid.

    The target's score at every visited point is an argument, so that it is evaluated once and kept.

    Attributes:
        num_steps: the number of steps, T.
        init: the distribution of x_0, a function of the parameters.
        forward: F_k, the distribution of x_{k+1} given x_k.
        backward: B_k, the distribution of x_k given x_{k+1}.
        marginal: ``(k, x) -> log density``, a guess of the law of x_k; that of x_T guesses the target.
        share: A_k, how far x_k is on the way from noise, 0, to the draw, 1, shape ``[T+1]``.
        look: ``(k, x, score at x) -> point``, where the chains want the target's score, too: they are then
            given both, shape ``[2, d]``. None: nowhere.
        coarse: ``points -> Process``, the same process on some points of its grid, shape ``[m+1]``,
            increasing from 0 to T; None where it is not known between other points than neighbours.
        learns_reference: whether the law of x_0 or the size of the noise depends on the parameters.
        continuous: whether the chains are continuous functions of the points. Across a jump the gradient of
            a mean over paths is not that along the paths.
    """

    num_steps: int
    init: Callable[[Params], Transition]
    forward: Chain
    backward: Chain
    marginal: Callable[[Int[Array, ""], Float[Array, " d"]], Float[Array, ""]]
    share: np.ndarray | Float[Array, " T1"]
    look: Callable[[Int[Array, ""], Float[Array, " d"], Float[Array, " d"]], Float[Array, " d"]] | None = None
    coarse: Callable[[Int[Array, " m1"]], "Process"] | None = None
    learns_reference: bool = False
    continuous: bool = True


def at(
    table: np.ndarray | Float[Array, " T"], k: Int[Array, ""], like: Float[Array, " d"]
) -> Float[Array, ""]:
    """Look up the entry of a step in a table that was computed in float64."""
    return jnp.asarray(table, like.dtype)[k]


def check_num_steps(num_steps: int) -> None:
    """Refuse a grid without a step."""
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")


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
    check_num_steps(num_steps)
    snr = np.linspace(low, high, num_steps) if num_steps > 1 else np.array([low])
    return np.append(1.0 / (1.0 + np.exp(-snr)), 1.0)


def dis(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 3.0,
    reference: Mixture | None = None,
    look_ahead: bool = False,
) -> Process:
    """Make a time-reversed diffusion sampler (DIS) with exact Ornstein-Uhlenbeck kernels.

    The reference is a mixture of normal distributions Σ_c p_c N(μ_c, S_c), the best guess of the target.
    If x_T had that law, x_T given x_k would be a mixture too, with weights p_c(x_k), means m_c(x_k) and
    covariances V_c. A network corrects all three:

        F_k(x' | x) = Σ_c softmax(log p_c(x) + l_c) N(c_K D_c + c_x x,
                                                     σ² α_k (1-A_{k+1})/(1-A_k) I + c_K² V_c exp(r)),
        c_K = √A_{k+1} α_k / (1-A_k),      c_x = √(1-α_k) (1-A_{k+1}) / (1-A_k),
        D_c = m_c(x) + √V_c (m + gate s̃),
        s̃   = clip(√(A_k (1-A_k)) σ (∇log ρ(x) - ∇log reference(x)), ±score_clip).

    With network outputs l = m = r = gate = 0 this is the exact time reversal for the reference as target,
    at every number of steps: all weights are then equal. The score enters relative to the reference's, and
    the mean moves in units of what each component leaves uncertain: a narrow one is not thrown off by a
    network that has yet to learn.

    With one normal distribution as reference the exact mean has m = √V E[∇log ρ(x_T) - ∇log reference(x_T)]
    given x_k: it depends on the score where the path will end. With ``look_ahead`` there is a second feature,
    from the score at a guess of x_T, namely D_c of the likeliest component with m = 0 and gate = 1: a step of
    a fixed-point iteration. A step then costs two target gradients.

    Args:
        net: ``apply(params, log_snr, z, s̃)`` returns ``(m, r, gate, l)`` of shapes ``[d]``, ``[d]``,
            ``[]`` and ``[K]``, from the point in units of its mean and deviations under the reference, z;
            ``log_snr`` depends on the step alone. r is in the coordinates of a component's eigenvectors.
            With ``look_ahead`` s̃ has shape ``[2, d]``, and gate ``[2]``.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the noise.
        score_clip: bound on each coordinate of the score feature.
        reference: the mixture; None for N(0, σ² I).
        look_ahead: evaluate the target's score at a guess of the end point, too.

    Returns:
        The process; its weights are exact at any T.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, section 3 (DIS); Ho et al. (2020),
        arXiv:2006.11239, eq. 7 (the bridge between two noise levels).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.process import Net, dis
        >>> still = Net(lambda key, d: (), lambda p, t, x, s: (0 * x, 0 * x, jnp.zeros(()), jnp.zeros(1)))
        >>> process = dis(still, dim=2, num_steps=4)
        >>> process.forward((), jnp.array(3), jnp.ones(2), -jnp.ones(2)).std.shape
        (1, 2)
    """
    reference = normal(dim, scale) if reference is None else reference
    share = log_snr_grid(num_steps)
    noise = 1.0 - share  # exact enough in float64, and only then rounded
    log_share = np.log(share)

    def coarse(points: Int[Array, " m1"]) -> Process:
        there = jnp.asarray(log_share)[points]
        alpha = -jnp.expm1(there[:-1] - there[1:])
        grid = jnp.asarray(share)[points], jnp.asarray(noise)[points], alpha
        return _reversal(net, reference, scale, score_clip, look_ahead, *grid)

    alpha = 1.0 - share[:-1] / share[1:]
    grid = share, noise, alpha
    return _reversal(net, reference, scale, score_clip, look_ahead, *grid)._replace(coarse=coarse)


def _reversal(
    net: Net,
    reference: Mixture,
    scale: float,
    score_clip: float,
    look_ahead: bool,
    share: np.ndarray | Float[Array, " T1"],
    noise: np.ndarray | Float[Array, " T1"],
    alpha: np.ndarray | Float[Array, " T"],
) -> Process:
    """Make `dis` on a grid of shares A_k, with 1-A_k and α_k given, since they must not be rounded."""
    xp = np if isinstance(share, np.ndarray) else jnp
    centre, spread = moments(reference)
    root_share = xp.sqrt(share)
    keep = xp.sqrt(1.0 - alpha)
    denoiser_weight = xp.sqrt(share[1:]) * alpha / noise[:-1]
    point_weight = keep * noise[1:] / noise[:-1]
    bridge_var = scale**2 * alpha * noise[1:] / noise[:-1]
    noise_std = scale * xp.sqrt(alpha)
    log_snr = xp.log(share[:-1]) - xp.log(noise[:-1])

    def noised(root: Float[Array, ""], noise_var: Float[Array, ""]) -> Mixture:
        """The law of root x_T plus white noise, for x_T from the reference."""
        std = jnp.sqrt(root**2 * reference.std**2 + noise_var)
        return reference._replace(centre=root * reference.centre, std=std)

    def law(k: Int[Array, ""], x: Float[Array, " d"]) -> Mixture:
        """The law of x_k, for x_T from the reference."""
        return noised(at(root_share, k, x), scale**2 * at(noise, k, x))

    def informed(
        k: Int[Array, ""], place: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Float[Array, " d"]:
        """The feature of a score, for x_k."""
        unit = at(root_share, k, place) * scale * jnp.sqrt(at(noise, k, place))
        return jnp.clip(unit * (score - reference.score(place)), -score_clip, score_clip)

    def end(
        k: Int[Array, ""], x: Float[Array, " d"], shift: Float[Array, " d"]
    ) -> tuple[Float[Array, "K d"], Float[Array, "K d"]]:
        """The mean of x_T given x_k, with a shift, and its deviations, in each component's coordinates."""
        here = law(k, x)
        gain = at(root_share, k, x) * reference.std**2 / here.std**2
        std = reference.std / here.std * scale * jnp.sqrt(at(noise, k, x))
        mean = reference.centre + gain * (reference.rotate(x) - here.centre)
        return mean + std * reference.rotate(shift), std

    def look(k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]) -> Float[Array, " d"]:
        likeliest = jnp.argmax(law(k, x).joint(x))
        guess = end(k, x, informed(k, x, score))[0][likeliest]
        return guess if reference.rotation is None else reference.rotation[likeliest] @ guess

    def features(
        k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, "*s d"]
    ) -> Float[Array, "*s d"]:
        if not look_ahead:
            return informed(k, x, score)
        first = informed(k, x, score[0])
        second = informed(k, look(k, x, score[0]), score[1])
        # the guess is not on the path: that there is no score there must not end it
        return jnp.stack([first, jnp.where(jnp.all(jnp.isfinite(second)), second, first)])

    def forward(
        params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, "*s d"]
    ) -> Mixture:
        root, noise_var = at(root_share, k, x), scale**2 * at(noise, k, x)
        feature = features(k, x, score)
        # modes may lie a hundred deviations apart: the network sees all of them within a few units
        seen = (x - root * centre) / jnp.sqrt(root**2 * spread**2 + noise_var)
        mean, log_var, gate, logits = net.apply(params, at(log_snr, k, x), seen, feature)
        denoised, std = end(k, x, mean + jnp.tensordot(gate, feature, gate.ndim))
        var = std**2 * jnp.exp(log_var)
        weight = at(denoiser_weight, k, x)
        return Mixture(
            jax.nn.log_softmax(law(k, x).joint(x) + logits),
            reference.rotation,
            weight * denoised + at(point_weight, k, x) * reference.rotate(x),
            jnp.sqrt(at(bridge_var, k, x) + weight**2 * var),
        )

    def backward(
        params: Params, k: Int[Array, ""], x_next: Float[Array, " d"], score: Float[Array, "*s d"]
    ) -> Gaussian:
        del params, score
        std = jnp.full_like(x_next, at(noise_std, k, x_next))
        return Gaussian(at(keep, k, x_next) * x_next, std)

    def marginal(k: Int[Array, ""], x: Float[Array, " d"]) -> Float[Array, ""]:
        return law(k, x).log_prob(x)

    init = noised(jnp.asarray(root_share[0]), jnp.asarray(scale**2 * noise[0]))
    ahead = look if look_ahead else None
    # which component is the likeliest changes at once
    continuous = not look_ahead or len(reference.log_weight) == 1
    return Process(
        len(alpha), lambda params: init, forward, backward, marginal, share, ahead, continuous=continuous
    )
