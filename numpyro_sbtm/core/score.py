# SPDX-License-Identifier: Apache-2.0
"""Learning the score of particles from the particles alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.target import Key, VectorField

__all__ = ["divergence_of", "divergences_of", "implicit_score_loss", "implicit_score_losses"]

_EXACT_UP_TO = 3  # dimension up to which d Jacobian-vector products are cheaper than a noisy one


def divergence_of(field: VectorField, x: Float[Array, " d"], key: Key | None) -> Float[Array, ""]:
    """Compute the divergence ∇·s of a vector field at one point.

    Args:
        field: the vector field s.
        x: the point, shape ``[d]``.
        key: for an unbiased estimate from one random sign vector (Hutchinson); None for the exact
            value by d Jacobian-vector products.

    Returns:
        The divergence, shape ``[]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.score import divergence_of
        >>> float(divergence_of(lambda x: x**2, jnp.array([1.0, 2.0]), None))
        6.0
    """
    if key is None:
        return jnp.trace(jax.jacfwd(field)(x))
    probe = jax.random.rademacher(key, x.shape, x.dtype)
    return jnp.dot(probe, jax.jvp(field, (x,), (probe,))[1])


def divergences_of(field: VectorField, x: Float[Array, "m d"], key: Key | None) -> Float[Array, " m"]:
    """Compute the divergence at every point: exactly for no key, else by estimates independent of each other.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.score import divergences_of
        >>> divergences_of(lambda x: x**2, jnp.array([[1.0, 2.0], [0.0, 0.0]]), None).tolist()
        [6.0, 0.0]
    """
    if key is None:
        return jax.vmap(lambda x: divergence_of(field, x, None))(x)
    return jax.vmap(lambda x, key: divergence_of(field, x, key))(x, jax.random.split(key, len(x)))


def implicit_score_loss(
    velocity: VectorField, particles: Float[Array, "n d"], scores: Float[Array, "n d"], key: Key
) -> Float[Array, ""]:
    """Compute the implicit score matching loss of s = g - v, for the velocity v = g - s.

    Implicit score matching minimises 1/n Σᵢ |s(xᵢ)|² + 2 ∇·s(xᵢ), which up to a constant is the mean
    squared distance of s from the score of the particles' law. With the target's score g and s = g - v it
    is, up to terms free of v,

        1/n Σᵢ |v(xᵢ)|² - 2 v(xᵢ)·g(xᵢ) - 2 ∇·v(xᵢ):

    a network that learns v needs no derivative of g, and v = 0, no motion, is where training starts and
    transport ends. The divergence is exact in low dimension and estimated with a fresh random sign vector
    above.

    Args:
        velocity: the field v.
        particles: shape ``[n, d]``.
        scores: the target's score g at the particles, shape ``[n, d]``.
        key: random key for the estimate.

    Returns:
        The loss, shape ``[]``: at its optimum minus the relative Fisher information.

    Reference:
        Hyvärinen (2005), JMLR 6, eq. 4; Ilin, Sushko & Hu (2025), arXiv:2504.18130.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.score import implicit_score_loss
        >>> x = jax.random.normal(jax.random.key(0), (100_000, 2))  # score -x; target N(0, I/2)
        >>> round(float(implicit_score_loss(lambda x: -x, x, -2 * x, jax.random.key(1))), 1)
        -2.0
    """
    return jnp.mean(implicit_score_losses(velocity, particles, scores, key))


def implicit_score_losses(
    velocity: VectorField, particles: Float[Array, "n d"], scores: Float[Array, "n d"], key: Key
) -> Float[Array, " n"]:
    """Compute the terms of `implicit_score_loss`, one for each particle, shape ``[n]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.score import implicit_score_losses
        >>> x = jnp.ones((2, 1))
        >>> implicit_score_losses(lambda x: -x, x, -2 * x, jax.random.key(0)).tolist()
        [-1.0, -1.0]
    """
    if particles.shape[1] <= _EXACT_UP_TO:
        divergence = jax.vmap(lambda x: divergence_of(velocity, x, None))(particles)
    else:
        keys = jax.random.split(key, particles.shape[0])
        divergence = jax.vmap(lambda x, k: divergence_of(velocity, x, k))(particles, keys)
    v = jax.vmap(velocity)(particles)
    return jnp.sum(v * (v - 2.0 * scores), -1) - 2.0 * divergence
