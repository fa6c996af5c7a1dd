# SPDX-License-Identifier: Apache-2.0
"""Learned diffusions: train a process by a divergence, draw paths with exact weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from numpyro_sbtm.core.algorithm import Algorithm, Draws, Info, guarded_update
from numpyro_sbtm.core.divergence import Divergence, two_pass_gradient
from numpyro_sbtm.core.path import reevaluate, simulate
from numpyro_sbtm.core.process import Net, Process
from numpyro_sbtm.core.target import Key, Params, Target

__all__ = ["DiffusionState", "diffusion"]


class DiffusionState(NamedTuple):
    """State of a learned diffusion.

    Attributes:
        step: training steps done, shape ``[]``.
        params: parameters being trained.
        average: their moving average, which draws use.
        opt_state: state of the optimiser.
    """

    step: Int[Array, ""]
    params: Params
    average: Params
    opt_state: optax.OptState


def diffusion(
    target: Target,
    process: Process,
    net: Net,
    divergence: Divergence,
    optimiser: optax.GradientTransformation,
    *,
    num_paths: int = 256,
    num_times: int | None = None,
    num_updates: int = 1,
    average_decay: float = 0.99,
) -> Algorithm:
    """Make the algorithm that trains a process by a divergence.

    One step simulates a block of paths and makes ``num_updates`` updates on it, the later ones off
    policy: the points stay, the densities on them are computed anew without calling the target.

    Args:
        target: the density.
        process: the two chains, with the network in them.
        net: the network, for its ``init``.
        divergence: the loss. A detached one uses the two-pass gradient.
        optimiser: an optax optimiser.
        num_paths: paths per step.
        num_times: how many of the T times enter each gradient, drawn anew for each update; None for all.
        num_updates: updates per step; more than one needs a detached divergence.
        average_decay: decay of the moving average of the parameters, per update; less in the first steps.

    Returns:
        The algorithm. A step costs ``num_paths (T+1)`` target gradients.

    Raises:
        ValueError: for ``num_updates > 1`` or ``num_times`` with a divergence that is not detached, and
            for sizes out of range.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from numpyro_sbtm.core import Target, diffusion, dis, log_variance
        >>> from numpyro_sbtm.networks import denoiser
        >>> target, net = Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2), 2), denoiser(8)
        >>> algorithm = diffusion(
        ...     target, dis(net, 2, num_steps=8), net, log_variance(), optax.adam(1e-3), num_paths=16)
        >>> state, info = algorithm.step(jax.random.key(1), algorithm.init(jax.random.key(0)))
        >>> algorithm.draw(jax.random.key(2), state, 5).x.shape
        (5, 2)
    """
    num_steps = process.num_steps
    if num_paths < 2:
        raise ValueError(f"`num_paths` must be at least 2 for a variance, got {num_paths}.")
    if num_times is not None and not 1 <= num_times <= num_steps:
        raise ValueError(f"`num_times` must be between 1 and {num_steps}, got {num_times}.")
    if not divergence.detach and (num_updates != 1 or num_times is not None):
        raise ValueError(
            "`divergence` differentiates through the simulation, so that every update needs its own: "
            f"`num_updates` must be 1 and `num_times` None, got {num_updates} and {num_times}."
        )

    def batch(params: Params, key: Key, n: int, detach: bool = True):  # type: ignore[no-untyped-def]
        one = lambda k: simulate(process, params, target, k, detach=detach)  # noqa: E731
        return jax.vmap(one)(jax.random.split(key, n))

    def init(key: Key) -> DiffusionState:
        params = net.init(key, target.dim)
        return DiffusionState(jnp.zeros((), jnp.int32), params, params, optimiser.init(params))

    def update(carry, gradient, step):  # type: ignore[no-untyped-def]
        params, average, opt_state = carry
        params, opt_state, skipped = guarded_update(optimiser, gradient, opt_state, params)
        # the window grows with the steps done: a short training must not average with its start
        decay = jnp.minimum(average_decay, (1.0 + step) / (10.0 + step))
        average = optax.incremental_update(params, average, 1.0 - decay)
        return (params, average, opt_state), skipped

    def step(key: Key, state: DiffusionState) -> tuple[DiffusionState, Info]:
        key_paths, key_times = jax.random.split(key)
        carry = state.params, state.average, state.opt_state
        if divergence.detach:
            paths = batch(state.params, key_paths, num_paths)

            def one(carry, key_k):  # type: ignore[no-untyped-def]
                times = None
                if num_times is not None:
                    times = jax.random.choice(key_k, num_steps, (num_times,), replace=False)
                here = paths
                if num_updates > 1:
                    here = jax.vmap(lambda path: reevaluate(process, carry[0], path))(paths)
                loss, gradient = two_pass_gradient(divergence, process, carry[0], here, times)
                carry, skipped = update(carry, gradient, state.step)
                return carry, (loss, skipped)

            carry, (losses, skips) = jax.lax.scan(one, carry, jax.random.split(key_times, num_updates))
            loss, skipped = losses[0], jnp.sum(skips, dtype=jnp.int32)
        else:
            loss, gradient = jax.value_and_grad(
                lambda params: divergence.value(batch(params, key_paths, num_paths, detach=False))
            )(state.params)
            carry, skip = update(carry, gradient, state.step)
            skipped = skip.astype(jnp.int32)
        gradients = jnp.asarray(num_paths * (num_steps + 1), jnp.int32)
        return DiffusionState(state.step + 1, *carry), Info(loss, skipped, gradients)

    def draw(key: Key, state: DiffusionState, n: int) -> Draws:
        paths = batch(state.average, key, n)
        return Draws(paths.xs[:, -1], paths.log_weight, paths.log_target, jnp.ones(n, bool))

    return Algorithm(init, step, draw)
