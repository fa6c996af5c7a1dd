# SPDX-License-Identifier: Apache-2.0
"""Log evidence from both sides, in float64: from fresh proposals, and from the chains' own states."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sbtm.core.psis import FINITE_VARIANCE_KHAT, tail_index, tail_index_error, unseen_share
from numpyro_sbtm.core.weights import ess_fraction, log_evidence
from numpyro_sbtm.reporting.convergence import FEWEST_DRAWS, effective_size

__all__ = ["Estimate", "from_chains", "from_proposals", "lower_bound"]

_NEGLIGIBLE = 1e-6  # weights below this part of their mean are left out of the lower bound


class Estimate(NamedTuple):
    """An estimate of the log evidence.

    Attributes:
        log_evidence: log Z.
        error: its standard error. Where k̂ may be above 0.5, being less than two of its own standard errors
            below, weights may have no finite variance, and it is at least what larger weights than any seen
            are expected to add (`numpyro_sbtm.core.psis.unseen_share`).
        khat: Pareto k̂ of the weights; of their inverses on the chains' side.
        ess_fraction: effective sample fraction of the weights.
        heavy: whether they may have no finite variance.
        unseen: share of their sum that larger weights than any seen would add, were k̂ 0.9. Where weights
            have several sizes, as those of two modes, k̂ is large whatever their tail; this is not.
    """

    log_evidence: float
    error: float
    khat: float
    ess_fraction: float
    heavy: bool
    unseen: float


def _centred(log_weight: Float[np.ndarray, "*n"]) -> tuple[Float[np.ndarray, " m"], float]:
    """Subtract the largest, so that float32 keeps what the weights differ by."""
    flat = np.asarray(log_weight, np.float64).reshape(-1)
    finite = np.isfinite(flat)
    largest = float(np.max(flat[finite])) if np.any(finite) else 0.0
    return flat - largest, largest


@jax.jit
def _described(log_weight: Float[Array, " n"]) -> tuple[tuple[Array, Array], Array, Array, Array]:
    """Compute what is asked of weights in one program: operation by operation it would be a hundred."""
    unseen = unseen_share(log_weight, jnp.inf)
    return log_evidence(log_weight), tail_index(log_weight), ess_fraction(log_weight), unseen


def _may_be_heavy(khat: float, n: float) -> bool:
    return khat + 2.0 * tail_index_error(khat, max(int(n), 1)) > FINITE_VARIANCE_KHAT


def from_proposals(log_weight: Float[np.ndarray, " n"]) -> Estimate:
    """Estimate the log evidence by the mean weight of fresh proposals.

    Args:
        log_weight: of independent proposals, target over proposal; one that is not finite is a weight of
            zero, shape ``[n]``.

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.reporting.evidence import from_proposals
        >>> found = from_proposals(-1e6 + 0.1 * np.random.default_rng(0).normal(size=4000))
        >>> round(found.log_evidence + 1e6, 2), round(found.error, 4)  # 0.1² / 2, and 0.1 / √4000
        (0.0, 0.0016)
    """
    values, largest = _centred(log_weight)
    weights = jnp.asarray(np.where(np.isfinite(values), values, -np.inf))
    (log_z, error), khat, fraction, unseen = jax.tree.map(float, _described(weights))
    heavy = _may_be_heavy(khat, values.size)
    if np.isfinite(log_z) and heavy:
        error = max(error, float(unseen_share(weights, khat)))
    return Estimate(log_z + largest, error, khat, fraction, heavy, unseen)


def from_chains(log_weight: Float[np.ndarray, "C n"]) -> Estimate:
    """Estimate the log evidence by the mean of 1/w over the states of chains that are exact: it is 1/Z.

    Local moves may find what is never proposed. Weights there are large, and the mean of 1/w small: then this
    estimate is above that of proposals.

    Args:
        log_weight: of the chains' states, shape ``[C, n]``.

    Returns:
        The estimate; its error uses the effective number of draws of the series 1/w, and is NaN with fewer
        than four draws.

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.reporting.evidence import from_chains
        >>> found = from_chains(-1e6 + 0.1 * np.random.default_rng(0).normal(size=(4, 1000)))
        >>> round(found.log_evidence + 1e6, 2), round(float(found.error), 3)  # -0.1² / 2, and 0.1 / √4000
        (-0.01, 0.002)
    """
    log_weight = np.asarray(log_weight, np.float64)
    values, largest = _centred(-log_weight)
    total = values.size
    # a weight is infinite where nothing is proposed; without one, nothing was ever accepted
    if np.any(np.isnan(log_weight) | (log_weight == -np.inf)) or np.all(log_weight == np.inf):
        return Estimate(-np.inf, np.nan, np.inf, 0.0, True, np.inf)
    inverse = np.exp(values)
    mean = float(np.mean(inverse))
    weights = jnp.asarray(values)
    _, khat, fraction, unseen = jax.tree.map(float, _described(weights))
    error, heavy = np.nan, True
    if log_weight.shape[1] >= FEWEST_DRAWS:
        deviation = float(np.std(inverse)) / mean
        size = float(effective_size(inverse.reshape(log_weight.shape))) if deviation > 0 else np.inf
        size = min(size, float(total))
        error, heavy = deviation / np.sqrt(size), _may_be_heavy(khat, size)
        if heavy:
            # a state that is held for long counts as often
            error = max(error, float(unseen_share(weights, khat)) * total / size)
    return Estimate(-(largest + float(np.log(mean))), error, khat, fraction, heavy, unseen)


def lower_bound(log_weight: Float[np.ndarray, " n"], log_evidence: float) -> tuple[float, float]:
    """Compute a lower bound of the log evidence that proposals of negligible weight do not decide.

    Over the set A where weights are above a millionth of their mean, E[log w | A] + log q(A) ≤ log Z: by
    Jensen's inequality for the proposal restricted to A, of which the mean weight is at most Z / q(A).
    The plain mean of log w (the ELBO) is that for A = everything: one proposal of weight exp(-10000) among
    a thousand lowers it by ten nats.

    Args:
        log_weight: of proposals; those that are not finite are left out, shape ``[n]``.
        log_evidence: log of the mean weight.

    Returns:
        The bound, and the share of proposals outside A.

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.reporting.evidence import lower_bound
        >>> bound, left_out = lower_bound(np.append(np.zeros(999), -1e4), np.log(0.999))
        >>> round(bound, 4), round(left_out, 4)
        (-0.001, 0.001)
    """
    with np.errstate(invalid="ignore"):
        kept = log_weight[np.isfinite(log_weight) & (log_weight > log_evidence + np.log(_NEGLIGIBLE))]
    if kept.size == 0:
        return -np.inf, 1.0
    share = kept.size / log_weight.size
    return float(np.mean(kept) + np.log(share)), 1.0 - share
