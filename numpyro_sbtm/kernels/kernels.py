# SPDX-License-Identifier: Apache-2.0
"""The kernels for `numpyro.infer.MCMC`: the choice of an algorithm, and its options."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from numpyro.infer import init_to_uniform
from numpyro.infer.autoguide import AutoGuide

from numpyro_sbtm.checks import (
    flag,
    names_unknown_options,
    number,
    one_of,
    optional,
    positive,
    whole,
)
from numpyro_sbtm.core.algorithm import Algorithm
from numpyro_sbtm.core.anneal import Annealing, convolution, dilation, geometric, tempering
from numpyro_sbtm.core.controlled import (
    bridge,
    cmcd,
    dds,
    dis_control,
    learned_reference,
    located,
    pair,
    pis,
    rescaled,
)
from numpyro_sbtm.core.diffusion import check_options, diffusion
from numpyro_sbtm.core.divergence import (
    Divergence,
    kl,
    kl_log_derivative,
    log_variance,
    sub_trajectory_log_variance,
    trajectory_balance,
)
from numpyro_sbtm.core.mixture import moments
from numpyro_sbtm.core.process import Net, Process, dis
from numpyro_sbtm.core.sbtm import sbtm
from numpyro_sbtm.core.target import LogDensity, Target
from numpyro_sbtm.kernels.base import LearnedKernel
from numpyro_sbtm.networks import denoiser, potential, score_mlp
from numpyro_sbtm.search.ladder import Precondition
from numpyro_sbtm.search.located import Located

__all__ = [
    "ANNEALINGS",
    "DIVERGENCES",
    "NETS",
    "PROCESSES",
    "DiffusionKernel",
    "LogVarianceDISKernel",
    "SBTMKernel",
]

PROCESSES: dict[str, Callable[..., Process]] = {
    "dis": dis,
    "dis-control": dis_control,
    "dis-euler": partial(dis_control, integrator="euler"),
    "pis": pis,
    "pis-control": partial(pis, denoise=False),
    "dds": dds,
    "dds-control": partial(dds, learn_variance=False),
    "dds-learned": lambda *sizes, **options: learned_reference(dds(*sizes, **options)),
    "bridge": bridge,
    "cmcd": cmcd,
}
"""Processes by name: functions of ``(net, dim, num_steps, scale)``, and of a ``score_clip``."""

NETS: dict[str, Callable[[Net], Net]] = {"bridge": pair, "dds-learned": located}
"""What becomes of the network, for processes that learn more than a forward chain."""

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

ANNEALINGS: dict[str, Callable[[], Annealing]] = {
    "adaptive": partial(geometric, conditional_ess=0.95),
    "convolution": convolution,
    "dilation": dilation,
    "geometric": geometric,
    "tempering": tempering,
}
"""Annealing of transport by name."""

_MOST_STEPS, _MOST_UNITS, _MOST_LAYERS = 2**20, 2**16, 64
_SCALES = 1e-6, 1e6  # float32 has squares of these, and what is left of one when they are added

_NO_NET = Net(lambda key, dim: (), lambda params, *inputs: ())

_MAX_FLOW_DIM = 32  # a draw of a flow costs as many Jacobian-vector products as there are dimensions

_MODEL = """
        model: a NumPyro model.
        potential_fn: minus a log density of unconstrained values, instead of a model; it needs
            ``init_params`` in `MCMC.run`.
"""

_DIFFUSION = """
        coarse_steps: 'dis' trains on at most so many of its steps, drawn anew for every block; None: on all.
        look_ahead: 'dis' also evaluates the target's score at a guess of where the path ends: twice the
            gradients, a better bound (see `numpyro_sbtm.core.process.dis`).
        patience: training ends, too, once the variance of the log weights is moderate and has not fallen by a
            twentieth in so many steps; None: it then takes all of warm-up.
        num_steps: steps of the diffusion, T.
        num_paths: paths simulated per training step.
        num_times: at most how many of the T times enter each gradient; all for 'kl'.
        learning_rate: of Adam, at most 1, decaying along a cosine over warm-up.
        width: units of each hidden layer of the network, an even number.
        depth: number of its hidden layers.
        scale: standard deviation of the noise, in whitened units.
