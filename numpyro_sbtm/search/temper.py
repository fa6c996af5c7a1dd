# SPDX-License-Identifier: Apache-2.0
"""Tempered particles: from wide normal distributions to a target."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sbtm.core.evaluations import Evaluations
from numpyro_sbtm.core.lazy import load
from numpyro_sbtm.core.mixture import Mixture
from numpyro_sbtm.core.target import Key, Target
from numpyro_sbtm.search.moves import LEAPS, adapted, drift_between, first_step_size, or_very_low, spread_out

__all__ = ["MAX_TEMPERATURES", "covering", "tempered_particles"]

_FAR = 20.0  # bound on where scouts lie, in whitened units
_WIDE = 1.5  # standard deviation of the first particles, relative to what they must cover
MAX_TEMPERATURES = 80
_LAST_ROUNDS = 5  # of moves at the target itself
_MORE_ROUNDS = 15  # where particles spread
_MAX_ROUNDS = 45  # where they spread even then; their spreading is then measured anew


def tempered_particles(
    key: Key,
    target: Target,
    base: Mixture,
    num_particles: int = 4096,
    num_moves: int = 3,
    brief: bool = False,
    max_rounds: int = MAX_TEMPERATURES,
) -> tuple[Float[Array, "n d"], Float[Array, ""], Evaluations, Float[Array, ""]]:
    """Carry particles from a mixture of normal distributions to a target by tempered SMC with HMC moves.

    Temperatures keep the effective sample size of every reweighting at 0.7 of the particles. Step sizes
    are random, and follow the acceptance rate. A log density that is not finite counts as very low. At the
    target itself moves go on for longer where they change a variance (see
    `numpyro_sbtm.search.moves.drift_between`).

    Args:
        key: random key.
        target: the density, best whitened.
        base: where the particles start; wide enough to cover the target.
        num_particles: n.
        num_moves: transitions per temperature.
        brief: no more at the target itself than the first five rounds.
        max_rounds: temperatures and rounds at the target, at most.

    Returns:
        Particles of equal weight, shape ``[n, d]``; an estimate of log Z, shape ``[]``; what was
        evaluated; and by what part moves at the target itself have changed a variance at least, the
        last thirty where there are so many, zero where that is within noise: beyond it particles had not
        arrived, and may not have now.

    Reference:
        Del Moral, Doucet & Jasra (2006), Sequential Monte Carlo samplers; blackjax runs it.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Target
        >>> from numpyro_sbtm.core.mixture import normal
        >>> from numpyro_sbtm.search.temper import tempered_particles
        >>> target = Target(lambda x: -0.5 * jnp.sum((x - 1) ** 2 / 0.01), 2)
        >>> x, log_z, spent, drift = tempered_particles(jax.random.key(0), target, normal(2), 500)
        >>> x.mean(0).round(1).tolist()
        [1.0, 1.0]
        >>> float(drift)
        0.0
    """
    dim = target.dim
    hmc, adaptive_tempered = load("blackjax.mcmc.hmc"), load("blackjax.smc.adaptive_tempered")

    def log_ratio(x: Float[Array, " d"]) -> Float[Array, ""]:
        return or_very_low(target.logdensity_fn(x) - base.log_prob(x))

    key_start, key_loop, key_steps = jax.random.split(key, 3)
    particles = jax.vmap(base.sample)(jax.random.split(key_start, num_particles))
    kernel = adaptive_tempered.build_kernel(
        base.log_prob,
        log_ratio,
        hmc.build_kernel(),
        hmc.init,
        load("blackjax.smc.resampling").systematic,
        target_ess=0.7,
    )

    def advance(carry):  # type: ignore[no-untyped-def]
        k, rounds, arrived, state, step_size, log_z = carry
        # blackjax resamples, moves and then weighs: the first round at the target ends the tempering
        arrived = jnp.where((rounds <= 1) | (rounds == _MORE_ROUNDS), state.particles, arrived)
        parameters = {
            "step_size": spread_out(jax.random.fold_in(key_steps, k), step_size, num_particles),
            "inverse_mass_matrix": jnp.ones((1, dim), particles.dtype),
            "num_integration_steps": jnp.array([LEAPS]),
        }
        rounds = rounds + (state.tempering_param >= 1.0)
        state, info = kernel(jax.random.fold_in(key_loop, k), state, num_moves, parameters)
        step_size = adapted(step_size, info.update_info.acceptance_rate)
        return k + 1, rounds, arrived, state, step_size, log_z + info.log_likelihood_increment

    def unfinished(carry):  # type: ignore[no-untyped-def]
        k, rounds, arrived, state, *_ = carry
        moving = (drift_between(arrived, state.particles) > 0.0) | (rounds > _MORE_ROUNDS)
        moving &= not brief
        return ((rounds < _LAST_ROUNDS) | (moving & (rounds < _MAX_ROUNDS))) & (k < max_rounds)

    state = adaptive_tempered.init(particles)
    state = state._replace(tempering_param=jnp.zeros((), particles.dtype))
    step_size = first_step_size(particles)
    none = jnp.zeros((), jnp.int32)
    carry = none, none, particles, state, step_size, jnp.zeros((), particles.dtype)
    temperatures, _, arrived, state, _, log_z = jax.lax.while_loop(unfinished, advance, carry)
    drift = jnp.where(state.tempering_param < 1.0, jnp.inf, drift_between(arrived, state.particles))
    each = Evaluations(values=1, gradients=num_moves * LEAPS + 1)
    return state.particles, log_z, each.times(temperatures * num_particles), drift


def covering(scouts: Float[Array, "m d"]) -> Mixture:
    """Cover the whitened unit ball and where scouts lie, in equal parts."""
    centre = jnp.nan_to_num(jnp.nanmedian(scouts, 0))
    spread = jnp.nan_to_num(1.4826 * jnp.nanmedian(jnp.abs(scouts - centre), 0))
    return Mixture(
        jnp.log(jnp.full(2, 0.5, scouts.dtype)),
        None,
        jnp.stack([jnp.zeros_like(centre), jnp.clip(centre, -_FAR, _FAR)]),
        _WIDE * jnp.stack([jnp.ones_like(spread), jnp.clip(spread, 1.0, _FAR)]),
    )
