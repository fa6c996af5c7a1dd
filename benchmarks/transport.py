# SPDX-License-Identifier: Apache-2.0
"""The experiments of Ilin, Sushko & Hu (2025), arXiv:2504.18130, and others where a plain transport fails.

Particles start from N(0, std² I) and move with no warm start. KL of the particles is that of two kernel
density estimates in one dimension, as in the paper; where the target is normal there is also that of the
normal distribution with the particles' moments. Masses, log Z and the divergence are those of fresh, weighted
draws.
"""

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.linalg import solve_banded
from scipy.stats import gaussian_kde

from benchmarks.particles import langevin, mass_errors, plain_transport, svgd, tempered
from numpyro_sbtm import plots, targets
from numpyro_sbtm.core import TransportOptions, sbtm
from numpyro_sbtm.core.quasi import quasi_normal, standardised
from numpyro_sbtm.core.target import Target
from numpyro_sbtm.core.transition import standard_normal
from numpyro_sbtm.core.transport.annealing import convolution, dilation, geometric
from numpyro_sbtm.core.transport.maps import trajectory
from numpyro_sbtm.core.weights import ess_fraction, log_evidence
from numpyro_sbtm.networks import radial, score_mlp

__all__ = ["COLUMNS", "PROBLEMS", "SAMPLERS", "applies", "cells", "measure"]

NUM_EXACT = 10_000  # draws of the target for the metric of the paper
NUM_FRESH = 16_384
NUM_PROBES = 4096
RATE = 1e-2  # of Adam, first
TOLERANCE = 1e-3  # of adaptive steps, in deviations of the particles
NUM_LOOKS = 5  # at the particles on their way
NUM_WAYS = 40  # trajectories drawn
NOTICEABLE = 0.01  # dissipation above which its error counts
MAX_SVGD = 1000  # particles; its cost grows with their square


class Problem(NamedTuple):
    """A target, the first law's deviation, and the sizes of the transport."""

    target: Target
    std: float
    duration: float
    num_steps: int
    num_particles: int
    width: int = 32
    num_fresh: int = NUM_FRESH
    true_dissipation: Callable[[np.ndarray], np.ndarray] | None = None
    covariance: np.ndarray | None = None


def _variance(t):
    """That of the first law on its way to N(0, 1): the Ornstein-Uhlenbeck process, time 0.1 after a point."""
    return 1.0 - np.exp(-2.0 * (t + 0.1))


_EARLY = float(np.sqrt(_variance(0.0)))


def _normal_dissipation(dim):
    """The relative Fisher information of N(0, v(t) I) and N(0, I)."""

    def at(t):
        v = _variance(t)
        return dim * (1.0 - v) ** 2 / v

    return at


def _normal(dim, num_particles, num_steps):
    covariance = np.eye(dim)
    target = targets.gaussian(np.zeros(dim), covariance)
    return Problem(
        target,
        _EARLY,
        2.5,
        num_steps,
        num_particles,
        true_dissipation=_normal_dissipation(dim),
        covariance=covariance,
    )


def _solved_dissipation(target, std):
    """Dissipation of the Fokker-Planck equation on the line, by finite volumes and implicit steps."""
    edges = np.linspace(-10.0, 10.0, 4001)
    x, dx, dt = 0.5 * (edges[1:] + edges[:-1]), edges[1] - edges[0], 1e-3
    with jax.enable_x64(True):
        log_target = np.asarray(jax.vmap(target.logdensity_fn)(jnp.asarray(x)[:, None]))
    q = np.exp(-0.5 * (x / std) ** 2) / np.sqrt(2 * np.pi) / std
    # flux between cells: -√(π_i π_{i+1}) d/dx (q / π), which leaves π at rest
    up = np.exp(0.5 * np.diff(log_target)) / dx**2
    down = np.exp(-0.5 * np.diff(log_target)) / dx**2
    bands = np.zeros((3, len(x)))
    bands[1, :-1] += up
    bands[1, 1:] += down
    bands[0, 1:] = -down
    bands[2, :-1] = -up
    bands = dt * bands
    bands[1] += 1.0
    times, values = [], []
    for k in range(10_001):
        log_ratio = np.log(np.maximum(q, 1e-300)) - log_target
        middle = 0.5 * (q[1:] + q[:-1])
        times.append(k * dt)
        values.append(np.sum(middle * (np.diff(log_ratio) / dx) ** 2) * dx)
        q = solve_banded((1, 1), bands, q)
    return lambda t: np.interp(t, times, values, right=np.nan)


