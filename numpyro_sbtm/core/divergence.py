# SPDX-License-Identifier: Apache-2.0
"""Losses: functions of a batch of paths, and the gradient that needs no graph of the simulation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.path import Path, log_kernels
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.target import Key, Params

__all__ = [
    "Divergence",
    "kl",
    "kl_log_derivative",
    "log_variance",
    "sub_trajectory_log_variance",
    "trajectory_balance",
    "two_pass_gradient",
]

_NUM_POINTS = 8192  # points of paths that are differentiated at once: more do not fit a core's cache


class Divergence(NamedTuple):
    """A scalar loss of a batch of paths.

    Attributes:
        value: ``(paths, extra) -> loss``, from a batch of paths, leading axis ``n``, to shape ``[]``.
        detach: whether the paths' points are constants. True allows the two-pass gradient; False asks
            for differentiation through the simulation, and the value must have the gradient of what is
            discrete there (see `Path.log_choice`).
        extra: ``(key, d) -> first value`` of what is learned beside the process, such as log Z; or None.
        extra_rate: step size of its own Adam.
        paths_per_start: how many consecutive paths share their x_0.
        on_policy: whether it asks for independent paths of the current forward chain, or groups of them.
        any_reference: whether it is sound where the law of x_0 or the size of the noise is learned.
        any_grid: whether paths on other grids than the process's own may be given.
    """

    value: Callable[..., Float[Array, ""]]
    detach: bool
    extra: Callable[[Key, int], Any] | None = None
    extra_rate: float = 0.1
    paths_per_start: int = 1
    on_policy: bool = False
    any_reference: bool = False
    any_grid: bool = True


def kl() -> Divergence:
    """Make the reverse Kullback-Leibler divergence of the path laws, less the constant log Z.

    ``mean(-log_weight)``, reparametrised: gradients run through the trajectory. Where the forward chain
    draws a component c of a mixture at every step, that is half of the gradient. With R = -log w of a path
    and R̄ its mean over the other paths, the whole is

        mean(∇R, for the components drawn,  +  (R - R̄) ∇log p(c)).

    Paths with a non-finite weight are left out of the mean.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, eq. 9; Schulman et al. (2015), arXiv:1506.05254, theorem 1
        (the gradient where some nodes are discrete draws).

    Examples:
        >>> from numpyro_sbtm.core.divergence import kl
        >>> kl().detach
        False
    """

    def value(paths: Path, extra: None = None) -> Float[Array, ""]:
        keep = jnp.isfinite(paths.log_weight)
        cost = jnp.where(keep, -paths.log_weight, 0.0)
        mean = jnp.sum(cost) / jnp.maximum(jnp.sum(keep), 1)
        if paths.log_choice is None:
            return mean
        centred, count = _less_mean_of_others(cost, keep)
        surrogate = jnp.sum(centred * jnp.where(keep, paths.log_choice, 0.0)) / count
        return mean + surrogate - jax.lax.stop_gradient(surrogate)

    return Divergence(value, detach=False, on_policy=True, any_reference=True)


def _less_mean_of_others(
    cost: Float[Array, " n"], keep: Bool[Array, " n"]
) -> tuple[Float[Array, " n"], Int[Array, ""]]:
    """Take from each cost that is kept, as a constant, the mean of the others; and count the kept ones.

    The mean of the others does not depend on the path itself, so that as a baseline it biases no gradient.
    """
    cost = jax.lax.stop_gradient(cost)
    count = jnp.maximum(jnp.sum(keep), 2)
    # R - mean of the others = (R - mean) n / (n - 1)
    return jnp.where(keep, cost - jnp.sum(cost) / count, 0.0) * count / (count - 1), count


def kl_log_derivative() -> Divergence:
    """Make the reverse Kullback-Leibler divergence with the gradient of the log-derivative trick.

    The points are constants; with R = -log w of a path and R̄ its mean over the other paths, the gradient is

        mean((R - R̄) ∇log(p_0 F) - ∇log B),

    unbiased, for learned backward chains and laws of x_0 too. Paths with a non-finite weight are left out.

    Reference:
        Sanokowski et al. (2025), arXiv:2506.10982; Richter et al. (2020), arXiv:2010.10436.

    Examples:
        >>> from numpyro_sbtm.core.divergence import kl_log_derivative
        >>> kl_log_derivative().detach
        True
    """

    def value(paths: Path, extra: None = None) -> Float[Array, ""]:
        keep = jnp.isfinite(paths.log_weight)
        cost = jax.lax.stop_gradient(jnp.where(keep, -paths.log_weight, 0.0))
        centred, count = _less_mean_of_others(cost, keep)
        mean = jnp.sum(cost) / count
        forward = jnp.where(keep, paths.log_init + jnp.sum(paths.log_forward, -1), 0.0)
        backward = jnp.where(keep, jnp.sum(paths.log_backward, -1), 0.0)
        surrogate = jnp.sum(centred * forward - backward) / count
        return mean + surrogate - jax.lax.stop_gradient(surrogate)

    return Divergence(value, detach=True, on_policy=True, any_reference=True)


def log_variance(clip: float | None = 20.0, paths_per_start: int = 1) -> Divergence:
    """Make the log-variance divergence: the variance of the log weights over the batch.

    Blind to constants in the log weight, zero if and only if the path laws agree, and on policy its
    gradient is twice that of the reverse KL, with a batch baseline. Paths with a non-finite weight are
    left out.

    Args:
        clip: log weights further than this from their median count as that far, and carry no gradient;
            otherwise a few paths on a barrier are the whole gradient. None: no clipping.
        paths_per_start: with more than one, the variance is taken over paths from the same x_0, and then
            averaged: zero if and only if the laws given x_0 agree, whatever the law of x_0.

    Raises:
        ValueError: for ``paths_per_start`` below one.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, eq. 12; Nüsken & Richter (2021),
        arXiv:2005.05409, definition 3.13.

    Examples:
        >>> from numpyro_sbtm.core.divergence import log_variance
        >>> log_variance().detach
        True
    """
    if paths_per_start < 1:
        raise ValueError(f"`paths_per_start` must be at least 1, got {paths_per_start}.")

    def value(paths: Path, extra: None = None) -> Float[Array, ""]:
        log_weight = paths.log_weight
        groups = log_weight.reshape(-1, paths_per_start) if paths_per_start > 1 else log_weight[None]
        return jnp.mean(_variances(groups, clip))

    grouped = paths_per_start > 1
    return Divergence(value, detach=True, paths_per_start=paths_per_start, on_policy=grouped)


def _variances(groups: Float[Array, "g n"], clip: float | None) -> Float[Array, " g"]:
    """Compute each group's variance, of finite values no further than ``clip`` from the median of all."""
    keep = jnp.isfinite(groups)
    median = jnp.nanmedian(jnp.where(keep, groups, jnp.nan))
    centred = jnp.where(keep, groups - jax.lax.stop_gradient(jnp.nan_to_num(median)), 0.0)
    if clip is not None:
        centred = jnp.clip(centred, -clip, clip)
    count = jnp.sum(keep, -1, keepdims=True)
    mean = jnp.sum(centred, -1, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(keep, (centred - mean) ** 2, 0.0), -1)
    return squares / jnp.maximum(count[:, 0] - 1, 1)


