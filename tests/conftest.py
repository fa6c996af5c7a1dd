# SPDX-License-Identifier: Apache-2.0
"""Shapes in signatures of core and search are checked at run time; float64 where an identity asks for it.

Almost all of the time of quick tests is compilation.
"""

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["numpyro_sbtm.core", "numpyro_sbtm.search"], "beartype.beartype")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Optimise no programs that run once, and those of long tests."""
    long = item.get_closest_marker("slow") or item.get_closest_marker("long")
    jax.config.update("jax_disable_most_optimizations", not long)


@pytest.fixture
def x64():
    """Run a test in float64."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Free each file's compiled programs, or memory mappings run out, and undo what its fixtures enabled."""
    before = jax.config.jax_enable_x64
    yield
    jax.clear_caches()
    jax.config.update("jax_enable_x64", before)
