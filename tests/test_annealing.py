# SPDX-License-Identifier: Apache-2.0
"""Transport on its way: annealed targets, held-out points, dissipation, and what it cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_within, correlated, transport, two_modes
from scipy.stats import norm

from numpyro_sbtm.core.mixture import normal
from numpyro_sbtm.core.quasi import quasi_normal
from numpyro_sbtm.core.score import divergence_of
from numpyro_sbtm.core.target import Target
from numpyro_sbtm.core.transition import standard_normal
from numpyro_sbtm.core.transport.annealing import (
    conditional_ess,
    convolution,
    dilation,
    geometric,
    next_level,
    tempering,
)
from numpyro_sbtm.core.transport.dissipation import dissipation
from numpyro_sbtm.core.transport.maps import velocity
from numpyro_sbtm.core.transport.velocity import ScoredPoints, affine_part, solve_output
from numpyro_sbtm.core.weights import ess_fraction, log_evidence
from numpyro_sbtm.networks import radial, score_mlp
from numpyro_sbtm.targets import gaussian, unequal_pair

NET = score_mlp(width=16)
PATHS = {
    "geometric": geometric,
    "adaptive": lambda: geometric(conditional_ess=0.8),
    "convolution": convolution,
    "dilation": dilation,
    "tempering": tempering,
}


def trained(target, std, num_maps, duration, learner=None, **options):
    sizes = {"num_particles": 1024, "num_updates": 5, "batch_size": 256}
    base = standard_normal(target.dim, std)
    learner = learner or (NET, optax.adam(3e-3))
    algorithm = transport(
        target, *learner, num_maps=num_maps, duration=duration, base=base, **(sizes | options)
    )
    keys = jax.random.split(jax.random.key(1), num_maps)
    run = jax.jit(lambda state: jax.lax.scan(lambda s, key: algorithm.step(key, s), state, keys)[0])
    return algorithm, run(algorithm.init(jax.random.key(0)))


# ------------------------------------------------------------------ paths of densities
@pytest.mark.parametrize("name", PATHS)
def test_paths_end_at_the_target(name):
    path, base, x = PATHS[name](), standard_normal(2), jnp.array([0.3, -1.0])
    last = path.at(two_modes(), base, jnp.ones(()))
    np.testing.assert_allclose(last.logdensity_fn(x), two_modes().logdensity_fn(x), rtol=1e-5)
    levels = [float(path.level(jnp.asarray(share))) for share in (0.0, 0.5, 0.8, 1.0)]
    assert 0.0 <= levels[0] < levels[1] < levels[2] == levels[3] == 1.0


def test_dilation_is_the_law_of_shrunk_draws():
    """Stein's identity E[x score] = -1 under λ x, which a score without the factor 1/λ violates."""
    x = 0.4 * two_modes().sample(jax.random.key(0), 20_000)
    density = dilation().at(two_modes(), standard_normal(2), jnp.asarray(0.4))
    zero = x * jax.vmap(jax.grad(density.logdensity_fn))(x) + 1.0
    assert_within(jnp.mean(zero, 0), 0.0, jnp.std(zero, 0) / np.sqrt(len(x)))


def test_convolution_is_the_law_of_noisy_draws():
    """E[w] = 1 and Stein's identity under λ x + √(1 - λ²) z, for z that is one of the path's points."""
    level, base = 0.4, standard_normal(2, 2.0)
    points = quasi_normal(8, 2)
    points = 2.0 * (points - points.mean(0))
    noise = jax.random.choice(jax.random.key(1), points, (20_000,))
    x = level * two_modes().sample(jax.random.key(0), 20_000) + np.sqrt(1 - level**2) * noise
    density = convolution(8).at(two_modes(), base, jnp.asarray(level))
    mixture = convolution(8).at(two_modes(), normal(2), jnp.asarray(level))
    assert np.isfinite(mixture.logdensity_fn(x[0]))
    zero = x * jax.vmap(jax.grad(density.logdensity_fn))(x) + 1.0
    assert_within(jnp.mean(zero, 0), 0.0, jnp.std(zero, 0) / np.sqrt(len(x)))
    wide = 4.0 * jax.random.normal(jax.random.key(2), (20_000, 2))
    proposal = jax.vmap(standard_normal(2, 4.0).log_prob)(wide)
    weight = jnp.exp(jax.vmap(density.logdensity_fn)(wide) - proposal)
    assert_within(jnp.mean(weight), 1.0, jnp.std(weight) / np.sqrt(len(wide)))


