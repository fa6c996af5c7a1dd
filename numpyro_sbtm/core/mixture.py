# SPDX-License-Identifier: Apache-2.0
"""Mixtures of normal distributions: where separated modes are, and the diffusion that ends there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.target import Key

__all__ = [
    "Mixture",
    "fit_mixture",
    "largest",
    "max_components",
    "moments",
    "normal",
    "numbers_of_components",
]

_EM_STEPS = 50
_PER_DIMENSION = 20  # particles per component and dimension that a covariance is fitted to
_MAX_COMPONENTS = 64
_PRIOR_COUNT = 2.0  # particles that the pooled covariance counts for in each component, per dimension


class Mixture(NamedTuple):
    """A mixture of K normal distributions N(U_c m_c, U_c diag(v_c) U_cᵀ) with weights p_c.

    Each component keeps the eigenvectors of its covariance, so that adding white noise, conditioning on
    a noisy copy and bridging are operations on m and v alone.

    Attributes:
        log_weight: log p, normalised; ``-inf`` for a component that is not there, shape ``[K]``.
        rotation: U, orthogonal, shape ``[K, d, d]``; None for the identity.
        centre: m, the mean in rotated coordinates, shape ``[K, d]``.
        std: √v, shape ``[K, d]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.mixture import normal
        >>> mixture = normal(2)
        >>> mixture.sample(jax.random.key(0)).shape
        (2,)
        >>> round(float(mixture.log_prob(jnp.zeros(2))), 4)  # -log(2 pi)
        -1.8379
    """

    log_weight: Float[Array, " K"]
    rotation: Float[Array, "K d d"] | None
    centre: Float[Array, "K d"]
    std: Float[Array, "K d"]

    def rotate(self, y: Float[Array, " d"]) -> Float[Array, "K d"]:
        """Express a point in the coordinates of every component, Uᵀ y."""
        if self.rotation is None:
            return jnp.broadcast_to(y, self.centre.shape)
        # as one matrix product for a batch of points
        flat = jnp.swapaxes(self.rotation, 0, 1).reshape(y.size, -1)
        return (y @ flat).reshape(self.centre.shape)

    def joint(self, y: Float[Array, " d"]) -> Float[Array, " K"]:
        """Evaluate log(p_c N(y; component c)) for every component."""
        z = (self.rotate(y) - self.centre) / self.std
        log_scale = jnp.sum(jnp.log(self.std), -1) + 0.5 * y.size * jnp.log(2 * jnp.pi)
        return self.log_weight - 0.5 * jnp.sum(z * z, -1) - log_scale

    def log_prob(self, y: Float[Array, " d"]) -> Float[Array, ""]:
        """Evaluate the normalised log density at one point."""
        return logsumexp(self.joint(y))

    def score(self, y: Float[Array, " d"]) -> Float[Array, " d"]:
        """Evaluate the gradient of the log density at one point."""
        pull = (self.centre - self.rotate(y)) / self.std**2
        share = jax.nn.softmax(self.joint(y))
        if self.rotation is None:
            return share @ pull
        flat = jnp.swapaxes(self.rotation, 1, 2).reshape(-1, y.size)
        return (share[:, None] * pull).reshape(-1) @ flat

    def widened(self, factor: Float[Array, ""]) -> "Mixture":
        """Multiply the standard deviations of every component."""
        return self._replace(std=factor * self.std)

    def sample(self, key: Key) -> Float[Array, " d"]:
        """Draw one point; differentiable in all but the weights (see `sample_component`)."""
        return self.sample_component(key)[0]

    def sample_component(self, key: Key) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Draw one point, and log p of the component that it was drawn from.

        The point does not change with the weights p while the component stays the same. The gradient of the
        mean of f(point) is therefore the mean of ∇f + f ∇log p, not that of ∇f alone.
        """
        shape, dtype = self.centre.shape[1:], self.centre.dtype
        if len(self.log_weight) == 1:
            y = self.centre[0] + self.std[0] * jax.random.normal(key, shape, dtype)
            return (y if self.rotation is None else self.rotation[0] @ y), jnp.zeros((), dtype)
        key_component, key_noise = jax.random.split(key)
        # by the inverse distribution function: one random number, not one for every component
        cumulative = jnp.cumsum(jax.nn.softmax(self.log_weight))
        level = cumulative[-1] * jax.random.uniform(key_component, (), dtype)
        c = jnp.minimum(jnp.sum(cumulative <= level), len(cumulative) - 1)
        noise = jax.random.normal(key_noise, shape, dtype)
        y = self.centre[c] + self.std[c] * noise
        log_share = jax.nn.log_softmax(self.log_weight)[c]
        if self.rotation is None:
            return y, log_share
        # as one matrix product for a batch of draws, which would otherwise hold a matrix each
        chosen = jnp.where(jnp.arange(len(cumulative))[:, None] == c, y, 0.0)
        return chosen.reshape(-1) @ jnp.swapaxes(self.rotation, 1, 2).reshape(-1, y.size), log_share


