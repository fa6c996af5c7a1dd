# SPDX-License-Identifier: Apache-2.0
"""Runs that go on: under other data, other keys, a longer warm-up, in another process, with other chains."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from test_kernel_driver import make, one_kind_quickly

from numpyro_sbtm import learned as before_draws
from numpyro_sbtm import report
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import Affine, Triangular
from numpyro_sbtm.core.maps.spline import fit_margins
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.kernels.fingerprint import fingerprint
from numpyro_sbtm.search.located import Located

WARMUP = 6


def conjugate(y):
    """N(Σ y / (n + 1), 1 / (n + 1))."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def run(kernel, *args, num_samples=20, num_warmup=WARMUP, seed=0, **options):
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False, **options)
    mcmc.run(random.key(seed), *args)
    return mcmc


# ------------------------------------------------------------------ other data
@one_kind_quickly
@pytest.mark.parametrize("jitted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_state_weighed_under_other_data_is_weighed_anew(kind, jitted):
    mcmc = run(make(kind, conjugate, steps_per_draw=2), np.zeros(2, np.float32), jit_model_args=jitted)
    old = mcmc.last_state
    mcmc.post_warmup_state = old
    mcmc.num_samples = 600
    mcmc._set_collection_params()
    mcmc.run(random.key(1), np.full(2, 4.0, np.float32))
    mu = np.asarray(mcmc.get_samples(group_by_chain=True)["mu"])
    ess = effective_sample_size(mu)
    assert ess > 50
    assert abs(mu.mean() - 8 / 3) < 5 * (1 / 3 / ess) ** 0.5
    assert abs(mu.std() - (1 / 3) ** 0.5) < 5 * (1 / 3 / 2 / ess) ** 0.5
    new = mcmc.last_state
    assert new.chain.num_draws == 600  # counted anew
    assert not np.array_equal(new.data, old.data)
    np.testing.assert_array_equal(new.learned.data, old.data)
    assert report(mcmc, num_proposals=500).verdict != "reliable"


def test_fingerprints_tell_data_apart():
    y = np.arange(6.0)
    every = [
        (y,),
        (y + 1e-6,),
        (y[::-1].copy(),),
        (y.reshape(2, 3),),
        (y.astype(int),),
        (y[:5],),
        (y, y),
        (y, None),
        ({"y": y},),
        ({"x": y},),
        (np.zeros(0),),
        (1,),
        (1.0,),
        ("a",),
        ("b",),
        (y > 2,),
        (1 + 2j,),
        (random.key(0),),
        (random.key(1),),
    ]
    found = [fingerprint(args, {}) for args in every]
    assert len({tuple(f.tolist()) for f in found}) == len(every)
    traced = jax.jit(lambda *args: fingerprint(args, {}))
    for args, f in zip(every, found, strict=True):
        if not isinstance(args[0], str):
            np.testing.assert_array_equal(traced(*args), f)
    # in JAX's precision, whatever holds the numbers
    np.testing.assert_array_equal(fingerprint(y), fingerprint(jnp.asarray(y, jnp.float32)))


# ------------------------------------------------------------------ keys
@pytest.mark.parametrize("method", ["vectorized", pytest.param("sequential", marks=pytest.mark.slow)])
def test_warmup_then_run_is_run_and_the_first_chain_is_that_of_a_run_alone(method):
    def model():
        numpyro.sample("x", dist.Normal(0, 1))

    key, block = random.key(0), {"block_size": 512}  # one block will do: it is split among the chains
    mcmc = run(make("dis", model, **block), num_samples=10, num_chains=2, chain_method=method)
    expected = mcmc.get_samples()["x"]
    mcmc.warmup(key)
    mcmc.run(mcmc.last_state.rng_key)
    np.testing.assert_array_equal(mcmc.get_samples()["x"], expected)
    alone = MCMC(make("dis", model, **block), num_warmup=WARMUP, num_samples=10, progress_bar=False)
    alone.run(random.split(key)[0])
    np.testing.assert_allclose(expected[:10], alone.get_samples()["x"], atol=1e-5)


def test_continuations_share_nothing_and_need_no_more_training():
    y = np.zeros(2, np.float32)
    first = run(make("dis", conjugate, metropolis=False), y)
    state = first.last_state
    assert state.chain.used < state.chain.block.x.shape[0]  # a part of the block is left
    # an `MCMC` of longer warm-up takes the state as it is: it knows its own
    second = MCMC(first.sampler, num_warmup=200, num_samples=20, progress_bar=False)
    drawn = [first.get_samples()["mu"]]
    for seed in (1, 2, 1):
        second.post_warmup_state = state
        second.run(random.key(seed), y)
        drawn.append(second.get_samples()["mu"])
        assert second.last_state.learned.num_steps == state.learned.num_steps
    np.testing.assert_array_equal(drawn[1], drawn[3])  # one key, one run
    assert len(np.unique(np.concatenate(drawn[:3]))) == 60


# ------------------------------------------------------------------ other chains, other processes
def test_a_state_of_other_chains_is_refused():
    y = np.zeros(2, np.float32)
    kernel = make("dis", conjugate)
    state = kernel.init(random.split(random.key(0), 4), WARMUP, None, (y,), {})
    for chains in (1, 2):
        mcmc = MCMC(kernel, num_warmup=WARMUP, num_samples=5, num_chains=chains, chain_method="vectorized")
        mcmc.post_warmup_state = state
        with pytest.raises(ValueError, match=rf"`post_warmup_state` holds 4 chain.*runs {chains}"):
            mcmc.run(random.key(1), y)


def test_a_state_of_another_model_is_refused():
    def model(n):
        numpyro.sample("x", dist.Normal(jnp.zeros(n), 1.0))

    kernel = make("dis", model)
    mcmc = MCMC(kernel, num_warmup=WARMUP, num_samples=5, progress_bar=False)
    mcmc.post_warmup_state = kernel.init(random.key(0), WARMUP, None, (2,), {})
    with pytest.raises(ValueError, match=r"2 latent values, the model 3.*Run warm-up again"):
        mcmc.run(random.key(1), 3)


def _no_search(*args):
    raise AssertionError("the posterior was looked for again")


@pytest.mark.parametrize("by", ["model", "potential"])
def test_unpickled_runs_search_for_nothing(by, monkeypatch):
    y = np.zeros(2, np.float32)
    if by == "model":
        mcmc = run(make("dis", conjugate), y)
        args = (y,)
    else:
        kernel = make("dis", potential_fn=_bowl)
        mcmc = MCMC(kernel, num_warmup=WARMUP, num_samples=20, progress_bar=False)
        mcmc.run(random.key(0), init_params={"a": jnp.ones(2)})
        args = ()
    mcmc.post_warmup_state = mcmc.last_state
    data = pickle.dumps(mcmc)
    mcmc.run(random.key(1), *args)
    monkeypatch.setattr(before_draws, "find_start", _no_search)
    again = pickle.loads(data)
    assert np.isfinite(report(again, num_proposals=500).log_evidence)
    again.run(random.key(1), *args)
    jax.tree.map(np.testing.assert_array_equal, again.get_samples(), mcmc.get_samples())


def _bowl(z):
    return 0.5 * jnp.sum(z["a"] ** 2)


def test_chains_in_sequence_share_one_search_and_one_training(monkeypatch):
    searches = []
    find_start = before_draws.find_start
    monkeypatch.setattr(before_draws, "find_start", lambda *args: searches.append(1) or find_start(*args))
    y = np.zeros(2, np.float32)
    kernel = make(
        "dis", conjugate, precondition=(np.full(1, 3.0), np.eye(1))
    )  # so far off that it must learn
    mcmc = run(kernel, y, num_chains=3, chain_method="sequential")
    assert len(searches) == 1
    learned = mcmc.last_state.learned
    for spent in (learned.spent.gradients, learned.located.spent.values):
        assert spent[0] > 0 and not np.any(spent[1:])
    for leaf in jax.tree.leaves(learned.params):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))
    drawn = mcmc.get_samples(group_by_chain=True)["mu"]
    assert len(np.unique(drawn)) > 40
    assert kernel._run is None  # nothing of a run is left
    mcmc.run(random.key(1), y)  # another look
    assert len(searches) == 2


