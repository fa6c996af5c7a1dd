# SPDX-License-Identifier: Apache-2.0
"""HMC moves of many particles side by side, whose step sizes adapt and vary."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.lazy import load
from numpyro_sbtm.core.target import Key, LogDensity

__all__ = [
    "LEAPS",
    "adapted",
    "drift_between",
    "first_step_size",
    "hmc_moves",
    "or_very_low",
    "spread_out",
]

LEAPS = 8  # leapfrog steps of a move
_TARGET_ACCEPTANCE = 0.7
_SMALLEST_STEP = 0.1  # step sizes vary by this factor, so that some particles enter narrow places


def first_step_size(particles: Float[Array, "n d"]) -> Float[Array, ""]:
    """Guess a step size for whitened particles."""
    return jnp.asarray(0.5 / particles.shape[1] ** 0.25, particles.dtype)


def spread_out(key: Key, step_size: Float[Array, ""], n: int) -> Float[Array, " n"]:
    """Draw step sizes of HMC, for some particles small enough to enter narrow places."""
    return step_size * _SMALLEST_STEP ** jax.random.uniform(key, (n,), step_size.dtype)


def adapted(step_size: Float[Array, ""], acceptance: Float[Array, "*n"]) -> Float[Array, ""]:
    """Let the step size follow the acceptance rate."""
    return step_size * jnp.exp(2.0 * (jnp.mean(acceptance) - _TARGET_ACCEPTANCE))


def or_very_low(value: Float[Array, ""]) -> Float[Array, ""]:
    """Put a very low log density in the place of one that is not finite."""
    return jnp.where(jnp.isfinite(value), value, -1e30)


def drift_between(
    before: Float[Array, "n d"], after: Float[Array, "n d"], errors: float = 3.0
) -> Float[Array, ""]:
    """Bound from below by what part the variance of a coordinate has changed between positions of particles.

    So many standard errors of the mean change are taken off. In equilibrium moves change no variance;
    particles that tempering has not carried everywhere go on spreading.
    """
    centre = jnp.mean(before, 0)
    first, change = (before - centre) ** 2, (after - centre) ** 2 - (before - centre) ** 2
    error = jnp.std(change, 0) / len(before) ** 0.5
    part = (jnp.abs(jnp.mean(change, 0)) - errors * error) / jnp.maximum(jnp.mean(first, 0), 1e-30)
    return jnp.maximum(jnp.max(part), 0.0)


def hmc_moves(key: Key, logdensity_fn: LogDensity, u: Float[Array, "n d"], num_moves: int) -> Any:
    """Move whitened particles by HMC, each on its own.

    Args:
        key: random key.
        logdensity_fn: the whitened log density; where it is not finite it counts as very low.
        u: the particles, shape ``[n, d]``.
        num_moves: transitions, of `LEAPS` leapfrog steps each.

    Returns:
        Their states: position, log density and its gradient, with a leading axis.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.search.moves import hmc_moves
        >>> states = hmc_moves(jax.random.key(0), lambda u: -0.5 * jnp.sum(u**2), jnp.ones((500, 2)), 9)
        >>> bool(jnp.all(jnp.abs(states.position.mean(0)) < 0.2))
        True
    """
    hmc = load("blackjax.mcmc.hmc")
    n, dim = u.shape
    inverse_mass_matrix, kernel = jnp.ones(dim, u.dtype), hmc.build_kernel()
    density = lambda u: or_very_low(logdensity_fn(u))  # noqa: E731

    def move(carry, key: Key):  # type: ignore[no-untyped-def]
        states, step_size = carry
        key_sizes, key = jax.random.split(key)
        sizes = spread_out(key_sizes, step_size, n)
        one = lambda key, state, size: kernel(key, state, density, size, inverse_mass_matrix, LEAPS)  # noqa: E731
        states, info = jax.vmap(one)(jax.random.split(key, n), states, sizes)
        return (states, adapted(step_size, info.acceptance_rate)), None

    states = jax.vmap(lambda u: hmc.init(u, density))(u)
    (states, _), _ = jax.lax.scan(move, (states, first_step_size(u)), jax.random.split(key, num_moves))
    return states
