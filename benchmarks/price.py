# SPDX-License-Identifier: Apache-2.0
"""What a run costs from the model to the printed report: evaluations, seconds, programs. One process each.

Seconds are from the first call to the printed report, NUTS's to its summary, without imports; cold, and again
in a second process with a cache of compiled programs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import monitoring
from jax.experimental.ode import odeint
from numpyro.infer import MCMC, NUTS

__all__ = ["COLUMNS", "PROBLEMS", "SAMPLERS", "cells", "measure"]

NUM_CHAINS, NUM_DRAWS = 4, 1000
WARMUP = {"nuts": 1000, "dis": 2000, "sbtm": 300}


# ---------------------------------------------------------------------- models
def eight_schools(centred):
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model():
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", 8):
            if centred:
                theta = numpyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * numpyro.sample("base", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model


def logistic():
    """Eight predictors, 500 rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 8))
    y = rng.random(500) < 1.0 / (1.0 + np.exp(-(x @ np.linspace(-1.0, 1.0, 8) + 0.5)))

    def model():
        intercept = numpyro.sample("intercept", dist.Normal(0.0, 2.0))
        beta = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y.astype(int))

    return model


def autoregression():
    """A scan over 250 steps: AR(2) with unknown noise."""
    rng = np.random.default_rng(1)
    y = np.zeros(250)
    for t in range(2, 250):
        y[t] = 0.6 * y[t - 1] - 0.3 * y[t - 2] + 0.5 * rng.normal()

    def model():
        phi = numpyro.sample("phi", dist.Normal(0.0, 0.5).expand([2]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))

        def step(last, now):
            mean = phi[0] * last[0] + phi[1] * last[1]
            return (now, last[0]), dist.Normal(mean, sigma).log_prob(now)

        start = jnp.zeros(()), jnp.zeros(())
        numpyro.factor("y", jnp.sum(jax.lax.scan(step, start, jnp.asarray(y, jnp.float32))[1]))

    return model


def lotka_volterra():
    """Hares and lynxes, thousands of pelts of the Hudson's Bay Company, 1900 to 1920 (Howard 2009)."""
    hare = [30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1]
    hare += [40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
    lynx = [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4]
    lynx += [8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
    y = np.stack([hare, lynx], 1)

    def slope(z, t, theta):
        u, v = z
        alpha, beta, gamma, delta = theta
        return jnp.stack([(alpha - beta * v) * u, (-gamma + delta * u) * v])

    def model():
        start = numpyro.sample("start", dist.LogNormal(jnp.log(10.0), 1.0).expand([2]).to_event(1))
        loc, scale = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.2, 0.01, 0.2, 0.01])
        theta = numpyro.sample("theta", dist.TruncatedNormal(loc, scale, low=0.0).to_event(1))
        sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
        z = odeint(slope, start, jnp.arange(21.0), theta, rtol=1e-6, atol=1e-5, mxstep=1000)
        numpyro.sample("y", dist.LogNormal(jnp.log(z), sigma).to_event(2), obs=y)

    return model


def two_regressions():
    """A mixture of two regressions, whose labels may be exchanged: two modes."""
    rng = np.random.default_rng(2)
    x, of_second = rng.uniform(-2.0, 2.0, 60), rng.random(60) < 0.4
    y = np.where(of_second, 1.0 - 1.5 * x, -1.0 + 1.0 * x) + 0.4 * rng.normal(size=60)

    def model():
        line = numpyro.sample("line", dist.Normal(0.0, 2.0).expand([2, 2]).to_event(2))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        mean = line[:, 0] + line[:, 1] * x[:, None]
        each = dist.Normal(mean, sigma).log_prob(y[:, None])
        numpyro.factor("y", jnp.sum(jax.nn.logsumexp(each, -1) - jnp.log(2.0)))

    return model


def nine_modes():
    centres = jnp.array([[a, b] for a in (-5.0, 0.0, 5.0) for b in (-5.0, 0.0, 5.0)])

    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 6.0).expand([2]).to_event(1))
        numpyro.factor("modes", jax.nn.logsumexp(-0.5 * jnp.sum((x - centres) ** 2, -1) / 0.3))

    return model


PROBLEMS = {
    "eight schools, non-centred": lambda: eight_schools(False),
    "eight schools, centred": lambda: eight_schools(True),
    "logistic regression": logistic,
    "autoregression by scan": autoregression,
    "Lotka-Volterra by odeint": lotka_volterra,
    "two regressions": two_regressions,
    "nine modes": nine_modes,
}
SAMPLERS = ("nuts", "dis", "sbtm")


