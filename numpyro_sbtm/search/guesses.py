# SPDX-License-Identifier: Apache-2.0
"""First guesses of maps: where climbs arrive, and where they start."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import LowRank, Triangular
from numpyro_sbtm.core.target import LogDensity, Target
from numpyro_sbtm.search.climb import climb, connected, evaluations_between, leaders

__all__ = ["diagonal_guesses", "first_guesses", "sorted_density"]

_DISTANT_TOPS = 4  # modes above scouts that are fitted
_CLIMB_STEPS = 100
_NUM_TOPS = 16  # modes that are fitted where there are no matrices
_DROP = 0.35  # nats, over steps that measure curvature
_STEP_BOUNDS, _HALVINGS = (-26.0, 10.0), 6  # of the binary logarithm of a step, which is then known to .6
_NARROW = 0.1  # deviations with which a fit without correlations begins at a mode


def _furthest(points: Float[Array, "m d"], num_given: int, num: int) -> Float[Array, "num d"]:
    """Choose points one by one, each the furthest from the first ``num_given`` and those chosen before."""
    spread = jnp.nanstd(jnp.where(jnp.isfinite(points), points, jnp.nan), 0)
    scaled = jnp.where(jnp.isfinite(points), points, 0.0) / jnp.maximum(spread, 1e-9)
    distance = jnp.min(jnp.sum((scaled[:, None] - scaled[:num_given]) ** 2, -1), 1)

    def choose(distance, _):  # type: ignore[no-untyped-def]
        far = jnp.argmax(distance)
        return jnp.minimum(distance, jnp.sum((scaled - scaled[far]) ** 2, -1)), far

    return points[jax.lax.scan(choose, distance, length=num)[1]]


def _steps(logdensity_fn: LogDensity, mode: Float[Array, " d"]) -> Float[Array, " d"]:
    """Find for every coordinate a step to both sides over which the log density drops by a tenth to a half.

    More where rounding hides that much, and the longest step where it does not drop so far.
    """
    top = logdensity_fn(mode)
    drop = jnp.maximum(_DROP, 16.0 * jnp.finfo(mode.dtype).eps * jnp.abs(top))

    def halve(_, bounds):  # type: ignore[no-untyped-def]
        low, high = bounds
        middle = 0.5 * (low + high)
        there = jnp.diag(jnp.exp2(middle))
        values = jax.vmap(logdensity_fn)(jnp.concatenate([mode + there, mode - there]))
        # a saddle rises: that is as far as another mode's edge
        within = jnp.abs(top - 0.5 * (values[: mode.size] + values[mode.size :])) < drop
        return jnp.where(within, middle, low), jnp.where(within, high, middle)

    bounds = tuple(jnp.full_like(mode, bound) for bound in _STEP_BOUNDS)
    return jnp.exp2(jax.lax.fori_loop(0, _HALVINGS, halve, bounds)[0])


def _laplace(logdensity_fn: LogDensity, mode: Float[Array, " d"]) -> Float[Array, "d d"]:
    """Compute a Cholesky factor of the inverse Hessian at a point, with guarded eigenvalues.

    Gradients at both ends of a step for every coordinate, not derivatives of the gradient: models may have
    none, and these tell the curvature at the scale of the density. Costs 2 d gradients and 12 d values.
    """
    dim = mode.shape[0]
    step = _steps(logdensity_fn, mode)
    ends = jnp.concatenate([mode + jnp.diag(step), mode - jnp.diag(step)])
    scores = jax.vmap(jax.grad(logdensity_fn))(ends)
    # what was added is not the step, but that rounded
    length = jnp.diagonal(ends[:dim] - ends[dim:])
    # in units of the steps all curvatures are alike
    hessian = -(step / length)[:, None] * (scores[:dim] - scores[dim:]) * step
    hessian = 0.5 * (hessian + hessian.T)
    usable = jnp.all(jnp.isfinite(hessian))
    eigenvalues, vectors = jnp.linalg.eigh(jnp.where(usable, hessian, jnp.eye(dim)))
    # flat or inverted directions get a wide scale, not an infinite one
    floor = jnp.maximum(1e-6 * jnp.max(jnp.abs(eigenvalues)), 1e-6)
    root = step[:, None] * vectors / jnp.sqrt(jnp.maximum(jnp.abs(eigenvalues), floor))
    # L with L L^T = root root^T is the transposed R of QR(root^T); its signs make the diagonal positive
    upper = jnp.linalg.qr(root.T, mode="r")
    return (upper * jnp.where(jnp.diagonal(upper) < 0, -1.0, 1.0)[:, None]).T


def sorted_density(target: Target, order: Int[Array, " d"]) -> LogDensity:
    """Make the log density of coordinates that are in another order."""
    return lambda y: target.logdensity_fn(jnp.zeros_like(y).at[order].set(y))


def first_guesses(
    target: Target, starts: Float[Array, "s d"], scouts: Float[Array, "m d"], order: Int[Array, " d"]
) -> tuple[Triangular, Evaluations]:
    """Guess affine maps: two from every start, and a few above scouts.

    One is the normal (Laplace) approximation where L-BFGS arrives, which knows the scales of a well-behaved
    posterior; one has unit scales at the start itself, which a density without a mode, such as a centred
    hierarchical model, does not lead astray.

    Args:
        target: the density.
        starts: points of finite density, shape ``[s, d]``.
        scouts: points that lie as widely as the density may; few of the modes above them are used, those
            that lie furthest apart, shape ``[m, d]``.
        order: a permutation of the coordinates, hyperparameters first, shape ``[d]``.

    Returns:
        Stacked maps, leading axis ``2 s + 4``; and what was evaluated: a few dozen values and gradients for
        every start and scout, and a few d for each of ``s + 4`` tops.
    """
    logdensity_fn = sorted_density(target, order)
    num, dim = starts.shape
    starts = starts[:, order]
    begin = jnp.concatenate([starts, scouts[:, order]])
    tops, spent = jax.vmap(lambda y: climb(logdensity_fn, y, _CLIMB_STEPS))(begin)
    locs = jnp.concatenate([tops[:num], _furthest(tops, num, _DISTANT_TOPS)])
    # one at a time: two batched LAPACK calls that XLA runs side by side can block a two-core machine
    trils = jax.lax.map(lambda y: _laplace(logdensity_fn, y), locs)
    locs = jnp.concatenate([locs, starts])
    trils = jnp.concatenate([trils, jnp.broadcast_to(jnp.eye(dim), (num, dim, dim))])
    maps = jax.vmap(lambda loc, tril: Triangular.affine(loc, tril, order))(locs, trils)
    curvature = Evaluations(values=1 + 2 * dim * _HALVINGS, gradients=2 * dim)
    return maps, jax.tree.map(jnp.sum, spent).plus(curvature.times(num + _DISTANT_TOPS)).as_arrays()


def _distinct_tops(logdensity_fn: LogDensity, tops: Float[Array, "m d"]) -> Float[Array, "t d"]:
    """Choose tops of different modes: the highest, and those that most climbs reach; at last others in order.

    Height alone would prefer narrow modes to those that hold as much.
    """
    values = jax.vmap(logdensity_fn)(tops)
    usable = jnp.isfinite(values) & jnp.all(jnp.isfinite(tops), -1)
    order = jnp.argsort(jnp.where(usable, -values, jnp.inf))
    leads, leader = leaders(order, connected(logdensity_fn, tops), usable)
    num = len(tops)
    climbs = jnp.sum(leader[:, None] == jnp.arange(num), 0)
    rank = lambda worth: jnp.argsort(jnp.argsort(-jnp.where(leads, worth, -jnp.inf)))  # noqa: E731
    first = jnp.minimum(2 * rank(values), 2 * rank(climbs.astype(values.dtype)) + 1)
    priority = jnp.where(leads, first, jnp.where(usable, 2 * num, 4 * num) + jnp.arange(num))
    return tops[jnp.argsort(priority)[:_NUM_TOPS]]


def diagonal_guesses(
    target: Target, starts: Float[Array, "s d"], scouts: Float[Array, "m d"]
) -> tuple[LowRank, Evaluations]:
    """Guess maps of rank zero: unit scales at starts, and narrow ones at different modes.

    Those are where L-BFGS arrives from starts and scouts. Tops between which the density does not dip count
    as one.

    Args:
        target: the density.
        starts: points of finite density, shape ``[s, d]``.
        scouts: points that lie as widely as the density may, shape ``[m, d]``.

    Returns:
        Stacked maps, leading axis ``s + 16``, or less where there are fewer climbs; and what was evaluated.
    """
    begin = jnp.concatenate([starts, scouts])
    tops, spent = jax.vmap(lambda y: climb(target.logdensity_fn, y, _CLIMB_STEPS))(begin)
    spent = jax.tree.map(jnp.sum, spent).plus(evaluations_between(len(begin)))
    tops = _distinct_tops(target.logdensity_fn, tops)
    locs = jnp.concatenate([tops, starts])
    std = jnp.where(jnp.arange(len(locs)) < len(tops), _NARROW, 1.0)[:, None] * jnp.ones_like(locs)
    num, dim = locs.shape
    maps = LowRank(locs, std, jnp.zeros((num, dim, 0), locs.dtype), jnp.zeros((num, 0), locs.dtype))
    return maps, spent.as_arrays()
