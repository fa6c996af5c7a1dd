# SPDX-License-Identifier: Apache-2.0
"""Where a posterior is: from points to a map, a mixture, and how good draws from there are."""
