# SPDX-License-Identifier: Apache-2.0
"""What is learned of a posterior before the first draw, and what of it is needed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_sbtm.compile import is_traced
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.local import LocalMove, local_move
from numpyro_sbtm.core.maps import Affine, Triangular
from numpyro_sbtm.core.maps.spline import identity_margins
from numpyro_sbtm.core.mixture import largest, normal
from numpyro_sbtm.core.target import Key, Params, Target
from numpyro_sbtm.methods.base import Method
from numpyro_sbtm.options import Correction, Search
from numpyro_sbtm.search.ladder import (
    Precondition,
    StartingPoints,
    find_start,
    most_components,
    with_step_size,
)
from numpyro_sbtm.search.located import Located
from numpyro_sbtm.search.offset import offset_near_mode

__all__ = ["Learned", "Settings", "Structure", "locate", "paid_for"]


class Settings(NamedTuple):
    """What is chosen before anything is known of the posterior.

    Attributes:
        method: how proposals are learned.
        search: how much is looked for.
        correction: how draws are made of proposals.
    """

    method: Method
    search: Search
    correction: Correction

    def local_move(self) -> LocalMove | None:
        """Return the move that ends every draw, where one is needed."""
        chosen = self.correction.local_kernel
        if chosen is None or isinstance(chosen, LocalMove):
            return chosen
        return local_move("hmc" if chosen == "auto" else chosen)


class Learned(NamedTuple):
    """What is learned before the first draw: all that draws need, and a record of how it came about.

    Attributes:
        located: what the search found, without its points.
        params: trained parameters, without optimiser or particles; None where draws come from the mixture
            that was found alone.
        num_steps: training steps done.
        loss: of every training step, NaN for those that were not needed, shape ``[num_warmup]``.
        skipped_updates: updates left out because their gradient was not finite.
        spent: what training evaluated; the search's own is in ``located``.
        local_moves: None where draws end with none, chains of the search's draws mixing well; else True.
        offset: log densities and log weights are relative to it, so that float32 holds them, shape ``[]``.
        data: fingerprint of the data that it was learned for.
    """

    located: Located
    params: Params
    num_steps: Int[Array, ""]
    loss: Float[Array, " num_warmup"]
    skipped_updates: Int[Array, ""]
    spent: Evaluations
    local_moves: Bool[Array, ""] | None
    offset: Float[Array, ""]
    data: np.ndarray | Array


def paid_for(learned: Learned) -> Learned:
    """Make what is learned without what was spent on it, for chains that find it learned."""
    none = Evaluations().as_arrays()
    return learned._replace(spent=none, located=learned.located._replace(spent=none))


class Structure(NamedTuple):
    """Which parts of a program are needed; samplers that are stacked must agree in it.

    Attributes:
        num_components: of the reference; None for all.
        margins: whether the whitening has any.
        turned: whether components of the reference have axes of their own.
        doubtful: whether single proposals may turn out to be poor.
        still: whether draws end without local moves, which would not pay.
        learned: whether anything is trained; else draws come from what was found alone.
    """

    num_components: int | None
    margins: bool
    turned: bool
    doubtful: bool
    still: bool
    learned: bool


def locate(
    key: Key,
    target: Target,
    settings: Settings,
    where: StartingPoints,
    precondition: Precondition,
    num_steps: int,
    *,
    own: bool = False,
    structure: Structure | None = None,
) -> tuple[Learned, Structure]:
    """Look for the posterior; what is found draws already.

    Args:
        key: random key.
        target: the posterior on the unconstrained space; it is searched relative to an offset, that of what
            is learned.
        settings: what was chosen before.
        where: points to look from.
        precondition: how it is whitened (see `find_start`).
        num_steps: training steps at most.
        own: whether chains have samplers of their own, which are stacked.
        structure: that of the first of them; None: what this search finds.

    Returns:
        What is known before training, and what is needed: train it if ``structure.learned``.
    """
    key_search, key_local = jax.random.split(key)
    density = target.logdensity_fn
    offset = jnp.asarray(offset_near_mode(density, where.starts), where.starts.dtype)
    target = Target(lambda x: density(x) - offset, target.dim)
    located = find_start(
        key_search, target, where, precondition, settings.search, settings.correction.steps_per_draw
    )
    if own and isinstance(located.whitening, Affine):
        located = located._replace(whitening=_bent(located.whitening))
    if structure is None:
        structure = _structure_of(located, settings, own)
    located = _simplified(located, structure)
    local = settings.local_move()
    if local is not None:
        # moves that are made for other data only need no better step size
        located = with_step_size(key_local, target, located, local, adapted=not structure.still)
    dtype, zero = located.ess_fraction.dtype, jnp.zeros((), jnp.int32)
    learned = Learned(
        located=located if structure.learned else located._replace(points=None),
        params=None,
        num_steps=zero,
        # by NumPy: JAX would compile a program for every shape
        loss=jnp.asarray(np.full(num_steps, np.nan, dtype)),
        skipped_updates=zero,
        spent=Evaluations().as_arrays(),
        local_moves=None if structure.still else jnp.ones((), bool),
        offset=offset,
        data=jnp.zeros(2, jnp.uint32),
    )
    return learned, structure


def _bent(whitening: Affine) -> Triangular:
    """Write an affine map as one that may bend: samplers that are stacked must agree in their maps."""
    loc, scale_tril = whitening
    return Triangular.affine(loc, scale_tril)._replace(margins=identity_margins(loc))


def _structure_of(located: Located, settings: Settings, own: bool) -> Structure:
    """Say what does nothing, for programs that are smaller and faster to compile.

    Of what was found, parts that are the identity and components without weight, unless each chain has its
    own, which may need them; where its draws alone would do, proposals chosen among several, and all training
    of what is corrected and not stacked; where chains of them mix well, local moves that are made by default.
    Where particles have not arrived everywhere, draws of what they show do not see what is missing: then
    training and moves are needed.
    """
    if is_traced(located):
        return Structure(None, True, True, True, False, True)
    margins, reference = getattr(located.whitening, "margins", None), located.reference
    rotation = reference.rotation
    num_components = int(np.sum(np.isfinite(reference.log_weight)))
    if own and bool(located.searched):
        most = most_components(reference.centre.shape[1], settings.search)
        num_components = max(len(reference.log_weight), most)
    return Structure(
        num_components,
        margins is not None and (own or bool(np.any(margins.slope != 1.0))),
        rotation is not None and (own or bool(np.any(rotation != np.eye(rotation.shape[-1])))),
        not bool(located.usable()),
        settings.correction.local_kernel == "auto" and bool(located.quick()),
        own
        or settings.method.always_trains
        or not settings.correction.metropolis
        or not bool(located.sufficient()),
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
