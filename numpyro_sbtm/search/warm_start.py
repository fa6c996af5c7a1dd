# SPDX-License-Identifier: Apache-2.0
"""The warm start: where the posterior is, before anything is learned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.compile import Stage
from numpyro_sbtm.core.lazy import load
from numpyro_sbtm.core.maps import LowRank, Triangular, affine, whiten
from numpyro_sbtm.core.maps.spline import fit_margins, identity_margins
from numpyro_sbtm.core.mixture import Mixture, fit_mixture, max_components, normal
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.fit import (
    Fit,
    diagonal_guesses,
    first_guesses,
    fit,
    fit_low_rank,
    likely_radius,
)
from numpyro_sbtm.search.fit_points import fit_points
from numpyro_sbtm.search.modes import (
    Mode,
    describe_modes,
    gradients_per_mode,
    num_draws,
    on_own_side,
    polish,
    separate_fits,
)
from numpyro_sbtm.search.moves import (
    LEAPS,
    adapted,
    drift_between,
    first_step_size,
    hmc_moves,
    or_very_low,
    spread_out,
)

__all__ = ["tempered_particles", "warm_start"]

_PLAIN, _MARGINS = 0, 1  # what comes after a map: nothing, margins, or a mixture of two or more components
_BEST, _FULL, _DIAGONAL, _FITTED = range(4)  # maps: by variational inference; affine, fitted to the particles
_TIE = 0.3  # nats by which others must beat the best map alone: a network can learn that much
_FAR = 20.0  # bound on where scouts lie, in whitened units
_WIDE = 1.5  # standard deviation of the first particles, relative to what they must cover
_FOUND = 0.25  # share of the particles it asks for with which a mode counts as found
_MAX_TEMPERATURES = 80
_APART = 3.0  # distance of the particles' mean that shows another mode among them
_OTHERS = 4  # modes that are left out so
_SUBSPACE_STEPS = 20
_LAST_ROUNDS = 5  # of moves at the target itself
_MORE_ROUNDS = 15  # where particles spread
_MAX_ROUNDS = 45  # where they spread even then; their spreading is then measured anew
_REFINEMENTS, _REFINING_MOVES = 2, 45  # maps fitted to the particles, HMC transitions under each


def tempered_particles(
    key: Key,
    target: Target,
    base: Mixture,
    num_particles: int = 4096,
    num_moves: int = 3,
    brief: bool = False,
) -> tuple[Float[Array, "n d"], Float[Array, ""], Int[Array, ""], Float[Array, ""]]:
    """Carry particles from a mixture of normal distributions to a target by tempered SMC with HMC moves.

    Temperatures keep the effective sample size of every reweighting at 0.7 of the particles. Step sizes
    are random, and follow the acceptance rate. A log density that is not finite counts as very low. At the
    target itself moves go on for longer where they change a variance (see
    `numpyro_sbtm.search.moves.drift_between`).

    Args:
        key: random key.
        target: the density, best whitened.
        base: where the particles start; wide enough to cover the target.
        num_particles: n.
        num_moves: transitions per temperature.
        brief: one transition per temperature, and no more at the target itself than the first five rounds.

    Returns:
        Particles of equal weight, shape ``[n, d]``; an estimate of log Z, shape ``[]``; the number of target
        gradients spent; and by what part moves at the target itself have changed a variance at least, the
        last thirty where there are so many, zero where that is within noise: beyond it particles had not
        arrived, and may not have now.

    Reference:
        Del Moral, Doucet & Jasra (2006), Sequential Monte Carlo samplers; blackjax runs it.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Target
        >>> from numpyro_sbtm.core.mixture import normal
        >>> from numpyro_sbtm.search.warm_start import tempered_particles
        >>> target = Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2 / 0.01), 2)
        >>> x, log_z, gradients, drift = tempered_particles(jax.random.key(0), target, normal(2), 500)
        >>> x.mean(0).round(1).tolist()
        [1.0, 1.0]
        >>> float(drift)
        0.0
    """
    dim, num_moves = target.dim, 1 if brief else num_moves
    hmc, adaptive_tempered = load("blackjax.mcmc.hmc"), load("blackjax.smc.adaptive_tempered")

    def log_ratio(x: Float[Array, " d"]) -> Float[Array, ""]:
        return or_very_low(target.logdensity_fn(x) - base.log_prob(x))

    key_start, key_loop, key_steps = jax.random.split(key, 3)
    particles = jax.vmap(base.sample)(jax.random.split(key_start, num_particles))
    kernel = adaptive_tempered.build_kernel(
        base.log_prob,
        log_ratio,
        hmc.build_kernel(),
        hmc.init,
        load("blackjax.smc.resampling").systematic,
        target_ess=0.7,
    )

    def advance(carry):  # type: ignore[no-untyped-def]
        k, rounds, arrived, state, step_size, log_z = carry
        # blackjax resamples, moves and then weighs: the first round at the target ends the tempering
        arrived = jnp.where((rounds <= 1) | (rounds == _MORE_ROUNDS), state.particles, arrived)
        parameters = {
            "step_size": spread_out(jax.random.fold_in(key_steps, k), step_size, num_particles),
            "inverse_mass_matrix": jnp.ones((1, dim), particles.dtype),
            "num_integration_steps": jnp.array([LEAPS]),
        }
        rounds = rounds + (state.tempering_param >= 1.0)
        state, info = kernel(jax.random.fold_in(key_loop, k), state, num_moves, parameters)
        step_size = adapted(step_size, info.update_info.acceptance_rate)
        return k + 1, rounds, arrived, state, step_size, log_z + info.log_likelihood_increment

    def unfinished(carry):  # type: ignore[no-untyped-def]
        k, rounds, arrived, state, *_ = carry
        moving = (drift_between(arrived, state.particles) > 0.0) | (rounds > _MORE_ROUNDS)
        moving &= not brief
        return ((rounds < _LAST_ROUNDS) | (moving & (rounds < _MAX_ROUNDS))) & (k < _MAX_TEMPERATURES)

    state = adaptive_tempered.init(particles)
    state = state._replace(tempering_param=jnp.zeros((), particles.dtype))
    step_size = first_step_size(particles)
    none = jnp.zeros((), jnp.int32)
    carry = none, none, particles, state, step_size, jnp.zeros((), particles.dtype)
    temperatures, _, arrived, state, _, log_z = jax.lax.while_loop(unfinished, advance, carry)
    drift = jnp.where(state.tempering_param < 1.0, jnp.inf, drift_between(arrived, state.particles))
    return state.particles, log_z, temperatures * (num_particles * num_moves * LEAPS), drift


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


def _covering(scouts: Float[Array, "m d"]) -> Mixture:
    """Cover the whitened unit ball and where scouts lie, in equal parts."""
    centre = jnp.nan_to_num(jnp.nanmedian(scouts, 0))
    spread = jnp.nan_to_num(1.4826 * jnp.nanmedian(jnp.abs(scouts - centre), 0))
    return Mixture(
        jnp.log(jnp.full(2, 0.5, scouts.dtype)),
        None,
        jnp.stack([jnp.zeros_like(centre), jnp.clip(centre, -_FAR, _FAR)]),
        _WIDE * jnp.stack([jnp.ones_like(spread), jnp.clip(spread, 1.0, _FAR)]),
    )


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
        inside = jnp.mean(_belong((particles - mean) @ rotation / std))
        share = jax.nn.sigmoid(elbo - log_z)
        missing = usable & (inside < _FOUND * share)
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


def _belong(z: Float[Array, "n d"]) -> Bool[Array, " n"]:
    """Say which particles may be of a mode, in coordinates where it is N(0, I).

    Norms are not enough: in a hundred dimensions particles of another mode six deviations away are as near
    as many of its own. But their mean then lies off, and those beyond half of the way to it are left out.
    """

    def leave_out(_: Int[Array, ""], own: Bool[Array, " n"]) -> Bool[Array, " n"]:
        mean = own @ z / jnp.maximum(jnp.sum(own), 1)
        distance = jnp.linalg.norm(mean)
        beyond = z @ mean > 0.5 * distance**2
        return own & ~((distance > _APART) & beyond)

    near = jnp.sum(z * z, -1) < likely_radius(z.shape[1])
    return jax.lax.fori_loop(0, _OTHERS, leave_out, near)


def warm_start(target: Target, order: Int[Array, " d"], search: Search, brief: bool = False) -> list[Stage]:
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
        brief: a first look by few particles, where there are matrices.

    Returns:
        Stages for `run_stages`. The first takes a random key; starts, points of finite density, shape
        ``[s, d]``; and scouts, points that lie as widely as the target may, such as draws of the prior,
        shape ``[m, d]``. The last returns the whitening, with margins that may be the identity; the
        mixture, whose first component is N(0, I) and alone where there is but one; the whitened particles,
        shape ``[n, d]``; the number of target gradients spent, without the few of `first_guesses`;
        the particles' drift (see `tempered_particles`); and a random key for what comes next.

    Raises:
        ValueError: for a refined map in more dimensions than have matrices.
    """
    if target.dim > search.max_dense_dim:
        if search.refine:
            raise ValueError(
                f"`refine` fits matrices to particles, up to `max_dense_dim` = {search.max_dense_dim} "
                f"dimensions, got {target.dim}. Pass `Search(refine=False)`."
            )
        return _wide_warm_start(target, search)

    def guess(key, starts, scouts):  # type: ignore[no-untyped-def]
        return jax.random.split(key, 5), first_guesses(target, starts, scouts, order), scouts

    def seek(keys, guesses, scouts):  # type: ignore[no-untyped-def]
        found = fit(keys[0], target, guesses)
        first = jax.tree.map(lambda a, b: jnp.where(found.separate, a, b), found.pooled, found.best)
        return keys, found, first, _covering(jax.vmap(lambda x: first.inverse(x)[0])(scouts))

    def temper(keys, found, first, base):  # type: ignore[no-untyped-def]
        num = search.first_particles if brief else search.num_particles
        white = whiten(target, first)
        return keys, found, first, *tempered_particles(keys[1], white, base, num, search.num_moves, brief)

    def refine(keys, found, first, particles, log_z, gradients, drift):  # type: ignore[no-untyped-def]
        key_refine, key_mixture = jax.random.split(keys[3])
        fitted, moved, spreading = _refine(key_refine, target, first, particles, order)
        good = jnp.all(jnp.isfinite(moved))
        particles = jnp.where(good, moved, particles)
        drift = jnp.where(good & jnp.isfinite(drift), spreading, drift)
        gradients += _REFINEMENTS * _REFINING_MOVES * LEAPS * len(particles)
        return keys.at[3].set(key_mixture), found, first, particles, log_z, gradients, drift, fitted

    def settle(keys, found, first, base):  # type: ignore[no-untyped-def]
        mixture, nowhere = _unsearched(found.best.loc)
        return found.best, mixture, nowhere, found.gradients, jnp.zeros(()), keys[4]

    if not search.num_particles:
        return [guess, seek, settle]
    return [guess, seek, temper, *([refine] if search.refine else []), _choose]


