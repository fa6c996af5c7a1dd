# SPDX-License-Identifier: Apache-2.0
"""From a NumPyro model to a density on R^d."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer import init_to_sample
from numpyro.infer.util import initialize_model, unconstrain_fn
from numpyro.util import not_jax_tracer

from numpyro_sbtm.batches import MAX_TOGETHER, at_once
from numpyro_sbtm.checks import shown
from numpyro_sbtm.compile import run_stages
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.kernels.failures import explained, refuse_overflow
from numpyro_sbtm.kernels.periodic import (
    Direction,
    find_centres,
    has_proper_priors,
    improper_directions,
    spread,
    window_log_density,
    wrap,
)
from numpyro_sbtm.kernels.problem import Problem, flat, logdensity, prototype_of
from numpyro_sbtm.options import Search

__all__ = ["Model", "from_model"]

_NUM_LOOKS = 32  # points from which directions without a prior are looked at
_UNCONSTRAIN = (
    "`numpyro.infer.util.unconstrain_fn(model, model_args, model_kwargs, values)` makes unconstrained values "
    "of the sites' own."
)


class Model(NamedTuple):
    """A NumPyro model with its arguments.

    Attributes:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_strategy: one of NumPyro's strategies.
        forward_mode: differentiate the model in forward mode.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    init_strategy: Callable[..., Any]
    forward_mode: bool

    def initialise(self, key: Key, num: int) -> Any:
        """Let NumPyro find so many valid positions."""
        return initialize_model(
            jax.random.split(key, num),
            self.model,
            init_strategy=self.init_strategy,
            dynamic_args=True,
            model_args=self.args,
            model_kwargs=self.kwargs,
            forward_mode_differentiation=self.forward_mode,
        )


def from_model(key: Key, model: Model, *, num_chains: int, search: Search, init_params: Any) -> Problem:
    """Set up a NumPyro model.

    Starts come half from the initialisation strategy and half from the prior, which knows the scale of a
    parameter; where prior draws have no finite density, from the strategy alone.

    Args:
        key: random key.
        model: the model with its arguments.
        num_chains: how many valid positions to return.
        search: how many starts and draws of the prior to return.
        init_params: unconstrained positions with a leading axis of length ``num_chains``, or None.

    Returns:
        The problem.

    Raises:
        ValueError: if the data do not fit the precision of the run, ``init_params`` names other sites or a
            point without a finite density, or a site with an improper prior is flat.
        TypeError: if arguments of the model are no arrays of numbers and it needs such.
        RuntimeError: if no start has a finite log density and gradient.
    """
    key_init, key_prior = jax.random.split(key)
    num_starts, half = search.num_starts, search.num_starts // 2
    refuse_overflow(model.model, model.args, model.kwargs)
    if init_params is not None:
        _check_positions(init_params)
    with explained("model", model.model, model.args, model.kwargs):
        info = model.initialise(key_init, num_chains + num_starts)
    values = info.param_info.z
    # chains come last: what is searched from does not depend on how many there are
    positions = jax.tree.map(lambda leaf: leaf[num_starts:], values)
    prototype = prototype_of(values)
    empty, unravel = ravel_pytree(prototype)
    problem = Problem(
        info.potential_fn,
        info.postprocess_fn,
        positions,
        starts=jnp.zeros((num_starts, 0)),
        scouts=jnp.zeros((num_starts, 0)),
        order=np.arange(0),
        unravel=unravel,
        together=MAX_TOGETHER,
        most=None,
    )
    if not empty.size:
        return problem
    x = flat(values)[:num_starts]
    potential_fn = info.potential_fn(*model.args, **model.kwargs)
    together, most = at_once(lambda x: potential_fn(unravel(x)), x[0], model.forward_mode)
    problem = problem._replace(
        starts=x[:half],
        scouts=x,
        order=_trace_order(prototype, [name for name in info.model_trace if name in prototype]),
        together=together,
        most=most,
    )
    problem = problem._replace(proper=has_proper_priors(info.model_trace, prototype))
    centre = _circles(problem, model, improper_directions(info.model_trace, prototype))
    problem = problem._replace(potential_gen=_windowed(info.potential_fn, centre), centre=centre)
    potential_fn = problem.potential_gen(*model.args, **model.kwargs)
    scouts = _prior_draws(key_prior, model, problem, potential_fn, search.num_prior_draws)
    starts = x[:half]
    if init_params is not None:
        positions = _given_positions(init_params, positions, potential_fn)
        starts = jnp.concatenate([flat(positions), starts])[:half]
    starts = jnp.concatenate([wrap(starts, centre), scouts[:half]])
    return problem._replace(positions=positions, starts=starts, scouts=scouts)


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


