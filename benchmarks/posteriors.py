# SPDX-License-Identifier: Apache-2.0
"""Small posteriors with exact answers, by NUTS, tempered SMC and both kernels, all with defaults."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import NUTS, init_to_uniform
from scipy.stats import multivariate_normal

from benchmarks.chains import timed_chains
from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, report, targets
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.target import Target
from numpyro_sbtm.kernels.model import Model, from_model
from numpyro_sbtm.kernels.problem import logdensity
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.temper import tempered_particles

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import eight_schools

__all__ = ["COLUMNS", "PROBLEMS", "SAMPLERS", "cells", "measure", "regression"]


class Problem(NamedTuple):
    """A model with arguments, features of its draws, and their exact means and standard deviations."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    features: Callable[[dict[str, Any]], np.ndarray]
    mean: np.ndarray
    sd: np.ndarray
    log_evidence: float


def schools(model):
    exact = eight_schools.quadrature()
    names = ("mu", "tau", "theta")
    return Problem(
        model,
        (eight_schools.Y, eight_schools.SIGMA),
        lambda draws: np.concatenate([np.atleast_3d(draws[name]) for name in names], -1),
        exact.mean,
        exact.sd,
        exact.log_evidence,
    )


def regression(num_slopes=3):
    """Thirty rows made with three slopes, N(0, 4) priors for the first of them, unit noise."""
    x = np.random.default_rng(0).normal(size=(30, 3))
    y = x @ np.array([1.0, -1.0, 0.2]) + np.random.default_rng(1).normal(size=30)
    x = x[:, :num_slopes]

    def model(y, x):
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    cov = np.linalg.inv(x.T @ x + np.eye(num_slopes) / 4)
    log_z = multivariate_normal(np.zeros(30), np.eye(30) + 4.0 * x @ x.T).logpdf(y)
    features = lambda draws: np.asarray(draws["slope"])  # noqa: E731
    return Problem(model, (y, x), features, cov @ x.T @ y, np.sqrt(np.diag(cov)), log_z)


def label_switching():
    """Two normal components without an order, nine data: two mirror modes."""
    y = np.array([-2.5, -1.0, -3.2, -2.1, 2.2, 3.1, 1.4, 2.9, 2.4])

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        numpyro.sample(
            "y", dist.MixtureSameFamily(dist.Categorical(probs=jnp.ones(2) / 2), dist.Normal(mu, 1.0)), obs=y
        )

    grid = np.linspace(-8.0, 8.0, 1601)
    each = np.exp(-0.5 * (y - grid[:, None]) ** 2) / np.sqrt(2 * np.pi)
    prior = np.exp(-0.5 * (grid / 5) ** 2) / np.sqrt(2 * np.pi) / 5
    joint = np.prod(0.5 * (each[:, None] + each[None]), -1) * prior[:, None] * prior
    log_z = np.log(joint.sum() * (grid[1] - grid[0]) ** 2)
    features = lambda draws: np.asarray(draws["mu"][..., :1] < draws["mu"][..., 1:], float)  # noqa: E731
    return Problem(model, (y,), features, np.array([0.5]), np.array([0.5]), float(log_z))


def nine_modes():
    target = targets.nine_modes()
    membership, masses = target.modes
    features = lambda draws: np.asarray(jnp.vectorize(membership, signature="(d)->(k)")(draws["x"]))  # noqa: E731
    return Problem(
        targets.as_model(target), (), features, masses, np.sqrt(masses * (1 - masses)), target.log_z
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "eight schools, non-centred": lambda: schools(eight_schools.noncentred),
    "eight schools, centred": lambda: schools(eight_schools.centred),
    "regression": regression,
    "label switching": label_switching,
    "nine modes": nine_modes,
}


def _chains(problem, kernel, num_warmup, seed, fields=()):
    mcmc, warmup, row = timed_chains(kernel, num_warmup, seed, problem.args, fields)
    x = problem.features(mcmc.get_samples(group_by_chain=True))
    row["ess"] = float(np.nanmin(effective_sample_size(x))) if np.all(x.std((0, 1)) > 0) else np.nan
    row["warmup_gradients"] = int(warmup["num_steps"].sum()) if fields else 0
    return mcmc, x.reshape(-1, x.shape[-1]), row


