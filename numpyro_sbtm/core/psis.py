# SPDX-License-Identifier: Apache-2.0
"""The tail index of importance weights, in JAX."""

import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float

from numpyro_sbtm.core.lazy import load
from numpyro_sbtm.core.weights import ess_fraction

__all__ = [
    "FINITE_VARIANCE_KHAT",
    "USABLE_KHAT",
    "harmless_tail",
    "judged_tail_index",
    "tail_index",
    "tail_index_error",
    "unseen_share",
]

FINITE_VARIANCE_KHAT = 0.5  # above it the weights have no finite variance
USABLE_KHAT = 0.7  # above it the mean weight has no usable error bar
_NEARLY_EQUAL = 0.9  # effective fraction above which k-hat is noise: there is too little in the tail to fit
_UNSEEN = 0.02  # what a tail may add to the mean weight at most, below which its index does no harm
_FEWEST = 25  # positive weights that have a tail
_LARGEST_KHAT = 0.9  # of a tail whose mean is still computed; one at k-hat 1 has none
_EQUAL = 1e-4  # range of log weights below which they count as equal


def tail_index(log_weight: Float[Array, " n"]) -> Float[Array, ""]:
    """Fit the tail of the weights: Pareto k̂. May be traced.

    Args:
        log_weight: shape ``[n]``; one that is not finite is a weight of zero.

    Returns:
        k̂, shape ``[]``; infinity if too few weights are positive or the fit fails, minus infinity if those
        that are positive are equal.

    Reference:
        Vehtari et al. (2024), Pareto smoothed importance sampling, JMLR 25.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.psis import tail_index
        >>> bool(tail_index(0.1 * jax.random.normal(jax.random.key(0), (1000,))) < 0.5)
        True
        >>> float(tail_index(jnp.zeros(100)))
        -inf
    """
    alive = jnp.isfinite(log_weight)
    largest = jnp.max(jnp.where(alive, log_weight, -jnp.inf))
    spread = largest - jnp.min(jnp.where(alive, log_weight, jnp.inf))
    # weights of zero are kept, far below the rest: they do not belong to the tail
    floor = largest - (700.0 if log_weight.dtype == jnp.float64 else 80.0)
    psis_weights = load("blackjax.diagnostics").psis_weights
    _, khat = psis_weights(jnp.where(alive, log_weight, floor))
    khat = jnp.where(jnp.isfinite(khat), khat, jnp.inf)
    khat = jnp.where(spread < _EQUAL, -jnp.inf, khat)
    return jnp.where(jnp.sum(alive) < _FEWEST, jnp.inf, khat)


def tail_index_error(khat: float, n: int) -> float:
    """Compute the standard error of k̂ from n weights, the largest 3 √n of which are their tail.

    Args:
        khat: the estimate.
        n: how many weights it is from.

    Reference:
        Smith (1987), Estimating tails of probability distributions, Annals of Statistics 15: (1 + k) / √m
        for m exceedances.

    Examples:
        >>> from numpyro_sbtm.core.psis import tail_index_error
        >>> round(tail_index_error(0.4, 4000), 2)
        0.1
    """
    return (1.0 + max(khat, 0.0)) / min(n / 5.0, 3.0 * n**0.5) ** 0.5


def unseen_share(log_weight: Float[Array, " n"], khat: Float[Array, ""] | float) -> Float[Array, ""]:
    """Compute what weights larger than any seen are expected to add to their sum, as a share of it.

    One weight in n lies above the largest of n, and of a Pareto tail of index k those above w have the mean
    w / (1 - k). Where weights have no finite variance, their sample's tells nothing, and this is the size of
    the error of their mean.

    Args:
        log_weight: shape ``[n]``; ``-inf`` is a weight of zero.
        khat: their tail index; taken as 0.9 where it is larger, as 0 where it is less than 0.

    Returns:
        max w / Σ w / (1 - k̂), shape ``[]``.

    Reference:
        Embrechts, Klüppelberg & Mikosch (1997), Modelling extremal events, theorem 3.4.13 (e).

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.psis import unseen_share
        >>> round(float(unseen_share(jnp.log(jnp.array([1.0, 1.0, 2.0])), 0.5)), 4)
        1.0
    """
    return jnp.exp(jnp.max(log_weight) - logsumexp(log_weight)) / (1.0 - jnp.clip(khat, 0.0, _LARGEST_KHAT))


def harmless_tail(
    fraction: Float[Array, ""] | float, unseen: Float[Array, ""] | float
) -> Bool[Array, ""] | bool:
    """Say whether weights are so equal that k̂ is noise, or so even that their tail adds next to nothing.

    Args:
        fraction: their effective sample fraction.
        unseen: their `unseen_share`, were k̂ 0.9.
    """
    return (fraction > _NEARLY_EQUAL) | (unseen < _UNSEEN)


def judged_tail_index(log_weight: Float[Array, " n"]) -> Float[Array, ""]:
    """Fit the tail of the weights where it matters: Pareto k̂, or minus infinity where it is harmless.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.psis import judged_tail_index
        >>> log_weight = 0.1 * jax.random.normal(jax.random.key(0), (1000,))
        >>> float(judged_tail_index(log_weight))
        -inf
    """
    harmless = harmless_tail(ess_fraction(log_weight), unseen_share(log_weight, jnp.inf))
    return jnp.where(harmless, -jnp.inf, tail_index(log_weight))
