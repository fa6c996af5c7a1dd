# SPDX-License-Identifier: Apache-2.0
"""Annealing: densities between a first law and the target, and when to pass from one to the next."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float

from numpyro_sbtm.core.bisection import furthest
from numpyro_sbtm.core.quasi import quasi_normal
from numpyro_sbtm.core.target import Target
from numpyro_sbtm.core.transition import Gaussian, Transition

__all__ = ["Annealing", "conditional_ess", "convolution", "dilation", "geometric", "next_level", "tempering"]


class Annealing(NamedTuple):
    """A path of densities that ends in the target at level 1.

    Attributes:
        at: ``(target, first law, level) -> Target``, the density of a level in [0, 1].
        level: the level at a share of the way in [0, 1]; it is 1 before the end, so that particles that lag
            arrive.
        conditional_ess: where given, the levels follow the weights instead, and each step keeps this
            conditional effective sample fraction.
        calls: of the target at every point, for its own score and that of the level.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.annealing import geometric
        >>> from numpyro_sbtm.core.target import Target
        >>> from numpyro_sbtm.core.transition import standard_normal
        >>> target = Target(lambda x: -jnp.sum((x - 3) ** 2), 1)
        >>> half = geometric().at(target, standard_normal(1), 0.5)
        >>> round(float(half.logdensity_fn(jnp.zeros(1)) - half.logdensity_fn(jnp.ones(1))), 4)  # 1/4 - 5/2
        -2.25
    """

    at: Callable[[Target, Transition, Float[Array, ""]], Target]
    level: Callable[[Float[Array, ""]], Float[Array, ""]]
    conditional_ess: float | None = None
    calls: int = 1


def _ramp(hold: float, first: float | None = None) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    """Make levels that rise evenly from the first one, by default 0, and then stay at 1."""
    if not 0 <= hold < 1:
        raise ValueError(f"`hold` must be at least 0 and below 1, got {hold}.")
    if first is not None and not 0 < first <= 1:
        raise ValueError(f"`first` must be above 0 and at most 1, got {first}.")
    start = first or 0.0
    return lambda share: jnp.minimum(start + (1.0 - start) * share / (1.0 - hold), 1.0)


def geometric(hold: float = 0.25, conditional_ess: float | None = None) -> Annealing:
    """Make the geometric path, base^(1-λ) π^λ.

    Args:
        hold: share of the way, at its end, during which the target itself is the density.
        conditional_ess: fraction between 0 and 1 for adaptive levels; None for a linear ramp.

    Raises:
        ValueError: for values out of range.

    Reference:
        Neal (2001), Annealed importance sampling, eq. 3. It can be slow where modes are born with wrong
        masses: Chehab & Korba (2024), arXiv:2406.14040; weights repair what it gets wrong.
    """
    if conditional_ess is not None and not 0 < conditional_ess < 1:
        raise ValueError(f"`conditional_ess` must lie between 0 and 1, got {conditional_ess}.")

    def at(target: Target, base: Transition, level: Float[Array, ""]) -> Target:
        def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
            return level * target.logdensity_fn(x) + (1.0 - level) * base.log_prob(x)

        return Target(logdensity, target.dim)

    return Annealing(at, _ramp(hold), conditional_ess)


def dilation(first: float = 0.2, hold: float = 0.25) -> Annealing:
    """Make the dilation path, the law of λ x for x from the target: π(x / λ) / λ^d.

    Its score is ∇log π(x / λ) / λ. Modes move apart instead of being born, and keep their masses.

    Args:
        first: the first λ, above 0.
        hold: share of the way, at its end, during which the target itself is the density.

    Raises:
        ValueError: for values out of range.

    Reference:
        Chehab & Korba (2024), A practical diffusion path for sampling, arXiv:2406.14040, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.annealing import dilation
        >>> from numpyro_sbtm.core.target import Target
        >>> from numpyro_sbtm.core.transition import standard_normal
        >>> half = dilation().at(Target(lambda x: -0.5 * jnp.sum(x**2), 1), standard_normal(1), 0.5)
        >>> jax.grad(half.logdensity_fn)(jnp.ones(1)).tolist()  # N(0, 1/4)
        [-4.0]
    """

    def at(target: Target, base: Transition, level: Float[Array, ""]) -> Target:
        del base
        return Target(lambda x: target.logdensity_fn(x / level) - target.dim * jnp.log(level), target.dim)

    return Annealing(at, _ramp(hold, first), calls=2)


def convolution(num_points: int = 16, first: float = 0.2, hold: float = 0.25) -> Annealing:
    """Make the diffusion path, the law of λ x + √(1 - λ²) z for x from the target and z from the first law.

    Modes part from one another as they do in a diffusion backwards in time, and keep their masses. The noise
    z takes K fixed points with equal probability, in the place of all of R^d, so that the density has a
    formula: the mean of K shifted copies of the target's dilation. The points are of low discrepancy for a
    normal first law, and draws of any other. In few dimensions the mean is smooth; in more the copies stand
    apart. It costs K gradients of the target at every point.

    Args:
        num_points: K, at least 2.
        first: the first λ, above 0.
        hold: share of the way, at its end, during which the target itself is the density.

    Raises:
        ValueError: for values out of range.

    Reference:
        Song et al. (2021), arXiv:2011.13456, section 3.4: the noising that preserves the variance, without
        its formula for z of any value; Chehab & Korba (2024), arXiv:2406.14040, section 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.annealing import convolution
        >>> from numpyro_sbtm.core.target import Target
        >>> from numpyro_sbtm.core.transition import standard_normal
        >>> normal = Target(lambda x: -0.5 * jnp.sum(x**2), 1)  # is its own noising
        >>> half = convolution(64).at(normal, standard_normal(1), 0.5)
        >>> round(float(half.logdensity_fn(jnp.zeros(1)) - half.logdensity_fn(jnp.ones(1))), 2)
        0.5
    """
    if num_points < 2:
        raise ValueError(f"`num_points` must be at least 2, got {num_points}.")

    def at(target: Target, base: Transition, level: Float[Array, ""]) -> Target:
        if isinstance(base, Gaussian):
            points = quasi_normal(num_points, target.dim)
            noise = base.mean + base.std * (points - jnp.mean(points, 0))
        else:
            noise = jax.vmap(base.sample)(jax.random.split(jax.random.key(0), num_points))
        size = jnp.sqrt(jnp.maximum(1.0 - level**2, 0.0))

        def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
            copies = jax.vmap(lambda z: target.logdensity_fn((x - size * z) / level))(noise)
            return logsumexp(copies) - jnp.log(num_points) - target.dim * jnp.log(level)

        return Target(logdensity, target.dim)

    return Annealing(at, _ramp(hold, first), calls=1 + num_points)


def tempering(first: float = 0.05, hold: float = 0.25) -> Annealing:
    """Make the path of powers of the target, π^λ.

    The velocity ∇log π - c s of a noise scaled by c is c times that of the power λ = 1 / c: the same
    particles, in a time that runs c times as fast.

    Args:
        first: the first λ, above 0.
        hold: share of the way, at its end, during which the target itself is the density.

    Raises:
        ValueError: for values out of range.

    Reference:
        Ilin, Sushko & Hu (2025), arXiv:2504.18130, whose images are made with scaled noise.
    """

    def at(target: Target, base: Transition, level: Float[Array, ""]) -> Target:
        del base
        return Target(lambda x: level * target.logdensity_fn(x), target.dim)

    return Annealing(at, _ramp(hold, first))


def conditional_ess(log_weight: Float[Array, " n"], log_ratio: Float[Array, " n"]) -> Float[Array, ""]:
    """Compute the conditional effective sample fraction, ``(Σ W v)² / Σ W v²`` for Σ W = 1.

    Args:
        log_weight: log W up to a constant, shape ``[n]``.
        log_ratio: log v, of the next density over this one, shape ``[n]``.

    Reference:
        Zhou, Johansen & Aston (2016), Toward automatic model comparison, eq. 3.13.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.annealing import conditional_ess
        >>> round(float(conditional_ess(jnp.zeros(2), jnp.array([0.0, -jnp.inf]))), 4)
        0.5
    """
    log_weight = log_weight - jnp.max(log_weight)
    log_weight = log_weight - logsumexp(log_weight)
    # the fraction does not change with the level of the ratios, but its rounding does
    log_ratio = log_ratio - jnp.max(log_ratio, where=jnp.isfinite(log_ratio), initial=-jnp.inf)
    return jnp.exp(2.0 * logsumexp(log_weight + log_ratio) - logsumexp(log_weight + 2.0 * log_ratio))


def next_level(
    level: Float[Array, ""],
    log_weight: Float[Array, " n"],
    log_ratio: Float[Array, " n"],
    goal: float,
) -> Float[Array, ""]:
    """Find the highest level of the geometric path that keeps a conditional effective sample fraction.

    Args:
        level: the level now, λ.
        log_weight: of its density over the law of weighted points, shape ``[n]``; ``-inf`` is no weight.
        log_ratio: log of target over first law at the points, shape ``[n]``.
        goal: the fraction to keep.

    Returns:
        The next level, between λ and 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.annealing import next_level
        >>> points = jnp.linspace(-2.0, 2.0, 101)
        >>> zero = jnp.zeros(101)
        >>> float(next_level(jnp.array(0.2), zero, zero, 0.9))  # the target is the first law
        1.0
        >>> 0.2 < float(next_level(jnp.array(0.2), zero, -8.0 * points**2, 0.9)) < 1.0
        True
    """
    usable = jnp.isfinite(log_weight) & jnp.isfinite(log_ratio)
    log_weight = jnp.where(usable, log_weight, -jnp.inf)
    log_ratio = jnp.where(usable, log_ratio, 0.0)

    def enough(new: Float[Array, ""]) -> Bool[Array, ""]:
        return conditional_ess(log_weight, (new - level) * log_ratio) >= goal

    return furthest(enough, level)
