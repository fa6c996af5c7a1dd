# SPDX-License-Identifier: Apache-2.0
"""The first look: what normal distributions and a few particles show of a posterior."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.compile import Stage
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import Affine, Triangular, whiten
from numpyro_sbtm.core.mixture import Mixture, fit_mixture, max_components, numbers_of_components
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.belonging import FOUND, belong
from numpyro_sbtm.search.blank import only_normal, padded_normal
from numpyro_sbtm.search.modes import fit_normal
from numpyro_sbtm.search.normals import Normals, covering_normal, fit_normals
from numpyro_sbtm.search.temper import covering, tempered_particles

__all__ = ["first_look"]

_MOST_ROUNDS = 30  # of the particles: those that need more need another map
_TIE = 0.05  # nats by which a mixture must beat one normal distribution
_COUNTS = 0.01  # share of the evidence from which it counts


def first_look(target: Target, search: Search) -> list[Stage]:
    """Find an affine map, and a mixture of normal distributions that resembles what it whitens.

    Normal distributions are fitted by scores from all first guesses. A few tempered particles go over the
    whole region, for modes that were not climbed. The map is that of their mean and covariance, and the
    mixture has as many components as held-out particles ask for. A posterior that is nearly normal, or has
    few modes that are, needs no more; of any other this look tells that it does.

    Args:
        target: the density on the unconstrained space.
        search: how much is looked for.

    Returns:
        Stages for `run_stages`, that begin and end as those of `numpyro_sbtm.search.warm_start.warm_start`
        after its first. Suspects are normal distributions in the place of which there are few particles.
    """

    def normals(keys, guesses: Triangular, scouts, spent):  # type: ignore[no-untyped-def]
        # guesses are affine, in the order of their rows
        order = guesses.order[0]
        place = jnp.argsort(order)
        root = jax.vmap(lambda tril: jnp.linalg.qr(tril[place].T, mode="r").T)(guesses.scale_tril)
        sign = jnp.where(jnp.diagonal(root, axis1=1, axis2=2) < 0, -1.0, 1.0)
        maps = Affine(guesses.loc[:, place], (root * sign[:, None, :]).astype(root.dtype))
        found, more = fit_normals(keys[0], target.logdensity_fn, maps)
        first = covering_normal(found)
        return keys, found, first, covering(jax.vmap(lambda x: first.inverse(x)[0])(scouts)), spent.plus(more)

    def temper(keys, found, first, base, spent):  # type: ignore[no-untyped-def]
        white, num = whiten(target, first), search.first_particles
        u, log_z, more, drift = tempered_particles(
            keys[1], white, base, num, num_moves=1, brief=True, max_rounds=_MOST_ROUNDS
        )
        score = jax.vmap(jax.grad(white.logdensity_fn))(u)
        suspects = _suspects(found, jax.vmap(lambda v: first.forward(v)[0])(u), log_z)
        return keys, first, u, score, suspects, spent.plus(more).plus(Evaluations(gradients=num)), drift

    return [normals, temper, _choose]


def _suspects(found: Normals, x: Float[Array, "n d"], log_z: Float[Array, ""]) -> Float[Array, "f d"]:
    """Take means of normal distributions in the place of which there are far too few particles.

    That is fewer than their evidence asks for; all others are NaN. Tempering loses a narrow mode in many
    dimensions, which a climb may have found.
    """

    def suspect(fit: Affine, elbo: Float[Array, ""]) -> Float[Array, " d"]:
        inside = jnp.mean(belong(jax.vmap(lambda point: fit.inverse(point)[0])(x)))
        share = jax.nn.sigmoid(elbo - log_z)
        return jnp.where((share > _COUNTS) & (inside < FOUND * share), fit.loc, jnp.nan)

    return jax.lax.map(lambda each: suspect(*each), tuple(found))


def _normal_of(u: Float[Array, "n d"], score: Float[Array, "n d"], by_scores: bool) -> Affine:
    """Fit a normal distribution to points, by their scores, too, or by their moments alone."""
    dim = u.shape[1]
    if by_scores:
        mean, cov = fit_normal(u, score, False)
    else:
        mean, cov = jnp.mean(u, 0), jnp.cov(u, rowvar=False).reshape(dim, dim)
        cov = cov + 1e-9 * jnp.trace(cov) / dim * jnp.eye(dim, dtype=u.dtype)
    return Affine(mean, jnp.linalg.cholesky(cov))


def _better_normal(u: Float[Array, "n d"], score: Float[Array, "n d"]) -> Affine:
    """Choose between both fits by half of the points that was not used, and make it of all.

    Scores tell a covariance in many dimensions from few points; moments that of several modes.
    """
    half = len(u) // 2

    def held_out(by_scores: bool) -> Float[Array, ""]:
        fit = _normal_of(u[:half], score[:half], by_scores)
        v, log_det = jax.vmap(fit.inverse)(u[half:])
        value = jnp.mean(-0.5 * jnp.sum(v * v, -1) - log_det)
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    moments, scored = _normal_of(u, score, False), _normal_of(u, score, True)
    use = held_out(True) > held_out(False)
    return jax.tree.map(lambda a, b: jnp.where(use, a, b), scored, moments)


def _choose(
    keys: Array,
    first: Affine,
    particles: Float[Array, "n d"],
    score: Float[Array, "n d"],
    suspects: Float[Array, "f d"],
    spent: Evaluations,
    drift: Float[Array, ""],
) -> tuple[Affine, Mixture, Float[Array, "n d"], Float[Array, "f d"], Evaluations, Float[Array, ""], Key]:
    """Fit the map, and choose the mixture by half of the particles that was not used for fitting."""
    n, dim = particles.shape
    fit = _better_normal(particles, jnp.where(jnp.isfinite(score), score, 0.0))
    usable = jnp.all(jnp.isfinite(fit.loc)) & jnp.all(jnp.isfinite(fit.scale_tril))
    fit = jax.tree.map(lambda a, b: jnp.where(usable, a, b), fit, Affine(jnp.zeros(dim), jnp.eye(dim)))
    whitening = Affine(first.forward(fit.loc)[0], first.scale_tril @ fit.scale_tril)
    drift = jnp.where(usable, drift, jnp.inf)
    u = jax.vmap(lambda v: fit.inverse(v)[0])(particles)
    u = jnp.where(jnp.all(jnp.isfinite(u), -1, keepdims=True), u, 0.0)
    size = max_components(n, dim)
    if size == 1:
        return whitening, padded_normal(u[0], 1), u, suspects, spent, drift, keys[4]
    sizes = jnp.array([1, *numbers_of_components(size)])
    train = (jnp.arange(n) < n // 2).astype(u.dtype)

    def compare(carry, k):  # type: ignore[no-untyped-def]
        # one size after the other on half of the particles; at last the best one on all of them
        scores, _ = carry
        last = k == len(sizes)
        row = jnp.where(last, jnp.argmax(scores), k)
        weight = jnp.where(last, 1.0, train)
        mixture = fit_mixture(jax.random.fold_in(keys[3], row), u, weight, sizes[row], size)
        score = (1.0 - train) @ jax.vmap(mixture.log_prob)(u) / jnp.sum(1.0 - train)
        score = jnp.where(jnp.isfinite(score), score, -jnp.inf) + jnp.where(row == 0, _TIE, 0.0)
        return (scores.at[row].set(score), mixture), None

    blank = padded_normal(u[0], size)
    carry = jnp.full(len(sizes), -jnp.inf, u.dtype), blank
    (scores, mixture), _ = jax.lax.scan(compare, carry, jnp.arange(len(sizes) + 1))
    one = only_normal(mixture)
    mixture = jax.tree.map(lambda a, b: jnp.where(jnp.argmax(scores) == 0, a, b), one, mixture)
    return whitening, mixture, u, suspects, spent, drift, keys[4]
