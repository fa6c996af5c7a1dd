# SPDX-License-Identifier: Apache-2.0
"""All that the mathematics knows of a network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.target import Key, Params

__all__ = ["Net", "pair", "with_place"]


class Net(NamedTuple):
    """All that the mathematics knows of a network: any pair of pure functions.

    Attributes:
        init: ``(key, d) -> params``, a plain pytree of arrays.
        apply: ``(params, *inputs of one point) -> outputs of one point``; what the inputs and outputs
            are is the contract between a network and the function that takes it.
        features: ``(params, *inputs of one point) -> φ``, shape ``[p]``, where ``params`` is a vector whose
            last p d entries are an output layer: ``apply`` gives Θᵀφ, with Θ these entries as a matrix of
            shape ``[p, d]``. None: there is no such layer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.net import Net
        >>> linear = Net(lambda key, d: jax.random.normal(key, (d, d)), lambda params, x: params @ x)
        >>> linear.apply(linear.init(jax.random.key(0), 3), jnp.ones(3)).shape
        (3,)
    """

    init: Callable[[Key, int], Params]
    apply: Callable[..., Any]
    features: Callable[..., Float[Array, " p"]] | None = None


def pair(net: Net) -> Net:
    """Make two networks of one: the parameters are a pair, and ``apply`` is for each of them.

    Examples:
        >>> import jax
        >>> from numpyro_sbtm.core.net import pair
        >>> from numpyro_sbtm.networks import denoiser
        >>> len(pair(denoiser(8)).init(jax.random.key(0), 2))
        2
    """

    def init(key: Key, dim: int) -> Params:
        return tuple(net.init(k, dim) for k in jax.random.split(key))

    return Net(init, net.apply)


def with_place(net: Net) -> Net:
    """Add a place and a log scale, shape ``[d]`` each, to the parameters of a network.

    Examples:
        >>> import jax
        >>> from numpyro_sbtm.core.net import with_place
        >>> from numpyro_sbtm.networks import denoiser
        >>> len(with_place(denoiser(8)).init(jax.random.key(0), 2))
        3
    """
    return Net(lambda key, dim: (net.init(key, dim), jnp.zeros(dim), jnp.zeros(dim)), net.apply)
