# SPDX-License-Identifier: Apache-2.0
"""The flow that score-based transport leaves behind, and score matching."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import assert_within, correlated, transport, two_modes

from numpyro_sbtm.core import Net, simulate
from numpyro_sbtm.core.score import divergence_of, implicit_score_loss
from numpyro_sbtm.core.target import Target
from numpyro_sbtm.core.transition import standard_normal
from numpyro_sbtm.core.transport.annealing import geometric
from numpyro_sbtm.core.transport.euler import euler_map, log_abs_det, spectral_norm
from numpyro_sbtm.core.transport.maps import Maps, pull, push
from numpyro_sbtm.core.transport.noisy import noisy_transport
from numpyro_sbtm.core.weights import log_evidence, log_variance_at, metropolis
from numpyro_sbtm.networks import score_mlp
from numpyro_sbtm.targets import gaussian

pytestmark = pytest.mark.usefixtures("x64")
NET = score_mlp(width=16)
STILL = Net(lambda key, dim: jnp.zeros(0), lambda params, x: 0.0 * x)


def trained(target, steps=12, net=NET, **options):
    sizes = {"num_particles": 512, "num_maps": 6, "num_updates": 4, "batch_size": 256}
    algorithm = transport(target, net, optax.adam(5e-3), num_steps=steps, **(sizes | options))
    state = algorithm.init(jax.random.key(0))
    state, info = jax.jit(
        lambda state: jax.lax.scan(
            lambda s, key: algorithm.step(key, s), state, jax.random.split(jax.random.key(1), steps)
        )
    )(state)
    return algorithm, state, jax.tree.map(lambda leaf: leaf[-1], info)


@pytest.fixture(scope="module")
def flow():
    """A flow trained on two modes, in float64: algorithm, state, and the composed map."""
    jax.config.update("jax_enable_x64", True)
    algorithm, state, _ = trained(two_modes(), base=standard_normal(2, 1.5))
    return algorithm, state, jax.jit(jax.vmap(lambda x, maps: push(NET, maps, x), in_axes=(0, None)))


def test_log_det_of_the_flow_equals_autodiff_of_the_composed_map(flow):
    _, state, composed = flow
    assert float(jnp.max(jnp.abs(state.maps.params))) > 0.05
    x = jax.random.normal(jax.random.key(1), (20, 2))
    _, log_det, stretch = composed(x, state.maps)
    jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda y: push(NET, state.maps, y)[0])))(x)
    sign, expected = jnp.linalg.slogdet(jacobian)
    assert jnp.all(stretch < 1) and jnp.all(sign == 1)
    np.testing.assert_allclose(log_det, expected, rtol=1e-9, atol=1e-10)


def test_the_inverse_exists_where_it_is_claimed(flow):
    """Each map is undone by fixed-point iteration, which converges where h Lip(v) < 1."""
    _, state, composed = flow
    x = jax.random.normal(jax.random.key(1), (200, 2))
    y, _, stretch = composed(x, state.maps)
    assert jnp.all(stretch < 1)

    @jax.jit
    def undo(y, one):
        move = jax.vmap(lambda p: push(NET, one, p)[0] - p)
        return jax.lax.fori_loop(0, 200, lambda _, found: y - move(found), y)

    for k in reversed(range(6)):
        y = undo(y, jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], state.maps))
    np.testing.assert_allclose(y, x, atol=1e-9)


def test_fresh_draws_have_mean_weight_z(flow):
    algorithm, state, _ = flow
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(3), algorithm.parameters(state), 20_000
    )
    assert bool(jnp.all(draws.one_to_one))
    log_z, se = log_evidence(draws.log_weight)
    assert se > 1e-3
    assert_within(log_z, 0.0, se)


def test_untrained_flow_is_the_identity():
    algorithm = transport(correlated(), NET, optax.adam(1e-3), num_particles=64, num_maps=3)
    state = algorithm.init(jax.random.key(0))
    x = jnp.array([0.3, -2.0])
    np.testing.assert_array_equal(push(NET, state.maps, x)[0], x)


def test_gaussians_need_no_network():
    """The affine part of the velocity is the exact Gaussian flow: variances follow their equation."""
    target = gaussian(np.zeros(2), np.diag([0.25, 4.0]))
    algorithm, state, _ = trained(
        target, steps=100, num_maps=100, num_updates=1, num_particles=20_000, duration=2.0
    )
    variance = np.ones(2)
    for _ in range(100):  # x ↦ (1 + h (1/V - 1/v)) x
        variance = variance * (1 + 0.02 * (1 / variance - 1 / np.array([0.25, 4.0]))) ** 2
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(1), algorithm.parameters(state), 20_000
    )
    found = draws.x.var(0)
    np.testing.assert_allclose(found, variance, rtol=0.05)
    # with noise, and the velocities that are right for this law, the marginals are the same
    process = noisy_transport(NET, 100, standard_normal(2))
    end = lambda k: simulate(process, (state.maps, jnp.array(0.3)), target, k).xs[-1]  # noqa: E731
    ends = jax.jit(jax.vmap(end))(jax.random.split(jax.random.key(2), 20_000))
    np.testing.assert_allclose(jnp.var(ends, 0), variance, rtol=0.05)


def test_preconditioned_particles_relax_at_one_rate_in_all_directions():
    """Multiplied by the particles' covariance c, the velocity is (1 - c / v) x: of rate one near any v."""
    target = gaussian(np.zeros(2), np.diag([0.25, 4.0]))
    algorithm, state, _ = trained(
        target,
        steps=100,
        num_maps=100,
        num_updates=1,
        num_particles=20_000,
        duration=2.0,
        preconditioned=True,
    )
    variance = np.ones(2)
    for step_size in np.asarray(state.maps.step_size):
        variance = variance * (1 + step_size * (1 - variance / np.array([0.25, 4.0]))) ** 2
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(1), algorithm.parameters(state), 20_000
    )
    np.testing.assert_allclose(draws.x.var(0), variance, rtol=0.05)
    log_z, se = log_evidence(draws.log_weight)
    assert_within(log_z, 0.0, max(float(se), 1e-4))
    # both estimates of what KL loses in unit time, in the metric of C: here Σ c (1/v - 1/c)²
    np.testing.assert_allclose(state.dissipation.fisher[0], 9.0 + 0.5625, rtol=0.1)
    np.testing.assert_allclose(state.dissipation.dissipation[0], 9.0 + 0.5625, rtol=0.1)


