# SPDX-License-Identifier: Apache-2.0
"""What every kernel shares: NumPyro's contract, driven by a `LearnedChain`. No mathematics."""

import copy
import gc
import operator
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key, not_jax_tracer

from numpyro_sbtm.chain import KernelState, Precondition, Proposals, Training, WarmStart, learned_chain
from numpyro_sbtm.core.algorithm import Algorithm
from numpyro_sbtm.core.mixture import largest, normal
from numpyro_sbtm.core.target import Key, LogDensity, Target
from numpyro_sbtm.core.weights import log_variance_at
from numpyro_sbtm.local import LOCAL_KERNELS, LocalMove, local_move
from numpyro_sbtm.model import from_model, from_potential, guide_moments, logdensity
from numpyro_sbtm.psis import NEARLY_EQUAL

__all__ = ["LearnedKernel"]

_ARRAY = object()  # stands for an array among a model's arguments
_NUM_STARTS = 8
_MAX_MAPPINGS = 0.6  # share of the process's memory mappings that leaves room for another run


def _check_precondition(precondition: Precondition | AutoGuide) -> None:
    if precondition is None or isinstance(precondition, AutoGuide):
        return
    if isinstance(precondition, str) and precondition in ("auto", "refined"):
        return
    cure = (
        "Pass 'auto', 'refined', None, an AutoGuide, or a pair `(loc, scale_tril)` of shapes [d] and [d, d]."
    )
    if not isinstance(precondition, tuple) or len(precondition) != 2:
        raise ValueError(f"`precondition` must describe a whitening, got {precondition!r}. {cure}")
    loc, scale_tril = (np.asarray(part) for part in precondition)
    if loc.ndim != 1 or scale_tril.shape != loc.shape * 2:
        raise ValueError(
            f"`precondition` has shapes {loc.shape} and {scale_tril.shape} that do not match. {cure}"
        )
    if np.any(np.triu(scale_tril, 1) != 0) or not np.all(np.diagonal(scale_tril) > 0):
        raise ValueError(
            "`precondition` needs a lower triangular `scale_tril` with a positive diagonal, such as a "
            "Cholesky factor of the posterior covariance."
        )


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

    @partial(jax.jit, static_argnums=2)
    def of_arrays(key: Key, training: Training, others: tuple[Any, ...], arrays: list[Any]) -> Any:
        structure, *leaves = others
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is _ARRAY else leaf for leaf in leaves]
        return use(key, training, *jax.tree.unflatten(structure, leaves))

    def compiled(key: Key, training: Training, *arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        others = [_ARRAY if is_array else leaf for leaf, is_array in zip(leaves, array, strict=True)]
        arrays = [leaf for leaf, is_array in zip(leaves, array, strict=True) if is_array]
        return of_arrays(key, training, (structure, *others), arrays)

    return compiled


class LearnedKernel(MCMCKernel):
    """Everything but the choice of the algorithm. Abstract; the kernels below are final."""

    sample_field = "z"
    default_fields = ("diverging",)

    def __init__(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[..., Any] | None,
        *,
        target_acceptance: float | None,
        precondition: Precondition | AutoGuide,
        correction: str | None,
        shared: bool,
        block_size: int,
        steps_per_draw: int,
        local_kernel: str | None,
        smc_particles: int,
        forward_mode_differentiation: bool,
        init_strategy: Callable[..., Any],
    ) -> None:
        if not (model is None) ^ (potential_fn is None):
            raise ValueError("Only one of `model` or `potential_fn` must be specified.")
        if correction not in ("metropolis", None):
            raise ValueError(
                f"`correction` must be 'metropolis' or None, got {correction!r}. None returns raw draws "
                "of the learned sampler, which are not exact."
            )
        if local_kernel not in (*LOCAL_KERNELS, "auto", None):
            raise ValueError(
                f"`local_kernel` must be 'auto', one of {', '.join(map(repr, LOCAL_KERNELS))}, or None, got "
                f"{local_kernel!r}."
            )
        if target_acceptance is not None and not 0 < target_acceptance < 1:
            raise ValueError(
                f"`target_acceptance` must lie between 0 and 1, got {target_acceptance}. None trains on "
                "until nothing more is gained."
            )
        _check_precondition(precondition)
        if isinstance(precondition, AutoGuide) and model is None:
            raise ValueError(
                "`precondition` is an AutoGuide, which needs a `model`, but a `potential_fn` was given. "
                "Pass 'auto' or a pair `(loc, scale_tril)`."
            )
        for name, value, least in (
            ("block_size", block_size, 1),
            ("steps_per_draw", steps_per_draw, 1),
            ("smc_particles", smc_particles, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self._model = model
        self._potential_fn = potential_fn
        # log weights never vary by less than nothing
        self._goal = 0.0 if target_acceptance is None else log_variance_at(target_acceptance)
        self._precondition = precondition
        self._correction = correction
        self._shared = shared
        self._block_size = block_size
        self._steps_per_draw = steps_per_draw
        self._local_kernel = local_kernel
        self._smc_particles = smc_particles
        self._forward_mode = forward_mode_differentiation
        self._init_strategy = init_strategy
        self._ensemble = False
        self._shortens = True  # training, where the warm start is near exact
        self._forget()

    def _forget(self) -> None:
        self._sample_fn: Callable[..., KernelState] | None = None
        self._propose_fn: Callable[..., Proposals] | None = None
        self._weigh_fn: Callable[..., Float[Array, " n"]] | None = None
        self._postprocess_gen: Callable[..., Any] | None = None
        self._structure: tuple[list[Any], int, bool, bool, bool] | None = None

    @abstractmethod
    def _algorithm(self, target: Target, warm: WarmStart, num_warmup: int) -> Algorithm:
        """Build the algorithm for a whitened target and its warm start."""

    def _check_density(self, logdensity_fn: LogDensity, x: Float[Array, " d"]) -> None:
        """Refuse a density that lacks what the algorithm needs beyond values and gradients."""

    # ------------------------------------------------------------------ NumPyro's contract
    @property
    def model(self) -> Callable[..., Any] | None:
        """The model, or None with a potential function."""
        return self._model

    @property
    def is_ensemble_kernel(self) -> bool:
        """Whether the last `init` made one trained sampler for a batch of chains."""
        return self._ensemble

    @property
    def correction(self) -> str | None:
        """'metropolis' for exact draws, None for raw ones."""
        return self._correction

    def postprocess_fn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the map from unconstrained values to the model's sites."""
        if self._postprocess_gen is None:
            return lambda x: x
        return self._postprocess_gen(*args, **kwargs)

    def init(
        self,
        rng_key: Key,
        num_warmup: int,
        init_params: Any = None,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> KernelState:
        """Set up the state; nothing is trained here.

        Args:
            rng_key: one key, or a batch of keys, one for every vectorised chain.
            num_warmup: the number of training steps.
            init_params: unconstrained positions, with a leading chain axis for a batch of keys.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.

        Raises:
            ValueError: if ``num_warmup`` is less than 1, or the model or ``init_params`` do not fit.
            RuntimeError: if no start has a finite log density.
        """
        if num_warmup < 1:
            raise ValueError(
                f"`num_warmup` must be at least 1, got {num_warmup}: the sampler is trained during "
                "warm-up. To go on from a trained one, set `mcmc.post_warmup_state`."
            )
        kwargs = {} if model_kwargs is None else model_kwargs
        if not_jax_tracer(rng_key):
            _spare_memory_mappings()
        single = is_prng_key(rng_key)
        self._ensemble = not single and self._shared
        if single or self._shared:
            chains = () if single else (len(rng_key),)
            key = rng_key if single else rng_key[0]
            return self._init_system(key, num_warmup, init_params, model_args, kwargs, chains, ensembles=True)
        states = [
            self._init_system(
                key,
                num_warmup,
                jax.tree.map(lambda leaf, c=c: leaf[c], init_params),
                model_args,
                kwargs,
                (),
                ensembles=False,  # batched, a choice between two ways to propose would always take both
            )
            for c, key in enumerate(rng_key)
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        one_chain = self._sample_fn
        assert one_chain is not None  # set by _init_system
        axes: Any = KernelState(*(None if field == "i" else 0 for field in KernelState._fields))  # type: ignore[arg-type]

        def sample_fn(state: KernelState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelState:
            # the counter stays unbatched: batched, every draw would pay for a training step
            step = jax.vmap(lambda s: one_chain(s, args, kwargs), in_axes=(axes,), out_axes=axes)
            return step(state)

        self._sample_fn = sample_fn
        return stacked._replace(i=states[0].i)

    def sample(
        self, state: KernelState, model_args: tuple[Any, ...], model_kwargs: dict[str, Any]
    ) -> KernelState:
        """Do one training step in warm-up; after it, one draw by Metropolis steps with fresh proposals."""
        if self._sample_fn is None:
            raise RuntimeError("`sample` was called before `init`.")
        return self._sample_fn(state, model_args, model_kwargs)

    def propose(
        self,
        state: KernelState,
        num_proposals: int,
        rng_key: Key,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> Proposals:
        """Draw fresh proposals with exact weights from a trained state.

        Args:
            state: ``mcmc.last_state``, from any chain method.
            num_proposals: the number n of proposals, per trained sampler.
            rng_key: random key.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.

        Returns:
            Proposals with leading axis ``[n]``, or ``[chains, n]`` where each chain has its own sampler.
        """
        return self._use(self._propose_fn, state, rng_key, num_proposals, model_args, model_kwargs)

    def weigh(
        self,
        state: KernelState,
        x: Float[Array, "n d"],
        rng_key: Key,
        model_args: tuple[Any, ...] = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> Float[Array, "*chains n"]:
        """Weigh given points as the trained sampler would its own.

        For draws of the posterior the mean log weight is an upper bound of the log evidence (EUBO), where
        that of proposals is a lower bound (ELBO). Unlike the latter it sees what is never proposed.

        Args:
            state: ``mcmc.last_state``, from any chain method.
            x: points of the flattened unconstrained space, as `Proposals.x`, shape ``[n, d]``.
            rng_key: random key.
            model_args: positional arguments of the model.
            model_kwargs: keyword arguments of the model.

        Returns:
            Log of unnormalised target over proposal, of the point or of a fresh path that ends there, shape
            ``[n]``, or ``[chains, n]`` where each chain has its own sampler; NaN if it cannot be computed.

        Reference:
            EUBO: Blessing et al. (2024), Beyond ELBOs, arXiv:2406.07423, section 4.
        """
        return self._use(self._weigh_fn, state, rng_key, x, model_args, model_kwargs)

    def _use(
        self,
        compiled: Callable[..., Any] | None,
        state: KernelState,
        rng_key: Key,
        what: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> Any:
        """Call a compiled function with every trained sampler of a state."""
        if compiled is None:
            raise RuntimeError(
                "This kernel has not been set up: run `MCMC` with it first (after unpickling, once more)."
            )
        kwargs = {} if model_kwargs is None else model_kwargs
        if is_prng_key(state.rng_key):
            return compiled(rng_key, state.training, what, model_args, kwargs)
        keys = jax.random.split(rng_key, len(state.rng_key))
        per_chain = [
            compiled(key, jax.tree.map(lambda leaf, c=c: leaf[c], state.training), what, model_args, kwargs)
            for c, key in enumerate(keys)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_chain)

    def __getstate__(self) -> dict[str, Any]:
        # closures are rebuilt by the next `init`, which `MCMC` calls where it finds no `_sample_fn`
        return self.__dict__ | {
            "_sample_fn": None,
            "_propose_fn": None,
            "_weigh_fn": None,
            "_postprocess_gen": None,
            "_structure": None,
        }

    def wrap_model(self, wrapper: Callable[..., Any]) -> "LearnedKernel":
        """Return a copy of this kernel for another model."""
        new = copy.copy(self)
        new._model = wrapper
        new._forget()
        return new

    def _init_system(
        self,
        rng_key: Key,
        num_warmup: int,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any],
        chains: tuple[int, ...],
        *,
        ensembles: bool,
    ) -> KernelState:
        """Make the state of one trained sampler, and the functions that advance it."""
        key_init, key_state = jax.random.split(rng_key)
        num_chains = chains[0] if chains else 1
        if init_params is not None and not chains:
            init_params = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], init_params)
        if self._potential_fn is None:
            assert self._model is not None  # checked by the constructor
            problem = from_model(
                key_init,
                self._model,
                model_args,
                model_kwargs,
                num_chains=num_chains,
                num_starts=_NUM_STARTS,
                init_strategy=self._init_strategy,
                init_params=init_params,
                forward_mode=self._forward_mode,
            )
            self._postprocess_gen = problem.postprocess_gen
        else:
            problem = from_potential(
                key_init,
                self._potential_fn,
                init_params,
                num_chains=num_chains,
                num_starts=_NUM_STARTS,
            )
        dim = problem.starts.shape[1]
        self._check_density(
            logdensity(problem, model_args, model_kwargs, self._forward_mode), problem.starts[0]
        )
        precondition = self._precondition
        if isinstance(precondition, AutoGuide):
            assert self._model is not None  # checked by the constructor
            key_guide, key_state = jax.random.split(key_state)
            precondition = guide_moments(key_guide, precondition, self._model, model_args, model_kwargs)
        if isinstance(precondition, tuple) and len(precondition[0]) != dim:
            raise ValueError(
                f"`precondition` is for dimension {len(precondition[0])}, but the posterior has "
                f"dimension {dim} on the unconstrained space."
            )
        chain = learned_chain(
            problem,
            lambda target, warm: self._algorithm(target, warm, num_warmup),
            model_args,
            model_kwargs,
            num_warmup=num_warmup,
            shorten=self._shortens,
            chains=chains,
            precondition=precondition,
            corrected=self._correction is not None,
            block_size=self._block_size,
            steps_per_draw=self._steps_per_draw,
            ensembles=ensembles,
            local=self._local_move(),
            forward_mode=self._forward_mode,
        )
        self._sample_fn = chain.sample
        self._propose_fn, self._weigh_fn = _compiled(chain.propose), _compiled(chain.weigh)
        key_start, key_state = jax.random.split(key_state)
        warm = chain.start(key_start, problem.starts, problem.scouts)
        return chain.init(key_state, *self._simplify(warm, model_args, model_kwargs))

    def _local_move(self) -> LocalMove | None:
        if self._local_kernel is None:
            return None
        return local_move("hmc" if self._local_kernel == "auto" else self._local_kernel)

    def _simplify(
        self, warm: WarmStart, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[WarmStart, bool]:
        """Drop what does nothing, for programs that are smaller and faster to compile.

        Of the warm start, parts that are the identity; where its draws alone would do, ensembles of
        proposals; and where they are nearly exact, local moves if `local_kernel` is 'auto'. Chains
        that are set up one after the other follow the first, so that their states can be stacked.

        Returns:
            The warm start, and whether proposals may turn out to be poor.
        """
        reference, whitening = warm.reference, warm.whitening
        if not not_jax_tracer(warm.khat):
            return warm, True
        data = jax.tree.leaves((args, kwargs))
        before = self._structure
        same = before is not None and len(before[0]) == len(data)
        if before is None or not (same and all(map(operator.is_, before[0], data))):
            num = int(np.sum(np.isfinite(reference.log_weight)))
            margins = whitening.margins is not None and bool(np.any(whitening.margins.slope != 1.0))
            # between an effective fraction of a half and nine tenths a chain may stick for many draws
            still = bool(warm.near_exact() & (warm.ess_fraction > NEARLY_EQUAL))
            before = data, num, margins, not bool(warm.usable()), still
            self._structure = before
        _, num, margins, doubtful, still = before
        if self._local_kernel == "auto" and still:
            warm = warm._replace(step_size=None)
        if whitening.margins is None:
            return warm, doubtful
        # a single component is N(0, I): see `warm_start`
        reference = normal(reference.centre.shape[1]) if num == 1 else largest(reference, num)
        whitening = whitening if margins else whitening._replace(margins=None)
        return warm._replace(reference=reference, whitening=whitening), doubtful
