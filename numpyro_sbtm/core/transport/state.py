# SPDX-License-Identifier: Apache-2.0
"""State of score-based transport, and what held-out points say of it."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.transport.dissipation import Dissipation
from numpyro_sbtm.core.transport.maps import Maps
from numpyro_sbtm.core.transport.velocity import ScoredPoints, bounded

__all__ = ["SBTMState", "Scored", "held_out", "probes_of"]

_WORST_EXCESS = 1e6  # of log q over log π, relative to its mean, where the latter is not finite


class SBTMState(NamedTuple):
    """State of score-based transport.

    Attributes:
        step: steps done, shape ``[]``.
        level: of the annealed target, 1 for the target itself, shape ``[]``.
        particles: the training particles, shape ``[n, d]``.
        scores: the annealed target's score at the particles, zero where it is not finite, shape ``[n, d]``.
        opt_state: state of the network's optimiser.
        current: the map being learned, with step size zero, without the leading axis.
        maps: the maps made so far.
        probes: points for no training, carried along, shape ``[m, d]``.
        probe_scores: the annealed target's score at the probes, shape ``[m, d]``.
        target_scores: the target's own, shape ``[m, d]``.
        log_target: the target's log density there, shape ``[m]``.
        probe_log_q: log density of the law they come from, shape ``[m]``; of noisy paths, forward over
            backward density.
        divergence: KL(q | π) - log Z after every map, from the probes of finite density and for q without the
            others; its first entry is before any, shape ``[K+1]``.
        dissipation: of every map, from the probes before it; NaN for those not made, each of shape ``[K]``.
        levels: of every map, shape ``[K]``.
        variance: of the probes' log weights after the last map, shape ``[]``.
        noise: b of noisy draws, shape ``[]``; zero for the flow.
        velocities: of the particles during the last map, zero before the first, shape ``[n, d]``; None where
            steps do not adapt.
    """

    step: Int[Array, ""]
    level: Float[Array, ""]
    particles: Float[Array, "n d"]
    scores: Float[Array, "n d"]
    opt_state: optax.OptState
    current: Maps
    maps: Maps
    probes: Float[Array, "m d"]
    probe_scores: Float[Array, "m d"]
    target_scores: Float[Array, "m d"]
    log_target: Float[Array, " m"]
    probe_log_q: Float[Array, " m"]
    divergence: Float[Array, " K1"]
    dissipation: Dissipation
    levels: Float[Array, " K"]
    variance: Float[Array, ""]
    noise: Float[Array, ""]
    velocities: Float[Array, "n d"] | None


class Scored(NamedTuple):
    """What the densities say of particles and probes.

    Attributes:
        scores: the annealed target's at the particles, bounded, shape ``[n, d]``.
        probe_scores: the annealed target's at the probes, shape ``[m, d]``.
        target_scores: the target's own there, shape ``[m, d]``.
        log_target: its log density there, shape ``[m]``.
    """

    scores: Float[Array, "n d"]
    probe_scores: Float[Array, "m d"]
    target_scores: Float[Array, "m d"]
    log_target: Float[Array, " m"]


def held_out(
    log_q: Float[Array, " m"], log_target: Float[Array, " m"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the divergence, but for log Z, and the variance of the log weights.

    Draws whose density is not finite are left out, so that what counts is q without them, of which a share
    is left: its density is q over the share.
    """
    excess = log_q - log_target
    there = jnp.isfinite(excess)
    share = jnp.mean(there, dtype=excess.dtype)
    mean = jnp.mean(excess, where=there)
    variance = jnp.var(jnp.where(there, excess - mean, _WORST_EXCESS))
    some = share > 0.0
    return jnp.where(some, mean - jnp.log(share), jnp.inf), jnp.where(some, variance, jnp.inf)


def probes_of(state: SBTMState) -> ScoredPoints:
    """Return the probes with the scores that they follow."""
    return ScoredPoints(state.probes, bounded(state.probe_scores))
