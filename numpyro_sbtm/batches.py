# SPDX-License-Identifier: Apache-2.0
"""Functions of points that are evaluated a few at a time, however they are batched."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array, Float

from numpyro_sbtm.factorisations import most_points

__all__ = ["MAX_TOGETHER", "at_once", "in_batches"]

MAX_TOGETHER = 8192  # points that are never too many
_MAX_BYTES = 2**28  # of an array over all points at which a density is evaluated together


def at_once(
    function: Callable[..., Any], x: Float[Array, " d"], forward_mode: bool
) -> tuple[int, int | None]:
    """Say at how many points a function may be evaluated at once, by its arrays and its factorisations."""

    def largest(jaxpr: Any) -> int:
        sizes = [0]
        for equation in jaxpr.eqns:
            sizes += [var.aval.size * var.aval.dtype.itemsize for var in equation.outvars if var.aval.shape]
            sizes += [largest(inner) for inner in jaxprs_in_params(equation.params)]
        return max(sizes)

    together = max(1, _MAX_BYTES // max(1, largest(jax.make_jaxpr(function)(x).jaxpr)))
    differentiated = jax.jacfwd(function) if forward_mode else jax.value_and_grad(function)
    return together, most_points(differentiated, x)


def in_batches(function: Callable[..., Any], together: int) -> Callable[..., Any]:
    """Make a function of points of R^d that is evaluated at so many of them at a time, however it is batched.

    All `vmap`s around it become one batch, which is cut into equal blocks. Where data of the model are
    batched too, one set of them comes after the other.
    """

    def evaluate(*points: Float[Array, " d"]) -> Any:
        # data stay constants of the inner program: a branch under `vmap` would make a copy for every point
        program, out = jax.make_jaxpr(jax.jit(function), return_shape=True)(*points)

        @jax.custom_batching.custom_vmap
        def many(points: tuple[Float[Array, "n d"], ...], data: list[Array]) -> Any:
            def one(points: tuple[Float[Array, " d"], ...]) -> Any:
                flat = jax.core.eval_jaxpr(program.jaxpr, data, *points)
                return jax.tree.unflatten(jax.tree.structure(out), flat)

            num = len(points[0])
            rounds = -(-num // together)
            if rounds == 1:
                return jax.vmap(one)(points)
            # the last point again and again fills the last block: a remainder would be a second program
            which = jnp.minimum(jnp.arange(rounds * -(-num // rounds)), num - 1).reshape(rounds, -1)
            found = jax.lax.map(lambda block: jax.vmap(one)(tuple(p[block] for p in points)), which)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num], found)

        @many.def_vmap
        def rule(size: int, in_batched: Any, points: Any, data: list[Array]) -> tuple[Any, Any]:
            wide = tuple(
                p if batched else jnp.broadcast_to(p, (size, *p.shape))
                for p, batched in zip(points, in_batched[0], strict=True)
            )
            if any(in_batched[1]):
                mapped = [leaf for leaf, batched in zip(data, in_batched[1], strict=True) if batched]

                def one_set(given: tuple[Any, list[Array]]) -> Any:
                    rest = iter(given[1])
                    own = [next(rest) if b else leaf for leaf, b in zip(data, in_batched[1], strict=True)]
                    return many(given[0], own)

                found = jax.lax.map(one_set, (wide, mapped))
            else:
                flat = many(tuple(p.reshape(-1, *p.shape[2:]) for p in wide), data)
                found = jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), flat)
            return found, jax.tree.map(lambda _: True, found)

        found = many(tuple(p[None] for p in points), list(program.consts))
        return jax.tree.map(lambda leaf: leaf[0], found)

    return evaluate