def test_steps_shrink_so_that_maps_stay_one_to_one():
    stiff = gaussian(np.zeros(2), np.diag([1.0, 1e-3]))
    _, state, _ = trained(stiff)
    steps = state.maps.step_size
    assert jnp.all(steps > 0) and jnp.all(steps < 1.0e-2)  # not the 0.33 of `duration / num_maps`


def test_steps_are_as_long_as_their_error_allows():
    """Particles that relax exponentially need ever fewer steps; the last one ends with the duration."""
    target, options = gaussian(np.zeros(2), np.eye(2)), {"num_particles": 4096, "duration": 2.0}
    options |= {"num_updates": 1, "quasi": True, "base": standard_normal(2, 0.5)}
    errors, counts = [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        _, state, _ = trained(target, steps=400, num_maps=400, tolerance=tolerance, **options)
        sizes = np.asarray(state.maps.step_size)
        sizes = sizes[sizes > 0]
        np.testing.assert_allclose(sizes.sum(), 2.0, rtol=1e-4)
        assert np.all(sizes[1:] <= 2.0 * sizes[:-1] * (1 + 1e-9))
        # a step of the flow of dv/dt = 2 (1 - v), and the affine velocity that transport has
        variance = 0.25
        worst = 0.0
        for h in sizes:
            exact = 1.0 - (1.0 - variance) * np.exp(-2.0 * h)
            variance = variance * (1.0 + h * (1.0 / variance - 1.0)) ** 2
            worst = max(worst, abs(np.sqrt(exact / variance) - 1.0))
        errors.append(worst / tolerance)
        counts.append(len(sizes))
    # the estimate lags by a step, and the first steps have none
    assert max(errors) < 4.0
    assert 2.0 < counts[1] / counts[0] < 4.0 and 2.0 < counts[2] / counts[1] < 4.0


def test_heun_steps_have_second_order():
    """On normal laws affine velocities are exact: what is left is the error of the steps."""
    target, options = gaussian(np.zeros(2), np.eye(2)), {"net": STILL, "num_particles": 512, "duration": 1.0}
    options |= {"num_updates": 1, "quasi": True, "base": standard_normal(2, 0.5)}

    def error(num_maps, heun):
        _, state, _ = trained(target, steps=num_maps, num_maps=num_maps, heun=heun, **options)
        np.testing.assert_allclose(jnp.sum(state.maps.step_size), 1.0, rtol=1e-6)
        return abs(float(jnp.mean(state.particles**2)) - (1.0 - 0.75 * np.exp(-2.0)))

    assert 1.8 < error(20, False) / error(40, False) < 2.2
    assert 3.4 < error(20, True) / error(40, True) < 4.6
    assert error(20, True) < 0.2 * error(40, False)


def test_heun_maps_are_exact_and_counted():
    """Fresh draws through maps of two velocities have weights of mean Z, and are carried back."""
    algorithm, state, info = trained(two_modes(), base=standard_normal(2, 1.5), heun=True)
    assert float(jnp.max(jnp.abs(state.maps.second.params - state.maps.params))) > 1e-3
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(3), algorithm.parameters(state), 20_000
    )
    assert bool(jnp.all(draws.one_to_one))
    log_z, se = log_evidence(draws.log_weight)
    assert se > 1e-3
    assert_within(log_z, 0.0, se)
    found = jax.jit(
        jax.vmap(lambda x: algorithm.proposal.weigh(jax.random.key(0), algorithm.parameters(state), x))
    )(draws.x[:100])
    np.testing.assert_allclose(found, draws.log_weight[:100], rtol=1e-9, atol=1e-9)
    assert info.gradients == 2 * (512 + 1024)
    # a step that is due for a map, from a network that is not finite: both of its fits are skipped
    lost = jnp.full_like(state.current.params, jnp.nan)
    broken = state._replace(current=state.current._replace(params=lost), step=jnp.ones((), jnp.int32))
    after, info = jax.jit(algorithm.step)(jax.random.key(0), broken)
    assert info.skipped == 8 and after.step == 2
    np.testing.assert_array_equal(after.particles, state.particles)


