# SPDX-License-Identifier: Apache-2.0
"""The kernel of score-based transport: the choice of network, optimiser and annealing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from numpyro.infer import init_to_uniform

from numpyro_sbtm.checks import function, names_unknown_options, one_of, shown
from numpyro_sbtm.core.algorithm import Algorithm
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.target import LogDensity, Target
from numpyro_sbtm.core.transport.annealing import Annealing, convolution, dilation, geometric, tempering
from numpyro_sbtm.core.transport.sbtm import check_transport, sbtm
from numpyro_sbtm.kernels.base import OPTIONS, LearnedKernel, checked_optimizer
from numpyro_sbtm.networks import score_mlp
from numpyro_sbtm.options import Correction, Search, TransportTraining, group_of
from numpyro_sbtm.search.located import Located

__all__ = ["ANNEALINGS", "SBTMKernel"]

ANNEALINGS: dict[str, Callable[[], Annealing]] = {
    "adaptive": partial(geometric, conditional_ess=0.95),
    "convolution": convolution,
    "dilation": dilation,
    "geometric": geometric,
    "tempering": tempering,
}
"""Annealing by name."""


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
        annealing: str | Annealing | None = None,
        network: str | Net | Callable[..., Net] = "score_mlp",
        optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None,
        precondition: Any = "auto",
        search: Search = Search(),
        training: TransportTraining = TransportTraining(),
        correction: Correction = Correction(),
        forward_mode_differentiation: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        self._training = group_of("training", TransportTraining, training)
        super().__init__(
            model,
            potential_fn,
            precondition=precondition,
            search=search,
            training=training,
            correction=correction,
            forward_mode_differentiation=forward_mode_differentiation,
            init_strategy=init_strategy,
        )
        made = isinstance(annealing, Annealing)
        self._annealing = annealing if made else one_of("annealing", annealing, (*ANNEALINGS, None))
        self._network: Any = score_mlp
        if isinstance(network, Net):
            self._network = network
        elif network != "score_mlp":
            cure = (
                "Pass 'score_mlp', or a function that makes a `Net`, such as `partial(score_mlp, width=128)`."
            )
            self._network = function("network", network, cure)
            net = self._network()
            if not isinstance(net, Net):
                raise TypeError(
                    f"`network` must make a `Net`, got {shown(net)}. Pass `score_mlp`, or its like."
                )
        self._optimizer = checked_optimizer(optimizer)
        if annealing is not None and training.noisy:
            raise ValueError(
                f"`annealing` is {shown(annealing)} and asks for a flow, but `noisy` is True. "
                "Pass one of them."
            )

    def _check_posterior(self, logdensity_fn: LogDensity, x: Float[Array, " d"]) -> None:
        check_transport(self._training, len(x), self._annealing)

    def _algorithm(self, target: Target, located: Located, num_warmup: int) -> Algorithm:
        training, annealing = self._training, self._annealing
        # where the search had to look for the posterior's shape, or found it, it is not made wider
        plain = len(located.reference.log_weight) == 1 and getattr(located.whitening, "margins", None) is None
        scale = jnp.where(located.near_exact(), 1.0, training.scale) if plain else 1.0
        optimizer = self._optimizer
        if optimizer is None:
            optimizer = optax.adamw(training.learning_rate, weight_decay=0.1)
        elif not isinstance(optimizer, optax.GradientTransformation):
            optimizer = optimizer(num_warmup)
        return sbtm(
            target,
            self._network if isinstance(self._network, Net) else self._network(),
            optimizer,
            training,
            base=located.reference._replace(std=scale * located.reference.std),
            annealing=ANNEALINGS[annealing]() if isinstance(annealing, str) else annealing,
            num_steps=num_warmup,
            smc_particles=self._correction.num_particles,
        )
