# SPDX-License-Identifier: Apache-2.0
"""What several calls of a kernel's `init` share within one call of `MCMC.run`."""

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from numpyro.infer import MCMC

from numpyro_sbtm.core.target import Key
from numpyro_sbtm.learned import Learned, Structure
from numpyro_sbtm.sampler import Posterior

__all__ = ["Run", "keys_of_sequential_run"]


@dataclass
class Run:
    """One call of `MCMC.run`, as far as its chains share what was found.

    Attributes:
        num_warmup: training steps.
        model_args: positional arguments of the model.
        model_kwargs: keyword arguments of the model.
        keys: those of all chains where they run in sequence, else None.
        structure: of the first chain that was set up.
        posterior: that of the first sampler that was trained, so that all are trained by one program.
        learned: what the first chain of a sequence found and trained, for the others, who pay nothing.
        num_set_up: chains of a sequence that were set up.
    """

    num_warmup: int
    model_args: tuple[Any, ...]
    model_kwargs: dict[str, Any]
    keys: Key | None = None
    structure: Structure | None = None
    posterior: Posterior | None = None
    learned: Learned | None = None
    num_set_up: int = 0


def keys_of_sequential_run(kernel: Any) -> Key | None:
    """Find the keys of all chains, if `MCMC.run` is running a kernel's chains one after the other.

    It hands each of them to the kernel by itself and says nothing of the others: there is no other way to
    know than to look at the caller.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is MCMC.run.__code__:
            mcmc = frame.f_locals["self"]
            if mcmc.sampler is kernel and mcmc.num_chains > 1 and mcmc.chain_method == "sequential":
                return frame.f_locals["rng_key"]
            return None
        frame = frame.f_back
    return None