def test_heun_maps_stay_one_to_one_where_the_second_velocity_is_steep():
    """At level zero the first velocity vanishes, and the second one is that of a narrow law."""
    narrow = gaussian(np.zeros(2), 0.01 * np.eye(2))
    algorithm, state, _ = trained(narrow, 10, num_maps=10, annealing=geometric(), heun=True)
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(3), algorithm.parameters(state), 200
    )
    assert bool(jnp.all(draws.one_to_one))
    found = jax.jit(
        jax.vmap(lambda x: algorithm.proposal.weigh(jax.random.key(0), algorithm.parameters(state), x))
    )(draws.x)
    np.testing.assert_allclose(found, draws.log_weight, rtol=1e-6, atol=1e-6)


def test_steps_after_the_last_map_change_nothing():
    algorithm, state, _ = trained(correlated())
    after, info = jax.jit(algorithm.step)(jax.random.key(5), state)
    assert jnp.isnan(info.loss) and info.gradients == 0
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), after._replace(step=state.step), state)
    assert all(jax.tree.leaves(same))


def test_transport_ends_where_proposals_are_good_enough():
    target = gaussian(np.zeros(2), np.eye(2))
    goal = log_variance_at(0.8)

    def ended(acceptance):
        base = standard_normal(2, 1.5)
        _, state, info = trained(target, 20, base=base, num_maps=20, target_acceptance=acceptance)
        assert bool(info.finished)
        return int(state.step), float(state.variance)

    (every_step, least), (step, variance) = ended(None), ended(0.8)
    assert 1 < step < every_step == 20 and least < variance < goal
    assert ended(1e-9)[0] == 1  # one map at least


