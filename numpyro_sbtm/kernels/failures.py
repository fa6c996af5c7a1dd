# SPDX-License-Identifier: Apache-2.0
"""What went wrong inside a user's function, in terms of what the user passed: the argument and the cure."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.util import not_jax_tracer

__all__ = ["explained", "refuse_overflow"]

_UNTRACEABLE = jax.errors.JAXTypeError, jax.errors.JAXIndexError
_NO_ARITHMETIC = TypeError, OverflowError, *_UNTRACEABLE


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call as the function does, if it can be asked; none of a call that misfits."""
    try:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except ValueError:  # some builtins cannot be asked
        return {f"argument {i}": value for i, value in enumerate(args)} | kwargs
    except TypeError:
        return {}


def _leaves(named: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """List what may be data, with where it is; a list of numbers is one thing."""
    is_leaf = lambda value: isinstance(value, list | tuple) and not any(map(_is_container, value))  # noqa: E731
    for path, value in jax.tree_util.tree_leaves_with_path(named, is_leaf=is_leaf):
        yield f"{path[0].key}{jax.tree_util.keystr(path[1:])}", value


def _is_container(value: Any) -> bool:
    return isinstance(value, list | tuple | dict) or hasattr(value, "shape")


def _unfit(value: Any) -> str | None:
    """Say what keeps a value from being data, and the cure; None for numbers and arrays of them."""
    if isinstance(value, np.ma.MaskedArray):
        return "is a masked array: pass `y.filled(0)`, and its mask to `numpyro.handlers.mask`"
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        kind = value.dtype.kind
        if kind == "c":
            return "is complex: pass its real and imaginary parts"
        return f"has dtype {value.dtype}: encode it by numbers" if kind in "OSUTMm" else None
    if isinstance(value, list | tuple | range) and len(value):
        kind = np.asarray(value, object if None in value else None).dtype.kind
        if kind in "biuf":
            return f"is a {type(value).__name__}: pass it as an array, `jnp.asarray(...)`"
        return f"is a {type(value).__name__} of what are not numbers: encode it by an array of numbers"
    if hasattr(value, "__array__"):  # pandas, polars and others
        return f"is a {type(value).__name__}: pass it as an array, `jnp.asarray(...)` or its `to_numpy()`"
    if isinstance(value, set | frozenset | Iterator):
        return f"is a {type(value).__name__}: pass an array, `jnp.asarray(list(...))`"
    if isinstance(value, int) and abs(value) > np.iinfo(jax.dtypes.canonicalize_dtype(int)).max:
        return f"is {value}, beyond the integers of the run: pass a float"
    return None


def _not_finite(value: Any) -> str | None:
    """Say where data are not finite in the precision of the run."""
    if not isinstance(value, float | np.ndarray | jax.Array) or not not_jax_tracer(value):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return None
    with np.errstate(over="ignore"):
        bad = np.argwhere(~np.isfinite(array.astype(jax.dtypes.canonicalize_dtype(array.dtype))))
    if not len(bad):
        return None
    return f"holds {array[tuple(bad[0])]} at {bad[0].tolist()}" if array.ndim else f"is {array}"


def refuse_overflow(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse integer data that JAX would silently wrap around.

    Raises:
        ValueError: for arrays of NumPy with integers that the precision of the run does not hold.
    """
    for name, value in _leaves(_named(function, args, kwargs)):
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or not value.size:
            continue
        dtype = jax.dtypes.canonicalize_dtype(value.dtype)
        for extreme in (value.min(), value.max()):
            if int(extreme) != int(extreme.astype(dtype)):
                raise ValueError(
                    f"`{name}` holds {extreme}, which {dtype} does not. Pass floats, or use "
                    "`jax.config.update('jax_enable_x64', True)`."
                )


@contextmanager
def explained(
    who: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Explain errors of a user's function by what it was given, where that is what they come from.

    Args:
        who: 'model' or 'potential_fn'.
        function: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        TypeError: for arguments that are no numbers, and for functions that JAX cannot trace.
        ValueError: for a ``while_loop`` without forward mode.
        RuntimeError: where no point has a finite density; it names data that are not finite.
    """
    try:
        yield
    except (ValueError, RuntimeError, *_NO_ARITHMETIC) as error:
        explanation = _explanation(error, who, _named(function, args, kwargs))
        if explanation is None:
            raise
        raise explanation from error


def _explanation(error: Exception, who: str, named: dict[str, Any]) -> Exception | None:
    message = str(error)
    if "Reverse-mode differentiation does not work" in message:
        return ValueError(
            f"`{who}` has a loop of unknown length, such as `while_loop`, and reverse mode does not "
            "differentiate it. Pass `forward_mode_differentiation=True`."
        )
    if "Cannot find valid initial parameters" in message:
        return RuntimeError(_no_start(named))
    if isinstance(error, _NO_ARITHMETIC) or "masked arrays are not supported" in message:
        for name, value in _leaves(named):
            unfit = _unfit(value)
            if unfit is not None:
                return TypeError(f"`{who}` failed: {_cause(error)} It was given `{name}`, which {unfit}.")
        if isinstance(error, _UNTRACEABLE):
            return TypeError(
                f"`{who}` uses a value that is being sampled where JAX cannot follow it: {_cause(error)} "
                "Write `jax.numpy` for `numpy`, and `jnp.where` or `lax.cond` for `if`."
            )
    return None


def _cause(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") + "."


def _no_start(named: dict[str, Any]) -> str:
    faults = [f"`{name}` {fault}" for name, value in _leaves(named) if (fault := _not_finite(value))]
    check = "Check the data for NaN or infinite values and the supports of the sites"
    if faults:
        check = f"{faults[0]}: leave such data out, impute or mask them (`numpyro.handlers.mask`)"
    return (
        "Cannot find valid initial parameters: the log density or its gradient is not finite at every point "
        f"tried. {check}, or pass another `init_strategy`, such as `init_to_value(values=...)` with a point "
        "of finite density."
    )
