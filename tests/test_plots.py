# SPDX-License-Identifier: Apache-2.0
"""What plots show is what they were given."""

import matplotlib
import numpy as np
import pytest

from numpyro_sbtm import plots

matplotlib.use("agg")


@pytest.fixture
def ax():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_training_curve_leaves_out_steps_that_trained_nothing(ax):
    loss = np.append(np.linspace(2.0, 1.0, 50), np.full(10, np.nan))
    plots.training_curve(ax, loss)
    curve, mean = ax.lines
    assert len(curve.get_ydata()) == 50 and ax.get_yscale() == "log"
    np.testing.assert_allclose(mean.get_ydata()[-1], loss[30:50].mean())


def test_without_training_the_picture_says_so(ax):
    plots.training_curve(ax, np.full(10, np.nan))
    assert not ax.lines and [text.get_text() for text in ax.texts] == ["nothing was trained"]


def test_log_weights_survive_non_finite_ones(ax):
    plots.log_weights(ax, np.array([0.0, 1.0, 2.0, np.nan, -np.inf]), 1.5)
    assert sum(patch.get_height() * patch.get_width() for patch in ax.patches) == pytest.approx(1.0)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), 1.5)


def test_points_on_the_line_lie_under_their_density(ax):
    x = np.random.default_rng(0).normal(size=(500, 1))
    plots.points(ax, np.append(x, [[np.nan]], 0), lambda x: 3.0 - 0.5 * x[:, 0] ** 2)
    curve = ax.lines[0]
    np.testing.assert_allclose(np.max(curve.get_ydata()), (2 * np.pi) ** -0.5, rtol=0.02)
    assert sum(patch.get_height() * patch.get_width() for patch in ax.patches) == pytest.approx(1.0)


@pytest.mark.parametrize("dim", [2, 3])
def test_points_show_two_coordinates_and_contours_on_the_plane(ax, dim):
    x = np.random.default_rng(0).normal(size=(50, dim))
    plots.points(ax, x, lambda x: -0.5 * np.sum(x**2, -1))
    np.testing.assert_allclose(ax.collections[0].get_offsets(), x[:, :2])
    assert (len(ax.collections) > 1) == (dim == 2)


def test_transport_shows_the_maps_that_were_made(ax):
    step_size = np.array([0.1, 0.2, 0.0])
    divergence = np.array([3.0, 1.0, 1.5, np.inf])
    unknown = np.array([1.0, 2.0, np.nan])
    plots.transport(ax, step_size, divergence, unknown, 2 * unknown)
    above, fisher, dissipation = ax.lines
    np.testing.assert_allclose(above.get_xdata(), [0.0, 0.1, 0.3])
    np.testing.assert_allclose(above.get_ydata(), [2.0, 0.0, 0.5])
    np.testing.assert_allclose(fisher.get_ydata(), [1.0, 2.0])
    np.testing.assert_allclose(dissipation.get_ydata(), [2.0, 4.0])


def test_trajectories_end_with_the_last_map_made(ax):
    xs = np.arange(24.0).reshape(2, 4, 3)
    plots.trajectories(ax, np.array([0.5, 0.25, 0.0]), xs, coordinate=1)
    assert len(ax.lines) == 2
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [0.0, 0.5, 0.75])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), xs[1, :3, 1])
