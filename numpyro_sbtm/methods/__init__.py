# SPDX-License-Identifier: Apache-2.0
"""Methods with all that has to be chosen: learned diffusion, and transport."""
