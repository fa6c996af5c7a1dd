# SPDX-License-Identifier: Apache-2.0
"""From a NumPyro model, or a potential function, to a density on R^d."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import jaxprs_in_params
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, init_to_sample
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import initialize_model, unconstrain_fn
from numpyro.optim import optax_to_numpyro
from numpyro.util import not_jax_tracer

from numpyro_sbtm.checks import shown
from numpyro_sbtm.core.target import Key, LogDensity
from numpyro_sbtm.failures import explained, refuse_overflow
from numpyro_sbtm.lapack import most_points
from numpyro_sbtm.stages import run_stages

__all__ = ["Problem", "from_model", "from_potential", "guide_moments", "logdensity"]

_NUM_SCOUTS = 128
_GUIDE_STEPS, _GUIDE_STEP_SIZE, _GUIDE_PARTICLES = 3000, 0.05, 8
_GUIDE_DRAWS = 4096
_MAX_BYTES = 2**28  # of an array over all points at which a density is evaluated together
_MAX_TOGETHER = 8192  # points that are never too many
_UNCONSTRAIN = (
    "`numpyro.infer.util.unconstrain_fn(model, model_args, model_kwargs, values)` makes unconstrained values "
    "of the sites' own."
)
_START_RADIUS = 0.1  # spread of the starts around the one that comes with a potential function


class Problem(NamedTuple):
    """A posterior on R^d, and the way back to the model's sites.

    Attributes:
        potential_gen: ``(*model_args, **model_kwargs) -> potential_fn``; the potential is minus the log
            density of unconstrained values. Rebuilt from the arguments wherever these may change.
        postprocess_gen: ``(*model_args, **model_kwargs) -> (unconstrained -> sites)``.
        positions: valid unconstrained values, with a leading axis, one per chain.
        starts: points from which to look for the posterior's bulk, shape ``[s, d]``.
        scouts: points that lie as widely as the posterior may, draws of the prior where there is one,
            shape ``[m, d]``.
        order: the coordinates of R^d in the order of the model's trace, shape ``[d]``.
        unravel: from a point of R^d to unconstrained values.
        together: at how many points the density may be evaluated at once, by the memory that takes.
        most: at how many points it may be evaluated at all at once; None: at any number.
    """

    potential_gen: Callable[..., Callable[[Any], Float[Array, ""]]]
    postprocess_gen: Callable[..., Callable[[Any], Any]]
    positions: Any
    starts: Float[Array, "s d"]
    scouts: Float[Array, "m d"]
    order: np.ndarray
    unravel: Callable[[Float[Array, " d"]], Any]
    together: int
    most: int | None

    @property
    def small(self) -> bool:
        """Whether the density makes no large arrays: many points are then evaluated at once."""
        return self.together >= _MAX_TOGETHER


def _flat(values: Any) -> Float[Array, "n d"]:
    return jax.vmap(lambda value: ravel_pytree(value)[0])(values)


def _prototype(values: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), values)


def from_model(
    key: Key,
    model: Callable[..., Any],
    model_args: tuple[Any, ...],
    model_kwargs: dict[str, Any],
    *,
    num_chains: int,
    num_starts: int,
    init_strategy: Callable[..., Any],
    init_params: Any,
    forward_mode: bool,
) -> Problem:
    """Set up a NumPyro model.

    Starts come half from the initialisation strategy and half from the prior, which knows the scale of a
    parameter; where prior draws have no finite density, from the strategy alone.

    Args:
        key: random key.
        model: the model.
        model_args: its positional arguments.
        model_kwargs: its keyword arguments.
        num_chains: how many valid positions to return.
        num_starts: how many starts to return, an even number.
        init_strategy: one of NumPyro's strategies.
        init_params: unconstrained positions with a leading axis of length ``num_chains``, or None.
        forward_mode: differentiate the model in forward mode.

    Returns:
        The problem.

    Raises:
        ValueError: if the model has no continuous latent site, its data do not fit the precision of the run,
            or ``init_params`` names other sites or a point without a finite density.
        TypeError: if arguments of the model are no arrays of numbers and it needs such.
        RuntimeError: if no start has a finite log density and gradient.
    """
    key_init, key_prior = jax.random.split(key)

    def initialise(key: Key, strategy: Callable[..., Any], num: int) -> Any:
        return initialize_model(
            jax.random.split(key, num),
            model,
            init_strategy=strategy,
            dynamic_args=True,
            model_args=model_args,
            model_kwargs=model_kwargs,
            forward_mode_differentiation=forward_mode,
        )

    half = num_starts // 2
    refuse_overflow(model, model_args, model_kwargs)
    if init_params is not None:
        _check_positions(init_params)
    with explained("model", model, model_args, model_kwargs):
        info = initialise(key_init, init_strategy, num_chains + num_starts)
    values = info.param_info.z
    if not sum(leaf.size for leaf in jax.tree.leaves(values)):
        raise ValueError(
            "`model` has no continuous latent site, so there is nothing to sample. "
            "Use `numpyro.infer.Predictive` to simulate it."
        )
    flat = _flat(values)
    starts = flat[num_chains : num_chains + half]
    potential_fn = info.potential_fn(*model_args, **model_kwargs)
    scouts = _scouts(key_prior, model, model_args, model_kwargs, potential_fn, values, flat[num_chains:])
    positions = jax.tree.map(lambda leaf: leaf[:num_chains], values)
    if init_params is not None:
        positions = _given_positions(init_params, positions, potential_fn)
        starts = jnp.concatenate([_flat(positions), starts])[:half]
    prototype = _prototype(values)
    _, unravel = ravel_pytree(prototype)
    return Problem(
        info.potential_fn,
        info.postprocess_fn,
        positions,
        jnp.concatenate([starts, scouts[:half]]),
        scouts,
        _trace_order(prototype, [name for name in info.model_trace if name in prototype]),
        unravel,
        *_at_once(lambda x: potential_fn(unravel(x)), starts[0], forward_mode),
    )


def _check_positions(init_params: Any) -> None:
    """Refuse positions that no model has, before anything is compiled."""
    if not isinstance(init_params, Mapping):
        raise TypeError(
            "`init_params` must be a dict with the unconstrained value of every latent site, got "
            f"{shown(init_params)}. {_UNCONSTRAIN}"
        )
    for name, value in init_params.items():
        if not_jax_tracer(value) and not np.all(np.isfinite(value)):
            raise ValueError(f"`init_params` must be finite, got {shown(np.asarray(value))} for {name!r}.")


def _given_positions(init_params: Any, positions: Any, potential_fn: Callable[..., Any]) -> Any:
    """Take positions that a user gives, in place of others, after checking that the model has them."""
    expected = {name: jnp.shape(leaf) for name, leaf in positions.items()}
    got = {name: jnp.shape(leaf) for name, leaf in init_params.items()}
    if expected != got:
        raise ValueError(
            "`init_params` must hold the unconstrained value of every latent site: expected shapes "
            f"{expected}, got {got}, the leading axis being that of chains. {_UNCONSTRAIN}"
        )
    given = {name: jnp.asarray(init_params[name], old.dtype) for name, old in positions.items()}
    energy = jax.jit(jax.vmap(potential_fn))(given)
    if not_jax_tracer(energy) and not np.all(np.isfinite(energy)):
        raise ValueError(
            "`init_params` must have a finite density, got minus its logarithm "
            f"{np.asarray(energy).tolist()}. Are they unconstrained values? {_UNCONSTRAIN}"
        )
    return given


def _scouts(
    key: Key,
    model: Callable[..., Any],
    model_args: tuple[Any, ...],
    model_kwargs: dict[str, Any],
    potential_fn: Callable[[Any], Float[Array, ""]],
    values: Any,
    others: Float[Array, "n d"],
) -> Float[Array, "m d"]:
    """Draw from the prior, unconstrained; other points stand in for draws without a finite density."""

    def draw(key: Key) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        seeded = handlers.substitute(handlers.seed(model, key), substitute_fn=init_to_sample)
        sites = handlers.trace(seeded).get_trace(*model_args, **model_kwargs)
        drawn = {name: sites[name]["value"] for name in values}
        # seeded, for discrete sites that are summed out elsewhere
        z = unconstrain_fn(handlers.seed(model, key), model_args, model_kwargs, drawn)
        z = {name: jnp.asarray(z[name], leaf.dtype).reshape(leaf.shape[1:]) for name, leaf in values.items()}
        return ravel_pytree(z)[0], potential_fn(z)

    def scouts(key: Key, others: Float[Array, "n d"]) -> tuple[Float[Array, "m d"]]:
        x, energy = jax.vmap(draw)(jax.random.split(key, _NUM_SCOUTS))
        finite = jnp.isfinite(energy) & jnp.all(jnp.isfinite(x), -1)
        # the finite draws first, again and again; without one, the other points
        first = jnp.argsort(~finite)[jnp.arange(_NUM_SCOUTS) % jnp.maximum(jnp.sum(finite), 1)]
        again = others[jnp.arange(_NUM_SCOUTS) % len(others)]
        return (jnp.where(jnp.any(finite), x[first], again),)

    return run_stages([scouts], key, others)[0]


def guide_moments(
    key: Key,
    guide: AutoGuide,
    model: Callable[..., Any],
    model_args: tuple[Any, ...],
    model_kwargs: dict[str, Any],
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Fit an AutoGuide by stochastic variational inference; return the moments of its unconstrained draws.

    Args:
        key: random key.
        guide: one of `numpyro.infer.autoguide`, made for the model.
        model: the model.
        model_args: its positional arguments.
        model_kwargs: its keyword arguments.

    Returns:
        The mean, shape ``[d]``, and a Cholesky factor of the covariance, shape ``[d, d]``, of the flattened
        unconstrained space, sites in sorted order.

    Raises:
        ValueError: if the guide is of another model, the moments are not finite, or the covariance is not
            regular.

    Reference:
        Kucukelbir et al. (2017), Automatic differentiation variational inference, arXiv:1603.00788.
    """
    key_fit, key_draws = jax.random.split(key)
    schedule = optax.cosine_decay_schedule(_GUIDE_STEP_SIZE, _GUIDE_STEPS, alpha=0.01)
    optimiser = optax_to_numpyro(optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule)))
    svi = SVI(model, guide, optimiser, Trace_ELBO(num_particles=_GUIDE_PARTICLES))
    state = svi.init(key_fit, *model_args, **model_kwargs)
    seeded = handlers.seed(model, key_draws)  # for discrete sites that are summed out elsewhere
    sites = jax.eval_shape(
        lambda key: guide.sample_posterior(key, svi.get_params(state), *model_args, **model_kwargs), key_draws
    )
    missing = [
        name
        for name, site in handlers.trace(seeded).get_trace(*model_args, **model_kwargs).items()
        if site["type"] == "sample" and not site["is_observed"] and name not in sites
        if not site["fn"].support.is_discrete
    ]
    if missing:
        raise ValueError(
            f"`precondition`, {type(guide).__name__}, draws {', '.join(sites)}, but not {', '.join(missing)} "
            f"of the kernel's `model`. Pass `{type(guide).__name__}(model)`."
        )
    params = svi.run(
        key_fit, _GUIDE_STEPS, *model_args, init_state=state, progress_bar=False, **model_kwargs
    ).params
    draws = guide.sample_posterior(
        key_draws, params, *model_args, sample_shape=(_GUIDE_DRAWS,), **model_kwargs
    )
    values = jax.vmap(lambda sites: unconstrain_fn(seeded, model_args, model_kwargs, sites))(draws)
    x = _flat(values)
    cov = jnp.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])
    loc, tril = jnp.mean(x, 0), jnp.linalg.cholesky(cov)
    if not_jax_tracer(tril) and not (np.all(np.isfinite(loc)) and np.all(np.isfinite(tril))):
        raise ValueError(
            f"`precondition`, {type(guide).__name__}, has no finite mean and covariance after "
            f"{_GUIDE_STEPS} steps. Use another guide, or 'auto'."
        )
    return loc, tril


