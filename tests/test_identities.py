# SPDX-License-Identifier: Apache-2.0
"""What holds exactly, for any parameters and any number of steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    STILL,
    assert_within,
    batch,
    correlated,
    evaluated,
    shaken,
    three_components,
    two_modes,
)

from numpyro_sbtm.core import (
    DiffusionOptions,
    Net,
    Target,
    diffusion,
    dis,
    kl,
    log_variance,
    noise_path,
    two_pass_gradient,
)
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.path import observe, reevaluate, simulate
from numpyro_sbtm.core.processes.grids import log_snr_grid
from numpyro_sbtm.core.target import value_and_score
from numpyro_sbtm.core.transport.annealing import conditional_ess
from numpyro_sbtm.core.weights import (
    clean,
    ess_fraction,
    log_evidence,
    log_variance_at,
    metropolis,
    reachable,
    resample,
)
from numpyro_sbtm.networks import denoiser
from numpyro_sbtm.targets import gaussian

pytestmark = pytest.mark.usefixtures("x64")
TARGETS = {"correlated": correlated, "two_modes": two_modes}


def two_pass(divergence, process, params, paths, times=None):
    return jax.jit(lambda p, t: two_pass_gradient(divergence, process, p, paths, t))(params, times)


@pytest.mark.parametrize("num_steps", [1, 4, 64])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_dis_on_its_own_prior_has_constant_weight(num_steps, scale):
    target = gaussian(np.zeros(3), scale**2 * np.eye(3))
    paths = batch(dis(STILL, 3, num_steps, scale), jnp.zeros(0), target, 0, 50)
    np.testing.assert_allclose(paths.log_weight, 0.0, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 4, 64])
def test_dis_on_its_reference_mixture_has_constant_weight(num_steps):
    mixture = three_components()
    still = Net(
        STILL.init, lambda params, t, x, score: (*STILL.apply(params, t, x, score)[:3], jnp.zeros(4, x.dtype))
    )
    process = dis(still, 2, num_steps, scale=1.3, reference=mixture)
    paths = batch(process, jnp.zeros(0), Target(mixture.log_prob, 2), 0, 50)
    np.testing.assert_allclose(paths.log_weight, 0.0, atol=1e-9)


def test_a_correction_of_one_moves_each_component_by_its_own_deviation():
    """Narrow components are not thrown off by a network that has yet to learn."""
    mixture = three_components()._replace(rotation=None)
    net = lambda size: Net(  # noqa: E731
        STILL.init, lambda params, t, x, score: (size + 0 * x, 0 * x, jnp.zeros(()), jnp.zeros(4))
    )
    last = jnp.array(3)  # its points are draws of x_T itself: no bridge is between
    moved, still = (
        dis(net(size), 2, 4, reference=mixture).forward(jnp.zeros(0), last, jnp.ones(2), jnp.ones(2))
        for size in (1.0, 0.0)
    )
    np.testing.assert_allclose(moved.centre - still.centre, still.std, rtol=1e-6)


def test_a_far_mode_is_not_thrown_off_by_the_first_updates():
    """Modes may lie a hundred deviations apart, where the whitening follows one of them."""
    mixture = Mixture(jnp.log(jnp.ones(2) / 2), None, jnp.array([[0.0], [100.0]]), jnp.ones((2, 1)))
    target = Target(lambda x: mixture.log_prob(x) + 0.1 * jnp.sum(jnp.sin(x)), 1)
    net = denoiser(16, num_components=2)
    process = dis(net, 1, num_steps=8, reference=mixture)
    algorithm = diffusion(
        target, process, net, log_variance(), optax.adam(2e-3), DiffusionOptions(num_paths=64)
    )
    state, step = algorithm.init(jax.random.key(0)), jax.jit(algorithm.step)
    for k in range(10):
        state, info = step(jax.random.key(k), state)
        assert info.loss < 1.0


def test_training_that_makes_it_worse_is_undone():
    mixture = three_components()
    target = Target(lambda x: mixture.log_prob(x) + 2.0, 2)
    net = denoiser(8, num_components=4)
    process = dis(net, 2, num_steps=4, reference=mixture)
    algorithm = diffusion(
        target, process, net, log_variance(), optax.sgd(-1e3), DiffusionOptions(num_paths=32)
    )
    key = jax.random.key(0)
    state = algorithm.init(key)
    perturbed = jax.tree.map(lambda leaf: leaf + 1e-3, state.params)
    state = state._replace(params=perturbed, average=perturbed, start=perturbed)
    advance = jax.jit(algorithm.step)
    for k in range(5):
        state, _ = advance(jax.random.fold_in(key, k), state)
    draw = jax.jit(
        lambda key, state, n: algorithm.proposal.draw(key, algorithm.parameters(state), n), static_argnums=2
    )
    blind = state._replace(progress=state.progress._replace(first=jnp.asarray(jnp.inf)))
    assert float(jnp.std(draw(key, blind, 100).log_weight)) > 1.0
    assert float(jnp.std(draw(key, state, 100).log_weight)) < 0.1


def test_training_that_leaves_no_finite_weight_is_undone():
    """No weight varies then: that is not the best, but the worst."""
    target, net = Target(lambda x: -0.5 * jnp.sum((x - 1.0) ** 2), 2), denoiser(8)
    process = dis(net, 2, num_steps=4)
    algorithm = diffusion(
        target, process, net, log_variance(), optax.adam(1e200), DiffusionOptions(num_paths=16)
    )
    key = jax.random.key(0)
    state = algorithm.init(key)
    advance = jax.jit(algorithm.step)
    for k in range(4):
        state, info = advance(jax.random.fold_in(key, k), state)
    assert float(info.loss) == 0.0  # no weight is left
    assert bool(state.progress.undone())
    assert np.all(np.isfinite(algorithm.proposal.draw(key, algorithm.parameters(state), 10).log_weight))


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_mean_weight_is_z_with_four_steps(name, mixture, look_ahead):
    # as wide as the targets: weights relative to a narrower one have no variance, and no standard error
    reference = three_components(widen=3.0) if mixture else None
    process, params = shaken(2, size=0.02, reference=reference, look_ahead=look_ahead)
    weight = jnp.exp(batch(process, params, TARGETS[name](), 1, 40_000).log_weight)
    assert float(jnp.std(weight)) > 0.1  # the process is wrong, so the check says something
    assert_within(jnp.mean(weight), 1.0, jnp.std(weight) / np.sqrt(weight.size))


def test_mean_weight_is_z_relative_to_a_constant():
    process, params = shaken(2, size=0.02)
    target = correlated()
    lifted = target._replace(logdensity_fn=lambda x: target.logdensity_fn(x) + 3.0)
    log_z, se = log_evidence(batch(process, params, lifted, 2, 20_000).log_weight)
    assert_within(log_z, 3.0, se)


@pytest.mark.parametrize(("detach", "look_ahead"), [(True, False), (False, False), (True, True)])
def test_evaluate_equals_simulate(detach, look_ahead):
    process, params = shaken(2, num_steps=6, look_ahead=look_ahead)
    path = batch(process, params, two_modes(), 3, 5, detach=detach)._replace(log_choice=None)
    again = evaluated(process, params, two_modes(), path.xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), path, again)


def test_looking_ahead_sees_the_score_where_the_path_will_end():
    net = denoiser(8, num_scores=2)
    process = dis(net, 2, 6, look_ahead=True)
    target, x = gaussian(np.array([0.5, -0.2]), np.diag([0.5, 0.8])), jnp.array([0.3, 0.7])
    for k in (1, 3):
        share = log_snr_grid(6)[k]
        excess = lambda x: value_and_score(target, x)[1] + x  # noqa: E731
        ahead = np.sqrt(share) * x + np.sqrt(share) * (1 - share) * excess(x)
        _, scores = observe(process, target, jnp.array(k), x)
        np.testing.assert_allclose(scores[0], excess(x) - x, rtol=1e-6)
        np.testing.assert_allclose(scores[1], excess(ahead) - ahead, rtol=1e-6)


def test_a_guess_off_the_target_does_not_end_a_path():
    process, params = shaken(2, num_steps=6, look_ahead=True)
    x, score = jnp.ones(2), jnp.array([1.0, -2.0])
    at_three = lambda *scores: process.forward(params, jnp.array(3), x, jnp.stack(scores)).log_prob(x)  # noqa: E731
    for nowhere in (jnp.nan, jnp.inf):
        assert np.isfinite(at_three(score, jnp.full(2, nowhere)))
    assert at_three(score, score) != at_three(score, jnp.zeros(2))


def test_simulation_goes_through_given_points():
    process, params = shaken(2, num_steps=6)
    path = jax.tree.map(lambda leaf: leaf[0], batch(process, params, two_modes(), 3, 1))
    free = jnp.arange(7) == 2
    given = jnp.where(free[:, None], jnp.nan, path.xs)
    through = jax.jit(lambda xs: simulate(process, params, two_modes(), jax.random.key(9), given=xs))
    again = through(path.xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), path, again)
    other = through(given)
    np.testing.assert_allclose(other.xs[~free], path.xs[~free], rtol=1e-9)
    assert np.all(np.abs(other.xs[2] - path.xs[2]) > 1e-3)
    expected = evaluated(process, params, two_modes(), other.xs[None]).log_weight[0]
    np.testing.assert_allclose(other.log_weight, expected, rtol=1e-9)


def test_reevaluate_puts_other_parameters_on_a_path():
    process, params = shaken(2)
    paths = batch(process, params, two_modes(), 3, 5)
    other = 1.1 * params
    expected = evaluated(process, other, two_modes(), paths.xs)
    found = jax.jit(jax.vmap(lambda path: reevaluate(process, other, path)))(paths)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected)


def test_backward_paths_bound_the_evidence_from_above():
    """E_Q[1/w] = 1/Z: the reverse identity, on paths that end in exact draws."""
    process, params = shaken(2, size=0.05)
    target = correlated()
    keys = jax.random.split(jax.random.key(4), 20_000)
    ends = target.sample(jax.random.key(5), keys.shape[0])
    xs = jax.jit(jax.vmap(lambda key, x: noise_path(process, params, target, key, x)))(keys, ends)
    log_weight = evaluated(process, params, target, xs).log_weight
    assert float(jnp.mean(log_weight)) > 0.0
    log_inverse, se = log_evidence(-log_weight)
    assert_within(log_inverse, 0.0, se)


def test_noise_paths_have_the_closed_form_marginals():
    share = log_snr_grid(5)
    target = gaussian(np.array([2.0]), np.eye(1))
    process = dis(STILL, 1, 5)
    keys = jax.random.split(jax.random.key(0), 20_000)
    end = jnp.array([2.0])
    xs = jax.jit(jax.vmap(lambda key: noise_path(process, jnp.zeros(0), target, key, end)))(keys)[..., 0]
    for k in range(5):
        sd = np.sqrt(1 - share[k])
        assert_within(jnp.mean(xs[:, k]), 2.0 * np.sqrt(share[k]), sd / np.sqrt(keys.shape[0]))
        assert_within(jnp.std(xs[:, k]), sd, sd / np.sqrt(2 * keys.shape[0]))


@pytest.mark.parametrize(
    "policy, clip, look_ahead", itertools.product(["on", "off"], [None, 2.0], [False, True])
)
def test_two_pass_gradient_equals_autodiff(policy, clip, look_ahead):
    process, params = shaken(2, num_steps=5, look_ahead=look_ahead)
    target, divergence = two_modes(), log_variance(clip)
    paths = batch(process, params, target, 6, 32)
    if policy == "off":  # the same points under other parameters
        params = 1.2 * params
        paths = jax.vmap(lambda path: reevaluate(process, params, path))(paths)

    def loss(params):
        return divergence.value(jax.vmap(lambda path: reevaluate(process, params, path))(paths))

    expected, gradient = jax.jit(jax.value_and_grad(loss))(params)
    value, found = two_pass(divergence, process, params, paths)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(found, gradient, rtol=1e-8, atol=1e-10)


def test_two_pass_gradient_equals_autodiff_through_a_detached_simulation():
    process, params = shaken(2, num_steps=5)
    target, divergence = two_modes(), log_variance(None)
    expected = jax.grad(lambda p: divergence.value(batch(process, p, target, 6, 32)))(params)
    _, found = two_pass(divergence, process, params, batch(process, params, target, 6, 32))
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_two_pass_gradient_takes_the_times_in_parts():
    """Whole or in parts of six times, and then memory does not grow with the times."""
    target, divergence, n, memory = two_modes(), log_variance(None), 1024, {}

    def compiled(num_steps):
        process, params = shaken(2, num_steps=num_steps)
        paths = batch(process, params, target, 6, n)
        gradient = jax.jit(lambda p, paths: two_pass_gradient(divergence, process, p, paths))
        return gradient.lower(params, paths).compile(), process, params, paths

    for num_steps in (6, 60):
        gradient, *_, paths = compiled(num_steps)
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(paths))
        memory[num_steps] = gradient.memory_analysis().temp_size_in_bytes - stored
    gradient, process, params, paths = compiled(12)
    expected = jax.grad(lambda p: divergence.value(batch(process, p, target, 6, n)))(params)
    np.testing.assert_allclose(gradient(params, paths)[1], expected, rtol=1e-8, atol=1e-10)
    assert memory[60] < 1.5 * memory[6]


def test_a_subset_of_times_is_unbiased():
    """The mean over all subsets of two of five times is the whole gradient, exactly."""
    process, params = shaken(2, num_steps=5)
    paths = batch(process, params, two_modes(), 7, 16)
    _, whole = two_pass(log_variance(), process, params, paths)
    subsets = jnp.array(list(itertools.combinations(range(5), 2)))
    one = lambda times: two_pass_gradient(log_variance(), process, params, paths, times)[1]  # noqa: E731
    gradients = jax.jit(jax.vmap(one))(subsets)
    assert float(jnp.max(jnp.abs(gradients - whole))) > 1e-6
    np.testing.assert_allclose(jnp.mean(gradients, 0), whole, rtol=1e-8, atol=1e-10)


def test_log_variance_gradient_is_twice_that_of_kl():
    """On policy, in expectation; tested at five standard errors on independent batches."""
    process, params = shaken(2, num_steps=3)
    target, direction = correlated(), jax.random.normal(jax.random.key(9), params.shape)

    def slopes(seed):
        paths = batch(process, params, target, seed, 64)
        _, lv = two_pass_gradient(log_variance(None), process, params, paths)
        klg = jax.grad(lambda p: kl().value(batch(process, p, target, seed, 64, detach=False)))(params)
        return jnp.dot(lv - 2 * klg, direction)

    found = jax.lax.map(slopes, jnp.arange(400))
    assert_within(jnp.mean(found), 0.0, jnp.std(found) / np.sqrt(found.size))


def test_log_variance_is_blind_to_constants_and_zero_at_the_optimum():
    process, params = shaken(2)
    paths = batch(process, params, correlated(), 8, 64)
    shifted = paths._replace(log_target=paths.log_target + 17.0)
    value = log_variance().value
    np.testing.assert_allclose(value(paths), value(shifted), rtol=1e-10)
    own = batch(dis(STILL, 2, 4), jnp.zeros(0), gaussian(np.zeros(2), np.eye(2)), 8, 64)
    assert float(value(own)) < 1e-20


def test_non_finite_paths_leave_no_trace_in_the_gradient():
    process, params = shaken(2)
    paths = batch(process, params, correlated(), 8, 20)
    poisoned = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), paths)
    without = jax.tree.map(lambda leaf: jnp.delete(leaf, 3, axis=0), paths)
    found = two_pass(log_variance(), process, params, poisoned)
    expected = two_pass(log_variance(), process, params, without)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


def test_weights_agree_with_their_definitions():
    weight = jnp.array([0.5, 2.0, 1.5, 0.0])
    log_z, se = log_evidence(jnp.log(weight))
    np.testing.assert_allclose(log_z, np.log(1.0))
    np.testing.assert_allclose(se, np.std(weight, ddof=1) / 2)
    np.testing.assert_allclose(ess_fraction(jnp.log(weight)), 16 / (4 * 6.5))
    assert clean(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0])).tolist() == [-jnp.inf, -jnp.inf, -jnp.inf, 1.0]
    chosen = resample(jax.random.key(0), jnp.log(weight), 40_000)
    share = jnp.bincount(chosen, length=4) / chosen.size
    assert_within(share[:3], weight[:3] / 4, np.sqrt(weight[:3] / 4 * (1 - weight[:3] / 4) / chosen.size))
    assert share[3] == 0


@pytest.mark.parametrize("acceptance", [0.3, 0.9])
def test_the_acceptance_of_normal_log_weights(acceptance):
    variance = log_variance_at(acceptance)
    noise = jax.random.normal(jax.random.key(0), (2, 100_000)) * variance**0.5
    # states of the chain have the proposals' law tilted by the weight
    _, prob = metropolis(jax.random.key(1), noise[0] + variance, noise[1])
    assert_within(jnp.mean(prob), acceptance, jnp.std(prob) / np.sqrt(prob.size))


def test_metropolis_detail():
    current = jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf, 0.0])
    proposed = jnp.array([np.log(0.25), 2.0, -5.0, -jnp.inf, jnp.nan])
    _, prob = metropolis(jax.random.key(0), current, proposed)
    np.testing.assert_allclose(prob, [0.25, 1.0, 1.0, 0.0, 0.0])
    accepts = jax.vmap(lambda key: metropolis(key, current, proposed)[0])(
        jax.random.split(jax.random.key(1), 10_000)
    )
    assert_within(jnp.mean(accepts[:, 0]), 0.25, np.sqrt(0.25 * 0.75 / 10_000))
    assert not jnp.any(accepts[:, 3:])


def test_fresh_weights_of_exact_draws_have_inverse_mean_one_over_z():
    """E[1 / w] = 1 / Z over draws of the target and backward paths: what a local move relies on."""
    target, net = two_modes(), denoiser(width=8)
    algorithm = diffusion(
        target, dis(net, 2, 4), net, log_variance(), optax.adam(1e-3), DiffusionOptions(num_paths=8)
    )
    state = algorithm.init(jax.random.key(0))
    state = state._replace(average=shaken(2, size=0.02)[1])
    draws = target.sample(jax.random.key(1), 40_000)
    keys = jax.random.split(jax.random.key(2), len(draws))
    inverse = jnp.exp(
        -jax.jit(jax.vmap(lambda key, x: algorithm.proposal.weigh(key, algorithm.parameters(state), x)))(
            keys, draws
        )
    )
    assert float(jnp.std(inverse)) > 0.1
    assert_within(jnp.mean(inverse), 1.0, jnp.std(inverse) / np.sqrt(len(draws)))


def test_training_stops_at_its_goal_and_not_before():
    net = denoiser(width=8)

    def finished(acceptance):
        algorithm = diffusion(
            gaussian(np.zeros(2), np.eye(2)), dis(net, 2, 4), net, log_variance(), optax.adam(1e-3),
            DiffusionOptions(num_paths=16, target_acceptance=acceptance),
        )  # fmt: skip
        step = lambda state, key: algorithm.step(key, state)  # noqa: E731
        keys = jax.random.split(jax.random.key(1), 120)
        return jax.jit(lambda: jax.lax.scan(step, algorithm.init(jax.random.key(0)), keys)[1].finished)()

    found = np.asarray(finished(0.98))  # the reference is the target: zero loss, once the window is full
    assert not found[:49].any() and found[60:].all()
    assert not np.asarray(finished(None)).any()


def test_clear_errors():
    process, params = shaken(2)
    with pytest.raises(ValueError, match="`divergence` must be detached"):
        two_pass_gradient(kl(), process, params, batch(process, params, correlated(), 0, 2))
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, got 0"):
        dis(STILL, 2, 0)


def test_weights_of_any_level_have_the_same_effective_fraction():
    """In float32, for log weights that are multiples of 1/16 and stay so half a million nats away."""
    near = jnp.round(16 * jax.random.normal(jax.random.key(0), (1000,))).astype(jnp.float32) / 16
    far = near - jnp.float32(2**19)
    for found in (ess_fraction, lambda w: log_evidence(w)[1], lambda w: reachable(w, 0.1)):
        np.testing.assert_allclose(found(far), found(near), rtol=1e-6)
    np.testing.assert_array_equal(*(resample(jax.random.key(1), w, 1000) for w in (near, far)))
    fractions = [conditional_ess(jnp.zeros(1000, jnp.float32), w) for w in (near, far)]
    np.testing.assert_allclose(*fractions, rtol=1e-6)
