# SPDX-License-Identifier: Apache-2.0
"""The trained sampler: a posterior with all that was learned of it. It draws, weighs, and makes chains."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.checks import shown, whole
from numpyro_sbtm.compile import is_traced
from numpyro_sbtm.core.algorithm import Algorithm, Draws, Proposal
from numpyro_sbtm.core.chain import Chain, ChainInfo, ChainState, Point, independence_chain
from numpyro_sbtm.core.decay import Rays, decay
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.evidence import Estimate, from_proposals
from numpyro_sbtm.core.importance import importance
from numpyro_sbtm.core.maps import whiten
from numpyro_sbtm.core.psis import USABLE_KHAT, judged_tail_index
from numpyro_sbtm.core.target import Key, Keys, LogDensity, Target
from numpyro_sbtm.files import read_learned, write_learned
from numpyro_sbtm.learned import Learned, Settings

__all__ = ["Posterior", "Run", "Sampler", "WeightedDraws", "absolute", "checked_key", "rays", "trained"]

_SHORTER = 4  # training ends after this part of warm-up where the search's draws are near exact
_SHORTEST_STEP = 0.01  # step sizes of local moves vary by this factor where they were adapted to other data


@dataclass(frozen=True, eq=False)
class Posterior:
    """What is sampled, as functions of data that may change.

    Attributes:
        dim: the dimension d of the unconstrained space.
        density: ``data -> log density`` of a point of R^d.
        unravel: from a point of R^d to the values of latent sites, unconstrained.
        sites: ``data -> (point of R^d -> values of all sites)``.
        proper: whether it is known to have a finite integral.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.sampler import Posterior
        >>> posterior = Posterior.of(lambda x: -0.5 * jnp.sum(x**2), 2)
        >>> float(posterior.density(())(jnp.ones(2)))
        -1.0
    """

    dim: int
    density: Callable[[Any], LogDensity]
    unravel: Callable[[Float[Array, " d"]], Any]
    sites: Callable[[Any], Callable[[Float[Array, " d"]], Any]]
    proper: bool = False

    @classmethod
    def of(cls, logdensity_fn: LogDensity, dim: int) -> "Posterior":
        """Make the posterior of a log density on R^d, without data."""
        return cls(dim, lambda data: logdensity_fn, lambda x: {"x": x}, lambda data: lambda x: x)


class WeightedDraws(NamedTuple):
    """Independent draws of the proposal with exact weights.

    Attributes:
        sites: values of the model's sites, or of x where there is no model; leading axis ``[n]``.
        x: points of the flattened unconstrained space, shape ``[n, d]``.
        log_weight: log of unnormalised posterior over proposal, of the point or of the path, float64, shape
            ``[n]``; NaN or -inf where there is none.
        logdensity: the unnormalised log density at x, float64, shape ``[n]``.
        one_to_one: as in `Draws`, shape ``[n]``.
    """

    sites: Any
    x: Float[Array, "n d"]
    log_weight: Float[np.ndarray, " n"]
    logdensity: Float[np.ndarray, " n"]
    one_to_one: Bool[Array, " n"]


class Run(NamedTuple):
    """Chains that `Sampler.sample` made.

    Attributes:
        sampler: what made them.
        sites: exact draws: values of the model's sites, or of x where there is no model; leading axes
            ``[C, n]``, as ArviZ has them.
        x: points of the flattened unconstrained space, shape ``[C, n, d]``.
        log_weight: log of unnormalised posterior over proposal of every state, float64, shape ``[C, n]``.
        acceptance: mean acceptance probability of every chain's proposals, shape ``[C]``.
        nonfinite: proposals whose weight was not finite, shape ``[C]``.
        state: of the chains, from which they go on (see `Sampler.chain`).
        key: random key for what comes next.
    """

    sampler: "Sampler"
    sites: Any
    x: Float[Array, "C n d"]
    log_weight: Float[np.ndarray, "C n"]
    acceptance: Float[Array, " C"]
    nonfinite: Int[Array, " C"]
    state: ChainState
    key: Key


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "learned", "several"),
    meta_fields=("posterior", "settings"),
)
@dataclass(frozen=True)
class Sampler:
    """A posterior with what was learned of it. A pytree, of which data and parameters are the leaves.

    It holds neither particles nor an optimiser. `learn` makes it.

    Attributes:
        posterior: what is sampled.
        settings: what was chosen before.
        data: of the posterior.
        learned: all that was found and trained.
        several: whether each proposal is chosen among several, single ones having been found poor, shape
            ``[]``; None: never.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.density import learn_density
        >>> density = lambda x: -0.5 * jnp.sum((x - 1) ** 2)
        >>> sampler = learn_density(jax.random.key(0), density, jnp.zeros((1, 2)), num_steps=50)
        >>> run = sampler.sample(jax.random.key(1), 500)
        >>> run.x.shape, round(float(run.x.mean()), 1)
        ((4, 500, 2), 1.0)
        >>> round(sampler.evidence(jax.random.key(2)).log_evidence, 2)  # log 2π
        1.84
    """

    posterior: Posterior
    settings: Settings
    data: Any
    learned: Learned
    several: Bool[Array, ""] | None = None

    # ------------------------------------------------------------------ for everyone
    def draw(self, key: Key, n: int = 1000) -> WeightedDraws:
        """Make independent draws of the proposal, with exact weights.

        Args:
            key: random key.
            n: the number of draws.

        Raises:
            TypeError: for what is no key or no number.
            ValueError: for less than one draw.
        """
        n = whole("n", n)
        draws = _draw(self, checked_key(key), n)
        sites, logdensity = _sites(self, draws.x), self.absolute(draws.logdensity)
        return WeightedDraws(sites, draws.x, self.absolute(draws.log_weight), logdensity, draws.one_to_one)

    def weigh(self, key: Key, x: Float[Array, "n d"]) -> Float[np.ndarray, " n"]:
        """Weigh given points as draws.

        For draws of the posterior the mean log weight is an upper bound of the log evidence (EUBO), where
        that of proposals is a lower bound (ELBO). Unlike the latter it sees what is never proposed.

        Args:
            key: random key.
            x: points of the flattened unconstrained space, as `WeightedDraws.x`, shape ``[n, d]``.

        Returns:
            Log of unnormalised posterior over proposal, of the point or of a fresh path that ends there, in
            float64, shape ``[n]``; infinite for what is never proposed, NaN if it cannot be computed.

        Raises:
            TypeError: for what is no key.
            ValueError: for points of another shape.

        Reference:
            EUBO: Blessing et al. (2024), Beyond ELBOs, arXiv:2406.07423, section 4.
        """
        dim = self.posterior.dim
        if jnp.ndim(x) != 2 or jnp.shape(x)[1] != dim or not len(x):
            raise ValueError(
                f"`x` must be points of the flattened unconstrained space, [n, {dim}], got shape "
                f"{list(jnp.shape(x))}. `draw` gives such points, `WeightedDraws.x`."
            )
        return self.absolute(_weigh(self, checked_key(key), jnp.asarray(x, self.learned.loss.dtype)))

    def evidence(self, key: Key, n: int = 4000) -> Estimate:
        """Estimate the log evidence by the mean weight of fresh draws, which neither chains nor training saw.

        Args:
            key: random key.
            n: the number of draws.
        """
        return from_proposals(self.draw(key, n).log_weight)

    def sample(self, key: Key, num_samples: int = 1000, num_chains: int = 4) -> Run:
        """Make exact draws by chains of independence Metropolis with local moves.

        Args:
            key: random key.
            num_samples: draws of each chain.
            num_chains: the number of chains.

        Raises:
            TypeError: for what is no key or no number.
            ValueError: for less than one draw or chain.
        """
        num_samples, num_chains = whole("num_samples", num_samples), whole("num_chains", num_chains)
        key_run, key_next = jax.random.split(checked_key(key))
        state, points, info = _sample(self, key_run, num_samples, num_chains)
        return Run(
            sampler=replace(self, several=state.several),
            sites=jax.vmap(lambda x: _sites(self, x))(points.x),
            x=points.x,
            log_weight=self.absolute(points.log_weight),
            acceptance=jnp.mean(info.acceptance, 1),
            nonfinite=jnp.sum(info.nonfinite, 1),
            state=state,
            key=key_next,
        )

    def save(self, path: str | Path) -> None:
        """Write what was learned into a new folder, from which `numpyro_sbtm.load` or `load` reads it.

        The model and its data are not written, nor is what was chosen, but for a few words of what draws
        depend on.

        Args:
            path: the folder; it must not exist, or be empty.

        Raises:
            FileExistsError: if there is something.
            TypeError: for a `precondition` or parameters that are no trees of arrays of known types.
        """
        write_learned(path, self.learned, self.several, self.settings.method.words())

    @classmethod
    def load(cls, path: str | Path, logdensity_fn: LogDensity, settings: Settings) -> "Sampler":
        """Read a sampler of a log density (see `learn_density`); `numpyro_sbtm.load` reads those of models.

        Args:
            path: the folder.
            logdensity_fn: the log density that it was learned for.
            settings: what was chosen, as ``sampler.settings``.

        Raises:
            FileNotFoundError: if it is not there, or not whole.
            ValueError: for another format, other settings, and arrays that this precision does not hold.

        Examples:
            >>> import tempfile, jax, jax.numpy as jnp
            >>> from numpyro_sbtm import Sampler, learn_density
            >>> density = lambda x: -0.5 * jnp.sum(x**2)
            >>> sampler = learn_density(jax.random.key(0), density, jnp.zeros((1, 2)), num_steps=50)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     sampler.save(folder)
            ...     again = Sampler.load(folder, density, sampler.settings)
            >>> key = jax.random.key(1)
            >>> bool((again.draw(key, 10).x == sampler.draw(key, 10).x).all())
            True
        """
        learned, several = read_learned(path, settings.method.words())
        dim = learned.located.reference.centre.shape[-1]
        return cls(Posterior.of(logdensity_fn, dim), settings, (), learned, several)

    def absolute(self, log_density: Float[Array, "*n"]) -> Float[np.ndarray, "*n"]:
        """Give log densities or log weights their offset back, in float64."""
        return absolute(log_density, self.learned.offset)

    # ------------------------------------------------------------------ the proposal
    @property
    def target(self) -> Target:
        """The unnormalised density on R^d, relative to ``learned.offset``."""
        density, offset = self.posterior.density(self.data), self.learned.offset
        return Target(lambda x: density(x) - offset, self.posterior.dim)

    @property
    def _white(self) -> Target:
        return whiten(self.target, self.learned.located.whitening)

    @property
    def _algorithm(self) -> Algorithm:
        return self.settings.method.algorithm(
            self._white,
            self.learned.located,
            self.learned.loss.shape[-1],
            self.settings.correction.num_particles,
        )

    def _use(self, use: Callable[[Proposal], Any]) -> Any:
        """Use the trained proposal, or the one of several draws each where single ones were found poor."""
        if self.learned.params is None:
            return use(importance(self._white, self.learned.located.reference))
        algorithm = self._algorithm
        dearer, several = algorithm.several, self.several
        if several is None or dearer is None:
            return use(algorithm.proposal)
        return jax.lax.cond(several, lambda: use(dearer), lambda: use(algorithm.proposal))

    def propose(self, key: Key, n: int) -> Draws:
        """Draw n proposals with exact weights, relative to the offset; NaN where there is none.

        Args:
            key: random key.
            n: number of proposals, static.
        """
        draws = self._use(lambda proposal: proposal.draw(key, self.learned.params, n))
        x, log_det = jax.vmap(lambda u: self.learned.located.whitening.forward(u))(draws.x)
        usable = jnp.isfinite(draws.log_weight) & jnp.all(jnp.isfinite(x), -1)
        log_weight = jnp.where(usable, draws.log_weight, jnp.nan)
        return Draws(x, log_weight, draws.logdensity - log_det, draws.one_to_one)

    def weights(self, key: Key, x: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Weigh given points as draws, relative to the offset."""
        u = jax.vmap(lambda point: self.learned.located.whitening.inverse(point)[0])(x)

        def of(proposal: Proposal) -> Float[Array, " n"]:
            keys = jax.random.split(key, len(x))
            return jax.vmap(lambda k, point: proposal.weigh(k, self.learned.params, point))(keys, u)

        return self._use(of)

    def rays(self, key: Key, x: Float[Array, "n d"], log_weight: Float[Array, " n"]) -> Rays:
        """Find out along which rays from weighted points the density does not fall."""
        return decay(key, self.target, self.learned.located.whitening, x, log_weight)

    def spent_by(self, state: ChainState) -> Evaluations:
        """Count what chains in this state have evaluated, in numbers of Python."""
        chains, draws = int(np.prod(state.point.log_weight.shape)), int(state.num_draws)
        each = int(np.prod(state.block.log_weight.shape))
        blocks, dearer = int(state.num_blocks), 0
        if state.several is not None and bool(state.several):
            dearer = blocks - 1  # the first, of single draws, was found poor
        one, several = self._costs()
        moves = round(float(np.mean(np.asarray(state.gradients))) * draws * chains)
        weights = one.times(draws * chains if moves else 0)
        return (
            one.times((blocks - dearer) * each)
            .plus(several.times(dearer * each))
            .plus(weights)
            .plus(Evaluations(gradients=moves))
        )

    def _costs(self) -> tuple[Evaluations, Evaluations]:
        """Count what a proposal costs, and one that is chosen among several."""
        if self.learned.params is None:
            return Evaluations(values=1), Evaluations(values=1)
        algorithm = self._algorithm
        one = algorithm.proposal.cost
        return one, one if algorithm.several is None else algorithm.several.cost

    def cost(self) -> Evaluations:
        """Count what a draw of the proposal costs."""
        chosen = self.several is not None and bool(self.several)
        return self._costs()[chosen]

    # ------------------------------------------------------------------ training
    def trained(self, key: Key) -> "Sampler":
        """Do all of the training, until it gains nothing more or all steps are done."""
        learned, algorithm = self.learned, self._algorithm
        num_steps = learned.loss.shape[-1]
        enough = num_steps // _SHORTER if self.settings.method.shortens else num_steps

        def step(now: "_Progress") -> "_Progress":
            k = now.num_steps
            state, info = algorithm.step(jax.random.fold_in(key_steps, k), now.state)
            new = _Progress(
                state=state,
                num_steps=k + 1,
                loss=now.loss.at[k].set(info.loss.astype(now.loss.dtype)),
                skipped=now.skipped + info.skipped,
                spent=now.spent.plus(Evaluations(gradients=info.gradients)),
                finished=info.finished | (learned.located.near_exact() & (k + 1 >= enough)),
            )
            return jax.tree.map(lambda leaf, before: leaf.astype(before.dtype), new, now)

        key_init, key_steps = jax.random.split(key)
        first = _Progress(
            algorithm.init(key_init),
            learned.num_steps,
            learned.loss,
            learned.skipped_updates,
            learned.spent,
            jnp.zeros((), bool),
        )
        # a weakly typed leaf would turn strong in the first step
        first = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), first)
        end = jax.lax.while_loop(lambda now: (now.num_steps < num_steps) & ~now.finished, step, first)
        after = learned._replace(
            located=learned.located._replace(points=None),
            params=algorithm.parameters(end.state),
            num_steps=end.num_steps,
            loss=end.loss,
            skipped_updates=end.skipped,
            spent=end.spent,
        )
        return replace(self, learned=after)

    # ------------------------------------------------------------------ chains
    def chain(self, foreign: Bool[Array, ""] | None = None) -> Chain:
        """Make chains that leave the posterior invariant: pure functions, relative to the offset.

        Args:
            foreign: whether the sampler was trained for other data, shape ``[]``: then a local move, of a
                step size that varies more, ends every draw. None: it was not.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from numpyro_sbtm.density import learn_density
            >>> density, start = lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2)
            >>> sampler = learn_density(jax.random.key(0), density, start[None], num_steps=50)
            >>> chain = sampler.chain()
            >>> state = chain.init(start, density(start))
            >>> state, info = chain.step(jax.random.key(1), state)
            >>> state.point.x.shape
            (2,)
        """
        correction = self.settings.correction
        poor = lambda log_weight: judged_tail_index(log_weight) > USABLE_KHAT  # noqa: E731
        return independence_chain(
            lambda key, n, several: replace(self, several=several).propose(key, n),
            self._moves(foreign),
            steps_per_draw=correction.steps_per_draw,
            block_size=correction.block_size,
            corrected=correction.metropolis,
            is_poor=None if self.several is None else poor,
        )

    def _moves(
        self, foreign: Bool[Array, ""] | None
    ) -> Callable[[Keys, Point, Bool[Array, ""] | None], tuple[Point, Int[Array, "*c"]]] | None:
        """Make the local moves of all chains that end a draw, or None where there are none."""
        local, located = self.settings.local_move(), self.learned.located
        step_size = located.step_size
        always = self.learned.local_moves is not None
        if local is None or step_size is None or not self.settings.correction.metropolis:
            return None
        if not always and foreign is None:
            return None
        white, whitening = self._white, located.whitening

        def move(key: Key, point: Point, several: Bool[Array, ""] | None) -> tuple[Point, Int[Array, ""]]:
            """One local move of one chain, and the weight of where it arrives."""
            key_move, key_weight, key_size = jax.random.split(key, 3)
            size = step_size
            if foreign is not None:
                shorter = _SHORTEST_STEP ** jax.random.uniform(key_size, (), point.x.dtype)
                size = size * jnp.where(foreign, shorter, 1.0)
            u, value, _, gradients = local.step(
                key_move, white.logdensity_fn, whitening.inverse(point.x)[0], size
            )
            weigh = lambda proposal: proposal.weigh(key_weight, self.learned.params, u)  # noqa: E731
            fresh = replace(self, several=several)._use(weigh)
            x, log_det = whitening.forward(u)
            # an infinite weight: what is never proposed is entered and left by these moves alone
            good = (fresh > -jnp.inf) & jnp.isfinite(value) & jnp.all(jnp.isfinite(x))
            moved = Point(x, fresh, value - log_det)
            kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, point)
            return kept, jnp.asarray(gradients, jnp.int32)

        def moves(
            keys: Keys, points: Point, several: Bool[Array, ""] | None
        ) -> tuple[Point, Int[Array, "*c"]]:
            over = jax.vmap if points.log_weight.ndim else lambda function: function
            go = lambda: over(lambda key, point: move(key, point, several))(keys, points)  # noqa: E731
            none = jnp.zeros(points.log_weight.shape, jnp.int32)
            return go() if always else jax.lax.cond(foreign, go, lambda: (points, none))

        return moves


