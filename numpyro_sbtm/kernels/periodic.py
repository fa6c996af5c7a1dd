# SPDX-License-Identifier: Apache-2.0
"""Directions without a proper prior: angles are made proper, flat ones are refused."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float
from numpyro.distributions import (
    ExpandedDistribution,
    ImproperUniform,
    Independent,
    MaskedDistribution,
    TransformedDistribution,
    Unit,
    constraints,
)

from numpyro_sbtm.core.target import Key, LogDensity
from numpyro_sbtm.search.climb import climb

__all__ = [
    "Direction",
    "find_centres",
    "has_proper_priors",
    "improper_directions",
    "log_window",
    "spread",
    "window_log_density",
    "wrap",
]

_PERIOD = 2.0 * np.pi
_EDGE = 0.5  # standard deviation of a window's edges
_TAIL = -15.0  # from here on log Φ is written as a series, as the derivative of JAX's fails in float32
_TURNS = (0.37, -0.21, 0.5)  # of a period: what any density that depends on an angle feels
_PERIODS = (1.0, 32.0, 1e3, 3e4)  # far enough for a wide prior, written as a factor, to be felt
_FAR = (1e10, 1e12, 1e14)  # on the line: beyond all data, with squares that are finite in float32
_FAR_LOGS = (20.0, 40.0, 80.0)  # where the line is the logarithm of a distance from a bound
_EPS = float(np.finfo(np.float32).eps)  # models may be of single precision, whatever their points are
_JITTER = 0.3
_NUM_TESTED = 8  # points from which a coordinate is moved
_CHUNK = 256  # moves in one call
_CLIMB_STEPS = 100
_HALF_LINES = (
    constraints.greater_than,
    constraints.greater_than_eq,
    constraints.less_than,
    constraints.less_than_eq,
)
_TOPS, _GRID = 4, 48  # points where climbs end, angles around each


def log_window(angle: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Evaluate a smooth window over one period, whose copies, 2π apart, sum to one everywhere.

    It is log(Φ((u+π)/s) - Φ((u-π)/s)), with s = 1/2: the sum over all copies telescopes. A density of period
    2π times the window is proper, and wrapped into one period it is what it was, with the same integral. At
    the middle of the next period the window is 2e-10, so that a sharp density has no copies worth finding,
    and its edges are as soft as that allows.

    Args:
        angle: distances u from the centre of the window, of any shape.

    Returns:
        The logarithm, of the same shape; it and its derivative are finite at any distance whose square is.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.kernels.periodic import log_window
        >>> copies = 2.0 + 2 * jnp.pi * jnp.arange(-3, 4)
        >>> round(float(jnp.sum(jnp.exp(log_window(copies)))), 6)
        1.0
    """
    away = jnp.abs(angle)
    near, far = _log_ndtr((np.pi - away) / _EDGE), _log_ndtr((-np.pi - away) / _EDGE)
    # the difference is -22 at least; far away it is lost in rounding
    return near + jnp.log1p(-jnp.exp(jnp.minimum(far - near, -20.0)))


