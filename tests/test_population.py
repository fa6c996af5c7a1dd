# SPDX-License-Identifier: Apache-2.0
"""Mixtures that the weights of their own draws better."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_within

from numpyro_sbtm.core.mixture import Mixture, normal
from numpyro_sbtm.core.psis import tail_index
from numpyro_sbtm.core.weights import clean, ess_fraction, log_evidence
from numpyro_sbtm.search.population import better_mixture, with_wider

DIM = 4
NUM = 4096
FREEDOM = 5.0


def student(x):
    """Independent Student laws of unit variance; Z = 1."""
    scale = ((FREEDOM - 2.0) / FREEDOM) ** 0.5
    return jnp.sum(jax.scipy.stats.t.logpdf(x / scale, FREEDOM) - jnp.log(scale))


def weights(key, density, mixture):
    draws = jax.vmap(mixture.sample)(jax.random.split(key, NUM))
    return clean(jax.vmap(density)(draws) - jax.vmap(mixture.log_prob)(draws))


def two_turned(key):
    """Two components with axes of their own."""
    rotation = jnp.linalg.qr(jax.random.normal(key, (2, DIM, DIM)))[0]
    std = jnp.array([[1.0, 0.5, 2.0, 1.0], [0.3, 1.0, 1.0, 1.0]])
    return Mixture(jnp.log(jnp.array([0.3, 0.7])), rotation, jnp.array([[0.0] * DIM, [2.0] * DIM]), std)


@pytest.mark.parametrize("make", [lambda key: normal(DIM), two_turned], ids=["one", "two"])
def test_wider_components_never_raise_a_weight_by_more_than_a_quarter(make):
    mixture = make(jax.random.key(0))
    points = 5.0 * jax.random.normal(jax.random.key(1), (200, DIM))
    wider = with_wider(mixture, points)
    ratio = jax.vmap(wider.log_prob)(points) - jax.vmap(mixture.log_prob)(points)
    assert float(jnp.min(ratio)) >= np.log(0.8) - 1e-5
    assert float(jnp.max(ratio)) > 5.0  # and lower those of points far out
    # a density still: by draws from it, E[old / new] = 1
    found, error = log_evidence(weights(jax.random.key(2), mixture.log_prob, wider))
    assert_within(found, 0.0, error)


def test_draws_better_a_mixture_with_light_tails():
    points = jax.random.t(jax.random.key(0), FREEDOM, (512, DIM)) * ((FREEDOM - 2.0) / FREEDOM) ** 0.5
    better = better_mixture(jax.random.key(1), student, with_wider(normal(DIM), points), NUM, 3)
    before, after = (weights(jax.random.key(2), student, mixture) for mixture in (normal(DIM), better))
    assert float(ess_fraction(before)) < 0.85 and float(tail_index(before)) > 0.5
    assert float(ess_fraction(after)) > 0.86 and float(tail_index(after)) < 0.5
    found, error = log_evidence(after)
    assert_within(found, 0.0, error)


def test_draws_move_a_mixture_to_modes_of_unequal_mass():
    """Masses .8 and .2 at distance five, from two components of equal weight that lie beside them."""
    modes = jnp.array([0.0, 5.0])

    def density(x):
        far = -0.5 * jnp.sum((x - modes[:, None]) ** 2, -1) + jnp.log(jnp.array([0.8, 0.2]))
        return jax.nn.logsumexp(far) - 0.5 * DIM * jnp.log(2 * jnp.pi)

    beside = (modes + jnp.array([0.7, -0.7]))[:, None] * jnp.ones(DIM)
    one = jnp.broadcast_to(jnp.eye(DIM), (2, DIM, DIM))
    start = Mixture(jnp.log(jnp.ones(2) / 2), one, beside, jnp.full((2, DIM), 1.5))
    better = better_mixture(jax.random.key(0), density, start, NUM, 6)
    found = weights(jax.random.key(1), density, better)
    assert float(ess_fraction(found)) > 0.97
    log_z, error = log_evidence(found)
    assert_within(log_z, 0.0, error)
    means = jnp.einsum("cij,cj->ci", better.rotation, better.centre)
    assert jnp.allclose(jnp.mean(means, 1), modes, atol=0.1)
    assert_within(jnp.exp(better.log_weight[0]), 0.8, 0.02)


def test_where_there_is_no_density_nothing_spreads():
    """N(0, I) where x0 < 1, NaN beyond; and a density that is NaN everywhere."""
    half = lambda x: jnp.where(x[0] < 1.0, -0.5 * jnp.sum(x**2), jnp.nan)  # noqa: E731
    start = with_wider(normal(DIM), jax.random.normal(jax.random.key(0), (512, DIM)))
    better = better_mixture(jax.random.key(1), half, start, NUM, 3)
    log_z, error = log_evidence(weights(jax.random.key(2), half, better))
    assert_within(log_z, np.log(0.8413447) + 0.5 * DIM * np.log(2 * np.pi), error)
    nowhere = better_mixture(jax.random.key(1), lambda x: jnp.nan * jnp.sum(x), start, NUM, 3)
    assert all(bool(jnp.all(a == b)) for a, b in zip(nowhere, start, strict=True))
    gone = start._replace(log_weight=start.log_weight.at[1].set(-jnp.inf))
    kept = better_mixture(jax.random.key(1), half, gone, NUM, 3)
    assert kept.log_weight[1] == -jnp.inf
    assert all(bool(jnp.all(~jnp.isnan(leaf))) for leaf in kept)
