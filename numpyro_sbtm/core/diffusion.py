# SPDX-License-Identifier: Apache-2.0
"""Learned diffusions: train a process by a divergence, draw paths with exact weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.algorithm import Algorithm, Info, guarded_update
from numpyro_sbtm.core.divergence import Divergence, log_variance, two_pass_gradient
from numpyro_sbtm.core.path import Path, noise_path, reevaluate, simulate
from numpyro_sbtm.core.process import Net, Process
from numpyro_sbtm.core.smc import path_draws
from numpyro_sbtm.core.target import Key, Params, Target
from numpyro_sbtm.core.weights import clean, reachable, resample

__all__ = ["DiffusionState", "check_options", "diffusion"]


_MIN_STEPS = 50
_WINDOW = 50  # of the moving average of the variance
_LESS = 0.95  # a variance below this share of the best is falling
_WORSE = 2.0  # a variance above this multiple of the first undoes the training


class Progress(NamedTuple):
    """How the variance of the log weights falls, each taken before the update on its own paths.

    Attributes:
        recent: its moving average, shape ``[]``.
        first: the variance at the start, shape ``[]``.
        best: the lowest such average at which it was still falling, shape ``[]``.
        stale: steps since then, shape ``[]``.
    """

    recent: Float[Array, ""]
    first: Float[Array, ""]
    best: Float[Array, ""]
    stale: Int[Array, ""]

    def after(self, step: Int[Array, ""], now: Float[Array, ""]) -> "Progress":
        """Take in the variance of a step, counted from 0."""
        window = jnp.minimum(_WINDOW, step + 1)
        recent = jnp.where(jnp.isfinite(self.recent), self.recent + (now - self.recent) / window, now)
        falling = recent < _LESS * self.best
        return Progress(
            recent=recent.astype(self.recent.dtype),
            first=jnp.where(step == 0, now, self.first).astype(self.first.dtype),
            best=jnp.where(falling & (step > _WINDOW), recent, self.best).astype(self.best.dtype),
            stale=jnp.where(falling, 0, self.stale + 1),
        )

    def undone(self) -> Bool[Array, ""]:
        """Say whether training has made the log weights vary twice as much."""
        return self.recent > _WORSE * self.first


class DiffusionState(NamedTuple):
    """State of a learned diffusion.

    Attributes:
        step: training steps done, shape ``[]``.
        params: parameters being trained.
        average: their moving average, which draws use.
        start: the parameters at the start, which draws use if the log weights now vary twice as much.
        opt_state: state of the optimiser.
        extra: what the divergence learns itself, such as log Z or a network's parameters, or None.
        extra_opt_state: state of its optimiser.
        buffer: ends of earlier paths, resampled by weight, shape ``[m, d]``; None without a buffer.
        progress: the variance of the log weights so far.
    """

    step: Int[Array, ""]
    params: Params
    average: Params
    start: Params
    opt_state: optax.OptState
    extra: Any
    extra_opt_state: optax.OptState
    buffer: Float[Array, "m d"] | None
    progress: Progress


def check_options(
    process: Process,
    divergence: Divergence,
    *,
    num_paths: int,
    num_times: int | None,
    num_updates: int,
    coarse_steps: int | None,
    explores: bool,
    trust_region: float | None,
    buffer_size: int,
) -> int:
    """Return how many steps training simulates; raise for what `diffusion` cannot do, see there.

    Nothing is computed, and of the process only its grid matters: neither its network nor its dimension.

    Raises:
        ValueError: as `diffusion` does.
    """
    num_steps = process.num_steps
    num_simulated = num_steps if coarse_steps is None else coarse_steps
    if num_paths < 2:
        raise ValueError(f"`num_paths` must be at least 2 for a variance, got {num_paths}.")
    if not 1 <= num_simulated <= num_steps:
        raise ValueError(f"`coarse_steps` must be between 1 and {num_steps}, got {coarse_steps}.")
    if num_times is not None and not 1 <= num_times <= num_simulated:
        raise ValueError(f"`num_times` must be between 1 and {num_simulated}, got {num_times}.")
    if process.learns_reference and not divergence.any_reference:
        raise ValueError(
            "`divergence` is not sound for a `process` that learns the law of x_0 or the size of its noise: "
            "both path laws then move, the gradient of a variance of log weights is no longer that of a KL "
            "divergence, and what it lowers no longer bounds how far the draws are off (Sanokowski et al. "
            "2025). Take 'kl' or 'kl-log-derivative', or a process with a fixed reference."
        )
    if not (process.continuous or divergence.detach):
        raise ValueError(
            "`divergence` differentiates through the simulation, but `process` looks ahead with a mixture of "
            "several components: its chains jump where another one becomes the likeliest, and the gradient "
            "along the paths does not see that. Pass `look_ahead=False`, or take 'kl-log-derivative' or "
            "'log-variance'."
        )
    if coarse_steps is not None and (process.coarse is None or not divergence.any_grid):
        who = "`process`" if process.coarse is None else "`divergence`"
        raise ValueError(f"`coarse_steps` is {coarse_steps}, but {who} is tied to its grid. Pass None.")
    off_policy = divergence.detach and not divergence.on_policy
    if explores and not off_policy:
        raise ValueError(
            "`exploration` draws paths from another chain, but `divergence` needs those of the current one. "
            "Log-variance and trajectory balance are valid for any paths."
        )
    if buffer_size and not off_policy:
        raise ValueError(
            f"`buffer_size` is {buffer_size}, but the buffer holds starts of backward paths, and "
            "`divergence` needs paths of the current forward chain. Pass 0, or take log-variance or "
            "trajectory balance."
        )
    if trust_region is not None and not (trust_region > 0 and num_updates > 1):
        raise ValueError(
            "`trust_region` must be positive and asks for several updates on one block, got "
            f"{trust_region} with `num_updates` = {num_updates}."
        )
    if divergence.on_policy and num_updates != 1:
        raise ValueError(
            "`divergence` needs paths of the current forward chain: `num_updates` must be 1, got "
            f"{num_updates}. Log-variance and trajectory balance take several updates on one block."
        )
    if not divergence.detach and (num_updates != 1 or num_times is not None):
        raise ValueError(
            "`divergence` differentiates through the simulation, so that every update needs its own: "
            f"`num_updates` must be 1 and `num_times` None, got {num_updates} and {num_times}."
        )

    group = divergence.paths_per_start
    if num_paths % group:
        raise ValueError(
            f"`num_paths` must be a multiple of the divergence's {group} paths per start, got {num_paths}."
        )
    return num_simulated


def _subset(key: Key, n: int, m: int) -> Int[Array, " m"]:
    """Draw m of the numbers below n, without replacement."""
    return jax.lax.top_k(jax.random.uniform(key, (n,)), m)[1]


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
    goal: float = 0.03,
    patience: int | None = 100,
    good_enough: float = 0.8,
    endpoints: Float[Array, "m d"] | None = None,
    backward_share: float = 0.25,
    buffer_size: int = 0,
    coarse_steps: int | None = None,
    exploration: optax.Schedule | None = None,
    trust_region: float | None = None,
    smc_particles: int = 0,
) -> Algorithm:
    """Make the algorithm that trains a process by a divergence.

    One step simulates a block of paths and makes ``num_updates`` updates on it, the later ones off
    policy: the points stay, the densities on them are computed anew without calling the target. Draws use
    the parameters of the start should training have made the log weights vary twice as much.

    Args:
        target: the density.
        process: the two chains, with the network in them.
        net: the network, for its ``init``.
        divergence: the loss. A detached one uses the two-pass gradient.
        optimiser: an optax optimiser.
        num_paths: paths per step.
        num_times: how many of the T times enter each gradient, drawn anew for each update; None for all.
        num_updates: updates per step; more than one needs a detached divergence that is valid off policy.
        average_decay: decay of the moving average of the parameters, per update; less in the first steps.
        goal: training is finished once the variance of the log weights, on average over 50 steps, is below
            this, whatever the divergence (see `log_variance_at`).
        patience: or once it has not fallen by a twentieth in so many steps (None: never),
        good_enough: provided that it is below this.
        endpoints: points that resemble draws of the target, shape ``[m, d]``. A divergence that is valid off
            policy is then also taken over paths that the backward chain makes from them, so that training
            sees what the forward chain does not reach yet.
        backward_share: share of such paths in a batch.
        buffer_size: how many ends of earlier paths are kept, resampled by weight in every step, to take the
            place of ``endpoints``, with which the buffer starts; 0: ``endpoints`` stay.
        coarse_steps: training simulates on so many of the T steps, drawn anew for every step, and everything
            else on all; None: on all. It needs a process that has `Process.coarse`.
        exploration: ``step -> e``: training simulates with the noise of the forward chain 1 + e times as
            large, where the divergence is valid off policy. None: 0.
        trust_region: with several updates, they aim at the law between that of the block's own chain and
            that of the target whose KL divergence from the former is this, in nats; None: at the target.
        smc_particles: paths behind each draw of `Algorithm.several` (see `path_ensemble`); none below two.

    Returns:
        The algorithm. A step costs ``num_paths (T+1)`` target gradients, fewer on a coarse grid, and twice as
        many where the process looks ahead.

    Raises:
        ValueError: for pairs of process and divergence that are unsound, for options that a divergence or a
            process does not allow, and for sizes out of range.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from numpyro_sbtm.core import Target, diffusion, dis, log_variance
        >>> from numpyro_sbtm.networks import denoiser
        >>> target, net = Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2), 2), denoiser(8)
        >>> algorithm = diffusion(
        ...     target, dis(net, 2, num_steps=8), net, log_variance(), optax.adam(1e-3), num_paths=16)
        >>> state, info = algorithm.step(jax.random.key(1), algorithm.init(jax.random.key(0)))
        >>> algorithm.proposal.draw(jax.random.key(2), algorithm.parameters(state), 5).x.shape
        (5, 2)
    """
    num_steps = process.num_steps
    num_simulated = check_options(
        process,
        divergence,
        num_paths=num_paths,
        num_times=num_times,
        num_updates=num_updates,
        coarse_steps=coarse_steps,
        explores=exploration is not None,
        trust_region=trust_region,
        buffer_size=buffer_size,
    )
    group = divergence.paths_per_start
    extra_optimiser = optax.adam(divergence.extra_rate)

    def spread(paths: Path) -> Float[Array, ""]:
        """The variance of the log weights, boundless where most are not finite: of none it would be zero."""
        usable = jnp.mean(jnp.isfinite(paths.log_weight), dtype=paths.log_weight.dtype)
        return jnp.where(usable > 0.5, log_variance().value(paths), jnp.inf)

    kept = None
    if buffer_size:
        blank = jnp.full((buffer_size, target.dim), jnp.nan)  # forward paths take the place of such ends
        kept = blank if endpoints is None else jnp.resize(endpoints, (buffer_size, target.dim))
    have_ends = kept is not None or endpoints is not None
    num_backward = int(backward_share * num_paths) if have_ends and not divergence.on_policy else 0
    num_forward = num_paths - num_backward

    def grid(key: Key) -> Process:
        """The process of one step: on its own grid, or on some points of it."""
        if coarse_steps is None:
            return process
        assert process.coarse is not None
        inner = _subset(key, num_steps - 1, coarse_steps - 1) + 1
        return process.coarse(jnp.concatenate([jnp.array([0]), jnp.sort(inner), jnp.array([num_steps])]))

    def backward_points(here: Process, state: DiffusionState, key: Key) -> Float[Array, "b T1 d"]:
        pool = endpoints if kept is None else state.buffer
        assert pool is not None
        # evenly spaced, others in the next step: neighbours may descend from one another
        ends = pool[(state.step + jnp.arange(num_backward) * len(pool) // num_backward) % len(pool)]
        return jax.vmap(lambda k, x: noise_path(here, state.params, target, k, x))(
            jax.random.split(key, num_backward), ends
        )

    def batch(
        here: Process,
        params: Params,
        key: Key,
        detach: bool,
        given: Float[Array, "n T1 d"] | None = None,
        widen: Float[Array, ""] | None = None,
    ) -> Path:
        def one(key: Key, xs: Float[Array, "T1 d"] | None) -> Path:
            return simulate(here, params, target, key, detach=detach, given=xs, widen=widen)

        return jax.vmap(one, in_axes=(0, None if given is None else 0))(
            jax.random.split(key, num_paths), given
        )

    def detached_batch(here: Process, state: DiffusionState, key_paths: Key, key_back: Key) -> Path:
        """Paths that are constants: free ones, groups from one start, some through backward points."""
        given = jnp.full((num_paths, num_simulated + 1, target.dim), jnp.nan)
        if group > 1:
            key_start, key_paths = jax.random.split(key_paths)
            start = here.init(state.params)
            first = jax.vmap(start.sample)(jax.random.split(key_start, num_paths // group))
            given = given.at[:, 0].set(jnp.repeat(first, group, 0))
        if num_backward:
            given = given.at[-num_backward:].set(backward_points(here, state, key_back))
        widen = None if exploration is None else 1.0 + jnp.asarray(exploration(state.step))
        return batch(here, state.params, key_paths, True, given if group > 1 or num_backward else None, widen)

    def refreshed(key: Key, state: DiffusionState, paths: Path) -> Float[Array, "m d"] | None:
        """The buffer with ends of the forward paths, resampled by weight, in its oldest places."""
        if kept is None:
            return None
        assert state.buffer is not None
        ends, log_weight = paths.xs[:num_forward, -1], clean(paths.log_weight[:num_forward])
        ends = ends[resample(key, log_weight, num_forward)]
        ends = jnp.where(jnp.any(jnp.isfinite(log_weight)), ends, jnp.nan)
        places = (state.step * num_forward + jnp.arange(num_forward)) % buffer_size
        return state.buffer.at[places].set(ends.astype(state.buffer.dtype))

    def aim(paths: Path) -> Path:
        """Aim at the path law in the trust region instead of the target's."""
        if trust_region is None:
            return paths
        return paths.tempered(reachable(paths.log_weight[:num_forward], trust_region))

    def init(key: Key) -> DiffusionState:
        zero, far = jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf)
        extra = None
        if divergence.extra is not None:
            key, key_extra = jax.random.split(key)
            extra = divergence.extra(key_extra, target.dim)
        params = net.init(key, target.dim)
        extra_opt_state = extra_optimiser.init(extra)
        return DiffusionState(
            step=zero,
            params=params,
            average=params,
            start=params,
            opt_state=optimiser.init(params),
            extra=extra,
            extra_opt_state=extra_opt_state,
            buffer=kept,
            progress=Progress(recent=far, first=far, best=far, stale=zero),
        )

    def update(carry, gradient, step):  # type: ignore[no-untyped-def]
        params, average, opt_state = carry
        params, opt_state, skipped = guarded_update(optimiser, gradient, opt_state, params)
        # the window grows with the steps done: a short training must not average with its start
        decay = jnp.minimum(average_decay, (1.0 + step) / (10.0 + step))
        average = optax.incremental_update(params, average, 1.0 - decay)
        return (params, average, opt_state), skipped

    def step(key: Key, state: DiffusionState) -> tuple[DiffusionState, Info]:
        keys = jax.random.split(key, 4 + num_updates)
        key_grid, key_paths, key_back, key_buffer = keys[:4]
        here, buffer = grid(key_grid), state.buffer
        carry = state.params, state.average, state.opt_state
        extra, extra_opt_state = state.extra, state.extra_opt_state
        if divergence.detach:
            paths = detached_batch(here, state, key_paths, key_back)
            buffer = refreshed(key_buffer, state, paths)
            aimed = aim(paths)

            def one(carry, key_k):  # type: ignore[no-untyped-def]
                times = None
                if num_times not in (None, num_simulated):
                    times = _subset(key_k, num_simulated, num_times)
                now = aimed
                if num_updates > 1:
                    now = jax.vmap(lambda path: reevaluate(here, carry[0], path))(aimed)
                loss, gradient = two_pass_gradient(divergence, here, carry[0], now, times, extra)
                carry, skipped = update(carry, gradient, state.step)
                return carry, (loss, skipped)

            carry, (losses, skips) = jax.lax.scan(one, carry, keys[4:])
            loss, skipped = losses[0], jnp.sum(skips, dtype=jnp.int32)
            if extra is not None:
                slope = jax.grad(lambda extra: divergence.value(paths, extra))(extra)
                extra, extra_opt_state, _ = guarded_update(extra_optimiser, slope, extra_opt_state, extra)
        else:

            def through(params: Params) -> tuple[Float[Array, ""], Path]:
                paths = batch(here, params, key_paths, False)
                return divergence.value(paths), paths

            (loss, paths), gradient = jax.value_and_grad(through, has_aux=True)(state.params)
            carry, skip = update(carry, gradient, state.step)
            skipped = skip.astype(jnp.int32)
        calls = 1 if process.look is None else 2
        gradients = jnp.asarray(num_paths * (num_simulated + 1) * calls, jnp.int32)
        progress = state.progress.after(state.step, spread(paths))
        recent = progress.recent
        finished = recent < goal
        if patience is not None:
            finished |= (progress.stale > patience) & (recent < good_enough)
        params, average, opt_state = carry
        new = state._replace(
            step=state.step + 1,
            params=params,
            average=average,
            opt_state=opt_state,
            extra=extra,
            extra_opt_state=extra_opt_state,
            buffer=buffer,
            progress=progress,
        )
        return new, Info(loss, skipped, gradients, finished & (state.step >= _MIN_STEPS))

    def parameters(state: DiffusionState) -> Params:
        undone = state.progress.undone()
        return jax.tree.map(lambda a, b: jnp.where(undone, a, b), state.start, state.average)

    return Algorithm(init, step, parameters, *path_draws(process, target, smc_particles))
