# SPDX-License-Identifier: Apache-2.0
"""Learned diffusion: the choice of process, divergence, network and optimiser."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from numpyro_sbtm.checks import function, one_of, shown
from numpyro_sbtm.core.algorithm import Algorithm
from numpyro_sbtm.core.diffusion import check_options, diffusion
from numpyro_sbtm.core.divergence import (
    Divergence,
    kl,
    kl_log_derivative,
    log_variance,
    sub_trajectory_log_variance,
    trajectory_balance,
)
from numpyro_sbtm.core.mixture import Mixture, moments, normal
from numpyro_sbtm.core.net import Net, pair, with_place
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.processes.bridge import bridge
from numpyro_sbtm.core.processes.cmcd import cmcd
from numpyro_sbtm.core.processes.dds import dds
from numpyro_sbtm.core.processes.dis import dis
from numpyro_sbtm.core.processes.dis_control import dis_control
from numpyro_sbtm.core.processes.moved import learned_reference, rescaled
from numpyro_sbtm.core.processes.pis import pis
from numpyro_sbtm.core.target import LogDensity, Target
from numpyro_sbtm.methods.base import checked_optimizer, named
from numpyro_sbtm.networks import denoiser, potential
from numpyro_sbtm.options import DiffusionTraining, group_of
from numpyro_sbtm.search.located import Located

__all__ = ["DIVERGENCES", "PROCESSES", "Diffusion", "DivergenceName", "Family", "ProcessName"]

ProcessName = Literal[
    "dis",
    "dis-control",
    "dis-euler",
    "pis",
    "pis-control",
    "dds",
    "dds-control",
    "dds-learned",
    "bridge",
    "cmcd",
]

DivergenceName = Literal[
    "log-variance",
    "log-variance-per-start",
    "sub-trajectory-log-variance",
    "kl",
    "kl-log-derivative",
    "trajectory-balance",
]


class Family(NamedTuple):
    """A process by name, and what it asks of a network.

    Attributes:
        process: ``(net, dim, num_steps, scale, score_clip=...) -> Process``, around the origin.
        network: what becomes of the network, for processes that learn more than a forward chain.
        passes: networks that are evaluated for every point.
    """

    process: Callable[..., Process]
    network: Callable[[Net], Net] = lambda net: net
    passes: int = 1


PROCESSES: dict[str, Family] = {
    "dis": Family(dis),
    "dis-control": Family(dis_control),
    "dis-euler": Family(partial(dis_control, integrator="euler")),
    "pis": Family(pis),
    "pis-control": Family(partial(pis, denoise=False)),
    "dds": Family(dds),
    "dds-control": Family(partial(dds, learn_variance=False)),
    "dds-learned": Family(lambda *sizes, **options: learned_reference(dds(*sizes, **options)), with_place),
    "bridge": Family(bridge, pair, 2),
    "cmcd": Family(cmcd, passes=2),
}
"""Processes by name. All but 'dis' are moved to the mean and the deviations of the mixture that was found."""

DIVERGENCES: dict[str, Callable[[Process], Divergence]] = {
    "log-variance": lambda process: log_variance(),
    "log-variance-per-start": lambda process: log_variance(paths_per_start=16),
    "sub-trajectory-log-variance": lambda process: sub_trajectory_log_variance(
        process, potential(), num_segments=min(4, process.num_steps)
    ),
    "kl": lambda process: kl(),
    "kl-log-derivative": lambda process: kl_log_derivative(),
    "trajectory-balance": lambda process: trajectory_balance(),
}
"""Divergences by name: functions of the process."""

_NO_NET = Net(lambda key, dim: (), lambda params, *inputs: ())

_NO_NET = Net(lambda key, dim: (), lambda params, *inputs: ())


@dataclass(frozen=True, eq=False, kw_only=True)
class Diffusion:
    """A learned diffusion of any kind, trained by any divergence.

    Attributes:
        process: 'dis' (the time reversal of the mixture that was found, with a denoiser), 'pis', 'dds',
            'bridge' or 'cmcd'; for comparison also 'dis-control', 'dis-euler', 'pis-control' and
            'dds-control', the published parametrisations, and 'dds-learned', which learns the mean and the
            deviations of its reference. All but 'dis' start from a normal distribution with the mean and the
            standard deviations of that mixture. Or a function ``(net, dim, num_steps, reference) ->
            Process``, whose reference is the mixture.
        divergence: 'log-variance', 'log-variance-per-start', 'sub-trajectory-log-variance' (four parts),
            'kl', 'kl-log-derivative', 'trajectory-balance', a `Divergence`, or a function of the process that
            makes one.
        network: 'denoiser', or a function that makes a `Net`, such as ``partial(denoiser, width=128)``: with
            the keywords ``num_components``, of the mixture that was found, and ``num_scores`` for 'dis';
            without any for other processes.
        optimizer: an optax optimiser, or a function of the number of training steps that makes one; None for
            Adam (see ``training.learning_rate``).
        training: how it is trained.

    Raises:
        ValueError: for options that do not go together.
        TypeError: for values of another type.

    Reference:
        Richter & Berner (2024), Improved sampling via learned diffusions, arXiv:2307.01198.

    Examples:
        >>> from numpyro_sbtm import Diffusion, DiffusionTraining
        >>> Diffusion(process="dds", training=DiffusionTraining(num_steps=8)).shortens
        True
    """

    process: ProcessName | Callable[..., Process] = "dis"
    divergence: DivergenceName | Divergence | Callable[[Process], Divergence] = "log-variance"
    network: Literal["denoiser"] | Callable[..., Net] = "denoiser"
    optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None
    training: DiffusionTraining = DiffusionTraining()

    def __post_init__(self) -> None:
        training: DiffusionTraining = group_of("training", DiffusionTraining, self.training)
        if not callable(self.process):
            one_of("process", self.process, PROCESSES)
        if not (isinstance(self.divergence, Divergence) or callable(self.divergence)):
            one_of("divergence", self.divergence, DIVERGENCES)
        if self.network != "denoiser":
            cure = "Pass 'denoiser', or a function that makes a `Net`, as `partial(denoiser, width=128)`."
            function("network", self.network, cure)
        checked_optimizer(self.optimizer)
        if training.look_ahead and self.process != "dis":
            raise ValueError(
                f"`look_ahead` asks for the `process` 'dis', got {shown(self.process)}. Pass False."
            )
        # abstractly: a constructor starts no backend
        jax.eval_shape(self._check_relations)

    def _check_relations(self) -> None:
        """Refuse what training would; neither the network nor the dimension matters for that."""
        net = self._net(normal(1))
        if not isinstance(net, Net):
            raise TypeError(f"`network` must make a `Net`, got {shown(net)}. Pass `denoiser`, or its like.")
        process = self._process(_NO_NET, 1, normal(1))
        divergence = self._divergence(process)
        try:
            check_options(process, divergence, self._options(process, divergence))
        except ValueError as error:
            chosen = f"With `process` = {shown(self.process)} and `divergence` = {shown(self.divergence)}: "
            raise ValueError(chosen + str(error)) from None

    @property
    def always_trains(self) -> bool:
        """Whether it trains also where draws of what was found are good enough as proposals."""
        return self.training.always

    @property
    def shortens(self) -> bool:
        """Whether a part of the training steps is enough where what was found is near exact."""
        return self.training.patience is not None

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the network in a training step: simulated points, and those that enter a gradient.

        Examples:
            >>> from numpyro_sbtm import Diffusion, DiffusionTraining
            >>> training = DiffusionTraining(num_steps=32, num_paths=256, num_times=16, coarse_steps=None)
            >>> Diffusion(training=training).evaluations_per_step
            12288
        """
        process = self._process(_NO_NET, 1, normal(1))
        options = self._options(process, self._divergence(process))
        simulated = options.coarse_steps or process.num_steps
        points = simulated  # of a path, differentiated at once where paths are not constants
        if options.num_times is not None:
            points += options.num_updates * options.num_times
            if options.num_updates > 1:
                points += options.num_updates * simulated  # each update evaluates the block anew
        passes = PROCESSES[self.process].passes if isinstance(self.process, str) else 1
        return self.training.num_paths * points * passes

    def words(self) -> dict[str, str]:
        """Say in words what draws depend on, but for what was learned."""
        training = self.training
        chosen = {"process": self.process, "network": self.network}
        chosen |= {
            name: getattr(training, name) for name in ("num_steps", "scale", "score_clip", "look_ahead")
        }
        return {"method": "Diffusion"} | {name: named(value) for name, value in chosen.items()}

    def check(self, logdensity_fn: LogDensity, x: Float[Array, " d"]) -> None:
        """Refuse a divergence that differentiates the score, where the density's has no derivative."""
        if self._divergence(self._process(_NO_NET, 1, normal(1))).detach:
            return
        score = jax.grad(logdensity_fn)
        try:
            jax.eval_shape(jax.grad(lambda x: jnp.sum(score(x))), x)
        except Exception as error:
            raise ValueError(
                "`divergence` 'kl' differentiates the score, but this model's gradient has no derivative: "
                f"{error} Use 'log-variance' or 'kl-log-derivative'."
            ) from error

    def check_several(self) -> None:
        """Refuse a reference that may have several components, as what a search finds may.

        Raises:
            ValueError: for 'kl' that looks ahead.
        """
        if self.training.look_ahead and self.divergence == "kl":
            raise ValueError(
                "`look_ahead` with the `divergence` 'kl' asks for a reference of one component, but that of "
                "the `precondition` 'auto' may have several, between which the look jumps. Take "
                "'kl-log-derivative' or 'log-variance', or pass `look_ahead=False`."
            )

    def algorithm(self, target: Target, located: Located, num_steps: int, smc_particles: int) -> Algorithm:
        """Make the algorithm for a whitened target and what the search has found of it."""
        reference = located.reference
        net = self._net(reference)
        process = self._process(net, target.dim, reference)
        divergence = self._divergence(process)
        options = self._options(process, divergence)
        if options.exploration_steps is None:
            options = replace(options, exploration_steps=max(num_steps // 2, 1))
        return diffusion(
            target,
            process,
            net,
            divergence,
            _optimizer(self.optimizer, self.training.learning_rate, num_steps),
            options,
            endpoints=located.points,
            smc_particles=smc_particles,
        )

    # ------------------------------------------------------------------ pieces
    def _options(self, process: Process, divergence: Divergence) -> DiffusionTraining:
        """Return the options, as far as this process and this divergence can take them."""
        training = self.training
        may = process.coarse is not None and divergence.any_grid
        coarse_steps = training.coarse_steps if may else None
        num_times = min(training.num_times or process.num_steps, coarse_steps or process.num_steps)
        return replace(
            training, coarse_steps=coarse_steps, num_times=num_times if divergence.detach else None
        )

    def _net(self, reference: Mixture) -> Net:
        network = denoiser if isinstance(self.network, str) else self.network
        if self.process == "dis":
            scores = 2 if self.training.look_ahead else 1
            return network(num_components=len(reference.log_weight), num_scores=scores)
        net = network()
        return PROCESSES[self.process].network(net) if isinstance(self.process, str) else net

    def _process(self, net: Net, dim: int, reference: Mixture) -> Process:
        training = self.training
        if not isinstance(self.process, str):
            return self.process(net, dim, training.num_steps, reference)
        clip: dict[str, Any] = {} if training.score_clip is None else {"score_clip": training.score_clip}
        sizes = net, dim, training.num_steps, training.scale
        if self.process == "dis":
            return dis(*sizes, reference=reference, look_ahead=training.look_ahead, **clip)
        return rescaled(PROCESSES[self.process].process(*sizes, **clip), *moments(reference))

    def _divergence(self, process: Process) -> Divergence:
        chosen: Any = self.divergence
        if isinstance(chosen, Divergence):
            return chosen
        made: Divergence = (DIVERGENCES[chosen] if isinstance(chosen, str) else chosen)(process)
        return made


def _optimizer(chosen: Any, learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    if chosen is None:
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps, alpha=0.05)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    return chosen if isinstance(chosen, optax.GradientTransformation) else chosen(num_steps)
