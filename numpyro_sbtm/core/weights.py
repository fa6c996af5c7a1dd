# SPDX-License-Identifier: Apache-2.0
"""What follows from draws with log weights (target over proposal): evidence, quality, correction."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.bisection import furthest
from numpyro_sbtm.core.target import Key

__all__ = [
    "chain_efficiency",
    "clean",
    "ess_fraction",
    "log_evidence",
    "log_variance_at",
    "metropolis",
    "reachable",
    "resample",
]


def clean(log_weight: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Give proposals with an undefined or infinite weight the weight zero; count them separately.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.weights import clean
        >>> clean(jnp.array([0.0, jnp.nan, jnp.inf])).tolist()
        [0.0, -inf, -inf]
    """
    return jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)


def _centred(log_weight: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Take the largest log weight from all: in float32 little is left of a difference of large sums."""
    largest = jnp.max(log_weight)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    return log_weight - largest, largest


def log_evidence(log_weight: Float[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimate log Z, the logarithm of the mean weight, and its standard error.

    The standard error is that of the mean weight relative to the mean weight (delta method).

    Args:
        log_weight: of independent fresh proposals, shape ``[n]``; ``-inf`` is a weight of zero.

    Returns:
        The estimate and its standard error, both of shape ``[]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.weights import log_evidence
        >>> log_z, se = log_evidence(jnp.full(10, 3.0))
        >>> round(float(log_z), 4), round(float(se), 4)
        (3.0, 0.0)
    """
    n = log_weight.shape[0]
    log_weight, largest = _centred(log_weight)
    log_z = logsumexp(log_weight) - jnp.log(n)
    relative = jnp.exp(log_weight - log_z)
    return log_z + largest, jnp.sqrt(jnp.sum((relative - 1.0) ** 2) / (n * max(n - 1, 1)))


def ess_fraction(log_weight: Float[Array, " n"]) -> Float[Array, ""]:
    """Compute the effective sample fraction, ``(Σ w)² / (n Σ w²)``, between 1/n and 1.

    Reference:
        Kong (1992), A note on importance sampling using standardized weights.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.weights import ess_fraction
        >>> float(ess_fraction(jnp.array([0.0, -jnp.inf])))
        0.5
    """
    log_weight, _ = _centred(log_weight)
    log_ess = 2 * logsumexp(log_weight) - logsumexp(2 * log_weight)
    return jnp.nan_to_num(jnp.exp(log_ess)) / log_weight.shape[0]


def chain_efficiency(log_weight: Float[Array, " n"], num_steps: int) -> Float[Array, ""]:
    """Predict how many effective draws one draw of a chain of independence Metropolis is worth.

    A state of weight w stays for another draw with the probability r(w)^m, where r = 1 - E min(1, w'/w) is
    that of rejecting one of m proposals; so long as it stays, all draws are one.

    Args:
        log_weight: of independent proposals, shape ``[n]``; ``-inf`` is a weight of zero.
        num_steps: m, Metropolis steps of a draw.

    Returns:
        The inverse of E (1 + r^m) / (1 - r^m) over the target, between 0 and 1, shape ``[]``.

    Reference:
        Liu (1996), Metropolized independent sampling with comparisons to rejection sampling and importance
        sampling, Statistics and Computing 6 (the eigenvalues of the chain, which are r(w)).

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.weights import chain_efficiency
        >>> log_weight = jnp.array([0.0] * 99 + [4.0])
        >>> [round(float(chain_efficiency(w, 4)), 2) for w in (0.0 * log_weight, log_weight)]
        [1.0, 0.15]
    """
    n = log_weight.shape[0]
    weight = jnp.sort(jnp.exp(_centred(log_weight)[0]))
    below = jnp.cumsum(weight) / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)
    stay = jnp.clip(1.0 - (below + (n - 1.0 - jnp.arange(n))) / n, 0.0, 1.0) ** num_steps
    time = (1.0 + stay) / jnp.maximum(1.0 - stay, 1.0 / n)
    return jnp.nan_to_num(jnp.sum(weight) / jnp.sum(jnp.where(weight > 0.0, weight * time, 0.0)))


