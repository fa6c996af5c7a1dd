# SPDX-License-Identifier: Apache-2.0
"""Distributions of the next point of a Markov chain."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.target import Key

__all__ = ["Gaussian", "Pinned", "Transition", "standard_normal"]


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


class Pinned(NamedTuple):
    """A normal distribution whose coordinates of standard deviation zero are points, with density one.

    Attributes:
        mean: shape ``[d]``.
        std: zero or more, shape ``[d]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.transition import Pinned
        >>> point = Pinned(jnp.ones(2), jnp.zeros(2))
        >>> point.sample(jax.random.key(0)).tolist(), float(abs(point.log_prob(jnp.ones(2))))
        ([1.0, 1.0], 0.0)
    """

    mean: Float[Array, " d"]
    std: Float[Array, " d"]

    def widened(self, factor: Float[Array, ""]) -> "Pinned":
        """Multiply the standard deviations."""
        return self._replace(std=factor * self.std)

    def sample(self, key: Key) -> Float[Array, " d"]:
        """Draw one point."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, y: Float[Array, " d"]) -> Float[Array, ""]:
        """Evaluate the log density of the coordinates that are not points."""
        free = self.std > 0
        std = jnp.where(free, self.std, 1.0)
        z = (y - self.mean) / std
        return -jnp.sum(jnp.where(free, 0.5 * z * z + jnp.log(std) + 0.5 * jnp.log(2 * jnp.pi), 0.0))


def standard_normal(dim: int, scale: float = 1.0) -> Gaussian:
    """Make the normal distribution N(0, scale² I) on R^dim.

    Examples:
        >>> from numpyro_sbtm.core.transition import standard_normal
        >>> standard_normal(3, 2.0).std.tolist()
        [2.0, 2.0, 2.0]
    """
    return Gaussian(jnp.zeros(dim), jnp.full(dim, scale))
