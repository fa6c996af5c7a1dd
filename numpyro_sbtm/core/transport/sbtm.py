# SPDX-License-Identifier: Apache-2.0
"""Score-based transport modelling: particles that move by the score of their own law.

    dx/dt = ∇log π(x) - s(x),      s learned on the particles, step by step.

The sequence of maps that the particles leave behind is a normalising flow: for points that were never
trained on, the density after the last map is known exactly. Where its determinants are too dear, fresh points
follow the same velocities with noise, and the weights of their paths are exact (`noisy_transport`).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.checks import shown
from numpyro_sbtm.core.algorithm import Algorithm, Info
from numpyro_sbtm.core.divergence import log_variance
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.options import TransportOptions
from numpyro_sbtm.core.path import log_kernels, simulate
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.quasi import quasi_normal, standardised
from numpyro_sbtm.core.score import divergences_of
from numpyro_sbtm.core.smc import independent_ensemble, path_draws
from numpyro_sbtm.core.target import Key, Target, value_and_score
from numpyro_sbtm.core.transition import Gaussian, Transition, standard_normal
from numpyro_sbtm.core.transport.annealing import Annealing, next_level
from numpyro_sbtm.core.transport.dissipation import Dissipation, dissipation
from numpyro_sbtm.core.transport.euler import euler_map, longest_step
from numpyro_sbtm.core.transport.maps import Maps, displacement, flow, velocity
from numpyro_sbtm.core.transport.noisy import noisy_transport
from numpyro_sbtm.core.transport.state import SBTMState, Scored, held_out, probes_of
from numpyro_sbtm.core.transport.velocity import (
    KernelFit,
    NetworkFit,
    ScoredPoints,
    VelocityFit,
    affine_part,
    bounded,
    times_covariance,
)
from numpyro_sbtm.core.weights import log_variance_at

__all__ = ["sbtm"]

_PATIENCE = 15  # maps without a lower divergence after which no more are made
_NOISES = (0.02, 0.05, 0.1, 0.2, 0.5)  # among which the variance of the weights decides
_FIRST_NOISE = 0.1  # while the maps are made
_NUM_JUDGED = 256  # paths that judge each of them
_FASTER = 2.0  # bound on a step over the one before, where steps adapt
_ALL = 1.0 - 1e-5  # of the duration, beyond rounding


def sbtm(
    target: Target,
    net: Net,
    optimiser: optax.GradientTransformation | None,
    options: TransportOptions = TransportOptions(),  # noqa: B008 - frozen
    *,
    base: Transition | None = None,
    annealing: Annealing | None = None,
    num_steps: int | None = None,
    smc_particles: int = 0,
) -> Algorithm:
    """Make the algorithm of score-based transport modelling.

    Every step trains the score network on the current particles by implicit score matching; every so many
    steps the particles move and the map is stored. When all maps are made, further steps do nothing. Fresh
    draws start from the first law, pass through the stored maps, and carry the exact weight π(x) / q(x).
    Points that are never trained on measure the divergence after every map; draws end with the map after
    which it was least.

    Args:
        target: the density π, best whitened.
        net: ``apply(params, u)`` gives the correction to a Gaussian score, shape ``[d]``.
        optimiser: an optax optimiser. None for a net that is linear in its parameters, such as
            `numpyro_sbtm.networks.radial`: velocities are fitted in closed form, without updates or rounds.
        options: how particles are transported.
        base: the first law, wider than the target; None for N(0, I).
        annealing: densities that the particles follow on their way to the target; None for the target itself.
            Weights and divergences are always those of the target.
        num_steps: training steps in all, divided evenly between the maps, of which there are then no more;
            None: one for each.
        smc_particles: draws behind each of `Algorithm.several` (see `independent_ensemble`, and for noisy
            draws `path_ensemble`); none below two.

    Returns:
        The algorithm. A map costs n + m gradients; a draw costs one and K (d + 1) evaluations of the network,
        or with noise K + 1 and 2 K. With Heun's steps gradients of maps and evaluations are twice as many.

    Raises:
        ValueError: for what does not go together.

    Reference:
        Ilin, Sushko & Hu (2025), arXiv:2504.18130, algorithm 1; Huang & Wang (2024),
        arXiv:2405.05187 (the density along the maps).

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from numpyro_sbtm.core import Target, TransportOptions, sbtm
        >>> from numpyro_sbtm.networks import score_mlp
        >>> target = Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2), 2)
        >>> options = TransportOptions(num_particles=64, num_maps=4)
        >>> algorithm = sbtm(target, score_mlp(8), optax.adam(1e-3), options)
        >>> state, info = algorithm.step(jax.random.key(1), algorithm.init(jax.random.key(0)))
        >>> algorithm.proposal.draw(jax.random.key(2), algorithm.parameters(state), 5).log_weight.shape
        (5,)
    """
    options.check_dim(target.dim, None if annealing is None else shown(annealing))
    base = standard_normal(target.dim) if base is None else base
    if options.quasi and not isinstance(base, Gaussian):
        raise ValueError(
            f"`quasi` needs a `base` that is a `Gaussian`, got {type(base).__name__}. Pass `quasi=False`."
        )
    if options.solved_output and (net.features is None or optimiser is None):
        raise ValueError(
            "`solved_output` needs a `net` with `features` and an `optimiser` that trains them, got "
            f"{'no features' if net.features is None else 'None'}. Pass `solved_output=False`."
        )
    fit: VelocityFit = KernelFit(net, base)
    if optimiser is None:
        optimiser = optax.identity()
    else:
        fit = NetworkFit(net, optimiser, base, options)
    num_maps = options.num_maps if num_steps is None else min(options.num_maps, num_steps)
    steps_per_map = 1 if num_steps is None else num_steps // num_maps
    noisy = options.is_noisy(target.dim)
    transport = _Transport(
        target, net, optimiser, options, base, annealing, fit, num_maps, steps_per_map, noisy
    )
    if noisy:
        proposals = path_draws(transport.process, target, smc_particles)
        return Algorithm(
            transport.init, transport.step, lambda state: (transport.best(state), state.noise), *proposals
        )
    single = flow(net, base, target)
    several = independent_ensemble(single, smc_particles) if smc_particles > 1 else None
    return Algorithm(transport.init, transport.step, transport.best, single, several)


@dataclass(frozen=True, eq=False)
class _Transport:
    """The steps of `sbtm`."""

    target: Target
    net: Net
    optimiser: optax.GradientTransformation
    options: TransportOptions
    base: Transition
    annealing: Annealing | None
    fit: VelocityFit
    num_maps: int
    steps_per_map: int
    noisy: bool

    @property
    def process(self) -> Process:
        """What noisy draws follow."""
        return noisy_transport(self.net, self.num_maps, self.base)

    def score(
        self, level: Float[Array, ""], particles: Float[Array, "n d"], probes: Float[Array, "m d"]
    ) -> Scored:
        """Evaluate the densities at particles and probes, in one batch."""
        n, points = len(particles), jnp.concatenate([particles, probes])
        if self.annealing is None:
            values, scores = jax.vmap(lambda y: value_and_score(self.target, y))(points)
            return Scored(bounded(scores[:n]), scores[n:], scores[n:], values[n:])
        annealed = self.annealing.at(self.target, self.base, level)
        (values, scores), (_, between) = jax.vmap(
            lambda y: (value_and_score(self.target, y), value_and_score(annealed, y))
        )(points)
        return Scored(bounded(between[:n]), between[n:], scores[n:], values[n:])

    # ------------------------------------------------------------------ the start
    def start(self, key_particles: Key, key_probes: Key) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
        """Draw particles and probes from the first law."""
        n, m, dim, base = self.options.num_particles, self.options.num_probes, self.target.dim, self.base
        if self.options.quasi:
            assert isinstance(base, Gaussian)
            particles = base.mean + base.std * standardised(quasi_normal(n, dim))
            return particles, base.mean + base.std * quasi_normal(m, dim, key_probes)
        particles = jax.vmap(base.sample)(jax.random.split(key_particles, n))
        return particles, jax.vmap(base.sample)(jax.random.split(key_probes, m))

    def init(self, key: Key) -> SBTMState:
        key_net, key_particles, key_probes = jax.random.split(key, 3)
        params = self.net.init(key_net, self.target.dim)
        particles, probes = self.start(key_particles, key_probes)
        log_q = jax.vmap(self.base.log_prob)(probes)
        level = jnp.ones((), log_q.dtype)
        if self.annealing is not None:
            level = self.annealing.level(jnp.zeros((), log_q.dtype))
        scored = self.score(level, particles, probes)
        current = affine_part(ScoredPoints(particles, scored.scores), params)
        one = current._replace(second=current) if self.options.heun else current
        maps = jax.tree.map(lambda leaf: jnp.zeros((self.num_maps, *leaf.shape), leaf.dtype), one)
        divergence, variance = held_out(log_q, scored.log_target)
        unknown = jnp.full(self.num_maps, jnp.nan, log_q.dtype)
        return SBTMState(
            step=jnp.zeros((), jnp.int32),
            level=level,
            particles=particles,
            opt_state=self.optimiser.init(params),
            current=current,
            maps=maps,
            probes=probes,
            probe_log_q=log_q,
            divergence=jnp.full(self.num_maps + 1, jnp.inf, log_q.dtype).at[0].set(divergence),
            dissipation=Dissipation(unknown, unknown, unknown),
            levels=unknown,
            variance=variance,
            noise=jnp.asarray(_FIRST_NOISE if self.noisy else 0.0, log_q.dtype),
            velocities=None if self.options.tolerance is None else jnp.zeros_like(particles),
            **scored._asdict(),
        )

    # ------------------------------------------------------------------ a step
    def step(self, key: Key, state: SBTMState) -> tuple[SBTMState, Info]:
        three = self.noisy or self.options.heun
        key_train, key_move, key_noise = jax.random.split(key, 3) if three else (key, key, key)
        before = self.complete(state)
        calls = (1 if self.annealing is None else self.annealing.calls) * (2 if self.options.heun else 1)

        def work(state: SBTMState) -> tuple[SBTMState, Info]:
            state, info = self.train(key_train, state)
            due = (state.step + 1) % self.steps_per_map == 0
            stay = lambda state: (state, jnp.zeros((), jnp.int32))  # noqa: E731
            state, skipped = jax.lax.cond(due, lambda state: self.move(key_move, state), stay, state)
            each = calls * (self.options.num_particles + self.options.num_probes)
            gradients = jnp.where(due, each, 0).astype(jnp.int32)
            info = info._replace(gradients=gradients, skipped=info.skipped + skipped)
            return state._replace(step=state.step + 1), info

        def rest(state: SBTMState) -> tuple[SBTMState, Info]:
            zero = jnp.zeros((), jnp.int32)
            return state, Info(jnp.asarray(jnp.nan, state.particles.dtype), zero, zero, jnp.zeros((), bool))

        state, info = jax.lax.cond(before, rest, work, state)
        finished = self.complete(state)
        if self.noisy:
            last = finished & ~before
            choose = lambda state: self.choose_noise(key_noise, state)  # noqa: E731
            state = jax.lax.cond(last, choose, lambda state: state, state)
            judged = len(_NOISES) * _NUM_JUDGED * (self.num_maps + 1)
            info = info._replace(gradients=info.gradients + jnp.where(last, judged, 0).astype(jnp.int32))
        return state, info._replace(finished=finished)

    def complete(self, state: SBTMState) -> Bool[Array, ""]:
        """Say whether another step would gain nothing."""
        goal = log_variance_at(self.options.target_acceptance)
        stale = state.step // self.steps_per_map - jnp.argmin(state.divergence) > _PATIENCE
        stale &= state.level >= 1.0
        reached = (state.step >= self.steps_per_map) & (state.variance < goal)
        if self.options.tolerance is not None:
            reached |= jnp.sum(state.maps.step_size) >= self.options.duration * _ALL
        return reached | stale | (state.step >= self.num_maps * self.steps_per_map)

    def train(self, key: Key, state: SBTMState) -> tuple[SBTMState, Info]:
        """Train the velocity of the next map."""
        particles = ScoredPoints(state.particles, state.scores)
        params, opt_state, loss, skipped = self.fit.train(
            key, state.step == 0, state.current, state.opt_state, particles, probes_of(state)
        )
        info = Info(loss, skipped, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
        return state._replace(current=state.current._replace(params=params), opt_state=opt_state), info

    def move(self, key: Key, state: SBTMState) -> tuple[SBTMState, Int[Array, ""]]:
        """Make a map and move all points by it, if that leaves them finite; with updates skipped."""
        options, before = self.options, state
        key_walk, key_slopes = jax.random.split(key) if self.noisy else (key, key)
        plain = self.fit.trim(state.current, ScoredPoints(state.particles, state.scores), probes_of(state))
        used = times_covariance(plain) if options.preconditioned else plain
        field = partial(velocity, self.net, used)
        velocities = jax.vmap(field)(state.particles)
        step_size = jnp.minimum(
            self.accurate(state, used, velocities), longest_step(field, state.particles, options.max_stretch)
        )
        made = used._replace(step_size=step_size.astype(used.mean.dtype))
        level = self.next_level(state, jnp.sum(state.maps.step_size) + step_size)
        shifts, skipped = velocities, jnp.zeros((), jnp.int32)
        if options.heun:
            made, state, skipped = self.corrected(key, state, made, level)
            both = partial(displacement, self.net, made)
            step_size = jnp.minimum(
                step_size, longest_step(both, state.particles, options.max_stretch)
            ).astype(made.step_size.dtype)
            made = made._replace(step_size=step_size)
            shifts = jax.vmap(both)(state.particles)
        k = state.step // self.steps_per_map
        maps = jax.tree.map(lambda stack, leaf: stack.at[k].set(leaf), state.maps, made)
        moved = state._replace(maps=maps, particles=state.particles + step_size * shifts, level=level)
        moved = self.carried(key_walk, state, moved, made)
        against = (
            jax.vmap(partial(velocity, self.net, plain))(state.probes) if options.preconditioned else None
        )
        slopes = divergences_of(field, state.probes, key_slopes if self.noisy else None)
        now = dissipation(jax.vmap(field)(state.probes), slopes, state.target_scores, against)
        moved = moved._replace(
            dissipation=jax.tree.map(lambda stack, leaf: stack.at[k].set(leaf), state.dissipation, now),
            levels=state.levels.at[k].set(state.level),
            velocities=None if options.tolerance is None else velocities,
        )
        leaves = jax.tree.leaves((moved.particles, moved.current))
        good = jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, before), skipped

    def carried(self, key: Key, state: SBTMState, moved: SBTMState, made: Maps) -> SBTMState:
        """Carry the probes along, where particles have moved, and score all points where they are now."""
        k = state.step // self.steps_per_map
        if self.noisy:
            process, params = self.process, (moved.maps, state.noise)
            walk = lambda key, x, score: process.forward(params, k, x, score).sample(key)  # noqa: E731
            keys = jax.random.split(key, len(state.probes))
            probes = jax.vmap(walk)(keys, state.probes, state.probe_scores)
        else:
            move_by = partial(displacement, self.net, made)
            carry = lambda x: euler_map(move_by, made.step_size, x)  # noqa: E731
            probes, change, _ = jax.vmap(carry)(state.probes)
        scored = self.score(moved.level, moved.particles, probes)
        if self.noisy:
            log_forward, log_backward = jax.vmap(lambda *ends: log_kernels(process, params, k, *ends))(
                state.probes, probes, state.probe_scores, scored.probe_scores
            )
            log_q = state.probe_log_q + log_forward - log_backward
        else:
            log_q = state.probe_log_q - change
        divergence, variance = held_out(log_q, scored.log_target)
        return moved._replace(
            current=affine_part(ScoredPoints(moved.particles, scored.scores), state.current.params),
            probes=probes,
            probe_log_q=log_q,
            divergence=state.divergence.at[k + 1].set(divergence),
            variance=variance,
            **scored._asdict(),
        )

    def next_level(self, state: SBTMState, elapsed: Float[Array, ""]) -> Float[Array, ""]:
        """Choose the level that particles follow next."""
        annealing = self.annealing
        if annealing is None:
            return state.level
        if annealing.conditional_ess is None:
            done = elapsed / self.options.duration
            if self.options.tolerance is None:
                done = (state.step // self.steps_per_map + 1) / self.num_maps
            return annealing.level(done).astype(state.level.dtype)
        log_base = jax.vmap(self.base.log_prob)(state.probes)
        log_ratio = state.log_target - log_base
        log_weight = log_base + state.level * log_ratio - state.probe_log_q
        return next_level(state.level, log_weight, log_ratio, annealing.conditional_ess)

    # ------------------------------------------------------------------ step sizes
    def accurate(self, state: SBTMState, used: Maps, velocities: Float[Array, "n d"]) -> Float[Array, ""]:
        """Compute the longest step that the tolerance allows, within what is left of the duration."""
        duration, tolerance = self.options.duration, self.options.tolerance
        first = jnp.asarray(duration / self.num_maps, velocities.dtype)
        if tolerance is None:
            return first
        assert state.velocities is not None
        k = state.step // self.steps_per_map
        last = jnp.where(k > 0, state.maps.step_size[k - 1], first)
        change = (velocities - state.velocities) @ used.whitener.T / last
        bend = jnp.sqrt(jnp.mean(change**2))
        allowed = jnp.sqrt(2.0 * tolerance / jnp.maximum(bend, 1e-12))
        allowed = jnp.where(k > 0, jnp.minimum(allowed, _FASTER * last), first)
        return jnp.minimum(allowed, duration - jnp.sum(state.maps.step_size))

    def corrected(
        self, key: Key, state: SBTMState, used: Maps, level: Float[Array, ""]
    ) -> tuple[Maps, SBTMState, Int[Array, ""]]:
        """Give a map its second velocity, learned where Euler's step would end; with updates skipped."""
        ahead = jax.vmap(lambda x: x + used.step_size * velocity(self.net, used, x))
        particles, probes = ahead(state.particles), ahead(state.probes)
        scored = self.score(level, particles, probes)
        points = ScoredPoints(particles, scored.scores)
        held_out = ScoredPoints(probes, bounded(scored.probe_scores))
        second = affine_part(points, state.current.params)
        params, opt_state, _, skipped = self.fit.train(
            key, jnp.zeros((), bool), second, state.opt_state, points, held_out
        )
        trained = state._replace(current=state.current._replace(params=params), opt_state=opt_state)
        second = self.fit.trim(second._replace(params=params, step_size=used.step_size), points, held_out)
        second = times_covariance(second) if self.options.preconditioned else second
        return used._replace(second=second), trained, skipped

    # ------------------------------------------------------------------ what draws use
    def best(self, state: SBTMState) -> Maps:
        """Take the maps up to the least divergence."""
        used = jnp.arange(self.num_maps) < jnp.argmin(state.divergence)
        return state.maps._replace(step_size=jnp.where(used, state.maps.step_size, 0.0))

    def choose_noise(self, key: Key, state: SBTMState) -> SBTMState:
        """Take the noise under which the log weights of fresh paths vary least."""
        keys = jax.random.split(key, _NUM_JUDGED)
        process, maps = self.process, self.best(state)

        def variance(noise: Float[Array, ""]) -> Float[Array, ""]:
            same = jax.random.clone(keys)  # the same paths, but for the noise
            paths = jax.vmap(lambda k: simulate(process, (maps, noise), self.target, k))(same)
            return log_variance().value(paths)

        noises = jnp.asarray(_NOISES, state.noise.dtype)
        return state._replace(noise=noises[jnp.argmin(jax.lax.map(variance, noises))])
