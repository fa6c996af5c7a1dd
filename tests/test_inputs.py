# SPDX-License-Identifier: Apache-2.0
"""What users pass: it works, or an error names the argument, the value and the cure within five seconds.

Rows that set a run up go as far as the point where the search would start.
"""

import inspect
import pickle
import sys
import time
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.contrib.funsor  # its import is slow, and not what is timed
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from jax import random
from numpyro.distributions.transforms import AffineTransform
from numpyro.infer import (
    MCMC,
    NUTS,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_value,
)
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.mcmc import MCMCKernel

from numpyro_sbtm import (
    Correction,
    DiffusionKernel,
    DiffusionTraining,
    LogVarianceDISKernel,
    SBTMKernel,
    Search,
    TransportTraining,
    learn,
    learn_density,
    plots,
    report,
)
from numpyro_sbtm.checks import number, whole
from numpyro_sbtm.core.maps import Affine
from numpyro_sbtm.networks import denoiser, score_mlp

WORKS = "works"
SECONDS = 5.0

KERNELS = {"dis": LogVarianceDISKernel, "sbtm": SBTMKernel, "diffusion": DiffusionKernel}


# ------------------------------------------------------------------ models
def normal(y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def counts(n):
    rate = numpyro.sample("rate", dist.HalfNormal(1.0))
    numpyro.sample("n", dist.Poisson(rate), obs=n)


def groups(index, y):
    with numpyro.plate("group", len(np.unique(index))):
        effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(effect[index], 1.0), obs=y)


def of_frame(frame):
    normal(jnp.asarray(frame["y"].to_numpy()))


def of_list(several):
    normal(jnp.concatenate(several) if len(several) else None)


def masked(y):
    with numpyro.handlers.mask(mask=~y.mask):
        normal(y.filled(0.0))


def pair():
    numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def positive():
    numpyro.sample("scale", dist.HalfNormal(1.0))


def bounded():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("support", jnp.where(x > 0.0, 0.0, -jnp.inf))


def simplex():
    numpyro.sample("probs", dist.Dirichlet(jnp.ones(3)))


def supports():
    simplex()
    numpyro.sample("rate", dist.Beta(2.0, 3.0).expand([2]).to_event(1))


def empty_site():
    numpyro.sample("nothing", dist.Normal(0.0, 1.0).expand([0]))


def empty_site_beside_another():
    empty_site()
    numpyro.sample("x", dist.Normal(0.0, 1.0))


def returns_a_value():
    return numpyro.sample("x", dist.Normal(0.0, 1.0)) + 1.0


def raises():
    raise KeyError("the user's own")


def loop(times=2):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    _, x = jax.lax.while_loop(lambda c: c[0] < times, lambda c: (c[0] + 1, 2.0 * c[1]), (0, x))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)


def numpy_inside():
    numpyro.factor("f", np.sin(numpyro.sample("x", dist.Normal(0.0, 1.0))))


def branches():
    if numpyro.sample("x", dist.Normal(0.0, 1.0)) > 0:
        numpyro.factor("f", 1.0)


def nan_inside():
    normal(jnp.array([0.0, jnp.nan]))


def impossible():
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("never", -jnp.inf)


def poisson_latent():
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("n", dist.Poisson(3.0))


def bernoulli_latent():
    shift = numpyro.sample("shift", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    numpyro.sample("x", dist.Normal(shift, 1.0))


def delta():
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("d", dist.Delta(1.0))


def subsampled():
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 4, subsample_size=2):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=jnp.zeros(2))


def named_twice():
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(0.0, 1.0))


def many():
    numpyro.sample("x", dist.Normal(0.0, 1.0).expand([40]).to_event(1))


def energy(z):
    return sum(jnp.sum((leaf - 1.0) ** 2) for leaf in jax.tree.leaves(z))


def looping_energy(z):
    return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 2.0 * c[1]), (0, jnp.sum(z**2)))[1]


# ------------------------------------------------------------------ how
class Ready(Exception):
    """The search would start."""


def build(kind="dis", *args, **options):
    if not args and not {"model", "potential_fn"} & options.keys():
        options["model"] = normal
    return helpers.build(KERNELS[kind], *args, **options)


def set_up(kernel, *args, init_params=None, chains=1, warmup=4, **kwargs):
    """Run a kernel up to its search."""
    method = kernel._settings.method

    class Stopping:
        always_trains, shortens = method.always_trains, method.shortens

        def check(self, logdensity_fn, x):
            method.check(logdensity_fn, x)
            raise Ready

    kernel._settings = kernel._settings._replace(method=Stopping())
    chain_method = "vectorized" if chains > 1 else "sequential"
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=2,
        num_chains=chains,
        chain_method=chain_method,
        progress_bar=False,
    )
    with pytest.raises(Ready):
        mcmc.run(random.key(0), *args, init_params=init_params, **kwargs)


def on_model(model, *args, kind="dis", options=(), **kwargs):
    set_up(build(kind, model, **dict(options)), *args, **kwargs)


def without_search(model):
    MCMC(build("dis", model), num_warmup=1, num_samples=2, progress_bar=False).run(random.key(0))


def on_potential(potential_fn, init_params, kind="dis", options=(), **kwargs):
    set_up(build(kind, potential_fn=potential_fn, **dict(options)), init_params=init_params, **kwargs)


class NotCallable:
    pass


# ------------------------------------------------------------------ the table: name, how, outcome
def option(name, value, *outcome, kind="dis", **others):
    outcome = outcome or (WORKS,)
    shown = getattr(value, "__name__", repr(value)).replace("\n", "")[:40]
    return f"{kind}: {name}={shown}", partial(build, kind, **{name: value}, **others), *outcome


