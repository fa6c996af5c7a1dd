# SPDX-License-Identifier: Apache-2.0
"""Sequential Monte Carlo along the paths of a process: many paths make one proposal."""

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.algorithm import Draws, Proposal
from numpyro_sbtm.core.path import evaluate, evaluations_of_path, log_kernels, noise_path, observe, simulate
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.target import Key, Params, Target, after
from numpyro_sbtm.core.weights import clean, ess_fraction, resample

__all__ = ["independent_ensemble", "path_draws", "path_ensemble"]

_THRESHOLD = 0.5  # effective fraction below which particles are resampled
_LARGEST_TWIST = 20.0  # bound on what the target adds to the log density of a point on the way
_GROUPS = 64  # ensembles that are made side by side


def _choose(key: Key, log_weight: Float[Array, " m"], leaves):  # type: ignore[no-untyped-def]
    """Take one particle with probability proportional to its weight."""
    chosen = resample(key, log_weight, 1)[0]
    return jax.tree.map(lambda leaf: leaf[chosen], leaves)


def _in_groups(draw_one, key: Key, n: int) -> Draws:  # type: ignore[no-untyped-def]
    """Make n ensembles, a few at a time: memory for few, and one draw of each."""
    size = min(n, _GROUPS)
    whole = -(-n // size) * size  # a remainder would be a second program
    draws = jax.lax.map(draw_one, jax.random.split(key, whole), batch_size=size)
    return jax.tree.map(lambda leaf: leaf[:n], draws)


def independent_ensemble(proposal: Proposal, num_particles: int) -> Proposal:
    """Make one proposal of several independent draws: one of them by weight, with their mean weight.

    Args:
        proposal: single draws.
        num_particles: how many of them are behind each draw, m.

    Returns:
        The proposal; its weights have the mean Z and the variance of the single ones' over m.

    Reference:
        Andrieu, Doucet & Holenstein (2010), Particle Markov chain Monte Carlo methods, JRSS B 72,
        algorithm PIMH, without resampling.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from numpyro_sbtm.core import Target, TransportOptions, sbtm
        >>> from numpyro_sbtm.core.smc import independent_ensemble
        >>> from numpyro_sbtm.networks import score_mlp
        >>> target = Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2), 2)
        >>> options = TransportOptions(num_particles=64, num_maps=4)
        >>> one = sbtm(target, score_mlp(8), optax.adam(1e-3), options)
        >>> maps = one.parameters(one.init(jax.random.key(0)))
        >>> many = independent_ensemble(one.proposal, 16).draw(jax.random.key(1), maps, 100).log_weight
        >>> bool(many.std() < one.proposal.draw(jax.random.key(1), maps, 100).log_weight.std())
        True
    """

    def draw(key: Key, params: Params, n: int) -> Draws:
        def one(key: Key) -> Draws:
            key_draw, key_choose = jax.random.split(key)
            draws = proposal.draw(key_draw, params, num_particles)
            log_weight = clean(draws.log_weight)
            chosen = _choose(key_choose, log_weight, draws)
            return chosen._replace(log_weight=logsumexp(log_weight) - jnp.log(num_particles))

        return _in_groups(one, key, n)

    def weigh(key: Key, params: Params, x: Float[Array, " d"]) -> Float[Array, ""]:
        key_own, key_draw = jax.random.split(key)
        own = proposal.weigh(key_own, params, x)
        others = clean(proposal.draw(after(key_draw, own), params, num_particles - 1).log_weight)
        log_weight = logsumexp(jnp.append(own, others)) - jnp.log(num_particles)
        return jnp.where(own > -jnp.inf, log_weight, jnp.nan)

    return Proposal(draw, weigh, proposal.cost.times(num_particles))


def path_ensemble(process: Process, target: Target, num_particles: int, power: float = 2.0) -> Proposal:
    """Make one proposal of several paths that are resampled on the way (particle filter).

    Particles follow the forward chain. After step k they are weighted for

        π_k(x) = r_k(x) (ρ(x) / r_T(x))^(A_k^power),

    where r_k is the law of x_k that the process guesses, r_T its guess of the target and A_k the share of
    the draw in x_k: early points are judged by the guess, late ones by the target. Whenever the effective
    fraction falls below one half they are resampled. The product of the mean weights between has the mean
    Z whatever π_k is, and one of the particles, chosen by weight, is the proposal.

    Args:
        process: the two chains.
        target: the density ρ of x_T.
        num_particles: the paths of each proposal, m.
        power: how late the target takes over.

    Returns:
        The proposal. ``weigh`` runs the filter conditionally on a path that the backward chain makes from the
        given point.

    Reference:
        Andrieu, Doucet & Holenstein (2010), Particle Markov chain Monte Carlo methods, JRSS B 72 (PIMH and
        the conditional filter); Chen et al. (2024), arXiv:2412.07081 (resampling along learned diffusions).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Net, Target, dis
        >>> from numpyro_sbtm.core.smc import path_ensemble
        >>> net = Net(lambda key, d: (), lambda p, t, x, s: (0 * x, 0 * x, jnp.zeros(()), jnp.zeros(1)))
        >>> target = Target(lambda x: -2.0 * jnp.sum((x - 1) ** 2), 1)
        >>> draws = path_ensemble(dis(net, 1, num_steps=8), target, 64).draw(jax.random.key(0), (), 200)
        >>> round(float(jnp.log(jnp.mean(jnp.exp(draws.log_weight)))), 1)  # log √(π/2) = 0.226
        0.2
    """
    num_steps = process.num_steps

    def law(k: Int[Array, ""], x: Float[Array, " d"], value: Float[Array, ""]) -> Float[Array, ""]:
        """Log π_k, given the target's log density at x."""
        last = jnp.asarray(num_steps, jnp.int32)
        twist = jnp.clip(value - process.marginal(last, x), -_LARGEST_TWIST, _LARGEST_TWIST)
        twist = jnp.where(jnp.isnan(twist), -_LARGEST_TWIST, twist)
        share = jnp.asarray(process.signal, x.dtype)[k]
        return jnp.where(k == num_steps, value, process.marginal(k, x) + share**power * twist)

    def run(key: Key, params: Params, kept: Float[Array, "T1 d"] | None):  # type: ignore[no-untyped-def]
        """Run the filter; with ``kept`` the first particle follows those points and is never lost."""
        key_init, key_steps = jax.random.split(key)

        def retain(x: Float[Array, "m d"], k: Int[Array, ""]) -> Float[Array, "m d"]:
            return x if kept is None else x.at[0].set(kept[k])

        def step(carry, inputs):  # type: ignore[no-untyped-def]
            x, _, score, before, log_weight, log_z = carry
            k, key_k = inputs
            key_resample, key_move = jax.random.split(key_k)
            poor = ess_fraction(log_weight) < _THRESHOLD
            ancestors = resample(key_resample, log_weight, num_particles)
            if kept is not None:
                ancestors = ancestors.at[0].set(0)
            ancestors = jnp.where(poor, ancestors, jnp.arange(num_particles))
            log_z = log_z + jnp.where(poor, logsumexp(log_weight) - jnp.log(num_particles), 0.0)
            log_weight = jnp.where(poor, 0.0, log_weight)
            x, score, before = (leaf[ancestors] for leaf in (x, score, before))
            keys = jax.random.split(key_move, num_particles)
            move = jax.vmap(lambda key, x, score: process.forward(params, k, x, score).sample(key))
            new = retain(move(keys, x, score), k + 1)
            new_value, new_score = jax.vmap(lambda y: observe(process, target, k + 1, y))(new)
            log_forward, log_backward = jax.vmap(lambda *ends: log_kernels(process, params, k, *ends))(
                x, new, score, new_score
            )
            after = jax.vmap(lambda *point: law(k + 1, *point))(new, new_value)
            log_weight = clean(log_weight + after + log_backward - before - log_forward)
            return (new, new_value, new_score, after, log_weight, log_z), None

        first = jnp.zeros((), jnp.int32)
        x = retain(jax.vmap(process.init(params).sample)(jax.random.split(key_init, num_particles)), first)
        value, score = jax.vmap(lambda y: observe(process, target, first, y))(x)
        before = jax.vmap(lambda *point: law(first, *point))(x, value)
        log_weight = clean(before - jax.vmap(process.init(params).log_prob)(x))
        carry = x, value, score, before, log_weight, jnp.zeros((), x.dtype)
        steps = jnp.arange(num_steps), jax.random.split(key_steps, num_steps)
        (x, value, _, _, log_weight, log_z), _ = jax.lax.scan(step, carry, steps)
        return x, value, log_weight, log_z + logsumexp(log_weight) - jnp.log(num_particles)

    def draw(key: Key, params: Params, n: int) -> Draws:
        def one(key: Key) -> Draws:
            key_run, key_choose = jax.random.split(key)
            x, value, log_weight, log_z = run(key_run, params, None)
            x, value = _choose(key_choose, log_weight, (x, value))
            return Draws(x, log_z, value, jnp.ones((), bool))

        return _in_groups(one, key, n)

    def weigh(key: Key, params: Params, x: Float[Array, " d"]) -> Float[Array, ""]:
        key_path, key_run = jax.random.split(key)
        kept = noise_path(process, params, target, key_path, x)
        *_, log_weight, log_z = run(key_run, params, kept)
        return jnp.where(jnp.isfinite(log_weight[0]), log_z, jnp.nan)

    return Proposal(draw, weigh, evaluations_of_path(process).times(num_particles))


def path_draws(process: Process, target: Target, num_particles: int) -> tuple[Proposal, Proposal | None]:
    """Make the two ways to propose ends of paths with their exact weights: one path, or several.

    Args:
        process: the two chains.
        target: the density of x_T.
        num_particles: the paths of each draw of the second way (see `path_ensemble`).

    Returns:
        The proposals; the second is None for fewer than two paths.
    """

    def draw(key: Key, params: Params, n: int) -> Draws:
        paths = jax.vmap(lambda k: simulate(process, params, target, k))(jax.random.split(key, n))
        return Draws(paths.xs[:, -1], paths.log_weight, paths.log_target, jnp.ones(n, bool))

    def weigh(key: Key, params: Params, x: Float[Array, " d"]) -> Float[Array, ""]:
        return evaluate(process, params, target, noise_path(process, params, target, key, x)).log_weight

    several = path_ensemble(process, target, num_particles) if num_particles > 1 else None
    return Proposal(draw, weigh, evaluations_of_path(process)), several
