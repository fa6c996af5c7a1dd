# SPDX-License-Identifier: Apache-2.0
"""Learned diffusions on the targets of the field: bounds and importance estimates of log Z, modes, cost.

The posteriors of Brownian motion, seeds and ionosphere need ``brownian.json``, ``seeds.json`` and
``ionosphere.json`` in the folder that the environment variable NUMPYRO_SBTM_DATA names.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import NUTS

from benchmarks.chains import NUM_DRAWS, timed_chains
from benchmarks.particles import mass_errors, tempered
from numpyro_sbtm import (
    Correction,
    DiffusionKernel,
    DiffusionTraining,
    LogVarianceDISKernel,
    Search,
    plots,
    report,
    targets,
)
from numpyro_sbtm.core.target import Target

__all__ = ["COLUMNS", "PROBLEMS", "SAMPLERS", "cells", "measure", "overview"]

NUM_WARMUP = 2000
LONG_WARMUP = 3000
NUM_PROPOSALS = 16_384
NUM_EXACT = 4000  # exact draws that are weighed for the upper bound
NUM_TRANSPORTED = 2000  # points of the Sinkhorn divergence
NUM_GRADIENTS = 4_000_000  # of NUTS and SMC: about what a warm-up with defaults spends
NUM_PILOT = 1024  # particles that tell what one of them costs

_DATA = os.environ.get("NUMPYRO_SBTM_DATA")
_BROWNIAN_LOG_Z = 1.1876  # the locations integrate out, the two scales by quadrature
_CANCER_LOG_Z = -71.47  # ± 0.02, bridge sampling (Meng & Wong 1996), three times 20,000 draws of NUTS
_IONOSPHERE_LOG_Z = -111.6091  # ± 0.0033, importance sampling; so is the next
_SEEDS_LOG_Z = -73.406  # ± 0.006


def _load(name):
    return json.loads((Path(_DATA) / f"{name}.json").read_text())


def cancer():
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    return targets.logistic_regression(features, labels.astype(float), 10.0)._replace(log_z=_CANCER_LOG_Z)


def ionosphere():
    data = _load("ionosphere")
    features, labels = np.asarray(data["X"], float), np.asarray(data["y"], float)
    return targets.logistic_regression(features, labels)._replace(log_z=_IONOSPHERE_LOG_Z)


def seeds():
    data = _load("seeds")
    columns = (np.asarray(data[name]) for name in ("R", "N", "X1", "X2"))
    return targets.seeds(*columns)._replace(log_z=_SEEDS_LOG_Z)


def brownian():
    return targets.brownian(np.array(_load("brownian")["observed"], float))._replace(log_z=_BROWNIAN_LOG_Z)


PROBLEMS: dict[str, Callable[[], Target]] = {
    "nine modes": targets.nine_modes,
    "funnel": targets.funnel,
    "double wells (5, 5, 4)": targets.double_wells,
    "double wells (50, 5, 2)": lambda: targets.double_wells(50, 5, 2.0),
    "forty modes": targets.forty_modes,
    "many well": targets.many_well,
    "rings": targets.rings,
    "Student mixture": targets.student_t_mixture,
    "cancer": cancer,
}
if _DATA is not None:
    PROBLEMS |= {"ionosphere": ionosphere, "seeds": seeds, "brownian": brownian}


def _plain(process, divergence, **options):
    """A process on its own: no warm start, no whitening, no paths from the target's side, no local moves."""
    return partial(
        DiffusionKernel,
        process=process,
        divergence=divergence,
        precondition=None,
        training=DiffusionTraining(**{"coarse_steps": None, "always": True} | options),
        correction=Correction(local_kernel=None, num_particles=0),
    )


_WIDE = 2.0  # standard deviation of noise from which plain processes reach the nine modes
_NARROW = 0.5, 0.7  # from which the wells at ±2 are hard to reach

_STARTS = {"wide": {"scale": _WIDE}} | {f"from {s}": {"scale": s, "patience": None} for s in _NARROW}

_PIECES = {
    "coarse grids": {"coarse_steps": 10},
    "exploration": {"exploration": 0.2},
    "buffer": {"buffer_size": 4096},
    "four updates": {"num_updates": 4},
    "four updates in a trust region": {"num_updates": 4, "trust_region": 1.0},
}
"""Options of training, one at a time."""

_FINE = DiffusionTraining(
    num_steps=256, coarse_steps=64, num_times=64, target_acceptance=None, patience=None, always=True
)
"""Training for a tight bound: many steps, and all of warm-up."""

_SINGLE = Correction(steps_per_draw=1, local_kernel=None, num_particles=0)
_AHEAD = replace(_FINE, look_ahead=True)

BOUNDS = {
    "256 steps": partial(LogVarianceDISKernel, training=_FINE, correction=_SINGLE),
    "256 steps, looking ahead": partial(LogVarianceDISKernel, training=_AHEAD, correction=_SINGLE),
    "256 steps, looking ahead, refined": partial(
        LogVarianceDISKernel, search=Search(refine=True), training=_AHEAD, correction=_SINGLE
    ),
}
"""Kernels that are trained longer."""