"""

_COMMON = """
        target_acceptance: training, where it is needed at all, ends once proposals that vary as its log
            weights do would be accepted with this probability; None: once it gains nothing more.
        precondition: how the posterior is whitened before anything is learned. 'auto' fits a triangular
            map by variational inference from several starts; 'refined' then fits it to tempered particles,
            which move and are fitted again (up to 128 dimensions; three million gradients more), for
            posteriors with a neck or a long tail; ``(loc, scale_tril)`` is an affine map of the flattened
            unconstrained space, sites in sorted order; an AutoGuide of the model is fitted
            by stochastic variational inference and gives its draws' mean and covariance; None leaves the
            space as it is.
        always_train: train also where draws of the warm start are good enough as proposals (an effective
            fraction above 0.5, k̂ below 0.7, particles without drift). Raw draws, and chains with samplers of
            their own, always are of trained ones.
        correction: 'metropolis' makes draws by Metropolis steps, so that the chains leave the
            posterior invariant, however well or badly the sampler is trained. None returns raw draws.
        shared: whether chains of ``chain_method="vectorized"`` share one trained sampler; False trains
            one for each, as "sequential" and "parallel" always do. Chains that share a sampler share
            what it misses: R-hat cannot see a mode that is never proposed.
        block_size: about how many proposals are made at a time.
        steps_per_draw: Metropolis steps per draw. A proposal is cheap beside training, and a few of them
            keep a chain from lingering where its weight is large.
        local_kernel: a local move that ends every draw and leaves the posterior invariant: 'hmc' (8 leapfrog
            steps), 'mala', 'nuts', or None. Proposals travel between modes; it repairs what they get
            wrong within one. 'auto' is 'hmc', but None where the warm start is nearly exact: an effective
            fraction above 0.9.
        smc_particles: where Pareto k̂ of the proposals is above 0.7, each is replaced by one chosen among so
            many, with their mean weight: by a particle filter along the paths, for a flow without noise
            among independent draws. Draws stay exact and cost as many times more; below two: never. It is not
            done for large data, nor with ``shared=False``.
        forward_mode_differentiation: differentiate the model in forward mode, for ``while_loop``.
        init_strategy: one of NumPyro's initialisation strategies.
