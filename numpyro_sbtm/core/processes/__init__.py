# SPDX-License-Identifier: Apache-2.0
"""Processes: pairs of discrete Markov chains, one a file, with its equations."""
