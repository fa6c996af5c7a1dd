# SPDX-License-Identifier: Apache-2.0
"""Learned diffusions: train a process by a divergence, draw paths with exact weights."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.algorithm import Algorithm, Info, guarded_update
from numpyro_sbtm.core.divergence import Divergence, log_variance, two_pass_gradient
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.options import DiffusionOptions
from numpyro_sbtm.core.path import Path, evaluations_of_path, noise_path, reevaluate, simulate
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.smc import path_draws
from numpyro_sbtm.core.target import Key, Keys, Params, Target
from numpyro_sbtm.core.weights import clean, log_variance_at, reachable, resample

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


def check_options(process: Process, divergence: Divergence, options: DiffusionOptions) -> int:
    """Return how many steps training simulates; raise for what `diffusion` cannot do, see there.

    Nothing is computed, and of the process only its grid matters: neither its network nor its dimension.

    Raises:
        ValueError: for pairs of process and divergence that are unsound, for options that a divergence or a
            process does not allow, and for sizes out of range.
    """
    num_steps, num_times, coarse_steps = process.num_steps, options.num_times, options.coarse_steps
    num_simulated = num_steps if coarse_steps is None else coarse_steps
    if not 1 <= num_simulated <= num_steps:
        raise ValueError(f"`coarse_steps` must be between 1 and {num_steps}, got {coarse_steps}.")
    if num_times is not None and not 1 <= num_times <= num_simulated:
        raise ValueError(f"`num_times` must be between 1 and {num_simulated}, got {num_times}.")
    _check_soundness(process, divergence)
    if coarse_steps is not None and (process.coarse is None or not divergence.any_grid):
        who = "`process`" if process.coarse is None else "`divergence`"
        raise ValueError(f"`coarse_steps` is {coarse_steps}, but {who} is tied to its grid. Pass None.")
    _check_policy(divergence, options)
    group = divergence.paths_per_start
    if options.num_paths % group:
        raise ValueError(
            f"`num_paths` must be a multiple of the divergence's {group} paths per start, got "
            f"{options.num_paths}."
        )
    return num_simulated


def _check_soundness(process: Process, divergence: Divergence) -> None:
    """Refuse pairs whose gradient is not that of what they are to lower."""
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


def _check_policy(divergence: Divergence, options: DiffusionOptions) -> None:
    """Refuse paths of other chains where a divergence needs those of the current one."""
    num_times, num_updates = options.num_times, options.num_updates
    off_policy = divergence.detach and not divergence.on_policy
    if options.exploration and not off_policy:
        raise ValueError(
            "`exploration` draws paths from another chain, but `divergence` needs those of the current one. "
            "Log-variance and trajectory balance are valid for any paths."
        )
    if options.buffer_size and not off_policy:
        raise ValueError(
            f"`buffer_size` is {options.buffer_size}, but the buffer holds starts of backward paths, and "
            "`divergence` needs paths of the current forward chain. Pass 0, or take log-variance or "
            "trajectory balance."
        )
    if options.trust_region is not None and num_updates == 1:
        raise ValueError(
            "`trust_region` asks for several updates on one block, got "
            f"{options.trust_region} with `num_updates` = 1."
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


def _subset(key: Key, n: int, m: int) -> Int[Array, " m"]:
    """Draw m of the numbers below n, without replacement."""
    return jax.lax.top_k(jax.random.uniform(key, (n,)), m)[1]


def diffusion(
    target: Target,
    process: Process,
    net: Net,
    divergence: Divergence,
    optimiser: optax.GradientTransformation,
    options: DiffusionOptions = DiffusionOptions(),  # noqa: B008 - frozen
    *,
    endpoints: Float[Array, "m d"] | None = None,
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
        options: how it is trained.
        endpoints: points that resemble draws of the target, shape ``[m, d]``. A divergence that is valid off
            policy is then also taken over paths that the backward chain makes from them, so that training
            sees what the forward chain does not reach yet.
        smc_particles: paths behind each draw of `Algorithm.several` (see `path_ensemble`); none below two.

    Returns:
        The algorithm. A step costs ``num_paths (T+1)`` target gradients, fewer on a coarse grid, and twice as
        many where the process looks ahead.

    Raises:
        ValueError: for pairs of process and divergence that are unsound, for options that a divergence or a
            process does not allow, and for sizes out of range.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from numpyro_sbtm.core import DiffusionOptions, Target, diffusion, dis, log_variance
        >>> from numpyro_sbtm.networks import denoiser
        >>> target, net = Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2), 2), denoiser(8)
        >>> process, options = dis(net, 2, num_steps=8), DiffusionOptions(num_paths=16)
        >>> algorithm = diffusion(target, process, net, log_variance(), optax.adam(1e-3), options)
        >>> state, info = algorithm.step(jax.random.key(1), algorithm.init(jax.random.key(0)))
        >>> algorithm.proposal.draw(jax.random.key(2), algorithm.parameters(state), 5).x.shape
        (5, 2)
    """
    num_simulated = check_options(process, divergence, options)
    if options.buffer_size:
        blank = jnp.full((options.buffer_size, target.dim), jnp.nan)  # forward paths take such places
        endpoints = blank if endpoints is None else jnp.resize(endpoints, blank.shape)
    training = _Training(target, process, net, divergence, optimiser, options, endpoints, num_simulated)
    return Algorithm(
        training.init, training.step, training.parameters, *path_draws(process, target, smc_particles)
    )


