# SPDX-License-Identifier: Apache-2.0
"""What every kernel shares: NumPyro's contract, driven by a `LearnedChain`. No mathematics."""

import copy
import gc
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro.distributions.transforms import Transform
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.mcmc import MCMC, MCMCKernel
from numpyro.util import is_prng_key, not_jax_tracer

from numpyro_sbtm.checks import flag, function, optional, shown, whole
from numpyro_sbtm.core.algorithm import Algorithm, Draws
from numpyro_sbtm.core.chain import Chain, ChainState
from numpyro_sbtm.core.decay import Rays
from numpyro_sbtm.core.local import LocalMove, local_move
from numpyro_sbtm.core.maps import Map
from numpyro_sbtm.core.target import Key, LogDensity, Target
from numpyro_sbtm.kernels.fingerprint import Fingerprint, fingerprint
from numpyro_sbtm.kernels.periodic import wrap
from numpyro_sbtm.kernels.problem import Problem, from_model, from_potential, guide_moments, logdensity
from numpyro_sbtm.kernels.sequential import Run, keys_of_sequential_run
from numpyro_sbtm.kernels.state import KernelState, chain_axes
from numpyro_sbtm.kernels.transform import TransformMap
from numpyro_sbtm.options import Correction, DiffusionTraining, Search, TransportTraining, group_of
from numpyro_sbtm.sampler import Learned, Method, Sampler, locate
from numpyro_sbtm.search.ladder import Precondition, StartingPoints
from numpyro_sbtm.search.located import Located

__all__ = ["OPTIONS", "LearnedKernel", "absolute", "checked_optimizer"]

_ARRAY = object()  # stands for an array among a model's arguments
_MAX_MAPPINGS = 0.6  # share of the process's memory mappings that leaves room for another run


OPTIONS = """
        optimizer: an optax optimiser, or a function of the number of training steps that makes one; None for
            Adam (see ``training.learning_rate``). Of functions only those of a module can be pickled with the
            kernel.
        precondition: how the posterior is whitened before anything is learned. 'auto' fits a triangular
            map by variational inference from several starts; ``(loc, scale_tril)`` is an affine map of the
            flattened unconstrained space, sites in sorted order; an AutoGuide of the model is fitted by
            stochastic variational inference and gives its draws' mean and covariance; any other bijection,
            such as a flow, has ``forward`` and ``inverse`` (see `numpyro_sbtm.core.maps.Map`) or is a
            transform of NumPyro; None leaves the space as it is.
        search: how the posterior is looked for, with 'auto' (see `Search`).
        correction: how draws are made of proposals (see `Correction`).
        forward_mode_differentiation: differentiate the model in forward mode, for ``while_loop``.
        init_strategy: one of NumPyro's initialisation strategies.
"""
"""What all kernels are documented to take."""


def _check_model(model: Any, potential_fn: Any) -> None:
    if not (model is None) ^ (potential_fn is None):
        raise ValueError(
            "Only one of `model` or `potential_fn` must be specified, got "
            f"{'neither' if model is None else 'both'}."
        )
    if isinstance(model, MCMC | MCMCKernel):
        raise TypeError(
            f"`model` must be a NumPyro model, got the {type(model).__name__} that runs one. "
            "Pass the function that it was made with."
        )
    cure = "Pass a function that calls `numpyro.sample`, not its name or what it returns."
    optional(function, "model", model, cure)
    cure = "Pass a function of unconstrained values that returns minus their log density."
    optional(function, "potential_fn", potential_fn, cure)


