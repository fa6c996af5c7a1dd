# SPDX-License-Identifier: Apache-2.0
"""Learning one velocity of transport: an affine part in closed form, and a network for the rest."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.algorithm import guarded_update
from numpyro_sbtm.core.flow import Maps, velocity
from numpyro_sbtm.core.process import Net
from numpyro_sbtm.core.score import divergence_of, implicit_score_loss, implicit_score_losses
from numpyro_sbtm.core.target import Key, Params, VectorField
from numpyro_sbtm.core.transition import Transition

__all__ = ["Cloud", "VelocityFit", "affine_part", "bounded", "kernel_fit", "precondition", "velocity_fit"]

_RIDGES = tuple(10.0**k for k in range(1, -6, -1))  # of the mean squared feature; held-out points choose
_OUTPUT_RIDGES = (jnp.inf, *_RIDGES[:4])  # weaker ones overfit: learned features fit their particles already
_LONGEST_SCORE = 5.0  # in medians of the particles' scores
_CLEAR = 2.0  # standard errors by which a network must improve the held-out loss of a map


class Cloud(NamedTuple):
    """Points with the scores that they follow.

    Attributes:
        x: shape ``[n, d]``.
        scores: finite, shape ``[n, d]``.
    """

    x: Float[Array, "n d"]
    scores: Float[Array, "n d"]


def bounded(scores: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Shorten long scores, and put zero where one is not finite: a few on a cliff must not move all others.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.learning import bounded
        >>> bounded(jnp.array([[1.0], [-1.0], [1.0], [99.0], [jnp.nan]]))[:, 0].tolist()
        [1.0, -1.0, 1.0, 5.0, 0.0]
    """
    scores = jnp.where(jnp.all(jnp.isfinite(scores), -1, keepdims=True), scores, 0.0)
    norm = jnp.linalg.norm(scores, axis=-1, keepdims=True)
    return scores * jnp.minimum(1.0, _LONGEST_SCORE * jnp.median(norm) / jnp.maximum(norm, 1e-9))


def affine_part(particles: Cloud, params: Params) -> Maps:
    """Solve implicit score matching for affine velocities, in closed form.

    W = (I + E[g (x-μ)ᵀ]) C⁻¹ and b = E[g]: the best affine fit of the target's score g, less the score
    of the normal distribution with the particles' mean and covariance C. It does not lag.
    """
    n, dim = particles.x.shape
    mean = jnp.mean(particles.x, 0)
    centred = particles.x - mean
    cov = centred.T @ centred / n
    tril = jnp.linalg.cholesky(cov + 1e-6 * jnp.mean(jnp.diagonal(cov)) * jnp.eye(dim))
    whitener = jax.scipy.linalg.solve_triangular(tril, jnp.eye(dim), lower=True)
    slope = (jnp.eye(dim) + particles.scores.T @ centred / n) @ (whitener.T @ whitener)
    return Maps(
        params, mean, whitener, whitener.T, jnp.mean(particles.scores, 0), slope, jnp.zeros((), mean.dtype)
    )


def precondition(one: Maps) -> Maps:
    """Multiply a velocity by the particles' covariance C, a metric in which all directions relax alike.

    Reference:
        Chen, Huang, Huang, Reich & Stuart (2023), Gradient flows for sampling, arXiv:2302.11024, section 4
        (affine invariance).
    """
    cov = jnp.linalg.inv(one.whitener.T @ one.whitener)
    return one._replace(drift=cov @ one.drift, slope=cov @ one.slope, lift=cov @ one.lift)


class VelocityFit(NamedTuple):
    """How the network of a velocity is trained, and whether it is used.

    Attributes:
        train: ``(key, first, map, optimiser's state, particles, probes) -> (params, optimiser's state, loss,
            updates skipped)``, for the map that the particles follow next; first says whether it is the very
            first one, whose velocity is known.
        trim: ``(map, particles, probes) -> map``, with the best output layer where one is solved for, and
            without its network if that does not help.
    """

    train: Callable[
        [Key, Bool[Array, ""], Maps, optax.OptState, Cloud, Cloud],
        tuple[Params, optax.OptState, Float[Array, ""], Int[Array, ""]],
    ]
    trim: Callable[[Maps, Cloud, Cloud], Maps]


def _ridge(gram, right, held_gram, held_right, ridges):  # type: ignore[no-untyped-def]
    """Solve (gram + λ I) θ = right, for the λ with the least loss of held-out points; with that loss."""
    values, vectors = jnp.linalg.eigh(gram)
    turned = vectors.T @ right
    sizes = jnp.asarray(ridges, gram.dtype) * jnp.mean(values)
    found = jax.vmap(lambda size: vectors @ (turned / (jnp.maximum(values, 0.0) + size)[:, None]))(sizes)
    losses = jax.vmap(lambda theta: jnp.sum(theta * (held_gram @ theta - 2.0 * held_right)))(found)
    best = jnp.argmin(losses)
    return found[best], losses[best]


