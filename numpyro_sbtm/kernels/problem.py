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
from numpyro_sbtm.compile import run_stages
from numpyro_sbtm.core.target import Key, LogDensity
from numpyro_sbtm.factorisations import most_points
from numpyro_sbtm.kernels.failures import explained, refuse_overflow
from numpyro_sbtm.kernels.periodic import (
    Direction,
    find_centres,
    improper_directions,
    spread,
    window_log_density,
    wrap,
)
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.fit import climb

__all__ = ["Problem", "from_model", "from_potential", "guide_moments", "logdensity"]

_NUM_LOOKS = 32  # points from which directions without a prior are looked at
_GUIDE_STEPS, _GUIDE_STEP_SIZE, _GUIDE_PARTICLES = 3000, 0.05, 8
_GUIDE_DRAWS = 4096
_MAX_BYTES = 2**28  # of an array over all points at which a density is evaluated together
_MAX_TOGETHER = 8192  # points that are never too many
_ROUNDED = 5e3  # size of log densities from which float32 rounds away half a thousandth and more
_OFFSET_STEPS = 50
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
        offset: about the largest log density, where float32 would round differences of such numbers; else 0.
        centre: of the windows of periodic coordinates, NaN for others, shape ``[d]``; None: all others.
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
    offset: float | Float[Array, ""] = 0.0
    centre: np.ndarray | None = None

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
    search: Search,
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
        search: how many starts and draws of the prior to return.
        init_strategy: one of NumPyro's strategies.
        init_params: unconstrained positions with a leading axis of length ``num_chains``, or None.
        forward_mode: differentiate the model in forward mode.

    Returns:
        The problem.

    Raises:
        ValueError: if the data do not fit the precision of the run, ``init_params`` names other sites or a
            point without a finite density, or a site with an improper prior is flat.
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

    num_starts = search.num_starts
    half = num_starts // 2
    refuse_overflow(model, model_args, model_kwargs)
    if init_params is not None:
        _check_positions(init_params)
    with explained("model", model, model_args, model_kwargs):
        info = initialise(key_init, init_strategy, num_chains + num_starts)
    values = info.param_info.z
    # chains come last: what is searched from does not depend on how many there are
    positions = jax.tree.map(lambda leaf: leaf[num_starts:], values)
    prototype = _prototype(values)
    empty, unravel = ravel_pytree(prototype)
    if not empty.size:
        nothing = jnp.zeros((num_starts, 0))
        return Problem(
            info.potential_fn,
            info.postprocess_fn,
            positions,
            nothing,
            nothing,
            np.arange(0),
            unravel,
            together=_MAX_TOGETHER,
            most=None,
        )
    flat = _flat(values)[:num_starts]
    starts = flat[:half]
    potential_fn = info.potential_fn(*model_args, **model_kwargs)
    at_once = _at_once(lambda x: potential_fn(unravel(x)), starts[0], forward_mode)
    order = _trace_order(prototype, [name for name in info.model_trace if name in prototype])
    problem = Problem(
        info.potential_fn, info.postprocess_fn, positions, starts, flat, order, unravel, *at_once
    )
    looks = lambda: initialise(jax.random.key(0), init_strategy, _NUM_LOOKS)  # noqa: E731
    directions = improper_directions(info.model_trace, prototype)
    centre = _circles(problem, looks, directions, model_args, model_kwargs, forward_mode)
    potential_gen = _windowed(info.potential_fn, centre)
    potential_fn = potential_gen(*model_args, **model_kwargs)
    drawn = search.num_prior_draws
    scouts = _scouts(key_prior, model, model_args, model_kwargs, potential_fn, values, flat, centre, drawn)
    if init_params is not None:
        positions = _given_positions(init_params, positions, potential_fn)
        starts = jnp.concatenate([_flat(positions), starts])[:half]
    starts = jnp.concatenate([wrap(starts, centre), scouts[:half]])
    problem = problem._replace(
        potential_gen=potential_gen, positions=positions, starts=starts, scouts=scouts, centre=centre
    )
    return _with_offset(problem, model_args, model_kwargs, forward_mode)


