# SPDX-License-Identifier: Apache-2.0
"""Draws of a mixture with their importance weights: the cheapest proposal, with nothing to learn."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.algorithm import Draws, Proposal
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.target import Key, Params, Target

__all__ = ["importance"]


def importance(target: Target, mixture: Mixture) -> Proposal:
    """Make the proposal that draws from a mixture, without parameters.

    Args:
        target: the density.
        mixture: what draws come from.

    Returns:
        The proposal. A draw costs one evaluation of the log density, and no gradient.

    Reference:
        Owen (2013), Monte Carlo theory, methods and examples, chapter 9.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Target, importance
        >>> from numpyro_sbtm.core.mixture import normal
        >>> target = Target(lambda x: -0.5 * jnp.sum(x**2), 2)
        >>> draws = importance(target, normal(2)).draw(jax.random.key(0), None, 3)
        >>> [round(w, 3) for w in draws.log_weight.tolist()]  # log 2 pi
        [1.838, 1.838, 1.838]
    """

    def weight(x: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        value = target.logdensity_fn(x)
        return value - mixture.log_prob(x), value

    def draw(key: Key, params: Params, n: int) -> Draws:
        x = jax.vmap(mixture.sample)(jax.random.split(key, n))
        return Draws(x, *jax.vmap(weight)(x), jnp.ones(n, bool))

    return Proposal(draw, lambda key, params, x: weight(x)[0])
