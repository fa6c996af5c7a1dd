# SPDX-License-Identifier: Apache-2.0
"""Losses: functions of a batch of paths, and the gradient that needs no graph of the simulation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.path import Path, log_kernels
from numpyro_sbtm.core.process import Process
from numpyro_sbtm.core.target import Params

__all__ = ["Divergence", "kl", "log_variance", "two_pass_gradient"]


class Divergence(NamedTuple):
    """A scalar loss of a batch of paths.

    Attributes:
        value: from a batch of paths, leading axis ``n``, to the loss, shape ``[]``.
        detach: whether the paths' points are constants. True allows the two-pass gradient; False asks
            for differentiation through the simulation.
    """

    value: Callable[[Path], Float[Array, ""]]
    detach: bool


def kl() -> Divergence:
    """Make the reverse Kullback-Leibler divergence of the path laws, less the constant log Z.

    ``mean(-log_weight)``, reparametrised: gradients run through the trajectory. Paths with a
    non-finite weight are left out of the mean.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, eq. 9.

    Examples:
        >>> from numpyro_sbtm.core.divergence import kl
        >>> kl().detach
        False
    """

    def value(paths: Path) -> Float[Array, ""]:
        keep = jnp.isfinite(paths.log_weight)
        loss = jnp.where(keep, -paths.log_weight, 0.0)
        return jnp.sum(loss) / jnp.maximum(jnp.sum(keep), 1)

    return Divergence(value, detach=False)


def log_variance(clip: float | None = 20.0) -> Divergence:
    """Make the log-variance divergence: the variance of the log weights over the batch.

    Blind to constants in the log weight, zero if and only if the path laws agree, and on policy its
    gradient is twice that of the reverse KL, with a batch baseline. Paths with a non-finite weight are
    left out.

    Args:
        clip: log weights further than this from their median count as that far, and carry no gradient;
            otherwise a few paths on a barrier are the whole gradient. None: no clipping.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, eq. 12; Nüsken & Richter (2021),
        arXiv:2005.05409, definition 3.13.

    Examples:
        >>> from numpyro_sbtm.core.divergence import log_variance
        >>> log_variance().detach
        True
    """

    def value(paths: Path) -> Float[Array, ""]:
        keep = jnp.isfinite(paths.log_weight)
        log_weight = jnp.where(keep, paths.log_weight, jnp.nan)
        centre = jax.lax.stop_gradient(jnp.nan_to_num(jnp.nanmedian(log_weight)))
        centred = jnp.where(keep, paths.log_weight - centre, 0.0)
        if clip is not None:
            centred = jnp.clip(centred, -clip, clip)
        count = jnp.sum(keep)
        mean = jnp.sum(centred) / jnp.maximum(count, 1)
        return jnp.sum(jnp.where(keep, (centred - mean) ** 2, 0.0)) / jnp.maximum(count - 1, 1)

    return Divergence(value, detach=True)


def two_pass_gradient(
    divergence: Divergence,
    process: Process,
    params: Params,
    paths: Path,
    times: Int[Array, " m"] | None = None,
) -> tuple[Float[Array, ""], Params]:
    """Compute a detached divergence and its gradient from simulated paths, all times in parallel.

    The first pass, simulation, has been done without gradients. Here the loss is differentiated with
    respect to the log densities on the path, a few numbers a path, and these cotangents are pulled back
    through the kernels in one batched vector-Jacobian product. The target is not called.

    Args:
        divergence: the loss; ``divergence.detach`` must be True.
        process: the two chains.
        params: parameters, at which ``paths`` must hold the densities (see `reevaluate`).
        paths: a batch, leading axis ``n``.
        times: a uniformly random subset of the T steps, drawn independently of the paths, shape
            ``[m]``; the gradient is then unbiased for the one over all steps, which None gives. The
            cotangents always come from whole paths.

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

    def loss(log_forward: Float[Array, "n T"], log_backward: Float[Array, "n T"]) -> Float[Array, ""]:
        return divergence.value(paths._replace(log_forward=log_forward, log_backward=log_backward))

    value, cotangents = jax.value_and_grad(loss, argnums=(0, 1))(paths.log_forward, paths.log_backward)
    if times is None:
        times = jnp.arange(process.num_steps)
    scale = process.num_steps / times.shape[0]
    here, there = times, times + 1

    def kernels(params: Params) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
        # times outside, paths inside: what depends on the time alone is computed once a time
        over_paths = jax.vmap(
            lambda k, *ends: log_kernels(process, params, k, *ends), in_axes=(None, 0, 0, 0, 0)
        )
        return jax.vmap(over_paths, in_axes=(0, 1, 1, 1, 1))(
            times,
            paths.xs[:, here],
            paths.xs[:, there],
            paths.scores[:, here],
            paths.scores[:, there],
        )

    # a path with a zero cotangent may hold anything, NaN included: silence it before and after
    usable = jnp.isfinite(paths.log_weight)
    paths = jax.tree.map(
        lambda leaf: jnp.where(usable.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, 0.0), paths
    )
    _, pull_back = jax.vjp(kernels, params)
    chosen = jax.tree.map(lambda c: scale * jnp.where(usable[:, None], c, 0.0)[:, times].T, cotangents)
    (gradient,) = pull_back(chosen)
    return value, gradient
