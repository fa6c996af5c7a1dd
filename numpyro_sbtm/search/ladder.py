# SPDX-License-Identifier: Apache-2.0
"""From a posterior to what is known before training: where it is, and how good draws from there are."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.compile import Stage, is_traced, run_stages
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.local import LocalMove
from numpyro_sbtm.core.maps import Affine, Map, whiten
from numpyro_sbtm.core.mixture import Mixture, max_components, normal
from numpyro_sbtm.core.psis import judged_tail_index
from numpyro_sbtm.core.target import Key, Keys, LogDensity, Target
from numpyro_sbtm.core.weights import chain_efficiency, clean, ess_fraction, log_evidence
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.climb import dips_between, values_between
from numpyro_sbtm.search.first_look import first_look
from numpyro_sbtm.search.located import Located
from numpyro_sbtm.search.moves import first_step_size
from numpyro_sbtm.search.population import NUM_WIDER, better_mixture, with_wider
from numpyro_sbtm.search.warm_start import Cloud, warm_start

__all__ = ["Precondition", "StartingPoints", "find_start", "most_components", "with_step_size"]

Precondition = str | tuple[Any, Any] | Map | None
"""'auto', ``(loc, scale_tril)``, a map, or None; a kernel turns an AutoGuide into a pair."""

_NUM_KEPT = 1024  # points kept for training
_NUM_ADAPTING = 32  # points that choose the step size of local moves
_WORSE = 0.9  # of its effective fraction may be lost by a mixture that reaches further
_NUM_HEAVY = 8  # particles of the largest weights, which may be of a mode where nothing is drawn
_HEAVY = 3.0  # nats by which a weight exceeds the mean one, to be among them
_CLIMB_STEPS = 40
_QUALITY = "ess_fraction", "khat", "efficiency", "log_evidence", "log_evidence_se"  # of what is found
_MOST_ROUNDS = 40  # of half of the particles


class StartingPoints(NamedTuple):
    """Where to look for a posterior.

    Attributes:
        starts: points of finite density, shape ``[s, d]``.
        scouts: points that lie as widely as the posterior may, draws of the prior best, shape ``[m, d]``.
        order: the coordinates, hyperparameters first, shape ``[d]``.
    """

    starts: Float[Array, "s d"]
    scouts: Float[Array, "m d"]
    order: Int[Array, " d"]


def find_start(
    key: Key,
    target: Target,
    where: StartingPoints,
    precondition: Precondition,
    search: Search,
    steps_per_draw: int = 4,
) -> Located:
    """Look for the posterior, or take what is given, and judge draws from there.

    Normal distributions and few particles look first, then a map that bends and as few particles, then more
    of them. Where draws from what one look shows are good, its particles have arrived, none of them lies
    outside, and no look before has a higher evidence, that is all. The first look must be certain of it, or
    the second agree. Last comes a look by many, where training would not know where to begin. Where weights
    of draws are not nearly equal, draws better the mixture, in few enough dimensions, if they are then good
    enough. What is traced, and what has too many dimensions for matrices, is looked at once by many, and its
    mixture stays.

    Args:
        key: random key.
        target: the posterior on the unconstrained space.
        where: points to look from.
        precondition: 'auto' to look for it, else the whitening itself.
        search: how much is looked for.
        steps_per_draw: Metropolis steps of a draw, for what is predicted of chains.

    Returns:
        What was found, without a step size.
    """
    starts, scouts, order = where
    searched = isinstance(precondition, str) and search.num_particles > 0
    check = _check(target, search, searched, steps_per_draw)
    if not isinstance(precondition, str):
        return _judged(run_stages([_given(precondition), check], key, starts, scouts))
    guess, *many = warm_start(target, order, search)
    if is_traced((key, starts)) or target.dim > search.max_dense_dim or not search.num_particles:
        return _judged(run_stages([guess, *many, check], key, starts, scouts))

    def look(number: int, stages: list[Stage], *before: Any) -> tuple[Located, list[Any]]:
        """Look by these stages, and let draws better what is found; with what every stage returned."""
        results: list[Any] = []
        found = _judged(run_stages([*stages, check], *before, results=results))
        return _bettered(jax.random.fold_in(key, number), target, found, search, steps_per_draw), results

    if search.refine or not search.first_particles:
        return look(1, [guess, *many], key, starts, scouts)[0]
    found, (guessed, *_) = look(1, [guess, *first_look(target, search)], key, starts, scouts)
    if bool(found.certain()):
        return found
    seek, *few = warm_start(target, order, search, Cloud(search.first_particles, 1, brief=True))[1:]
    again, (_, fitted, *_) = look(2, [_with_new_keys, seek, *few], *guessed)
    looks = [found]
    found = _after(looks, again, guessed[-1])
    # what was fitted stays; particles start anew, and many only where few have not seen enough to train from
    for number, cloud in (3, Cloud(search.num_particles // 2, 1, max_rounds=_MOST_ROUNDS)), (4, None):
        if bool(found.sufficient()) or (cloud is None and bool(found.trainable())):
            return found
        stages = warm_start(target, order, search, cloud)[2:]
        fitted = _with_new_keys(*fitted)
        found = _after(looks, look(number, stages, *fitted)[0], fitted[1].spent)
    return found


def _after(before: list[Located], found: Located, in_both: Evaluations) -> Located:
    """Choose between what looks before and the next have found, and append the next to those before.

    Draws of which the evidence is lower than that of another look, by more than errors, miss a part of the
    posterior. If they are those of the last look, it is not taken; if they are those of the next, that part
    is as good as a mode outside. What was evaluated is that of all, but what is in both is counted once.
    """
    last = before[-1]
    found = found._replace(spent=found.spent.plus(last.spent).plus(in_both.times(-1)))
    misses = any(bool(found.less_than(look)) for look in before)
    found = found._replace(outside=found.outside | misses)
    better = not bool(found.sufficient()) or bool(last.ess_fraction > found.ess_fraction)
    stays = bool(last.sufficient() & (found.drift == 0.0) & ~last.less_than(found))
    before.append(last._replace(spent=found.spent) if stays and better else found)
    return before[-1]


def _with_new_keys(keys: Keys, *rest: Any) -> tuple[Any, ...]:
    """Begin a look with keys that none before has used."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 1), *rest


