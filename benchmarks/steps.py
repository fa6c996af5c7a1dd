# SPDX-License-Identifier: Apache-2.0
"""The cost of one training step of a learned diffusion: two passes beside plain automatic differentiation.

Seconds are measured in turns within one process; temporary memory is the compiler's, and does not drift.
"""

import time

import jax
import numpy as np
import optax

from numpyro_sbtm.core import dis, log_variance, simulate, two_pass_gradient
from numpyro_sbtm.networks import denoiser
from numpyro_sbtm.targets import nine_modes

__all__ = ["COLUMNS", "PROBLEMS", "SAMPLERS", "batch_of", "cells", "measure"]

NUM_ROUNDS = 20

PROBLEMS = {f"{paths} x {times}": (paths, times) for paths, times in ((256, 64), (256, 256), (2048, 200))}
"""Paths and times of a step."""


def _step(gradient_of):
    """Make a training step of a gradient of (params, paths, key)."""
    optimiser = optax.adam(1e-3)

    def step(params, opt_state, key):
        gradient = gradient_of(params, key)
        updates, opt_state = optimiser.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return optimiser, step


def batch_of(process, target, num_paths, detach=True):
    """Make the simulation of a batch of paths from (params, key)."""
    one = lambda params, key: simulate(process, params, target, key, detach=detach)  # noqa: E731
    return lambda params, key: jax.vmap(one, (None, 0))(params, jax.random.split(key, num_paths))


def autodiff(process, target, num_paths):
    """Differentiate the divergence of simulated paths."""
    batch, loss = batch_of(process, target, num_paths), log_variance()
    return lambda params, key: jax.grad(lambda p: loss.value(batch(p, key)))(params)


def two_pass(process, target, num_paths, share=1):
    """Simulate without a graph, then pull the divergence's cotangents back through a part of the times."""
    batch, loss, num_times = batch_of(process, target, num_paths), log_variance(), process.num_steps // share

    def gradient(params, key):
        key_paths, key_times = jax.random.split(key)
        times = None
        if share > 1:
            times = jax.random.choice(key_times, process.num_steps, (num_times,), replace=False)
        return two_pass_gradient(loss, process, params, batch(params, key_paths), times)[1]

    return gradient


SAMPLERS = {
    "autodiff": autodiff,
    "two passes": two_pass,
    "two passes, a quarter of the times": lambda *problem: two_pass(*problem, share=4),
}


def _compiled(name, sampler):
    num_paths, num_times = PROBLEMS[name]
    target, net = nine_modes(), denoiser()
    process = dis(net, target.dim, num_times)
    optimiser, step = _step(SAMPLERS[sampler](process, target, num_paths))
    params = net.init(jax.random.key(0), target.dim)
    arguments = params, optimiser.init(params), jax.random.key(1)
    return jax.jit(step).lower(*arguments).compile(), arguments


def measure(name, sampler, seed):
    """Time a step beside the step by automatic differentiation, in turns; returns a row of plain values."""
    del seed
    found = {each: _compiled(name, each) for each in {sampler, "autodiff"}}
    seconds = {each: [] for each in found}
    for _ in range(NUM_ROUNDS):
        for each, (compiled, arguments) in found.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds[each].append(time.perf_counter() - start)
    compiled = found[sampler][0]
    median = {each: float(np.median(values)) for each, values in seconds.items()}
    return {
        "problem": name,
        "sampler": sampler,
        "step_s": median[sampler],
        "ratio": median[sampler] / median["autodiff"],
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
    }


COLUMNS = ("paths x times", "step", "ms", "of autodiff", "temporary memory, MB")


def cells(row):
    """Format a row for `COLUMNS`."""
    return [
        row["problem"],
        row["sampler"],
        f"{1e3 * row['step_s']:.1f}",
        f"{row['ratio']:.2f}",
        f"{row['temporary_bytes'] / 1e6:.1f}",
    ]
