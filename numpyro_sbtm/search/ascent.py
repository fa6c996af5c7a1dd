# SPDX-License-Identifier: Apache-2.0
"""Stochastic variational inference over families of maps, from several first guesses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import LowRank, Triangular
from numpyro_sbtm.core.target import Key, LogDensity

__all__ = ["LOW_RANK", "TRIANGULAR", "Family", "Shape", "likely_radius", "maximise_elbos"]

_COMPARABLE = 20.0  # nats below the best ELBO, within which a fit elsewhere may be another mode
_STEP_SIZE = 0.03
_CHUNK = 250  # steps between looks at the ELBOs
_BRIEF = 150  # steps of fits before a few of them survive
_DECAY_CHUNKS = 3  # over which the step size decays
_MAX_STEADY_CHUNKS = 8
_RISING = 0.05  # nats by which the best ELBO rises in a chunk while it is worth going on


def likely_radius(dim: int) -> float:
    """Bound the squared norm of nearly all draws of N(0, I): three deviations above its mean."""
    return dim + 3.0 * (2.0 * dim) ** 0.5


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
    shears: Float[Array, "2 d d"]


def _whitening(guess: Triangular, shape: Shape) -> Triangular:
    """Make the map; shears of the guess are ones where they are free, and zeros where there are none."""
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
        jnp.tril(guess.shears * shape.shears, -1),
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
    return Shape(vector, vector, *(matrix,) * 3, *(vector,) * 4, jnp.stack([matrix, matrix]))


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


LOW_RANK = Family(
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


class _Fits(NamedTuple):
    """Fits on their way, leading axis f, and what they were worth when last looked at.

    Attributes:
        shapes: their free parameters.
        opt_states: of their optimisers.
        maps: as of the last look.
        elbos: on the test noise, shape ``[f]``.
        draws: images of the test noise, shape ``[f, t, d]``.
    """

    shapes: Any
    opt_states: Any
    maps: Any
    elbos: Float[Array, " f"]
    draws: Float[Array, "f t d"]


class _Round(NamedTuple):
    """Where the ascent is.

    Attributes:
        k: chunks done.
        left: chunks of the decay that are left; the step size is constant before.
        num_steps: steps done.
        chosen: the fits that survive, shape ``[s]``.
        fits: all of them.
    """

    k: Int[Array, ""]
    left: Int[Array, ""]
    num_steps: Int[Array, ""]
    chosen: Int[Array, " s"]
    fits: _Fits


@dataclass(frozen=True, eq=False)
class _Ascent:
    """The steps of `maximise_elbos`."""

    logdensity_fn: LogDensity
    family: Family
    guesses: Any
    num_draws: int
    at_once: int
    key_noise: Key
    signs: Float[Array, "f d"]
    test_noise: Float[Array, "t d"]

    @property
    def num_brief(self) -> int:
        """Chunks in which all fits are improved, a few at a time."""
        num_fits = len(self.signs)
        return 0 if self.at_once == num_fits else -(-num_fits // self.at_once)

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """What makes updates of gradients, but for their length."""
        longest = 10.0 * self.signs.shape[1] ** 0.5
        return optax.chain(optax.clip_by_global_norm(longest), optax.scale_by_adam())

    def improve(
        self, guess: Any, shape: Any, opt_state: Any, half: Float[Array, "h d"], rate: Float[Array, ""]
    ) -> tuple[Any, Any]:
        """Make one step of one fit, by some noise and its mirror image."""
        u = jnp.concatenate([half, -half])

        def push(shape: Any) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
            return jax.vmap(lambda v: self.family.push(self.family.build(guess, shape), v))(u)

        (x, _), pull_back = jax.vjp(push, shape)
        value, score = jax.vmap(jax.value_and_grad(self.logdensity_fn))(x)
        keep = jnp.isfinite(value) & jnp.all(jnp.isfinite(score), -1)
        cotangent = -jnp.where(keep[:, None], score, 0.0), -jnp.where(keep, 1.0, 0.0)
        (gradient,) = pull_back(jax.tree.map(lambda c: c.astype(x.dtype) / u.shape[0], cotangent))
        updates, opt_state = self.optimiser.update(gradient, opt_state, shape)
        return jax.tree.map(lambda a, b: a - rate * b, shape, updates), opt_state

    def evaluate(self, guess: Any, shape: Any) -> tuple[Any, Float[Array, ""], Float[Array, "t d"]]:
        """Make the map of a fit, its ELBO, and the images of the test noise."""
        whitening, dim = self.family.build(guess, shape), self.test_noise.shape[1]
        x, log_det = jax.vmap(lambda v: self.family.push(whitening, v))(self.test_noise)
        value = jax.vmap(self.logdensity_fn)(x)
        entropy = 0.5 * jnp.sum(self.test_noise**2, -1) + 0.5 * dim * jnp.log(2 * jnp.pi)
        each = value + log_det + entropy
        # a draw without a density counts as far worse than any that has one, whatever the density's level
        worst = jnp.min(each, where=jnp.isfinite(each), initial=jnp.inf) - 1e6
        elbo = jnp.mean(jnp.where(jnp.isfinite(each), each, worst))
        return whitening, jnp.where(jnp.isfinite(elbo), elbo, -jnp.inf), x

    def start(self) -> _Round:
        """Begin with all fits as they were guessed, none of them looked at."""
        num_fits, dtype = len(self.signs), self.signs.dtype
        shapes = jax.vmap(self.family.blank)(self.guesses)
        blank = jax.eval_shape(jax.vmap(self.evaluate), self.guesses, shapes)
        maps, _, draws = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), blank)
        worth = maps, jnp.full(num_fits, -jnp.inf, dtype), draws
        fits, zero = _Fits(shapes, jax.vmap(self.optimiser.init)(shapes), *worth), jnp.zeros((), jnp.int32)
        return _Round(zero, zero + _DECAY_CHUNKS, zero, jnp.arange(self.at_once), fits)

    def chunk(self, now: _Round) -> _Round:
        """Improve some fits for a while, and look at them."""
        k, left, num_brief, num_fits = now.k, now.left, self.num_brief, len(self.signs)
        brief, steady = k < num_brief, left == _DECAY_CHUNKS
        group = jnp.minimum(k * self.at_once + jnp.arange(self.at_once), num_fits - 1)
        which = jnp.where(brief, group, now.chosen)
        length = jnp.where(brief, _BRIEF, _CHUNK)
        signs, guesses = self.signs[which], jax.tree.map(lambda leaf: leaf[which], self.guesses)
        dtype, dim = self.signs.dtype, self.signs.shape[1]

        def step(i: Int[Array, ""], fits: tuple[Any, Any]) -> tuple[Any, Any]:
            done = jnp.where(steady, 0.0, _DECAY_CHUNKS - 1 - left + i / length) / _DECAY_CHUNKS
            rate = _STEP_SIZE * (0.03 + 0.97 * 0.5 * (1.0 + jnp.cos(jnp.pi * done)))
            key = jax.random.fold_in(jax.random.fold_in(self.key_noise, k), i)
            half = jax.random.normal(key, (self.num_draws // 2, dim), dtype)
            improve = lambda sign, guess, shape, state: self.improve(  # noqa: E731
                guess, shape, state, sign * half, rate.astype(dtype)
            )
            return jax.vmap(improve)(signs, guesses, *fits)

        own = jax.tree.map(lambda leaf: leaf[which], (now.fits.shapes, now.fits.opt_states))
        shapes, opt_states = jax.lax.fori_loop(0, length, step, own)
        new = _Fits(shapes, opt_states, *jax.vmap(self.evaluate)(guesses, shapes))
        rising = jnp.max(new.elbos) - jnp.max(now.fits.elbos) > _RISING
        fits = jax.tree.map(lambda leaf, part: leaf.at[which].set(part), now.fits, new)
        survivors = lambda: _survivors(fits.elbos, fits.draws, self.at_once)  # noqa: E731
        chosen = jax.lax.cond(k == num_brief - 1, survivors, lambda: now.chosen)
        stay = steady & (rising | (k == num_brief)) & (k < num_brief + _MAX_STEADY_CHUNKS)
        left = jnp.where(brief | stay, left, left - 1)
        return _Round(k + 1, left, now.num_steps + length, chosen, fits)


def maximise_elbos(
    key: Key,
    logdensity_fn: LogDensity,
    family: Family,
    guesses: Any,
    num_draws: int,
    num_test: int,
    num_survivors: int | None = None,
) -> tuple[Any, Float[Array, " f"], Float[Array, "f t d"], Evaluations]:
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
        The maps, their ELBOs on the test noise, the images of that noise, and what was evaluated.

    Reference:
        Karnin, Koren & Somekh (2013), Almost optimal exploration in multi-armed bandits (halving).
    """
    num_fits, dim = guesses.loc.shape
    dtype = guesses.loc.dtype
    at_once = num_fits if num_survivors is None else min(num_survivors, num_fits)
    key_test, key_noise, key_signs = jax.random.split(key, 3)
    signs = jax.random.rademacher(key_signs, (num_fits, dim), dtype)
    test_noise = jax.random.normal(key_test, (num_test, dim), dtype)
    ascent = _Ascent(logdensity_fn, family, guesses, num_draws, at_once, key_noise, signs, test_noise)
    end = jax.lax.while_loop(lambda now: now.left >= 0, ascent.chunk, ascent.start())
    spent = Evaluations(end.k * (at_once * num_test), end.num_steps * (at_once * num_draws))
    return end.fits.maps, end.fits.elbos, end.fits.draws, spent
