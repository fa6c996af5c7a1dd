# SPDX-License-Identifier: Apache-2.0
"""The kernels under NumPyro's driver: chain methods, keys, phases, pickling, transformations, compilation.

Almost all of the time is compilation, so that every run is asked as much as it can answer.
"""

import os
import pickle
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import build
from jax import random
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from numpyro.infer.util import potential_energy
from numpyro.util import is_prng_key

from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, report
from numpyro_sbtm.core.evaluations import Evaluations

KINDS = {
    "dis": (LogVarianceDISKernel, {"num_steps": 4, "num_paths": 16, "num_times": 4}),
    "sbtm": (SBTMKernel, {"num_particles": 64, "num_maps": 4, "num_updates": 1, "batch_size": 32}),
}
WARMUP = 6
DRAWS = 99  # more than three blocks of 32
Y = np.array([1.0, 0.5, 2.0], np.float32)
TRACES = Counter()

both_kinds = pytest.mark.parametrize("kind", KINDS)
# where the code under test is the same for both, the second is left to the slow tests
one_kind_quickly = pytest.mark.parametrize("kind", ["dis", pytest.param("sbtm", marks=pytest.mark.slow)])


def make(kind, model=None, **options):
    cls, sizes = KINDS[kind]
    return build(cls, model, **sizes | {"width": 8, "block_size": 32, "precondition": None} | options)


def model(y, offset=None):
    """Conjugate in mu: N(sum(y) / (n + 1), 1 / (n + 1)); s keeps its prior."""
    TRACES["model"] += 1
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("s", dist.HalfNormal(1.0).expand([2]).to_event(1))
    loc = mu
    if offset is not None:
        loc = mu + offset * numpyro.sample("slope", dist.Normal(0.0, 1.0))
    numpyro.deterministic("twice", 2 * mu)
    numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.fixture(autouse=True, scope="module")
