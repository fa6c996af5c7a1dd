# SPDX-License-Identifier: Apache-2.0
"""One trajectory, and every density on it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.target import Key, Params, Target, value_and_score
from numpyro_sbtm.core.transition import Transition

__all__ = [
    "Path",
    "evaluate",
    "evaluations_of_path",
    "log_kernels",
    "noise_path",
    "observe",
    "reevaluate",
    "simulate",
]


class Path(NamedTuple):
    """A trajectory x_0, ..., x_T with the target's score and all log densities on it.

    Attributes:
        xs: the points, shape ``[T+1, d]``.
        scores: the target's score at the points, shape ``[T+1, d]``; and where the process looks,
            shape ``[T+1, 2, d]``.
        log_init: log p_0(x_0), shape ``[]``.
        log_forward: log F_k(x_{k+1} | x_k), shape ``[T]``.
        log_backward: log B_k(x_k | x_{k+1}), shape ``[T]``.
        log_target: the unnormalised log density of x_T, shape ``[]``.
        log_choice: where gradients run through the points, the log probability of all that is discrete in
            how they were drawn, the components of mixtures: points do not change with it, so that the
            gradient of a mean of L has the term L ∇log_choice, shape ``[]``. None for points that are
            constants.
    """

    xs: Float[Array, "*n T1 d"]
    scores: Float[Array, "*points d"]
    log_init: Float[Array, "*n"]
    log_forward: Float[Array, "*n T"]
    log_backward: Float[Array, "*n T"]
    log_target: Float[Array, "*n"]
    log_choice: Float[Array, "*n"] | None = None

    def tempered(self, share: Float[Array, ""]) -> "Path":
        """Aim at ``F^(1-share) (ρ B)^share`` instead of ρ B, F being the chain that made the path.

        The weight with which `reevaluate` then judges other parameters is that for this law between.
        """
        return self._replace(log_target=self.log_target - (1.0 - share) * self.log_weight)

    @property
    def log_weight(self) -> Float[Array, "*n"]:
        """Log of target over proposal on the path: its exponential has mean Z, at any T."""
        return self.log_target - self.log_init + jnp.sum(self.log_backward - self.log_forward, -1)


def observe(
    process: Process, target: Target, k: Int[Array, ""], x: Float[Array, " d"]
) -> tuple[Float[Array, ""], Float[Array, "*s d"]]:
    """Evaluate all that the chains want to know of the target at x_k: its log density and its score there.

    Args:
        process: the two chains.
        target: the density of x_T.
        k: the number of the point, shape ``[]``.
        x: the point, shape ``[d]``.

    Returns:
        The log density, shape ``[]``, and the score, shape ``[d]``; both scores where the process looks
        elsewhere, too, shape ``[2, d]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core import Target, dis
        >>> from numpyro_sbtm.core.path import observe
        >>> from numpyro_sbtm.networks import denoiser
        >>> target = Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2), 1)
        >>> process = dis(denoiser(8, num_scores=2), 1, num_steps=3, look_ahead=True)
        >>> _, scores = observe(process, target, jnp.array(1), jnp.zeros(1))
        >>> scores.shape
        (2, 1)
    """
    look = process.look_ahead
    if look is None:
        return value_and_score(target, x)

    def one(place: Float[Array, " d"], _: None):  # type: ignore[no-untyped-def]
        value, score = value_and_score(target, place)
        return look(k, x, score), (value, score)

    # a loop: the target is compiled once
    _, (values, scores) = jax.lax.scan(one, x, None, length=2)
    return values[0], scores


def evaluations_of_path(process: Process) -> Evaluations:
    """Count what a path evaluates: the score at every point, and once more where the process looks ahead."""
    return Evaluations(gradients=(process.num_steps + 1) * (1 if process.look_ahead is None else 2))


def log_kernels(
    process: Process,
    params: Params,
    k: Int[Array, ""],
    x: Float[Array, " d"],
    x_next: Float[Array, " d"],
    score: Float[Array, "*s d"],
    score_next: Float[Array, "*s d"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Evaluate log F_k(x_next | x) and log B_k(x | x_next)."""
    return (
        process.forward(params, k, x, score).log_prob(x_next),
        process.backward(params, k, x_next, score_next).log_prob(x),
    )


