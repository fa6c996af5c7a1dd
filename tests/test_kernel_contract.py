# SPDX-License-Identifier: Apache-2.0
"""What the kernels accept and refuse: models, potentials, bad arguments, bad posteriors, ArviZ, DCC."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import build
from jax import random
from numpyro.contrib.stochastic_support.dcc import DCC
from numpyro.diagnostics import effective_sample_size
from numpyro.handlers import reparam
from numpyro.infer import MCMC, Predictive
from numpyro.infer.reparam import LocScaleReparam
from scipy.stats import norm

from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, report
from numpyro_sbtm.kernels import memory

KINDS = {
    "dis": (LogVarianceDISKernel, {"num_steps": 4, "num_paths": 16, "num_times": 4}),
    "sbtm": (SBTMKernel, {"num_particles": 64, "num_maps": 4, "num_updates": 1, "batch_size": 32}),
}
SMALL = {"width": 8, "block_size": 32, "precondition": None}

both_kinds = pytest.mark.parametrize("kind", KINDS)
# where the code under test is the same for both, the slower one is left to the slow tests
one_kind_quickly = pytest.mark.parametrize("kind", ["sbtm", pytest.param("dis", marks=pytest.mark.slow)])


def make(kind, model=None, potential_fn=None, **options):
    cls, sizes = KINDS[kind]
    return build(cls, model, potential_fn, **sizes | SMALL | options)


def run(kernel, *args, warmup=6, samples=20, fields=(), init_params=None, key=0, **options):
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=samples, progress_bar=False, **options)
    mcmc.run(random.key(key), *args, extra_fields=fields, init_params=init_params)
    return mcmc


def error_of_mean(draws):
    draws = np.asarray(draws)
    return np.std(draws) / np.sqrt(effective_sample_size(draws[None]))


def normal():
    numpyro.sample("x", dist.Normal(0.0, 1.0))


# ------------------------------------------------------------------ models
def supports(counts=None):
    probs = numpyro.sample("probs", dist.Dirichlet(jnp.ones(3)))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("pair", 2):
        numpyro.sample("rate", dist.Beta(2.0, 3.0))
    tril = numpyro.sample("tril", dist.LKJCholesky(3, 1.0))
    numpyro.deterministic("cov", scale**2 * tril @ tril.T)
    with numpyro.plate("rows", 4):
        numpyro.sample("counts", dist.Multinomial(10, probs), obs=counts)


COUNTS = np.array([[7, 2, 1], [6, 3, 1], [8, 1, 1], [7, 1, 2]])


@pytest.fixture(scope="module")
def supported():
    return run(make("sbtm", supports), COUNTS, chain_method="vectorized", num_chains=2)


def test_samples_lie_in_the_supports_of_their_sites(supported):
    samples = {name: np.asarray(value) for name, value in supported.get_samples().items()}
    assert {name: value.shape for name, value in samples.items()} == {
        "probs": (40, 3),
        "scale": (40,),
        "rate": (40, 2),
        "tril": (40, 3, 3),
        "cov": (40, 3, 3),
    }
    for name, constraint in {
        "probs": dist.constraints.simplex,
        "scale": dist.constraints.positive,
        "rate": dist.constraints.unit_interval,
        "tril": dist.constraints.corr_cholesky,
        "cov": dist.constraints.positive_definite,
    }.items():
        assert np.all(constraint(samples[name])), name
    cov = samples["scale"][:, None, None] ** 2 * samples["tril"] @ np.swapaxes(samples["tril"], 1, 2)
    np.testing.assert_allclose(samples["cov"], cov, rtol=1e-4, atol=1e-5)


def test_predictive_takes_the_samples(supported):
    predicted = Predictive(supports, supported.get_samples())(random.key(1))["counts"]
    assert predicted.shape == (40, 4, 3)
    assert np.all(np.sum(predicted, -1) == 10)


@pytest.mark.filterwarnings(r"ignore:\s*ArviZ is undergoing a major refactor:FutureWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # constant entries
def test_arviz_and_print_summary_read_the_run(supported, capsys):
    import arviz as az  # warns, once a day

    data = az.from_numpyro(supported)
    posterior, stats = data["posterior"], data["sample_stats"]
    if int(az.__version__.split(".")[0]) >= 1:
        posterior, stats = posterior.dataset, data["sample_stats"]
    assert set(posterior.data_vars) == {"probs", "scale", "rate", "tril", "cov"}
    assert posterior["rate"].dims == ("chain", "draw", "pair")
    assert posterior["probs"].shape == (2, 20, 3)
    if "diverging" in supported.get_extra_fields():
        assert stats["diverging"].shape == (2, 20)
    supported.print_summary()
    printed = capsys.readouterr().out
    assert "scale" in printed
    assert "Number of divergences: 0" in printed
    assert "cov" not in printed  # deterministic


@one_kind_quickly
def test_enumerated_and_reparametrised_sites_give_the_exact_posterior(kind):
    @partial(reparam, config={"theta": LocScaleReparam(0.0)})
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        theta = numpyro.sample("theta", dist.Normal(mu, 0.5))
        shift = numpyro.sample("shift", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(theta + 2.0 * shift, 1.0), obs=y)

    y, variance = 1.5, 1.0 + 0.25  # of theta, before the data
    weight = np.array([0.7, 0.3]) * norm.pdf(y, [0.0, 2.0], np.sqrt(variance + 1.0))
    exact = np.sum(weight / weight.sum() * (y - np.array([0.0, 2.0])) * variance / (variance + 1.0))
    mcmc = run(make(kind, model), y, warmup=20, samples=1500)
    samples = mcmc.get_samples()
    assert set(samples) == {"mu", "theta", "theta_decentered"}
    error = error_of_mean(samples["theta"])
    assert error < 0.1
    assert abs(np.mean(samples["theta"]) - exact) < 5 * error


@one_kind_quickly
def test_forward_mode_differentiates_while_loops(kind):
    def model(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        # x doubled twice, in a way that reverse mode cannot differentiate
        _, four_x = jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 2.0 * c[1]), (0, x))
        numpyro.sample("y", dist.Normal(four_x / 4.0, 1.0), obs=y)

    x = run(make(kind, model, forward_mode_differentiation=True), 2.0, samples=1000).get_samples()["x"]
    error = error_of_mean(x)
    assert error < 0.1
    assert abs(np.mean(x) - 1.0) < 5 * error


@pytest.mark.slow
def test_dcc_takes_the_kernel_for_stochastic_support():
    def model():
        branch = numpyro.sample("branch", dist.Bernoulli(0.5), infer={"branching": True})
        name, loc = ("low", 0.0) if branch == 0 else ("high", 1.0)
        mean = numpyro.sample(name, dist.Normal(loc, 1.0))
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=0.2)

    dcc = DCC(
        model,
        mcmc_kwargs={"num_warmup": 6, "num_samples": 200, "progress_bar": False},
        kernel_cls=partial(make, "sbtm"),
        num_slp_samples=30,
    )
    result = dcc.run(random.key(0))
    assert sorted(name for samples in result.samples.values() for name in samples) == ["high", "low"]
    exact = norm.pdf(0.2, [0.0, 1.0], np.sqrt(2.0))
    # 200 importance weights of DCC's own, whose relative standard deviation is below 1.5
    error = 1.5 / np.sqrt(200)
    assert abs(float(result.slp_weights["0"]) - exact[0] / exact.sum()) < 5 * error


# ------------------------------------------------------------------ potential functions
POTENTIALS = {
    # chains, init_params without the chain axis
    "array": (1, np.zeros(2)),
    "dict": (2, {"a": np.zeros(2), "b": np.ones((2, 3))}),
}


@pytest.mark.parametrize(("kind", "shape"), [("dis", "dict"), ("sbtm", "array")])
def test_potential_functions_of_any_pytree(kind, shape):
    def potential(z):
        return sum(jnp.sum((leaf - 1.0) ** 2) for leaf in jax.tree.leaves(z))

    chains, one = POTENTIALS[shape]
    init = one if chains == 1 else jax.tree.map(lambda leaf: np.stack([leaf] * chains), one)
    kernel = make(kind, potential_fn=potential)
    mcmc = run(
        kernel,
        init_params=init,
        num_chains=chains,
        chain_method="vectorized",
        warmup=20,
        samples=400,
        fields=("potential_energy",),
    )
    draws = mcmc.get_samples()
    assert jax.tree.structure(draws) == jax.tree.structure(one)
    jax.tree.map(lambda d, leaf: np.testing.assert_equal(d.shape, (chains * 400, *leaf.shape)), draws, one)
    energy = mcmc.get_extra_fields()["potential_energy"]
    np.testing.assert_allclose(energy, jax.vmap(potential)(draws), rtol=1e-4, atol=1e-5)
    first = np.asarray(jax.tree.leaves(mcmc.get_samples(group_by_chain=True))[0])
    first = first.reshape(chains, 400, -1)[..., 0] if chains > 1 else first.reshape(1, -1, 2)[..., 0]
    error = np.std(first) / np.sqrt(effective_sample_size(first))
    assert error < 0.25
    assert abs(first.mean() - 1.0) < 5 * error


@one_kind_quickly
def test_local_moves_come_by_default_where_the_warm_start_is_poor(kind):
    def learned(**options):
        return make(kind, normal, **options).init(random.key(0), 4, None, (), {}).learned

    # N(0, 1) needs no warm start; a step size is kept for other data all the same
    assert learned().local_moves is None and learned().located.step_size > 0
    assert learned(local_kernel="hmc").local_moves is not None
    assert learned(precondition=(np.zeros(1), 5.0 * np.eye(1))).local_moves is not None
    assert learned(local_kernel=None).located.step_size is None


# ------------------------------------------------------------------ starts; test_inputs has more
def pair():
    numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@both_kinds
def test_init_params_are_the_first_position(kind):
    kernel = make(kind, pair)
    start = {"a": np.array([3.0, -3.0]), "b": np.array([[1.0, 2.0], [3.0, 4.0]])}
    state = kernel.init(random.split(random.key(0), 2), 6, start)
    jax.tree.map(np.testing.assert_array_equal, state.z, start)


def test_compiled_programs_are_dropped_before_memory_mappings_run_out(monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "clear_caches", lambda: calls.append(1))
    kernel = make("dis", normal)
    kernel.init(random.key(0), 6)
    assert not calls  # one run is far from the limit
    monkeypatch.setattr(memory, "_MAX_MAPPINGS", 0.0)
    kernel.init(random.key(0), 6)
    assert calls == [1] * os.path.exists("/proc/self/maps")


# ------------------------------------------------------------------ bad posteriors
@both_kinds
def test_a_mode_that_nothing_looked_for_is_not_called_reliable(kind):
    """Of two modes, 40 deviations apart, only that of the start is found, and its draws look perfect."""

    def pair(x):
        return -jnp.logaddexp(-0.5 * jnp.sum(x**2), -0.5 * jnp.sum((x - 40.0) ** 2))

    mcmc = run(make(kind, None, pair), samples=300, init_params=jnp.zeros(1))
    found = report(mcmc, num_proposals=1000)
    assert found.ess_fraction > 0.99
    assert abs(found.log_evidence - 0.5 * np.log(2 * np.pi)) < 0.02  # half the truth
    assert found.verdict == "caution" and "nothing looked for modes" in found.advice


@both_kinds
def test_undefined_densities_are_never_accepted_and_counted(kind):
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("hole", jnp.where(x > 1.0, jnp.nan, 0.0))

    mcmc = run(make(kind, model), samples=300)
    x = np.asarray(mcmc.get_samples()["x"])
    diverging = np.asarray(mcmc.get_extra_fields()["diverging"])
    assert np.all(np.isfinite(x))
    assert np.all(x <= 1.0)
    assert diverging.sum() > 0
    assert mcmc.last_state.nonfinite_proposals >= diverging.sum()
    found = report(mcmc, num_proposals=1000)
    assert found.nonfinite_proposals == mcmc.last_state.nonfinite_proposals
    assert 0 < np.mean(~np.isfinite(found.log_weight)) < 1
    assert found.verdict != "reliable" and "no finite density" in found.advice
    assert np.isfinite(found.log_evidence)
