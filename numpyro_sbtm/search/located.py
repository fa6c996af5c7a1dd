# SPDX-License-Identifier: Apache-2.0
"""What the search finds."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import Map
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.psis import FINITE_VARIANCE_KHAT, USABLE_KHAT

__all__ = ["Located"]

_WORTH = 0.3
_LEAST = 0.05
_EQUAL, _LIGHT = 0.9, 0.4
_MISSING = 0.03  # nats that one look's evidence may lie below another's, at least


class Located(NamedTuple):
    """Where the posterior is.

    Attributes:
        whitening: a map under which the posterior looks like N(0, I), or like ``reference``.
        reference: a mixture that resembles the whitened posterior.
        points: points that resemble whitened draws, shape ``[m, d]``; None where nothing was searched, and
            once training is over.
        ess_fraction: effective sample fraction of draws from it.
        khat: Pareto k̂ of their weights; minus infinity where their tail does no harm.
        efficiency: what a draw of a chain of such proposals is worth, in effective draws, as predicted
            from the weights (see `numpyro_sbtm.core.weights.chain_efficiency`).
        log_evidence: log Z as those weights tell it, shape ``[]``.
        log_evidence_se: its standard error, shape ``[]``.
        drift: by what part a variance of tempered particles still changed, at least, shape ``[]``.
        outside: whether a particle is of a mode from which nothing is drawn, shape ``[]``.
        step_size: of local moves, in whitened units; None where there are none, shape ``[]``.
        spent: what was evaluated.
        searched: whether anything looked for modes, shape ``[]``.
    """

    whitening: Map
    reference: Mixture
    points: Float[Array, "m d"] | None
    ess_fraction: Float[Array, ""]
    khat: Float[Array, ""]
    efficiency: Float[Array, ""]
    log_evidence: Float[Array, ""]
    log_evidence_se: Float[Array, ""]
    drift: Float[Array, ""]
    outside: Bool[Array, ""]
    step_size: Float[Array, ""] | None
    spent: Evaluations
    searched: Bool[Array, ""]

    def near_exact(self) -> Bool[Array, ""]:
        """Say whether there is little to learn: an effective fraction above 0.5 and k̂ below 0.5."""
        return self.usable() & (self.khat < FINITE_VARIANCE_KHAT)

    def sufficient(self) -> Bool[Array, ""]:
        """Say whether draws from it do as proposals: usable, its particles arrived, and none outside."""
        return self.usable() & self.settled()

    def quick(self) -> Bool[Array, ""]:
        """Say whether chains of its draws need no local moves, which cost as much as two or three draws."""
        return self.sufficient() & (self.efficiency > _WORTH)

    def trainable(self) -> Bool[Array, ""]:
        """Say whether training may begin here: settled, and an effective fraction above 0.05."""
        return self.settled() & (self.ess_fraction > _LEAST)

    def settled(self) -> Bool[Array, ""]:
        """Say whether its particles arrived everywhere, and none lies outside what is drawn."""
        return (self.drift == 0.0) & ~self.outside

    def usable(self) -> Bool[Array, ""]:
        """Say whether draws from it alone would do: an effective fraction above 0.5 and k̂ below 0.7."""
        return (self.ess_fraction > 0.5) & (self.khat < USABLE_KHAT)

    def certain(self) -> Bool[Array, ""]:
        """Say whether weights are so equal that draws can hardly have missed what hangs with them.

        That is an effective fraction above 0.9, or k̂ below 0.4.
        """
        return self.sufficient() & ((self.ess_fraction > _EQUAL) | (self.khat < _LIGHT))

    def less_than(self, other: "Located") -> Bool[Array, ""]:
        """Say whether the evidence of draws is lower than another look's by more than errors."""
        error = jnp.hypot(self.log_evidence_se, other.log_evidence_se)
        return other.log_evidence - self.log_evidence > jnp.maximum(3.0 * error, _MISSING)
