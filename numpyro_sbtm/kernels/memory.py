# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that are dropped before a process runs out of memory mappings."""

import gc

import jax

__all__ = ["spare_memory_mappings"]

_MAX_MAPPINGS = 0.6  # share of the process's memory mappings that leaves room for another run


def spare_memory_mappings() -> None:
    """Drop JAX's compiled programs when they have used most of the memory mappings a process may have.

    On Linux, XLA's CPU client takes some thousand mappings for every large program, NumPyro keeps the
    programs of all past runs, and a process that runs out of mappings dies. What is still needed is
    compiled again.
    """
    try:
        with open("/proc/self/maps", "rb") as maps, open("/proc/sys/vm/max_map_count") as limit:
            share = sum(1 for _ in maps) / int(limit.read())
    except OSError:  # not Linux
        return
    if share > _MAX_MAPPINGS:
        gc.collect()
        jax.clear_caches()
