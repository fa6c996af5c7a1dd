# SPDX-License-Identifier: Apache-2.0
"""Eight schools, centred and non-centred, by three samplers, against the exact answer.

Given (mu, tau) the effects integrate out, y_j ~ N(mu, sigma_j² + tau²), so a two-dimensional quadrature
gives the log evidence and all moments. Data: Rubin (1981), Estimation in parallel randomized experiments.

    python examples/eight_schools.py [--warmup 600] [--output out]
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from scipy.special import logsumexp
from scipy.stats import halfcauchy, norm

from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, plots, report

Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def centred(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentred(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        raw = numpyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * raw)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


class Exact(NamedTuple):
    """The answer: moments of mu, tau, theta_1..8, and log p(mu, log tau | y) on a grid."""

    log_evidence: float
    mean: np.ndarray
    sd: np.ndarray
    mu: np.ndarray
    log_tau: np.ndarray
    log_density: np.ndarray


def quadrature(num_mu=601, num_tau=1601):
    """Integrate over (mu, log tau) by the trapezoidal rule; its error is far below 1e-4."""
    mu, log_tau = np.linspace(-30, 40, num_mu), np.linspace(-16, 16, num_tau)
    m, tau = mu[:, None], np.exp(log_tau)[None]
    total = SIGMA**2 + tau[..., None] ** 2
    log_joint = norm.logpdf(m, 0, 5) + halfcauchy.logpdf(tau, 0, 5) + log_tau
    log_joint = log_joint + norm.logpdf(Y, m[..., None], np.sqrt(total)).sum(-1)
    cell = np.log((mu[1] - mu[0]) * (log_tau[1] - log_tau[0]))
    log_z = logsumexp(log_joint) + cell
    weight = np.exp(log_joint + cell - log_z)

    variance = SIGMA**2 * tau[..., None] ** 2 / total
    theta = (m[..., None] * SIGMA**2 + Y * tau[..., None] ** 2) / total
    first = [weight * m, weight * tau, *np.moveaxis(weight[..., None] * theta, -1, 0)]
    second = [weight * m**2, weight * tau**2]
    second += list(np.moveaxis(weight[..., None] * (theta**2 + variance), -1, 0))
    mean = np.array([part.sum() for part in first])
    sd = np.sqrt(np.array([part.sum() for part in second]) - mean**2)
    return Exact(float(log_z), mean, sd, mu, log_tau, log_joint - log_z)


def parameters(samples):
    """Stack mu, tau and theta, shape [n, 10]."""
    return np.column_stack([np.asarray(samples[name]) for name in ("mu", "tau", "theta")])


def run(kernel, num_warmup, seed=0, num_chains=4):
    """Run one sampler; return it with seconds to the first draw, per 1,000 draws, and NUTS' leapfrogs."""
    fields = ("num_steps",) if isinstance(kernel, NUTS) else ()
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=1000, num_chains=num_chains, chain_method="vectorized"
    )
    start = time.perf_counter()
    mcmc.warmup(jax.random.key(seed), Y, SIGMA, extra_fields=fields, collect_warmup=bool(fields))
    jax.block_until_ready(mcmc.post_warmup_state)
    warm = time.perf_counter() - start
    gradients = int(mcmc.get_extra_fields()["num_steps"].sum()) if fields else 0
    start = time.perf_counter()
    mcmc.run(jax.random.key(seed + 1), Y, SIGMA, extra_fields=fields)
    jax.block_until_ready(mcmc.get_samples())
    draw = (time.perf_counter() - start) / num_chains
    gradients += int(mcmc.get_extra_fields()["num_steps"].sum()) if fields else 0
    return mcmc, warm, draw, gradients


def picture(ax_row, exact, samples, found):
    """Draw the posterior of mu and log tau over the exact density, and the weights."""
    left, right = ax_row
    levels = exact.log_density.max() - np.array([6.0, 4.0, 2.0, 1.0, 0.3])
    log_tau = np.log(np.asarray(samples["tau"]))
    left.plot(np.asarray(samples["mu"])[::2], log_tau[::2], ".", ms=1.5, alpha=0.5)
    left.contour(exact.mu, exact.log_tau, exact.log_density.T, levels, colors="k", linewidths=0.8)
    left.set(xlim=(-10, 18), ylim=(-4, 4.5), xlabel="mu", ylabel="log tau")
    plots.log_weights(right, found.log_weight, found.log_evidence)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--warmup", type=int, default=600, help="warm-up steps of LogVarianceDISKernel")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args()
    matplotlib.use("Agg")
    exact = quadrature()
    started = time.perf_counter()
    header = f"{'sampler':<10}{'mu':>14}{'tau':>14}{'theta_1':>14}  {'log evidence':>18}{'accept':>8}"
    header += f"{'first draw':>12}{'1000 draws':>12}{'gradients':>12}"
    figure, axes = plt.subplots(4, 2, figsize=(8, 12), layout="constrained")
    rows = iter(axes)
    for model in (noncentred, centred):
        print(f"\n{model.__name__}\n{header}")

        def line(name, mean, sd, evidence, rest=""):
            cells = "".join(f"{m:>8.2f} ±{s:>4.1f}" for m, s in zip(mean[:3], sd[:3], strict=True))
            print(f"{name:<10}{cells}  {evidence:>18}{rest}", flush=True)

        line("exact", exact.mean, exact.sd, f"{exact.log_evidence:.3f}")
        kernels = {"SBTM": (SBTMKernel(model), 300), "DIS": (LogVarianceDISKernel(model), args.warmup)}
        for name, (kernel, num_warmup) in (kernels | {"NUTS": (NUTS(model), 1000)}).items():
            mcmc, warm, draw, gradients = run(kernel, num_warmup)
            samples = mcmc.get_samples()
            x = parameters(samples)
            evidence, accept = "-", float("nan")
            if name == "NUTS":
                accept = float(np.mean(mcmc.last_state.mean_accept_prob))
            else:
                found = report(mcmc)
                evidence = f"{found.log_evidence:.3f} ± {found.log_evidence_se:.3f}"
                accept = found.acceptance
                gradients = found.evaluations.search.plus(found.evaluations.training).total
                row = next(rows)
                picture(row, exact, samples, found)
                row[0].set_title(f"{name}, {model.__name__}: {found.verdict}")
            rest = f"{accept:>8.2f}{warm:>10.1f} s{draw:>10.2f} s{gradients:>12,}"
            line(name, x.mean(0), x.std(0), evidence, rest)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "eight_schools.png"
    figure.savefig(path, dpi=80)
    print(f"\n{time.perf_counter() - started:.0f} s in all; picture: {path}")


if __name__ == "__main__":
    main()
