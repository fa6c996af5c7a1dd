# SPDX-License-Identifier: Apache-2.0
"""States before the first draw."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.util import is_prng_key

from numpyro_sbtm.core.target import Keys
from numpyro_sbtm.kernels.fingerprint import Fingerprint
from numpyro_sbtm.kernels.posterior import Arguments
from numpyro_sbtm.kernels.problem import Problem
from numpyro_sbtm.kernels.state import KernelState
from numpyro_sbtm.sampler import Sampler

__all__ = ["first_state", "state_without_latents"]


def first_state(
    sampler: Sampler, problem: Problem, keys: Keys, arguments: Arguments, data: Fingerprint
) -> KernelState:
    """Make the state of chains before the first draw, with one key for each."""
    z, learned = problem.positions, sampler.learned
    energy = jax.jit(jax.vmap(problem.potential_gen(*arguments.args, **arguments.kwargs)))(z)
    if is_prng_key(keys):
        z, energy = jax.tree.map(lambda leaf: leaf[0], (z, energy))
    over = jax.vmap if energy.ndim else lambda function: function
    x = over(lambda value: ravel_pytree(value)[0])(z)
    chain = sampler.chain().init(x, -energy - learned.offset)
    blank, zero = jnp.zeros_like(chain.point.log_weight), jnp.zeros((), jnp.int32)
    state = KernelState(
        i=zero,
        z=z,
        potential_energy=energy.astype(x.dtype),
        log_weight=chain.point.log_weight,
        accept_prob=blank,
        mean_accept_prob=blank,
        diverging=blank > 0,
        nonfinite_proposals=blank.astype(jnp.int32),
        learned=learned,
        chain=chain,
        data=data,
        next_key=jax.random.key_data(keys),
        rng_key=zero,
    )
    # a weakly typed leaf would turn strong in the first step, and a second program would be compiled
    strong = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), state)
    return strong._replace(rng_key=keys)


def state_without_latents(
    problem: Problem, keys: Keys, arguments: Arguments, data: Fingerprint
) -> KernelState:
    """Make the state of a model without latent values: there is nothing to learn or to draw."""
    chains = () if is_prng_key(keys) else (len(keys),)
    z = problem.positions if chains else jax.tree.map(lambda leaf: leaf[0], problem.positions)
    one = jax.tree.map(lambda leaf: leaf[0], problem.positions)
    energy = problem.potential_gen(*arguments.args, **arguments.kwargs)(one)
    blank, zero = jnp.zeros(chains), jnp.zeros((), jnp.int32)
    return KernelState(
        i=zero,
        z=z,
        potential_energy=blank + energy,
        log_weight=blank - energy,
        accept_prob=blank + 1.0,
        mean_accept_prob=blank + 1.0,
        diverging=jnp.zeros(chains, bool),
        nonfinite_proposals=jnp.zeros(chains, jnp.int32),
        learned=None,
        chain=None,
        data=jnp.asarray(data),
        next_key=jax.random.key_data(keys),
        rng_key=keys,
    )
