# SPDX-License-Identifier: Apache-2.0
"""The whitening map, mixtures, tempered particles, and what the warm start makes of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_within, correlated, run_chains, three_components, two_modes
from scipy.stats import multivariate_normal

from benchmarks.posteriors import PROBLEMS
from numpyro_sbtm import LogVarianceDISKernel, SBTMKernel, report
from numpyro_sbtm.compile import run_stages
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.local import LOCAL_KERNELS, local_move
from numpyro_sbtm.core.maps import Triangular, whiten
from numpyro_sbtm.core.maps.spline import fit_margins
from numpyro_sbtm.core.mixture import fit_mixture, largest, normal
from numpyro_sbtm.core.target import Target
from numpyro_sbtm.core.weights import clean, ess_fraction, log_evidence
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.fit import Fit, _pool, fit
from numpyro_sbtm.search.fit_points import fit_points
from numpyro_sbtm.search.guesses import _laplace, first_guesses
from numpyro_sbtm.search.ladder import StartingPoints, _check, _judged, find_start
from numpyro_sbtm.search.temper import tempered_particles
from numpyro_sbtm.search.warm_start import warm_start
from numpyro_sbtm.targets import gaussian

pytestmark = pytest.mark.usefixtures("x64")


def bent(x):
    """Move points towards 1 and -1."""
    return x + 0.3 * jnp.tanh(2.0 * x)


def random_whitening(dim, seed=0, strength=1.0):
    keys = iter(jax.random.split(jax.random.key(seed), 11))
    vector = lambda size: strength * size * jax.random.normal(next(keys), (dim,))  # noqa: E731
    matrix = lambda size: strength * size * jax.random.normal(next(keys), (dim, dim))  # noqa: E731
    return Triangular(
        order=jax.random.permutation(next(keys), dim),
        loc=vector(1.0),
        scale_tril=jnp.tril(matrix(0.5), -1) + jnp.eye(dim),
        log_scale_slope=jnp.tril(matrix(0.4), -1),
        shift_slope=jnp.tril(matrix(0.4), -1),
        shift=vector(0.5),
        precision=jnp.exp(vector(1.0)),
        skew=vector(0.3),
        tail=strength * jnp.linspace(-0.3, 0.3, dim),
        shears=jnp.tril(jnp.stack([matrix(0.2), matrix(0.2)]), -1),
        margins=fit_margins(bent(strength * jax.random.normal(next(keys), (200, dim))), jnp.ones(200)),
    )


def test_whitening_is_undone():
    whitening = random_whitening(4)
    u = 2.0 * jax.random.normal(jax.random.key(1), (200, 4))  # beyond the outer knots too
    x, log_det = jax.vmap(lambda v: whitening.forward(v))(u)
    back, same = jax.vmap(lambda y: whitening.inverse(y))(x)
    np.testing.assert_allclose(back, u, atol=1e-6)
    np.testing.assert_allclose(same, log_det, atol=1e-6)


def test_whitening_log_det_equals_autodiff():
    whitening = random_whitening(4)
    u = jax.random.normal(jax.random.key(1), (20, 4))
    _, log_det = jax.jit(jax.vmap(lambda v: whitening.forward(v)))(u)
    jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda v: whitening.forward(v)[0])))(u)
    np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-10)


def test_whitening_keeps_the_integral():
    target = correlated()
    whitening = random_whitening(2, strength=0.3)
    margins = fit_margins(bent(jax.random.normal(jax.random.key(3), (4000, 2))), jnp.ones(4000))
    whitened = whiten(target, whitening._replace(margins=margins))
    u = 2.0 * jax.random.normal(jax.random.key(0), (100_000, 2))
    proposal = gaussian(np.zeros(2), 4.0 * np.eye(2))
    log_weight = jax.vmap(whitened.logdensity_fn)(u) - jax.vmap(proposal.logdensity_fn)(u)
    log_z, se = log_evidence(log_weight)
    assert 1e-3 < se < 0.02
    assert_within(log_z, 0.0, se)


@pytest.mark.parametrize(
    ("std", "correlation", "log_scale"),
    [(np.logspace(-4, 4, 9), 0.5, 0.0), (np.full(20, 1e-3), 0.99, -1e4), (np.logspace(-2, 2, 50), 0.9, -1e5)],
)
def test_curvature_is_measured_at_every_scale(std, correlation, log_scale):
    """In float32, of normal laws away from the origin, half a deviation from their modes too."""
    dim = len(std)
    cov = (correlation + (1.0 - correlation) * np.eye(dim)) * std * std[:, None]
    whiten_by = np.linalg.inv(np.linalg.cholesky(cov))
    mode, root = jnp.full(dim, 3.0), jnp.asarray(whiten_by, jnp.float32)

    def density(x):
        return log_scale - 0.5 * jnp.sum((root @ (x - mode)) ** 2)

    found = jax.jit(jax.vmap(lambda x: _laplace(density, x)))(jnp.stack([mode, mode + 0.5 * std]))
    for tril in found:
        singular = np.linalg.svd(whiten_by @ np.asarray(tril, float), compute_uv=False)
        np.testing.assert_allclose(singular, 1.0, atol=0.01)


def test_curvature_needs_values_and_gradients_alone():
    """A likelihood from outside JAX has no second derivatives; nor has every differential equation."""

    @jax.custom_vjp
    def outside(x):
        return jax.pure_callback(lambda x: np.sum(x**2, -1), x[0], x, vmap_method="expand_dims")

    outside.defvjp(lambda x: (outside(x), x), lambda x, c: (2.0 * c * x,))
    tril = _laplace(lambda x: -0.5 * outside(x * jnp.array([1.0, 10.0])), jnp.zeros(2))
    np.testing.assert_allclose(tril, np.diag([1.0, 0.1]), atol=1e-3)


def test_the_fit_straightens_a_funnel_given_its_order():
    """Neal's funnel, sd 1.5, with the scale last: in the right order it is inside the family of maps."""

    def funnel(x):
        v, y = x[-1], x[:-1]
        return -0.5 * (v / 1.5) ** 2 - 0.5 * jnp.sum(y**2) * jnp.exp(-v) - 0.5 * y.size * v

    target = Target(funnel, 4)
    starts = jax.random.normal(jax.random.key(0), (4, 4))
    order = jnp.array([3, 0, 1, 2])
    run = jax.jit(lambda key: fit(key, target, first_guesses(target, starts, starts, order)[0]).best)
    whitening = run(jax.random.key(1))
    u = jax.random.normal(jax.random.key(2), (5000, 4))
    log_weight = jax.vmap(whiten(target, whitening).logdensity_fn)(u) + 0.5 * jnp.sum(u**2, -1)
    assert float(jnp.std(log_weight)) < 0.5  # the best affine map leaves more than 2


