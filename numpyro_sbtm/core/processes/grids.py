# SPDX-License-Identifier: Apache-2.0
"""Grids: how far every point of a path is on the way from noise to the draw."""

import numpy as np

__all__ = ["check_num_steps", "cosine_grid", "log_snr_grid", "vp_grid"]


def check_num_steps(num_steps: int) -> None:
    """Refuse a grid without a step."""
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")


def log_snr_grid(num_steps: int, low: float = -6.0, high: float = 7.5) -> np.ndarray:
    """Compute signal levels A_0 < ... < A_T = 1 of the points of a path.

    The log signal-to-noise ratios ``log(A_k / (1-A_k))`` of the first T points are equally spaced.

    Args:
        num_steps: the number of steps, T >= 1.
        low: log signal-to-noise ratio of x_0.
        high: log signal-to-noise ratio of x_{T-1}.

    Returns:
        A, shape ``[T+1]``, in float64.

    Examples:
        >>> from numpyro_sbtm.core.processes.grids import log_snr_grid
        >>> log_snr_grid(2, -2.0, 2.0).round(3).tolist()
        [0.119, 0.881, 1.0]
    """
    check_num_steps(num_steps)
    snr = np.linspace(low, high, num_steps) if num_steps > 1 else np.array([low])
    return np.append(1.0 / (1.0 + np.exp(-snr)), 1.0)


def cosine_grid(num_steps: int, total: float = 6.4) -> np.ndarray:
    """Compute the signal levels A_0 < ... < A_T = 1 of the DDS grid: large steps first, near the noise.

    ``-log A_k`` is the sum of the increments from k on; they are proportional to cos⁴ and sum to ``total``.

    Args:
        num_steps: the number of steps, T >= 1.
        total: ``-log A_0``.

    Returns:
        A, shape ``[T+1]``, in float64.

    Reference:
        Vargas et al. (2023), Denoising diffusion samplers, arXiv:2302.13834, appendix.

    Examples:
        >>> from numpyro_sbtm.core.processes.grids import cosine_grid
        >>> cosine_grid(3, 2.0).round(3).tolist()
        [0.135, 0.675, 1.0, 1.0]
    """
    check_num_steps(num_steps)
    phase = (np.linspace(0.0, 1.0, num_steps) + 0.008) / 1.008
    steps = np.cos(0.5 * np.pi * phase) ** 4 + 1e-4  # the last one must not vanish
    left = np.cumsum((steps * total / steps.sum())[::-1])[::-1]
    return np.append(np.exp(-left), 1.0)


def vp_grid(num_steps: int, first: float = 10.0, last: float = 0.1, duration: float = 1.0) -> np.ndarray:
    """Compute the signal levels of the variance-preserving diffusion on a uniform grid.

    β falls linearly from ``first`` at the noise to ``last`` at the draw; ``A_k = exp(-∫ β)`` over the rest.

    Args:
        num_steps: the number of steps, T >= 1.
        first: β at time 0.
        last: β at the end.
        duration: total time.

    Returns:
        A, shape ``[T+1]``, in float64.

    Reference:
        Richter & Berner (2024), arXiv:2307.01198, appendix A.9.

    Examples:
        >>> from numpyro_sbtm.core.processes.grids import vp_grid
        >>> vp_grid(2).round(4).tolist()
        [0.0064, 0.276, 1.0]
    """
    check_num_steps(num_steps)
    left = duration * (1.0 - np.arange(num_steps + 1) / num_steps)
    return np.exp(-(last * left + 0.5 * (first - last) * left**2 / duration))
