# SPDX-License-Identifier: Apache-2.0
"""The trained sampler: what was learned of a posterior, and how it draws."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.compile import is_traced
from numpyro_sbtm.core.algorithm import Algorithm, Draws, Proposal
from numpyro_sbtm.core.chain import Chain, Point, independence_chain
from numpyro_sbtm.core.decay import Rays, decay
from numpyro_sbtm.core.importance import importance
from numpyro_sbtm.core.local import LocalMove
from numpyro_sbtm.core.maps import Triangular, whiten
from numpyro_sbtm.core.mixture import largest, normal
from numpyro_sbtm.core.psis import USABLE_KHAT, judged_tail_index
from numpyro_sbtm.core.target import Key, Params, Target
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.ladder import (
    Precondition,
    StartingPoints,
    find_start,
    most_components,
    with_step_size,
)
from numpyro_sbtm.search.located import Located

__all__ = ["Learned", "Method", "Sampler", "Structure", "locate"]

_SHORTER = 4  # training ends after this part of warm-up where the search's draws are near exact
_SHORTEST_STEP = 0.01  # step sizes of local moves vary by this factor where they were adapted to other data
_EXACT = 0.9  # effective fraction of the search's draws above which they need no local moves


class Learned(NamedTuple):
    """What is learned before the first draw: all that draws need, and a record of how it came about.

    Attributes:
        located: what the search found, without its points.
        params: trained parameters, without optimiser or particles; None where draws come from the mixture
            that was found alone.
        num_steps: training steps done.
        loss: of every training step, NaN for those that were not needed, shape ``[num_warmup]``.
        skipped_updates: updates left out because their gradient was not finite.
        gradients: target gradients spent.
        local_moves: None where draws end with none, the search's draws being nearly exact; else True.
        offset: log densities and log weights are relative to it, so that float32 holds them, shape ``[]``.
        data: fingerprint of the data that it was learned for.
    """

    located: Located
    params: Params
    num_steps: Int[Array, ""]
    loss: Float[Array, " num_warmup"]
    skipped_updates: Int[Array, ""]
    gradients: Int[Array, ""]
    local_moves: Bool[Array, ""] | None
    offset: Float[Array, ""]
    data: np.ndarray | Array


class Method(NamedTuple):
    """What is chosen before anything is known of the posterior.

    Attributes:
        algorithm: ``(whitened target, located, num_steps) -> algorithm``.
        local: the local move that ends every draw, or None.
        corrected: whether a Metropolis step corrects the proposals.
        shorten: whether a part of the training steps is enough where the search's draws are near exact.
        quiet: whether draws end without local moves where the search's draws are nearly exact.
        always_train: whether to train also where the search's draws are good enough as proposals.
        search: how much is looked for.
    """

    algorithm: Callable[[Target, Located, int], Algorithm]
    local: LocalMove | None
    corrected: bool
    shorten: bool
    quiet: bool
    always_train: bool
    search: Search


class Structure(NamedTuple):
    """Which parts of a program are needed; samplers that are stacked must agree in it.

    Attributes:
        num_components: of the reference; None for all.
        margins: whether the whitening has any.
        turned: whether components of the reference have axes of their own.
        doubtful: whether single proposals may turn out to be poor.
        still: whether draws end without local moves, those of the search being nearly exact.
        learned: whether anything is trained; else draws come from what was found alone.
    """

    num_components: int | None
    margins: bool
    turned: bool
    doubtful: bool
    still: bool
    learned: bool


@partial(jax.tree_util.register_dataclass, data_fields=("learned",), meta_fields=("target", "method"))
@dataclass(frozen=True)
class Sampler:
    """A posterior with what was learned of it. A pytree, of which ``learned`` are the leaves.

    Attributes:
        target: the unnormalised density on R^d, relative to ``learned.offset``.
        method: what was chosen before.
        learned: all that was found and trained.
    """

    target: Target
    method: Method
    learned: Learned

    @property
    def _white(self) -> Target:
        return whiten(self.target, self.learned.located.whitening)

    @property
    def _algorithm(self) -> Algorithm:
        return self.method.algorithm(self._white, self.learned.located, self.learned.loss.shape[-1])

    def _use(self, several: Bool[Array, ""] | None, use: Callable[[Proposal], Any]) -> Any:
        """Use the trained proposal, or the one of several draws each where single ones were found poor."""
        if self.learned.params is None:
            return use(importance(self._white, self.learned.located.reference))
        algorithm = self._algorithm
        dearer = algorithm.several
        if several is None or dearer is None:
            return use(algorithm.proposal)
        return jax.lax.cond(several, lambda: use(dearer), lambda: use(algorithm.proposal))

    def propose(self, key: Key, n: int, several: Bool[Array, ""] | None = None) -> Draws:
        """Draw n proposals with exact weights, relative to the offset; NaN where there is none.

        Args:
            key: random key.
            n: number of proposals, static.
            several: whether each is chosen among several, shape ``[]``; None: never.
        """
        draws = self._use(several, lambda proposal: proposal.draw(key, self.learned.params, n))
        x, log_det = jax.vmap(lambda u: self.learned.located.whitening.forward(u))(draws.x)
        usable = jnp.isfinite(draws.log_weight) & jnp.all(jnp.isfinite(x), -1)
        log_weight = jnp.where(usable, draws.log_weight, jnp.nan)
        return Draws(x, log_weight, draws.logdensity - log_det, draws.one_to_one)

    def weigh(
        self, key: Key, x: Float[Array, "n d"], several: Bool[Array, ""] | None = None
    ) -> Float[Array, " n"]:
        """Weigh given points as draws, relative to the offset."""
        u = jax.vmap(lambda point: self.learned.located.whitening.inverse(point)[0])(x)

        def weights(proposal: Proposal) -> Float[Array, " n"]:
            keys = jax.random.split(key, len(x))
            return jax.vmap(lambda k, point: proposal.weigh(k, self.learned.params, point))(keys, u)

        return self._use(several, weights)

    def rays(self, key: Key, x: Float[Array, "n d"], log_weight: Float[Array, " n"]) -> Rays:
        """Find out along which rays from weighted points the density does not fall."""
        return decay(key, self.target, self.learned.located.whitening, x, log_weight)

    # ------------------------------------------------------------------ training
    def trained(self, key: Key) -> "Sampler":
        """Do all of the training, until it gains nothing more or all steps are done."""
        learned, algorithm = self.learned, self._algorithm
        num_steps = learned.loss.shape[-1]
        enough = num_steps // _SHORTER if self.method.shorten else num_steps

        def step(now: "_Progress") -> "_Progress":
            k = now.num_steps
            state, info = algorithm.step(jax.random.fold_in(key_steps, k), now.state)
            new = _Progress(
                state=state,
                num_steps=k + 1,
                loss=now.loss.at[k].set(info.loss.astype(now.loss.dtype)),
                skipped=now.skipped + info.skipped,
                gradients=now.gradients + info.gradients,
                finished=info.finished | (learned.located.near_exact() & (k + 1 >= enough)),
            )
            return jax.tree.map(lambda leaf, before: leaf.astype(before.dtype), new, now)

        key_init, key_steps = jax.random.split(key)
        first = _Progress(
            algorithm.init(key_init),
            learned.num_steps,
            learned.loss,
            learned.skipped_updates,
            learned.gradients,
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
            gradients=end.gradients,
        )
        return replace(self, learned=after)

    # ------------------------------------------------------------------ chains
    def chain(
        self,
        *,
        steps_per_draw: int,
        block_size: int,
        doubtful: bool,
        foreign: Bool[Array, ""] | None = None,
    ) -> Chain:
        """Make chains that leave the posterior invariant.

        Args:
            steps_per_draw: Metropolis steps of a draw.
            block_size: about how many proposals are made at a time, over all chains.
            doubtful: whether the first proposals decide if each must be chosen among several.
            foreign: whether the sampler was trained for other data, shape ``[]``: then a local move, of a
                step size that varies more, ends every draw. None: it was not.
        """
        poor = lambda log_weight: judged_tail_index(log_weight) > USABLE_KHAT  # noqa: E731
        return independence_chain(
            self.propose,
            self._moves(foreign),
            steps_per_draw=steps_per_draw,
            block_size=block_size,
            corrected=self.method.corrected,
            is_poor=poor if doubtful else None,
        )

    def _moves(
        self, foreign: Bool[Array, ""] | None
    ) -> Callable[[Key, Point, Bool[Array, ""] | None], Point] | None:
        """Make the local moves of all chains that end a draw, or None where there are none."""
        local, located = self.method.local, self.learned.located
        step_size = located.step_size
        always = self.learned.local_moves is not None
        if local is None or step_size is None or not self.method.corrected:
            return None
        if not always and foreign is None:
            return None
        white, whitening = self._white, located.whitening

        def move(key: Key, point: Point, several: Bool[Array, ""] | None) -> Point:
            """One local move of one chain, and the weight of where it arrives."""
            key_move, key_weight, key_size = jax.random.split(key, 3)
            size = step_size
            if foreign is not None:
                shorter = _SHORTEST_STEP ** jax.random.uniform(key_size, (), point.x.dtype)
                size = size * jnp.where(foreign, shorter, 1.0)
            u, value, *_ = local.step(key_move, white.logdensity_fn, whitening.inverse(point.x)[0], size)
            weigh = lambda proposal: proposal.weigh(key_weight, self.learned.params, u)  # noqa: E731
            fresh = self._use(several, weigh)
            x, log_det = whitening.forward(u)
            # an infinite weight: what is never proposed is entered and left by these moves alone
            good = (fresh > -jnp.inf) & jnp.isfinite(value) & jnp.all(jnp.isfinite(x))
            moved = Point(x, fresh, value - log_det)
            return jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, point)

        def moves(keys: Key, points: Point, several: Bool[Array, ""] | None) -> Point:
            over = jax.vmap if points.log_weight.ndim else lambda function: function
            go = lambda: over(lambda key, point: move(key, point, several))(keys, points)  # noqa: E731
            return go() if always else jax.lax.cond(foreign, go, lambda: points)

        return moves


class _Progress(NamedTuple):
    """State of training with its record."""

    state: Any
    num_steps: Int[Array, ""]
    loss: Float[Array, " num_warmup"]
    skipped: Int[Array, ""]
    gradients: Int[Array, ""]
    finished: Bool[Array, ""]


def locate(
    key: Key,
    target: Target,
    method: Method,
    where: StartingPoints,
    precondition: Precondition,
    num_steps: int,
    *,
    own: bool = False,
    structure: Structure | None = None,
) -> tuple[Sampler, Structure]:
    """Look for the posterior, and make the sampler whose draws come from what was found.

    Args:
        key: random key.
        target: the posterior on the unconstrained space.
        method: what was chosen before.
        where: points to look from.
        precondition: how it is whitened (see `find_start`).
        num_steps: training steps at most.
        own: whether chains have samplers of their own, which are stacked.
        structure: that of the first of them; None: what this search finds.

    Returns:
        The sampler before training, and what it needs: train it if ``structure.learned``.
    """
    key_search, key_local = jax.random.split(key)
    located = find_start(key_search, target, where, precondition, method.search)
    if structure is None:
        structure = _structure_of(located, method, own)
    located = _simplified(located, structure)
    if method.local is not None:
        # moves that are made for other data only need no better step size
        located = with_step_size(key_local, target, located, method.local, adapted=not structure.still)
    dtype, zero = located.ess_fraction.dtype, jnp.zeros((), jnp.int32)
    learned = Learned(
        located=located if structure.learned else located._replace(points=None),
        params=None,
        num_steps=zero,
        # by NumPy: JAX would compile a program for every shape
        loss=jnp.asarray(np.full(num_steps, np.nan, dtype)),
        skipped_updates=zero,
        gradients=located.gradients,
        local_moves=None if structure.still else jnp.ones((), bool),
        offset=jnp.zeros((), dtype),
        data=jnp.zeros(2, jnp.uint32),
    )
    return Sampler(target, method, learned), structure


def _structure_of(located: Located, method: Method, own: bool) -> Structure:
    """Say what does nothing, for programs that are smaller and faster to compile.

    Of what was found, parts that are the identity and components without weight, unless each chain has its
    own, which may need them; where its draws alone would do, proposals chosen among several, and all training
    of what is corrected and not stacked; where they are nearly exact, local moves of a quiet method. Where
    particles have not arrived everywhere, draws of what they show do not see what is missing: then training
    and moves are needed.
    """
    if is_traced(located):
        return Structure(None, True, True, True, False, True)
    margins, reference = getattr(located.whitening, "margins", None), located.reference
    rotation = reference.rotation
    num_components = int(np.sum(np.isfinite(reference.log_weight)))
    if own and bool(located.searched):
        most = most_components(reference.centre.shape[1], method.search)
        num_components = max(len(reference.log_weight), most)
    # between an effective fraction of a half and nine tenths a chain may stick for many draws
    exact = located.sufficient() & (located.ess_fraction > _EXACT)
    return Structure(
        num_components,
        margins is not None and (own or bool(np.any(margins.slope != 1.0))),
        rotation is not None and (own or bool(np.any(rotation != np.eye(rotation.shape[-1])))),
        not bool(located.usable()),
        method.quiet and bool(exact),
        own or method.always_train or not method.corrected or not bool(located.sufficient()),
    )


def _simplified(located: Located, structure: Structure) -> Located:
    """Drop components, margins and rotations that are not there."""
    if structure.num_components is None:
        return located
    reference, whitening = located.reference, located.whitening
    # a single component is N(0, I): see `warm_start`
    one = structure.num_components == 1
    reference = normal(reference.centre.shape[1]) if one else largest(reference, structure.num_components)
    if not structure.turned:
        reference = reference._replace(rotation=None)
    if isinstance(whitening, Triangular) and not structure.margins:
        whitening = whitening._replace(margins=None)
    return located._replace(reference=reference, whitening=whitening)