def most_components(dim: int, search: Search) -> int:
    """Return how many components the mixture of any search in so few dimensions may have.

    Examples:
        >>> from numpyro_sbtm.options import Search
        >>> from numpyro_sbtm.search.ladder import most_components
        >>> most_components(2, Search()), most_components(100, Search())
        (66, 4)
    """
    return max_components(search.num_particles, dim) + NUM_WIDER


def _bettered(key: Key, target: Target, found: Located, search: Search, steps_per_draw: int) -> Located:
    """Let draws better the mixture, where that may do instead of training, and judge it by fresh ones.

    Training starts better from the mixture that particles show: the wider components and the many axes of
    this one are for draws alone.
    """
    turned = target.dim <= search.max_mixture_dim and search.mixture_rounds
    if not turned or bool(jnp.isneginf(found.khat) | ~found.settled()):
        return found
    num, rounds = search.num_checked, search.mixture_rounds

    def adapt(key: Key, whitening: Map, reference: Mixture, points: Float[Array, "m d"]) -> tuple[Any, ...]:
        key_rounds, key_check = jax.random.split(key)
        density = whiten(target, whitening).logdensity_fn
        better = better_mixture(key_rounds, density, with_wider(reference, points), num, rounds)
        log_weight = _fresh_weights(key_check, density, better, num)
        return better, *_quality(log_weight, steps_per_draw, points.dtype)

    better, *quality = run_stages([adapt], key, found.whitening, found.reference, found.points)
    found = found._replace(spent=found.spent.plus(Evaluations(values=(rounds + 1) * num)))
    bettered = found._replace(reference=better, **dict(zip(_QUALITY, quality, strict=True)))
    worse = float(bettered.ess_fraction) < _WORSE * float(found.ess_fraction)
    return found if worse or not bool(bettered.sufficient()) else bettered


