# SPDX-License-Identifier: Apache-2.0
"""Above 128 dimensions, or nearly: separated modes, their masses, and maps of low rank."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import run_chains
from jax.scipy.special import logsumexp

from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, report
from numpyro_sbtm.compile import run_stages
from numpyro_sbtm.core.maps import LowRank, whiten
from numpyro_sbtm.core.target import Target
from numpyro_sbtm.core.weights import ess_fraction, log_evidence
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.guesses import diagonal_guesses
from numpyro_sbtm.search.modes import describe_modes, fit_normal, log_evidence_by_bridge, separate_fits
from numpyro_sbtm.search.warm_start import _add_missing, warm_start
from numpyro_sbtm.search.wide import _draw_modes


def direction(dim):
    """A random direction over all coordinates."""
    v = np.random.default_rng(dim).normal(size=dim)
    return v / np.linalg.norm(v)


def modes(weights, centres, scales):
    """The normalised log density of a mixture of normal distributions."""
    log_weight, centres = np.log(weights), jnp.asarray(centres)
    scales, dim = jnp.asarray(scales), centres.shape[1]

    def logdensity(x):
        z = (x - centres) / scales[:, None]
        return logsumexp(log_weight - 0.5 * jnp.sum(z * z, -1) - dim * jnp.log(scales * np.sqrt(2 * np.pi)))

    return logdensity


def pair(dim, distance, scales=(1.0, 1.0)):
    """Modes of .3 and .7, so far apart along a random direction."""
    v, off = direction(dim), 0.5 * np.random.default_rng(1).normal(size=dim)
    centres = np.stack([off - 0.5 * distance * v, off + 0.5 * distance * v])
    return modes([0.3, 0.7], centres, scales), centres


def fits_at(locs, scales):
    """Maps of rank zero."""
    locs = jnp.asarray(locs)
    std = jnp.asarray(scales)[:, None] * jnp.ones_like(locs)
    return LowRank(locs, std, jnp.zeros((*locs.shape, 0)), jnp.zeros((len(locs), 0)))


# ------------------------------------------------------------------ the parts of the search
def test_climbs_from_scouts_guess_at_every_mode():
    """Three modes, of which the middle one and that of mass .03 are above few scouts."""
    v = direction(150)
    logdensity = modes([0.03, 0.57, 0.4], np.stack([9.0 * v, 0.0 * v, -9.0 * v]), np.ones(3))
    scouts = 4.0 * jax.random.normal(jax.random.key(0), (128, 150))
    guesses, _ = diagonal_guesses(Target(logdensity, 150), scouts[:4], scouts[4:])
    assert guesses.loc.shape == (20, 150)
    along = guesses.loc[:3] @ v
    np.testing.assert_allclose(jnp.sort(along), [-9.0, 0.0, 9.0], atol=0.1)


@pytest.mark.parametrize(("distance", "scales"), [(5.0, (1.0, 1.0)), (8.0, (1.0, 1.0)), (16.0, (0.5, 1.0))])
def test_fits_of_one_mode_are_told_from_those_of_another_in_300_dimensions(distance, scales):
    logdensity, centres = pair(300, distance, scales)
    noise = 0.05 * np.random.default_rng(2).normal(size=(12, 300))  # what optimisation leaves
    fits = fits_at(np.repeat(centres, 6, 0) + noise, np.repeat(scales, 6))
    elbos = jnp.log(jnp.repeat(jnp.array([0.3, 0.7]), 6))
    chosen, there, _ = separate_fits(jax.random.key(0), logdensity, fits, elbos)
    assert jnp.sum(there) == 2
    assert sorted(int(k) // 6 for k in chosen[:2]) == [0, 1]


def test_the_normal_fit_is_exact_wherever_the_points_are():
    rng = np.random.default_rng(0)
    root = np.eye(150) + 0.05 * rng.normal(size=(150, 150))
    cov, mean = root @ root.T, rng.normal(size=150)
    u = 0.7 * rng.normal(size=(400, 150)) + 0.3
    score = -(u - mean) @ np.linalg.inv(cov)
    found, found_cov = fit_normal(jnp.asarray(u), jnp.asarray(score), False)
    np.testing.assert_allclose(found, mean, atol=0.05)
    np.testing.assert_allclose(found_cov, cov, atol=0.05)  # the points' own covariance is off by .6
    found, variance = fit_normal(jnp.asarray(u), jnp.asarray(-(u - mean) / 2.0), True)
    np.testing.assert_allclose(found, mean, atol=0.02)
    np.testing.assert_allclose(variance, 2.0, atol=0.05)


def test_a_bridge_estimates_evidence_where_weights_do_not():
    """Target N(0, I) in 100 dimensions, times e^3; proposals 1.2 times as wide."""
    proposed, drawn = jax.random.normal(jax.random.key(0), (2, 1000, 100))
    proposed = 1.2 * proposed
    log_ratio = lambda x: 3.0 + 100 * np.log(1.2) - 0.5 * jnp.sum(x**2, -1) * (1.0 - 1.0 / 1.44)  # noqa: E731
    assert ess_fraction(log_ratio(proposed)) < 0.1
    assert abs(log_evidence_by_bridge(log_ratio(proposed), log_ratio(drawn)) - 3.0) < 0.2


@pytest.mark.parametrize(("distance", "scales"), [(5.0, (1.0, 1.0)), (16.0, (0.5, 1.0))])
def test_modes_get_their_masses_in_200_dimensions(distance, scales):
    logdensity, centres = pair(200, distance, scales)
    target = Target(logdensity, 200)
    fits = fits_at(np.concatenate([centres, centres[:1]]) + 0.02, [*scales, scales[0]])
    there = jnp.array([True, True, False])

    @jax.jit
    def mixture(key):
        drawn, spent = _draw_modes(key, target, fits, there)
        first = jax.tree.map(lambda leaf: leaf[0], fits)
        found = describe_modes(key, target, first, fits, there, drawn)
        u = jax.vmap(found.sample)(jax.random.split(key, 2000))
        log_weight = jax.vmap(whiten(target, first).logdensity_fn)(u) - jax.vmap(found.log_prob)(u)
        return found, log_weight, spent

    found, log_weight, spent = mixture(jax.random.key(0))
    np.testing.assert_allclose(jnp.exp(found.log_weight), [0.3, 0.7, 0.0], atol=0.02)
    assert ess_fraction(log_weight) > 0.9
    assert abs(log_evidence(log_weight)[0]) < 0.02
    assert 0 < int(spent.total) < 1e6


@pytest.mark.parametrize("dim", [20, 100, 128])
@pytest.mark.parametrize("distance", [5.0, 6.0, 12.0])
def test_a_fit_tells_particles_of_its_mode_from_those_of_another(dim, distance):
    """All particles lie in the mode of .7, and norms hardly tell; then they lie in both."""
    rng, v = np.random.default_rng(dim), direction(dim)
    lost = jnp.asarray(rng.normal(size=(4096, dim)) - 0.5 * distance * v)
    centres = 0.5 * distance * np.stack([-v, v])[:, None]
    draws = jnp.asarray(rng.normal(size=(2, 512, dim)) + centres)
    elbos = jnp.log(jnp.array([0.7, 0.3]))
    both = lost + distance * jnp.asarray(v) * (jnp.arange(4096) % 10 < 3)[:, None]
    add = jax.jit(lambda x, log_z: _add_missing(jax.random.key(0), x, log_z, elbos, draws))
    assert abs(jnp.mean(add(lost, jnp.log(0.7)) @ v > 0) - 0.3) < 0.03
    np.testing.assert_array_equal(add(both, jnp.zeros(())), both)


def test_refinement_needs_few_enough_dimensions():
    with pytest.raises(ValueError, match=r"`max_dense_dim` = 128 dimensions, got 129"):
        warm_start(Target(lambda x: -0.5 * jnp.sum(x**2), 129), jnp.arange(129), Search(refine=True))


# ------------------------------------------------------------------ whole searches
def factor_model(dim=200, rank=2):
    """N(mean, S² (I/2 + V Vᵀ)) with scales S from 0.1 to 10; its log density is normalised."""
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=dim), np.geomspace(0.1, 10.0, dim)
    loading = 0.7 * rng.normal(size=(dim, rank))
    inner = np.linalg.inv(np.eye(rank) + 2.0 * loading.T @ loading)
    log_det = np.sum(np.log(scale)) + 0.5 * (dim * np.log(0.5) - np.linalg.slogdet(inner)[1])

    def logdensity(x):
        z = (x - mean) / scale
        along = z @ loading
        quadratic = 2.0 * jnp.sum(z * z) - 4.0 * along @ inner @ along
        return -0.5 * quadratic - log_det - 0.5 * dim * np.log(2 * np.pi)

    return Target(logdensity, dim), mean, scale


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_one_mode_in_many_dimensions_needs_no_matrices():
    target, mean, scale = factor_model()
    scouts = 3.0 * jax.random.normal(jax.random.key(0), (32, target.dim))
    stages = warm_start(target, jnp.arange(target.dim), Search())
    whitening = run_stages(stages, jax.random.key(1), scouts[:4], scouts)[0]
    assert isinstance(whitening, LowRank)
    assert jnp.min(whitening.gain[:2]) > 2.0 > jnp.max(whitening.gain[2:])
    assert max(leaf.size for leaf in jax.tree.leaves(whitening)) <= 16 * target.dim
    draws = jax.vmap(lambda u: whitening.forward(u)[0])(jax.random.normal(jax.random.key(2), (2000, 200)))
    assert np.all(np.abs(draws.mean(0) - mean) < 0.3 * scale)
    # an undone map, and its log-determinant
    x, log_det = whitening.forward(jnp.arange(200.0) / 100)
    u, same = whitening.inverse(x)
    np.testing.assert_allclose(u, jnp.arange(200.0) / 100, atol=1e-3)
    exact = jnp.linalg.slogdet(jax.jacobian(lambda u: whitening.forward(u)[0])(u))[1]
    np.testing.assert_allclose([log_det, same], [exact, exact], rtol=1e-4)
    white = whiten(target, whitening)
    u = jax.random.normal(jax.random.key(3), (4000, 200))
    log_weight = jax.vmap(white.logdensity_fn)(u) + 0.5 * jnp.sum(u**2, -1) + 100 * np.log(2 * np.pi)
    assert float(jnp.std(log_weight)) < 3.0  # a map without correlations leaves more than 10


def two_wells(dim=150):
    """The first coordinate is 3 or -3, deviation .5; all others are near one."""
    x = numpyro.sample("x", dist.Normal(0, 3).expand([dim]).to_event(1))
    wells = jnp.logaddexp(-0.5 * ((x[0] - 3) / 0.5) ** 2, -0.5 * ((x[0] + 3) / 0.5) ** 2)
    numpyro.factor("f", wells - 0.5 * jnp.sum((x[1:] - 1) ** 2))


def as_model(logdensity, dim):
    """A model whose posterior is a normalised density, with a wide prior to look around in."""

    def model():
        x = numpyro.sample("x", dist.Normal(0, 3).expand([dim]).to_event(1))
        numpyro.factor("f", logdensity(x) - jnp.sum(dist.Normal(0, 3).log_prob(x)))

    return model


def check_run(mcmc, shares, masses, log_z):
    """Check the masses of modes and the evidence of a run; the verdict is good."""
    found = report(mcmc)
    assert found.verdict == "reliable", str(found)
    np.testing.assert_allclose(shares, masses, atol=0.03)
    assert abs(found.log_evidence - log_z) < 0.01
    assert found.log_evidence_se < 0.01


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(LogVarianceDISKernel, marks=pytest.mark.slow),
        pytest.param(SBTMKernel, marks=pytest.mark.long),
    ],
)
def test_both_kernels_find_both_wells_of_one_coordinate_among_150(kernel):
    mcmc = run_chains(kernel(two_wells), warmup=300)
    x = np.asarray(mcmc.get_samples()["x"])
    check_run(mcmc, np.mean(x[:, 0] > 0), 0.5, -180.5914)


@pytest.mark.long
def test_modes_of_unequal_mass_in_200_dimensions():
    logdensity, centres = pair(200, 6.0)
    mcmc = run_chains(LogVarianceDISKernel(as_model(logdensity, 200)), warmup=300)
    x = np.asarray(mcmc.get_samples()["x"])
    check_run(mcmc, np.mean((x - centres.mean(0)) @ direction(200) < 0), 0.3, 0.0)


@pytest.mark.long
def test_three_modes_in_300_dimensions():
    centres = np.random.default_rng(5).normal(size=(3, 300))
    centres *= 6.0 / np.linalg.norm(centres, axis=1, keepdims=True)
    masses, scales = [0.2, 0.3, 0.5], np.ones(3)
    mcmc = run_chains(LogVarianceDISKernel(as_model(modes(masses, centres, scales), 300)), warmup=300)
    x = np.asarray(mcmc.get_samples()["x"])
    distance = np.sum((x[:, None] - centres) ** 2, -1) / scales**2
    of_mode = np.argmin(0.5 * distance + 300 * np.log(scales), 1)
    check_run(mcmc, np.bincount(of_mode, minlength=3) / len(x), masses, 0.0)


@pytest.mark.long
def test_both_signs_of_an_item_response_model():
    """Abilities and discriminations change their signs together: each mode has one half."""
    rng = np.random.default_rng(3)
    theta, a, b = rng.normal(size=100), rng.normal(size=20), rng.normal(size=20)
    answers = rng.uniform(size=(100, 20)) < 1.0 / (1.0 + np.exp(b - a * theta[:, None]))

    def model(y):
        theta = numpyro.sample("theta", dist.Normal(0, 1).expand([100]).to_event(1))
        a = numpyro.sample("a", dist.Normal(0, 1).expand([20]).to_event(1))
        b = numpyro.sample("b", dist.Normal(0, 1).expand([20]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=a * theta[:, None] - b).to_event(2), obs=y)

    mcmc = run_chains(LogVarianceDISKernel(model), jnp.asarray(answers, int), warmup=500)
    assert report(mcmc).verdict != "unreliable"
    share = np.mean(np.sum(np.asarray(mcmc.get_samples()["a"]), 1) > 0)
    assert abs(share - 0.5) < 0.05
    # no estimate of one mode's evidence is at hand; the mixture has both in equal parts
    mass = jnp.exp(mcmc.last_state.learned.located.reference.log_weight)
    np.testing.assert_allclose(mass, 0.5, atol=0.05)
