# SPDX-License-Identifier: Apache-2.0
"""From a posterior to what is known before training: where it is, and how good draws from there are."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.mixture import normal
from numpyro_sbtm.core.target import Key, Target, after
from numpyro_sbtm.core.weights import clean, ess_fraction
from numpyro_sbtm.core.whitening import affine, whiten
from numpyro_sbtm.local import LocalMove
from numpyro_sbtm.psis import tail_index
from numpyro_sbtm.stages import run_stages
from numpyro_sbtm.state import WarmStart
from numpyro_sbtm.warm_start import warm_start

__all__ = ["Precondition", "find_start"]

Precondition = str | tuple[Any, Any] | None
"""'auto', 'refined', ``(loc, scale_tril)``, or None; a kernel turns an AutoGuide into a pair."""

_NUM_CHECKED = 1024  # draws that judge the warm start
_NUM_KEPT = 1024  # points kept for training
_NUM_ADAPTING = 128  # points that choose the step size of local moves


def find_start(
    key: Key,
    target: Target,
    starts: Float[Array, "s d"],
    scouts: Float[Array, "m d"],
    order: Int[Array, " d"],
    precondition: Precondition,
    local: LocalMove | None,
) -> WarmStart:
    """Look for the posterior, or take what is given, and judge draws from there.

    Args:
        key: random key.
        target: the posterior on the unconstrained space.
        starts: points of finite density, shape ``[s, d]``.
        scouts: points that lie as widely as the posterior may, shape ``[m, d]``.
        order: the coordinates, hyperparameters first, shape ``[d]``.
        precondition: 'auto' or 'refined' to look for it (see `warm_start`), else the whitening itself.
        local: the local move whose step size is adapted, or None.
    """
    dim, dtype = starts.shape[1], starts.dtype

    def given(key: Key, starts: Float[Array, "s d"], scouts: Float[Array, "m d"]):  # type: ignore[no-untyped-def]
        assert not isinstance(precondition, str)
        loc, scale_tril = precondition or (jnp.zeros(dim), jnp.eye(dim))
        whitening = affine(jnp.asarray(loc, dtype), jnp.asarray(scale_tril, dtype))
        key_points, key = jax.random.split(key)
        points = jax.vmap(normal(dim).sample)(jax.random.split(key_points, _NUM_ADAPTING))
        return whitening, normal(dim), points, jnp.zeros((), jnp.int32), jnp.zeros((), dtype), key

    def check(whitening, reference, points, gradients, drift, key):  # type: ignore[no-untyped-def]
        key_check, key_adapt = jax.random.split(key)
        white = whiten(target, whitening)
        draws = jax.vmap(reference.sample)(jax.random.split(key_check, _NUM_CHECKED))
        log_weight = jax.vmap(lambda u: white.logdensity_fn(u) - reference.log_prob(u))(draws)
        step_size = None
        if local is not None:
            step_size = local.adapt(
                after(key_adapt, log_weight),
                white.logdensity_fn,
                points[:: max(1, len(points) // _NUM_ADAPTING)],
            ).astype(dtype)
        log_weight = clean(log_weight)
        # neighbours among tempered particles descend from one another: take them evenly spaced
        kept = points[:: max(1, len(points) // _NUM_KEPT)] if isinstance(precondition, str) else None
        fraction, khat = (found(log_weight).astype(dtype) for found in (ess_fraction, tail_index))
        drift, gradients = drift.astype(dtype), gradients.astype(jnp.int32)
        return whitening, reference, kept, fraction, khat, drift, step_size, gradients

    stages = [given]
    if isinstance(precondition, str):
        stages = warm_start(target, order, precondition == "refined")
    return WarmStart(*run_stages([*stages, check], key, starts, scouts))
