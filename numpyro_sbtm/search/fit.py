# SPDX-License-Identifier: Apache-2.0
"""Variational inference over whitening maps, from several starts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.maps import LowRank, Triangular, affine
from numpyro_sbtm.core.target import Key, LogDensity, Target

__all__ = [
    "TRIANGULAR",
    "Family",
    "Fit",
    "Shape",
    "climb",
    "connected",
    "diagonal_guesses",
    "dips_between",
    "first_guesses",
    "fit",
    "fit_low_rank",
    "leaders",
    "likely_radius",
]

_SEPARATE = 4.0  # squared distance of a fit from the mean, in pooled deviations, that makes it a mode
_COUNTS = 0.01  # share of the evidence from which a fit is one of the modes
_DISTANT_TOPS = 4  # modes above scouts that are fitted
_NUM_TOPS = 16  # modes that are fitted where there are no matrices
_SEGMENTS, _DIP = 8, 0.5  # parts of the way between two points; nats of a dip on it that separates them
_NUM_TEST = 512  # draws that compare fits
_LEAST_GAIN = 1e-5  # nats in one step of a climb, below which, three times in a row, it ends
_DROP = 0.35  # nats, over steps that measure curvature
_STEP_BOUNDS, _HALVINGS = (-26.0, 10.0), 6  # of the binary logarithm of a step, which is then known to .6
_COMPARABLE = 20.0  # nats below the best ELBO, within which a fit elsewhere may be another mode
_STEP_SIZE = 0.03
_NARROW = 0.1  # deviations with which a fit without correlations begins at a mode
_CHUNK = 250  # steps between looks at the ELBOs
_BRIEF = 150  # steps of fits before a few of them survive
_SURVIVORS = 4
_DECAY_CHUNKS = 3  # over which the step size decays
_MAX_STEADY_CHUNKS = 8
_RISING = 0.05  # nats by which the best ELBO rises in a chunk while it is worth going on


def climb(logdensity_fn: LogDensity, start: Float[Array, " d"], num_steps: int) -> Float[Array, " d"]:
    """Climb towards a mode by L-BFGS until it gains next to nothing; returns the best finite point met."""
    optimiser = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=20))

    def loss(y: Float[Array, " d"]) -> Float[Array, ""]:
        return -logdensity_fn(y)

    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):  # type: ignore[no-untyped-def]
        k, y, state, best, best_value, stale = carry
        value, gradient = value_and_grad(y, state=state)
        better = jnp.isfinite(value) & (value < best_value)
        stale = jnp.where(best_value - value > _LEAST_GAIN, 0, stale + 1)
        best, best_value = jnp.where(better, y, best), jnp.where(better, value, best_value)
        updates, state = optimiser.update(gradient, state, y, value=value, grad=gradient, value_fn=loss)
        return k + 1, optax.apply_updates(y, updates), state, best, best_value, stale

    def unfinished(carry):  # type: ignore[no-untyped-def]
        k, *_, stale = carry
        return (k < num_steps) & (stale < 3)

    zero = jnp.zeros((), jnp.int32)
    carry = zero, start, optimiser.init(start), start, jnp.asarray(jnp.inf, start.dtype), zero
    return jax.lax.while_loop(unfinished, step, carry)[3]


def _furthest(points: Float[Array, "m d"], num_given: int, num: int) -> Float[Array, "num d"]:
    """Choose points one by one, each the furthest from the first ``num_given`` and those chosen before."""
    spread = jnp.nanstd(jnp.where(jnp.isfinite(points), points, jnp.nan), 0)
    scaled = jnp.where(jnp.isfinite(points), points, 0.0) / jnp.maximum(spread, 1e-9)
    distance = jnp.min(jnp.sum((scaled[:, None] - scaled[:num_given]) ** 2, -1), 1)

    def choose(distance, _):  # type: ignore[no-untyped-def]
        far = jnp.argmax(distance)
        return jnp.minimum(distance, jnp.sum((scaled - scaled[far]) ** 2, -1)), far

    return points[jax.lax.scan(choose, distance, length=num)[1]]


def _steps(logdensity_fn: LogDensity, mode: Float[Array, " d"]) -> Float[Array, " d"]:
    """Find for every coordinate a step to both sides over which the log density drops by a tenth to a half.

    More where rounding hides that much, and the longest step where it does not drop so far.
    """
    top = logdensity_fn(mode)
    drop = jnp.maximum(_DROP, 16.0 * jnp.finfo(mode.dtype).eps * jnp.abs(top))

    def halve(_, bounds):  # type: ignore[no-untyped-def]
        low, high = bounds
        middle = 0.5 * (low + high)
        there = jnp.diag(jnp.exp2(middle))
        values = jax.vmap(logdensity_fn)(jnp.concatenate([mode + there, mode - there]))
        # a saddle rises: that is as far as another mode's edge
        within = jnp.abs(top - 0.5 * (values[: mode.size] + values[mode.size :])) < drop
        return jnp.where(within, middle, low), jnp.where(within, high, middle)

    bounds = tuple(jnp.full_like(mode, bound) for bound in _STEP_BOUNDS)
    return jnp.exp2(jax.lax.fori_loop(0, _HALVINGS, halve, bounds)[0])


def _laplace(logdensity_fn: LogDensity, mode: Float[Array, " d"]) -> Float[Array, "d d"]:
    """Compute a Cholesky factor of the inverse Hessian at a point, with guarded eigenvalues.

    Gradients at both ends of a step for every coordinate, not derivatives of the gradient: models may have
    none, and these tell the curvature at the scale of the density. Costs 2 d gradients and 12 d values.
    """
    dim = mode.shape[0]
    step = _steps(logdensity_fn, mode)
    ends = jnp.concatenate([mode + jnp.diag(step), mode - jnp.diag(step)])
    scores = jax.vmap(jax.grad(logdensity_fn))(ends)
    # what was added is not the step, but that rounded
    length = jnp.diagonal(ends[:dim] - ends[dim:])
    # in units of the steps all curvatures are alike
    hessian = -(step / length)[:, None] * (scores[:dim] - scores[dim:]) * step
    hessian = 0.5 * (hessian + hessian.T)
    usable = jnp.all(jnp.isfinite(hessian))
    eigenvalues, vectors = jnp.linalg.eigh(jnp.where(usable, hessian, jnp.eye(dim)))
    # flat or inverted directions get a wide scale, not an infinite one
    floor = jnp.maximum(1e-6 * jnp.max(jnp.abs(eigenvalues)), 1e-6)
    root = step[:, None] * vectors / jnp.sqrt(jnp.maximum(jnp.abs(eigenvalues), floor))
    # L with L L^T = root root^T is the transposed R of QR(root^T); its signs make the diagonal positive
    upper = jnp.linalg.qr(root.T, mode="r")
    return (upper * jnp.where(jnp.diagonal(upper) < 0, -1.0, 1.0)[:, None]).T


class Shape(NamedTuple):
    """The free parameters of the fit, relative to a first guess; zero is nearly the first guess."""

    loc: Float[Array, " d"]
    log_diagonal: Float[Array, " d"]
    scale: Float[Array, "d d"]
    log_scale_slope: Float[Array, "d d"]
    shift_slope: Float[Array, "d d"]
    shift: Float[Array, " d"]
    log_precision: Float[Array, " d"]
    skew: Float[Array, " d"]
    tail: Float[Array, " d"]


def _whitening(guess: Triangular, shape: Shape) -> Triangular:
    tril = jnp.tril(shape.scale, -1) + jnp.diag(jnp.exp(shape.log_diagonal))
    return Triangular(
        guess.order,
        guess.loc + guess.scale_tril @ shape.loc,
        guess.scale_tril @ tril,
        jnp.tril(shape.log_scale_slope, -1),
        jnp.tril(shape.shift_slope, -1),
        shape.shift,
        jnp.exp(shape.log_precision - 3.0),
        shape.skew,
        0.5 * jnp.tanh(shape.tail),
    )


class Family(NamedTuple):
    """A family of maps around a first guess.

    Attributes:
        blank: ``guess -> shape``, the free parameters that leave a guess as it is, or nearly so.
        build: ``(guess, shape) -> map``.
        push: ``(map, u) -> (x, log-determinant)``.
    """

    blank: Callable[[Any], Any]
    build: Callable[[Any, Any], Any]
    push: Callable[[Any, Float[Array, " d"]], tuple[Float[Array, " d"], Float[Array, ""]]]


def _blank_shape(guess: Triangular) -> Shape:
    vector, matrix = jnp.zeros_like(guess.loc), jnp.zeros_like(guess.scale_tril)
    return Shape(vector, vector, *(matrix,) * 3, *(vector,) * 4)


TRIANGULAR = Family(_blank_shape, _whitening, lambda whitening, u: whitening.sorted(u))


def _low_rank(
    guess: LowRank, shape: tuple[Float[Array, " d"], Float[Array, " d"], Float[Array, " r"]]
) -> LowRank:
    shift, log_std, log_gain = shape
    return guess._replace(
        loc=guess.forward(shift)[0],
        std=guess.std * jnp.exp(log_std),
        gain=(1.0 + guess.gain) * jnp.exp(log_gain) - 1.0,
    )


_LOW_RANK = Family(
    lambda guess: (jnp.zeros_like(guess.loc), jnp.zeros_like(guess.loc), jnp.zeros_like(guess.gain)),
    _low_rank,
    lambda whitening, u: whitening.forward(u),
)


def _survivors(elbos: Float[Array, " f"], draws: Float[Array, "f t d"], num: int) -> Int[Array, " num"]:
    """Choose fits to go on with: the best, then the best elsewhere if comparable, else the next best."""
    first = jnp.argmax(elbos)
    mean, std = jnp.mean(draws, 1), jnp.std(draws[first], 0)
    comparable = elbos > elbos[first] - _COMPARABLE

    def choose(carry, _):  # type: ignore[no-untyped-def]
        taken, nearest = carry
        left = jnp.where(taken, -jnp.inf, elbos)
        elsewhere = comparable & (nearest > likely_radius(draws.shape[-1]))
        best = jnp.argmax(jnp.where(jnp.any(elsewhere & ~taken), jnp.where(elsewhere, left, -jnp.inf), left))
        distance = jnp.sum(((mean - mean[best]) / jnp.maximum(std, 1e-12)) ** 2, -1)
        return (taken.at[best].set(True), jnp.minimum(nearest, distance)), best

    taken, nearest = jnp.zeros(len(elbos), bool), jnp.full(len(elbos), jnp.inf, elbos.dtype)
    return jax.lax.scan(choose, (taken, nearest), length=num)[1]


def _maximise_elbos(
    key: Key,
    logdensity_fn: LogDensity,
    family: Family,
    guesses: Any,
    num_draws: int,
    num_test: int,
    num_survivors: int | None = None,
) -> tuple[Any, Float[Array, " f"], Float[Array, "f t d"], Int[Array, ""]]:
    """Improve several first guesses by stochastic variational inference, side by side.

    All are improved for a while, a few at a time, and then those that survive. Their step size is constant
    until the best ELBO stops rising, and then decays. All fits share their noise but for signs: one generator
    to compile, and where a posterior is symmetric, such as a banana, not all of them lean to the same side.

    Args:
        key: random key.
        logdensity_fn: the log density.
        family: the family of maps.
        guesses: stacked maps, leading axis f.
        num_draws: draws per step of each fit, an even number.
        num_test: draws t that compare the fits.
        num_survivors: how many are improved to the end (see `_survivors`); None: all, from the start.

    Returns:
        The maps, their ELBOs on the test noise, the images of that noise, and target gradients spent.

    Reference:
        Karnin, Koren & Somekh (2013), Almost optimal exploration in multi-armed bandits (halving).
    """
    num_fits, dim = guesses.loc.shape
    dtype = guesses.loc.dtype
    at_once = num_fits if num_survivors is None else min(num_survivors, num_fits)
    num_brief = 0 if at_once == num_fits else -(-num_fits // at_once)
    optimiser = optax.chain(optax.clip_by_global_norm(10.0 * dim**0.5), optax.scale_by_adam())
    shapes = jax.vmap(family.blank)(guesses)
    key_test, key_noise, key_signs = jax.random.split(key, 3)
    signs = jax.random.rademacher(key_signs, (num_fits, dim), dtype)
    test_noise = jax.random.normal(key_test, (num_test, dim), dtype)

    def improve(guess, shape, opt_state, half, rate):  # type: ignore[no-untyped-def]
        u = jnp.concatenate([half, -half])

        def push(shape):  # type: ignore[no-untyped-def]
            return jax.vmap(lambda v: family.push(family.build(guess, shape), v))(u)

        (x, _), pull_back = jax.vjp(push, shape)
        value, score = jax.vmap(jax.value_and_grad(logdensity_fn))(x)
        keep = jnp.isfinite(value) & jnp.all(jnp.isfinite(score), -1)
        cotangent = -jnp.where(keep[:, None], score, 0.0), -jnp.where(keep, 1.0, 0.0)
        (gradient,) = pull_back(jax.tree.map(lambda c: c.astype(x.dtype) / u.shape[0], cotangent))
        updates, opt_state = optimiser.update(gradient, opt_state, shape)
        return jax.tree.map(lambda a, b: a - rate * b, shape, updates), opt_state

    def evaluate(guess, shape):  # type: ignore[no-untyped-def]
        whitening = family.build(guess, shape)
        x, log_det = jax.vmap(lambda v: family.push(whitening, v))(test_noise)
        value = jax.vmap(logdensity_fn)(x)
        entropy = 0.5 * jnp.sum(test_noise**2, -1) + 0.5 * dim * jnp.log(2 * jnp.pi)
        each = value + log_det + entropy
        # a draw without a density counts as far worse than any that has one, whatever the density's level
        worst = jnp.min(each, where=jnp.isfinite(each), initial=jnp.inf) - 1e6
        elbo = jnp.mean(jnp.where(jnp.isfinite(each), each, worst))
        return whitening, jnp.where(jnp.isfinite(elbo), elbo, -jnp.inf), x

    def chunk(carry):  # type: ignore[no-untyped-def]
        k, left, num_steps, chosen, fits, found = carry
        brief = k < num_brief
        group = jnp.minimum(k * at_once + jnp.arange(at_once), num_fits - 1)
        which = jnp.where(brief, group, chosen)
        length = jnp.where(brief, _BRIEF, _CHUNK)
        steady = left == _DECAY_CHUNKS
        own = signs[which], jax.tree.map(lambda leaf: leaf[which], guesses)

        def step(i, fits):  # type: ignore[no-untyped-def]
            done = jnp.where(steady, 0.0, _DECAY_CHUNKS - 1 - left + i / length) / _DECAY_CHUNKS
            rate = _STEP_SIZE * (0.03 + 0.97 * 0.5 * (1.0 + jnp.cos(jnp.pi * done)))
            key_i = jax.random.fold_in(jax.random.fold_in(key_noise, k), i)
            half = jax.random.normal(key_i, (num_draws // 2, dim), dtype)
            one = lambda sign, guess, shape, state: improve(  # noqa: E731
                guess, shape, state, sign * half, rate.astype(dtype)
            )
            return jax.vmap(one)(*own, *fits)

        some = jax.lax.fori_loop(0, length, step, jax.tree.map(lambda leaf: leaf[which], fits))
        new = jax.vmap(evaluate)(own[1], some[0])
        rising = jnp.max(new[1]) - jnp.max(found[1]) > _RISING
        put = lambda leaf, part: leaf.at[which].set(part)  # noqa: E731
        fits, found = jax.tree.map(put, fits, some), jax.tree.map(put, found, new)
        chosen = jax.lax.cond(
            k == num_brief - 1, lambda: _survivors(found[1], found[2], at_once), lambda: chosen
        )
        stay = steady & (rising | (k == num_brief)) & (k < num_brief + _MAX_STEADY_CHUNKS)
        left = jnp.where(brief | stay, left, left - 1)
        return k + 1, left, num_steps + length, chosen, fits, found

    fits = shapes, jax.vmap(optimiser.init)(shapes)
    blank = jax.eval_shape(jax.vmap(evaluate), guesses, shapes)
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blank)
    found = blank[0], jnp.full(num_fits, -jnp.inf, dtype), blank[2]
    zero = jnp.zeros((), jnp.int32)
    start = zero, zero + _DECAY_CHUNKS, zero, jnp.arange(at_once), fits, found
    *_, num_steps, _, _, found = jax.lax.while_loop(lambda carry: carry[1] >= 0, chunk, start)
    return *found, num_steps * (at_once * num_draws)


class Fit(NamedTuple):
    """What variational inference from several starts found.

    Attributes:
        best: the map of the best ELBO.
        pooled: an affine map with the pooled covariance within and between the fits, widened.
        separate: whether fits of similar ELBO lie apart, as they do for separated modes, or few of many lie
            where the best one does, or the pooled map suits the draws of all better, shape ``[]``.
        elbos: the ELBO of every fit, shape ``[f]``.
        draws: draws from every fit, those of failed fits not finite, shape ``[f, t, d]``.
        gradients: target gradients spent, without those of the first guesses, which are few, shape ``[]``.
    """

    best: Triangular
    pooled: Triangular
    separate: Bool[Array, ""]
    elbos: Float[Array, " f"]
    draws: Float[Array, "f t d"]
    gradients: Int[Array, ""]


def likely_radius(dim: int) -> float:
    """Bound the squared norm of nearly all draws of N(0, I): three deviations above its mean."""
    return dim + 3.0 * (2.0 * dim) ** 0.5


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
    fits: Triangular, elbos: Float[Array, " f"], draws: Float[Array, "f t d"], gradients: Int[Array, ""]
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
    pooled = affine(mean, jnp.where(regular, tril, jnp.eye(dim)), best.order)
    unsort = jnp.argsort(best.order)
    # a curved map may leave out what other fits found, although they overlap: a banana's other arm
    some = x[:, ::8, unsort]
    covers = _mean_log_density(pooled, weight, some) > _mean_log_density(best, weight, some)
    separate = regular & ((ratio > _SEPARATE) | covers)
    return Fit(best, pooled, separate, elbos, draws[..., unsort], gradients)


def _sorted_density(target: Target, order: Int[Array, " d"]) -> LogDensity:
    return lambda y: target.logdensity_fn(jnp.zeros_like(y).at[order].set(y))


def first_guesses(
    target: Target, starts: Float[Array, "s d"], scouts: Float[Array, "m d"], order: Int[Array, " d"]
) -> Triangular:
    """Guess affine maps: two from every start, and a few above scouts.

    One is the normal (Laplace) approximation where L-BFGS arrives, which knows the scales of a well-behaved
    posterior; one has unit scales at the start itself, which a density without a mode, such as a centred
    hierarchical model, does not lead astray.

    Args:
        target: the density.
        starts: points of finite density, shape ``[s, d]``.
        scouts: points that lie as widely as the density may; few of the modes above them are used, those
            that lie furthest apart, shape ``[m, d]``.
        order: a permutation of the coordinates, hyperparameters first, shape ``[d]``.

    Returns:
        Stacked maps, leading axis ``2 s + 4``. Costs a few dozen target gradients for every start and scout,
        and a few d for each of ``s + 4`` tops.
    """
    logdensity_fn = _sorted_density(target, order)
    num, dim = starts.shape
    starts = starts[:, order]
    tops = jax.vmap(lambda y: climb(logdensity_fn, y, 100))(jnp.concatenate([starts, scouts[:, order]]))
    locs = jnp.concatenate([tops[:num], _furthest(tops, num, _DISTANT_TOPS)])
    # one at a time: two batched LAPACK calls that XLA runs side by side can block a two-core machine
    trils = jax.lax.map(lambda y: _laplace(logdensity_fn, y), locs)
    locs = jnp.concatenate([locs, starts])
    trils = jnp.concatenate([trils, jnp.broadcast_to(jnp.eye(dim), (num, dim, dim))])
    return jax.vmap(lambda loc, tril: affine(loc, tril, order))(locs, trils)


def fit(key: Key, target: Target, guesses: Triangular, *, num_draws: int = 8) -> Fit:
    """Fit a whitening to a target from several first guesses.

    Each is improved by stochastic variational inference over `Triangular` maps, and the best ELBO wins.
    Where fits of similar ELBO lie apart, few lie where the best one does, or the pooled map suits the draws
    of all better, separated modes are within reach of N(0, I) under the pooled map.

    Args:
        key: random key.
        target: the density.
        guesses: stacked affine maps of one order, leading axis f (see `first_guesses`).
        num_draws: draws per step of each fit, an even number.

    Returns:
        The fits. Costs 150 target gradients for each of ``f num_draws`` draws, and 1,250 to 3,000 for each
        of those of the four that survive.

    Reference:
        Kucukelbir et al. (2017), arXiv:1603.00788 (the inference); the maps: see `Triangular`.
    """
    logdensity_fn = _sorted_density(target, guesses.order[0])
    return _pool(*_maximise_elbos(key, logdensity_fn, TRIANGULAR, guesses, num_draws, _NUM_TEST, _SURVIVORS))


def fit_low_rank(
    key: Key, target: Target, guesses: LowRank, *, num_draws: int = 16
) -> tuple[LowRank, Float[Array, " f"], Int[Array, ""]]:
    """Improve low-rank maps by stochastic variational inference, their bases as they are; memory linear in d.

    Args:
        key: random key.
        target: the density.
        guesses: stacked maps, leading axis f.
        num_draws: draws per step of each fit, an even number.

    Returns:
        The maps, stacked; their ELBOs, minus infinity for those that failed; and target gradients spent.
    """
    fits, elbos, _, gradients = _maximise_elbos(
        key, target.logdensity_fn, _LOW_RANK, guesses, num_draws, num_draws
    )
    return fits, elbos, gradients


def dips_between(value_fn: LogDensity, start: Float[Array, " d"], end: Float[Array, " d"]) -> Bool[Array, ""]:
    """Say whether a function, such as a log density, dips below both ends on the way between two points.

    Two normal modes of one scale that lie D deviations apart dip by D²/8 - log 2 nats. A value on the way
    that is NaN counts as a dip.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.search.fit import dips_between
        >>> wells = lambda x: -jnp.sum((x**2 - 4.0) ** 2)
        >>> [bool(dips_between(wells, jnp.array([-2.0]), jnp.array([x]))) for x in (2.0, -1.5)]
        [True, False]
    """
    parts = jnp.linspace(0.0, 1.0, _SEGMENTS + 1, dtype=start.dtype)[:, None]
    values = jax.vmap(value_fn)(start + parts * (end - start))
    return ~(jnp.min(values) >= jnp.minimum(values[0], values[-1]) - _DIP)


def connected(value_fn: LogDensity, points: Float[Array, "m d"]) -> Bool[Array, "m m"]:
    """Say between which points a function, such as a log density, does not dip below both ends.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.search.fit import connected
        >>> wells = lambda x: -jnp.sum((x**2 - 4.0) ** 2)
        >>> connected(wells, jnp.array([[-2.0], [2.0], [1.5]]))[1].tolist()
        [False, True, True]
    """
    dips = jax.vmap(lambda start, end: dips_between(value_fn, start, end), (None, 0))
    return ~jax.lax.map(lambda start: dips(start, points), points)


def leaders(
    order: Int[Array, " m"], same: Bool[Array, "m m"], usable: Bool[Array, " m"]
) -> tuple[Bool[Array, " m"], Int[Array, " m"]]:
    """Group things: each, in their order, joins the first leader that it equals, or leads a new group.

    Args:
        order: a permutation, shape ``[m]``.
        same: whether two are the same, shape ``[m, m]``.
        usable: what is not belongs to no group, shape ``[m]``.

    Returns:
        Which of them lead; and the index of each one's leader, its own where it has none.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.search.fit import leaders
        >>> same = jnp.array([[True, True, False], [True, True, False], [False, False, True]])
        >>> [part.tolist() for part in leaders(jnp.array([1, 0, 2]), same, jnp.ones(3, bool))]
        [[False, True, True], [1, 1, 2]]
    """

    def visit(carry, i: Int[Array, ""]):  # type: ignore[no-untyped-def]
        leads, leader = carry
        mine = (leads & same[i])[order]
        joins = jnp.any(mine)
        leads = leads.at[i].set(usable[i] & ~joins)
        return (leads, leader.at[i].set(jnp.where(usable[i] & joins, order[jnp.argmax(mine)], i))), None

    carry = jnp.zeros(len(order), bool), jnp.arange(len(order))
    return jax.lax.scan(visit, carry, order)[0]


def _distinct_tops(logdensity_fn: LogDensity, tops: Float[Array, "m d"]) -> Float[Array, "t d"]:
    """Choose tops of different modes: the highest, and those that most climbs reach; at last others in order.

    Height alone would prefer narrow modes to those that hold as much.
    """
    values = jax.vmap(logdensity_fn)(tops)
    usable = jnp.isfinite(values) & jnp.all(jnp.isfinite(tops), -1)
    order = jnp.argsort(jnp.where(usable, -values, jnp.inf))
    leads, leader = leaders(order, connected(logdensity_fn, tops), usable)
    num = len(tops)
    climbs = jnp.sum(leader[:, None] == jnp.arange(num), 0)
    rank = lambda worth: jnp.argsort(jnp.argsort(-jnp.where(leads, worth, -jnp.inf)))  # noqa: E731
    first = jnp.minimum(2 * rank(values), 2 * rank(climbs.astype(values.dtype)) + 1)
    priority = jnp.where(leads, first, jnp.where(usable, 2 * num, 4 * num) + jnp.arange(num))
    return tops[jnp.argsort(priority)[:_NUM_TOPS]]


def diagonal_guesses(target: Target, starts: Float[Array, "s d"], scouts: Float[Array, "m d"]) -> LowRank:
    """Guess maps of rank zero: unit scales at starts, and narrow ones at different modes.

    Those are where L-BFGS arrives from starts and scouts. Tops between which the density does not dip count
    as one.

    Args:
        target: the density.
        starts: points of finite density, shape ``[s, d]``.
        scouts: points that lie as widely as the density may, shape ``[m, d]``.

    Returns:
        Stacked maps, leading axis ``s + 16``, or less where there are fewer climbs.
    """
    begin = jnp.concatenate([starts, scouts])
    tops = jax.vmap(lambda y: climb(target.logdensity_fn, y, 100))(begin)
    tops = _distinct_tops(target.logdensity_fn, tops)
    locs = jnp.concatenate([tops, starts])
    std = jnp.where(jnp.arange(len(locs)) < len(tops), _NARROW, 1.0)[:, None] * jnp.ones_like(locs)
    num, dim = locs.shape
    return LowRank(locs, std, jnp.zeros((num, dim, 0), locs.dtype), jnp.zeros((num, 0), locs.dtype))
