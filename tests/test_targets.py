# SPDX-License-Identifier: Apache-2.0
"""Benchmark targets: draws have the density's law, modes their masses, and log Z its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import iv

from numpyro_sbtm import targets
from numpyro_sbtm.core.target import Target

NUM_DRAWS = 20_000

SAMPLED = {
    "nine modes": targets.nine_modes,
    "forty modes": targets.forty_modes,
    "student": targets.student_t_mixture,
    "funnel": lambda: targets.funnel(sd=0.5),  # the score of a wide one has no useful variance
    "wells": targets.double_wells,
    "wells and normals": lambda: targets.double_wells(7, 2, 2.0),
    "shifted wells": lambda: targets.double_wells(4, 2, 2.0, shift=1.5),
    "many well": lambda: targets.many_well(6),
    "rings": targets.rings,
    "unequal pair": targets.unequal_pair,
    "sixteen modes": targets.sixteen_modes,
    "circle": targets.circle,
}


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_follow_the_density(name):
    """Stein's identities: E[score] = 0 and E[x score] = -1 in every coordinate."""
    target = SAMPLED[name]()
    x = target.sample(jax.random.key(0), NUM_DRAWS)
    score = jax.vmap(jax.grad(target.logdensity_fn))(x)
    for zero in (score, x * score + 1.0):
        error = jnp.std(zero, 0) / np.sqrt(NUM_DRAWS)
        assert jnp.all(jnp.abs(jnp.mean(zero, 0)) < 4.5 * error), name


@pytest.mark.parametrize("name", [name for name in SAMPLED if name not in ("funnel", "circle")])
def test_modes_have_their_masses(name):
    target = SAMPLED[name]()
    x = target.sample(jax.random.key(1), NUM_DRAWS)
    found = jnp.mean(jax.vmap(target.modes.membership)(x), 0)
    masses = target.modes.masses
    assert found.shape == masses.shape
    assert jnp.all(jnp.abs(found - masses) < 4.5 * np.sqrt(masses * (1 - masses) / NUM_DRAWS))


def double_well_mass(separation):
    """The integral of exp(-(x² - δ)²) by Bessel functions."""
    z = separation**2 / 2
    return np.exp(-z) * np.pi / 2 * np.sqrt(separation) * (iv(-0.25, z) + iv(0.25, z))


@pytest.mark.parametrize("separation", [2.0, 4.0])
def test_double_wells_against_bessel_functions(separation):
    found = targets.double_wells(50, 5, separation).log_z
    assert abs(found - 5 * np.log(double_well_mass(separation)) - 22.5 * np.log(2 * np.pi)) < 1e-6


@pytest.mark.parametrize("name", ["nine modes", "student", "rings"])
def test_log_z_in_the_plane(name):
    """By summation over a grid that contains the mass, Student's tails but for 1 in 1000."""
    target: Target = SAMPLED[name]()
    half, n = (150.0, 1501) if name == "student" else (9.0, 1801)
    axis = np.linspace(-half, half, n)
    density = lambda a, b: jnp.exp(target.logdensity_fn(jnp.stack([a, b])))  # noqa: E731
    rows = jax.jit(lambda b: jnp.sum(jax.vmap(density, (0, None))(axis, b)))
    total = float(jax.lax.map(rows, jnp.asarray(axis)).sum()) * (axis[1] - axis[0]) ** 2
    assert abs(np.log(total) - target.log_z) < (1e-3 if name == "student" else 1e-4)


def test_funnel_is_normalised():
    target = targets.funnel(3)
    x = jax.random.normal(jax.random.key(0), (NUM_DRAWS, 3)) * jnp.array([3.0, 6.0, 6.0])
    proposal = jax.scipy.stats.norm.logpdf(x, 0.0, jnp.array([3.0, 6.0, 6.0])).sum(-1)
    weight = jnp.exp(jax.vmap(target.logdensity_fn)(x) - proposal)
    weight = jnp.where(jnp.abs(x[:, 0]) < 2.0, weight, 0.0)  # on a slice, where weights are bounded
    slice_mass = 2 * (jax.scipy.stats.norm.cdf(2.0 / 3.0) - 0.5)
    assert abs(jnp.mean(weight) - slice_mass) < 4 * jnp.std(weight) / np.sqrt(NUM_DRAWS)


# ------------------------------------------------------------------ posteriors
def test_posteriors_have_finite_scores():
    rng = np.random.default_rng(0)
    posteriors = [
        targets.logistic_regression(rng.normal(size=(20, 3)), rng.integers(0, 2, 20).astype(float), 10.0),
        targets.brownian(np.array([0.1, 0.2, np.nan, np.nan, -0.1])),
        targets.seeds(np.array([1, 5, 2]), np.array([4, 9, 7]), np.array([0, 1, 1]), np.array([1, 0, 1])),
    ]
    for target in posteriors:
        value, score = jax.value_and_grad(target.logdensity_fn)(0.1 * jnp.ones(target.dim))
        assert score.shape == (target.dim,)
        assert jnp.isfinite(value) and jnp.all(jnp.isfinite(score))


def test_brownian_marginal_likelihood():
    """With both scales known the states integrate out: compare with the joint normal density."""
    observed = np.array([0.3, np.nan, -0.2])
    target, scales = targets.brownian(observed), np.log([0.5, 0.2])
    seen = np.isfinite(observed)
    states = 0.25 * np.minimum.outer(np.arange(1, 4), np.arange(1, 4))
    cov = (states + 0.04 * np.eye(3))[np.ix_(seen, seen)]
    exact = jax.scipy.stats.multivariate_normal.logpdf(observed[seen], jnp.zeros(2), cov)
    exact = exact + jnp.sum(jax.scipy.stats.norm.logpdf(scales, 0.0, 2.0))
    # quadratic in the states: its integral is that of the normal density at the maximum
    f = lambda states: target.logdensity_fn(jnp.concatenate([jnp.asarray(scales), states]))  # noqa: E731
    hessian = -jax.hessian(f)(jnp.zeros(3))
    peak = jnp.linalg.solve(hessian, jax.grad(f)(jnp.zeros(3)))
    found = f(peak) + 1.5 * jnp.log(2 * jnp.pi) - 0.5 * jnp.linalg.slogdet(hessian)[1]
    assert abs(found - exact) < 1e-3