def bad(name, value, error, message, kind="dis", **others):
    return option(name, value, (error, message), kind=kind, **others)


def numbers():
    """What every option that is a number refuses, and what it takes."""
    counted = {
        "dis": ["num_steps", "num_paths", "num_times", "coarse_steps", "patience"],
        "sbtm": ["num_particles", "num_maps", "num_updates", "batch_size", "max_rounds", "first_updates"],
        "diffusion": ["num_updates", "buffer_size", "exploration_steps"],
    }
    counted["dis"] += ["block_size", "steps_per_draw", "num_starts", "num_prior_draws", "first_particles"]
    counted["sbtm"] += ["num_probes"]
    counted["dis"] += [
        "num_moves",
        "num_checked",
        "mixture_rounds",
        "max_mixture_dim",
        "max_dense_dim",
        "rank",
    ]
    for kind, names in counted.items():
        for name in names:
            for value in (2.5, 64.0, True, "8", float("nan"), -1):
                error = ValueError if value == -1 else TypeError
                yield bad(name, value, error, f"`{name}` must be a whole number from .*, got", kind)
            yield bad(name, 10**12, ValueError, f"`{name}` must be a whole number from .*, got 10000", kind)
    real = {
        "dis": ["learning_rate", "scale", "target_acceptance"],
        "sbtm": ["learning_rate", "scale", "duration", "tolerance", "max_stretch"],
        "diffusion": ["exploration", "trust_region", "score_clip", "average_decay", "good_enough"],
    }
    real["diffusion"] += ["backward_share"]
    for kind, names in real.items():
        for name in names:
            for value in (float("nan"), float("inf"), 1e9, -1.0):
                yield bad(name, value, ValueError, f"`{name}` must be a number .*, got {value}", kind)
            for value in (True, "0.1", 1j, np.ones(2)):
                yield bad(name, value, TypeError, f"`{name}` must be a number .*, got", kind)


