# SPDX-License-Identifier: Apache-2.0
"""What a method is, for whoever searches, trains and draws."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import optax
from jaxtyping import Array, Float

from numpyro_sbtm.checks import shown
from numpyro_sbtm.core.algorithm import Algorithm
from numpyro_sbtm.core.target import LogDensity, Target
from numpyro_sbtm.search.located import Located

__all__ = ["Method", "checked_optimizer", "named"]


@runtime_checkable
class Method(Protocol):
    """How proposals are learned; `Diffusion` and `Transport` are such."""

    @property
    def always_trains(self) -> bool:
        """Whether it trains also where draws of what was found are good enough as proposals."""
        ...

    @property
    def shortens(self) -> bool:
        """Whether a part of the training steps is enough where what was found is near exact."""
        ...

    def words(self) -> dict[str, str]:
        """Say in words what draws depend on, but for what was learned."""
        ...

    def check(self, logdensity_fn: LogDensity, x: Float[Array, " d"]) -> None:
        """Refuse, before the search, what does not fit the dimension or needs more than the density has."""
        ...

    def check_several(self) -> None:
        """Refuse a reference that may have several components, as what a search finds may."""
        ...

    def algorithm(self, target: Target, located: Located, num_steps: int, smc_particles: int) -> Algorithm:
        """Make the algorithm for a whitened target and what the search has found of it."""
        ...


def named(value: Any) -> str:
    """Name an object of a user's, the same in every process: a function by its place, others by their type.

    Examples:
        >>> from functools import partial
        >>> from numpyro_sbtm.methods.base import named
        >>> from numpyro_sbtm.networks import denoiser
        >>> named(partial(denoiser, width=8)), named("dis"), named(0.5)
        ('numpyro_sbtm.networks.denoiser(width=8)', 'dis', '0.5')
    """
    if value is None or isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, partial):
        arguments = [*map(named, value.args), *(f"{k}={named(v)}" for k, v in value.keywords.items())]
        return f"{named(value.func)}({', '.join(arguments)})"
    of = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    return f"{of.__module__}.{of.__qualname__}"


def checked_optimizer(optimizer: Any) -> Any:
    """Check an optimiser, or what makes one.

    Raises:
        TypeError: for anything else.
    """
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation) or callable(optimizer):
        return optimizer
    raise TypeError(
        f"`optimizer` must be an optax optimiser, or a function of the number of training steps that makes "
        f"one, got {shown(optimizer)}. Pass None for the default."
    )
