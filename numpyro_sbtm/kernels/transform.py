# SPDX-License-Identifier: Apache-2.0
"""Transforms of NumPyro, flows among them, as maps that whiten a posterior."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

__all__ = ["TransformMap"]


@partial(jax.tree_util.register_dataclass, data_fields=("transform",), meta_fields=())
@dataclass(frozen=True)
class TransformMap:
    """A bijection of R^d, from a transform of `numpyro.distributions.transforms`.

    Attributes:
        transform: from whitened points to those of the flattened unconstrained space; a pytree, as all of
            NumPyro's are.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro.distributions.transforms import LowerCholeskyAffine
        >>> from numpyro_sbtm.kernels.transform import TransformMap
        >>> scaled = TransformMap(LowerCholeskyAffine(jnp.ones(2), 3 * jnp.eye(2)))
        >>> scaled.inverse(jnp.array([1.0, 4.0]))[0].tolist()
        [0.0, 1.0]
    """

    transform: Any

    def forward(self, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one whitened point; with the log-determinant."""
        x = self.transform(u)
        return x, self.transform.log_abs_det_jacobian(u, x).sum()

    def inverse(self, x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map one point back; with the log-determinant of the way there."""
        u = self.transform.inv(x)
        return u, self.transform.log_abs_det_jacobian(u, x).sum()
