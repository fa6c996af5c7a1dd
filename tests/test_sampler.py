# SPDX-License-Identifier: Apache-2.0
"""The trained sampler as a thing of its own: without NumPyro, as a pytree, in a folder."""

import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import assert_within
from numpyro.infer import MCMC

from numpyro_sbtm import (
    Diffusion,
    DiffusionTraining,
    LogVarianceDISKernel,
    Sampler,
    SBTMKernel,
    Search,
    Transport,
    TransportTraining,
    learn,
    learn_density,
    load,
    report,
)
from numpyro_sbtm.networks import denoiser, score_mlp

Y = np.array([1.0, 2.0, 4.0], np.float32)
PATHS = DiffusionTraining(num_steps=4, num_paths=32, always=True)
PARTICLES = TransportTraining(num_particles=64, num_maps=2, num_updates=2, always=True)
KERNELS = {
    "dis": partial(LogVarianceDISKernel, training=PATHS, search=Search.quick(), network=partial(denoiser, 8)),
    "sbtm": partial(SBTMKernel, training=PARTICLES, search=Search.quick(), network=partial(score_mlp, 8)),
}
METHODS = {"dis": Diffusion(training=PATHS), "sbtm": Transport(training=PARTICLES)}
both = pytest.mark.parametrize("kind", KERNELS)


def model(y, scale=1.0):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    numpyro.deterministic("twice", 2.0 * mu)
    numpyro.sample("y", dist.Normal(mu, scale), obs=y)


def log_evidence(y):
    cov = np.eye(len(y)) + 4.0
    quadratic = y @ np.linalg.solve(cov, y)
    return -0.5 * (quadratic + np.linalg.slogdet(cov)[1] + len(y) * np.log(2 * np.pi))


@pytest.fixture(scope="module", params=KERNELS)
def learned(request):
    kernel = KERNELS[request.param](model)
    return kernel, learn(jax.random.key(0), kernel, Y, num_steps=20)


def test_draws_of_a_model_are_of_its_sites_and_exact(learned):
    _, sampler = learned
    draws = sampler.draw(jax.random.key(1), 4000)
    np.testing.assert_allclose(draws.sites["twice"], 2.0 * draws.sites["mu"], rtol=1e-6)
    np.testing.assert_allclose(draws.x[:, 0], draws.sites["mu"])
    found = sampler.evidence(jax.random.key(2))
    assert_within(found.log_evidence, log_evidence(Y), found.error + 1e-5)
    # from the other side: E[1/w] over exact draws is 1/Z
    variance = 1.0 / (1.0 / 4.0 + len(Y))
    exact = variance * Y.sum() + np.sqrt(variance) * np.random.default_rng(0).normal(size=(4000, 1))
    inverse = np.exp(log_evidence(Y) - sampler.weigh(jax.random.key(3), exact))
    assert_within(inverse.mean(), 1.0, inverse.std() / np.sqrt(4000) + 1e-6)
    run = sampler.sample(jax.random.key(4), 500)
    assert run.sites["mu"].shape == run.log_weight.shape == (4, 500)
    np.testing.assert_allclose(run.sites["mu"].mean(), variance * Y.sum(), atol=0.1)


