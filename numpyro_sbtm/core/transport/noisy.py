# SPDX-License-Identifier: Apache-2.0
"""Following the maps with noise: path weights without determinants."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Pinned, Transition
from numpyro_sbtm.core.transport.maps import velocity

__all__ = ["noisy_transport"]


def noisy_transport(net: Net, num_maps: int, base: Transition) -> Process:
    """Make the process that follows the maps with noise: the same marginals in the limit of small steps.

    With v = g - s, for the target's score g and the particles' score s, and a noise b > 0,

        F_k(x' | x) = N(x + h_k (b g(x) + (1-b) v_k(x)), 2 b h_k I),
        B_k(x | x') = N(x' + h_k (b g(x') - (1+b) v_k(x')), 2 b h_k I).

    The second is the time reversal of the first where v is exact, whatever b is. Path weights are exact for
    any v, without a determinant, and the maps need not be one-to-one: a step costs one target gradient and
    two evaluations of the network, in any dimension. Where v = 0 both are Langevin steps.

    Args:
        net: the network of the maps.
        num_maps: K.
        base: the law of x_0.

    Returns:
        The process, of parameters ``(maps, b)``. Steps of size zero stay where they are.

    Reference:
        The family of diffusions with given marginals: Song et al. (2021), arXiv:2011.13456, eq. 13 and
        appendix D; Albergo et al. (2023), arXiv:2303.08797, section 2.4.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core import Net
        >>> from numpyro_sbtm.core.transport.maps import Maps
        >>> from numpyro_sbtm.core.transport.noisy import noisy_transport
        >>> from numpyro_sbtm.core.transition import standard_normal
        >>> still = Net(lambda key, d: (), lambda params, x: 0.0 * x)
        >>> zeros, eye = jnp.zeros((1, 2)), jnp.eye(2)[None]
        >>> maps = Maps((), zeros, eye, eye, zeros, 0.0 * eye, jnp.array([0.5]))
        >>> process = noisy_transport(still, 1, standard_normal(2))
        >>> process.forward((maps, jnp.array(1.0)), jnp.array(0), jnp.ones(2), -jnp.ones(2)).mean.tolist()
        [0.5, 0.5]
    """

    def kernel(
        params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"], sign: float
    ) -> Pinned:
        maps, noise = params
        one = jax.tree.map(lambda leaf: leaf[k], maps)
        std = jnp.sqrt(2.0 * noise * one.step_size)
        # on a cliff of the target its score must not throw a point further than noise would
        pull_in = one.step_size * noise * score
        longest = std * np.sqrt(x.size)
        pull_in = pull_in * jnp.minimum(1.0, longest / jnp.maximum(jnp.linalg.norm(pull_in), 1e-30))
        drift = (sign - noise) * velocity(net, one, x)
        return Pinned(x + pull_in + one.step_size * drift, jnp.full_like(x, std))

    return Process(
        num_maps,
        lambda params: base,
        lambda params, k, x, score: kernel(params, k, x, score, 1.0),
        lambda params, k, x, score: kernel(params, k, x, score, -1.0),
        lambda k, x: base.log_prob(x),
        np.arange(num_maps + 1) / num_maps,
    )