def reachable(log_weight: Float[Array, " n"], nats: float) -> Float[Array, ""]:
    """Compute the largest power β in [0, 1] such that weights w^β change a sample's law by so many nats.

    Measured by the Kullback-Leibler divergence of the weighted sample from the plain one.

    Args:
        log_weight: of draws, shape ``[n]``; ``-inf`` is a weight of zero.
        nats: the bound on the divergence.

    Returns:
        β, shape ``[]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.weights import reachable
        >>> float(reachable(jnp.array([0.0, 0.1]), 1.0))
        1.0
    """

    log_weight, _ = _centred(log_weight)

    def near(power: Float[Array, ""]) -> Bool[Array, ""]:
        share = jax.nn.log_softmax(jnp.where(jnp.isfinite(log_weight), power * log_weight, -jnp.inf))
        log_ratio = jnp.where(jnp.isfinite(share), share, 0.0) + jnp.log(log_weight.shape[0])
        return jnp.sum(jnp.exp(share) * log_ratio) < nats

    return furthest(near, jnp.zeros((), log_weight.dtype))


def resample(key: Key, log_weight: Float[Array, " n"], num: int) -> Int[Array, " num"]:
    """Draw indices with probability proportional to the weights; uniformly if all weights are zero.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.weights import resample
        >>> resample(jax.random.key(0), jnp.array([-jnp.inf, 0.0]), 3).tolist()
        [1, 1, 1]
    """
    alive = jnp.any(jnp.isfinite(log_weight))
    return jax.random.categorical(key, jnp.where(alive, _centred(log_weight)[0], 0.0), shape=(num,))


def log_variance_at(acceptance: float | None) -> float:
    """Compute the variance of normal log weights at which an independence sampler accepts so many proposals.

    Independent proposals with log weights N(m, σ²) are accepted with probability 2 Φ(-σ / √2): in
    equilibrium the log ratio of two weights is N(-σ², 2 σ²).

    Args:
        acceptance: the mean acceptance probability, between 0 and 1; None for one that is never reached.

    Returns:
        σ²; 0 for None.

    Reference:
        Doucet, Pitt, Deligiannidis & Kohn (2015), Efficient implementation of Markov chain Monte Carlo when
        using an unbiased likelihood estimator, Biometrika 102, for the exact proposal.

    Examples:
        >>> from numpyro_sbtm.core.weights import log_variance_at
        >>> round(log_variance_at(0.9), 4), round(log_variance_at(0.5), 4)
        (0.0316, 0.9099)
    """
    if acceptance is None:
        return 0.0  # log weights never vary by less than nothing
    return 2.0 * NormalDist().inv_cdf(acceptance / 2.0) ** 2


def metropolis(
    key: Key, log_weight: Float[Array, "*n"], proposed_log_weight: Float[Array, "*n"]
) -> tuple[Bool[Array, "*n"], Float[Array, "*n"]]:
    """Accept or reject independent proposals: probability ``min(1, w' / w)``.

    Leaves the target invariant whatever the proposal, on points and on paths alike. A proposal of weight
    zero is never accepted, and a current weight of zero, or of no value, always left; one that is infinite,
    of a state that is never proposed, is never left.

    Args:
        key: random key.
        log_weight: of the current states.
        proposed_log_weight: of the proposals.

    Returns:
        Whether each proposal is accepted, and with what probability.

    Reference:
        Tierney (1994), Markov chains for exploring posterior distributions, section 2.3.3.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.weights import metropolis
        >>> accept, prob = metropolis(jax.random.key(0), jnp.array([0.0]), jnp.array([1.0]))
        >>> accept.tolist(), prob.tolist()
        ([True], [1.0])
    """
    proposed = clean(proposed_log_weight)
    log_ratio = jnp.where(log_weight > -jnp.inf, proposed - log_weight, jnp.inf)
    accept_prob = jnp.where(jnp.isfinite(proposed), jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    uniform = jax.random.uniform(key, accept_prob.shape, accept_prob.dtype)
    return uniform < accept_prob, accept_prob