def _drawn(law: Transition, key: Key) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Draw one point, with the log probability of what is discrete about it."""
    if isinstance(law, Mixture):
        return law.sample_component(key)
    x = law.sample(key)
    return x, jnp.zeros((), x.dtype)


def simulate(
    process: Process,
    params: Params,
    target: Target,
    key: Key,
    *,
    detach: bool = True,
    given: Float[Array, "T1 d"] | None = None,
    widen: Float[Array, ""] | None = None,
) -> Path:
    """Simulate one path with the forward chain; `vmap` over keys for a batch.

    Args:
        process: the two chains.
        params: parameters of the process.
        target: the density of x_T.
        key: random key.
        detach: stop gradients through the points, so that only the densities depend on ``params``
            (log-variance); False lets gradients run through the trajectory (reparametrised KL), and the path
            has its ``log_choice``.
        given: points to go through, shape ``[T+1, d]``; a row that is not finite is drawn. None draws all.
        widen: points are drawn from the forward chain with its standard deviations times this, to explore;
            the densities remain those of the chain itself. None: 1.

    Returns:
        The path, whose `log_weight` is exact at any number of steps.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Net, Target, dis, simulate
        >>> net = Net(lambda key, d: (), lambda p, t, x, s: (0 * x, 0 * x, jnp.zeros(()), jnp.zeros(1)))
        >>> target = Target(lambda x: -0.5 * jnp.sum(x**2), 2)
        >>> path = simulate(dis(net, 2, num_steps=4), (), target, jax.random.key(0))
        >>> path.xs.shape, round(float(path.log_weight), 4)  # log(2 pi), on every path
        ((5, 2), 1.8379)
    """
    last = process.num_steps - 1
    keys = jax.random.split(key, process.num_steps + 2)

    def point(k: Int[Array, ""], law: Transition, key: Key) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        drawn, log_choice = _drawn(law, key)
        if given is not None:
            pinned = jnp.all(jnp.isfinite(given[k]))
            drawn = jnp.where(pinned, given[k].astype(drawn.dtype), drawn)
            log_choice = jnp.where(pinned, 0.0, log_choice)
        return (jax.lax.stop_gradient(drawn) if detach else drawn), log_choice

    def step(carry, inputs):  # type: ignore[no-untyped-def]
        # arrive at x_k and go on: one place that calls the target. What x_0 came from and where x_T goes is
        # not used, but must be finite for gradients
        before, x = carry
        k, key_k = inputs
        log_target, score = observe(process, target, k, x)
        log_backward = process.backward(params, jnp.maximum(k - 1, 0), x, score).log_prob(before)
        forward = process.forward(params, jnp.minimum(k, last), x, score)
        wider = forward if widen is None else forward.widened(widen)
        after, log_choice = point(jnp.minimum(k, last) + 1, wider, key_k)
        return (x, after), (x, score, forward.log_prob(after), log_backward, log_target, log_choice)

    init = process.init(params)
    x0, first_choice = point(jnp.zeros((), jnp.int32), init, keys[0])
    steps = jnp.arange(process.num_steps + 1), keys[1:]
    _, (xs, scores, log_forward, log_backward, log_targets, choices) = jax.lax.scan(step, (x0, x0), steps)
    path = Path(xs, scores, init.log_prob(x0), log_forward[:-1], log_backward[1:], log_targets[-1])
    return path if detach else path._replace(log_choice=first_choice + jnp.sum(choices[:-1]))


def noise_path(
    process: Process, params: Params, target: Target, key: Key, x: Float[Array, " d"]
) -> Float[Array, "T1 d"]:
    """Sample the points of a path that ends in a given draw, with the backward chain.

    Given draws of the target this samples paths from the law that training aims at: they give the
    upper bound of the log evidence (EUBO), off-policy training, and path refreshment.

    Args:
        process: the two chains.
        params: parameters of the process.
        target: the density of x_T.
        key: random key.
        x: the end point x_T, shape ``[d]``.

    Returns:
        The points x_0, ..., x_T, shape ``[T+1, d]``.
    """

    def step(x_next, inputs):  # type: ignore[no-untyped-def]
        k, key_k = inputs
        _, score = observe(process, target, k + 1, x_next)
        before = process.backward(params, k, x_next, score).sample(key_k)
        return before, before

    steps = jnp.arange(process.num_steps), jax.random.split(key, process.num_steps)
    _, xs = jax.lax.scan(step, x, steps, reverse=True)
    return jnp.concatenate([xs, x[None]])


def evaluate(process: Process, params: Params, target: Target, xs: Float[Array, "T1 d"]) -> Path:
    """Put every density on given points: replay, backward paths, Metropolis.

    Args:
        process: the two chains.
        params: parameters of the process.
        target: the density of x_T.
        xs: the points x_0, ..., x_T, shape ``[T+1, d]``.

    Returns:
        The path; ``evaluate(..., simulate(...).xs)`` equals ``simulate(...)``.
    """
    steps = jnp.arange(process.num_steps + 1)
    log_targets, scores = jax.vmap(lambda k, x: observe(process, target, k, x))(steps, xs)
    none, blank = jnp.zeros((), xs.dtype), jnp.zeros(process.num_steps, xs.dtype)
    path = Path(xs, scores, none, blank, blank, log_targets[-1])
    return reevaluate(process, params, path)


def reevaluate(process: Process, params: Params, path: Path) -> Path:
    """Put the densities of other parameters on a path, without another call of the target.

    Args:
        process: the two chains.
        params: the other parameters.
        path: one path with its cached scores and log target.

    Returns:
        The path with new densities, but for ``log_target``.
    """
    log_forward, log_backward = jax.vmap(lambda k, *ends: log_kernels(process, params, k, *ends))(
        jnp.arange(process.num_steps), path.xs[:-1], path.xs[1:], path.scores[:-1], path.scores[1:]
    )
    log_init = process.init(params).log_prob(path.xs[0])
    return path._replace(log_init=log_init, log_forward=log_forward, log_backward=log_backward)
