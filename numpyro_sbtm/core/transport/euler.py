# SPDX-License-Identifier: Apache-2.0
"""Deterministic maps x ↦ x + h v(x), with their log-determinant."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.target import VectorField

__all__ = ["euler_map", "log_abs_det", "longest_step", "spectral_norm"]

_PROBED = 64  # points at which a velocity's Lipschitz constant is measured


def log_abs_det(matrix: Float[Array, "d d"]) -> Float[Array, ""]:
    """Compute log|det M| by Gaussian elimination without pivoting.

    Stable for M = I + E with ‖E‖ < 1, all leading minors of which are regular. Written in array
    operations, so that thousands of small matrices are one batch: a batched LAPACK call would be slower
    and, on CPU, blocks a thread of the pool that it waits for.

    Args:
        matrix: shape ``[d, d]``.

    Returns:
        The logarithm, shape ``[]``; not finite if a leading minor vanishes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.euler import log_abs_det
        >>> round(float(log_abs_det(jnp.array([[1.5, 0.2], [0.1, 0.8]]))), 4)
        0.1655
    """
    dim = matrix.shape[0]

    def eliminate(k, carry):  # type: ignore[no-untyped-def]
        rest, total = carry
        pivot, row = rest[k, k], rest[k]
        column = jnp.where(jnp.arange(dim) > k, rest[:, k], 0.0)
        return rest - jnp.outer(column, row) / pivot, total + jnp.log(jnp.abs(pivot))

    return jax.lax.fori_loop(0, dim, eliminate, (matrix, jnp.zeros((), matrix.dtype)))[1]


def spectral_norm(matrix: Float[Array, "d d"], num_iterations: int = 12) -> Float[Array, ""]:
    """Estimate the largest singular value by power iteration, from below.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.euler import spectral_norm
        >>> round(float(spectral_norm(jnp.diag(jnp.array([3.0, -4.0])))), 2)
        4.0
    """
    dim = matrix.shape[0]
    start = jnp.cos(1.0 + jnp.arange(dim, dtype=matrix.dtype))  # no structure to be orthogonal to

    def iterate(_, v):  # type: ignore[no-untyped-def]
        v = matrix.T @ (matrix @ v)
        return v / jnp.maximum(jnp.linalg.norm(v), 1e-30)

    v = jax.lax.fori_loop(0, num_iterations, iterate, start)
    return jnp.linalg.norm(matrix @ v)


def euler_map(
    velocity: VectorField, step_size: Float[Array, ""], x: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, ""]]:
    """Move one point by x ↦ x + h v(x) and compute what that does to a density there.

    The map is one-to-one where h Lip(v) < 1; then log q(x') = log q(x) - log|det(I + h Dv(x))|.

    Args:
        velocity: the field v.
        step_size: h, shape ``[]``.
        x: the point, shape ``[d]``.

    Returns:
        The moved point; log|det(I + h Dv(x))|; and h ‖Dv(x)‖, to be below one. Costs d + 1
        evaluations of the velocity.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.euler import euler_map
        >>> x, log_det, stretch = euler_map(lambda x: -x, jnp.array(0.5), jnp.ones(2))
        >>> x.tolist(), round(float(log_det), 4), round(float(stretch), 4)  # 2 log(1/2)
        ([0.5, 0.5], -1.3863, 0.5)
    """

    def with_value(x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        v = velocity(x)
        return v, v

    jacobian, v = jax.jacfwd(with_value, has_aux=True)(x)
    change = step_size * jacobian
    return x + step_size * v, log_abs_det(jnp.eye(x.shape[0]) + change), spectral_norm(change)


def longest_step(velocity: VectorField, x: Float[Array, "n d"], max_stretch: float) -> Float[Array, ""]:
    """Compute the longest step h with h Lip(v) at most a bound, as some points show.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.euler import longest_step
        >>> round(float(longest_step(lambda x: -2.0 * x, jnp.ones((10, 3)), 0.5)), 3)
        0.25
    """
    probed = x[:: max(1, len(x) // _PROBED)][:_PROBED]
    lipschitz = jnp.max(jax.vmap(lambda x: spectral_norm(jax.jacfwd(velocity)(x)))(probed))
    return max_stretch / jnp.maximum(lipschitz, 1e-12)