def test_chains_with_samplers_of_their_own_keep_all_modes_that_each_of_them_found(monkeypatch):
    kernel = make("dis", potential_fn=_bowl, shared=False)
    x = jnp.linspace(-3.0, 3.0, 64)[:, None]
    finds = iter([_found(x, num) for num in (1, 3)])
    monkeypatch.setattr(before_draws, "find_start", lambda *args: next(finds))
    state = kernel.init(random.split(random.key(0), 2), 1, {"a": jnp.zeros((2, 1))})
    assert next(finds, None) is None  # each chain searched
    weight = jnp.exp(state.learned.located.reference.log_weight)
    np.testing.assert_allclose(jnp.sort(weight)[:, -3:], [[0, 0, 1], [1 / 3] * 3], atol=1e-6)
    assert bool(jnp.isfinite(state.learned.loss).all())


def test_chains_with_samplers_of_their_own_may_have_been_found_by_different_looks(monkeypatch):
    kernel = make("dis", potential_fn=_bowl, shared=False)
    x = jnp.linspace(-3.0, 3.0, 64)[:, None]
    margins = fit_margins(0.5 * x**3, jnp.ones(64))
    bent = Triangular.affine(jnp.zeros(1), jnp.eye(1))._replace(margins=margins)
    finds = iter([_found(x, 1), _found(x, 1)._replace(whitening=bent)])
    monkeypatch.setattr(before_draws, "find_start", lambda *args: next(finds))
    state = kernel.init(random.split(random.key(0), 2), 1, {"a": jnp.zeros((2, 1))})
    whitening = state.learned.located.whitening
    for chain, expected in enumerate((Affine(jnp.zeros(1), jnp.eye(1)), bent)):
        own = jax.tree.map(lambda leaf, chain=chain: leaf[chain], whitening)
        for u in (-2.0, 0.5, 2.0):
            np.testing.assert_allclose(
                own.forward(jnp.full(1, u))[0], expected.forward(jnp.full(1, u))[0], atol=1e-5
            )


