# SPDX-License-Identifier: Apache-2.0
"""What stands for mixtures and particles that are not there."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.mixture import Mixture, normal

__all__ = ["only_normal", "padded_normal", "unsearched"]


def unsearched(like: Float[Array, " d"]) -> tuple[Mixture, Float[Array, "0 d"]]:
    """Make what stands for the mixture and the particles where none look."""
    return normal(len(like)), jnp.zeros((0, len(like)), like.dtype)


def padded_normal(like: Float[Array, " d"], size: int) -> Mixture:
    """Make N(0, I), all other components of which are not there."""
    shape = size, like.size
    blank = jnp.zeros(shape, like.dtype)
    return only_normal(Mixture(blank[:, 0], jnp.zeros((*shape, like.size), like.dtype), blank, blank))


def only_normal(like: Mixture) -> Mixture:
    """Make N(0, I) in the shapes of a mixture, all other components of which are not there."""
    rotation = None
    if like.rotation is not None:
        one = jnp.eye(like.centre.shape[1], dtype=like.centre.dtype)
        rotation = jnp.broadcast_to(one, like.rotation.shape)
    first = jnp.arange(len(like.log_weight)) == 0
    return Mixture(
        jnp.where(first, 0.0, -jnp.inf).astype(like.log_weight.dtype),
        rotation,
        jnp.zeros_like(like.centre),
        jnp.ones_like(like.std),
    )
