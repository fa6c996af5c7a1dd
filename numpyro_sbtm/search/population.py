# SPDX-License-Identifier: Apache-2.0
"""Population Monte Carlo: a mixture is bettered by the weights of its own draws, without gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.mixture import Mixture, moments
from numpyro_sbtm.core.target import Key, LogDensity
from numpyro_sbtm.core.weights import clean, log_evidence

__all__ = ["NUM_WIDER", "better_mixture", "with_wider"]

_PRIOR_COUNT = 2.0  # draws that the covariance before counts for, per dimension
_LEAST_SHARE = 0.01  # of a component that is there
_WIDE_SHARES = 0.1, 0.1  # of the two wider components
NUM_WIDER = len(_WIDE_SHARES)
_SPREAD = 2.4  # their extra variance, in units of that of a squared norm's mean over the dimensions


def with_wider(mixture: Mixture, points: Float[Array, "n d"]) -> Mixture:
    """Add two components that are wider than all others: as wide as points lie, and alike in all directions.

    The second is so much wider that draws of the others lie within its typical set.

    Args:
        mixture: of K components.
        points: that resemble draws of the target, shape ``[n, d]``.

    Returns:
        A mixture of K + 2 components.

    Reference:
        Owen & Zhou (2000), Safe and effective importance sampling, JASA 95.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core.mixture import normal
        >>> from numpyro_sbtm.search.population import with_wider
        >>> far = jnp.array([[9.0, 0.0], [0.0, 1.0]])
        >>> [[round(std, 1) for std in row] for row in with_wider(normal(2), far).std.tolist()]
        [[1.0, 1.0], [13.3, 1.5], [1.8, 1.8]]
    """
    num, dim = mixture.centre.shape
    dtype = mixture.centre.dtype
    mean, std = moments(mixture)
    # so far out lies the outermost of n normal ones
    outermost = jax.scipy.special.ndtri(1.0 - 0.5 / len(points))
    reach = jnp.max(jnp.abs(points - mean), 0) / outermost
    wide = jnp.sqrt(1.0 + _SPREAD * jnp.sqrt(2.0 / dim)) * std
    stds = jnp.stack([jnp.maximum(reach, jnp.sqrt(std * wide)), wide])
    one = jnp.broadcast_to(jnp.eye(dim, dtype=dtype), (num + NUM_WIDER, dim, dim))
    rotation = one if mixture.rotation is None else one.at[:num].set(mixture.rotation)
    shares = jnp.array(_WIDE_SHARES, dtype)
    return Mixture(
        jnp.concatenate([mixture.log_weight + jnp.log1p(-jnp.sum(shares)), jnp.log(shares)]),
        rotation,
        jnp.concatenate([mixture.centre, jnp.stack([mean, mean])]),
        jnp.concatenate([mixture.std, stds]),
    )


def better_mixture(
    key: Key, logdensity_fn: LogDensity, mixture: Mixture, num_draws: int, num_rounds: int
) -> Mixture:
    """Draw, weigh, and let expectation maximisation move the components to where weights are; several times.

    Weights above √n of their mean are cut. A covariance leans on that before, so that one of few draws stays
    regular.

    Args:
        key: random key.
        logdensity_fn: the target.
        mixture: where to begin; wide enough to reach into the target's tails.
        num_draws: n, of each round.
        num_rounds: rounds.

    Returns:
        The mixture. Costs ``num_draws * num_rounds`` values of the log density, and no gradient.

    Reference:
        Cappé, Douc, Guillin, Marin & Robert (2008), Adaptive importance sampling in general mixture classes,
        Statistics and Computing 18; Ionides (2008), Truncated importance sampling (the cut).

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core.mixture import normal
        >>> from numpyro_sbtm.search.population import better_mixture, with_wider
        >>> key, target = jax.random.key(0), lambda x: -0.5 * jnp.sum((x - 2.0) ** 2)
        >>> start = with_wider(normal(2, 2.0), jnp.zeros((9, 2)))
        >>> better = better_mixture(key, target, start, 1000, 5)
        >>> means = jnp.einsum("cij,cj->ci", better.rotation, better.centre)
        >>> (jnp.exp(better.log_weight) @ means).round(1).tolist()
        [2.0, 2.0]
    """

    def improve(mixture: Mixture, key: Key) -> tuple[Mixture, None]:
        draws = jax.vmap(mixture.sample)(jax.random.split(key, num_draws))
        joint = jax.vmap(mixture.joint)(draws)
        log_weight = clean(jax.vmap(logdensity_fn)(draws) - jax.nn.logsumexp(joint, -1))
        excess = log_weight - log_evidence(log_weight)[0]
        weight = jnp.minimum(jnp.exp(excess), num_draws**0.5)
        usable = jnp.all(jnp.isfinite(weight))
        new = _moved(mixture, draws, weight[:, None] * jax.nn.softmax(joint, -1))
        finite = jax.tree.reduce(lambda good, leaf: good & jnp.all(~jnp.isnan(leaf)), new, usable)
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, mixture), None

    return jax.lax.scan(improve, mixture, jax.random.split(key, num_rounds))[0]


def _moved(mixture: Mixture, x: Float[Array, "n d"], share: Float[Array, "n K"]) -> Mixture:
    """Move every component to its share of the draws, as far as these tell more than what it was."""
    assert mixture.rotation is not None
    dim = x.shape[1]
    mean = jnp.einsum("cij,cj->ci", mixture.rotation, mixture.centre)
    total = jnp.maximum(jnp.sum(share, 0), 1e-30)
    count = total**2 / jnp.maximum(jnp.sum(share**2, 0), 1e-30)
    new = share.T @ x / total[:, None]
    second = jnp.einsum("nc,ni,nj->cij", share, x, x) / total[:, None, None]
    scatter = second - new[:, :, None] * new[:, None, :]
    before = jnp.einsum("cij,cj,ckj->cik", mixture.rotation, mixture.std**2, mixture.rotation)
    toward, lean = new - mean, _PRIOR_COUNT * dim
    between = (count * lean / (count + lean))[:, None, None] * toward[:, :, None] * toward[:, None, :]
    cov = (count[:, None, None] * scatter + lean * before + between) / (count + lean)[:, None, None]
    # one at a time: two batched LAPACK calls that XLA runs side by side can block a two-core machine
    variance, rotation = jax.lax.map(jnp.linalg.eigh, cov)
    mean = (count[:, None] * new + mean) / (count + 1.0)[:, None]
    there = jnp.isfinite(mixture.log_weight)
    part = jnp.maximum(total / jnp.sum(total), _LEAST_SHARE)
    return Mixture(
        jax.nn.log_softmax(jnp.where(there, jnp.log(part), -jnp.inf)),
        rotation,
        jnp.einsum("cij,ci->cj", rotation, mean),
        jnp.sqrt(jnp.maximum(variance, 1e-8)),
    )
