# SPDX-License-Identifier: Apache-2.0
"""Pieces of a user's own keep the contract of those of the package: exact, pickled, in every chain method."""

import pickle
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import assert_evidence
from numpyro.infer import MCMC

from numpyro_sbtm import (
    Correction,
    DiffusionKernel,
    DiffusionTraining,
    SBTMKernel,
    Search,
    TransportTraining,
    report,
)
from numpyro_sbtm.core import Divergence, Gaussian, Net, Process
from numpyro_sbtm.core.local import LocalMove

TRAINING = DiffusionTraining(num_steps=4, num_paths=32, always=True)
PARTICLES = TransportTraining(num_particles=64, num_maps=2, num_updates=2, always=True)


def model():
    numpyro.sample("x", dist.Normal(3.0, 2.0).expand([2]).to_event(1))


def langevin(net, dim, num_steps, reference):
    size = 2.0 / num_steps

    def noise(x):
        return jnp.full_like(x, (2.0 * size) ** 0.5)

    def forward(params, k, x, score):
        shift, *_ = net.apply(params, k / num_steps, x, score)
        return Gaussian(x + size * (score + shift), noise(x))

    def backward(params, k, x_next, score):
        return Gaussian(x_next + size * score, noise(x_next))

    return Process(
        num_steps,
        init=lambda params: reference,
        forward=forward,
        backward=backward,
        marginal=lambda k, x: reference.log_prob(x),
        signal=np.arange(num_steps + 1) / num_steps,
    )


def clipped(paths, extra=None):
    log_weight = paths.log_weight - jax.lax.stop_gradient(jnp.median(paths.log_weight))
    return jnp.var(jnp.clip(log_weight, -3.0, 3.0))


def init_linear(key, dim):
    return {"weight": jnp.zeros((dim, dim)), "bias": jnp.zeros(dim)}


def apply_linear(params, u):
    return params["weight"] @ u + params["bias"]


def adagrad(num_steps):
    return optax.adagrad(optax.cosine_decay_schedule(0.01, num_steps))


def adapt_walk(key, logdensity_fn, points):
    return jnp.asarray(1.0, points.dtype), jnp.zeros((), jnp.int32)


def walk(key, logdensity_fn, u, step_size):
    key_walk, key_accept = jax.random.split(key)
    new = u + step_size * jax.random.normal(key_walk, u.shape, u.dtype)
    old_value, value = logdensity_fn(u), logdensity_fn(new)
    prob = jnp.nan_to_num(jnp.minimum(1.0, jnp.exp(value - old_value)))
    accept = jax.random.uniform(key_accept) < prob
    return jnp.where(accept, new, u), jnp.where(accept, value, old_value), prob, jnp.asarray(1, jnp.int32)


class Scaled(NamedTuple):
    scale: jax.Array

    def forward(self, u):
        return self.scale * u, jnp.sum(jnp.log(self.scale))

    def inverse(self, x):
        return x / self.scale, jnp.sum(jnp.log(self.scale))


diffusion = partial(DiffusionKernel, model, training=TRAINING, search=Search.quick())
PIECES = {
    "process": lambda: diffusion(process=langevin),
    "divergence": lambda: diffusion(divergence=Divergence(clipped, detach=True)),
    "network": lambda: SBTMKernel(
        model, network=Net(init_linear, apply_linear), training=PARTICLES, search=Search.quick()
    ),
    "optimizer": lambda: diffusion(optimizer=adagrad),
    "local_kernel": lambda: diffusion(correction=Correction(local_kernel=LocalMove(adapt_walk, walk))),
    "precondition": lambda: diffusion(precondition=Scaled(np.full(2, 3.0, np.float32))),
}


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_of_ones_own_is_exact_and_pickled(piece):
    kernel = pickle.loads(pickle.dumps(PIECES[piece]()))
    mcmc = MCMC(
        kernel,
        num_warmup=20,
        num_samples=500,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0))
    assert_evidence(report(mcmc))
    x = mcmc.get_samples()["x"]
    np.testing.assert_allclose(x.mean(0), 3.0, atol=0.5)
    np.testing.assert_allclose(x.std(0), 2.0, atol=0.5)
