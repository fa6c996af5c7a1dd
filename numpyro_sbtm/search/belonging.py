# SPDX-License-Identifier: Apache-2.0
"""Which particles are of a mode."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.search.ascent import likely_radius

__all__ = ["FOUND", "belong"]

FOUND = 0.25  # share of the particles it asks for with which a mode counts as found
_APART = 3.0  # distance of the particles' mean that shows another mode among them
_OTHERS = 4  # modes that are left out so


def belong(z: Float[Array, "n d"]) -> Bool[Array, " n"]:
    """Say which particles may be of a mode, in coordinates where it is N(0, I).

    Norms are not enough: in a hundred dimensions particles of another mode six deviations away are as near
    as many of its own. But their mean then lies off, and those beyond half of the way to it are left out.
    """

    def leave_out(_: Int[Array, ""], own: Bool[Array, " n"]) -> Bool[Array, " n"]:
        mean = own @ z / jnp.maximum(jnp.sum(own), 1)
        distance = jnp.linalg.norm(mean)
        beyond = z @ mean > 0.5 * distance**2
        return own & ~((distance > _APART) & beyond)

    near = jnp.sum(z * z, -1) < likely_radius(z.shape[1])
    return jax.lax.fori_loop(0, _OTHERS, leave_out, near)