OPTIONS = [
    option("width", np.int64(8)),
    option("width", jnp.asarray(8)),
    option("learning_rate", np.float32(1e-3)),
    option("learning_rate", jnp.asarray(1e-3)),
    option("learning_rate", 1),
    *(bad(name, "yes", TypeError, f"`{name}` must be True or False", "sbtm") for name in ("heun", "quasi")),
    bad("preconditioned", 1, TypeError, "`preconditioned` must be True or False, got 1", "sbtm"),
    bad("quasi", True, ValueError, "`quasi` asks for one normal distribution", "sbtm"),
    bad("heun", True, ValueError, "`heun` asks for a flow.*noisy=False", "sbtm", noisy=True),
    bad("preconditioned", True, ValueError, "asks for a flow.*noisy=False", "sbtm", noisy=True),
    option("shared", np.bool_(False)),
    option("always", True),
    option("patience", None),
    option("coarse_steps", 64),  # more than there are steps: all of them
    option("num_steps", 4),  # fewer than the times and the coarse steps
    option("target_acceptance", None),
    option("annealing", "geometric", kind="sbtm"),
    option("noisy", True, kind="sbtm"),
    option("init_strategy", init_to_median),
    option("init_strategy", init_to_value(values={"mu": 0.0})),
    option("refine", True),
    option("precondition", None),
    option("precondition", AutoNormal(normal)),
    option("precondition", ([0, 1], [[1, 0], [1, 2]])),
    bad(
        "learning_rate",
        1e6,
        ValueError,
        "`learning_rate` must be a number above 0 and at most 1, got 1000000",
    ),
    bad("learning_rate", 0.0, ValueError, "`learning_rate` must be a number above 0 and at most 1, got 0.0"),
    bad("scale", 1e30, ValueError, "`scale` must be a number from 1e-06 to 1e.06, got 1e.30"),
    bad("scale", 1e-30, ValueError, "`scale` must be a number from 1e-06 to 1e.06, got 1e-30", "sbtm"),
    bad(
        "duration",
        1e30,
        ValueError,
        "`duration` must be a number above 0 and at most 1000, got 1e.30",
        "sbtm",
    ),
    bad("exploration", 1e9, ValueError, "`exploration` must be a number from 0 to 10, got 1000", "diffusion"),
    bad(
        "target_acceptance",
        1.0,
        ValueError,
        "`target_acceptance` must be a number above 0 and below 1, got 1.0",
    ),
    bad("width", 7, ValueError, "`width` must be even, .*, got 7"),
    bad("network", "mlp", TypeError, "`network` must be a function, got 'mlp'.*partial.denoiser"),
    bad("network", 64, TypeError, "`network` must be a function, got 64.*partial.score_mlp", "sbtm"),
    option("network", partial(denoiser, 8)),
    option("network", score_mlp(8), kind="sbtm"),
    bad("optimizer", "adam", TypeError, "`optimizer` must be an optax optimiser.*got 'adam'"),
    option("optimizer", optax.sgd(1e-3)),
    option("optimizer", optax.adam, kind="sbtm"),
    bad("search", "quick", TypeError, "`search` must be a `Search`, got 'quick'"),
    option("search", Search.quick()),
    bad("num_starts", 3, ValueError, "`num_starts` must be even, .*, got 3"),
    (
        "refinement without particles",
        lambda: Search(num_particles=0, refine=True),
        (ValueError, "`refine` fits a map to particles, but `num_particles` is 0. Pass 4096"),
    ),
    bad("refine", "yes", TypeError, "`refine` must be True or False, got 'yes'"),
    bad("training", TransportTraining(), TypeError, "`training` must be a `DiffusionTraining`, got"),
    bad("training", {}, TypeError, "`training` must be a `TransportTraining`, got {}", "sbtm"),
    bad("correction", "metropolis", TypeError, "`correction` must be a `Correction`, got 'metropolis'"),
    bad("smc_particles", 2.5, TypeError, "`num_particles` must be a whole number from 0 .*, got 2.5"),
    bad("smc_particles", 10**12, ValueError, "`num_particles` must be a whole number from 0 .*, got 10000"),
    bad("num_paths", 1, ValueError, "`num_paths` must be a whole number from 2 to .*, got 1"),
    bad("num_particles", 2, ValueError, "`num_particles` must be a whole number from 3 to .*, got 2", "sbtm"),
    bad("steps_per_draw", 0, ValueError, "`steps_per_draw` must be a whole number from 1 to .*, got 0"),
    bad("always", None, TypeError, "`always` must be True or False, got None"),
    bad("shared", "yes", TypeError, "`shared` must be True or False, got 'yes'"),
    bad("shared", 1, TypeError, "`shared` must be True or False, got 1"),
    bad(
        "forward_mode_differentiation",
        None,
        TypeError,
        "`forward_mode_differentiation` must be True or False",
    ),
    bad("look_ahead", "no", TypeError, "`look_ahead` must be True or False, got 'no'"),
    bad("solved_output", 0, TypeError, "`solved_output` must be True or False, got 0", "sbtm"),
    bad("noisy", "auto", TypeError, "`noisy` must be True or False, got 'auto'", "sbtm"),
    bad("metropolis", None, TypeError, "`metropolis` must be True or False, got None"),
    bad("local_kernel", "gibbs", ValueError, "`local_kernel` must be one of 'auto', 'hmc', .*, got 'gibbs'"),
    bad("local_kernel", ["hmc"], ValueError, "`local_kernel` must be one of .*, got .'hmc'."),
    bad("process", "ddpm", ValueError, "`process` must be one of 'dis', .*, got 'ddpm'", "diffusion"),
    bad(
        "divergence", "hellinger", ValueError, "`divergence` must be one of .*, got 'hellinger'", "diffusion"
    ),
    bad("annealing", "linear", ValueError, "`annealing` must be one of 'adaptive', .*, got 'linear'", "sbtm"),
    bad(
        "init_strategy",
        "median",
        TypeError,
        "`init_strategy` must be a function, got 'median'.*init_to_median",
    ),
    bad("init_strategy", {"mu": 0.0}, TypeError, "`init_strategy` must be a function, got .'mu': 0.0."),
    # options that do not go together
    bad(
        "process",
        "pis",
        ValueError,
        "`look_ahead` asks for the `process` 'dis', got 'pis'",
        "diffusion",
        look_ahead=True,
    ),
    # tied to their grids, they train on all of their steps
    option("process", "pis", kind="diffusion", coarse_steps=8),
    option("divergence", "sub-trajectory-log-variance", kind="diffusion", coarse_steps=8),
    bad("process", "dds-learned", ValueError, "'dds-learned' .*not sound.*Take 'kl'", "diffusion"),
    option("process", "dds-learned", kind="diffusion", divergence="kl"),
    bad("divergence", "kl", ValueError, "'kl': `exploration` draws paths", "diffusion", exploration=0.1),
    bad("divergence", "kl", ValueError, "'kl': `buffer_size` is 64, .*Pass 0", "diffusion", buffer_size=64),
    bad("divergence", "kl", ValueError, "'kl': .*`num_updates` must be 1, got 2", "diffusion", num_updates=2),
    bad("trust_region", 0.5, ValueError, "`trust_region` .*several updates.* got 0.5", "diffusion"),
    option("trust_region", 0.5, kind="diffusion", num_updates=2),
    bad(
        "num_paths",
        20,
        ValueError,
        "`num_paths` must be a multiple of the divergence's 16 paths per start, got 20",
        "diffusion",
        divergence="log-variance-per-start",
    ),
    bad(
        "annealing",
        "geometric",
        ValueError,
        "`annealing` is 'geometric' .* but `noisy` is True",
        "sbtm",
        noisy=True,
    ),
    # options of others
    bad(
        "target_accept_prob",
        0.9,
        TypeError,
        "has no option `target_accept_prob`, got 0.9.*NUTS's.*`target_acceptance`",
    ),
    bad("target_accept_prob", 0.9, TypeError, "^SBTMKernel has no option", "sbtm"),
    bad("dense_mass", True, TypeError, "no option `dense_mass`, got True.*NUTS's.*`precondition"),
    bad("max_tree_depth", 10, TypeError, "no option `max_tree_depth`, got 10.*NUTS's"),
    bad("step_size", 0.1, TypeError, "no option `step_size`, got 0.1.*NUTS's.*`local_kernel`"),
    bad("num_chains", 4, TypeError, "no option `num_chains`, got 4.*MCMC"),
    bad("divergence", "kl", TypeError, "no option `divergence`, got 'kl'.*`DiffusionKernel`"),
    bad("num_step", 3, TypeError, "no option `num_step`, got 3. Is `num_steps` of `training` meant"),
    bad("temperature", 3, TypeError, "no option `temperature`, got 3. It has model, .*init_strategy"),
    *(
        (
            f"an option of {group}",
            lambda name=name: LogVarianceDISKernel(normal, **{name: 3}),
            (TypeError, f"no option `{name}`, got 3. It is one of `{group}`: pass `{group}=.*{name}=..."),
        )
        for group, name in (("training", "num_paths"), ("correction", "block_size"), ("search", "rank"))
    ),
    (
        "an option that was renamed",
        lambda: SBTMKernel(normal, smc_particles=3),
        (TypeError, "no option `smc_particles`, got 3. It is `Correction`'s: .*num_particles"),
    ),
    (
        "an option of no group",
        lambda: Search(num_scouts=3),
        (TypeError, "^Search has no option `num_scouts`, got 3. Is `num_starts` meant"),
    ),
]