def _found(x, num):
    """What a search may have found in one dimension: so many modes."""
    centre = jnp.linspace(-2.0, 2.0, num)[:, None] if num > 1 else jnp.zeros((1, 1))
    mixture = Mixture(jnp.full(num, -jnp.log(num)), None, centre, jnp.ones((num, 1)))
    zero = jnp.zeros(())
    whitening = Affine(jnp.zeros(1), jnp.eye(1))
    spent, searched = Evaluations().as_arrays(), jnp.ones((), bool)
    return Located(whitening, mixture, x, zero, zero, zero, zero, zero, zero, zero > 1, None, spent, searched)


# ------------------------------------------------------------------ sizes of log densities
@pytest.mark.parametrize("size", [1e4, 1.4e6])
def test_evidences_of_any_size_in_single_precision(size):
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)
        numpyro.factor("many", -size)

    mcmc = run(make("dis", model), num_samples=500)
    truth = -size - 0.25 - 0.5 * np.log(4 * np.pi)
    found = report(mcmc)
    rounding = np.spacing(np.float32(size))  # of the model's own density: nothing can undo it
    assert abs(found.log_evidence - truth) < 0.05 + rounding
    assert abs(found.backward_log_evidence - truth) < 0.1 + rounding
    assert found.log_evidence_se < 0.05


# ------------------------------------------------------------------ nothing to sample
@pytest.mark.parametrize("num_chains", [1, 2])
@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_models_without_latent_values_run(num_chains, method):
    def model():
        numpyro.deterministic("x", jnp.array([1.0, 2.0]))
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.5)

    mcmc = run(make("dis", model), num_chains=num_chains, chain_method=method)
    assert mcmc.get_samples()["x"].shape == (20 * num_chains, 2)
    expected = -float(dist.Normal(0.0, 1.0).log_prob(0.5))
    np.testing.assert_allclose(mcmc.last_state.potential_energy, expected, rtol=1e-6)
    empty = run(make("dis", lambda: None), num_chains=num_chains, chain_method=method)
    assert empty.get_samples() == {}
    empty.print_summary()