def test_the_whitening_of_a_wide_funnel_is_all_but_exact():
    # log scales 1.5 s: at three deviations 4.5, still below the bound of 6
    z = jax.random.normal(jax.random.key(0), (20_000, 10))
    funnel = Triangular.affine(jnp.zeros(10), jnp.eye(10))
    funnel = funnel._replace(log_scale_slope=jnp.zeros((10, 10)).at[1:, 0].set(1.5))
    x, log_det = jax.vmap(lambda u: funnel.forward(u))(z)
    excess = 0.5 * jnp.sum(z[:, 1:] ** 2 - (x[:, 1:] * jnp.exp(-1.5 * x[:, :1])) ** 2, -1)
    log_weight = excess + log_det - 9 * 1.5 * x[:, 0]
    assert ess_fraction(log_weight) > 0.97  # .74 with a plain hyperbolic tangent
    assert abs(jnp.mean(log_weight)) < 0.01


def test_a_banana_is_fitted_along_both_arms():
    def density(x):
        return -0.5 * ((x[0] / 10) ** 2 + (x[1] - 0.1 * (100 - x[0] ** 2)) ** 2)

    target, starts = Target(density, 2), jax.random.normal(jax.random.key(0), (8, 2))
    run = jax.jit(lambda key: fit(key, target, first_guesses(target, starts, starts, jnp.arange(2))[0]))
    found = run(jax.random.key(1))
    best = jnp.argmax(found.elbos)
    assert found.elbos[best] > jnp.log(2 * jnp.pi * 10) - 0.05
    assert jnp.min(found.draws[best, :, 0]) < -12 and jnp.max(found.draws[best, :, 0]) > 12


