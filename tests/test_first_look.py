# SPDX-License-Identifier: Apache-2.0
"""The first look: normal distributions by scores, modes that tempering loses, and what it all costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_within

from numpyro_sbtm.core import Target, importance
from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.maps import Affine, whiten
from numpyro_sbtm.core.mixture import normal
from numpyro_sbtm.core.path import evaluations_of_path
from numpyro_sbtm.core.processes.dis import dis
from numpyro_sbtm.core.smc import independent_ensemble, path_draws
from numpyro_sbtm.core.weights import chain_efficiency, ess_fraction, metropolis
from numpyro_sbtm.networks import denoiser
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.first_look import _better_normal, first_look
from numpyro_sbtm.search.ladder import StartingPoints, _after, find_start
from numpyro_sbtm.search.located import Located
from numpyro_sbtm.search.normals import Normals, covering_normal, fit_normals


def correlated(dim, widest):
    """A normal density with scales from one over the widest to the widest, in a turned frame."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    std = np.geomspace(1.0 / widest, widest, dim)
    mean = rng.normal(size=dim)
    precision = (turn / std**2) @ turn.T
    return mean, (turn * std**2) @ turn.T, lambda x: -0.5 * (x - mean) @ precision @ (x - mean)


@pytest.mark.parametrize("dim", [2, 20])
def test_scores_tell_a_normal_distribution_from_few_points(dim):
    mean, cov, density = correlated(dim, 10.0)
    guesses = Affine(jnp.zeros((2, dim)), jnp.broadcast_to(jnp.eye(dim), (2, dim, dim)))
    found, spent = jax.jit(lambda key: fit_normals(key, density, guesses))(jax.random.key(0))
    assert spent == Evaluations(gradients=6 * 2 * 64)
    for loc, tril in zip(*found.maps, strict=True):
        relative = np.linalg.solve(np.linalg.cholesky(cov), tril)
        np.testing.assert_allclose(relative @ relative.T, np.eye(dim), atol=0.05)
        assert np.linalg.norm(np.linalg.solve(np.linalg.cholesky(cov), loc - mean)) < 0.1
    exact = 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1]
    np.testing.assert_allclose(found.elbos, exact, atol=0.05)


def test_a_density_that_is_nowhere_leaves_a_guess_as_it_was():
    guess = Affine(jnp.ones((1, 3)), jnp.eye(3)[None])
    found, _ = fit_normals(jax.random.key(0), lambda x: jnp.nan * jnp.sum(x), guess)
    assert found.elbos[0] == -jnp.inf
    jax.tree.map(np.testing.assert_array_equal, found.maps, guess)
    covering = covering_normal(Normals(guess, found.elbos))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in covering)


def test_scores_are_used_in_many_dimensions_and_moments_for_several_modes():
    key = jax.random.key(0)
    many = jax.random.normal(key, (512, 60))
    scored = _better_normal(many, -many)
    np.testing.assert_allclose(scored.scale_tril @ scored.scale_tril.T, jnp.eye(60), atol=0.01)
    sides = jnp.where(jnp.arange(512) % 2 == 0, 5.0, -5.0)[:, None]
    two = sides + jax.random.normal(key, (512, 1))
    assert abs(float(_better_normal(two, sides - two).scale_tril[0, 0]) - np.sqrt(26.0)) < 0.5


def narrow_and_wide(dim):
    """Half of the mass in a mode of a twentieth of the scale: no particle of the wide one finds it."""
    far = jnp.zeros(dim).at[0].set(6.0)

    def density(x):
        wide = -0.5 * jnp.sum(x**2)
        narrow = -0.5 * jnp.sum((x - far) ** 2) / 0.05**2 - dim * jnp.log(0.05)
        return jnp.logaddexp(wide, narrow) - jnp.log(2.0) - 0.5 * dim * jnp.log(2 * jnp.pi)

    return density, far


