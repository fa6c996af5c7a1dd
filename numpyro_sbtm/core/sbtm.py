# SPDX-License-Identifier: Apache-2.0
"""Score-based transport modelling: particles that move by the score of their own law.

    dx/dt = ∇log π(x) - s(x),      s learned on the particles, step by step.

The sequence of maps that the particles leave behind is a normalising flow: for points that were never
trained on, the density after the last map is known exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.algorithm import Algorithm, Draws, Info, guarded_update
from numpyro_sbtm.core.process import Net
from numpyro_sbtm.core.score import implicit_score_loss
from numpyro_sbtm.core.smc import independent_ensemble
from numpyro_sbtm.core.target import Key, Params, Target, value_and_score
from numpyro_sbtm.core.transition import Transition, standard_normal
from numpyro_sbtm.core.transport import euler_map, spectral_norm

__all__ = ["Maps", "SBTMState", "pull", "push", "sbtm"]

_MAX_INVERSION_STEPS = 50
_INVERSION_ERROR = 1e-3  # of a point that is carried back and forth, in whitened units
_NUM_PROBES = 1024
_PATIENCE = 15  # maps without a lower divergence after which no more are made
_LONGEST_SCORE = 5.0  # in medians of the particles' scores
_WORST_EXCESS = 1e6  # of log q over log π, where the latter is not finite
_PROBED = 64  # particles at which the velocity's Lipschitz constant is measured before a step


class Maps(NamedTuple):
    """The maps x ↦ x + h v(x), stacked: leading axis K.

        v(x) = b + W (x - μ) + Rᵀ net(R (x - μ)),       R = L⁻¹.

    Attributes:
        params: parameters of the network.
        mean: the particles' mean μ, shape ``[K, d]``.
        whitener: R, the inverse of a Cholesky factor L of their covariance, shape ``[K, d, d]``.
        drift: b, shape ``[K, d]``.
        slope: W, shape ``[K, d, d]``.
        step_size: h, shape ``[K]``; zero for a map not made yet, which is then the identity.
    """

    params: Params
    mean: Float[Array, "K d"]
    whitener: Float[Array, "K d d"]
    drift: Float[Array, "K d"]
    slope: Float[Array, "K d d"]
    step_size: Float[Array, " K"]


class SBTMState(NamedTuple):
    """State of score-based transport.

    Attributes:
        step: steps done, shape ``[]``.
        particles: the training particles, shape ``[n, d]``.
        scores: the target's score at the particles, zero where it is not finite, shape ``[n, d]``.
        opt_state: state of the network's optimiser.
        current: the map being learned, with step size zero, without the leading axis.
        maps: the maps made so far.
        probes: points for no training, carried along, shape ``[m, d]``.
        probe_log_q: log density of the law they come from, shape ``[m]``.
        divergence: KL(q | π) + log Z after every map, from the probes; its first entry is before any,
            shape ``[K+1]``.
    """

    step: Int[Array, ""]
    particles: Float[Array, "n d"]
    scores: Float[Array, "n d"]
    opt_state: optax.OptState
    current: Maps
    maps: Maps
    probes: Float[Array, "m d"]
    probe_log_q: Float[Array, " m"]
    divergence: Float[Array, " K1"]


def _velocity(net: Net, one: Maps, x: Float[Array, " d"]) -> Float[Array, " d"]:
    centred = x - one.mean
    correction = one.whitener.T @ net.apply(one.params, one.whitener @ centred)
    return one.drift + one.slope @ centred + correction


def push(
    net: Net, maps: Maps, x: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, ""]]:
    """Carry one point through all maps.

    Args:
        net: the network.
        maps: the maps.
        x: the point, shape ``[d]``.

    Returns:
        The image, the log-determinant of the composed map, and the largest h ‖Dv‖ met on the way,
        which is below one where the maps are one-to-one.
    """

    def step(carry, one: Maps):  # type: ignore[no-untyped-def]
        x, log_det, worst = carry
        x, change, stretch = euler_map(lambda y: _velocity(net, one, y), one.step_size, x)
        return (x, log_det + change, jnp.maximum(worst, stretch)), None

    zero = jnp.zeros((), x.dtype)
    return jax.lax.scan(step, (x, zero, zero), maps)[0]


def pull(net: Net, maps: Maps, x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Carry one point back through all maps: the inverse of `push`.

    Every map is undone by the iteration x ← y - h v(x), a contraction where h Lip(v) < 1.

    Args:
        net: the network.
        maps: the maps.
        x: the point, shape ``[d]``.

    Returns:
        The point that `push` carries to x, and the largest change in a last iteration: not small where
        an iteration did not converge.
    """
    tolerance = 4.0 * jnp.finfo(x.dtype).eps

    def undo(carry, one: Maps):  # type: ignore[no-untyped-def]
        image, worst = carry

        def iterate(inner):  # type: ignore[no-untyped-def]
            k, y, _ = inner
            new = image - one.step_size * _velocity(net, one, y)
            return k + 1, new, jnp.max(jnp.abs(new - y))

        def unfinished(inner):  # type: ignore[no-untyped-def]
            k, y, change = inner
            return (change > tolerance * (1.0 + jnp.max(jnp.abs(y)))) & (k < _MAX_INVERSION_STEPS)

        first = jnp.zeros((), jnp.int32), image, jnp.asarray(jnp.inf, image.dtype)
        _, y, change = jax.lax.while_loop(unfinished, iterate, first)
        return (y, jnp.maximum(worst, change)), None

    return jax.lax.scan(undo, (x, jnp.zeros((), x.dtype)), maps, reverse=True)[0]


