# SPDX-License-Identifier: Apache-2.0
"""Markov chains that are fed by a trained sampler: train, then propose, correct, count."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.algorithm import Algorithm, Ensemble
from numpyro_sbtm.core.mixture import Mixture, normal
from numpyro_sbtm.core.target import Key, Target, after
from numpyro_sbtm.core.weights import clean, ess_fraction, metropolis, resample
from numpyro_sbtm.core.whitening import LowRank, Whitening, affine, invert, unwhiten, whiten
from numpyro_sbtm.local import LocalMove
from numpyro_sbtm.model import Problem, logdensity
from numpyro_sbtm.psis import FINITE_VARIANCE_KHAT, NEARLY_EQUAL, USABLE_KHAT, tail_index
from numpyro_sbtm.stages import run_stages
from numpyro_sbtm.warm_start import warm_start

__all__ = [
    "KernelState",
    "LearnedChain",
    "Precondition",
    "Proposals",
    "Training",
    "WarmStart",
    "learned_chain",
]

Precondition = str | tuple[Any, Any] | None
"""'auto', 'refined', ``(loc, scale_tril)``, or None; a kernel turns an AutoGuide into a pair."""


_NUM_CHECKED = 1024  # draws that judge the warm start
_NUM_KEPT = 1024  # points kept for training
_SHORTER = 4  # training ends after this part of warm-up where the warm start is near exact
_NUM_ADAPTING = 128  # points that choose the step size of local moves


class WarmStart(NamedTuple):
    """What is known before training.

    Attributes:
        whitening: a map under which the posterior looks like N(0, I), or like ``reference``.
        reference: a mixture that resembles the whitened posterior.
        points: points that resemble whitened draws, or None, shape ``[m, d]``.
        ess_fraction: effective sample fraction of draws from it.
        khat: Pareto k̂ of their weights.
        drift: by what part a variance of tempered particles still changed, at least, shape ``[]``.
        step_size: of local moves; None where there are none, shape ``[]``.
        gradients: target gradients spent.
    """

    whitening: Whitening | LowRank
    reference: Mixture
    points: Float[Array, "m d"] | None
    ess_fraction: Float[Array, ""]
    khat: Float[Array, ""]
    drift: Float[Array, ""]
    step_size: Float[Array, ""] | None
    gradients: Int[Array, ""]

    def near_exact(self) -> Bool[Array, ""]:
        """Say whether there is little to learn: an effective fraction above 0.5 and k̂ below 0.5."""
        return self.usable() & (self.khat < FINITE_VARIANCE_KHAT)

    def usable(self) -> Bool[Array, ""]:
        """Say whether draws from it alone would do: an effective fraction above 0.5 and k̂ below 0.7."""
        return (self.ess_fraction > 0.5) & (self.khat < USABLE_KHAT)


class Training(NamedTuple):
    """What warm-up learns; frozen afterwards."""

    warm: WarmStart
    algorithm: Any
    finished: Bool[Array, ""]
    num_steps: Int[Array, ""]
    loss: Float[Array, " num_warmup"]
    skipped_updates: Int[Array, ""]
    gradients: Int[Array, ""]
    ensemble: Bool[Array, ""] | None


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
    log_mean_inverse_weight: Float[Array, "*chains"]
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
 - **log_mean_inverse_weight** - log of the mean of 1/w over the states since the end of warm-up; for exact
   chains minus it is an estimate of the log evidence, from the posterior's side.
 - **training** - the warm start, trained parameters, whether training is finished and after how many
   steps, loss of every warm-up step, updates skipped because their gradient was not finite, target
   gradients spent, and whether each proposal is chosen among several, as found at the first draw; None where
   the warm start left no doubt.
 - **block** - fresh proposals, some consumed for every draw.
 - **rng_key** - random key.
"""


