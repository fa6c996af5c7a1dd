# SPDX-License-Identifier: Apache-2.0
"""What transport leaves behind: a stack of maps, and the flow that follows them exactly."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_sbtm.core.algorithm import Draws, Proposal
from numpyro_sbtm.core.net import Net
from numpyro_sbtm.core.target import Key, Params, Target
from numpyro_sbtm.core.transition import Transition
from numpyro_sbtm.core.transport.euler import euler_map

__all__ = ["Maps", "displacement", "flow", "pull", "push", "returns", "trajectory", "velocity"]

_MAX_INVERSION_STEPS = 100
_RETURN_STEPS = 50  # within which a point must return, fewer so that what returns is also found
_INVERSION_ERROR = 1e-3  # of a point that is carried back and forth, in whitened units
_SAME = 1e-4  # distance, relative to 1 + |x|, within which a point that is carried back has returned


class Maps(NamedTuple):
    """The maps x ↦ x + h v(x), stacked: leading axis K.

        v(x) = b + W (x - μ) + Q net(R (x - μ)),       R = L⁻¹.

    Attributes:
        params: parameters of the network.
        mean: the particles' mean μ, shape ``[K, d]``.
        whitener: R, the inverse of a Cholesky factor L of their covariance C, shape ``[K, d, d]``.
        lift: Q, that is Rᵀ, or L = C Rᵀ for velocities multiplied by C, shape ``[K, d, d]``.
        drift: b, shape ``[K, d]``.
        slope: W, shape ``[K, d, d]``.
        step_size: h, shape ``[K]``; zero for a map not made yet, which is then the identity.
        second: v₂ of Heun's step x ↦ x + ½h (v(x) + v₂(x + h₂ v(x))), whose ``step_size`` is h₂, that of the
            Euler step under which v₂ was learned; None for Euler's steps.
    """

    params: Params
    mean: Float[Array, "K d"]
    whitener: Float[Array, "K d d"]
    lift: Float[Array, "K d d"]
    drift: Float[Array, "K d"]
    slope: Float[Array, "K d d"]
    step_size: Float[Array, " K"]
    second: "Maps | None" = None


def velocity(net: Net, one: Maps, x: Float[Array, " d"]) -> Float[Array, " d"]:
    """Evaluate v(x) for one map, without the leading axis."""
    centred = x - one.mean
    correction = one.lift @ net.apply(one.params, one.whitener @ centred)
    return one.drift + one.slope @ centred + correction


def displacement(net: Net, one: Maps, x: Float[Array, " d"]) -> Float[Array, " d"]:
    """Evaluate (x' - x) / h for one map x ↦ x': v(x), or the mean of the two velocities of Heun's step.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core import Net
        >>> from numpyro_sbtm.core.transport.maps import Maps, displacement
        >>> still = Net(lambda key, d: (), lambda params, x: 0.0 * x)
        >>> zero, eye = jnp.zeros(1), jnp.eye(1)
        >>> euler = Maps((), zero, eye, eye, zero, -eye, jnp.array(0.5))  # v(x) = -x
        >>> heun = euler._replace(second=euler)
        >>> [displacement(still, one, jnp.ones(1)).item() for one in (euler, heun)]
        [-1.0, -0.75]
    """
    first = velocity(net, one, x)
    if one.second is None:
        return first
    return 0.5 * (first + velocity(net, one.second, x + one.second.step_size * first))


def push(
    net: Net, maps: Maps, x: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, ""]]:
    """Carry one point through all maps.

    Args:
        net: the network.
        maps: the maps.
        x: the point, shape ``[d]``.

    Returns:
        The image, the log-determinant of the composed map, and the largest ‖D(x' - x)‖ of a map x ↦ x' met
        on the way, which is below one where the maps are one-to-one.
    """

    def step(carry, one: Maps):  # type: ignore[no-untyped-def]
        x, log_det, worst = carry
        x, change, stretch = euler_map(lambda y: displacement(net, one, y), one.step_size, x)
        return (x, log_det + change, jnp.maximum(worst, stretch)), None

    zero = jnp.zeros((), x.dtype)
    return jax.lax.scan(step, (x, zero, zero), maps)[0]


def trajectory(net: Net, maps: Maps, x: Float[Array, " d"]) -> Float[Array, "K1 d"]:
    """Carry one point through all maps and keep where it was: the point, and its image under every map.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core import Net
        >>> from numpyro_sbtm.core.transport.maps import Maps, trajectory
        >>> still = Net(lambda key, d: (), lambda params, x: 0.0 * x)
        >>> zeros, eye = jnp.zeros((2, 1)), jnp.ones((2, 1, 1))
        >>> maps = Maps((), zeros, eye, eye, zeros, -eye, jnp.array([0.5, 0.5]))  # v(x) = -x
        >>> trajectory(still, maps, jnp.ones(1))[:, 0].tolist()
        [1.0, 0.5, 0.25]
    """

    def step(x, one: Maps):  # type: ignore[no-untyped-def]
        x = x + one.step_size * displacement(net, one, x)
        return x, x

    return jnp.concatenate([x[None], jax.lax.scan(step, x, maps)[1]])


def _undo(
    net: Net,
    one: Maps,
    image: Float[Array, " d"],
    max_steps: int,
    done: Callable[[Float[Array, " d"]], Bool[Array, ""]] | None = None,
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Undo one map by the iteration y ← image - h v(y), from the image on; with the last change of y.

    Where it ends depends on the image alone: of several points with this image it finds one at most. It
    may end early, once ``done(y)``.
    """
    tolerance = 4.0 * jnp.finfo(image.dtype).eps

    def iterate(inner):  # type: ignore[no-untyped-def]
        k, y, _ = inner
        new = image - one.step_size * displacement(net, one, y)
        return k + 1, new, jnp.max(jnp.abs(new - y))

    def unfinished(inner):  # type: ignore[no-untyped-def]
        k, y, change = inner
        going = (change > tolerance * (1.0 + jnp.max(jnp.abs(y)))) & (k < max_steps)
        return going if done is None else going & ~done(y)

    first = jnp.zeros((), jnp.int32), image, jnp.asarray(jnp.inf, image.dtype)
    _, y, change = jax.lax.while_loop(unfinished, iterate, first)
    return y, change


def pull(net: Net, maps: Maps, x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Carry one point back through all maps: the inverse of `push`.

    Every map is undone by the iteration x ← y - h v(x), a contraction where h Lip(v) < 1; v is the mean of
    both velocities of Heun's step.

    Args:
        net: the network.
        maps: the maps.
        x: the point, shape ``[d]``.

    Returns:
        The point that `push` carries to x, and the largest change in a last iteration: not small where
        an iteration did not converge.
    """

    def undo(carry, one: Maps):  # type: ignore[no-untyped-def]
        image, worst = carry
        y, change = _undo(net, one, image, _MAX_INVERSION_STEPS)
        return (y, jnp.maximum(worst, change)), None

    return jax.lax.scan(undo, (x, jnp.zeros((), x.dtype)), maps, reverse=True)[0]


def returns(net: Net, maps: Maps, x: Float[Array, " d"]) -> Bool[Array, ""]:
    """Say whether `pull` finds its way back from the image of a point, through every map.

    Maps that fold space give several points one image. On the set S of points that return they are
    one-to-one, whatever they do elsewhere, because `pull` finds one point at most. What is pushed from S
    alone has the density p(x) / |det|, and no other. Points from which ‖D(x' - x)‖ exceeds one in a map do
    not belong to S either: the iteration that undoes it may come near them, but does not stay.

    Args:
        net: the network.
        maps: the maps.
        x: the point, shape ``[d]``.

    Returns:
        Whether x is in S, shape ``[]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.core import Net
        >>> from numpyro_sbtm.core.transport.maps import Maps, push, returns
        >>> wave = Net(lambda key, d: (), lambda params, x: -jnp.sin(x))
        >>> zero, eye = jnp.zeros((1, 1)), jnp.eye(1)[None]
        >>> maps = Maps((), zero, eye, eye, zero, 0 * eye, jnp.array([3.0]))  # x - 3 sin x folds
        >>> [bool(returns(wave, maps, jnp.array([x]))) for x in (0.3, 1.8)]
        [False, True]
    """

    def step(carry, one: Maps):  # type: ignore[no-untyped-def]
        x, good = carry

        def near(y: Float[Array, " d"]) -> Bool[Array, ""]:
            return jnp.max(jnp.abs(y - x)) <= _SAME * (1.0 + jnp.max(jnp.abs(x)))

        image = x + one.step_size * displacement(net, one, x)
        back, _ = _undo(net, one, image, _RETURN_STEPS, near)
        return (image, good & near(back)), None

    return jax.lax.scan(step, (x, jnp.ones((), bool)), maps)[0][1]


def flow(net: Net, base: Transition, target: Target) -> Proposal:
    """Make the proposal that pushes draws of the first law through the maps, its parameters.

    Only points at which the maps are one-to-one are proposed: others get weight zero, and the weight of a
    given point is infinite where it is the image of none of them.

    Args:
        net: the network.
        base: the first law.
        target: the density that weighs them.

    Returns:
        The proposal. A draw costs a target value and K (d + 1) evaluations of the network.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sbtm.core import Net, Target
        >>> from numpyro_sbtm.core.transition import standard_normal
        >>> from numpyro_sbtm.core.transport.maps import Maps, flow
        >>> still = Net(lambda key, d: (), lambda params, x: 0.0 * x)
        >>> zero, eye = jnp.zeros((1, 1)), jnp.eye(1)[None]
        >>> maps = Maps((), zero, eye, eye, zero, -eye, jnp.array([0.5]))  # N(0, 1) becomes N(0, 1/4)
        >>> proposal = flow(still, standard_normal(1), Target(lambda x: -2.0 * jnp.sum(x**2), 1))
        >>> draws = proposal.draw(jax.random.key(0), maps, 1000)
        >>> round(float(jnp.exp(draws.log_weight.mean())), 3)  # √(π/2)
        1.253
    """

    def checked_push(
        maps: Maps, x: Float[Array, " d"]
    ) -> tuple[Float[Array, " d"], Float[Array, ""], Bool[Array, ""]]:
        """Carry a point through the maps, and say whether it is one of those where they are one-to-one."""
        image, log_det, stretch = push(net, maps, x)
        # what comes near a point that repels has not returned to it
        return image, log_det, returns(net, maps, x) & (stretch < 1.0)

    def draw(key: Key, maps: Maps, n: int) -> Draws:
        start = jax.vmap(base.sample)(jax.random.split(key, n))
        x, log_det, one_to_one = jax.vmap(lambda x: checked_push(maps, x))(start)
        one_to_one |= ~jnp.all(jnp.isfinite(x), -1)  # lost for another reason
        logdensity = jax.vmap(target.logdensity_fn)(x)
        log_proposal = jax.vmap(base.log_prob)(start) - log_det
        log_weight = jnp.where(one_to_one, logdensity - log_proposal, -jnp.inf)
        return Draws(x, log_weight, logdensity, one_to_one)

    def weigh(key: Key, maps: Maps, x: Float[Array, " d"]) -> Float[Array, ""]:
        del key
        start, _ = pull(net, maps, x)
        image, log_det, one_to_one = checked_push(maps, start)
        logdensity = target.logdensity_fn(x)
        log_weight = logdensity - base.log_prob(start) + log_det
        proposed = one_to_one & (jnp.max(jnp.abs(image - x)) < _INVERSION_ERROR)
        return jnp.where(proposed, log_weight, jnp.where(jnp.isfinite(logdensity), jnp.inf, jnp.nan))

    return Proposal(draw, weigh)
