# SPDX-License-Identifier: Apache-2.0
"""Whether to trust a run, and its evidence."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro.infer import MCMC
from numpyro.util import is_prng_key

from numpyro_sbtm import plots
from numpyro_sbtm.checks import shown, whole
from numpyro_sbtm.core.algorithm import Draws
from numpyro_sbtm.core.decay import Rays
from numpyro_sbtm.core.psis import tail_index
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.kernels.base import LearnedKernel, absolute
from numpyro_sbtm.kernels.state import KernelState
from numpyro_sbtm.reporting.convergence import Convergence, convergence, site_name
from numpyro_sbtm.reporting.evidence import Estimate, from_chains, from_proposals, lower_bound
from numpyro_sbtm.reporting.verdict import Check, Judgement, Measured, Verdict, checks, judge, printed_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "pareto_khat", "report"]

_KEY = 0x7265706F  # folded into the last state's key: splitting it never comes so far
_NO_DECAY = 0.75  # share of rays without decay above which a direction is improper
_NUM_CHECKED = 1000  # proposals from which rays start


def pareto_khat(log_weight: Float[Array, " n"]) -> float:
    """Fit the tail of the weights: Pareto k̂, below 0.7 for estimates with a usable error bar.

    Args:
        log_weight: of fresh proposals, shape ``[n]``; ``-inf`` is a weight of zero.

    Returns:
        k̂; infinity if there are too few weights for a tail, or none is positive. Equal weights have none
        and give minus infinity.

    Reference:
        Vehtari et al. (2024), Pareto smoothed importance sampling, JMLR 25.

    Examples:
        >>> import jax
        >>> from numpyro_sbtm.reporting.report import pareto_khat
        >>> pareto_khat(0.1 * jax.random.normal(jax.random.key(0), (1000,))) < 0.5
        True
    """
    return float(tail_index(jnp.asarray(log_weight)))


@dataclass(frozen=True)
class Report:
    """What `report` found. Printing it gives a summary; `plot` draws it.

    Attributes:
        draws: verdict of the draws, "reliable", "caution" or "unreliable", with what is wrong and the cure.
        evidence: the same of the log evidence.
        checks: every number that was judged, with its limits.
        acceptance: mean acceptance probability of the Metropolis steps, over all chains.
        worst_acceptance: that of the worst chain.
        khat: Pareto k̂ of the weights of fresh proposals; above an effective fraction of 0.9 it is not
            judged, being noise there.
        ess_fraction: effective sample fraction of fresh proposals.
        log_evidence: log marginal likelihood, from fresh proposals of the frozen sampler.
        log_evidence_se: its standard error. Where k̂ may be above 0.5, being less than two of its own standard
            errors below, the weights may have no finite variance, and it is at least what larger weights than
            any seen are expected to add (`numpyro_sbtm.core.psis.unseen_share`). There, and where the two
            estimates are more than two joint errors apart, it is at least their difference.
        backward_log_evidence: log evidence from the chains' own weights, minus log mean 1/w; NaN for raw
            draws. Local moves may find what is never proposed: then the two estimates disagree.
        backward_log_evidence_se: its standard error, by the effective number of draws of 1/w.
        elbo: lower bound of the log evidence in expectation, E[log w | A] + log q(A) over the set A of
            proposals whose weight is above a millionth of the mean.
        elbo_left_out: share of proposals outside A.
        max_rhat: the largest rank-normalised split R-hat over sites; NaN with fewer than four draws.
        bulk_ess: the smallest effective number of draws for the bulk, over sites and all chains.
        tail_ess: the smallest for the 5 % and 95 % quantiles.
        frozen: latent sites that never move in some chain.
        improper: sites along which the density does not fall.
        warm_start_ess_fraction: effective sample fraction of draws from the warm start, before training;
            where it is near one, there was nothing to learn.
        warm_start_khat: Pareto k̂ of their weights; minus infinity where their tail does no harm. With an
            effective fraction above 0.5, k̂ below 0.7 and no drift nothing is trained.
        warm_start_drift: by what part at least moves that leave the posterior invariant still changed a
            variance of the warm start's particles; above zero, they had not arrived everywhere.
        training: training loss of every warm-up step, shape ``[num_warmup]`` or ``[chains, num_warmup]``;
            NaN for steps that were not needed.
        training_steps: warm-up steps after which training gained nothing more and stopped.
        skipped_updates: updates left out because their gradient was not finite.
        ensemble: whether every proposal was chosen among several, because single ones had a bad k̂ (see the
            `Correction`'s ``num_particles``); k̂ and all else is then that of the proposals so chosen.
        nonfinite_proposals: proposals with a non-finite weight while sampling; none is accepted.
        not_one_to_one: share of fresh proposals at which a transport map may fold space (SBTM).
        gradients: gradients of the target spent in the warm start and in training.
        corrected: whether draws are exact; else they are raw draws of the sampler.
        log_weight: of the fresh proposals, in float64, shape ``[n]``.
    """

    draws: Judgement
    evidence: Judgement
    checks: tuple[Check, ...]
    acceptance: float
    worst_acceptance: float
    khat: float
    ess_fraction: float
    log_evidence: float
    log_evidence_se: float
    backward_log_evidence: float
    backward_log_evidence_se: float
    elbo: float
    elbo_left_out: float
    max_rhat: float
    bulk_ess: float
    tail_ess: float
    frozen: tuple[str, ...]
    improper: tuple[str, ...]
    warm_start_ess_fraction: float
    warm_start_khat: float
    warm_start_drift: float
    training: np.ndarray
    training_steps: int
    skipped_updates: int
    ensemble: bool
    nonfinite_proposals: int
    not_one_to_one: float
    gradients: int
    corrected: bool
    log_weight: np.ndarray

    @property
    def verdict(self) -> Verdict:
        """The worse of the two verdicts."""
        return self._worse.verdict

    @property
    def advice(self) -> str:
        """What is wrong by the worse of the two verdicts, and the cure; empty if nothing is."""
        return self._worse.advice

    @property
    def draws_verdict(self) -> Verdict:
        """The verdict of the draws."""
        return self.draws.verdict

    @property
    def evidence_verdict(self) -> Verdict:
        """The verdict of the log evidence."""
        return self.evidence.verdict

    @property
    def _worse(self) -> Judgement:
        grades = ("reliable", "caution", "unreliable")
        return max(self.draws, self.evidence, key=lambda judgement: grades.index(judgement.verdict))

    def __str__(self) -> str:
        exact = "Metropolis-corrected" if self.corrected else "UNCORRECTED: raw draws of the sampler"
        left_out = f" (without {self.elbo_left_out:.2%} of proposals)" if self.elbo_left_out > 0 else ""
        heavy = f" (k-hat {self.warm_start_khat:.2f})" if np.isfinite(self.warm_start_khat) else ""
        rows = [
            ("correction", exact),
            ("log evidence", f"{self.log_evidence:.3f} ± {self.log_evidence_se:.3f}"),
            (
                "log evidence, from the chains",
                f"{self.backward_log_evidence:.3f} ± {self.backward_log_evidence_se:.3f}",
            ),
            ("ELBO", f"{self.elbo:.3f}{left_out}"),
            *((check.name, str(check)) for check in self.checks if check.printed),
            (
                "warm start's effective fraction",
                f"{self.warm_start_ess_fraction:.3f}{heavy}",
            ),
            ("training steps", f"{self.training_steps} of {self.training.shape[-1]}"),
            ("skipped updates", f"{self.skipped_updates}"),
            ("non-finite proposals", f"{self.nonfinite_proposals}"),
            ("target gradients in warm-up", f"{self.gradients:,}"),
        ]
        if self.ensemble:
            rows.append(("proposals", "each chosen among several (`Correction`)"))
        lines = [f"{name:<33}{value}" for name, value in rows]
        return "\n".join([f"draws: {self.draws}", f"evidence: {self.evidence}", *lines])

    def plot(self) -> "Figure":
        """Draw the training curve and the log weights side by side.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: without matplotlib; install the extra ``plot``.
        """
        figure, (left, right) = plots.pyplot().subplots(1, 2, figsize=(8, 3), layout="constrained")
        for loss in np.atleast_2d(self.training):
            plots.training_curve(left, loss)
        plots.log_weights(right, self.log_weight, self.log_evidence)
        figure.suptitle(f"draws: {self.draws.verdict}, evidence: {self.evidence.verdict}")
        return figure


def report(mcmc: MCMC, *, num_proposals: int = 4000, rng_key: Key | None = None) -> Report:
    """Judge a finished run of one of this package's kernels.

    Evidence and weights come from fresh proposals of the frozen sampler, independent of the batches that
    trained it and of the chains. The density is also evaluated along rays from some of them, to see that it
    falls as that of a proper posterior must.

    Args:
        mcmc: after `run`.
        num_proposals: fresh proposals, over all trained samplers.
        rng_key: key for them; by default derived from the run's last state.

    Returns:
        The report.

    Raises:
        TypeError: for what is no run, and for another kernel.
        RuntimeError: if there is no finished run.
        ValueError: for fewer than 100 proposals.

    Examples:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_sbtm import LogVarianceDISKernel, report
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> mcmc = MCMC(LogVarianceDISKernel(model), num_warmup=100, num_samples=200, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 1.0)
        >>> found = report(mcmc)
        >>> found.verdict, round(found.log_evidence, 1)  # log N(1; 0, 2) = -1.515...
        ('reliable', -1.5)
    """
    if not isinstance(mcmc, MCMC):
        raise TypeError(
            f"`mcmc` must be the `numpyro.infer.MCMC` that ran the kernel, got {shown(mcmc)}. "
            "Call `mcmc.run(...)` and then `report(mcmc)`."
        )
    kernel, state = mcmc.sampler, mcmc.last_state
    if not isinstance(kernel, LearnedKernel):
        raise TypeError(
            f"`mcmc` must run a kernel of numpyro_sbtm, got {type(kernel).__name__}. "
            "NUTS and others have no importance weights to report on."
        )
    if state is None:
        raise RuntimeError("`mcmc` has not been run: call `mcmc.run(...)` first.")
    num_proposals = whole("num_proposals", num_proposals, 100)
    if state.learned is None:
        raise ValueError(
            "`mcmc` has run a model without latent values: there is nothing to judge. Its log evidence is "
            f"its log density, {-float(np.max(np.asarray(state.potential_energy)))}."
        )
    if rng_key is None:
        rng_key = state.rng_key if is_prng_key(state.rng_key) else state.rng_key[0]
        rng_key = jax.random.fold_in(rng_key, _KEY)
    key_proposals, key_rays = jax.random.split(rng_key)
    samplers = np.size(state.learned.num_steps)
    each = -(-num_proposals // samplers)
    fresh = kernel.propose(state, each, key_proposals, mcmc._args, mcmc._kwargs)
    log_weight = np.asarray(fresh.log_weight).reshape(-1)
    measured = Measured(
        corrected=kernel.corrected,
        ensemble=_any(state.chain.several),
        searched=bool(np.all(np.asarray(state.learned.located.searched))),
        trained=state.learned.params is not None,
        other_data=_other_data(state),
        chains=_chains(mcmc),
        acceptance=float(np.min(np.asarray(state.mean_accept_prob))),
        forward=from_proposals(log_weight),
        backward=_backward(mcmc),
        not_finite=float(np.mean(~np.isfinite(log_weight) & np.ravel(fresh.one_to_one))),
        folded=float(1.0 - np.mean(np.asarray(fresh.one_to_one))),
        drift=float(np.max(np.asarray(state.learned.located.drift))),
        improper=_improper(mcmc, fresh, key_rays),
    )
    return _summary(kernel, state, measured, log_weight)


def _summary(
    kernel: LearnedKernel, state: KernelState, measured: Measured, log_weight: Float[np.ndarray, " n"]
) -> Report:
    table = checks(measured)
    assert state.learned is not None  # else there is no report
    learned, chains, forward, backward = state.learned, measured.chains, measured.forward, measured.backward
    elbo, left_out = lower_bound(log_weight, forward.log_evidence)
    return Report(
        draws=judge(table, "draws"),
        evidence=judge(table, "evidence"),
        checks=tuple(table),
        acceptance=float(np.mean(np.asarray(state.mean_accept_prob))),
        worst_acceptance=measured.acceptance,
        khat=forward.khat,
        ess_fraction=forward.ess_fraction,
        log_evidence=forward.log_evidence,
        log_evidence_se=printed_error(measured),
        backward_log_evidence=np.nan if backward is None else backward.log_evidence,
        backward_log_evidence_se=np.nan if backward is None else backward.error,
        elbo=elbo,
        elbo_left_out=left_out,
        max_rhat=chains.rhat,
        bulk_ess=chains.bulk_size,
        tail_ess=chains.tail_size,
        frozen=chains.frozen,
        improper=measured.improper,
        warm_start_ess_fraction=float(np.min(np.asarray(learned.located.ess_fraction))),
        warm_start_khat=float(np.max(np.asarray(learned.located.khat))),
        warm_start_drift=measured.drift,
        training=np.asarray(learned.loss),
        training_steps=int(np.max(np.asarray(learned.num_steps))),
        skipped_updates=int(np.sum(np.asarray(learned.skipped_updates))),
        ensemble=measured.ensemble,
        nonfinite_proposals=int(np.sum(np.asarray(state.nonfinite_proposals))),
        not_one_to_one=measured.folded,
        gradients=int(np.sum(np.asarray(learned.gradients))),
        corrected=kernel.corrected,
        log_weight=log_weight,
    )


def _any(flag: Any) -> bool:
    return flag is not None and bool(np.any(np.asarray(flag)))


def _other_data(state: KernelState) -> bool:
    """Say whether the sampler was trained for other data than it draws for."""
    assert state.learned is not None
    return bool(np.any(np.asarray(state.learned.data) != np.asarray(state.data)))


def _chains(mcmc: MCMC) -> Convergence:
    latent = mcmc.last_state.z if mcmc.sampler.model is not None else None
    return convergence(mcmc.get_samples(group_by_chain=True), latent)


def _backward(mcmc: MCMC) -> Estimate | None:
    if not mcmc.sampler.corrected:
        return None
    log_weight = mcmc.get_extra_fields(group_by_chain=True)["log_weight"]
    return from_chains(absolute(log_weight, mcmc.last_state))


def _improper(mcmc: MCMC, fresh: Draws, key: Key) -> tuple[str, ...]:
    """Name the sites along which the density does not fall."""
    kernel, state = mcmc.sampler, mcmc.last_state
    x = fresh.x.reshape(-1, fresh.x.shape[-1])
    stride = -(-len(x) // _NUM_CHECKED)
    x, log_weight = x[::stride], fresh.log_weight.reshape(-1)[::stride]
    log_weight = log_weight - np.max(log_weight, initial=-np.inf, where=np.isfinite(log_weight))
    names = _coordinate_names(state.z, chains=0 if x.shape[-1] == _size(state.z) else 1)
    rays = kernel.rays(state, (x, log_weight), key, mcmc._args, mcmc._kwargs)
    return tuple(dict.fromkeys(names[_endless(rays, np.asarray(x))].tolist()))


def _endless(rays: Rays, x: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " d"]:
    """Say along which coordinates the density does not fall, from the shares of rays and their starts."""
    flat = np.max(np.atleast_2d(np.asarray(rays.coordinates)), 0) > _NO_DECAY
    finite = np.abs(x[np.all(np.isfinite(x), -1)].astype(np.float64))
    far = np.median(finite, 0) if len(finite) else np.zeros(x.shape[-1])
    if not np.any(flat) and max(np.max(rays.outwards), np.max(rays.scaled)) > _NO_DECAY:
        # a cone: of all directions those in which draws lie far out
        flat = far >= 0.1 * np.max(far)
    # where squares overflow there is no further out to look, and no posterior
    return np.asarray(flat | (far > float(np.finfo(x.dtype).max) ** 0.5))


def _size(z: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(z))


def _coordinate_names(z: Any, chains: int) -> np.ndarray:
    """The site of every coordinate of the flattened unconstrained space."""
    leaves = jax.tree_util.tree_flatten_with_path(z)[0]
    sizes = [int(np.prod(leaf.shape[chains:])) for _, leaf in leaves]
    return np.repeat([site_name(path) for path, _ in leaves], sizes)
