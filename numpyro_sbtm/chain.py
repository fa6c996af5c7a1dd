# SPDX-License-Identifier: Apache-2.0
"""Markov chains that are fed by a trained sampler: train, then propose, correct, count."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float
from numpyro.util import not_jax_tracer

from numpyro_sbtm.core.algorithm import Algorithm, Ensemble
from numpyro_sbtm.core.decay import Rays, decay
from numpyro_sbtm.core.importance import importance
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.core.weights import clean, metropolis, resample
from numpyro_sbtm.core.whitening import invert, unwhiten, whiten
from numpyro_sbtm.fingerprint import Fingerprint
from numpyro_sbtm.local import LocalMove
from numpyro_sbtm.model import Problem, logdensity
from numpyro_sbtm.psis import USABLE_KHAT, judged_tail_index
from numpyro_sbtm.state import KernelState, Proposals, Training, WarmStart

__all__ = ["LearnedChain"]

_SHORTER = 4  # training ends after this part of warm-up where the warm start is near exact
_START_POOL = 256  # of a chain's first proposals, one of which becomes its first state
_SHORTEST_STEP = 0.01  # step sizes of local moves vary by this factor where they were adapted to other data


@dataclass(frozen=True)
class LearnedChain:
    """Functions of a `KernelState`, for one trained sampler and the chains that share it.

    A state says by its shapes how many chains there are, how long warm-up is and how large a block of
    proposals; what is here is the same for all states of a posterior. Everything random of a chain comes from
    its own key: a chain is the same whatever others run beside it.

    Attributes:
        problem: the posterior.
        make_algorithm: ``(whitened target, warm start, num_warmup) -> algorithm``.
        local: the local move that ends every draw, or None.
        corrected: whether a Metropolis step corrects the proposals.
        shorten: whether a part of warm-up is enough where the warm start is near exact.
        forward_mode: differentiate the model in forward mode.
        known: fingerprint of data that states were surely trained for, where the model's arguments have it;
            None: none.
    """

    problem: Problem
    make_algorithm: Callable[[Target, WarmStart, int], Algorithm]
    local: LocalMove | None
    corrected: bool
    shorten: bool
    forward_mode: bool
    known: Fingerprint | None = None

    def target(self, offset: Float[Array, ""], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Target:
        """Return the posterior's density on R^d, relative to an offset."""
        log_density = logdensity(self.problem, args, kwargs, self.forward_mode)
        return Target(lambda x: log_density(x) - offset, self.problem.starts.shape[1])

    def _white(self, training: Training, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Target:
        return whiten(self.target(training.offset, args, kwargs), training.warm.whitening)

    def _algorithm(self, training: Training, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Algorithm:
        white = self._white(training, args, kwargs)
        if training.algorithm is None:
            return importance(white, training.warm.reference)
        return self.make_algorithm(white, training.warm, training.loss.shape[-1])

    def _with_sampler(
        self,
        training: Training,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        use: Callable[[Algorithm | Ensemble], Any],
    ) -> Any:
        """Use the trained algorithm, or its ensemble where single draws were found to be poor."""
        algorithm = self._algorithm(training, args, kwargs)
        ensemble = algorithm.ensemble
        if training.ensemble is None or ensemble is None:
            return use(algorithm)
        return jax.lax.cond(training.ensemble, lambda: use(ensemble), lambda: use(algorithm))

    # ------------------------------------------------------------------ the trained sampler
    def propose(
        self, key: Key, training: Training, n: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Proposals:
        """Draw n proposals with their exact weights, relative to the training's offset."""
        draws = self._with_sampler(
            training, args, kwargs, lambda sampler: sampler.draw(key, training.algorithm, n)
        )
        x, log_det = jax.vmap(lambda u: unwhiten(training.warm.whitening, u))(draws.x)
        usable = jnp.isfinite(draws.log_weight) & jnp.all(jnp.isfinite(x), -1)
        return Proposals(
            x,
            jnp.where(usable, draws.log_weight, jnp.nan),
            log_det - draws.logdensity - training.offset,
            draws.one_to_one,
        )

    def weigh(
        self,
        key: Key,
        training: Training,
        x: Float[Array, "n d"],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Float[Array, " n"]:
        """Weigh given points, relative to the training's offset."""
        u = jax.vmap(lambda point: invert(training.warm.whitening, point)[0])(x)

        def weights(sampler: Algorithm | Ensemble) -> Float[Array, " n"]:
            keys = jax.random.split(key, len(x))
            return jax.vmap(lambda k, point: sampler.weigh(k, training.algorithm, point))(keys, u)

        return self._with_sampler(training, args, kwargs, weights)

    def rays(
        self,
        key: Key,
        training: Training,
        points: tuple[Float[Array, "n d"], Float[Array, " n"]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Rays:
        """Find out along which rays from weighted points the density does not fall."""
        return decay(key, self.target(training.offset, args, kwargs), training.warm.whitening, *points)

    # ------------------------------------------------------------------ warm-up
    def trained(
        self, key: Key, training: Training, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Training:
        """Do all of the training, until it gains nothing more or warm-up is over."""
        num_warmup = training.loss.shape[-1]
        algorithm = self.make_algorithm(self._white(training, args, kwargs), training.warm, num_warmup)
        enough = num_warmup // _SHORTER if self.shorten else num_warmup

        def step(carry):  # type: ignore[no-untyped-def]
            training, _ = carry
            k = training.num_steps
            trained, info = algorithm.step(jax.random.fold_in(key_steps, k), training.algorithm)
            new = training._replace(
                algorithm=trained,
                num_steps=k + 1,
                loss=training.loss.at[k].set(info.loss.astype(training.loss.dtype)),
                skipped_updates=training.skipped_updates + info.skipped,
                gradients=training.gradients + info.gradients,
            )
            finished = info.finished | (training.warm.near_exact() & (k + 1 >= enough))
            return jax.tree.map(lambda leaf, before: leaf.astype(before.dtype), new, training), finished

        key_init, key_steps = jax.random.split(key)
        # a weakly typed leaf would turn strong in the first step
        first = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), algorithm.init(key_init))
        carry = training._replace(algorithm=first), jnp.zeros((), bool)
        unfinished = lambda carry: (carry[0].num_steps < num_warmup) & ~carry[1]  # noqa: E731
        return jax.lax.while_loop(unfinished, step, carry)[0]

    # ------------------------------------------------------------------ draws
    def sample(
        self,
        state: KernelState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        data: Fingerprint,
    ) -> KernelState:
        """Make a draw; in warm-up do nothing. ``data`` is the fingerprint of the arguments."""
        assert state.training is not None
        new = jax.lax.cond(
            state.i < state.training.loss.shape[-1],
            lambda: state,
            lambda: _like(self.draw(state, args, kwargs, data), state),
        )
        return new._replace(i=state.i + 1, next_key=jax.random.key_data(new.rng_key))

    def draw(
        self,
        state: KernelState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        data: Fingerprint,
    ) -> KernelState:
        """Make one draw of every chain: Metropolis steps with fresh proposals, and a local move."""
        assert state.training is not None and state.block is not None
        chains = state.log_weight.shape
        over = jax.vmap if chains else _itself
        keys = over(lambda key: jax.random.split(key, 5))(state.rng_key)
        rng_key, key_block, key_start, key_accept, key_local = (_column(keys, k, over) for k in range(5))
        rounds = state.block.log_weight.shape[len(chains)]
        # a chain begins, or begins again for other data: what it knows was weighed under the old ones
        fresh = (state.num_draws == 0) | jnp.any(data != state.data)
        num_draws = jnp.where(fresh, 0, state.num_draws)
        rekeyed = jnp.any(jax.random.key_data(state.rng_key) != state.next_key)
        # two blocks where chains begin: one for their first states, one for what is proposed
        times = jnp.where(fresh, 2, jnp.where(rekeyed | (state.used == rounds), 1, 0)).astype(jnp.int32)
        training, block, seeds = self._refilled(key_block, state, times, fresh, args, kwargs)
        used = jnp.where(times > 0, 0, state.used)

        x, log_weight, energy = jax.lax.cond(
            fresh,
            lambda: over(_first)(key_start, seeds, _raveled(state.z, over), state.potential_energy),
            lambda: (_raveled(state.z, over), state.log_weight, state.potential_energy),
        )
        proposals = jax.tree.map(lambda leaf: leaf[(slice(None),) * len(chains) + (used,)], block)
        steps = over(partial(_metropolis_steps, corrected=self.corrected))
        (x, log_weight, energy), accept_prob = steps(key_accept, (x, log_weight, energy), proposals)
        x, log_weight, energy = self._moved(key_local, training, (x, log_weight, energy), args, kwargs, data)
        finite = jnp.isfinite(proposals.log_weight) | ~proposals.one_to_one
        bad = jnp.sum(~finite, -1, dtype=jnp.int32)
        before = jnp.where(fresh, 0.0, state.mean_accept_prob)
        return state._replace(
            z=over(self.problem.unravel)(x),
            potential_energy=energy,
            log_weight=log_weight,
            accept_prob=accept_prob,
            mean_accept_prob=before + (accept_prob - before) / (num_draws + 1),
            diverging=bad > 0,
            nonfinite_proposals=jnp.where(fresh, 0, state.nonfinite_proposals) + bad,
            training=training,
            block=block,
            used=used + 1,
            num_draws=num_draws + 1,
            data=data,
            rng_key=rng_key,
        )

    def _refilled(
        self,
        keys: Key,
        state: KernelState,
        times: Any,
        fresh: Bool[Array, ""],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Training, Proposals, Proposals]:
        """Make so many new blocks; return the last two, with the training that says how they were made."""
        assert state.training is not None and state.block is not None
        training, chains = state.training, state.log_weight.shape
        over = jax.vmap if chains else _itself
        rounds, steps = state.block.log_weight.shape[len(chains) :]

        def refill(carry):  # type: ignore[no-untyped-def]
            k, times, ensemble, block, _ = carry
            how = training._replace(ensemble=ensemble)
            flat = over(
                lambda key: self.propose(jax.random.fold_in(key, k), how, rounds * steps, args, kwargs)
            )(keys)
            new = jax.tree.map(lambda leaf, old: leaf.reshape(old.shape).astype(old.dtype), flat, block)
            if ensemble is not None:  # the very first block decides; if it is poor, it is not used
                weight = clean(flat.log_weight.reshape(-1))
                switch = (judged_tail_index(weight) > USABLE_KHAT) & fresh & (k == 0)
                ensemble, times = ensemble | switch, times + switch
            return k + 1, times, ensemble, new, block

        ensemble = None if training.ensemble is None else training.ensemble & ~fresh
        carry = jnp.zeros((), jnp.int32), times, ensemble, state.block, state.block
        _, _, ensemble, block, last = jax.lax.while_loop(lambda carry: carry[0] < carry[1], refill, carry)
        return training._replace(ensemble=ensemble), block, last

    def _moved(
        self,
        keys: Key,
        training: Training,
        states: tuple[Float[Array, "*c d"], Float[Array, "*c"], Float[Array, "*c"]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        data: Fingerprint,
    ) -> tuple[Float[Array, "*c d"], Float[Array, "*c"], Float[Array, "*c"]]:
        """End a draw by a local move, where there is one; always where training knew other data."""
        local, step_size = self.local, training.warm.step_size
        if local is None or step_size is None or not self.corrected:
            return states
        foreign = jnp.any(training.data != data)
        over = jax.vmap if states[1].ndim else _itself

        def move(key, x, log_weight, energy):  # type: ignore[no-untyped-def]
            """One local move of one chain, and the weight of where it arrives."""
            key_move, key_weight, key_size = jax.random.split(key, 3)
            shorter = _SHORTEST_STEP ** jax.random.uniform(key_size, (), x.dtype)
            size = step_size * jnp.where(foreign, shorter, 1.0)
            white = self._white(training, args, kwargs)
            whitening = training.warm.whitening
            u, value, *_ = local.step(key_move, white.logdensity_fn, invert(whitening, x)[0], size)
            weigh = lambda sampler: sampler.weigh(key_weight, training.algorithm, u)  # noqa: E731
            fresh = self._with_sampler(training, args, kwargs, weigh)
            moved, log_det = unwhiten(whitening, u)
            # an infinite weight: what is never proposed is entered and left by these moves alone
            good = (fresh > -jnp.inf) & jnp.isfinite(value) & jnp.all(jnp.isfinite(moved))
            return (
                jnp.where(good, moved, x),
                jnp.where(good, fresh, log_weight),
                jnp.where(good, log_det - value - training.offset, energy),
            )

        if training.local_moves is not None:
            return over(move)(keys, *states)
        if self.known is not None and not_jax_tracer(data) and np.array_equal(self.known, data):
            return states
        return jax.lax.cond(foreign, lambda: over(move)(keys, *states), lambda: states)

    # ------------------------------------------------------------------ the first state
    def init(
        self,
        keys: Key,
        warm: WarmStart,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_warmup: int,
        block: tuple[int, ...],
        *,
        doubtful: bool,
        still: bool,
        data: Fingerprint,
    ) -> KernelState:
        """Make the state before training: draws from it are those of the warm start.

        Args:
            keys: one for every chain, or one alone.
            warm: the warm start.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
            num_warmup: training steps.
            block: the chain axis, if any, and for each chain draws and proposals per draw in a block.
            doubtful: whether each proposal may be chosen among several, should single ones be poor.
            still: whether draws end without local moves.
            data: fingerprint of the arguments.
        """
        problem, chains = self.problem, block[:-2]
        dim, dtype = problem.starts.shape[1], problem.starts.dtype
        energy = jax.jit(jax.vmap(problem.potential_gen(*args, **kwargs)))(problem.positions)
        z = problem.positions
        if not chains:
            z, energy = jax.tree.map(lambda leaf: leaf[0], (z, energy))
        blank, zero = _filled(chains, 0.0, dtype), _filled((), 0, jnp.int32)
        training = Training(
            warm=warm,
            algorithm=None,
            num_steps=zero,
            loss=_filled((num_warmup,), jnp.nan, dtype),
            skipped_updates=zero,
            gradients=warm.gradients,
            ensemble=None,
            local_moves=None if still else _filled((), True, bool),
            offset=jnp.asarray(problem.offset, dtype),
            data=data,
        )
        ensemble = _filled((), False, bool) if doubtful and problem.small else None
        # filled at the first draw
        empty = _filled(block, 0.0, dtype)
        state = KernelState(
            i=zero,
            z=z,
            potential_energy=energy.astype(dtype),
            log_weight=_filled(chains, -jnp.inf, dtype),
            accept_prob=blank,
            mean_accept_prob=blank,
            diverging=_filled(chains, False, bool),
            nonfinite_proposals=_filled(chains, 0, jnp.int32),
            training=training._replace(ensemble=ensemble),
            block=Proposals(_filled((*block, dim), 0.0, dtype), empty, empty, _filled(block, False, bool)),
            used=zero,
            num_draws=zero,
            data=data,
            next_key=jax.random.key_data(keys),
            rng_key=zero,
        )
        # a weakly typed leaf would turn strong in the first step, and a second program would be compiled
        strong = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), state)
        return strong._replace(rng_key=keys)


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
    """Stand in for `jax.vmap` where there is one chain without a chain axis."""
    return function


def _column(keys: Key, k: int, over: Callable[..., Any]) -> Key:
    """Take the k-th of the keys that every chain was given."""
    return over(lambda own: own[k])(keys)


def _raveled(z: Any, over: Callable[..., Any]) -> Float[Array, "*c d"]:
    return over(lambda value: ravel_pytree(value)[0])(z)


def _filled(shape: tuple[int, ...], value: float, dtype: Any) -> Array:
    # by NumPy: JAX would compile a program for every shape
    return jnp.asarray(np.full(shape, value, dtype))


def _like(new: KernelState, old: KernelState) -> KernelState:
    """Give every leaf the type it had."""
    zero = jnp.zeros((), jnp.int32)
    same = lambda leaf, before: leaf.astype(before.dtype)  # noqa: E731
    typed = jax.tree.map(same, new._replace(rng_key=zero), old._replace(rng_key=zero))
    return typed._replace(rng_key=new.rng_key)


def _first(
    key: Key, seeds: Proposals, x: Float[Array, " d"], energy: Float[Array, ""]
) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, ""]]:
    """Choose a chain's first state among its first proposals by weight; without one it stays where it is."""
    pool = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:_START_POOL], seeds)
    weight = clean(pool.log_weight)
    chosen = resample(key, weight, 1)[0]
    alive = jnp.isfinite(weight[chosen])
    return (
        jnp.where(alive, pool.x[chosen], x),
        weight[chosen],
        jnp.where(alive, pool.potential_energy[chosen], energy),
    )


def _metropolis_steps(key, state, proposals: Proposals, corrected: bool):  # type: ignore[no-untyped-def]
    """Propose one after the other; without the correction take all that can be weighed."""

    def step(carry, inputs):  # type: ignore[no-untyped-def]
        x, log_weight, energy = carry
        key, proposal = inputs
        accept, accept_prob = metropolis(key, log_weight, proposal.log_weight)
        if not corrected:
            accept = jnp.isfinite(proposal.log_weight)
        carry = (
            jnp.where(accept, proposal.x, x),
            jnp.where(accept, proposal.log_weight, log_weight),
            jnp.where(accept, proposal.potential_energy, energy),
        )
        return carry, accept_prob

    keys = jax.random.split(key, len(proposals.log_weight))
    state, accept_probs = jax.lax.scan(step, state, (keys, proposals))
    return state, jnp.mean(accept_probs)