def _unsearched(like: Float[Array, " d"]) -> tuple[Mixture, Float[Array, "0 d"]]:
    """Make what stands for the mixture and the particles where none look."""
    return normal(len(like)), jnp.zeros((0, len(like)), like.dtype)


def _choose(
    keys: Array,
    found: Fit,
    first: Triangular,
    particles: Float[Array, "n d"],
    log_z: Float[Array, ""],
    gradients: Int[Array, ""],
    drift: Float[Array, ""],
    fitted: Triangular | None = None,
) -> tuple[Triangular, Mixture, Float[Array, "n d"], Int[Array, ""], Float[Array, ""], Key]:
    """Choose the map and the mixture, from what was found and the particles that ``first`` whitens.

    ``fitted`` are two maps, stacked: of the first half of the particles, which is compared, and of all.
    """
    n, dim = particles.shape
    size = max_components(n, dim)
    own = jax.vmap(lambda x: first.inverse(x)[0])(found.draws.reshape(-1, dim)).reshape(found.draws.shape)
    particles = _add_missing(keys[2], particles, log_z, found.elbos, own)
    x = jax.vmap(lambda u: first.forward(u)[0])(particles)

    sizes = sorted({2} | {size >> shift for shift in range(size.bit_length() - 1)})
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
    blank, plain, key_mixture = identity_margins(x[0]), _padded_normal(x[0], size), keys[3]

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
    return whitening, mixture, u, found.gradients + gradients, drift, keys[4]