def sub_trajectory_log_variance(
    process: Process, potential: Net, num_segments: int = 4, clip: float | None = 20.0
) -> Divergence:
    """Make the log-variance of parts of paths, between guesses of the laws on the way that are learned.

    With log densities φ_k(x) = log r_k(x) + potential(t_k, x), where r_k is the law of x_k that the process
    guesses, but φ_0 = log p_0 and φ_T the target's own, and bounds 0 = b_0 < ... < b_M = T on the grid,

        L = Σ_m Var[φ_{b_m+1}(x_{b_m+1}) - φ_{b_m}(x_{b_m}) + Σ_{b_m <= k < b_m+1} (log B_k - log F_k)].

    It is zero if and only if every part agrees. The terms of a path add up to its log weight, and M L is no
    less than the `log_variance`. Its noise is that of short paths; but what the early parts learn from, the
    potential must learn first. Each part has its own constant: laws on the way need no normalisation.

    Args:
        process: the process that is trained.
        potential: ``apply(params, t, x)`` gives a number, best zero at the start; t is the log
            signal-to-noise ratio of x_k.
        num_segments: M, at most the number of steps. With one, the log-variance remains.
        clip: as in `log_variance`.

    Raises:
        ValueError: for a number of segments out of range.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, appendix A.7; Madan et al. (2023), arXiv:2209.12782
        (sub-trajectory balance); Chen et al. (2024), arXiv:2412.07081 (parts shared by a batch).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Net, Target, dis, simulate
        >>> from numpyro_sbtm.core.divergence import sub_trajectory_log_variance
        >>> from numpyro_sbtm.networks import potential
        >>> net = Net(lambda key, d: (), lambda p, t, x, s: (0 * x, 0 * x, jnp.zeros(()), jnp.zeros(1)))
        >>> process = dis(net, 2, num_steps=4)
        >>> divergence = sub_trajectory_log_variance(process, potential(8), num_segments=2)
        >>> target = Target(lambda x: -0.5 * jnp.sum(x**2), 2)
        >>> keys = jax.random.split(jax.random.key(0), 9)
        >>> paths = jax.vmap(lambda key: simulate(process, (), target, key))(keys)
        >>> round(float(divergence.value(paths, divergence.extra(jax.random.key(1), 2))), 4)
        0.0
    """
    num_steps = process.num_steps
    if not 1 <= num_segments <= num_steps:
        raise ValueError(f"`num_segments` must be between 1 and {num_steps}, got {num_segments}.")
    bounds = np.round(np.linspace(0, num_steps, num_segments + 1)).astype(int)
    share = process.signal[bounds[1:-1]]
    log_snr = np.log(share) - np.log1p(-share)

    def value(paths: Path, extra: Params) -> Float[Array, ""]:
        usable = jnp.isfinite(paths.log_weight)
        xs = jnp.where(usable[:, None, None], paths.xs[:, bounds[1:-1]], 0.0)

        def guess(k: Int[Array, ""], t: Float[Array, ""], x: Float[Array, " d"]) -> Float[Array, ""]:
            return process.marginal(k, x) + potential.apply(extra, t, x)

        over_paths = jax.vmap(guess, in_axes=(None, None, 0))
        inner = jax.vmap(over_paths, in_axes=(0, 0, 1), out_axes=1)(
            jnp.asarray(bounds[1:-1]), jnp.asarray(log_snr, xs.dtype), xs
        )
        ends = jnp.concatenate([paths.log_init[:, None], inner, paths.log_target[:, None]], 1)
        ratio = jnp.pad(jnp.cumsum(paths.log_backward - paths.log_forward, 1), ((0, 0), (1, 0)))
        parts = jnp.diff(ends, axis=1) + jnp.diff(ratio[:, bounds], axis=1)
        parts = jnp.where(usable[:, None], parts, jnp.nan)
        return jnp.sum(jnp.stack([_variances(part[None], clip)[0] for part in parts.T]))

    return Divergence(value, detach=True, extra=potential.init, extra_rate=2e-3, any_grid=False)


