# SPDX-License-Identifier: Apache-2.0
"""The kernel of score-based transport."""

from collections.abc import Callable
from typing import Any, Literal

import optax
from numpyro.infer import init_to_uniform

from numpyro_sbtm.checks import names_unknown_options
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.transport.annealing import Annealing
from numpyro_sbtm.kernels.arguments import OPTIONS
from numpyro_sbtm.kernels.base import LearnedKernel
from numpyro_sbtm.methods.transport import AnnealingName, Transport
from numpyro_sbtm.options import Correction, Search, TransportTraining

__all__ = ["SBTMKernel"]


class SBTMKernel(LearnedKernel):
    __doc__ = f"""Score-based transport modelling, as a NumPyro kernel.

    In warm-up particles move by ``dx/dt = ∇log π(x) - s(x)`` while a network learns their score s;
    ``num_warmup`` counts training steps, divided evenly between the maps. The maps are kept: after
    warm-up every Metropolis step proposes a fresh point that has passed through all of them, and accepts
    it with its exact weight. Where draws of what the search finds are good enough as proposals, nothing is
    trained.

    Args:
        model: a NumPyro model.
        potential_fn: minus a log density of unconstrained values, instead of a model; it needs
            ``init_params`` in `MCMC.run`.
        annealing: densities that particles follow on their way from what was found to the posterior:
            'geometric' (linear levels), 'adaptive' (geometric, with levels that keep a conditional effective
            sample fraction of 0.95), 'convolution' (with noise; in few dimensions), 'dilation', 'tempering',
            an `Annealing`, or None for the posterior itself. For flows.
        network: 'score_mlp', a `Net`, or a function that makes one, as ``partial(score_mlp, width=128)``.
{OPTIONS.strip(chr(10))}
        training: how the sampler is trained (see `TransportTraining`).

    Raises:
        ValueError: for values out of range, and for options that do not go together, at once; `init` and
            `MCMC.run` raise for models that do not fit.
        TypeError: for values of another type, and unknown options.

    Reference:
        Ilin, Sushko & Hu (2025), Score-based deterministic density sampling, arXiv:2504.18130.

    Examples:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_sbtm import SBTMKernel
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(3.0, 2.0))
        >>> mcmc = MCMC(SBTMKernel(model), num_warmup=50, num_samples=500, progress_bar=False)
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
        annealing: AnnealingName | Annealing | None = None,
        network: Literal["score_mlp"] | Net | Callable[..., Net] = "score_mlp",
        optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None,
        precondition: Any = "auto",
        search: Search = Search(),
        training: TransportTraining = TransportTraining(),
        correction: Correction = Correction(),
        forward_mode_differentiation: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        method = Transport(annealing=annealing, network=network, optimizer=optimizer, training=training)
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
