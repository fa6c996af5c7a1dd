# SPDX-License-Identifier: Apache-2.0
"""Networks, as pairs of pure functions on a vector of parameters. The only module that knows flax."""

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from numpyro_sbtm.core.process import Net
from numpyro_sbtm.core.quasi import quasi_normal
from numpyro_sbtm.core.target import Key, Params

__all__ = ["denoiser", "potential", "radial", "score_mlp", "unet"]


def _functional(make: Callable[[int, nnx.Rngs], nnx.Module], has_features: bool = False) -> Net:
    """Turn a flax module into pure functions of one vector of parameters.

    Its entries are in the order of the attributes' names. A module with features ends with ``out``, a linear
    layer, whose bias comes first.

    One vector, not a tree of matrices: an optimiser's update is then a handful of kernels instead of a
    handful for every matrix, which halves the time to compile a training step.
    """

    @cache
    def skeleton(dim: int) -> tuple[nnx.GraphDef[Any], nnx.State, Callable[[Params], Any]]:
        with jax.ensure_compile_time_eval():
            # the key is an argument: of a constant, weights would be computed
            shapes = nnx.eval_shape(lambda key: make(dim, nnx.Rngs(key)), jax.random.key(0))
            graph, state = nnx.split(shapes)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
            return graph, state, ravel_pytree(nnx.to_pure_dict(zeros))[1]

    def init(key: Key, dim: int) -> Params:
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        return ravel_pytree(nnx.to_pure_dict(nnx.state(make(dim, nnx.Rngs(key)), nnx.Param)))[0]

    def module(params: Params, dim: int) -> Any:
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


