# SPDX-License-Identifier: Apache-2.0
"""Local moves between proposals: one transition of a blackjax kernel in the whitened space."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.lazy import load
from numpyro_sbtm.core.target import Key, LogDensity

__all__ = ["LOCAL_KERNELS", "LocalMove", "local_move"]

LOCAL_KERNELS = ("hmc", "mala", "nuts")
_LEAPS = 8
_TARGET_ACCEPTANCE = {"hmc": 0.75, "mala": 0.6, "nuts": 0.8}
_JITTER = (0.6, 1.2)  # range of the factor on the step size, drawn anew for every move
_ADAPTATION = 60


class LocalMove(NamedTuple):
    """A Markov kernel that leaves any density on R^d invariant, and the choice of its step size.

    Attributes:
        adapt: ``(key, logdensity_fn, points [m, d]) -> (step size, gradients spent)``; the points move along.
        step: ``(key, logdensity_fn, u [d], step size) -> (u [d], log density, acceptance probability,
            gradients spent)``.
    """

    adapt: Callable[[Key, LogDensity, Float[Array, "m d"]], tuple[Float[Array, ""], Int[Array, ""]]]
    step: Callable[..., tuple[Float[Array, " d"], Float[Array, ""], Float[Array, ""], Int[Array, ""]]]


def local_move(name: str) -> LocalMove:
    """Make a local move.

    Args:
        name: 'hmc' with 8 leapfrog steps, 'mala' with one, or 'nuts'.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.local import local_move
        >>> u, _, probability, gradients = local_move("hmc").step(
        ...     jax.random.key(0), lambda u: -0.5 * jnp.sum(u**2), jnp.zeros(2), 0.1)
        >>> u.shape, float(probability) > 0.9, int(gradients)
        ((2,), True, 9)
    """
    hmc = load("blackjax.mcmc.hmc")
    if name == "nuts":
        kernel: Any = load("blackjax.mcmc.nuts").build_kernel()
        extra: tuple[int, ...] = ()
    else:
        kernel = hmc.build_kernel()
        extra = (_LEAPS if name == "hmc" else 1,)

    def step(key: Key, logdensity_fn: LogDensity, u: Float[Array, " d"], step_size: Float[Array, ""] | float):  # type: ignore[no-untyped-def]
        key_jitter, key_move = jax.random.split(key)
        low, high = _JITTER
        factor = jax.random.uniform(key_jitter, (), u.dtype, low, high)
        state, info = kernel(
            key_move, hmc.init(u, logdensity_fn), logdensity_fn, factor * step_size, jnp.ones_like(u), *extra
        )
        # one more where it starts
        gradients = jnp.asarray(info.num_integration_steps + 1, jnp.int32)
        return state.position, state.logdensity, info.acceptance_rate, gradients

    def adapt(
        key: Key, logdensity_fn: LogDensity, points: Float[Array, "m d"]
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        def advance(carry, inputs):  # type: ignore[no-untyped-def]
            points, log_step, average, spent = carry
            k, key_k = inputs
            keys = jax.random.split(key_k, len(points))
            moved, _, probability, gradients = jax.vmap(
                lambda key, u: step(key, logdensity_fn, u, jnp.exp(log_step))
            )(keys, points)
            probability = jnp.mean(jnp.nan_to_num(probability))
            log_step += (probability - _TARGET_ACCEPTANCE[name]) / (0.3 + 0.05 * k)
            rate = 10.0 / (10.0 + k)
            average += rate * (log_step - average)
            return (moved, log_step, average, spent + jnp.sum(gradients, dtype=spent.dtype)), None

        start = jnp.asarray(jnp.log(0.5 / points.shape[1] ** 0.25), points.dtype)
        steps = jnp.arange(_ADAPTATION, dtype=points.dtype), jax.random.split(key, _ADAPTATION)
        carry = points, start, start, jnp.zeros((), jnp.int32)
        (_, _, log_step, gradients), _ = jax.lax.scan(advance, carry, steps)
        return jnp.exp(log_step), gradients

    return LocalMove(adapt, step)
