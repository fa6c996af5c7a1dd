# SPDX-License-Identifier: Apache-2.0
"""Maps of single coordinates: any marginal law, several modes included."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Margins", "fit_margins", "identity_margins"]

_BINS = 16  # of a margin's spline
_TAIL = 0.002  # share of the points beyond a margin's outer knots, on either side
_NARROWEST = 1e-4  # whitened width of a bin without points: what it holds of N(0, 1) is drawn for nothing


class Margins(NamedTuple):
    """Increasing maps of single coordinates: rational quadratic splines, linear beyond the outer knots.

    They give a coordinate any marginal law, several modes included.

    Attributes:
        u: the knots, increasing, shape ``[d, B+1]``.
        y: their images, increasing, shape ``[d, B+1]``.
        slope: the derivative there, shape ``[d, B+1]``.

    Reference:
        Durkan et al. (2019), Neural spline flows, arXiv:1906.04032, eq. 4-6.
    """

    u: Float[Array, "d B1"]
    y: Float[Array, "d B1"]
    slope: Float[Array, "d B1"]

    def forward(self, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one point; with the log-determinant."""
        u0, u1, y0, y1, d0, d1, inside, below = _bin(self, self.u, u)
        secant = (y1 - y0) / (u1 - u0)
        t = jnp.where(inside, (u - u0) / (u1 - u0), 0.5)
        rest = 1.0 - t
        denominator = secant + (d0 + d1 - 2.0 * secant) * t * rest
        image = y0 + (y1 - y0) * (secant * t * t + d0 * t * rest) / denominator
        slope = secant**2 * (d1 * t * t + 2.0 * secant * t * rest + d0 * rest * rest) / denominator**2
        outside = jnp.where(below, y0 + d0 * (u - u0), y1 + d1 * (u - u1))
        slope = jnp.where(inside, slope, jnp.where(below, d0, d1))
        return jnp.where(inside, image, outside), jnp.sum(jnp.log(slope))

    def inverse(self, y: Float[Array, " d"]) -> Float[Array, " d"]:
        """Map one point back, without the log-determinant: a quadratic equation in every piece."""
        u0, u1, y0, y1, d0, d1, inside, below = _bin(self, self.y, y)
        secant = (y1 - y0) / (u1 - u0)
        rise = jnp.where(inside, y - y0, 0.5 * (y1 - y0))
        bend = rise * (d0 + d1 - 2.0 * secant)
        a = (y1 - y0) * (secant - d0) + bend
        b = (y1 - y0) * d0 - bend
        c = -secant * rise
        t = 2.0 * c / (-b - jnp.sqrt(jnp.maximum(b * b - 4.0 * a * c, 0.0)))
        return jnp.where(inside, u0 + t * (u1 - u0), jnp.where(below, u0 + (y - y0) / d0, u1 + (y - y1) / d1))


def identity_margins(like: Float[Array, " d"]) -> Margins:
    """Make margins that change nothing, of the dimension and type of a point."""
    knots = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, _BINS + 1, dtype=like.dtype), (like.shape[0], _BINS + 1))
    return Margins(knots, knots, jnp.ones_like(knots))


def fit_margins(points: Float[Array, "n d"], weight: Float[Array, " n"]) -> Margins:
    """Fit margins that carry N(0, 1) to the marginal law of weighted points.

    Knots are evenly spaced between outer quantiles of the points, so that an empty stretch between two
    modes becomes a steep piece of its own. A coordinate whose counts N(0, 1) explains as well, by the
    Bayesian information criterion, keeps the identity: the noise of its knots would be all it gains.

    Args:
        points: shape ``[n, d]``, finite.
        weight: not negative, shape ``[n]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jax.scipy.special import ndtri
        >>> from numpyro_sbtm.core.maps.spline import fit_margins
        >>> normal = ndtri((jnp.arange(9999) + 0.5) / 9999)[:, None]
        >>> margins = fit_margins(3 * normal, jnp.ones(9999))
        >>> float(jnp.abs(margins.slope[:, 2:-2] - 3).max()) < 0.1
        True
        >>> fit_margins(normal, jnp.ones(9999)).slope.max().item()
        1.0
    """
    low, high = jnp.quantile(points, _TAIL, 0), jnp.quantile(points, 1.0 - _TAIL, 0)
    y = low + jnp.maximum(high - low, 1e-6) * jnp.linspace(0.0, 1.0, _BINS + 1, dtype=points.dtype)[:, None]
    below = jax.lax.map(lambda level: weight @ (points <= level).astype(points.dtype), y)
    u = jax.scipy.special.ndtri((below + 0.5) / (jnp.sum(weight) + 1.0))
    width = jnp.maximum(jnp.diff(u, axis=0), _NARROWEST)
    u = jnp.concatenate([u[:1], u[0] + jnp.cumsum(width, 0)])
    # weighted harmonic means of the secants keep the spline increasing (Fritsch & Butland 1984)
    secant = jnp.diff(y, axis=0) / width
    left, right = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    inner = (left + right) / (left / secant[:-1] + right / secant[1:])
    fitted = Margins(u.T, y.T, jnp.concatenate([secant[:1], inner, secant[-1:]]).T)
    total = jnp.sum(weight)
    count = jnp.diff(below, axis=0, prepend=0.0, append=total)
    share = jnp.diff(jax.scipy.special.ndtr(y), axis=0, prepend=0.0, append=1.0)
    gain = jnp.sum(jax.scipy.special.xlogy(count, count / jnp.maximum(total * share, 1e-12)), 0)
    needed = gain > 0.5 * _BINS * jnp.log(total)
    blank = identity_margins(points[0])
    return jax.tree.map(lambda new, old: jnp.where(needed[:, None], new, old), fitted, blank)


def _bin(margins: Margins, knots: Float[Array, "d B1"], value: Float[Array, " d"]):  # type: ignore[no-untyped-def]
    """Look up the piece of every spline that a value lies in: its ends, secant, and whether there is one."""
    k = jnp.clip(jnp.sum(value[:, None] >= knots, 1) - 1, 0, knots.shape[1] - 2)

    def ends(table: Float[Array, "d B1"]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        pair = jnp.take_along_axis(table, jnp.stack([k, k + 1], 1), 1)
        return pair[:, 0], pair[:, 1]

    inside = (value > knots[:, 0]) & (value < knots[:, -1])
    (u0, u1), (y0, y1), (d0, d1) = (ends(table) for table in margins)
    return u0, u1, y0, y1, d0, d1, inside, value <= knots[:, 0]
