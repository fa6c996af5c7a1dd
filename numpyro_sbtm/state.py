# SPDX-License-Identifier: Apache-2.0
"""What a learned kernel knows from one iteration to the next."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt32

from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.core.whitening import LowRank, Whitening
from numpyro_sbtm.fingerprint import Fingerprint
from numpyro_sbtm.psis import FINITE_VARIANCE_KHAT, USABLE_KHAT

__all__ = ["KernelState", "Proposals", "Training", "WarmStart"]


class WarmStart(NamedTuple):
    """What is known before training.

    Attributes:
        whitening: a map under which the posterior looks like N(0, I), or like ``reference``.
        reference: a mixture that resembles the whitened posterior.
        points: points that resemble whitened draws, or None, shape ``[m, d]``.
        ess_fraction: effective sample fraction of draws from it.
        khat: Pareto k̂ of their weights; minus infinity where their tail does no harm.
        drift: by what part a variance of tempered particles still changed, at least, shape ``[]``.
        outside: whether a particle is of a mode from which nothing is drawn, shape ``[]``.
        step_size: of local moves, in whitened units; None where there are none, shape ``[]``.
        gradients: target gradients spent.
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

    def near_exact(self) -> Bool[Array, ""]:
        """Say whether there is little to learn: an effective fraction above 0.5 and k̂ below 0.5."""
        return self.usable() & (self.khat < FINITE_VARIANCE_KHAT)

    def sufficient(self) -> Bool[Array, ""]:
        """Say whether draws from it do as proposals: usable, its particles arrived, and none outside."""
        return self.usable() & self.settled()

    def settled(self) -> Bool[Array, ""]:
        """Say whether its particles arrived everywhere, and none lies outside what is drawn."""
        return (self.drift == 0.0) & ~self.outside

    def usable(self) -> Bool[Array, ""]:
        """Say whether draws from it alone would do: an effective fraction above 0.5 and k̂ below 0.7."""
        return (self.ess_fraction > 0.5) & (self.khat < USABLE_KHAT)


class Training(NamedTuple):
    """What is learned before the first draw.

    Attributes:
        warm: the warm start.
        algorithm: the algorithm's state, trained parameters among it; None where draws come from the warm
            start alone.
        num_steps: steps done.
        loss: of every warm-up step, NaN for those that were not needed; its length is the number of warm-up
            steps of the run that this state belongs to.
        skipped_updates: updates left out because their gradient was not finite.
        gradients: target gradients spent.
        ensemble: whether each proposal is chosen among several, as found at the first draw; None where the
            warm start left no doubt.
        local_moves: None where draws end with none, the warm start being nearly exact.
        offset: log densities and log weights are relative to it, so that float32 holds them, shape ``[]``.
        data: fingerprint of the model's arguments in warm-up.
    """

    warm: WarmStart
    algorithm: Any
    num_steps: Int[Array, ""]
    loss: Float[Array, " num_warmup"]
    skipped_updates: Int[Array, ""]
    gradients: Int[Array, ""]
    ensemble: Bool[Array, ""] | None
    local_moves: Bool[Array, ""] | None
    offset: Float[Array, ""]
    data: Fingerprint


class Proposals(NamedTuple):
    """Fresh proposals in the model's unconstrained space, with any leading axes."""

    x: Float[Array, "*n d"]
    log_weight: Float[Array, "*n"]
    potential_energy: Float[Array, "*n"]
    one_to_one: Bool[Array, "*n"]


class KernelState(NamedTuple):
    """State of a learned kernel; see the bullets below its definition."""

    i: Int[Array, ""]
    z: Any
    potential_energy: Float[Array, "*chains"]
    log_weight: Float[Array, "*chains"]
    accept_prob: Float[Array, "*chains"]
    mean_accept_prob: Float[Array, "*chains"]
    diverging: Bool[Array, "*chains"]
    nonfinite_proposals: Int[Array, "*chains"]
    training: Training | None
    block: Proposals | None
    used: Int[Array, ""]
    num_draws: Int[Array, ""]
    data: Fingerprint
    next_key: UInt32[Array, "*chains k"]
    rng_key: Key


UNBATCHED = ("i", "num_draws", "data")
"""Fields that no chain axis is ever added to: what is done in an iteration depends on them."""

"""
A NamedTuple with the fields

 - **i** - iteration, over warm-up and sampling; never batched.
 - **z** - unconstrained values of the latent sites.
 - **potential_energy** - minus the log density of ``z``.
 - **log_weight** - log of unnormalised target over proposal, of the current state, relative to
   ``training.offset``.
 - **accept_prob** - mean acceptance probability of the last draw's proposals.
 - **mean_accept_prob** - its mean over the chain's draws.
 - **diverging** - whether a proposal of the last draw had a non-finite weight; such are never accepted.
 - **nonfinite_proposals** - how many proposals had, over the chain's draws.
 - **training** - the warm start and what was trained (see `Training`); None for a model without latent
   values.
 - **block** - fresh proposals, some consumed for every draw.
 - **used** - how many draws' worth of the block are consumed.
 - **num_draws** - draws since the end of warm-up, or since the model's arguments changed; never batched.
 - **data** - fingerprint of the arguments under which the state and the block were weighed; where the model
   is given others, both are weighed anew, and the chain begins again.
 - **next_key** - ``rng_key`` as the kernel left it. Where it was replaced, as `MCMC.run` does when a run goes
   on, what is left of the block is not used: another key means other draws.
 - **rng_key** - random key, one for every chain.
"""
