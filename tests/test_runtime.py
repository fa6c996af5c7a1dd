# SPDX-License-Identifier: Apache-2.0
"""What the package does to the process it runs in: devices, and what is alive after import."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_script(script, timeout=900, **environment):
    """Run a script in a process of its own, which must end well; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_starts_no_backend_and_leaves_no_array():
    """As every NumPyro example has it, the number of devices is set after the imports."""
    run_script(
        """
        import jax, numpyro, numpyro_sbtm
        from numpyro_sbtm import DiffusionKernel, LogVarianceDISKernel, SBTMKernel
        from numpyro_sbtm import core, networks, plots, targets

        kernels = [DiffusionKernel, LogVarianceDISKernel, SBTMKernel]
        made = [kernel(potential_fn=lambda x: x @ x) for kernel in kernels]
        networks.denoiser(), networks.score_mlp(), networks.radial()
        numpyro.set_host_device_count(4)
        assert not jax.live_arrays()
        assert jax.local_device_count() == 4, jax.devices()
        """
    )


def test_what_is_imported_while_a_function_is_traced_holds_no_tracers():
    run_script(
        """
        import jax, jax.numpy as jnp
        from numpyro_sbtm.core.local import local_move
        from numpyro_sbtm.networks import denoiser
        from numpyro_sbtm.core.psis import tail_index

        @jax.jit
        def first(key):
            params = denoiser(8).init(key, 2)
            out = denoiser(8).apply(params, jnp.array(0.5), jnp.ones(2), jnp.ones(2))
            moved = local_move("nuts").step(key, lambda u: -(u @ u), jnp.ones(2), jnp.array(0.1))[0]
            return out[0] + moved + tail_index(jnp.arange(100.0))

        with jax.checking_leaks():
            first(jax.random.key(0))
        first.clear_cache()
        print(jax.jit(lambda key: first(key))(jax.random.key(1)))
        """
    )


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np, numpyro
    import numpyro.distributions as dist
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from numpyro.infer import MCMC
    from numpyro_sbtm import LogVarianceDISKernel
    from numpyro_sbtm.compile import run_stages

    assert len(jax.devices()) == 4
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    x_all = rng.normal(size=(64, 2)).astype(np.float32)
    y_all = (x_all @ np.array([1.0, -1.0]) + rng.normal(size=64)).astype(np.float32)
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    x, y = jax.device_put(x_all, rows), jax.device_put(y_all, rows)
    """


def test_stages_take_data_that_are_spread_over_devices():
    run_script(
        SHARDED
        + """
    start = jnp.ones(2)
    stages = [lambda b, c: (b, x @ b + c), lambda b, fit: (b + 1.0, fit.sum()), lambda b, s: (y @ x @ b + s,)]
    for given in (start, jax.device_put(start, jax.devices()[1])):
        (found,) = run_stages(stages, given, x[:, 0])
        exact = y_all @ x_all @ np.full(2, 2.0) + (x_all @ np.ones(2) + x_all[:, 0]).sum()
        np.testing.assert_allclose(found, exact, rtol=1e-4)
    # what lies on one device is not bound to it
    (free,) = run_stages([lambda b: (2.0 * b,)], start)
    assert not free.committed
    """,
        JAX_NUM_CPU_DEVICES="4",
    )


@pytest.mark.slow
@pytest.mark.parametrize("held", ["as arguments", "by the model"])
def test_a_run_with_data_that_are_spread_over_devices(held):
    """The posterior is that of the same data on one device, which is exact."""
    given = "x, y" if held == "as arguments" else ""
    run_script(
        SHARDED
        + f"""
    def model(x=x, y=y):
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    options = dict(chain_method="vectorized", progress_bar=False)
    mcmc = MCMC(LogVarianceDISKernel(model), num_warmup=20, num_samples=1000, num_chains=2, **options)
    mcmc.run(jax.random.key(0), {given})
    cov = np.linalg.inv(x_all.T @ x_all + np.eye(2) / 4.0)
    z = (np.asarray(mcmc.get_samples()["slope"]) - cov @ x_all.T @ y_all) / np.sqrt(np.diag(cov))
    assert np.all(np.abs(z.mean(0)) < 0.15), z.mean(0)
    assert np.all(np.abs(np.log(z.std(0))) < 0.15), z.std(0)
    """,
        JAX_NUM_CPU_DEVICES="4",
    )


@pytest.mark.long
def test_twenty_searches_of_a_factor_model_end():
    """A Cholesky factor and two triangular solves: in one of three searches jaxlib 0.10 waited for itself."""
    run_script(
        """
        import faulthandler
        import jax, jax.numpy as jnp, numpy as np, numpyro
        import numpyro.distributions as dist
        from jax.scipy.linalg import cho_solve
        from numpyro.infer import init_to_uniform
        from numpyro_sbtm.core import Target
        from numpyro_sbtm.kernels.model import Model, from_model
        from numpyro_sbtm.kernels.problem import logdensity
        from numpyro_sbtm.options import Search
        from numpyro_sbtm.search.warm_start import warm_start

        rng = np.random.default_rng(0)
        y = rng.normal(size=(100, 2)) @ rng.normal(size=(2, 6)) + 0.5 * rng.normal(size=(100, 6))
        squares = (y.T @ y).astype(np.float32)

        def model(squares):
            loading = numpyro.sample("loading", dist.Normal(0.0, 1.0).expand([6, 2]).to_event(2))
            psi = numpyro.sample("psi", dist.HalfNormal(1.0).expand([6]).to_event(1))
            root = jnp.linalg.cholesky(loading @ loading.T + jnp.diag(psi**2 + 1e-3))
            distance = jnp.trace(cho_solve((root, True), squares))
            numpyro.factor("y", -100 * jnp.sum(jnp.log(jnp.diagonal(root))) - 0.5 * distance)

        bound = Model(model, (squares,), {}, init_to_uniform, False)
        problem = from_model(jax.random.key(0), bound, num_chains=1, search=Search(), init_params=None)
        target = Target(logdensity(problem, (squares,), {}, False), 18)
        stages = [jax.jit(stage) for stage in warm_start(target, jnp.asarray(problem.order), Search())]
        for seed in range(20):
            # the first one compiles
            faulthandler.dump_traceback_later(600 if seed else 3600, exit=True)
            values = jax.random.key(seed), problem.starts, problem.scouts
            for stage in stages:
                values = jax.block_until_ready(stage(*values))
            print(seed, flush=True)
        """,
        timeout=4 * 3600,
    )
