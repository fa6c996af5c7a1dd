# SPDX-License-Identifier: Apache-2.0
"""Checks of options, made before anything is computed: an error names the option, its value and the cure."""

import dataclasses
import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Collection
from typing import Any, ParamSpec

import jax.numpy as jnp
import numpy as np

__all__ = [
    "flag",
    "function",
    "names_unknown_options",
    "number",
    "one_of",
    "optional",
    "positive",
    "probability",
    "shown",
    "whole",
]

Options = ParamSpec("Options")

_MANY = 2**24  # no option that counts is sensible above this
_MAX_SHOWN = 80

_ELSEWHERE = {
    "target_accept_prob": "NUTS's: how good the proposals shall be is `target_acceptance`, of `training`",
    "step_size": "NUTS's: local moves (`local_kernel`) find their step size themselves",
    "adapt_step_size": "NUTS's: local moves (`local_kernel`) find their step size themselves",
    "find_heuristic_step_size": "NUTS's: local moves (`local_kernel`) find their step size themselves",
    "inverse_mass_matrix": "NUTS's: pass the shape of the posterior as `precondition=(loc, scale_tril)`",
    "adapt_mass_matrix": "NUTS's: `precondition='auto'` learns the shape of the posterior",
    "dense_mass": "NUTS's: `precondition='auto'` learns the shape of the posterior",
    "regularize_mass_matrix": "NUTS's: `precondition='auto'` learns the shape of the posterior",
    "max_tree_depth": "NUTS's, and has nothing that corresponds to it here",
    "trajectory_length": "HMC's, and has nothing that corresponds to it here",
    "kinetic_fn": "NUTS's, and has nothing that corresponds to it here",
    "num_warmup": "`numpyro.infer.MCMC`'s, which takes the kernel",
    "num_samples": "`numpyro.infer.MCMC`'s, which takes the kernel",
    "num_chains": "`numpyro.infer.MCMC`'s, which takes the kernel",
    "thinning": "`numpyro.infer.MCMC`'s, which takes the kernel",
    "chain_method": "`numpyro.infer.MCMC`'s, which takes the kernel",
    "progress_bar": "`numpyro.infer.MCMC`'s, which takes the kernel",
    "init_params": "that of `run` of `numpyro.infer.MCMC`",
    "process": "that of `DiffusionKernel`",
    "divergence": "that of `DiffusionKernel`",
    "width": "the network's: pass `network=functools.partial(denoiser, width=...)` or its like",
    "depth": "the network's: pass `network=functools.partial(denoiser, depth=...)` or its like",
    "smc_particles": "`Correction`'s: pass `correction=Correction(num_particles=...)`",
    "always_train": "that of `training`: pass `training=DiffusionTraining(always=...)` or its like",
}
"""Options that users bring along from elsewhere: whose they are, and what to do."""


def shown(value: Any) -> str:
    """Write a value for an error, by its type where it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN and "\n" not in text else f"a {type(value).__name__}"


def _is_scalar(value: Any, kind: Any) -> bool:
    """Say whether a value is an array of no axes, of a kind; arrays of NumPy and of JAX are alike here."""
    return (
        getattr(value, "shape", None) == () and hasattr(value, "dtype") and jnp.issubdtype(value.dtype, kind)
    )


def whole(name: str, value: Any, least: int = 1, most: int = _MANY) -> int:
    """Check a whole number between bounds, both included.

    Args:
        name: of the option.
        value: an integer of Python, NumPy or JAX; neither a truth value nor a float, be it 64.0.
        least: the lower bound.
        most: the upper bound.

    Returns:
        The number, as Python's.

    Raises:
        TypeError: for anything else than an integer.
        ValueError: beyond the bounds.

    Examples:
        >>> import numpy as np
        >>> from numpyro_sbtm.checks import whole
        >>> whole("width", np.int32(64))
        64
    """
    must = f"`{name}` must be a whole number from {least} to {most}, got {shown(value)}."
    if isinstance(value, bool) or not (isinstance(value, int) or _is_scalar(value, jnp.integer)):
        raise TypeError(must)
    if not least <= int(value) <= most:
        raise ValueError(must)
    return int(value)


def number(name: str, value: Any, least: float, most: float) -> float:
    """Check a real number between bounds, both included.

    Args:
        name: of the option.
        value: a real number of Python, NumPy or JAX, not a truth value.
        least: the lower bound.
        most: the upper bound.

    Returns:
        The number, as a float of Python.

    Raises:
        TypeError: for anything else than a real number.
        ValueError: beyond the bounds, and for NaN.

    Examples:
        >>> import jax.numpy as jnp
        >>> from numpyro_sbtm.checks import number
        >>> number("scale", jnp.asarray(2), 0.0, 10.0)
        2.0
    """
    return _real(name, value, f"from {least:g} to {most:g}", lambda x: least <= x <= most)


def positive(name: str, value: Any, most: float) -> float:
    """Check a real number above zero and at most as large as a bound, as `number` does."""
    return _real(name, value, f"above 0 and at most {most:g}", lambda x: 0 < x <= most)


def probability(name: str, value: Any) -> float:
    """Check a real number between zero and one, both excluded, as `number` does."""
    return _real(name, value, "above 0 and below 1", lambda x: 0 < x < 1)


def _real(name: str, value: Any, bounds: str, good: Callable[[float], bool]) -> float:
    must = f"`{name}` must be a number {bounds}, got {shown(value)}."
    real = isinstance(value, numbers.Real) or any(_is_scalar(value, k) for k in (jnp.integer, jnp.floating))
    if isinstance(value, bool) or not real:
        raise TypeError(must)
    value = float(value)
    if not good(value):  # NaN is in no interval
        raise ValueError(must)
    return value


def one_of(name: str, value: Any, known: Collection[str | None]) -> Any:
    """Check one of some names.

    Raises:
        ValueError: for any other value.

    Examples:
        >>> from numpyro_sbtm.checks import one_of
        >>> one_of("correction", None, ("metropolis", None))
    """
    if not (value is None or isinstance(value, str)) or value not in known:
        names = ", ".join(repr(one) for one in known)
        raise ValueError(f"`{name}` must be one of {names}, got {shown(value)}.")
    return value


def flag(name: str, value: Any) -> bool:
    """Check a truth value, of Python or NumPy.

    Raises:
        TypeError: for anything else, such as "yes" or 1.

    Examples:
        >>> from numpyro_sbtm.checks import flag
        >>> flag("shared", False)
        False
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}.")
    return bool(value)


