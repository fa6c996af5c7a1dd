# SPDX-License-Identifier: Apache-2.0
"""Whitening: an invertible map under which a badly scaled target looks like N(0, I)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.target import Target

__all__ = [
    "LowRank",
    "Margins",
    "Whitening",
    "affine",
    "fit_margins",
    "identity_margins",
    "invert",
    "unwhiten",
    "whiten",
]

_BINS = 16  # of a margin's spline
_TAIL = 0.002  # share of the points beyond a margin's outer knots, on either side
_NARROWEST = 1e-4  # whitened width of a bin without points: what it holds of N(0, 1) is drawn for nothing
_MAX_LOG_SCALE = 6.0  # bound on what one whitened point may add to a log scale: exp(6) is 400 times


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


class Whitening(NamedTuple):
    """A triangular map from the whitened point u to the point x of the target,

        x[order] = loc + L r,      r_j = σ_j s_j + σ_j² (V s + b)_j,
        σ_j⁻² = exp(-2 (W s)_j) + κ_j,      s_j = sinh(exp(τ_j) asinh(m_j(u_j)) + ε_j),

    with W and V strictly lower triangular. With all but loc and L at zero it is affine. The rest is the
    shape of a hierarchical posterior. Given hyperparameters, which ``order`` puts first, the precision of
    an effect is that of its prior, log-linear in them, plus that of its data, κ; and its mean leaves the
    prior's by an amount proportional to its variance. So a funnel becomes nearly Gaussian down to its
    neck. ε skews a coordinate and τ changes its tails, as the logarithm of a scale is skewed. The Jacobian
    is triangular: the log-determinant is a sum. The margins m are fitted to points, and are the identity
    where none are at hand.

    Attributes:
        order: a permutation of the coordinates, shape ``[d]``.
        loc: shape ``[d]``.
        scale_tril: L, lower triangular with a positive diagonal, shape ``[d, d]``.
        log_scale_slope: W, shape ``[d, d]``.
        shift_slope: V, shape ``[d, d]``.
        shift: b, shape ``[d]``.
        precision: κ, not negative, shape ``[d]``.
        skew: ε, shape ``[d]``.
        tail: τ, shape ``[d]``.
        margins: m; None for the identity.

    Reference:
        Papamakarios et al. (2017), arXiv:1705.07057, eq. 3 (maps whose scale depends on earlier
        coordinates); Jones & Pewsey (2009), Sinh-arcsinh distributions, eq. 2 (s).
    """

    order: Int[Array, " d"]
    loc: Float[Array, " d"]
    scale_tril: Float[Array, "d d"]
    log_scale_slope: Float[Array, "d d"]
    shift_slope: Float[Array, "d d"]
    shift: Float[Array, " d"]
    precision: Float[Array, " d"]
    skew: Float[Array, " d"]
    tail: Float[Array, " d"]
    margins: Margins | None = None


class LowRank(NamedTuple):
    """An affine map from u to x = loc + std (u + V (γ Vᵀ u)) that takes memory linear in d.

    Attributes:
        loc: shape ``[d]``.
        std: positive, shape ``[d]``.
        basis: V, with orthonormal columns, shape ``[d, r]``.
        gain: γ, above -1, shape ``[r]``.
    """

    loc: Float[Array, " d"]
    std: Float[Array, " d"]
    basis: Float[Array, "d r"]
    gain: Float[Array, " r"]

    @property
    def margins(self) -> None:
        """None: there are no margins."""
        return None


def affine(
    loc: Float[Array, " d"], scale_tril: Float[Array, "d d"], order: Int[Array, " d"] | None = None
) -> Whitening:
    """Make the affine whitening x = loc + scale_tril u.

    Args:
        loc: shape ``[d]``.
        scale_tril: lower triangular with a positive diagonal, shape ``[d, d]``.
        order: the permutation of x in which these are given; None for x itself.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.whitening import affine, unwhiten
        >>> x, log_det = unwhiten(affine(jnp.ones(2), 3 * jnp.eye(2)), jnp.array([0.0, 1.0]))
        >>> x.tolist(), round(float(log_det), 4)  # 2 log 3
        ([1.0, 4.0], 2.1972)
    """
    zero = jnp.zeros_like(scale_tril)
    order = jnp.arange(loc.shape[0]) if order is None else order
    flat = jnp.zeros_like(loc)
    return Whitening(order, loc, scale_tril, zero, zero, flat, flat, flat, flat)


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
        >>> from numpyro_sbtm.core.whitening import fit_margins
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


def _apply_margins(margins: Margins, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Map u to y, with the log-determinant."""
    u0, u1, y0, y1, d0, d1, inside, below = _bin(margins, margins.u, u)
    secant = (y1 - y0) / (u1 - u0)
    t = jnp.where(inside, (u - u0) / (u1 - u0), 0.5)
    rest = 1.0 - t
    denominator = secant + (d0 + d1 - 2.0 * secant) * t * rest
    image = y0 + (y1 - y0) * (secant * t * t + d0 * t * rest) / denominator
    slope = secant**2 * (d1 * t * t + 2.0 * secant * t * rest + d0 * rest * rest) / denominator**2
    outside = jnp.where(below, y0 + d0 * (u - u0), y1 + d1 * (u - u1))
    slope = jnp.where(inside, slope, jnp.where(below, d0, d1))
    return jnp.where(inside, image, outside), jnp.sum(jnp.log(slope))


