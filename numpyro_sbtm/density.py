# SPDX-License-Identifier: Apache-2.0
"""Learning a sampler of a log density, without NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sbtm.checks import whole
from numpyro_sbtm.core.maps import Map
from numpyro_sbtm.core.target import Key, LogDensity, Target
from numpyro_sbtm.learned import Settings, locate
from numpyro_sbtm.methods.base import Method
from numpyro_sbtm.methods.diffusion import Diffusion
from numpyro_sbtm.options import Correction, Search
from numpyro_sbtm.sampler import Posterior, Sampler, checked_key, trained
from numpyro_sbtm.search.ladder import StartingPoints

__all__ = ["learn_density"]

_NEAR = 0.1  # spread of starts around points, where these are few


def learn_density(
    key: Key,
    logdensity_fn: LogDensity,
    points: Float[Array, "p d"],
    *,
    num_steps: int = 1000,
    method: Method | None = None,
    precondition: Map | None = None,
    search: Search = Search(),
    correction: Correction = Correction(),
) -> Sampler:
    """Look for where a density is, and learn to draw from it where that is not enough.

    Args:
        key: random key.
        logdensity_fn: the unnormalised log density of one point of R^d.
        points: from which it is looked for, such as draws of a prior; the wider, the better are modes found.
            At least one of them of finite density, shape ``[p, d]``.
        num_steps: training steps at most.
        method: `Diffusion` or `Transport` with all that is chosen; None for `Diffusion()`.
        precondition: a map under which the density is white (see `numpyro_sbtm.core.maps.Map`); None to look
            for one.
        search: how much is looked for.
        correction: how draws are made of proposals.

    Returns:
        The sampler.

    Raises:
        ValueError: for points of another shape, or without a finite density.
        TypeError: for what is no key, number or method.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.density import learn_density
        >>> pair = lambda x: jnp.logaddexp(-0.5 * jnp.sum((x - 4) ** 2), -0.5 * jnp.sum((x + 4) ** 2))
        >>> points = 5.0 * jax.random.normal(jax.random.key(0), (100, 2))
        >>> sampler = learn_density(jax.random.key(1), pair, points, num_steps=50)
        >>> run = sampler.sample(jax.random.key(2))
        >>> round(float((run.x[..., 0] > 0).mean()), 1)
        0.5
    """
    points = jnp.asarray(points, jnp.result_type(float))
    if points.ndim != 2 or not points.size:
        raise ValueError(
            f"`points` must have shape [p, d], one or more points of R^d, got {list(points.shape)}. Pass "
            "draws of a prior, or `point[None]` for a single one."
        )
    dim, num_steps = points.shape[1], whole("num_steps", num_steps)
    if not (method is None or isinstance(method, Method)):
        raise TypeError(f"`method` must be a `Diffusion` or a `Transport`, got {method!r}.")
    settings = Settings(method or Diffusion(), search, correction)
    finite = np.asarray(jnp.isfinite(jax.jit(jax.vmap(logdensity_fn))(points)))
    if not np.any(finite):
        raise ValueError(
            f"`points` must have one of finite density, but `logdensity_fn` is finite at none of the "
            f"{len(points)}."
        )
    if precondition is None:
        settings.method.check_several()
    settings.method.check(logdensity_fn, points[0])
    key_noise, key_locate, key_train = jax.random.split(checked_key(key), 3)
    where = _starting_points(key_noise, points[finite], search)
    posterior = Posterior.of(logdensity_fn, dim)
    learned, structure = locate(
        key_locate,
        Target(logdensity_fn, dim),
        settings,
        where,
        "auto" if precondition is None else precondition,
        num_steps,
    )
    doubtful = structure.doubtful and correction.num_particles > 1
    sampler = Sampler(posterior, settings, (), learned, jnp.zeros((), bool) if doubtful else None)
    return trained(sampler, key_train) if structure.learned else sampler


def _starting_points(key: Key, points: Float[Array, "p d"], search: Search) -> StartingPoints:
    """Make starts of some points, with a little noise where they are few, and scouts of all."""
    num, dim = search.num_starts, points.shape[1]
    noise = _NEAR * jax.random.normal(key, (num, dim), points.dtype)
    starts = points[jnp.arange(num) % len(points)] + jnp.where(len(points) < num, noise, 0.0)
    scouts = points[jnp.arange(search.num_prior_draws) % len(points)]
    return StartingPoints(starts, scouts, jnp.arange(dim))