def test_the_fit_covers_modes_that_lie_apart():
    one = gaussian(np.zeros(2), np.eye(2)).logdensity_fn
    apart = lambda x: jnp.logaddexp(one(x - 8.0), one(x + 8.0))  # noqa: E731
    starts = jnp.array([[7.0, 9.0], [-8.0, -7.0], [9.0, 8.0], [-7.0, -9.0]])
    target = Target(apart, 2)
    run = jax.jit(lambda key: fit(key, target, first_guesses(target, starts, starts, jnp.arange(2))[0]))
    found = run(jax.random.key(0))
    assert found.separate
    whitening = found.pooled
    inverse = jnp.linalg.inv(whitening.scale_tril)
    for mode in (8.0, -8.0):
        assert jnp.linalg.norm(inverse @ (jnp.full(2, mode) - whitening.loc)) < 3.0


@pytest.mark.parametrize(("together", "separate"), [(1, True), (6, False)])
def test_the_widest_of_many_modes_does_not_hide_the_others(together, separate):
    """Fits of ten corners, the best of them by five nats; or six in its corner, and four that went astray."""
    corners = 6.0 * jnp.sign(jax.random.normal(jax.random.key(0), (10, 4))).at[:together].set(1.0)
    fits = jax.vmap(lambda loc: Triangular.affine(loc, jnp.eye(4), jnp.arange(4)))(corners)
    draws = corners[:, None] + jax.random.normal(jax.random.key(1), (200, 4))
    elbos = jnp.zeros(10).at[:together].set(5.0)
    found = jax.jit(_pool)(fits, elbos, draws, Evaluations())
    assert bool(found.separate) == separate
    assert jnp.all(found.best.loc == corners[0])
    if separate:
        inverse = jnp.linalg.inv(found.pooled.scale_tril)
        assert jnp.max(jnp.linalg.norm((corners - found.pooled.loc) @ inverse.T, axis=-1)) < 3.0


def test_margins_straighten_two_modes():
    sample = two_modes().sample(jax.random.key(0), 8000)
    margins = fit_margins(sample, jnp.ones(8000))
    whitening = Triangular.affine(jnp.zeros(2), jnp.eye(2))._replace(margins=margins)
    fresh = two_modes().sample(jax.random.key(1), 4000)
    u = np.asarray(jax.vmap(lambda x: whitening.inverse(x)[0])(fresh))
    for level in (-1.5, 0.0, 1.5):
        share = 0.5 * (1 + np.vectorize(math.erf)(level / np.sqrt(2)))
        assert_within(np.mean(u < level, 0), share, np.sqrt(share * (1 - share) / 2600))


def test_margins_draw_next_to_nothing_between_modes_and_spare_normal_coordinates():
    key_side, key_noise = jax.random.split(jax.random.key(0))
    noise = jax.random.normal(key_noise, (4096, 2))
    side = jax.random.rademacher(key_side, (4096,), noise.dtype)
    margins = fit_margins(noise * jnp.array([0.1, 1.0]) + jnp.stack([side, 0 * side], 1), jnp.ones(4096))
    assert jnp.all(margins.slope[1] == 1.0) and jnp.all(margins.u[1] == margins.y[1])
    whitening = Triangular.affine(jnp.zeros(2), jnp.eye(2))._replace(margins=margins)
    x, _ = jax.vmap(lambda u: whitening.forward(u))(jax.random.normal(jax.random.key(1), (100_000, 2)))
    assert 0 < jnp.mean(jnp.abs(x[:, 0]) < 0.5) < 1e-3
    np.testing.assert_allclose(x[:, 1].std(), 1.0, atol=0.01)


def test_mixture_densities_and_draws_agree_with_scipy():
    mixture = three_components()
    y = jax.random.normal(jax.random.key(0), (20, 2))
    expected = 0.0
    for c in range(3):
        turn, std = np.asarray(mixture.rotation[c]), np.asarray(mixture.std[c])
        law = multivariate_normal(turn @ np.asarray(mixture.centre[c]), turn @ np.diag(std**2) @ turn.T)
        expected += float(jnp.exp(mixture.log_weight[c])) * law.pdf(np.asarray(y))
    np.testing.assert_allclose(jax.vmap(mixture.log_prob)(y), np.log(expected), rtol=1e-10)
    np.testing.assert_allclose(
        jax.vmap(mixture.score)(y), jax.vmap(jax.grad(mixture.log_prob))(y), rtol=1e-9, atol=1e-10
    )
    draws = jax.vmap(mixture.sample)(jax.random.split(jax.random.key(1), 40_000))
    means = jnp.einsum("cij,cj->ci", mixture.rotation, mixture.centre)
    truth = jnp.exp(mixture.log_weight[:3]) @ means[:3]
    assert_within(jnp.mean(draws, 0), truth, jnp.std(draws, 0) / 200.0)


