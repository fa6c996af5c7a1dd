# SPDX-License-Identifier: Apache-2.0
"""Options in groups: how a posterior is looked for, how a method is trained, how draws are corrected."""

from dataclasses import dataclass
from typing import Any, TypeVar

from numpyro_sbtm.checks import (
    flag,
    names_unknown_options,
    number,
    one_of,
    optional,
    positive,
    shown,
    whole,
)
from numpyro_sbtm.core.local import LOCAL_KERNELS, LocalMove
from numpyro_sbtm.core.options import MOST_STEPS, DiffusionOptions, TransportOptions, put

__all__ = ["Correction", "DiffusionTraining", "Search", "TransportTraining", "group_of"]

Group = TypeVar("Group")

_MOST_PARTICLES = 2**16
_SCALES = 1e-6, 1e6  # float32 has squares of these, and what is left of one when they are added


def _named(group: type[Group]) -> type[Group]:
    """Let a group say whose option an unknown keyword is."""
    setattr(group, "__init__", names_unknown_options(group.__init__))  # noqa: B010
    return group


@_named
@dataclass(frozen=True, kw_only=True)
class Search:
    """How the posterior is looked for, before anything is learned.

    Few particles look first, under a map that is affine, then under one that bends; where draws of what they
    show are good, that is all. Else half of ``num_particles`` look, with one move per temperature, and last,
    where training would not know where to begin, all of them.

    Attributes:
        num_starts: points from which modes are climbed and maps fitted, an even number: half come from the
            initialisation strategy, half from the prior.
        num_prior_draws: points, drawn from the prior, that say how widely the posterior may lie; modes are
            climbed from them, too.
        first_particles: tempered particles of the first looks; 0: all look at once.
        num_particles: of the last look; 0: none look, ever. What is found is then the best of the fits,
            nothing has looked for other modes, and no run is called better than "caution".
        num_moves: HMC transitions of a particle per temperature, in the last look.
        num_checked: fresh draws by which what was found is judged.
        mixture_rounds: rounds in which draws better the mixture, each of as many as judge it; 0: none.
        max_mixture_dim: dimensions up to which they do.
        max_dense_dim: dimensions up to which maps have matrices.
        rank: of the map beyond.
        refine: whether a map is fitted to the particles, which move under it and are fitted again, for
            posteriors with a neck or a long tail: three million gradients more, up to ``max_dense_dim``.

    Raises:
        ValueError: for values out of range.
        TypeError: for values of another type.

    Examples:
        >>> from numpyro_sbtm import Search
        >>> Search(num_particles=1024).num_starts
        8
        >>> Search.quick().num_particles
        0
    """

    num_starts: int = 8
    num_prior_draws: int = 128
    first_particles: int = 512
    num_particles: int = 4096
    num_moves: int = 3
    num_checked: int = 2048
    mixture_rounds: int = 3
    max_mixture_dim: int = 64
    max_dense_dim: int = 128
    rank: int = 16
    refine: bool = False

    def __post_init__(self) -> None:
        put(
            self,
            num_starts=whole("num_starts", self.num_starts, 2, 1024),
            num_prior_draws=whole("num_prior_draws", self.num_prior_draws, 2, 2**14),
            first_particles=whole("first_particles", self.first_particles, 0, 2**20),
            num_particles=whole("num_particles", self.num_particles, 0, 2**20),
            num_moves=whole("num_moves", self.num_moves, 1, 1000),
            num_checked=whole("num_checked", self.num_checked, 100, 2**20),
            mixture_rounds=whole("mixture_rounds", self.mixture_rounds, 0, 100),
            max_mixture_dim=whole("max_mixture_dim", self.max_mixture_dim, 0),
            max_dense_dim=whole("max_dense_dim", self.max_dense_dim, 0),
            rank=whole("rank", self.rank, 1, 1024),
            refine=flag("refine", self.refine),
        )
        if self.num_starts % 2:
            raise ValueError(
                f"`num_starts` must be even, for halves from strategy and prior, got {self.num_starts}."
            )
        if self.refine and not self.num_particles:
            raise ValueError("`refine` fits a map to particles, but `num_particles` is 0. Pass 4096.")

    @classmethod
    def quick(cls) -> "Search":
        """Make the search for a model's own tests: the best of a few fits, which sees one mode at most."""
        return cls(num_starts=2, num_prior_draws=8, first_particles=0, num_particles=0, num_checked=256)