KERNELS = (
    {
        "default": LogVarianceDISKernel,
        "default on whole grids": partial(
            LogVarianceDISKernel, training=DiffusionTraining(coarse_steps=None)
        ),
        "published control": partial(DiffusionKernel, process="dis-control"),
        "single paths": partial(LogVarianceDISKernel, correction=Correction(num_particles=0)),
        "default, looking ahead": partial(LogVarianceDISKernel, training=DiffusionTraining(look_ahead=True)),
        "default, refined": partial(LogVarianceDISKernel, search=Search(refine=True)),
    }
    | {
        f"dis, {divergence}": _plain("dis", divergence)
        for divergence in ("kl", "log-variance", "sub-trajectory-log-variance", "trajectory-balance")
    }
    | {
        f"{process}, {divergence}, {start}": _plain(process, divergence, **options)
        for process in ("pis-control", "pis", "dis-euler", "dis", "dds-control", "dds")
        for divergence in ("kl", "log-variance")
        for start, options in _STARTS.items()
    }
    | {"dis, sub-trajectory-log-variance, wide": _plain("dis", "sub-trajectory-log-variance", scale=_WIDE)}
    | {
        f"dis, {divergence}, wide, without score": _plain("dis", divergence, scale=_WIDE, score_clip=0.0)
        for divergence in ("log-variance", "sub-trajectory-log-variance")
    }
    | {
        f"{process}, log-variance, wide, clipped at {clip}": _plain(
            process, "log-variance", scale=_WIDE, score_clip=float(clip)
        )
        for process in ("pis-control", "dis-euler")
        for clip in (1, 50, 250)
    }
    | {f"dis, log-variance, {name}": _plain("dis", "log-variance", **_PIECES[name]) for name in _PIECES}
    | {f"{process}, kl": _plain(process, "kl") for process in ("dds", "dds-learned")}
)
"""Kernels by name: functions of the model."""


def _sinkhorn(x, y):
    """The debiased Sinkhorn divergence of squared distances."""
    from ott.tools import sinkhorn_divergence

    found = sinkhorn_divergence.sinkdiv(x=x, y=y, epsilon=None)
    return float(found[0])


def _learned(make, num_warmup, target, seed):
    """Warm up a kernel and draw; modes are judged by proposals with weights, independent on every target."""
    kernel = make(targets.as_model(target))
    mcmc, _, row = timed_chains(kernel, num_warmup, seed)
    found = report(mcmc, num_proposals=NUM_PROPOSALS)
    row |= {
        "seconds": row.pop("warmup_s"),
        "verdict": found.verdict,
        "gradients": found.evaluations.search.plus(found.evaluations.training).gradients,
        "training_steps": found.training_steps,
        "network_evaluations": found.training_steps * kernel.evaluations_per_step,
        "ensemble": found.ensemble,
        "elbo": found.elbo,
        "gap": target.log_z - found.elbo,
        "ess_fraction": found.ess_fraction,
        "khat": found.khat,
        "log_evidence_error": found.log_evidence - target.log_z,
        "log_evidence_se": found.log_evidence_se,
        "acceptance": found.acceptance,
        "max_rhat": found.max_rhat,
    }
    sampler = kernel.sampler(mcmc.last_state)
    if target.sample is not None:
        exact = target.sample(jax.random.key(seed + 2), NUM_EXACT)
        weights = sampler.weigh(jax.random.key(seed + 3), exact)
        row["upper_gap"] = float(jnp.nanmean(weights)) - target.log_z
    fresh = sampler.draw(jax.random.key(seed + 4), NUM_PROPOSALS)
    weight = jax.nn.softmax(jnp.nan_to_num(fresh.log_weight, nan=-jnp.inf))
    draws = mcmc.get_samples()["x"]
    row |= mass_errors(target, fresh.x, weight)
    row |= {f"proposal_{key}": value for key, value in mass_errors(target, fresh.x).items()}
    row["figure"] = partial(_figure, target, found, np.asarray(draws))
    return draws, row


def _nuts(target, seed):
    """Draw by NUTS for as many gradients as are allowed, warm-up among them."""
    model, fields = targets.as_model(target), ("num_steps",)
    pilot, warmup, _ = timed_chains(NUTS(model), 1000, seed, fields=fields)
    per_draw = int(pilot.get_extra_fields()["num_steps"].sum()) / NUM_DRAWS
    num_draws = max(NUM_DRAWS, int((NUM_GRADIENTS - int(warmup["num_steps"].sum())) / per_draw))
    mcmc, warmup, row = timed_chains(NUTS(model), 1000, seed, fields=fields, num_draws=num_draws)
    draws = mcmc.get_samples()["x"]
    spent = int(warmup["num_steps"].sum()) + int(mcmc.get_extra_fields()["num_steps"].sum())
    row |= {"seconds": row.pop("warmup_s") + row["draws_s"], "gradients": spent}
    return draws, row | mass_errors(target, draws)


