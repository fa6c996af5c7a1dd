# SPDX-License-Identifier: Apache-2.0
"""Measurements behind the tables of the documentation: ``python -m benchmarks``."""