def _waves(log_snr: Float[Array, ""], width: int) -> Float[Array, " w"]:
    """Embed a log signal-to-noise ratio by sines and cosines."""
    angles = log_snr * jnp.geomspace(0.1, 3.0, width // 2, dtype=log_snr.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class _Denoiser(nnx.Module):
    def __init__(
        self, dim: int, width: int, depth: int, num_components: int, num_scores: int, rngs: nnx.Rngs
    ) -> None:
        dtype = jnp.result_type(float)
        zero = nnx.initializers.zeros
        self.dim, self.width, self.num_scores = dim, width, num_scores
        inputs = (1 + num_scores) * dim
        self.x = nnx.Linear(inputs, width, param_dtype=dtype, rngs=rngs)
        self.time = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)
        self.hidden = nnx.List(
            nnx.Linear(width, width, param_dtype=dtype, rngs=rngs) for _ in range(depth - 1)
        )
        self.shift = nnx.List(
            nnx.Linear(width, width, param_dtype=dtype, rngs=rngs) for _ in range(depth - 1)
        )
        size, last = 2 * dim + num_components, width
        if num_scores > 1:
            last = 2 * width
            self.linear = nnx.Linear(inputs, width, use_bias=False, param_dtype=dtype, rngs=rngs)
            self.gain = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(last, size, param_dtype=dtype, rngs=rngs, kernel_init=zero, bias_init=zero)
        self.gate = nnx.Linear(
            width, num_scores, param_dtype=dtype, rngs=rngs, kernel_init=zero, bias_init=zero
        )

    def __call__(
        self, log_snr: Float[Array, ""], x: Float[Array, " d"], score: Float[Array, "*s d"]
    ) -> tuple[Float[Array, " d"], Float[Array, " d"], Float[Array, "*s"], Float[Array, " K"]]:
        time = nnx.gelu(self.time(_waves(log_snr, self.width)))
        seen = jnp.concatenate([x, score.ravel()])
        hidden = nnx.gelu(self.x(seen) + time)
        for layer, shift in zip(self.hidden, self.shift, strict=True):
            hidden = nnx.gelu(layer(hidden) + shift(time))
        if self.num_scores > 1:
            hidden = jnp.concatenate([hidden, self.gain(time) * self.linear(seen)])
        mean, log_var, logits = jnp.split(self.out(hidden), [self.dim, 2 * self.dim])
        gate = self.gate(time).reshape(score.shape[:-1])
        return mean, 4.0 * jnp.tanh(log_var / 4.0), gate, logits


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

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.networks import denoiser
        >>> net = denoiser(width=8)
        >>> mean, log_var, gate, logits = net.apply(
        ...     net.init(jax.random.key(0), 3), jnp.array(0.5), jnp.ones(3), jnp.ones(3))
        >>> mean.tolist(), float(gate)
        ([0.0, 0.0, 0.0], 0.0)
    """
    return _functional(lambda dim, rngs: _Denoiser(dim, width, depth, num_components, num_scores, rngs))


class _Potential(nnx.Module):
    def __init__(self, dim: int, width: int, rngs: nnx.Rngs) -> None:
        dtype = jnp.result_type(float)
        zero = nnx.initializers.zeros
        self.width = width
        self.x = nnx.Linear(dim, width, param_dtype=dtype, rngs=rngs)
        self.time = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)
        self.hidden = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, 1, param_dtype=dtype, rngs=rngs, kernel_init=zero, bias_init=zero)

    def __call__(self, log_snr: Float[Array, ""], x: Float[Array, " d"]) -> Float[Array, ""]:
        hidden = nnx.gelu(self.x(x) + nnx.gelu(self.time(_waves(log_snr, self.width))))
        return self.out(nnx.gelu(self.hidden(hidden)))[0]


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
    return _functional(lambda dim, rngs: _Potential(dim, width, rngs))


class _ScoreMLP(nnx.Module):
    def __init__(self, dim: int, width: int, depth: int, rngs: nnx.Rngs) -> None:
        dtype = jnp.result_type(float)
        zero = nnx.initializers.zeros
        sizes = [dim] + depth * [width]
        self.hidden = nnx.List(nnx.Linear(a, b, param_dtype=dtype, rngs=rngs) for a, b in pairwise(sizes))
        self.out = nnx.Linear(width, dim, param_dtype=dtype, rngs=rngs, kernel_init=zero, bias_init=zero)

    def last_hidden(self, x: Float[Array, " d"]) -> Float[Array, " w"]:
        for layer in self.hidden:
            x = nnx.soft_sign(layer(x))
        return x

    def features(self, x: Float[Array, " d"]) -> Float[Array, " w1"]:
        return jnp.concatenate([jnp.ones(1, x.dtype), self.last_hidden(x)])

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.out(self.last_hidden(x))


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
    return _functional(lambda dim, rngs: _ScoreMLP(dim, width, depth, rngs), has_features=True)


class _Block(nnx.Module):
    """Two convolutions, shifted by an embedding, around which the input passes."""

    def __init__(self, inputs: int, outputs: int, embedding: int, rngs: nnx.Rngs) -> None:
        dtype = jnp.result_type(float)
        self.norms = nnx.List(
            nnx.GroupNorm(n, num_groups=min(8, n // 4), param_dtype=dtype, rngs=rngs)
            for n in (inputs, outputs)
        )
        self.convs = nnx.List(
            nnx.Conv(n, outputs, (3, 3), param_dtype=dtype, rngs=rngs) for n in (inputs, outputs)
        )
        self.shift = nnx.Linear(embedding, outputs, param_dtype=dtype, rngs=rngs)
        self.skip = nnx.Linear(inputs, outputs, use_bias=False, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "1 h w c"], embedding: Float[Array, " e"]) -> Float[Array, "1 h w c2"]:
        hidden = self.convs[0](nnx.silu(self.norms[0](x))) + self.shift(embedding)
        return self.skip(x) + self.convs[1](nnx.silu(self.norms[1](hidden)))


class _UNet(nnx.Module):
    def __init__(self, dim: int, width: int, rngs: nnx.Rngs) -> None:
        dtype, zero = jnp.result_type(float), nnx.initializers.zeros
        self.side, self.width = math.isqrt(dim), width
        if self.side**2 != dim or self.side % 4:
            raise ValueError(f"`dim` must be the square of a multiple of four, got {dim}.")
        self.embed = nnx.Linear(width, 2 * width, param_dtype=dtype, rngs=rngs)
        conv = partial(nnx.Conv, kernel_size=(3, 3), param_dtype=dtype, rngs=rngs)
        self.first, self.down = conv(4, width), conv(width, 2 * width, strides=2)
        self.before = _Block(width, width, 2 * width, rngs)
        self.middle = nnx.List(_Block(2 * width, 2 * width, 2 * width, rngs) for _ in range(2))
        self.after = _Block(3 * width, width, 2 * width, rngs)
        self.out = conv(width, 4, kernel_init=zero)

    def __call__(self, log_noise: Float[Array, ""], x: Float[Array, " d"]) -> Float[Array, " d"]:
        half = self.side // 2
        embedding = nnx.silu(self.embed(_waves(log_noise, self.width)))
        patches = x.reshape(half, 2, half, 2).transpose(0, 2, 1, 3).reshape(1, half, half, 4)
        fine = self.before(self.first(patches), embedding)
        coarse = self.down(fine)
        for block in self.middle:
            coarse = block(coarse, embedding)
        up = jax.image.resize(coarse, (*fine.shape[:3], coarse.shape[3]), "nearest")
        patches = self.out(nnx.silu(self.after(jnp.concatenate([fine, up], -1), embedding)))
        return patches.reshape(half, half, 2, 2).transpose(0, 2, 1, 3).reshape(x.shape)


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
    return _functional(lambda dim, rngs: _UNet(dim, width, rngs))


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