def test_next_level_keeps_the_conditional_effective_sample_fraction():
    x = jax.random.normal(jax.random.key(0), (4000,))
    weight, ratio = 0.3 * x, -4.0 * (x - 1.0) ** 2
    level = next_level(jnp.asarray(0.2), weight, ratio, 0.9)
    assert 0.2 < level < 1.0
    np.testing.assert_allclose(conditional_ess(weight, (level - 0.2) * ratio), 0.9, atol=1e-3)
    # points without a weight change nothing
    np.testing.assert_allclose(
        next_level(jnp.asarray(0.2), jnp.append(weight, -jnp.inf), jnp.append(ratio, jnp.nan), 0.9),
        level,
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", PATHS)
def test_annealed_flows_have_unbiased_weights(name):
    """Barely trained on the way: E[w] = Z for the target itself."""
    target = two_modes()
    algorithm, state = trained(target, 2.0, 20, 2.0, annealing=PATHS[name]())
    levels = np.asarray(state.levels)
    levels = levels[np.isfinite(levels)]
    assert levels[0] < 0.3 and np.all(np.diff(levels) >= 0) and state.level == 1.0
    assert int(jnp.argmin(state.divergence)) > 0
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(2), algorithm.parameters(state), 20_000
    )
    log_z, error = log_evidence(draws.log_weight)
    assert 1e-3 < error < 0.1
    assert_within(log_z, 0.0, error)


@pytest.mark.parametrize("path", [None, "dilation"])
def test_undefined_densities_are_left_out_of_the_divergence(path):
    """N(0, 1) without x > 1: the first law without its undefined draws is the target, and nothing beats it.

    Counted as very bad they would make transport crowd all draws together, far from the edge.
    """
    normal_law = gaussian(np.zeros(1), np.eye(1))
    target = Target(lambda x: jnp.where(x[0] > 1.0, jnp.nan, normal_law.logdensity_fn(x)), 1)
    annealing = None if path is None else PATHS[path]()
    algorithm, state = trained(target, 1.0, 10, 1.0, annealing=annealing, num_probes=4096, quasi=True)
    np.testing.assert_allclose(state.divergence[0], -norm.logcdf(1.0), atol=0.01)
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(2), algorithm.parameters(state), 20_000
    )
    log_weight = jnp.where(jnp.isfinite(draws.log_weight), draws.log_weight, -jnp.inf)
    assert ess_fraction(log_weight) > 0.8
    log_z, error = log_evidence(log_weight)
    assert_within(log_z, norm.logcdf(1.0), error)


# ------------------------------------------------------------------ held-out points
@pytest.fixture(scope="module")
def careful():
    """Transport to two modes with everything that looks at held-out points; and its step."""
    return trained(
        two_modes(),
        2.0,
        100,
        1.0,
        max_rounds=4,
        first_updates=500,
        quasi=True,
        num_particles=4096,
        num_probes=4096,
    )


def test_dissipation_is_the_fall_of_the_divergence(careful):
    """KL_0 - KL_K, from densities, is the sum of h D, from divergences of velocities."""
    _, state = careful
    steps, found = state.maps.step_size, state.dissipation
    fall = -np.diff(np.asarray(state.divergence))
    assert fall[:20].sum() > 0.3
    for part in (slice(0, 20), slice(20, 60)):
        np.testing.assert_allclose(jnp.sum((steps * found.dissipation)[part]), fall[part].sum(), rtol=0.08)


def test_the_first_velocity_is_that_of_the_known_score():
    near = unequal_pair(2.0)
    _, state = trained(near, 1.0, 1, 0.01, max_rounds=4, first_updates=1000, quasi=True, num_probes=4096)
    x = jax.random.normal(jax.random.key(3), (100_000, 1))
    v = jax.vmap(lambda y: jax.grad(near.logdensity_fn)(y) + y)(x)
    exact = jnp.mean(jnp.sum(v * v, -1))
    np.testing.assert_allclose(state.dissipation.fisher[0], exact, rtol=0.03)
    np.testing.assert_allclose(state.dissipation.dissipation[0], exact, rtol=0.03)


def test_kernel_scores_need_no_training():
    """Radial functions, solved for at every map: the first velocity is known; weights have mean Z."""
    near = unequal_pair(2.0)
    algorithm, state = trained(near, 1.0, 40, 1.0, (radial(), None), quasi=True, num_probes=4096)
    x = jax.random.normal(jax.random.key(3), (100_000, 1))
    v = jax.vmap(lambda y: jax.grad(near.logdensity_fn)(y) + y)(x)
    np.testing.assert_allclose(state.dissipation.fisher[0], jnp.mean(jnp.sum(v * v, -1)), rtol=0.03)
    # later velocities are learned from the particles alone; where they are right both estimates agree
    np.testing.assert_allclose(
        state.dissipation.residual, 0.0, atol=0.05 * float(state.dissipation.fisher[0])
    )
    assert jnp.all(state.dissipation.trusted())
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(2), algorithm.parameters(state), 20_000
    )
    log_z, error = log_evidence(draws.log_weight)
    assert 1e-4 < error < 0.02
    assert_within(log_z, near.log_z, error)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.usefixtures("x64")
