# SPDX-License-Identifier: Apache-2.0
"""What a finished run is worth: evidence, convergence, and the verdict."""
