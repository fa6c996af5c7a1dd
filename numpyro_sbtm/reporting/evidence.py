# SPDX-License-Identifier: Apache-2.0
"""Log evidence from the chains' own states, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from numpyro_sbtm.core.evidence import Estimate, centred, described, may_be_heavy
from numpyro_sbtm.core.psis import unseen_share
from numpyro_sbtm.reporting.convergence import FEWEST_DRAWS, effective_size

__all__ = ["from_chains"]


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
    values, largest = centred(-log_weight)
    total = values.size
    # a weight is infinite where nothing is proposed; without one, nothing was ever accepted
    if np.any(np.isnan(log_weight) | (log_weight == -np.inf)) or np.all(log_weight == np.inf):
        return Estimate(-np.inf, np.nan, np.inf, 0.0, True, np.inf)
    inverse = np.exp(values)
    mean = float(np.mean(inverse))
    weights = jnp.asarray(values)
    _, khat, fraction, unseen = jax.tree.map(float, described(weights))
    error, heavy = np.nan, True
    if log_weight.shape[1] >= FEWEST_DRAWS:
        deviation = float(np.std(inverse)) / mean
        size = float(effective_size(inverse.reshape(log_weight.shape))) if deviation > 0 else np.inf
        size = min(size, float(total))
        error, heavy = deviation / np.sqrt(size), may_be_heavy(khat, size)
        if heavy:
            # a state that is held for long counts as often
            error = max(error, float(unseen_share(weights, khat)) * total / size)
    return Estimate(-(largest + float(np.log(mean))), error, khat, fraction, heavy, unseen)