def test_expectation_maximisation_finds_a_mixture():
    truth = three_components()
    x = jax.vmap(truth.sample)(jax.random.split(jax.random.key(0), 6000))
    found = jax.jit(lambda: fit_mixture(jax.random.key(1), x[:4000], jnp.ones(4000), 3, size=5))()
    assert int(jnp.sum(jnp.isfinite(found.log_weight))) == 3
    gap = jnp.mean(jax.vmap(lambda y: truth.log_prob(y) - found.log_prob(y))(x[4000:]))
    assert -0.01 < float(gap) < 0.02  # nats, on points that were not fitted
    two = largest(found, 2)
    np.testing.assert_allclose(jnp.sum(jnp.exp(two.log_weight)), 1.0, rtol=1e-9)


def test_tempered_particles_weigh_separated_modes():
    target = two_modes()
    far = Target(lambda x: target.logdensity_fn(x / 4.0) - 2 * jnp.log(4.0) + 1.5, 2)
    x, log_z, *_ = jax.jit(lambda key: tempered_particles(key, far, normal(2, 8.0)))(jax.random.key(0))
    assert abs(float(log_z) - 1.5) < 0.1
    assert abs(float(jnp.mean(x[:, 0] < 0)) - 0.3) < 0.05


@pytest.mark.parametrize(
    ("std", "spread", "arrived"), [(3.0, 4.0, True), (3.0, 0.3, True), (1e12, 0.3, False)]
)
def test_particles_move_until_they_arrive_or_their_drift_tells(std, spread, arrived):
    wide = gaussian(np.zeros(2), std**2 * np.eye(2))
    run = jax.jit(lambda key: tempered_particles(key, wide, normal(2, spread)))
    x, _, spent, drift = run(jax.random.key(0))
    assert (drift == 0.0) == arrived
    assert jnp.all(jnp.isfinite(x)) and spent.gradients > 0
    if arrived:
        assert_within(jnp.std(x, 0), std, 2 * std / np.sqrt(2 * len(x)))  # moves leave particles dependent


def narrow_and_wide(x):
    """Normal distributions of weights .2 and .8 and deviations 1 and .4, apart in 8 dimensions."""
    apart = 2.0 * jnp.ones(8)
    wide = jnp.log(0.2) - 0.5 * jnp.sum((x + apart) ** 2)
    narrow = jnp.log(0.8) - 0.5 * jnp.sum((x - apart) ** 2) / 0.16 - 8 * jnp.log(0.4)
    return jnp.logaddexp(wide, narrow) - 4 * jnp.log(2 * jnp.pi)


def ring(x):
    return -0.5 * ((jnp.linalg.norm(x) - 3.0) / 0.3) ** 2


RING_LOG_Z = float(np.log(2 * np.pi * 3.0 * 0.3 * np.sqrt(2 * np.pi)))  # by quadrature in the radius
SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    ("density", "dim", "log_z", "least_ess", "refined"),
    [
        pytest.param(narrow_and_wide, 8, 0.0, 0.3, False, id="narrow"),
        pytest.param(narrow_and_wide, 8, 0.0, 0.3, True, id="narrow, refined", **SLOW),
        pytest.param(ring, 2, RING_LOG_Z, 0.5, False, id="ring", **SLOW),
        pytest.param(ring, 2, RING_LOG_Z, 0.5, True, id="ring, refined", **SLOW),
        # 4,096 modes
        pytest.param(
            lambda x: -jnp.sum((x**2 - 4.0) ** 2), 12, 12 * -0.10821, 0.5, False, id="wells", **SLOW
        ),
        pytest.param(correlated().logdensity_fn, 2, 0.0, 0.95, False, id="normal", **SLOW),
    ],
)
def test_the_warm_start_finds_every_mode(density, dim, log_z, least_ess, refined):
    target = Target(density, dim)
    scouts = 4.0 * jax.random.normal(jax.random.key(0), (128, dim))

    @jax.jit
    def weights(key):
        stages = warm_start(target, jnp.arange(dim), Search(refine=refined))
        whitening, mixture, particles, *_ = run_stages(stages, key, scouts[:8], scouts)
        white = whiten(target, whitening)
        u = jax.vmap(mixture.sample)(jax.random.split(key, 8000))
        log_weight = jax.vmap(white.logdensity_fn)(u) - jax.vmap(mixture.log_prob)(u)
        return clean(log_weight), particles

    log_weight, particles = weights(jax.random.key(1))
    found, se = log_evidence(log_weight)
    assert float(ess_fraction(log_weight)) > least_ess
    assert_within(found, log_z, se + 1e-4)
    assert jnp.all(jnp.isfinite(particles))


