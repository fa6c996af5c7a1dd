# SPDX-License-Identifier: Apache-2.0
"""Log evidence against closed forms, over many seeds, and simulation-based calibration. All with defaults."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from scipy.stats import chisquare, multivariate_normal

from benchmarks.posteriors import PROBLEMS
from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, report

KERNELS = {"dis": LogVarianceDISKernel, "sbtm": SBTMKernel}
NUM_SEEDS, NUM_COVERED = 40, 38
NUM_SIMULATIONS, NUM_BINS = 200, 10


@pytest.fixture
def compiled_once(tmp_path):
    """Keep compiled programs on disk, for runs that differ in their seed alone."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def run(kind, model, *args, seed=0, warmup=200, samples=100):
    mcmc = MCMC(
        KERNELS[kind](model),
        num_warmup=warmup,
        num_samples=samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed), *args)
    return mcmc


# ------------------------------------------------------------------ regressions
COVARIATES = np.array(jax.random.normal(jax.random.key(0), (30, 3)))
RESPONSE = COVARIATES @ np.array([1.0, -1.0, 0.2]) + np.array(jax.random.normal(jax.random.key(1), (30,)))


def regression(y, x):
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)


def regression_log_evidence(y, x):
    return multivariate_normal(np.zeros(len(y)), np.eye(len(y)) + 4.0 * x @ x.T).logpdf(y)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KERNELS)
def test_bayes_factor_of_nested_regressions(kind):
    designs = COVARIATES[:, :2], COVARIATES
    found = [report(run(kind, regression, RESPONSE, x)) for x in designs]
    exact = [regression_log_evidence(RESPONSE, x) for x in designs]
    error = np.hypot(*(each.log_evidence_se for each in found))
    assert error < 0.02
    assert abs((found[1].log_evidence - found[0].log_evidence) - (exact[1] - exact[0])) < 3 * error + 1e-4
    assert all(each.verdict == "reliable" for each in found)


# ------------------------------------------------------------------ coverage
@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight schools, non-centred", "regression", "nine modes"])
def test_error_bars_cover_the_log_evidence(name, compiled_once):
    problem = PROBLEMS[name]()
    kinds = ["dis", "sbtm"]
    scores = []
    for seed in range(NUM_SEEDS):
        found = report(run(kinds[seed % 2], problem.model, *problem.args, seed=seed, samples=50))
        scores.append((found.log_evidence - problem.log_evidence) / found.log_evidence_se)
    print(f"\n{name}: {np.round(scores, 1)}")
    assert np.sum(np.abs(scores) < 3.0) >= NUM_COVERED
    # and the error bars are not too wide either
    assert np.std(scores) > 0.5


# ------------------------------------------------------------------ calibration
def hierarchy(y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    with numpyro.plate("group", 3):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, 0.5), obs=y)


@pytest.mark.slow
def test_simulation_based_calibration(compiled_once):
    """Ranks of the true parameters among posterior draws are uniform (Talts et al. 2018)."""
    prior = numpyro.infer.Predictive(hierarchy, num_samples=NUM_SIMULATIONS)(jax.random.key(0))
    ranks = []
    for sim in range(NUM_SIMULATIONS):
        draws = run("dis", hierarchy, prior["y"][sim], seed=sim, warmup=100, samples=100).get_samples()
        true = [prior["mu"][sim], prior["tau"][sim], prior["theta"][sim, 0]]
        thinned = [draws["mu"][::4], draws["tau"][::4], draws["theta"][::4, 0]]
        ranks.append([int(jnp.sum(x < value)) for x, value in zip(thinned, true, strict=True)])
    bins = np.array(ranks) * NUM_BINS // 101
    for name, column in zip(("mu", "tau", "theta"), bins.T, strict=True):
        counts = np.bincount(column, minlength=NUM_BINS)
        print(f"\n{name}: {counts}")
        assert len(counts) == NUM_BINS
        # 0 to 100 in ten bins: the first holds eleven ranks
        expected = NUM_SIMULATIONS * np.array([11, *[10] * 9]) / 101
        assert chisquare(counts, expected).pvalue > 0.001
