# SPDX-License-Identifier: Apache-2.0
"""Score-based transport: the maps, how their velocities are fitted, and how particles move."""
