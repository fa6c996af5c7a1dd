# SPDX-License-Identifier: Apache-2.0
"""What models may contain, against NUTS or an exact answer, with default kernels; and what comes after."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import KERNELS, build, run_chains
from jax.experimental.ode import odeint
from jax.extend.core import jaxprs_in_params
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import NUTS, init_to_uniform, log_likelihood
from numpyro.infer.autoguide import AutoBNAFNormal, AutoMultivariateNormal, AutoNormal

from numpyro_sbtm import DiffusionKernel, LogVarianceDISKernel, factorisations, report
from numpyro_sbtm.core import Target
from numpyro_sbtm.kernels.model import Model, from_model
from numpyro_sbtm.kernels.potential import from_potential
from numpyro_sbtm.kernels.problem import logdensity
from numpyro_sbtm.options import Search
from numpyro_sbtm.search.guesses import first_guesses

WARMUP = {"dis": 300, "sbtm": 150}


# ------------------------------------------------------------------ supports
RATINGS = np.array([0, 1, 1, 2, 2, 2, 1, 0, 2, 1, 1, 2])
DIRECTIONS = np.array([2.9, -3.0, 3.1, 2.6, -2.8])
GAPS = np.array([0.4, 1.1, 0.2, 0.9])
PAIRS = np.array([[1.0, 0.7], [-0.5, -0.9], [0.3, 0.8], [-1.2, -1.0], [0.8, 0.1]])
COUNTS = np.array([5, 2, 1])


def every_support():
    cuts = numpyro.sample(
        "cuts",
        dist.TransformedDistribution(dist.Normal(0, 1.5).expand([2]), dist.transforms.OrderedTransform()),
    )
    numpyro.sample("rating", dist.OrderedLogistic(jnp.zeros(len(RATINGS)), cuts), obs=RATINGS)
    # the posterior straddles ±π
    mean = numpyro.sample("mean", dist.VonMises(0.0, 0.1))
    numpyro.sample("direction", dist.VonMises(mean, 4.0), obs=DIRECTIONS)
    rate = numpyro.sample("rate", dist.ImproperUniform(dist.constraints.positive, (), ()))
    numpyro.sample("gap", dist.Gamma(2.0, rate), obs=GAPS)
    corr = numpyro.sample("corr", dist.LKJCholesky(2, 2.0))
    numpyro.sample("pair", dist.MultivariateNormal(jnp.zeros(2), scale_tril=corr), obs=PAIRS)
    probs = numpyro.sample("probs", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("counts", dist.Multinomial(8, probs), obs=COUNTS)
    numpyro.sample("cov", dist.Wishart(5.0, scale_tril=jnp.eye(2)))
    numpyro.sample("edge", dist.Uniform(-1.0, 2.0))


def features(samples):
    """Scalars with finite variance, one column each; a direction becomes its sine and cosine."""
    angle = samples["mean"]
    corr = samples["corr"] @ jnp.swapaxes(samples["corr"], -1, -2)
    parts = [
        samples["cuts"],
        jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1),
        samples["rate"][..., None],
        corr[..., 0, 1][..., None],
        samples["probs"][..., :2],
        samples["cov"].reshape(*angle.shape, 4)[..., :3],
        samples["edge"][..., None],
    ]
    return np.asarray(jnp.concatenate(parts, -1))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Continuous inference poorly handles circular:UserWarning")
@pytest.mark.parametrize("kind", KERNELS)
def test_supports_against_nuts_and_exact_answers(kind):
    mcmc = run_chains(KERNELS[kind](every_support), warmup=WARMUP[kind])
    found = report(mcmc)
    print(f"\n{kind}\n{found}")
    assert found.verdict != "unreliable"
    ours = features(mcmc.get_samples(group_by_chain=True))
    theirs = features(
        run_chains(NUTS(every_support), warmup=1000, samples=4000).get_samples(group_by_chain=True)
    )
    error = np.sqrt(
        ours.var((0, 1)) / effective_sample_size(ours)
        + theirs.var((0, 1)) / np.minimum(effective_sample_size(theirs), 16000)
    )
    scores = np.abs(ours.mean((0, 1)) - theirs.mean((0, 1))) / error
    assert np.all(scores < 5), scores
    # conjugate: Gamma(1 + 2 n, sum) without the 1 of a proper prior, and Dirichlet(1 + counts)
    exact = {4: (2 * len(GAPS) + 1) / GAPS.sum(), 6: 6 / 11, 7: 3 / 11}
    for column, value in exact.items():
        assert abs(ours.mean((0, 1))[column] - value) < 5 * error[column]


# ------------------------------------------------------------------ preconditioning by a guide
X = np.array(jax.random.normal(jax.random.key(0), (40, 2)))
Y = X @ np.array([10.0, -0.5]) + np.array(jax.random.normal(jax.random.key(1), (40,)))


def regression(y, x, num_slopes):
    # a size among the arguments, as it is common
    slope = numpyro.sample("slope", dist.Normal(0.0, 50.0).expand([num_slopes]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    numpyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


@pytest.mark.parametrize(
    "make_guide",
    [
        AutoMultivariateNormal,
        *(pytest.param(guide, marks=pytest.mark.long) for guide in (AutoNormal, AutoBNAFNormal)),
    ],
)
def test_guides_precondition(make_guide):
    kernel = build(LogVarianceDISKernel, regression, precondition=make_guide(regression), num_steps=16)
    mcmc = run_chains(kernel, Y, X, num_slopes=2, warmup=100)
    found = report(mcmc)
    # without whitening nothing would be accepted: the posterior sits at 10 with a deviation of 0.2
    assert found.acceptance > 0.3
    slope = np.asarray(mcmc.get_samples()["slope"])
    least_squares = np.linalg.lstsq(X, Y, rcond=None)[0]
    assert np.all(np.abs(slope.mean(0) - least_squares) < 0.2 * slope.std(0))


def problem_of(model, *args):
    bound = Model(model, args, {}, init_to_uniform, False)
    return from_model(jax.random.key(0), bound, num_chains=1, search=Search(num_starts=2), init_params=None)


# ------------------------------------------------------------------ large data
def test_large_data_is_evaluated_a_few_points_at_a_time():
    """A million rows: memory is that of a few points, and the values are those of the model."""

    def model(x, y):
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    rows = 1_000_000
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    y = x @ np.array([1.0, 0.0, -1.0], np.float32)
    problem = problem_of(model, x, y)
    assert problem.together < 100
    slopes = 0.1 * jax.random.normal(jax.random.key(1), (8, 16, 3))

    def all_scores(slopes, x, y):
        density = logdensity(problem, (x, y), {}, False)
        return jax.vmap(jax.vmap(jax.value_and_grad(density)))(slopes)

    program = jax.jit(all_scores).lower(slopes, x, y).compile()
    together = 4 * rows * problem.together  # bytes of one array
    assert program.memory_analysis().temp_size_in_bytes < 8 * together
    values, scores = program(slopes, x, y)
    exact = -slopes / 4.0 + (x.T @ y - slopes @ (x.T @ x))
    np.testing.assert_allclose(scores, exact, rtol=1e-3, atol=20.0)
    one = -problem.potential_gen(x, y)({"slope": slopes[3, 5]})
    np.testing.assert_allclose(values[3, 5], one, rtol=1e-5)
    hessian = jax.jit(jax.jacrev(jax.grad(logdensity(problem, (x, y), {}, False))))(slopes[0, 0])
    np.testing.assert_allclose(hessian, -x.T @ x - np.eye(3) / 4.0, rtol=1e-3, atol=20.0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "held"), [("dis", "by the model"), ("sbtm", "as arguments")])
def test_ten_thousand_rows_from_end_to_end(kind, held):
    rows = 10_000
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    y = (x @ np.array([1.0, 0.0, -1.0]) + rng.normal(size=rows)).astype(np.float32)

    def model(x=x, y=y):
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    args = (x, y) if held == "as arguments" else ()
    mcmc = run_chains(KERNELS[kind](model), *args, warmup=60)
    cov = np.linalg.inv(x.T @ x + np.eye(3) / 4.0)
    z = (np.asarray(mcmc.get_samples()["slope"]) - cov @ x.T @ y) / np.sqrt(np.diag(cov))
    assert np.all(np.abs(z.mean(0)) < 0.15)
    assert np.all(np.abs(np.log(z.std(0))) < 0.15)


# ------------------------------------------------------------------ factorisations
def gaussian_process(x):
    t = jnp.linspace(0.0, 1.0, 5)
    cov = jnp.exp(x[0] - (t[:, None] - t) ** 2 * jnp.exp(x[1])) + jnp.eye(5)
    return dist.MultivariateNormal(covariance_matrix=cov).log_prob(jnp.sin(t))


def two_covariances(x):
    normals = [dist.MultivariateNormal(covariance_matrix=jnp.eye(2) + y**2) for y in x]
    return sum(normal.log_prob(PAIRS).sum() for normal in normals)


@pytest.mark.parametrize(
    ("density", "num_threads", "limited"),
    [
        (lambda x: -jnp.sum(x**2), 1, False),
        # one after the other, and NumPyro's check of the covariance is not used
        (gaussian_process, 2, False),
        (gaussian_process, 1, True),
        (two_covariances, 2, True),
        (jax.jit(two_covariances), 2, True),
        (lambda x: jax.lax.scan(lambda c, _: (c + two_covariances(x), None), 0.0, None, 3)[0], 2, True),
        (two_covariances, 8, False),
        (lambda x: two_covariances(jnp.zeros(2)) + jnp.sum(x), 2, False),
    ],
)
def test_independent_factorisations_never_wait_for_each_other(density, num_threads, limited, monkeypatch):
    monkeypatch.setattr(factorisations, "_WAITING", True)  # of this JAX or not
    found = factorisations.most_points(jax.value_and_grad(density), jnp.zeros(2), num_threads)
    assert (found is not None) == limited


def test_densities_of_independent_factorisations_keep_their_values(monkeypatch):
    monkeypatch.setattr(factorisations, "_WAITING", True)
    monkeypatch.setattr(factorisations.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    options = {"num_chains": 1, "num_starts": 2}
    start = jnp.zeros((1, 2))
    problem = from_potential(
        jax.random.key(0), lambda x: -two_covariances(x), start, forward_mode=False, **options
    )
    assert problem.small
    assert problem.most is not None
    points = jax.random.normal(jax.random.key(1), (problem.most + 10, 2))
    values, scores = jax.jit(jax.vmap(jax.value_and_grad(logdensity(problem, (), {}, False))))(points)
    # a branch for each point, such as that of a line search, gets the data of the model too
    one = logdensity(problem, (), {}, False)
    branches = jax.vmap(lambda x: jax.lax.cond(x[0] > 0.0, one, lambda x: 0.0, x))
    exact, exact_scores = jax.jit(jax.vmap(jax.value_and_grad(two_covariances)))(points)
    positive = np.where(points[:, 0] > 0.0, exact, 0.0)
    np.testing.assert_allclose(jax.jit(branches)(points), positive, rtol=1e-5)
    np.testing.assert_allclose(values, exact, rtol=1e-5)
    np.testing.assert_allclose(scores, exact_scores, rtol=1e-4, atol=1e-5)


def largest_batch(function, *args):
    """How many matrices a program factorises at once, at most."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "cholesky":
                yield int(np.prod(equation.invars[0].aval.shape[:-2]))
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)

    return max(walk(jax.make_jaxpr(function)(*args).jaxpr))


