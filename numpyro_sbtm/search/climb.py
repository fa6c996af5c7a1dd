# SPDX-License-Identifier: Apache-2.0
"""Climbs towards modes, and which of the tops are of one mode."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.target import LogDensity

__all__ = ["climb", "connected", "dips_between", "evaluations_between", "leaders", "values_between"]

_SEGMENTS, _DIP = 8, 0.5  # parts of the way between two points; nats of a dip on it that separates them
_HALVINGS = 20  # of a step that does not gain
_LEAST_GAIN = 1e-5  # nats in one step of a climb, below which, three times in a row, it ends


def climb(
    logdensity_fn: LogDensity, start: Float[Array, " d"], num_steps: int
) -> tuple[Float[Array, " d"], Evaluations]:
    """Climb towards a mode by L-BFGS until it gains next to nothing.

    Args:
        logdensity_fn: the log density.
        start: where to begin, shape ``[d]``.
        num_steps: steps at most.

    Returns:
        The best finite point met, and what was evaluated.
    """
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=_HALVINGS)
    optimiser = optax.lbfgs(linesearch=search)

    def loss(y: Float[Array, " d"]) -> Float[Array, ""]:
        return -logdensity_fn(y)

    def step(carry):  # type: ignore[no-untyped-def]
        k, y, state, best, best_value, stale, tried = carry
        value, gradient = jax.value_and_grad(loss)(y)
        better = jnp.isfinite(value) & (value < best_value)
        stale = jnp.where(best_value - value > _LEAST_GAIN, 0, stale + 1)
        best, best_value = jnp.where(better, y, best), jnp.where(better, value, best_value)
        updates, state = optimiser.update(gradient, state, y, value=value, grad=gradient, value_fn=loss)
        tried += optax.tree.get(state, "num_linesearch_steps").astype(tried.dtype)
        return k + 1, optax.apply_updates(y, updates), state, best, best_value, stale, tried

    def unfinished(carry):  # type: ignore[no-untyped-def]
        k, *_, stale, _ = carry
        return (k < num_steps) & (stale < 3)

    zero = jnp.zeros((), jnp.int32)
    carry = zero, start, optimiser.init(start), start, jnp.asarray(jnp.inf, start.dtype), zero, zero
    end = jax.lax.while_loop(unfinished, step, carry)
    return end[3], Evaluations(values=end[6], gradients=end[0]).as_arrays()


def dips_between(value_fn: LogDensity, start: Float[Array, " d"], end: Float[Array, " d"]) -> Bool[Array, ""]:
    """Say whether a function, such as a log density, dips below both ends on the way between two points.

    Two normal modes of one scale that lie D deviations apart dip by D²/8 - log 2 nats. A value on the way
    that is NaN counts as a dip.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.search.climb import dips_between
        >>> wells = lambda x: -jnp.sum((x**2 - 4.0) ** 2)
        >>> [bool(dips_between(wells, jnp.array([-2.0]), jnp.array([x]))) for x in (2.0, -1.5)]
        [True, False]
    """
    parts = jnp.linspace(0.0, 1.0, _SEGMENTS + 1, dtype=start.dtype)[:, None]
    values = jax.vmap(value_fn)(start + parts * (end - start))
    return ~(jnp.min(values) >= jnp.minimum(values[0], values[-1]) - _DIP)


def values_between() -> int:
    """Count the values that `dips_between` evaluates."""
    return _SEGMENTS + 1


def connected(value_fn: LogDensity, points: Float[Array, "m d"]) -> Bool[Array, "m m"]:
    """Say between which points a function, such as a log density, does not dip below both ends.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.search.climb import connected
        >>> wells = lambda x: -jnp.sum((x**2 - 4.0) ** 2)
        >>> connected(wells, jnp.array([[-2.0], [2.0], [1.5]]))[1].tolist()
        [False, True, True]
    """
    dips = jax.vmap(lambda start, end: dips_between(value_fn, start, end), (None, 0))
    return ~jax.lax.map(lambda start: dips(start, points), points)


def evaluations_between(num: int) -> Evaluations:
    """Count what `connected` evaluates for so many points."""
    return Evaluations(values=num * num * values_between())


def leaders(
    order: Int[Array, " m"], same: Bool[Array, "m m"], usable: Bool[Array, " m"]
) -> tuple[Bool[Array, " m"], Int[Array, " m"]]:
    """Group things: each, in their order, joins the first leader that it equals, or leads a new group.

    Args:
        order: a permutation, shape ``[m]``.
        same: whether two are the same, shape ``[m, m]``.
        usable: what is not belongs to no group, shape ``[m]``.

    Returns:
        Which of them lead; and the index of each one's leader, its own where it has none.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.search.climb import leaders
        >>> same = jnp.array([[True, True, False], [True, True, False], [False, False, True]])
        >>> [part.tolist() for part in leaders(jnp.array([1, 0, 2]), same, jnp.ones(3, bool))]
        [[False, True, True], [1, 1, 2]]
    """

    def visit(carry, i: Int[Array, ""]):  # type: ignore[no-untyped-def]
        leads, leader = carry
        mine = (leads & same[i])[order]
        joins = jnp.any(mine)
        leads = leads.at[i].set(usable[i] & ~joins)
        return (leads, leader.at[i].set(jnp.where(usable[i] & joins, order[jnp.argmax(mine)], i))), None

    carry = jnp.zeros(len(order), bool), jnp.arange(len(order))
    return jax.lax.scan(visit, carry, order)[0]
