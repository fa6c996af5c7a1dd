# SPDX-License-Identifier: Apache-2.0
"""Bijections of R^d under which a badly scaled target looks like N(0, I)."""

from numpyro_sbtm.core.maps.affine import Affine as Affine
from numpyro_sbtm.core.maps.base import Map as Map
from numpyro_sbtm.core.maps.base import whiten as whiten
from numpyro_sbtm.core.maps.low_rank import LowRank as LowRank
from numpyro_sbtm.core.maps.triangular import Triangular as Triangular