def normal(dim: int, scale: float = 1.0) -> Mixture:
    """Make N(0, scale² I) on R^dim as a mixture of one component.

    Examples:
        >>> from numpyro_sbtm.core.mixture import normal
        >>> normal(2, 3.0).std.tolist()
        [[3.0, 3.0]]
    """
    return Mixture(jnp.zeros(1), None, jnp.zeros((1, dim)), jnp.full((1, dim), scale))


def largest(mixture: Mixture, size: int) -> Mixture:
    """Keep the components of the largest weights, and renormalise; where there are fewer, the rest is absent.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.mixture import Mixture, largest
        >>> two = Mixture(jnp.log(jnp.array([0.3, 0.7])), None, jnp.array([[0.0], [9.0]]), jnp.ones((2, 1)))
        >>> largest(two, 1).centre.tolist()
        [[9.0]]
        >>> [round(weight, 1) for weight in jnp.exp(largest(two, 3).log_weight).tolist()]
        [0.7, 0.3, 0.0]
    """
    num = len(mixture.log_weight)
    order = jnp.argsort(-mixture.log_weight)
    keep = jnp.concatenate([order, jnp.full(max(0, size - num), order[-1])])[:size]
    kept = jax.tree.map(lambda leaf: leaf[keep], mixture)
    log_weight = jnp.where(jnp.arange(size) < num, kept.log_weight, -jnp.inf)
    return kept._replace(log_weight=jax.nn.log_softmax(log_weight))


