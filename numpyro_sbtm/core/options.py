# SPDX-License-Identifier: Apache-2.0
"""Options of the two methods, with their defaults; whatever is out of range is refused at once."""

from dataclasses import dataclass
from typing import Any

from numpyro_sbtm.checks import flag, number, optional, positive, probability, whole

__all__ = ["MOST_STEPS", "DiffusionOptions", "TransportOptions", "put"]

MOST_STEPS = 2**20
_MAX_FLOW_DIM = 32  # a draw of a flow costs as many Jacobian-vector products as there are dimensions


def put(group: Any, **values: Any) -> None:
    """Put checked values into a frozen group: numbers of NumPy become Python's."""
    for name, value in values.items():
        object.__setattr__(group, name, value)


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions:
    """How a learned diffusion is trained.

    Attributes:
        num_paths: paths simulated per training step.
        num_times: at most how many of the T times enter each gradient, drawn anew for each update; None: all.
        num_updates: updates on each block of simulated paths, which cost no call of the target. More than one
            needs a divergence that is valid off policy.
        coarse_steps: a process that can trains on so many of its steps, drawn anew for every block, while
            everything else is done on all; None: on all.
        trust_region: with several updates, they aim at the law between that of the block's own chain and that
            of the target whose KL divergence from the former is this, in nats; None: at the target.
        buffer_size: how many ends of earlier paths are kept, resampled by weight in every step, as ends of
            backward paths for training; 0: those that are given stay.
        backward_share: share of paths that the backward chain makes from such ends.
        exploration: training simulates with noise larger by this part, where the divergence is valid off
            policy.
        exploration_steps: over how many steps that falls to nothing; None: it stays, and in a kernel it falls
            over the first half of warm-up.
        average_decay: decay of the moving average of the parameters, per update; less in the first steps.
        target_acceptance: training ends once proposals that vary as its log weights do, on average over 50
            steps, would be accepted with this probability (see `numpyro_sbtm.core.weights.log_variance_at`);
            None: once it gains nothing more.
        patience: training ends, too, once the variance of the log weights has not fallen by a twentieth in so
            many steps; None: never,
        good_enough: provided that it is below this.

    Raises:
        ValueError: for values out of range.
        TypeError: for values of another type, such as a float as a number of steps.

    Examples:
        >>> from numpyro_sbtm.core import DiffusionOptions
        >>> DiffusionOptions(num_paths=64).num_updates
        1
    """

    num_paths: int = 256
    num_times: int | None = None
    num_updates: int = 1
    coarse_steps: int | None = None
    trust_region: float | None = None
    buffer_size: int = 0
    backward_share: float = 0.25
    exploration: float = 0.0
    exploration_steps: int | None = None
    average_decay: float = 0.99
    target_acceptance: float | None = 0.9
    patience: int | None = 100
    good_enough: float = 0.8

    def __post_init__(self) -> None:
        put(
            self,
            num_paths=whole("num_paths", self.num_paths, 2),
            num_times=optional(whole, "num_times", self.num_times),
            num_updates=whole("num_updates", self.num_updates, 1, MOST_STEPS),
            coarse_steps=optional(whole, "coarse_steps", self.coarse_steps),
            trust_region=optional(positive, "trust_region", self.trust_region, 1e6),
            buffer_size=whole("buffer_size", self.buffer_size, 0),
            backward_share=number("backward_share", self.backward_share, 0.0, 1.0),
            exploration=number("exploration", self.exploration, 0.0, 10.0),
            exploration_steps=optional(whole, "exploration_steps", self.exploration_steps),
            average_decay=number("average_decay", self.average_decay, 0.0, 1.0),
            target_acceptance=optional(probability, "target_acceptance", self.target_acceptance),
            patience=optional(whole, "patience", self.patience, 0),
            good_enough=number("good_enough", self.good_enough, 0.0, 1e6),
        )