def test_a_run_without_numpyro_is_judged_as_one_with_it(learned):
    kernel, sampler = learned
    mcmc = MCMC(kernel, num_warmup=20, num_samples=500, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    with_it, without = report(mcmc), report(sampler.sample(jax.random.key(5), 500))
    assert [check.name for check in with_it.checks] == [check.name for check in without.checks]
    assert with_it.evaluations.search == without.evaluations.search
    assert abs(with_it.log_evidence - without.log_evidence) < 0.1
    again = kernel.sampler(mcmc.last_state, (Y,))
    key = jax.random.key(6)
    np.testing.assert_allclose(again.draw(key, 10).x, sampler.draw(key, 10).x, rtol=1e-5)


def test_a_sampler_is_a_pytree_of_what_draws_need(learned):
    _, sampler = learned
    leaves, structure = jax.tree.flatten(sampler)
    again = jax.tree.unflatten(structure, leaves)
    x = jax.jit(lambda sampler, key: sampler.propose(key, 5).x)(again, jax.random.key(0))
    np.testing.assert_allclose(x, sampler.draw(jax.random.key(0), 5).x, rtol=1e-5)
    assert sampler.learned.located.points is None  # no particles
    assert sum(np.size(leaf) for leaf in leaves) < 20_000


def test_a_saved_sampler_draws_the_same_in_another_process(learned, tmp_path):
    kernel, sampler = learned
    folder = tmp_path / "sampler"
    sampler.save(folder)
    key = jax.random.key(7)
    again = load(folder, kernel, Y)
    np.testing.assert_array_equal(again.draw(key, 10).x, sampler.draw(key, 10).x)
    kind = "dis" if isinstance(kernel, LogVarianceDISKernel) else "sbtm"
    script = f"""
import sys
sys.path += {sys.path!r}
import jax, numpy as np
from test_sampler import KERNELS, Y, load, model
sampler = load({str(folder)!r}, KERNELS[{kind!r}](model), Y)
np.save({str(tmp_path / "x.npy")!r}, sampler.draw(jax.random.key(7), 10).x)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    # programs are compiled anew there, and may round otherwise
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), sampler.draw(key, 10).x, rtol=1e-5)


def test_what_does_not_belong_to_a_saved_sampler_is_refused(learned, tmp_path):
    kernel, sampler = learned
    folder = tmp_path / "sampler"
    sampler.save(folder)
    with pytest.raises(FileExistsError, match=r"`path` is .* Pass a new folder"):
        sampler.save(folder)
    with pytest.raises(FileNotFoundError, match="where no sampler is"):
        load(tmp_path / "nothing", kernel, Y)
    with pytest.raises(ValueError, match=r"for other data.*Pass the same, or learn anew"):
        load(folder, kernel, Y + 1.0)
    with pytest.raises(ValueError, match=r"other settings: .* was .*, is .*Pass the kernel"):
        load(folder, LogVarianceDISKernel(model), Y)
    description = json.loads((folder / "sampler.json").read_text())
    (folder / "sampler.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(ValueError, match=r"in format 99, but this version .* reads format 1"):
        load(folder, kernel, Y)


@both
def test_densities_are_learned_without_a_model(kind, tmp_path):
    def density(x):
        return -1e6 - 0.5 * jnp.sum((x - 1.0) ** 2)  # float32 knows such numbers to a sixteenth

    sampler = learn_density(
        jax.random.key(0),
        density,
        np.zeros((1, 2), np.float32),
        num_steps=20,
        method=METHODS[kind],
        search=Search.quick(),
    )
    found = sampler.evidence(jax.random.key(1))
    assert abs(found.log_evidence - (np.log(2 * np.pi) - 1e6)) < 0.2
    run = sampler.sample(jax.random.key(2), 500)
    np.testing.assert_allclose(run.x.mean((0, 1)), 1.0, atol=0.2)
    assert report(run).draws.verdict == "caution"  # nothing looked for other modes
    sampler.save(tmp_path / "sampler")
    again = Sampler.load(tmp_path / "sampler", density, sampler.settings)
    key = jax.random.key(3)
    np.testing.assert_array_equal(again.draw(key, 5).x, sampler.draw(key, 5).x)


def test_the_core_knows_nothing_of_numpyro_and_no_import_starts_a_backend():
    script = """
import sys, numpyro_sbtm.core
assert not {"numpyro", "flax", "blackjax"} & set(sys.modules)
import numpyro, numpyro_sbtm
from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, learn, load, report
numpyro.set_host_device_count(4)
import jax
assert jax.device_count() == 4
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_are_what_is_imported():
    import numpyro_sbtm

    for name in dir(numpyro_sbtm):
        assert getattr(numpyro_sbtm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nuts'"):
        numpyro_sbtm.nuts  # noqa: B018