def _log_ndtr(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Evaluate log Φ with a derivative that does not come from a difference of large numbers."""
    t = jnp.maximum(-x, -_TAIL)
    r = t**-2
    tail = -0.5 * t * t - jnp.log(t * np.sqrt(2 * np.pi)) + jnp.log1p(-r + 3 * r**2 - 15 * r**3 + 105 * r**4)
    return jnp.where(x < _TAIL, tail, log_ndtr(jnp.maximum(x, _TAIL)))


def window_log_density(x: Float[Array, "*n d"], centre: np.ndarray) -> Float[Array, "*n"]:
    """Sum the log windows of all periodic coordinates.

    Args:
        x: points, with any leading axes.
        centre: centres of the windows, NaN for coordinates that are not periodic, shape ``[d]``.

    Returns:
        What to add to the log density.
    """
    index = np.flatnonzero(~np.isnan(centre))
    return jnp.sum(log_window(x[..., index] - centre[index].astype(x.dtype)), -1)


def wrap(x: Float[Array, "*n d"], centre: np.ndarray) -> Float[Array, "*n d"]:
    """Put periodic coordinates of points into the period around the centre, shape ``[d]``, NaN elsewhere."""
    index = np.flatnonzero(~np.isnan(centre))
    turns = jnp.round((x[..., index] - centre[index].astype(x.dtype)) / _PERIOD)
    return x.at[..., index].add((-_PERIOD * turns).astype(x.dtype)) if len(index) else x


def spread(key: Key, x: Float[Array, "*n d"], centre: np.ndarray) -> Float[Array, "*n d"]:
    """Draw the periodic coordinates of points anew, uniformly on their circles; centre as in `wrap`."""
    index = np.flatnonzero(~np.isnan(centre))
    if not len(index):
        return x
    angle = jax.random.uniform(key, (*x.shape[:-1], len(index)), x.dtype, -np.pi, np.pi)
    return x.at[..., index].set(centre[index].astype(x.dtype) + angle)


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution | TransformedDistribution):
        fn = fn.base_dist
    return fn


class Direction(NamedTuple):
    """A coordinate of the unconstrained space whose site has no proper prior.

    Attributes:
        name: of the site, with an index where it has several.
        real: whether the site lies on the real line; otherwise it is bounded on one side.
        circular: whether `CircularReparam` made it, so that it is periodic even if nothing depends on it.
    """

    name: str
    real: bool
    circular: bool


def improper_directions(trace: dict[str, Any], prototype: dict[str, Any]) -> dict[int, Direction]:
    """List the coordinates without a proper prior, on the real line or a part of it bounded on one side.

    Args:
        trace: of a model.
        prototype: arrays like the unconstrained values of its latent sites, flattened in sorted order.

    Returns:
        By their place in the flattened space.
    """
    found: dict[int, Direction] = {}
    first = 0
    for name in sorted(prototype):
        shape, fn = prototype[name].shape, trace[name]["fn"]
        support = fn.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        real = support is constraints.real
        if isinstance(_base(fn), ImproperUniform) and (real or isinstance(support, _HALF_LINES)):
            wrapped = name.removesuffix("_unwrapped")
            circular = real and wrapped != name and f"{wrapped}_factor" in trace
            for k, index in enumerate(np.ndindex(*shape)):
                label = f"{name}[{', '.join(map(str, index))}]" if shape else name
                found[first + k] = Direction(label, real, circular)
        first += prototype[name].size
    return found


def has_proper_priors(trace: dict[str, Any], prototype: dict[str, Any]) -> bool:
    """Say whether all priors are proper, as far as that is known, and no factor may undo them.

    Args:
        trace: of a model.
        prototype: arrays like the unconstrained values of its latent sites.
    """
    sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
    if any(isinstance(_base(site["fn"]), Unit) for site in sites.values()):  # a factor
        return False
    return all(_is_proper(sites[name]) for name in prototype)


def _is_proper(site: dict[str, Any]) -> bool:
    fn, base = site["fn"], _base(site["fn"])
    while fn is not base:
        if isinstance(fn, MaskedDistribution):
            return False
        fn = fn.base_dist
    known = type(base).__module__.startswith("numpyro.distributions")
    return known and not isinstance(base, ImproperUniform) and site["scale"] is None


def find_centres(
    density: LogDensity,
    points: Float[Array, "n d"],
    directions: dict[int, Direction],
) -> np.ndarray:
    """Find out in which directions without a proper prior a density is periodic, and where to cut circles.

    Each coordinate is moved, at several points, by parts of a period, by periods, and to great distances. It
    is periodic if periods change nothing and their parts do; it is flat if nothing changes anything.

    The window of a circle is centred at the mean angle around the highest points of some climbs, so that it
    does not cut a mode in two: two halves of a mode on each of n circles would be 2^n modes.

    Args:
        density: the log density.
        points: points of finite density, different from one another, shape ``[n, d]``.
        directions: the coordinates without a proper prior, one at least.

    Returns:
        The centres of the windows, NaN for coordinates that are not periodic, shape ``[d]``.

    Raises:
        ValueError: if a direction without a proper prior is flat: the posterior is improper.
    """
    probe = _prober(density)
    index, candidates = np.array(list(directions)), list(directions.values())
    periods = _PERIOD * np.array([*_PERIODS, *(-k for k in _PERIODS)])
    near = np.concatenate([[0.0], _PERIOD * np.array(_TURNS), periods])
    far = np.array([_FAR if candidate.real else _FAR_LOGS for candidate in candidates])
    moves = np.concatenate([np.broadcast_to(near, (len(index), len(near))), far, -far], 1)
    # a strategy may have put all points at the same place
    noise = _JITTER * jax.random.normal(jax.random.key(0), points.shape, points.dtype)
    finite = np.isfinite(probe(points + noise, np.zeros(1, int), np.zeros(1))[0])
    points = jnp.where(finite, points + noise, points)
    tested = points[:_NUM_TESTED]
    value, slope = (
        part.reshape(len(tested), *moves.shape)
        for part in probe(tested, np.repeat(index, moves.shape[1]), moves.ravel())
    )
    size = np.abs(np.asarray(tested))[:, index, None] + np.abs(moves)
    periodic = np.zeros(len(index), bool)
    for k, (name, real, circular) in enumerate(candidates):
        periodic[k] = real and _is_periodic(
            *(part[:, k, : len(near)] for part in (value, slope, size)), circular=circular
        )
        if not periodic[k] and _is_flat(value[:, k], slope[:, k], moves[k], real):
            raise ValueError(
                f"Site `{name}` has an improper prior (`ImproperUniform`) and the data do not bound it: the "
                "log density does not depend on it, so that the posterior is improper. Give it a proper "
                "prior, such as `dist.Normal(0, 10)`."
            )
    centre = np.full(points.shape[1], np.nan)
    if np.any(periodic):
        index = index[periodic]
        centre[index] = _mean_angles(density, probe, points, index)
    return centre


def _prober(density: LogDensity) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Make a function that moves one coordinate of each point, and returns the density's value and slope."""

    @jax.jit
    def evaluate(points: Array, which: Array, index: Array, move: Array) -> tuple[Array, Array]:
        def one(k: Array, i: Array, t: Array) -> tuple[Array, Array]:
            value, score = jax.value_and_grad(density)(points[k].at[i].add(t))
            return value, score[i]

        return jax.vmap(one)(which, index, move)

    def probe(points: Array, index: np.ndarray, move: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        which, column = (part.ravel() for part in np.indices((len(points), len(index))))
        values = []
        for first in range(0, len(which), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            missing = max(0, first + _CHUNK - len(which))  # one program for any number of moves
            values.append(
                evaluate(
                    points,
                    np.pad(which[chunk], (0, missing)),
                    np.pad(index[column[chunk]], (0, missing)),
                    np.pad(move[column[chunk]], (0, missing)).astype(points.dtype),
                )
            )
        shape = len(points), len(index)
        value, slope = (
            np.concatenate(parts)[: len(which)].reshape(shape) for parts in zip(*values, strict=True)
        )
        return value.astype(float), slope.astype(float)

    return probe


def _is_periodic(value: np.ndarray, slope: np.ndarray, size: np.ndarray, *, circular: bool) -> bool:
    """Say whether moves by periods change nothing, and moves by parts of a period do.

    Args:
        value: log densities: unmoved, moved by parts of a period, and by periods, shape ``[n, moves]``.
        slope: derivatives there, of the same shape.
        size: bounds of the coordinate, which is rounded to so many digits, of the same shape.
        circular: whether no change at all is a circle too.
    """
    if not (np.all(np.isfinite(value)) and np.all(np.isfinite(slope))):
        return False
    first = 1 + len(_TURNS)
    steepest = np.max(np.abs(slope[:, :first]))
    rounding = 32 * _EPS * np.max(np.abs(value)) + 8 * _EPS * size * steepest
    change, turn = np.abs(value - value[:, :1]), np.abs(slope - slope[:, :1])
    same = np.all((change <= rounding)[:, first:])
    # by one period, where the slope is hardly rounded
    same &= np.all(turn[:, [first, first + len(_PERIODS)]] <= 0.01 * steepest)
    # around a circle slopes change their sign, even where the log density is too large to show a change
    varies = np.max(turn[:, 1:first]) > 0.05 * steepest > 0.0
    return bool(same and (varies or circular))


def _is_flat(value: np.ndarray, slope: np.ndarray, move: np.ndarray, real: bool) -> bool:
    """Say whether no move changes the density of a site.

    Args:
        value: log densities, the first column where nothing was moved, shape ``[n, moves]``.
        slope: derivatives there, of the same shape.
        move: by how much, shape ``[moves]``.
        real: whether distances are those of the site itself, or logarithms, whose density has the factor e^u.
    """
    if not real:
        # longer moves would overflow
        short = np.abs(move) <= max(_FAR_LOGS)
        value, slope = (value - move)[:, short], (slope - 1.0)[:, short]
    if not (np.all(np.isfinite(value)) and np.all(np.isfinite(slope))):
        return False
    rounding = 32 * _EPS * (1.0 + np.max(np.abs(value)) + (0.0 if real else max(_FAR_LOGS)))
    # slopes are not lost in a large log density: what bounds the site is steep far away
    return bool(np.max(np.abs(value - value[:, :1])) <= rounding and np.max(np.abs(slope)) <= 1e-4)


def _mean_angles(
    density: LogDensity,
    probe: Callable[..., tuple[np.ndarray, np.ndarray]],
    points: Float[Array, "n d"],
    index: np.ndarray,
) -> np.ndarray:
    """Find the angles from which the mean squared distance, around the highest points, is least."""
    # evenly spread over the circles (Weyl's sequence), each coordinate in its own order
    order = np.arange(1, len(points) + 1)[:, None] * np.sqrt(np.arange(2, len(index) + 2))
    points = points.at[:, index].set(_PERIOD * (order * 0.618 % 1.0 - 0.5))
    tops = jax.jit(jax.vmap(lambda x: climb(density, x, _CLIMB_STEPS)[0]))(points)
    value = probe(tops, np.zeros(1, int), np.zeros(1))[0][:, 0]
    tops = tops[np.argsort(-np.where(np.isfinite(value), value, -np.inf))[:_TOPS]]
    grid = _PERIOD * np.arange(_GRID) / _GRID
    value, _ = probe(tops, np.repeat(index, _GRID), np.tile(grid, len(index)))
    value = np.where(np.isfinite(value), value, -np.inf).reshape(len(tops), len(index), _GRID)
    angle = np.asarray(tops)[:, index, None] + grid
    weight = np.exp(value - np.max(value, (0, 2), keepdims=True, initial=-1e300))
    distance = (grid[:, None, None, None] - angle + np.pi) % _PERIOD - np.pi
    spread = np.sum(distance**2 * weight, (1, 3))
    return (grid[np.argmin(spread, 0)] + np.pi) % _PERIOD - np.pi