class _Progress(NamedTuple):
    """State of training with its record."""

    state: Any
    num_steps: Int[Array, ""]
    loss: Float[Array, " num_warmup"]
    skipped: Int[Array, ""]
    spent: Evaluations
    finished: Bool[Array, ""]


def absolute(log_density: Any, offset: Any) -> Float[np.ndarray, "*n"]:
    """Give log densities or log weights their offset back, in float64: one, or one for every chain."""
    offset = np.asarray(offset, np.float64)
    return np.asarray(log_density, np.float64) + (offset[:, None] if offset.ndim else offset)


def checked_key(key: Any) -> Key:
    """Check a random key.

    Raises:
        TypeError: for anything else.
    """
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if (typed and key.ndim == 0) or (getattr(key, "dtype", None) == jnp.uint32 and jnp.ndim(key) == 1):
        return key
    raise TypeError(f"`key` must be a random key, got {shown(key)}. Pass `jax.random.key(0)`.")


# compiled once for all samplers whose posterior and settings are the same objects
_draw = jax.jit(lambda sampler, key, n: sampler.propose(key, n), static_argnums=2)
_weigh = jax.jit(lambda sampler, key, x: sampler.weights(key, x))
_sites = jax.jit(lambda sampler, x: jax.vmap(sampler.posterior.sites(sampler.data))(x))
_trained = jax.jit(lambda sampler, key: sampler.trained(key))
rays = jax.jit(lambda sampler, key, x, log_weight: sampler.rays(key, x, log_weight))


@partial(jax.jit, static_argnums=(2, 3))
def _sample(
    sampler: Sampler, key: Key, num_samples: int, num_chains: int
) -> tuple[ChainState, Point, ChainInfo]:
    key_first, key_chains = jax.random.split(key)
    chain = sampler.chain()
    first = sampler.propose(key_first, num_chains)
    there = jnp.isfinite(first.logdensity)
    state = chain.init(jnp.where(there[:, None], first.x, 0.0), jnp.where(there, first.logdensity, -jnp.inf))
    keys = jax.vmap(lambda key: jax.random.split(key, num_samples))(jax.random.split(key_chains, num_chains))

    def step(state: ChainState, keys: Keys) -> tuple[ChainState, tuple[Point, ChainInfo]]:
        state, info = chain.step(keys, state)
        return state, (state.point, info)

    state, (points, info) = jax.lax.scan(step, state, jnp.swapaxes(keys, 0, 1))
    points, info = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (points, info))
    return state, points, info


def trained(sampler: Sampler, key: Key) -> Sampler:
    """Do all of the training, by a program that is kept; within a trace, as a part of what is traced."""
    # a program that is kept would keep traced values alive, too
    return sampler.trained(key) if is_traced((sampler, key)) else _trained(sampler, key)
