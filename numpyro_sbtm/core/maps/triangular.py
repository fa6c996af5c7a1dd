# SPDX-License-Identifier: Apache-2.0
"""Triangular maps with the shape of a hierarchical posterior."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.maps.spline import Margins

__all__ = ["Triangular"]

_MAX_LOG_SCALE = 6.0  # bound on what one whitened point may add to a log scale: exp(6) is 400 times


class Triangular(NamedTuple):
    """A triangular map from the whitened point u to the point x of the target,

        x[order] = loc + L h(r),      r_j = σ_j s_j + σ_j² (V s + b)_j,
        σ_j⁻² = exp(-2 (W s)_j) + κ_j,      s_j = sinh(exp(τ_j) asinh(m_j(u_j)) + ε_j),

    with W and V strictly lower triangular, and h two shears r + Q (r∘r) after one another, Q strictly lower
    triangular, too. With all but loc and L at zero it is affine. Shears bend: a coordinate may follow the
    square of one before it, and another the square of that. The rest is the shape of a hierarchical
    posterior. Given hyperparameters, which ``order`` puts first, the precision of an effect is that of its
    prior, log-linear in them, plus that of its data, κ; and its mean leaves the prior's by an amount
    proportional to its variance. So a funnel becomes nearly Gaussian down to its neck. ε skews a coordinate
    and τ changes its tails, as the logarithm of a scale is skewed. The Jacobian is triangular: the
    log-determinant is a sum, to which shears add nothing. The margins m are fitted to points, and are the
    identity where none are at hand.

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
        shears: both Q, shape ``[2, d, d]``.
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
    shears: Float[Array, "2 d d"]
    margins: Margins | None = None

    @classmethod
    def affine(
        cls, loc: Float[Array, " d"], scale_tril: Float[Array, "d d"], order: Int[Array, " d"] | None = None
    ) -> "Triangular":
        """Make the one that is affine, x[order] = loc + scale_tril u; None for x in its own order."""
        zero, flat = jnp.zeros_like(scale_tril), jnp.zeros_like(loc)
        order = jnp.arange(loc.shape[0]) if order is None else order
        return cls(order, loc, scale_tril, zero, zero, flat, flat, flat, flat, jnp.stack([zero, zero]))

    def forward(self, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one whitened point; with the log-determinant."""
        margin, log_slopes = u, jnp.zeros((), u.dtype)
        if self.margins is not None:
            margin, log_slopes = self.margins.forward(u)
        y, log_det = self.sorted(margin)
        return jnp.zeros_like(y).at[self.order].set(y), log_det + log_slopes

    def inverse(self, x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one point of the target's space back; with the log-determinant."""
        r = jax.scipy.linalg.solve_triangular(self.scale_tril, x[self.order] - self.loc, lower=True)
        for shear in self.shears[::-1]:
            sheared = r
            back = lambda j, r: r.at[j].set(sheared[j] - shear[j] @ (r * r))  # noqa: B023, E731
            r = jax.lax.fori_loop(1, r.shape[0], back, r)

        def solve(j: Int[Array, ""], s: Float[Array, " d"]) -> Float[Array, " d"]:
            # what comes before j is known, and nothing else enters
            precision, shift = self._conditional(s, j)
            return s.at[j].set((r[j] - shift) * jnp.sqrt(precision))

        s = jax.lax.fori_loop(0, r.shape[0], solve, jnp.zeros_like(r))
        margin = jnp.sinh((jnp.arcsinh(s) - self.skew) * jnp.exp(-self.tail))
        u = margin if self.margins is None else self.margins.inverse(margin)
        return u, self.forward(u)[1]

    def sorted(self, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map u, after its margins, to x[order]; with the log-determinant."""
        # half the time of a gradient through this map goes into functions such as these: few, and none twice
        grown = jnp.exp(jnp.exp(self.tail) * _arcsinh(u) + self.skew)
        s, cosh = 0.5 * (grown - 1.0 / grown), 0.5 * (grown + 1.0 / grown)
        precision, shift = self._conditional(s, slice(None))
        root = jnp.sqrt(precision)
        r = s / root + shift
        for shear in self.shears:
            r = r + shear @ (r * r)
        log_slopes = self.tail + jnp.log(cosh / (root * jnp.sqrt(1.0 + u * u)))
        log_det = jnp.sum(log_slopes) + jnp.sum(jnp.log(jnp.diagonal(self.scale_tril)))
        return self.loc + self.scale_tril @ r, log_det

    def _conditional(
        self, s: Float[Array, " d"], j: slice | Int[Array, ""]
    ) -> tuple[Float[Array, "*j"], Float[Array, "*j"]]:
        """Compute σ_j⁻² and the shift of coordinate j, or of all, given the coordinates before."""
        ratio = self.log_scale_slope[j] @ s / _MAX_LOG_SCALE
        # the cube cancels that of the hyperbolic tangent: linear up to half of the bound
        log_scale = _MAX_LOG_SCALE * jnp.tanh(ratio + ratio**3 / 3.0)
        precision = jnp.exp(-2.0 * log_scale) + self.precision[j]
        return precision, (self.shift_slope[j] @ s + self.shift[j]) / precision


@jax.custom_jvp
def _arcsinh(u: Float[Array, " d"]) -> Float[Array, " d"]:
    """Compute the inverse hyperbolic sine with one logarithm, exact to the rounding of numbers near one."""
    return jnp.sign(u) * jnp.log(jnp.abs(u) + jnp.sqrt(1.0 + u * u))


@_arcsinh.defjvp
def _arcsinh_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    (u,), (tangent,) = primals, tangents
    return _arcsinh(u), tangent / jnp.sqrt(1.0 + u * u)
