# SPDX-License-Identifier: Apache-2.0
"""Proper densities fall along every ray, improper ones do not; heavy tails are no fault."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import biject_to

from numpyro_sbtm.core.decay import decay
from numpyro_sbtm.core.maps import Affine
from numpyro_sbtm.core.target import Target

NO_DECAY = 0.75
D = 5


def site(distribution):
    """Density and draws of a site on its unconstrained space."""
    transform = biject_to(distribution.support)

    def logdensity(x):
        y = transform(x)
        return jnp.sum(distribution.log_prob(y)) + jnp.sum(transform.log_abs_det_jacobian(x, y))

    return logdensity, lambda key: transform.inv(distribution.sample(key))


def product(distribution, dim=D):
    return site(distribution.expand([dim]).to_event(1))


def joined(build):
    """Density and draws of a normal hierarchy: a log scale first, the rest given it."""

    def logdensity(x):
        scale, rest = build(x[0])
        return scale.log_prob(x[0]) + jnp.sum(rest.log_prob(x[1:]))

    def sample(key):
        first, second = jax.random.split(key)
        log_scale = build(0.0)[0].sample(first)
        return jnp.append(log_scale, build(log_scale)[1].sample(second, (D,)))

    return logdensity, sample


def horseshoe():
    def logdensity(x):
        local, beta = x[:D], x[D:]
        prior = dist.HalfCauchy(1.0).log_prob(jnp.exp(local)) + local
        return jnp.sum(prior) + jnp.sum(dist.Normal(0.0, jnp.exp(local)).log_prob(beta))

    def sample(key):
        first, second = jax.random.split(key)
        local = jnp.log(dist.HalfCauchy(1.0).sample(first, (D,)))
        return jnp.concatenate([local, jnp.exp(local) * jax.random.normal(second, (D,))])

    return logdensity, sample


def centred_schools():
    """The prior of centred eight schools, which the data only narrow."""

    def logdensity(x):
        mu, log_tau, theta = x[0], x[1], x[2:]
        tau = jnp.exp(log_tau)
        scale = dist.HalfCauchy(5.0).log_prob(tau) + log_tau
        return dist.Normal(0.0, 5.0).log_prob(mu) + scale + jnp.sum(dist.Normal(mu, tau).log_prob(theta))

    def sample(key):
        keys = jax.random.split(key, 3)
        mu, tau = 5.0 * jax.random.normal(keys[0]), dist.HalfCauchy(5.0).sample(keys[1])
        return jnp.concatenate([jnp.array([mu, jnp.log(tau)]), mu + tau * jax.random.normal(keys[2], (8,))])

    return logdensity, sample


SPIKE = dist.MixtureSameFamily(
    dist.Categorical(jnp.array([0.9, 0.1])), dist.Normal(jnp.zeros(2), jnp.array([0.05, 3.0]))
)
PROPER = {
    "wide and far, without a whitening": lambda: product(dist.Normal(1e5, 300.0)),
    "Cauchy on the line": lambda: product(dist.Cauchy(0.0, 1.0), 1),
    "Cauchy, many": lambda: product(dist.Cauchy(0.0, 1.0), 300),
    "Student t, 1 degree": lambda: product(dist.StudentT(1.0, 3.0, 2.0)),
    "funnel": lambda: joined(lambda v: (dist.Normal(0.0, 3.0), dist.Normal(0.0, jnp.exp(0.5 * v)))),
    "horseshoe": horseshoe,
    "centred schools": centred_schools,
    "spike and slab": lambda: product(SPIKE),
    "uniform": lambda: product(dist.Uniform(-2.0, 5.0)),
    "simplex": lambda: site(dist.Dirichlet(0.3 * jnp.ones(4))),
    "LKJ": lambda: site(dist.LKJCholesky(4, 1.0)),
    "thousand": lambda: product(dist.Normal(0.0, 1.0), 1000),
}


def rays(logdensity, x):
    dim = x.shape[1]
    plain = Affine(jnp.zeros(dim), jnp.eye(dim))
    find = jax.jit(lambda key, x: decay(key, Target(logdensity, dim), plain, x, jnp.zeros(len(x))))
    return find(jax.random.key(1), x)


@pytest.mark.parametrize("name", PROPER)
def test_proper_densities_fall_along_every_ray(name):
    logdensity, sample = PROPER[name]()
    found = rays(logdensity, jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), 1000)))
    assert max(np.max(found.coordinates), found.outwards, found.scaled) <= NO_DECAY, found


def separated(x):
    """Logistic regression with an intercept and one slope, of separated data, with flat priors."""
    data = jnp.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])
    return jnp.sum(jax.nn.log_sigmoid(jnp.sign(data) * (x[0] + x[1] * data)))


@pytest.mark.parametrize("size", [1.0, 1e36])
def test_separated_data_with_flat_priors_are_improper(size):
    slope = size * (5.0 + 5.0 * jax.random.uniform(jax.random.key(0), (1000,)))
    x = jnp.stack([0.1 * slope * jax.random.normal(jax.random.key(1), (1000,)), slope], 1)
    found = rays(separated, x)
    assert max(np.max(found.coordinates), found.scaled) > NO_DECAY, found


def test_a_flat_coordinate_is_found_among_others():
    x = jax.random.normal(jax.random.key(0), (1000, 4))
    found = rays(lambda x: -0.5 * jnp.sum(x[jnp.array([0, 1, 3])] ** 2), x)
    np.testing.assert_array_equal(np.asarray(found.coordinates) > NO_DECAY, [False, False, True, False])


def test_where_a_density_is_undefined_shorter_rays_tell():
    x = jax.random.normal(jax.random.key(0), (1000, 2))
    found = rays(lambda x: jnp.where(jnp.any(jnp.abs(x) > 10), jnp.nan, -0.5 * x[0] ** 2), x)
    assert found.coordinates[0] <= NO_DECAY < found.coordinates[1]
