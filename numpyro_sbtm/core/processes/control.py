# SPDX-License-Identifier: Apache-2.0
"""What controlled processes have in common: PIS, DDS, DIS as published, bridges and CMCD.

The notation is that of `numpyro_sbtm.core.processes.base`: ``x_0`` is noise, ``x_T`` a draw, and both chains
have normal transitions with exact densities, so that weights are exact at any number of steps. The network
sees a time, the point in units of the scale, and the target's score relative to that of the reference
N(0, σ² I),

    s̃(x) = clip(σ (∇log ρ(x) + x / σ²), ±c),

and its outputs ``(m, r, gate, l)`` make the control u = m + gate s̃; l is not used here. All are zero at the
start, and all processes but DIS by Euler-Maruyama then sample N(0, σ² I) with equal weights.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.processes.base import at
from numpyro_sbtm.core.target import Params
from numpyro_sbtm.core.transition import Gaussian

__all__ = ["Control", "Steps", "euler_steps", "exact_steps", "make_control"]


_MAX_LOG_SNR = 12.0


class Control(NamedTuple):
    """A network as the control of a drift.

    Attributes:
        net: the network, as in `numpyro_sbtm.core.processes.dis.dis`, with one component.
        log_snr: what it sees of the time, shape ``[T+1]``.
        scale: σ.
        clip: the bound c.
    """

    net: Net
    log_snr: np.ndarray
    scale: float
    clip: float

    def feature(self, x: Float[Array, " d"], score: Float[Array, " d"]) -> Float[Array, " d"]:
        """Compute s̃(x)."""
        return jnp.clip(self.scale * score + x / self.scale, -self.clip, self.clip)

    def __call__(
        self, params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
    ) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """Compute the control and the log variance."""
        feature = self.feature(x, score)
        mean, log_var, gate, _ = self.net.apply(params, at(self.log_snr, k, x), x / self.scale, feature)
        return mean + gate * feature, log_var


def make_control(net: Net, signal: np.ndarray, scale: float, score_clip: float) -> Control:
    """Make the control on a grid of signal levels.

    Raises:
        ValueError: for a scale that is not positive.
    """
    if not scale > 0:
        raise ValueError(f"`scale` must be positive, got {scale}.")
    with np.errstate(divide="ignore"):
        log_snr = np.clip(np.log(signal) - np.log1p(-signal), -_MAX_LOG_SNR, _MAX_LOG_SNR)
    return Control(net, log_snr, scale, score_clip)


class Steps(NamedTuple):
    """Steps of an Ornstein-Uhlenbeck process with a control u, by tables of shape ``[T]``.

        F_k = N(keep x + σ pull u, σ² noise),      B_k = N(keep_back x' + σ pull v, σ² noise_back).

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.core.processes.control import exact_steps
        >>> exact_steps(np.array([0.25, 1.0])).keep.tolist()
        [0.5]
    """

    keep: np.ndarray
    pull: np.ndarray
    noise: np.ndarray
    keep_back: np.ndarray
    noise_back: np.ndarray

    def forward(
        self, scale: float, k: Int[Array, ""], x: Float[Array, " d"], u: Float[Array, " d"]
    ) -> Gaussian:
        """Make F_k."""
        std = jnp.full_like(x, scale) * jnp.sqrt(at(self.noise, k, x))
        return Gaussian(at(self.keep, k, x) * x + scale * at(self.pull, k, x) * u, std)

    def backward(
        self,
        scale: float,
        k: Int[Array, ""],
        x_next: Float[Array, " d"],
        v: Float[Array, " d"] | None = None,
    ) -> Gaussian:
        """Make B_k; without a control for None."""
        std = jnp.full_like(x_next, scale) * jnp.sqrt(at(self.noise_back, k, x_next))
        mean = at(self.keep_back, k, x_next) * x_next
        return Gaussian(mean if v is None else mean + scale * at(self.pull, k, x_next) * v, std)


def exact_steps(signal: np.ndarray) -> Steps:
    """Integrate exactly what is linear, as an exponential integrator does: pull and noise are both α_k."""
    alpha = 1.0 - signal[:-1] / signal[1:]
    keep = np.sqrt(1.0 - alpha)
    return Steps(keep, alpha, alpha, keep, alpha)


def euler_steps(signal: np.ndarray) -> Steps:
    """Make Euler-Maruyama's steps, with h = ½ ∫ β over a step, and the backward ones of the papers' weights.

    F_k = N((1-h) x + 2h σ u, 2h σ²),      B_k = N(x_{k+1} / (1+h), 2h σ² / (1+h)²).
    """
    half = -0.5 * np.log(signal[:-1] / signal[1:])
    return Steps(1.0 - half, 2.0 * half, 2.0 * half, 1.0 / (1.0 + half), 2.0 * half / (1.0 + half) ** 2)