def test_non_finite_gradients_are_skipped_and_counted():
    target = Target(lambda x: jnp.sum(jnp.where(x > 1.0, jnp.nan, -0.5 * x**2)), 2)
    algorithm, state, _ = trained(target)
    leaves = jax.tree.leaves((state.particles, state.maps))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
    broken = state._replace(scores=jnp.full_like(state.scores, jnp.nan), step=jnp.zeros((), jnp.int32))
    after, info = jax.jit(algorithm.step)(jax.random.key(0), broken)
    assert info.skipped == 4
    np.testing.assert_array_equal(after.current.params, broken.current.params)


def test_log_abs_det_and_spectral_norm_agree_with_linear_algebra():
    matrices = 0.15 * jax.random.normal(jax.random.key(0), (20, 6, 6))
    whole = jnp.eye(6) + matrices
    np.testing.assert_allclose(jax.vmap(log_abs_det)(whole), jnp.linalg.slogdet(whole)[1], rtol=1e-9)
    norms = jax.vmap(lambda m: spectral_norm(m, 300))(matrices)
    np.testing.assert_allclose(norms, jnp.linalg.norm(matrices, 2, axis=(1, 2)), rtol=1e-3)


def test_euler_map_has_first_order():
    """Halving the step halves the distance from the exact flow x ↦ x exp(-t)."""

    def error(n):
        step = lambda _, x: euler_map(lambda y: -y, jnp.array(1.0 / n), x)[0]  # noqa: E731
        return float(jnp.abs(jax.lax.fori_loop(0, n, step, jnp.ones(1)) - jnp.exp(-1.0))[0])

    assert 1.9 < error(50) / error(100) < 2.1


def test_divergence_estimate_is_unbiased():
    def field(x):
        return jnp.stack([jnp.sin(x[0] * x[1]), x[0] ** 2 + x[1] * x[2], x[2] * x[1]])

    x = jnp.array([0.3, -1.2, 0.7])
    exact = divergence_of(field, x, None)
    keys = jax.random.split(jax.random.key(0), 5000)
    found = jax.vmap(lambda key: divergence_of(field, x, key))(keys)
    assert_within(jnp.mean(found), exact, jnp.std(found) / np.sqrt(5000))


@pytest.mark.parametrize("dim", [2, 5])
def test_score_loss_is_least_at_the_particles_score(dim):
    """For particles N(0, I) and target N(0, I/2) the optimum is v = -x, with loss -E|v|² = -dim."""
    x = jax.random.normal(jax.random.key(0), (200_000, dim))
    loss = lambda a: implicit_score_loss(lambda y: -a * y, x, -2.0 * x, jax.random.key(1))  # noqa: E731
    values = np.array([loss(a) for a in (0.8, 1.0, 1.2)])
    assert values.argmin() == 1
    np.testing.assert_allclose(values[1], -dim, rtol=0.05)


def test_weights_of_given_points_are_those_of_draws(flow):
    algorithm, state, _ = flow
    draws = jax.jit(lambda: algorithm.proposal.draw(jax.random.key(3), algorithm.parameters(state), 100))()
    found = jax.jit(
        jax.vmap(lambda x: algorithm.proposal.weigh(jax.random.key(0), algorithm.parameters(state), x))
    )(draws.x)
    assert int(jnp.argmin(state.divergence)) > 0
    np.testing.assert_allclose(found, draws.log_weight, rtol=1e-9, atol=1e-9)
    x = jax.random.normal(jax.random.key(1), (20, 2))
    back, error = jax.vmap(lambda y: pull(NET, state.maps, push(NET, state.maps, y)[0]))(x)
    np.testing.assert_allclose(back, x, atol=1e-9)
    assert float(jnp.max(error)) < 1e-12


