# SPDX-License-Identifier: Apache-2.0
"""The table of faults: from what was measured to a verdict of the draws and one of the evidence."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from numpyro_sbtm.core.evidence import Estimate
from numpyro_sbtm.core.psis import USABLE_KHAT, harmless_tail
from numpyro_sbtm.reporting.convergence import FEWEST_DRAWS, Convergence

__all__ = ["Check", "Judgement", "Measured", "Verdict", "checks", "joint_error", "judge", "printed_error"]

Verdict = Literal["reliable", "caution", "unreliable"]
Limits = tuple[float, float]
"""Limits for "reliable" and for "caution" of a number that is bad when large."""

_NEVER = (np.inf, np.inf)
_AT_MOST_CAUTION = (0.0, np.inf)
_MAX_KHAT = (USABLE_KHAT, 1.0)
_MAX_KHAT_OF_DRAWS = (1.0, np.inf)
_MIN_ACCEPTANCE = (0.2, 0.05)
_MIN_ESS = (0.1, 0.01)
_MAX_BAD_SHARE = (0.01, 0.2)
_MAX_DRIFT = (0.02, np.inf)
_MAX_ERROR = (0.25, 1.0)  # nats: a Bayes factor is then known to a quarter of itself
_FEWEST_DRAWS_IN_ALL = (100.0, 0.0)
_EFFECTIVE_DRAWS = (100.0, 20.0)
_EFFECTIVE_PART = (0.2, 0.05)  # of all draws, for runs that are too short to have so many
_JOINT_ERRORS = (4.0, 10.0)  # by which the two log evidences may differ, above a floor and below a ceiling
_FLOOR = (0.02, 0.25)
_FLOOR_OF_DRAWS = (0.1, 0.5)
_CEILING = (0.5, 2.0)

_LONGER = "train longer (`num_warmup`), or pass a wider `precondition`"
_TRAIN = "train, although draws of the warm start looked good enough (`always=True` of `training`)"


class Measured(NamedTuple):
    """Everything that is judged.

    Attributes:
        corrected: whether a Metropolis step corrected the proposals.
        ensemble: whether each proposal was chosen among several.
        searched: whether something looked for modes.
        trained: whether anything was trained.
        other_data: whether the sampler was trained for other data.
        chains: what the chains say about themselves.
        acceptance: mean acceptance probability of the worst chain.
        forward: log evidence from fresh proposals.
        backward: log evidence from the chains' states; None for raw draws.
        not_finite: share of fresh proposals without a finite weight.
        folded: share of fresh proposals at which a transport map may not be one-to-one.
        drift: by what part a variance of the warm start's particles still changed.
        improper: sites along which the density does not fall.
    """

    corrected: bool
    ensemble: bool
    searched: bool
    trained: bool
    other_data: bool
    chains: Convergence
    acceptance: float
    forward: Estimate
    backward: Estimate | None
    not_finite: float
    folded: float
    drift: float
    improper: tuple[str, ...]


class Check(NamedTuple):
    """A number with its limits.

    Attributes:
        name: what it is; empty for what is no number.
        value: the number.
        fault: what is wrong if it is beyond a limit, and the cure.
        draws: limits of a verdict of the draws.
        evidence: limits of a verdict of the evidence.
        least: whether it is bad when small.
        form: how it is printed.
    """

    name: str
    value: float
    fault: str
    draws: Limits = _NEVER
    evidence: Limits = _NEVER
    least: bool = False
    form: str = ".2f"

    @property
    def printed(self) -> bool:
        """Whether it has a row of its own: what is merely there or not has one only if it is."""
        return bool(self.name) and (self.form != ".0f" or self.least or self.value > 0)

    def grade(self, limits: Limits) -> int:
        """0 within the first limit, 1 within the second, 2 beyond; NaN is beyond."""
        if limits == _NEVER:
            return 0
        sign = -1.0 if self.least else 1.0
        return sum(not sign * self.value <= sign * limit for limit in limits)

    def __str__(self) -> str:
        judged = [(name, limits[0]) for name, limits in (("draws", self.draws), ("evidence", self.evidence))]
        judged = [(name, limit) for name, limit in judged if np.isfinite(limit)]
        value = format(self.value, self.form)
        if not judged:
            return f"{value:<10} (not judged)"
        if len({limit for _, limit in judged}) == 1:
            return f"{value:<10} (limit {judged[0][1]:{self.form}})"
        each = ", ".join(f"{limit:{self.form}} for {name}" for name, limit in judged)
        return f"{value:<10} (limit {each})"


class Judgement(NamedTuple):
    """A verdict, and the fault with its cure; what is wrong is empty if nothing is."""

    verdict: Verdict
    advice: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.advice}" if self.advice else self.verdict


def judge(table: Sequence[Check], of: Literal["draws", "evidence"]) -> Judgement:
    """Find the worst fault, the first in the table if there are several as bad.

    Examples:
        >>> from numpyro_sbtm.reporting.verdict import Check, judge
        >>> low = Check("acceptance rate", 0.1, "low acceptance: train longer", (0.2, 0.05), least=True)
        >>> judge([low], "draws")
        Judgement(verdict='caution', advice='low acceptance: train longer')
        >>> judge([low], "evidence").verdict
        'reliable'
    """
    grades = [check.grade(check.draws if of == "draws" else check.evidence) for check in table]
    worst = max(grades, default=0)
    if worst == 0:
        return Judgement("reliable", "")
    verdict: Verdict = "caution" if worst == 1 else "unreliable"
    return Judgement(verdict, table[grades.index(worst)].fault)


def joint_error(measured: Measured) -> float:
    """Standard error of the difference of the two log evidences; NaN where it cannot be known."""
    if measured.backward is None:
        return float("nan")
    return float(np.hypot(measured.forward.error, measured.backward.error))


def difference(measured: Measured) -> float:
    """Compute by how much the two log evidences differ; NaN if there is one only."""
    if measured.backward is None:
        return float("nan")
    return abs(measured.backward.log_evidence - measured.forward.log_evidence)


def printed_error(measured: Measured) -> float:
    """Standard error of the log evidence that does not hide by how much the two estimates differ.

    At least the difference where that is above two joint errors, or weights may have no finite variance.
    """
    apart, joint = difference(measured), joint_error(measured)
    if np.isfinite(apart) and (measured.forward.heavy or apart > 2.0 * joint):
        return max(measured.forward.error, apart)
    return measured.forward.error


def checks(measured: Measured) -> list[Check]:
    """Put every number beside its limits, what is at the root of other faults first."""
    ours = [
        Check(
            "directions without decay",
            len(measured.improper),
            "the posterior is improper: the density does not fall along "
            f"{', '.join(map(repr, measured.improper))}. Give these sites proper priors",
            (0.0, 0.0),
            (0.0, 0.0),
            form=".0f",
        ),
        *_of_proposals(measured),
        *_of_chains(measured),
        *_of_evidence(measured),
        Check(
            "drift of the warm start",
            measured.drift,
            "particles of the warm start had not arrived everywhere and may have missed a part of the "
            "posterior: compare with another seed or kernel, or give a wider start (`init_strategy`)",
            _MAX_DRIFT,
            _MAX_DRIFT,
            form=".3f",
        ),
    ]
    for given, words in (
        (not measured.corrected, "raw draws are not exact: weigh them, or use correction='metropolis'"),
        (measured.other_data, "the sampler was trained for other data: run warm-up again"),
    ):
        if given:
            ours.append(Check("", 1.0, words, _AT_MOST_CAUTION, form=".0f"))
    if not measured.searched:
        words = (
            "nothing looked for modes before training, and one that no path reached leaves no trace: compare "
            "with precondition='auto' or another sampler"
        )
        ours.append(Check("", 1.0, words, _AT_MOST_CAUTION, _AT_MOST_CAUTION, form=".0f"))
    return ours


def _of_chains(measured: Measured) -> list[Check]:
    chains, longer = measured.chains, _LONGER if measured.trained else _TRAIN
    names = ", ".join(map(repr, chains.frozen))
    undefined = ", ".join(map(repr, chains.undefined))
    found = [
        Check(
            "sites that never move",
            len(chains.frozen),
            f"frozen: {names} never moves in some chain: {longer}; check options such as `learning_rate`",
            (0.0, 0.0),
            form=".0f",
        ),
        Check(
            "sites with undefined draws",
            len(chains.undefined),
            f"{undefined} has draws that are not finite: check the model for overflow, or enable float64",
            (0.0, 0.0),
            form=".0f",
        ),
        Check(
            "draws of each chain",
            chains.num_draws,
            f"{chains.num_draws} draws of each chain cannot be judged: draw more samples",
            (FEWEST_DRAWS, 0.0),
            least=True,
            form=".0f",
        ),
    ]
    if np.isfinite(chains.bulk_size):
        total = chains.num_chains * chains.num_draws
        first, second = map(min, _EFFECTIVE_DRAWS, (part * total for part in _EFFECTIVE_PART))
        slack = 5.0 / (chains.num_draws // 2)
        cure = f"draw more samples, or {longer}"
        found += [
            Check(
                "largest R-hat",
                chains.rhat,
                f"chains disagree (R-hat {chains.rhat:.3f}): {cure}",
                (1.01 + slack, 1.09 + slack),
                form=".3f",
            ),
            Check(
                "effective draws, bulk",
                chains.bulk_size,
                f"few effective draws ({chains.bulk_size:.0f}): {cure}",
                (first, second),
                least=True,
                form=".0f",
            ),
            Check(
                "effective draws, tails",
                chains.tail_size,
                f"few effective draws in the tails ({chains.tail_size:.0f}): {cure}",
                (first, second),
                least=True,
                form=".0f",
            ),
            Check(
                "draws in all",
                total,
                f"{total} draws are few: draw more samples",
                _FEWEST_DRAWS_IN_ALL,
                least=True,
                form=".0f",
            ),
        ]
    found.append(
        Check(
            "acceptance of the worst chain",
            measured.acceptance,
            f"low acceptance ({measured.acceptance:.2f}): {longer}",
            _MIN_ACCEPTANCE,
            least=True,
        )
    )
    return found


def _of_proposals(measured: Measured) -> list[Check]:
    return [
        Check(
            "proposals without a density",
            measured.not_finite,
            f"{measured.not_finite:.1%} of proposals have no finite density: check the model for overflow, "
            "or enable float64",
            _MAX_BAD_SHARE,
            _MAX_BAD_SHARE,
            form=".1%",
        ),
        Check(
            "maps perhaps not one-to-one",
            measured.folded,
            f"at {measured.folded:.1%} of proposals a transport map may not be one-to-one: use more maps "
            "(`num_maps`) or a shorter `duration`",
            _MAX_BAD_SHARE,
            _MAX_BAD_SHARE,
            form=".1%",
        ),
    ]


def _of_evidence(measured: Measured) -> list[Check]:
    forward, error = measured.forward, printed_error(measured)
    cure = _LONGER if measured.trained else _TRAIN
    cure = "raise `num_particles` of `correction`" if measured.ensemble else cure
    tail = f"the weights have a heavy tail (k-hat {forward.khat:.2f}): proposals are too narrow; {cure}"
    apart, joint = difference(measured), joint_error(measured)
    if np.isinf(apart):
        joint = np.inf  # of a state without weight there is no error

    def limits(floor: Limits) -> Limits:
        first, second = (
            min(low + times * joint, high)
            for low, times, high in zip(floor, _JOINT_ERRORS, _CEILING, strict=True)
        )
        return first, second

    # the posterior's side sees what is seldom proposed: the mean of 1/w has no such tail
    confirmed = (
        measured.backward is not None
        and measured.backward.khat <= USABLE_KHAT
        and apart <= limits(_FLOOR)[0]
        and not any(check.grade(check.draws) for check in _of_chains(measured))
    )
    khat_limits = (1.0, 1.0) if confirmed else _MAX_KHAT
    harmless = not forward.khat <= USABLE_KHAT and harmless_tail(forward.ess_fraction, forward.unseen)
    found = [
        Check(
            "Pareto k-hat",
            forward.khat,
            tail,
            _NEVER if harmless else _MAX_KHAT_OF_DRAWS,
            _NEVER if harmless else khat_limits,
        ),
        Check(
            "effective sample fraction",
            forward.ess_fraction,
            f"few effective proposals ({forward.ess_fraction:.3f}): {cure}",
            evidence=_MIN_ESS,
            least=True,
            form=".3f",
        ),
    ]
    if not np.isnan(joint):
        found.append(
            Check(
                "difference of log evidences",
                apart,
                f"log evidence from proposals and from the chains' states differ by {apart:.2f}: something "
                f"is hardly ever proposed; {cure}",
                limits(_FLOOR_OF_DRAWS),
                limits(_FLOOR),
                form=".3f",
            )
        )
    found.append(
        Check(
            "error of the log evidence",
            error,
            f"the log evidence is known to {error:.2f} only: {cure}, or give `report` more `num_proposals`",
            evidence=_MAX_ERROR,
            form=".3f",
        )
    )
    return found
