# SPDX-License-Identifier: Apache-2.0
"""Learning the sampler of a model, without `numpyro.infer.MCMC`, and reading one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from numpyro_sbtm.checks import whole
from numpyro_sbtm.core.target import Key
from numpyro_sbtm.files import read_learned
from numpyro_sbtm.kernels.base import LearnedKernel
from numpyro_sbtm.kernels.diffusion import LogVarianceDISKernel
from numpyro_sbtm.kernels.fingerprint import fingerprint
from numpyro_sbtm.sampler import Sampler, checked_key

__all__ = ["learn", "load"]


def learn(
    rng_key: Key,
    model: Callable[..., Any] | LearnedKernel,
    *model_args: Any,
    model_kwargs: dict[str, Any] | None = None,
    num_steps: int = 1000,
    init_params: Any = None,
) -> Sampler:
    """Look for a model's posterior, and learn to draw from it where that is not enough.

    Args:
        rng_key: random key.
        model: a NumPyro model, or a kernel made of one with all that is chosen; a model stands for
            `LogVarianceDISKernel` of it.
        *model_args: its positional arguments.
        model_kwargs: its keyword arguments.
        num_steps: training steps at most.
        init_params: an unconstrained position to start from, too; needed for a potential function.

    Returns:
        The sampler, whose draws are of the model's sites.

    Raises:
        ValueError: if the model does not fit, or has no latent values.
        TypeError: for what is no key, model or number.
        RuntimeError: if no start has a finite log density.

    Examples:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_sbtm import learn
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> sampler = learn(jax.random.key(0), model, 1.0, num_steps=50)
        >>> run = sampler.sample(jax.random.key(1), 500)
        >>> run.sites["mu"].shape, round(float(run.sites["mu"].mean()), 1)
        ((4, 500), 0.5)
        >>> round(sampler.evidence(jax.random.key(2)).log_evidence, 2)  # log N(1; 0, 2)
        -1.52
    """
    kernel = _kernel_of(model)
    kwargs, num_steps = {} if model_kwargs is None else model_kwargs, whole("num_steps", num_steps)
    state = kernel.init(checked_key(rng_key), num_steps, init_params, model_args, kwargs)
    return kernel.sampler(state, model_args, kwargs)


def load(
    path: str | Path,
    model: Callable[..., Any] | LearnedKernel,
    *model_args: Any,
    model_kwargs: dict[str, Any] | None = None,
    init_params: Any = None,
) -> Sampler:
    """Read a sampler that `Sampler.save` wrote.

    Args:
        path: the folder.
        model: the model that it was learned for, or the kernel, where that is not `LogVarianceDISKernel` with
            all as it is by default.
        *model_args: its positional arguments, the same as then.
        model_kwargs: its keyword arguments, the same as then.
        init_params: an unconstrained position of any density, for the shapes of a potential function.

    Returns:
        The sampler; its draws are those that it would have made where it was written.

    Raises:
        FileNotFoundError: if it is not there, or not whole.
        ValueError: for another format, other settings, other data, and arrays that this precision does not
            hold.

    Examples:
        >>> import tempfile, jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_sbtm import learn, load
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     learn(jax.random.key(0), model, 1.0, num_steps=50).save(folder)
        ...     sampler = load(folder, model, 1.0)
        >>> round(float(sampler.sample(jax.random.key(1)).sites["mu"].mean()), 1)
        0.5
    """
    kernel, kwargs = _kernel_of(model), {} if model_kwargs is None else model_kwargs
    learned, several = read_learned(path, kernel.method.words())
    if np.any(np.asarray(learned.data) != np.asarray(fingerprint(model_args, kwargs))):
        raise ValueError(
            f"`path` is {str(path)!r}, a sampler for other data: `model_args` and `model_kwargs` are not "
            "those that it was learned for. Pass the same, or learn anew."
        )
    return kernel.bind(learned, several, model_args, kwargs, init_params)


def _kernel_of(model: Callable[..., Any] | LearnedKernel) -> LearnedKernel:
    return model if isinstance(model, LearnedKernel) else LogVarianceDISKernel(model)
