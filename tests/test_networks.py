# SPDX-License-Identifier: Apache-2.0
"""The network for images; those of the samplers are tested with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_sbtm.networks import unet


@pytest.fixture(scope="module")
def disturbed():
    """A network on images of 12 x 12 pixels whose last layer is not zero."""
    net = unet(8)
    params = net.init(jax.random.key(0), 144)
    return net, params + 0.1 * jax.random.normal(jax.random.key(1), params.shape)


def test_every_pixel_of_a_small_image_is_seen_everywhere(disturbed):
    net, params = disturbed
    x = jax.random.normal(jax.random.key(2), (144,))
    jacobian = jax.jit(jax.jacrev(lambda y: net.apply(params, jnp.array(0.3), y)))(x)
    assert jacobian.shape == (144, 144) and float(jnp.abs(jacobian).min()) > 0.0
    # patches go back where they came from: the next pixels count more than those far away
    places = np.indices((12, 12)).reshape(2, -1)
    apart = np.abs(places[:, :, None] - places[:, None]).max(0)
    size = jnp.abs(jacobian)
    assert size[apart <= 1].mean() > 2.0 * size[apart >= 6].mean()


def test_noise_level_and_parameters_matter(disturbed):
    net, params = disturbed
    x = jnp.ones(144)
    apply = jax.jit(net.apply)
    assert not np.allclose(apply(params, jnp.array(-2.0), x), apply(params, jnp.array(1.0), x), atol=1e-3)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, jnp.array(0.3), x) ** 2)))(params)
    assert float(jnp.mean(slope != 0.0)) > 0.9


@pytest.mark.parametrize("dim", [63, 36])
def test_images_must_be_squares_with_sides_that_two_halvings_leave_whole(dim):
    with pytest.raises(ValueError, match=f"`dim` must be the square of a multiple of four, got {dim}"):
        unet(8).init(jax.random.key(0), dim)