def moments(mixture: Mixture) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Compute the mean and the standard deviation of every coordinate, each of shape ``[d]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.mixture import Mixture, moments
        >>> two = Mixture(jnp.log(jnp.ones(2) / 2), None, jnp.array([[-3.0], [3.0]]), 4 * jnp.ones((2, 1)))
        >>> [part.tolist() for part in moments(two)]
        [[0.0], [5.0]]
    """
    weight = jnp.exp(mixture.log_weight)
    if mixture.rotation is None:
        means, variances = mixture.centre, mixture.std**2
    else:
        means = jnp.einsum("cij,cj->ci", mixture.rotation, mixture.centre)
        variances = jnp.einsum("cij,cj->ci", mixture.rotation**2, mixture.std**2)
    mean = weight @ means
    return mean, jnp.sqrt(weight @ (variances + (means - mean) ** 2))


def max_components(num_particles: int, dim: int) -> int:
    """Return how many components with a full covariance that many particles can support.

    Examples:
        >>> from numpyro_sbtm.core.mixture import max_components
        >>> max_components(4096, 2), max_components(4096, 10), max_components(4096, 1000)
        (64, 20, 1)
    """
    return max(1, min(_MAX_COMPONENTS, num_particles // (_PER_DIMENSION * dim)))


def numbers_of_components(most: int) -> list[int]:
    """List how many components are worth a try: two, and the most halved again and again.

    Examples:
        >>> from numpyro_sbtm.core.mixture import numbers_of_components
        >>> numbers_of_components(12), numbers_of_components(1)
        ([2, 3, 6, 12], [2])
    """
    return sorted({2} | {most >> shift for shift in range(most.bit_length() - 1)})


def _components(x: Float[Array, "n d"], weight: Float[Array, " n"], share: Float[Array, "n K"]) -> Mixture:
    """Fit every component to its share of weighted points; a covariance leans a little on the pooled one."""
    dim = x.shape[1]
    responsibility = weight[:, None] * share
    count = jnp.sum(responsibility, 0)
    mean = responsibility.T @ x / jnp.maximum(count, 1e-9)[:, None]
    second = jnp.einsum("nc,ni,nj->cij", responsibility, x, x)
    scatter = second - count[:, None, None] * mean[:, :, None] * mean[:, None, :]
    pooled = jnp.sum(scatter, 0) / jnp.sum(count)
    # the prior has the size of the component, and only the shape of the pooled covariance
    size = jnp.trace(scatter, axis1=1, axis2=2) / jnp.maximum(count, 1e-9) / jnp.trace(pooled)
    lean = _PRIOR_COUNT * dim
    cov = (scatter + lean * size[:, None, None] * pooled) / (count + lean)[:, None, None]
    cov = cov + 1e-8 * jnp.eye(dim)
    # one at a time: two batched LAPACK calls that XLA runs side by side can block a two-core machine
    variance, rotation = jax.lax.map(jnp.linalg.eigh, cov)
    log_weight = jnp.log(count / jnp.sum(count))
    centre = jnp.einsum("cij,ci->cj", rotation, mean)
    return Mixture(log_weight, rotation, centre, jnp.sqrt(jnp.maximum(variance, 1e-8)))


def fit_mixture(
    key: Key,
    x: Float[Array, "n d"],
    weight: Float[Array, " n"],
    num_components: int | Int[Array, ""],
    size: int,
) -> Mixture:
    """Fit a mixture to weighted points by expectation maximisation.

    The first centres are chosen as in k-means++: each at random, in proportion to the squared distance
    from those before. A covariance leans towards the pooled shape by as much as a few points would
    pull it, so that a component of few points stays regular; one of less than a point goes.

    Args:
        key: random key.
        x: the points, shape ``[n, d]``, finite.
        weight: how many points each of them stands for, shape ``[n]``.
        num_components: how many components to begin with, at most ``size``; may be traced.
        size: the number K of components of the result, absent ones included.

    Returns:
        The mixture.

    Reference:
        Dempster, Laird & Rubin (1977); Arthur & Vassilvitskii (2007) (k-means++).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.mixture import fit_mixture
        >>> x = jnp.concatenate([jnp.linspace(-4, -3, 50), jnp.linspace(3, 5, 50)])[:, None]
        >>> mixture = fit_mixture(jax.random.key(0), x, jnp.ones(100), 2, size=3)
        >>> sorted((mixture.rotation[:, 0, 0] * mixture.centre[:, 0]).round(1).tolist())
        [-3.5, 0.0, 4.0]
    """
    key_first, key_rest = jax.random.split(key)
    dim = x.shape[1]

    def choose(carry, inputs):  # type: ignore[no-untyped-def]
        centres, nearest = carry
        k, key_k = inputs
        new = x[jax.random.categorical(key_k, jnp.log(weight * nearest + 1e-30))]
        return (centres.at[k].set(new), jnp.minimum(nearest, jnp.sum((x - new) ** 2, -1))), None

    first = x[jax.random.categorical(key_first, jnp.log(weight))]
    centres = jnp.zeros((size, dim), x.dtype).at[0].set(first)
    steps = jnp.arange(1, size), jax.random.split(key_rest, size)[1:]
    (centres, _), _ = jax.lax.scan(choose, (centres, jnp.sum((x - first) ** 2, -1)), steps)
    distance = jax.lax.map(lambda centre: jnp.sum((x - centre) ** 2, -1), centres).T
    distance = jnp.where(jnp.arange(size) < num_components, distance, jnp.inf)
    share = jax.nn.one_hot(jnp.argmin(distance, 1), size, dtype=x.dtype)

    def improve(_: Int[Array, ""], mixture: Mixture) -> Mixture:
        return _components(x, weight, jax.vmap(lambda y: jax.nn.softmax(mixture.joint(y)))(x))

    mixture = jax.lax.fori_loop(0, _EM_STEPS, improve, _components(x, weight, share))
    alive = jnp.exp(mixture.log_weight) * jnp.sum(weight) >= 1.0
    return mixture._replace(log_weight=jax.nn.log_softmax(jnp.where(alive, mixture.log_weight, -jnp.inf)))