def test_draws_end_where_the_divergence_was_least(flow):
    """With the first map declared the best, draws pass through it alone."""
    algorithm, state, composed = flow
    early = state._replace(divergence=jnp.arange(7.0).at[1].set(-1.0))
    draws = jax.jit(lambda: algorithm.proposal.draw(jax.random.key(3), algorithm.parameters(early), 50))()
    start = jax.vmap(standard_normal(2, 1.5).sample)(jax.random.split(jax.random.key(3), 50))
    first = jax.tree.map(lambda leaf: leaf[:1], state.maps)
    np.testing.assert_allclose(draws.x, composed(start, first)[0], atol=1e-12)


# ------------------------------------------------------------------ noise instead of determinants
@pytest.fixture(scope="module")
def noisy():
    jax.config.update("jax_enable_x64", True)
    base = standard_normal(2, 2.0)
    return trained(two_modes(), steps=24, num_maps=24, duration=1.0, base=base, noisy=True)


def test_weights_of_noisy_paths_are_unbiased_both_ways(noisy):
    """E[w] = Z on fresh paths, and E[1/w] = 1/Z on paths that end in exact draws; barely trained."""
    algorithm, state, _ = noisy
    assert int(jnp.argmin(state.divergence)) > 0
    draws = jax.jit(lambda: algorithm.proposal.draw(jax.random.key(3), algorithm.parameters(state), 20_000))()
    weight = jnp.exp(draws.log_weight)
    assert 0.05 < jnp.std(draws.log_weight) < 1.5
    assert_within(jnp.mean(weight), 1.0, jnp.std(weight) / np.sqrt(20_000))
    x = two_modes().sample(jax.random.key(4), 20_000)
    keys = jax.random.split(jax.random.key(5), 20_000)
    weight = jnp.exp(
        -jax.jit(jax.vmap(lambda k, y: algorithm.proposal.weigh(k, algorithm.parameters(state), y)))(keys, x)
    )
    assert_within(jnp.mean(weight), 1.0, jnp.std(weight) / np.sqrt(20_000))


def test_at_rest_noisy_weights_vary_with_the_square_of_the_step():
    """For target and base N(0, I) and v = 0 the steps are Langevin's; Var log w falls fourfold with h / 2."""
    target = gaussian(np.zeros(2), np.eye(2))

    def variance(n):
        process = noisy_transport(STILL, n, standard_normal(2))
        zeros = jnp.zeros((n, 2))
        none, eye = jnp.zeros((n, 2, 2)), jnp.tile(jnp.eye(2), (n, 1, 1))
        maps = Maps(jnp.zeros((n, 0)), zeros, eye, eye, zeros, none, jnp.full(n, 1.0 / n))
        one = lambda k: simulate(process, (maps, jnp.array(0.5)), target, k).log_weight  # noqa: E731
        return float(jnp.var(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 20_000))))

    assert 3.4 < variance(8) / variance(16) < 4.6


def test_clear_errors():
    with pytest.raises(ValueError, match="`num_particles` must exceed the dimension"):
        transport(correlated(), NET, optax.sgd(1.0), num_particles=3)
    with pytest.raises(ValueError, match=r"`max_stretch` must be a number above 0 and below 1, got 1\.5"):
        transport(correlated(), NET, optax.sgd(1.0), max_stretch=1.5)
    with pytest.raises(ValueError, match=r"`tolerance` must be a number above 0 .*got 0"):
        transport(correlated(), NET, optax.sgd(1.0), tolerance=0.0)
    with pytest.raises(ValueError, match="`heun` asks for a flow"):
        transport(correlated(), NET, optax.sgd(1.0), heun=True, noisy=True)


# ------------------------------------------------------------------ maps that fold
BEND = 0.35
LOWEST, HIGHEST = -0.25 / BEND, 0.75 / BEND  # from where the inverse leads back to one point


def folding(target):
    """The one map u ↦ u + BEND u² of N(0, 1): two points have one image, and none lies below LOWEST."""
    square = Net(lambda key, dim: jnp.zeros(0), lambda params, x: x**2)
    algorithm = transport(target, square, optax.sgd(0.0), num_particles=8, num_maps=1, num_probes=8)
    state = algorithm.init(jax.random.key(0))
    zero, eye = jnp.zeros((1, 1)), jnp.eye(1)[None]
    maps = Maps(jnp.zeros((1, 0)), zero, eye, eye, zero, 0.0 * eye, jnp.array([BEND]))
    return algorithm, state._replace(maps=maps, divergence=jnp.array([1.0, 0.0]))


