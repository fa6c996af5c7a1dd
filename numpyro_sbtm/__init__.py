# SPDX-License-Identifier: Apache-2.0
"""Learned samplers for NumPyro: exact draws, an evidence with an error bar, and a plain verdict."""

from numpyro_sbtm.kernels.kernels import DiffusionKernel as DiffusionKernel
from numpyro_sbtm.kernels.kernels import LogVarianceDISKernel as LogVarianceDISKernel
from numpyro_sbtm.kernels.kernels import SBTMKernel as SBTMKernel
from numpyro_sbtm.reporting.report import Report as Report
from numpyro_sbtm.reporting.report import report as report
