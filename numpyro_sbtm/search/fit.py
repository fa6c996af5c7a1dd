# SPDX-License-Identifier: Apache-2.0
"""Maps that are fitted to a target from several first guesses, and what covers them all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import LowRank, Triangular
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.search.ascent import LOW_RANK, TRIANGULAR, likely_radius, maximise_elbos
from numpyro_sbtm.search.guesses import sorted_density

__all__ = ["Fit", "fit", "fit_low_rank"]

_SEPARATE = 4.0  # squared distance of a fit from the mean, in pooled deviations, that makes it a mode
_COUNTS = 0.01  # share of the evidence from which a fit is one of the modes
_NUM_TEST = 512  # draws that compare fits
_COMPARABLE = 20.0  # nats below the best ELBO, within which a fit elsewhere may be another mode
_SURVIVORS = 4


class Fit(NamedTuple):
    """What variational inference from several starts found.

    Attributes:
        best: the map of the best ELBO.
        pooled: an affine map with the pooled covariance within and between the fits, widened.
        separate: whether fits of similar ELBO lie apart, as they do for separated modes, or few of many lie
            where the best one does, or the pooled map suits the draws of all better, shape ``[]``.
        elbos: the ELBO of every fit, shape ``[f]``.
        draws: draws from every fit, those of failed fits not finite, shape ``[f, t, d]``.
        spent: what was evaluated, also before.
    """

    best: Triangular
    pooled: Triangular
    separate: Bool[Array, ""]
    elbos: Float[Array, " f"]
    draws: Float[Array, "f t d"]
    spent: Evaluations


def _regular(cov: Float[Array, "d d"]) -> Float[Array, "d d"]:
    dim = cov.shape[0]
    return cov + 1e-6 * jnp.trace(cov) / dim * jnp.eye(dim)


def _squared_distance(toward: Float[Array, "f d"], cov: Float[Array, "d d"]) -> Float[Array, " f"]:
    """Compute squared Mahalanobis distances."""
    return jnp.sum(toward * jnp.linalg.solve(cov, toward.T).T, -1)


def _shares(elbos: Float[Array, " f"], draws: Float[Array, "f t d"]) -> Float[Array, " f"]:
    """Weigh the fits: by their evidence, but all that are comparable alike where they are scattered.

    Where few fits came to the best one's place, it is one of many modes, and only the widest.
    """
    first, dim = jnp.argmax(elbos), draws.shape[-1]
    comparable = elbos > elbos[first] - _COMPARABLE
    centre = jnp.mean(draws, 1)
    toward = jnp.where(comparable[:, None], centre - centre[first], 0.0)
    distance = _squared_distance(toward, _regular(jnp.cov(draws[first].T).reshape(dim, dim)))
    near = comparable & (distance < likely_radius(dim))
    scattered = (jnp.sum(comparable) > 4 * jnp.sum(near)) & (2 * jnp.sum(comparable) > len(elbos))
    return jnp.where(scattered, comparable / jnp.sum(comparable), jax.nn.softmax(elbos))


def _mean_log_density(
    whitening: Triangular, weight: Float[Array, " f"], x: Float[Array, "f t d"]
) -> Float[Array, ""]:
    """Average the log density that a map gives to weighted fits' draws, up to a constant."""
    u, log_det = jax.vmap(jax.vmap(lambda y: whitening.inverse(y)))(x)
    value = jnp.mean(-0.5 * jnp.sum(u * u, -1) - log_det, 1)
    return jnp.sum(jnp.where(weight > _COUNTS, weight * jnp.nan_to_num(value, nan=-jnp.inf), 0.0))


def _pool(
    fits: Triangular, elbos: Float[Array, " f"], draws: Float[Array, "f t d"], spent: Evaluations
) -> Fit:
    """Choose the best of several fits, and cover them all."""
    best = jax.tree.map(lambda leaf: leaf[jnp.argmax(elbos)], fits)
    dim = best.loc.shape[0]
    weight = _shares(elbos, draws)
    x = jnp.where(weight[:, None, None] > 1e-6, draws, 0.0)  # a failed fit may hold anything
    means = jnp.mean(x, 1)
    mean = weight @ means
    centred = x - means[:, None]
    within = _regular(jnp.einsum("s,sni,snj->ij", weight, centred, centred) / x.shape[1])
    toward = means - mean
    between = jnp.einsum("s,si,sj->ij", weight, toward, toward)
    ratio = jnp.max(jnp.where(weight > _COUNTS, _squared_distance(toward, within), 0.0))
    # a few fits span a few directions only: spread them over all coordinates
    pooled_cov = within + between + jnp.diag(jnp.diagonal(between))
    tril = jnp.linalg.cholesky(pooled_cov)
    regular = jnp.all(jnp.isfinite(tril))
    pooled = Triangular.affine(mean, jnp.where(regular, tril, jnp.eye(dim)), best.order)
    unsort = jnp.argsort(best.order)
    # a curved map may leave out what other fits found, although they overlap: a banana's other arm
    some = x[:, ::8, unsort]
    covers = _mean_log_density(pooled, weight, some) > _mean_log_density(best, weight, some)
    separate = regular & ((ratio > _SEPARATE) | covers)
    return Fit(best, pooled, separate, elbos, draws[..., unsort], spent)


def fit(key: Key, target: Target, guesses: Triangular, *, num_draws: int = 8) -> Fit:
    """Fit a whitening to a target from several first guesses.

    Each is improved by stochastic variational inference over `Triangular` maps, and the best ELBO wins.
    Where fits of similar ELBO lie apart, few lie where the best one does, or the pooled map suits the draws
    of all better, separated modes are within reach of N(0, I) under the pooled map.

    Args:
        key: random key.
        target: the density.
        guesses: stacked affine maps of one order, leading axis f (see
            `numpyro_sbtm.search.guesses.first_guesses`).
        num_draws: draws per step of each fit, an even number.

    Returns:
        The fits. Costs 150 target gradients for each of ``f num_draws`` draws, and 1,250 to 3,000 for each
        of those of the four that survive.

    Reference:
        Kucukelbir et al. (2017), arXiv:1603.00788 (the inference); the maps: see `Triangular`.
    """
    logdensity_fn = sorted_density(target, guesses.order[0])
    # a heavy tail is no place for squares: every other fit does without shears
    on = jnp.arange(len(guesses.loc)) % 2
    guesses = guesses._replace(shears=jnp.ones_like(guesses.shears) * on[:, None, None, None])
    return _pool(*maximise_elbos(key, logdensity_fn, TRIANGULAR, guesses, num_draws, _NUM_TEST, _SURVIVORS))


def fit_low_rank(
    key: Key, target: Target, guesses: LowRank, *, num_draws: int = 16
) -> tuple[LowRank, Float[Array, " f"], Evaluations]:
    """Improve low-rank maps by stochastic variational inference, their bases as they are; memory linear in d.

    Args:
        key: random key.
        target: the density.
        guesses: stacked maps, leading axis f.
        num_draws: draws per step of each fit, an even number.

    Returns:
        The maps, stacked; their ELBOs, minus infinity for those that failed; and what was evaluated.
    """
    fits, elbos, _, spent = maximise_elbos(key, target.logdensity_fn, LOW_RANK, guesses, num_draws, num_draws)
    return fits, elbos, spent