def judged(target, whitening, reference, points, seed=0, suspects=None):
    """What a check says of a mixture of one component, of particles, and of points that may be of a mode."""
    suspects = points[:0] if suspects is None else suspects
    spent, drift, key = Evaluations().as_arrays(), jnp.zeros(()), jax.random.key(seed)
    check = _check(target, Search(), True, 4)
    found = run_stages([check], whitening, reference, points, suspects, spent, drift, key)
    warm = _judged(found)
    return warm, bool(warm.outside)


@pytest.mark.parametrize("dim", [2, 60])
def test_particles_where_nothing_is_drawn_are_seen(dim):
    """In 60 dimensions the noise of particles fills the gap between modes eight deviations apart."""
    other = jnp.zeros(dim).at[0].set(8.0)
    target = Target(lambda x: jnp.logaddexp(*(-0.5 * jnp.sum((x - c) ** 2) for c in (0.0, other))), dim)
    plain = Triangular.affine(jnp.zeros(dim), jnp.eye(dim))
    own = jax.random.normal(jax.random.key(0), (512, dim))
    warm, outside = judged(target, plain, normal(dim), own)
    assert not outside and warm.ess_fraction > 0.99
    # fresh draws are as good as before: one particle of the other mode says what is missing
    warm, outside = judged(target, plain, normal(dim), own.at[100].add(other))
    assert outside and warm.ess_fraction > 0.99


def test_a_heavy_tail_is_no_mode():
    """Draws and particles agree on the first; particles alone reach into the second, of weight e^70."""
    plain = Triangular.affine(jnp.zeros(2), jnp.eye(2))
    own = jax.random.normal(jax.random.key(0), (512, 2))
    wider = Target(lambda x: -0.5 * jnp.sum(x**2) / 1.15**2, 2)
    tail = Target(lambda x: -0.5 * jnp.sum(x**2) + jnp.maximum(0.0, 0.5 * x[0] ** 2 - 2.0 * x[0] + 2.0), 2)
    for target, points in ((wider, 1.15 * own), (tail, own.at[100].set(jnp.array([14.0, 0.0])))):
        _, outside = judged(target, plain, normal(2), points)
        assert not outside


UNSEEN = pytest.mark.xfail(
    reason="no climb enters the narrow mode, nor does any of 4,096 particles", strict=True
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("density", "dim", "log_z", "least_ess", "seed"),
    [
        pytest.param(narrow_and_wide, 8, 0.0, 0.3, 0, id="narrow-0"),
        pytest.param(narrow_and_wide, 8, 0.0, 0.3, 1, id="narrow-1", marks=UNSEEN),
        pytest.param(narrow_and_wide, 8, 0.0, 0.3, 2, id="narrow-2"),
        *(pytest.param(ring, 2, RING_LOG_Z, 0.5, seed, id=f"ring-{seed}") for seed in range(3)),
        *(
            pytest.param(lambda x: -jnp.sum((x**2 - 4.0) ** 2), 12, 12 * -0.10821, 0.05, s, id=f"wells-{s}")
            for s in range(3)
        ),
        *(pytest.param(correlated().logdensity_fn, 2, 0.0, 0.95, s, id=f"normal-{s}") for s in range(3)),
    ],
)
def test_a_first_look_ends_the_search_only_where_it_saw_everything(density, dim, log_z, least_ess, seed):
    target = Target(density, dim)
    scouts = 4.0 * jax.random.normal(jax.random.key(seed), (128, dim))
    warm = find_start(
        jax.random.key(seed), target, StartingPoints(scouts[:8], scouts, jnp.arange(dim)), "auto", Search()
    )
    white = whiten(target, warm.whitening)
    u = jax.vmap(warm.reference.sample)(jax.random.split(jax.random.key(seed + 100), 8000))
    log_weight = jax.vmap(white.logdensity_fn)(u) - jax.vmap(warm.reference.log_prob)(u)
    found, se = log_evidence(clean(log_weight))
    assert float(ess_fraction(clean(log_weight))) > least_ess
    assert_within(found, log_z, se + 1e-4)


