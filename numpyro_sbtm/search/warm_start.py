# SPDX-License-Identifier: Apache-2.0
"""The warm start: where the posterior is, before anything is learned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.compile import Stage
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import Triangular, whiten
from numpyro_sbtm.core.maps.spline import fit_margins, identity_margins
from numpyro_sbtm.core.mixture import Mixture, fit_mixture, max_components, numbers_of_components
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.belonging import FOUND, belong
from numpyro_sbtm.search.blank import padded_normal, unsearched
from numpyro_sbtm.search.fit import Fit, fit
from numpyro_sbtm.search.fit_points import fit_points
from numpyro_sbtm.search.guesses import first_guesses
from numpyro_sbtm.search.moves import LEAPS, drift_between, hmc_moves
from numpyro_sbtm.search.temper import MAX_TEMPERATURES, covering, tempered_particles
from numpyro_sbtm.search.wide import wide_warm_start

__all__ = ["Cloud", "warm_start"]

_PLAIN, _MARGINS = 0, 1  # what comes after a map: nothing, margins, or a mixture of two or more components
_BEST, _FULL, _DIAGONAL, _FITTED = range(4)  # maps: by variational inference; affine, fitted to the particles
_TIE = 0.3  # nats by which others must beat the best map alone: a network can learn that much
_REFINEMENTS, _REFINING_MOVES = 2, 45  # maps fitted to the particles, HMC transitions under each


def _refine(
    key: Key, target: Target, first: Triangular, particles: Float[Array, "n d"], order: Int[Array, " d"]
) -> tuple[Triangular, Float[Array, "n d"], Float[Array, ""]]:
    """Fit a map to the particles, move them where it whitens, and so on.

    A tail or a neck where tempering left a few particles is as wide as all else under a map that is fitted to
    them, so that moves bring more of them there.

    Returns:
        Two maps, stacked: of the first half of the particles, for comparing on the other half, and of all;
        the particles, where ``first`` whitens; and what `drift_between` says of the last moves.
    """
    n = len(particles)

    def moved(key: Key, whitening: Triangular, x: Float[Array, "n d"]):  # type: ignore[no-untyped-def]
        u = jax.vmap(lambda y: whitening.inverse(y)[0])(x)
        end = hmc_moves(key, whiten(target, whitening).logdensity_fn, u, _REFINING_MOVES).position
        return jax.vmap(lambda u: whitening.forward(u)[0])(end), drift_between(u, end).astype(x.dtype)

    def refine(carry, inputs):  # type: ignore[no-untyped-def]
        k, key = inputs
        x, drift = carry
        key_fit, key_moves = jax.random.split(key)
        half = jnp.resize(x[: n // 2], x.shape)
        whitening = fit_points(key_fit, jnp.where(k == _REFINEMENTS, half, x), order)
        carry = jax.lax.cond(k < _REFINEMENTS, lambda: moved(key_moves, whitening, x), lambda: (x, drift))
        return carry, whitening

    x = jax.vmap(lambda u: first.forward(u)[0])(particles)
    rounds = jnp.arange(_REFINEMENTS + 2), jax.random.split(key, _REFINEMENTS + 2)
    (x, drift), whitenings = jax.lax.scan(refine, (x, jnp.zeros((), x.dtype)), rounds)
    particles = jax.vmap(lambda y: first.inverse(y)[0])(x)
    return jax.tree.map(lambda leaf: leaf[_REFINEMENTS:], whitenings), particles, drift


def _add_missing(
    key: Key,
    particles: Float[Array, "n d"],
    log_z: Float[Array, ""],
    elbos: Float[Array, " f"],
    draws: Float[Array, "f t d"],
) -> Float[Array, "n d"]:
    """Put in, by weight, the fits whose place holds far fewer particles than their evidence asks for.

    A narrow mode in many dimensions has no weight at high temperatures, so that tempering loses it; an
    optimiser may have found it.
    """
    n, dim = particles.shape

    def add(carry, inputs):  # type: ignore[no-untyped-def]
        particles, log_z = carry
        key_f, elbo, own = inputs
        usable = jnp.all(jnp.isfinite(own)) & jnp.isfinite(elbo)
        own = jnp.where(usable, own, jnp.arange(own.size, dtype=own.dtype).reshape(own.shape))
        mean = jnp.mean(own, 0)
        centred = own - mean
        cov = centred.T @ centred / len(own)
        variance, rotation = jnp.linalg.eigh(cov + 1e-9 * jnp.trace(cov) * jnp.eye(dim))
        std = jnp.sqrt(jnp.maximum(variance, 1e-12))
        inside = jnp.mean(belong((particles - mean) @ rotation / std))
        share = jax.nn.sigmoid(elbo - log_z)
        missing = usable & (inside < FOUND * share)
        key_which, key_draw = jax.random.split(key_f)
        replaced = missing & (jax.random.uniform(key_which, (n,)) < share)
        # not the fit's own draws: repeated, they would look like structure
        fresh = mean + (std * jax.random.normal(key_draw, (n, dim), own.dtype)) @ rotation.T
        particles = jnp.where(replaced[:, None], fresh, particles)
        return (particles, jnp.where(missing, jnp.logaddexp(log_z, elbo), log_z)), None

    best_first = jnp.argsort(-elbos)
    keys = jax.random.split(key, len(elbos))
    carry = particles, log_z
    return jax.lax.scan(add, carry, (keys, elbos[best_first], draws[best_first]))[0][0]


class Cloud(NamedTuple):
    """How particles look.

    Attributes:
        num: particles.
        num_moves: HMC transitions of each per temperature.
        brief: whether they rest at the target after five rounds, even if they still spread.
        max_rounds: temperatures and rounds at the target, at most.
    """

    num: int
    num_moves: int
    brief: bool = False
    max_rounds: int = MAX_TEMPERATURES


def warm_start(
    target: Target, order: Int[Array, " d"], search: Search, cloud: Cloud | None = None
) -> list[Stage]:
    """Find a whitening map and a mixture of normal distributions that resembles the whitened target.

    Variational inference comes first (see `fit`). Then tempered particles go over the whole region, for
    modes that it did not see. Candidates are the best map alone, the affine map that whitens the
    particles, and either of them followed by margins or by a mixture fitted to the particles. The mean
    log density on particles that were not used for fitting decides: it punishes a missing mode, as ELBOs
    do not. Should particles not be finite, the best map alone remains.

    Above ``search.max_dense_dim`` dimensions matrices are avoided: maps without correlations are fitted from
    starts and from where climbs from starts and scouts arrive. If they are of one mode, its particles'
    leading directions follow, and memory is linear in d. If they are of several, at most eight, each has its
    normal distribution: with a matrix up to 512 dimensions, and draws of all take 64 kB per dimension.

    Args:
        target: the density on the unconstrained space.
        order: a permutation of the coordinates, hyperparameters first, shape ``[d]``.
        search: how much of it. A refined map is preferred. If a particle does not stay finite in refinement,
            all are as they were before. A missing mode is put in afterwards: the map does not know of it.
        cloud: how particles look, where there are matrices; None: as ``search`` says.

    Returns:
        Stages for `run_stages`. The first takes a random key; starts, points of finite density, shape
        ``[s, d]``; and scouts, points that lie as widely as the target may, such as draws of the prior,
        shape ``[m, d]``. The last returns the whitening, with margins that may be the identity; the
        mixture, whose first component is N(0, I) and alone where there is but one; the whitened particles,
        shape ``[n, d]``; points that may be of modes without particles, here none, shape ``[0, d]``; what
        was evaluated; the particles' drift (see `tempered_particles`); and a random key for what comes
        next.

    Raises:
        ValueError: for a refined map in more dimensions than have matrices.
    """
    if target.dim > search.max_dense_dim:
        if search.refine:
            raise ValueError(
                f"`refine` fits matrices to particles, up to `max_dense_dim` = {search.max_dense_dim} "
                f"dimensions, got {target.dim}. Pass `Search(refine=False)`."
            )
        return wide_warm_start(target, search)

    def guess(key, starts, scouts):  # type: ignore[no-untyped-def]
        guesses, spent = first_guesses(target, starts, scouts, order)
        return jax.random.split(key, 5), guesses, scouts, spent

    def seek(keys, guesses, scouts, spent):  # type: ignore[no-untyped-def]
        found = fit(keys[0], target, guesses)
        found = found._replace(spent=found.spent.plus(spent))
        first = jax.tree.map(lambda a, b: jnp.where(found.separate, a, b), found.pooled, found.best)
        return keys, found, first, covering(jax.vmap(lambda x: first.inverse(x)[0])(scouts))

    def temper(keys, found, first, base):  # type: ignore[no-untyped-def]
        white, how = whiten(target, first), cloud or Cloud(search.num_particles, search.num_moves)
        return keys, found, first, *tempered_particles(keys[1], white, base, *how)

    def refine(keys, found, first, particles, log_z, spent, drift):  # type: ignore[no-untyped-def]
        key_refine, key_mixture = jax.random.split(keys[3])
        fitted, moved, spreading = _refine(key_refine, target, first, particles, order)
        good = jnp.all(jnp.isfinite(moved))
        particles = jnp.where(good, moved, particles)
        drift = jnp.where(good & jnp.isfinite(drift), spreading, drift)
        moves = Evaluations(gradients=_REFINEMENTS * (_REFINING_MOVES * LEAPS + 1))
        spent = spent.plus(moves.times(len(particles)))
        return keys.at[3].set(key_mixture), found, first, particles, log_z, spent, drift, fitted

    def settle(keys, found, first, base):  # type: ignore[no-untyped-def]
        mixture, nowhere = unsearched(found.best.loc)
        return found.best, mixture, nowhere, nowhere, found.spent, jnp.zeros(()), keys[4]

    if not search.num_particles:
        return [guess, seek, settle]
    return [guess, seek, temper, *([refine] if search.refine else []), _choose]


def _choose(
    keys: Array,
    found: Fit,
    first: Triangular,
    particles: Float[Array, "n d"],
    log_z: Float[Array, ""],
    spent: Evaluations,
    drift: Float[Array, ""],
    fitted: Triangular | None = None,
) -> tuple[Triangular, Mixture, Float[Array, "n d"], Float[Array, "0 d"], Evaluations, Float[Array, ""], Key]:
    """Choose the map and the mixture, from what was found and the particles that ``first`` whitens.

    ``fitted`` are two maps, stacked: of the first half of the particles, which is compared, and of all.
    """
    n, dim = particles.shape
    size = max_components(n, dim)
    own = jax.vmap(lambda x: first.inverse(x)[0])(found.draws.reshape(-1, dim)).reshape(found.draws.shape)
    particles = _add_missing(keys[2], particles, log_z, found.elbos, own)
    x = jax.vmap(lambda u: first.forward(u)[0])(particles)

    sizes = numbers_of_components(size)
    flat, diagonal = _affine_maps(x, found.best.order)
    maps, bases = [found.best, flat, diagonal], [_BEST, _FULL]
    if fitted is not None:
        maps += [jax.tree.map(lambda leaf, k=k: leaf[k], fitted) for k in range(2)]
        bases = [_FITTED, *bases]
    whitenings = jax.tree.map(lambda *leaves: jnp.stack(leaves), *maps)
    rows = [(base, _PLAIN) for base in bases] + [(_BEST, _MARGINS), (_DIAGONAL, _MARGINS)]
    rows += [(base, num) for base in bases for num in sizes if 1 < num <= size]
    which, kinds = (jnp.array(column) for column in zip(*rows, strict=True))
    train = (jnp.arange(n) < n // 2).astype(x.dtype)
    blank, plain, key_mixture = identity_margins(x[0]), padded_normal(x[0], size), keys[3]

    def attempt(
        row: Int[Array, ""], weight: Float[Array, " n"], last: Bool[Array, ""]
    ) -> tuple[Triangular, Mixture]:
        number = which[row] + (last & (which[row] == _FITTED))
        whitening = jax.tree.map(lambda leaf: leaf[number], whitenings)
        kind, key_row = kinds[row], jax.random.fold_in(key_mixture, row)
        u = jax.vmap(lambda y: whitening.inverse(y)[0])(x)
        margins = jax.lax.cond(kind == _MARGINS, lambda: fit_margins(u, weight), lambda: blank)
        mixture = jax.lax.cond(
            kind > _MARGINS, lambda: fit_mixture(key_row, u, weight, kind, size), lambda: plain
        )
        return whitening._replace(margins=margins), mixture

    def compare(carry, k):  # type: ignore[no-untyped-def]
        # one row after the other on half of the particles; at last the best one on all of them
        scores, *_ = carry
        last = k == len(rows)
        row = jnp.where(last, jnp.argmax(scores), k)
        whitening, mixture = attempt(row, jnp.where(last, 1.0, train), last)
        u, log_det = jax.vmap(lambda y: whitening.inverse(y))(x)
        score = (1.0 - train) @ (jax.vmap(mixture.log_prob)(u) - log_det) / (n - n // 2)
        score = jnp.where(jnp.isfinite(score), score, -jnp.inf) + jnp.where(row == 0, _TIE, 0.0)
        return (scores.at[row].set(score), whitening, mixture, u), None

    blanks = jax.eval_shape(attempt, which[0], train, jnp.zeros((), bool))
    blanks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blanks)
    carry = jnp.full(len(rows), -jnp.inf, x.dtype), *blanks, x
    (_, whitening, mixture, u), _ = jax.lax.scan(compare, carry, jnp.arange(len(rows) + 1))
    u = jnp.where(jnp.all(jnp.isfinite(u), -1, keepdims=True), u, 0.0)
    return whitening, mixture, u, u[:0], found.spent.plus(spent), drift, keys[4]


def _affine_maps(x: Float[Array, "n d"], order: Int[Array, " d"]) -> tuple[Triangular, Triangular]:
    """Make the affine maps with the points' mean and covariance, and with their variances alone."""
    dim = x.shape[1]
    loc = jnp.mean(x, 0)[order]
    cov = jnp.cov(x[:, order], rowvar=False).reshape(dim, dim)
    diagonal = jnp.diag(jnp.sqrt(jnp.diagonal(cov)))
    tril = jnp.linalg.cholesky(cov + 1e-12 * jnp.trace(cov) * jnp.eye(dim))
    tril = jnp.where(jnp.all(jnp.isfinite(tril)), tril, diagonal)
    return Triangular.affine(loc, tril, order), Triangular.affine(loc, diagonal, order)
