# SPDX-License-Identifier: Apache-2.0
"""What a kernel knows from one iteration to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from numpyro_sbtm.checks import shown
from numpyro_sbtm.core.chain import ChainState
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.kernels.fingerprint import Fingerprint
from numpyro_sbtm.learned import Learned

__all__ = ["KernelState", "chain_axes", "known_of", "same_types"]


class KernelState(NamedTuple):
    """State of a learned kernel; see the bullets below its definition."""

    i: Int[Array, ""]
    z: Any
    potential_energy: Float[Array, "*chains"]
    log_weight: Float[Array, "*chains"]
    accept_prob: Float[Array, "*chains"]
    mean_accept_prob: Float[Array, "*chains"]
    diverging: Bool[Array, "*chains"]
    nonfinite_proposals: Int[Array, "*chains"]
    learned: Learned | None
    chain: ChainState | None
    data: Fingerprint
    next_key: UInt32[Array, "*chains k"]
    rng_key: Key

    def chain_of(self, c: int) -> ChainState:
        """Return the state of one of several chains with samplers of their own, however they ran."""
        assert self.chain is not None
        # side by side they share the number of draws
        return jax.tree.map(lambda leaf: leaf[c] if jnp.ndim(leaf) else leaf, self.chain)


"""
A NamedTuple with the fields

 - **i** - iteration, over warm-up and sampling; never batched.
 - **z** - unconstrained values of the latent sites.
 - **potential_energy** - minus the log density of ``z``.
 - **log_weight** - log of unnormalised target over proposal, of the current state, relative to
   ``learned.offset``.
 - **accept_prob** - mean acceptance probability of the last draw's proposals.
 - **mean_accept_prob** - its mean over the chain's draws.
 - **diverging** - whether a proposal of the last draw had a non-finite weight; such are never accepted.
 - **nonfinite_proposals** - how many proposals had, over the chain's draws.
 - **learned** - what was found and trained (see `Learned`); None for a model without latent values.
 - **chain** - the chain's own state: where it is, and its block of fresh proposals (see
   `numpyro_sbtm.core.chain.ChainState`).
 - **data** - fingerprint of the arguments under which the chain's state was weighed; where the model is given
   others, it begins again.
 - **next_key** - ``rng_key`` as the kernel left it. Where it was replaced, as `MCMC.run` does when a run goes
   on, what is left of the block is not used: another key means other draws.
 - **rng_key** - random key, one for every chain.
"""


def chain_axes(state: KernelState) -> KernelState:
    """Return the axis of every leaf that chains with samplers of their own have: 0, or None.

    What is done in an iteration depends on the number of iterations, draws and the data: these have no such
    axis, or every iteration would pay for all that it may do.
    """
    axes = jax.tree.map(lambda leaf: 0, state)
    assert axes.chain is not None
    return axes._replace(i=None, data=None, chain=axes.chain._replace(num_draws=None))


def known_of(state: Any) -> tuple[Learned, ChainState]:
    """Return what a state knows.

    Raises:
        TypeError: for what is no state.
        ValueError: for that of a model without latent values.
    """
    if not isinstance(state, KernelState):
        raise TypeError(
            f"`state` must be that of a run of this kernel, got {shown(state)}. "
            "Pass `mcmc.last_state` after `mcmc.run(...)`."
        )
    if state.learned is None or state.chain is None:
        raise ValueError("`state` is that of a model without latent values: it has no sampler.")
    return state.learned, state.chain


def same_types(new: KernelState, old: KernelState) -> KernelState:
    """Give every leaf the type it had."""
    zero = jnp.zeros((), jnp.int32)
    same = lambda leaf, before: leaf.astype(before.dtype)  # noqa: E731
    typed = jax.tree.map(same, new._replace(rng_key=zero), old._replace(rng_key=zero))
    return typed._replace(rng_key=new.rng_key)
