# SPDX-License-Identifier: Apache-2.0
"""What holds exactly for every process and every divergence, at any number of steps and any parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    STILL,
    assert_evidence,
    assert_within,
    batch,
    build,
    correlated,
    evaluated,
    run_chains,
    shaken,
    three_components,
    two_modes,
)
from jax.flatten_util import ravel_pytree
from jax.scipy.special import digamma, gammaln, polygamma
from test_exactness import largest_z_score

from numpyro_sbtm import DiffusionKernel, report
from numpyro_sbtm.core import (
    DiffusionOptions,
    Net,
    Target,
    diffusion,
    dis,
    evaluate,
    kl,
    kl_log_derivative,
    log_variance,
    noise_path,
    reevaluate,
    rescaled,
    simulate,
    sub_trajectory_log_variance,
    trajectory_balance,
    two_pass_gradient,
)
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.processes.grids import cosine_grid, vp_grid
from numpyro_sbtm.core.transition import Gaussian
from numpyro_sbtm.core.weights import log_evidence, reachable
from numpyro_sbtm.methods.diffusion import DIVERGENCES, PROCESSES
from numpyro_sbtm.networks import denoiser, potential
from numpyro_sbtm.targets import gaussian

CONTROLLED = [name for name in PROCESSES if name != "dis"]
every_process = pytest.mark.parametrize("name", CONTROLLED)


def with_network(name, net):
    return PROCESSES[name].network(net)


def process_of(name, num_steps=4, scale=1.0, size=0.1, **options):
    """A process with a small network whose weights are all random."""
    net = with_network(name, denoiser(width=8))
    params = net.init(jax.random.key(0), 2)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + size * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return PROCESSES[name].process(net, 2, num_steps, scale, **options), jax.tree.unflatten(structure, noisy)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [name for name in CONTROLLED if name != "dis-euler"])
def test_an_untrained_process_has_constant_weight_on_its_reference(name):
    net = with_network(name, STILL)
    process = PROCESSES[name].process(net, 3, 5, 1.7)
    target = gaussian(np.zeros(3), 1.7**2 * np.eye(3))
    paths = batch(process, net.init(jax.random.key(0), 3), target, 0, 50)
    np.testing.assert_allclose(paths.log_weight, 0.0, atol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_score_clipped_at_zero_stays_out(name):
    x, y, scores = jnp.ones(2), jnp.zeros(2), [jnp.zeros(2), jnp.array([1.0, -2.0])]
    for options, same in (({"score_clip": 0.0}, True), ({}, False)):
        process, params = process_of(name, **options)
        first, second = (process.forward(params, jnp.array(2), x, score).log_prob(y) for score in scores)
        assert (first == second) == same


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
@pytest.mark.parametrize("name", ["dds", "bridge", "dds-learned"])
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


def _exact_kl(process, target, half_width, num):
    """KL on a line, less log Z, as a function of the parameters: a sum over the steps on a grid."""
    x = jnp.linspace(-half_width, half_width, num)[:, None]
    cell = 2 * half_width / (num - 1)
    over = jax.vmap(lambda f, *a: jax.vmap(lambda y: f(*a, y))(x), in_axes=(None, 0, 0))
    scores = jax.vmap(jax.grad(target.logdensity_fn))(x)

    def value(params):
        start = process.init(params)
        log_law = jax.vmap(start.log_prob)(x)
        total = jnp.sum(cell * jnp.exp(log_law) * log_law)
        for k in map(jnp.asarray, range(process.num_steps)):
            forward = over(lambda y, g, z, k=k: process.forward(params, k, y, g).log_prob(z), x, scores)
            backward = over(lambda y, _, z, k=k: process.backward(params, k, z, y).log_prob(y), x, scores)
            joint = cell**2 * jnp.exp(log_law[:, None] + forward)
            total += jnp.sum(joint * (forward - backward))
            log_law = jnp.log(jnp.sum(joint, 0) / cell)
        return total - jnp.sum(cell * jnp.exp(log_law) * jax.vmap(target.logdensity_fn)(x))

    return value


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_kl_sees_which_component_is_drawn():
    """On a line, against a quadrature: logits of components, and shifts that change their shares later on."""
    # what is learned: the same logits and the same shift at every step
    net = Net(
        lambda key, dim: jnp.zeros(4),
        lambda params, t, x, score: (params[3:], 0.0 * x, jnp.zeros((), x.dtype), params[:3]),
    )
    centre, std = jnp.array([[-2.0], [0.5], [3.0]]), jnp.array([[0.6], [0.8], [0.7]])
    reference = Mixture(jnp.log(jnp.array([0.3, 0.4, 0.3])), None, centre, std)
    process = dis(net, 1, 4, reference=reference)
    masses = jnp.array([0.5, 0.2, 0.3])
    target = Target(Mixture(jnp.log(masses), None, centre + 0.2, std).log_prob, 1)
    params = jnp.array([0.2, -0.3, 0.1, 0.15])
    exact, truth = jax.jit(jax.value_and_grad(_exact_kl(process, target, 9.0, 1000)))(params)

    def estimate(seed):
        return jax.value_and_grad(lambda p: kl().value(batch(process, p, target, seed, 32, detach=False)))(
            params
        )

    values, gradients = jax.jit(lambda seeds: jax.lax.map(estimate, seeds, batch_size=100))(jnp.arange(3000))
    assert_within(jnp.mean(values), exact, jnp.std(values) / np.sqrt(3000))
    error = jnp.std(gradients, 0) / np.sqrt(3000)
    assert float(jnp.max(error)) < 0.01 < 0.03 < float(jnp.min(jnp.abs(truth)))
    assert_within(jnp.mean(gradients, 0), truth, error)


@pytest.mark.usefixtures("x64")
def test_points_that_are_given_are_no_choice():
    process, params = shaken(2, reference=three_components())
    free, key = jnp.full((5, 2), jnp.nan), jax.random.key(0)
    choice = lambda given: simulate(process, params, two_modes(), key, detach=False, given=given).log_choice  # noqa: E731
    assert float(choice(free)) < 0.0 == float(choice(jnp.zeros((5, 2))))


def test_a_look_that_jumps_is_refused_where_gradients_run_along_paths():
    process, _ = shaken(2, reference=three_components(), look_ahead=True)
    with pytest.raises(ValueError, match="`process` looks ahead with a mixture of several components"):
        diffusion(two_modes(), process, denoiser(8), kl(), optax.sgd(0.0))
    with pytest.raises(
        ValueError, match="`precondition` 'auto' may have several, between which the look jumps"
    ):
        build(DiffusionKernel, None, lambda x: 0.0, divergence="kl", look_ahead=True)


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
    process = process._replace(init=lambda params: Gaussian(jnp.ones(2), 3.0 * jnp.ones(2)))
    target = gaussian(np.zeros(2), np.eye(2))
    starts = jnp.repeat(jax.vmap(process.init(params).sample)(jax.random.split(jax.random.key(0), 8)), 4, 0)
    given = jnp.full((32, process.num_steps + 1, 2), jnp.nan).at[:, 0].set(starts)
    one = lambda key, xs: simulate(process, params, target, key, given=xs)  # noqa: E731
    paths = jax.vmap(one)(jax.random.split(jax.random.key(1), 32), given)
    assert float(log_variance().value(paths)) > 1.0
    assert float(log_variance(paths_per_start=4).value(paths)) < 1e-18


# ------------------------------------------------------------------ pieces of training
@pytest.mark.usefixtures("x64")
def test_a_process_on_some_of_its_points_is_exact_too():
    reference = three_components()
    process, params = shaken(2, num_steps=8, size=0.0, reference=reference)
    points = jnp.array([0, 2, 3, 7, 8])
    coarse, target = process.coarse(points), Target(reference.log_prob, 2)
    # its own reversal on every grid
    np.testing.assert_allclose(batch(coarse, params, target, 0, 50).log_weight, 0.0, atol=1e-9)
    # and on all points it is the process itself
    paths = batch(process, params, two_modes(), 1, 20)
    again = evaluated(process.coarse(jnp.arange(9)), params, two_modes(), paths.xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), paths, again)
    # a network that knows nothing of the grid leaves weights unbiased
    process, params = shaken(2, num_steps=8)
    weight = np.exp(np.asarray(batch(process.coarse(points), params, correlated(), 1, 10_000).log_weight))
    assert weight.std() > 0.1
    assert_within(weight.mean(), 1.0, weight.std() / 100)


@pytest.mark.usefixtures("x64")
def test_paths_that_explore_have_the_densities_of_their_points():
    process, params = shaken(2)
    target = two_modes()
    keys = jax.random.split(jax.random.key(0), 500)
    explore = lambda key: simulate(process, params, target, key, widen=jnp.asarray(1.5))  # noqa: E731
    wide, plain = jax.vmap(explore)(keys), batch(process, params, target, 0, 500)
    again = evaluated(process, params, target, wide.xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), wide, again)
    assert float(jnp.mean(wide.log_forward)) < float(jnp.mean(plain.log_forward)) - 0.1


@pytest.mark.usefixtures("x64")
def test_a_trust_region_shortens_the_way_and_keeps_its_direction():
    process, params = shaken(2)
    paths, divergence = batch(process, params, two_modes(), 3, 64), log_variance(None)
    nats = 0.05
    share = reachable(paths.log_weight, nats)
    assert 0.0 < float(share) < 1.0
    weight = np.exp(float(share) * np.asarray(paths.log_weight))
    weight /= weight.sum()
    np.testing.assert_allclose(np.sum(weight * np.log(64 * weight)), nats, rtol=1e-6)
    aimed = jax.vmap(lambda path: reevaluate(process, params, path))(
        jax.vmap(lambda path: path.tempered(share))(paths)
    )
    value, gradient = two_pass_gradient(divergence, process, params, aimed)
    whole, direction = two_pass_gradient(divergence, process, params, paths)
    np.testing.assert_allclose(value, share**2 * whole, rtol=1e-8)
    np.testing.assert_allclose(gradient, share * direction, rtol=1e-7, atol=1e-10)
    # weights of zero are outside of any region
    assert float(reachable(jnp.array([0.0, -jnp.inf]), 0.1)) == 0.0


def test_a_buffer_holds_ends_by_weight():
    target = correlated()
    process, _ = shaken(2, num_steps=8)
    net = denoiser(width=8)
    algorithm = diffusion(
        target,
        process,
        net,
        log_variance(),
        optax.sgd(0.0),
        DiffusionOptions(num_paths=400, buffer_size=6000),
    )
    state = algorithm.init(jax.random.key(0))
    assert bool(jnp.all(jnp.isnan(state.buffer)))
    step = jax.jit(algorithm.step)
    state, info = step(jax.random.key(1), state)
    assert int(jnp.sum(jnp.isfinite(state.buffer[:, 0]))) == 300  # a quarter of the paths comes from behind
    for k in range(20):
        state, info = step(jax.random.key(2 + k), state)
    assert bool(jnp.all(jnp.isfinite(state.buffer))) and bool(jnp.isfinite(info.loss))
    # an untrained process: its ends have another law, but the buffer that of the target
    plain = algorithm.proposal.draw(jax.random.key(9), algorithm.parameters(state), 6000).x
    mean, cov = jnp.array([0.5, -1.0]), np.array([[1.0, 0.8], [0.8, 1.5]])
    assert float(jnp.max(jnp.abs(jnp.mean(plain, 0) - mean))) > 0.3
    # resampled draws repeat: twice the error of independent ones
    assert_within(jnp.mean(state.buffer, 0), mean, 2 * np.sqrt(np.diag(cov) / 6000))


@pytest.mark.parametrize(
    ("name", "divergence", "options", "message"),
    [
        ("dds-learned", log_variance(), {}, "`divergence` is not sound for a `process` that learns"),
        (
            "pis",
            log_variance(),
            {"coarse_steps": 2},
            "`coarse_steps` is 2, but `process` is tied to its grid",
        ),
        ("pis", log_variance(), {"coarse_steps": 9}, "`coarse_steps` must be between 1 and 4, got 9"),
        (
            "pis",
            kl(),
            {"exploration": 0.1},
            "`exploration` draws paths from another",
        ),
        ("pis", kl(), {"buffer_size": 64}, "`buffer_size` is 64, but the buffer holds starts of backward"),
        ("pis", log_variance(), {"trust_region": 1.0}, "asks for several updates on one block"),
        (
            "pis",
            log_variance(),
            {"trust_region": -1.0, "num_updates": 2},
            "`trust_region` must be a number above 0",
        ),
    ],
)
def test_pieces_that_do_not_fit_are_refused(name, divergence, options, message):
    process, _ = process_of(name)
    with pytest.raises(ValueError, match=message):
        diffusion(correlated(), process, denoiser(8), divergence, optax.sgd(0.0), DiffusionOptions(**options))


@pytest.mark.slow
def test_looking_ahead_makes_proposals_of_a_skewed_target_better():
    """Logarithms of gamma variables, standardised and mixed: what is left of the variance, same training."""
    shape, dim = 4.0, 10
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))[0])
    scale, mean = jnp.sqrt(polygamma(1, shape)), digamma(shape)

    def logdensity(x):
        z = scale * (turn @ x) + mean
        return jnp.sum(shape * z - jnp.exp(z) - gammaln(shape) + jnp.log(scale))

    target, left = Target(logdensity, dim), []
    for num_scores in (1, 2):
        net = denoiser(32, num_scores=num_scores)
        process = dis(net, dim, 64, look_ahead=num_scores == 2)
        optimiser = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, 400))
        )
        algorithm = diffusion(
            target,
            process,
            net,
            log_variance(),
            optimiser,
            DiffusionOptions(num_paths=128, coarse_steps=16, patience=None),
        )
        keys = jax.random.split(jax.random.key(1), 400)
        advance = lambda state, key: algorithm.step(key, state)  # noqa: B023, E731
        state, _ = jax.jit(lambda state: jax.lax.scan(advance, state, keys))(  # noqa: B023
            algorithm.init(jax.random.key(0))
        )
        draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
            jax.random.key(2), algorithm.parameters(state), 8192
        )
        log_z, error = log_evidence(draws.log_weight)
        assert_within(log_z, 0.0, error)
        left.append(float(jnp.var(draws.log_weight)))
    assert left[1] < 0.75 * left[0] and left[0] < 0.08


# ------------------------------------------------------------------ as a kernel
OPTIONS = {"num_updates": 2, "coarse_steps": 5, "exploration": 0.2, "trust_region": 0.5, "buffer_size": 256}
PAIRS = [(name, "kl" if name == "dds-learned" else "log-variance", {}) for name in PROCESSES]
PAIRS += [("dis", name, {}) for name in DIVERGENCES if name != "log-variance"]
PAIRS += [("dis", "log-variance", OPTIONS), ("dis", "sub-trajectory-log-variance", {"score_clip": 0.0})]
PAIRS += [("dis", "log-variance", {"look_ahead": True}), ("dis", "kl", {"look_ahead": True})]


@pytest.mark.slow
@pytest.mark.parametrize(("process", "divergence", "options"), PAIRS)
def test_barely_trained_kernels_are_exact(process, divergence, options):
    target = two_modes()
    kernel = build(
        DiffusionKernel,
        None,
        lambda x: -target.logdensity_fn(x),
        process=process,
        divergence=divergence,
        precondition=None,
        num_steps=8,
        num_paths=64,
        num_times=8,
        smc_particles=0,
        **options,
    )
    mcmc = run_chains(kernel, warmup=20, samples=3000, init_params=jnp.zeros((4, 2)))
    assert largest_z_score(mcmc.get_samples(group_by_chain=True), target) < 5.0
    found = report(mcmc)
    assert_evidence(found)
    assert np.isfinite(found.training).all() and found.skipped_updates == 0 and not found.ensemble
