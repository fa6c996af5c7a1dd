# SPDX-License-Identifier: Apache-2.0
"""How far a condition holds."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["furthest"]

_STEPS = 30


def furthest(holds: Callable[[Float[Array, ""]], Bool[Array, ""]], low: Float[Array, ""]) -> Float[Array, ""]:
    """Find the largest number up to 1 for which a condition holds, by bisection.

    Args:
        holds: the condition; it holds at ``low``, and beyond some number no more.
        low: where to begin, at most 1.

    Returns:
        The number, at least ``low``; 1 itself if the condition holds there.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.bisection import furthest
        >>> round(float(furthest(lambda x: x**2 < 0.25, jnp.zeros(()))), 6)
        0.5
    """

    def halve(_, ends):  # type: ignore[no-untyped-def]
        low, high = ends
        middle = 0.5 * (low + high)
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    one = jnp.ones_like(low)
    low, _ = jax.lax.fori_loop(0, _STEPS, halve, (low, one))
    return jnp.where(holds(one), one, low)
