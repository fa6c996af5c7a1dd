# SPDX-License-Identifier: Apache-2.0
"""Log evidence against closed forms, over many seeds, and simulation-based calibration. All with defaults."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import KERNELS, build, run_chains
from numpyro.infer import MCMC
from scipy.stats import chisquare

from benchmarks.posteriors import PROBLEMS, regression
from numpyro_sbtm import LogVarianceDISKernel, report
from numpyro_sbtm.core.psis import tail_index, unseen_share
from numpyro_sbtm.core.weights import log_evidence

NUM_SEEDS, NUM_COVERED = 40, 38
NUM_SIMULATIONS, NUM_BINS = 200, 10


@pytest.fixture
def compiled_once(tmp_path):
    """Keep compiled programs on disk, for runs that differ in their seed alone."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


# ------------------------------------------------------------------ regressions
@pytest.mark.parametrize(
    "kind", [pytest.param("dis", marks=pytest.mark.slow), pytest.param("sbtm", marks=pytest.mark.long)]
)
def test_bayes_factor_of_nested_regressions(kind):
    problems = [regression(num_slopes) for num_slopes in (2, 3)]
    options = {"warmup": 200, "samples": 100}
    found = [report(run_chains(KERNELS[kind](each.model), *each.args, **options)) for each in problems]
    exact = [each.log_evidence for each in problems]
    # printed errors hold the difference of both estimates, and would excuse it: the tolerance is fixed
    assert max(each.log_evidence_se for each in found) < 0.02
    for side in ("log_evidence", "backward_log_evidence"):
        values = [getattr(each, side) for each in found]
        assert abs((values[1] - values[0]) - (exact[1] - exact[0])) < 0.03
    assert all(each.verdict == "reliable" for each in found)


# ------------------------------------------------------------------ coverage
@pytest.mark.parametrize("khat", [0.6, 0.7])
def test_error_bars_of_heavy_tails_are_of_the_size_of_the_errors(khat):
    """A tenth of the weight in a Pareto tail without variance: the sample's standard error is too small."""
    uniform = np.random.default_rng(0).uniform(size=(300, 4000))
    log_weight = jnp.log(1.0 + 0.1 * (uniform**-khat - 1.0))
    estimate, error = jax.vmap(log_evidence)(log_weight)
    found = jax.jit(jax.vmap(tail_index))(log_weight)
    wider = jnp.where(found > 0.5, jnp.maximum(error, jax.vmap(unseen_share)(log_weight, found)), error)
    off = np.abs(estimate - np.log(1.0 + 0.1 * khat / (1.0 - khat)))
    spread = np.sqrt(0.68 * 0.32 / 300)
    assert np.mean(off < error) < 0.68 - 2 * spread
    assert 0.68 - 2 * spread < np.mean(off < wider) < 0.68 + 4 * spread


@pytest.mark.long
@pytest.mark.parametrize("name", ["eight schools, non-centred", "regression", "nine modes"])
def test_error_bars_cover_the_log_evidence(name, compiled_once):
    problem = PROBLEMS[name]()
    kinds = ["dis", "sbtm"]
    scores = []
    for seed in range(NUM_SEEDS):
        kernel = KERNELS[kinds[seed % 2]](problem.model)
        mcmc = MCMC(kernel, num_warmup=200, num_samples=1, progress_bar=False)
        mcmc.warmup(jax.random.key(seed), *problem.args)
        fresh = kernel.sampler(mcmc.last_state, problem.args).draw(jax.random.key(100 + seed), 4000)
        found, error = log_evidence(fresh.log_weight)
        scores.append((float(found) - problem.log_evidence) / float(error))
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


@pytest.mark.long
def test_simulation_based_calibration():
    """Ranks of the true parameters among posterior draws are uniform (Talts et al. 2018)."""

    def ranks(key):
        key_prior, key_run = jax.random.split(key)
        true = numpyro.infer.Predictive(hierarchy, num_samples=1)(key_prior)
        # small, for two hundred trainings in one program; without a warm start, so that learning has a task
        kernel = build(
            LogVarianceDISKernel,
            hierarchy,
            precondition=None,
            num_steps=16,
            num_paths=64,
            num_times=8,
            block_size=64,
            smc_particles=0,  # batched over simulations, both ways to propose would be computed
        )
        mcmc = MCMC(kernel, num_warmup=200, num_samples=1000, progress_bar=False, thinning=10)
        mcmc.run(key_run, true["y"][0])
        draws = mcmc.get_samples()
        below = [jnp.sum(draws[name] < true[name][0]) for name in ("mu", "tau")]
        return jnp.array([*below, jnp.sum(draws["theta"][:, 0] < true["theta"][0, 0])])

    run_all = jax.jit(lambda keys: jax.lax.map(ranks, keys, batch_size=25))
    found = np.asarray(run_all(jax.random.split(jax.random.key(0), NUM_SIMULATIONS)))
    bins = found * NUM_BINS // 101
    for name, column in zip(("mu", "tau", "theta"), bins.T, strict=True):
        counts = np.bincount(column, minlength=NUM_BINS)
        print(f"\n{name}: {counts}")
        assert len(counts) == NUM_BINS
        # 0 to 100 in ten bins: the first holds eleven ranks
        expected = NUM_SIMULATIONS * np.array([11, *[10] * 9]) / 101
        assert chisquare(counts, expected).pvalue > 0.001
