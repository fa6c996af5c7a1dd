# SPDX-License-Identifier: Apache-2.0
"""Whitening: an invertible map under which a badly scaled target looks like N(0, I)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.target import Key, LogDensity, Target

__all__ = ["Whitening", "affine", "fit", "unwhiten", "whiten"]

_SEPARATE = 4.0  # squared distance of a fit from the mean, in pooled deviations, that makes it a mode
_TEST_STEPS = 64  # sets of noise kept for comparing fits
_MAX_LOG_SCALE = 6.0  # bound on what one whitened point may add to a log scale: exp(6) is 400 times


class Whitening(NamedTuple):
    """A triangular map from the whitened point u to the point x of the target,

        x[order] = loc + L r,      r_j = σ_j s_j + σ_j² (V s + b)_j,
        σ_j⁻² = exp(-2 (W s)_j) + κ_j,      s_j = sinh(exp(τ_j) asinh(u_j) + ε_j),

    with W and V strictly lower triangular. With all but loc and L at zero it is affine. The rest is the
    shape of a hierarchical posterior. Given hyperparameters, which ``order`` puts first, the precision of
    an effect is that of its prior, log-linear in them, plus that of its data, κ; and its mean leaves the
    prior's by an amount proportional to its variance. So a funnel becomes nearly Gaussian down to its
    neck. ε skews a coordinate and τ changes its tails, as the logarithm of a scale is skewed. The Jacobian
    is triangular: the log-determinant is a sum.

    Attributes:
        order: a permutation of the coordinates, shape ``[d]``.
        loc: shape ``[d]``.
        scale_tril: L, lower triangular with a positive diagonal, shape ``[d, d]``.
        log_scale_slope: W, shape ``[d, d]``.
        shift_slope: V, shape ``[d, d]``.
        shift: b, shape ``[d]``.
        precision: κ, not negative, shape ``[d]``.
        skew: ε, shape ``[d]``.
        tail: τ, shape ``[d]``.

    Reference:
        Papamakarios et al. (2017), arXiv:1705.07057, eq. 3 (maps whose scale depends on earlier
        coordinates); Jones & Pewsey (2009), Sinh-arcsinh distributions, eq. 2 (s).
    """

    order: Int[Array, " d"]
    loc: Float[Array, " d"]
    scale_tril: Float[Array, "d d"]
    log_scale_slope: Float[Array, "d d"]
    shift_slope: Float[Array, "d d"]
    shift: Float[Array, " d"]
    precision: Float[Array, " d"]
    skew: Float[Array, " d"]
    tail: Float[Array, " d"]


def affine(
    loc: Float[Array, " d"], scale_tril: Float[Array, "d d"], order: Int[Array, " d"] | None = None
) -> Whitening:
    """Make the affine whitening x = loc + scale_tril u.

    Args:
        loc: shape ``[d]``.
        scale_tril: lower triangular with a positive diagonal, shape ``[d, d]``.
        order: the permutation of x in which these are given; None for x itself.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.precondition import affine, unwhiten
        >>> x, log_det = unwhiten(affine(jnp.ones(2), 3 * jnp.eye(2)), jnp.array([0.0, 1.0]))
        >>> x.tolist(), round(float(log_det), 4)  # 2 log 3
        ([1.0, 4.0], 2.1972)
    """
    zero = jnp.zeros_like(scale_tril)
    order = jnp.arange(loc.shape[0]) if order is None else order
    flat = jnp.zeros_like(loc)
    return Whitening(order, loc, scale_tril, zero, zero, flat, flat, flat, flat)


def _triangular(whitening: Whitening, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Map u to x[order], with the log-determinant."""
    stretched = jnp.exp(whitening.tail) * jnp.arcsinh(u) + whitening.skew
    s = jnp.sinh(stretched)
    log_scale = _MAX_LOG_SCALE * jnp.tanh(whitening.log_scale_slope @ s / _MAX_LOG_SCALE)
    log_std = -0.5 * jnp.log(jnp.exp(-2.0 * log_scale) + whitening.precision)
    shift = jnp.exp(2.0 * log_std) * (whitening.shift_slope @ s + whitening.shift)
    r = jnp.exp(log_std) * s + shift
    log_slopes = log_std + whitening.tail + jnp.log(jnp.cosh(stretched)) - 0.5 * jnp.log1p(u * u)
    log_det = jnp.sum(log_slopes) + jnp.sum(jnp.log(jnp.diagonal(whitening.scale_tril)))
    return whitening.loc + whitening.scale_tril @ r, log_det


