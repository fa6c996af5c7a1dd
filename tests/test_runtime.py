# SPDX-License-Identifier: Apache-2.0
"""What the package does to the process it runs in: devices, and what is alive after import."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_script(script, **environment):
    """Run a script in a process of its own, which must end well; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=900,
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
        from numpyro_sbtm.local import local_move
        from numpyro_sbtm.networks import denoiser
        from numpyro_sbtm.psis import tail_index

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