def function(name: str, value: Any, cure: str) -> Callable[..., Any]:
    """Check something that can be called.

    Raises:
        TypeError: otherwise; it ends with the cure.

    Examples:
        >>> from numpyro_sbtm.checks import function
        >>> function("potential_fn", abs, "Pass minus a log density.") is abs
        True
    """
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, got {shown(value)}. {cure}")
    return value


def optional(check: Callable[..., Any], name: str, value: Any, *bounds: Any) -> Any:
    """Let None pass, and check everything else.

    Raises:
        TypeError: as the check does.
        ValueError: as the check does.

    Examples:
        >>> from numpyro_sbtm.checks import optional, whole
        >>> optional(whole, "patience", None, 0), optional(whole, "patience", 10, 0)
        (None, 10)
    """
    return None if value is None else check(name, value, *bounds)


def names_unknown_options(init: Callable[Options, None]) -> Callable[Options, None]:
    """Make a constructor say whose option an unknown keyword is, and what to write instead.

    Its signature stays as it is. Options that are groups, dataclasses, are looked into.

    Raises:
        TypeError: from the constructor, for a keyword that it does not have.

    Examples:
        >>> from numpyro_sbtm.checks import names_unknown_options
        >>> class Kernel:
        ...     @names_unknown_options
        ...     def __init__(self, *, width: int = 64) -> None: ...
        >>> Kernel(widht=3)
        Traceback (most recent call last):
        ...
        TypeError: Kernel has no option `widht`, got 3. Is `width` meant? It has width.
    """
    parameters = list(inspect.signature(init).parameters.values())[1:]
    known = [parameter.name for parameter in parameters]
    groups = {one.name: type(one.default) for one in parameters if dataclasses.is_dataclass(one.default)}

    @functools.wraps(init)
    def checked(*args: Options.args, **options: Options.kwargs) -> None:
        for name, value in options.items():
            if name not in known:
                raise TypeError(
                    f"{type(args[0]).__name__} has no option `{name}`, got {shown(value)}. "
                    + _advice(name, known, groups)
                )
        init(*args, **options)

    return checked


def _advice(name: str, known: list[str], groups: dict[str, type]) -> str:
    for option, group in groups.items():
        if name in _fields(group):
            return f"It is one of `{option}`: pass `{option}={group.__name__}({name}=...)`."
    if name in _ELSEWHERE:
        return f"It is {_ELSEWHERE[name]}."
    places = {field: option for option, group in groups.items() for field in _fields(group)}
    close = difflib.get_close_matches(name, [*known, *places], 1)
    place = f" of `{places[close[0]]}`" if close and close[0] not in known else ""
    return (f"Is `{close[0]}`{place} meant? " if close else "") + f"It has {', '.join(known)}."


def _fields(group: type) -> list[str]:
    return [field.name for field in dataclasses.fields(group)]
