# SPDX-License-Identifier: Apache-2.0
"""Sites without a proper prior: angles, which a window makes proper, and what is flat, which is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import KERNELS, build, run_chains
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import init_to_uniform
from numpyro.infer.reparam import CircularReparam
from numpyro.infer.util import log_density
from scipy.special import i0e
from scipy.special import log_ndtr as exact_log_ndtr

from numpyro_sbtm import report
from numpyro_sbtm.kernels.model import Model, from_model
from numpyro_sbtm.kernels.periodic import Direction, find_centres, log_window, wrap
from numpyro_sbtm.kernels.problem import logdensity
from numpyro_sbtm.options import Search

REAL, IMPROPER = dist.constraints.real, dist.ImproperUniform
PERIODS = 2 * np.pi * np.arange(-3, 4)
# twenty angles on both sides of ±π
ANGLES = np.array(dist.VonMises(np.pi - 0.05, 15.0).sample(jax.random.key(0), (20,)))


@handlers.reparam(config={"mu": CircularReparam()})
def angles(y):
    mu = numpyro.sample("mu", dist.VonMises(0.0, 0.1))
    k = numpyro.sample("k", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.VonMises(mu, k), obs=y)


def exact_angles(y):
    """Mean and deviation of cos mu, sin mu and k, and the log evidence, by quadrature."""
    mu, k = np.linspace(-np.pi, np.pi, 1000, endpoint=False), np.linspace(1e-3, 80.0, 4001)

    def log_prob(x, loc, k):
        return k * (np.cos(x - loc) - 1.0) - np.log(2 * np.pi * i0e(k))

    logs = sum(log_prob(each, mu[:, None], k) for each in y) + log_prob(mu, 0.0, 0.1)[:, None]
    logs += -0.5 * (k / 10.0) ** 2 + np.log(2 / np.sqrt(2 * np.pi) / 10.0)
    mass = np.exp(logs - np.max(logs))
    log_evidence = np.log(np.sum(mass) * (mu[1] - mu[0]) * (k[1] - k[0])) + np.max(logs)
    mass /= np.sum(mass)
    parts = (np.cos(mu), mass.sum(1)), (np.sin(mu), mass.sum(1)), (k, mass.sum(0))
    mean = np.array([p @ x for x, p in parts])
    std = np.sqrt([p @ x**2 - (p @ x) ** 2 for x, p in parts])
    return mean, std, log_evidence


def problem_of(model, *args, key=None):
    return from_model(
        jax.random.key(0) if key is None else key,
        Model(model, args, {}, init_to_uniform, False),
        num_chains=1,
        search=Search(num_starts=4),
        init_params=None,
    )


# ------------------------------------------------------------------ the window
def test_copies_of_the_window_sum_to_one():
    u = jnp.linspace(-3 * np.pi, 3 * np.pi, 301)
    copies = jnp.exp(log_window(u[:, None] + 2 * np.pi * jnp.arange(-5, 6)))
    np.testing.assert_allclose(copies.sum(-1), 1.0, atol=1e-6)
    assert float(log_window(jnp.array(2 * np.pi))) < -22  # a sharp density has no copies


def test_tails_of_the_window_are_exact_and_finite_in_float32():
    u = np.array([0.0, 1e-3, 1.0, 3.0, np.pi, 4.0, 10.0, 10.7, 30.0, 1e3, 1e6, 1e9], np.float32)
    u = np.concatenate([-u, u])
    away = np.abs(u.astype(float))
    # the other edge is lost in rounding
    exact = exact_log_ndtr((np.pi - away) / 0.5)
    np.testing.assert_allclose(log_window(jnp.array(u)), exact, rtol=2e-5, atol=1e-7)
    a = (np.pi - away) / 0.5
    slope = -np.sign(u) * 2.0 * np.exp(-0.5 * a**2 - 0.5 * np.log(2 * np.pi) - exact_log_ndtr(a))
    far = away > 1e3 - 1  # there the quotient of densities is its asymptote
    slope[far] = (-np.sign(u) * (away - np.pi) / 0.25)[far]
    np.testing.assert_allclose(jax.vmap(jax.grad(log_window))(jnp.array(u)), slope, rtol=1e-4, atol=1e-6)


def test_points_are_put_into_the_period_around_the_centre():
    x = wrap(jnp.array([[7.0, 7.0, -100.0], [3.0, -4.0, 0.1]]), np.array([np.nan, 3.0, -3.0]))
    assert np.all(np.abs(x[:, 1:] - jnp.array([3.0, -3.0])) <= np.pi + 1e-4)
    np.testing.assert_allclose(x[:, 0], [7.0, 3.0])
    np.testing.assert_allclose(jnp.cos(x[0, 2]), np.cos(100.0), atol=1e-4)


# ------------------------------------------------------------------ which directions are periodic
def centres(density, dim=1, points=None, **direction):
    directions = {
        i: Direction(f"x[{i}]", **({"real": True, "circular": False} | direction)) for i in range(dim)
    }
    if points is None:
        points = jax.random.uniform(jax.random.key(1), (32, dim), minval=-2.0, maxval=2.0)
    return find_centres(density, points, directions)


@pytest.mark.parametrize(
    ("density", "centre"),
    [
        (lambda x: 3.0 * jnp.cos(x[0] - 1.0), [1.0]),
        (lambda x: 2.0 * jnp.sin(x[0]), [np.pi / 2]),
        (lambda x: 400.0 * jnp.cos(x[0] - np.pi), [np.pi]),
        # rounding hides what depends on the angle, but not the slope
        (lambda x: 3.0 * jnp.cos(x[0] - 1.0) - 1e7, [1.0]),
        # of two opposite modes neither is cut
        (lambda x: 30.0 * jnp.cos(2.0 * x[0]), [np.pi / 2]),
        (lambda x: 4.0 * jnp.cos(x[0] - x[1] - 1.0) + 3.0 * jnp.cos(x[1] - 2.0), [3.0, 2.0]),
        (lambda x: 3.0 * jnp.cos(x[0]) - 0.5 * (x[1] - x[0] % (2 * np.pi)) ** 2, None),
        # what looks periodic close by is bounded far away
        (lambda x: 3.0 * jnp.cos(x[0]) - 0.5 * (x[0] / 1e3) ** 2, [np.nan]),
        (lambda x: -0.5 * ((x[0] - 1e6) / 1e5) ** 2, [np.nan]),
        (lambda x: -jnp.log1p((x[0] - 1e6) ** 2), [np.nan]),
        (lambda x: 3.0 * jnp.cos(3.0 * x[0]) + jnp.sin(0.5 * x[0]) - 0.01 * x[0] ** 2, [np.nan]),
        # improper, but not flat: the verdict is for after the run
        (lambda x: -jax.nn.softplus(-x[0]), [np.nan]),
    ],
)
def test_periodic_directions_are_found_by_what_they_do(density, centre):
    if centre is None:
        found = centres(density, 2)
        assert np.isfinite(found[0]) and np.isnan(found[1])
        return
    found = centres(density, len(centre))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(centre))
    off = (
        (found - np.array(centre) + np.pi / 2) % np.pi - np.pi / 2
        if centre == [np.pi / 2]
        else found - centre
    )
    off = (off + np.pi) % (2 * np.pi) - np.pi
    assert np.all(np.abs(off[~np.isnan(off)]) < 0.2), found


def test_strategies_that_put_all_points_at_one_place_do_no_harm():
    (found,) = centres(lambda x: 3.0 * jnp.cos(x[0] - 1.0), points=jnp.zeros((32, 1)))
    assert abs(found - 1.0) < 0.2


def test_a_circle_that_nothing_depends_on_is_known_by_its_name():
    assert np.all(np.isfinite(centres(lambda x: 0.0 * x[0], circular=True)))


@pytest.mark.parametrize(
    ("density", "real"), [(lambda x: -0.5 * x[0] ** 2 - 1e5, True), (lambda x: x[1] - jnp.exp(-x[0]), False)]
)
def test_flat_directions_are_named(density, real):
    with pytest.raises(ValueError, match=r"Site `x\[1\]` has an improper prior .* Give it a proper prior"):
        centres(density, 2, real=real)


# ------------------------------------------------------------------ models
def test_flat_sites_are_refused_at_once():
    def model(x):
        slope = numpyro.sample("slope", IMPROPER(REAL, (), (2, 2)))
        numpyro.sample("y", dist.Normal(x @ slope.ravel(), 1.0), obs=jnp.ones(len(x)))

    x = np.array(jax.random.normal(jax.random.key(0), (30, 4)))
    problem_of(model, x)
    for kernel in KERNELS.values():
        with pytest.raises(ValueError, match=r"Site `slope\[1, 0\]` has an improper prior"):
            kernel(model).init(jax.random.key(0), 10, None, (x * np.array([1, 1, 0, 1]),), {})


def other_circles(y):
    """Two angles of a mixture, one of a plate's each, and a slope that data bound."""
    with numpyro.plate("component", 2):
        loc = numpyro.sample("loc", dist.VonMises(0.0, 0.5))
    slope = numpyro.sample("slope", IMPROPER(REAL, (), ()))
    numpyro.sample("height", dist.Normal(slope, 2.0), obs=30.0)
    with numpyro.plate("row", len(y)):
        which = numpyro.sample(
            "which", dist.Categorical(jnp.array([0.3, 0.7])), infer={"enumerate": "parallel"}
        )
        numpyro.sample("y", dist.VonMises(loc[which], 4.0), obs=y)


