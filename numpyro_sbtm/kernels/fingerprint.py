# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of a model's arguments: whether a state was weighed under the same data."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

__all__ = ["Fingerprint", "fingerprint"]

_LANES = np.array([0x9E3779B9, 0x85EBCA77], np.uint32)  # odd: multiplication by them loses nothing


Fingerprint = np.ndarray | Array
"""Two whole numbers of 32 bits."""


def fingerprint(*arguments: Any) -> Fingerprint:
    """Compute 64 bits that change with every value, shape, place and name among the arguments.

    Numbers and arrays count by their values in JAX's precision, whether they are traced or not, so that a run
    with ``jit_model_args=True`` finds the same. Of other objects a text counts, and of all else the type.
    Bits are summed as whole numbers, in any order: data that are spread over devices count as if they were
    not.

    Args:
        arguments: pytrees.

    Returns:
        Two whole numbers; for arguments that are not traced a NumPy array, also within a traced function.

    Reference:
        The mixing of bits is the finaliser of Appleby's MurmurHash3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.kernels.fingerprint import fingerprint
        >>> one, same, other = (fingerprint(jnp.array(y)) for y in ([0.0, 1.0], [0.0, 1.0], [1.0, 0.0]))
        >>> (one == same).all().item(), (one == other).any().item()
        (True, False)
    """
    leaves, structure = jax.tree.flatten(arguments)
    # by NumPy where it can be: JAX would compile a program for every operation on every shape
    xp = jnp if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) else np
    total = _mixed(_LANES + np.uint32(zlib.crc32(str(structure).encode())))
    for place, leaf in enumerate(leaves):
        bits = _bits(xp, leaf)
        shape = np.uint32(zlib.crc32(str((place, bits.shape)).encode()))
        position = xp.arange(bits.size, dtype=np.uint32)[:, None]
        mixed = _mixed(bits.reshape(-1, 1) ^ _mixed((position + shape) * _LANES))
        total = _mixed(total + xp.sum(mixed, 0, dtype=np.uint32) + shape)
    return total


def _bits(xp: Any, leaf: Any) -> Any:
    """Express a leaf as whole numbers of 32 bits; ``xp`` is NumPy, or its twin for values that are traced."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    x = xp.asarray(leaf)
    if not (jnp.issubdtype(x.dtype, np.number) or x.dtype == bool):
        words = leaf if isinstance(leaf, str) else type(leaf).__qualname__
        return np.array([zlib.crc32(words.encode())], np.uint32)
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
    if jnp.iscomplexobj(x):
        x = xp.stack([x.real, x.imag], -1)
    if jnp.issubdtype(x.dtype, np.floating):
        x = x.astype(np.promote_types(x.dtype, np.float32))
    if x.dtype.itemsize < 4:
        return x.astype(np.uint32)
    # of eight bytes each half counts
    return x.reshape(-1, 1).view(np.uint32).reshape(*x.shape, x.dtype.itemsize // 4)


def _mixed(bits: Any) -> Any:
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(16))
