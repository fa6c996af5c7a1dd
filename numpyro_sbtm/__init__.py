# SPDX-License-Identifier: Apache-2.0
"""Learned samplers for NumPyro: exact draws, an evidence with an error bar, and a plain verdict."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpyro_sbtm.cache import enable_cache as enable_cache
    from numpyro_sbtm.density import learn_density as learn_density
    from numpyro_sbtm.kernels.diffusion import DiffusionKernel as DiffusionKernel
    from numpyro_sbtm.kernels.diffusion import LogVarianceDISKernel as LogVarianceDISKernel
    from numpyro_sbtm.kernels.learn import learn as learn
    from numpyro_sbtm.kernels.learn import load as load
    from numpyro_sbtm.kernels.transport import SBTMKernel as SBTMKernel
    from numpyro_sbtm.methods.diffusion import Diffusion as Diffusion
    from numpyro_sbtm.methods.transport import Transport as Transport
    from numpyro_sbtm.options import Correction as Correction
    from numpyro_sbtm.options import DiffusionTraining as DiffusionTraining
    from numpyro_sbtm.options import Search as Search
    from numpyro_sbtm.options import TransportTraining as TransportTraining
    from numpyro_sbtm.reporting.report import Report as Report
    from numpyro_sbtm.reporting.report import report as report
    from numpyro_sbtm.sampler import Sampler as Sampler

_PLACES = {
    "Correction": "options",
    "Diffusion": "methods.diffusion",
    "DiffusionKernel": "kernels.diffusion",
    "DiffusionTraining": "options",
    "LogVarianceDISKernel": "kernels.diffusion",
    "Report": "reporting.report",
    "SBTMKernel": "kernels.transport",
    "Sampler": "sampler",
    "Search": "options",
    "Transport": "methods.transport",
    "TransportTraining": "options",
    "enable_cache": "cache",
    "learn": "kernels.learn",
    "learn_density": "density",
    "load": "kernels.learn",
    "report": "reporting.report",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `numpyro_sbtm.core` needs no NumPyro."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_PLACES)
