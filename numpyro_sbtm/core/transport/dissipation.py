# SPDX-License-Identifier: Apache-2.0
"""How fast particles that move approach the target, and whether the score they move by can be trusted."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["Dissipation", "dissipation"]


class Dissipation(NamedTuple):
    """Estimates at points that move with a velocity v, none of which it was trained on; any leading axes.

    Attributes:
        fisher: mean |v|², or mean v·C⁻¹v for a velocity that was multiplied by C. With v = ∇log π - s for the
            points' own score s it is the relative Fisher information F, and the dissipation. A wrong s makes
            it wrong, and it cannot see the masses of modes that are apart: small, it proves nothing.
        dissipation: mean of ∇·v + v·∇log π, an unbiased estimate of -dKL(q | π)/dt for any v.
        error: standard error of ``dissipation``.

    Reference:
        Liu, Lee & Jordan (2016), arXiv:1602.03253, theorem 3.6, for the identity: the derivative of KL
        is minus the mean of the Langevin-Stein operator of v.
    """

    fisher: Float[Array, "*k"]
    dissipation: Float[Array, "*k"]
    error: Float[Array, "*k"]

    @property
    def residual(self) -> Float[Array, "*k"]:
        """Stein residual, mean of ∇·v + v·s: zero for an exact score, of either sign for a wrong one."""
        return self.dissipation - self.fisher

    @property
    def dual(self) -> Float[Array, "*k"]:
        """Lower bound of F: F less the mean squared error of s, minus the held-out score matching loss."""
        return 2.0 * self.dissipation - self.fisher

    def trusted(self, tolerance: float = 0.25) -> Bool[Array, "*k"]:
        """Say whether the score that v is made of fits the points: the residual is small, or within noise."""
        allowed = tolerance * self.fisher + 2.0 * self.error
        return jnp.abs(self.residual) <= allowed


def dissipation(
    v: Float[Array, "m d"],
    divergence: Float[Array, " m"],
    scores: Float[Array, "m d"],
    against: Float[Array, "m d"] | None = None,
) -> Dissipation:
    """Estimate dissipation from what is known at held-out points; what is not finite there is left out.

    Args:
        v: the velocity, shape ``[m, d]``.
        divergence: ∇·v or an unbiased estimate of it, shape ``[m]``.
        scores: ∇log π, shape ``[m, d]``.
        against: C⁻¹v for a velocity that was multiplied by C; None for v itself.

    Returns:
        The estimates, each of shape ``[]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.transport.dissipation import dissipation
        >>> x = jax.random.normal(jax.random.key(0), (100_000, 2))  # score -x; target N(0, I/2): v = -x
        >>> found = dissipation(-x, jnp.full(100_000, -2.0), -2.0 * x)
        >>> round(float(found.fisher), 1), round(float(found.dissipation), 1), bool(found.trusted())
        (2.0, 2.0, True)
    """
    each = divergence + jnp.sum(v * scores, -1)
    speed = jnp.sum(v * (v if against is None else against), -1)
    usable = jnp.isfinite(each) & jnp.isfinite(speed)
    count = jnp.maximum(jnp.sum(usable), 1)
    each, speed = jnp.where(usable, each, 0.0), jnp.where(usable, speed, 0.0)
    mean = jnp.sum(each) / count
    variance = jnp.sum(jnp.where(usable, (each - mean) ** 2, 0.0)) / count
    return Dissipation(jnp.sum(speed) / count, mean, jnp.sqrt(variance / count))
