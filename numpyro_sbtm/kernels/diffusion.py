# SPDX-License-Identifier: Apache-2.0
"""Kernels of learned diffusions."""

from collections.abc import Callable
from typing import Any, Literal

import optax
from numpyro.infer import init_to_uniform

from numpyro_sbtm.checks import names_unknown_options
from numpyro_sbtm.core.divergence import Divergence
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.kernels.arguments import OPTIONS
from numpyro_sbtm.kernels.base import LearnedKernel
from numpyro_sbtm.methods.diffusion import Diffusion, DivergenceName, ProcessName
from numpyro_sbtm.options import Correction, DiffusionTraining, Search

__all__ = ["DiffusionKernel", "LogVarianceDISKernel"]

_NETWORK = """
        network: 'denoiser', or a function that makes a `Net`, such as ``partial(denoiser, width=128)``: with
            the keywords ``num_components``, of the mixture that was found, and ``num_scores`` for 'dis';
            without any for other processes.
"""


class DiffusionKernel(LearnedKernel):
    __doc__ = f"""Learned diffusion of any kind, trained by any divergence, as a NumPyro kernel.

    ``num_warmup`` counts training steps. After them every Metropolis step proposes the end of a fresh path
    and accepts it with its exact path weight. Where draws of what the search finds are good enough as
    proposals, nothing is trained.

    Args:
        model: a NumPyro model.
        potential_fn: minus a log density of unconstrained values, instead of a model; it needs
            ``init_params`` in `MCMC.run`.
        process: 'dis' (the time reversal of the mixture that was found, with a denoiser), 'pis', 'dds',
            'bridge' or 'cmcd'; for comparison also 'dis-control', 'dis-euler', 'pis-control' and
            'dds-control', the published parametrisations, and 'dds-learned', which learns the mean and the
            deviations of its reference. All but 'dis' start from a normal distribution with the mean and the
            standard deviations of that mixture. Or a function ``(net, dim, num_steps, reference) ->
            Process``, whose reference is the mixture.
        divergence: 'log-variance', 'log-variance-per-start', 'sub-trajectory-log-variance' (four parts),
            'kl', 'kl-log-derivative', 'trajectory-balance', a `Divergence`, or a function of the process that
            makes one.
{_NETWORK.strip(chr(10))}
{OPTIONS.strip(chr(10))}
        training: how the sampler is trained (see `DiffusionTraining`).

    Raises:
        ValueError: for values out of range, and for options that do not go together, at once; `init` and
            `MCMC.run` raise for models that do not fit.
        TypeError: for values of another type, and unknown options.

    Reference:
        Richter & Berner (2024), Improved sampling via learned diffusions, arXiv:2307.01198.

    Examples:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_sbtm import DiffusionKernel
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(3.0, 2.0))
        >>> kernel = DiffusionKernel(model, process="pis", divergence="trajectory-balance")
        >>> mcmc = MCMC(kernel, num_warmup=50, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> mcmc.get_samples()["x"].shape
        (500,)
    """

    @names_unknown_options
    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[..., Any] | None = None,
        *,
        process: ProcessName | Callable[..., Process] = "dis",
        divergence: DivergenceName | Divergence | Callable[[Process], Divergence] = "log-variance",
        network: Literal["denoiser"] | Callable[..., Net] = "denoiser",
        optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None,
        precondition: Any = "auto",
        search: Search = Search(),
        training: DiffusionTraining = DiffusionTraining(),
        correction: Correction = Correction(),
        forward_mode_differentiation: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        method = Diffusion(
            process=process, divergence=divergence, network=network, optimizer=optimizer, training=training
        )
        super().__init__(
            model,
            potential_fn,
            method,
            precondition=precondition,
            search=search,
            correction=correction,
            forward_mode_differentiation=forward_mode_differentiation,
            init_strategy=init_strategy,
        )

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the network in a training step (see `Diffusion.evaluations_per_step`)."""
        assert isinstance(self.method, Diffusion)
        return self.method.evaluations_per_step


class LogVarianceDISKernel(DiffusionKernel):
    __doc__ = f"""Learned diffusion that carries noise to the posterior, as a NumPyro kernel.

    A time-reversed diffusion (DIS) with exact Ornstein-Uhlenbeck steps is trained in warm-up by the
    log-variance divergence; ``num_warmup`` counts training steps. After warm-up every Metropolis step
    proposes the end of a fresh path and accepts it with its exact path weight. Where draws of what the search
    finds are good enough as proposals, nothing is trained. It is `DiffusionKernel` with the best pair of
    process and divergence.

    Args:
        model: a NumPyro model.
        potential_fn: minus a log density of unconstrained values, instead of a model; it needs
            ``init_params`` in `MCMC.run`.
{_NETWORK.strip(chr(10))}
{OPTIONS.strip(chr(10))}
        training: how the sampler is trained (see `DiffusionTraining`).

    Raises:
        ValueError: for values out of range, and for options that do not go together, at once; `init` and
            `MCMC.run` raise for models that do not fit.
        TypeError: for values of another type, and unknown options.

    Reference:
        Richter & Berner (2024), Improved sampling via learned diffusions, arXiv:2307.01198.

    Examples:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_sbtm import LogVarianceDISKernel
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(3.0, 2.0))
        >>> mcmc = MCMC(LogVarianceDISKernel(model), num_warmup=50, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> mcmc.get_samples()["x"].shape
        (500,)
    """

    @names_unknown_options
    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[..., Any] | None = None,
        *,
        network: Literal["denoiser"] | Callable[..., Net] = "denoiser",
        optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None,
        precondition: Any = "auto",
        search: Search = Search(),
        training: DiffusionTraining = DiffusionTraining(),
        correction: Correction = Correction(),
        forward_mode_differentiation: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            network=network,
            optimizer=optimizer,
            precondition=precondition,
            search=search,
            training=training,
            correction=correction,
            forward_mode_differentiation=forward_mode_differentiation,
            init_strategy=init_strategy,
        )