def _affine_part(particles: Float[Array, "n d"], scores: Float[Array, "n d"], params: Params) -> Maps:
    """Solve implicit score matching for affine velocities, in closed form.

    W = (I + E[g (x-μ)ᵀ]) C⁻¹ and b = E[g]: the best affine fit of the target's score g, less the score
    of the normal distribution with the particles' mean and covariance C. It does not lag.
    """
    n, dim = particles.shape
    mean = jnp.mean(particles, 0)
    centred = particles - mean
    cov = centred.T @ centred / n
    tril = jnp.linalg.cholesky(cov + 1e-6 * jnp.mean(jnp.diagonal(cov)) * jnp.eye(dim))
    whitener = jax.scipy.linalg.solve_triangular(tril, jnp.eye(dim), lower=True)
    slope = (jnp.eye(dim) + scores.T @ centred / n) @ (whitener.T @ whitener)
    return Maps(params, mean, whitener, jnp.mean(scores, 0), slope, jnp.zeros((), mean.dtype))


def sbtm(
    target: Target,
    net: Net,
    optimiser: optax.GradientTransformation,
    *,
    num_particles: int = 1024,
    num_maps: int = 50,
    steps_per_map: int = 1,
    num_updates: int = 10,
    batch_size: int = 256,
    duration: float = 2.0,
    base: Transition | None = None,
    max_stretch: float = 0.5,
    smc_particles: int = 0,
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
        optimiser: an optax optimiser.
        num_particles: training particles, n.
        num_maps: the number of maps, K.
        steps_per_map: training steps before each map.
        num_updates: updates of the network per step.
        batch_size: particles per update.
        duration: total time of the flow; the time step is ``duration / num_maps`` or less.
        base: the first law, wider than the target; None for N(0, I).
        max_stretch: bound on h Lip(v), estimated on particles, that shortens steps; below one.
        smc_particles: draws behind each proposal of the ensemble (see `independent_ensemble`); none
            below two.

    Returns:
        The algorithm. A map costs n gradients and a few Hessian-vector products; a draw costs
        K (d + 1) of them.

    Raises:
        ValueError: for sizes out of range.

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
        >>> algorithm.draw(jax.random.key(2), state, 5).log_weight.shape
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
    if min(num_maps, steps_per_map, num_updates, batch_size) < 1:
        raise ValueError(
            "`num_maps`, `steps_per_map`, `num_updates` and `batch_size` must be at least 1, got "
            f"{num_maps}, {steps_per_map}, {num_updates} and {batch_size}."
        )
    base = standard_normal(dim) if base is None else base

    def look(
        particles: Float[Array, "n d"], probes: Float[Array, "m d"], log_q: Float[Array, " m"]
    ) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
        """Evaluate the scores at the particles, and the divergence from the probes, in one batch."""
        values, scores = jax.vmap(lambda y: value_and_score(target, y))(jnp.concatenate([particles, probes]))
        excess = log_q - values[len(particles) :]
        return bounded(scores[: len(particles)]), jnp.mean(
            jnp.where(jnp.isfinite(excess), excess, _WORST_EXCESS)
        )

    def bounded(scores: Float[Array, "n d"]) -> Float[Array, "n d"]:
        scores = jnp.where(jnp.all(jnp.isfinite(scores), -1, keepdims=True), scores, 0.0)
        # a few particles on a cliff must not move all others
        norm = jnp.linalg.norm(scores, axis=-1, keepdims=True)
        return scores * jnp.minimum(1.0, _LONGEST_SCORE * jnp.median(norm) / jnp.maximum(norm, 1e-9))

    def init(key: Key) -> SBTMState:
        key_net, key_particles, key_probes = jax.random.split(key, 3)
        params = net.init(key_net, dim)
        particles = jax.vmap(base.sample)(jax.random.split(key_particles, num_particles))
        probes = jax.vmap(base.sample)(jax.random.split(key_probes, _NUM_PROBES))
        log_q = jax.vmap(base.log_prob)(probes)
        scores, found = look(particles, probes, log_q)
        current = _affine_part(particles, scores, params)
        maps = jax.tree.map(lambda leaf: jnp.zeros((num_maps, *leaf.shape), leaf.dtype), current)
        zero = jnp.zeros((), jnp.int32)
        divergence = jnp.full(num_maps + 1, jnp.inf, log_q.dtype).at[0].set(found)
        opt_state = optimiser.init(params)
        return SBTMState(zero, particles, scores, opt_state, current, maps, probes, log_q, divergence)

    def train(key: Key, state: SBTMState) -> tuple[SBTMState, Info]:
        def update(carry, key_k):  # type: ignore[no-untyped-def]
            params, opt_state = carry
            key_batch, key_probe = jax.random.split(key_k)
            batch = jax.random.randint(key_batch, (batch_size,), 0, num_particles)

            def loss_fn(params: Params) -> Float[Array, ""]:
                one = state.current._replace(params=params)
                return implicit_score_loss(
                    lambda y: _velocity(net, one, y),
                    state.particles[batch],
                    state.scores[batch],
                    key_probe,
                )

            loss, gradient = jax.value_and_grad(loss_fn)(params)
            params, opt_state, skipped = guarded_update(optimiser, gradient, opt_state, params)
            return (params, opt_state), (loss, skipped)

        (params, opt_state), (losses, skips) = jax.lax.scan(
            update, (state.current.params, state.opt_state), jax.random.split(key, num_updates)
        )
        zero, unfinished = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        info = Info(jnp.mean(losses), jnp.sum(skips, dtype=jnp.int32), zero, unfinished)
        return state._replace(current=state.current._replace(params=params), opt_state=opt_state), info

    def move(state: SBTMState) -> SBTMState:
        def velocity(x: Float[Array, " d"]) -> Float[Array, " d"]:
            return _velocity(net, state.current, x)

        probed = state.particles[:_PROBED]
        lipschitz = jnp.max(jax.vmap(lambda x: spectral_norm(jax.jacfwd(velocity)(x)))(probed))
        longest = duration / num_maps
        step_size = jnp.minimum(longest, max_stretch / jnp.maximum(lipschitz, max_stretch / longest))
        particles = state.particles + step_size * jax.vmap(velocity)(state.particles)
        probes, change, _ = jax.vmap(lambda x: euler_map(velocity, step_size, x))(state.probes)
        log_q = state.probe_log_q - change
        scores, found = look(particles, probes, log_q)
        made = state.current._replace(step_size=step_size.astype(state.current.mean.dtype))
        current = _affine_part(particles, scores, state.current.params)
        k = state.step // steps_per_map
        moved = state._replace(
            particles=particles,
            scores=scores,
            current=current,
            maps=jax.tree.map(lambda stack, leaf: stack.at[k].set(leaf), state.maps, made),
            probes=probes,
            probe_log_q=log_q,
            divergence=state.divergence.at[k + 1].set(found),
        )
        good = jnp.all(
            jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((particles, current))])
        )
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, state)

    def step(key: Key, state: SBTMState) -> tuple[SBTMState, Info]:
        def work(state: SBTMState) -> tuple[SBTMState, Info]:
            state, info = train(key, state)
            due = (state.step + 1) % steps_per_map == 0
            state = jax.lax.cond(due, move, lambda state: state, state)
            gradients = jnp.where(due, num_particles + _NUM_PROBES, 0)
            return state, info._replace(gradients=gradients.astype(jnp.int32))

        def rest(state: SBTMState) -> tuple[SBTMState, Info]:
            zero = jnp.zeros((), jnp.int32)
            return state, Info(jnp.asarray(jnp.nan, state.particles.dtype), zero, zero, jnp.zeros((), bool))

        state, info = jax.lax.cond(state.step < num_maps * steps_per_map, work, rest, state)
        made = (state.step + 1) // steps_per_map
        stale = made - jnp.argmin(state.divergence) > _PATIENCE
        finished = stale | (state.step + 1 >= num_maps * steps_per_map)
        return state._replace(step=state.step + 1), info._replace(finished=finished)

    def best(state: SBTMState) -> Maps:
        used = jnp.arange(num_maps) < jnp.argmin(state.divergence)
        return state.maps._replace(step_size=jnp.where(used, state.maps.step_size, 0.0))

    def draw(key: Key, state: SBTMState, n: int) -> Draws:
        maps = best(state)
        start = jax.vmap(base.sample)(jax.random.split(key, n))
        x, log_det, stretch = jax.vmap(lambda x: push(net, maps, x))(start)
        logdensity = jax.vmap(target.logdensity_fn)(x)
        log_proposal = jax.vmap(base.log_prob)(start) - log_det
        return Draws(x, logdensity - log_proposal, logdensity, stretch < 1.0)

    def weigh(key: Key, state: SBTMState, x: Float[Array, " d"]) -> Float[Array, ""]:
        del key
        maps = best(state)
        start, error = pull(net, maps, x)
        image, log_det, _ = push(net, maps, start)
        log_weight = target.logdensity_fn(x) - base.log_prob(start) + log_det
        there = (error < _INVERSION_ERROR) & (jnp.max(jnp.abs(image - x)) < _INVERSION_ERROR)
        return jnp.where(there, log_weight, jnp.nan)

    algorithm = Algorithm(init, step, draw, weigh)
    if smc_particles > 1:
        algorithm = algorithm._replace(ensemble=independent_ensemble(algorithm, smc_particles))
    return algorithm
