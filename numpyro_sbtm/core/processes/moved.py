# SPDX-License-Identifier: Apache-2.0
"""Processes in another place and on another scale, given or learned."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.processes.base import Chain, Process
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Gaussian, Pinned, Transition

__all__ = ["learned_reference", "rescaled"]


def rescaled(process: Process, loc: Float[Array, " d"], scale: Float[Array, " d"]) -> Process:
    """Move a process of normal transitions: if y is a path of it, ``loc + scale y`` is one of the result.

    Args:
        process: any process of normal transitions.
        loc: shape ``[d]``.
        scale: positive, shape ``[d]``.

    Returns:
        The process.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.processes.dds import dds
        >>> from numpyro_sbtm.core.processes.moved import rescaled
        >>> from numpyro_sbtm.networks import denoiser
        >>> rescaled(dds(denoiser(8), 2), jnp.ones(2), 3 * jnp.ones(2)).init(()).std.tolist()
        [3.0, 3.0]
    """

    def marginal(k: Int[Array, ""], x: Float[Array, " d"]) -> Float[Array, ""]:
        return process.marginal(k, (x - loc) / scale) - jnp.sum(jnp.log(scale))

    return _moved(process, lambda params: (params, loc, scale))._replace(marginal=marginal)


def learned_reference(process: Process) -> Process:
    """Learn the reference too: `rescaled`, by a place and a scale that are among the parameters.

    The law of x_0 and the size of the noise then change in training, and with them the backward chain.

    Args:
        process: any process of normal transitions.

    Returns:
        The process; its parameters are those of `numpyro_sbtm.core.net.with_place`.

    Reference:
        Blessing et al. (2025), arXiv:2503.00524 (learned priors); Sanokowski et al. (2025),
        arXiv:2506.10982 (why the divergence must then be a KL).

    Examples:
        >>> import jax
        >>> from numpyro_sbtm.core.net import with_place
        >>> from numpyro_sbtm.core.processes.dds import dds
        >>> from numpyro_sbtm.core.processes.moved import learned_reference
        >>> from numpyro_sbtm.networks import denoiser
        >>> net = with_place(denoiser(8))
        >>> learned_reference(dds(net, 2)).init(net.init(jax.random.key(0), 2)).std.tolist()
        [1.0, 1.0]
    """

    def parts(params: Params) -> tuple[Params, Float[Array, " d"], Float[Array, " d"]]:
        inner, loc, log_scale = params
        return inner, loc, jnp.exp(log_scale)

    return _moved(process, parts)._replace(learns_reference=True)


def _moved(process: Process, parts: Callable[[Params], tuple[Params, Array, Array]]) -> Process:
    """Make the process of ``loc + scale y``; ``parts`` gives the inner parameters, loc and scale."""

    def moved(one: Transition, loc: Float[Array, " d"], scale: Float[Array, " d"]) -> Gaussian | Pinned:
        assert isinstance(one, Gaussian | Pinned)
        return one._replace(mean=loc + scale * one.mean, std=scale * one.std)

    def chain(kernel: Chain) -> Chain:
        def there(
            params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
        ) -> Transition:
            inner, loc, scale = parts(params)
            return moved(kernel(inner, k, (x - loc) / scale, scale * score), loc, scale)

        return there

    def init(params: Params) -> Transition:
        inner, loc, scale = parts(params)
        return moved(process.init(inner), loc, scale)

    return process._replace(init=init, forward=chain(process.forward), backward=chain(process.backward))
