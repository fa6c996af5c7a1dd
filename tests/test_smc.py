# SPDX-License-Identifier: Apache-2.0
"""Proposals chosen among several: unbiased, exact, and used where single ones are poor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KERNELS, assert_within, build, run_chains, shaken, transport, two_modes
from test_exactness import largest_z_score

from numpyro_sbtm import Correction, report
from numpyro_sbtm.core import importance, simulate
from numpyro_sbtm.core.mixture import normal
from numpyro_sbtm.core.smc import independent_ensemble, path_ensemble
from numpyro_sbtm.networks import score_mlp

SMALL = {
    "dis": {"num_steps": 8, "num_paths": 64, "num_times": 8},
    "sbtm": {"num_particles": 512, "batch_size": 256, "num_maps": 2, "scale": 1.0},
}


def paths(target):
    process, params = shaken(2, num_steps=6, size=0.3)
    single = jax.vmap(lambda key: simulate(process, params, target, key).log_weight)
    return path_ensemble(process, target, 8), params, lambda key, n: single(jax.random.split(key, n))


def flows(target):
    algorithm = transport(target, score_mlp(8), optax.adam(1e-3), num_particles=128, num_maps=3)
    state = algorithm.init(jax.random.key(0))
    for k in range(3):
        state, _ = algorithm.step(jax.random.key(k), state)
    maps = algorithm.parameters(state)
    return (
        independent_ensemble(algorithm.proposal, 8),
        maps,
        lambda key, n: algorithm.proposal.draw(key, maps, n).log_weight,
    )


def mixtures(target):
    proposal = importance(target, normal(2, 2.5))
    return independent_ensemble(proposal, 8), None, lambda key, n: proposal.draw(key, None, n).log_weight


def test_a_draw_of_a_mixture_weighs_what_its_point_weighs():
    target = two_modes()
    proposal = importance(target, normal(2, 2.5))
    draws = proposal.draw(jax.random.key(0), None, 4000)
    again = jax.vmap(lambda x: proposal.weigh(jax.random.key(1), None, x))(draws.x)
    np.testing.assert_allclose(draws.log_weight, again, atol=1e-5)
    np.testing.assert_allclose(draws.logdensity, jax.vmap(target.logdensity_fn)(draws.x), atol=1e-5)
    weight = np.exp(np.asarray(draws.log_weight, float))
    assert_within(weight.mean(), 1.0, weight.std() / np.sqrt(4000))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [paths, flows, mixtures])
def test_weights_of_ensembles_are_unbiased_both_ways(make):
    target, n = two_modes(), 3000
    ensemble, state, single = make(target)
    draws = jax.jit(lambda key: ensemble.draw(key, state, n))(jax.random.key(1))
    weight = np.exp(np.asarray(draws.log_weight))
    # of the logarithms: the variance of the weights themselves hangs on the largest
    assert jnp.std(draws.log_weight) < 0.6 * jnp.std(jax.jit(lambda key: single(key, n))(jax.random.key(2)))
    np.testing.assert_allclose(draws.logdensity, jax.vmap(target.logdensity_fn)(draws.x), rtol=1e-9)
    truth = np.asarray(target.sample(jax.random.key(3), 200_000))
    for feature in (lambda x: 1.0 + 0.0 * x, lambda x: x, lambda x: x**2, lambda x: 1.0 * (x > 0)):
        weighted = weight[:, None] * feature(np.asarray(draws.x))
        assert_within(weighted.mean(0), feature(truth).mean(0), weighted.std(0) / np.sqrt(n) + 1e-3)
    # from the posterior's side: the mean of 1/w over the pairs that chains leave invariant is 1/Z
    keys = jax.random.split(jax.random.key(4), n)
    back = jax.jit(jax.vmap(lambda key, x: ensemble.weigh(key, state, x)))(keys, jnp.asarray(truth[:n]))
    inverse = np.exp(-np.asarray(back))
    assert_within(inverse.mean(), 1.0, inverse.std() / np.sqrt(n))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_chains_of_a_narrow_proposal_turn_to_ensembles_and_stay_exact(kernel):
    target = two_modes()
    narrow = np.zeros(2), 0.35 * np.eye(2)
    sampler = build(
        KERNELS[kernel],
        None,
        lambda x: -target.logdensity_fn(x),
        precondition=narrow,
        smc_particles=16,
        **SMALL[kernel],
    )
    mcmc = run_chains(sampler, warmup=1, samples=2000, init_params=jnp.zeros((4, 2)))
    found = report(mcmc)
    assert found.ensemble and found.evidence_verdict != "reliable" and "chosen among several" in str(found)
    assert largest_z_score(mcmc.get_samples(group_by_chain=True), target) < 5.0


def test_few_particles_are_refused():
    with pytest.raises(ValueError, match="`num_particles` must be a whole number from 0 to 65536, got -1"):
        Correction(num_particles=-1)