def _invert_margins(margins: Margins, y: Float[Array, " d"]) -> Float[Array, " d"]:
    """Map y back to u: a quadratic equation in every piece."""
    u0, u1, y0, y1, d0, d1, inside, below = _bin(margins, margins.y, y)
    secant = (y1 - y0) / (u1 - u0)
    rise = jnp.where(inside, y - y0, 0.5 * (y1 - y0))
    bend = rise * (d0 + d1 - 2.0 * secant)
    a = (y1 - y0) * (secant - d0) + bend
    b = (y1 - y0) * d0 - bend
    c = -secant * rise
    t = 2.0 * c / (-b - jnp.sqrt(jnp.maximum(b * b - 4.0 * a * c, 0.0)))
    return jnp.where(inside, u0 + t * (u1 - u0), jnp.where(below, u0 + (y - y0) / d0, u1 + (y - y1) / d1))


@jax.custom_jvp
def _arcsinh(u: Float[Array, " d"]) -> Float[Array, " d"]:
    """Compute the inverse hyperbolic sine with one logarithm, exact to the rounding of numbers near one."""
    return jnp.sign(u) * jnp.log(jnp.abs(u) + jnp.sqrt(1.0 + u * u))


@_arcsinh.defjvp
def _arcsinh_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    (u,), (tangent,) = primals, tangents
    return _arcsinh(u), tangent / jnp.sqrt(1.0 + u * u)


def _conditional(
    whitening: Whitening, s: Float[Array, " d"], j: slice | Int[Array, ""]
) -> tuple[Float[Array, "*j"], Float[Array, "*j"]]:
    """Compute σ_j⁻² and the shift of coordinate j, or of all, given the coordinates before."""
    ratio = whitening.log_scale_slope[j] @ s / _MAX_LOG_SCALE
    # the cube cancels that of the hyperbolic tangent: linear up to half of the bound
    log_scale = _MAX_LOG_SCALE * jnp.tanh(ratio + ratio**3 / 3.0)
    precision = jnp.exp(-2.0 * log_scale) + whitening.precision[j]
    return precision, (whitening.shift_slope[j] @ s + whitening.shift[j]) / precision


