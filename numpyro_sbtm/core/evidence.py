# SPDX-License-Identifier: Apache-2.0
"""Log evidence from fresh proposals, in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sbtm.core.psis import FINITE_VARIANCE_KHAT, tail_index, tail_index_error, unseen_share
from numpyro_sbtm.core.weights import ess_fraction, log_evidence

__all__ = ["Estimate", "centred", "described", "from_proposals", "lower_bound", "may_be_heavy"]

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


def centred(log_weight: Float[np.ndarray, "*n"]) -> tuple[Float[np.ndarray, " m"], float]:
    """Subtract the largest, so that float32 keeps what the weights differ by."""
    flat = np.asarray(log_weight, np.float64).reshape(-1)
    finite = np.isfinite(flat)
    largest = float(np.max(flat[finite])) if np.any(finite) else 0.0
    return flat - largest, largest


@jax.jit
def described(log_weight: Float[Array, " n"]) -> tuple[tuple[Array, Array], Array, Array, Array]:
    """Compute what is asked of weights in one program: operation by operation it would be a hundred."""
    unseen = unseen_share(log_weight, jnp.inf)
    return log_evidence(log_weight), tail_index(log_weight), ess_fraction(log_weight), unseen


def may_be_heavy(khat: float, n: float) -> bool:
    """Say whether k̂ of so many weights leaves open that they have no finite variance."""
    return khat + 2.0 * tail_index_error(khat, max(int(n), 1)) > FINITE_VARIANCE_KHAT


def from_proposals(log_weight: Float[np.ndarray, " n"]) -> Estimate:
    """Estimate the log evidence by the mean weight of fresh proposals.

    Args:
        log_weight: of independent proposals, target over proposal; one that is not finite is a weight of
            zero, shape ``[n]``.

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.core.evidence import from_proposals
        >>> found = from_proposals(-1e6 + 0.1 * np.random.default_rng(0).normal(size=4000))
        >>> round(found.log_evidence + 1e6, 2), round(found.error, 4)  # 0.1² / 2, and 0.1 / √4000
        (0.0, 0.0016)
    """
    values, largest = centred(log_weight)
    weights = jnp.asarray(np.where(np.isfinite(values), values, -np.inf))
    (log_z, error), khat, fraction, unseen = jax.tree.map(float, described(weights))
    heavy = may_be_heavy(khat, float(values.size))
    if np.isfinite(log_z) and heavy:
        error = max(error, float(unseen_share(weights, khat)))
    return Estimate(log_z + largest, error, khat, fraction, heavy, unseen)


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
        >>> from numpyro_sbtm.core.evidence import lower_bound
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
