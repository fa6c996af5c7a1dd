# SPDX-License-Identifier: Apache-2.0
"""Small pieces that several test files share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC

from numpyro_sbtm import (
    Correction,
    DiffusionTraining,
    LogVarianceDISKernel,
    SBTMKernel,
    Search,
    TransportTraining,
)
from numpyro_sbtm.core import Net, TransportOptions, dis, evaluate, sbtm, simulate
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.weights import clean, log_evidence
from numpyro_sbtm.networks import denoiser, score_mlp
from numpyro_sbtm.targets import gaussian, gaussian_mixture

KERNELS = {"dis": LogVarianceDISKernel, "sbtm": SBTMKernel}


def build(cls, *args, width=None, smc_particles=None, **options):
    """Make a kernel: every option is put into its group, and ``smc_particles`` are those of `Correction`."""
    transport = issubclass(cls, SBTMKernel)
    training = TransportTraining if transport else DiffusionTraining
    several = {} if smc_particles is None else {"num_particles": smc_particles}
    for name, group in (("training", training), ("correction", Correction), ("search", Search)):
        own = {
            option: options.pop(option) for option in list(options) if option in group.__dataclass_fields__
        }
        own |= several if group is Correction else {}
        if own:
            options[name] = group(**own)
    if width is not None:
        options["network"] = partial(score_mlp if transport else denoiser, width)
    return cls(*args, **options)


def transport(
    target, net, optimiser, *, base=None, annealing=None, num_steps=None, smc_particles=0, **options
):
    """Make the algorithm of transport with its options in line."""
    return sbtm(
        target,
        net,
        optimiser,
        TransportOptions(**options),
        base=base,
        annealing=annealing,
        num_steps=num_steps,
        smc_particles=smc_particles,
    )


def run_chains(kernel, *args, warmup, samples=1000, seed=0, **kwargs):
    """Run a kernel with four vectorised chains."""
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed), *args, **kwargs)
    return mcmc


STILL = Net(
    lambda key, dim: jnp.zeros(0),
    lambda params, t, x, score: (0 * x, 0 * x, jnp.zeros((), x.dtype), jnp.zeros(1, x.dtype)),
)
"""A denoiser that has learned nothing: the process is its own time reversal."""


def shaken(dim, num_steps=4, size=0.1, seed=0, reference=None, look_ahead=False):
    """A DIS process with a small network whose weights are all random, output layer included."""
    num_components = 1 if reference is None else len(reference.log_weight)
    net = denoiser(width=8, num_components=num_components, num_scores=2 if look_ahead else 1)
    params = net.init(jax.random.key(seed), dim)
    noise = jax.random.normal(jax.random.key(seed + 1), params.shape, params.dtype)
    process = dis(net, dim, num_steps, reference=reference, look_ahead=look_ahead)
    return process, params + size * noise


def three_components(widen=1.0):
    """A mixture of three correlated normal distributions on the plane, and a component that is not there."""
    angle = jnp.array([0.3, 1.2, -0.5, 0.0])
    turn = jnp.stack([jnp.cos(angle), -jnp.sin(angle), jnp.sin(angle), jnp.cos(angle)], -1).reshape(4, 2, 2)
    centre = jnp.array([[0.0, 0.0], [1.5, -1.0], [-2.0, 0.5], [9.0, 9.0]])
    std = widen * jnp.array([[0.3, 0.7], [0.2, 0.2], [0.8, 0.1], [1.0, 1.0]])
    return Mixture(jnp.log(jnp.array([0.5, 0.2, 0.3, 0.0])), turn, centre, std)


def batch(process, params, target, seed, n, detach=True):
    """Simulate n paths."""

    @jax.jit
    def run(params, seed):
        keys = jax.random.split(jax.random.key(seed), n)
        return jax.vmap(lambda key: simulate(process, params, target, key, detach=detach))(keys)

    return run(params, seed)


def evaluated(process, params, target, xs):
    """Put every density on the points of paths."""
    return jax.jit(jax.vmap(lambda x: evaluate(process, params, target, x)))(xs)


def correlated():
    """A two-dimensional normal density with correlation 0.8 and unequal scales."""
    return gaussian(np.array([0.5, -1.0]), np.array([[1.0, 0.8], [0.8, 1.5]]))


def two_modes():
    """Two modes of weights 0.3 and 0.7 that a normal distribution does not separate."""
    trils = np.stack([0.7 * np.eye(2), 0.5 * np.eye(2)])
    return gaussian_mixture(np.array([0.3, 0.7]), np.array([[-1.5, 0.0], [1.5, 0.5]]), trils)


def assert_evidence(found, truth=0.0):
    """Assert that a report's log evidence is right by the error of its weights alone.

    The printed error holds the difference of both estimates, and would excuse it.
    """
    error = float(log_evidence(clean(jnp.asarray(found.log_weight)))[1])
    assert error < 0.2
    assert_within(found.log_evidence, truth, error)


def assert_within(estimate, truth, standard_error, limit=5.0):
    """Assert that an estimate lies within a number of standard errors of the truth."""
    estimate, truth, standard_error = map(np.asarray, (estimate, truth, standard_error))
    score = np.abs(estimate - truth) / standard_error
    assert np.all(score < limit), f"{score} standard errors off: {estimate} for {truth}"
