# SPDX-License-Identifier: Apache-2.0
"""Whether a density falls far out, as one with a finite integral must."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.maps import Map, Triangular
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.core.weights import resample

__all__ = ["Rays", "decay", "num_values"]

_POINTS = (12, 32)  # from which rays start, at least and at most
_MANY = 8_000  # rays along coordinates, above which they start from fewer points
_MOST = 20_000  # above which coordinates are left out
_TOGETHER = 512  # points at which the density is evaluated at a time, and four times as many ends
_LENGTHS = (30.0, 3.0)  # of rays, in widths; the second where the density is undefined at the first


class Rays(NamedTuple):
    """Where the density does not fall as a proper one must, as shares of the points that rays start from.

    Attributes:
        coordinates: along whitened coordinates, of both directions the worse; in the order of the flattened
            unconstrained space, shape ``[d]``.
        outwards: along whitened rays from the middle of the points.
        scaled: along rays from the origin of the unconstrained space.
    """

    coordinates: Float[Array, "*chains d"]
    outwards: Float[Array, "*chains"]
    scaled: Float[Array, "*chains"]


def _num_starts(dim: int) -> int:
    fewest, most = _POINTS
    return min(max(_MANY // (2 * dim), fewest), most)


def _stride(dim: int) -> int:
    """Of the coordinates that are tested."""
    return -(-2 * dim * _POINTS[0] // _MOST)


def num_values(dim: int) -> int:
    """Count the values that `decay` evaluates in so many dimensions."""
    return (len(range(0, dim, _stride(dim))) + 2) * _num_starts(dim) * (2 * len(_LENGTHS) + 1)


def decay(
    key: Key,
    target: Target,
    whitening: Map,
    x: Float[Array, "n d"],
    log_weight: Float[Array, " n"],
) -> Rays:
    """Find out along which rays a density does not fall as one with a finite integral must.

    A density of one variable falls faster than 1/s, and along rays from a centre of R^d it falls faster than
    s^-d. Rays start at some of the points, drawn by weight, and end thirty widths of the points further on:
    far enough to tell a Cauchy distribution from a flat density, or three where there it is undefined.

    Args:
        key: random key.
        target: the density.
        whitening: coordinates of the rays.
        x: points of the target's space, such as proposals, shape ``[n, d]``.
        log_weight: theirs, shape ``[n]``.

    Returns:
        Shares of the rays' starts. Of more than 833 coordinates some are left out, evenly, and count as zero.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.decay import decay
        >>> from numpyro_sbtm.core.target import Target
        >>> from numpyro_sbtm.core.maps import Affine
        >>> x = jax.random.normal(jax.random.key(0), (500, 2))
        >>> half_flat = Target(lambda x: -0.5 * x[0] ** 2, 2)
        >>> plain = Affine(jnp.zeros(2), jnp.eye(2))
        >>> decay(jax.random.key(1), half_flat, plain, x, jnp.zeros(500)).coordinates.tolist()
        [0.0, 1.0]
    """
    dim = x.shape[1]
    num = _num_starts(dim)
    usable = jnp.isfinite(log_weight) & jnp.all(jnp.isfinite(x), -1)
    x = jnp.where(usable[:, None], x, x[jnp.argmax(usable)])
    u = jax.vmap(lambda point: whitening.inverse(point)[0])(x)
    low, middle, high = jnp.nanquantile(u, jnp.array([0.25, 0.5, 0.75], u.dtype), 0)
    # what is narrower than N(0, 1) needs no shorter rays
    width = jnp.maximum((high - low) / 1.35, 1.0)
    chosen = resample(key, jnp.where(usable, log_weight, -jnp.inf), num)
    lengths = jnp.array([sign * length for length in _LENGTHS for sign in (1.0, -1.0)], u.dtype)

    def along(k: Int[Array, ""], x: Float[Array, " d"], u: Float[Array, " d"]) -> Bool[Array, " 2"]:
        """Whether the density does not fall along a ray, forwards and backwards."""
        radius = jnp.maximum(jnp.linalg.norm((u - middle) / width), 1e-3)
        is_scaled = k == dim + 1

        def value(length: Float[Array, ""]) -> Float[Array, ""]:
            size = jnp.abs(length)
            axis = length * width * (jnp.arange(dim) == k)
            end, log_det = whitening.forward(u + jnp.where(k < dim, axis, size * (u - middle) / radius))
            end = jnp.where(is_scaled, jnp.where(size > 0.0, size, 1.0) * x, end)
            return target.logdensity_fn(end) + jnp.where(is_scaled, 0.0, log_det)

        values = jax.vmap(value)(jnp.append(lengths, 0.0))
        change, size = values[:-1] - values[-1], jnp.abs(lengths)
        needed = jnp.where(k < dim, 1.0, dim) * jnp.where(k == dim, jnp.log1p(size / radius), jnp.log(size))
        undefined = jnp.isnan(change) | (change == jnp.inf)
        stays = ~undefined & (change > -needed)
        return jnp.where(undefined[:2], stays[2:], stays[:2])

    def direction(k: Int[Array, ""]) -> Float[Array, ""]:
        stays = jax.vmap(lambda x, u: along(k, x, u))(x[chosen], u[chosen])
        return jnp.max(jnp.mean(stays, 0, dtype=u.dtype))

    tested = jnp.concatenate([jnp.arange(0, dim, _stride(dim)), jnp.array([dim, dim + 1])])
    share = jax.lax.map(direction, tested, batch_size=min(max(1, _TOGETHER // num), len(tested)))
    order = whitening.order if isinstance(whitening, Triangular) else jnp.arange(dim)
    return Rays(jnp.zeros(dim, u.dtype).at[order[tested[:-2]]].set(share[:-2]), share[-2], share[-1])