def _check_precondition(precondition: Any, has_model: bool) -> None:
    if isinstance(precondition, AutoGuide) and not has_model:
        raise ValueError(
            f"`precondition` is a guide, {type(precondition).__name__}, which needs a `model`, but a "
            "`potential_fn` was given. Pass 'auto' or a pair `(loc, scale_tril)`."
        )
    if precondition is None or isinstance(precondition, AutoGuide | Transform):
        return
    if isinstance(precondition, str) and precondition == "auto":
        return
    if isinstance(precondition, Map) and not isinstance(precondition, type):
        return
    cure = (
        "Pass 'auto', None, an AutoGuide, a pair `(loc, scale_tril)` of shapes [d] and [d, d], or a "
        "bijection with `forward` and `inverse` (see `numpyro_sbtm.core.maps.Map`)."
    )
    if precondition == "refined":
        cure = "Pass `search=Search(refine=True)`."
    if isinstance(precondition, type) and issubclass(precondition, AutoGuide):
        cure = f"Pass the guide of your model, `{precondition.__name__}(model)`."
    if not isinstance(precondition, tuple) or len(precondition) != 2:
        raise ValueError(f"`precondition` must describe a whitening, got {shown(precondition)}. {cure}")
    try:
        loc, scale_tril = (np.asarray(part).astype(float, casting="same_kind") for part in precondition)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`precondition` must hold numbers, got {shown(precondition)}. {cure}") from error
    if loc.ndim != 1 or scale_tril.shape != loc.shape * 2:
        raise ValueError(
            f"`precondition` has shapes {loc.shape} and {scale_tril.shape} that do not match. {cure}"
        )
    if not (np.all(np.isfinite(loc)) and np.all(np.isfinite(scale_tril))):
        raise ValueError(
            f"`precondition` must be finite, got `loc` {shown(loc)} and `scale_tril` {shown(scale_tril)}. "
            "Pass 'auto' if you do not know the posterior's scale."
        )
    diagonal = np.diagonal(scale_tril)
    if np.any(np.triu(scale_tril, 1) != 0) or not np.all(diagonal > 0):
        raise ValueError(
            "`precondition` needs a lower triangular `scale_tril` with a positive diagonal, such as a "
            f"Cholesky factor of the posterior covariance, got {shown(scale_tril)}."
        )
    # in the run's precision draws must differ, near the location too, and their squares must not overflow
    dtype = jnp.result_type(float)
    small, spread = np.sqrt(np.finfo(dtype).tiny), np.linalg.norm(scale_tril, axis=1)
    resolved = (diagonal > small) & (spread > np.spacing(np.abs(loc).astype(dtype))) & (spread < 1.0 / small)
    if not np.all(resolved):
        raise ValueError(
            f"`precondition` has a `scale_tril` that {dtype.name} cannot resolve around `loc`, with diagonal "
            f"{shown(diagonal)}: all draws would be the same. Rescale the model's sites, or use "
            "`jax.config.update('jax_enable_x64', True)`."
        )


def checked_optimizer(optimizer: Any) -> Any:
    """Check an optimiser, or what makes one."""
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation) or callable(optimizer):
        return optimizer
    raise TypeError(
        f"`optimizer` must be an optax optimiser, or a function of the number of training steps that makes "
        f"one, got {shown(optimizer)}. Pass None for the default."
    )


def _checked(state: Any) -> tuple[Learned, ChainState]:
    """Return what a state knows, after a look at what it is."""
    if not isinstance(state, KernelState):
        raise TypeError(
            f"`state` must be that of a run of this kernel, got {shown(state)}. "
            "Pass `mcmc.last_state` after `mcmc.run(...)`."
        )
    if state.learned is None or state.chain is None:
        raise ValueError("`state` is that of a model without latent values: it has no sampler.")
    return state.learned, state.chain


def _spare_memory_mappings() -> None:
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


