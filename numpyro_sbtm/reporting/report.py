# SPDX-License-Identifier: Apache-2.0
"""Whether to trust a run, and its evidence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpyro.infer import MCMC

from numpyro_sbtm import plots
from numpyro_sbtm.checks import whole
from numpyro_sbtm.core.decay import Rays, num_values
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.evidence import from_proposals, lower_bound
from numpyro_sbtm.core.psis import tail_index
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.reporting.convergence import convergence, site_name
from numpyro_sbtm.reporting.evidence import from_chains
from numpyro_sbtm.reporting.finished import Finished, Offered, finished
from numpyro_sbtm.reporting.verdict import Check, Judgement, Measured, Verdict, checks, judge, printed_error
from numpyro_sbtm.sampler import Run, Sampler, WeightedDraws, rays

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "pareto_khat", "report"]

_KEY = 0x7265706F  # folded into the last state's key: splitting it never comes so far
_NO_DECAY = 0.75  # share of rays without decay above which a direction is improper
_NUM_PROPOSALS = 4000  # fresh ones, where chains were offered too few
_FEWEST_OFFERED = 1000  # to a chain
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


class Spending(NamedTuple):
    """What a run has evaluated, by stage.

    Attributes:
        search: where the posterior is.
        training: of the sampler.
        draws: by the chains: proposals and local moves.
        report: of this report.
    """

    search: Evaluations
    training: Evaluations
    draws: Evaluations
    report: Evaluations

    @property
    def total(self) -> int:
        """Of all stages, values and gradients alike."""
        return int(sum(part.total for part in self))

    def rows(self) -> list[tuple[str, str]]:
        """Say it in words, one row a stage."""
        names = ("in the search", "in training", "by the chains", "by this report")
        return [
            (f"evaluations {name}", f"{part.values:,} values, {part.gradients:,} gradients")
            for name, part in zip(names, self, strict=True)
            if part.total
        ]


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
        evaluations: of the log density: in the search, in training, by the chains and by this report.
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
    evaluations: Spending
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
            *self.evaluations.rows(),
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


def report(mcmc: MCMC | Run, *, num_proposals: int | None = None, rng_key: Key | None = None) -> Report:
    """Judge a finished run: of one of this package's kernels, or of a `Sampler`.

    Evidence and weights come from independent proposals of the frozen sampler, which training has not seen.
    Where priors may be improper, or a model has a factor, the density is also evaluated along rays from some
    of them, to see that it falls as that of a proper posterior must.

    Args:
        mcmc: after `run`; or what `Sampler.sample` returned.
        num_proposals: so many fresh proposals, over all trained samplers. None takes those that the chains
            were last offered, which costs nothing; where these are few, 4,000 fresh ones.
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
    run = finished(mcmc)
    if num_proposals is not None:
        num_proposals = whole("num_proposals", num_proposals, 100)
    key = jax.random.fold_in(run.key, _KEY) if rng_key is None else rng_key
    key_proposals, key_rays = jax.random.split(key)
    fresh, spent = _proposals(run, num_proposals, key_proposals)
    log_weight = np.concatenate([draws.log_weight for draws in fresh])
    one_to_one = np.concatenate([np.asarray(draws.one_to_one) for draws in fresh])
    learned = [sampler.learned for sampler in run.samplers]
    improper: tuple[str, ...] = ()
    if not run.samplers[0].posterior.proper:
        improper = _improper(run, fresh, key_rays)
        spent = spent.plus(Evaluations(values=num_values(fresh[0].x.shape[1]) * len(run.samplers)))
    measured = Measured(
        corrected=run.corrected,
        ensemble=any(sampler.several is not None and bool(sampler.several) for sampler in run.samplers),
        searched=all(bool(one.located.searched) for one in learned),
        trained=any(one.params is not None for one in learned),
        other_data=run.other_data,
        chains=convergence(run.sites, run.latent),
        acceptance=float(np.min(run.acceptance)),
        forward=from_proposals(log_weight),
        backward=from_chains(run.log_weight) if run.corrected else None,
        not_finite=float(np.mean(~np.isfinite(log_weight) & one_to_one)),
        folded=float(1.0 - np.mean(one_to_one)),
        drift=max(float(one.located.drift) for one in learned),
        improper=improper,
    )
    return _summary(run, measured, log_weight, spent)