PRECONDITIONS = [
    bad(
        "precondition",
        "full",
        ValueError,
        "`precondition` must describe a whitening, got 'full'. Pass 'auto'",
    ),
    bad("precondition", "refined", ValueError, r"got 'refined'. Pass `search=Search\(refine=True\)`"),
    option("precondition", Affine(jnp.zeros(1), jnp.eye(1))),
    option("precondition", AffineTransform(0.0, 2.0)),
    bad("precondition", (np.zeros(2),), ValueError, "`precondition` must describe a whitening"),
    bad(
        "precondition", AutoNormal, ValueError, r"`precondition` .*got <class .*Pass .*`AutoNormal\(model\)`"
    ),
    bad(
        "precondition", (np.zeros(2), np.eye(3)), ValueError, r"`precondition` has shapes \(2,\) and \(3, 3\)"
    ),
    bad("precondition", (0.0, 1.0), ValueError, r"`precondition` has shapes \(\) and \(\)"),
    bad("precondition", (np.zeros(2), np.ones((2, 2))), ValueError, "lower triangular .* got"),
    bad("precondition", (np.zeros(2), -np.eye(2)), ValueError, "positive diagonal.*Cholesky"),
    bad("precondition", (np.zeros(2), np.zeros((2, 2))), ValueError, "positive diagonal.*Cholesky"),
    bad(
        "precondition",
        (np.full(1, np.nan), np.eye(1)),
        ValueError,
        "`precondition` must be finite, got `loc` .*nan",
    ),
    bad(
        "precondition",
        (np.zeros(1), np.full((1, 1), np.nan)),
        ValueError,
        "`precondition` must be finite.*nan",
    ),
    bad(
        "precondition",
        (np.zeros(1), np.full((1, 1), np.inf)),
        ValueError,
        "`precondition` must be finite.*inf",
    ),
    bad("precondition", (["a"], [["b"]]), ValueError, "`precondition` must hold numbers"),
    bad("precondition", (np.zeros(1), 1j * np.eye(1)), ValueError, "`precondition` must hold numbers"),
    # all draws would be the same
    bad(
        "precondition",
        (np.zeros(1), 1e-30 * np.eye(1)),
        ValueError,
        "`precondition` .*float32 cannot resolve.*x64",
    ),
    bad(
        "precondition",
        (np.full(1, 1e9), np.eye(1)),
        ValueError,
        "`precondition` .*float32 cannot resolve.*Rescale",
    ),
    bad(
        "precondition", (np.zeros(1), 1e30 * np.eye(1)), ValueError, "`precondition` .*float32 cannot resolve"
    ),
    (
        "a guide without a model",
        lambda: LogVarianceDISKernel(potential_fn=energy, precondition=AutoNormal(normal)),
        (ValueError, "`precondition` is a guide, AutoNormal, which needs a `model`.*Pass 'auto'"),
    ),
    (
        "a guide of another model",
        lambda: LogVarianceDISKernel(positive, precondition=AutoNormal(returns_a_value)).init(
            random.key(0), 4
        ),
        (ValueError, r"`precondition`, AutoNormal, draws x, but not scale .*Pass `AutoNormal\(model\)`"),
    ),
    (
        "a precondition of another dimension",
        lambda: build(precondition=(np.zeros(3), np.eye(3))).init(random.key(0), 4),
        (ValueError, "`precondition` is for dimension 3, but .* dimension 2"),
    ),
]

