# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood over whitening maps, for points."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.algorithm import guarded_update
from numpyro_sbtm.core.maps import Triangular
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.search.ascent import TRIANGULAR, Shape

__all__ = ["fit_points"]

_NUM_UPDATES, _BATCH_SIZE, _RATE = 800, 512, 0.01
_RIDGE = 1e-6  # added to a correlation matrix


def fit_points(key: Key, points: Float[Array, "n d"], order: Int[Array, " d"]) -> Triangular:
    """Fit a whitening to points by penalised maximum likelihood, from the affine map of their moments.

    It covers all that the points do, tails and necks as well, where variational inference cuts off what does
    not suit its family. The sum of what is free below the diagonals is penalised in absolute value, by one
    standard error 1/√n each, since most of it is zero in truth: 3/2 d² parameters would otherwise fit noise.
    An update with a gradient that is not finite is skipped.

    Args:
        key: random key.
        points: shape ``[n, d]``.
        order: a permutation of the coordinates, hyperparameters first, shape ``[d]``.

    Returns:
        The map. Nothing is evaluated.

    Reference:
        Parno & Marzouk (2018), Transport map accelerated Markov chain Monte Carlo, arXiv:1412.5492: maps
        fitted to samples, and moves under them.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.search.fit_points import fit_points

        >>> z = jax.random.normal(jax.random.key(0), (2000, 2))
        >>> funnel = jnp.stack([z[:, 0], jnp.exp(z[:, 0]) * z[:, 1]], 1)
        >>> fitted = fit_points(jax.random.key(1), funnel, jnp.arange(2))
        >>> u = jax.vmap(lambda x: fitted.inverse(x)[0])(funnel)
        >>> bool(jnp.max(jnp.abs(u)) < 6.0), bool(jnp.max(jnp.abs(funnel[:, 1] / funnel[:, 1].std())) > 6.0)
        (True, True)
    """
    n, dim = points.shape
    sorted_points = points[:, order]
    mean, std = jnp.mean(sorted_points, 0), jnp.maximum(jnp.std(sorted_points, 0), 1e-30)
    z = (sorted_points - mean) / std
    tril = jnp.linalg.cholesky(z.T @ z / n + _RIDGE * jnp.eye(dim))
    guess = Triangular.affine(mean, std[:, None] * tril, order)
    optimiser = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(_RATE, _NUM_UPDATES))
    )

    def loss(shape: Shape, batch: Float[Array, "b d"]) -> Float[Array, ""]:
        u, log_det = jax.vmap(lambda x: TRIANGULAR.build(guess, shape).inverse(x))(batch)
        free = (jnp.tril(part, -1) for part in (shape.scale, shape.log_scale_slope, shape.shift_slope))
        penalty = sum(jnp.sum(jnp.abs(part)) for part in free) / n**0.5
        return jnp.mean(0.5 * jnp.sum(u * u, -1) + log_det) + penalty

    def update(carry, key: Key):  # type: ignore[no-untyped-def]
        shape, opt_state = carry
        batch = points[jax.random.randint(key, (min(n, _BATCH_SIZE),), 0, n)]
        shape, opt_state, _ = guarded_update(optimiser, jax.grad(loss)(shape, batch), opt_state, shape)
        return (shape, opt_state), None

    first = TRIANGULAR.blank(guess)
    keys = jax.random.split(key, _NUM_UPDATES)
    (shape, _), _ = jax.lax.scan(update, (first, optimiser.init(first)), keys)
    return TRIANGULAR.build(guess, shape)
