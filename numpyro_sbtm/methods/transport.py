# SPDX-License-Identifier: Apache-2.0
"""Score-based transport: the choice of network, optimiser and annealing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from numpyro_sbtm.checks import function, one_of, shown
from numpyro_sbtm.core.algorithm import Algorithm
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.target import LogDensity, Target
from numpyro_sbtm.core.transport.annealing import Annealing, convolution, dilation, geometric, tempering
from numpyro_sbtm.core.transport.sbtm import sbtm
from numpyro_sbtm.methods.base import checked_optimizer, named
from numpyro_sbtm.networks import score_mlp
from numpyro_sbtm.options import TransportTraining, group_of
from numpyro_sbtm.search.located import Located

__all__ = ["ANNEALINGS", "AnnealingName", "Transport"]

AnnealingName = Literal["adaptive", "convolution", "dilation", "geometric", "tempering"]

ANNEALINGS: dict[str, Callable[[], Annealing]] = {
    "adaptive": partial(geometric, conditional_ess=0.95),
    "convolution": convolution,
    "dilation": dilation,
    "geometric": geometric,
    "tempering": tempering,
}
"""Annealing by name."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Transport:
    """Score-based transport, by maps that are kept.

    Attributes:
        annealing: densities that particles follow on their way from what was found to the posterior:
            'geometric' (linear levels), 'adaptive' (geometric, with levels that keep a conditional effective
            sample fraction of 0.95), 'convolution' (with noise; in few dimensions), 'dilation', 'tempering',
            an `Annealing`, or None for the posterior itself. For flows.
        network: 'score_mlp', a `Net`, or a function that makes one, as ``partial(score_mlp, width=128)``.
        optimizer: an optax optimiser, or a function of the number of training steps that makes one; None for
            Adam (see ``training.learning_rate``).
        training: how it is trained.

    Raises:
        ValueError: for options that do not go together.
        TypeError: for values of another type.

    Reference:
        Ilin, Sushko & Hu (2025), Score-based deterministic density sampling, arXiv:2504.18130.

    Examples:
        >>> from numpyro_sbtm import Transport
        >>> Transport(annealing="geometric").training.num_maps
        50
    """

    annealing: AnnealingName | Annealing | None = None
    network: Literal["score_mlp"] | Net | Callable[..., Net] = "score_mlp"
    optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None
    training: TransportTraining = TransportTraining()

    def __post_init__(self) -> None:
        training: TransportTraining = group_of("training", TransportTraining, self.training)
        if not isinstance(self.annealing, Annealing):
            one_of("annealing", self.annealing, (*ANNEALINGS, None))
        if not (isinstance(self.network, Net) or self.network == "score_mlp"):
            cure = (
                "Pass 'score_mlp', or a function that makes a `Net`, such as `partial(score_mlp, width=128)`."
            )
            net = function("network", self.network, cure)()
            if not isinstance(net, Net):
                raise TypeError(
                    f"`network` must make a `Net`, got {shown(net)}. Pass `score_mlp`, or its like."
                )
        checked_optimizer(self.optimizer)
        if self.annealing is not None and training.noisy:
            raise ValueError(
                f"`annealing` is {shown(self.annealing)} and asks for a flow, but `noisy` is True. "
                "Pass one of them."
            )

    @property
    def always_trains(self) -> bool:
        """Whether it trains also where draws of what was found are good enough as proposals."""
        return self.training.always

    @property
    def shortens(self) -> bool:
        """Whether a part of the training steps is enough where what was found is near exact."""
        return True

    def words(self) -> dict[str, str]:
        """Say in words what draws depend on, but for what was learned."""
        chosen = {"network": self.network, "num_maps": self.training.num_maps, "noisy": self.training.noisy}
        return {"method": "Transport"} | {name: named(value) for name, value in chosen.items()}

    def check(self, logdensity_fn: LogDensity, x: Float[Array, " d"]) -> None:
        """Refuse too few particles, and annealing where draws are noisy."""
        self.training.check_dim(len(x), None if self.annealing is None else shown(self.annealing))

    def check_several(self) -> None:
        """Let a first law of several components pass."""

    def algorithm(self, target: Target, located: Located, num_steps: int, smc_particles: int) -> Algorithm:
        """Make the algorithm for a whitened target and what the search has found of it."""
        training, annealing, optimizer = self.training, self.annealing, self.optimizer
        # where the search had to look for the posterior's shape, or found it, it is not made wider
        plain = len(located.reference.log_weight) == 1 and getattr(located.whitening, "margins", None) is None
        scale = jnp.where(located.near_exact(), 1.0, training.scale) if plain else 1.0
        if optimizer is None:
            optimizer = optax.adamw(training.learning_rate, weight_decay=0.1)
        elif not isinstance(optimizer, optax.GradientTransformation):
            optimizer = optimizer(num_steps)
        network: Any = score_mlp if isinstance(self.network, str) else self.network
        return sbtm(
            target,
            network if isinstance(network, Net) else network(),
            optimizer,
            training,
            base=located.reference._replace(std=scale * located.reference.std),
            annealing=ANNEALINGS[annealing]() if isinstance(annealing, str) else annealing,
            num_steps=num_steps,
            smc_particles=smc_particles,
        )