def _wide_warm_start(target: Target, search: Search) -> list[Stage]:
    """Do what `warm_start` does, in many dimensions, where particles are too few for covariances."""

    def guess(key, starts, scouts):  # type: ignore[no-untyped-def]
        return jax.random.split(key, 8), diagonal_guesses(target, starts, scouts), scouts

    def seek(keys, guesses, scouts):  # type: ignore[no-untyped-def]
        fits, elbos, gradients = fit_low_rank(keys[0], target, guesses)
        chosen, there = separate_fits(keys[7], target.logdensity_fn, fits, elbos)
        return keys, jax.tree.map(lambda leaf: leaf[chosen], fits), there, gradients, scouts

    def part(keys, fits, there, gradients, scouts):  # type: ignore[no-untyped-def]
        modes, more = _draw_modes(keys[5], target, fits, there)
        found = _mixture_of_modes(keys[6], target, fits, modes, there, search)
        return keys, fits, found, gradients + more, scouts

    def temper(keys, fits, found, gradients, scouts):  # type: ignore[no-untyped-def]
        best = jnp.argmax(found.mixture.log_weight)
        flat = jax.tree.map(lambda leaf: leaf[best], fits)

        def go(_):  # type: ignore[no-untyped-def]
            base = _covering(jax.vmap(lambda x: flat.inverse(x)[0])(scouts))
            particles, _, more, drift = tempered_particles(
                keys[1], whiten(target, flat), base, search.num_particles, search.num_moves
            )
            return particles, more, drift

        stay = found.points, jnp.zeros((), jnp.int32), found.drift
        particles, more, drift = jax.lax.cond(found.several, lambda stay: stay, go, stay)
        return keys, flat, found, particles, gradients + more, drift

    def finish(keys, flat, found, particles, gradients, drift):  # type: ignore[no-untyped-def]
        def go(_):  # type: ignore[no-untyped-def]
            # particles do not move far along a stiff direction: the fit ends by variational inference again
            usable = jnp.all(jnp.isfinite(particles))
            v = jnp.where(usable, particles, 0.0)
            guess = _leading_directions(keys[2], flat, v, usable, search.rank)
            fits, _, more = fit_low_rank(keys[3], target, jax.tree.map(lambda leaf: leaf[None], guess))
            whitening = jax.tree.map(lambda leaf: leaf[0], fits)
            u = jax.vmap(lambda v: whitening.inverse(flat.forward(v)[0])[0])(v)
            return whitening, _only_normal(found.mixture), u, more

        stay = found.whitening, found.mixture, particles, jnp.zeros((), jnp.int32)
        whitening, mixture, u, more = jax.lax.cond(found.several, lambda stay: stay, go, stay)
        return whitening, mixture, u, gradients + more, drift, keys[4]

    def settle(keys, fits, there, gradients, scouts):  # type: ignore[no-untyped-def]
        best = jax.tree.map(lambda leaf: leaf[0], fits)
        mixture, nowhere = _unsearched(best.loc)
        return best, mixture, nowhere, gradients, jnp.zeros(()), keys[4]

    return [guess, seek, part, temper, finish] if search.num_particles else [guess, seek, settle]


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
) -> tuple[Mode, Int[Array, ""]]:
    """Polish fits, where there are several; with target gradients spent."""
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
    return modes, jnp.where(several, jnp.sum(there), 0) * gradients_per_mode(target.dim)


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
    blank = blank._replace(mixture=_only_normal(blank.mixture))
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


