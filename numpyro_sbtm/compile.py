# SPDX-License-Identifier: Apache-2.0
"""A long computation as stages: one after the other to run, all at the same time to compile."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.stages import Compiled, Lowered

__all__ = ["Stage", "is_traced", "run_stages"]

Stage = Callable[..., tuple[Any, ...]]

# a stage runs once: on a CPU these save more of its compilation than they cost of its run
_QUICK_COMPILATION: dict[str, str | bool] = {
    "xla_backend_optimization_level": "1",
    "xla_cpu_use_fusion_emitters": False,
}


def is_traced(values: Any) -> bool:
    """Say whether any leaf of a tree is traced, so that its value is not known."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def _compiled(lowered: Lowered) -> Compiled:
    if jax.default_backend() == "cpu":
        try:
            return lowered.compile(compiler_options=_QUICK_COMPILATION)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):  # XLA's options change without notice
                raise
    return lowered.compile()


def _call(program: Compiled, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Call a program with its inputs where its data are, which may be spread over several devices."""

    def place(value: Any, sharding: Any) -> Any:
        if not isinstance(value, jax.Array) or sharding is None:
            return value
        # what lies there already must not be bound to its device
        there = value.sharding.is_equivalent_to(sharding, value.ndim)
        return value if there else jax.device_put(value, sharding)

    return program(*jax.tree.map(place, values, program.input_shardings[0]))


def run_stages(stages: Sequence[Stage], *values: Any, results: list[Any] | None = None) -> tuple[Any, ...]:
    """Run functions one after the other, each on what the last one returned.

    XLA compiles one program on one core. So every stage becomes a program of its own, all are compiled at
    the same time, and the first ones run while the last ones still compile. Under a JAX transformation the
    stages are simply traced.

    Args:
        stages: functions of arrays, or trees of arrays, that return tuples of the next one's arguments.
        values: the first one's arguments.
        results: a list to which what every stage returned is added; None: only the last one's is kept.

    Returns:
        What the last stage returned.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.compile import run_stages
        >>> stages = [lambda x: (x.sum(), x.size), lambda total, size: (total / size,)]
        >>> float(run_stages(stages, jnp.arange(4.0))[0])
        1.5
    """
    if is_traced(values):
        for stage in stages:
            values = stage(*values)
            if results is not None:
                results.append(values)
        return values
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shapes = jax.eval_shape(lambda *values: values, *values)
        programs = []
        for stage in stages:
            lowered = jax.jit(stage).lower(*shapes)
            shapes = lowered.out_info
            programs.append(pool.submit(_compiled, lowered))
        for program in programs:
            values = _call(program.result(), values)
            if results is not None:
                results.append(values)
    return values
