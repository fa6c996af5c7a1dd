# SPDX-License-Identifier: Apache-2.0
"""Processes whose drift a network controls: PIS, DDS, DIS as published, bridges and CMCD.

The notation is that of `numpyro_sbtm.core.process`: ``x_0`` is noise, ``x_T`` a draw, and both chains have
normal transitions with exact densities, so that weights are exact at any number of steps. The network sees a
time, the point in units of the scale, and the target's score relative to that of the reference N(0, σ² I),

    s̃(x) = clip(σ (∇log ρ(x) + x / σ²), ±c),

and its outputs ``(m, r, gate, l)`` make the control u = m + gate s̃; l is not used here. All are zero at the
start, and all processes but DIS by Euler-Maruyama then sample N(0, σ² I) with equal weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.process import Chain, Net, Process, at, check_num_steps, log_snr_grid
from numpyro_sbtm.core.target import Key, Params
from numpyro_sbtm.core.transition import Gaussian, Transition, standard_normal

__all__ = [
    "Pinned",
    "bridge",
    "cmcd",
    "cosine_grid",
    "dds",
    "dis_control",
    "learned_reference",
    "located",
    "pair",
    "pis",
    "rescaled",
    "vp_grid",
]

_MAX_LOG_SNR = 12.0


class Pinned(NamedTuple):
    """A normal distribution whose coordinates of standard deviation zero are points, with density one.

    Attributes:
        mean: shape ``[d]``.
        std: zero or more, shape ``[d]``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.controlled import Pinned
        >>> point = Pinned(jnp.ones(2), jnp.zeros(2))
        >>> point.sample(jax.random.key(0)).tolist(), float(abs(point.log_prob(jnp.ones(2))))
        ([1.0, 1.0], 0.0)
    """

    mean: Float[Array, " d"]
    std: Float[Array, " d"]

    def widened(self, factor: Float[Array, ""]) -> "Pinned":
        """Multiply the standard deviations."""
        return self._replace(std=factor * self.std)

    def sample(self, key: Key) -> Float[Array, " d"]:
        """Draw one point."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, y: Float[Array, " d"]) -> Float[Array, ""]:
        """Evaluate the log density of the coordinates that are not points."""
        free = self.std > 0
        std = jnp.where(free, self.std, 1.0)
        z = (y - self.mean) / std
        return -jnp.sum(jnp.where(free, 0.5 * z * z + jnp.log(std) + 0.5 * jnp.log(2 * jnp.pi), 0.0))


def cosine_grid(num_steps: int, total: float = 6.4) -> np.ndarray:
    """Compute the shares A_0 < ... < A_T = 1 of the DDS grid: large steps first, near the noise.

    ``-log A_k`` is the sum of the increments from k on; they are proportional to cos⁴ and sum to ``total``.

    Args:
        num_steps: the number of steps, T >= 1.
        total: ``-log A_0``.

    Returns:
        A, shape ``[T+1]``, in float64.

    Reference:
        Vargas et al. (2023), Denoising diffusion samplers, arXiv:2302.13834, appendix.

    Examples:
        >>> from numpyro_sbtm.core.controlled import cosine_grid
        >>> cosine_grid(3, 2.0).round(3).tolist()
        [0.135, 0.675, 1.0, 1.0]
    """
    check_num_steps(num_steps)
    phase = (np.linspace(0.0, 1.0, num_steps) + 0.008) / 1.008
    steps = np.cos(0.5 * np.pi * phase) ** 4 + 1e-4  # the last one must not vanish
    left = np.cumsum((steps * total / steps.sum())[::-1])[::-1]
    return np.append(np.exp(-left), 1.0)


def vp_grid(num_steps: int, first: float = 10.0, last: float = 0.1, duration: float = 1.0) -> np.ndarray:
    """Compute the shares of the variance-preserving diffusion on a uniform grid.

    β falls linearly from ``first`` at the noise to ``last`` at the draw; ``A_k = exp(-∫ β)`` over the rest.

    Args:
        num_steps: the number of steps, T >= 1.
        first: β at time 0.
        last: β at the end.
        duration: total time.

    Returns:
        A, shape ``[T+1]``, in float64.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, appendix A.9.

    Examples:
        >>> from numpyro_sbtm.core.controlled import vp_grid
        >>> vp_grid(2).round(4).tolist()
        [0.0064, 0.276, 1.0]
    """
    check_num_steps(num_steps)
    left = duration * (1.0 - np.arange(num_steps + 1) / num_steps)
    return np.exp(-(last * left + 0.5 * (first - last) * left**2 / duration))