MODELS = [
    ("no model", LogVarianceDISKernel, (ValueError, "Only one of `model` or `potential_fn`.*got neither")),
    (
        "a model and a potential",
        lambda: SBTMKernel(normal, energy),
        (ValueError, "Only one of `model` or `potential_fn`.*got both"),
    ),
    (
        "a model's name",
        lambda: build("dis", "normal"),
        (TypeError, "`model` must be a function, got 'normal'"),
    ),
    (
        "a kernel as model",
        lambda: build("sbtm", NUTS(normal)),
        (TypeError, "`model` must be a NumPyro model, got the NUTS that runs one"),
    ),
    (
        "a run as model",
        lambda: build("dis", MCMC(NUTS(normal), num_warmup=1, num_samples=1)),
        (TypeError, "`model` must be a NumPyro model, got the MCMC that runs one"),
    ),
    (
        "an instance as model",
        lambda: build("dis", NotCallable()),
        (TypeError, "`model` must be a function, got"),
    ),
    ("what a model returns", lambda: build("dis", 3.0), (TypeError, "`model` must be a function, got 3.0")),
    (
        "an array as potential",
        lambda: build(potential_fn=np.zeros(3)),
        (TypeError, "`potential_fn` must be a function, got array"),
    ),
    ("a partial as model", lambda: build("dis", partial(normal, 1.0)), WORKS),
    ("constrained sites", partial(on_model, supports), WORKS),
    ("a model that returns", partial(on_model, returns_a_value), WORKS),
    ("a model that raises", partial(on_model, raises), (KeyError, "the user's own")),
    ("an empty site alone", partial(without_search, empty_site), WORKS),
    ("an empty site beside another", partial(on_model, empty_site_beside_another), WORKS),
    ("a discrete latent that is summed out", partial(on_model, bernoulli_latent), WORKS),
    ("a discrete latent that is not", partial(on_model, poisson_latent), (RuntimeError, "Poisson .* site n")),
    ("a delta", partial(on_model, delta), (ValueError, "'d' has a delta.*use `numpyro.deterministic`")),
    ("a subsample", partial(on_model, subsampled), (ValueError, "do not support subsampling")),
    ("two sites of one name", partial(on_model, named_twice), (AssertionError, "unique names but got `x`")),
    (
        "numpy of a latent value",
        partial(on_model, numpy_inside),
        (TypeError, "`model` uses a value.*jax.numpy"),
    ),
    (
        "a branch on a latent value",
        partial(on_model, branches),
        (TypeError, "`model` uses a value.*jnp.where"),
    ),
    ("NaN inside", partial(on_model, nan_inside), (RuntimeError, "Cannot find valid.*NaN.*init_strategy")),
    ("no finite density", partial(on_model, impossible), (RuntimeError, "Cannot find valid.*init_strategy")),
    (
        "while_loop",
        partial(on_model, loop),
        (ValueError, "`model` has a loop.*forward_mode_differentiation=True"),
    ),
    ("while_loop, forward", partial(on_model, loop, options={"forward_mode_differentiation": True}), WORKS),
    (
        "too few arguments",
        partial(on_model, counts),
        (TypeError, "missing 1 required positional argument: 'n'"),
    ),
    ("too many arguments", partial(on_model, normal, 1.0, 2.0), (TypeError, "takes from 0 to 1 positional")),
    ("an unknown keyword", partial(on_model, normal, x=1.0), (TypeError, "unexpected keyword argument 'x'")),
    *(
        (f"start by {name.__name__}", partial(on_model, positive, options={"init_strategy": name}), WORKS)
        for name in (init_to_feasible, init_to_mean, init_to_median, init_to_sample)
    ),
    (
        "start at a value",
        partial(on_model, positive, options={"init_strategy": init_to_value(values={"scale": 2.0})}),
        WORKS,
    ),
    (
        "particles for too many dimensions",
        partial(on_model, pair, kind="sbtm", options={"num_particles": 4}),
        (ValueError, "`num_particles` must exceed the dimension 3 by two or more.*got 4"),
    ),
    (
        "annealing in many dimensions",
        partial(on_model, many, kind="sbtm", options={"annealing": "geometric"}),
        (ValueError, "`annealing` is 'geometric' .*in 40 dimensions.*Pass `noisy=False`"),
    ),
    (
        "no warm-up",
        partial(on_model, normal, warmup=0),
        (ValueError, "`num_warmup` must be at least 1, got 0.*post_warmup_state"),
    ),
    (
        "half a warm-up step",
        partial(on_model, normal, warmup=2.5),
        (ValueError, "num_warmup must be a nonneg"),
    ),
]

SERIES = pd.Series([0.0, 1.0])
DATA = [
    ("an array", partial(on_model, normal, np.array([0.0, 1.0])), WORKS),
    ("an array of JAX", partial(on_model, normal, jnp.array([0.0, 1.0])), WORKS),
    ("integers", partial(on_model, normal, np.array([0, 1])), WORKS),
    ("truth values", partial(on_model, normal, np.array([True, False])), WORKS),
    ("a number", partial(on_model, normal, 1.0), WORKS),
    ("none", partial(on_model, normal, None), WORKS),
    ("no rows", partial(on_model, normal, np.zeros(0)), WORKS),
    ("float64", partial(on_model, normal, np.ones(3)), WORKS),
    ("a keyword", partial(on_model, normal, y=np.ones(3)), WORKS),
    ("np.unique of an argument", partial(on_model, groups, np.array([0, 1, 1]), np.zeros(3)), WORKS),
    (
        "a data frame that the model reads",
        partial(on_model, of_frame, pd.DataFrame({"y": [0.0, 1.0]})),
        WORKS,
    ),
    ("a list of arrays that the model reads", partial(on_model, of_list, [np.ones(2), np.ones(3)]), WORKS),
    (
        "a masked array that the model reads",
        partial(on_model, masked, np.ma.masked_array([0.0, 9.0], [0, 1])),
        WORKS,
    ),
    (
        "a list",
        partial(on_model, normal, [0.0, 1.0]),
        (TypeError, "`model` failed.*`y`, which is a list: .*jnp.asarray"),
    ),
    (
        "a list of integers",
        partial(on_model, counts, [0, 1]),
        (TypeError, "`n`, which is a list: .*jnp.asarray"),
    ),
    ("a tuple", partial(on_model, normal, (0.0, 1.0)), (TypeError, "`y`, which is a tuple: .*jnp.asarray")),
    ("a range", partial(on_model, normal, range(3)), (TypeError, "`y`, which is a range: .*jnp.asarray")),
    (
        "a set",
        partial(on_model, normal, {0.0, 1.0}),
        (TypeError, r"`y`, which is a set: .*jnp.asarray\(list"),
    ),
    (
        "a list, by keyword",
        partial(on_model, normal, y=[0.0]),
        (TypeError, "`y`, which is a list: .*jnp.asarray"),
    ),
    ("a pandas Series", partial(on_model, normal, SERIES), (TypeError, "`y`, which is a Series: .*to_numpy")),
    (
        "a pandas DataFrame",
        partial(on_model, normal, SERIES.to_frame()),
        (TypeError, "`y`, which is a DataFrame: "),
    ),
    (
        "missing integers",
        partial(on_model, normal, pd.Series([1, None], dtype="Int64")),
        (TypeError, "`y`, .* Series"),
    ),
    (
        "a list with a gap",
        partial(on_model, normal, [0.0, None]),
        (TypeError, "`y`, which is a list of .*encode"),
    ),
    ("strings", partial(on_model, normal, ["a", "b"]), (TypeError, "`y`, which is a list of .*encode it")),
    (
        "an array of strings",
        partial(on_model, normal, np.array(["a"])),
        (TypeError, "`y`, .*dtype <U1: encode it"),
    ),
    (
        "an array of objects",
        partial(on_model, normal, np.array([1.0, None])),
        (TypeError, "`y`, .*dtype object"),
    ),
    (
        "dates",
        partial(on_model, normal, np.array(["2020-01-01"], "M8[D]")),
        (TypeError, "`y`, .*dtype datetime64"),
    ),
    (
        "complex numbers",
        partial(on_model, normal, np.array([1j])),
        (TypeError, "`y`, which is complex: .*real"),
    ),
    (
        "a masked array",
        partial(on_model, normal, np.ma.masked_array([0.0, 9.0], [0, 1])),
        (TypeError, "`y`, which is a masked array: .*numpyro.handlers.mask"),
    ),
    (
        "NaN",
        partial(on_model, normal, np.array([0.0, np.nan])),
        (RuntimeError, r"`y` holds nan at \[1\]: .*mask"),
    ),
    (
        "infinity",
        partial(on_model, normal, jnp.array([jnp.inf])),
        (RuntimeError, r"`y` holds inf at \[0\]: .*mask"),
    ),
    ("one NaN", partial(on_model, normal, float("nan")), (RuntimeError, "`y` is nan: .*mask")),
    (
        "too large for float32",
        partial(on_model, normal, np.array([1e300])),
        (RuntimeError, r"`y` holds 1e.300 at \[0\]"),
    ),
    (
        "an impossible count",
        partial(on_model, counts, np.array([-1])),
        (RuntimeError, "Cannot find valid.*supports"),
    ),
    (
        "integers beyond int32",
        partial(on_model, counts, np.array([1, 2**40])),
        (ValueError, "`n` holds 1099511627776, which int32 does not.*jax_enable_x64"),
    ),
    ("a large integer", partial(on_model, normal, 10**30), (TypeError, "`y`, which is 1000.*pass a float")),
]

