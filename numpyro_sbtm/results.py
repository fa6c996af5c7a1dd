# SPDX-License-Identifier: Apache-2.0
"""Whether to trust a run, and its evidence."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC
from numpyro.util import is_prng_key

from numpyro_sbtm import plots
from numpyro_sbtm.adapter import LearnedKernel
from numpyro_sbtm.checks import shown, whole
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.core.weights import clean, ess_fraction, log_evidence
from numpyro_sbtm.psis import (
    FINITE_VARIANCE_KHAT,
    NEARLY_EQUAL,
    USABLE_KHAT,
    tail_index,
    tail_index_error,
    unseen_share,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "pareto_khat", "report"]

Verdict = Literal["reliable", "caution", "unreliable"]

# limits for "reliable" and for "caution" of what is bad when large; shares that are bad when small enter
# with a minus sign
_MAX_KHAT = (USABLE_KHAT, 1.0)
_MIN_ACCEPTANCE = (-0.2, -0.05)
_MIN_ESS = (-0.1, -0.01)
_MAX_BAD_SHARE = (0.01, 0.2)
_MAX_RHAT = (1.02, 1.1)
_MAX_DISAGREEMENT = (0.5, 2.0)
_MAX_DRIFT = (0.02, np.inf)


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
        >>> from numpyro_sbtm.results import pareto_khat
        >>> pareto_khat(0.1 * jax.random.normal(jax.random.key(0), (1000,))) < 0.5
        True
    """
    return float(tail_index(jnp.asarray(log_weight)))


@dataclass(frozen=True)
class Report:
    """What `report` found. Printing it gives a summary; `plot` draws it.

    Attributes:
        verdict: "reliable", "caution" or "unreliable".
        advice: one line: why, and what to try next.
        acceptance: mean acceptance probability of the Metropolis steps, over all chains.
        khat: Pareto k̂ of the weights of fresh proposals; above an effective fraction of 0.9 it is not
            judged, being noise there.
        ess_fraction: effective sample fraction of fresh proposals.
        log_evidence: log marginal likelihood, from fresh proposals of the frozen sampler.
        log_evidence_se: its standard error. Where k̂ may be above 0.5, being less than two of its own standard
            errors below, the weights may have no finite variance, and it is at least the difference from
            ``backward_log_evidence``, and what larger weights than any seen are expected to add
            (`numpyro_sbtm.psis.unseen_share`).
        backward_log_evidence: log evidence from the chains' own weights, minus log mean 1/w; NaN for raw
            draws. Local moves may find what is never proposed: then the two estimates disagree.
        elbo: mean log weight, a lower bound of the log evidence in expectation.
        max_rhat: the largest split R-hat over sites; NaN with fewer than four draws.
        warm_start_ess_fraction: effective sample fraction of draws from the warm start, before training;
            where it is near one, there was nothing to learn.
        warm_start_khat: Pareto k̂ of their weights. With an effective fraction above 0.5 and k̂ below 0.5
            training is cut to a quarter of warm-up.
        warm_start_drift: by what part at least moves that leave the posterior invariant still changed a
            variance of the warm start's particles; above zero, they had not arrived everywhere.
        training: training loss of every warm-up step, shape ``[num_warmup]`` or ``[chains, num_warmup]``;
            NaN for steps that were not needed.
        training_steps: warm-up steps after which training gained nothing more and stopped.
        skipped_updates: updates left out because their gradient was not finite.
        ensemble: whether every proposal was chosen among several, because single ones had a bad k̂ (see the
            kernels' ``smc_particles``); the verdict is then "caution" at best.
        nonfinite_proposals: proposals with a non-finite weight while sampling; none is accepted.
        not_one_to_one: share of fresh proposals at which a transport map may fold space (SBTM).
        gradients: gradients of the target spent in the warm start and in training.
        correction: 'metropolis', or None for raw draws.
        log_weight: of the fresh proposals, shape ``[n]``.
    """

    verdict: Verdict
    advice: str
    acceptance: float
    khat: float
    ess_fraction: float
    log_evidence: float
    log_evidence_se: float
    backward_log_evidence: float
    elbo: float
    max_rhat: float
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
    correction: str | None
    log_weight: np.ndarray

    def __str__(self) -> str:
        exact = "Metropolis-corrected" if self.correction else "UNCORRECTED: raw draws of the sampler"
        rows = [
            ("draws", exact),
            ("log evidence", f"{self.log_evidence:.3f} ± {self.log_evidence_se:.3f}"),
            ("log evidence, from the chains", f"{self.backward_log_evidence:.3f}"),
            ("ELBO", f"{self.elbo:.3f}"),
            ("effective sample fraction", f"{self.ess_fraction:.3f}"),
            ("Pareto k-hat", f"{self.khat:.2f}"),
            ("acceptance rate", f"{self.acceptance:.3f}"),
            ("largest R-hat", f"{self.max_rhat:.3f}"),
            (
                "warm start's effective fraction",
                f"{self.warm_start_ess_fraction:.3f} (k-hat {self.warm_start_khat:.2f})",
            ),
            ("training steps", f"{self.training_steps} of {self.training.shape[-1]}"),
            ("skipped updates", f"{self.skipped_updates}"),
            ("non-finite proposals", f"{self.nonfinite_proposals}"),
            ("target gradients in warm-up", f"{self.gradients:,}"),
        ]
        if self.warm_start_drift > 0:
            rows.append(("warm start's particles", f"still spreading (drift {self.warm_start_drift:.3f})"))
        if self.ensemble:
            rows.append(("proposals", "each chosen among several (`smc_particles`)"))
        if self.not_one_to_one > 0:
            rows.append(("maps perhaps not one-to-one", f"{self.not_one_to_one:.2%} of proposals"))
        lines = [f"{name:<33}{value}" for name, value in rows]
        return "\n".join([f"{self.verdict}: {self.advice}", *lines])

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
        figure.suptitle(self.verdict)
        return figure