def _circles(problem: Problem, model: Model, directions: dict[int, Direction]) -> np.ndarray:
    """Find the periodic directions of a model and the centres of their windows; NaN for other directions.

    They depend on the model and its arguments alone, so that a state keeps its meaning when its kernel is set
    up again. Where data are traced values, no density can be looked at: then only what `CircularReparam` made
    is periodic, around zero.
    """
    centre = np.full(problem.starts.shape[1], np.nan)
    for i, direction in directions.items():
        centre[i] = 0.0 if direction.circular else np.nan
    if not directions or not all(map(not_jax_tracer, jax.tree.leaves((model.args, model.kwargs)))):
        return centre
    with jax.ensure_compile_time_eval():  # keys may be traced where data are not, as for parallel chains
        info = model.initialise(jax.random.key(0), _NUM_LOOKS)
        points = flat(info.param_info.z)
        if not not_jax_tracer(points):  # the model closes over traced values
            return centre
        problem = problem._replace(potential_gen=info.potential_fn)
        density = logdensity(problem, model.args, model.kwargs, model.forward_mode)
        return find_centres(density, points, directions)


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


def _prior_draws(
    key: Key, model: Model, problem: Problem, potential_fn: Callable[[Any], Float[Array, ""]], num: int
) -> Float[Array, "m d"]:
    """Draw from the prior, unconstrained; starts stand in for draws without a finite density."""
    centre, prototype = problem.centre, problem.unravel(problem.starts[0])
    assert centre is not None  # by `_circles`

    def draw(key: Key) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        key_sites, key_discrete, key_spread = jax.random.split(key, 3)
        seeded = handlers.substitute(handlers.seed(model.model, key_sites), substitute_fn=init_to_sample)
        sites = handlers.trace(seeded).get_trace(*model.args, **model.kwargs)
        drawn = {name: sites[name]["value"] for name in prototype}
        # seeded, for discrete sites that are summed out elsewhere
        z = unconstrain_fn(handlers.seed(model.model, key_discrete), model.args, model.kwargs, drawn)
        z = {name: jnp.asarray(z[name], leaf.dtype).reshape(leaf.shape) for name, leaf in prototype.items()}
        x = spread(key_spread, ravel_pytree(z)[0], centre)
        return x, potential_fn(problem.unravel(x))

    def draws(key: Key, others: Float[Array, "n d"]) -> tuple[Float[Array, "m d"]]:
        x, energy = jax.vmap(draw)(jax.random.split(key, num))
        finite = jnp.isfinite(energy) & jnp.all(jnp.isfinite(x), -1)
        # the finite draws first, again and again; without one, the other points
        first = jnp.argsort(~finite)[jnp.arange(num) % jnp.maximum(jnp.sum(finite), 1)]
        again = wrap(others[jnp.arange(num) % len(others)], centre)
        return (jnp.where(jnp.any(finite), x[first], again),)

    return run_stages([draws], key, problem.scouts)[0]


def _trace_order(prototype: dict[str, Any], names: list[str]) -> np.ndarray:
    """List the coordinates, which `ravel_pytree` sorts by site name, in the order of the trace."""
    stop = np.cumsum([prototype[name].size for name in sorted(prototype)])
    ranges = {
        name: np.arange(end - prototype[name].size, end)
        for name, end in zip(sorted(prototype), stop, strict=True)
    }
    return np.concatenate([ranges[name] for name in names])