PAIR = {"a": np.zeros(()), "b": np.zeros(2)}
STARTS = [
    ("unconstrained values", partial(on_model, pair, init_params=PAIR), WORKS),
    ("Python's numbers", partial(on_model, positive, init_params={"scale": 1}), WORKS),
    (
        "values of two chains",
        partial(on_model, pair, init_params={"a": np.zeros(2), "b": np.zeros((2, 2))}, chains=2),
        WORKS,
    ),
    (
        "values of another number of chains",
        partial(on_model, positive, init_params={"scale": np.zeros(3)}, chains=2),
        (ValueError, "same leading dimension as `num_chains`"),
    ),
    (
        "a list",
        partial(on_model, pair, init_params=[0.0, np.zeros(2)]),
        (TypeError, "`init_params` must be a dict .*got"),
    ),
    (
        "an array",
        partial(on_model, positive, init_params=np.zeros(1)),
        (TypeError, "`init_params` must be a dict .*unconstrain_fn"),
    ),
    (
        "NaN",
        partial(on_model, pair, init_params=PAIR | {"a": np.nan}),
        (ValueError, "`init_params` must be finite, got .*nan.* for 'a'"),
    ),
    (
        "infinity",
        partial(on_model, pair, init_params=PAIR | {"b": np.full(2, np.inf)}),
        (ValueError, "`init_params` must be finite.*'b'"),
    ),
    (
        "another shape",
        partial(on_model, pair, init_params=PAIR | {"b": np.zeros(3)}),
        (ValueError, "`init_params` .* expected shapes .*unconstrain_fn"),
    ),
    (
        "a site missing",
        partial(on_model, pair, init_params={"a": 0.0}),
        (ValueError, "`init_params` .* expected shapes .*got"),
    ),
    (
        "a site too many",
        partial(on_model, pair, init_params=PAIR | {"c": 0.0}),
        (ValueError, "`init_params` .* expected shapes"),
    ),
    (
        "no site",
        partial(on_model, pair, init_params={}),
        (ValueError, "`init_params` .* expected shapes .*got {}"),
    ),
    (
        "a constrained value",
        partial(on_model, simplex, init_params={"probs": np.ones(3) / 3}),
        (ValueError, "`init_params` .* unconstrained .*unconstrain_fn"),
    ),
    (
        "out of the support",
        partial(on_model, bounded, init_params={"x": -1.0}),
        (ValueError, "`init_params` must have a finite density.*inf"),
    ),
]

