# SPDX-License-Identifier: Apache-2.0
"""Markov chains that are fed by independent proposals: propose, weigh, accept; a local move ends a draw."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.core.algorithm import Draws
from numpyro_sbtm.core.target import Key, Keys
from numpyro_sbtm.core.weights import clean, metropolis, resample

__all__ = ["Chain", "ChainInfo", "ChainState", "Point", "independence_chain"]

_START_POOL = 96  # of a chain's first proposals, one of which becomes its first state


class Point(NamedTuple):
    """Where chains are, with any leading axes.

    Attributes:
        x: shape ``[*c, d]``.
        log_weight: log of unnormalised target over proposal, shape ``[*c]``.
        logdensity: of the unnormalised target, shape ``[*c]``.
    """

    x: Float[Array, "*c d"]
    log_weight: Float[Array, "*c"]
    logdensity: Float[Array, "*c"]


class ChainState(NamedTuple):
    """State of one chain, or of chains that share a proposal.

    Attributes:
        point: where the chains are.
        block: fresh proposals, some consumed for every draw, of leading shape ``[*c, rounds, steps]``.
        used: how many draws' worth of the block are consumed, shape ``[]``.
        num_blocks: blocks made since the chains began, shape ``[]``.
        gradients: of the target, mean number in a draw's local move, of each chain, shape ``[*c]``.
        num_draws: draws since the chains began, shape ``[]``.
        several: whether each proposal is chosen among several, as the first block decides; None: never.
    """

    point: Point
    block: Draws
    used: Int[Array, ""]
    num_blocks: Int[Array, ""]
    gradients: Float[Array, "*c"]
    num_draws: Int[Array, ""]
    several: Bool[Array, ""] | None


class ChainInfo(NamedTuple):
    """What one draw reports of every chain.

    Attributes:
        acceptance: mean acceptance probability of its proposals, shape ``[*c]``.
        nonfinite: proposals whose weight is not finite; none is accepted, shape ``[*c]``.
    """

    acceptance: Float[Array, "*c"]
    nonfinite: Int[Array, "*c"]


class Chain(NamedTuple):
    """Pure functions of a chain's state.

    Attributes:
        init: ``(x [*c, d], logdensity [*c]) -> state``. The position is left at the first draw, which chooses
            one of the first proposals by weight, unless none can be weighed.
        step: ``(keys, state, restart=False, refill=False) -> (state, ChainInfo)``, one key for every chain.
            One draw: some Metropolis steps with fresh proposals and a local move. ``restart`` begins anew,
            for what is known was weighed under another target; ``refill`` drops what is left of the block.
    """

    init: Callable[[Float[Array, "*c d"], Float[Array, "*c"]], ChainState]
    step: Callable[..., tuple[ChainState, ChainInfo]]


def independence_chain(
    propose: Callable[[Key, int, Bool[Array, ""] | None], Draws],
    move: Callable[[Keys, Point, Bool[Array, ""] | None], tuple[Point, Int[Array, "*c"]]] | None = None,
    *,
    steps_per_draw: int = 4,
    block_size: int = 4096,
    corrected: bool = True,
    is_poor: Callable[[Float[Array, " n"]], Bool[Array, ""]] | None = None,
) -> Chain:
    """Make chains that leave a target invariant, however well or badly proposals resemble it.

    Everything random of a chain comes from its own key: a chain is the same whatever others run beside it.

    Args:
        propose: ``(key, n, several) -> Draws``, n independent proposals with exact weights.
        move: ``(keys, points, several) -> (points, gradients spent)``, for all chains at once: leaves the
            target invariant together with fresh weights.
        steps_per_draw: Metropolis steps of a draw.
        block_size: about how many proposals are made at a time, over all chains.
        corrected: whether a Metropolis step decides; without it all that can be weighed is taken.
        is_poor: of the log weights of the very first block: whether each proposal must be chosen among
            several from then on. None: never.

    Returns:
        The chain.

    Reference:
        Tierney (1994), Markov chains for exploring posterior distributions, section 2.3.3.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Target, importance
        >>> from numpyro_sbtm.core.chain import independence_chain
        >>> from numpyro_sbtm.core.mixture import normal
        >>> target = Target(lambda x: -2.0 * jnp.sum((x - 1) ** 2), 1)
        >>> proposal = importance(target, normal(1))
        >>> chain = independence_chain(lambda key, n, several: proposal.draw(key, None, n))
        >>> state = chain.init(jnp.zeros(1), target.logdensity_fn(jnp.zeros(1)))
        >>> keys = jax.random.split(jax.random.key(0), 2000)
        >>> _, x = jax.lax.scan(
        ...     lambda state, key: (state := chain.step(key, state)[0], state.point.x[0]), state, keys)
        >>> round(float(x.mean()), 1), round(float(x.std()), 1)
        (1.0, 0.5)
    """

    def init(x: Float[Array, "*c d"], logdensity: Float[Array, "*c"]) -> ChainState:
        chains, dim = x.shape[:-1], x.shape[-1]
        rounds = max(1, block_size // ((chains[0] if chains else 1) * steps_per_draw))
        shape = (*chains, rounds, steps_per_draw)
        empty, zero = _filled(shape, 0.0, x.dtype), _filled((), 0, jnp.int32)
        return ChainState(
            point=Point(x, _filled(chains, -jnp.inf, x.dtype), logdensity.astype(x.dtype)),
            block=Draws(_filled((*shape, dim), 0.0, x.dtype), empty, empty, _filled(shape, False, bool)),
            used=zero,
            num_blocks=zero,
            gradients=_filled(chains, 0.0, x.dtype),
            num_draws=zero,
            several=None if is_poor is None else _filled((), False, bool),
        )

    def refilled(
        keys: Keys, state: ChainState, times: Int[Array, ""], fresh: Bool[Array, ""]
    ) -> tuple[Draws, Draws, Bool[Array, ""] | None, Int[Array, ""]]:
        """Make so many new blocks; return the last two, whether proposals are chosen among several, and how
        many blocks were made.
        """
        chains = state.point.log_weight.shape
        over = jax.vmap if chains else _itself
        rounds, steps = state.block.log_weight.shape[len(chains) :]

        def refill(carry):  # type: ignore[no-untyped-def]
            k, times, several, block, _ = carry
            flat = over(lambda key: propose(jax.random.fold_in(key, k), rounds * steps, several))(keys)
            new = jax.tree.map(lambda leaf, old: leaf.reshape(old.shape).astype(old.dtype), flat, block)
            if several is not None:  # the very first block decides; if it is poor, it is not used
                assert is_poor is not None
                switch = is_poor(clean(flat.log_weight.reshape(-1))) & fresh & (k == 0)
                several, times = several | switch, times + switch
            return k + 1, times, several, new, block

        several = None if state.several is None else state.several & ~fresh
        carry = jnp.zeros((), jnp.int32), times, several, state.block, state.block
        k, _, several, block, last = jax.lax.while_loop(lambda carry: carry[0] < carry[1], refill, carry)
        return block, last, several, k

    def step(
        keys: Keys, state: ChainState, restart: Bool[Array, ""] | bool = False, refill: Any = False
    ) -> tuple[ChainState, ChainInfo]:
        chains = state.point.log_weight.shape
        over = jax.vmap if chains else _itself
        own = over(lambda key: jax.random.split(key, 4))(keys)
        key_block, key_start, key_accept, key_move = (over(lambda key, k=k: key[k])(own) for k in range(4))
        rounds = state.block.log_weight.shape[len(chains)]
        fresh = restart | (state.num_draws == 0)
        # where chains begin, the first rounds of a block are for their first states, or all of one of its own
        due = refill | (state.used == rounds)
        begins = -(-_START_POOL // steps_per_draw)
        begins = begins if rounds >= 2 * begins else 0
        times = jnp.where(fresh, 1 if begins else 2, jnp.where(due, 1, 0)).astype(jnp.int32)
        block, last, several, made = refilled(key_block, state, times, fresh)
        used = jnp.where(times > 0, jnp.where(fresh, begins, 0), state.used)
        first = partial(_first, num=begins * steps_per_draw or _START_POOL)
        seeds = block if begins else last
        point = jax.lax.cond(fresh, lambda: over(first)(key_start, seeds, state.point), lambda: state.point)
        proposals = jax.tree.map(lambda leaf: leaf[(slice(None),) * len(chains) + (used,)], block)
        steps = over(partial(_metropolis_steps, corrected=corrected))
        point, acceptance = steps(key_accept, point, proposals)
        num_draws = jnp.where(fresh, 0, state.num_draws) + 1
        gradients = jnp.where(fresh, 0.0, state.gradients)
        if move is not None:
            point, spent = move(key_move, point, several)
            gradients = gradients + (spent - gradients) / num_draws
        lost = ~jnp.isfinite(proposals.log_weight) & proposals.one_to_one
        num_blocks = jnp.where(fresh, 0, state.num_blocks) + made
        gradients = gradients.astype(state.gradients.dtype)
        new = ChainState(point, block, used + 1, num_blocks, gradients, num_draws, several)
        return new, ChainInfo(acceptance, jnp.sum(lost, -1, dtype=jnp.int32))

    return Chain(init, step)


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
    """Stand in for `jax.vmap` where there is one chain without a chain axis."""
    return function


def _filled(shape: tuple[int, ...], value: Any, dtype: Any) -> Array:
    # by NumPy: JAX would compile a program for every shape
    return jnp.asarray(np.full(shape, value, dtype))


def _first(key: Key, seeds: Draws, point: Point, num: int) -> Point:
    """Choose a chain's first state among its first proposals by weight; without one it stays where it is."""
    pool = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num], seeds)
    weight = clean(pool.log_weight)
    chosen = resample(key, weight, 1)[0]
    alive = jnp.isfinite(weight[chosen])
    return Point(
        jnp.where(alive, pool.x[chosen], point.x),
        weight[chosen],
        jnp.where(alive, pool.logdensity[chosen], point.logdensity),
    )


def _metropolis_steps(
    key: Key, point: Point, proposals: Draws, corrected: bool
) -> tuple[Point, Float[Array, ""]]:
    """Propose one after the other; without the correction take all that can be weighed."""

    def step(point: Point, inputs: tuple[Key, Draws]) -> tuple[Point, Float[Array, ""]]:
        key, proposal = inputs
        accept, accept_prob = metropolis(key, point.log_weight, proposal.log_weight)
        if not corrected:
            accept = jnp.isfinite(proposal.log_weight)
        new = Point(proposal.x, proposal.log_weight, proposal.logdensity)
        return jax.tree.map(lambda new, old: jnp.where(accept, new, old), new, point), accept_prob

    keys = jax.random.split(key, len(proposals.log_weight))
    point, accept_probs = jax.lax.scan(step, point, (keys, proposals))
    return point, jnp.mean(accept_probs)