def trajectory_balance(clip: float | None = 20.0, log_z: float = 0.0) -> Divergence:
    """Make the trajectory balance, or second moment, loss: the mean square of log w - log Z, with Z learned.

    Zero if and only if the path laws agree and Z is right. The learned log Z is a baseline over all of
    training, where that of `log_variance` is the mean of a batch.

    Args:
        clip: where |log w - log Z| exceeds it the loss is linear (Huber); None: square everywhere.
        log_z: where log Z starts.

    Reference:
        Malkin et al. (2022), arXiv:2201.13259; Richter & Berner (2024), arXiv:2307.01198, remark A.2.

    Examples:
        >>> from numpyro_sbtm.core.divergence import trajectory_balance
        >>> import jax
        >>> float(trajectory_balance(log_z=2.0).extra(jax.random.key(0), 3))
        2.0
    """

    def value(paths: Path, extra: Float[Array, ""]) -> Float[Array, ""]:
        keep = jnp.isfinite(paths.log_weight)
        excess = jnp.where(keep, paths.log_weight - extra, 0.0)
        square = excess**2 if clip is None else 2.0 * optax.losses.huber_loss(excess, delta=clip)
        return jnp.sum(square) / jnp.maximum(jnp.sum(keep), 1)

    return Divergence(value, detach=True, extra=lambda key, dim: jnp.asarray(log_z))


