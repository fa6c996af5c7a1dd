# SPDX-License-Identifier: Apache-2.0
"""Checks of a kernel's arguments, and what all kernels are documented to take."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.distributions.transforms import Transform
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.mcmc import MCMC, MCMCKernel

from numpyro_sbtm.checks import function, optional, shown
from numpyro_sbtm.core.maps import Map

__all__ = ["OPTIONS", "check_model", "check_precondition"]

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


def check_model(model: Any, potential_fn: Any) -> None:
    """Refuse what is no model, and both or neither of model and potential."""
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


def check_precondition(precondition: Any, has_model: bool) -> None:
    """Refuse what is no whitening, or one under which all draws would be the same."""
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
    _check_affine(precondition, cure)


def _check_affine(precondition: tuple[Any, Any], cure: str) -> None:
    """Refuse a pair of location and scale that is no affine map of R^d, in the precision of the run."""
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
