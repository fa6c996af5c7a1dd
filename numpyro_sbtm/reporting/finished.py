# SPDX-License-Identifier: Apache-2.0
"""A finished run, whoever made it."""

from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro.infer import MCMC
from numpyro.util import is_prng_key

from numpyro_sbtm.checks import shown
from numpyro_sbtm.core.chain import ChainState
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.kernels.base import LearnedKernel
from numpyro_sbtm.sampler import Run, Sampler, absolute

__all__ = ["Finished", "finished"]


class Offered(NamedTuple):
    """Independent proposals of a frozen sampler, as `numpyro_sbtm.sampler.WeightedDraws`.

    Attributes:
        x: shape ``[n, d]``.
        log_weight: in float64, shape ``[n]``.
        one_to_one: shape ``[n]``.
    """

    x: Float[Array, "n d"]
    log_weight: Float[np.ndarray, " n"]
    one_to_one: Bool[np.ndarray, " n"]


class Finished(NamedTuple):
    """What is judged of a run.

    Attributes:
        samplers: one, or one for every chain.
        corrected: whether a Metropolis step corrected the proposals.
        sites: draws, leading axes ``[C, n]``.
        latent: names of the latent sites; None for all of them.
        log_weight: of every state, in float64, shape ``[C, n]``.
        acceptance: mean acceptance probability of every chain, shape ``[C]``.
        nonfinite: proposals whose weight was not finite.
        other_data: whether the sampler was trained for other data than it drew for.
        offered: the last proposals that chains were offered, of every sampler.
        spent: what all proposals and moves have evaluated.
        key: that the run ended with.
    """

    samplers: list[Sampler]
    corrected: bool
    sites: Any
    latent: Any
    log_weight: Float[np.ndarray, "C n"]
    acceptance: Float[np.ndarray, " C"]
    nonfinite: int
    other_data: bool
    offered: list[Offered]
    spent: Evaluations
    key: Key


def finished(run: Any) -> Finished:
    """Read a run.

    Raises:
        TypeError: for what is no run, and for another kernel.
        RuntimeError: if it has not been run.
        ValueError: for a model without latent values.
    """
    if isinstance(run, Run):
        return _of_sampler(run)
    if not isinstance(run, MCMC):
        raise TypeError(
            f"`mcmc` must be the `numpyro.infer.MCMC` that ran the kernel, got {shown(run)}. "
            "Call `mcmc.run(...)` and then `report(mcmc)`, or `report(sampler.sample(...))`."
        )
    return _of_mcmc(run)


def _of_sampler(run: Run) -> Finished:
    names = jax.eval_shape(run.sampler.posterior.unravel, run.x[0, 0])
    return Finished(
        samplers=[run.sampler],
        corrected=run.sampler.settings.correction.metropolis,
        sites={"x": run.sites} if isinstance(run.sites, jax.Array) else run.sites,
        latent=list(names) if isinstance(names, dict) else None,
        log_weight=run.log_weight,
        acceptance=np.asarray(run.acceptance),
        nonfinite=int(np.sum(np.asarray(run.nonfinite))),
        other_data=False,
        offered=[_offered(run.sampler, run.state)],
        spent=run.sampler.spent_by(run.state),
        key=run.key,
    )


def _offered(sampler: Sampler, state: ChainState) -> Offered:
    """Take the block of proposals that chains were last offered."""
    x, log_weight, _, one_to_one = (np.asarray(leaf) for leaf in state.block)
    flat = absolute(log_weight.reshape(-1), sampler.learned.offset)
    return Offered(jnp.asarray(x.reshape(-1, x.shape[-1])), flat, one_to_one.reshape(-1))


def _of_mcmc(mcmc: MCMC) -> Finished:
    kernel, state = mcmc.sampler, mcmc.last_state
    if not isinstance(kernel, LearnedKernel):
        raise TypeError(
            f"`mcmc` must run a kernel of numpyro_sbtm, got {type(kernel).__name__}. "
            "NUTS and others have no importance weights to report on."
        )
    if state is None:
        raise RuntimeError("`mcmc` has not been run: call `mcmc.run(...)` first.")
    if state.learned is None:
        raise ValueError(
            "`mcmc` has run a model without latent values: there is nothing to judge. Its log evidence is "
            f"its log density, {-float(np.max(np.asarray(state.potential_energy)))}."
        )
    samplers = kernel.samplers(state, mcmc._args, mcmc._kwargs)
    log_weight = mcmc.get_extra_fields(group_by_chain=True)["log_weight"]
    states = [state.chain]
    if state.learned.num_steps.ndim:
        states = [state.chain_of(c) for c in range(len(samplers))]
    spent = [sampler.spent_by(own) for sampler, own in zip(samplers, states, strict=True)]
    return Finished(
        samplers=samplers,
        corrected=kernel.corrected,
        sites=mcmc.get_samples(group_by_chain=True),
        latent=state.z if kernel.model is not None else None,
        log_weight=absolute(log_weight, state.learned.offset),
        acceptance=np.atleast_1d(np.asarray(state.mean_accept_prob)),
        nonfinite=int(np.sum(np.asarray(state.nonfinite_proposals))),
        other_data=bool(np.any(np.asarray(state.learned.data) != np.asarray(state.data))),
        offered=[_offered(sampler, own) for sampler, own in zip(samplers, states, strict=True)],
        spent=reduce(Evaluations.plus, spent),
        key=state.rng_key if is_prng_key(state.rng_key) else state.rng_key[0],
    )