def _proposals(
    run: Finished, num: int | None, key: Key
) -> tuple[Sequence[WeightedDraws | Offered], Evaluations]:
    """Take what the chains were offered, where that is enough, or make fresh proposals; with their cost."""
    if num is None and all(len(offered.log_weight) >= _FEWEST_OFFERED for offered in run.offered):
        return run.offered, Evaluations()
    each = -(-(num or _NUM_PROPOSALS) // len(run.samplers))
    keys = _keys(key, run)
    fresh = [sampler.draw(own, each) for sampler, own in zip(run.samplers, keys, strict=True)]
    spent = [sampler.cost().times(each) for sampler in run.samplers]
    return fresh, reduce(Evaluations.plus, spent)


def _keys(key: Key, run: Finished) -> list[Key]:
    """Make a key for every sampler."""
    return [key] if len(run.samplers) == 1 else list(jax.random.split(key, len(run.samplers)))


def _summary(
    run: Finished, measured: Measured, log_weight: Float[np.ndarray, " n"], spent: Evaluations
) -> Report:
    table = checks(measured)
    chains, forward, backward = measured.chains, measured.forward, measured.backward
    elbo, left_out = lower_bound(log_weight, forward.log_evidence)
    learned = [sampler.learned for sampler in run.samplers]
    loss = np.stack([np.asarray(one.loss) for one in learned])
    return Report(
        draws=judge(table, "draws"),
        evidence=judge(table, "evidence"),
        checks=tuple(table),
        acceptance=float(np.mean(run.acceptance)),
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
        warm_start_ess_fraction=min(float(one.located.ess_fraction) for one in learned),
        warm_start_khat=max(float(one.located.khat) for one in learned),
        warm_start_drift=measured.drift,
        training=loss[0] if len(learned) == 1 else loss,
        training_steps=max(int(one.num_steps) for one in learned),
        skipped_updates=sum(int(one.skipped_updates) for one in learned),
        ensemble=measured.ensemble,
        nonfinite_proposals=run.nonfinite,
        not_one_to_one=measured.folded,
        evaluations=Spending(
            search=_sum(one.located.spent for one in learned),
            training=_sum(one.spent for one in learned),
            draws=run.spent,
            report=spent,
        ),
        corrected=run.corrected,
        log_weight=log_weight,
    )


def _sum(spent: Iterable[Evaluations]) -> Evaluations:
    return reduce(Evaluations.plus, (Evaluations(*map(int, one)) for one in spent))


def _improper(run: Finished, fresh: Sequence[WeightedDraws | Offered], key: Key) -> tuple[str, ...]:
    """Name the sites along which the density does not fall."""
    x = jnp.concatenate([draws.x for draws in fresh])
    log_weight = np.concatenate([draws.log_weight for draws in fresh])
    stride = -(-len(x) // _NUM_CHECKED)
    x, log_weight = x[::stride], log_weight[::stride]
    log_weight = log_weight - np.max(log_weight, initial=-np.inf, where=np.isfinite(log_weight))
    points = x, jnp.asarray(log_weight, x.dtype)
    found = [rays(sampler, own, *points) for sampler, own in zip(run.samplers, _keys(key, run), strict=True)]
    all_rays = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    names = _coordinate_names(run.samplers[0])
    return tuple(dict.fromkeys(names[_endless(all_rays, np.asarray(x))].tolist()))


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


def _coordinate_names(sampler: Sampler) -> np.ndarray:
    """The site of every coordinate of the flattened unconstrained space."""
    values = jax.eval_shape(sampler.posterior.unravel, jnp.zeros(sampler.posterior.dim))
    leaves = jax.tree_util.tree_flatten_with_path(values)[0]
    return np.repeat([site_name(path) for path, _ in leaves], [leaf.size for _, leaf in leaves])
