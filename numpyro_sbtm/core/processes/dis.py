# SPDX-License-Identifier: Apache-2.0
"""The time-reversed diffusion sampler."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.mixture import Mixture, moments, normal
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.processes.base import Process, at
from numpyro_sbtm.core.processes.grids import log_snr_grid
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Gaussian

__all__ = ["dis"]


Table = np.ndarray | Float[Array, "..."]


class _Grid(NamedTuple):
    """What the equations of `dis` take from the grid, step by step."""

    signal: Table
    noise: Table
    root_signal: Table
    keep: Table
    denoiser_weight: Table
    point_weight: Table
    bridge_var: Table
    noise_std: Table
    log_snr: Table


def _grid(signal: Table, noise: Table, alpha: Table, scale: float) -> _Grid:
    """Compute the tables from A_k, and from 1-A_k and α_k, which must not be rounded."""
    xp = np if isinstance(signal, np.ndarray) else jnp
    keep = xp.sqrt(1.0 - alpha)
    return _Grid(
        signal=signal,
        noise=noise,
        root_signal=xp.sqrt(signal),
        keep=keep,
        denoiser_weight=xp.sqrt(signal[1:]) * alpha / noise[:-1],
        point_weight=keep * noise[1:] / noise[:-1],
        bridge_var=scale**2 * alpha * noise[1:] / noise[:-1],
        noise_std=scale * xp.sqrt(alpha),
        log_snr=xp.log(signal[:-1]) - xp.log(noise[:-1]),
    )


def _noised(reference: Mixture, root: Float[Array, ""], noise_var: Float[Array, ""]) -> Mixture:
    """Make the law of root x_T plus white noise, for x_T from the reference."""
    std = jnp.sqrt(root**2 * reference.std**2 + noise_var)
    return reference._replace(centre=root * reference.centre, std=std)


@dataclass(frozen=True, eq=False)
class _Reversal:
    """The chains of `dis` on one grid."""

    net: Net
    reference: Mixture
    scale: float
    score_clip: float
    look_ahead: bool
    grid: _Grid

    def law(self, k: Int[Array, ""], x: Float[Array, " d"]) -> Mixture:
        """Make the law of x_k, for x_T from the reference."""
        grid = self.grid
        return _noised(self.reference, at(grid.root_signal, k, x), self.scale**2 * at(grid.noise, k, x))

    def informed(
        self, k: Int[Array, ""], place: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Float[Array, " d"]:
        """Compute the feature of a score, for x_k."""
        grid, clip = self.grid, self.score_clip
        unit = at(grid.root_signal, k, place) * self.scale * jnp.sqrt(at(grid.noise, k, place))
        return jnp.clip(unit * (score - self.reference.score(place)), -clip, clip)

    def end(
        self, k: Int[Array, ""], x: Float[Array, " d"], shift: Float[Array, " d"]
    ) -> tuple[Float[Array, "K d"], Float[Array, "K d"]]:
        """Compute mean, with a shift, and deviations of x_T given x_k, in each component's coordinates."""
        grid, reference, law = self.grid, self.reference, self.law(k, x)
        gain = at(grid.root_signal, k, x) * reference.std**2 / law.std**2
        std = reference.std / law.std * self.scale * jnp.sqrt(at(grid.noise, k, x))
        mean = reference.centre + gain * (reference.rotate(x) - law.centre)
        return mean + std * reference.rotate(shift), std

    def look(self, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]) -> Float[Array, " d"]:
        """Guess where the path ends."""
        likeliest = jnp.argmax(self.law(k, x).joint(x))
        guess = self.end(k, x, self.informed(k, x, score))[0][likeliest]
        rotation = self.reference.rotation
        return guess if rotation is None else rotation[likeliest] @ guess

    def features(
        self, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, "*s d"]
    ) -> Float[Array, "*s d"]:
        """Compute what the network sees of the scores."""
        if not self.look_ahead:
            return self.informed(k, x, score)
        first = self.informed(k, x, score[0])
        second = self.informed(k, self.look(k, x, score[0]), score[1])
        # the guess is not on the path: that there is no score there must not end it
        return jnp.stack([first, jnp.where(jnp.all(jnp.isfinite(second)), second, first)])

    def forward(
        self, params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, "*s d"]
    ) -> Mixture:
        """Make F_k."""
        grid, reference = self.grid, self.reference
        centre, spread = moments(reference)
        root, noise_var = at(grid.root_signal, k, x), self.scale**2 * at(grid.noise, k, x)
        feature = self.features(k, x, score)
        # modes may lie a hundred deviations apart: the network sees all of them within a few units
        seen = (x - root * centre) / jnp.sqrt(root**2 * spread**2 + noise_var)
        mean, log_var, gate, logits = self.net.apply(params, at(grid.log_snr, k, x), seen, feature)
        denoised, std = self.end(k, x, mean + jnp.tensordot(gate, feature, gate.ndim))
        var = std**2 * jnp.exp(log_var)
        weight = at(grid.denoiser_weight, k, x)
        return Mixture(
            jax.nn.log_softmax(self.law(k, x).joint(x) + logits),
            reference.rotation,
            weight * denoised + at(grid.point_weight, k, x) * reference.rotate(x),
            jnp.sqrt(at(grid.bridge_var, k, x) + weight**2 * var),
        )

    def backward(
        self, params: Params, k: Int[Array, ""], x_next: Float[Array, " d"], score: Float[Array, "*s d"]
    ) -> Gaussian:
        """Make B_k."""
        del params, score
        std = jnp.full_like(x_next, at(self.grid.noise_std, k, x_next))
        return Gaussian(at(self.grid.keep, k, x_next) * x_next, std)

    def process(self) -> Process:
        """Make the process."""
        grid = self.grid
        root, noise_var = jnp.asarray(grid.root_signal[0]), jnp.asarray(self.scale**2 * grid.noise[0])
        init = _noised(self.reference, root, noise_var)
        return Process(
            num_steps=len(grid.keep),
            init=lambda params: init,
            forward=self.forward,
            backward=self.backward,
            marginal=lambda k, x: self.law(k, x).log_prob(x),
            signal=grid.signal,
            look_ahead=self.look if self.look_ahead else None,
            # which component is the likeliest changes at once
            continuous=not self.look_ahead or len(self.reference.log_weight) == 1,
        )


