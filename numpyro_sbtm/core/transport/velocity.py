# SPDX-License-Identifier: Apache-2.0
"""Learning one velocity of transport: an affine part in closed form, and a network for the rest."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.algorithm import guarded_update
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.options import TransportOptions
from numpyro_sbtm.core.score import divergence_of, implicit_score_loss, implicit_score_losses
from numpyro_sbtm.core.target import Key, Params, VectorField
from numpyro_sbtm.core.transition import Transition
from numpyro_sbtm.core.transport.maps import Maps, velocity

__all__ = [
    "KernelFit",
    "NetworkFit",
    "ScoredPoints",
    "VelocityFit",
    "affine_part",
    "bounded",
    "solve_output",
    "times_covariance",
]

_RIDGES = tuple(10.0**k for k in range(1, -6, -1))  # of the mean squared feature; held-out points choose
_OUTPUT_RIDGES = (jnp.inf, *_RIDGES[:4])  # weaker ones overfit: learned features fit their particles already
_LONGEST_SCORE = 5.0  # in medians of the particles' scores
_CLEAR = 2.0  # standard errors by which a network must improve the held-out loss of a map


class ScoredPoints(NamedTuple):
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
        >>> from numpyro_sbtm.core.transport.velocity import bounded
        >>> bounded(jnp.array([[1.0], [-1.0], [1.0], [99.0], [jnp.nan]]))[:, 0].tolist()
        [1.0, -1.0, 1.0, 5.0, 0.0]
    """
    scores = jnp.where(jnp.all(jnp.isfinite(scores), -1, keepdims=True), scores, 0.0)
    norm = jnp.linalg.norm(scores, axis=-1, keepdims=True)
    return scores * jnp.minimum(1.0, _LONGEST_SCORE * jnp.median(norm) / jnp.maximum(norm, 1e-9))


def affine_part(particles: ScoredPoints, params: Params) -> Maps:
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


def times_covariance(one: Maps) -> Maps:
    """Multiply a velocity by the particles' covariance C, a metric in which all directions relax alike.

    Reference:
        Chen, Huang, Huang, Reich & Stuart (2023), Gradient flows for sampling, arXiv:2302.11024, section 4
        (affine invariance).
    """
    cov = jnp.linalg.inv(one.whitener.T @ one.whitener)
    return one._replace(drift=cov @ one.drift, slope=cov @ one.slope, lift=cov @ one.lift)


def _ridge(
    gram: Float[Array, "p p"],
    right: Float[Array, "p d"],
    held_gram: Float[Array, "p p"],
    held_right: Float[Array, "p d"],
    ridges: tuple[float, ...],
) -> tuple[Float[Array, "p d"], Float[Array, ""]]:
    """Solve (gram + λ I) θ = right, for the λ with the least loss of held-out points; with that loss."""
    values, vectors = jnp.linalg.eigh(gram)
    turned = vectors.T @ right
    sizes = jnp.asarray(ridges, gram.dtype) * jnp.mean(values)
    solutions = jax.vmap(lambda size: vectors @ (turned / (jnp.maximum(values, 0.0) + size)[:, None]))(sizes)
    losses = jax.vmap(lambda theta: jnp.sum(theta * (held_gram @ theta - 2.0 * held_right)))(solutions)
    best = jnp.argmin(losses)
    return solutions[best], losses[best]


def solve_output(net: Net, current: Maps, particles: ScoredPoints, probes: ScoredPoints) -> Maps:
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

    def moments(points: ScoredPoints) -> tuple[Float[Array, "p p"], Float[Array, "p d"]]:
        centred = points.x - current.mean
        u = centred @ current.whitener.T
        at = jax.vmap(lambda u: features(current.params, u))
        # a shift of all points at once: its derivative is the mean of theirs
        slopes = jax.jacfwd(lambda shift: jnp.mean(at(u + shift), 0))(jnp.zeros_like(current.mean))
        phi, rest = at(u), points.scores - current.drift - centred @ current.slope.T
        return phi.T @ phi / len(phi), phi.T @ rest / len(phi) + slopes @ current.whitener

    gram, right = moments(particles)
    held_gram, held_right = moments(probes)
    psi, _ = _ridge(gram, right, held_gram, held_right, _OUTPUT_RIDGES)
    theta = jax.scipy.linalg.solve_triangular(current.whitener, psi.T, trans=1, lower=True).T
    good = jnp.all(jnp.isfinite(theta))
    params = current.params.at[-theta.size :].set(theta.ravel())
    return current._replace(params=jnp.where(good, params, current.params))