def nuts(problem, seed):
    mcmc, x, row = _chains(problem, NUTS(problem.model), 1000, seed, ("num_steps",))
    return x, row | {"draw_gradients": int(mcmc.get_extra_fields()["num_steps"].sum())}


def _learned(problem, kernel, num_warmup, seed):
    mcmc, x, row = _chains(problem, kernel, num_warmup, seed)
    found = report(mcmc)
    return x, row | {
        "warmup_gradients": found.evaluations.search.plus(found.evaluations.training).total,
        "draw_gradients": found.evaluations.draws.total,
        "log_evidence": found.log_evidence,
        "log_evidence_se": found.log_evidence_se,
        "verdict": found.verdict,
    }


def dis(problem, seed):
    return _learned(problem, LogVarianceDISKernel(problem.model), 2000, seed)


def sbtm(problem, seed):
    return _learned(problem, SBTMKernel(problem.model), 300, seed)


def smc(problem, seed):
    """Adaptive tempered SMC from a normal distribution with the mean and twice the spread of the prior."""
    key_model, key_run = jax.random.split(jax.random.key(seed))
    start = time.perf_counter()
    setup = from_model(
        key_model,
        Model(problem.model, problem.args, {}, init_to_uniform, False),
        num_chains=1,
        search=Search(),
        init_params=None,
    )
    dim = setup.scouts.shape[1]
    target = Target(logdensity(setup, problem.args, {}, False), dim)
    centre, spread = jnp.median(setup.scouts, 0), jnp.std(setup.scouts, 0)
    base = Mixture(jnp.zeros(1), None, centre[None], 2.0 * spread[None])
    particles, log_z, spent, _ = jax.block_until_ready(
        jax.jit(lambda key: tempered_particles(key, target, base))(key_run)
    )
    seconds = time.perf_counter() - start
    draws = jax.vmap(lambda x: setup.postprocess_gen(*problem.args)(setup.unravel(x)))(particles)
    x = problem.features(jax.tree.map(lambda leaf: np.asarray(leaf)[None], draws))
    return x.reshape(-1, x.shape[-1]), {
        "warmup_s": seconds,
        "draws_s": 0.0,
        "ess": None,
        "warmup_gradients": int(spent.total),
        "draw_gradients": 0,
        "log_evidence": float(log_z),
    }


SAMPLERS = {"nuts": nuts, "smc": smc, "dis": dis, "sbtm": sbtm}


def measure(name, sampler, seed):
    """Run one sampler on one problem; returns a row of plain values."""
    problem = PROBLEMS[name]()
    x, row = SAMPLERS[sampler](problem, seed)
    row["problem"], row["sampler"] = name, sampler
    row["mean_error_sd"] = float(np.max(np.abs(x.mean(0) - problem.mean) / problem.sd))
    if "log_evidence" in row:
        row["log_evidence_error"] = row["log_evidence"] - problem.log_evidence
    return row


COLUMNS = (
    "problem",
    "sampler",
    "verdict",
    "s to first draw",
    "effective draws per s",
    "gradients in warm-up",
    "gradients per effective draw",
    "largest error of a mean, in sd",
    "error of log evidence",
)


def cells(row):
    """Format a row for `COLUMNS`; a dash where there is no such number."""
    ess, seconds = row["ess"], row["draws_s"]
    known = ess is not None and np.isfinite(ess)
    return [
        row["problem"],
        row["sampler"],
        row.get("verdict", "–"),
        f"{row['warmup_s']:.0f}",
        f"{ess / seconds:.0f}" if known else "–",
        f"{row['warmup_gradients']:,}",
        f"{row['draw_gradients'] / ess:.0f}" if known else "–",
        f"{row['mean_error_sd']:.3f}",
        f"{row['log_evidence_error']:+.3f}" if "log_evidence_error" in row else "–",
    ]
