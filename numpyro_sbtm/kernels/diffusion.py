# SPDX-License-Identifier: Apache-2.0
"""Kernels of learned diffusions: the choice of process, divergence, network and optimiser."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from numpyro.infer import init_to_uniform

from numpyro_sbtm.checks import function, names_unknown_options, one_of, shown
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
from numpyro_sbtm.core.net import Net, pair
from numpyro_sbtm.core.net import with_place as with_place
from numpyro_sbtm.core.processes.base import Process
from numpyro_sbtm.core.processes.bridge import bridge
from numpyro_sbtm.core.processes.cmcd import cmcd
from numpyro_sbtm.core.processes.dds import dds
from numpyro_sbtm.core.processes.dis import dis
from numpyro_sbtm.core.processes.dis_control import dis_control
from numpyro_sbtm.core.processes.moved import learned_reference, rescaled
from numpyro_sbtm.core.processes.pis import pis
from numpyro_sbtm.core.target import LogDensity, Target
from numpyro_sbtm.kernels.base import OPTIONS, LearnedKernel, checked_optimizer
from numpyro_sbtm.networks import denoiser, potential
from numpyro_sbtm.options import Correction, DiffusionTraining, Search, group_of
from numpyro_sbtm.search.located import Located

__all__ = ["DIVERGENCES", "PROCESSES", "DiffusionKernel", "Family", "LogVarianceDISKernel"]


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
        process: str | Callable[..., Process] = "dis",
        divergence: str | Divergence | Callable[[Process], Divergence] = "log-variance",
        network: str | Callable[..., Net] = "denoiser",
        optimizer: optax.GradientTransformation | Callable[[int], Any] | None = None,
        precondition: Any = "auto",
        search: Search = Search(),
        training: DiffusionTraining = DiffusionTraining(),
        correction: Correction = Correction(),
        forward_mode_differentiation: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        self._training = group_of("training", DiffusionTraining, training)
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
        # names where names were given: kernels are pickled
        self._process = process if callable(process) else one_of("process", process, PROCESSES)
        made = isinstance(divergence, Divergence) or callable(divergence)
        self._divergence = divergence if made else one_of("divergence", divergence, DIVERGENCES)
        self._network = denoiser
        if network != "denoiser":
            cure = "Pass 'denoiser', or a function that makes a `Net`, as `partial(denoiser, width=128)`."
            self._network = function("network", network, cure)
        self._optimizer = checked_optimizer(optimizer)
        self._shortens = training.patience is not None
        if training.look_ahead and process != "dis":
            raise ValueError(f"`look_ahead` asks for the `process` 'dis', got {shown(process)}. Pass False.")
        if training.look_ahead and divergence == "kl" and isinstance(precondition, str):
            raise ValueError(
                "`look_ahead` with the `divergence` 'kl' asks for a reference of one component, but that of "
                f"the `precondition` {precondition!r} may have several, between which the look jumps. Take "
                "'kl-log-derivative' or 'log-variance', or pass `look_ahead=False`."
            )
        # abstractly: a constructor starts no backend
        jax.eval_shape(self._check_relations)

    def _check_relations(self) -> None:
        """Refuse what training would; neither the network nor the dimension matters for that."""
        net = self._make_net(normal(1))
        if not isinstance(net, Net):
            raise TypeError(f"`network` must make a `Net`, got {shown(net)}. Pass `denoiser`, or its like.")
        process = self._make_process(_NO_NET, 1, normal(1))
        divergence = self._make_divergence(process)
        try:
            check_options(process, divergence, self._options(process, divergence))
        except ValueError as error:
            chosen = f"With `process` = {shown(self._process)} and `divergence` = {shown(self._divergence)}: "
            raise ValueError(chosen + str(error)) from None

    def _options(self, process: Process, divergence: Divergence) -> DiffusionTraining:
        """Return the options, as far as this process and this divergence can take them."""
        training = self._training
        may = process.coarse is not None and divergence.any_grid
        coarse_steps = training.coarse_steps if may else None
        num_times = min(training.num_times or process.num_steps, coarse_steps or process.num_steps)
        return replace(
            training, coarse_steps=coarse_steps, num_times=num_times if divergence.detach else None
        )

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the network in a training step: simulated points, and those that enter a gradient.

        Examples:
            >>> from numpyro_sbtm import DiffusionKernel, DiffusionTraining
            >>> training = DiffusionTraining(num_steps=32, num_paths=256, num_times=16, coarse_steps=None)
            >>> DiffusionKernel(lambda: None, training=training).evaluations_per_step
            12288
        """
        process = self._make_process(_NO_NET, 1, normal(1))
        options = self._options(process, self._make_divergence(process))
        simulated = options.coarse_steps or process.num_steps
        points = simulated  # of a path, differentiated at once where paths are not constants
        if options.num_times is not None:
            points += options.num_updates * options.num_times
            if options.num_updates > 1:
                points += options.num_updates * simulated  # each update evaluates the block anew
        passes = PROCESSES[self._process].passes if isinstance(self._process, str) else 1
        return self._training.num_paths * points * passes

    def _check_posterior(self, logdensity_fn: LogDensity, x: Float[Array, " d"]) -> None:
        if self._make_divergence(self._make_process(_NO_NET, 1, normal(1))).detach:
            return
        score = jax.grad(logdensity_fn)
        try:
            jax.eval_shape(jax.grad(lambda x: jnp.sum(score(x))), x)
        except Exception as error:
            raise ValueError(
                "`divergence` 'kl' differentiates the score, but this model's gradient has no derivative: "
                f"{error} Use 'log-variance' or 'kl-log-derivative'."
            ) from error

    def _make_net(self, reference: Mixture) -> Net:
        if self._process == "dis":
            scores = 2 if self._training.look_ahead else 1
            return self._network(num_components=len(reference.log_weight), num_scores=scores)
        net = self._network()
        return PROCESSES[self._process].network(net) if isinstance(self._process, str) else net

    def _make_process(self, net: Net, dim: int, reference: Mixture) -> Process:
        training = self._training
        if not isinstance(self._process, str):
            return self._process(net, dim, training.num_steps, reference)
        clip = {} if training.score_clip is None else {"score_clip": training.score_clip}
        sizes = net, dim, training.num_steps, training.scale
        if self._process == "dis":
            return dis(*sizes, reference=reference, look_ahead=training.look_ahead, **clip)
        return rescaled(PROCESSES[self._process].process(*sizes, **clip), *moments(reference))

    def _make_divergence(self, process: Process) -> Divergence:
        chosen = self._divergence
        if isinstance(chosen, Divergence):
            return chosen
        made: Divergence = (DIVERGENCES[chosen] if isinstance(chosen, str) else chosen)(process)
        return made

    def _algorithm(self, target: Target, located: Located, num_warmup: int) -> Algorithm:
        training, reference = self._training, located.reference
        net = self._make_net(reference)
        process = self._make_process(net, target.dim, reference)
        divergence = self._make_divergence(process)
        options = self._options(process, divergence)
        if options.exploration_steps is None:
            options = replace(options, exploration_steps=max(num_warmup // 2, 1))
        return diffusion(
            target,
            process,
            net,
            divergence,
            _optimizer(self._optimizer, training.learning_rate, num_warmup),
            options,
            endpoints=located.points,
            smc_particles=self._correction.num_particles,
        )


def _optimizer(chosen: Any, learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    if chosen is None:
        schedule = optax.cosine_decay_schedule(learning_rate, num_steps, alpha=0.05)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    return chosen if isinstance(chosen, optax.GradientTransformation) else chosen(num_steps)


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
        network: str | Callable[..., Net] = "denoiser",
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