def a_real_progress_bar():
    """`CI` and xdist would switch the bar off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield


def rows(samples):
    return np.concatenate([np.reshape(samples[k], (len(samples[k]), -1)) for k in ("mu", "s")], axis=1)


def assert_same_tree(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ------------------------------------------------------------------ chain methods
METHODS = {
    # name: (chain_method, options of the kernel, chains, progress bar, key)
    "shared": ("vectorized", {}, 4, True, random.key),
    "independent": ("vectorized", {"shared": False}, 2, False, random.PRNGKey),
    "sequential": ("sequential", {}, 2, True, random.PRNGKey),
    "parallel": ("parallel", {}, 2, True, random.key),
    "vmap": (jax.vmap, {}, 2, False, random.key),
}


# without devices for it, "parallel" runs the program of "sequential"
ONE_KIND = {"sequential": "dis", "parallel": "sbtm"}
ALSO_SLOWLY = {("shared", "sbtm"), ("vmap", "dis"), ("independent", "dis")}


# NumPyro donates buffers that a callable chain method batches, whatever the kernel
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning")
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        pytest.param(m, kind, marks=[pytest.mark.slow] if (m, kind) in ALSO_SLOWLY else [])
        for m in METHODS
        for kind in KINDS
        if ONE_KIND.get(m, kind) == kind
    ],
)
def test_every_chain_method_gives_valid_chains_and_fields(method, kind):
    chain_method, options, chains, bar, make_key = METHODS[method]
    kernel = make(kind, model, **options)

    def build():
        return MCMC(
            kernel,
            num_warmup=WARMUP,
            num_samples=20,
            num_chains=chains,
            chain_method=chain_method,
            progress_bar=bar,
        )

    if method == "parallel" and jax.local_device_count() < chains:
        with pytest.warns(UserWarning, match="not enough devices to run parallel chains"):
            mcmc = build()
    else:
        mcmc = build()
    fields = ("potential_energy", "log_weight", "accept_prob", "z.mu", "z.s")
    mcmc.run(make_key(0), Y, extra_fields=fields)

    grouped = mcmc.get_samples(group_by_chain=True)
    assert {k: v.shape for k, v in grouped.items()} == {
        "mu": (chains, 20),
        "s": (chains, 20, 2),
        "twice": (chains, 20),
    }
    assert mcmc.get_samples()["s"].shape == (chains * 20, 2)
    assert all(np.all(np.isfinite(v)) for v in grouped.values())
    assert np.all(np.asarray(grouped["s"]) > 0)
    np.testing.assert_allclose(grouped["twice"], 2 * grouped["mu"], rtol=1e-6)
    assert len({np.asarray(chain).tobytes() for chain in grouped["mu"]}) == chains

    extra = mcmc.get_extra_fields(group_by_chain=True)
    for name in ("diverging", "potential_energy", "log_weight", "accept_prob"):
        assert extra[name].shape == (chains, 20), name
    assert extra["diverging"].dtype == bool
    accept = np.asarray(extra["accept_prob"])
    assert np.all((accept >= 0) & (accept <= 1))
    assert np.all(np.isfinite(extra["log_weight"]))
    energy = jax.vmap(jax.vmap(lambda z: potential_energy(model, (Y,), {}, z)))(
        {"mu": extra["z.mu"], "s": extra["z.s"]}
    )
    np.testing.assert_allclose(extra["potential_energy"], energy, rtol=1e-4, atol=1e-4)

    state = mcmc.last_state
    shared = method == "shared"
    assert not is_prng_key(state.rng_key)  # one for every chain
    assert state.learned.loss.shape == ((WARMUP,) if shared else (chains, WARMUP))
    assert np.all(np.asarray(state.i) == WARMUP + 20)
    if shared:  # the same kernel again, for data of another shape and a model of other sites
        offset = np.arange(5, dtype=np.float32)
        mcmc.run(make_key(1), offset, offset=offset)
        again = mcmc.get_samples(group_by_chain=True)
        assert set(again) == {"mu", "s", "slope", "twice"}
        assert again["slope"].shape == (4, 20)


# ------------------------------------------------------------------ one trained run, asked many things
class Trained:
    def __init__(self, kind):
        self.kind = kind
        self.mcmc = self.build()
        TRACES.clear()
        self.mcmc.run(random.key(0), Y)
        self.traces = TRACES["model"]
        self.samples = self.mcmc.get_samples()
        self.state = self.mcmc.last_state
        self.pickled = pickle.dumps(self.mcmc)
        self.mcmc.post_warmup_state = self.state
        self.mcmc.run(random.key(1), Y)
        self.more = self.mcmc.get_samples()
        TRACES.clear()
        self.mcmc.run(random.key(2), Y)
        self.retraces = TRACES["model"]

    def build(self, **options):
        kernel = make(self.kind, model, metropolis=False)
        return MCMC(kernel, num_warmup=WARMUP, num_samples=DRAWS, progress_bar=True, **options)


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    return Trained(request.param)


def test_proposals_never_repeat(trained):
    every = np.concatenate([rows(trained.samples), rows(trained.more)])
    assert len(np.unique(every, axis=0)) == len(every) == 2 * DRAWS


def test_a_run_continues_without_training_again(trained):
    state = trained.mcmc.last_state
    assert trained.state.i == WARMUP + DRAWS
    assert state.i == WARMUP + 2 * DRAWS  # the last run too started from `trained.state`
    assert np.all(np.isfinite(trained.state.learned.loss[:4]))
    assert_same_tree(trained.state.learned, state.learned)
    assert not np.array_equal(trained.more["mu"], trained.mcmc.get_samples()["mu"])  # two keys


def test_the_model_is_traced_a_bounded_number_of_times(trained):
    assert 0 < trained.traces <= 24
    # `sample` is not traced again; the driver itself maps the first state to the model's sites once
    assert trained.retraces <= 1


def test_warmup_then_run_is_run_and_thinning_takes_every_third(trained):
    mcmc = trained.build(thinning=3)
    mcmc.warmup(random.key(0), Y)
    assert mcmc.post_warmup_state.i == WARMUP
    mcmc.run(mcmc.post_warmup_state.rng_key, Y)
    assert_same_tree(mcmc.get_samples(), {k: v[2::3] for k, v in trained.samples.items()})
    assert_same_tree(mcmc.last_state.learned, trained.state.learned)
    mcmc.run(random.key(5), Y)
    assert not np.any(np.isin(mcmc.get_samples()["mu"], trained.samples["mu"]))


def test_pickled_runs_and_kernels_go_on(trained):
    kernel = pickle.loads(pickle.dumps(trained.mcmc.sampler))
    assert type(kernel) is type(trained.mcmc.sampler)
    assert kernel.samplers(trained.state, (Y,))[0].draw(random.key(0), 10).x.shape == (10, 3)
    mcmc = pickle.loads(trained.pickled)
    assert_same_tree(mcmc.get_samples(), trained.samples)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(random.key(1), Y)
    assert_same_tree(mcmc.get_samples(), trained.more)
    found = report(mcmc, num_proposals=500)
    assert found.verdict in ("caution", "unreliable")  # raw draws are never called reliable
    assert not found.corrected
    assert np.isfinite(found.log_evidence)
    assert found.training.shape == (WARMUP,)


# ------------------------------------------------------------------ arguments, transformations
@one_kind_quickly
def test_jitted_arguments_give_each_data_set_its_posterior(kind):
    kernel = make(kind, model, learning_rate=1e-2)
    mcmc = MCMC(kernel, num_warmup=100, num_samples=4000, progress_bar=True, jit_model_args=True)
    for seed, y in enumerate(([2.0], [-1.0])):
        y = np.array(y, np.float32)
        mcmc.run(random.key(seed), y)
        mu = np.asarray(mcmc.get_samples()["mu"])
        ess = effective_sample_size(mu[None])
        error = np.sqrt(1 / 2 / ess)
        assert ess > 100
        assert abs(mu.mean() - y.sum() / 2) < 5 * error


@pytest.mark.slow
@both_kinds
def test_simulation_based_calibration_in_jit_and_vmap(kind):
    num_sims, num_draws = 64, 60

    def rank(key):
        key_mu, key_y, key_run = random.split(key, 3)
        mu = random.normal(key_mu)
        y = mu + random.normal(key_y, (1,))
        mcmc = MCMC(make(kind, model), num_warmup=WARMUP, num_samples=num_draws, progress_bar=False)
        mcmc.run(key_run, y)
        return jnp.mean(mcmc.get_samples()["mu"] < mu)

    ranks = np.asarray(jax.jit(jax.vmap(rank))(random.split(random.key(0), num_sims)))
    assert ranks.shape == (num_sims,)
    assert len(np.unique(ranks)) > 10
    # autocorrelation pushes ranks outwards, at most to a fair coin
    assert abs(ranks.mean() - 0.5) < 5 * np.sqrt(1 / 4 / num_sims)


@one_kind_quickly
@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tracers_do_not_leak(kind, shared):
    # of the kernel; `MCMC` under `jit` leaves tracers in JAX's caches, with NUTS too
    def advance(key, y):
        kernel = make(kind, model, shared=shared)
        state = kernel.init(random.split(key, 2), WARMUP, None, model_args=(y,), model_kwargs={})
        return kernel.sample(state, (y,), {}).z

    with jax.checking_leaks():
        jax.jit(advance).trace(random.key(0), Y)


@both_kinds
@pytest.mark.parametrize("shared", [True, False])
def test_training_is_skipped_after_warmup_not_masked_out(kind, shared):
    # a batched iteration counter would turn the branch into a `select` that runs both sides
    kernel = make(kind, model, shared=shared)
    state = kernel.init(random.split(random.key(0), 2), WARMUP, None, model_args=(Y,), model_kwargs={})
    TRACES.clear()
    lowered = jax.jit(kernel.sample).lower(state, (Y,), {})
    assert 0 < TRACES["model"] <= 16  # in training, in both ways to propose, and in the local move
    entry = lowered.as_text(dialect="hlo").split("ENTRY")[1]
    assert "conditional(" in entry
    branches = [
        eqn
        for eqn in jax.make_jaxpr(kernel.sample)(state, (Y,), {}).jaxpr.eqns
        if eqn.primitive.name == "cond"
    ]
    assert [eqn.invars[0].aval.shape for eqn in branches] == [()]


# ------------------------------------------------------------------ double precision
X64 = """
import jax, numpy as np
from jax import random
from numpyro.infer import MCMC
import test_kernel_driver as t
jax.config.update("jax_disable_most_optimizations", True)
for kind in t.KINDS:
    mcmc = MCMC(t.make(kind, t.model), num_warmup=6, num_samples=10, progress_bar=False)
    mcmc.run(random.key(0), t.Y.astype(float), extra_fields=("log_weight", "potential_energy"))
    drawn = jax.tree.leaves((mcmc.get_samples(), mcmc.get_extra_fields()))
    assert all(np.isfinite(leaf).all() for leaf in drawn)
    for leaves in (drawn, jax.tree.leaves(mcmc.last_state.learned)):
        print(kind, {str(leaf.dtype) for leaf in leaves if np.issubdtype(leaf.dtype, np.floating)})
"""


@pytest.mark.slow
def test_double_precision_gives_double_draws():
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", X64],
        env={**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{kind} {{'float64'}}" for kind in KINDS for _ in range(2)]


@pytest.mark.parametrize(
    ("always", "patience", "steps"), [(False, 100, 0), (True, 100, 10), (True, None, 40)]
)
def test_nothing_is_trained_where_the_warm_start_is_good_unless_it_is_asked_for(always, patience, steps):
    kernel = make(
        "dis",
        lambda: numpyro.sample("mu", dist.Normal(0.0, 1.0)),
        always=always,
        patience=patience,
        target_acceptance=None,
    )
    mcmc = MCMC(kernel, num_warmup=40, num_samples=100, progress_bar=False)
    mcmc.run(random.key(0))
    found = report(mcmc)
    assert found.training_steps == steps
    assert found.evaluations.training == Evaluations(gradients=steps * 16 * 5)
    assert abs(found.log_evidence) < 1e-3 + 5 * found.log_evidence_se