def _padded_normal(like: Float[Array, " d"], size: int) -> Mixture:
    """Make N(0, I), all other components of which are not there."""
    shape = size, like.size
    blank = jnp.zeros(shape, like.dtype)
    return _only_normal(Mixture(blank[:, 0], jnp.zeros((*shape, like.size), like.dtype), blank, blank))


def _only_normal(like: Mixture) -> Mixture:
    """Make N(0, I) in the shapes of a mixture, all other components of which are not there."""
    rotation = None
    if like.rotation is not None:
        one = jnp.eye(like.centre.shape[1], dtype=like.centre.dtype)
        rotation = jnp.broadcast_to(one, like.rotation.shape)
    first = jnp.arange(len(like.log_weight)) == 0
    return Mixture(
        jnp.where(first, 0.0, -jnp.inf).astype(like.log_weight.dtype),
        rotation,
        jnp.zeros_like(like.centre),
        jnp.ones_like(like.std),
    )


def _affine_maps(x: Float[Array, "n d"], order: Int[Array, " d"]) -> tuple[Triangular, Triangular]:
    """Make the affine maps with the points' mean and covariance, and with their variances alone."""
    dim = x.shape[1]
    loc = jnp.mean(x, 0)[order]
    cov = jnp.cov(x[:, order], rowvar=False).reshape(dim, dim)
    diagonal = jnp.diag(jnp.sqrt(jnp.diagonal(cov)))
    tril = jnp.linalg.cholesky(cov + 1e-12 * jnp.trace(cov) * jnp.eye(dim))
    tril = jnp.where(jnp.all(jnp.isfinite(tril)), tril, diagonal)
    return affine(loc, tril, order), affine(loc, diagonal, order)