def _weights(logdensity_fn: LogDensity, proposal: Mixture, u: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Weigh whitened points as draws of the proposal; NaN where there is no density."""
    return jax.vmap(lambda u: logdensity_fn(u) - proposal.log_prob(u))(u)


def _fresh_weights(key: Key, logdensity_fn: LogDensity, proposal: Mixture, num: int) -> Float[Array, " n"]:
    draws = jax.vmap(proposal.sample)(jax.random.split(key, num))
    return clean(_weights(logdensity_fn, proposal, draws))


def _quality(log_weight: Float[Array, " n"], steps_per_draw: int, dtype: Any) -> tuple[Float[Array, ""], ...]:
    """Compute the effective fraction, k-hat where it matters, what a draw of a chain is worth, and log Z."""
    measures = (
        ess_fraction(log_weight),
        judged_tail_index(log_weight),
        chain_efficiency(log_weight, steps_per_draw),
        *log_evidence(log_weight),
    )
    return tuple(measure.astype(dtype) for measure in measures)


def with_step_size(
    key: Key, target: Target, found: Located, local: LocalMove, adapted: bool = True
) -> Located:
    """Choose the step size of local moves; without adapting it, one that suits N(0, I)."""
    if not adapted:
        return found._replace(step_size=first_step_size(found.reference.centre))

    def adapt(key: Key, found: Located) -> tuple[Float[Array, ""], Int[Array, ""]]:
        key_points, key_adapt = jax.random.split(key)
        if found.points is None:
            points = jax.vmap(found.reference.sample)(jax.random.split(key_points, _NUM_ADAPTING))
        else:
            points = _some(found.points, _NUM_ADAPTING)
        return local.adapt(key_adapt, whiten(target, found.whitening).logdensity_fn, points)

    step_size, gradients = run_stages([adapt], key, found)
    return found._replace(step_size=step_size, spent=found.spent.plus(Evaluations(gradients=gradients)))


def _some(points: Float[Array, "n d"], num: int) -> Float[Array, "m d"]:
    """Take about so many particles evenly spaced: neighbours descend from one another."""
    return points[:: max(1, len(points) // num)]


def _judged(found: tuple[Any, ...]) -> Located:
    """Name what `_check` returned."""
    whitening, reference, points, quality, drift, outside, spent = found
    searched = jnp.asarray(np.array(points is not None))
    return Located(
        whitening=whitening,
        reference=reference,
        points=points,
        **dict(zip(_QUALITY, quality, strict=True)),
        drift=drift,
        outside=outside,
        step_size=None,
        spent=spent,
        searched=searched,
    )


def _given(precondition: tuple[Any, Any] | Map | None) -> Stage:
    """Make the stage that takes a whitening as it is."""

    def given(key: Key, starts: Float[Array, "s d"], scouts: Float[Array, "m d"]):  # type: ignore[no-untyped-def]
        dim, dtype = starts.shape[1], starts.dtype
        whitening = precondition
        # a named tuple may be a map, too
        if whitening is None or not isinstance(whitening, Map):
            loc, scale_tril = whitening or (jnp.zeros(dim), jnp.eye(dim))
            whitening = Affine(jnp.asarray(loc, dtype), jnp.asarray(scale_tril, dtype))
        none = jnp.zeros((0, dim), dtype)
        return whitening, normal(dim), none, none, Evaluations().as_arrays(), jnp.zeros((), dtype), key

    return given


def _check(target: Target, search: Search, searched: bool, steps_per_draw: int) -> Stage:
    """Make the stage that judges what was found, by fresh draws and by the particles."""

    def check(whitening, reference, points, suspects, spent, drift, key):  # type: ignore[no-untyped-def]
        dtype = points.dtype
        white = whiten(target, whitening)

        log_weight = _fresh_weights(key, white.logdensity_fn, reference, search.num_checked)
        kept = _some(points, _NUM_KEPT) if searched else None
        quality = _quality(log_weight, steps_per_draw, dtype)
        drift, spent = drift.astype(dtype), spent.plus(Evaluations(values=search.num_checked))
        outside = jnp.zeros((), bool)
        if kept is not None:
            excess = _weights(white.logdensity_fn, reference, kept)
            excess = jnp.nan_to_num(excess, nan=-jnp.inf) - log_evidence(log_weight)[0]
            tops = jax.vmap(lambda x: whitening.inverse(x)[0])(suspects)
            outside = _outside(white.logdensity_fn, kept, excess, tops)
            of_pair = Evaluations(values_between(), 2 * _CLIMB_STEPS)
            spent = spent.plus(of_pair.times(_NUM_HEAVY + len(suspects)))
            spent = spent.plus(Evaluations(values=len(kept)))
        return whitening, reference, kept, quality, drift, outside, spent.as_arrays()

    return check


def _outside(
    logdensity_fn: LogDensity,
    points: Float[Array, "n d"],
    excess: Float[Array, " n"],
    suspects: Float[Array, "s d"],
) -> Bool[Array, ""]:
    """Say whether a suspect, or one of the heaviest particles, is of another mode than all not heavy ones.

    A tail that is heavier than that of the mixture also makes heavy particles, but no dip lies on the way to
    them from the nearest that is not heavy. Both ends climb before, since in many dimensions it lies between
    tops only.
    """
    heavy = excess > _HEAVY
    heaviest = jnp.argsort(-excess)[:_NUM_HEAVY]
    there = jnp.concatenate([heavy[heaviest], jnp.all(jnp.isfinite(suspects), -1)])
    from_there = jnp.concatenate([points[heaviest], suspects])
    from_there = jnp.where(there[:, None], from_there, points[0])

    def nearest(u: Float[Array, " d"]) -> Float[Array, " d"]:
        return points[jnp.argmin(jnp.where(heavy, jnp.inf, jnp.sum((points - u) ** 2, -1)))]

    ends = jnp.stack([from_there, jax.vmap(nearest)(from_there)])
    tops = jax.vmap(jax.vmap(lambda u: _climb(logdensity_fn, u)))(ends)
    return jnp.any(there & jax.vmap(lambda a, b: dips_between(logdensity_fn, a, b))(*tops))


def _climb(logdensity_fn: LogDensity, u: Float[Array, " d"]) -> Float[Array, " d"]:
    """Go up the gradient, by steps that grow while they gain; far enough to leave the noise of particles."""
    value_and_grad = jax.value_and_grad(logdensity_fn)

    def step(_: Int[Array, ""], carry):  # type: ignore[no-untyped-def]
        u, value, gradient, size = carry
        new = u + size * gradient
        there = value_and_grad(new)
        better = there[0] > value
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), (new, *there), (u, value, gradient))
        return *kept, size * jnp.where(better, 1.5, 0.25)

    # the first step stays, and evaluates where it starts
    start = u, jnp.full_like(u[0], -jnp.inf), jnp.zeros_like(u), jnp.full_like(u[0], 1 / 1.5)
    return jax.lax.fori_loop(0, _CLIMB_STEPS, step, start)[0]
