# SPDX-License-Identifier: Apache-2.0
"""Separated modes: which fits are modes of their own, the normal distribution of each, and its mass."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import LowRank, Triangular, whiten
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.target import Key, LogDensity, Target
from numpyro_sbtm.search.climb import connected, evaluations_between, leaders
from numpyro_sbtm.search.moves import LEAPS, drift_between, hmc_moves

__all__ = [
    "MAX_MODES",
    "Mode",
    "describe_modes",
    "evaluations_per_mode",
    "fit_normal",
    "log_evidence_by_bridge",
    "num_draws",
    "on_own_side",
    "polish",
    "separate_fits",
]

MAX_MODES = 8
_MATRICES = 512  # dimensions up to which every mode has a covariance matrix; beyond it has variances
_NUM_DRAWS, _NUM_DRAWS_BEYOND = 1024, 512  # of every mode
_COMPARABLE, _PER_DIMENSION = 20.0, 0.25  # nats below the best ELBO, within which a fit may be a mode
_NUM_PAIRS = 4  # of draws, of opposite signs, for an ELBO between two fits
_SAME = 2.0  # distance of means, in deviations, below which fits are of one mode
_MERGED = 3.0  # the same for means of moved draws, which are less exact
_RIDGE = 1e-3  # towards the last covariance
_ROUNDS, _MOVES = 3, 15  # how often a mode's draws move and are fitted; HMC transitions of each round
_GAIN = 0.1  # nats by which matrices must beat variances alone
_LEAST_MASS = 1e-4
_BRIDGE_STEPS = 50
_DRIFT_ERRORS = 5.0  # there are hundreds of coordinates in several modes


class Mode(NamedTuple):
    """Draws of the target that stay in a mode.

    Attributes:
        draws: shape ``[n, d]``.
        scores: the target's scores there, shape ``[n, d]``.
        values: its log densities there, shape ``[n]``.
        drift: what `numpyro_sbtm.search.moves.drift_between` says of the last moves, shape ``[]``.
    """

    draws: Float[Array, "n d"]
    scores: Float[Array, "n d"]
    values: Float[Array, " n"]
    drift: Float[Array, ""]


def num_draws(dim: int) -> int:
    """Return how many draws there are of every mode."""
    return _NUM_DRAWS if dim <= _MATRICES else _NUM_DRAWS_BEYOND


def evaluations_per_mode(dim: int) -> Evaluations:
    """Count what `polish` and `describe_modes`, twice, evaluate for a mode."""
    moves = Evaluations(gradients=_ROUNDS * (_MOVES * LEAPS + 1))
    return Evaluations(values=3).plus(moves).times(num_draws(dim))


def separate_fits(
    key: Key, logdensity_fn: LogDensity, fits: LowRank, elbos: Float[Array, " f"]
) -> tuple[Int[Array, " K"], Bool[Array, " K"], Evaluations]:
    """Choose one fit for every mode that may count.

    Two fits are of one mode if neither the density dips between their means nor the ELBO between them, or if
    their means are close: all of it sees a separation that the norms of draws hide in many dimensions. The
    density alone would not do: a wide mode that holds as much as a narrow one is far lower, and its mean may
    lie on the narrow one's slope.

    Args:
        key: random key.
        logdensity_fn: the log density.
        fits: stacked maps, leading axis f.
        elbos: shape ``[f]``.

    Returns:
        Indices of fits, the best one first, and which of these are there, each of shape ``[MAX_MODES]``; and
        what was evaluated.
    """
    dim = fits.loc.shape[1]
    usable = elbos > jnp.max(elbos) - _COMPARABLE - _PER_DIMENSION * dim
    usable &= jnp.all(jnp.isfinite(fits.loc), -1) & jnp.all(jnp.isfinite(fits.std), -1)
    loc = jnp.where(usable[:, None], fits.loc, 0.0)
    std = jnp.where(usable[:, None], fits.std, 1.0)
    toward = (loc[:, None] - loc) ** 2 / (0.5 * (std[:, None] ** 2 + std**2))
    noise = jax.random.normal(key, (_NUM_PAIRS, dim), loc.dtype)

    def elbo(fit: Float[Array, " d2"]) -> Float[Array, ""]:
        loc, log_std = jnp.split(fit, 2)
        x = loc + jnp.exp(log_std) * jnp.concatenate([noise, -noise])
        return jnp.mean(jax.vmap(logdensity_fn)(x)) + jnp.sum(log_std)

    same = connected(elbo, jnp.concatenate([loc, jnp.log(std)], 1)) & connected(logdensity_fn, loc)
    same |= jnp.sum(toward, -1) < _SAME**2
    order = jnp.argsort(-elbos)
    first, _ = leaders(order, same, usable)
    chosen = order[jnp.argsort(~first[order])][:MAX_MODES]
    spent = evaluations_between(len(loc))
    return chosen, first[chosen], spent.times(1 + 2 * _NUM_PAIRS)


def fit_normal(
    u: Float[Array, "n d"], score: Float[Array, "n d"], diagonal: bool
) -> tuple[Float[Array, " d"], Float[Array, "..."]]:
    """Fit a normal distribution to points and a density's scores there.

    It has the least Fisher divergence: its covariance is the geometric mean of the points' covariance C and
    of the inverse of the scores' S, the solution of Σ S Σ = C. That is exact for a normal density, wherever
    more than d points are. A ridge draws it a little towards the identity.

    Args:
        u: the points, shape ``[n, d]``.
        score: shape ``[n, d]``.
        diagonal: whether to fit variances alone.

    Returns:
        The mean, shape ``[d]``, and the covariance, shape ``[d, d]``, or the variances, shape ``[d]``.

    Reference:
        Cai et al. (2024), Batch and match, arXiv:2402.14758; Bhatia (2007), Positive definite matrices,
        chapter 4 (the geometric mean).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.search.modes import fit_normal
        >>> u = jax.random.normal(jax.random.key(0), (50, 2))
        >>> mean, cov = fit_normal(u, -(u - 3.0) / jnp.array([1.0, 2.0]), False)
        >>> mean.round(1).tolist(), jnp.abs(cov).round(1).tolist()
        ([3.0, 3.0], [[1.0, 0.0], [0.0, 2.0]])
    """
    centre, pull = jnp.mean(u, 0), jnp.mean(score, 0)
    if diagonal:
        variance = jnp.sqrt((jnp.var(u, 0) + _RIDGE) / (jnp.var(score, 0) + _RIDGE))
        return centre + variance * pull, variance
    points, scores = u - centre, score - pull
    ridge = _RIDGE * jnp.eye(u.shape[1], dtype=u.dtype)
    inner, vectors = jnp.linalg.eigh(scores.T @ scores / len(u) + ridge)
    root = (vectors * jnp.sqrt(inner)) @ vectors.T
    inverse_root = (vectors / jnp.sqrt(inner)) @ vectors.T
    middle, turn = jnp.linalg.eigh(root @ (points.T @ points / len(u) + ridge) @ root)
    half = inverse_root @ (turn * jnp.maximum(middle, 1e-12) ** 0.25)
    cov = half @ half.T
    return centre + cov @ pull, cov


def on_own_side(
    fits: LowRank, there: Bool[Array, " K"], k: Int[Array, ""], x: Float[Array, " d"]
) -> Bool[Array, ""]:
    """Say whether a point lies on mode k's side of the planes midway between its mean and the others'.

    The sides part the space, so that masses add up, and moves do not carry draws to a mode that is near.
    """
    variance = 0.5 * (fits.std[k] ** 2 + fits.std**2)
    beyond = jnp.sum((fits.loc - fits.loc[k]) / variance * (x - 0.5 * (fits.loc + fits.loc[k])), -1)
    return ~jnp.any(there & (beyond > 0.0))


def polish(key: Key, logdensity_fn: LogDensity, loc: Float[Array, " d"], std: Float[Array, " d"]) -> Mode:
    """Draw from the target within a mode, by HMC from a fit without correlations.

    Normal distributions are fitted to the draws and their scores (see `fit_normal`), whiten what follows, and
    so on.

    Args:
        key: random key.
        logdensity_fn: the target's log density, very low beyond the mode (see `on_own_side`).
        loc: the mode's mean, shape ``[d]``.
        std: its deviations, shape ``[d]``.

    Returns:
        The draws. They cost `evaluations_per_mode`.
    """
    dim = len(loc)
    diagonal = dim > _MATRICES
    times: Callable[..., Array] = jnp.multiply if diagonal else jnp.matmul
    one = jnp.ones_like(loc) if diagonal else jnp.eye(dim, dtype=loc.dtype)
    key_start, key_rounds = jax.random.split(key)
    noise = jax.random.normal(key_start, (num_draws(dim), dim), loc.dtype)

    def improve(carry, key: Key):  # type: ignore[no-untyped-def]
        mean, root, inverse, x = carry[:4]

        def push(u: Float[Array, " d"]) -> Float[Array, " d"]:
            return mean + std * times(root, u)

        u = jax.vmap(lambda y: times(inverse, (y - mean) / std))(x)
        states = hmc_moves(key, lambda u: logdensity_fn(push(u)), u, _MOVES)
        moved, score = states.position, states.logdensity_grad
        centre, cov = fit_normal(moved, jnp.where(jnp.isfinite(score), score, 0.0), diagonal)
        if diagonal:
            stretch, shrink = jnp.sqrt(cov), 1.0 / jnp.sqrt(cov)
        else:
            variance, vectors = jnp.linalg.eigh(cov)
            stretch = vectors * jnp.sqrt(variance)
            shrink = (vectors / jnp.sqrt(variance)).T
        good = jnp.all(jnp.isfinite(stretch)) & jnp.all(jnp.isfinite(centre))
        new = push(centre), times(root, stretch), times(shrink, inverse)
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (mean, root, inverse))
        of_x = jax.vmap(lambda g: times(inverse.T, g) / std)(score)
        return (
            *kept,
            jax.vmap(push)(moved),
            of_x,
            states.logdensity,
            drift_between(u, moved, _DRIFT_ERRORS),
        ), None

    x = loc + std * noise
    x = jnp.where(jnp.isfinite(jax.vmap(logdensity_fn)(x))[:, None], x, loc)
    carry = loc, one, one, x, x, x[:, 0], jnp.zeros((), x.dtype)
    (_, _, _, *found), _ = jax.lax.scan(improve, carry, jax.random.split(key_rounds, _ROUNDS))
    return Mode(*found)


def log_evidence_by_bridge(proposed: Float[Array, " n"], drawn: Float[Array, " n"]) -> Float[Array, ""]:
    """Estimate log Z from log ratios of target to proposal, at draws of the proposal and of the target.

    Errors are far smaller than those of the mean weight where the two overlap in part.

    Args:
        proposed: log ratios at draws of the proposal, shape ``[n]``.
        drawn: log ratios at draws of the target, shape ``[n]``.

    Reference:
        Bennett (1976), Efficient estimation of free energy differences; Meng & Wong (1996), eq. 4.1.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.search.modes import log_evidence_by_bridge
        >>> u = jax.random.normal(jax.random.key(0), (2, 4000))
        >>> log_ratio = lambda x: 3.0 + 0.5 - x  # exp(3) N(1, 1) over N(0, 1), but for the sign of x
        >>> round(float(log_evidence_by_bridge(log_ratio(u[0]), log_ratio(u[1] - 1.0))), 1)
        4.0
    """

    def improve(_: Int[Array, ""], log_z: Float[Array, ""]) -> Float[Array, ""]:
        forward, backward = logsumexp(log_sigmoid(proposed - log_z)), logsumexp(log_sigmoid(log_z - drawn))
        return log_z + 0.5 * (forward - backward)

    return jax.lax.fori_loop(0, _BRIDGE_STEPS, improve, 0.5 * (jnp.median(proposed) + jnp.median(drawn)))


def _held_out(u: Float[Array, "n d"], score: Float[Array, "n d"], diagonal: bool) -> Float[Array, ""]:
    """Average over one half the log density of the normal distribution fitted to the other."""
    half = len(u) // 2
    mean, cov = fit_normal(u[:half], score[:half], diagonal)
    centred = u[half:] - mean
    if diagonal:
        return -0.5 * jnp.mean(jnp.sum(centred**2 / cov, -1)) - 0.5 * jnp.sum(jnp.log(cov))
    variance, vectors = jnp.linalg.eigh(cov)
    z = centred @ vectors
    return -0.5 * jnp.mean(jnp.sum(z**2 / variance, -1)) - 0.5 * jnp.sum(jnp.log(variance))


def describe_modes(
    key: Key,
    target: Target,
    whitening: LowRank | Triangular,
    fits: LowRank,
    there: Bool[Array, " K"],
    modes: Mode,
) -> Mixture:
    """Make the mixture of the modes' normal distributions, weighted by bridge estimates of their evidence.

    Components without correlations where these gain next to nothing: their rotations are then the identity.

    Args:
        key: random key.
        target: the density.
        whitening: an affine map, in whose coordinates the mixture is.
        fits: those that the modes were polished from, leading axis K.
        there: which of them are there, shape ``[K]``.
        modes: their draws, leading axis K.

    Returns:
        The mixture. The log weight of a mode that is not there is minus infinity; so is that of one of mass
        below 1e-4 of the largest, or with the mean of a larger one, which then has the mass of both.
    """
    dim = target.dim
    white = whiten(target, whitening)
    pull_back = jax.vjp(lambda u: whitening.forward(u)[0], jnp.zeros(dim, modes.draws.dtype))[1]
    u = jax.vmap(jax.vmap(lambda x: whitening.inverse(x)[0]))(modes.draws)
    score = jax.vmap(jax.vmap(lambda g: pull_back(g)[0]))(modes.scores)
    log_det = whitening.forward(u[0, 0])[1]

    def or_nothing(fit, there, *arguments):  # type: ignore[no-untyped-def]
        shapes = jax.eval_shape(fit, *arguments)
        blank = lambda *_: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
        return jax.lax.cond(there, fit, blank, *arguments)

    def flat(u, score):  # type: ignore[no-untyped-def]
        return *fit_normal(u, score, True), _held_out(u, score, True)

    def full(u, score):  # type: ignore[no-untyped-def]
        mean, cov = fit_normal(u, score, False)
        variance, vectors = jnp.linalg.eigh(cov)
        return vectors.T @ mean, variance, vectors, _held_out(u, score, False)

    each = lambda fit: jax.lax.map(lambda one: or_nothing(fit, *one), (there, u, score))  # noqa: E731
    centre, variance, flat_score = each(flat)
    means, variances, rotation = centre, variance, None
    if dim <= _MATRICES:
        turned, turned_variance, vectors, full_score = each(full)
        worth = jnp.nan_to_num(full_score - flat_score)
        use = jnp.max(jnp.where(there, worth, 0.0)) > _GAIN
        centre, variance = jnp.where(use, turned, centre), jnp.where(use, turned_variance, variance)
        rotation = jnp.where(use, vectors, jnp.eye(dim, dtype=vectors.dtype))
        rotation = jnp.where(there[:, None, None], rotation, jnp.eye(dim, dtype=vectors.dtype))
    std = jnp.where(there[:, None], jnp.sqrt(variance), 1.0)
    mixture = Mixture(jnp.zeros(len(there), std.dtype), rotation, centre, std)

    def evidence(
        key: Key, k: Int[Array, ""], one: Mixture, u: Float[Array, "n d"], values: Float[Array, " n"]
    ) -> Float[Array, ""]:
        one = jax.tree.map(lambda leaf: leaf[None], one)
        draws = jax.vmap(one.sample)(jax.random.split(key, len(u)))
        proposed = jax.vmap(lambda v: white.logdensity_fn(v) - one.log_prob(v))(draws)
        own = jax.vmap(lambda v: on_own_side(fits, there, k, whitening.forward(v)[0]))(draws)
        drawn = values + log_det - jax.vmap(one.log_prob)(u)
        return log_evidence_by_bridge(jnp.where(own & jnp.isfinite(proposed), proposed, -1e6), drawn)

    keys = jax.random.split(key, len(there))
    log_z = jax.lax.map(
        lambda one: or_nothing(evidence, *one),
        (there, keys, jnp.arange(len(there)), mixture, u, modes.values),
    )
    log_z = jnp.where(there & jnp.isfinite(log_z), log_z, -jnp.inf)
    toward = (means[:, None] - means) ** 2 / (0.5 * (variances[:, None] + variances) + 1e-12)
    same = jnp.sum(toward, -1) < _MERGED**2
    leads, leader = leaders(jnp.argsort(-log_z), same, jnp.isfinite(log_z))
    # halves of one mode have one mean: the larger stands for both
    joined = logsumexp(jnp.where(leader == jnp.arange(len(there))[:, None], log_z, -jnp.inf), 1)
    kept = leads & (joined > jnp.max(joined) + jnp.log(_LEAST_MASS))
    return mixture._replace(log_weight=jax.nn.log_softmax(jnp.where(kept, joined, -jnp.inf)))
