# SPDX-License-Identifier: Apache-2.0
"""Markov chains that are fed by a trained sampler: train, then propose, correct, count."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.algorithm import Algorithm
from numpyro_sbtm.core.precondition import Whitening, affine, fit, unwhiten, whiten
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.core.weights import clean, metropolis, resample
from numpyro_sbtm.model import Problem, logdensity

__all__ = ["KernelState", "LearnedChain", "Precondition", "Proposals", "Training", "learned_chain"]

Precondition = str | tuple[Any, Any] | None
"""'auto', ``(loc, scale_tril)``, or None: see `numpyro_sbtm.kernels`."""


class Training(NamedTuple):
    """What warm-up learns; frozen afterwards."""

    whitening: Whitening
    algorithm: Any
    loss: Float[Array, " num_warmup"]
    skipped_updates: Int[Array, ""]
    gradients: Int[Array, ""]


class Proposals(NamedTuple):
    """Fresh proposals in the model's unconstrained space, with any leading axes."""

    x: Float[Array, "*n d"]
    log_weight: Float[Array, "*n"]
    potential_energy: Float[Array, "*n"]
    one_to_one: Bool[Array, "*n"]


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
    starts: Float[Array, "s d"]
    training: Training
    block: Proposals
    rng_key: Key


"""
A NamedTuple with the fields

 - **i** - iteration, over warm-up and sampling; never batched.
 - **z** - unconstrained values of the latent sites.
 - **potential_energy** - minus the log density of ``z``.
 - **log_weight** - log of unnormalised target over proposal, of the current state.
 - **accept_prob** - mean acceptance probability of the last draw's proposals.
 - **mean_accept_prob** - its mean since the end of warm-up.
 - **diverging** - whether a proposal of the last draw had a non-finite weight; such are never accepted.
 - **nonfinite_proposals** - how many proposals had since the end of warm-up.
 - **starts** - points from which the whitening is fitted.
 - **training** - whitening, trained parameters, loss of every warm-up step, updates skipped because
   their gradient was not finite, and target gradients spent.
 - **block** - fresh proposals, some consumed for every draw.
 - **rng_key** - random key.
"""


class LearnedChain(NamedTuple):
    """Pure functions of a `KernelState`, for one trained sampler and the chains that share it.

    Attributes:
        init: ``key -> state``; nothing is trained here.
        sample: ``(state, model_args, model_kwargs) -> state``; a training step or a draw.
        propose: ``(key, training, n, model_args, model_kwargs) -> Proposals`` of leading axis ``[n]``.
    """

    init: Callable[[Key], KernelState]
    sample: Callable[[KernelState, tuple[Any, ...], dict[str, Any]], KernelState]
    propose: Callable[[Key, Training, int, tuple[Any, ...], dict[str, Any]], Proposals]


