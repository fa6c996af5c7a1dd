# SPDX-License-Identifier: Apache-2.0
"""The mathematics, in pure JAX: six nouns, and the two methods made of them."""

from numpyro_sbtm.core.algorithm import Algorithm as Algorithm
from numpyro_sbtm.core.algorithm import Draws as Draws
from numpyro_sbtm.core.algorithm import Info as Info
from numpyro_sbtm.core.diffusion import diffusion as diffusion
from numpyro_sbtm.core.divergence import Divergence as Divergence
from numpyro_sbtm.core.divergence import kl as kl
from numpyro_sbtm.core.divergence import kl_log_derivative as kl_log_derivative
from numpyro_sbtm.core.divergence import log_variance as log_variance
from numpyro_sbtm.core.divergence import sub_trajectory_log_variance as sub_trajectory_log_variance
from numpyro_sbtm.core.divergence import trajectory_balance as trajectory_balance
from numpyro_sbtm.core.divergence import two_pass_gradient as two_pass_gradient
from numpyro_sbtm.core.importance import importance as importance
from numpyro_sbtm.core.net import Net as Net
from numpyro_sbtm.core.net import pair as pair
from numpyro_sbtm.core.options import DiffusionOptions as DiffusionOptions
from numpyro_sbtm.core.options import TransportOptions as TransportOptions
from numpyro_sbtm.core.path import Path as Path
from numpyro_sbtm.core.path import evaluate as evaluate
from numpyro_sbtm.core.path import noise_path as noise_path
from numpyro_sbtm.core.path import reevaluate as reevaluate
from numpyro_sbtm.core.path import simulate as simulate
from numpyro_sbtm.core.processes.base import Process as Process
from numpyro_sbtm.core.processes.bridge import bridge as bridge
from numpyro_sbtm.core.processes.cmcd import cmcd as cmcd
from numpyro_sbtm.core.processes.dds import dds as dds
from numpyro_sbtm.core.processes.dis import dis as dis
from numpyro_sbtm.core.processes.dis_control import dis_control as dis_control
from numpyro_sbtm.core.processes.moved import rescaled as rescaled
from numpyro_sbtm.core.processes.pis import pis as pis
from numpyro_sbtm.core.target import Target as Target
from numpyro_sbtm.core.transition import Gaussian as Gaussian
from numpyro_sbtm.core.transition import Transition as Transition
from numpyro_sbtm.core.transport.sbtm import sbtm as sbtm
