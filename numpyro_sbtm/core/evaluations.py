# SPDX-License-Identifier: Apache-2.0
"""How often a density was evaluated: what a run costs, whatever the machine."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["Evaluations"]


class Evaluations(NamedTuple):
    """Evaluations of a log density, at one point each.

    Attributes:
        values: of the log density alone.
        gradients: of the log density with its gradient.

    Examples:
        >>> from numpyro_sbtm.core.evaluations import Evaluations
        >>> Evaluations(values=1).plus(Evaluations(2, 3)).times(2)
        Evaluations(values=6, gradients=6)
    """

    values: Any = 0
    gradients: Any = 0

    def plus(self, other: "Evaluations") -> "Evaluations":
        """Add others."""
        return Evaluations(self.values + other.values, self.gradients + other.gradients)

    def times(self, number: Any) -> "Evaluations":
        """Count them so many times."""
        return Evaluations(self.values * number, self.gradients * number)

    @property
    def total(self) -> Any:
        """All of them."""
        return self.values + self.gradients

    def as_arrays(self) -> "Evaluations":
        """Make arrays of whole numbers, for what is compiled."""
        # by NumPy where they are known: JAX would compile a program for every shape
        return Evaluations(*(jnp.asarray(np.int32(n) if isinstance(n, int) else n, jnp.int32) for n in self))
