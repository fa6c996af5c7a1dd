# SPDX-License-Identifier: Apache-2.0
"""Affine maps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Affine"]


class Affine(NamedTuple):
    """The map x = loc + L u.

    Attributes:
        loc: shape ``[d]``.
        scale_tril: L, lower triangular with a positive diagonal, shape ``[d, d]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.maps import Affine
        >>> x, log_det = Affine(jnp.ones(2), 3 * jnp.eye(2)).forward(jnp.array([0.0, 1.0]))
        >>> x.tolist(), round(float(log_det), 4)  # 2 log 3
        ([1.0, 4.0], 2.1972)
    """

    loc: Float[Array, " d"]
    scale_tril: Float[Array, "d d"]

    def forward(self, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one whitened point; with the log-determinant."""
        return self.loc + self.scale_tril @ u, self._log_det

    def inverse(self, x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one point of the target's space back; with the log-determinant."""
        u = jax.scipy.linalg.solve_triangular(self.scale_tril, x - self.loc, lower=True)
        return u, self._log_det

    @property
    def _log_det(self) -> Float[Array, ""]:
        return jnp.sum(jnp.log(jnp.diagonal(self.scale_tril)))