@runtime_checkable
class VelocityFit(Protocol):
    """How the velocity of the next map is fitted, and whether its network is used."""

    def train(
        self,
        key: Key,
        first: Bool[Array, ""],
        current: Maps,
        opt_state: optax.OptState,
        particles: ScoredPoints,
        probes: ScoredPoints,
    ) -> tuple[Params, optax.OptState, Float[Array, ""], Int[Array, ""]]:
        """Train the network of a map; ``first`` says whether it is the very first, whose velocity is known.

        Returns:
            New parameters and state of the optimiser, the loss, and updates skipped.
        """
        ...

    def trim(self, current: Maps, particles: ScoredPoints, probes: ScoredPoints) -> Maps:
        """Give a map its best output layer, or no network if that does not help."""
        ...


@dataclass(frozen=True, eq=False)
class NetworkFit:
    """Training of velocities by implicit score matching.

    Attributes:
        net: the network.
        optimiser: an optax optimiser.
        base: the particles' first law.
        options: ``num_updates``, ``batch_size``, ``max_rounds``, ``first_updates`` and ``solved_output``.

    Reference:
        Hyvärinen (2005), JMLR 6, eq. 4, in the form of `implicit_score_loss`.
    """

    net: Net
    optimiser: optax.GradientTransformation
    base: Transition
    options: TransportOptions

    def field(self, params: Params, current: Maps) -> VectorField:
        """Make the velocity of a map with other parameters."""
        one = current._replace(params=params)
        return lambda y: velocity(self.net, one, y)

    def held_out(self, params: Params, current: Maps, probes: ScoredPoints) -> Float[Array, " m"]:
        """Compute the losses of points that are not trained on."""
        # one key for all that is compared
        return implicit_score_losses(self.field(params, current), probes.x, probes.scores, jax.random.key(0))

    def first_fit(
        self, key: Key, current: Maps, opt_state: optax.OptState, particles: ScoredPoints
    ) -> tuple[Params, optax.OptState]:
        """Fit the first velocity, which is known at the particles, by least squares."""
        known = particles.scores - jax.vmap(jax.grad(self.base.log_prob))(particles.x)

        def update(carry: tuple[Params, optax.OptState], key: Key) -> tuple[Any, None]:
            batch = jax.random.randint(key, (self.options.batch_size,), 0, len(known))

            def loss(params: Params) -> Float[Array, ""]:
                v = jax.vmap(self.field(params, current))(particles.x[batch])
                return jnp.mean(jnp.sum((v - known[batch]) ** 2, -1))

            return guarded_update(self.optimiser, jax.grad(loss)(carry[0]), carry[1], carry[0])[:2], None

        keys = jax.random.split(key, self.options.first_updates)
        return jax.lax.scan(update, (current.params, opt_state), keys)[0]

    def one_round(
        self, key: Key, carry: tuple[Params, optax.OptState], current: Maps, particles: ScoredPoints
    ) -> tuple[tuple[Params, optax.OptState], Float[Array, ""], Int[Array, ""]]:
        """Make the updates of a round."""

        def update(carry: tuple[Params, optax.OptState], key: Key) -> tuple[Any, Any]:
            params, opt_state = carry
            key_batch, key_probe = jax.random.split(key)
            batch = jax.random.randint(key_batch, (self.options.batch_size,), 0, len(particles.x))
            x, scores = (leaf[batch] for leaf in particles)

            def batch_loss(params: Params) -> Float[Array, ""]:
                return implicit_score_loss(self.field(params, current), x, scores, key_probe)

            loss, gradient = jax.value_and_grad(batch_loss)(params)
            params, opt_state, skipped = guarded_update(self.optimiser, gradient, opt_state, params)
            return (params, opt_state), (loss, skipped)

        keys = jax.random.split(key, self.options.num_updates)
        carry, (values, skips) = jax.lax.scan(update, carry, keys)
        return carry, jnp.mean(values), jnp.sum(skips, dtype=jnp.int32)

    def train(
        self,
        key: Key,
        first: Bool[Array, ""],
        current: Maps,
        opt_state: optax.OptState,
        particles: ScoredPoints,
        probes: ScoredPoints,
    ) -> tuple[Params, optax.OptState, Float[Array, ""], Int[Array, ""]]:
        """Make a round of updates, or rounds while the held-out loss falls, and keep the best parameters."""
        carry = current.params, opt_state
        if self.options.first_updates:
            key_first, key = jax.random.split(key)
            known = lambda: self.first_fit(key_first, current, opt_state, particles)  # noqa: E731
            carry = jax.lax.cond(first, known, lambda: carry)
        if self.options.max_rounds == 1:
            carry, loss, skipped = self.one_round(key, carry, current, particles)
            return *carry, loss, skipped

        def advance(now: _Rounds) -> _Rounds:
            carry, loss, skips = self.one_round(jax.random.fold_in(key, now.k), now.carry, current, particles)
            held_out = jnp.mean(self.held_out(carry[0], current, probes))
            better = held_out < now.least
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), carry[0], now.best)
            least = jnp.where(better, held_out, now.least)
            return _Rounds(now.k + 1, carry, best, least, loss, now.skipped + skips, better)

        least, zero = jnp.mean(self.held_out(carry[0], current, probes)), jnp.zeros((), jnp.int32)
        start = _Rounds(zero, carry, carry[0], least, jnp.zeros_like(least), zero, jnp.ones((), bool))
        end = jax.lax.while_loop(lambda now: now.better & (now.k < self.options.max_rounds), advance, start)
        return end.best, end.carry[1], end.loss, end.skipped

    def trim(self, current: Maps, particles: ScoredPoints, probes: ScoredPoints) -> Maps:
        """Solve for the output layer, or leave out a network that does not help held-out points clearly."""
        if self.options.solved_output:
            return solve_output(self.net, current, particles, probes)
        if self.options.max_rounds == 1:
            return current
        blank = jax.tree.map(jnp.zeros_like, current.params)
        gain = self.held_out(blank, current, probes) - self.held_out(current.params, current, probes)
        needless = jnp.mean(gain) < _CLEAR * jnp.std(gain) / len(gain) ** 0.5
        params = jax.tree.map(lambda none, some: jnp.where(needless, none, some), blank, current.params)
        return current._replace(params=params)


