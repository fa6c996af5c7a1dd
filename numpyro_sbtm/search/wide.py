# SPDX-License-Identifier: Apache-2.0
"""The warm start in many dimensions, where particles are too few for covariances."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.compile import Stage
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import LowRank, whiten
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.blank import only_normal, unsearched
from numpyro_sbtm.search.fit import fit_low_rank
from numpyro_sbtm.search.guesses import diagonal_guesses
from numpyro_sbtm.search.modes import (
    Mode,
    describe_modes,
    evaluations_per_mode,
    num_draws,
    on_own_side,
    polish,
    separate_fits,
)
from numpyro_sbtm.search.temper import covering, tempered_particles

__all__ = ["wide_warm_start"]

_SUBSPACE_STEPS = 20


class _Modes(NamedTuple):
    """Several modes in common coordinates, or what stands for them where there is one.

    Attributes:
        several: whether there are several, shape ``[]``.
        whitening: of what modes have in common.
        mixture: their normal distributions.
        points: whitened draws, in proportion to the modes' masses, shape ``[n, d]``.
        drift: of the draws, shape ``[]``.
    """

    several: Bool[Array, ""]
    whitening: LowRank
    mixture: Mixture
    points: Float[Array, "n d"]
    drift: Float[Array, ""]


def _draw_modes(
    key: Key, target: Target, fits: LowRank, there: Bool[Array, " K"]
) -> tuple[Mode, Evaluations]:
    """Polish fits, where there are several; with what was evaluated."""
    several = jnp.sum(there) > 1

    def one(inputs):  # type: ignore[no-untyped-def]
        key, k, present = inputs

        def within(x: Float[Array, " d"]) -> Float[Array, ""]:
            return jnp.where(on_own_side(fits, there, k, x), target.logdensity_fn(x), -jnp.inf)

        draw = lambda: polish(key, within, fits.loc[k], fits.std[k])  # noqa: E731
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(draw))
        return jax.lax.cond(present, draw, lambda: blank)

    keys = jax.random.split(key, len(there))
    modes = jax.lax.map(one, (keys, jnp.arange(len(there)), there & several))
    return modes, evaluations_per_mode(target.dim).times(jnp.where(several, jnp.sum(there), 0))


def _mixture_of_modes(
    key: Key, target: Target, fits: LowRank, modes: Mode, there: Bool[Array, " K"], search: Search
) -> _Modes:
    """Describe polished modes in coordinates that whiten what they have in common."""
    n, rank, dim, dtype = search.num_particles, search.rank, target.dim, fits.loc.dtype
    key_order, key_map, key_mixture = jax.random.split(key, 3)
    place = jax.random.permutation(key_order, n)
    basis = jnp.eye(dim, rank, dtype=dtype)
    flat = LowRank(fits.loc[0], fits.std[0], basis, jnp.zeros(rank, dtype))

    def chosen(mixture: Mixture) -> tuple[Int[Array, " n"], Float[Array, "n d"]]:
        """Choose draws in proportion to masses, none twice among those that are kept for training."""
        cumulative = jnp.cumsum(jnp.exp(mixture.log_weight))
        which = jnp.sum(cumulative[:, None] < cumulative[-1] * (place + 0.5) / n, 0)
        return which, modes.draws[which, jnp.arange(n) * num_draws(dim) // n]

    def describe(carry, _):  # type: ignore[no-untyped-def]
        whitening = carry[0]
        mixture = describe_modes(key_mixture, target, whitening, fits, there, modes)
        every = max(1, n // num_draws(dim))  # no draw twice: repeated, they would look like structure
        which, x = (part[::every] for part in chosen(mixture))
        means = jnp.mean(modes.draws, 1)[which]
        v = jax.vmap(lambda y: flat.inverse(y)[0])(x - means + jnp.mean(x, 0))
        common = _leading_directions(key_map, flat, v, jnp.all(jnp.isfinite(v)), rank)
        return (common, whitening, mixture), None

    def go() -> _Modes:
        mixture = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(lambda: describe_modes(key_mixture, target, flat, fits, there, modes)),
        )
        (_, whitening, mixture), _ = jax.lax.scan(describe, (flat, flat, mixture), length=2)
        u = jax.vmap(lambda y: whitening.inverse(y)[0])(chosen(mixture)[1])
        present = jnp.isfinite(mixture.log_weight)
        drift = jnp.max(jnp.where(present, modes.drift, 0.0))
        return _Modes(jnp.sum(present) > 1, whitening, mixture, u, drift)

    shapes = jax.eval_shape(go)
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    blank = blank._replace(mixture=only_normal(blank.mixture))
    return jax.lax.cond(jnp.sum(there) > 1, go, lambda: blank)


def _leading_directions(
    key: Key, flat: LowRank, particles: Float[Array, "n d"], usable: Bool[Array, ""], rank: int
) -> LowRank:
    """Make the map that whitens particles in their leading directions, if usable; ``flat`` did so first."""
    n, dim = particles.shape
    # leading eigenvectors of the covariance, by subspace iteration
    centre = jnp.mean(particles, 0)
    std = jnp.maximum(jnp.std(particles, 0), 1e-3)
    z = (particles - centre) / std

    def improve(_: Int[Array, ""], basis: Float[Array, "d r"]) -> Float[Array, "d r"]:
        return jnp.linalg.qr(z.T @ (z @ basis))[0]

    basis = jax.random.normal(key, (dim, rank), z.dtype)
    basis = jax.lax.fori_loop(0, _SUBSPACE_STEPS, improve, jnp.linalg.qr(basis)[0])
    _, singular, turn = jnp.linalg.svd(z @ basis, full_matrices=False)
    variance = singular**2 / n
    # what noise alone would make as large is no correlation (Marchenko & Pastur 1967)
    kept = variance > 1.1 * (1.0 + (dim / n) ** 0.5) ** 2
    # all other directions share the rest of the variance (Tipping & Bishop 1999, probabilistic PCA)
    rest = (dim - jnp.sum(jnp.where(kept, variance, 0.0))) / (dim - jnp.sum(kept))
    rest = jnp.sqrt(jnp.clip(rest, 0.01, 1.0))
    gain = jnp.where(kept, jnp.sqrt(variance) / rest - 1.0, 0.0)
    whitening = LowRank(flat.loc + flat.std * centre, flat.std * std * rest, basis @ turn.T, gain)
    return jax.tree.map(
        lambda new, old: jnp.where(usable, new, old),
        whitening,
        flat._replace(basis=basis, gain=jnp.zeros_like(gain)),
    )


def wide_warm_start(target: Target, search: Search) -> list[Stage]:
    """Do what the warm start does where particles are too few for covariances."""

    def guess(key, starts, scouts):  # type: ignore[no-untyped-def]
        guesses, spent = diagonal_guesses(target, starts, scouts)
        return jax.random.split(key, 8), guesses, scouts, spent

    def seek(keys, guesses, scouts, spent):  # type: ignore[no-untyped-def]
        fits, elbos, of_fits = fit_low_rank(keys[0], target, guesses)
        chosen, there, of_choice = separate_fits(keys[7], target.logdensity_fn, fits, elbos)
        fits = jax.tree.map(lambda leaf: leaf[chosen], fits)
        return keys, fits, there, spent.plus(of_fits).plus(of_choice), scouts

    def part(keys, fits, there, spent, scouts):  # type: ignore[no-untyped-def]
        modes, more = _draw_modes(keys[5], target, fits, there)
        found = _mixture_of_modes(keys[6], target, fits, modes, there, search)
        return keys, fits, found, spent.plus(more), scouts

    def temper(keys, fits, found, spent, scouts):  # type: ignore[no-untyped-def]
        best = jnp.argmax(found.mixture.log_weight)
        flat = jax.tree.map(lambda leaf: leaf[best], fits)

        def go(_):  # type: ignore[no-untyped-def]
            base = covering(jax.vmap(lambda x: flat.inverse(x)[0])(scouts))
            particles, _, more, drift = tempered_particles(
                keys[1], whiten(target, flat), base, search.num_particles, search.num_moves
            )
            return particles, more.as_arrays(), drift

        stay = found.points, Evaluations().as_arrays(), found.drift
        particles, more, drift = jax.lax.cond(found.several, lambda stay: stay, go, stay)
        return keys, flat, found, particles, spent.plus(more), drift

    def finish(keys, flat, found, particles, spent, drift):  # type: ignore[no-untyped-def]
        def go(_):  # type: ignore[no-untyped-def]
            # particles do not move far along a stiff direction: the fit ends by variational inference again
            usable = jnp.all(jnp.isfinite(particles))
            v = jnp.where(usable, particles, 0.0)
            guess = _leading_directions(keys[2], flat, v, usable, search.rank)
            fits, _, more = fit_low_rank(keys[3], target, jax.tree.map(lambda leaf: leaf[None], guess))
            whitening = jax.tree.map(lambda leaf: leaf[0], fits)
            u = jax.vmap(lambda v: whitening.inverse(flat.forward(v)[0])[0])(v)
            return whitening, only_normal(found.mixture), u, more.as_arrays()

        stay = found.whitening, found.mixture, particles, Evaluations().as_arrays()
        whitening, mixture, u, more = jax.lax.cond(found.several, lambda stay: stay, go, stay)
        return whitening, mixture, u, u[:0], spent.plus(more), drift, keys[4]

    def settle(keys, fits, there, spent, scouts):  # type: ignore[no-untyped-def]
        best = jax.tree.map(lambda leaf: leaf[0], fits)
        mixture, nowhere = unsearched(best.loc)
        return best, mixture, nowhere, nowhere, spent, jnp.zeros(()), keys[4]

    return [guess, seek, part, temper, finish] if search.num_particles else [guess, seek, settle]
