# SPDX-License-Identifier: Apache-2.0
"""How many points jaxlib 0.10 can factorise matrices for at once without waiting for itself.

From 0.10.0 to 0.11.0 a batched LAPACK call on a CPU runs in a thread of XLA's pool and waits for parts that
it leaves to the same pool. As many such calls at once as there are threads wait for ever; only calls that do
not depend on each other run at once. A call with little work has no parts. Python 3.11 has no later jaxlib
than 0.10, so that all of this is needed for as long as that Python is supported.
"""

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.extend.core import Var, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

__all__ = ["most_points"]

_WAITING = (0, 10, 0) <= tuple(map(int, version("jaxlib").split(".")[:3])) <= (0, 11, 0)
_LAPACK = {
    *("cholesky", "eig", "eigh", "geqrf", "hessenberg", "householder_product", "lu", "schur", "svd"),
    *("triangular_solve", "tridiagonal", "tridiagonal_solve"),
}
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
    "remat2",
}
_UNDIVIDED = 200_000  # floating-point operations of a call that has no parts
_OPERATIONS = {"cholesky": 1, "triangular_solve": 2}  # floating-point operations per entry and row, at most
_MOST_OPERATIONS = 25  # the same, of a singular value decomposition


def most_points(function: Callable[..., Any], x: Array, num_threads: int | None = None) -> int | None:
    """Say at how many points a function may be evaluated together, None where any number is safe.

    Args:
        function: of one point. It is traced only where the answer depends on it.
        x: a point.
        num_threads: in XLA's pool; None: one for each processor of this process.
    """
    if not _WAITING or jax.default_backend() != "cpu":
        return None
    if num_threads is None:
        affinity = getattr(os, "sched_getaffinity", None)  # not on every system
        num_threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    work: list[int] = []  # of each call
    order: list[frozenset[int]] = []  # the calls on which each depends

    def operations(equation: Any) -> int:
        name, sizes = equation.primitive.name, [var.aval.size for var in equation.invars]
        entries = sizes[-1] if name == "triangular_solve" else max(sizes)
        return _OPERATIONS.get(name, _MOST_OPERATIONS) * entries * equation.invars[0].aval.shape[-1]

    def walk(jaxpr: Any, inputs: list[frozenset[int] | None]) -> list[frozenset[int] | None]:
        """Follow which calls each value depends on; None: not on the point."""
        earlier = dict(zip(jaxpr.invars, inputs, strict=True))

        def calls(var: Any) -> frozenset[int] | None:
            return earlier.get(var) if isinstance(var, Var) else None

        for equation in jaxpr.eqns:
            given = [calls(var) for var in equation.invars]
            if all(before is None for before in given):
                continue
            after = frozenset().union(*filter(None, given))
            inner = list(jaxprs_in_params(equation.params))
            if equation.primitive.name in _CALLS and len(inner) == 1:
                outputs = walk(inner[0], given)
            else:
                for body in inner:
                    start = len(work)
                    walk(body, [after] * len(body.invars))
                    after |= frozenset(range(start, len(work)))
                if equation.primitive.name in _LAPACK:
                    order.append(after)
                    work.append(operations(equation))
                    after |= {len(work) - 1}
                outputs = [after] * len(equation.outvars)
            earlier |= dict(zip(equation.outvars, outputs, strict=True))
        return [calls(var) for var in jaxpr.outvars]

    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    walk(used, [frozenset()] * len(used.invars))
    # Dilworth (1950): of calls that are all independent there are as many as chains that cover the order
    edges = np.array([[i in before for i in range(len(order))] for before in order], int)
    if not len(edges) or np.sum(maximum_bipartite_matching(csr_array(edges)) < 0) < num_threads:
        return None
    return max(1, _UNDIVIDED // max(work))