def test_copies_of_a_windowed_model_sum_to_the_model():
    """With plates, enumerated sites and an improper prior that is left alone; the copies are 2π apart."""
    model = handlers.reparam(other_circles, config={"loc": CircularReparam()})
    problem = problem_of(model, ANGLES)
    potential = problem.potential_gen(ANGLES)
    z = {"loc_unwrapped": jnp.array([2.5, -0.4]), "slope": jnp.array(28.0)}
    shifts = np.stack(np.meshgrid(PERIODS, PERIODS), -1).reshape(-1, 2)
    copies = jax.vmap(lambda t: -potential(z | {"loc_unwrapped": z["loc_unwrapped"] + t}))(jnp.array(shifts))
    loc = z["loc_unwrapped"]
    rows = dist.VonMises(loc, 4.0).log_prob(ANGLES[:, None]) + jnp.log(jnp.array([0.3, 0.7]))
    exact = jnp.sum(jax.scipy.special.logsumexp(rows, -1)) + jnp.sum(dist.VonMises(0.0, 0.5).log_prob(loc))
    exact += dist.Normal(z["slope"], 2.0).log_prob(30.0)
    np.testing.assert_allclose(jax.scipy.special.logsumexp(copies), exact, rtol=1e-5)
    site = problem.postprocess_gen(ANGLES)(z | {"loc_unwrapped": z["loc_unwrapped"] + 2 * np.pi})
    np.testing.assert_allclose(site["loc"], z["loc_unwrapped"], atol=1e-5)
    around = problem.scouts[:, :2].reshape(-1)
    assert np.ptp(around) > 5.5 and np.std(around) > 1.5  # all around the circles