@_named
@dataclass(frozen=True, kw_only=True)
class DiffusionTraining(DiffusionOptions):
    """How a kernel trains a learned diffusion: `DiffusionOptions`, with other defaults, and more.

    Attributes:
        num_steps: steps of the diffusion, T.
        learning_rate: of Adam, at most 1, decaying along a cosine over warm-up, where no ``optimizer`` is
            given.
        scale: standard deviation of the noise, in whitened units.
        score_clip: bound on each coordinate of the target's score, relative to the reference's and in units
            of the noise, where it enters the forward chain; 0 keeps it out. None: 3 for 'dis', 10 for the
            others.
        look_ahead: 'dis' also evaluates the target's score at a guess of where the path ends: twice the
            gradients, a better bound (see `numpyro_sbtm.core.processes.dis.dis`).
        num_times: as in `DiffusionOptions`; all for 'kl'.
        coarse_steps: as in `DiffusionOptions`, and at most ``num_steps``.
        patience: as in `DiffusionOptions`; None: training takes all of warm-up.
        always: train also where draws of what was found are good enough as proposals (an effective fraction
            above 0.5, k̂ below 0.7, particles without drift). Raw draws, and chains with samplers of their
            own, always are of trained ones.

    Raises:
        ValueError: for values out of range.
        TypeError: for values of another type, such as a float as a number of steps.

    Examples:
        >>> from numpyro_sbtm import DiffusionTraining
        >>> DiffusionTraining(num_steps=8).num_paths
        256
    """

    num_steps: int = 32
    num_times: int | None = 16
    coarse_steps: int | None = 10
    learning_rate: float = 2e-3
    scale: float = 1.0
    score_clip: float | None = None
    look_ahead: bool = False
    always: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        num_steps = whole("num_steps", self.num_steps, 1, MOST_STEPS)
        put(
            self,
            num_steps=num_steps,
            coarse_steps=None if self.coarse_steps is None else min(self.coarse_steps, num_steps),
            learning_rate=positive("learning_rate", self.learning_rate, 1.0),
            scale=number("scale", self.scale, *_SCALES),
            score_clip=optional(number, "score_clip", self.score_clip, 0.0, 1e6),
            look_ahead=flag("look_ahead", self.look_ahead),
            always=flag("always", self.always),
        )


@_named
@dataclass(frozen=True, kw_only=True)
class TransportTraining(TransportOptions):
    """How a kernel trains score-based transport: `TransportOptions`, with other defaults, and more.

    Attributes:
        num_maps: transport steps; at most ``num_warmup`` are made.
        learning_rate: of Adam with weight decay, where no ``optimizer`` is given.
        scale: standard deviation of the particles' first law, in whitened units, where what was found is one
            normal distribution and not near exact.
        always: as in `DiffusionTraining`.

    Raises:
        ValueError: for values out of range.
        TypeError: for values of another type, such as a float as a number of particles.

    Examples:
        >>> from numpyro_sbtm import TransportTraining
        >>> TransportTraining(num_maps=20).num_particles
        16384
    """

    num_particles: int = 16384
    batch_size: int = 2048
    duration: float = 1.5
    learning_rate: float = 1e-3
    scale: float = 1.2
    always: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        put(
            self,
            learning_rate=positive("learning_rate", self.learning_rate, 1.0),
            scale=number("scale", self.scale, *_SCALES),
            always=flag("always", self.always),
        )
        if self.quasi:
            raise ValueError(
                "`quasi` asks for one normal distribution as first law, but a kernel's is the mixture that "
                "was found. Pass `quasi=False`."
            )


@_named
@dataclass(frozen=True, kw_only=True)
class Correction:
    """How draws are made of proposals.

    Attributes:
        metropolis: make draws by Metropolis steps, so that the chains leave the posterior invariant, however
            well or badly the sampler is trained. False returns raw draws.
        steps_per_draw: Metropolis steps per draw. A proposal is cheap beside training, and a few of them
            keep a chain from lingering where its weight is large.
        block_size: about how many proposals are made at a time.
        local_kernel: a local move that ends every draw and leaves the posterior invariant: 'hmc' (8 leapfrog
            steps), 'mala', 'nuts', a `LocalMove`, or None. Proposals travel between modes; it repairs what
            they get wrong within one. 'auto' is 'hmc', but None where chains of what was found mix well
            without: a draw is then worth 0.3 effective ones at least.
        num_particles: where Pareto k̂ of the proposals is above 0.7, each is replaced by one chosen among so
            many, with their mean weight: by a particle filter along the paths, for a flow without noise
            among independent draws. Draws stay exact and cost as many times more; below two: never. It is not
            done for large data, nor with ``shared=False``.
        shared: whether chains share one trained sampler; False trains one for each. Chains that share a
            sampler share what it misses: R-hat cannot see a mode that is never proposed.

    Raises:
        ValueError: for values out of range.
        TypeError: for values of another type.

    Examples:
        >>> from numpyro_sbtm import Correction
        >>> Correction(steps_per_draw=1).local_kernel
        'auto'
    """

    metropolis: bool = True
    steps_per_draw: int = 4
    block_size: int = 4096
    local_kernel: str | LocalMove | None = "auto"
    num_particles: int = 16
    shared: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.local_kernel, LocalMove):
            one_of("local_kernel", self.local_kernel, ("auto", *LOCAL_KERNELS, None))
        put(
            self,
            metropolis=flag("metropolis", self.metropolis),
            steps_per_draw=whole("steps_per_draw", self.steps_per_draw),
            block_size=whole("block_size", self.block_size),
            num_particles=whole("num_particles", self.num_particles, 0, _MOST_PARTICLES),
            shared=flag("shared", self.shared),
        )


def group_of(name: str, group: type, value: Any) -> Any:
    """Check that an option is a group.

    Raises:
        TypeError: otherwise.
    """
    if not isinstance(value, group):
        raise TypeError(
            f"`{name}` must be a `{group.__name__}`, got {shown(value)}. Pass `{group.__name__}(...)`."
        )
    return value
