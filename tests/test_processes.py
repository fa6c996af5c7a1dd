# SPDX-License-Identifier: Apache-2.0
"""What holds exactly for every process and every divergence, at any number of steps and any parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import STILL, assert_within, batch, correlated, evaluated, run_chains, shaken, two_modes
from jax.flatten_util import ravel_pytree
from test_exactness import largest_z_score

from numpyro_sbtm import DiffusionKernel, report
from numpyro_sbtm.core import (
    evaluate,
    kl,
    kl_log_derivative,
    log_variance,
    noise_path,
    pair,
    rescaled,
    simulate,
    sub_trajectory_log_variance,
    trajectory_balance,
    two_pass_gradient,
)
from numpyro_sbtm.core.controlled import cosine_grid, vp_grid
from numpyro_sbtm.core.transition import Gaussian
from numpyro_sbtm.kernels import DIVERGENCES, PROCESSES
from numpyro_sbtm.networks import denoiser, potential
from numpyro_sbtm.targets import gaussian

CONTROLLED = [name for name in PROCESSES if name != "dis"]
every_process = pytest.mark.parametrize("name", CONTROLLED)


def process_of(name, num_steps=4, scale=1.0, size=0.1):
    """A process with a small network whose weights are all random."""
    net = denoiser(width=8)
    net = pair(net) if name == "bridge" else net
    params = net.init(jax.random.key(0), 2)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + size * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return PROCESSES[name](net, 2, num_steps, scale), jax.tree.unflatten(structure, noisy)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [name for name in CONTROLLED if name != "dis-euler"])
def test_an_untrained_process_has_constant_weight_on_its_reference(name):
    net = pair(STILL) if name == "bridge" else STILL
    process = PROCESSES[name](net, 3, 5, 1.7)
    target = gaussian(np.zeros(3), 1.7**2 * np.eye(3))
    paths = batch(process, net.init(jax.random.key(0), 3), target, 0, 50)
    np.testing.assert_allclose(paths.log_weight, 0.0, atol=1e-9)


@pytest.mark.usefixtures("x64")
@every_process
def test_weights_are_unbiased_both_ways(name):
    num_steps = {"cmcd": 16, "dis-euler": 64}.get(name, 4)  # these two diverge with long steps
    process, params = process_of(name, num_steps, scale=1.5, size=0.03)
    target, n = correlated(), 10_000
    weight = np.exp(np.asarray(batch(process, params, target, 1, n).log_weight))
    assert weight.std() > 0.1  # the process is wrong, so the check says something
    assert_within(weight.mean(), 1.0, weight.std() / np.sqrt(n))
    # from the target's side: E[1/w] = 1/Z on backward paths that end in exact draws
    keys, ends = jax.random.split(jax.random.key(4), n), target.sample(jax.random.key(5), n)

    @jax.jit
    @jax.vmap
    def inverse(key, x):
        xs = noise_path(process, params, target, key, x)
        return jnp.exp(-evaluate(process, params, target, xs).log_weight)

    found = np.asarray(inverse(keys, ends))
    assert_within(found.mean(), 1.0, found.std() / np.sqrt(n))


@pytest.mark.usefixtures("x64")
@every_process
def test_paths_and_gradients_do_not_depend_on_how_they_are_computed(name):
    process, params = process_of(name)
    target, divergence = two_modes(), log_variance(None)
    paths = batch(process, params, target, 3, 16)
    again = evaluated(process, params, target, paths.xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), paths, again)
    expected = jax.grad(lambda p: divergence.value(batch(process, p, target, 3, 16)))(params)
    _, found = jax.jit(lambda p: two_pass_gradient(divergence, process, p, paths))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), found, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["pis", "cmcd"])
def test_a_moved_process_has_the_same_weights_on_the_moved_target(name):
    process, params = process_of(name)
    loc, scale = jnp.array([3.0, -1.0]), jnp.array([0.5, 4.0])
    moved = rescaled(process, loc, scale)
    target = correlated()
    there = target._replace(
        logdensity_fn=lambda x: target.logdensity_fn((x - loc) / scale) - jnp.sum(jnp.log(scale))
    )
    here, paths = batch(process, params, target, 2, 20), batch(moved, params, there, 2, 20)
    np.testing.assert_allclose(paths.xs, loc + scale * here.xs, rtol=1e-9)
    np.testing.assert_allclose(paths.log_weight, here.log_weight, rtol=1e-7, atol=1e-7)


def test_grids_end_at_the_draw():
    for share in (cosine_grid(8, 5.0), vp_grid(8)):
        assert share[-1] == 1.0 and np.all(np.diff(share) > 0)
    np.testing.assert_allclose(cosine_grid(8, 5.0)[0], np.exp(-5.0))
    np.testing.assert_allclose(vp_grid(8)[0], np.exp(-5.05))


# ------------------------------------------------------------------ divergences
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["dds", "bridge"])
def test_the_log_derivative_gradient_is_that_of_kl(name):
    """In expectation, for a learned backward chain too; tested at five standard errors."""
    process, params = process_of(name, num_steps=3)
    target = correlated()
    direction = jnp.concatenate([jnp.cos(jnp.arange(leaf.size) * 1.0) for leaf in jax.tree.leaves(params)])

    def slope(seed):
        paths = batch(process, params, target, seed, 64)
        _, one = two_pass_gradient(kl_log_derivative(), process, params, paths)
        other = jax.grad(lambda p: kl().value(batch(process, p, target, seed, 64, detach=False)))(params)
        one, other = (ravel_pytree(gradient)[0] @ direction for gradient in (one, other))
        return one - other, other

    difference, size = jax.lax.map(slope, jnp.arange(600))
    error = jnp.std(difference) / np.sqrt(difference.size)
    assert float(jnp.abs(jnp.mean(size))) > 3.0 * float(error)  # there is something to agree on
    assert_within(jnp.mean(difference), 0.0, error)


@pytest.mark.usefixtures("x64")
def test_trajectory_balance_with_the_mean_as_log_z_is_log_variance():
    process, params = shaken(2)
    paths = batch(process, params, two_modes(), 3, 32)
    divergence = trajectory_balance(clip=None)
    mean = jnp.mean(paths.log_weight)
    value, gradient = two_pass_gradient(divergence, process, params, paths, extra=mean)
    expected, variance = two_pass_gradient(log_variance(None), process, params, paths)
    np.testing.assert_allclose(value, expected * 31 / 32, rtol=1e-9)
    np.testing.assert_allclose(gradient, variance * 31 / 32, rtol=1e-7, atol=1e-10)
    slope = jax.grad(lambda log_z: divergence.value(paths, log_z))(mean + 1.0)
    np.testing.assert_allclose(slope, 2.0, rtol=1e-9)  # log Z is led to the mean


@pytest.mark.usefixtures("x64")
def test_one_part_is_the_whole_path():
    process, params = shaken(2)
    paths = batch(process, params, two_modes(), 3, 32)
    divergence = sub_trajectory_log_variance(process, potential(8), num_segments=1, clip=None)
    extra = divergence.extra(jax.random.key(0), 2)
    found = two_pass_gradient(divergence, process, params, paths, extra=extra)
    expected = two_pass_gradient(log_variance(None), process, params, paths)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10), found, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_segments", [2, 3, 5])
def test_parts_of_paths_add_up_whatever_is_guessed_between(num_segments):
    """The variance of a sum of M parts, that of the log weight, is at most M times the sum of theirs."""
    process, params = shaken(2, num_steps=5)
    paths = batch(process, params, two_modes(), 3, 200)
    divergence = sub_trajectory_log_variance(process, potential(8), num_segments, clip=None)
    extra = divergence.extra(jax.random.key(0), 2)
    extra = extra + 0.3 * jax.random.normal(jax.random.key(1), extra.shape)
    parts = float(divergence.value(paths, extra))
    assert float(log_variance(None).value(paths)) < num_segments * parts
    # a path that is not finite is left out, and takes no gradient with it
    gradient = jax.grad(divergence.value, argnums=1)(paths, extra)
    broken = paths._replace(xs=paths.xs.at[0].set(jnp.nan), log_target=paths.log_target.at[0].set(jnp.nan))
    rest = jax.tree.map(lambda leaf: leaf[1:], paths)
    for one, other in zip(
        jax.value_and_grad(divergence.value, argnums=1)(broken, extra),
        jax.value_and_grad(divergence.value, argnums=1)(rest, extra),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-10)
    assert float(jnp.max(jnp.abs(gradient))) > 0.0


@pytest.mark.usefixtures("x64")
def test_parts_agree_where_the_process_is_its_own_reversal():
    """Untrained dis on its reference: every part is exact, not just the whole."""
    process, params = shaken(2, num_steps=6, size=0.0)
    target = gaussian(np.zeros(2), np.eye(2))
    paths = batch(process, params, target, 0, 50)
    divergence = sub_trajectory_log_variance(process, potential(8), num_segments=3)
    assert float(divergence.value(paths, divergence.extra(jax.random.key(0), 2))) < 1e-18


@pytest.mark.parametrize("num_segments", [0, 5])
def test_parts_need_steps(num_segments):
    process, _ = shaken(2)
    with pytest.raises(ValueError, match=f"`num_segments` must be between 1 and 4, got {num_segments}"):
        sub_trajectory_log_variance(process, potential(8), num_segments)


@pytest.mark.usefixtures("x64")
def test_log_variance_per_start_does_not_see_the_law_of_the_start():
    """The time reversal of N(0, I), started elsewhere: given x_0 the laws agree."""
    process, params = shaken(2, size=0.0)
    process = process._replace(init=Gaussian(jnp.ones(2), 3.0 * jnp.ones(2)))
    target = gaussian(np.zeros(2), np.eye(2))
    starts = jnp.repeat(jax.vmap(process.init.sample)(jax.random.split(jax.random.key(0), 8)), 4, 0)
    given = jnp.full((32, process.num_steps + 1, 2), jnp.nan).at[:, 0].set(starts)
    one = lambda key, xs: simulate(process, params, target, key, given=xs)  # noqa: E731
    paths = jax.vmap(one)(jax.random.split(jax.random.key(1), 32), given)
    assert float(log_variance().value(paths)) > 1.0
    assert float(log_variance(paths_per_start=4).value(paths)) < 1e-18


# ------------------------------------------------------------------ as a kernel
PAIRS = [(name, "log-variance") for name in PROCESSES]
PAIRS += [("dis", name) for name in DIVERGENCES if name != "log-variance"]


@pytest.mark.slow
@pytest.mark.parametrize(("process", "divergence"), PAIRS)
def test_barely_trained_kernels_are_exact(process, divergence):
    target = two_modes()
    kernel = DiffusionKernel(
        None,
        lambda x: -target.logdensity_fn(x),
        process=process,
        divergence=divergence,
        precondition=None,
        num_steps=8,
        num_paths=64,
        num_times=8,
        smc_particles=0,
    )
    mcmc = run_chains(kernel, warmup=20, samples=3000, init_params=jnp.zeros((4, 2)))
    assert largest_z_score(mcmc.get_samples(group_by_chain=True), target) < 5.0
    found = report(mcmc)
    assert abs(found.log_evidence) < 5.0 * found.log_evidence_se
    assert np.isfinite(found.training).all() and found.skipped_updates == 0


def test_unknown_processes_and_divergences_are_refused():
    with pytest.raises(ValueError, match=r"`process` must be one of .*, got .ddpm."):
        DiffusionKernel(None, lambda x: 0.0, process="ddpm")
    with pytest.raises(ValueError, match=r"`divergence` must be one of .*, got .hellinger."):
        DiffusionKernel(None, lambda x: 0.0, divergence="hellinger")
    with pytest.raises(ValueError, match="multiple of the divergence's 16 paths per start, got 20"):
        run_chains(
            DiffusionKernel(None, lambda x: jnp.sum(x**2), divergence="log-variance-per-start", num_paths=20),
            warmup=1,
            init_params=jnp.zeros((4, 2)),
        )