def _compiled(use: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a use of a trained sampler for arrays among its arguments; sizes and flags stay as they are."""

    @partial(jax.jit, static_argnums=3)
    def of_arrays(
        key: Key, learned: Learned, several: Any, others: tuple[Any, ...], arrays: list[Any]
    ) -> Any:
        structure, *leaves = others
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is _ARRAY else leaf for leaf in leaves]
        return use(key, learned, several, *jax.tree.unflatten(structure, leaves))

    def compiled(key: Key, learned: Learned, several: Any, *arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        others = [_ARRAY if is_array else leaf for leaf, is_array in zip(leaves, array, strict=True)]
        arrays = [leaf for leaf, is_array in zip(leaves, array, strict=True) if is_array]
        try:
            return of_arrays(key, learned, several, (structure, *others), arrays)
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError, TypeError, ValueError):
            # a model that needs its data themselves, for `np.unique` or as a data frame: constants, then
            constant = lambda key, learned, several: use(key, learned, several, *arguments)  # noqa: E731
            return jax.jit(constant)(key, learned, several)

    return compiled


class LearnedKernel(MCMCKernel):
    """Everything but the choice of the algorithm. Abstract; the kernels below are final."""

    sample_field = "z"
    default_fields = ("diverging", "log_weight")

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[..., Any] | None,
        *,
        precondition: Any,
        search: Search,
        training: DiffusionTraining | TransportTraining,
        correction: Correction,
        forward_mode_differentiation: bool,
        init_strategy: Callable[..., Any],
    ) -> None:
        _check_model(model, potential_fn)
        _check_precondition(precondition, model is not None)
        self._model = model
        self._potential_fn = potential_fn
        self._precondition = precondition
        self._search = group_of("search", Search, search)
        self._always_train = training.always
        self._correction = group_of("correction", Correction, correction)
        self._forward_mode = flag("forward_mode_differentiation", forward_mode_differentiation)
        self._init_strategy = function(
            "init_strategy", init_strategy, "Pass one of `numpyro.infer`'s, such as `init_to_median`."
        )
        self._shortens = True  # training, where what was found is near exact
        self._forget()

    def _forget(self) -> None:
        self._problem: tuple[Any, Problem] | None = None  # the last one, and the shapes it was made for
        self._uses: dict[str, Callable[..., Any]] = {}  # compiled uses of a trained sampler
        self._run: Run | None = None  # in sequence, while there are more chains to come
        self._set_up = False
        self._known: np.ndarray | None = None

    @abstractmethod
    def _algorithm(self, target: Target, located: Located, num_warmup: int) -> Algorithm:
        """Build the algorithm for a whitened target and what the search has found of it."""

    def _check_posterior(self, logdensity_fn: LogDensity, x: Float[Array, " d"]) -> None:
        """Refuse, before the search, what does not fit the dimension or needs more than the density has."""

    # ------------------------------------------------------------------ NumPyro's contract
    @property
    def model(self) -> Callable[..., Any] | None:
        """The model, or None with a potential function."""
        return self._model

    @property
    def _sample_fn(self) -> Callable[..., KernelState] | None:
        """What `MCMC` looks at: None where it must call `init`, even for a state that needs none."""
        return self.sample if self._set_up else None

    @property
    def corrected(self) -> bool:
        """Whether draws are exact; else they are raw draws of the sampler."""
        return self._correction.metropolis

    def postprocess_fn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the map from unconstrained values to the model's sites."""
        if self._potential_fn is not None:
            return lambda x: x
        return self._problem_of(args, kwargs).postprocess_gen(*args, **kwargs)

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
            _spare_memory_mappings()
        single = is_prng_key(rng_key)
        if init_params is not None and single:
            init_params = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], init_params)
        run = self._run_of(rng_key, Run(num_warmup, model_args, kwargs))
        if single or self._correction.shared:
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
        learned, chain = _checked(state)
        num_keys = () if is_prng_key(state.rng_key) else (len(state.rng_key),)
        if num_keys != state.log_weight.shape:
            chains, given = (shape[0] if shape else 1 for shape in (state.log_weight.shape, num_keys))
            raise ValueError(
                f"`post_warmup_state` holds {chains} chain(s) that share a sampler, but `MCMC` runs {given}. "
                "Pass as many keys, or the same `num_chains` and `chain_method` as in warm-up."
            )
        problem = self._problem_of(model_args, model_kwargs, state)
        dim, known = problem.starts.shape[1], chain.point.x.shape[-1]
        if dim != known:
            raise ValueError(
                f"`post_warmup_state` has {known} latent values, the model {dim} with these arguments: "
                "it belongs to another model or to data of another size. Run warm-up again."
            )
        data = fingerprint(model_args, model_kwargs)
        step = partial(self._iterate, problem=problem, args=model_args, kwargs=model_kwargs, data=data)
        if learned.num_steps.ndim:
            axes = chain_axes(state)
            step = jax.vmap(step, in_axes=(axes,), out_axes=axes)
        return step(state)

    def _iterate(
        self,
        state: KernelState,
        problem: Problem,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        data: Fingerprint,
    ) -> KernelState:
        """Make a draw, by one trained sampler; in warm-up do nothing."""
        learned, chain = _checked(state)
        over = jax.vmap if state.log_weight.shape else lambda function: function

        def draw() -> KernelState:
            keys = over(jax.random.split)(state.rng_key)
            rng_key, key = (over(lambda own, k=k: own[k])(keys) for k in range(2))
            # what it was trained for is surely what it is run for where both are known to be the same
            same = self._known is not None and not_jax_tracer(data) and np.array_equal(self._known, data)
            foreign = None if same else jnp.any(learned.data != data)
            rekeyed = jnp.any(jax.random.key_data(state.rng_key) != state.next_key)
            chains = self._chains(self._sampler(problem, learned, args, kwargs), chain.several, foreign)
            new, info = chains.step(key, chain, restart=jnp.any(data != state.data), refill=rekeyed)
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
            return _like(drawn, state)

        new = jax.lax.cond(state.i < learned.loss.shape[-1], lambda: state, draw)
        return new._replace(i=state.i + 1, next_key=jax.random.key_data(new.rng_key))

    def _sampler(
        self, problem: Problem, learned: Learned, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Sampler:
        """Bind what was learned to the posterior that it draws for."""
        return Sampler(self._target(problem, learned.offset, args, kwargs), self._method(), learned)

    def _target(
        self, problem: Problem, offset: Float[Array, ""], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Target:
        log_density = logdensity(problem, args, kwargs, self._forward_mode)
        return Target(lambda x: log_density(x) - offset, problem.starts.shape[1])

    def _chains(self, sampler: Sampler, several: Any, foreign: Any = None) -> Chain:
        return sampler.chain(
            steps_per_draw=self._correction.steps_per_draw,
            block_size=self._correction.block_size,
            doubtful=several is not None,
            foreign=foreign,
        )

    def propose(
        self,
        state: KernelState,
        num_proposals: int,
        rng_key: Key,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> Draws:
        """Draw fresh proposals with exact weights from a trained state.

        Args:
            state: ``mcmc.last_state``, from any chain method.
            num_proposals: the number n of proposals, per trained sampler.
            rng_key: random key.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.

        Returns:
            Proposals with leading axis ``[n]``, or ``[chains, n]`` where each chain has its own sampler,
            points of the flattened unconstrained space; log weights and log densities in float64.

        Raises:
            TypeError: for what is no state of it, no number of proposals, or no key.
            ValueError: for less than one proposal.
        """
        num_proposals = whole("num_proposals", num_proposals)
        proposals = self._use("propose", state, rng_key, num_proposals, model_args, model_kwargs)
        return proposals._replace(
            log_weight=absolute(proposals.log_weight, state),
            logdensity=absolute(proposals.logdensity, state),
        )

    def weigh(
        self,
        state: KernelState,
        x: Float[Array, "n d"],
        rng_key: Key,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> Float[np.ndarray, "*chains n"]:
        """Weigh given points as the trained sampler would its own.

        For draws of the posterior the mean log weight is an upper bound of the log evidence (EUBO), where
        that of proposals is a lower bound (ELBO). Unlike the latter it sees what is never proposed.

        Args:
            state: ``mcmc.last_state``, from any chain method.
            x: points of the flattened unconstrained space, as `Draws.x`, shape ``[n, d]``.
            rng_key: random key.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.

        Returns:
            Log of unnormalised target over proposal, of the point or of a fresh path that ends there, in
            float64, shape ``[n]``, or ``[chains, n]`` where each chain has its own sampler; NaN if it cannot
            be computed.

        Raises:
            TypeError: for what is no state of it, or no key.
            ValueError: for points of another shape.

        Reference:
            EUBO: Blessing et al. (2024), Beyond ELBOs, arXiv:2406.07423, section 4.
        """
        like = _checked(state)[1].block.x
        if jnp.ndim(x) != 2 or jnp.shape(x)[1] != like.shape[-1] or not len(x):
            raise ValueError(
                f"`x` must be points of the flattened unconstrained space, [n, {like.shape[-1]}], got shape "
                f"{list(jnp.shape(x))}. `propose` gives such points, `Draws.x`."
            )
        x = jnp.asarray(x, like.dtype)
        return absolute(self._use("weigh", state, rng_key, x, model_args, model_kwargs), state)

    def rays(
        self,
        state: KernelState,
        points: tuple[Float[Array, "n d"], Float[Array, " n"]],
        rng_key: Key,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> Rays:
        """Find out along which rays the density does not fall as that of a proper posterior must.

        Args:
            state: ``mcmc.last_state``, from any chain method.
            points: proposals in the flattened unconstrained space and their log weights, up to a constant,
                ``(x [n, d], log_weight [n])``.
            rng_key: random key.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.

        Returns:
            Shares of rays without decay; with a leading axis ``[chains]`` where each chain has its own
            sampler.
        """
        points = jax.tree.map(lambda leaf: jnp.asarray(leaf, points[0].dtype), points)
        return self._use("rays", state, rng_key, points, model_args, model_kwargs)

    def _use(
        self,
        name: str,
        state: KernelState,
        rng_key: Key,
        what: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> Any:
        """Use every trained sampler of a state, by a compiled function."""
        learned, chain = _checked(state)
        if not is_prng_key(rng_key):
            raise TypeError(
                f"`rng_key` must be a random key, got {shown(rng_key)}. Pass `jax.random.key(0)`."
            )
        kwargs = {} if model_kwargs is None else model_kwargs
        problem = self._problem_of(model_args, kwargs, state)
        use = self._uses.get(name)
        if use is None:

            def of_sampler(  # type: ignore[no-untyped-def]
                key, learned, several, what, args, kwargs
            ):
                use = getattr(self._sampler(problem, learned, args, kwargs), name)
                return use(key, *what) if name == "rays" else use(key, what, several)

            use = self._uses[name] = _compiled(of_sampler)
        if not learned.num_steps.ndim:
            return use(rng_key, learned, chain.several, what, model_args, kwargs)
        keys = jax.random.split(rng_key, len(learned.num_steps))
        per_chain = [
            use(
                key,
                *jax.tree.map(lambda leaf, c=c: leaf[c], (learned, chain.several)),
                what,
                model_args,
                kwargs,
            )
            for c, key in enumerate(keys)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_chain)

    def __getstate__(self) -> dict[str, Any]:
        # closures are rebuilt from the model and its arguments when they are needed
        return self.__dict__ | {"_problem": None, "_uses": {}, "_run": None}

    def wrap_model(self, wrapper: Callable[..., Any]) -> "LearnedKernel":
        """Return a copy of this kernel for another model."""
        new = copy.copy(self)
        new._model = wrapper
        new._forget()
        return new

    # ------------------------------------------------------------------ the posterior
    def _make_problem(
        self,
        key: Key,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any],
        num_chains: int,
    ) -> Problem:
        if self._potential_fn is not None:
            return from_potential(
                key,
                self._potential_fn,
                init_params,
                num_chains=num_chains,
                num_starts=self._search.num_starts,
                forward_mode=self._forward_mode,
            )
        assert self._model is not None  # checked by the constructor
        return from_model(
            key,
            self._model,
            model_args,
            model_kwargs,
            num_chains=num_chains,
            search=self._search,
            init_strategy=self._init_strategy,
            init_params=init_params,
            forward_mode=self._forward_mode,
        )

    def _remember(self, problem: Problem, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._problem, self._uses = (_shapes(args, kwargs), problem), {}

    def _problem_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], state: KernelState | None = None
    ) -> Problem:
        """Return the posterior for arguments: the last one where these have its shapes, else a new one."""
        if self._problem is not None and self._problem[0] == _shapes(args, kwargs):
            return self._problem[1]
        # for its functions alone, so that any key will do
        make = partial(self._make_problem, jax.random.key(0), model_args=args, model_kwargs=kwargs)
        if self._potential_fn is not None:
            assert state is not None
            chains = state.log_weight.shape
            z = state.z if chains else jax.tree.map(lambda leaf: leaf[None], state.z)
            return make(z, num_chains=chains[0] if chains else 1)
        if not all(map(not_jax_tracer, jax.tree.leaves((args, kwargs)))):
            return make(None, num_chains=1)
        with jax.ensure_compile_time_eval():
            problem = make(None, num_chains=1)
        self._remember(problem, args, kwargs)
        return problem

    def _method(self) -> Method:
        return Method(
            algorithm=self._algorithm,
            local=self._local_move(),
            corrected=self._correction.metropolis,
            shorten=self._shortens,
            quiet=self._correction.local_kernel == "auto",
            always_train=self._always_train,
            search=self._search,
        )

    def _init_system(self, rng_key: Key, init_params: Any, run: Run, *, several: bool = False) -> KernelState:
        """Make the state of one trained sampler and of the chains that share it."""
        args, kwargs = run.model_args, run.model_kwargs
        chains = () if is_prng_key(rng_key) else (len(rng_key),)
        over = jax.vmap if chains else lambda function: function
        split = over(jax.random.split)(rng_key)
        key_system, keys = (over(lambda own, k=k: own[k])(split) for k in range(2))
        key_problem, key_learn = jax.random.split(key_system[0] if chains else key_system)
        problem = self._make_problem(key_problem, init_params, args, kwargs, chains[0] if chains else 1)
        self._remember(problem, args, kwargs)
        data = fingerprint(args, kwargs)
        if not problem.starts.shape[1]:
            return _without_latents(problem, rng_key, chains, run, data)
        if run.num_warmup < 1:
            raise ValueError(
                f"`num_warmup` must be at least 1, got {run.num_warmup}: the sampler is trained during "
                "warm-up. To go on from a trained one, set `mcmc.post_warmup_state`."
            )
        self._known = data if isinstance(data, np.ndarray) else None
        if run.learned is None:
            own = not self._correction.shared and (several or run.keys is not None)
            learned = self._learn(key_learn, problem, run, data, own=own)
            if run.keys is not None and self._correction.shared:
                run.learned = learned._replace(gradients=jnp.zeros_like(learned.gradients))
        else:  # paid for by the first chain
            learned = run.learned
        assert run.structure is not None
        may = not several and problem.small and self._correction.num_particles > 1
        doubtful = may and run.structure.doubtful
        return self._first_state(problem, learned, keys, run, data, doubtful)

    def _learn(self, key: Key, problem: Problem, run: Run, data: Fingerprint, *, own: bool) -> Learned:
        """Look for the posterior, and train where draws from what was found are not good enough."""
        args, kwargs = run.model_args, run.model_kwargs
        density = logdensity(problem, args, kwargs, self._forward_mode)
        self._check_posterior(density, problem.starts[0])
        key_guide, key_locate, key_train = jax.random.split(key, 3)
        offset = jnp.asarray(problem.offset, problem.starts.dtype)
        sampler, run.structure = locate(
            key_locate,
            self._target(problem, offset, args, kwargs),
            self._method(),
            StartingPoints(problem.starts, problem.scouts, jnp.asarray(problem.order)),
            self._whitening(key_guide, problem, args, kwargs),
            run.num_warmup,
            own=own,
            structure=run.structure,
        )
        learned = sampler.learned._replace(offset=offset, data=data)
        if not run.structure.learned:
            return learned
        train = lambda key, learned: self._sampler(problem, learned, args, kwargs).trained(key).learned  # noqa: E731
        run.train = run.train or jax.jit(train)
        return run.train(key_train, learned)

    def _first_state(
        self, problem: Problem, learned: Learned, keys: Key, run: Run, data: Fingerprint, doubtful: bool
    ) -> KernelState:
        """Make the state before the first draw."""
        args, kwargs = run.model_args, run.model_kwargs
        z = problem.positions
        energy = jax.jit(jax.vmap(problem.potential_gen(*args, **kwargs)))(z)
        if is_prng_key(keys):
            z, energy = jax.tree.map(lambda leaf: leaf[0], (z, energy))
        over = jax.vmap if energy.ndim else lambda function: function
        x = over(lambda value: ravel_pytree(value)[0])(z)
        sampler = self._sampler(problem, learned, args, kwargs)
        chain = self._chains(sampler, doubtful or None).init(x, -energy - learned.offset)
        blank, zero = jnp.zeros_like(chain.point.log_weight), jnp.zeros((), jnp.int32)
        state = KernelState(
            i=zero,
            z=z,
            potential_energy=energy.astype(x.dtype),
            log_weight=chain.point.log_weight,
            accept_prob=blank,
            mean_accept_prob=blank,
            diverging=blank > 0,
            nonfinite_proposals=blank.astype(jnp.int32),
            learned=learned,
            chain=chain,
            data=data,
            next_key=jax.random.key_data(keys),
            rng_key=zero,
        )
        # a weakly typed leaf would turn strong in the first step, and a second program would be compiled
        strong = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), state)
        return strong._replace(rng_key=keys)

    def _whitening(
        self, key: Key, problem: Problem, model_args: tuple[Any, ...], model_kwargs: dict[str, Any]
    ) -> Precondition:
        precondition, dim = self._precondition, problem.starts.shape[1]
        if isinstance(precondition, AutoGuide):
            assert self._model is not None  # checked by the constructor
            precondition = guide_moments(key, precondition, self._model, model_args, model_kwargs)
        if isinstance(precondition, Transform):
            return TransformMap(precondition)
        if isinstance(precondition, Map):
            return precondition
        if isinstance(precondition, tuple) and len(precondition[0]) != dim:
            raise ValueError(
                f"`precondition` is for dimension {len(precondition[0])}, but the posterior has "
                f"dimension {dim} on the unconstrained space."
            )
        if isinstance(precondition, tuple) and problem.centre is not None:
            # a guide knows no window and may sit in another period
            precondition = wrap(jnp.asarray(precondition[0]), problem.centre), precondition[1]
        return precondition

    def _local_move(self) -> LocalMove | None:
        chosen = self._correction.local_kernel
        if chosen is None or isinstance(chosen, LocalMove):
            return chosen
        return local_move("hmc" if chosen == "auto" else chosen)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Describe arguments as far as the sites of a model depend on them."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    return structure, [
        (leaf.shape, str(leaf.dtype)) if isinstance(leaf, jax.Array | np.ndarray) else leaf for leaf in leaves
    ]


def absolute(log_density: Any, state: KernelState) -> Any:
    """Give log densities or log weights their offset back, in float64 where they are values."""
    assert state.learned is not None
    offset: Any = state.learned.offset
    if not_jax_tracer(log_density):
        log_density, offset = np.asarray(log_density, np.float64), np.asarray(offset, np.float64)
    return log_density + (offset[:, None] if offset.ndim else offset)


def _like(new: KernelState, old: KernelState) -> KernelState:
    """Give every leaf the type it had."""
    zero = jnp.zeros((), jnp.int32)
    same = lambda leaf, before: leaf.astype(before.dtype)  # noqa: E731
    typed = jax.tree.map(same, new._replace(rng_key=zero), old._replace(rng_key=zero))
    return typed._replace(rng_key=new.rng_key)


def _without_latents(
    problem: Problem, rng_key: Key, chains: tuple[int, ...], run: Run, data: Any
) -> KernelState:
    """Make the state of a model without latent values: there is nothing to learn or to draw."""
    z = problem.positions if chains else jax.tree.map(lambda leaf: leaf[0], problem.positions)
    one = jax.tree.map(lambda leaf: leaf[0], problem.positions)
    energy = problem.potential_gen(*run.model_args, **run.model_kwargs)(one)
    blank, zero = jnp.zeros(chains), jnp.zeros((), jnp.int32)
    return KernelState(
        i=zero,
        z=z,
        potential_energy=blank + energy,
        log_weight=blank - energy,
        accept_prob=blank + 1.0,
        mean_accept_prob=blank + 1.0,
        diverging=jnp.zeros(chains, bool),
        nonfinite_proposals=jnp.zeros(chains, jnp.int32),
        learned=None,
        chain=None,
        data=jnp.asarray(data),
        next_key=jax.random.key_data(rng_key),
        rng_key=rng_key,
    )