@pytest.mark.slow
def test_refinement_reaches_into_a_neck():
    """e^x of a Gamma(1/2, 1) law and two normal coordinates of that deviation; 5.6 % lie where x < -6."""

    def density(x):
        inner = -0.5 * jnp.sum(x[1:] ** 2) * jnp.exp(-2.0 * x[0])
        return inner - 1.5 * x[0] - jnp.exp(x[0]) - 0.5 * np.log(np.pi) - np.log(2.0 * np.pi)

    target = Target(density, 3)
    scouts = 2.0 * jax.random.normal(jax.random.key(0), (64, 3))
    rng = np.random.default_rng(0)
    scale = rng.gamma(0.5, size=4000)
    exact = jnp.asarray(np.c_[np.log(scale), scale[:, None] * rng.normal(size=(4000, 2))])

    def ended(refined):
        stages = warm_start(target, jnp.arange(3), Search(refine=refined))
        whitening, mixture, particles, _, spent, *_ = run_stages(
            stages, jax.random.key(1), scouts[:8], scouts
        )
        x = jax.vmap(lambda u: whitening.forward(u)[0])(particles)
        u, log_det = jax.vmap(lambda x: whitening.inverse(x))(exact)
        log_ratio = jax.vmap(density)(exact) - jax.vmap(mixture.log_prob)(u) + log_det
        assert jnp.all(jnp.isfinite(particles))
        return float(jnp.mean(x[:, 0] < -6.0)), float(jnp.mean(log_ratio)), int(spent.gradients)

    (_, divergence, gradients), (share, nearer, more) = ended(False), ended(True)
    assert abs(share - 0.056) < 0.015
    assert nearer < min(0.3, 0.8 * divergence)
    assert more - gradients == 2 * (45 * 8 + 1) * 4096

    # all of the law stays as it is; where the neck is cut off, most of it comes back
    first = Triangular.affine(jnp.zeros(3), jnp.eye(3), jnp.arange(3))
    refine = jax.jit(warm_start(target, jnp.arange(3), Search(refine=True))[3])
    for cut, least, most in ((-np.inf, 0.045, 0.067), (-6.0, 0.028, 0.067)):
        x = jnp.resize(exact[exact[:, 0] > cut], (4096, 3))
        zero = jnp.zeros(())
        x = refine(jax.random.split(jax.random.key(2), 5), zero, first, x, zero, Evaluations(), zero)[3]
        assert least < float(jnp.mean(x[:, 0] < -6.0)) < most


@pytest.mark.slow
def test_a_fitted_map_knows_of_scales_and_fits_no_noise():
    """Scales from 1e-5 to 1 in four dimensions, and twenty independent coordinates: KL from fresh draws."""
    for scale in (np.array([1.0, 1e-5, 1.0, 0.1]), np.ones(20)):
        dim = len(scale)
        points, fresh = (scale * np.random.default_rng(k).normal(size=(4096, dim)) for k in range(2))
        whitening = jax.jit(fit_points)(jax.random.key(0), jnp.asarray(points), jnp.arange(dim))
        u, log_det = jax.vmap(whitening.inverse)(jnp.asarray(fresh))
        excess = 0.5 * jnp.sum(u**2, -1) + log_det - 0.5 * jnp.sum((fresh / scale) ** 2, -1)
        assert 0.0 < float(jnp.mean(excess)) - np.log(scale).sum() < 0.05


