# SPDX-License-Identifier: Apache-2.0
"""Affine maps that take memory linear in the dimension."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["LowRank"]


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

    def forward(self, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one whitened point; with the log-determinant."""
        stretched = u + self.basis @ (self.gain * (self.basis.T @ u))
        return self.loc + self.std * stretched, self._log_det

    def inverse(self, x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one point of the target's space back; with the log-determinant."""
        z = (x - self.loc) / self.std
        shrunk = self.gain / (1.0 + self.gain) * (self.basis.T @ z)
        return z - self.basis @ shrunk, self._log_det

    @property
    def _log_det(self) -> Float[Array, ""]:
        return jnp.sum(jnp.log(self.std)) + jnp.sum(jnp.log1p(self.gain))