def scanned(density):
    return lambda x: jax.lax.scan(lambda c, y: (c + density(x + y), None), 0.0, jnp.zeros(3))[0]


def looped(density):
    def advance(carry):
        return carry[0] + 1.0, carry[1] + 0.1 * jax.grad(density)(carry[1])

    return lambda x: jnp.sum(jax.lax.while_loop(lambda c: c[0] < jnp.abs(x[0]), advance, (0.0, x))[1])


def branched(density):
    return lambda x: jax.lax.cond(x[0] > 0.0, density, lambda x: jnp.sum(x), x)


@pytest.mark.parametrize("use", [lambda density: density, scanned, looped, branched])
@pytest.mark.parametrize("held", ["by the model", "one for each"])
@pytest.mark.parametrize("shape", [(20, 1024), (3, 5, 70)])
def test_batches_of_batches_keep_to_the_limit(use, held, shape, monkeypatch):
    """Two maps of 20 and of 1,024 points were 9,240 factorisations at once where 462 were allowed."""
    monkeypatch.setattr(factorisations, "_WAITING", True)
    monkeypatch.setattr(factorisations.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    data = jnp.asarray(PAIRS)

    def potential_gen(data):
        def potential(x):
            normals = [dist.MultivariateNormal(covariance_matrix=jnp.eye(2) + y**2) for y in x]
            return -sum(normal.log_prob(data).sum() for normal in normals)

        return potential

    options = {"num_chains": 1, "num_starts": 2}
    problem = from_potential(
        jax.random.key(0), potential_gen(data), jnp.zeros((1, 2)), forward_mode=False, **options
    )
    problem = problem._replace(most=100, potential_gen=potential_gen)

    def values(x, data):
        function = use(logdensity(problem, (data,), {}, False))
        for _ in x.shape[:-1]:
            function = jax.vmap(function)
        return function(x)

    def gradients(x, data):
        return jax.grad(lambda x: jnp.sum(values(x, data)))(x)

    def curvatures(x, data):
        return jax.grad(lambda x: jnp.sum(gradients(x, data) ** 2))(x)

    x = jnp.ones((*shape, 2))
    forms = [values] if use is looped else [values, gradients, curvatures]
    for form in forms:
        if held == "by the model":
            most = largest_batch(lambda x, form=form: form(x, data), x)
        else:
            most = largest_batch(jax.vmap(form), jnp.stack(2 * [x]), jnp.stack(2 * [data]))
        assert most <= 100


# ------------------------------------------------------------------ what derivatives a model has
@jax.custom_vjp
def outside(mu):
    """A normal log likelihood that NumPy computes."""
    return _outside(mu)[0]


def _outside(mu):
    def compute(mu):
        away = OBSERVED - mu[..., None]
        return np.float32(-0.5 * np.sum(away**2, -1)), np.float32(np.sum(away, -1))

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.pure_callback(compute, (shape, shape), mu, vmap_method="expand_dims")


outside.defvjp(_outside, lambda score, cotangent: (cotangent * score,))
OBSERVED = np.array([0.3, 1.1, -0.4, 2.0], np.float32)


def computed_outside():
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    numpyro.factor("y", outside(mu))


@pytest.mark.slow
def test_a_likelihood_from_outside_jax_runs_from_end_to_end():
    mcmc = run_chains(LogVarianceDISKernel(computed_outside), warmup=20)
    precision = len(OBSERVED) + 0.25
    z = (np.asarray(mcmc.get_samples()["mu"]) - OBSERVED.sum() / precision) * precision**0.5
    assert abs(z.mean()) < 0.1
    assert abs(np.log(z.std())) < 0.1


def test_kl_asks_for_the_derivative_of_the_score_at_once():
    kernel = DiffusionKernel(computed_outside, divergence="kl")
    with pytest.raises(
        ValueError, match=r"`divergence` 'kl' differentiates the score, .* Use 'log-variance'"
    ):
        kernel.init(jax.random.key(0), 10)


def test_scores_of_models_with_a_loop_have_a_derivative():
    """In forward mode: the reparametrised KL runs on them too."""

    def potential(x):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x[0]), (0, x[1]))[1]

    options = {"num_chains": 1, "num_starts": 2}
    problem = from_potential(jax.random.key(0), jnp.sum, jnp.ones((1, 2)), forward_mode=False, **options)
    density = logdensity(problem._replace(potential_gen=lambda: potential), (), {}, True)
    x, y = 0.7, -0.3
    hessian = jax.jit(jax.jacrev(jax.grad(density)))(jnp.array([x, y]))
    np.testing.assert_allclose(hessian, [[-6 * x * y, -3 * x**2], [-3 * x**2, 0.0]], rtol=1e-5)


