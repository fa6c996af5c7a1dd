# SPDX-License-Identifier: Apache-2.0
"""What a map is, and a target seen through one."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from numpyro_sbtm.core.target import Target

__all__ = ["Map", "whiten"]


@runtime_checkable
class Map(Protocol):
    """A bijection of R^d, a pytree of arrays: from a whitened point u to a point x of the target's space.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.maps import Affine
        >>> scaled = Affine(jnp.ones(2), 3 * jnp.eye(2))
        >>> x, log_det = scaled.forward(jnp.array([0.0, 1.0]))
        >>> x.tolist(), scaled.inverse(x)[0].tolist()
        ([1.0, 4.0], [0.0, 1.0])
    """

    def forward(self, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one whitened point; with the log-determinant of dx/du, shape ``[]``."""
        ...

    def inverse(self, x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one point of the target's space back; with the log-determinant of dx/du there, shape ``[]``."""
        ...


def whiten(target: Target, whitening: Map) -> Target:
    """Pull a target back through a whitening: same integral, so the same log Z.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.maps import Affine, whiten
        >>> from numpyro_sbtm.core.target import Target
        >>> wide = Target(lambda x: -0.5 * jnp.sum((x / 5) ** 2), 1)
        >>> white = whiten(wide, Affine(jnp.zeros(1), 5 * jnp.eye(1)))
        >>> round(float(white.logdensity_fn(jnp.ones(1))), 4)  # -1/2 + log 5
        1.1094
    """

    def logdensity(u: Float[Array, " d"]) -> Float[Array, ""]:
        x, log_det = whitening.forward(u)
        return target.logdensity_fn(x) + log_det

    return Target(logdensity, target.dim, target.log_z)
