# SPDX-License-Identifier: Apache-2.0
"""Particle methods to compare with: Langevin, SVGD, and score-based transport as first published."""

import time

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from numpyro_sbtm.core.mixture import normal
from numpyro_sbtm.core.score import implicit_score_loss
from numpyro_sbtm.networks import score_mlp
from numpyro_sbtm.search.temper import tempered_particles

__all__ = ["langevin", "mass_errors", "plain_transport", "svgd", "tempered"]

_FIRST_UPDATES = 2000  # of the fit to the first law's score
_UPDATES, _BATCH = 10, 400
_SVGD_RATE = 0.1


def mass_errors(target, x, weight=None):
    """Errors of the modes' shares of weighted points, where modes are known; None: equal weights."""
    if target.modes is None:
        return {}
    membership, masses = target.modes
    off = np.average(np.asarray(jax.vmap(membership)(x)), axis=0, weights=weight) - masses
    return {
        "mass_error": float(np.abs(off).max()),
        "mass_tv": float(0.5 * np.abs(off).sum()),
        "modes_found": int(np.sum(masses + off > 0.2 * masses)),
    }


def langevin(key, target, start, step_size, num_steps):
    """Move particles by unadjusted Langevin steps."""
    score = jax.vmap(jax.grad(target.logdensity_fn))

    def step(x, key):
        noise = jax.random.normal(key, x.shape)
        return x + step_size * score(x) + jnp.sqrt(2 * step_size) * noise, None

    return jax.lax.scan(step, start, jax.random.split(key, num_steps))[0]


def svgd(key, target, start, step_size, num_steps):
    """Move particles by Stein variational gradient descent, with AdaGrad and the median heuristic."""
    del key, step_size
    algorithm = blackjax.svgd(jax.grad(target.logdensity_fn), optax.adagrad(_SVGD_RATE))
    state = algorithm.init(start)
    return jax.lax.fori_loop(0, num_steps, lambda _, state: algorithm.step(state), state).particles


def tempered(seed, target, std, num_particles):
    """Carry particles from N(0, std² I) by adaptive tempered SMC with HMC moves, by blackjax.

    Returns the particles and a row of plain values; seconds are those after compilation.
    """
    base, key = normal(target.dim, std), jax.random.key(seed)
    run = jax.jit(lambda key: tempered_particles(key, target, base, num_particles)).lower(key).compile()
    start = time.perf_counter()
    x, log_z, spent, _ = jax.block_until_ready(run(key))
    return x, {
        "seconds": time.perf_counter() - start,
        "gradients": int(spent.gradients),
        "log_evidence_error": float(log_z) - target.log_z,
    }


def plain_transport(key, target, start, step_size, num_steps, std):
    """Move particles by the published method: a network for the whole score, ten updates before every step.

    The network is fitted to the score of the first law, N(0, std² I), and then by implicit score matching on
    shuffled batches of the particles that move.
    """
    n, dim = start.shape
    net = score_mlp(128, 2)
    optimiser = optax.adamw(5e-4)
    score = jax.vmap(jax.grad(target.logdensity_fn))
    apply = lambda params, x: net.apply(params, x)  # noqa: E731
    key_net, key_first, key_steps = jax.random.split(key, 3)

    def updates(params, opt_state, key, num, loss):
        """Update on batches of shuffled particles: a new order once all of them were used."""
        size = min(n, _BATCH)
        key_order, key_probes = jax.random.split(key)
        rounds = -(-num * size // n)
        orders = jax.vmap(lambda k: jax.random.permutation(k, n))(jax.random.split(key_order, rounds))
        batches = orders.reshape(-1)[: num * size].reshape(num, size)

        def update(carry, inputs):
            params, opt_state = carry
            change, opt_state = optimiser.update(jax.grad(loss)(params, *inputs), opt_state, params)
            return (optax.apply_updates(params, change), opt_state), None

        inputs = batches, jax.random.split(key_probes, num)
        return jax.lax.scan(update, (params, opt_state), inputs)[0]

    def explicit(params, batch, key):
        del key
        x = start[batch]
        return jnp.mean(jnp.sum((jax.vmap(lambda y: apply(params, y))(x) + x / std**2) ** 2, -1))

    def implicit(x):
        def loss(params, batch, key):
            # for v = -s without a target the loss of a velocity is |s|² + 2 ∇·s
            zero = jnp.zeros_like(x[batch])
            return implicit_score_loss(lambda y: -apply(params, y), x[batch], zero, key)

        return loss

    def step(carry, key):
        x, params, opt_state = carry
        params, opt_state = updates(params, opt_state, key, _UPDATES, implicit(x))
        return (x + step_size * (score(x) - jax.vmap(lambda y: apply(params, y))(x)), params, opt_state), None

    params = net.init(key_net, dim)
    params, opt_state = updates(params, optimiser.init(params), key_first, _FIRST_UPDATES, explicit)
    return jax.lax.scan(step, (start, params, opt_state), jax.random.split(key_steps, num_steps))[0][0]
