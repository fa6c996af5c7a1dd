# SPDX-License-Identifier: Apache-2.0
"""Networks, as pairs of pure functions on a vector of parameters, made of flax modules."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_sbtm.checks import whole
from numpyro_sbtm.core.lazy import load
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.quasi import quasi_normal
from numpyro_sbtm.core.target import Key, Params

_MOST_UNITS, _MOST_LAYERS = 2**16, 64

__all__ = ["denoiser", "potential", "radial", "score_mlp", "unet"]


def _functional(name: str, *options: int, has_features: bool = False) -> Net:
    """Turn one of `numpyro_sbtm.modules` into pure functions of one vector of parameters.

    Its entries are in the order of the attributes' names. A module with features ends with ``out``, a linear
    layer, whose bias comes first.

    One vector, not a tree of matrices: an optimiser's update is then a handful of kernels instead of a
    handful for every matrix, which halves the time to compile a training step.
    """

    def make(dim: int, rngs: Any) -> Any:
        return getattr(load("numpyro_sbtm.modules"), name)(dim, *options, rngs)

    @cache
    def skeleton(dim: int) -> tuple[Any, Any, Callable[[Params], Any]]:
        nnx = load("flax.nnx")
        with jax.ensure_compile_time_eval():
            # the key is an argument: of a constant, weights would be computed
            shapes = nnx.eval_shape(lambda key: make(dim, nnx.Rngs(key)), jax.random.key(0))
            graph, state = nnx.split(shapes)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
            return graph, state, ravel_pytree(nnx.to_pure_dict(zeros))[1]

    def init(key: Key, dim: int) -> Params:
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        nnx = load("flax.nnx")
        return ravel_pytree(nnx.to_pure_dict(nnx.state(make(dim, nnx.Rngs(key)), nnx.Param)))[0]

    def module(params: Params, dim: int) -> Any:
        nnx = load("flax.nnx")
        graph, state, unravel = skeleton(dim)
        state = copy.deepcopy(state)
        nnx.replace_by_pure_dict(state, unravel(params))
        return nnx.merge(graph, state)

    def apply(params: Params, *inputs: Float[Array, "..."]) -> Any:
        return module(params, inputs[-1].shape[-1])(*inputs)

    def features(params: Params, *inputs: Float[Array, "..."]) -> Float[Array, " p"]:
        found: Float[Array, " p"] = module(params, inputs[-1].shape[-1]).features(*inputs)
        return found

    return Net(init, apply, features if has_features else None)


def _sizes(width: int, depth: int) -> tuple[int, int]:
    return whole("width", width, 1, _MOST_UNITS), whole("depth", depth, 1, _MOST_LAYERS)


def denoiser(width: int = 64, depth: int = 2, num_components: int = 1, num_scores: int = 1) -> Net:
    """Make the network of `dis`: corrections to the end point's mean, log variance and component.

    A multilayer perceptron of the point and the score feature, shifted in every layer by an embedding of
    the log signal-to-noise ratio. That embedding does not depend on the point, so that a batch of points
    at one time shares it. All outputs are zero at the start: the process is then its own time reversal.
    With two score features the outputs are nearly linear in them: there are linear units beside the last
    hidden layer, each with a gain that depends on the noise.

    Args:
        width: units of each hidden layer, an even number.
        depth: number of hidden layers.
        num_components: components K of the reference.
        num_scores: score features, s; the second is that of `dis` with ``look_ahead``.

    Returns:
        A net whose ``apply(params, log_snr, x, score)`` gives
        ``(mean [d], log_var [d], gate [], logits [K])``; with two features score has shape ``[2, d]`` and
        gate ``[2]``.

    Raises:
        ValueError: for sizes out of range, and an odd width.
        TypeError: for sizes that are no whole numbers.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.networks import denoiser
        >>> net = denoiser(width=8)
        >>> mean, log_var, gate, logits = net.apply(
        ...     net.init(jax.random.key(0), 3), jnp.array(0.5), jnp.ones(3), jnp.ones(3))
        >>> mean.tolist(), float(gate)
        ([0.0, 0.0, 0.0], 0.0)
    """
    width, depth = _sizes(width, depth)
    if width % 2:
        raise ValueError(f"`width` must be even, for pairs of sines and cosines of the time, got {width}.")
    return _functional("Denoiser", width, depth, num_components, num_scores)


def potential(width: int = 64) -> Net:
    """Make the network of `sub_trajectory_log_variance`: corrections to log densities on the way.

    Args:
        width: units of each of its two hidden layers, an even number.

    Returns:
        A net whose ``apply(params, log_snr, x)`` gives a number, zero at the start.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.networks import potential
        >>> net = potential(width=8)
        >>> float(net.apply(net.init(jax.random.key(0), 3), jnp.array(0.5), jnp.ones(3)))
        0.0
    """
    return _functional("Potential", width)


def score_mlp(width: int = 64, depth: int = 2) -> Net:
    """Make the network of `sbtm`: a correction to the score of a normal distribution.

    A multilayer perceptron with bounded, smooth activations (softsign), as in the paper's code: far from
    the particles its output, and so the velocity it causes, stays bounded. It is zero at the start.

    Args:
        width: units of each hidden layer.
        depth: number of hidden layers.

    Returns:
        A net whose ``apply(params, x)`` gives a vector of shape ``[d]``.

    Reference:
        Ilin, Sushko & Hu (2025), arXiv:2504.18130.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.networks import score_mlp
        >>> net = score_mlp(width=8)
        >>> net.apply(net.init(jax.random.key(0), 3), jnp.ones(3)).tolist()
        [0.0, 0.0, 0.0]
    """
    return _functional("ScoreMLP", *_sizes(width, depth), has_features=True)


def unet(width: int = 32) -> Net:
    """Make a network for square grey images: a U-Net on patches of two by two pixels, with two resolutions.

    Args:
        width: channels at the finer resolution, a multiple of four; twice as many at the coarser. On CPU its
            gradients are several times slower within a compiled loop than step by step.

    Returns:
        A net whose ``apply(params, log_noise, x)`` gives an image for an image, both flattened, shape ``[d]``
        with d the square of a multiple of four. It is zero at the start.

    Reference:
        Ronneberger, Fischer & Brox (2015), arXiv:1505.04597; with residual blocks shifted by the noise level,
        Ho et al. (2020), arXiv:2006.11239, appendix B.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.networks import unet
        >>> net = unet(8)
        >>> float(jnp.abs(net.apply(net.init(jax.random.key(0), 64), jnp.array(0.0), jnp.ones(64))).max())
        0.0
    """
    return _functional("UNet", width)


def radial(num_centres: int = 64, width: float = 0.5, spread: float = 1.3) -> Net:
    """Make gradients of radial functions for `sbtm`, linear in their parameters: no training, a solve.

        net(u) = Σ_j θ_j ∇exp(-|u - c_j|² / 2ℓ²),       c_j evenly spread as N(0, s² I).

    The field is conservative, as a score is, and zero far from the centres. It sees points in units of the
    particles' mean and covariance, so that fixed centres serve all maps. In one and a few dimensions it does
    not lag and has little noise; in many the centres lie too far apart.

    Args:
        num_centres: their number.
        width: ℓ, in deviations of the particles.
        spread: s.

    Returns:
        A net whose ``apply(params, u)`` gives a vector of shape ``[d]``.

    Reference:
        Li & Turner (2018), Gradient estimators for implicit models, arXiv:1705.07107, and Zhou, Shi & Zhu
        (2020), arXiv:2005.10099, for scores in spans of kernels.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.networks import radial
        >>> net = radial(8)
        >>> net.apply(net.init(jax.random.key(0), 3), jnp.ones(3)).tolist()
        [0.0, 0.0, 0.0]
    """

    def init(key: Key, dim: int) -> Params:
        del key, dim
        return jnp.zeros(num_centres)

    def apply(params: Params, u: Float[Array, " d"]) -> Float[Array, " d"]:
        away = u - spread * quasi_normal(num_centres, u.size).astype(u.dtype)
        bump = jnp.exp(-0.5 * jnp.sum(away**2, -1) / width**2)
        return -(params * bump) @ away / width**2

    return Net(init, apply)