@cache  # the Fokker-Planck equation is solved once, not for every method and seed
def _pair(distance, num_particles=10_000):
    target = targets.unequal_pair(distance)
    return Problem(
        target, 1.0, 10.0, 1000, num_particles, 64, true_dissipation=_solved_dissipation(target, 1.0)
    )


def _stiff():
    covariance = np.diag([1.0, 0.5, 0.25, 0.1, 0.05])
    target = targets.gaussian(np.zeros(5), covariance)
    return Problem(target, 1.0, 1.5, 75, 500, covariance=covariance)


def _bent(dim):
    """Pairs of a standard normal coordinate and one around half its square; log Z = 0."""

    def logdensity(x):
        first, second = x[::2], x[1::2] - 0.5 * (x[::2] ** 2 - 1.0)
        return -0.5 * (jnp.sum(first**2) + jnp.sum(second**2)) - 0.5 * dim * jnp.log(2 * jnp.pi)

    # determinants of many points at once fill the memory with their square in d
    return Problem(
        Target(logdensity, dim, 0.0), 1.2, 2.0, 60, 2048, 64, num_fresh=NUM_FRESH if dim < 100 else 2048
    )


PROBLEMS: dict[str, Callable[[], Problem]] = (
    {f"normal, n = {n}": partial(_normal, 1, n, 1250) for n in (100, 300, 1000, 3000, 10_000)}
    | {f"normal, d = {d}": partial(_normal, d, 4096, 1250) for d in (1, 3, 5, 10, 20)}
    | {
        "near mixture": partial(_pair, 2.0),
        "far mixture": partial(_pair, 4.0),
        "sixteen modes, spacing 4": lambda: Problem(targets.sixteen_modes(), 6.0, 6.0, 300, 20_000, 128),
        "sixteen modes, spacing 10": lambda: Problem(
            targets.sixteen_modes(10.0), 14.0, 10.0, 400, 20_000, 128
        ),
        "circle": lambda: Problem(targets.circle(), 3.0, 5.0, 250, 10_000, 128),
        "stiff normal": _stiff,
    }
    | {f"bent, d = {d}": partial(_bent, d) for d in (2, 10, 50, 200)}
    | {f"cost, n = {n}": partial(_normal, 1, n, 100) for n in (1000, 10_000, 100_000, 1_000_000)}
)


def _kernel_kl(x, exact, estimate=gaussian_kde):
    """KL of two kernel density estimates by the trapezoid rule, as in the paper's code."""
    grid = np.linspace(min(x.min(), exact.min()), max(x.max(), exact.max()), 1000)
    p, q = (estimate(points)(grid) + 1e-10 for points in (x, exact))
    return float(np.trapezoid(p * np.log(p / q), grid))


def _shrunk_kde(x):
    """A kernel density estimate whose variance is that of its points (Silverman, 1986, section 6.4)."""
    factor = gaussian_kde(x).factor
    shrink = 1.0 / np.sqrt(1.0 + factor**2)
    return gaussian_kde(x.mean() + shrink * (x - x.mean()), factor)


def _moment_kl(x, covariance):
    """KL of the normal distribution with the particles' moments from N(0, covariance)."""
    solved = np.linalg.solve(covariance, np.cov(x.T).reshape(covariance.shape))
    mean = x.mean(0)
    away = mean @ np.linalg.solve(covariance, mean)
    return float(0.5 * (np.trace(solved) - len(mean) - np.linalg.slogdet(solved)[1] + away))


