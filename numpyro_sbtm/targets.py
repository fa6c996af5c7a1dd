# SPDX-License-Identifier: Apache-2.0
"""Benchmark densities with what is known about them: one copy, for tests, benchmarks and docs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from numpyro_sbtm.core.target import Key, Modes, Target

__all__ = [
    "as_model",
    "brownian",
    "circle",
    "double_wells",
    "forty_modes",
    "funnel",
    "gaussian",
    "gaussian_mixture",
    "logistic_regression",
    "many_well",
    "nine_modes",
    "rings",
    "seeds",
    "sixteen_modes",
    "student_t_mixture",
    "unequal_pair",
]


def as_model(target: Target) -> Callable[[], None]:
    """Make a NumPyro model of a target, with one site ``x`` of shape ``[d]``.

    The prior of x, N(0, spread² I), is divided out again: the posterior is the target, and its evidence the
    target's Z. As the prior of a real model, it says where to look.

    Args:
        target: the density.

    Examples:
        >>> import jax
        >>> from numpyro.infer.util import log_density
        >>> from numpyro_sbtm.targets import as_model, funnel
        >>> x = jax.numpy.ones(10)
        >>> value, _ = log_density(as_model(funnel()), (), {}, {"x": x})
        >>> abs(float(value - funnel().logdensity_fn(x))) < 1e-4
        True
    """

    def model() -> None:
        prior = dist.Normal(0.0, target.spread).expand([target.dim]).to_event(1)
        x = numpyro.sample("x", prior)
        numpyro.factor("target", target.logdensity_fn(x) - prior.log_prob(x))

    return model


def gaussian(mean: Float[np.ndarray, " d"], covariance: Float[np.ndarray, "d d"]) -> Target:
    """Make the normalised density N(mean, covariance): log Z = 0.

    Args:
        mean: shape ``[d]``.
        covariance: symmetric and positive definite, shape ``[d, d]``.

    Examples:
        >>> import jax, numpy as np
        >>> from numpyro_sbtm.targets import gaussian
        >>> gaussian(np.zeros(2), np.eye(2)).sample(jax.random.key(0), 5).shape
        (5, 2)
    """
    tril = np.linalg.cholesky(covariance)
    return gaussian_mixture(np.ones(1), mean[None], tril[None])


def gaussian_mixture(
    weights: Float[np.ndarray, " k"],
    means: Float[np.ndarray, "k d"],
    scale_trils: Float[np.ndarray, "k d d"],
) -> Target:
    """Make a normalised mixture of normal densities: log Z = 0.

    Args:
        weights: positive; they need not sum to one, shape ``[k]``.
        means: shape ``[k, d]``.
        scale_trils: Cholesky factors of the covariances, shape ``[k, d, d]``.

    Returns:
        The target, with an exact sampler.

    Examples:
        >>> import jax.numpy as jnp, numpy as np
        >>> from numpyro_sbtm.targets import gaussian_mixture
        >>> two = gaussian_mixture(np.ones(2), np.array([[-2.0], [2.0]]), np.ones((2, 1, 1)))
        >>> round(float(two.logdensity_fn(jnp.zeros(1))), 4)  # log N(2; 0, 1)
        -2.9189
    """
    dim = means.shape[1]
    log_weights = np.log(weights / np.sum(weights))
    inverses = np.linalg.inv(scale_trils)
    log_norms = -np.log(np.abs(np.linalg.det(scale_trils))) - 0.5 * dim * np.log(2 * np.pi)

    def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
        z = jnp.einsum("kij,kj->ki", jnp.asarray(inverses, x.dtype), x - jnp.asarray(means, x.dtype))
        constants = jnp.asarray(log_weights + log_norms, x.dtype)
        return logsumexp(constants - 0.5 * jnp.sum(z * z, -1))

    def sample(key: Key, n: int) -> Float[Array, "n d"]:
        key_mode, key_noise = jax.random.split(key)
        mode = jax.random.categorical(key_mode, jnp.asarray(log_weights), shape=(n,))
        noise = jax.random.normal(key_noise, (n, dim))
        return jnp.asarray(means)[mode] + jnp.einsum("nij,nj->ni", jnp.asarray(scale_trils)[mode], noise)

    return Target(logdensity, dim, 0.0, sample)


def _round_mixture(
    means: Float[np.ndarray, "k d"], std: float, weights: Float[np.ndarray, " k"] | None = None
) -> Target:
    """Make a mixture of equally wide, round normal distributions, with its modes."""
    count, dim = means.shape
    scale_trils = np.broadcast_to(std * np.eye(dim), (count, dim, dim))
    masses = np.full(count, 1 / count) if weights is None else weights

    def membership(x: Float[Array, " d"]) -> Float[Array, " k"]:
        squares = jnp.sum((x - jnp.asarray(means, x.dtype)) ** 2, -1)
        return jax.nn.softmax(jnp.asarray(np.log(masses), x.dtype) - 0.5 * squares / std**2)

    return gaussian_mixture(masses, means, scale_trils)._replace(
        modes=Modes(membership, masses),
        spread=float(np.sqrt(np.mean(means**2) + std**2)),
    )


def nine_modes() -> Target:
    """Make the mixture of nine normal densities with means on {-5, 0, 5}² and variance 0.3; log Z = 0.

    Reference:
        GMM in Richter & Berner (2024), arXiv:2307.01198, section 4.

    Examples:
        >>> from numpyro_sbtm.targets import nine_modes
        >>> nine_modes().modes.masses.shape
        (9,)
    """
    axis = np.array([-5.0, 0.0, 5.0])
    return _round_mixture(np.stack(np.meshgrid(axis, axis), -1).reshape(9, 2), np.sqrt(0.3))


def forty_modes(dim: int = 2) -> Target:
    """Make a mixture of forty standard normal densities with means from U[-40, 40]^d; log Z = 0.

    The means are fixed, and not those of other authors.

    Args:
        dim: the dimension d.

    Reference:
        The kind is that of Midgley et al. (2023), arXiv:2208.01893, section 4.1.

    Examples:
        >>> from numpyro_sbtm.targets import forty_modes
        >>> forty_modes().modes.masses.shape
        (40,)
    """
    return _round_mixture(np.random.default_rng(40).uniform(-40.0, 40.0, (40, dim)), 1.0)


def unequal_pair(distance: float = 4.0) -> Target:
    """Make the mixture .25 N(-a, 1) + .75 N(a, 1) on the line; log Z = 0.

    Args:
        distance: a.

    Reference:
        Mixtures of section 4 in Ilin, Sushko & Hu (2025), arXiv:2504.18130: near for a = 2, far for a = 4.

    Examples:
        >>> from numpyro_sbtm.targets import unequal_pair
        >>> unequal_pair().modes.masses.tolist()
        [0.25, 0.75]
    """
    return _round_mixture(np.array([[-distance], [distance]]), 1.0, np.array([0.25, 0.75]))


def sixteen_modes(spacing: float = 4.0) -> Target:
    """Make the mixture of sixteen standard normal densities on a grid around the origin; log Z = 0.

    Args:
        spacing: distance between neighbouring means.

    Reference:
        Ilin, Sushko & Hu (2025), arXiv:2504.18130, section 4, for spacings 4 and 10.

    Examples:
        >>> from numpyro_sbtm.targets import sixteen_modes
        >>> sixteen_modes(10.0).modes.masses.shape
        (16,)
    """
    axis = spacing * np.array([-1.5, -0.5, 0.5, 1.5])
    return _round_mixture(np.stack(np.meshgrid(axis, axis), -1).reshape(16, 2), 1.0)


def circle() -> Target:
    """Make a circle of radius 1 around (4, 0): ``-(|x - c| - 1)² / (2 · 0.2)``.

    Reference:
        Ilin, Sushko & Hu (2025), arXiv:2504.18130, section 4.

    Examples:
        >>> from numpyro_sbtm.targets import circle
        >>> round(circle().log_z, 4)
        1.9541
    """
    centre = np.array([4.0, 0.0])
    radius = _Tabulated(lambda r: np.log(np.maximum(r, 1e-300)) - (r - 1.0) ** 2 / 0.4, 0.0, 5.0)

    def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
        r = jnp.sqrt(jnp.sum((x - jnp.asarray(centre, x.dtype)) ** 2) + 1e-12)
        return -((r - 1.0) ** 2) / 0.4

    def sample(key: Key, n: int) -> Float[Array, "n d"]:
        key_radius, key_angle = jax.random.split(key)
        angle = jax.random.uniform(key_angle, (n,), maxval=2 * jnp.pi)
        around = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        return jnp.asarray(centre) + radius.sample(key_radius, (n, 1)) * around

    return Target(logdensity, 2, radius.log_mass + float(np.log(2 * np.pi)), sample, None, 5.0)


def student_t_mixture(dim: int = 2, num_modes: int = 10, df: float = 2.0) -> Target:
    """Make a mixture of equally likely round Student-t densities with means from U[-10, 10]^d; log Z = 0.

    Args:
        dim: the dimension d.
        num_modes: the number of components.
        df: degrees of freedom.

    Reference:
        The kind is that of Blessing et al. (2024), arXiv:2406.07423, section 5 (MoS).

    Examples:
        >>> import jax
        >>> from numpyro_sbtm.targets import student_t_mixture
        >>> student_t_mixture().sample(jax.random.key(0), 3).shape
        (3, 2)
    """
    means = np.random.default_rng(10).uniform(-10.0, 10.0, (num_modes, dim))

    def components(x: Float[Array, " d"]) -> Float[Array, " k"]:
        eye = jnp.eye(dim, dtype=x.dtype)
        return dist.MultivariateStudentT(df, jnp.asarray(means, x.dtype), eye).log_prob(x)

    def sample(key: Key, n: int) -> Float[Array, "n d"]:
        key_mode, key_noise = jax.random.split(key)
        mode = jax.random.randint(key_mode, (n,), 0, num_modes)
        noise = dist.MultivariateStudentT(df, jnp.zeros(dim), jnp.eye(dim)).sample(key_noise, (n,))
        return jnp.asarray(means)[mode] + noise

    return Target(
        lambda x: logsumexp(components(x)) - jnp.log(num_modes),
        dim,
        0.0,
        sample,
        Modes(lambda x: jax.nn.softmax(components(x)), np.full(num_modes, 1 / num_modes)),
        float(np.sqrt(np.mean(means**2) + 1.0)),
    )


def funnel(dim: int = 10, sd: float = 3.0) -> Target:
    """Make Neal's funnel: x_1 ~ N(0, sd²), the others N(0, exp(x_1)) given x_1; log Z = 0.

    Args:
        dim: the dimension d.
        sd: standard deviation of x_1.

    Reference:
        Neal (2003), Slice sampling, section 8.

    Examples:
        >>> import jax
        >>> from numpyro_sbtm.targets import funnel
        >>> funnel().sample(jax.random.key(0), 3).shape
        (3, 10)
    """

    def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
        rest = dist.Normal(0.0, jnp.exp(0.5 * x[0])).log_prob(x[1:])
        return dist.Normal(0.0, sd).log_prob(x[0]) + jnp.sum(rest)

    def sample(key: Key, n: int) -> Float[Array, "n d"]:
        noise = jax.random.normal(key, (n, dim))
        first = sd * noise[:, :1]
        return jnp.concatenate([first, jnp.exp(0.5 * first) * noise[:, 1:]], -1)

    return Target(logdensity, dim, 0.0, sample, spread=sd)


class _Tabulated:
    """A density on an interval, given by its log up to a constant: mass and draws by quadrature."""

    def __init__(self, log_f: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> None:
        self.points = np.linspace(low, high, 200_001)
        values = log_f(self.points)
        peak = np.max(values)
        f = np.exp(values - peak)
        step = self.points[1] - self.points[0]
        self.cdf = np.concatenate([np.zeros(1), np.cumsum(0.5 * step * (f[1:] + f[:-1]))])
        self.log_mass = float(np.log(self.cdf[-1]) + peak)
        self.cdf /= self.cdf[-1]

    def below(self, x: float) -> float:
        return float(np.interp(x, self.points, self.cdf))

    def sample(self, key: Key, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return jnp.interp(jax.random.uniform(key, shape), jnp.asarray(self.cdf), jnp.asarray(self.points))


def double_wells(dim: int = 5, num_wells: int = 5, separation: float = 4.0, shift: float = 0.0) -> Target:
    """Make a product of double wells and standard normal densities, with 2^m equally likely modes.

    The log density is ``-Σ_{i≤m} ((x_i - shift)² - δ)² - Σ_{i>m} x_i² / 2``.

    Args:
        dim: the dimension d.
        num_wells: the number m of coordinates with two wells, at most d.
        separation: δ; the wells of a coordinate are at ``shift ± √δ``.
        shift: 1.5 in the 1000-dimensional experiment of the reference.

    Reference:
        MW in Richter & Berner (2024), arXiv:2307.01198, section 4.

    Examples:
        >>> from numpyro_sbtm.targets import double_wells
        >>> round(double_wells().log_z, 7)
        -0.5410555
    """
    well = _Tabulated(lambda x: -((x**2 - separation) ** 2), -6.0, 6.0)
    count = 2**num_wells

    def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
        wells = x[:num_wells] - shift
        return -jnp.sum((wells**2 - separation) ** 2) - 0.5 * jnp.sum(x[num_wells:] ** 2)

    def sample(key: Key, n: int) -> Float[Array, "n d"]:
        key_wells, key_rest = jax.random.split(key)
        wells = shift + well.sample(key_wells, (n, num_wells))
        return jnp.concatenate([wells, jax.random.normal(key_rest, (n, dim - num_wells))], -1)

    def membership(x: Float[Array, " d"]) -> Float[Array, " k"]:
        label = jnp.sum((x[:num_wells] > shift) * 2 ** np.arange(num_wells))
        return jax.nn.one_hot(label, count, dtype=x.dtype)

    return Target(
        logdensity,
        dim,
        num_wells * well.log_mass + 0.5 * (dim - num_wells) * float(np.log(2 * np.pi)),
        sample,
        Modes(membership, np.full(count, 1 / count)),
        float(np.sqrt(separation + shift**2)),
    )


def many_well(dim: int = 32) -> Target:
    """Make d/2 independent copies of ``-x⁴ + 6x² + x/2 - y²/2``, with 2^(d/2) modes of unequal mass.

    ``modes`` holds the d/2 events that a well is in its right half.

    Args:
        dim: the dimension d, even.

    Reference:
        Midgley et al. (2023), arXiv:2208.01893, section 4.2.

    Examples:
        >>> from numpyro_sbtm.targets import many_well
        >>> round(many_well().log_z, 4)
        164.6957
    """
    well = _Tabulated(lambda x: -(x**4) + 6 * x**2 + 0.5 * x, -5.0, 5.0)
    count = dim // 2

    def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
        a, b = x[::2], x[1::2]
        return jnp.sum(-(a**4) + 6 * a**2 + 0.5 * a - 0.5 * b**2)

    def sample(key: Key, n: int) -> Float[Array, "n d"]:
        key_wells, key_rest = jax.random.split(key)
        pairs = well.sample(key_wells, (n, count)), jax.random.normal(key_rest, (n, count))
        return jnp.stack(pairs, -1).reshape(n, dim)

    return Target(
        logdensity,
        dim,
        count * (well.log_mass + 0.5 * float(np.log(2 * np.pi))),
        sample,
        Modes(lambda x: (x[::2] > 0).astype(x.dtype), np.full(count, 1.0 - well.below(0.0))),
        1.8,
    )


def rings() -> Target:
    """Make three concentric rings in the plane: ``-100 min_c (|x| - c)²`` over c in {1, 3, 5}.

    Reference:
        Rings in Richter & Berner (2024), arXiv:2307.01198, appendix.

    Examples:
        >>> from numpyro_sbtm.targets import rings
        >>> round(rings().log_z, 4)
        2.3049
    """
    radii = np.array([1.0, 3.0, 5.0])

    def log_profile(r: np.ndarray) -> np.ndarray:
        return -100.0 * np.asarray((r[:, None] - radii) ** 2).min(-1)

    with np.errstate(divide="ignore"):
        radius = _Tabulated(lambda r: np.log(r) + log_profile(r), 0.0, 6.0)

    def distance(x: Float[Array, " d"]) -> Float[Array, " k"]:
        return (jnp.sqrt(jnp.sum(x**2) + 1e-12) - jnp.asarray(radii, x.dtype)) ** 2

    def sample(key: Key, n: int) -> Float[Array, "n d"]:
        key_radius, key_angle = jax.random.split(key)
        angle = jax.random.uniform(key_angle, (n,), maxval=2 * jnp.pi)
        circle = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        return radius.sample(key_radius, (n, 1)) * circle

    return Target(
        lambda x: -100.0 * jnp.min(distance(x)),
        2,
        radius.log_mass + float(np.log(2 * np.pi)),
        sample,
        Modes(lambda x: jax.nn.one_hot(jnp.argmin(distance(x)), 3, dtype=x.dtype), radii / radii.sum()),
        3.0,
    )


def logistic_regression(
    features: Float[np.ndarray, "n p"], labels: Float[np.ndarray, " n"], prior_scale: float = 1.0
) -> Target:
    """Make the posterior of a logistic regression with weights N(0, prior_scale² I).

    Features are standardised, those that are constant left out, and an intercept is put first.

    Args:
        features: shape ``[n, p]``.
        labels: 0 or 1, shape ``[n]``.
        prior_scale: 10 for the breast cancer data, 1 for the ionosphere data of the sampling literature.

    Returns:
        The unnormalised posterior of the weights; its Z, not known here, is the evidence.

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.targets import logistic_regression
        >>> logistic_regression(np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([0.0, 1.0])).dim
        2
    """
    varied = features[:, np.std(features, 0) > 0]
    design = np.c_[np.ones(len(varied)), (varied - varied.mean(0)) / varied.std(0)]

    def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
        outcome = dist.Bernoulli(logits=jnp.asarray(design, x.dtype) @ x)
        return jnp.sum(dist.Normal(0.0, prior_scale).log_prob(x)) + jnp.sum(
            outcome.log_prob(jnp.asarray(labels, x.dtype))
        )

    return Target(logdensity, design.shape[1], spread=prior_scale)


def brownian(observed: Float[np.ndarray, " t"], prior_scale: float = 2.0) -> Target:
    """Make the posterior of a random walk from 0 of which some steps are observed with noise.

    The coordinates are the log of the innovations' scale and that of the noise, both N(0, prior_scale²), and
    the t states.

    Args:
        observed: NaN where nothing was observed, shape ``[t]``.
        prior_scale: of the logarithms of both scales.

    Reference:
        "Brownian motion, unknown scales, missing middle observations" of the Inference Gym.

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.targets import brownian
        >>> brownian(np.array([0.1, np.nan, 0.3])).dim
        5
    """
    seen = np.isfinite(observed)
    filled = np.where(seen, observed, 0.0)

    def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
        innovation, noise, states = jnp.exp(x[0]), jnp.exp(x[1]), x[2:]
        steps = jnp.diff(states, prepend=jnp.zeros(1, x.dtype))
        noisy = dist.Normal(states, noise).log_prob(jnp.asarray(filled, x.dtype))
        prior = jnp.sum(dist.Normal(0.0, prior_scale).log_prob(x[:2]))
        return prior + jnp.sum(dist.Normal(0.0, innovation).log_prob(steps)) + jnp.sum(noisy * seen)

    return Target(logdensity, len(observed) + 2, spread=prior_scale)


def seeds(
    germinated: Int[np.ndarray, " n"],
    total: Int[np.ndarray, " n"],
    kind: Int[np.ndarray, " n"],
    extract: Int[np.ndarray, " n"],
) -> Target:
    """Make the posterior of a logistic regression with a random effect of every plate of seeds.

    The coordinates are log τ with τ ~ Gamma(.01, .01), four coefficients N(0, 10²), and the n effects
    N(0, 1/τ).

    Args:
        germinated: seeds that germinated, of each plate, shape ``[n]``.
        total: seeds on it, shape ``[n]``.
        kind: 0 or 1, shape ``[n]``.
        extract: 0 or 1, shape ``[n]``.

    Reference:
        Crowder (1978); "Seeds" among the examples of BUGS.

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.targets import seeds
        >>> seeds(np.array([1, 2]), np.array([3, 4]), np.array([0, 1]), np.array([1, 0])).dim
        7
    """
    design = np.stack([np.ones(len(kind)), kind, extract, kind * extract], -1)

    def logdensity(x: Float[Array, " d"]) -> Float[Array, ""]:
        tau, coefficients, effects = jnp.exp(x[0]), x[1:5], x[5:]
        prior = dist.Gamma(0.01, 0.01).log_prob(tau) + x[0]
        prior = prior + jnp.sum(dist.Normal(0.0, 10.0).log_prob(coefficients))
        prior = prior + jnp.sum(dist.Normal(0.0, tau**-0.5).log_prob(effects))
        logits = jnp.asarray(design, x.dtype) @ coefficients + effects
        counts = dist.Binomial(jnp.asarray(total), logits=logits)
        return prior + jnp.sum(counts.log_prob(jnp.asarray(germinated)))

    return Target(logdensity, 5 + len(total), spread=3.0)
