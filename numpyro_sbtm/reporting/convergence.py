# SPDX-License-Identifier: Apache-2.0
"""Whether chains agree and how much they tell: rank-normalised R-hat, bulk and tail effective sizes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from scipy.special import ndtri
from scipy.stats import rankdata

__all__ = ["FEWEST_DRAWS", "Convergence", "convergence"]

FEWEST_DRAWS = 4  # of a chain: it is split, and a half needs two
_TOGETHER = 2**22  # values that are ranked at a time
_MOST_COMPUTED = 1000  # entries of a site that is not latent: they follow from those that are


class Convergence(NamedTuple):
    """What chains say about themselves, in the worst of all scalar entries of all sites.

    Attributes:
        num_chains: C.
        num_draws: n, of each chain.
        rhat: the largest rank-normalised split R-hat, of the draws and of their distances from the median.
        bulk_size: the smallest effective number of draws for the bulk.
        tail_size: the smallest effective number of draws for the 5 % and 95 % quantiles.
        frozen: latent sites that do not move in some chain.
        undefined: latent sites with a draw that is not finite, and other sites that are NaN in some draws.
    """

    num_chains: int
    num_draws: int
    rhat: float
    bulk_size: float
    tail_size: float
    frozen: tuple[str, ...]
    undefined: tuple[str, ...]


def convergence(samples: Any, latent: Any = None) -> Convergence:
    """Judge chains by the scalar entries of all sites.

    All entries of latent sites, and at most a thousand, evenly spaced, of each other site.
    An entry that is the same in all draws of all chains tells nothing and is left out, such as the zeros of a
    triangular matrix. A latent site that is constant in some chain is frozen.

    Args:
        samples: pytree of arrays of shape ``[C, n, ...]``, as from ``mcmc.get_samples(group_by_chain=True)``.
        latent: names of the latent sites; None for all of them.

    Returns:
        What was found; R-hat and sizes are NaN with fewer than four draws of each chain, or if nothing
        varies.

    Reference:
        Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), Rank-normalization, folding, and localization:
        an improved R-hat, Bayesian Analysis 16, sections 4.1 to 4.3.

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.reporting.convergence import convergence
        >>> found = convergence({"x": np.random.default_rng(0).normal(size=(4, 500))})
        >>> found.rhat < 1.01, 1500 < found.bulk_size < 2500, 1500 < found.tail_size < 2500
        (True, True, True)
        >>> convergence({"x": np.ones((4, 1)) * [[0], [1], [0], [1]] * np.ones(500)}).frozen
        ('x',)
    """
    frozen, undefined, found = [], [], []
    shape = (0, 0)
    for path, leaf in jax.tree_util.tree_flatten_with_path(samples)[0]:
        name = site_name(path)
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            continue
        shape = leaf.shape[:2]
        draws = np.asarray(leaf, np.float64).reshape(*shape, -1)
        if draws.size == 0:
            continue
        is_latent = latent is None or name in latent
        constant = np.all((draws == draws[:, :1]) | (np.isnan(draws) & np.isnan(draws[:, :1])), 1)
        bad = ~np.isfinite(draws) if is_latent else np.isnan(draws) & ~np.all(constant, 0)
        if np.any(bad):
            undefined.append(name)
        if shape[1] < FEWEST_DRAWS:
            continue
        if is_latent and np.any(np.all(constant, 1)):
            frozen.append(name)
        same = np.all(draws == draws[:1, :1], (0, 1))
        judged = draws[..., ~same & ~np.any(np.isnan(draws), (0, 1))]
        if not is_latent:
            judged = judged[..., :: -(-judged.shape[-1] // _MOST_COMPUTED) or 1]
        width = max(1, _TOGETHER // (shape[0] * shape[1]))
        found += [_of_entries(judged[..., k : k + width]) for k in range(0, judged.shape[-1], width)]
    if not found:
        return Convergence(*shape, np.nan, np.nan, np.nan, tuple(frozen), tuple(undefined))
    rhat, bulk, tail = np.array(found).T
    return Convergence(
        *shape, float(np.max(rhat)), float(np.min(bulk)), float(np.min(tail)), tuple(frozen), tuple(undefined)
    )


def site_name(path: tuple[Any, ...]) -> str:
    """Name a leaf of a pytree of sites: the key of a dictionary, or the whole path."""
    if len(path) == 1 and isinstance(path[0], jax.tree_util.DictKey):
        return str(path[0].key)
    return jax.tree_util.keystr(path).lstrip(".")


def _of_entries(draws: Float[np.ndarray, "C n k"]) -> tuple[float, float, float]:
    """The largest R-hat, and the smallest effective sizes of bulk and tails."""
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.median(draws, (0, 1))
        # an infinite median is at no distance from itself
        distance = np.where(draws == centre, 0.0, np.abs(draws - centre))
        ranks = _normal_scores(draws)
        rhat = np.fmax(split_gelman_rubin(ranks), split_gelman_rubin(_normal_scores(distance)))
        bulk = effective_size(_split(ranks))
        low, high = np.quantile(draws, (0.05, 0.95), (0, 1), method="lower")
        tails = [effective_size(_split((draws <= level).astype(float))) for level in (low, high)]
    # distances may all be equal, and so may draws below a quantile of values with ties
    return float(np.max(rhat)), float(np.nanmin(bulk)), float(np.nanmin([bulk, *tails]))


def _normal_scores(draws: Float[np.ndarray, "C n k"]) -> Float[np.ndarray, "C n k"]:
    flat = draws.reshape(-1, draws.shape[-1])
    scores = ndtri((rankdata(flat, axis=0) - 0.375) / (len(flat) + 0.25))
    return scores.reshape(draws.shape)


def _split(draws: Float[np.ndarray, "C n k"]) -> Float[np.ndarray, "C2 m k"]:
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, -half:]])


def effective_size(draws: Float[np.ndarray, "C n *k"]) -> Float[np.ndarray, "*k"]:
    """Compute effective numbers of draws, kept below S log10 S, where noise alone would make them infinite.

    Reference:
        Vehtari et al. (2021), section 3.2.
    """
    total = draws.shape[0] * draws.shape[1]
    most = total * max(np.log10(total), 1.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        size = effective_sample_size(draws)
    return np.where((size <= 0) | (size > most), most, size)