POTENTIALS = [
    ("of an array", partial(on_potential, energy, np.zeros(2)), WORKS),
    ("of integers", partial(on_potential, energy, np.zeros(2, int)), WORKS),
    ("of a number", partial(on_potential, energy, 0.0), WORKS),
    ("of a dict", partial(on_potential, energy, {"a": np.zeros(2), "b": 0.0}), WORKS),
    ("of a tuple", partial(on_potential, energy, (np.zeros(2), np.zeros((2, 3)))), WORKS),
    ("of a list", partial(on_potential, energy, [np.zeros(2), 0.0]), WORKS),
    ("of two chains", partial(on_potential, energy, {"a": np.zeros((2, 3))}, chains=2), WORKS),
    (
        "with a loop, forward",
        partial(on_potential, looping_energy, np.zeros(2), options={"forward_mode_differentiation": True}),
        WORKS,
    ),
    (
        "with a loop",
        partial(on_potential, looping_energy, np.zeros(2)),
        (ValueError, "`potential_fn` has a loop.*forward_mode_differentiation=True"),
    ),
    (
        "without a start",
        partial(on_potential, energy, None),
        (ValueError, "`init_params` must be provided with `potential_fn`"),
    ),
    (
        "without a parameter",
        partial(on_potential, energy, {}, kind="sbtm"),
        (ValueError, "`init_params` is empty"),
    ),
    ("of no size", partial(on_potential, energy, np.zeros(0)), (ValueError, "`init_params` is empty")),
    (
        "at NaN",
        partial(on_potential, energy, np.array([np.nan])),
        (ValueError, "`potential_fn` must be finite at `init_params`, got .nan.*Pass"),
    ),
    (
        "at an infinite density",
        partial(on_potential, lambda z: jnp.sum(1 / z), np.zeros(1)),
        (ValueError, "`potential_fn` must be finite at `init_params`, got .inf"),
    ),
    (
        "of shape [1]",
        partial(on_potential, lambda z: z**2, np.zeros(1)),
        (TypeError, r"`potential_fn` must return one real number.*shape \(1,\).*its only entry"),
    ),
    (
        "of a vector's shape",
        partial(on_potential, lambda z: z**2, np.zeros(3)),
        (TypeError, r"`potential_fn` .*shape \(3,\).*Take its sum"),
    ),
    (
        "that is complex",
        partial(on_potential, lambda z: jnp.sum(z) + 0j, np.zeros(3)),
        (TypeError, "`potential_fn` .*dtype complex64.*real part"),
    ),
    (
        "that is an integer",
        partial(on_potential, lambda z: jnp.sum(z).astype(int), np.zeros(3)),
        (TypeError, "`potential_fn` .*dtype int32.*floats"),
    ),
    (
        "that is True",
        partial(on_potential, lambda z: jnp.all(z > 0), np.zeros(3)),
        (TypeError, "`potential_fn` .*dtype bool.*floats"),
    ),
    (
        "that is None",
        partial(on_potential, lambda z: None, np.zeros(3)),
        (TypeError, "`potential_fn` must return one real number.*got None"),
    ),
    (
        "that is a pair",
        partial(on_potential, lambda z: (energy(z), z), np.zeros(3)),
        (TypeError, "`potential_fn` must return .*got a tuple"),
    ),
    (
        "made a float by Python",
        partial(on_potential, lambda z: float(jnp.sum(z)), np.zeros(3)),
        (TypeError, "`potential_fn` uses a value.*jax.numpy"),
    ),
    (
        "made by NumPy",
        partial(on_potential, lambda z: np.sin(z[0]), np.zeros(3)),
        (TypeError, "`potential_fn` uses a value.*jax.numpy"),
    ),
    ("that fails", partial(on_potential, lambda z: z["b"], {"a": np.zeros(3)}), (KeyError, "b")),
]

OTHERS = [
    (
        "report(None)",
        partial(report, None),
        (TypeError, "`mcmc` must be the `numpyro.infer.MCMC`.*got None.*report.mcmc"),
    ),
    ("report(kernel)", lambda: report(build()), (TypeError, "`mcmc` must be the `numpyro.infer.MCMC`")),
    (
        "report(samples)",
        partial(report, {"mu": np.zeros(3)}),
        (TypeError, "`mcmc` must be the `numpyro.infer.MCMC`"),
    ),
    (
        "report of NUTS",
        lambda: report(MCMC(NUTS(normal), num_warmup=1, num_samples=1)),
        (TypeError, "`mcmc` must run a kernel of numpyro_sbtm, got NUTS"),
    ),
    (
        "report before the run",
        lambda: report(MCMC(build(), num_warmup=1, num_samples=1)),
        (RuntimeError, "`mcmc` has not been run: call"),
    ),
    ("sample before init", lambda: build().sample(None, (), {}), (TypeError, "`state` must .*got None")),
    (
        "sampler before the run",
        lambda: build().sampler(None),
        (TypeError, "`state` must .*got None.*mcmc.last_state"),
    ),
    (
        "learning without steps",
        lambda: learn(random.key(0), normal, num_steps=0),
        (ValueError, "`num_steps` .*, got 0"),
    ),
    (
        "learning half a step",
        lambda: learn(random.key(0), normal, num_steps=2.5),
        (TypeError, "`num_steps` .*, got 2.5"),
    ),
    (
        "learning without a key",
        lambda: learn(0, normal),
        (TypeError, "`key` must be a random key, got 0"),
    ),
    (
        "learning a density from a point",
        lambda: learn_density(random.key(0), lambda x: 0.0, np.zeros(2)),
        (ValueError, "`points` must have shape .*got .2.*point.None."),
    ),
    (
        "learning a density from nowhere",
        lambda: learn_density(random.key(0), lambda x: jnp.sum(x) / 0.0, np.zeros((3, 2))),
        (ValueError, "`points` must have one of finite density.*none of the 3"),
    ),
    (
        "learning a density by name",
        lambda: learn_density(random.key(0), lambda x: 0.0, np.zeros((3, 2)), method="dis"),
        (TypeError, "`method` must be a `Diffusion` or a `Transport`, got 'dis'"),
    ),
]

