# SPDX-License-Identifier: Apache-2.0
"""Normal points of low discrepancy: a deterministic transport keeps them evenly spread, as noise does not."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sbtm.core.target import Key

__all__ = ["quasi_normal", "standardised"]


def quasi_normal(num: int, dim: int, key: Key | None = None) -> Float[Array, "num dim"]:
    """Make points whose empirical law is closer to N(0, I) than that of independent draws.

    The first coordinate runs over ``num`` intervals of equal probability; the others are an additive
    recurrence with the generalised golden ratio, φ^d = φ + 1. All are shifted modulo one.

    Args:
        num: the number of points, n.
        dim: the dimension d.
        key: for random shifts and a random rotation, under which every single point has the law N(0, I), so
            that means over the points are unbiased; None for shifts by a half and no rotation.

    Returns:
        The points, shape ``[n, d]``.

    Reference:
        Niederreiter (1992), Random number generation and quasi-Monte Carlo methods, chapter 3: a regular
        coordinate added to a sequence; Cranley & Patterson (1976) for the shift; Roberts (2018) for the
        generator of the recurrence.

    Examples:
        >>> from numpyro_sbtm.core.quasi import quasi_normal
        >>> quasi_normal(2, 1).round(3)[:, 0]  # the quartiles
        Array([-0.674,  0.674], dtype=float32)
    """
    ratio = 2.0
    for _ in range(60):
        ratio = (1.0 + ratio) ** (1.0 / dim)
    index = np.arange(num)[:, None]
    fractions = np.concatenate([index / num, index * ratio ** -np.arange(1.0, dim) % 1.0], 1)
    shift = jnp.full(dim, 0.5)
    if key is not None:
        key_shift, key_rotation = jax.random.split(key)
        shift = jax.random.uniform(key_shift, (dim,))
    scale = np.where(np.arange(dim) == 0, 1.0 / num, 1.0)
    uniform = (jnp.asarray(fractions) + scale * shift) % 1.0
    tiny = jnp.finfo(uniform.dtype).eps
    points = jax.scipy.special.ndtri(jnp.clip(uniform, tiny, 1.0 - tiny))
    if key is None:
        return points
    # another set must not share this one's planes: what is learned on one is then seen to fail on the other
    return points @ jax.random.orthogonal(key_rotation, dim, dtype=points.dtype)


def standardised(points: Float[Array, "num dim"]) -> Float[Array, "num dim"]:
    """Shift and shear points to mean zero and covariance I: what is affine in them is then free of error.

    Args:
        points: more of them than dimensions, shape ``[n, d]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.quasi import standardised
        >>> points = standardised(jax.random.normal(jax.random.key(0), (9, 2)))
        >>> bool(jnp.allclose(points.T @ points / 9, jnp.eye(2), atol=1e-5))
        True
    """
    centred = points - jnp.mean(points, 0)
    tril = jnp.linalg.cholesky(centred.T @ centred / len(points))
    return jax.scipy.linalg.solve_triangular(tril, centred.T, lower=True).T