def _distances(problem, x, seed):
    """Divergences of particles, by name."""
    x, found = np.asarray(x, float), {}
    if problem.target.dim == 1:
        exact = np.asarray(problem.target.sample(jax.random.key(42 + seed), NUM_EXACT), float)[:, 0]
        found["kernel_kl"] = _kernel_kl(x[:, 0], exact)
        found["shrunk_kl"] = _kernel_kl(x[:, 0], exact, _shrunk_kde)
    if problem.covariance is not None:
        found["moment_kl"] = _moment_kl(x, problem.covariance)
    return found


def _network(problem):
    """What learns a velocity: a network, and its optimiser."""
    schedule = optax.cosine_decay_schedule(RATE, 10 * problem.num_steps, alpha=0.1)
    return score_mlp(problem.width), optax.adam(schedule)


def _kernel(problem):
    """Or radial functions, without training."""
    return radial(64, 0.4), None


def _rises(looks):
    """By how much every divergence ends above the least that was seen."""
    return {f"{name}_rise": last - min(look[name] for look in looks) for name, last in looks[-1].items()}


def _transport(problem, seed, learner=_network, num_steps=None, quasi=True, annealing=None, **options):
    """Transport as this package does it: affine part in closed form, held-out stopping, exact weights."""
    problem = problem._replace(num_steps=num_steps or problem.num_steps)
    algorithm = sbtm(
        problem.target,
        *learner(problem),
        TransportOptions(
            num_particles=problem.num_particles,
            num_maps=problem.num_steps,
            num_updates=10,
            batch_size=512,
            duration=problem.duration,
            max_rounds=8,
            first_updates=1000,
            num_probes=min(problem.num_particles, NUM_PROBES),
            quasi=quasi,
            **{"noisy": False} | options,
        ),
        base=standard_normal(problem.target.dim, problem.std),
        annealing=annealing,
    )
    keys = jax.random.split(jax.random.key(seed + 1), problem.num_steps)

    def advance(state, keys):
        return jax.lax.scan(lambda state, key: algorithm.step(key, state), state, keys)

    state = jax.jit(algorithm.init)(jax.random.key(seed))
    parts = jnp.split(keys, NUM_LOOKS)
    start = time.perf_counter()
    compiled = jax.jit(advance).lower(state, parts[0]).compile()
    row: dict[str, Any] = {"compilation_s": time.perf_counter() - start}
    seconds, gradients, looks = 0.0, 0, []
    for part in parts:
        start = time.perf_counter()
        state, info = jax.block_until_ready(compiled(state, part))
        seconds += time.perf_counter() - start
        gradients += int(info.gradients.sum())
        looks.append(_distances(problem, state.particles, seed))
    row |= {
        "seconds": seconds,
        "gradients": gradients,
        "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
        "maps": int(jnp.sum(state.maps.step_size > 0)),
    }
    row |= _rises(looks)
    made = state.divergence[: row["maps"] + 1]
    row["divergence_rise"] = float(made[-1] - jnp.min(made))
    plain = annealing is None and not options.keys() & {"noisy", "preconditioned"}
    if problem.true_dissipation is not None and plain:
        row["dissipation_error"] = _dissipation_error(problem, state)
    row |= _weighed(problem, algorithm, state, seed)
    history = state.maps.step_size, state.divergence, state.dissipation.fisher, state.dissipation.dissipation
    net, fresh = (
        learner(problem)[0],
        jax.random.normal(jax.random.key(seed + 4), (NUM_WAYS, problem.target.dim)),
    )
    ways = jax.jit(jax.vmap(partial(trajectory, net), (None, 0)))(state.maps, problem.std * fresh)
    return state.particles, row | {
        "history": [np.asarray(part) for part in history],
        "ways": np.asarray(ways),
    }