@dataclass(frozen=True, kw_only=True)
class TransportOptions:
    """How particles are transported.

    Attributes:
        num_particles: training particles, n.
        num_maps: the number of maps, K.
        num_updates: updates of the network per training step.
        batch_size: particles per update.
        duration: total time of the transport; the time step is ``duration / num_maps`` or less.
        tolerance: error that a step may make, ½ h² |dv/dt| in root mean square over the particles and in
            their deviations, from the last two velocities. Steps are then as long as that allows, at most
            twice the last one, and end with ``duration``, or after ``num_maps`` of them. None: all steps are
            alike.
        heun: whether a second velocity is learned where every step would end, and steps follow the mean of
            both: errors of the path are then of second order in the step, for twice the gradients and
            evaluations and the updates of one more step. A ``tolerance`` bounds the error of the first half
            alone. For flows.
        noisy: whether draws follow the maps with noise, with exact path weights, instead of the flow with its
            determinants, whose cost grows with the cube of the dimension. The noise is chosen at the end of
            training, by the variance of the weights. None: above 32 dimensions.
        preconditioned: whether velocities are multiplied by the particles' covariance, so that near the end
            stiff directions relax like all others; time is then in units of that. For flows.
        solved_output: whether every map takes the best output layer for its network's features, solved for on
            all particles with a ridge that held-out points choose, in the place of the one in training. It
            leaves of the network what those points support, and errors of scores are then several times
            smaller. The net must have `Net.features`, as `numpyro_sbtm.networks.score_mlp` has.
        max_stretch: bound on h Lip(v), estimated on particles, that shortens steps; below one. With ``heun``
            also on that of both velocities' mean.
        max_rounds: rounds of ``num_updates`` per step at most; more than one end once the score matching loss
            of points that are not trained on stops falling, the best parameters are kept, and a map that does
            not fit those points clearly better than its affine part goes without its network.
        first_updates: updates of the network before the first map, whose velocity is known: the first law's
            score is.
        num_probes: how many points are carried along that are not trained on, m.
        quasi: whether particles and held-out points start with low discrepancy instead of independently, the
            particles with exactly the base's mean and covariance; the base must be a `Gaussian`. Errors of
            means over them are then smaller than their standard errors.
        target_acceptance: training ends once proposals that vary as the probes' log weights do would be
            accepted with this probability (see `numpyro_sbtm.core.weights.log_variance_at`); None: never.

    Raises:
        ValueError: for values out of range, and for what asks for a flow with noise.
        TypeError: for values of another type, such as a float as a number of particles.

    Examples:
        >>> from numpyro_sbtm.core import TransportOptions
        >>> TransportOptions(num_maps=20).num_particles
        1024
    """

    num_particles: int = 1024
    num_maps: int = 50
    num_updates: int = 10
    batch_size: int = 256
    duration: float = 2.0
    tolerance: float | None = None
    heun: bool = False
    noisy: bool | None = None
    preconditioned: bool = False
    solved_output: bool = False
    max_stretch: float = 0.5
    max_rounds: int = 1
    first_updates: int = 0
    num_probes: int = 1024
    quasi: bool = False
    target_acceptance: float | None = None

    def __post_init__(self) -> None:
        num_particles = whole("num_particles", self.num_particles, 3)
        put(
            self,
            num_particles=num_particles,
            num_maps=whole("num_maps", self.num_maps, 1, MOST_STEPS),
            num_updates=whole("num_updates", self.num_updates, 1, MOST_STEPS),
            batch_size=min(whole("batch_size", self.batch_size), num_particles),
            duration=positive("duration", self.duration, 1e3),
            tolerance=optional(positive, "tolerance", self.tolerance, 10.0),
            heun=flag("heun", self.heun),
            noisy=optional(flag, "noisy", self.noisy),
            preconditioned=flag("preconditioned", self.preconditioned),
            solved_output=flag("solved_output", self.solved_output),
            max_stretch=probability("max_stretch", self.max_stretch),
            max_rounds=whole("max_rounds", self.max_rounds, 1, MOST_STEPS),
            first_updates=whole("first_updates", self.first_updates, 0, MOST_STEPS),
            num_probes=whole("num_probes", self.num_probes, 2),
            quasi=flag("quasi", self.quasi),
            target_acceptance=optional(probability, "target_acceptance", self.target_acceptance),
        )
        if self.noisy:
            self.check_flow()

    def is_noisy(self, dim: int) -> bool:
        """Say whether draws follow the maps with noise in so many dimensions."""
        return dim > _MAX_FLOW_DIM if self.noisy is None else self.noisy

    def check_dim(self, dim: int, annealing: str | None = None) -> None:
        """Refuse what does not go with a dimension, before anything is computed.

        Args:
            dim: the dimension d.
            annealing: how it is called in an error; None where there is none.

        Raises:
            ValueError: for too few particles, and for what asks for a flow where draws are noisy.
        """
        if self.num_particles < dim + 2:
            raise ValueError(
                f"`num_particles` must exceed the dimension {dim} by two or more for a regular covariance, "
                f"got {self.num_particles}."
            )
        if self.is_noisy(dim):
            self.check_flow()
            if annealing is not None:
                by_default = f", as in {dim} dimensions by default," if self.noisy is None else ""
                raise ValueError(
                    f"`annealing` is {annealing} and asks for a flow, but draws are noisy{by_default} and "
                    "move by the target's own score. Pass `noisy=False`, or no annealing."
                )

    def check_flow(self) -> None:
        """Refuse what asks for a flow, where draws are noisy."""
        if self.preconditioned:
            raise ValueError(
                "`preconditioned` asks for a flow: noisy draws take the same noise in all directions. Pass "
                "`noisy=False`."
            )
        if self.heun:
            raise ValueError(
                "`heun` asks for a flow: a step with noise is of first order. Pass `noisy=False`."
            )