class _Rounds(NamedTuple):
    """Rounds of training with what was best."""

    k: Int[Array, ""]
    carry: tuple[Params, optax.OptState]
    best: Params
    least: Float[Array, ""]
    loss: Float[Array, ""]
    skipped: Int[Array, ""]
    better: Bool[Array, ""]


@dataclass(frozen=True, eq=False)
class KernelFit:
    """The fit of velocities that are linear in their parameters θ: in closed form, every map anew.

    For v(x) = v_0(x) + Φ(x) θ the score matching loss is quadratic,

        θ = (E[ΦᵀΦ] + λ I)⁻¹ E[Φᵀ (g - v_0) + ∇·Φ],

    without an optimiser, a start or a lag. The ridge λ is the one of a few under which held-out points have
    the least loss. The first velocity is known, g - ∇log base, and is fitted by least squares.

    Attributes:
        net: ``apply(params, u)`` is linear in ``params``, a vector (see `numpyro_sbtm.networks.radial`).
        base: the particles' first law.

    Reference:
        Hyvärinen (2007), Some extensions of score matching, section 4 (closed form for exponential families);
        Zhou, Shi & Zhu (2020), Nonparametric score estimators, arXiv:2005.10099.
    """

    net: Net
    base: Transition

    def moments(
        self, current: Maps, points: ScoredPoints, known: Bool[Array, ""] | bool
    ) -> tuple[Float[Array, "p p"], Float[Array, " p"]]:
        """Compute E[ΦᵀΦ] and what it is multiplied into, from one set of points."""
        blank = current._replace(params=jnp.zeros_like(current.params))

        def at(
            x: Float[Array, " d"], score: Float[Array, " d"]
        ) -> tuple[Float[Array, "d p"], Float[Array, " p"]]:
            field = lambda params: velocity(self.net, blank._replace(params=params), x)  # noqa: E731
            v, pull_back = jax.vjp(field, blank.params)
            features = jax.vmap(lambda e: pull_back(e)[0])(jnp.eye(x.size, dtype=x.dtype))

            def slope(params: Params) -> Float[Array, ""]:
                return divergence_of(lambda y: velocity(self.net, blank._replace(params=params), y), x, None)

            implicit = (score - v) @ features + jax.grad(slope)(blank.params)
            explicit = (score - jax.grad(self.base.log_prob)(x) - v) @ features
            return features, jnp.where(known, explicit, implicit)

        features, right = jax.vmap(at)(*points)
        return jnp.einsum("nij,nik->jk", features, features) / len(right), jnp.mean(right, 0)

    def train(
        self,
        key: Key,
        first: Bool[Array, ""],
        current: Maps,
        opt_state: optax.OptState,
        particles: ScoredPoints,
        probes: ScoredPoints,
    ) -> tuple[Params, optax.OptState, Float[Array, ""], Int[Array, ""]]:
        """Solve for the parameters."""
        del key
        gram, right = self.moments(current, particles, first)
        held_gram, held_right = self.moments(current, probes, False)
        solution, loss = _ridge(gram, right[:, None], held_gram, held_right[:, None], _RIDGES)
        params = solution[:, 0]
        good = jnp.all(jnp.isfinite(params))
        return jnp.where(good, params, current.params), opt_state, loss, (~good).astype(jnp.int32)

    def trim(self, current: Maps, particles: ScoredPoints, probes: ScoredPoints) -> Maps:
        """Leave a map as it is: a wide ridge leaves as little as it should."""
        del particles, probes
        return current