def report(mcmc: MCMC, *, num_proposals: int = 4000, rng_key: Key | None = None) -> Report:
    """Judge a finished run of one of this package's kernels.

    Evidence and weights come from fresh proposals of the frozen sampler, independent of the batches that
    trained it and of the chains.

    Args:
        mcmc: after `run`.
        num_proposals: fresh proposals, over all trained samplers.
        rng_key: key for them; by default derived from the run's last state.

    Returns:
        The report.

    Raises:
        TypeError: for what is no run, and for another kernel.
        RuntimeError: if there is no finished run.

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
    single = is_prng_key(state.rng_key)
    if rng_key is None:
        rng_key = jax.random.fold_in(state.rng_key if single else state.rng_key[0], 1)
    each = num_proposals if single else -(-num_proposals // len(state.rng_key))
    proposals = kernel.propose(state, each, rng_key, mcmc._args, mcmc._kwargs)
    log_weight = clean(proposals.log_weight.reshape(-1))
    log_z, log_z_se = (float(value) for value in log_evidence(log_weight))
    fraction = float(ess_fraction(log_weight))
    finite = np.isfinite(np.asarray(log_weight))
    acceptance = float(np.mean(np.asarray(state.mean_accept_prob)))
    folded = float(1.0 - np.mean(np.asarray(proposals.one_to_one)))
    khat = pareto_khat(log_weight)
    max_rhat = _max_rhat(mcmc.get_samples(group_by_chain=True))
    backward = float("nan")
    if kernel.correction is not None:
        inverse = np.ravel(np.asarray(state.log_mean_inverse_weight))
        backward = -float(np.logaddexp.reduce(inverse) - np.log(inverse.size))
    if khat + 2.0 * tail_index_error(khat, log_weight.size) > FINITE_VARIANCE_KHAT:
        disagreement = abs(backward - log_z) if np.isfinite(backward) else 0.0
        log_z_se = max(log_z_se, disagreement, float(unseen_share(log_weight, khat)))
    ensemble = state.training.ensemble is not None and bool(np.any(np.asarray(state.training.ensemble)))
    drift = float(np.max(np.asarray(state.training.warm.drift)))
    verdict, advice = _judge(
        kernel.correction,
        ensemble,
        khat,
        acceptance,
        fraction,
        1.0 - finite.mean(),
        folded,
        max_rhat,
        backward - log_z,
        drift,
        searched=state.training.warm.points is not None,
    )
    return Report(
        verdict=verdict,
        advice=advice,
        acceptance=acceptance,
        khat=khat,
        ess_fraction=fraction,
        log_evidence=log_z,
        log_evidence_se=log_z_se,
        backward_log_evidence=backward,
        elbo=float(np.mean(np.asarray(log_weight)[finite])) if finite.any() else float("-inf"),
        max_rhat=max_rhat,
        warm_start_ess_fraction=float(np.min(np.asarray(state.training.warm.ess_fraction))),
        warm_start_khat=float(np.max(np.asarray(state.training.warm.khat))),
        warm_start_drift=drift,
        training=np.asarray(state.training.loss),
        training_steps=int(np.max(np.asarray(state.training.num_steps))),
        skipped_updates=int(np.sum(np.asarray(state.training.skipped_updates))),
        ensemble=ensemble,
        nonfinite_proposals=int(np.sum(np.asarray(state.nonfinite_proposals))),
        not_one_to_one=folded,
        gradients=int(np.sum(np.asarray(state.training.gradients))),
        correction=kernel.correction,
        log_weight=np.asarray(proposals.log_weight).reshape(-1),
    )


def _max_rhat(samples: Any) -> float:
    values = []
    for leaf in jax.tree.leaves(samples):
        draws = np.asarray(leaf)
        if draws.shape[1] >= 4 and draws.size and np.issubdtype(draws.dtype, np.floating):
            with np.errstate(invalid="ignore", divide="ignore"):
                values.append(np.ravel(split_gelman_rubin(draws)))
    found = np.concatenate(values) if values else np.array([np.nan])
    found = found[np.isfinite(found)]  # constant sites have none
    return float(found.max()) if found.size else float("nan")


def _judge(
    correction: str | None,
    ensemble: bool,
    khat: float,
    acceptance: float,
    fraction: float,
    nonfinite: float,
    folded: float,
    max_rhat: float,
    disagreement: float,
    drift: float,
    searched: bool,
) -> tuple[Verdict, str]:
    """Find the worst fault; its grade is the verdict and its cure the advice."""
    longer = "train longer (`num_warmup`), or pass a wider `precondition`"
    rhat = max_rhat if np.isfinite(max_rhat) else 1.0
    khat_limits = (np.inf, np.inf) if fraction > NEARLY_EQUAL else _MAX_KHAT
    faults: list[tuple[float, tuple[float, float], str]] = [
        # badness, its limits for "reliable" and for "caution", what is wrong and the cure
        (
            khat,
            khat_limits,
            f"the weights have a heavy tail (k-hat {khat:.2f}): the learned proposal is too narrow, or the "
            f"posterior is improper; {longer}",
        ),
        (-acceptance, _MIN_ACCEPTANCE, f"low acceptance ({acceptance:.2f}): {longer}"),
        (-fraction, _MIN_ESS, f"few effective proposals ({fraction:.3f}): {longer}"),
        (
            nonfinite,
            _MAX_BAD_SHARE,
            f"{nonfinite:.1%} of proposals have no finite density: check the model for overflow, or enable "
            "float64",
        ),
        (
            folded,
            _MAX_BAD_SHARE,
            f"at {folded:.1%} of proposals a transport map may not be one-to-one: use more maps "
            "(`num_maps`) or a shorter `duration`",
        ),
        (
            0.0 if correction is None else abs(disagreement),
            _MAX_DISAGREEMENT,
            f"log evidence from proposals and from the chains' states differ by {abs(disagreement):.2f}: "
            f"something is hardly ever proposed; {longer}",
        ),
        (
            drift,
            _MAX_DRIFT,
            "particles of the warm start had not arrived everywhere and may have missed a part of the "
            "posterior: compare with another seed or kernel, or give a wider start (`init_strategy`)",
        ),
        (rhat, _MAX_RHAT, f"chains disagree (R-hat {rhat:.2f}): draw more samples, or {longer}"),
    ]
    grades: tuple[tuple[int, Verdict], ...] = ((1, "unreliable"), (0, "caution"))
    for column, grade in grades:
        for badness, limits, words in faults:
            if not badness <= limits[column]:
                return grade, words
    if ensemble:
        return "caution", f"single proposals had a heavy tail, and each is now chosen among several; {longer}"
    if correction is None:
        return "caution", "raw draws are not exact; weigh them, or use correction='metropolis'"
    if not searched:
        return "caution", (
            "nothing looked for modes before training, and one that no path reached leaves no trace: compare "
            "with precondition='auto' or another sampler"
        )
    return "reliable", "draws are reliable"