def unwhiten(whitening: Whitening, u: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Map a whitened point to the target's space.

    Args:
        whitening: the map.
        u: one whitened point, shape ``[d]``.

    Returns:
        The point x, shape ``[d]``, and the log-determinant of dx/du, shape ``[]``.
    """
    y, log_det = _triangular(whitening, u)
    return jnp.zeros_like(y).at[whitening.order].set(y), log_det


def whiten(target: Target, whitening: Whitening) -> Target:
    """Pull a target back through a whitening: same integral, so the same log Z.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.precondition import affine, whiten
        >>> from numpyro_sbtm.core.target import Target
        >>> wide = Target(lambda x: -0.5 * jnp.sum((x / 5) ** 2), 1)
        >>> white = whiten(wide, affine(jnp.zeros(1), 5 * jnp.eye(1)))
        >>> round(float(white.logdensity_fn(jnp.ones(1))), 4)  # -1/2 + log 5
        1.1094
    """

    def logdensity(u: Float[Array, " d"]) -> Float[Array, ""]:
        x, log_det = unwhiten(whitening, u)
        return target.logdensity_fn(x) + log_det

    return Target(logdensity, target.dim, target.log_z)


def _climb(logdensity_fn: LogDensity, start: Float[Array, " d"], num_steps: int) -> Float[Array, " d"]:
    """Climb towards a mode by L-BFGS; returns the best finite point met."""
    optimiser = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=20))

    def loss(y: Float[Array, " d"]) -> Float[Array, ""]:
        return -logdensity_fn(y)

    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(_, carry):  # type: ignore[no-untyped-def]
        y, state, best, best_value = carry
        value, gradient = value_and_grad(y, state=state)
        better = jnp.isfinite(value) & (value < best_value)
        best, best_value = jnp.where(better, y, best), jnp.where(better, value, best_value)
        updates, state = optimiser.update(gradient, state, y, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(y, updates), state, best, best_value

    carry = start, optimiser.init(start), start, jnp.asarray(jnp.inf, start.dtype)
    return jax.lax.fori_loop(0, num_steps, step, carry)[2]


def _laplace(logdensity_fn: LogDensity, mode: Float[Array, " d"]) -> Float[Array, "d d"]:
    """Compute a Cholesky factor of the inverse Hessian at a point, with guarded eigenvalues."""
    dim = mode.shape[0]
    hessian = -jax.hessian(logdensity_fn)(mode)
    usable = jnp.all(jnp.isfinite(hessian))
    eigenvalues, vectors = jnp.linalg.eigh(jnp.where(usable, hessian, jnp.eye(dim)))
    # flat or inverted directions get a wide scale, not an infinite one
    floor = jnp.maximum(1e-6 * jnp.max(jnp.abs(eigenvalues)), 1e-6)
    root = vectors / jnp.sqrt(jnp.maximum(jnp.abs(eigenvalues), floor))
    # L with L L^T = root root^T is the transposed R of QR(root^T); its signs make the diagonal positive
    upper = jnp.linalg.qr(root.T, mode="r")
    return (upper * jnp.where(jnp.diagonal(upper) < 0, -1.0, 1.0)[:, None]).T


class _Shape(NamedTuple):
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


def _whitening(guess: Whitening, shape: _Shape) -> Whitening:
    tril = jnp.tril(shape.scale, -1) + jnp.diag(jnp.exp(shape.log_diagonal))
    return Whitening(
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


def _maximise_elbo(
    logdensity_fn: LogDensity,
    guess: Whitening,
    noise: Float[Array, "k m d"],
    test_noise: Float[Array, "t d"],
) -> tuple[Whitening, Float[Array, ""], Float[Array, "t d"]]:
    """Fit the map by stochastic variational inference, one step for each set of noise.

    Returns the map, its ELBO on the test noise, and the image of that noise.
    """
    dim = guess.loc.shape[0]
    schedule = optax.cosine_decay_schedule(0.03, noise.shape[0], alpha=0.03)
    optimiser = optax.chain(optax.clip_by_global_norm(10.0 * dim**0.5), optax.adam(schedule))
    vector, matrix = jnp.zeros_like(guess.loc), jnp.zeros_like(guess.scale_tril)
    shape = _Shape(vector, vector, *(matrix,) * 3, *(vector,) * 4)

    def step(carry, half):  # type: ignore[no-untyped-def]
        shape, opt_state = carry
        u = jnp.concatenate([half, -half])

        def push(shape: _Shape) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
            return jax.vmap(lambda v: _triangular(_whitening(guess, shape), v))(u)

        (x, _), pull_back = jax.vjp(push, shape)
        value, score = jax.vmap(jax.value_and_grad(logdensity_fn))(x)
        keep = jnp.isfinite(value) & jnp.all(jnp.isfinite(score), -1)
        cotangent = -jnp.where(keep[:, None], score, 0.0), -jnp.where(keep, 1.0, 0.0)
        (gradient,) = pull_back(jax.tree.map(lambda c: c.astype(x.dtype) / u.shape[0], cotangent))
        updates, opt_state = optimiser.update(gradient, opt_state, shape)
        return (optax.apply_updates(shape, updates), opt_state), None

    carry, _ = jax.lax.scan(step, (shape, optimiser.init(shape)), noise)
    whitening = _whitening(guess, carry[0])
    x, log_det = jax.vmap(lambda v: _triangular(whitening, v))(test_noise)
    value = jax.vmap(logdensity_fn)(x)
    entropy = 0.5 * jnp.sum(test_noise**2, -1) + 0.5 * dim * jnp.log(2 * jnp.pi)
    elbo = jnp.mean(jnp.where(jnp.isfinite(value), value + log_det + entropy, -1e6))
    return whitening, jnp.where(jnp.isfinite(elbo), elbo, -jnp.inf), x


def _pool(fits: Whitening, elbos: Float[Array, " s"], x: Float[Array, "s t d"]) -> Whitening:
    """Choose the best of several fits, or, where they found separate modes, cover them all."""
    best = jax.tree.map(lambda leaf: leaf[jnp.argmax(elbos)], fits)
    dim = best.loc.shape[0]
    weight = jax.nn.softmax(elbos)
    x = jnp.where(weight[:, None, None] > 1e-6, x, 0.0)  # a failed fit may hold anything
    means = jnp.mean(x, 1)
    mean = weight @ means
    centred = x - means[:, None]
    within = jnp.einsum("s,sni,snj->ij", weight, centred, centred) / x.shape[1]
    within += 1e-6 * jnp.trace(within) / dim * jnp.eye(dim)
    toward = means - mean
    between = jnp.einsum("s,si,sj->ij", weight, toward, toward)
    ratios = jnp.sum(toward * jnp.linalg.solve(within, toward.T).T, -1)
    ratio = jnp.max(jnp.where(weight > 0.01, ratios, 0.0))
    tril = jnp.linalg.cholesky(jnp.where(ratio > _SEPARATE, within + between, jnp.eye(dim)))
    separate = (ratio > _SEPARATE) & jnp.all(jnp.isfinite(tril))
    pooled = affine(mean, jnp.where(separate, tril, jnp.eye(dim)), best.order)
    return jax.tree.map(lambda a, b: jnp.where(separate, a, b), pooled, best)


def fit(
    key: Key,
    target: Target,
    starts: Float[Array, "s d"],
    order: Int[Array, " d"],
    *,
    num_steps: int = 3000,
    num_draws: int = 16,
) -> Whitening:
    """Fit a whitening to a target from several starts.

    From every start two fits are made by stochastic variational inference over `Whitening` maps: one
    begins with the normal (Laplace) approximation where L-BFGS arrives, which knows the scales of a
    well-behaved posterior; one at the start itself, with unit scales, which a density without a mode,
    such as a centred hierarchical model, does not lead astray. The fit with the best ELBO wins. Where
    fits of similar ELBO lie apart, the result is affine instead, with the pooled covariance within and
    between them, so that separated modes stay within reach of N(0, I).

    Args:
        key: random key.
        target: the density.
        starts: points of finite density, shape ``[s, d]``.
        order: a permutation of the coordinates, hyperparameters first, shape ``[d]``.
        num_steps: optimiser steps of each fit.
        num_draws: draws per step of each fit, an even number.

    Returns:
        The whitening. Costs about ``2 s num_steps num_draws`` target gradients.

    Reference:
        Kucukelbir et al. (2017), arXiv:1603.00788 (the inference); the maps: see `Whitening`.
    """

    def logdensity_fn(y: Float[Array, " d"]) -> Float[Array, ""]:
        return target.logdensity_fn(jnp.zeros_like(y).at[order].set(y))

    dim = starts.shape[1]
    starts = starts[:, order]
    locs = jax.vmap(lambda y: _climb(logdensity_fn, y, 100))(starts)
    # one at a time: two batched LAPACK calls that XLA runs side by side can block a two-core machine
    trils = jax.lax.map(lambda y: _laplace(logdensity_fn, y), locs)
    locs = jnp.concatenate([locs, starts])
    trils = jnp.concatenate([trils, jnp.broadcast_to(jnp.eye(dim), trils.shape)])
    # all fits share their noise: one generator to compile, and fairer comparisons
    noise = jax.random.normal(key, (num_steps + _TEST_STEPS, num_draws // 2, dim), starts.dtype)
    noise, test_noise = noise[:num_steps], noise[num_steps:].reshape(-1, dim)
    fits, elbos, x = jax.vmap(
        lambda loc, tril: _maximise_elbo(logdensity_fn, affine(loc, tril, order), noise, test_noise)
    )(locs, trils)
    return _pool(fits, elbos, x)
