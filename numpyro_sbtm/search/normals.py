# SPDX-License-Identifier: Apache-2.0
"""Normal distributions fitted by scores: the cheapest picture of a posterior."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import Affine
from numpyro_sbtm.core.target import Key, LogDensity
from numpyro_sbtm.search.modes import fit_normal

__all__ = ["Normals", "covering_normal", "fit_normals"]

_ROUNDS = 6  # of draws; the last only judges
_FEWEST_DRAWS, _PER_DIMENSION = 64, 2  # of a normal distribution in a round
_SEPARATE = 4.0  # squared distance from their mean, in deviations within, that makes one of them a mode
_COUNTS = 0.01  # share of the evidence from which it is one of the modes


class Normals(NamedTuple):
    """Normal distributions, leading axis f.

    Attributes:
    maps: from N(0, I) to each.
    elbos: shape ``[f]``.
    """

    maps: Affine
    elbos: Float[Array, " f"]


def fit_normals(key: Key, logdensity_fn: LogDensity, guesses: Affine) -> tuple[Normals, Evaluations]:
    """Fit a normal distribution from each of several guesses, by the scores at a few of its own draws.

    Every round moves it to where the Fisher divergence over these draws is least, which for a normal density
    is that density itself (see `numpyro_sbtm.search.modes.fit_normal`). Of all rounds the best ELBO is kept.

    Args:
        key: random key.
        logdensity_fn: the log density.
        guesses: stacked maps, leading axis f.

    Returns:
        The normal distributions, and what was evaluated.

    Reference:
        Cai et al. (2024), Batch and match: black-box variational inference with a score-based divergence,
        arXiv:2402.14758.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.maps import Affine
        >>> from numpyro_sbtm.search.normals import fit_normals
        >>> guess = Affine(jnp.zeros((1, 2)), jnp.eye(2)[None])
        >>> found, spent = fit_normals(jax.random.key(0), lambda x: -50 * jnp.sum((x - 7) ** 2), guess)
        >>> found.maps.loc.round(1).tolist(), round(float(found.maps.scale_tril[0, 0, 0]), 2)
        ([[7.0, 7.0]], 0.1)
    """
    num_fits, dim = guesses.loc.shape
    num_draws = max(_FEWEST_DRAWS, _PER_DIMENSION * dim)
    value_and_score = jax.vmap(jax.vmap(jax.value_and_grad(logdensity_fn)))

    def moved(fit: Affine, z: Float[Array, "n d"], score: Float[Array, "n d"]) -> Affine:
        mean, cov = fit_normal(z, score @ fit.scale_tril, False)
        tril = fit.scale_tril @ jnp.linalg.cholesky(cov)
        new = Affine(fit.forward(mean)[0], tril)
        usable = jnp.all(jnp.isfinite(new.loc)) & jnp.all(jnp.isfinite(tril))
        return jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, fit)

    def improve(carry: tuple[Affine, Normals], key: Key) -> tuple[tuple[Affine, Normals], None]:
        fits, best = carry
        z = jax.random.normal(key, (num_fits, num_draws, dim), fits.loc.dtype)
        x, log_det = jax.vmap(lambda fit, z: jax.vmap(fit.forward)(z))(fits, z)
        value, score = value_and_score(x)
        entropy = log_det + 0.5 * jnp.sum(z**2, -1) + 0.5 * dim * jnp.log(2 * jnp.pi)
        elbos = jnp.mean(value + entropy, 1)
        better = elbos > best.elbos  # a draw without a density is worse than any guess
        pick = lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
        best = jax.tree.map(pick, Normals(fits, elbos), best)
        finite = jnp.where(jnp.isfinite(score), score, 0.0)
        # one at a time: batched LAPACK calls that XLA runs side by side can block a two-core machine
        fits = jax.lax.map(lambda each: moved(*each), (fits, z, finite))
        return (fits, best), None

    lowest = jnp.full(num_fits, -jnp.inf, guesses.loc.dtype)
    carry = guesses, Normals(guesses, lowest)
    (_, best), _ = jax.lax.scan(improve, carry, jax.random.split(key, _ROUNDS))
    return best, Evaluations(gradients=_ROUNDS * num_fits * num_draws).as_arrays()


def covering_normal(found: Normals) -> Affine:
    """Take the best normal distribution, or where several that count lie apart, one that covers them all.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.maps import Affine
        >>> from numpyro_sbtm.search.normals import Normals, covering_normal
        >>> maps = Affine(jnp.array([[-6.0], [6.0]]), jnp.ones((2, 1, 1)))
        >>> [covering_normal(Normals(maps, jnp.array([0.0, elbo]))).loc.item() for elbo in (0.0, -30.0)]
        [0.0, -6.0]
    """
    maps, elbos = found
    dim = maps.loc.shape[1]
    best = jax.tree.map(lambda leaf: leaf[jnp.argmax(elbos)], maps)
    weight = jax.nn.softmax(elbos)
    counts = weight > 1e-6  # one that failed may hold anything
    loc = jnp.where(counts[:, None], maps.loc, best.loc)
    tril = jnp.where(counts[:, None, None], maps.scale_tril, best.scale_tril)
    mean = weight @ loc
    within = jnp.einsum("f,fij,fkj->ik", weight, tril, tril)
    toward = loc - mean
    between = jnp.einsum("f,fi,fj->ij", weight, toward, toward)
    ridge = 1e-6 * jnp.trace(within) / dim * jnp.eye(dim, dtype=loc.dtype)
    distance = jnp.sum(toward * jnp.linalg.solve(within + ridge, toward.T).T, -1)
    apart = jnp.max(jnp.where(weight > _COUNTS, distance, 0.0)) > _SEPARATE
    # a few modes span a few directions only: spread them over all coordinates
    root = jnp.linalg.cholesky(within + between + jnp.diag(jnp.diagonal(between)) + ridge)
    pooled = Affine(mean, root)
    use = apart & jnp.all(jnp.isfinite(root))
    return jax.tree.map(lambda a, b: jnp.where(use, a, b), pooled, best)
