# SPDX-License-Identifier: Apache-2.0
"""No random key is used twice, by JAX's own check of traced programs; nothing is compiled."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import three_components, transport, two_modes
from jax import lax
from jax.experimental.key_reuse import _core as key_reuse

from numpyro_sbtm.core import DiffusionOptions, diffusion, dis
from numpyro_sbtm.core.local import LOCAL_KERNELS, local_move
from numpyro_sbtm.methods.diffusion import DIVERGENCES, PROCESSES
from numpyro_sbtm.networks import denoiser, score_mlp
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.warm_start import warm_start
from numpyro_sbtm.targets import gaussian

DIM = 4  # above which divergences are estimated with noise
PIECES = {"num_updates": 2, "coarse_steps": 3, "trust_region": 0.5, "buffer_size": 16, "num_times": 2}
FLOWS = {
    "flow": {"max_rounds": 3, "first_updates": 2},
    "heun": {"heun": True, "first_updates": 2},
    "noisy": {"noisy": True, "first_updates": 2},
    "quasi": {"quasi": True, "solved_output": True},
}


@pytest.fixture(autouse=True)
def _transposed_keys(monkeypatch):
    """Let the check know of keys that `vmap` transposes: it takes them for used."""
    signature = key_reuse.KeyReuseSignature(key_reuse.Forward(0, 0))
    monkeypatch.setitem(key_reuse.key_reuse_signatures, lax.transpose_p, signature)


def diffusion_of(process="dis", divergence="log-variance", endpoints=None, **options):
    if process == "dis":
        target, net = two_modes(), denoiser(8, num_components=4)
        made = dis(net, 2, 4, reference=three_components())
    else:
        target = gaussian(jnp.zeros(DIM), jnp.eye(DIM))
        net = PROCESSES[process].network(denoiser(8))
        made = PROCESSES[process].process(net, DIM, 4, 1.0)
    loss = DIVERGENCES[divergence](made)
    return target.dim, diffusion(
        target,
        made,
        net,
        loss,
        optax.adam(1e-3),
        DiffusionOptions(num_paths=32, **options),
        endpoints=endpoints,
        smc_particles=4,
    )


def flow_of(**options):
    sizes = {"num_particles": 32, "num_maps": 2, "num_updates": 2, "batch_size": 8, "num_probes": 16}
    target = gaussian(jnp.zeros(DIM), jnp.eye(DIM))
    return DIM, transport(target, score_mlp(8), optax.adam(1e-3), smc_particles=4, **sizes, **options)


ALGORITHMS = {
    **{name: lambda name=name: diffusion_of(divergence=name) for name in DIVERGENCES},
    "every piece": lambda: diffusion_of(exploration=0.1, endpoints=jnp.zeros((4, 2)), **PIECES),
    "bridge": lambda: diffusion_of("bridge"),
    **{name: lambda name=name: flow_of(**FLOWS[name]) for name in FLOWS},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_use_no_key_twice(name):
    dim, algorithm = ALGORITHMS[name]()
    key, x = jax.random.key(0), jnp.zeros(dim)
    state = jax.eval_shape(algorithm.init, key)
    key_reuse.check_key_reuse(algorithm.init, key)
    key_reuse.check_key_reuse(algorithm.step, key, state)
    params = jax.eval_shape(algorithm.parameters, state)
    for one in (algorithm.proposal, algorithm.several):
        key_reuse.check_key_reuse(lambda key, params, one=one: one.draw(key, params, 3), key, params)
        key_reuse.check_key_reuse(one.weigh, key, params, x)


def test_the_check_finds_a_key_that_is_used_twice():
    def twice(key):
        return jax.vmap(lambda key: jax.random.normal(key) + jax.random.uniform(key))(jax.random.split(key))

    with pytest.raises(jax.errors.KeyReuseError):
        key_reuse.check_key_reuse(twice, jax.random.key(0))


@pytest.mark.parametrize("name", [name for name in LOCAL_KERNELS if name != "nuts"])  # blackjax selects keys
def test_local_moves_use_no_key_twice(name):
    move, density, key = local_move(name), two_modes().logdensity_fn, jax.random.key(0)
    key_reuse.check_key_reuse(lambda key: move.step(key, density, jnp.zeros(2), 0.1), key)
    key_reuse.check_key_reuse(lambda key: move.adapt(key, density, jnp.zeros((4, 2))), key)


def test_the_warm_start_uses_no_key_twice():
    given = jax.random.key(0), jnp.zeros((2, 2)), jnp.zeros((4, 2))
    for stage in warm_start(two_modes(), jnp.arange(2), Search(refine=True)):
        key_reuse.check_key_reuse(stage, *given)
        given = jax.eval_shape(stage, *given)
