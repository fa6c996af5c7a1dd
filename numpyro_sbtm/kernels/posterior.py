# SPDX-License-Identifier: Apache-2.0
"""A model's posterior as functions of its data, for samplers that outlive a run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sbtm.core.target import LogDensity
from numpyro_sbtm.kernels.problem import Problem, logdensity
from numpyro_sbtm.sampler import Posterior

__all__ = ["Arguments", "posterior_of"]

_ARRAY = object()  # stands for an array


class Arguments(NamedTuple):
    """Arguments of a model: positional, and by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def arrays(self) -> list[Any]:
        """Return the arrays among them."""
        return [leaf for leaf in jax.tree.leaves(tuple(self)) if _is_array(leaf)]

    def shapes(self) -> Any:
        """Describe them as far as the sites of a model depend on them."""
        leaves, structure = jax.tree.flatten(tuple(self))
        return structure, [(leaf.shape, str(leaf.dtype)) if _is_array(leaf) else leaf for leaf in leaves]

    def blank(self) -> "Callable[[list[Any]], Arguments]":
        """Return what puts other arrays in the places of these, and holds none of them."""
        leaves, structure = jax.tree.flatten(tuple(self))
        others = [_ARRAY if _is_array(leaf) else leaf for leaf in leaves]

        def filled(arrays: list[Any]) -> Arguments:
            remaining = iter(arrays)
            filled = [next(remaining) if leaf is _ARRAY else leaf for leaf in others]
            return Arguments(*jax.tree.unflatten(structure, filled))

        return filled


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def posterior_of(problem: Problem, arguments: Arguments, forward_mode: bool) -> tuple[Posterior, bool]:
    """Make the posterior of a model, as functions of the arrays among its arguments.

    Where a model needs its data themselves, for `np.unique` or as a data frame, they are constants of it.

    Returns:
        The posterior, and whether it is that of other arrays of the same shapes, too.
    """
    dim, filled = problem.starts.shape[1], arguments.blank()

    def density(data: list[Any]) -> LogDensity:
        given = filled(data)
        return logdensity(problem, given.args, given.kwargs, forward_mode)

    def sites(data: list[Any]) -> Callable[[Float[Array, " d"]], Any]:
        given = filled(data)
        postprocess = problem.postprocess_gen(*given.args, **given.kwargs)
        return lambda x: postprocess(problem.unravel(x))

    data = arguments.arrays()
    try:
        jax.eval_shape(lambda data, x: density(data)(x), data, jnp.zeros(dim))
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError, TypeError, ValueError):
        constant = lambda _: density(data), problem.unravel, lambda _: sites(data)
        return Posterior(dim, *constant, problem.proper), False
    return Posterior(dim, density, problem.unravel, sites, problem.proper), True