def dis(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 3.0,
    reference: Mixture | None = None,
    look_ahead: bool = False,
) -> Process:
    """Make a time-reversed diffusion sampler (DIS) with exact Ornstein-Uhlenbeck kernels.

    The reference is a mixture of normal distributions Σ_c p_c N(μ_c, S_c), the best guess of the target.
    If x_T had that law, x_T given x_k would be a mixture too, with weights p_c(x_k), means m_c(x_k) and
    covariances V_c. A network corrects all three:

        F_k(x' | x) = Σ_c softmax(log p_c(x) + l_c) N(c_K D_c + c_x x,
                                                     σ² α_k (1-A_{k+1})/(1-A_k) I + c_K² V_c exp(r)),
        c_K = √A_{k+1} α_k / (1-A_k),      c_x = √(1-α_k) (1-A_{k+1}) / (1-A_k),
        D_c = m_c(x) + √V_c (m + gate s̃),
        s̃   = clip(√(A_k (1-A_k)) σ (∇log ρ(x) - ∇log reference(x)), ±score_clip).

    With network outputs l = m = r = gate = 0 this is the exact time reversal for the reference as target,
    at every number of steps: all weights are then equal. The score enters relative to the reference's, and
    the mean moves in units of what each component leaves uncertain: a narrow one is not thrown off by a
    network that has yet to learn.

    With one normal distribution as reference the exact mean has m = √V E[∇log ρ(x_T) - ∇log reference(x_T)]
    given x_k: it depends on the score where the path will end. With ``look_ahead`` there is a second feature,
    from the score at a guess of x_T, namely D_c of the likeliest component with m = 0 and gate = 1: a step of
    a fixed-point iteration. A step then costs two target gradients.

    Args:
        net: ``apply(params, log_snr, z, s̃)`` returns ``(m, r, gate, l)`` of shapes ``[d]``, ``[d]``,
            ``[]`` and ``[K]``, from the point in units of its mean and deviations under the reference, z;
            ``log_snr`` depends on the step alone. r is in the coordinates of a component's eigenvectors.
            With ``look_ahead`` s̃ has shape ``[2, d]``, and gate ``[2]``.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the noise.
        score_clip: bound on each coordinate of the score feature.
        reference: the mixture; None for N(0, σ² I).
        look_ahead: evaluate the target's score at a guess of the end point, too.

    Returns:
        The process; its weights are exact at any T.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, section 3 (DIS); Ho et al. (2020),
        arXiv:2006.11239, eq. 7 (the bridge between two noise levels).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Net, dis
        >>> still = Net(lambda key, d: (), lambda p, t, x, s: (0 * x, 0 * x, jnp.zeros(()), jnp.zeros(1)))
        >>> process = dis(still, dim=2, num_steps=4)
        >>> process.forward((), jnp.array(3), jnp.ones(2), -jnp.ones(2)).std.shape
        (1, 2)
    """
    reference = normal(dim, scale) if reference is None else reference
    signal = log_snr_grid(num_steps)
    noise = 1.0 - signal  # exact enough in float64, and only then rounded
    log_signal = np.log(signal)

    def on(grid: _Grid) -> Process:
        return _Reversal(net, reference, scale, score_clip, look_ahead, grid).process()

    def coarse(points: Int[Array, " m1"]) -> Process:
        there = jnp.asarray(log_signal)[points]
        alpha = -jnp.expm1(there[:-1] - there[1:])
        return on(_grid(jnp.asarray(signal)[points], jnp.asarray(noise)[points], alpha, scale))

    return on(_grid(signal, noise, 1.0 - signal[:-1] / signal[1:], scale))._replace(coarse=coarse)
