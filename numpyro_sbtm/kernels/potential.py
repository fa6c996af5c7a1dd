# SPDX-License-Identifier: Apache-2.0
"""From a potential function to a density on R^d."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro.util import not_jax_tracer

from numpyro_sbtm.batches import at_once
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.kernels.failures import explained
from numpyro_sbtm.kernels.problem import Problem, flat, prototype_of

__all__ = ["from_potential"]

_START_RADIUS = 0.1  # spread of the starts around the one that comes with a potential function


def from_potential(
    key: Key,
    potential_fn: Callable[[Any], Float[Array, ""]],
    init_params: Any,
    *,
    num_chains: int,
    num_starts: int,
    forward_mode: bool,
) -> Problem:
    """Set up a potential function, minus a log density, of any pytree of unconstrained arrays.

    Args:
        key: random key.
        potential_fn: the potential.
        init_params: positions with a leading axis of length ``num_chains``.
        num_chains: how many positions there are.
        num_starts: how many starts to return.
        forward_mode: differentiate the potential in forward mode.

    Returns:
        The problem.

    Raises:
        ValueError: if ``init_params`` is missing, empty, or has no finite potential.
        TypeError: if the potential is no real number.
    """
    if init_params is None:
        raise ValueError("Valid value of `init_params` must be provided with `potential_fn`.")
    positions = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), init_params)
    x = flat(positions) if jax.tree.leaves(positions) else jnp.zeros((num_chains, 0))
    if x.shape[1] == 0:
        raise ValueError("`init_params` is empty, so there is nothing to sample.")
    with explained("potential_fn", potential_fn, (), {}):
        energy = jax.vmap(potential_fn)(positions)
    _check_potential(energy, num_chains)
    if not_jax_tracer(energy) and not np.all(np.isfinite(energy)):
        raise ValueError(
            f"`potential_fn` must be finite at `init_params`, got {np.asarray(energy).tolist()}. "
            "Pass a point of finite density."
        )
    _, unravel = ravel_pytree(prototype_of(positions))
    noise = _START_RADIUS * jax.random.normal(key, (num_starts, x.shape[1]), x.dtype)
    starts = x[jnp.arange(num_starts) % num_chains] + noise

    def identity_gen(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return lambda x: x

    def potential_gen(*args: Any, **kwargs: Any) -> Callable[[Any], Float[Array, ""]]:
        return potential_fn

    order = np.arange(x.shape[1])
    with explained("potential_fn", potential_fn, (), {}):
        together, most = at_once(lambda x: potential_fn(unravel(x)), starts[0], forward_mode)
    return Problem(potential_gen, identity_gen, positions, starts, starts, order, unravel, together, most)


def _check_potential(energy: Any, num_chains: int) -> None:
    """Refuse what a potential function gave at the positions of chains, unless it is a number for each."""
    must = "`potential_fn` must return one real number, minus a log density"
    if not isinstance(energy, jax.Array):
        raise TypeError(f"{must}, got {'None' if energy is None else f'a {type(energy).__name__}'}.")
    if energy.shape != (num_chains,):
        raise TypeError(f"{must}, got an array of shape {energy.shape[1:]}. Take its sum, or its only entry.")
    if not jnp.issubdtype(energy.dtype, jnp.floating):
        real = jnp.issubdtype(energy.dtype, jnp.complexfloating)
        cure = "Take its real part." if real else "Compute with floats: integers have no gradient."
        raise TypeError(f"{must}, got one of dtype {energy.dtype}. {cure}")