def _dissipation_error(problem, state):
    """The largest relative error of the Fisher information where the true dissipation is noticeable."""
    t = np.concatenate([[0.0], np.cumsum(np.asarray(state.maps.step_size))[:-1]])
    true = problem.true_dissipation(t)
    found = np.asarray(state.dissipation.fisher)
    counts = (true > NOTICEABLE) & np.isfinite(found)
    return float(np.max(np.abs(found[counts] / true[counts] - 1.0)))


def _weighed(problem, algorithm, state, seed):
    """What fresh draws of the flow say, none of which it was trained on."""
    draws = jax.jit(algorithm.proposal.draw, static_argnums=2)(
        jax.random.key(seed + 2), algorithm.parameters(state), problem.num_fresh
    )
    log_weight = jnp.where(jnp.isfinite(draws.log_weight), draws.log_weight, -jnp.inf)
    found, error = log_evidence(log_weight)
    row = {
        "log_evidence_error": float(found) - problem.target.log_z,
        "log_evidence_se": float(error),
        "ess_fraction": float(ess_fraction(log_weight)),
        "divergence": float(found - jnp.mean(draws.log_weight)),
    }
    weight = jax.nn.softmax(log_weight)
    row |= mass_errors(problem.target, draws.x, weight)
    chosen = jax.random.choice(jax.random.key(seed + 3), len(weight), (NUM_EXACT,), p=weight)
    again = _distances(problem, draws.x[chosen], seed)
    return row | {f"weighted_{name}": value for name, value in again.items()}


def _particles(move, problem, seed):
    """Run a method without weights, from independent draws of the first law."""
    key_start, key_run = jax.random.split(jax.random.key(seed))
    start = problem.std * jax.random.normal(key_start, (problem.num_particles, problem.target.dim))
    step_size = problem.duration / problem.num_steps
    run = jax.jit(lambda key, start: move(key, problem.target, start, step_size, problem.num_steps))
    compiled = run.lower(key_run, start).compile()
    begin = time.perf_counter()
    x = jax.block_until_ready(compiled(key_run, start))
    row: dict[str, Any] = {
        "seconds": time.perf_counter() - begin,
        "gradients": problem.num_particles * problem.num_steps,
    }
    return x, row | mass_errors(problem.target, x)


def _smc(problem, seed):
    x, row = tempered(seed, problem.target, problem.std, problem.num_particles)
    return x, row | mass_errors(problem.target, x)


def _exact_flow(problem, seed, spread):
    """N(0, v(t) I) on its way to N(0, I): points of the first law in the place of particles, scaled by √v."""
    points = spread(seed, problem)
    times = problem.duration * np.arange(1, NUM_LOOKS + 1) / NUM_LOOKS
    ways = [np.sqrt(_variance(t)) * points for t in times]
    looks = [_distances(problem, x, seed) for x in ways]
    return ways[-1], {"seconds": 0.0, "gradients": 0} | _rises(looks)


def _even(seed, problem):
    del seed
    return standardised(quasi_normal(problem.num_particles, problem.target.dim))


def _independent(seed, problem):
    return jax.random.normal(jax.random.key(seed), (problem.num_particles, problem.target.dim))


def _exact(problem, seed):
    """Independent draws of the target: the floor of the metric."""
    return problem.target.sample(jax.random.key(seed), problem.num_particles), {
        "seconds": 0.0,
        "gradients": 0,
    }


