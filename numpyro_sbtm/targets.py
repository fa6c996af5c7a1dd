# SPDX-License-Identifier: Apache-2.0
"""Benchmark densities with their log Z and exact samplers: one copy, for tests, benchmarks and docs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from numpyro_sbtm.core.target import Key, Target

__all__ = ["gaussian", "gaussian_mixture"]


def gaussian(mean: Float[np.ndarray, " d"], covariance: Float[np.ndarray, "d d"]) -> Target:
    """Make the normalised density N(mean, covariance): log Z = 0.

    Args:
        mean: shape ``[d]``.
        covariance: symmetric and positive definite, shape ``[d, d]``.

    Examples:
        >>> import jax, numpy as np
        >>> from numpyro_sbtm.targets import gaussian
        >>> gaussian(np.zeros(2), np.eye(2)).sample(jax.random.key(0), 5).shape
        (5, 2)
    """
    tril = np.linalg.cholesky(covariance)
    return gaussian_mixture(np.ones(1), mean[None], tril[None])


def gaussian_mixture(
    weights: Float[np.ndarray, " k"],
    means: Float[np.ndarray, "k d"],
    scale_trils: Float[np.ndarray, "k d d"],
) -> Target:
    """Make a normalised mixture of normal densities: log Z = 0.

    Args:
        weights: positive; they need not sum to one, shape ``[k]``.
        means: shape ``[k, d]``.
        scale_trils: Cholesky factors of the covariances, shape ``[k, d, d]``.

    Returns:
        The target, with an exact sampler.

    Examples:
        >>> import jax.numpy as jnp, numpy as np
        >>> from numpyro_sbtm.targets import gaussian_mixture
        >>> two = gaussian_mixture(np.ones(2), np.array([[-2.0], [2.0]]), np.ones((2, 1, 1)))
        >>> round(float(two.logdensity_fn(jnp.zeros(1))), 4)  # log N(2; 0, 1)
        -2.9189
    """
    dim = means.shape[1]
    log_weights = np.log(weights / np.sum(weights))
    inverses = np.linalg.inv(scale_trils)
    log_norms = -np.log(np.abs(np.linalg.det(scale_trils))) - 0.5 * dim * np.log(2 * np.pi)

    def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
        z = jnp.einsum("kij,kj->ki", jnp.asarray(inverses, x.dtype), x - jnp.asarray(means, x.dtype))
        constants = jnp.asarray(log_weights + log_norms, x.dtype)
        return logsumexp(constants - 0.5 * jnp.sum(z * z, -1))

    def sample(key: Key, n: int) -> Float[Array, "n d"]:
        key_mode, key_noise = jax.random.split(key)
        mode = jax.random.categorical(key_mode, jnp.asarray(log_weights), shape=(n,))
        noise = jax.random.normal(key_noise, (n, dim))
        return jnp.asarray(means)[mode] + jnp.einsum("nij,nj->ni", jnp.asarray(scale_trils)[mode], noise)

    return Target(logdensity, dim, 0.0, sample)