def test_the_output_layer_solves_score_matching(dim):
    """The solved layer is where the gradient of the score matching loss with its ridge vanishes."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(512, dim)) @ (np.eye(dim) + 0.3 * rng.normal(size=(dim, dim))))
    cloud = ScoredPoints(x, -x - 2.0 * jnp.sin(2.0 * x))
    net = score_mlp(width=8, depth=1)
    params = net.init(jax.random.key(0), dim)
    layer = jnp.arange(9.0 * dim) / dim
    params = params.at[-9 * dim :].set(layer)
    np.testing.assert_allclose(
        net.apply(params, x[0]), layer.reshape(9, dim).T @ net.features(params, x[0]), rtol=1e-12
    )
    current = affine_part(cloud, params)
    solved = solve_output(net, current, cloud, cloud)

    def loss(layer, size):
        one = current._replace(params=params.at[-9 * dim :].set(layer))
        field = lambda y: velocity(net, one, y)  # noqa: E731
        v = jax.vmap(field)(x)
        slopes = jax.vmap(lambda y: divergence_of(field, y, None))(x)
        penalty = size * jnp.sum((layer.reshape(9, dim) @ current.whitener) ** 2)
        return jnp.mean(jnp.sum(v * (v - 2.0 * cloud.scores), -1) - 2.0 * slopes) + penalty

    found = solved.params[-9 * dim :]
    phi = jax.vmap(lambda y: net.features(params, current.whitener @ (y - current.mean)))(x)
    # the points that choose are those that are fitted, which want the weakest ridge
    size = 1e-2 * jnp.mean(phi**2)
    before, after = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(jnp.stack([layer, found]), size)
    assert jnp.abs(after).max() < 1e-9 * jnp.abs(before).max()


@pytest.mark.parametrize("heun", [False, True])
def test_scores_with_a_solved_output_layer_follow_the_exact_flow(heun):
    """Two modes from N(0, 1): F̂ is that of the Fokker-Planck equation, on its way to an eighth."""
    near = unequal_pair(2.0)
    options = {
        "max_rounds": 4,
        "first_updates": 500,
        "quasi": True,
        "num_particles": 4096,
        "num_probes": 4096,
    }
    algorithm, state = trained(near, 1.0, 50, 1.0, solved_output=True, heun=heun, **options)
    # F of the exact flow at these times, by finite volumes (benchmarks/transport.py)
    t, exact = np.array([0.0, 0.2, 0.5, 0.8]), np.array([2.5848, 1.4219, 0.6830, 0.3500])
    fisher = state.dissipation.fisher[np.round(t / 0.02).astype(int)]
    np.testing.assert_allclose(fisher, exact, rtol=0.04 if heun else 0.06)
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(2), algorithm.parameters(state), 20_000
    )
    log_z, error = log_evidence(draws.log_weight)
    assert 1e-4 < error < 0.02
    assert_within(log_z, near.log_z, error)


@pytest.mark.parametrize("dim", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_dissipation_of_a_normal_law_in_several_dimensions(dim):
    """N(0, v I) goes to N(0, I) with F = d (1-v)² / v: networks have nothing to add, and must not find it.

    Held-out points that share planes with the particles let them in, and F was ten times too large; with the
    particles' moments a little off, all maps are a little off.
    """
    first, steps = 1.0 - np.exp(-0.2), 60
    target = gaussian(np.zeros(dim), np.eye(dim))
    sizes = {"num_particles": 4096, "num_probes": 4096, "batch_size": 512}
    algorithm, state = trained(
        target, np.sqrt(first), steps, 0.12, max_rounds=8, first_updates=500, quasi=True, **sizes
    )
    # the particles have the first law's moments exactly
    np.testing.assert_allclose(state.maps.slope[0], (1.0 / first - 1.0) * np.eye(dim), atol=1e-3)
    t = np.cumsum(state.maps.step_size) - state.maps.step_size
    v = 1.0 - np.exp(-2.0 * (t + 0.1))
    np.testing.assert_allclose(state.dissipation.fisher, dim * (1.0 - v) ** 2 / v, rtol=0.05)
    # fresh draws follow: the divergence that is left is that of N(0, v I)
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(2), algorithm.parameters(state), 20_000
    )
    v = 1.0 - np.exp(-2.0 * (0.12 + 0.1))
    left = 0.5 * dim * (v - 1.0 - np.log(v))
    np.testing.assert_allclose(-jnp.mean(draws.log_weight), left, rtol=0.05)


def test_a_wrong_score_is_not_trusted():
    x = jax.random.normal(jax.random.key(0), (4096, 2))
    right, wrong = (dissipation(-a * x, jnp.full(4096, -2.0 * a), -2.0 * x) for a in (1.0, 0.5))
    assert right.trusted() and not wrong.trusted()
    assert wrong.dual < right.dual  # the bound is tight for the right one
    broken = dissipation((-x).at[0].set(jnp.nan), jnp.full(4096, -2.0), -2.0 * x)
    np.testing.assert_allclose(broken.dissipation, right.dissipation, rtol=0.01)


def test_fisher_information_alone_does_not_see_wrong_masses():
    """At rest in each of two far modes F is next to nothing, and the divergence is all there."""
    algorithm, state = trained(
        unequal_pair(), 1.0, 200, 5.0, max_rounds=4, first_updates=500, quasi=True, num_probes=2048
    )
    made = int(jnp.sum(state.maps.step_size > 0))
    assert state.dissipation.fisher[made - 1] < 0.01
    assert state.divergence[made] > 0.05
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(2), algorithm.parameters(state), 8000
    )
    shares = jax.vmap(unequal_pair().modes.membership)(draws.x)
    assert abs(jnp.mean(shares[:, 0]) - 0.25) > 0.1
    # weights see it, and repair it
    assert abs(jax.nn.softmax(draws.log_weight) @ shares[:, 0] - 0.25) < 0.02
    assert abs(log_evidence(draws.log_weight)[0]) < 0.02


def test_networks_that_do_not_help_on_held_out_points_are_left_out():
    """Particles that stay normal need the affine part alone, and few of them would be overfitted."""
    target = gaussian(np.zeros(1), np.eye(1))
    options = {"num_particles": 100, "batch_size": 100, "num_probes": 100}
    _, careful = trained(target, 0.4, 100, 2.0, max_rounds=4, **options)
    _, careless = trained(target, 0.4, 100, 2.0, **options)
    size = lambda state: float(jnp.mean(jnp.any(state.maps.params != 0.0, -1)))  # noqa: E731
    assert size(careful) < 0.3 and size(careless) == 1.0
    assert careful.divergence.min() < careless.divergence.min()


@pytest.mark.parametrize("dim", [1, 3])
def test_quasi_normal_points_have_the_moments_of_the_normal_distribution(dim):
    for key in (None, jax.random.key(0), jax.random.key(1)):
        x = quasi_normal(4096, dim, key)
        assert x.shape == (4096, dim)
        # a tenth of the error of independent points
        assert float(jnp.abs(jnp.mean(x, 0)).max()) < 0.1 / 64 * 3
        np.testing.assert_allclose(jnp.cov(x.T).reshape(dim, dim), np.eye(dim), atol=0.01)
    assert not np.allclose(x, quasi_normal(4096, dim))


def test_random_shifts_leave_means_unbiased():
    means = jax.vmap(lambda key: jnp.mean(quasi_normal(8, 2, key) ** 2, 0))(
        jax.random.split(jax.random.key(0), 4000)
    )
    assert_within(jnp.mean(means, 0), 1.0, jnp.std(means, 0) / np.sqrt(4000))


def test_clear_errors():
    wrong = {
        "hold": lambda: geometric(hold=1.0),
        "first": lambda: dilation(first=0.0),
        "num_points": lambda: convolution(1),
    }
    for argument, path in wrong.items():
        with pytest.raises(ValueError, match=f"`{argument}` must be"):
            path()
    with pytest.raises(ValueError, match="`conditional_ess` must lie between 0 and 1, got 2"):
        geometric(conditional_ess=2.0)
    with pytest.raises(ValueError, match=r"`annealing` is .* and asks for a flow.*noisy=False"):
        transport(correlated(), NET, optax.sgd(1.0), noisy=True, annealing=geometric())
    with pytest.raises(ValueError, match=r"`preconditioned` asks for a flow.*noisy=False"):
        transport(correlated(), NET, optax.sgd(1.0), noisy=True, preconditioned=True)
    with pytest.raises(ValueError, match="`quasi` needs a `base` that is a `Gaussian`, got Mixture"):
        transport(correlated(), NET, optax.sgd(1.0), base=normal(2), quasi=True)
    with pytest.raises(ValueError, match=r"`solved_output` needs a `net` with `features`.*got no features"):
        transport(correlated(), radial(), optax.sgd(1.0), solved_output=True)
    with pytest.raises(ValueError, match=r"`solved_output` needs .* an `optimiser`.*got None"):
        transport(correlated(), NET, None, solved_output=True)
