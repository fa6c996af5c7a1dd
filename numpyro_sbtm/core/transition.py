# SPDX-License-Identifier: Apache-2.0
"""Distributions of the next point of a Markov chain."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.target import Key

__all__ = ["Gaussian", "Transition", "standard_normal"]


@runtime_checkable
class Transition(Protocol):
    """A distribution on R^d that can be sampled and whose normalised density is known."""

    def sample(self, key: Key) -> Float[Array, " d"]:
        """Draw one point, differentiably with respect to the distribution's parameters."""
        ...

    def log_prob(self, y: Float[Array, " d"]) -> Float[Array, ""]:
        """Evaluate the normalised log density at one point."""
        ...

    def widened(self, factor: Float[Array, ""]) -> "Transition":
        """Make a distribution with the same centre that spreads further by a factor."""
        ...


class Gaussian(NamedTuple):
    """A normal distribution with independent coordinates.

    The integrator of a diffusion *is* the choice of this mean and standard deviation: exact
    Ornstein-Uhlenbeck, Euler-Maruyama and so on differ in nothing else.

    Attributes:
        mean: shape ``[d]``.
        std: standard deviation of each coordinate, shape ``[d]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.transition import Gaussian
        >>> normal = Gaussian(jnp.zeros(2), jnp.ones(2))
        >>> normal.sample(jax.random.key(0)).shape
        (2,)
        >>> round(float(normal.log_prob(jnp.zeros(2))), 4)  # -log(2 pi)
        -1.8379
    """

    mean: Float[Array, " d"]
    std: Float[Array, " d"]

    def sample(self, key: Key) -> Float[Array, " d"]:
        """Draw one point by shifting and scaling standard noise."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, y: Float[Array, " d"]) -> Float[Array, ""]:
        """Evaluate the normalised log density at one point."""
        z = (y - self.mean) / self.std
        log_scale = jnp.sum(jnp.log(self.std)) + 0.5 * self.mean.size * jnp.log(2 * jnp.pi)
        return -0.5 * jnp.sum(z * z) - log_scale

    def widened(self, factor: Float[Array, ""]) -> "Gaussian":
        """Multiply the standard deviations."""
        return self._replace(std=factor * self.std)


def standard_normal(dim: int, scale: float = 1.0) -> Gaussian:
    """Make the normal distribution N(0, scale² I) on R^dim.

    Examples:
        >>> from numpyro_sbtm.core.transition import standard_normal
        >>> standard_normal(3, 2.0).std.tolist()
        [2.0, 2.0, 2.0]
    """
    return Gaussian(jnp.zeros(dim), jnp.full(dim, scale))