def learned_chain(
    problem: Problem,
    make_algorithm: Callable[[Target], Algorithm],
    model_args: tuple[Any, ...],
    model_kwargs: dict[str, Any],
    *,
    num_warmup: int,
    chains: tuple[int, ...],
    precondition: Precondition,
    corrected: bool,
    block_size: int,
    steps_per_draw: int,
    forward_mode: bool,
) -> LearnedChain:
    """Tie an algorithm to a posterior and to Metropolis chains.

    Args:
        problem: the posterior; its positions have a leading axis of ``chains``, or of length one.
        make_algorithm: from a whitened target to the algorithm.
        model_args: positional arguments of the model, for ``init``.
        model_kwargs: keyword arguments of the model, for ``init``.
        num_warmup: training steps.
        chains: ``()`` for one chain without a chain axis, ``(C,)`` for C chains on one sampler.
        precondition: how to whiten.
        corrected: whether a Metropolis step corrects the proposals.
        block_size: about how many proposals to make at a time.
        steps_per_draw: Metropolis steps, each with its own proposal, per draw.
        forward_mode: differentiate the model in forward mode.

    Returns:
        The functions.
    """
    dim = problem.starts.shape[1]
    dtype = problem.starts.dtype
    num_chains = chains[0] if chains else 1
    rounds = max(1, block_size // (num_chains * steps_per_draw))
    size = rounds * steps_per_draw * num_chains
    shape = (rounds, steps_per_draw, *chains)

    def target_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Target:
        return Target(logdensity(problem, args, kwargs, forward_mode), dim)

    def start(key: Key, target: Target, starts: Float[Array, "s d"]) -> Training:
        key_fit, key_algorithm = jax.random.split(key)
        if isinstance(precondition, str):
            whitening = fit(key_fit, target, starts, jnp.asarray(problem.order))
        elif precondition is None:
            whitening = affine(jnp.zeros(dim, dtype), jnp.eye(dim, dtype=dtype))
        else:
            loc, scale_tril = (jnp.asarray(part, dtype) for part in precondition)
            whitening = affine(loc, scale_tril)
        state = make_algorithm(whiten(target, whitening)).init(key_algorithm)
        zero = jnp.zeros((), jnp.int32)
        return Training(whitening, state, jnp.full(num_warmup, jnp.nan, dtype), zero, zero)

    def train(state: KernelState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelState:
        target = target_of(args, kwargs)
        rng_key, key_start, key_step = jax.random.split(state.rng_key, 3)
        training = jax.lax.cond(
            state.i == 0,
            lambda: start(key_start, target, state.starts),
            lambda: state.training,
        )
        algorithm = make_algorithm(whiten(target, training.whitening))
        trained, info = algorithm.step(key_step, training.algorithm)
        training = Training(
            training.whitening,
            trained,
            training.loss.at[state.i].set(info.loss.astype(dtype)),
            training.skipped_updates + info.skipped,
            training.gradients + info.gradients,
        )
        return state._replace(training=training, rng_key=rng_key)

    def propose(
        key: Key, training: Training, n: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Proposals:
        target = whiten(target_of(args, kwargs), training.whitening)
        draws = make_algorithm(target).draw(key, training.algorithm, n)
        x, log_det = jax.vmap(lambda u: unwhiten(training.whitening, u))(draws.x)
        usable = jnp.isfinite(draws.log_weight) & jnp.all(jnp.isfinite(x), -1)
        return Proposals(
            x,
            jnp.where(usable, draws.log_weight, jnp.nan),
            log_det - draws.logdensity,
            draws.one_to_one,
        )

    def ravel_chains(z: Any) -> Float[Array, "*c d"]:
        ravel = lambda value: ravel_pytree(value)[0]  # noqa: E731
        return jax.vmap(ravel)(z) if chains else ravel(z)

    def unravel_chains(x: Float[Array, "*c d"]) -> Any:
        return jax.vmap(problem.unravel)(x) if chains else problem.unravel(x)

    def draw(state: KernelState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelState:
        rng_key, key_block, key_start, key_accept = jax.random.split(state.rng_key, 4)
        drawn = state.i - num_warmup

        def refill(k: Int[Array, ""], blocks: tuple[Proposals, Proposals]) -> tuple[Proposals, Proposals]:
            key = jax.random.fold_in(key_block, k)
            flat = propose(key, state.training, size, args, kwargs)
            new = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), flat)
            return new, blocks[0]

        # at the first draw two blocks: one for the chains' first states, one for what is proposed
        times = jnp.where(drawn == 0, 2, jnp.where(drawn % rounds == 0, 1, 0))
        block, seeds = jax.lax.fori_loop(0, times, refill, (state.block, state.block))

        def first() -> tuple[Float[Array, "*c d"], Float[Array, "*c"], Float[Array, "*c"]]:
            flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(shape) :]), seeds)
            weight = clean(flat.log_weight)
            chosen = resample(key_start, weight, num_chains).reshape(chains)
            alive = jnp.isfinite(weight[chosen])
            return (
                jnp.where(alive[..., None], flat.x[chosen], x),
                weight[chosen],
                jnp.where(alive, flat.potential_energy[chosen], state.potential_energy),
            )

        x = ravel_chains(state.z)
        x, log_weight, energy = jax.lax.cond(
            drawn == 0, first, lambda: (x, state.log_weight, state.potential_energy)
        )
        proposals = jax.tree.map(lambda leaf: leaf[drawn % rounds], block)
        finite = jnp.isfinite(proposals.log_weight)

        def metropolis_step(carry, inputs):  # type: ignore[no-untyped-def]
            x, log_weight, energy = carry
            key, proposal = inputs
            accept, accept_prob = metropolis(key, log_weight, proposal.log_weight)
            if not corrected:
                accept = jnp.isfinite(proposal.log_weight)
            carry = (
                jnp.where(accept[..., None], proposal.x, x),
                jnp.where(accept, proposal.log_weight, log_weight),
                jnp.where(accept, proposal.potential_energy, energy),
            )
            return carry, accept_prob

        (x, log_weight, energy), accept_probs = jax.lax.scan(
            metropolis_step,
            (x, log_weight, energy),
            (jax.random.split(key_accept, steps_per_draw), proposals),
        )
        accept_prob = jnp.mean(accept_probs, 0)
        return state._replace(
            z=unravel_chains(x),
            potential_energy=energy,
            log_weight=log_weight,
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + (accept_prob - state.mean_accept_prob) / (drawn + 1),
            diverging=jnp.any(~finite, 0),
            nonfinite_proposals=state.nonfinite_proposals + jnp.sum(~finite, 0, dtype=jnp.int32),
            block=block,
            rng_key=rng_key,
        )

    def sample(state: KernelState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelState:
        new = jax.lax.cond(
            state.i < num_warmup,
            lambda: train(state, args, kwargs),
            lambda: draw(state, args, kwargs),
        )
        new = new._replace(i=state.i + 1)
        typed = [field for field in KernelState._fields if field != "rng_key"]
        same = lambda leaf, old: leaf.astype(old.dtype)  # noqa: E731
        return new._replace(
            **{name: jax.tree.map(same, getattr(new, name), getattr(state, name)) for name in typed}
        )

    def init(key: Key) -> KernelState:
        z = problem.positions
        energy = jax.vmap(problem.potential_gen(*model_args, **model_kwargs))(z)
        if not chains:
            z, energy = jax.tree.map(lambda leaf: leaf[0], (z, energy))
        target = target_of(model_args, model_kwargs)
        # the first warm-up step fills these; only their shapes are needed before
        training = jax.eval_shape(lambda: start(key, target, problem.starts))
        block = jax.eval_shape(
            lambda training: propose(key, training, size, model_args, model_kwargs),
            training,
        )
        training = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), training)
        block = jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape[1:]), leaf.dtype), block)
        blank = jnp.zeros(chains, dtype)
        return KernelState(
            i=jnp.zeros((), jnp.int32),
            z=z,
            potential_energy=energy.astype(dtype),
            log_weight=jnp.full(chains, -jnp.inf, dtype),
            accept_prob=blank,
            mean_accept_prob=blank,
            diverging=jnp.zeros(chains, bool),
            nonfinite_proposals=jnp.zeros(chains, jnp.int32),
            starts=problem.starts,
            training=training,
            block=block,
            rng_key=key,
        )

    return LearnedChain(init, sample, propose)