def test_the_evidence_of_a_windowed_model_is_that_of_the_wrapped_one():
    problem = problem_of(angles, ANGLES)
    density = logdensity(problem, (ANGLES,), {}, False)
    log_k, u = np.linspace(-1.0, 4.5, 150), np.linspace(-9.0, 9.0, 300)
    grid = jnp.array(np.stack(np.meshgrid(log_k, u, indexing="ij"), -1).reshape(-1, 2))
    logs = np.asarray(jax.vmap(density)(grid), float)
    total = jax.scipy.special.logsumexp(logs) + np.log((log_k[1] - log_k[0]) * (u[1] - u[0]))
    assert abs(total - exact_angles(ANGLES)[2]) < 2e-4
    # the posterior is at ±π, and not cut there: the two sides are one mode
    assert np.std(grid[:, 1][logs > np.max(logs) - 5.0]) < 0.5


def test_models_with_proper_priors_are_left_alone():
    def model():
        u = numpyro.sample("u", dist.Normal(0.0, 5.0))
        numpyro.factor("circle", 3.0 * jnp.cos(u))

    z = {"u": jnp.array(9.0)}
    exact = log_density(model, (), {}, z)[0]
    np.testing.assert_allclose(problem_of(model).potential_gen()(z), -exact, rtol=1e-6)


def test_a_whitening_around_another_period_is_turned_back():
    loc = jnp.array([jnp.log(11.0), 3.03 - 2 * np.pi])
    kernel = build(KERNELS["dis"], angles, precondition=(loc, jnp.diag(jnp.array([0.35, 0.08]))), num_steps=4)
    state = kernel.init(jax.random.key(0), 10, None, (ANGLES,), {})
    assert state.learned.located.ess_fraction > 0.7


@pytest.mark.parametrize("traced", ["key", "data", "closure"])
def test_windows_under_a_trace(traced):
    """Traced keys do not matter; of traced data only the name of a site is known, and the window is at 0."""

    def starts(key, y):
        if traced == "closure":
            return problem_of(lambda: angles(y), key=key).starts
        return problem_of(angles, y, key=key).starts

    key = jax.random.key(0)
    if traced == "key":
        found = jax.jit(lambda key: starts(key, ANGLES))(key)[:, 1]
        assert np.all(np.abs(found - 3.0) < np.pi + 0.3) and np.any(found > np.pi)
    else:
        found = jax.jit(starts)(key, ANGLES)[:, 1]
        assert np.all(np.abs(found) <= np.pi + 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KERNELS)
def test_angles_around_pi(kind):
    mcmc = run_chains(KERNELS[kind](angles), ANGLES, warmup={"dis": 300, "sbtm": 60}[kind])
    found = report(mcmc)
    mean, std, log_evidence = exact_angles(ANGLES)
    samples = mcmc.get_samples(group_by_chain=True)
    ours = np.stack([np.cos(samples["mu"]), np.sin(samples["mu"]), samples["k"]], -1)
    error = std / np.sqrt(np.minimum(effective_sample_size(ours), 4000))
    assert np.all(np.abs(ours.mean((0, 1)) - mean) < 4 * error)
    assert np.all(np.abs(ours.std((0, 1)) / std - 1) < 0.15)
    assert abs(found.log_evidence - log_evidence) < 0.02
    assert found.verdict == "reliable", found