def _spread(paths: Path) -> Float[Array, ""]:
    """Compute the variance of the log weights, boundless where most are not finite: of none it would be 0."""
    usable = jnp.mean(jnp.isfinite(paths.log_weight), dtype=paths.log_weight.dtype)
    return jnp.where(usable > 0.5, log_variance().value(paths), jnp.inf)


class _Updated(NamedTuple):
    """What an update changes."""

    params: Params
    average: Params
    opt_state: optax.OptState


@dataclass(frozen=True, eq=False)
class _Training:
    """The steps of `diffusion`."""

    target: Target
    process: Process
    net: Net
    divergence: Divergence
    optimiser: optax.GradientTransformation
    options: DiffusionOptions
    endpoints: Float[Array, "m d"] | None
    num_simulated: int

    @property
    def extra_optimiser(self) -> optax.GradientTransformation:
        """What trains the divergence's own parameters."""
        return optax.adam(self.divergence.extra_rate)

    @property
    def num_backward(self) -> int:
        """Paths of a batch that the backward chain makes."""
        may = self.endpoints is not None and not self.divergence.on_policy
        return int(self.options.backward_share * self.options.num_paths) if may else 0

    def init(self, key: Key) -> DiffusionState:
        zero, far = jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf)
        extra = None
        if self.divergence.extra is not None:
            key, key_extra = jax.random.split(key)
            extra = self.divergence.extra(key_extra, self.target.dim)
        params = self.net.init(key, self.target.dim)
        return DiffusionState(
            step=zero,
            params=params,
            average=params,
            start=params,
            opt_state=self.optimiser.init(params),
            extra=extra,
            extra_opt_state=self.extra_optimiser.init(extra),
            buffer=self.endpoints if self.options.buffer_size else None,
            progress=Progress(recent=far, first=far, best=far, stale=zero),
        )

    # ------------------------------------------------------------------ paths
    def grid(self, key: Key) -> Process:
        """Make the process of one step: on its own grid, or on some points of it."""
        process, coarse_steps = self.process, self.options.coarse_steps
        if coarse_steps is None:
            return process
        assert process.coarse is not None
        last = process.num_steps
        inner = _subset(key, last - 1, coarse_steps - 1) + 1
        return process.coarse(jnp.concatenate([jnp.array([0]), jnp.sort(inner), jnp.array([last])]))

    def backward_points(self, process: Process, state: DiffusionState, key: Key) -> Float[Array, "b T1 d"]:
        """Make paths by the backward chain from what resembles draws."""
        pool, num = self.endpoints if state.buffer is None else state.buffer, self.num_backward
        assert pool is not None
        # evenly spaced, others in the next step: neighbours may descend from one another
        ends = pool[(state.step + jnp.arange(num) * len(pool) // num) % len(pool)]
        back = lambda k, x: noise_path(process, state.params, self.target, k, x)  # noqa: E731
        return jax.vmap(back)(jax.random.split(key, num), ends)

    def batch(
        self,
        process: Process,
        params: Params,
        key: Key,
        given: Float[Array, "n T1 d"] | None = None,
        widen: Float[Array, ""] | None = None,
    ) -> Path:
        """Simulate paths, through points where these are given."""

        def path(key: Key, xs: Float[Array, "T1 d"] | None) -> Path:
            detach = self.divergence.detach
            return simulate(process, params, self.target, key, detach=detach, given=xs, widen=widen)

        keys = jax.random.split(key, self.options.num_paths)
        return jax.vmap(path, in_axes=(0, None if given is None else 0))(keys, given)

    def detached_batch(self, process: Process, state: DiffusionState, key_paths: Key, key_back: Key) -> Path:
        """Simulate paths as constants: free ones, groups from one start, some through backward points."""
        num, group = self.options.num_paths, self.divergence.paths_per_start
        given = jnp.full((num, self.num_simulated + 1, self.target.dim), jnp.nan)
        if group > 1:
            key_start, key_paths = jax.random.split(key_paths)
            start = process.init(state.params)
            first = jax.vmap(start.sample)(jax.random.split(key_start, num // group))
            given = given.at[:, 0].set(jnp.repeat(first, group, 0))
        if self.num_backward:
            given = given.at[-self.num_backward :].set(self.backward_points(process, state, key_back))
        some = group > 1 or self.num_backward
        return self.batch(
            process, state.params, key_paths, given if some else None, self.widening(state.step)
        )

    def widening(self, step: Int[Array, ""]) -> Float[Array, ""] | None:
        """Compute the factor of the noise with which training explores."""
        exploration, num_steps = self.options.exploration, self.options.exploration_steps
        if not exploration:
            return None
        if num_steps is None:
            return 1.0 + jnp.asarray(exploration)
        return 1.0 + jnp.asarray(optax.linear_schedule(exploration, 0.0, num_steps)(step))

    def refreshed(self, key: Key, state: DiffusionState, paths: Path) -> Float[Array, "m d"] | None:
        """Put ends of the forward paths, resampled by weight, in the oldest places of the buffer."""
        if state.buffer is None:
            return None
        num = self.options.num_paths - self.num_backward
        ends, log_weight = paths.xs[:num, -1], clean(paths.log_weight[:num])
        ends = ends[resample(key, log_weight, num)]
        ends = jnp.where(jnp.any(jnp.isfinite(log_weight)), ends, jnp.nan)
        places = (state.step * num + jnp.arange(num)) % self.options.buffer_size
        return state.buffer.at[places].set(ends.astype(state.buffer.dtype))

    def aimed(self, paths: Path) -> Path:
        """Aim at the path law in the trust region instead of the target's."""
        if self.options.trust_region is None:
            return paths
        num = self.options.num_paths - self.num_backward
        return paths.tempered(reachable(paths.log_weight[:num], self.options.trust_region))

    # ------------------------------------------------------------------ a step
    def update(
        self, before: _Updated, gradient: Params, step: Int[Array, ""]
    ) -> tuple[_Updated, Bool[Array, ""]]:
        """Make one update; say whether it was skipped."""
        params, opt_state, skipped = guarded_update(self.optimiser, gradient, before.opt_state, before.params)
        # the window grows with the steps done: a short training must not average with its start
        decay = jnp.minimum(self.options.average_decay, (1.0 + step) / (10.0 + step))
        average = optax.incremental_update(params, before.average, 1.0 - decay)
        return _Updated(params, average, opt_state), skipped

    def detached_updates(
        self, keys: Keys, process: Process, state: DiffusionState, paths: Path
    ) -> tuple[_Updated, Float[Array, ""], Int[Array, ""]]:
        """Update on one block of paths, once for every key; with the first loss, and updates skipped."""
        num_times, num_simulated = self.options.num_times, self.num_simulated
        aimed = self.aimed(paths)

        def once(now: _Updated, key: Key) -> tuple[_Updated, tuple[Float[Array, ""], Bool[Array, ""]]]:
            times = None if num_times in (None, num_simulated) else _subset(key, num_simulated, num_times)
            block = aimed
            if self.options.num_updates > 1:
                block = jax.vmap(lambda path: reevaluate(process, now.params, path))(aimed)
            loss, gradient = two_pass_gradient(
                self.divergence, process, now.params, block, times, state.extra
            )
            now, skipped = self.update(now, gradient, state.step)
            return now, (loss, skipped)

        before = _Updated(state.params, state.average, state.opt_state)
        after, (losses, skips) = jax.lax.scan(once, before, keys)
        return after, losses[0], jnp.sum(skips, dtype=jnp.int32)

    def update_through(
        self, key: Key, process: Process, state: DiffusionState
    ) -> tuple[_Updated, Float[Array, ""], Int[Array, ""], Path]:
        """Update by the gradient through the simulation; with the loss, updates skipped and the paths."""

        def value(params: Params) -> tuple[Float[Array, ""], Path]:
            paths = self.batch(process, params, key)
            return self.divergence.value(paths), paths

        (loss, paths), gradient = jax.value_and_grad(value, has_aux=True)(state.params)
        before = _Updated(state.params, state.average, state.opt_state)
        after, skipped = self.update(before, gradient, state.step)
        return after, loss, skipped.astype(jnp.int32), paths

    def step(self, key: Key, state: DiffusionState) -> tuple[DiffusionState, Info]:
        options, divergence = self.options, self.divergence
        keys = jax.random.split(key, 4 + options.num_updates)
        key_grid, key_paths, key_back, key_buffer = keys[:4]
        process = self.grid(key_grid)
        extra, extra_opt_state, buffer = state.extra, state.extra_opt_state, state.buffer
        if divergence.detach:
            paths = self.detached_batch(process, state, key_paths, key_back)
            buffer = self.refreshed(key_buffer, state, paths)
            after, loss, skipped = self.detached_updates(keys[4:], process, state, paths)
            if extra is not None:
                slope = jax.grad(lambda extra: divergence.value(paths, extra))(extra)
                extra, extra_opt_state, _ = guarded_update(
                    self.extra_optimiser, slope, extra_opt_state, extra
                )
        else:
            after, loss, skipped, paths = self.update_through(key_paths, process, state)
        gradients = jnp.asarray(evaluations_of_path(process).gradients * options.num_paths, jnp.int32)
        progress = state.progress.after(state.step, _spread(paths))
        new = state._replace(
            step=state.step + 1,
            extra=extra,
            extra_opt_state=extra_opt_state,
            buffer=buffer,
            progress=progress,
            **after._asdict(),
        )
        finished = self.finished(progress) & (state.step >= _MIN_STEPS)
        return new, Info(loss, skipped, gradients, finished)

    def finished(self, progress: Progress) -> Bool[Array, ""]:
        """Say whether the log weights vary as little as they should, or vary no less than long before."""
        patience = self.options.patience
        finished = progress.recent < log_variance_at(self.options.target_acceptance)
        if patience is not None:
            finished |= (progress.stale > patience) & (progress.recent < self.options.good_enough)
        return finished

    def parameters(self, state: DiffusionState) -> Params:
        """Take the averaged parameters, or those of the start should training have undone them."""
        undone = state.progress.undone()
        return jax.tree.map(lambda a, b: jnp.where(undone, a, b), state.start, state.average)
