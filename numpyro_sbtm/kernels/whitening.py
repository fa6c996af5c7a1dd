# SPDX-License-Identifier: Apache-2.0
"""Whitenings that a kernel is given: maps, transforms of NumPyro, moments of an AutoGuide's draws."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions.transforms import Transform
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import unconstrain_fn
from numpyro.optim import optax_to_numpyro
from numpyro.util import not_jax_tracer

from numpyro_sbtm.core.maps import Map
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.kernels.periodic import wrap
from numpyro_sbtm.kernels.posterior import Arguments
from numpyro_sbtm.kernels.problem import Problem, flat
from numpyro_sbtm.kernels.transform import TransformMap
from numpyro_sbtm.search.ladder import Precondition

__all__ = ["guide_moments", "whitening_of"]

_GUIDE_STEPS, _GUIDE_STEP_SIZE, _GUIDE_PARTICLES = 3000, 0.05, 8
_GUIDE_DRAWS = 4096


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
    x = flat(values)
    cov = jnp.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])
    loc, tril = jnp.mean(x, 0), jnp.linalg.cholesky(cov)
    if not_jax_tracer(tril) and not (np.all(np.isfinite(loc)) and np.all(np.isfinite(tril))):
        raise ValueError(
            f"`precondition`, {type(guide).__name__}, has no finite mean and covariance after "
            f"{_GUIDE_STEPS} steps. Use another guide, or 'auto'."
        )
    return loc, tril


def whitening_of(
    key: Key, precondition: Any, problem: Problem, model: Callable[..., Any] | None, arguments: Arguments
) -> Precondition:
    """Return the whitening that a kernel's ``precondition`` means, for a posterior of this dimension.

    Raises:
        ValueError: for a whitening of another dimension, and as `guide_moments` does.
    """
    dim = problem.starts.shape[1]
    if isinstance(precondition, AutoGuide):
        assert model is not None  # checked by the constructor
        precondition = guide_moments(key, precondition, model, arguments.args, arguments.kwargs)
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