def _divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is not above a limit, and 1 below all of them."""
    return max(m for m in range(1, number + 1) if number % m == 0 and m <= max(limit, 1))


def two_pass_gradient(
    divergence: Divergence,
    process: Process,
    params: Params,
    paths: Path,
    times: Int[Array, " m"] | None = None,
    extra: Any = None,
) -> tuple[Float[Array, ""], Params]:
    """Compute a detached divergence and its gradient from simulated paths, many times at once.

    The first pass, simulation, has been done without gradients. Here the loss is differentiated with
    respect to the log densities on the path, a few numbers a path, and these cotangents are pulled back
    through the kernels by batched vector-Jacobian products, of as many times at once as make some thousand
    points: beside the stored paths, memory does not grow with the times. The target is not called.

    Args:
        divergence: the loss; ``divergence.detach`` must be True.
        process: the two chains.
        params: parameters, at which ``paths`` must hold the densities (see `reevaluate`).
        paths: a batch, leading axis ``n``.
        times: a uniformly random subset of the T steps, drawn independently of the paths, shape
            ``[m]``; the gradient is then unbiased for the one over all steps, which None gives. The
            cotangents always come from whole paths.
        extra: what the divergence learns itself, here a constant.

    Returns:
        The loss and its gradient with respect to ``params``.

    Raises:
        ValueError: for a divergence that is not detached.

    Reference:
        The gradient of the log-variance divergence as a weighted sum of path scores: Richter et al.
        (2020), arXiv:2010.10436, eq. 5 (VarGrad).
    """
    if not divergence.detach:
        raise ValueError(
            "`divergence` must be detached for the two-pass gradient, got one whose gradient runs "
            "through the trajectory. Differentiate `divergence.value(simulate(..., detach=False))`."
        )

    def loss(
        log_forward: Float[Array, "n T"], log_backward: Float[Array, "n T"], log_init: Float[Array, " n"]
    ) -> Float[Array, ""]:
        densities = {"log_forward": log_forward, "log_backward": log_backward, "log_init": log_init}
        return divergence.value(paths._replace(**densities), extra)

    value, (*cotangents, at_start) = jax.value_and_grad(loss, argnums=(0, 1, 2))(
        paths.log_forward, paths.log_backward, paths.log_init
    )
    if times is None:
        times = jnp.arange(process.num_steps)
    # a path with a zero cotangent may hold anything, NaN included: silence it before and after
    usable = jnp.isfinite(paths.log_weight)
    paths = jax.tree.map(
        lambda leaf: jnp.where(usable.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, 0.0), paths
    )
    scale = process.num_steps / times.shape[0]
    chosen = [scale * jnp.where(usable[:, None], c, 0.0)[:, times].T for c in cotangents]

    def pulled(gradient, block):  # type: ignore[no-untyped-def]
        times, *cotangents = block

        def kernels(params: Params) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
            # times outside, paths inside: what depends on the time alone is computed once a time
            over_paths = jax.vmap(
                lambda k, *ends: log_kernels(process, params, k, *ends), in_axes=(None, 0, 0, 0, 0)
            )
            return jax.vmap(over_paths, in_axes=(0, 1, 1, 1, 1))(
                times,
                paths.xs[:, times],
                paths.xs[:, times + 1],
                paths.scores[:, times],
                paths.scores[:, times + 1],
            )

        (more,) = jax.vjp(kernels, params)[1](tuple(cotangents))
        return jax.tree.map(jnp.add, gradient, more), None

    at_once = _divisor(len(times), _NUM_POINTS // len(usable))
    blocks = [leaf.reshape(-1, at_once, *leaf.shape[1:]) for leaf in (times, *chosen)]
    gradient, _ = jax.lax.scan(pulled, jax.tree.map(jnp.zeros_like, params), blocks)
    if process.learns_reference:
        _, pull_back = jax.vjp(lambda p: jax.vmap(process.init(p).log_prob)(paths.xs[:, 0]), params)
        (start,) = pull_back(jnp.where(usable, at_start, 0.0))
        gradient = jax.tree.map(jnp.add, gradient, start)
    return value, gradient