def solve_output(net: Net, current: Maps, particles: Cloud, probes: Cloud) -> Maps:
    """Solve for the output layer of a map's network, which has features φ, on all particles at once.

    For v(x) = v_0(x) + Ψᵀ φ(u), u = R (x - μ), the score matching loss is quadratic in Ψ,

        Ψ = (E[φ φᵀ] + λ I)⁻¹ (E[φ (g - v_0)ᵀ] + E[∂φ/∂u] R),

    and the output layer is Θ = Ψ R⁻¹. The ridge λ is the one of a few with the least loss at held-out points.

    Reference:
        Golub & Pereyra (1973), The differentiation of pseudo-inverses and nonlinear least squares problems
        whose variables separate: what is linear in a fit is solved for.
    """
    features = net.features
    assert features is not None

    def moments(cloud: Cloud):  # type: ignore[no-untyped-def]
        centred = cloud.x - current.mean
        u = centred @ current.whitener.T
        at = jax.vmap(lambda u: features(current.params, u))
        # a shift of all points at once: its derivative is the mean of theirs
        slopes = jax.jacfwd(lambda shift: jnp.mean(at(u + shift), 0))(jnp.zeros_like(current.mean))
        phi, rest = at(u), cloud.scores - current.drift - centred @ current.slope.T
        return phi.T @ phi / len(phi), phi.T @ rest / len(phi) + slopes @ current.whitener

    gram, right = moments(particles)
    held_gram, held_right = moments(probes)
    psi, _ = _ridge(gram, right, held_gram, held_right, _OUTPUT_RIDGES)
    theta = jax.scipy.linalg.solve_triangular(current.whitener, psi.T, trans=1, lower=True).T
    good = jnp.all(jnp.isfinite(theta))
    params = current.params.at[-theta.size :].set(theta.ravel())
    return current._replace(params=jnp.where(good, params, current.params))


def velocity_fit(
    net: Net,
    optimiser: optax.GradientTransformation,
    base: Transition,
    *,
    num_updates: int,
    batch_size: int,
    max_rounds: int,
    first_updates: int,
    solved_output: bool,
) -> VelocityFit:
    """Make the training of velocities by implicit score matching.

    Args:
        net: the network.
        optimiser: an optax optimiser.
        base: the particles' first law.
        num_updates: updates per round.
        batch_size: particles per update.
        max_rounds: rounds at most; more than one end once the loss of the probes, which are not trained on,
            stops falling, and the best parameters are kept.
        first_updates: updates before the first map, by least squares.
        solved_output: whether maps take the output layer of `solve_output`; training goes on from its own.

    Reference:
        Hyvärinen (2005), JMLR 6, eq. 4, in the form of `implicit_score_loss`.
    """

    def field(params: Params, current: Maps) -> VectorField:
        one = current._replace(params=params)
        return lambda y: velocity(net, one, y)

    def held_out(params: Params, current: Maps, probes: Cloud) -> Float[Array, " m"]:
        # one key for all that is compared
        return implicit_score_losses(field(params, current), probes.x, probes.scores, jax.random.key(0))

    def first_fit(key: Key, current: Maps, opt_state: optax.OptState, particles: Cloud):  # type: ignore[no-untyped-def]
        """Fit the first velocity, which is known at the particles, by least squares."""
        known = particles.scores - jax.vmap(jax.grad(base.log_prob))(particles.x)

        def update(carry, key_k):  # type: ignore[no-untyped-def]
            batch = jax.random.randint(key_k, (batch_size,), 0, len(known))

            def loss(params: Params) -> Float[Array, ""]:
                v = jax.vmap(field(params, current))(particles.x[batch])
                return jnp.mean(jnp.sum((v - known[batch]) ** 2, -1))

            return guarded_update(optimiser, jax.grad(loss)(carry[0]), carry[1], carry[0])[:2], None

        return jax.lax.scan(update, (current.params, opt_state), jax.random.split(key, first_updates))[0]

    def train(  # type: ignore[no-untyped-def]
        key: Key, first: Bool[Array, ""], current: Maps, opt_state, particles: Cloud, probes: Cloud
    ):
        def update(carry, key_k):  # type: ignore[no-untyped-def]
            params, opt_state = carry
            key_batch, key_probe = jax.random.split(key_k)
            batch = jax.random.randint(key_batch, (batch_size,), 0, len(particles.x))
            x, scores = (leaf[batch] for leaf in particles)

            def batch_loss(params: Params) -> Float[Array, ""]:
                return implicit_score_loss(field(params, current), x, scores, key_probe)

            loss, gradient = jax.value_and_grad(batch_loss)(params)
            params, opt_state, skipped = guarded_update(optimiser, gradient, opt_state, params)
            return (params, opt_state), (loss, skipped)

        def one_round(carry, key: Key):  # type: ignore[no-untyped-def]
            carry, (values, skips) = jax.lax.scan(update, carry, jax.random.split(key, num_updates))
            return carry, jnp.mean(values), jnp.sum(skips, dtype=jnp.int32)

        carry = current.params, opt_state
        if first_updates:
            key_first, key = jax.random.split(key)
            carry = jax.lax.cond(
                first, lambda: first_fit(key_first, current, opt_state, particles), lambda: carry
            )
        if max_rounds == 1:
            carry, loss, skipped = one_round(carry, key)
            return *carry, loss, skipped

        def advance(inner):  # type: ignore[no-untyped-def]
            k, carry, params, least, _, skipped, _ = inner
            carry, loss, skips = one_round(carry, jax.random.fold_in(key, k))
            now = jnp.mean(held_out(carry[0], current, probes))
            better = now < least
            params = jax.tree.map(lambda new, old: jnp.where(better, new, old), carry[0], params)
            return k + 1, carry, params, jnp.where(better, now, least), loss, skipped + skips, better

        least, zero = jnp.mean(held_out(carry[0], current, probes)), jnp.zeros((), jnp.int32)
        inner = zero, carry, carry[0], least, jnp.zeros_like(least), zero, jnp.ones((), bool)
        _, (_, opt_state), params, _, loss, skipped, _ = jax.lax.while_loop(
            lambda inner: inner[-1] & (inner[0] < max_rounds), advance, inner
        )
        return params, opt_state, loss, skipped

    def trim(current: Maps, particles: Cloud, probes: Cloud) -> Maps:
        if solved_output:
            return solve_output(net, current, particles, probes)
        if max_rounds == 1:
            return current
        blank = jax.tree.map(jnp.zeros_like, current.params)
        gain = held_out(blank, current, probes) - held_out(current.params, current, probes)
        needless = jnp.mean(gain) < _CLEAR * jnp.std(gain) / len(gain) ** 0.5
        params = jax.tree.map(lambda none, some: jnp.where(needless, none, some), blank, current.params)
        return current._replace(params=params)

    return VelocityFit(train, trim)


