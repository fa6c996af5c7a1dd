# SPDX-License-Identifier: Apache-2.0
"""Kernels for `numpyro.infer.MCMC`: from a model to a density, and NumPyro's contract. No mathematics."""
