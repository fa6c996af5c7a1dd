# SPDX-License-Identifier: Apache-2.0
"""Score-based transport modelling: particles that move by the score of their own law.

    dx/dt = ∇log π(x) - s(x),      s learned on the particles, step by step.

The sequence of maps that the particles leave behind is a normalising flow: for points that were never
trained on, the density after the last map is known exactly. Where its determinants are too dear, fresh points
follow the same velocities with noise, and the weights of their paths are exact (`noisy_transport`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.algorithm import Algorithm, Draws, Info, Proposal
from numpyro_sbtm.core.anneal import Annealing, next_level
from numpyro_sbtm.core.dissipation import Dissipation, dissipation
from numpyro_sbtm.core.divergence import log_variance
from numpyro_sbtm.core.flow import Maps, displacement, noisy_transport, pull, push, returns, velocity
from numpyro_sbtm.core.learning import (
    Cloud,
    affine_part,
    bounded,
    kernel_fit,
    precondition,
    velocity_fit,
)
from numpyro_sbtm.core.path import log_kernels, simulate
from numpyro_sbtm.core.process import Net
from numpyro_sbtm.core.quasi import quasi_normal, standardised
from numpyro_sbtm.core.score import divergence_of
from numpyro_sbtm.core.smc import independent_ensemble, path_draws
from numpyro_sbtm.core.target import Key, Target, VectorField, value_and_score
from numpyro_sbtm.core.transition import Gaussian, Transition, standard_normal
from numpyro_sbtm.core.transport import euler_map, spectral_norm

__all__ = ["SBTMState", "sbtm"]

_INVERSION_ERROR = 1e-3  # of a point that is carried back and forth, in whitened units
_PATIENCE = 15  # maps without a lower divergence after which no more are made
_WORST_EXCESS = 1e6  # of log q over log π, relative to its mean, where the latter is not finite
_NOISES = (0.02, 0.05, 0.1, 0.2, 0.5)  # among which the variance of the weights decides
_FIRST_NOISE = 0.1  # while the maps are made
_NUM_JUDGED = 256  # paths that judge each of them
_FASTER = 2.0  # bound on a step over the one before, where steps adapt
_ALL = 1.0 - 1e-5  # of the duration, beyond rounding
_PROBED = 64  # particles at which the velocity's Lipschitz constant is measured before a step


class SBTMState(NamedTuple):
    """State of score-based transport.

    Attributes:
        step: steps done, shape ``[]``.
        level: of the annealed target, 1 for the target itself, shape ``[]``.
        particles: the training particles, shape ``[n, d]``.
        scores: the annealed target's score at the particles, zero where it is not finite, shape ``[n, d]``.
        opt_state: state of the network's optimiser.
        current: the map being learned, with step size zero, without the leading axis.
        maps: the maps made so far.
        probes: points for no training, carried along, shape ``[m, d]``.
        probe_scores: the annealed target's score at the probes, shape ``[m, d]``.
        target_scores: the target's own, shape ``[m, d]``.
        log_target: the target's log density there, shape ``[m]``.
        probe_log_q: log density of the law they come from, shape ``[m]``; of noisy paths, forward over
            backward density.
        divergence: KL(q | π) - log Z after every map, from the probes of finite density and for q without the
            others; its first entry is before any, shape ``[K+1]``.
        dissipation: of every map, from the probes before it; NaN for those not made, each of shape ``[K]``.
        levels: of every map, shape ``[K]``.
        variance: of the probes' log weights after the last map, shape ``[]``.
        noise: b of noisy draws, shape ``[]``; zero for the flow.
        velocities: of the particles during the last map, zero before the first, shape ``[n, d]``; None where
            steps do not adapt.
    """

    step: Int[Array, ""]
    level: Float[Array, ""]
    particles: Float[Array, "n d"]
    scores: Float[Array, "n d"]
    opt_state: optax.OptState
    current: Maps
    maps: Maps
    probes: Float[Array, "m d"]
    probe_scores: Float[Array, "m d"]
    target_scores: Float[Array, "m d"]
    log_target: Float[Array, " m"]
    probe_log_q: Float[Array, " m"]
    divergence: Float[Array, " K1"]
    dissipation: Dissipation
    levels: Float[Array, " K"]
    variance: Float[Array, ""]
    noise: Float[Array, ""]
    velocities: Float[Array, "n d"] | None


def sbtm(
    target: Target,
    net: Net,
    optimiser: optax.GradientTransformation | None,
    *,
    num_particles: int = 1024,
    num_maps: int = 50,
    steps_per_map: int = 1,
    num_updates: int = 10,
    batch_size: int = 256,
    duration: float = 2.0,
    base: Transition | None = None,
    max_stretch: float = 0.5,
    tolerance: float | None = None,
    heun: bool = False,
    noisy: bool = False,
    goal: float = 0.0,
    smc_particles: int = 0,
    annealing: Annealing | None = None,
    max_rounds: int = 1,
    num_probes: int = 1024,
    first_updates: int = 0,
    quasi: bool = False,
    preconditioned: bool = False,
    solved_output: bool = False,
) -> Algorithm:
    """Make the algorithm of score-based transport modelling.

    Every step trains the score network on the current particles by implicit score matching; every
    ``steps_per_map`` steps the particles move and the map is stored. When all maps are made, further
    steps do nothing. Fresh draws start from the first law, pass through the stored maps, and carry the
    exact weight π(x) / q(x). Points that are never trained on measure the divergence after every map;
    draws end with the map after which it was least.

    Args:
        target: the density π, best whitened.
        net: ``apply(params, u)`` gives the correction to a Gaussian score, shape ``[d]``.
        optimiser: an optax optimiser. None for a net that is linear in its parameters, such as
            `numpyro_sbtm.networks.radial`: velocities are fitted in closed form, without updates or rounds.
        num_particles: training particles, n.
        num_maps: the number of maps, K.
        steps_per_map: training steps before each map.
        num_updates: updates of the network per step.
        batch_size: particles per update.
        duration: total time of the flow; the time step is ``duration / num_maps`` or less.
        base: the first law, wider than the target; None for N(0, I).
        max_stretch: bound on h Lip(v), estimated on particles, that shortens steps; below one. With ``heun``
            also on that of both velocities' mean.
        tolerance: error that a step may make, ½ h² |dv/dt| in root mean square over the particles and in
            their deviations, from the last two velocities. Steps are then as long as that allows, at most
            twice the last one, and end with ``duration``, or after ``num_maps`` of them. None: steps of
            ``duration / num_maps``.
        heun: whether a second velocity is learned where every step would end, and steps follow the mean of
            both: errors of the path are then of second order in the step, for twice the gradients and
            evaluations and the updates of one more step. A ``tolerance`` bounds the error of the first half
            alone. Not with noise.
        noisy: draw paths with noise instead of points of the flow. The noise is chosen at the end of
            training, by the variance of the weights.
        goal: training is finished once the variance of those points' log weights is below this (see
            `log_variance_at`).
        smc_particles: draws behind each of `Algorithm.several` (see `independent_ensemble`, and for noisy
            draws `path_ensemble`); none below two.
        annealing: densities that the particles follow on their way to the target; None for the target itself.
            Weights and divergences are always those of the target.
        max_rounds: rounds of ``num_updates`` per step at most; more than one end once the score matching loss
            of points that are not trained on stops falling, the best parameters are kept, and a map that does
            not fit those points clearly better than its affine part goes without its network.
        num_probes: how many such points, m.
        first_updates: updates of the network before the first map, whose velocity is known: the first law's
            score is.
        quasi: whether particles and held-out points start with low discrepancy instead of independently, the
            particles with exactly the base's mean and covariance; the base must be a `Gaussian`. Errors of
            means over them are then smaller than their standard errors.
        preconditioned: whether velocities are multiplied by the particles' covariance, so that near the end
            stiff directions relax like all others; time is then in units of that. Not with noise.
        solved_output: whether every map takes the best output layer for its network's features, solved for on
            all particles with a ridge that held-out points choose, in the place of the one in training. It
            leaves of the network what those points support, and errors of scores are then several times
            smaller. The net must have `Net.features`, as `numpyro_sbtm.networks.score_mlp` has.

    Returns:
        The algorithm. A map costs n + m gradients; a draw costs one and K (d + 1) evaluations of the network,
        or with noise K + 1 and 2 K. With Heun's steps gradients of maps and evaluations are twice as many.

    Raises:
        ValueError: for sizes out of range, and for what does not go together.

    Reference:
        Ilin, Sushko & Hu (2025), arXiv:2504.18130, algorithm 1; Huang & Wang (2024),
        arXiv:2405.05187 (the density along the maps).

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from numpyro_sbtm.core import Target, sbtm
        >>> from numpyro_sbtm.networks import score_mlp
        >>> target = Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2), 2)
        >>> algorithm = sbtm(target, score_mlp(8), optax.adam(1e-3), num_particles=64, num_maps=4)
        >>> state, info = algorithm.step(jax.random.key(1), algorithm.init(jax.random.key(0)))
        >>> algorithm.proposal.draw(jax.random.key(2), algorithm.parameters(state), 5).log_weight.shape
        (5,)
    """
    dim = target.dim
    if num_particles < dim + 2:
        raise ValueError(
            f"`num_particles` must exceed the dimension {dim} by two or more for a regular covariance, "
            f"got {num_particles}."
        )
    if not 0 < max_stretch < 1:
        raise ValueError(f"`max_stretch` must lie between 0 and 1, got {max_stretch}.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive, got {tolerance}. Pass None for steps of one length.")
    if min(num_maps, steps_per_map, num_updates, batch_size, max_rounds, num_probes) < 1:
        raise ValueError(
            "`num_maps`, `steps_per_map`, `num_updates`, `batch_size`, `max_rounds` and `num_probes` must be "
            f"at least 1, got {num_maps}, {steps_per_map}, {num_updates}, {batch_size}, {max_rounds} and "
            f"{num_probes}."
        )
    if noisy and annealing is not None:
        raise ValueError(
            "`annealing` asks for a flow: noisy draws move by the target's own score. Pass `noisy=False`."
        )
    if noisy and preconditioned:
        raise ValueError(
            "`preconditioned` asks for a flow: noisy draws take the same noise in all directions. Pass "
            "`noisy=False`."
        )
    if noisy and heun:
        raise ValueError("`heun` asks for a flow: a step with noise is of first order. Pass `noisy=False`.")
    base = standard_normal(dim) if base is None else base
    if quasi and not isinstance(base, Gaussian):
        raise ValueError(
            f"`quasi` needs a `base` that is a `Gaussian`, got {type(base).__name__}. Pass `quasi=False`."
        )

    if solved_output and (net.features is None or optimiser is None):
        raise ValueError(
            "`solved_output` needs a `net` with `features` and an `optimiser` that trains them, got "
            f"{'no features' if net.features is None else 'None'}. Pass `solved_output=False`."
        )

    calls = (1 if annealing is None else annealing.calls) * (2 if heun else 1)
    process = noisy_transport(net, num_maps, base)
    if optimiser is None:
        learning, optimiser = kernel_fit(net, base), optax.identity()
    else:
        learning = velocity_fit(
            net,
            optimiser,
            base,
            num_updates=num_updates,
            batch_size=batch_size,
            max_rounds=max_rounds,
            first_updates=first_updates,
            solved_output=solved_output,
        )

    def look(
        level: Float[Array, ""], particles: Float[Array, "n d"], probes: Float[Array, "m d"]
    ) -> tuple[Float[Array, "n d"], Float[Array, "m d"], Float[Array, "m d"], Float[Array, " m"]]:
        """Evaluate scores at particles and probes, and the target itself at the probes, in one batch."""
        n, points = len(particles), jnp.concatenate([particles, probes])
        if annealing is None:
            values, scores = jax.vmap(lambda y: value_and_score(target, y))(points)
            return bounded(scores[:n]), scores[n:], scores[n:], values[n:]
        annealed = annealing.at(target, base, level)
        (values, scores), (_, between) = jax.vmap(
            lambda y: (value_and_score(target, y), value_and_score(annealed, y))
        )(points)
        return bounded(between[:n]), between[n:], scores[n:], values[n:]

    def level_after(state: SBTMState, elapsed: Float[Array, ""]) -> Float[Array, ""]:
        """Choose the level that particles follow next."""
        if annealing is None:
            return state.level
        if annealing.conditional_ess is None:
            done = (state.step // steps_per_map + 1) / num_maps if tolerance is None else elapsed / duration
            return annealing.level(done).astype(state.level.dtype)
        log_base = jax.vmap(base.log_prob)(state.probes)
        log_ratio = state.log_target - log_base
        log_weight = log_base + state.level * log_ratio - state.probe_log_q
        return next_level(state.level, log_weight, log_ratio, annealing.conditional_ess)

    def judge(
        log_q: Float[Array, " m"], log_target: Float[Array, " m"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Compute the divergence, but for log Z, and the variance of the log weights.

        Draws whose density is not finite are left out, so that what counts is q without them, of which a
        share is left: its density is q over the share.
        """
        excess = log_q - log_target
        there = jnp.isfinite(excess)
        share = jnp.mean(there, dtype=excess.dtype)
        mean = jnp.mean(excess, where=there)
        variance = jnp.var(jnp.where(there, excess - mean, _WORST_EXCESS))
        some = share > 0.0
        return jnp.where(some, mean - jnp.log(share), jnp.inf), jnp.where(some, variance, jnp.inf)

    def init(key: Key) -> SBTMState:
        key_net, key_particles, key_probes = jax.random.split(key, 3)
        params = net.init(key_net, dim)
        if quasi:
            assert isinstance(base, Gaussian)
            particles = base.mean + base.std * standardised(quasi_normal(num_particles, dim))
            probes = base.mean + base.std * quasi_normal(num_probes, dim, key_probes)
        else:
            particles = jax.vmap(base.sample)(jax.random.split(key_particles, num_particles))
            probes = jax.vmap(base.sample)(jax.random.split(key_probes, num_probes))
        log_q = jax.vmap(base.log_prob)(probes)
        level = jnp.ones((), log_q.dtype)
        if annealing is not None:
            level = annealing.level(jnp.zeros((), log_q.dtype))
        scores, probe_scores, target_scores, log_target = look(level, particles, probes)
        current = affine_part(Cloud(particles, scores), params)
        one = current._replace(second=current) if heun else current
        maps = jax.tree.map(lambda leaf: jnp.zeros((num_maps, *leaf.shape), leaf.dtype), one)
        divergence, variance = judge(log_q, log_target)
        unknown = jnp.full(num_maps, jnp.nan, log_q.dtype)
        return SBTMState(
            step=jnp.zeros((), jnp.int32),
            level=level,
            particles=particles,
            scores=scores,
            opt_state=optimiser.init(params),
            current=current,
            maps=maps,
            probes=probes,
            probe_scores=probe_scores,
            target_scores=target_scores,
            log_target=log_target,
            probe_log_q=log_q,
            divergence=jnp.full(num_maps + 1, jnp.inf, log_q.dtype).at[0].set(divergence),
            dissipation=Dissipation(unknown, unknown, unknown),
            levels=unknown,
            variance=variance,
            noise=jnp.asarray(_FIRST_NOISE if noisy else 0.0, log_q.dtype),
            velocities=None if tolerance is None else jnp.zeros_like(particles),
        )

    def probes_of(state: SBTMState) -> Cloud:
        return Cloud(state.probes, bounded(state.probe_scores))

    def train(key: Key, state: SBTMState) -> tuple[SBTMState, Info]:
        particles = Cloud(state.particles, state.scores)
        params, opt_state, loss, skipped = learning.train(
            key, state.step == 0, state.current, state.opt_state, particles, probes_of(state)
        )
        info = Info(loss, skipped, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
        return state._replace(current=state.current._replace(params=params), opt_state=opt_state), info

    def accurate(state: SBTMState, used: Maps, velocities: Float[Array, "n d"]) -> Float[Array, ""]:
        """The longest step that the tolerance allows, within what is left of the duration."""
        if tolerance is None:
            return jnp.asarray(duration / num_maps, velocities.dtype)
        assert state.velocities is not None
        k = state.step // steps_per_map
        first = jnp.asarray(duration / num_maps, velocities.dtype)
        last = jnp.where(k > 0, state.maps.step_size[k - 1], first)
        change = (velocities - state.velocities) @ used.whitener.T / last
        bend = jnp.sqrt(jnp.mean(change**2))
        allowed = jnp.sqrt(2.0 * tolerance / jnp.maximum(bend, 1e-12))
        allowed = jnp.where(k > 0, jnp.minimum(allowed, _FASTER * last), first)
        return jnp.minimum(allowed, duration - jnp.sum(state.maps.step_size))

    def corrected(
        key: Key, state: SBTMState, used: Maps, level: Float[Array, ""]
    ) -> tuple[Maps, SBTMState, Int[Array, ""]]:
        """Give a map its second velocity, learned where Euler's step would end; with updates skipped."""
        ahead = jax.vmap(lambda x: x + used.step_size * velocity(net, used, x))
        particles, probes = ahead(state.particles), ahead(state.probes)
        scores, probe_scores, _, _ = look(level, particles, probes)
        points, held_out = Cloud(particles, scores), Cloud(probes, bounded(probe_scores))
        second = affine_part(points, state.current.params)
        params, opt_state, _, skipped = learning.train(
            key, jnp.zeros((), bool), second, state.opt_state, points, held_out
        )
        trained = state._replace(current=state.current._replace(params=params), opt_state=opt_state)
        second = learning.trim(second._replace(params=params, step_size=used.step_size), points, held_out)
        return used._replace(second=precondition(second) if preconditioned else second), trained, skipped

    def move(key: Key, state: SBTMState) -> tuple[SBTMState, Int[Array, ""]]:
        plain = learning.trim(state.current, Cloud(state.particles, state.scores), probes_of(state))
        used = precondition(plain) if preconditioned else plain

        def field(x: Float[Array, " d"]) -> Float[Array, " d"]:
            return velocity(net, used, x)

        def one_to_one(field: VectorField) -> Float[Array, ""]:
            """The longest step with which the field is bound to make a map that is one-to-one."""
            probed = state.particles[:: max(1, num_particles // _PROBED)][:_PROBED]
            lipschitz = jnp.max(jax.vmap(lambda x: spectral_norm(jax.jacfwd(field)(x)))(probed))
            return max_stretch / jnp.maximum(lipschitz, 1e-12)

        velocities = jax.vmap(field)(state.particles)
        step_size = jnp.minimum(accurate(state, used, velocities), one_to_one(field))
        made = used._replace(step_size=step_size.astype(used.mean.dtype))
        k = state.step // steps_per_map
        level = level_after(state, jnp.sum(state.maps.step_size) + step_size)
        before, skipped = state, jnp.zeros((), jnp.int32)
        if heun:
            made, state, skipped = corrected(key, state, made, level)
            both = partial(displacement, net, made)
            step_size = jnp.minimum(step_size, one_to_one(both)).astype(made.step_size.dtype)
            made = made._replace(step_size=step_size)
            particles = jax.vmap(lambda x: x + step_size * both(x))(state.particles)
        else:
            particles = state.particles + step_size * velocities
        maps = jax.tree.map(lambda stack, leaf: stack.at[k].set(leaf), state.maps, made)
        if noisy:
            params = maps, state.noise
            walk = lambda key, x, g: process.forward(params, k, x, g).sample(key)  # noqa: E731
            key_walk, key_slopes = jax.random.split(key)
            probes = jax.vmap(walk)(jax.random.split(key_walk, num_probes), state.probes, state.probe_scores)
            scores, probe_scores, target_scores, log_target = look(level, particles, probes)
            log_forward, log_backward = jax.vmap(lambda *ends: log_kernels(process, params, k, *ends))(
                state.probes, probes, state.probe_scores, probe_scores
            )
            log_q = state.probe_log_q + log_forward - log_backward
            keys = jax.random.split(key_slopes, num_probes)
            slopes = jax.vmap(lambda x, key: divergence_of(field, x, key))(state.probes, keys)
        else:
            move_by = lambda x: displacement(net, made, x)  # noqa: E731
            probes, change, _ = jax.vmap(lambda x: euler_map(move_by, step_size, x))(state.probes)
            scores, probe_scores, target_scores, log_target = look(level, particles, probes)
            log_q = state.probe_log_q - change
            # for an Euler step these Jacobians are those of the map
            slopes = jax.vmap(lambda x: divergence_of(field, x, None))(state.probes)
        against = jax.vmap(lambda x: velocity(net, plain, x))(state.probes) if preconditioned else None
        now = dissipation(jax.vmap(field)(state.probes), slopes, state.target_scores, against)
        current = affine_part(Cloud(particles, scores), state.current.params)
        divergence, variance = judge(log_q, log_target)
        moved = state._replace(
            level=level,
            particles=particles,
            scores=scores,
            current=current,
            maps=maps,
            probes=probes,
            probe_scores=probe_scores,
            target_scores=target_scores,
            log_target=log_target,
            probe_log_q=log_q,
            divergence=state.divergence.at[k + 1].set(divergence),
            dissipation=jax.tree.map(lambda all_k, one: all_k.at[k].set(one), state.dissipation, now),
            levels=state.levels.at[k].set(state.level),
            variance=variance,
            velocities=None if tolerance is None else velocities,
        )
        good = jnp.all(
            jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((particles, current))])
        )
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, before), skipped

    def complete(state: SBTMState) -> Bool[Array, ""]:
        """Say whether another step would gain nothing."""
        stale = state.step // steps_per_map - jnp.argmin(state.divergence) > _PATIENCE
        stale &= state.level >= 1.0
        reached = (state.step >= steps_per_map) & (state.variance < goal)
        if tolerance is not None:
            reached |= jnp.sum(state.maps.step_size) >= duration * _ALL
        return reached | stale | (state.step >= num_maps * steps_per_map)

    def choose_noise(key: Key, state: SBTMState) -> SBTMState:
        """Take the noise under which the log weights of fresh paths vary least."""
        keys = jax.random.split(key, _NUM_JUDGED)

        def variance(noise: Float[Array, ""]) -> Float[Array, ""]:
            same = jax.random.clone(keys)  # the same paths, but for the noise
            paths = jax.vmap(lambda k: simulate(process, (best(state), noise), target, k))(same)
            return log_variance().value(paths)

        noises = jnp.asarray(_NOISES, state.noise.dtype)
        return state._replace(noise=noises[jnp.argmin(jax.lax.map(variance, noises))])

    def step(key: Key, state: SBTMState) -> tuple[SBTMState, Info]:
        key_train, key_move, key_noise = jax.random.split(key, 3) if noisy or heun else (key, key, key)
        before = complete(state)

        def work(state: SBTMState) -> tuple[SBTMState, Info]:
            state, info = train(key_train, state)
            due = (state.step + 1) % steps_per_map == 0
            stay = lambda state: (state, jnp.zeros((), jnp.int32))  # noqa: E731
            state, skipped = jax.lax.cond(due, lambda state: move(key_move, state), stay, state)
            gradients = jnp.where(due, calls * (num_particles + num_probes), 0).astype(jnp.int32)
            info = info._replace(gradients=gradients, skipped=info.skipped + skipped)
            return state._replace(step=state.step + 1), info

        def rest(state: SBTMState) -> tuple[SBTMState, Info]:
            zero = jnp.zeros((), jnp.int32)
            return state, Info(jnp.asarray(jnp.nan, state.particles.dtype), zero, zero, jnp.zeros((), bool))

        state, info = jax.lax.cond(before, rest, work, state)
        finished = complete(state)
        if noisy:
            last = finished & ~before
            state = jax.lax.cond(
                last, lambda state: choose_noise(key_noise, state), lambda state: state, state
            )
            judged = len(_NOISES) * _NUM_JUDGED * (num_maps + 1)
            info = info._replace(gradients=info.gradients + jnp.where(last, judged, 0).astype(jnp.int32))
        return state, info._replace(finished=finished)

    def best(state: SBTMState) -> Maps:
        used = jnp.arange(num_maps) < jnp.argmin(state.divergence)
        return state.maps._replace(step_size=jnp.where(used, state.maps.step_size, 0.0))

    def checked_push(
        maps: Maps, x: Float[Array, " d"]
    ) -> tuple[Float[Array, " d"], Float[Array, ""], Bool[Array, ""]]:
        """Carry a point through the maps, and say whether it is one of those where they are one-to-one."""
        image, log_det, stretch = push(net, maps, x)
        # what comes near a point that repels has not returned to it
        return image, log_det, returns(net, maps, x) & (stretch < 1.0)

    def draw(key: Key, maps: Maps, n: int) -> Draws:
        start = jax.vmap(base.sample)(jax.random.split(key, n))
        x, log_det, one_to_one = jax.vmap(lambda x: checked_push(maps, x))(start)
        one_to_one |= ~jnp.all(jnp.isfinite(x), -1)  # lost for another reason
        logdensity = jax.vmap(target.logdensity_fn)(x)
        log_proposal = jax.vmap(base.log_prob)(start) - log_det
        log_weight = jnp.where(one_to_one, logdensity - log_proposal, -jnp.inf)
        return Draws(x, log_weight, logdensity, one_to_one)

    def weigh(key: Key, maps: Maps, x: Float[Array, " d"]) -> Float[Array, ""]:
        del key
        start, _ = pull(net, maps, x)
        image, log_det, one_to_one = checked_push(maps, start)
        logdensity = target.logdensity_fn(x)
        log_weight = logdensity - base.log_prob(start) + log_det
        proposed = one_to_one & (jnp.max(jnp.abs(image - x)) < _INVERSION_ERROR)
        return jnp.where(proposed, log_weight, jnp.where(jnp.isfinite(logdensity), jnp.inf, jnp.nan))

    if noisy:
        noisy_maps = lambda state: (best(state), state.noise)  # noqa: E731
        return Algorithm(init, step, noisy_maps, *path_draws(process, target, smc_particles))
    single = Proposal(draw, weigh)
    several = independent_ensemble(single, smc_particles) if smc_particles > 1 else None
    return Algorithm(init, step, best, single, several)