def _with_offset(
    problem: Problem, model_args: tuple[Any, ...], model_kwargs: dict[str, Any], forward_mode: bool
) -> Problem:
    """Choose an offset for log densities that float32 would round: about the value at a mode."""
    starts = problem.starts
    if starts.dtype != jnp.float32 or not not_jax_tracer(starts):
        return problem
    log_density = logdensity(problem, model_args, model_kwargs, forward_mode)
    values = jax.jit(jax.vmap(log_density))(starts)
    best = jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))
    if abs(float(values[best])) < _ROUNDED:
        return problem
    # where it is so large it changes as much on the way to a mode
    top = jax.jit(lambda x: log_density(climb(log_density, x, _OFFSET_STEPS)))(starts[best])
    return problem._replace(offset=float(jnp.maximum(top, values[best])))


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


def _circles(
    problem: Problem,
    initialise: Callable[[], Any],
    directions: dict[int, Direction],
    model_args: tuple[Any, ...],
    model_kwargs: dict[str, Any],
    forward_mode: bool,
) -> np.ndarray:
    """Find the periodic directions of a model and the centres of their windows; NaN for other directions.

    They depend on the model and its arguments alone, so that a state keeps its meaning when its kernel is set
    up again. Where data are traced values, no density can be looked at: then only what `CircularReparam` made
    is periodic, around zero.
    """
    centre = np.full(problem.starts.shape[1], np.nan)
    for i, direction in directions.items():
        centre[i] = 0.0 if direction.circular else np.nan
    if not directions or not all(map(not_jax_tracer, jax.tree.leaves((model_args, model_kwargs)))):
        return centre
    with jax.ensure_compile_time_eval():  # keys may be traced where data are not, as for parallel chains
        info = initialise()
        points = _flat(info.param_info.z)
        if not not_jax_tracer(points):  # the model closes over traced values
            return centre
        problem = problem._replace(potential_gen=info.potential_fn)
        return find_centres(logdensity(problem, model_args, model_kwargs, forward_mode), points, directions)


def _windowed(
    potential_gen: Callable[..., Callable[[Any], Float[Array, ""]]], centre: np.ndarray
) -> Callable[..., Callable[[Any], Float[Array, ""]]]:
    """Make periodic directions proper; without one, leave all as it is."""
    if np.all(np.isnan(centre)):
        return potential_gen

    def windowed_gen(*args: Any, **kwargs: Any) -> Callable[[Any], Float[Array, ""]]:
        potential_fn = potential_gen(*args, **kwargs)
        return lambda z: potential_fn(z) - window_log_density(ravel_pytree(z)[0], centre)

    return windowed_gen


