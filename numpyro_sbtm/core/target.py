# SPDX-License-Identifier: Apache-2.0
"""What is sampled: an unnormalised density on R^d."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped, UInt32

__all__ = [
    "Key",
    "Keys",
    "LogDensity",
    "Modes",
    "Params",
    "Target",
    "VectorField",
    "after",
    "value_and_score",
]

Key = PRNGKeyArray | Shaped[Array, "2"]
"""One JAX random key, typed (``jax.random.key``) or legacy (``jax.random.PRNGKey``)."""

Keys = jaxtyping.Key[Array, "..."] | UInt32[Array, "... 2"]
"""One JAX random key, or an array of them."""

Params = Any
"""Any pytree of arrays: the parameters of a network."""

LogDensity = Callable[[Float[Array, " d"]], Float[Array, ""]]
"""An unnormalised log density of one point of R^d."""


VectorField = Callable[[Float[Array, " d"]], Float[Array, " d"]]
"""A vector field on R^d, at one point."""


class Modes(NamedTuple):
    """Events that tell modes apart, with their probabilities.

    Attributes:
        membership: how much one point belongs to each of k modes, shape ``[d]`` to shape ``[k]``: 0 or 1, or
            a probability where modes overlap.
        masses: its expectation under the target, shape ``[k]``.
    """

    membership: Callable[[Float[Array, " d"]], Float[Array, " k"]]
    masses: Float[np.ndarray, " k"]


class Target(NamedTuple):
    """An unnormalised density on R^d.

    Annealing and whitening are functions from a target to a target, so every method is written once,
    for a density on R^d. All but the first two fields are the truth, where it is known; only tests and
    benchmarks read them.

    Attributes:
        logdensity_fn: the unnormalised log density of one point, shape ``[d]`` to shape ``[]``.
        dim: the dimension d.
        log_z: the logarithm of the integral of the density, or None.
        sample: ``(key, n) -> [n, d]``, exact draws, or None.
        modes: what the modes are and how likely, or None.
        spread: standard deviation of a normal distribution around the origin that covers the density.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.target import Target
        >>> target = Target(lambda x: -0.5 * jnp.sum(x**2), dim=2)
        >>> float(target.logdensity_fn(jnp.ones(2)))
        -1.0
    """

    logdensity_fn: LogDensity
    dim: int
    log_z: float | None = None
    sample: Callable[[Key, int], Float[Array, "n d"]] | None = None
    modes: Modes | None = None
    spread: float = 1.0


def value_and_score(target: Target, x: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, " d"]]:
    """Evaluate the log density and its gradient, the score, at one point.

    Args:
        target: the density.
        x: one point, shape ``[d]``.

    Returns:
        The log density, shape ``[]``, and the score, shape ``[d]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.target import Target, value_and_score
        >>> value, score = value_and_score(Target(lambda x: -0.5 * jnp.sum(x**2), 2), jnp.ones(2))
        >>> value.item(), score.tolist()
        (-1.0, [-1.0, -1.0])
    """
    return jax.value_and_grad(target.logdensity_fn)(x)


def after(key: Key, value: Shaped[Array, "*n"]) -> Key:
    """Make a key that is not known before a value is.

    What is drawn with it waits for the value. Two batches of densities that XLA's CPU client runs side by
    side may both wait for the threads of its pool: a batched Cholesky factor in a model then never ends.

    Args:
        key: random key.
        value: what to wait for; nothing else depends on it.

    Returns:
        The key.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.target import after
        >>> jax.random.normal(after(jax.random.key(0), jnp.ones(3)), (2,)).shape
        (2,)
    """
    return jax.random.fold_in(
        key, jax.lax.bitcast_convert_type(jnp.ravel(value)[0].astype(jnp.float32), jnp.uint32)
    )