def test_flows_that_fold_propose_each_point_from_one_place():
    """E[w] = Z π(A) and E_π[1/w] = P(S): maps are one-to-one on S, and carry it to A."""
    target = gaussian(np.array([0.5]), np.eye(1))
    algorithm, state = folding(target)
    n = 100_000
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(1), algorithm.parameters(state), n
    )
    weigh = jax.jit(
        jax.vmap(lambda x: algorithm.proposal.weigh(jax.random.key(0), algorithm.parameters(state), x))
    )
    x = target.sample(jax.random.key(2), n)
    log_weight = weigh(x)
    proposed = log_weight < jnp.inf
    # the inverse takes fifty steps at most: some of what is left out could be found in more
    assert not bool(jnp.any(proposed, where=(x[:, 0] < LOWEST) | (x[:, 0] > HIGHEST)))
    easy = lambda slope: (slope**2 - 1) / (4 * BEND)  # noqa: E731
    assert bool(jnp.all(proposed, where=(x[:, 0] > easy(0.25)) & (x[:, 0] < easy(1.75))))
    assert bool(jnp.all((draws.log_weight == -jnp.inf) == ~draws.one_to_one))
    weight, inverse = jnp.exp(draws.log_weight), jnp.exp(-log_weight)
    for one, other in ((weight, proposed), (inverse, draws.one_to_one)):
        assert 0.5 < float(jnp.mean(other)) < 0.95 and float(jnp.std(one)) < 1.0
        assert_within(jnp.mean(one), jnp.mean(other), jnp.hypot(jnp.std(one), jnp.std(other)) / np.sqrt(n))
    again = weigh(draws.x)
    np.testing.assert_allclose(again[draws.one_to_one], draws.log_weight[draws.one_to_one], atol=1e-3)


def test_chains_with_flows_that_fold_leave_the_target_alone():
    """Exact draws stay exact draws, under proposals of the flow and local moves."""
    target = gaussian(np.array([0.5]), np.eye(1))
    algorithm, state = folding(target)
    n = 100_000
    weigh = jax.vmap(lambda x: algorithm.proposal.weigh(jax.random.key(0), algorithm.parameters(state), x))
    density = jax.vmap(target.logdensity_fn)

    def step(carry, key):
        x, log_weight = carry
        key_draw, key_accept, key_move, key_local = jax.random.split(key, 4)
        draws = algorithm.proposal.draw(key_draw, algorithm.parameters(state), n)
        accept, _ = metropolis(key_accept, log_weight, draws.log_weight)
        x = jnp.where(accept[:, None], draws.x, x)
        log_weight = jnp.where(accept, draws.log_weight, log_weight)
        near = x + jax.random.normal(key_move, x.shape)
        fresh = weigh(near)
        moves = (jnp.log(jax.random.uniform(key_local, (n,))) < density(near) - density(x)) & (
            fresh > -jnp.inf
        )
        return (jnp.where(moves[:, None], near, x), jnp.where(moves, fresh, log_weight)), jnp.mean(accept)

    x = target.sample(jax.random.key(2), n)
    keys = jax.random.split(jax.random.key(3), 5)
    (x, _), accepted = jax.jit(lambda x: jax.lax.scan(step, (x, weigh(x)), keys))(x)
    assert float(jnp.min(accepted)) > 0.3
    x = x[:, 0]
    assert_within(jnp.mean(x), 0.5, 1.0 / np.sqrt(n))
    assert_within(jnp.var(x), 1.0, np.sqrt(2.0 / n))
    for level in (LOWEST, 0.0, 1.0, HIGHEST):
        mass = scipy.stats.norm.cdf(level - 0.5)
        assert_within(jnp.mean(x < level), mass, np.sqrt(mass * (1 - mass) / n))