def _scouts(
    key: Key,
    model: Callable[..., Any],
    model_args: tuple[Any, ...],
    model_kwargs: dict[str, Any],
    potential_fn: Callable[[Any], Float[Array, ""]],
    values: Any,
    others: Float[Array, "n d"],
    centre: np.ndarray,
    num: int,
) -> Float[Array, "m d"]:
    """Draw from the prior, unconstrained; other points stand in for draws without a finite density."""
    _, unravel = ravel_pytree(_prototype(values))

    def draw(key: Key) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        seeded = handlers.substitute(handlers.seed(model, key), substitute_fn=init_to_sample)
        sites = handlers.trace(seeded).get_trace(*model_args, **model_kwargs)
        drawn = {name: sites[name]["value"] for name in values}
        # seeded, for discrete sites that are summed out elsewhere
        z = unconstrain_fn(handlers.seed(model, key), model_args, model_kwargs, drawn)
        z = {name: jnp.asarray(z[name], leaf.dtype).reshape(leaf.shape[1:]) for name, leaf in values.items()}
        x = spread(jax.random.fold_in(key, 1), ravel_pytree(z)[0], centre)
        return x, potential_fn(unravel(x))

    def scouts(key: Key, others: Float[Array, "n d"]) -> tuple[Float[Array, "m d"]]:
        x, energy = jax.vmap(draw)(jax.random.split(key, num))
        finite = jnp.isfinite(energy) & jnp.all(jnp.isfinite(x), -1)
        # the finite draws first, again and again; without one, the other points
        first = jnp.argsort(~finite)[jnp.arange(num) % jnp.maximum(jnp.sum(finite), 1)]
        again = wrap(others[jnp.arange(num) % len(others)], centre)
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
    problem = Problem(potential_gen, identity_gen, positions, starts, starts, order, unravel, *at_once)
    return _with_offset(problem, (), {}, forward_mode)


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

    score_of = (jax.jacfwd if forward_mode else jax.grad)(evaluate)

    def with_score(x: Float[Array, " d"]) -> tuple[Float[Array, ""], Float[Array, " d"]]:
        return (evaluate(x), score_of(x)) if forward_mode else jax.value_and_grad(evaluate)(x)

    def curved(x: Float[Array, " d"], v: Float[Array, " d"]) -> Float[Array, " d"]:
        """The Hessian times a vector."""
        return jax.jvp(score_of, (x,), (v,))[1] if forward_mode else jax.vjp(score_of, x)[1](v)[0]

    value, value_and_score, hessian_product = evaluate, with_score, curved
    if sizes:
        value, value_and_score, hessian_product = (
            _in_batches(f, min(sizes)) for f in (evaluate, with_score, curved)
        )

    def residuals(x: Float[Array, " d"]) -> tuple[Any, Any]:
        found = value_and_score(x)
        return found, (x, found[1])

    # only gradients through simulated paths differentiate the score
    scored = jax.custom_vjp(value_and_score)
    scored.defvjp(residuals, lambda kept, c: (c[0] * kept[1] + hessian_product(kept[0], c[1]),))
    differentiable = jax.custom_vjp(value)
    differentiable.defvjp(scored, lambda score, cotangent: (cotangent * score,))
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
    """Make a function of points of R^d that is evaluated at so many of them at a time, however it is batched.

    All `vmap`s around it become one batch, which is cut into equal blocks. Where data of the model are
    batched too, one set of them comes after the other.
    """

    def evaluate(*points: Float[Array, " d"]) -> Any:
        # data stay constants of the inner program: a branch under `vmap` would make a copy for every point
        program, out = jax.make_jaxpr(jax.jit(function), return_shape=True)(*points)

        @jax.custom_batching.custom_vmap
        def many(points: tuple[Float[Array, "n d"], ...], data: list[Array]) -> Any:
            def one(points: tuple[Float[Array, " d"], ...]) -> Any:
                flat = jax.core.eval_jaxpr(program.jaxpr, data, *points)
                return jax.tree.unflatten(jax.tree.structure(out), flat)

            num = len(points[0])
            rounds = -(-num // together)
            if rounds == 1:
                return jax.vmap(one)(points)
            # the last point again and again fills the last block: a remainder would be a second program
            which = jnp.minimum(jnp.arange(rounds * -(-num // rounds)), num - 1).reshape(rounds, -1)
            found = jax.lax.map(lambda block: jax.vmap(one)(tuple(p[block] for p in points)), which)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num], found)

        @many.def_vmap
        def rule(size: int, in_batched: Any, points: Any, data: list[Array]) -> tuple[Any, Any]:
            wide = tuple(
                p if batched else jnp.broadcast_to(p, (size, *p.shape))
                for p, batched in zip(points, in_batched[0], strict=True)
            )
            if any(in_batched[1]):
                mapped = [leaf for leaf, batched in zip(data, in_batched[1], strict=True) if batched]

                def one_set(given: tuple[Any, list[Array]]) -> Any:
                    rest = iter(given[1])
                    own = [next(rest) if b else leaf for leaf, b in zip(data, in_batched[1], strict=True)]
                    return many(given[0], own)

                found = jax.lax.map(one_set, (wide, mapped))
            else:
                flat = many(tuple(p.reshape(-1, *p.shape[2:]) for p in wide), data)
                found = jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), flat)
            return found, jax.tree.map(lambda _: True, found)

        found = many(tuple(p[None] for p in points), list(program.consts))
        return jax.tree.map(lambda leaf: leaf[0], found)

    return evaluate
