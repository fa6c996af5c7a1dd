# SPDX-License-Identifier: Apache-2.0
"""Networks as flax modules, of which `numpyro_sbtm.networks` makes pure functions."""

import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

__all__ = ["Denoiser", "Potential", "ScoreMLP", "UNet"]


def _waves(log_snr: Float[Array, ""], width: int) -> Float[Array, " w"]:
    """Embed a log signal-to-noise ratio by sines and cosines."""
    angles = log_snr * jnp.geomspace(0.1, 3.0, width // 2, dtype=log_snr.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class Denoiser(nnx.Module):
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


class Potential(nnx.Module):
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


class ScoreMLP(nnx.Module):
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


class UNet(nnx.Module):
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