def test_a_narrow_mode_that_was_climbed_is_not_passed_over():
    dim = 8
    density, far = narrow_and_wide(dim)
    scouts = 2.0 * jax.random.normal(jax.random.key(1), (128, dim))
    starts = scouts[:8].at[0].set(far + 0.02)
    where = StartingPoints(starts, scouts, jnp.arange(dim))
    found = find_start(jax.random.key(0), Target(density, dim), where, "auto", Search())
    u = jax.vmap(found.reference.sample)(jax.random.split(jax.random.key(2), 4000))
    x = jax.vmap(lambda v: found.whitening.forward(v)[0])(u)
    log_weight = jax.vmap(whiten(Target(density, dim), found.whitening).logdensity_fn)(u)
    log_weight = log_weight - jax.vmap(found.reference.log_prob)(u)
    weight = jnp.exp(log_weight)
    share = float(jnp.sum(weight * (x[:, 0] > 4.0)) / jnp.sum(weight))
    # either it is in the mixture with its mass, or the search says that it has not seen all
    assert not bool(found.sufficient()) or abs(share - 0.5) < 0.1
    assert ess_fraction(log_weight) > 0.01


def test_an_ordinary_posterior_needs_one_look_of_few_evaluations():
    mean, _, density = correlated(5, 100.0)
    scouts = mean + 30.0 * jax.random.normal(jax.random.key(1), (128, 5))
    where = StartingPoints(scouts[:8], scouts, jnp.arange(5))
    found = find_start(jax.random.key(0), Target(density, 5), where, "auto", Search())
    assert isinstance(found.whitening, Affine) and bool(found.quick())
    assert found.ess_fraction > 0.9 and found.efficiency > 0.9
    assert found.spent.total < 90_000
    assert len(first_look(Target(density, 5), Search())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_arms_that_draws_do_not_reach_are_found_by_a_map_that_bends(seed):
    """x0 ~ N(0, 2), x1 ~ N(x0², 1), x2 ~ N(x1² / 5, 1): a sixth of the mass lies where |x0| > 2.8.

    A mixture of normal distributions stops there, and its weights do not tell.
    """

    def density(x):
        z = jnp.stack([x[0] / 2.0, x[1] - x[0] ** 2, x[2] - x[1] ** 2 / 5.0])
        return -0.5 * jnp.sum(z * z) - jnp.log(2.0) - 1.5 * jnp.log(2 * jnp.pi)

    scouts = jax.random.uniform(jax.random.key(seed), (128, 3), minval=-2.0, maxval=2.0)
    where = StartingPoints(scouts[:8], scouts, jnp.arange(3))
    found = find_start(jax.random.key(seed), Target(density, 3), where, "auto", Search())
    assert bool(found.sufficient())
    assert_within(found.log_evidence, 0.0, found.log_evidence_se)
    assert found.spent.total < 500_000
    u = jax.vmap(found.reference.sample)(jax.random.split(jax.random.key(seed + 10), 20_000))
    x = jax.vmap(lambda v: found.whitening.forward(v)[0])(u)
    weight = jnp.exp(jax.vmap(lambda v: found.whitening.forward(v)[1])(u) + jax.vmap(density)(x))
    weight = weight / jnp.exp(jax.vmap(found.reference.log_prob)(u))
    means = weight @ x / jnp.sum(weight)
    # standard deviations of means: 2, 5.7 and 19 over the root of 10,000 effective draws
    for mean, exact, error in zip(means, (0.0, 4.0, 9.8), (0.02, 0.06, 0.2), strict=True):
        assert_within(mean, exact, error)


def _looked(log_z, se, fraction, khat):
    """What a look may have found: draws of that evidence and quality."""
    scalar = lambda value: jnp.asarray(value, jnp.float32)  # noqa: E731
    return Located(
        whitening=Affine(jnp.zeros(1), jnp.eye(1)),
        reference=normal(1),
        points=None,
        ess_fraction=scalar(fraction),
        khat=scalar(khat),
        efficiency=scalar(fraction),
        log_evidence=scalar(log_z),
        log_evidence_se=scalar(se),
        drift=scalar(0.0),
        outside=jnp.zeros((), bool),
        step_size=None,
        spent=Evaluations(100, 10),
        searched=jnp.ones((), bool),
    )


def test_draws_of_a_lower_evidence_than_those_of_another_look_are_not_believed():
    seldom, exact = _looked(-0.2, 0.01, 0.8, 0.5), _looked(0.0, 0.003, 0.6, 0.1)
    assert bool(seldom.sufficient()) and not bool(seldom.certain())
    looks = [seldom]
    assert float(_after(looks, exact, Evaluations(40, 4)).log_evidence) == 0.0
    assert looks[-1].spent == Evaluations(160, 16) and bool(looks[-1].sufficient())
    # the other way round, however good its weights look, and even if a look between was worse than both
    looks = [_looked(0.0, 0.003, 0.3, 0.1), _looked(-2.0, 1.0, 0.01, 0.9)]
    assert not bool(_after(looks, _looked(-0.2, 0.003, 0.95, -jnp.inf), Evaluations()).sufficient())
    # within errors the better of two that suffice is taken
    looks = [_looked(-0.05, 0.03, 0.8, 0.5)]
    assert float(_after(looks, exact, Evaluations()).ess_fraction) == pytest.approx(0.8)


@pytest.mark.parametrize(("spread", "steps"), [(0.3, 1), (1.0, 4), (1.5, 4)])
def test_what_a_draw_of_a_chain_is_worth_is_predicted_from_weights(spread, steps):
    """Against chains of proposals with normal log weights: by the autocorrelation of the weights' ranks."""
    num, chains = 2000, 64
    proposed = spread * jax.random.normal(jax.random.key(0), (num * steps, chains))

    def step(now, inputs):
        key, new, value = inputs
        accept, _ = metropolis(key, now[0], new)
        return (jnp.where(accept, new, now[0]), jnp.where(accept, value, now[1])), jnp.where(
            accept, value, now[1]
        )

    keys = jax.random.split(jax.random.key(1), num * steps)
    # what is averaged does not depend on the weight
    values = jax.random.normal(jax.random.key(2), proposed.shape)
    _, drawn = jax.lax.scan(step, (proposed[0], values[0]), (keys, proposed, values))
    means = jnp.mean(drawn[::steps][200:], 0)
    measured = 1.0 / (float(jnp.mean(means**2)) * (num - 200))
    predicted = float(chain_efficiency(proposed.reshape(-1), steps))
    assert abs(np.log(measured / predicted)) < 5 * np.sqrt(2 / chains)


def counted(dim):
    """A density that counts its evaluations on the host."""
    count = []

    def callback(x):
        count.append(int(np.prod(np.shape(x)[:-1], dtype=int)))
        return -0.5 * np.sum(np.asarray(x) ** 2, -1)

    @jax.custom_vjp
    def density(x):
        return jax.pure_callback(callback, jax.ShapeDtypeStruct((), x.dtype), x, vmap_method="broadcast_all")

    density.defvjp(lambda x: (density(x), x), lambda x, c: (-c * x,))
    return Target(density, dim), count


def test_proposals_cost_what_they_say():
    target, count = counted(2)
    one = importance(target, normal(2))
    process = dis(denoiser(4), 2, num_steps=3)
    params = denoiser(4).init(jax.random.key(0), 2)
    path, several = path_draws(process, target, 5)
    assert evaluations_of_path(process) == Evaluations(gradients=4)
    for proposal, given in (
        (one, None),
        (path, params),
        (several, params),
        (independent_ensemble(one, 6), None),
    ):
        count.clear()
        jax.block_until_ready(proposal.draw(jax.random.key(1), given, 10))
        jax.effects_barrier()
        assert sum(count) == proposal.cost.times(10).total
