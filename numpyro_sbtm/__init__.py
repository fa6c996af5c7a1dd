# SPDX-License-Identifier: Apache-2.0
"""Learned samplers for NumPyro: exact draws, an evidence with an error bar, and a plain verdict."""

from numpyro_sbtm.kernels.diffusion import DiffusionKernel as DiffusionKernel
from numpyro_sbtm.kernels.diffusion import LogVarianceDISKernel as LogVarianceDISKernel
from numpyro_sbtm.kernels.transport import SBTMKernel as SBTMKernel
from numpyro_sbtm.options import Correction as Correction
from numpyro_sbtm.options import DiffusionTraining as DiffusionTraining
from numpyro_sbtm.options import Search as Search
from numpyro_sbtm.options import TransportTraining as TransportTraining
from numpyro_sbtm.reporting.report import Report as Report
from numpyro_sbtm.reporting.report import report as report
