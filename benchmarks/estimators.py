# SPDX-License-Identifier: Apache-2.0
"""How noisy divergences and their gradients are, at the same parameters (Richter & Berner 2024, Figure 5).

On policy the gradient of the log-variance is twice that of the reverse KL in expectation, so that half of it
is compared. Parameters come from training by log-variance, several updates a block, on nine modes.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.steps import batch_of
from numpyro_sbtm.core import (
    DiffusionOptions,
    diffusion,
    kl,
    kl_log_derivative,
    log_variance,
    two_pass_gradient,
)
from numpyro_sbtm.methods.diffusion import PROCESSES
from numpyro_sbtm.networks import denoiser
from numpyro_sbtm.targets import nine_modes

__all__ = ["COLUMNS", "PROBLEMS", "SAMPLERS", "cells", "measure"]

NUM_STEPS, NUM_PATHS, NUM_REPEATS = 32, 256, 40

PROBLEMS = {
    f"{process} after {steps} steps": (process, steps)
    for process in ("pis-control", "dis-euler", "dds-control")
    for steps in (0, 100, 1000)
}
"""Processes in the published parametrisation, and steps of training."""

SAMPLERS = {"kl": kl, "kl-log-derivative": kl_log_derivative, "log-variance": log_variance}


def _parts(name):
    target, net = nine_modes(), denoiser()
    return target, net, PROCESSES[name].process(net, target.dim, NUM_STEPS, 1.0)


@cache
def _trained(name, num_steps, seed):
    """Train one process; returns its parameters."""
    target, net, process = _parts(name)
    algorithm = diffusion(
        target,
        process,
        net,
        log_variance(),
        optax.adam(2e-3),
        DiffusionOptions(num_paths=NUM_PATHS, num_updates=4),
    )
    keys = jax.random.split(jax.random.key(seed), num_steps + 1)
    train = jax.jit(lambda state, keys: jax.lax.scan(lambda s, k: (algorithm.step(k, s)[0], ()), state, keys))
    return train(algorithm.init(keys[0]), keys[1:])[0].params


def measure(name, sampler, seed):
    """Repeat one estimate on independent batches; returns a row of plain values."""
    process_name, num_steps = PROBLEMS[name]
    target, _, process = _parts(process_name)
    params, divergence = _trained(process_name, num_steps, seed), SAMPLERS[sampler]()
    batch = batch_of(process, target, NUM_PATHS, divergence.detach)

    def estimate(key):
        if divergence.detach:
            loss, gradient = two_pass_gradient(divergence, process, params, batch(params, key))
        else:
            loss, gradient = jax.value_and_grad(lambda p: divergence.value(batch(p, key)))(params)
        scale = 0.5 if sampler == "log-variance" else 1.0
        return loss, scale * ravel_pytree(gradient)[0]

    keys = jax.random.split(jax.random.key(seed + 1), NUM_REPEATS)
    losses, gradients = jax.jit(partial(jax.lax.map, estimate))(keys)
    mean = jnp.mean(gradients, 0)
    variance = jnp.sum((gradients - mean) ** 2) / (NUM_REPEATS - 1)
    return {
        "problem": name,
        "sampler": sampler,
        "loss": float(jnp.mean(losses)),
        "loss_std": float(jnp.std(losses, ddof=1)),
        "gradient_std": float(jnp.sqrt(variance)),
        # of the mean gradient, less what noise alone would give it
        "gradient_norm": float(jnp.sqrt(jnp.maximum(jnp.sum(mean**2) - variance / NUM_REPEATS, 0.0))),
    }


COLUMNS = ("process", "divergence", "loss", "its deviation", "gradient", "its deviation")


def cells(row):
    """Format a row for `COLUMNS`."""
    numbers = ("loss", "loss_std", "gradient_norm", "gradient_std")
    return [row["problem"], row["sampler"], *(f"{row[name]:.3g}" for name in numbers)]