@pytest.mark.slow
def test_refinement_leaves_particles_that_do_not_stay_finite():
    target, flat = gaussian(np.zeros(2), np.eye(2)), Triangular.affine(jnp.ones(2), jnp.eye(2))
    found = Fit(flat, flat, jnp.zeros((), bool), jnp.zeros(1), jnp.zeros((1, 8, 2)), Evaluations())
    refine = jax.jit(warm_start(target, jnp.arange(2), Search(refine=True))[3])
    keys, none = jax.random.split(jax.random.key(0), 5), Evaluations().as_arrays()

    def refined(particles):
        values = refine(keys, found, flat, particles, jnp.zeros(()), none, jnp.zeros(()))
        return values[3], values[-1].loc[1]

    # under the first map they lie around one, and the target around zero: they move
    particles = jax.random.normal(jax.random.key(1), (500, 2))
    moved, loc = refined(particles)
    assert jnp.all(jnp.abs(jnp.mean(moved, 0) + 1.0) < 0.3) and jnp.all(jnp.abs(loc) < 0.3)
    broken = particles.at[3].set(jnp.nan)
    np.testing.assert_array_equal(refined(broken)[0], broken)


@pytest.mark.parametrize("name", LOCAL_KERNELS)
def test_local_moves_leave_the_target_alone(name):
    target, move = two_modes(), local_move(name)
    draws = target.sample(jax.random.key(0), 20_000)
    step_size, _ = jax.jit(lambda: move.adapt(jax.random.key(1), target.logdensity_fn, draws[:64]))()
    keys = jax.random.split(jax.random.key(2), len(draws))
    run = jax.jit(jax.vmap(lambda key, x: move.step(key, target.logdensity_fn, x, step_size)))
    moved, value, probability, gradients = run(keys, draws)
    assert gradients.min() >= 2 and (name != "hmc" or gradients.max() == 9)
    assert 0.4 < float(jnp.mean(probability)) < 0.97
    assert float(jnp.mean(jnp.abs(moved - draws))) > 0.1
    np.testing.assert_allclose(value, jax.vmap(target.logdensity_fn)(moved), rtol=1e-9)
    for feature in (lambda x: x, jnp.square, lambda x: x[:, :1] > 0):
        change = feature(moved) * 1.0 - feature(draws)
        assert_within(jnp.mean(change, 0), 0.0, jnp.std(change, 0) / np.sqrt(len(draws)) + 1e-12)


# ------------------------------------------------------------------ the kernels on separated modes
@pytest.mark.slow
@pytest.mark.parametrize("kernel", [LogVarianceDISKernel, SBTMKernel])
def test_label_switching_is_mixed_and_its_evidence_right(kernel):
    problem = PROBLEMS["label switching"]()
    warmup = {LogVarianceDISKernel: 500, SBTMKernel: 300}[kernel]
    mcmc = run_chains(kernel(problem.model), *problem.args, warmup=warmup)
    found = report(mcmc)
    assert found.verdict == "reliable" and found.max_rhat < 1.02, str(found)
    mu = np.asarray(mcmc.get_samples()["mu"])
    assert abs(np.mean(mu[:, 0] < mu[:, 1]) - 0.5) < 0.03
    # the printed error holds the difference of both estimates, and would excuse it
    for value in (found.log_evidence, found.backward_log_evidence):
        assert abs(value - problem.log_evidence) < 0.03


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(LogVarianceDISKernel, marks=pytest.mark.slow),
        pytest.param(SBTMKernel, marks=pytest.mark.long),
    ],
)
def test_a_refined_warm_start_serves_both_kernels(kernel):
    problem = PROBLEMS["eight schools, centred"]()
    warmup = {LogVarianceDISKernel: 500, SBTMKernel: 300}[kernel]
    mcmc = run_chains(kernel(problem.model, search=Search(refine=True)), *problem.args, warmup=warmup)
    found = report(mcmc)
    assert found.verdict != "unreliable" and found.max_rhat < 1.02, str(found)
    assert "nothing looked for modes" not in str(found)
    for value in (found.log_evidence, found.backward_log_evidence):
        assert abs(value - problem.log_evidence) < 0.15
    draws = problem.features(mcmc.get_samples(group_by_chain=True))
    np.testing.assert_allclose((draws.mean((0, 1)) - problem.mean) / problem.sd, 0.0, atol=0.1)