SAMPLERS = {
    "sbtm": _transport,
    "sbtm, geometric": partial(_transport, annealing=geometric()),
    "sbtm, adaptive": partial(_transport, annealing=geometric(conditional_ess=0.98)),
    "sbtm, convolution": partial(_transport, annealing=convolution()),
    "sbtm, convolution over 64 points": partial(_transport, annealing=convolution(64)),
    "sbtm, dilation": partial(_transport, annealing=dilation()),
    "sbtm, kernel score": partial(_transport, learner=_kernel),
    "sbtm, solved output": partial(_transport, solved_output=True),
    "sbtm, preconditioned": partial(_transport, preconditioned=True),
    "sbtm, adaptive steps": partial(_transport, tolerance=TOLERANCE),
    "sbtm, 50 steps": partial(_transport, num_steps=50),
    "sbtm, 25 steps of Heun": partial(_transport, num_steps=25, heun=True),
    "sbtm, noisy": partial(_transport, noisy=True),
    "sbtm, independent particles": partial(_transport, quasi=False),
    "exact flow": partial(_exact_flow, spread=_even),
    "exact flow, independent particles": partial(_exact_flow, spread=_independent),
    "plain sbtm": lambda problem, seed: _particles(partial(plain_transport, std=problem.std), problem, seed),
    "langevin": partial(_particles, langevin),
    "svgd": partial(_particles, svgd),
    "smc": _smc,
    "exact": _exact,
}


def applies(name, sampler):
    """Say whether a problem has exact draws, or a flow that is known, where a sampler needs them."""
    problem = PROBLEMS[name]()
    if sampler.startswith("exact flow"):
        return problem.covariance is not None and np.array_equal(
            problem.covariance, np.eye(problem.target.dim)
        )
    return sampler != "exact" or problem.target.sample is not None


def measure(name, sampler, seed):
    """Run one method on one problem; returns a row of plain values."""
    problem = PROBLEMS[name]()
    if sampler == "svgd" and problem.num_particles > MAX_SVGD:
        problem = problem._replace(num_particles=MAX_SVGD)
    x, row = SAMPLERS[sampler](problem, seed)
    row |= {"problem": name, "sampler": sampler, "num_particles": problem.num_particles}
    row |= {
        "figure": partial(_figure, problem, np.asarray(x), row.pop("history", None), row.pop("ways", None))
    }
    return row | _distances(problem, x, seed)


def _figure(problem, x, history, ways):
    """Draw the particles over the target, and what transport did on the way."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 if history is None else 3, figsize=(13, 4), layout="constrained")
    axes = np.atleast_1d(axes)
    logdensity = jax.jit(jax.vmap(problem.target.logdensity_fn))
    plots.points(axes[0], x, lambda grid: np.asarray(logdensity(grid)))
    if history is not None:
        plots.transport(axes[1], *history)
        plots.trajectories(axes[2], history[0], ways)
    return figure


COLUMNS = (
    "experiment",
    "sampler",
    "seconds",
    "maps",
    "gradients",
    "kernel KL (its rise)",
    "shrunk (its rise)",
    "moment KL (its rise)",
    "error of F",
    "KL of draws (its rise)",
    "kernel KL, weighted",
    "ESS fraction",
    "log Z error",
    "largest mass error",
)


def cells(row):
    """Format a row for `COLUMNS`; a dash where there is no such number."""

    def optional(text, key, otherwise="–"):
        return text.format(**row) if key in row else otherwise

    def with_rise(key, digits):
        value = f"{{{key}:.{digits}f}}"
        return optional(value, key) + optional(f" ({{{key}_rise:.{digits}f}})", f"{key}_rise", "")

    return [
        row["problem"],
        row["sampler"],
        "{seconds:.1f}".format(**row),
        optional("{maps:.0f}", "maps"),
        "{gradients:,.0f}".format(**row),
        with_rise("kernel_kl", 5),
        with_rise("shrunk_kl", 5),
        with_rise("moment_kl", 5),
        optional("{dissipation_error:.1%}", "dissipation_error"),
        with_rise("divergence", 4),
        optional("{weighted_kernel_kl:.5f}", "weighted_kernel_kl"),
        optional("{ess_fraction:.3f}", "ess_fraction"),
        optional("{log_evidence_error:+.4f}", "log_evidence_error")
        + optional(" ± {log_evidence_se:.4f}", "log_evidence_se", ""),
        optional("{mass_error:.4f}", "mass_error"),
    ]