def triangular(whitening: Whitening, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Map u, after its margins, to x[order], with the log-determinant."""
    # half the time of a gradient through this map goes into functions such as these: few, and none twice
    grown = jnp.exp(jnp.exp(whitening.tail) * _arcsinh(u) + whitening.skew)
    s, cosh = 0.5 * (grown - 1.0 / grown), 0.5 * (grown + 1.0 / grown)
    precision, shift = _conditional(whitening, s, slice(None))
    root = jnp.sqrt(precision)
    r = s / root + shift
    log_slopes = whitening.tail + jnp.log(cosh / (root * jnp.sqrt(1.0 + u * u)))
    log_det = jnp.sum(log_slopes) + jnp.sum(jnp.log(jnp.diagonal(whitening.scale_tril)))
    return whitening.loc + whitening.scale_tril @ r, log_det


def unwhiten(
    whitening: Whitening | LowRank, u: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Map a whitened point to the target's space.

    Args:
        whitening: the map.
        u: one whitened point, shape ``[d]``.

    Returns:
        The point x, shape ``[d]``, and the log-determinant of dx/du, shape ``[]``.
    """
    if isinstance(whitening, LowRank):
        stretched = u + whitening.basis @ (whitening.gain * (whitening.basis.T @ u))
        log_det = jnp.sum(jnp.log(whitening.std)) + jnp.sum(jnp.log1p(whitening.gain))
        return whitening.loc + whitening.std * stretched, log_det
    margin, log_slopes = u, jnp.zeros((), u.dtype)
    if whitening.margins is not None:
        margin, log_slopes = _apply_margins(whitening.margins, u)
    y, log_det = triangular(whitening, margin)
    return jnp.zeros_like(y).at[whitening.order].set(y), log_det + log_slopes


def invert(
    whitening: Whitening | LowRank, x: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Map a point of the target's space to its whitened point: the inverse of `unwhiten`.

    Args:
        whitening: the map.
        x: one point, shape ``[d]``.

    Returns:
        The whitened point u, shape ``[d]``, and the log-determinant of dx/du there, shape ``[]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.whitening import affine, invert
        >>> invert(affine(jnp.ones(2), 3 * jnp.eye(2)), jnp.array([1.0, 4.0]))[0].tolist()
        [0.0, 1.0]
    """
    if isinstance(whitening, LowRank):
        z = (x - whitening.loc) / whitening.std
        shrunk = whitening.gain / (1.0 + whitening.gain) * (whitening.basis.T @ z)
        u = z - whitening.basis @ shrunk
        return u, unwhiten(whitening, u)[1]
    r = jax.scipy.linalg.solve_triangular(
        whitening.scale_tril, x[whitening.order] - whitening.loc, lower=True
    )

    def solve(j: Int[Array, ""], s: Float[Array, " d"]) -> Float[Array, " d"]:
        # what comes before j is known, and nothing else enters
        precision, shift = _conditional(whitening, s, j)
        return s.at[j].set((r[j] - shift) * jnp.sqrt(precision))

    s = jax.lax.fori_loop(0, r.shape[0], solve, jnp.zeros_like(r))
    margin = jnp.sinh((jnp.arcsinh(s) - whitening.skew) * jnp.exp(-whitening.tail))
    u = margin if whitening.margins is None else _invert_margins(whitening.margins, margin)
    return u, unwhiten(whitening, u)[1]


def whiten(target: Target, whitening: Whitening | LowRank) -> Target:
    """Pull a target back through a whitening: same integral, so the same log Z.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.whitening import affine, whiten
        >>> from numpyro_sbtm.core.target import Target
        >>> wide = Target(lambda x: -0.5 * jnp.sum((x / 5) ** 2), 1)
        >>> white = whiten(wide, affine(jnp.zeros(1), 5 * jnp.eye(1)))
        >>> round(float(white.logdensity_fn(jnp.ones(1))), 4)  # -1/2 + log 5
        1.1094
    """

    def logdensity(u: Float[Array, " d"]) -> Float[Array, ""]:
        x, log_det = unwhiten(whitening, u)
        return target.logdensity_fn(x) + log_det

    return Target(logdensity, target.dim, target.log_z)
