# SPDX-License-Identifier: Apache-2.0
"""What the search finds, and what learning leaves behind."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.whitening import LowRank, Whitening
from numpyro_sbtm.fingerprint import Fingerprint
from numpyro_sbtm.psis import FINITE_VARIANCE_KHAT, USABLE_KHAT

__all__ = ["Learned", "Located"]


class Located(NamedTuple):
    """Where the posterior is.

    Attributes:
        whitening: a map under which the posterior looks like N(0, I), or like ``reference``.
        reference: a mixture that resembles the whitened posterior.
        points: points that resemble whitened draws, shape ``[m, d]``; None where nothing was searched, and
            once training is over.
        ess_fraction: effective sample fraction of draws from it.
        khat: Pareto k̂ of their weights; minus infinity where their tail does no harm.
        drift: by what part a variance of tempered particles still changed, at least, shape ``[]``.
        outside: whether a particle is of a mode from which nothing is drawn, shape ``[]``.
        step_size: of local moves, in whitened units; None where there are none, shape ``[]``.
        gradients: target gradients spent.
        searched: whether anything looked for modes, shape ``[]``.
    """

    whitening: Whitening | LowRank
    reference: Mixture
    points: Float[Array, "m d"] | None
    ess_fraction: Float[Array, ""]
    khat: Float[Array, ""]
    drift: Float[Array, ""]
    outside: Bool[Array, ""]
    step_size: Float[Array, ""] | None
    gradients: Int[Array, ""]
    searched: Bool[Array, ""]

    def near_exact(self) -> Bool[Array, ""]:
        """Say whether there is little to learn: an effective fraction above 0.5 and k̂ below 0.5."""
        return self.usable() & (self.khat < FINITE_VARIANCE_KHAT)

    def sufficient(self) -> Bool[Array, ""]:
        """Say whether draws from it do as proposals: usable, its particles arrived, and none outside."""
        return self.usable() & (self.drift == 0.0) & ~self.outside

    def usable(self) -> Bool[Array, ""]:
        """Say whether draws from it alone would do: an effective fraction above 0.5 and k̂ below 0.7."""
        return (self.ess_fraction > 0.5) & (self.khat < USABLE_KHAT)


class Learned(NamedTuple):
    """What is learned before the first draw: all that draws need, and a record of how it came about.

    Attributes:
        located: what the search found, without its points.
        params: trained parameters, without optimiser or particles; None where draws come from the mixture
            that was found alone.
        num_steps: training steps done.
        loss: of every training step, NaN for those that were not needed, shape ``[num_warmup]``.
        skipped_updates: updates left out because their gradient was not finite.
        gradients: target gradients spent.
        local_moves: None where draws end with none, the search's draws being nearly exact; else True.
        offset: log densities and log weights are relative to it, so that float32 holds them, shape ``[]``.
        data: fingerprint of the data that it was learned for.
    """

    located: Located
    params: Params
    num_steps: Int[Array, ""]
    loss: Float[Array, " num_warmup"]
    skipped_updates: Int[Array, ""]
    gradients: Int[Array, ""]
    local_moves: Bool[Array, ""] | None
    offset: Float[Array, ""]
    data: Fingerprint
