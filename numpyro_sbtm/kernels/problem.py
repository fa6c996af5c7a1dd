# SPDX-License-Identifier: Apache-2.0
"""A density on R^d, and the way back to the sites of a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_sbtm.batches import MAX_TOGETHER, in_batches
from numpyro_sbtm.core.target import LogDensity

__all__ = ["Problem", "flat", "logdensity", "prototype_of"]


class Problem(NamedTuple):
    """A posterior on R^d, and the way back to the model's sites.

    Attributes:
        potential_gen: ``(*model_args, **model_kwargs) -> potential_fn``; the potential is minus the log
            density of unconstrained values. Rebuilt from the arguments wherever these may change.
        postprocess_gen: ``(*model_args, **model_kwargs) -> (unconstrained -> sites)``.
        positions: valid unconstrained values, with a leading axis, one per chain.
        starts: points from which to look for the posterior's bulk, shape ``[s, d]``.
        scouts: points that lie as widely as the posterior may, draws of the prior where there is one,
            shape ``[m, d]``.
        order: the coordinates of R^d in the order of the model's trace, shape ``[d]``.
        unravel: from a point of R^d to unconstrained values.
        together: at how many points the density may be evaluated at once, by the memory that takes.
        most: at how many points it may be evaluated at all at once; None: at any number.
        proper: whether all priors are known to be proper, and nothing but data enters beside them.
        centre: of the windows of periodic coordinates, NaN for others, shape ``[d]``; None: all others.
    """

    potential_gen: Callable[..., Callable[[Any], Float[Array, ""]]]
    postprocess_gen: Callable[..., Callable[[Any], Any]]
    positions: Any
    starts: Float[Array, "s d"]
    scouts: Float[Array, "m d"]
    order: np.ndarray
    unravel: Callable[[Float[Array, " d"]], Any]
    together: int
    most: int | None
    proper: bool = False
    centre: np.ndarray | None = None

    @property
    def small(self) -> bool:
        """Whether the density makes no large arrays: many points are then evaluated at once."""
        return self.together >= MAX_TOGETHER


def flat(values: Any) -> Float[Array, "n d"]:
    """Flatten values that have a leading axis."""
    return jax.vmap(lambda value: ravel_pytree(value)[0])(values)


def prototype_of(values: Any) -> Any:
    """Make zeros of the shapes that values have without their leading axis."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), values)


def logdensity(
    problem: Problem, model_args: tuple[Any, ...], model_kwargs: dict[str, Any], forward_mode: bool
) -> LogDensity:
    """Build the log density of a point of R^d for given model arguments.

    Args:
        problem: the problem.
        model_args: positional arguments of the model.
        model_kwargs: keyword arguments of the model.
        forward_mode: compute its gradient in forward mode, for models with a ``while_loop``.
    """
    potential = problem.potential_gen(*model_args, **model_kwargs)

    def evaluate(x: Float[Array, " d"]) -> Float[Array, ""]:
        return -potential(problem.unravel(x))

    sizes = [] if problem.small else [problem.together]
    sizes += [] if problem.most is None else [problem.most]
    if not sizes and not forward_mode:
        return evaluate

    score_of = (jax.jacfwd if forward_mode else jax.grad)(evaluate)

    def with_score(x: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, " d"]]:
        return (evaluate(x), score_of(x)) if forward_mode else jax.value_and_grad(evaluate)(x)

    def curved(x: Float[Array, " d"], v: Float[Array, " d"]) -> Float[Array, " d"]:
        """The Hessian times a vector."""
        return jax.jvp(score_of, (x,), (v,))[1] if forward_mode else jax.vjp(score_of, x)[1](v)[0]

    value, value_and_score, hessian_product = evaluate, with_score, curved
    if sizes:
        value, value_and_score, hessian_product = (
            in_batches(f, min(sizes)) for f in (evaluate, with_score, curved)
        )

    def residuals(x: Float[Array, " d"]) -> tuple[Any, Any]:
        found = value_and_score(x)
        return found, (x, found[1])

    # only gradients through simulated paths differentiate the score
    scored = jax.custom_vjp(value_and_score)
    scored.defvjp(residuals, lambda kept, c: (c[0] * kept[1] + hessian_product(kept[0], c[1]),))
    differentiable = jax.custom_vjp(value)
    differentiable.defvjp(scored, lambda score, cotangent: (cotangent * score,))
    return differentiable