def _smc(target, seed):
    """Temper as many particles as the allowed gradients pay for."""
    _, pilot = tempered(seed, target, target.spread, NUM_PILOT)
    num_particles = NUM_GRADIENTS * NUM_PILOT // pilot["gradients"]
    x, row = tempered(seed, target, target.spread, num_particles)
    return x, row | mass_errors(target, x)


SAMPLERS = (
    {name: partial(_learned, make, NUM_WARMUP) for name, make in KERNELS.items()}
    | {name: partial(_learned, make, LONG_WARMUP) for name, make in BOUNDS.items()}
    | {"nuts": _nuts, "smc": _smc}
)


def measure(name, sampler, seed):
    """Run one sampler on one problem; returns a row of plain values."""
    target = PROBLEMS[name]()
    draws, row = SAMPLERS[sampler](target, seed)
    row |= {"problem": name, "sampler": sampler}
    if target.sample is not None:
        first, second = jnp.split(target.sample(jax.random.key(seed + 5), 2 * NUM_TRANSPORTED), 2)
        row["sinkhorn"] = _sinkhorn(draws[:: len(draws) // NUM_TRANSPORTED][:NUM_TRANSPORTED], first)
        row["sinkhorn_floor"] = _sinkhorn(second, first)
    return row


def _figure(target, found, draws):
    """Draw the training, the weights, and the draws over the target."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    plots.training_curve(axes[0], found.training)
    plots.log_weights(axes[1], found.log_weight, target.log_z)
    logdensity = jax.jit(jax.vmap(target.logdensity_fn))
    plots.points(axes[2], draws, lambda grid: np.asarray(logdensity(grid)))
    return figure


def _kl_and_log_variance(rows):
    """Gaps of what differs in the divergence alone, by KL and by log-variance."""
    gaps = {(row["problem"], row["seed"], row["sampler"]): row["gap"] for row in rows if "gap" in row}
    others = {key: (*key[:2], key[2].replace(", kl", ", log-variance")) for key in gaps if ", kl" in key[2]}
    return [(gaps[key], gaps[other]) for key, other in others.items() if other in gaps]


def overview(rows):
    """Draw gaps against seconds of warm-up, a panel a problem, and gaps by KL against log-variance."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["problem"] for row in rows))
    pairs = _kl_and_log_variance(rows)
    num_panels = len(names) + bool(pairs)
    figure, axes = plt.subplots(
        1, num_panels, figsize=(3.5 * num_panels, 3.5), layout="constrained", squeeze=False
    )
    if pairs:
        ax, gaps = axes[0, -1], np.maximum(pairs, 1e-4)
        ax.loglog(*gaps.T, "o")
        ax.loglog([gaps.min(), gaps.max()], [gaps.min(), gaps.max()], color="0.7", zorder=0)
        ax.set(xlabel="log Z - ELBO by KL", ylabel="by log-variance", title="same process, same budget")
    for ax, name in zip(axes[0, : len(names)], names, strict=True):
        for sampler in dict.fromkeys(row["sampler"] for row in rows):
            those = [row for row in rows if row["problem"] == name and row["sampler"] == sampler]
            seconds, gaps = ([row[key] for row in those if "gap" in row] for key in ("seconds", "gap"))
            ax.loglog(seconds, np.maximum(gaps, 1e-4), "o", label=sampler)
        ax.set(xlabel="seconds of warm-up", ylabel="log Z - ELBO", title=name)
    axes[0, 0].legend(frameon=False, fontsize="small")
    return figure


COLUMNS = (
    "target",
    "sampler",
    "verdict",
    "seconds (compiling)",
    "gradients",
    "log Z - ELBO",
    "EUBO - log Z",
    "ESS fraction",
    "log Z error",
    "largest mass error (TV)",
    "modes proposed (TV)",
    "Sinkhorn (floor)",
)


def cells(row):
    """Format a row for `COLUMNS`; a dash where there is no such number."""
    optional = lambda text, key: text.format(**row) if key in row else "–"  # noqa: E731
    spread = " ± {log_evidence_se:.4f}" if "log_evidence_se" in row else ""
    return [
        row["problem"],
        row["sampler"] + (", chosen among several" if row.get("ensemble") else ""),
        row.get("verdict", "–"),
        "{seconds:.0f}".format(**row) + (" ({compilation_s:.0f})".format(**row) if "gap" in row else ""),
        "{gradients:,.0f}".format(**row),
        optional("{gap:.3f}", "gap"),
        optional("{upper_gap:.3f}", "upper_gap"),
        optional("{ess_fraction:.3f}", "ess_fraction"),
        optional("{log_evidence_error:+.4f}" + spread, "log_evidence_error"),
        optional("{mass_error:.4f} ({mass_tv:.3f})", "mass_error"),
        optional("{proposal_modes_found:.0f} ({proposal_mass_tv:.3f})", "proposal_mass_tv"),
        optional("{sinkhorn:.3g} ({sinkhorn_floor:.3g})", "sinkhorn"),
    ]
