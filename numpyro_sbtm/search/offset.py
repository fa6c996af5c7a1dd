# SPDX-License-Identifier: Apache-2.0
"""What is subtracted from log densities, so that float32 holds their differences."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.compile import is_traced
from numpyro_sbtm.core.target import LogDensity
from numpyro_sbtm.search.climb import climb

__all__ = ["offset_near_mode"]

_ROUNDED = 5e3  # size of log densities from which float32 rounds away half a thousandth and more
_STEPS = 50


def offset_near_mode(logdensity_fn: LogDensity, starts: Float[Array, "s d"]) -> float:
    """Choose an offset for log densities that float32 would round: about the value at a mode.

    Args:
        logdensity_fn: the log density.
        starts: points of finite density, shape ``[s, d]``.

    Returns:
        The offset; 0 where the numbers are small, precise, or not known because they are traced.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.search.offset import offset_near_mode
        >>> offset_near_mode(lambda x: -1e6 - jnp.sum(x**2), jnp.ones((2, 3), jnp.float32))
        -1000000.0
    """
    if starts.dtype != jnp.float32 or is_traced(starts):
        return 0.0
    values = jax.jit(jax.vmap(logdensity_fn))(starts)
    if is_traced(values):  # of a model that closes over traced values
        return 0.0
    best = jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))
    if abs(float(values[best])) < _ROUNDED:
        return 0.0
    # where it is so large it changes as much on the way to a mode
    top = jax.jit(lambda x: logdensity_fn(climb(logdensity_fn, x, _STEPS)[0]))(starts[best])
    return float(jnp.maximum(top, values[best]))
