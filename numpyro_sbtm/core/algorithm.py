# SPDX-License-Identifier: Apache-2.0
"""The one seam between a method and whoever drives it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.target import Key, Params

__all__ = ["Algorithm", "Draws", "Info", "Proposal", "guarded_update"]


class Info(NamedTuple):
    """What one training step reports.

    Attributes:
        loss: the training loss, shape ``[]``; NaN where it could not be computed.
        skipped: updates left out because their gradient was not finite, shape ``[]``.
        gradients: evaluations of the target's gradient, shape ``[]``.
        finished: whether another step would gain nothing, shape ``[]``.
    """

    loss: Float[Array, ""]
    skipped: Int[Array, ""]
    gradients: Int[Array, ""]
    finished: Bool[Array, ""]


class Draws(NamedTuple):
    """Fresh draws, independent given the trained parameters.

    Attributes:
        x: shape ``[n, d]``.
        log_weight: log of unnormalised target over proposal, on the point or on the path, shape ``[n]``.
        logdensity: the unnormalised log density of the target at x, shape ``[n]``.
        one_to_one: False for a draw of weight zero because a map behind it folds space and its inverse does
            not lead back to where the draw came from; always True for methods without maps, shape ``[n]``.
    """

    x: Float[Array, "n d"]
    log_weight: Float[Array, " n"]
    logdensity: Float[Array, " n"]
    one_to_one: Bool[Array, " n"]


class Proposal(NamedTuple):
    """Independent draws with exact weights: pure functions of frozen parameters.

    Attributes:
        draw: ``(key, params, n) -> Draws``. ``n`` fresh draws with exact weights; ``n`` is static.
        weigh: ``(key, params, x) -> log_weight`` of a given point, shape ``[d]`` to shape ``[]``: of the
            point itself, or of a fresh path that ends there. For a draw x of the target and this weight
            the pair has the law that Metropolis steps leave invariant. Infinite for a point that is never
            drawn, which only other moves leave; NaN if it cannot be computed.
        cost: what is evaluated for one draw, or for one weight.
    """

    draw: Callable[[Key, Params, int], Draws]
    weigh: Callable[[Key, Params, Float[Array, " d"]], Float[Array, ""]]
    cost: Evaluations = Evaluations(values=1)


class Algorithm(NamedTuple):
    """A method: how it learns, and how what it has learned draws.

    Attributes:
        init: ``key -> state``, a pytree of arrays. Cheap: nothing is trained here.
        step: ``(key, state) -> (state, Info)``. One step of training or transport.
        parameters: ``state -> params``, all that draws need: no optimiser and no particles.
        proposal: draws from there.
        several: dearer draws, each chosen among several, for where the weights of single ones vary too much,
            or None. A weight is an unbiased estimate of Z from all draws behind it.
    """

    init: Callable[[Key], Any]
    step: Callable[[Key, Any], tuple[Any, Info]]
    parameters: Callable[[Any], Params]
    proposal: Proposal
    several: Proposal | None = None


def guarded_update(
    optimiser: optax.GradientTransformation,
    gradient: Params,
    opt_state: optax.OptState,
    params: Params,
) -> tuple[Params, optax.OptState, Bool[Array, ""]]:
    """Apply an optimiser update, unless the gradient or the result is not finite.

    Args:
        optimiser: the optimiser.
        gradient: gradient of the loss, shaped like ``params``.
        opt_state: its state.
        params: the parameters.

    Returns:
        New parameters and state, or the old ones, and whether the update was skipped.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from numpyro_sbtm.core.algorithm import guarded_update
        >>> sgd, w = optax.sgd(1.0), jnp.zeros(1)
        >>> guarded_update(sgd, jnp.array([jnp.nan]), sgd.init(w), w)[2].item()
        True
    """
    updates, new_state = optimiser.update(gradient, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    leaves = jax.tree.leaves((gradient, new_params))
    good = jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
    new_params, new_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (new_params, new_state), (params, opt_state)
    )
    return new_params, new_state, ~good
