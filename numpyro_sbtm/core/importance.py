# SPDX-License-Identifier: Apache-2.0
"""Draws of a mixture with their importance weights: the cheapest method, where there is nothing to learn."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.algorithm import Algorithm, Draws, Info
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.target import Key, Target

__all__ = ["importance"]


def importance(target: Target, proposal: Mixture) -> Algorithm:
    """Make the algorithm that draws from a mixture: nothing is trained, and its state is empty.

    Args:
        target: the density.
        proposal: what draws come from.

    Returns:
        The algorithm. A draw costs one evaluation of the log density, and no gradient.

    Reference:
        Owen (2013), Monte Carlo theory, methods and examples, chapter 9.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Target, importance
        >>> from numpyro_sbtm.core.mixture import normal
        >>> target = Target(lambda x: -0.5 * jnp.sum(x**2), 2)
        >>> draws = importance(target, normal(2)).draw(jax.random.key(0), (), 3)
        >>> [round(w, 3) for w in draws.log_weight.tolist()]  # log 2 pi
        [1.838, 1.838, 1.838]
    """

    def step(key: Key, state: Any) -> tuple[Any, Info]:
        none = jnp.zeros((), jnp.int32)
        return state, Info(jnp.full((), jnp.nan), none, none, jnp.ones((), bool))

    def weight(x: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        value = target.logdensity_fn(x)
        return value - proposal.log_prob(x), value

    def draw(key: Key, state: Any, n: int) -> Draws:
        x = jax.vmap(proposal.sample)(jax.random.split(key, n))
        return Draws(x, *jax.vmap(weight)(x), jnp.ones(n, bool))

    return Algorithm(lambda key: (), step, draw, lambda key, state, x: weight(x)[0])
