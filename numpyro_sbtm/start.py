# SPDX-License-Identifier: Apache-2.0
"""From a posterior to what is known before training: where it is, and how good draws from there are."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from numpyro.util import not_jax_tracer

from numpyro_sbtm.core.mixture import Mixture, max_components, normal
from numpyro_sbtm.core.population import NUM_WIDER, better_mixture, with_wider
from numpyro_sbtm.core.target import Key, LogDensity, Target
from numpyro_sbtm.core.variational import dips_between
from numpyro_sbtm.core.weights import clean, ess_fraction, log_evidence
from numpyro_sbtm.core.whitening import Whitening, affine, whiten
from numpyro_sbtm.local import LocalMove
from numpyro_sbtm.moves import first_step_size
from numpyro_sbtm.psis import judged_tail_index
from numpyro_sbtm.stages import Stage, run_stages
from numpyro_sbtm.state import WarmStart
from numpyro_sbtm.warm_start import DENSE, NUM_PARTICLES, warm_start

__all__ = ["Precondition", "find_start", "most_components", "with_step_size"]

Precondition = str | tuple[Any, Any] | None
"""'auto', 'refined', ``(loc, scale_tril)``, or None; a kernel turns an AutoGuide into a pair."""

_NUM_CHECKED = 4096  # draws that judge the warm start
_NUM_KEPT = 1024  # points kept for training
_NUM_ADAPTING = 32  # points that choose the step size of local moves
_SOUGHT = 1  # number of the stage after which particles start
_NUM_ROUNDS = 3  # in which draws better the mixture, as many in each as judge it
_MOST_TURNED = 64  # dimensions up to which they do
_WORSE = 0.9  # of its effective fraction may be lost by a mixture that reaches further
_NUM_HEAVY = 8  # particles of the largest weights, which may be of a mode where nothing is drawn
_HEAVY = 3.0  # nats by which a weight exceeds the mean one, to be among them
_CLIMB_STEPS = 40


def find_start(
    key: Key,
    target: Target,
    starts: Float[Array, "s d"],
    scouts: Float[Array, "m d"],
    order: Int[Array, " d"],
    precondition: Precondition,
) -> WarmStart:
    """Look for the posterior, or take what is given, and judge draws from there.

    Few particles look first. Where draws from what they show are good, the particles have arrived, and none
    of them lies outside, that is all; else many look. Where weights of draws are not nearly equal, draws
    better the mixture, up to 64 dimensions, if they are then good enough. What is traced, and what has more
    than 128 dimensions, has no first look, and its mixture stays.

    Args:
        key: random key.
        target: the posterior on the unconstrained space.
        starts: points of finite density, shape ``[s, d]``.
        scouts: points that lie as widely as the posterior may, shape ``[m, d]``.
        order: the coordinates, hyperparameters first, shape ``[d]``.
        precondition: 'auto' or 'refined' to look for it (see `warm_start`), else the whitening itself.

    Returns:
        The warm start, without a step size.
    """
    searched = isinstance(precondition, str)
    check = _check(target, searched)
    if not searched:
        assert not isinstance(precondition, str)
        return _judged(run_stages([_given(precondition), check], key, starts, scouts))
    refined = precondition == "refined"
    many = warm_start(target, order, refined)
    traced = not (not_jax_tracer(key) and not_jax_tracer(starts))
    if traced or target.dim > DENSE:
        return _judged(run_stages([*many, check], key, starts, scouts))
    key_few, key_many = jax.random.split(jax.random.fold_in(key, 1))
    if refined:
        return _bettered(key_many, target, _judged(run_stages([*many, check], key, starts, scouts)))
    results: list[Any] = []
    few = warm_start(target, order, brief=True)
    warm = _judged(run_stages([*few, check], key, starts, scouts, results=results))
    warm = _bettered(key_few, target, warm)
    if bool(warm.sufficient()):
        return warm
    # what was fitted stays; particles start anew
    keys, *seen = results[_SOUGHT]
    keys = run_stages([lambda keys: (jax.vmap(jax.random.fold_in, (0, None))(keys, 1),)], keys)[0]
    more = _judged(run_stages([*many[_SOUGHT + 1 :], check], keys, *seen))
    more = more._replace(gradients=more.gradients + (warm.gradients - seen[0].gradients))
    return _bettered(key_many, target, more)


def most_components(dim: int) -> int:
    """Return how many components the mixture of any search in so few dimensions may have.

    Examples:
        >>> from numpyro_sbtm.start import most_components
        >>> most_components(2), most_components(100)
        (66, 4)
    """
    return max_components(NUM_PARTICLES, dim) + NUM_WIDER


def _bettered(key: Key, target: Target, warm: WarmStart) -> WarmStart:
    """Let draws better the mixture, where that may do instead of training, and judge it by fresh ones.

    Training starts better from the mixture that particles show: the wider components and the many axes of
    this one are for draws alone.
    """
    if target.dim > _MOST_TURNED or bool(jnp.isneginf(warm.khat) | ~warm.settled()):
        return warm

    def adapt(
        key: Key, whitening: Whitening, reference: Mixture, points: Float[Array, "m d"]
    ) -> tuple[Any, ...]:
        key_rounds, key_check = jax.random.split(key)
        density = whiten(target, whitening).logdensity_fn
        better = better_mixture(key_rounds, density, with_wider(reference, points), _NUM_CHECKED, _NUM_ROUNDS)
        return better, *_quality(_fresh_weights(key_check, density, better), points.dtype)

    better, fraction, khat = run_stages([adapt], key, warm.whitening, warm.reference, warm.points)
    bettered = warm._replace(reference=better, ess_fraction=fraction, khat=khat)
    worse = float(fraction) < _WORSE * float(warm.ess_fraction)
    return warm if worse or not bool(bettered.sufficient()) else bettered


def _weights(logdensity_fn: LogDensity, proposal: Mixture, u: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Weigh whitened points as draws of the proposal; NaN where there is no density."""
    return jax.vmap(lambda u: logdensity_fn(u) - proposal.log_prob(u))(u)


