# SPDX-License-Identifier: Apache-2.0
"""Plots of a run. Every function takes the axes to draw on; the only module that needs matplotlib."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["log_weights", "points", "pyplot", "training_curve", "trajectories", "transport"]


def pyplot() -> Any:
    """Import `matplotlib.pyplot`.

    Raises:
        ImportError: without matplotlib; it names the extra.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install the extra `plot`: "
            "`pip install numpyro_sbtm[plot]`."
        ) from error
    return plt


def training_curve(ax: "Axes", loss: Float[np.ndarray, " n"], *, window: int = 20) -> None:
    """Draw the training loss with its running mean.

    Args:
        ax: matplotlib axes.
        loss: one value a warm-up step, shape ``[n]``; NaN where a step trained nothing. Without any, the
            picture says that nothing was trained.
        window: steps in the running mean.
    """
    loss = loss[np.isfinite(loss)]
    if not loss.size:
        ax.text(0.5, 0.5, "nothing was trained", ha="center", va="center", transform=ax.transAxes)
        ax.set(xticks=[], yticks=[], title="Training")
        return
    ax.plot(loss, lw=0.5, alpha=0.5)
    if loss.size > window:
        mean = np.convolve(loss, np.ones(window) / window, "valid")
        ax.plot(np.arange(window - 1, loss.size), mean, lw=1.5)
    if loss.min() > 0:
        ax.set_yscale("log")
    ax.set(xlabel="warm-up step", ylabel="training loss", title="Training")


def log_weights(ax: "Axes", log_weight: Float[np.ndarray, " n"], log_evidence: float) -> None:
    """Draw the histogram of the log weights of fresh proposals; the narrower, the better.

    Args:
        ax: matplotlib axes.
        log_weight: shape ``[n]``; non-finite ones are left out.
        log_evidence: drawn as a vertical line.
    """
    finite = log_weight[np.isfinite(log_weight)]
    if finite.size:
        low = np.quantile(finite, 0.005) - 0.5
        ax.hist(np.clip(finite, low, None), bins=60, density=True)
        ax.axvline(log_evidence, color="k", lw=1, label="log evidence")
        ax.legend(frameon=False)
    ax.set(xlabel="log weight", yticks=[], title="Fresh proposals")


def points(
    ax: "Axes",
    x: Float[np.ndarray, "n d"],
    logdensity: Callable[[Float[np.ndarray, "m d"]], Float[np.ndarray, " m"]] | None = None,
) -> None:
    """Draw points over a density: a histogram on the line, otherwise a scatter plot of two coordinates.

    Args:
        ax: matplotlib axes.
        x: shape ``[n, d]``; of more than two coordinates the first two are drawn, without a density.
        logdensity: of a batch of points, up to a constant; None for the points alone.
    """
    x = x[np.all(np.isfinite(x), -1)]
    if x.shape[1] == 1:
        ax.hist(x[:, 0], bins=80, density=True, alpha=0.5)
        if logdensity is not None:
            grid = np.linspace(*ax.get_xlim(), 400)
            value = np.exp(logdensity(grid[:, None]))
            ax.plot(grid, value / np.trapezoid(value, grid), "k", lw=1)
        ax.set(xlabel="x", yticks=[], title="Points")
        return
    ax.scatter(x[:, 0], x[:, 1], s=1, alpha=0.3, rasterized=True)
    if logdensity is not None and x.shape[1] == 2:
        axes = [np.linspace(*limits, 200) for limits in (ax.get_xlim(), ax.get_ylim())]
        grid = np.stack(np.meshgrid(*axes), -1)
        value = logdensity(grid.reshape(-1, 2)).reshape(grid.shape[:2])
        ax.contour(*axes, value - value.max(), levels=[-4.5, -2.0, -0.5], colors="k", linewidths=0.5)
    ax.set(xlabel="first coordinate", ylabel="second coordinate", title="Points")


def _clock(step_size: Float[np.ndarray, " K"]) -> tuple[int, Float[np.ndarray, " M1"]]:
    """Count the maps that were made, M, and add up the time before any and after each."""
    made = int(np.sum(step_size > 0))
    return made, np.concatenate([[0.0], np.cumsum(step_size[:made])])


def transport(
    ax: "Axes",
    step_size: Float[np.ndarray, " K"],
    divergence: Float[np.ndarray, " K1"],
    fisher: Float[np.ndarray, " K"],
    dissipation: Float[np.ndarray, " K"],
) -> None:
    """Draw the divergence of transported points from the target over time, and how fast it falls.

    Args:
        ax: matplotlib axes.
        step_size: of every map, zero for those not made, shape ``[K]``.
        divergence: before any map and after each, shape ``[K+1]``; its least value is the zero of the plot.
        fisher: mean squared velocity before each map, shape ``[K]``.
        dissipation: its unbiased estimate of the fall of the divergence, shape ``[K]``.
    """
    made, time = _clock(step_size)
    curve = divergence[: made + 1]
    ax.plot(time, curve - curve[np.isfinite(curve)].min(), "k", label="divergence above its least")
    ax.plot(time[:-1], fisher[:made], lw=1, label="mean squared velocity")
    ax.plot(time[:-1], dissipation[:made], ":", lw=1.5, label="dissipation")
    ax.set_yscale("symlog", linthresh=1e-2)
    ax.legend(frameon=False)
    ax.set(xlabel="time", title="Transport")


def trajectories(
    ax: "Axes", step_size: Float[np.ndarray, " K"], xs: Float[np.ndarray, "n K1 d"], *, coordinate: int = 0
) -> None:
    """Draw the ways of transported points over time.

    Args:
        ax: matplotlib axes.
        step_size: of every map, zero for those not made, shape ``[K]``.
        xs: points before any map and after each, shape ``[n, K+1, d]``.
        coordinate: which of them is drawn.
    """
    made, time = _clock(step_size)
    ax.plot(time, xs[:, : made + 1, coordinate].T, "k", lw=0.4, alpha=0.6)
    ax.set(xlabel="time", ylabel="coordinate", title="Trajectories")