def _trace_order(prototype: dict[str, Any], names: list[str]) -> np.ndarray:
    """List the coordinates, which `ravel_pytree` sorts by site name, in the order of the trace."""
    stop = np.cumsum([prototype[name].size for name in sorted(prototype)])
    ranges = {
        name: np.arange(end - prototype[name].size, end)
        for name, end in zip(sorted(prototype), stop, strict=True)
    }
    return np.concatenate([ranges[name] for name in names])


def from_potential(
    key: Key,
    potential_fn: Callable[[Any], Float[Array, ""]],
    init_params: Any,
    *,
    num_chains: int,
    num_starts: int,
    forward_mode: bool,
) -> Problem:
    """Set up a potential function, minus a log density, of any pytree of unconstrained arrays.

    Args:
        key: random key.
        potential_fn: the potential.
        init_params: positions with a leading axis of length ``num_chains``.
        num_chains: how many positions there are.
        num_starts: how many starts to return.
        forward_mode: differentiate the potential in forward mode.

    Returns:
        The problem.

    Raises:
        ValueError: if ``init_params`` is missing, empty, or has no finite potential.
        TypeError: if the potential is no real number.
    """
    if init_params is None:
        raise ValueError("Valid value of `init_params` must be provided with `potential_fn`.")
    positions = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), init_params)
    flat = _flat(positions) if jax.tree.leaves(positions) else jnp.zeros((num_chains, 0))
    if flat.shape[1] == 0:
        raise ValueError("`init_params` is empty, so there is nothing to sample.")
    with explained("potential_fn", potential_fn, (), {}):
        energy = jax.vmap(potential_fn)(positions)
    _check_potential(energy, num_chains)
    if not_jax_tracer(energy) and not np.all(np.isfinite(energy)):
        raise ValueError(
            f"`potential_fn` must be finite at `init_params`, got {np.asarray(energy).tolist()}. "
            "Pass a point of finite density."
        )
    _, unravel = ravel_pytree(_prototype(positions))
    noise = _START_RADIUS * jax.random.normal(key, (num_starts, flat.shape[1]), flat.dtype)
    starts = flat[jnp.arange(num_starts) % num_chains] + noise

    def identity_gen(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return lambda x: x

    def potential_gen(*args: Any, **kwargs: Any) -> Callable[[Any], Float[Array, ""]]:
        return potential_fn

    order = np.arange(flat.shape[1])
    with explained("potential_fn", potential_fn, (), {}):
        at_once = _at_once(lambda x: potential_fn(unravel(x)), starts[0], forward_mode)
    return Problem(potential_gen, identity_gen, positions, starts, starts, order, unravel, *at_once)


def _check_potential(energy: Any, num_chains: int) -> None:
    """Refuse what a potential function gave at the positions of chains, unless it is a number for each."""
    must = "`potential_fn` must return one real number, minus a log density"
    if not isinstance(energy, jax.Array):
        raise TypeError(f"{must}, got {'None' if energy is None else f'a {type(energy).__name__}'}.")
    if energy.shape != (num_chains,):
        raise TypeError(f"{must}, got an array of shape {energy.shape[1:]}. Take its sum, or its only entry.")
    if not jnp.issubdtype(energy.dtype, jnp.floating):
        real = jnp.issubdtype(energy.dtype, jnp.complexfloating)
        cure = "Take its real part." if real else "Compute with floats: integers have no gradient."
        raise TypeError(f"{must}, got one of dtype {energy.dtype}. {cure}")


def logdensity(
    problem: Problem, model_args: tuple[Any, ...], model_kwargs: dict[str, Any], forward_mode: bool
) -> LogDensity:
    """Build the log density of a point of R^d for given model arguments.

    Args:
        problem: the problem.
        model_args: positional arguments of the model.
        model_kwargs: keyword arguments of the model.
        forward_mode: compute its gradient in forward mode, for models with a ``while_loop``.
    """
    potential = problem.potential_gen(*model_args, **model_kwargs)

    def evaluate(x: Float[Array, " d"]) -> Float[Array, ""]:
        return -potential(problem.unravel(x))

    sizes = [] if problem.small else [problem.together]
    sizes += [] if problem.most is None else [problem.most]
    if not sizes and not forward_mode:
        return evaluate

    def with_score(x: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, " d"]]:
        if forward_mode:
            return evaluate(x), jax.jacfwd(evaluate)(x)
        return jax.value_and_grad(evaluate)(x)

    value, value_and_score = evaluate, with_score
    if sizes:
        value, value_and_score = (_in_batches(f, min(sizes)) for f in (evaluate, with_score))
    differentiable = jax.custom_vjp(value)
    differentiable.defvjp(value_and_score, lambda score, cotangent: (cotangent * score,))
    return differentiable