TABLE = [
    (f"{section}: {name}", how, outcome)
    for section, rows in {
        "number": numbers(),
        "option": OPTIONS,
        "precondition": PRECONDITIONS,
        "model": MODELS,
        "data": DATA,
        "start": STARTS,
        "potential": POTENTIALS,
        "other": OTHERS,
    }.items()
    for name, how, outcome in rows
]


@pytest.mark.filterwarnings("ignore:Out-of-support values:UserWarning")  # NumPyro's, for NaN
@pytest.mark.filterwarnings("ignore:Site y. Out-of-support values:UserWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # JAX's
@pytest.mark.filterwarnings("ignore:Some algorithms will automatically enumerate:FutureWarning")
@pytest.mark.parametrize(("how", "outcome"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_inputs(how, outcome):
    if outcome == WORKS:
        how()
        return
    error, message = outcome
    start = time.process_time()  # what other processes take is not counted
    with pytest.raises(error, match=f"(?s){message}") as found:
        how()
    assert time.process_time() - start < SECONDS
    assert found.type is error


@pytest.fixture(scope="module")
def finished():
    """A run end to end, of a model that needs its arguments themselves."""
    sizes = {"num_particles": 64, "num_maps": 2, "num_updates": 1, "batch_size": 32, "width": 8}
    kernel = helpers.build(SBTMKernel, groups, **sizes, block_size=32, precondition=None, local_kernel=None)
    mcmc = MCMC(kernel, num_warmup=2, num_samples=4, progress_bar=False)
    mcmc.run(random.key(0), np.array([0, 1, 1]), np.zeros(3))
    return mcmc


def test_what_a_run_can_do_with_its_arguments_so_can_report(finished):
    assert finished.get_samples()["effect"].shape == (4, 2)
    assert report(finished, num_proposals=100).log_weight.shape == (100,)


def test_a_model_that_needs_its_data_is_weighed_for_those_that_are_given(finished):
    kernel, state, key = finished.sampler, finished.last_state, random.key(0)
    zeros, ones = (
        kernel.sampler(state, (np.array([0, 1, 1]), y)).draw(key, 5) for y in (np.zeros(3), np.ones(3))
    )
    np.testing.assert_allclose(ones.x, zeros.x, rtol=1e-5)
    ratio = zeros.x @ np.array([1.0, 2.0]) - 1.5  # of N(1; effect, 1) over N(0; effect, 1), three times
    np.testing.assert_allclose(ones.logdensity - zeros.logdensity, ratio, rtol=1e-4, atol=1e-5)


def test_data_frames_that_a_model_reads_reach_proposals(finished):
    kernel = finished.sampler.wrap_model(of_frame)
    arguments = (pd.DataFrame({"y": [0.0, 1.0]}),)
    state = kernel.init(random.key(0), 2, model_args=arguments)
    assert kernel.sampler(state, arguments).draw(random.key(1), 3).x.shape == (3, 1)


def test_proposals_and_weights_check_their_arguments(finished):
    kernel, state, key = finished.sampler, finished.last_state, random.key(0)
    sampler = kernel.sampler(state, finished._args, finished._kwargs)
    for num, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"`n` must be a whole number .*, got {num}"):
            sampler.draw(key, num)
    for x in (np.ones(2), np.ones((3, 3)), np.ones((0, 2)), 1.0):
        with pytest.raises(ValueError, match=r"`x` must be points .*\[n, 2\], got shape .*`draw`"):
            sampler.weigh(key, x)
    for wrong in (None, (1, 2), state.learned):
        with pytest.raises(TypeError, match=r"`state` must be that of a run .*mcmc.last_state"):
            kernel.sampler(wrong)
    for wrong in (0, None, random.split(key)):
        with pytest.raises(TypeError, match=r"`key` must be a random key.*jax.random.key"):
            sampler.draw(wrong, 3)


def test_the_table_is_long():
    assert len(TABLE) > 80


def test_every_option_is_in_the_table():
    """An option that is added without a row for what it refuses is found here."""
    words = " ".join(name for name, _, outcome in TABLE if outcome != WORKS)
    for cls in (*KERNELS.values(), Search, DiffusionTraining, TransportTraining, Correction):
        for name in inspect.signature(cls.__init__).parameters:
            assert name in ("self", "model", "potential_fn") or f"{name}=" in words, name


def test_a_kernel_has_ten_options_at_most():
    for cls in KERNELS.values():
        assert (
            len(inspect.signature(cls.__init__).parameters.keys() - {"self", "model", "potential_fn"}) <= 10
        )


def test_signatures_stay_as_they_are():
    for cls in KERNELS.values():
        for signature in (inspect.signature(cls.__init__), inspect.signature(cls)):
            kinds = {parameter.kind for parameter in signature.parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds
            assert {"model", "potential_fn", "precondition", "network"} <= signature.parameters.keys()


def test_kernels_still_pickle():
    kernel = pickle.loads(pickle.dumps(build("diffusion", process="pis", num_steps=np.int64(8))))
    assert isinstance(kernel, MCMCKernel) and kernel.evaluations_per_step > 0


def test_numbers_come_back_as_those_of_python():
    assert type(whole("n", np.int8(3))) is int and type(whole("n", jnp.asarray(3))) is int
    assert type(number("x", jnp.asarray(2), 0.0, 3.0)) is float


def test_plots_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"`plot`.*pip install numpyro_sbtm\[plot\]"):
        plots.pyplot()


def test_discrete_latents_without_funsor_name_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpyro.contrib.funsor", None)
    with pytest.raises(ImportError, match="funsor"):
        on_model(bernoulli_latent)
