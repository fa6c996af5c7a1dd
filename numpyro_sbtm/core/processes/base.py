# SPDX-License-Identifier: Apache-2.0
"""Pairs of discrete Markov chains, forward (noise to posterior) and backward (posterior to noise).

Notation, used in every formula of this folder: T steps; ``x_0`` is noise and ``x_T`` a draw. The
backward chain adds noise by exact Ornstein-Uhlenbeck steps with variance σ² at rest,

    B_k(x_k | x_{k+1}) = N(√(1-α_k) x_{k+1}, σ² α_k),

so that with A_k = ∏_{j≥k} (1-α_j) and A_T = 1, x_k given x_T is N(√A_k x_T, σ² (1-A_k)).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Transition

__all__ = ["Chain", "Process", "at"]


Chain = Callable[[Params, Int[Array, ""], Float[Array, " d"], Float[Array, "*s d"]], Transition]
"""``(params, k, x, score of the target at x) -> Transition``, for one point; of two scores where the process
has `Process.look_ahead`."""


class Process(NamedTuple):
    """Two discrete Markov chains on one grid.

    The target's score at every visited point is an argument, so that it is evaluated once and kept.

    Attributes:
        num_steps: the number of steps, T.
        init: the distribution of x_0, a function of the parameters.
        forward: F_k, the distribution of x_{k+1} given x_k.
        backward: B_k, the distribution of x_k given x_{k+1}.
        marginal: ``(k, x) -> log density``, a guess of the law of x_k; that of x_T guesses the target.
        signal: the signal level A_k, how far x_k is from noise, 0, to the draw, 1, shape ``[T+1]``.
        look_ahead: ``(k, x, score at x) -> point``, where the chains want the target's score, too: they are
            then given both, shape ``[2, d]``. None: nowhere.
        coarse: ``points -> Process``, the same process on some points of its grid, shape ``[m+1]``,
            increasing from 0 to T; None where it is not known between other points than neighbours.
        learns_reference: whether the law of x_0 or the size of the noise depends on the parameters.
        continuous: whether the chains are continuous functions of the points. Across a jump the gradient of
            a mean over paths is not that along the paths.
    """

    num_steps: int
    init: Callable[[Params], Transition]
    forward: Chain
    backward: Chain
    marginal: Callable[[Int[Array, ""], Float[Array, " d"]], Float[Array, ""]]
    signal: np.ndarray | Float[Array, " T1"]
    look_ahead: (
        Callable[[Int[Array, ""], Float[Array, " d"], Float[Array, " d"]], Float[Array, " d"]] | None
    ) = None
    coarse: Callable[[Int[Array, " m1"]], "Process"] | None = None
    learns_reference: bool = False
    continuous: bool = True


def at(
    table: np.ndarray | Float[Array, " T"], k: Int[Array, ""], like: Float[Array, " d"]
) -> Float[Array, ""]:
    """Look up the entry of a step in a table that was computed in float64."""
    return jnp.asarray(table, like.dtype)[k]