"""


class DiffusionKernel(LearnedKernel):
    __doc__ = f"""Learned diffusion of any kind, trained by any divergence, as a NumPyro kernel.

    ``num_warmup`` counts training steps. After them every Metropolis step proposes the end of a fresh path
    and accepts it with its exact path weight. Where draws of the warm start are good enough as proposals,
    nothing is trained (see ``always_train``).

    Args:
{_MODEL.strip(chr(10))}
        process: 'dis' (the time reversal of the warm start's mixture, with a denoiser), 'pis', 'dds',
            'bridge' or 'cmcd'; for comparison also 'dis-control', 'dis-euler', 'pis-control' and
            'dds-control', the published parametrisations, and 'dds-learned', which learns the mean and the
            deviations of its reference. All but 'dis' start from a normal distribution with the mean and the
            standard deviations of that mixture.
        divergence: 'log-variance', 'log-variance-per-start', 'sub-trajectory-log-variance' (four parts),
            'kl', 'kl-log-derivative' or 'trajectory-balance'.
        num_updates: updates on each block of simulated paths, which cost no call of the target.
        exploration: at the start training simulates with noise larger by this part, which falls to nothing
            over the first half of warm-up.
        trust_region: with several updates, how far in nats they aim from the law of the block; None: at the
            target.
        buffer_size: how many ends of earlier paths are kept, by weight, as ends of backward paths for
            training; 0: those of the warm start.
        score_clip: bound on each coordinate of the target's score, relative to the reference's and in units
            of the noise, where it enters the forward chain; 0 keeps it out. None: 3 for 'dis', 10 for the
            others.
{_DIFFUSION.strip(chr(10))}
{_COMMON.strip(chr(10))}

    Raises:
        ValueError: for values out of range, and for options that do not go together, at once; `init` and
            `MCMC.run` raise for models that do not fit.
        TypeError: for values of another type, such as a float as a number of steps, and unknown options.

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
        process: str = "dis",
        divergence: str = "log-variance",
        num_updates: int = 1,
        coarse_steps: int | None = None,
        exploration: float = 0.0,
        trust_region: float | None = None,
        buffer_size: int = 0,
        score_clip: float | None = None,
        look_ahead: bool = False,
        patience: int | None = 100,
        num_steps: int = 32,
        num_paths: int = 256,
        num_times: int = 16,
        learning_rate: float = 2e-3,
        width: int = 64,
        depth: int = 2,
        scale: float = 1.0,
        target_acceptance: float | None = 0.9,
        precondition: Precondition | AutoGuide = "auto",
        always_train: bool = False,
        correction: str | None = "metropolis",
        shared: bool = True,
        block_size: int = 4096,
        steps_per_draw: int = 4,
        local_kernel: str | None = "auto",
        smc_particles: int = 16,
        forward_mode_differentiation: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            target_acceptance=target_acceptance,
            precondition=precondition,
            always_train=always_train,
            correction=correction,
            shared=shared,
            block_size=block_size,
            steps_per_draw=steps_per_draw,
            local_kernel=local_kernel,
            smc_particles=smc_particles,
            forward_mode_differentiation=forward_mode_differentiation,
            init_strategy=init_strategy,
        )
        self._process = one_of("process", process, PROCESSES)  # names: kernels are pickled
        self._divergence = one_of("divergence", divergence, DIVERGENCES)
        self._num_steps = whole("num_steps", num_steps, 1, _MOST_STEPS)
        self._num_paths = whole("num_paths", num_paths, 2)
        coarse_steps = optional(whole, "coarse_steps", coarse_steps)
        self._coarse_steps = None if coarse_steps is None else min(coarse_steps, self._num_steps)
        self._num_times = min(whole("num_times", num_times), self._coarse_steps or self._num_steps)
        self._num_updates = whole("num_updates", num_updates, 1, _MOST_STEPS)
        self._exploration = number("exploration", exploration, 0.0, 10.0)
        self._trust_region = optional(positive, "trust_region", trust_region, 1e6)
        self._buffer_size = whole("buffer_size", buffer_size, 0)
        clip = optional(number, "score_clip", score_clip, 0.0, 1e6)
        self._clip: dict[str, Any] = {} if clip is None else {"score_clip": clip}
        self._look_ahead = flag("look_ahead", look_ahead)
        self._patience = optional(whole, "patience", patience, 0)
        self._shortens = patience is not None
        self._learning_rate = positive("learning_rate", learning_rate, 1.0)
        self._net = whole("width", width, 2, _MOST_UNITS), whole("depth", depth, 1, _MOST_LAYERS)
        self._scale = number("scale", scale, *_SCALES)
        if self._net[0] % 2:
            raise ValueError(
                f"`width` must be even, for pairs of sines and cosines of the time, got {width}."
            )
        if self._look_ahead and process != "dis":
            raise ValueError(f"`look_ahead` asks for the `process` 'dis', got {process!r}. Pass False.")
        if self._look_ahead and divergence == "kl" and isinstance(precondition, str):
            raise ValueError(
                "`look_ahead` with the `divergence` 'kl' asks for a reference of one component, but that of "
                f"the `precondition` {precondition!r} may have several, between which the look jumps. Take "
                "'kl-log-derivative' or 'log-variance', or pass `look_ahead=False`."
            )
        # abstractly: a constructor starts no backend
        jax.eval_shape(self._check_relations)

    def _check_relations(self) -> None:
        """Refuse what training would; neither the network nor the dimension matters for that."""
        process = PROCESSES[self._process](_NO_NET, 1, self._num_steps, self._scale)
        divergence = DIVERGENCES[self._divergence](process)
        try:
            check_options(
                process,
                divergence,
                num_paths=self._num_paths,
                num_times=self._num_times if divergence.detach else None,
                num_updates=self._num_updates,
                coarse_steps=self._coarse_steps,
                explores=self._exploration > 0,
                trust_region=self._trust_region,
                buffer_size=self._buffer_size,
            )
        except ValueError as error:
            chosen = f"With `process` = {self._process!r} and `divergence` = {self._divergence!r}: "
            raise ValueError(chosen + str(error)) from None

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the network in a training step: simulated points, and those that enter a gradient.

        Examples:
            >>> from numpyro_sbtm import DiffusionKernel
            >>> DiffusionKernel(lambda: None, num_steps=32, num_paths=256, num_times=16).evaluations_per_step
            12288
        """
        simulated = self._coarse_steps or self._num_steps
        points = simulated  # of a path, differentiated at once for 'kl'
        if self._divergence != "kl":
            points += self._num_updates * self._num_times
            if self._num_updates > 1:
                points += self._num_updates * simulated  # each update evaluates the block anew
        networks = 2 if self._process in ("bridge", "cmcd") else 1
        return self._num_paths * points * networks

    def _check_posterior(self, logdensity_fn: LogDensity, x: Float[Array, " d"]) -> None:
        if self._divergence != "kl":
            return
        score = jax.grad(logdensity_fn)
        try:
            jax.eval_shape(jax.grad(lambda x: jnp.sum(score(x))), x)
        except Exception as error:
            raise ValueError(
                "`divergence` 'kl' differentiates the score, but this model's gradient has no derivative: "
                f"{error} Use 'log-variance' or 'kl-log-derivative'."
            ) from error

    def _algorithm(self, target: Target, located: Located, num_warmup: int) -> Algorithm:
        make = PROCESSES[self._process]
        if self._process == "dis":
            net = denoiser(
                *self._net,
                num_components=len(located.reference.log_weight),
                num_scores=2 if self._look_ahead else 1,
            )
            process = dis(
                net,
                target.dim,
                self._num_steps,
                self._scale,
                reference=located.reference,
                look_ahead=self._look_ahead,
                **self._clip,
            )
        else:
            net = NETS.get(self._process, lambda net: net)(denoiser(*self._net))
            process = make(net, target.dim, self._num_steps, self._scale, **self._clip)
            process = rescaled(process, *moments(located.reference))
        divergence = DIVERGENCES[self._divergence](process)
        schedule = optax.cosine_decay_schedule(self._learning_rate, num_warmup, alpha=0.05)
        optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
        explore = None
        if self._exploration:
            explore = optax.linear_schedule(self._exploration, 0.0, max(num_warmup // 2, 1))
        return diffusion(
            target,
            process,
            net,
            divergence,
            optimiser,
            num_paths=self._num_paths,
            num_times=self._num_times if divergence.detach else None,
            num_updates=self._num_updates,
            coarse_steps=self._coarse_steps,
            exploration=explore,
            trust_region=self._trust_region,
            buffer_size=self._buffer_size,
            goal=self._goal,
            patience=self._patience,
            endpoints=located.points,
            smc_particles=self._smc_particles,
        )


class LogVarianceDISKernel(DiffusionKernel):
    __doc__ = f"""Learned diffusion that carries noise to the posterior, as a NumPyro kernel.

    A time-reversed diffusion (DIS) with exact Ornstein-Uhlenbeck steps is trained in warm-up by the
    log-variance divergence; ``num_warmup`` counts training steps. After warm-up every Metropolis step
    proposes the end of a fresh path and accepts it with its exact path weight. Where draws of the warm start
    are good enough as proposals, nothing is trained (see ``always_train``). It is `DiffusionKernel` with the
    best pair of process and divergence.

    Args:
{_MODEL.strip(chr(10))}
{_DIFFUSION.strip(chr(10))}
{_COMMON.strip(chr(10))}

    Raises:
        ValueError: for values out of range, and for options that do not go together, at once; `init` and
            `MCMC.run` raise for models that do not fit.
        TypeError: for values of another type, such as a float as a number of steps, and unknown options.

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
        coarse_steps: int | None = 10,
        look_ahead: bool = False,
        patience: int | None = 100,
        num_steps: int = 32,
        num_paths: int = 256,
        num_times: int = 16,
        learning_rate: float = 2e-3,
        width: int = 64,
        depth: int = 2,
        scale: float = 1.0,
        target_acceptance: float | None = 0.9,
        precondition: Precondition | AutoGuide = "auto",
        always_train: bool = False,
        correction: str | None = "metropolis",
        shared: bool = True,
        block_size: int = 4096,
        steps_per_draw: int = 4,
        local_kernel: str | None = "auto",
        smc_particles: int = 16,
        forward_mode_differentiation: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            coarse_steps=coarse_steps,
            look_ahead=look_ahead,
            patience=patience,
            num_steps=num_steps,
            num_paths=num_paths,
            num_times=num_times,
            learning_rate=learning_rate,
            width=width,
            depth=depth,
            scale=scale,
            target_acceptance=target_acceptance,
            precondition=precondition,
            always_train=always_train,
            correction=correction,
            shared=shared,
            block_size=block_size,
            steps_per_draw=steps_per_draw,
            local_kernel=local_kernel,
            smc_particles=smc_particles,
            forward_mode_differentiation=forward_mode_differentiation,
            init_strategy=init_strategy,
        )