# ---------------------------------------------------------------------- one process
def _one(problem, sampler, seed, counted):
    """Run a sampler to its printed report; prints a row of plain values as the last line."""
    from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, report
    from numpyro_sbtm.reporting.convergence import convergence

    model = PROBLEMS[problem]()
    spent = {"compilation_s": 0.0, "tracing_s": 0.0, "programs": 0}
    events = {
        "/jax/core/compile/backend_compile_duration": "compilation_s",
        "/jax/core/compile/jaxpr_trace_duration": "tracing_s",
        "/jax/core/compile/jaxpr_to_mlir_module_duration": "tracing_s",
    }

    def listen(event, seconds, **_):
        if event in events:
            spent[events[event]] += seconds
            spent["programs"] += event.endswith("backend_compile_duration")

    monitoring.register_event_duration_secs_listener(listen)
    cpu, start = time.process_time(), time.perf_counter()
    kernel = {"nuts": NUTS, "dis": LogVarianceDISKernel, "sbtm": SBTMKernel}[sampler](model)
    mcmc = MCMC(
        kernel,
        num_warmup=WARMUP[sampler],
        num_samples=NUM_DRAWS,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    fields = ("num_steps",) if sampler == "nuts" else ()
    mcmc.run(jax.random.key(seed), extra_fields=fields)
    found = None
    if sampler == "nuts":
        mcmc.print_summary()
    else:
        found = report(mcmc)
        print(found)
    row = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, **spent}
    chains = convergence(mcmc.get_samples(group_by_chain=True), mcmc.last_state.z)
    row |= {"bulk_ess": chains.bulk_size, "tail_ess": chains.tail_size, "rhat": chains.rhat}
    if found is None:
        steps = int(mcmc.get_extra_fields()["num_steps"].sum())
        row |= {"draws": steps, "total": None}
        if counted:  # warm-up once more, not timed
            mcmc.warmup(jax.random.key(seed), extra_fields=fields, collect_warmup=True)
            row["total"] = steps + int(mcmc.get_extra_fields()["num_steps"].sum())
    else:
        for name, part in found.evaluations._asdict().items():
            row |= {f"{name}_values": part.values, f"{name}_gradients": part.gradients}
        row |= {"draws": found.evaluations.draws.total, "total": found.evaluations.total}
        row |= {"verdict": found.verdict, "log_evidence": found.log_evidence}
        row |= {"log_evidence_se": found.log_evidence_se, "training_steps": found.training_steps}
    print(json.dumps(row))


def _process(arguments, environment):
    command = [sys.executable, "-m", "benchmarks.price", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _num_lines(folder):
    """Lines of StableHLO, but for those that name source locations."""
    text = (line for file in Path(folder).iterdir() for line in file.open(errors="replace"))
    return sum(not line.startswith("#loc") for line in text)


def measure(problem, sampler, seed):
    """Run one sampler on one problem in processes of its own; returns a row of plain values."""
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as programs:
        kept = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        arguments = (problem, sampler, str(seed))
        row = _process((*arguments, "counted"), {})
        _process(arguments, kept | {"JAX_DUMP_IR_TO": programs})
        row["cached_s"] = _process(arguments, kept)["seconds"]
        row["lines"] = _num_lines(programs)
    return {"problem": problem, "sampler": sampler, **row}


COLUMNS = (
    "problem",
    "sampler",
    "verdict",
    "evaluations in all",
    "evaluations per 1,000 effective draws",
    "seconds, cold",
    "seconds, cached",
    "of CPU: compilation",
    "tracing",
    "programs",
    "lines of StableHLO",
)


def cells(row):
    """Format a row for `COLUMNS`; a dash where there is no such number."""
    least = min(row["bulk_ess"], row["tail_ess"])
    return [
        row["problem"],
        row["sampler"],
        row.get("verdict", f"R-hat {row['rhat']:.2f}"),
        f"{row['total']:,}" if row["total"] else "–",
        f"{1000 * row['draws'] / max(least, 1e-9):,.0f}",
        f"{row['seconds']:.1f}",
        f"{row['cached_s']:.1f}",
        f"{row['compilation_s']:.1f}",
        f"{row['tracing_s']:.1f}",
        f"{row['programs']}",
        f"{row['lines']:,}",
    ]


if __name__ == "__main__":
    _one(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:] == ["counted"])
