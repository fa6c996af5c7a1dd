# SPDX-License-Identifier: Apache-2.0
"""What every kernel shares: NumPyro's contract, in a thin shell around `Sampler`. No mathematics."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key, not_jax_tracer

from numpyro_sbtm.checks import flag, function
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.kernels.arguments import check_model, check_precondition
from numpyro_sbtm.kernels.cache import ProblemCache
from numpyro_sbtm.kernels.fingerprint import Fingerprint, fingerprint
from numpyro_sbtm.kernels.first import first_state, state_without_latents
from numpyro_sbtm.kernels.memory import spare_memory_mappings
from numpyro_sbtm.kernels.posterior import Arguments
from numpyro_sbtm.kernels.problem import Problem, logdensity
from numpyro_sbtm.kernels.sequential import Run, keys_of_sequential_run
from numpyro_sbtm.kernels.state import KernelState, chain_axes, known_of, same_types
from numpyro_sbtm.kernels.whitening import whitening_of
from numpyro_sbtm.learned import Learned, Settings, locate, paid_for
from numpyro_sbtm.methods.base import Method
from numpyro_sbtm.options import Correction, Search, group_of
from numpyro_sbtm.sampler import Posterior, Sampler, trained
from numpyro_sbtm.search.ladder import StartingPoints

__all__ = ["LearnedKernel"]


class LearnedKernel(MCMCKernel):
    """Everything but the choice of the method. Abstract; the kernels below are final."""

    sample_field = "z"
    default_fields = ("diverging", "log_weight")

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[..., Any] | None,
        method: Method,
        *,
        precondition: Any,
        search: Search,
        correction: Correction,
        forward_mode_differentiation: bool,
        init_strategy: Callable[..., Any],
    ) -> None:
        check_model(model, potential_fn)
        check_precondition(precondition, model is not None)
        if isinstance(precondition, str):
            method.check_several()
        self._precondition = precondition
        self._settings = Settings(
            method, group_of("search", Search, search), group_of("correction", Correction, correction)
        )
        self._problems = ProblemCache(
            model,
            potential_fn,
            search,
            function(
                "init_strategy", init_strategy, "Pass one of `numpyro.infer`'s, such as `init_to_median`."
            ),
            flag("forward_mode_differentiation", forward_mode_differentiation),
        )
        self._forget()

    def _forget(self) -> None:
        self._run: Run | None = None  # in sequence, while there are more chains to come
        self._set_up = False
        self._known: np.ndarray | None = None

    # ------------------------------------------------------------------ NumPyro's contract
    @property
    def model(self) -> Callable[..., Any] | None:
        """The model, or None with a potential function."""
        return self._problems.model

    @property
    def method(self) -> Method:
        """How proposals are learned."""
        return self._settings.method

    @property
    def _sample_fn(self) -> Callable[..., KernelState] | None:
        """What `MCMC` looks at: None where it must call `init`, even for a state that needs none."""
        return self.sample if self._set_up else None

    @property
    def corrected(self) -> bool:
        """Whether draws are exact; else they are raw draws of the sampler."""
        return self._settings.correction.metropolis

    def postprocess_fn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the map from unconstrained values to the model's sites."""
        if self._problems.potential_fn is not None:
            return lambda x: x
        return self._problems.last(Arguments(args, kwargs)).postprocess_gen(*args, **kwargs)

    def init(
        self,
        rng_key: Key,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> KernelState:
        """Look for the posterior, and train where draws from what was found are not good enough.

        Of chains that run in sequence `MCMC` hands over one by one, each after the end of the one before:
        with ``shared=True`` the first searches and trains for all.

        Args:
            rng_key: one key, or a batch of keys, one for every vectorised chain.
            num_warmup: the largest number of training steps.
            init_params: unconstrained positions, with a leading chain axis for a batch of keys.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.

        Raises:
            ValueError: if ``num_warmup`` is less than 1, or the model or ``init_params`` do not fit.
            RuntimeError: if no start has a finite log density.
        """
        kwargs = {} if model_kwargs is None else model_kwargs
        if not_jax_tracer(rng_key):
            spare_memory_mappings()
        single = is_prng_key(rng_key)
        if init_params is not None and single:
            init_params = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], init_params)
        run = self._run_of(rng_key, Run(num_warmup, model_args, kwargs))
        if single or self._settings.correction.shared:
            state = self._init_system(rng_key, init_params, run)
        else:
            states = []
            for c, key in enumerate(rng_key):
                own = jax.tree.map(lambda leaf, c=c: leaf[c : c + 1], init_params)
                # batched, a choice between two ways to propose would always take both
                states.append(self._init_system(key, own, run, several=True))
            stack = lambda axis, *leaves: leaves[0] if axis is None else jnp.stack(leaves)  # noqa: E731
            none = lambda axis: axis is None  # noqa: E731
            state = jax.tree.map(stack, chain_axes(states[0]), *states, is_leaf=none)
        self._set_up = True
        return state

    def _run_of(self, rng_key: Key, new: Run) -> Run:
        """Return the run that a chain belongs to: a new one, or that of the chains before it."""
        new.keys = keys_of_sequential_run(self) if is_prng_key(rng_key) and not_jax_tracer(rng_key) else None
        run = new if new.keys is None or self._run is None or self._run.keys is not new.keys else self._run
        run.num_set_up += 1
        more = run.keys is not None and run.num_set_up < len(run.keys)
        self._run = run if more else None
        return run

    def sample(
        self, state: KernelState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any]
    ) -> KernelState:
        """Make one draw by Metropolis steps with fresh proposals; in warm-up, do nothing.

        All that it needs to know it finds in the state and the arguments. Where these are not the data that
        the state was weighed under, position and proposals are weighed anew.

        Raises:
            ValueError: for the state of another number of chains, or of a model of other size.
        """
        if isinstance(state, KernelState) and state.learned is None:  # a model without latent values
            return state._replace(i=state.i + 1)
        learned, chain = known_of(state)
        num_keys = () if is_prng_key(state.rng_key) else (len(state.rng_key),)
        if num_keys != state.log_weight.shape:
            chains, given = (shape[0] if shape else 1 for shape in (state.log_weight.shape, num_keys))
            raise ValueError(
                f"`post_warmup_state` holds {chains} chain(s) that share a sampler, but `MCMC` runs {given}. "
                "Pass as many keys, or the same `num_chains` and `chain_method` as in warm-up."
            )
        arguments = Arguments(model_args, model_kwargs)
        problem = self._problems.last(arguments, state)
        dim, known = problem.starts.shape[1], chain.point.x.shape[-1]
        if dim != known:
            raise ValueError(
                f"`post_warmup_state` has {known} latent values, the model {dim} with these arguments: "
                "it belongs to another model or to data of another size. Run warm-up again."
            )
        data = fingerprint(*arguments)
        step = partial(self._iterate, problem=problem, arguments=arguments, data=data)
        if learned.num_steps.ndim:
            axes = chain_axes(state)
            step = jax.vmap(step, in_axes=(axes,), out_axes=axes)
        return step(state)

    def _iterate(
        self, state: KernelState, problem: Problem, arguments: Arguments, data: Fingerprint
    ) -> KernelState:
        """Make a draw, by one trained sampler; in warm-up do nothing."""
        learned, chain = known_of(state)
        over = jax.vmap if state.log_weight.shape else lambda function: function

        def draw() -> KernelState:
            keys = over(jax.random.split)(state.rng_key)
            rng_key, key = (over(lambda own, k=k: own[k])(keys) for k in range(2))
            # what it was trained for is surely what it is run for where both are known to be the same
            same = self._known is not None and not_jax_tracer(data) and np.array_equal(self._known, data)
            foreign = None if same else jnp.any(learned.data != data)
            rekeyed = jnp.any(jax.random.key_data(state.rng_key) != state.next_key)
            sampler = self._sampler(problem, learned, arguments, chain.several)
            new, info = sampler.chain(foreign).step(
                key, chain, restart=jnp.any(data != state.data), refill=rekeyed
            )
            first = new.num_draws == 1
            mean = jnp.where(first, 0.0, state.mean_accept_prob)
            drawn = state._replace(
                z=over(problem.unravel)(new.point.x),
                potential_energy=-new.point.logdensity - learned.offset,
                log_weight=new.point.log_weight,
                accept_prob=info.acceptance,
                mean_accept_prob=mean + (info.acceptance - mean) / new.num_draws,
                diverging=info.nonfinite > 0,
                nonfinite_proposals=jnp.where(first, 0, state.nonfinite_proposals) + info.nonfinite,
                chain=new,
                data=data,
                rng_key=rng_key,
            )
            return same_types(drawn, state)

        new = jax.lax.cond(state.i < learned.loss.shape[-1], lambda: state, draw)
        return new._replace(i=state.i + 1, next_key=jax.random.key_data(new.rng_key))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_run": None}

    def wrap_model(self, wrapper: Callable[..., Any]) -> "LearnedKernel":
        """Return a copy of this kernel for another model."""
        new = copy.copy(self)
        new._problems = self._problems.of_model(wrapper)
        new._forget()
        return new

    # ------------------------------------------------------------------ the trained sampler
    def samplers(
        self,
        state: KernelState,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> list[Sampler]:
        """Return what a run has trained: one sampler, or one for every chain that has its own.

        Args:
            state: ``mcmc.last_state``, from any chain method.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.

        Raises:
            TypeError: for what is no state of it.
            ValueError: for the state of a model without latent values.
        """
        learned, chain = known_of(state)
        arguments = Arguments(model_args, {} if model_kwargs is None else model_kwargs)
        posterior = self._problems.posterior(self._problems.last(arguments, state), arguments)
        make = partial(Sampler, posterior, self._settings, arguments.arrays())
        if not learned.num_steps.ndim:
            return [make(learned, chain.several)]
        of_chain = lambda c: jax.tree.map(lambda leaf: leaf[c], (learned, chain.several))  # noqa: E731
        return [make(*of_chain(c)) for c in range(len(learned.num_steps))]

    def sampler(
        self,
        state: KernelState,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> Sampler:
        """Return the sampler that a run has trained.

        Args:
            state: ``mcmc.last_state``, from any chain method.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.

        Raises:
            TypeError: for what is no state of it.
            ValueError: where every chain has its own, and for the state of a model without latent values.
        """
        samplers = self.samplers(state, model_args, model_kwargs)
        if len(samplers) > 1:
            raise ValueError(
                f"`state` holds {len(samplers)} samplers, one for every chain. Take one of `samplers(...)`."
            )
        return samplers[0]

    def bind(
        self,
        learned: Learned,
        several: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any],
        init_params: Any = None,
    ) -> Sampler:
        """Return the sampler of what was learned for the same data, in another process perhaps.

        Raises:
            ValueError: for a model of another dimension.
        """
        arguments = Arguments(model_args, model_kwargs)
        positions = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], init_params)
        problem = self._problems.new(jax.random.key(0), arguments, positions, 1)
        dim, known = problem.starts.shape[1], learned.located.reference.centre.shape[-1]
        if dim != known:
            raise ValueError(f"`model` has {dim} latent values, but the sampler was learned for {known}.")
        posterior = self._problems.posterior(problem, arguments)
        return Sampler(posterior, self._settings, arguments.arrays(), learned, several)

    def _sampler(self, problem: Problem, learned: Learned, arguments: Arguments, several: Any) -> Sampler:
        """Bind what was learned to the posterior that it draws for, where its data are what they are."""
        density = logdensity(problem, arguments.args, arguments.kwargs, self._problems.forward_mode)
        posterior = Posterior.of(density, problem.starts.shape[1])
        return Sampler(posterior, self._settings, (), learned, several)

    # ------------------------------------------------------------------ set-up
    def _init_system(self, rng_key: Key, init_params: Any, run: Run, *, several: bool = False) -> KernelState:
        """Make the state of one trained sampler and of the chains that share it."""
        arguments = Arguments(run.model_args, run.model_kwargs)
        chains = () if is_prng_key(rng_key) else (len(rng_key),)
        over = jax.vmap if chains else lambda function: function
        split = over(jax.random.split)(rng_key)
        key_system, keys = (over(lambda own, k=k: own[k])(split) for k in range(2))
        key_problem, key_learn = jax.random.split(key_system[0] if chains else key_system)
        problem = self._problems.new(key_problem, arguments, init_params, chains[0] if chains else 1)
        data = fingerprint(*arguments)
        if not problem.starts.shape[1]:
            return state_without_latents(problem, rng_key, arguments, data)
        if run.num_warmup < 1:
            raise ValueError(
                f"`num_warmup` must be at least 1, got {run.num_warmup}: the sampler is trained during "
                "warm-up. To go on from a trained one, set `mcmc.post_warmup_state`."
            )
        self._known = data if isinstance(data, np.ndarray) else None
        correction = self._settings.correction
        if run.learned is None:
            own = not correction.shared and (several or run.keys is not None)
            learned = self._learn(key_learn, problem, run, own=own)._replace(data=data)
            if run.keys is not None and correction.shared:
                run.learned = paid_for(learned)
        else:  # paid for by the first chain
            learned = run.learned
        assert run.structure is not None
        may = not several and problem.small and correction.num_particles > 1
        doubtful = jnp.zeros((), bool) if may and run.structure.doubtful else None
        sampler = self._sampler(problem, learned, arguments, doubtful)
        return first_state(sampler, problem, keys, arguments, data)

    def _learn(self, key: Key, problem: Problem, run: Run, *, own: bool) -> Learned:
        """Look for the posterior, and train where draws from what was found are not good enough."""
        arguments = Arguments(run.model_args, run.model_kwargs)
        density = logdensity(problem, *arguments, self._problems.forward_mode)
        self._settings.method.check(density, problem.starts[0])
        key_guide, key_locate, key_train = jax.random.split(key, 3)
        learned, run.structure = locate(
            key_locate,
            Target(density, problem.starts.shape[1]),
            self._settings,
            StartingPoints(problem.starts, problem.scouts, jnp.asarray(problem.order)),
            whitening_of(key_guide, self._precondition, problem, self.model, arguments),
            run.num_warmup,
            own=own,
            structure=run.structure,
        )
        if not run.structure.learned:
            return learned
        run.posterior = run.posterior or self._problems.posterior(problem, arguments)
        sampler = Sampler(run.posterior, self._settings, arguments.arrays(), learned)
        return trained(sampler, key_train).learned