@pytest.mark.slow
def test_the_search_climbs_a_differential_equation():
    """`odeint` has no forward mode; where optimisers arrive, its curvature is measured all the same."""
    times, rate = jnp.linspace(0.0, 1.0, 4), 0.8

    def model(y):
        log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 1.0))
        z = odeint(lambda z, t, k: -k * z, jnp.ones(()), times, jnp.exp(log_rate), rtol=1e-5, atol=1e-5)
        numpyro.sample("y", dist.Normal(z, 0.05), obs=y)

    y = jnp.exp(-rate * times)
    problem = problem_of(model, y)
    target = Target(logdensity(problem, (y,), {}, False), 1)
    guesses = jax.jit(lambda x: first_guesses(target, x, x, jnp.arange(1))[0])(problem.starts[:1])
    np.testing.assert_allclose(guesses.loc[0], np.log(rate), atol=0.02)
    slopes = times * rate * y / 0.05  # of the standardised observations
    np.testing.assert_allclose(guesses.scale_tril[0, 0, 0], (1.0 + np.sum(slopes**2)) ** -0.5, rtol=0.05)


# ------------------------------------------------------------------ downstream
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_arviz_compares_models():
    import arviz as az

    data, y = {}, Y + 2.0 * X[:, 1]
    for name, num_slopes in (("one slope", 1), ("two slopes", 2)):
        x = X[:, :num_slopes]
        kernel = LogVarianceDISKernel(regression)
        mcmc = run_chains(kernel, y, x, num_slopes=num_slopes, warmup=WARMUP["dis"])
        pointwise = log_likelihood(regression, mcmc.get_samples(), y, x, num_slopes)
        assert pointwise["y"].shape == (4000, 40)
        data[name] = az.from_numpyro(mcmc, log_likelihood=True)
        loo = az.loo(data[name])
        assert np.isfinite(float(getattr(loo, "elpd_loo", getattr(loo, "elpd", np.nan))))
    assert list(az.compare(data).index) == ["two slopes", "one slope"]