def kernel_fit(net: Net, base: Transition) -> VelocityFit:
    """Make the fit of velocities that are linear in their parameters θ: in closed form, every map anew.

    For v(x) = v_0(x) + Φ(x) θ the score matching loss is quadratic,

        θ = (E[ΦᵀΦ] + λ I)⁻¹ E[Φᵀ (g - v_0) + ∇·Φ],

    without an optimiser, a start or a lag. The ridge λ is the one of a few under which held-out points have
    the least loss. The first velocity is known, g - ∇log base, and is fitted by least squares.

    Args:
        net: ``apply(params, u)`` is linear in ``params``, a vector (see `numpyro_sbtm.networks.radial`).
        base: the particles' first law.

    Reference:
        Hyvärinen (2007), Some extensions of score matching, section 4 (closed form for exponential families);
        Zhou, Shi & Zhu (2020), Nonparametric score estimators, arXiv:2005.10099.
    """

    def moments(current: Maps, cloud: Cloud, known: Bool[Array, ""] | bool):  # type: ignore[no-untyped-def]
        """E[ΦᵀΦ] and what it is multiplied into, from one set of points."""
        blank = current._replace(params=jnp.zeros_like(current.params))

        def one(x: Float[Array, " d"], score: Float[Array, " d"]):  # type: ignore[no-untyped-def]
            at = lambda params: velocity(net, blank._replace(params=params), x)  # noqa: E731
            v, pull_back = jax.vjp(at, blank.params)
            features = jax.vmap(lambda e: pull_back(e)[0])(jnp.eye(x.size, dtype=x.dtype))

            def slope(params: Params) -> Float[Array, ""]:
                return divergence_of(lambda y: velocity(net, blank._replace(params=params), y), x, None)

            implicit = (score - v) @ features + jax.grad(slope)(blank.params)
            explicit = (score - jax.grad(base.log_prob)(x) - v) @ features
            return features, jnp.where(known, explicit, implicit)

        features, right = jax.vmap(one)(*cloud)
        return jnp.einsum("nij,nik->jk", features, features) / len(right), jnp.mean(right, 0)

    def train(  # type: ignore[no-untyped-def]
        key: Key, first: Bool[Array, ""], current: Maps, opt_state, particles: Cloud, probes: Cloud
    ):
        del key
        gram, right = moments(current, particles, first)
        held_gram, held_right = moments(current, probes, False)
        solution, loss = _ridge(gram, right[:, None], held_gram, held_right[:, None], _RIDGES)
        params = solution[:, 0]
        good = jnp.all(jnp.isfinite(params))
        return (
            jnp.where(good, params, current.params),
            opt_state,
            loss,
            (~good).astype(jnp.int32),
        )

    # nothing to trim: a wide ridge leaves as little as it should
    return VelocityFit(train, lambda current, particles, probes: current)
