# SPDX-License-Identifier: Apache-2.0
"""Chains by any kernel, timed."""

import time

import jax
from jax import monitoring
from numpyro.infer import MCMC

__all__ = ["NUM_CHAINS", "NUM_DRAWS", "timed_chains"]

NUM_CHAINS, NUM_DRAWS = 4, 1000


class _Compilation:
    """Seconds that XLA spends on compiling, those of programs compiled side by side added up."""

    def __init__(self):
        self.seconds = 0.0
        monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += seconds


_compilation = _Compilation()


def timed_chains(kernel, num_warmup, seed, args=(), fields=(), num_draws=NUM_DRAWS):
    """Warm up and draw, four chains side by side.

    With the progress bar NumPyro compiles one program for both, so that ``draws_s`` is free of compilation.

    Returns the finished MCMC, the extra fields of warm-up, and the seconds.
    """
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_draws,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
    )
    compiling, start = _compilation.seconds, time.perf_counter()
    mcmc.warmup(jax.random.key(seed), *args, extra_fields=fields, collect_warmup=bool(fields))
    jax.block_until_ready(mcmc.post_warmup_state)
    row = {"warmup_s": time.perf_counter() - start, "compilation_s": _compilation.seconds - compiling}
    warmup = mcmc.get_extra_fields() if fields else {}
    start = time.perf_counter()
    mcmc.run(jax.random.key(seed + 1), *args, extra_fields=fields)
    jax.block_until_ready(mcmc.get_samples())
    return mcmc, warmup, row | {"draws_s": time.perf_counter() - start}