def pair(net: Net) -> Net:
    """Make two networks of one: the parameters are a pair, and ``apply`` is for each of them.

    Examples:
        >>> import jax
        >>> from numpyro_sbtm.core.controlled import pair
        >>> from numpyro_sbtm.networks import denoiser
        >>> len(pair(denoiser(8)).init(jax.random.key(0), 2))
        2
    """

    def init(key: Key, dim: int) -> Params:
        return tuple(net.init(k, dim) for k in jax.random.split(key))

    return Net(init, net.apply)


def located(net: Net) -> Net:
    """Add a place and a log scale, shape ``[d]`` each, to the parameters of a network.

    Examples:
        >>> import jax
        >>> from numpyro_sbtm.core.controlled import located
        >>> from numpyro_sbtm.networks import denoiser
        >>> len(located(denoiser(8)).init(jax.random.key(0), 2))
        3
    """
    return Net(lambda key, dim: (net.init(key, dim), jnp.zeros(dim), jnp.zeros(dim)), net.apply)


def _log_snr(share: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.clip(np.log(share) - np.log1p(-share), -_MAX_LOG_SNR, _MAX_LOG_SNR)


class _Control(NamedTuple):
    """A network as the control of a drift."""

    net: Net
    log_snr: np.ndarray
    scale: float
    clip: float

    def feature(self, x: Float[Array, " d"], score: Float[Array, " d"]) -> Float[Array, " d"]:
        return jnp.clip(self.scale * score + x / self.scale, -self.clip, self.clip)

    def __call__(
        self, params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
    ) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """Compute the control and the log variance."""
        feature = self.feature(x, score)
        mean, log_var, gate, _ = self.net.apply(params, at(self.log_snr, k, x), x / self.scale, feature)
        return mean + gate * feature, log_var


def _check(num_steps: int, scale: float) -> None:
    check_num_steps(num_steps)
    if not scale > 0:
        raise ValueError(f"`scale` must be positive, got {scale}.")


def pis(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
    denoise: bool = True,
) -> Process:
    """Make a path integral sampler (PIS): a Brownian motion from the origin, with exact bridge kernels.

    With τ_k = k / T and Δ = 1 / T, uncontrolled paths end in the reference N(0, σ² I). The backward chain is
    the Brownian bridge to the origin, B_k = N((τ_k / τ_{k+1}) x_{k+1}, σ² Δ τ_k / τ_{k+1}). The forward is

        F_k = N(x + σ Δ u, σ² Δ)                                             (the papers' control), or
        F_k = N(x + w (D - x), σ² Δ (1-τ_{k+1}) / (1-τ_k) + w² σ² (1-τ_k) exp(r)),    w = Δ / (1-τ_k),

    the bridge to an end point that the network predicts, with mean D = x + σ √(1-τ_k) u.

    Args:
        net: as in `dis`, with one component.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the reference.
        score_clip: bound c on each coordinate of the score feature.
        denoise: predict the end point, with its variance; False for the papers' control.

    Returns:
        The process.

    Raises:
        ValueError: for values out of range.

    Reference:
        Zhang & Chen (2022), Path integral sampler, arXiv:2111.15141; Richter & Berner (2024),
        arXiv:2307.01198, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Target, simulate
        >>> from numpyro_sbtm.core.controlled import pis
        >>> from numpyro_sbtm.networks import denoiser
        >>> net = denoiser(8)
        >>> target = Target(lambda x: -0.5 * jnp.sum(x**2), 2)
        >>> params = net.init(jax.random.key(0), 2)
        >>> path = simulate(pis(net, 2, num_steps=4), params, target, jax.random.key(0))
        >>> round(float(path.log_weight), 3)  # log(2 pi), on every path
        1.838
    """
    _check(num_steps, scale)
    time = np.arange(num_steps + 1) / num_steps
    step = 1.0 / num_steps
    left = 1.0 - time[:-1]
    control = _Control(net, _log_snr(time), scale, score_clip)

    def forward(
        params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        u, log_var = control(params, k, x, score)
        if not denoise:
            return Gaussian(x + scale * step * u, jnp.full_like(x, scale * step**0.5))
        weight = at(step / left, k, x)
        bridge_var = at(step * (left - step) / left, k, x)
        end_var = weight**2 * at(left, k, x) * jnp.exp(log_var)
        mean = x + weight * scale * jnp.sqrt(at(left, k, x)) * u
        return Gaussian(mean, scale * jnp.sqrt(jnp.maximum(bridge_var, 0.0) + end_var))

    def backward(
        params: Params, k: Int[Array, ""], x_next: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Pinned:
        del params, score
        ratio = at(time[:-1] / time[1:], k, x_next)
        return Pinned(ratio * x_next, jnp.full_like(x_next, scale * step**0.5) * jnp.sqrt(ratio))

    def marginal(k: Int[Array, ""], x: Float[Array, " d"]) -> Float[Array, ""]:
        return Pinned(jnp.zeros_like(x), jnp.full_like(x, scale) * jnp.sqrt(at(time, k, x))).log_prob(x)

    origin = Pinned(jnp.zeros(dim), jnp.zeros(dim))
    return Process(num_steps, lambda params: origin, forward, backward, marginal, time)


def _noising(
    net: Net,
    dim: int,
    share: np.ndarray,
    scale: float,
    score_clip: float,
    *,
    learn_variance: bool = False,
    learn_backward: bool = False,
    late_score: bool = False,
    euler: bool = False,
) -> Process:
    """Make a controlled Ornstein-Uhlenbeck process on a grid of shares."""
    num_steps = len(share) - 1
    _check(num_steps, scale)
    alpha = 1.0 - share[:-1] / share[1:]
    half = -0.5 * np.log1p(-alpha)  # ½ ∫ β over a step
    keep, noise, pull, back = np.sqrt(1.0 - alpha), alpha, alpha, np.sqrt(1.0 - alpha)
    noise_back = alpha
    if euler:
        keep, noise, pull = 1.0 - half, 2.0 * half, 2.0 * half
        back, noise_back = 1.0 / (1.0 + half), 2.0 * half / (1.0 + half) ** 2
    control = _Control(net, _log_snr(share), scale, score_clip)
    late = np.arange(num_steps + 1) / num_steps if late_score else np.ones(num_steps + 1)

    def forward(
        params: Params, k: Int[Array, ""], x: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        mine = params[0] if learn_backward else params
        informed = at(late, k, x) * (score + x / scale**2) - x / scale**2
        u, log_var = control(mine, k, x, informed)
        std = jnp.full_like(x, scale) * jnp.sqrt(at(noise, k, x))
        std = std * jnp.exp(0.5 * log_var) if learn_variance else std
        return Gaussian(at(keep, k, x) * x + scale * at(pull, k, x) * u, std)

    def backward(
        params: Params, k: Int[Array, ""], x_next: Float[Array, " d"], score: Float[Array, " d"]
    ) -> Gaussian:
        std = jnp.full_like(x_next, scale) * jnp.sqrt(at(noise_back, k, x_next))
        mean = at(back, k, x_next) * x_next
        if learn_backward:
            u, _ = control(params[1], k + 1, x_next, score)
            mean = mean + scale * at(pull, k, x_next) * u
        return Gaussian(mean, std)

    prior = standard_normal(dim, scale)
    return Process(
        num_steps,
        lambda params: prior,
        forward,
        backward,
        lambda k, x: prior.log_prob(x),
        share,
    )


def dds(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
    learn_variance: bool = True,
) -> Process:
    """Make a denoising diffusion sampler (DDS): exponential integrator, cosine⁴ grid.

        F_k = N(√(1-α_k) x + σ α_k u, σ² α_k exp(r)),      B_k = N(√(1-α_k) x_{k+1}, σ² α_k).

    Args:
        net: as in `dis`, with one component.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the reference.
        score_clip: bound c on each coordinate of the score feature.
        learn_variance: learn r; False for the paper's fixed variance.

    Returns:
        The process.

    Reference:
        Vargas, Grathwohl & Doucet (2023), Denoising diffusion samplers, arXiv:2302.13834, section 3.

    Examples:
        >>> from numpyro_sbtm.core.controlled import dds
        >>> from numpyro_sbtm.networks import denoiser
        >>> dds(denoiser(8), 2, num_steps=4).num_steps
        4
    """
    share = cosine_grid(num_steps)
    return _noising(net, dim, share, scale, score_clip, learn_variance=learn_variance)


def dis_control(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
    integrator: str = "exact",
) -> Process:
    """Make DIS as published: the control of a variance-preserving diffusion, for comparison with `dis`.

    The score enters interpolated from the prior's to the target's. With h = ½ ∫ β over a step the kernels are
    exact, as in `dds` on another grid, or by Euler-Maruyama,

        F_k = N((1-h) x + 2h σ u, 2h σ²),      B_k = N(x_{k+1} / (1+h), 2h σ² / (1+h)²);

    B_k is the normalised kernel for which the published weights are right but for a constant.

    Args:
        net: as in `dis`, with one component.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the reference.
        score_clip: bound c on each coordinate of the score feature.
        integrator: 'exact' or 'euler'.

    Returns:
        The process.

    Raises:
        ValueError: for another integrator.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, section 3 and appendix A.9.

    Examples:
        >>> from numpyro_sbtm.core.controlled import dis_control
        >>> from numpyro_sbtm.networks import denoiser
        >>> dis_control(denoiser(8), 2, num_steps=4, integrator="euler").num_steps
        4
    """
    if integrator not in ("exact", "euler"):
        raise ValueError(f"`integrator` must be 'exact' or 'euler', got {integrator!r}.")
    share = vp_grid(num_steps)
    return _noising(net, dim, share, scale, score_clip, late_score=True, euler=integrator == "euler")


def bridge(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
) -> Process:
    """Make the general bridge: both drifts learned, both kernels in density form.

        F_k = N(√(1-α_k) x + σ α_k u(x, k), σ² α_k),
        B_k = N(√(1-α_k) x_{k+1} + σ α_k v(x_{k+1}, k+1), σ² α_k).

    No divergence of a network is needed, since both densities are known. The solution is not unique.

    Args:
        net: `pair` of a net as in `dis`, with one component: its parameters are a pair.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the prior.
        score_clip: bound c on each coordinate of the score feature.

    Returns:
        The process.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, section 2 (the general bridge).

    Examples:
        >>> from numpyro_sbtm.core.controlled import bridge, pair
        >>> from numpyro_sbtm.networks import denoiser
        >>> bridge(pair(denoiser(8)), 2, num_steps=4).num_steps
        4
    """
    return _noising(net, dim, log_snr_grid(num_steps), scale, score_clip, learn_backward=True)


def cmcd(
    net: Net,
    dim: int,
    num_steps: int = 32,
    scale: float = 1.0,
    score_clip: float = 10.0,
    duration: float = 4.0,
) -> Process:
    """Make controlled Monte Carlo diffusion (CMCD): annealed Langevin, corrected in both directions.

    The path of densities is π_k ∝ N(0, σ² I)^(1-β_k) ρ^β_k with β_k = k / T. With a = exp(-duration / T) the
    reference's part of the drift is integrated exactly:

        F_k = N(a x + σ (1-a) (β_k s̃(x) + u(x, k)), σ² (1-a²)),
        B_k = N(a x' + σ (1-a) (β_{k+1} s̃(x') - u(x', k+1)), σ² (1-a²)),      x' = x_{k+1}.

    One network serves both: the solution is unique.

    Args:
        net: as in `dis`, with one component.
        dim: the dimension d.
        num_steps: the number of steps, T.
        scale: the standard deviation σ of the prior.
        score_clip: bound c on each coordinate of the score feature.
        duration: Langevin time, in relaxation times of the prior.

    Returns:
        The process.

    Reference:
        Vargas et al. (2024), Transport meets variational inference, arXiv:2307.01050.

    Examples:
        >>> from numpyro_sbtm.core.controlled import cmcd
        >>> from numpyro_sbtm.networks import denoiser
        >>> cmcd(denoiser(8), 2, num_steps=4).num_steps
        4
    """
    _check(num_steps, scale)
    if not duration > 0:
        raise ValueError(f"`duration` must be positive, got {duration}.")
    beta = np.arange(num_steps + 1) / num_steps
    keep = float(np.exp(-duration / num_steps))
    control = _Control(net, _log_snr(beta), scale, score_clip)

    def step(sign: float, params: Params, k, x, score) -> Gaussian:  # type: ignore[no-untyped-def]
        u, _ = control(params, k, x, score)
        drift = at(beta, k, x) * control.feature(x, score) + sign * u
        return Gaussian(
            keep * x + scale * (1.0 - keep) * drift, jnp.full_like(x, scale * (1.0 - keep**2) ** 0.5)
        )

    prior = standard_normal(dim, scale)
    return Process(
        num_steps,
        lambda params: prior,
        lambda params, k, x, score: step(1.0, params, k, x, score),
        lambda params, k, x_next, score: step(-1.0, params, k + 1, x_next, score),
        lambda k, x: prior.log_prob(x),
        beta,
    )


def rescaled(process: Process, loc: Float[Array, " d"], scale: Float[Array, " d"]) -> Process:
    """Move a process of normal transitions: if y is a path of it, ``loc + scale y`` is one of the result.

    Args:
        process: any process of this module.
        loc: shape ``[d]``.
        scale: positive, shape ``[d]``.

    Returns:
        The process.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.controlled import dds, rescaled
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
        process: any process of this module.

    Returns:
        The process; its parameters are those of `located`.

    Reference:
        Blessing et al. (2025), arXiv:2503.00524 (learned priors); Sanokowski et al. (2025),
        arXiv:2506.10982 (why the divergence must then be a KL).

    Examples:
        >>> import jax
        >>> from numpyro_sbtm.core.controlled import dds, learned_reference, located
        >>> from numpyro_sbtm.networks import denoiser
        >>> net = located(denoiser(8))
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