def _at_once(
    function: Callable[..., Any], x: Float[Array, " d"], forward_mode: bool
) -> tuple[int, int | None]:
    """Say at how many points a function may be evaluated at once, by its arrays and its factorisations."""

    def largest(jaxpr: Any) -> int:
        sizes = [0]
        for equation in jaxpr.eqns:
            sizes += [var.aval.size * var.aval.dtype.itemsize for var in equation.outvars if var.aval.shape]
            sizes += [largest(inner) for inner in jaxprs_in_params(equation.params)]
        return max(sizes)

    together = max(1, _MAX_BYTES // max(1, largest(jax.make_jaxpr(function)(x).jaxpr)))
    differentiated = jax.jacfwd(function) if forward_mode else jax.value_and_grad(function)
    return together, most_points(differentiated, x)


def _in_batches(function: Callable[..., Any], together: int) -> Callable[..., Any]:
    """Make a function of one point that, under `vmap`, is evaluated at so many points at a time."""

    def wrap(batched: Callable[..., Any], size: int) -> Callable[..., Any]:
        wrapped = jax.custom_batching.custom_vmap(batched)

        def rule(axis_size: int, in_batched: list[bool], *args: Array) -> tuple[Any, Any]:
            if size * axis_size <= together:
                axes = [0 if mapped else None for mapped in in_batched]
                out = wrap(jax.vmap(batched, axes), size * axis_size)(*args)
            else:

                def one(mapped: list[Array]) -> Any:
                    rest = iter(mapped)
                    return batched(*(next(rest) if m else a for m, a in zip(in_batched, args, strict=True)))

                mapped = [arg for m, arg in zip(in_batched, args, strict=True) if m]
                out = jax.lax.map(one, mapped, batch_size=max(1, together // size))
            return out, jax.tree.map(lambda _: True, out)

        wrapped.def_vmap(rule)
        return wrapped

    def evaluate(x: Float[Array, " d"]) -> Any:
        # data stay constants of the inner program: a branch under `vmap` would make a copy for every point
        program, out = jax.make_jaxpr(jax.jit(function), return_shape=True)(x)

        def call(x: Array, *traced: Array) -> Any:
            flat = jax.core.eval_jaxpr(program.jaxpr, traced, x)
            return jax.tree.unflatten(jax.tree.structure(out), flat)

        return wrap(call, 1)(x, *program.consts)

    # only Hessians differentiate once more, at few points
    differentiable = jax.custom_jvp(evaluate)
    differentiable.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return differentiable