def _fresh_weights(key: Key, logdensity_fn: LogDensity, proposal: Mixture) -> Float[Array, " n"]:
    draws = jax.vmap(proposal.sample)(jax.random.split(key, _NUM_CHECKED))
    return clean(_weights(logdensity_fn, proposal, draws))


def _quality(log_weight: Float[Array, " n"], dtype: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the effective fraction, and k-hat where it matters."""
    return ess_fraction(log_weight).astype(dtype), judged_tail_index(log_weight).astype(dtype)


def with_step_size(
    key: Key, target: Target, warm: WarmStart, local: LocalMove, adapted: bool = True
) -> WarmStart:
    """Choose the step size of local moves; without adapting it, one that suits N(0, I)."""
    if not adapted:
        return warm._replace(step_size=first_step_size(warm.reference.centre))

    def adapt(key: Key, warm: WarmStart) -> tuple[Float[Array, ""], Int[Array, ""]]:
        key_points, key_adapt = jax.random.split(key)
        if warm.points is None:
            points = jax.vmap(warm.reference.sample)(jax.random.split(key_points, _NUM_ADAPTING))
        else:
            points = _some(warm.points, _NUM_ADAPTING)
        return local.adapt(key_adapt, whiten(target, warm.whitening).logdensity_fn, points)

    step_size, gradients = run_stages([adapt], key, warm)
    return warm._replace(step_size=step_size, gradients=warm.gradients + gradients)


def _some(points: Float[Array, "n d"], num: int) -> Float[Array, "m d"]:
    """Take about so many particles evenly spaced: neighbours descend from one another."""
    return points[:: max(1, len(points) // num)]


def _judged(found: tuple[Any, ...]) -> WarmStart:
    """Name what `_check` returned."""
    whitening, reference, points, fraction, khat, drift, gradients, outside = found
    return WarmStart(whitening, reference, points, fraction, khat, drift, outside, None, gradients)


def _given(precondition: tuple[Any, Any] | None) -> Stage:
    """Make the stage that takes a whitening as it is."""

    def given(key: Key, starts: Float[Array, "s d"], scouts: Float[Array, "m d"]):  # type: ignore[no-untyped-def]
        dim, dtype = starts.shape[1], starts.dtype
        loc, scale_tril = precondition or (jnp.zeros(dim), jnp.eye(dim))
        whitening = affine(jnp.asarray(loc, dtype), jnp.asarray(scale_tril, dtype))
        none = jnp.zeros((0, dim), dtype)
        return whitening, normal(dim), none, jnp.zeros((), jnp.int32), jnp.zeros((), dtype), key

    return given


def _check(target: Target, searched: bool) -> Stage:
    """Make the stage that judges what was found, by fresh draws and by the particles."""

    def check(whitening, reference, points, gradients, drift, key):  # type: ignore[no-untyped-def]
        dtype = points.dtype
        white = whiten(target, whitening)

        log_weight = _fresh_weights(key, white.logdensity_fn, reference)
        kept = _some(points, _NUM_KEPT) if searched else None
        fraction, khat = _quality(log_weight, dtype)
        drift, gradients = drift.astype(dtype), gradients.astype(jnp.int32)
        outside = jnp.zeros((), bool)
        if kept is not None:
            excess = _weights(white.logdensity_fn, reference, kept)
            excess = jnp.nan_to_num(excess, nan=-jnp.inf) - log_evidence(log_weight)[0]
            outside = _outside(white.logdensity_fn, kept, excess)
            gradients += 2 * _NUM_HEAVY * _CLIMB_STEPS
        return whitening, reference, kept, fraction, khat, drift, gradients, outside

    return check


def _outside(
    logdensity_fn: LogDensity, points: Float[Array, "n d"], excess: Float[Array, " n"]
) -> Bool[Array, ""]:
    """Say whether one of the heaviest particles is of another mode than the nearest that is not heavy.

    A tail that is heavier than that of the mixture also makes heavy particles, but no dip lies on the way to
    them. Both particles climb before, since in many dimensions it lies between tops only.
    """
    heavy = excess > _HEAVY
    heaviest = jnp.argsort(-excess)[:_NUM_HEAVY]

    def nearest(u: Float[Array, " d"]) -> Int[Array, ""]:
        return jnp.argmin(jnp.where(heavy, jnp.inf, jnp.sum((points - u) ** 2, -1)))

    pairs = jnp.stack([heaviest, jax.vmap(nearest)(points[heaviest])])
    tops = jax.vmap(jax.vmap(lambda u: _climb(logdensity_fn, u)))(points[pairs])
    return jnp.any(heavy[heaviest] & jax.vmap(lambda a, b: dips_between(logdensity_fn, a, b))(*tops))


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

    return jax.lax.fori_loop(0, _CLIMB_STEPS, step, (u, *value_and_grad(u), jnp.ones((), u.dtype)))[0]
