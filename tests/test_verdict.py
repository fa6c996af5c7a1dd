# SPDX-License-Identifier: Apache-2.0
"""The table of faults: each alone turns the right verdict, prints its limit and names its cure."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import run_chains

from numpyro_sbtm import LogVarianceDISKernel, report
from numpyro_sbtm.core.decay import Rays
from numpyro_sbtm.core.evidence import from_proposals, lower_bound
from numpyro_sbtm.reporting.convergence import convergence
from numpyro_sbtm.reporting.evidence import from_chains
from numpyro_sbtm.reporting.report import _KEY, _endless
from numpyro_sbtm.reporting.verdict import Measured, checks, judge, printed_error
from numpyro_sbtm.sampler import absolute

CHAINS = convergence({"x": np.random.default_rng(0).normal(size=(4, 1000, 2))})
WEIGHTS = 0.6 * np.random.default_rng(1).normal(size=4000)
FORWARD = from_proposals(WEIGHTS)
BACKWARD = from_chains(0.36 + 0.6 * np.random.default_rng(2).normal(size=(4, 1000)))
SOUND = Measured(
    corrected=True,
    ensemble=False,
    searched=True,
    trained=True,
    other_data=False,
    chains=CHAINS,
    acceptance=0.7,
    forward=FORWARD,
    backward=BACKWARD,
    not_finite=0.0,
    folded=0.0,
    drift=0.0,
    improper=(),
)


def verdicts(measured):
    table = checks(measured)
    return judge(table, "draws"), judge(table, "evidence")


def grades(measured):
    return tuple(each.verdict for each in verdicts(measured))


def test_a_sound_run_is_reliable_and_so_is_one_whose_proposals_are_chosen_among_several():
    assert grades(SOUND) == ("reliable", "reliable")
    assert grades(SOUND._replace(ensemble=True)) == ("reliable", "reliable")


def backward(apart):
    return BACKWARD._replace(log_evidence=FORWARD.log_evidence + apart)


# fault, verdicts of draws and evidence, what is named, and the row that is printed with its limit
FAULTS = {
    "improper": (
        {"improper": ("b", "a")},
        "unreliable",
        "unreliable",
        "'b', 'a'. Give these sites proper",
        "",
    ),
    "frozen": (
        {"chains": CHAINS._replace(frozen=("x",))},
        "unreliable",
        "reliable",
        "'x' never moves in some chain: train longer",
        "sites that never move            1          (limit 0)",
    ),
    "undefined": (
        {"chains": CHAINS._replace(undefined=("x",))},
        "unreliable",
        "reliable",
        "'x' has draws that are not finite: check the model for overflow",
        "",
    ),
    "three draws": (
        {"chains": CHAINS._replace(num_draws=3, rhat=np.nan, bulk_size=np.nan, tail_size=np.nan)},
        "caution",
        "reliable",
        "3 draws of each chain cannot be judged: draw more samples",
        "draws of each chain              3          (limit 4)",
    ),
    "R-hat": (
        {"chains": CHAINS._replace(rhat=1.03)},
        "caution",
        "reliable",
        "chains disagree (R-hat 1.030): draw more samples",
        "largest R-hat                    1.030      (limit 1.020)",
    ),
    "infinite R-hat": (
        {"chains": CHAINS._replace(rhat=np.inf)},
        "unreliable",
        "reliable",
        "chains disagree",
        "",
    ),
    "undefined R-hat": (
        {"chains": CHAINS._replace(rhat=np.nan)},
        "unreliable",
        "reliable",
        "chains disagree",
        "",
    ),
    "bulk": (
        {"chains": CHAINS._replace(bulk_size=60.0)},
        "caution",
        "reliable",
        "few effective draws (60): draw more samples",
        "effective draws, bulk            60         (limit 100)",
    ),
    "tails": (
        {"chains": CHAINS._replace(tail_size=15.0)},
        "unreliable",
        "reliable",
        "few effective draws in the tails (15)",
        "effective draws, tails           15         (limit 100)",
    ),
    "acceptance": (
        {"acceptance": 0.1},
        "caution",
        "reliable",
        "low acceptance (0.10): train longer (`num_warmup`)",
        "acceptance of the worst chain    0.10       (limit 0.20)",
    ),
    "acceptance, nothing trained": (
        {"acceptance": 0.1, "trained": False},
        "caution",
        "reliable",
        "low acceptance (0.10): train, although draws of the warm start looked good enough (`always",
        "acceptance of the worst chain    0.10       (limit 0.20)",
    ),
    "acceptance of NaN": ({"acceptance": np.nan}, "unreliable", "reliable", "low acceptance", ""),
    "no density": (
        {"not_finite": 0.05},
        "caution",
        "caution",
        "5.0% of proposals have no finite density",
        "",
    ),
    "folds": (
        {"folded": 0.3},
        "unreliable",
        "unreliable",
        "use more maps (`num_maps`)",
        "maps perhaps not one-to-one      30.0%      (limit 1.0%)",
    ),
    "drift": ({"drift": 0.05}, "caution", "caution", "compare with another seed or kernel", ""),
    "k-hat": (
        {"forward": FORWARD._replace(khat=0.8, unseen=0.1), "backward": BACKWARD._replace(khat=0.8)},
        "reliable",
        "caution",
        "heavy tail (k-hat 0.80): proposals are too narrow; train longer",
        "Pareto k-hat                     0.80       (limit 1.00 for draws, 0.70 for evidence)",
    ),
    "k-hat of an ensemble": (
        {"forward": FORWARD._replace(khat=0.8, unseen=0.1), "backward": None, "ensemble": True},
        "reliable",
        "caution",
        "raise `num_particles` of `correction`",
        "",
    ),
    "k-hat above one": (
        {"forward": FORWARD._replace(khat=1.2, unseen=0.1)},
        "caution",
        "unreliable",
        "heavy tail",
        "",
    ),
    "effective fraction": (
        {"forward": FORWARD._replace(ess_fraction=0.05)},
        "reliable",
        "caution",
        "few effective proposals (0.050)",
        "effective sample fraction        0.050      (limit 0.100)",
    ),
    "poor proposals": (
        {
            "acceptance": 0.27,
            "forward": FORWARD._replace(khat=0.65, ess_fraction=0.155, error=0.33),
            "backward": None,
        },
        "reliable",
        "caution",
        "known to 0.33 only",
        "",
    ),
    "k-hat that the chains do not confirm": (
        {"forward": FORWARD._replace(khat=0.8, unseen=0.1), "backward": backward(0.1)},
        "reliable",
        "caution",
        "heavy tail",
        "",
    ),
    "error": (
        {"forward": FORWARD._replace(error=0.33), "backward": None},
        "reliable",
        "caution",
        "the log evidence is known to 0.33 only: train longer",
        "error of the log evidence        0.330      (limit 0.250)",
    ),
    "apart": (
        {"backward": backward(0.45)},
        "caution",
        "unreliable",
        "differ by 0.45: something is hardly",
        "",
    ),
    "a little apart": ({"backward": backward(0.1)}, "reliable", "caution", "differ by 0.10", ""),
    "far apart": ({"backward": backward(-3.0)}, "unreliable", "unreliable", "differ by 3.00", ""),
    "infinitely apart": (
        {"backward": from_chains(np.full((4, 100), -np.inf))},
        "unreliable",
        "unreliable",
        "differ by inf",
        "",
    ),
    "raw": (
        {"corrected": False, "backward": None},
        "caution",
        "reliable",
        "raw draws are not exact: weigh",
        "",
    ),
    "not searched": (
        {"searched": False},
        "caution",
        "caution",
        "nothing looked for modes before training",
        "",
    ),
    "other data": ({"other_data": True}, "caution", "reliable", "run warm-up again", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_turns_its_verdict(fault):
    changes, draws, evidence, words, row = FAULTS[fault]
    measured = SOUND._replace(**changes)
    assert grades(measured) == (draws, evidence)
    for judgement in verdicts(measured):
        assert (words in judgement.advice) == (judgement.verdict != "reliable")
    rows = [f"{check.name:<33}{check}" for check in checks(measured)]
    assert not row or row in rows


def test_the_gravest_fault_is_named():
    measured = SOUND._replace(drift=0.05, chains=CHAINS._replace(frozen=("x",)))
    draws, evidence = verdicts(measured)
    assert draws.verdict == "unreliable" and "never moves" in draws.advice
    assert evidence.verdict == "caution" and "had not arrived" in evidence.advice


def test_nearly_equal_weights_have_no_tail_to_judge():
    for forward in (
        FORWARD._replace(khat=2.0, ess_fraction=0.95, unseen=0.1),
        FORWARD._replace(khat=2.0, unseen=0.01),
    ):
        measured = SOUND._replace(forward=forward)
        assert grades(measured) == ("reliable", "reliable")
        assert any(str(check) == "2.00       (not judged)" for check in checks(measured))


def test_a_tail_that_good_chains_confirm_is_no_fault():
    """As of increments with their posterior at the boundary: k-hat .74 with evidence right to .01."""
    heavy = FORWARD._replace(khat=0.74, ess_fraction=0.19, error=0.07, unseen=0.1)
    assert grades(SOUND._replace(forward=heavy)) == ("reliable", "reliable")
    for change in (
        {"forward": heavy._replace(khat=1.01)},
        {"backward": BACKWARD._replace(khat=0.8)},
        {"chains": CHAINS._replace(rhat=1.03)},
        {"acceptance": 0.1},
        {"backward": None},
    ):
        assert grades(SOUND._replace(**{"forward": heavy} | change))[1] != "reliable"


def test_weights_of_two_sizes_are_no_heavy_tail():
    """As of a spike and a slab whose learned shares are off: k-hat sees a tail where there is none."""
    generator = np.random.default_rng(0)
    slab = generator.uniform(size=4000) < 0.03
    log_weight = np.where(slab, 1.5, 0.0) + 0.01 * generator.normal(size=4000)
    found = from_proposals(log_weight)
    assert found.khat > 1.0 and found.ess_fraction < 0.9
    measured = SOUND._replace(forward=found, backward=from_chains(found.log_evidence + np.zeros((4, 100))))
    assert grades(measured) == ("reliable", "reliable")
    heavy = from_proposals(0.8 * generator.exponential(size=4000))
    assert heavy.unseen > 0.02 and grades(SOUND._replace(forward=heavy, backward=None))[1] != "reliable"


# ------------------------------------------------------------------ chains
def test_short_runs_of_independent_draws_pass():
    """In most of fifty runs each, of as many entries as models commonly have."""
    generator = np.random.default_rng(0)
    for shape, needed in (((1, 200, 10), 45), ((4, 100, 10), 49), ((4, 1000, 20), 50)):
        passed = 0
        for _ in range(50):
            found = convergence({"x": generator.normal(size=shape)})
            passed += grades(SOUND._replace(chains=found)) == ("reliable", "reliable")
        assert passed >= needed, (shape, passed)


def test_few_draws_are_too_few_and_no_worse():
    for draws in (3, 10):
        found = convergence({"x": np.random.default_rng(0).normal(size=(1, draws))})
        assert grades(SOUND._replace(chains=found))[0] == "caution"


@pytest.mark.parametrize("between", [0.0, 1.0])
def test_chains_that_stand_still_are_frozen(between):
    still = between * np.array([0.0, 1.0, 0.0, 1.0])[:, None] * np.ones((4, 500))
    moving = np.random.default_rng(0).normal(size=(4, 500))
    found = convergence({"x": still, "y": moving}, {"x", "y"})
    assert found.frozen == ("x",)
    assert (found.rhat == np.inf or found.rhat > 100) == (between > 0)
    # a constant that the model computes is no fault, but one that differs between chains is
    computed = convergence({"x": still, "y": moving}, {"y"})
    assert computed.frozen == () and (computed.rhat > 100) == (between > 0)
    one = convergence({"y": np.concatenate([moving[:3], 0.3 * np.ones((1, 500))])})
    assert one.frozen == ("y",)


def test_entries_that_a_site_holds_constant_are_left_out():
    tril = np.random.default_rng(0).normal(size=(4, 500, 2, 2)) * np.array([[0.0, 0.0], [1.0, 1.0]])
    found = convergence({"tril": tril})
    assert found.frozen == found.undefined == () and found.rhat < 1.02 and found.bulk_size > 1000


def test_nan_is_a_fault_unless_the_model_computes_nothing_else():
    draws = np.random.default_rng(0).normal(size=(4, 500, 2))
    draws[1, 7, 0] = np.nan
    assert convergence({"x": draws}).undefined == ("x",)
    assert convergence({"x": draws}, {"z"}).undefined == ("x",)
    draws[..., 0] = np.nan
    assert convergence({"x": draws}, {"z"}).undefined == ()
    assert convergence({"x": np.where(draws > 0, np.inf, draws)}, {"z"}).undefined == ()


def test_chains_of_other_scales_disagree():
    """Their means agree: the folded ranks tell."""
    scale = np.array([1.0, 1.0, 1.0, 3.0])[:, None]
    assert convergence({"x": scale * np.random.default_rng(0).normal(size=(4, 1000))}).rhat > 1.1


# ------------------------------------------------------------------ evidence
def test_both_estimates_and_their_errors_are_right():
    """π = N(0, 1) and proposals N(0, 1.2²), in a hundred runs: scores have mean zero and variance one."""
    generator = np.random.default_rng(0)
    log_ratio = lambda x: np.log(1.2) - 0.5 * x**2 + 0.5 * (x / 1.2) ** 2  # noqa: E731
    persistence = 0.8
    scores = []
    for _ in range(100):
        forward = from_proposals(log_ratio(1.2 * generator.normal(size=2000)) - 1e6)
        x = np.empty((4, 500))
        x[:, 0] = generator.normal(size=4)
        for k in range(1, 500):  # chains with memory: an error that took draws as independent is too small
            noise = np.sqrt(1 - persistence**2) * generator.normal(size=4)
            x[:, k] = persistence * x[:, k - 1] + noise
        back = from_chains(log_ratio(x) - 1e6)
        scores.append([(each.log_evidence + 1e6) / each.error for each in (forward, back)])
    scores = np.array(scores)
    assert np.all(np.abs(scores.mean(0)) < 4 / 10)
    # of a variance of a hundred, that standard error is √(2 / 100)
    assert np.all(np.abs(scores.var(0) - 1.0) < 4 * np.sqrt(2 / 100)), scores.var(0)


def test_the_printed_error_never_hides_a_difference():
    assert printed_error(SOUND) == FORWARD.error < 0.02
    assert printed_error(SOUND._replace(backward=backward(-0.45))) == pytest.approx(0.45)


def test_the_bound_leaves_out_what_is_hardly_there():
    log_weight = np.append(WEIGHTS, [-1e4, np.nan])
    found = from_proposals(log_weight)
    bound, left_out = lower_bound(log_weight, found.log_evidence)
    assert left_out == pytest.approx(2 / 4002)
    assert bound == pytest.approx(WEIGHTS.mean() + np.log(4000 / 4002))
    assert np.mean(log_weight[:-1]) < bound - 2.0 < bound < found.log_evidence
    assert lower_bound(np.full(10, -np.inf), -np.inf) == (-np.inf, 1.0)


@pytest.mark.parametrize(
    "offset, added", [(-1e6, np.full((2, 3), -1e6)), ([-1e6, 3.0], [[-1e6] * 3, [3.0] * 3])]
)
def test_the_offset_is_added_in_double_precision(offset, added):
    values = jnp.array([[1.25, 2.0, 1e-3]] * 2, jnp.float32)
    np.testing.assert_allclose(
        absolute(values, np.asarray(offset)) - np.array(added), np.asarray(values), atol=1e-9
    )


def test_coordinates_without_an_end_are_found():
    x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    none = Rays(np.zeros(3), np.zeros(()), np.zeros(()))
    assert _endless(none, x).tolist() == [False] * 3
    of_chains = none._replace(coordinates=np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.7]]))
    assert _endless(of_chains, x).tolist() == [False, True, True]
    # a cone is named by where draws lie, and what overflows is endless although no ray can be followed
    assert _endless(none._replace(scaled=np.ones(())), x * np.float32([1, 50, 90])).tolist() == [
        False,
        True,
        True,
    ]
    huge = x * np.float32([1, 1e37, 1])
    huge[:20, 0] = np.inf
    assert _endless(none, huge).tolist() == [False, True, False]


def test_the_key_of_a_report_is_none_of_the_chain():
    key = jax.random.key(0)
    taken = np.asarray(jax.random.key_data(jax.random.split(key, 1000)))

    def is_taken(tag):
        return np.any(np.all(taken == np.asarray(jax.random.key_data(jax.random.fold_in(key, tag))), -1))

    assert is_taken(1) and not is_taken(_KEY)  # a small number folded in is one of a split's keys


# ------------------------------------------------------------------ whole runs
@pytest.mark.slow
def test_separated_data_with_flat_priors_are_called_improper():
    x = np.linspace(-2.0, 2.0, 20)

    def model(x, y):
        flat = dist.ImproperUniform(dist.constraints.real, (), ())
        intercept, slope = numpyro.sample("intercept", flat), numpyro.sample("slope", flat)
        numpyro.sample("y", dist.Bernoulli(logits=intercept + slope * x), obs=y)

    found = report(run_chains(LogVarianceDISKernel(model), x, x > 0, warmup=100, samples=200))
    assert found.draws_verdict == found.evidence_verdict == "unreliable", str(found)
    assert "slope" in found.improper and "improper" in found.advice and "'slope'" in found.advice
