# SPDX-License-Identifier: Apache-2.0
"""Posteriors of a kernel's model, made once for all arguments of the same shapes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from numpyro.util import not_jax_tracer

from numpyro_sbtm.core.target import Key
from numpyro_sbtm.kernels.model import Model, from_model
from numpyro_sbtm.kernels.posterior import Arguments, posterior_of
from numpyro_sbtm.kernels.potential import from_potential
from numpyro_sbtm.kernels.problem import Problem
from numpyro_sbtm.kernels.state import KernelState
from numpyro_sbtm.options import Search
from numpyro_sbtm.sampler import Posterior

__all__ = ["ProblemCache"]


class ProblemCache:
    """Makes posteriors of a model, or of a potential function, and keeps the last one.

    Args:
        model: the model, or None.
        potential_fn: the potential function, or None.
        search: how many starts and draws of the prior a posterior has.
        init_strategy: one of NumPyro's strategies.
        forward_mode: differentiate in forward mode.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[..., Any] | None,
        search: Search,
        init_strategy: Callable[..., Any],
        forward_mode: bool,
    ) -> None:
        self.model = model
        self.potential_fn = potential_fn
        self.search = search
        self.init_strategy = init_strategy
        self.forward_mode = forward_mode
        # the last one, with the shapes of the arguments that it was made for, and its posterior
        self._problem: tuple[Any, Problem] | None = None
        self._posterior: tuple[Problem, Posterior] | None = None

    def of_model(self, model: Callable[..., Any]) -> "ProblemCache":
        """Return one for another model."""
        return ProblemCache(model, self.potential_fn, self.search, self.init_strategy, self.forward_mode)

    def __getstate__(self) -> dict[str, Any]:
        # closures are made again from the model and its arguments when they are needed
        return self.__dict__ | {"_problem": None, "_posterior": None}

    def new(self, key: Key, arguments: Arguments, init_params: Any, num_chains: int) -> Problem:
        """Make the posterior for arguments, and keep it."""
        problem = self._make(key, arguments, init_params, num_chains)
        self._problem = arguments.shapes(), problem
        return problem

    def last(self, arguments: Arguments, state: KernelState | None = None) -> Problem:
        """Return the posterior for arguments: the last one where these have its shapes, else a new one.

        Args:
            arguments: of the model.
            state: of a run, for the shapes of a potential function.
        """
        if self._problem is not None and self._problem[0] == arguments.shapes():
            return self._problem[1]
        # for its functions alone, so that any key will do
        make = partial(self._make, jax.random.key(0), arguments)
        if self.potential_fn is not None:
            assert state is not None
            chains = state.log_weight.shape
            z = state.z if chains else jax.tree.map(lambda leaf: leaf[None], state.z)
            return make(z, chains[0] if chains else 1)
        if not all(map(not_jax_tracer, jax.tree.leaves(tuple(arguments)))):
            return make(None, 1)
        with jax.ensure_compile_time_eval():
            problem = make(None, 1)
        self._problem = arguments.shapes(), problem
        return problem

    def posterior(self, problem: Problem, arguments: Arguments) -> Posterior:
        """Return a posterior as functions of its data: the same for the same problem, where it may be."""
        if self._posterior is not None and self._posterior[0] is problem:
            return self._posterior[1]
        posterior, of_all = posterior_of(problem, arguments, self.forward_mode)
        if of_all:
            self._posterior = problem, posterior
        return posterior

    def _make(self, key: Key, arguments: Arguments, init_params: Any, num_chains: int) -> Problem:
        if self.potential_fn is not None:
            return from_potential(
                key,
                self.potential_fn,
                init_params,
                num_chains=num_chains,
                num_starts=self.search.num_starts,
                forward_mode=self.forward_mode,
            )
        assert self.model is not None  # checked by the kernel's constructor
        model = Model(self.model, *arguments, self.init_strategy, self.forward_mode)
        return from_model(key, model, num_chains=num_chains, search=self.search, init_params=init_params)