class LearnedChain(NamedTuple):
    """Pure functions of a `KernelState`, for one trained sampler and the chains that share it.

    Attributes:
        start: ``(key, starts [s, d], scouts [m, d]) -> WarmStart``.
        init: ``(key, warm start, doubtful) -> state``; nothing is trained here. Without doubt proposals are
            never chosen among several.
        sample: ``(state, model_args, model_kwargs) -> state``; a training step or a draw.
        propose: ``(key, training, n, model_args, model_kwargs) -> Proposals`` of leading axis ``[n]``.
        weigh: ``(key, training, x [n, d], model_args, model_kwargs) -> log weights [n]`` of given points.
    """

    start: Callable[[Key, Float[Array, "s d"], Float[Array, "m d"]], WarmStart]
    init: Callable[[Key, WarmStart, bool], KernelState]
    sample: Callable[[KernelState, tuple[Any, ...], dict[str, Any]], KernelState]
    propose: Callable[[Key, Training, int, tuple[Any, ...], dict[str, Any]], Proposals]
    weigh: Callable[[Key, Training, Float[Array, "n d"], tuple[Any, ...], dict[str, Any]], Float[Array, " n"]]


def learned_chain(
    problem: Problem,
    make_algorithm: Callable[[Target, WarmStart], Algorithm],
    model_args: tuple[Any, ...],
    model_kwargs: dict[str, Any],
    *,
    num_warmup: int,
    shorten: bool,
    chains: tuple[int, ...],
    precondition: Precondition,
    corrected: bool,
    block_size: int,
    steps_per_draw: int,
    ensembles: bool,
    local: LocalMove | None,
    forward_mode: bool,
) -> LearnedChain:
    """Tie an algorithm to a posterior and to Metropolis chains.

    Args:
        problem: the posterior; its positions have a leading axis of ``chains``, or of length one.
        make_algorithm: from a whitened target and its warm start to the algorithm.
        model_args: positional arguments of the model, for ``init``.
        model_kwargs: keyword arguments of the model, for ``init``.
        num_warmup: training steps.
        shorten: whether a part of them is enough where the warm start is near exact.
        chains: ``()`` for one chain without a chain axis, ``(C,)`` for C chains on one sampler.
        precondition: how to whiten.
        corrected: whether a Metropolis step corrects the proposals.
        block_size: about how many proposals to make at a time.
        steps_per_draw: Metropolis steps, each with its own proposal, per draw.
        ensembles: whether proposals may be chosen among several each, should single ones be poor.
        local: the local move after them, or None; there is none either where the warm start has no step size.
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
    ensembles = ensembles and problem.small

    def target_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Target:
        return Target(logdensity(problem, args, kwargs, forward_mode), dim)

    def start(key: Key, starts: Float[Array, "s d"], scouts: Float[Array, "m d"]) -> WarmStart:
        target = target_of(model_args, model_kwargs)

        def given(key: Key, starts: Float[Array, "s d"], scouts: Float[Array, "m d"]):  # type: ignore[no-untyped-def]
            assert not isinstance(precondition, str)
            loc, scale_tril = precondition or (jnp.zeros(dim), jnp.eye(dim))
            whitening = affine(jnp.asarray(loc, dtype), jnp.asarray(scale_tril, dtype))
            key_points, key = jax.random.split(key)
            points = jax.vmap(normal(dim).sample)(jax.random.split(key_points, _NUM_ADAPTING))
            return whitening, normal(dim), points, jnp.zeros((), jnp.int32), jnp.zeros((), dtype), key

        def check(whitening, reference, points, gradients, drift, key):  # type: ignore[no-untyped-def]
            key_check, key_adapt = jax.random.split(key)
            white = whiten(target, whitening)
            draws = jax.vmap(reference.sample)(jax.random.split(key_check, _NUM_CHECKED))
            log_weight = jax.vmap(lambda u: white.logdensity_fn(u) - reference.log_prob(u))(draws)
            step_size = None
            if local is not None:
                step_size = local.adapt(
                    after(key_adapt, log_weight),
                    white.logdensity_fn,
                    points[:: max(1, len(points) // _NUM_ADAPTING)],
                ).astype(dtype)
            log_weight = clean(log_weight)
            # neighbours among tempered particles descend from one another: take them evenly spaced
            kept = points[:: max(1, len(points) // _NUM_KEPT)] if isinstance(precondition, str) else None
            fraction, khat = (found(log_weight).astype(dtype) for found in (ess_fraction, tail_index))
            drift, gradients = drift.astype(dtype), gradients.astype(jnp.int32)
            return whitening, reference, kept, fraction, khat, drift, step_size, gradients

        stages = [given]
        if isinstance(precondition, str):
            stages = warm_start(target, jnp.asarray(problem.order), precondition == "refined")
        return WarmStart(*run_stages([*stages, check], key, starts, scouts))

    def algorithm_of(warm: WarmStart, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Algorithm:
        return make_algorithm(whiten(target_of(args, kwargs), warm.whitening), warm)

    def train(state: KernelState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelState:
        rng_key, key_step = jax.random.split(state.rng_key)

        def work(training: Training) -> Training:
            trained, info = algorithm_of(training.warm, args, kwargs).step(key_step, training.algorithm)
            num_steps = training.num_steps + 1
            least = num_warmup // _SHORTER if shorten else num_warmup
            enough = training.warm.near_exact() & (num_steps >= least)
            return training._replace(
                algorithm=trained,
                finished=info.finished | enough,
                num_steps=num_steps,
                loss=training.loss.at[state.i].set(info.loss.astype(dtype)),
                skipped_updates=training.skipped_updates + info.skipped,
                gradients=training.gradients + info.gradients,
            )

        training = jax.lax.cond(state.training.finished, lambda training: training, work, state.training)
        return state._replace(training=training, rng_key=rng_key)

    def sampler(
        training: Training,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        use: Callable[[Algorithm | Ensemble], Any],
    ) -> Any:
        """Use the trained algorithm, or its ensemble where single draws were found to be poor."""
        algorithm = algorithm_of(training.warm, args, kwargs)
        ensemble = algorithm.ensemble
        if training.ensemble is None or ensemble is None:
            return use(algorithm)
        return jax.lax.cond(training.ensemble, lambda: use(ensemble), lambda: use(algorithm))

    def propose(
        key: Key, training: Training, n: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Proposals:
        draws = sampler(training, args, kwargs, lambda one: one.draw(key, training.algorithm, n))
        x, log_det = jax.vmap(lambda u: unwhiten(training.warm.whitening, u))(draws.x)
        usable = jnp.isfinite(draws.log_weight) & jnp.all(jnp.isfinite(x), -1)
        return Proposals(
            x,
            jnp.where(usable, draws.log_weight, jnp.nan),
            log_det - draws.logdensity,
            draws.one_to_one,
        )

    def weigh(
        key: Key, training: Training, x: Float[Array, "n d"], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Float[Array, " n"]:
        u = jax.vmap(lambda point: invert(training.warm.whitening, point)[0])(x)
        weights = lambda one: jax.vmap(lambda k, point: one.weigh(k, training.algorithm, point))  # noqa: E731
        return sampler(training, args, kwargs, lambda one: weights(one)(jax.random.split(key, len(x)), u))

    def ravel_chains(z: Any) -> Float[Array, "*c d"]:
        ravel = lambda value: ravel_pytree(value)[0]  # noqa: E731
        return jax.vmap(ravel)(z) if chains else ravel(z)

    def unravel_chains(x: Float[Array, "*c d"]) -> Any:
        return jax.vmap(problem.unravel)(x) if chains else problem.unravel(x)

    def move(
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        training: Training,
        key: Key,
        x: Float[Array, " d"],
        log_weight: Float[Array, ""],
        energy: Float[Array, ""],
    ) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, ""]]:
        """One local move of one chain, and the weight of where it arrives."""
        assert local is not None
        assert training.warm.step_size is not None
        key_move, key_weight = jax.random.split(key)
        warm = training.warm
        logdensity_fn = whiten(target_of(args, kwargs), warm.whitening).logdensity_fn
        u, value, _ = local.step(key_move, logdensity_fn, invert(warm.whitening, x)[0], warm.step_size)
        fresh = sampler(training, args, kwargs, lambda one: one.weigh(key_weight, training.algorithm, u))
        moved, log_det = unwhiten(warm.whitening, u)
        # an infinite weight: what is never proposed is entered and left by these moves alone
        good = (fresh > -jnp.inf) & jnp.isfinite(value) & jnp.all(jnp.isfinite(moved))
        return (
            jnp.where(good, moved, x),
            jnp.where(good, fresh, log_weight),
            jnp.where(good, log_det - value, energy),
        )

    def draw(state: KernelState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelState:
        rng_key, key_block, key_start, key_accept, key_local = jax.random.split(state.rng_key, 5)
        drawn = state.i - num_warmup

        def refill(carry):  # type: ignore[no-untyped-def]
            k, times, ensemble, block, _ = carry
            key = jax.random.fold_in(key_block, k)
            flat = propose(key, state.training._replace(ensemble=ensemble), size, args, kwargs)
            new = jax.tree.map(lambda leaf, old: leaf.reshape(old.shape).astype(old.dtype), flat, block)
            if ensemble is not None:  # the very first block decides; if it is poor, it is not used
                weight = clean(flat.log_weight)
                poor = (tail_index(weight) > USABLE_KHAT) & (ess_fraction(weight) < NEARLY_EQUAL)
                switch = poor & (drawn == 0) & (k == 0)
                ensemble, times = ensemble | switch, times + switch
            return k + 1, times, ensemble, new, block

        # at the first draw two blocks: one for the chains' first states, one for what is proposed
        times = jnp.where(drawn == 0, 2, jnp.where(drawn % rounds == 0, 1, 0)).astype(jnp.int32)
        carry = jnp.zeros((), jnp.int32), times, state.training.ensemble, state.block, state.block
        _, _, ensemble, block, seeds = jax.lax.while_loop(lambda carry: carry[0] < carry[1], refill, carry)
        training = state.training._replace(ensemble=ensemble)

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
        finite = jnp.isfinite(proposals.log_weight) | ~proposals.one_to_one

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
        if training.warm.step_size is not None and corrected:
            one = lambda *state_of_one: move(args, kwargs, training, *state_of_one)  # noqa: E731
            if chains:
                one, key_local = jax.vmap(one), jax.random.split(key_local, num_chains)
            x, log_weight, energy = one(key_local, x, log_weight, energy)
        return state._replace(
            z=unravel_chains(x),
            potential_energy=energy,
            log_weight=log_weight,
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + (accept_prob - state.mean_accept_prob) / (drawn + 1),
            diverging=jnp.any(~finite, 0),
            nonfinite_proposals=state.nonfinite_proposals + jnp.sum(~finite, 0, dtype=jnp.int32),
            log_mean_inverse_weight=jnp.logaddexp(state.log_mean_inverse_weight + jnp.log(drawn), -log_weight)
            - jnp.log(drawn + 1),
            training=training,
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

    def filled(shape: tuple[int, ...], value: float, dtype: Any = dtype) -> Array:
        # by NumPy: JAX would compile a program for every shape
        return jnp.asarray(np.full(shape, value, dtype))

    def init(key: Key, warm: WarmStart, doubtful: bool) -> KernelState:
        z = problem.positions
        energy = jax.jit(jax.vmap(problem.potential_gen(*model_args, **model_kwargs)))(z)
        if not chains:
            z, energy = jax.tree.map(lambda leaf: leaf[0], (z, energy))
        key_algorithm, rng_key = jax.random.split(key)
        own = algorithm_of(warm, model_args, model_kwargs)
        (algorithm,) = run_stages([lambda key: (own.init(key),)], key_algorithm)
        blank, zero, no = filled(chains, 0.0), filled((), 0, jnp.int32), filled((), False, bool)
        training = Training(
            warm=warm,
            algorithm=algorithm,
            finished=no,
            num_steps=zero,
            loss=filled((num_warmup,), jnp.nan),
            skipped_updates=zero,
            gradients=warm.gradients,
            ensemble=no if ensembles and doubtful and own.ensemble is not None else None,
        )
        # filled at the first draw
        empty = filled(shape, 0.0)
        block = Proposals(filled((*shape, dim), 0.0), empty, empty, filled(shape, False, bool))
        state = KernelState(
            i=zero,
            z=z,
            potential_energy=energy.astype(dtype),
            log_weight=filled(chains, -jnp.inf),
            accept_prob=blank,
            mean_accept_prob=blank,
            diverging=filled(chains, False, bool),
            nonfinite_proposals=filled(chains, 0, jnp.int32),
            log_mean_inverse_weight=blank,
            training=training,
            block=block,
            rng_key=rng_key,
        )
        # a weakly typed leaf would turn strong in the first step, and a second program would be compiled
        strong = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), state._replace(rng_key=zero))
        return strong._replace(rng_key=rng_key)

    return LearnedChain(start, init, sample, propose, weigh)
