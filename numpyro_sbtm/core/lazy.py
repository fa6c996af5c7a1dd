# SPDX-License-Identifier: Apache-2.0
"""Imports that wait until something is computed."""

from importlib import import_module
from typing import Any

import jax

__all__ = ["load"]


def load(name: str) -> Any:
    """Import a module that makes arrays when it is imported, as blackjax and flax do.

    At the head of a file they would start JAX's backend, after which `numpyro.set_host_device_count` has no
    effect and `jax.distributed.initialize` refuses. Within a trace their arrays would be tracers.

    Args:
        name: of the module.

    Returns:
        The module.

    Examples:
        >>> from numpyro_sbtm.core.lazy import load
        >>> load("blackjax.mcmc.hmc").__name__
        'blackjax.mcmc.hmc'
    """
    with jax.ensure_compile_time_eval():
        return import_module(name)
