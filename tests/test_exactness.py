# SPDX-License-Identifier: Apache-2.0
"""A badly trained sampler costs acceptance, never correctness; and the test that says so can fail."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_evidence, assert_within, build, correlated, run_chains, two_modes
from numpyro.diagnostics import effective_sample_size

from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, report

KERNELS = {
    "dis": lambda potential, **options: build(
        LogVarianceDISKernel,
        None,
        potential,
        num_steps=8,
        num_paths=64,
        num_times=8,
        precondition=None,
        **options,
    ),
    "sbtm": lambda potential, **options: build(
        SBTMKernel, None, potential, num_particles=512, batch_size=256, precondition=None, **options
    ),
}
KERNELS["noisy sbtm"] = partial(KERNELS["sbtm"], noisy=True)
KERNELS["adaptive sbtm"] = partial(KERNELS["sbtm"], tolerance=1e-2, solved_output=True)
KERNELS["annealed sbtm"] = partial(KERNELS["sbtm"], annealing="adaptive")
# annealed particles must arrive: E[1/w] is no test where hardly a draw of the target is proposed
WARMUP = {"annealed sbtm": 20}
TARGETS = {"correlated": correlated, "two_modes": two_modes}


def largest_z_score(x, target):
    """Compare means, second moments and the share of x_0 > 0 with exact draws; in standard errors."""
    truth = np.asarray(target.sample(jax.random.key(99), 1_000_000), float)
    features = lambda x: np.concatenate([x, x**2, x[..., :1] > 0.0], -1)  # noqa: E731
    found, true = features(np.asarray(x, float)), features(truth)
    ess = effective_sample_size(found)
    error = np.sqrt(true.var(0) / ess + true.var(0) / len(true))
    return np.abs((found.mean((0, 1)) - true.mean(0)) / error).max()


def run(kernel, target, correction, local=None, num_samples=5000):
    make = KERNELS[kernel]
    sampler = make(lambda x: -target.logdensity_fn(x), metropolis=correction, scale=2.0, local_kernel=local)
    return run_chains(
        sampler, warmup=WARMUP.get(kernel, 5), samples=num_samples, init_params=jnp.zeros((4, 2))
    )


@pytest.mark.parametrize(
    ("kernel", "name", "local"),
    [
        pytest.param("dis", "correlated", "hmc", marks=pytest.mark.slow),
        ("dis", "two_modes", None),
        pytest.param("dis", "two_modes", "nuts", marks=pytest.mark.slow),
        ("sbtm", "correlated", "mala"),
        ("sbtm", "two_modes", None),
        pytest.param("noisy sbtm", "two_modes", "hmc", marks=pytest.mark.slow),
        pytest.param("adaptive sbtm", "two_modes", None, marks=pytest.mark.slow),
        pytest.param("annealed sbtm", "two_modes", None, marks=pytest.mark.slow),
        pytest.param("sbtm", "two_modes", "hmc", marks=pytest.mark.slow),
    ],
)
def test_barely_trained_chains_are_exact(kernel, name, local):
    target = TARGETS[name]()
    mcmc = run(kernel, target, True, local)
    assert float(np.mean(mcmc.last_state.mean_accept_prob)) < 0.9  # the proposal is wrong
    assert largest_z_score(mcmc.get_samples(group_by_chain=True), target) < 5.0
    found = report(mcmc)
    assert_evidence(found)
    # from the other side, weights of exact draws: E[1/w] = 1/Z, and the two bounds enclose log Z
    sampler = mcmc.sampler.sampler(mcmc.last_state)
    log_weight = sampler.weigh(jax.random.key(8), target.sample(jax.random.key(7), 4000))
    inverse = jnp.exp(-log_weight)
    assert_within(jnp.mean(inverse), 1.0, jnp.std(inverse) / np.sqrt(4000))
    assert found.elbo < 0.0 < jnp.mean(log_weight)


@pytest.mark.parametrize("kernel", ["dis", "sbtm"])
def test_without_the_correction_the_same_test_fails(kernel):
    target = two_modes()
    mcmc = run(kernel, target, False)
    assert largest_z_score(mcmc.get_samples(group_by_chain=True), target) > 5.0
    found = report(mcmc)
    assert found.verdict != "reliable" and "UNCORRECTED" in str(found)