class SBTMKernel(LearnedKernel):
    __doc__ = f"""Score-based transport modelling, as a NumPyro kernel.

    In warm-up particles move by ``dx/dt = ∇log π(x) - s(x)`` while a network learns their score s;
    ``num_warmup`` counts training steps, divided evenly between the maps. The maps are kept: after
    warm-up every Metropolis step proposes a fresh point that has passed through all of them, and accepts
    it with its exact weight. Where draws of the warm start are good enough as proposals, nothing is trained
    (see ``always_train``).

    Args:
{_MODEL.strip(chr(10))}
        num_particles: training particles.
        num_maps: transport steps; at most ``num_warmup`` are made.
        num_updates: updates of the network per training step.
        batch_size: particles per update.
        solved_output: whether every map takes the best output layer for its network, solved for on all
            particles with a ridge that held-out points choose: better scores for a little more work.
        duration: total time of the transport.
        tolerance: error that a step of the transport may make, in deviations of the particles; steps adapt to
            it, and ``num_maps`` is their largest number. None: all steps are alike.
        learning_rate: of Adam with weight decay.
        width: units of each hidden layer of the network.
        depth: number of its hidden layers.
        scale: standard deviation of the particles' first law, in whitened units, where the warm start is one
            normal distribution and not near exact.
        noisy: whether proposals follow the maps with noise, with exact path weights, instead of the flow with
            its determinants, whose cost grows with the cube of the dimension. None: above 32 dimensions.
        annealing: densities that particles follow on their way from the warm start to the posterior:
            'geometric' (linear levels), 'adaptive' (geometric, with levels that keep a conditional effective
            sample fraction of 0.95), 'convolution' (with noise; in few dimensions), 'dilation', 'tempering',
            or None for the posterior itself. For flows.
{_COMMON.strip(chr(10))}

    Raises:
        ValueError: for values out of range, and for options that do not go together, at once; `init` and
            `MCMC.run` raise for models that do not fit.
        TypeError: for values of another type, such as a float as a number of steps, and unknown options.

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
        num_particles: int = 16384,
        num_maps: int = 50,
        num_updates: int = 10,
        batch_size: int = 2048,
        solved_output: bool = False,
        duration: float = 1.5,
        tolerance: float | None = None,
        learning_rate: float = 1e-3,
        width: int = 64,
        depth: int = 2,
        scale: float = 1.2,
        noisy: bool | None = None,
        annealing: str | None = None,
        target_acceptance: float | None = None,
        precondition: Precondition | AutoGuide = "auto",
        always_train: bool = False,
        correction: str | None = "metropolis",
        shared: bool = True,
        block_size: int = 4096,
        steps_per_draw: int = 4,
        local_kernel: str | None = "auto",
        smc_particles: int = 16,
        forward_mode_differentiation: bool = False,
        init_strategy: Callable[..., Any] = init_to_uniform,
    ) -> None:
        super().__init__(
            model,
            potential_fn,
            target_acceptance=target_acceptance,
            precondition=precondition,
            always_train=always_train,
            correction=correction,
            shared=shared,
            block_size=block_size,
            steps_per_draw=steps_per_draw,
            local_kernel=local_kernel,
            smc_particles=smc_particles,
            forward_mode_differentiation=forward_mode_differentiation,
            init_strategy=init_strategy,
        )
        self._annealing = one_of("annealing", annealing, (*ANNEALINGS, None))
        self._num_maps = whole("num_maps", num_maps, 1, _MOST_STEPS)
        self._num_particles = whole("num_particles", num_particles, 3)
        self._num_updates = whole("num_updates", num_updates, 1, _MOST_STEPS)
        self._batch_size = min(whole("batch_size", batch_size), self._num_particles)
        self._solved_output = flag("solved_output", solved_output)
        self._learning_rate = positive("learning_rate", learning_rate, 1.0)
        self._net = whole("width", width, 1, _MOST_UNITS), whole("depth", depth, 1, _MOST_LAYERS)
        self._duration = positive("duration", duration, 1e3)
        self._tolerance = optional(positive, "tolerance", tolerance, 10.0)
        self._noisy = optional(flag, "noisy", noisy)
        self._scale = number("scale", scale, *_SCALES)
        if annealing is not None and noisy:
            raise ValueError(
                f"`annealing` is {annealing!r} and asks for a flow, but `noisy` is True. Pass one of them."
            )

    def _is_noisy(self, dim: int) -> bool:
        return dim > _MAX_FLOW_DIM if self._noisy is None else self._noisy

    def _check_posterior(self, logdensity_fn: LogDensity, x: Float[Array, " d"]) -> None:
        dim = len(x)
        if self._num_particles < dim + 2:
            raise ValueError(
                f"`num_particles` must exceed the dimension {dim} by two or more for a regular covariance, "
                f"got {self._num_particles}."
            )
        if self._annealing is not None and self._is_noisy(dim):
            raise ValueError(
                f"`annealing` is {self._annealing!r} and asks for a flow, but in {dim} dimensions proposals "
                f"are noisy by default, above {_MAX_FLOW_DIM}. Pass `noisy=False`, or no annealing."
            )

    def _algorithm(self, target: Target, located: Located, num_warmup: int) -> Algorithm:
        num_maps = min(self._num_maps, num_warmup)
        # where the warm start had to look for the posterior's shape, or found it, it is not made wider
        plain = len(located.reference.log_weight) == 1 and getattr(located.whitening, "margins", None) is None
        scale = jnp.where(located.near_exact(), 1.0, self._scale) if plain else 1.0
        return sbtm(
            target,
            score_mlp(*self._net),
            optax.adamw(self._learning_rate, weight_decay=0.1),
            num_maps=num_maps,
            steps_per_map=num_warmup // num_maps,
            duration=self._duration,
            tolerance=self._tolerance,
            base=located.reference._replace(std=scale * located.reference.std),
            noisy=self._is_noisy(target.dim),
            goal=self._goal,
            smc_particles=self._smc_particles,
            annealing=None if self._annealing is None else ANNEALINGS[self._annealing](),
            num_particles=self._num_particles,
            num_updates=self._num_updates,
            batch_size=self._batch_size,
            solved_output=self._solved_output,
        )
