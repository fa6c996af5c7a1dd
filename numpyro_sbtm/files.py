# SPDX-License-Identifier: Apache-2.0
"""Samplers in files: a folder with a description in JSON, and arrays by orbax."""

import dataclasses
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

from numpyro_sbtm.core.lazy import load as load_module
from numpyro_sbtm.learned import Learned

__all__ = ["read_learned", "write_learned"]

_FORMAT = 1
_DESCRIPTION, _ARRAYS = "sampler.json", "arrays"
_PACKAGE = "numpyro_sbtm."


def write_learned(path: str | Path, learned: Learned, several: Any, settings: dict[str, str]) -> None:
    """Write what was learned into a new folder.

    Args:
        path: the folder; it must not exist, or be empty.
        learned: what was learned, of one sampler.
        several: whether its proposals are chosen among several.
        settings: what was chosen, in words, to be compared when it is read.

    Raises:
        FileExistsError: if there is something.
        TypeError: for a map that is no tree of arrays in named fields.
    """
    folder = Path(path).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"`path` is {str(path)!r}, where something is already. Pass a new folder.")
    arrays: list[np.ndarray] = []
    tree = _described({"learned": learned, "several": several}, arrays)
    folder.mkdir(parents=True, exist_ok=True)
    with load_module("orbax.checkpoint").StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / _ARRAYS, {str(k): array for k, array in enumerate(arrays)})
    description = {"format": _FORMAT, "settings": settings, "tree": tree}
    # last: a folder without it is not whole
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1))


def read_learned(path: str | Path, settings: dict[str, str]) -> tuple[Learned, Any]:
    """Read what was learned, and whether proposals are chosen among several.

    Args:
        path: the folder.
        settings: what is chosen now; it must be what was chosen then.

    Raises:
        FileNotFoundError: if it is not there, or not whole.
        ValueError: for another format, other settings, and arrays that this precision does not hold.
    """
    folder = Path(path).absolute()
    file = folder / _DESCRIPTION
    if not file.exists():
        raise FileNotFoundError(
            f"`path` is {str(path)!r}, where no sampler is, or one that was not written to its end."
        )
    description = json.loads(file.read_text())
    if description.get("format") != _FORMAT:
        raise ValueError(
            f"`path` is {str(path)!r}, a sampler in format {description.get('format')}, but this version of "
            f"numpyro_sbtm reads format {_FORMAT}. Read it by the version that wrote it."
        )
    other = [
        f"{name} was {then}, is {settings.get(name)}"
        for name, then in description["settings"].items()
        if settings.get(name) != then
    ]
    if other:
        raise ValueError(
            f"`path` is {str(path)!r}, a sampler with other settings: {'; '.join(other)}. Pass the kernel, "
            "or the settings, that it was made with."
        )
    shapes = dict(_shapes(description["tree"]))
    wide = [dtype for _, dtype in shapes.values() if jax.dtypes.canonicalize_dtype(dtype) != np.dtype(dtype)]
    if wide:
        raise ValueError(
            f"`path` is {str(path)!r}, a sampler in {wide[0]}. Read it after "
            "`jax.config.update('jax_enable_x64', True)`."
        )
    # on one device here, wherever they were
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=place)
        for name, (shape, dtype) in shapes.items()
    }
    with load_module("orbax.checkpoint").StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder / _ARRAYS, like)
    tree = _rebuilt(description["tree"], arrays)
    return tree["learned"], tree["several"]


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of a named tuple or a dataclass; None for anything else."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _described(value: Any, arrays: list[np.ndarray]) -> Any:
    """Describe a tree for JSON, and add its arrays to a list."""
    if isinstance(value, jax.Array | np.ndarray):
        arrays.append(np.asarray(value))
        return {"array": len(arrays) - 1, "shape": list(value.shape), "dtype": str(value.dtype)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, dict):
        return {"dict": {name: _described(part, arrays) for name, part in value.items()}}
    fields = _fields(value)
    kind = type(value)
    if fields is not None and kind.__module__.startswith(_PACKAGE):
        parts = {name: _described(part, arrays) for name, part in fields.items()}
        return {"type": [kind.__module__, kind.__qualname__], "fields": parts}
    if type(value) in (tuple, list):
        return {kind.__name__: [_described(part, arrays) for part in value]}
    raise TypeError(
        f"`sampler` holds a {kind.__module__}.{kind.__qualname__}, which cannot be written: only what is "
        "made of this package's own types is. A `precondition` of one's own, or parameters of a network that "
        "are no dicts, lists or tuples of arrays, are not; pickle the run instead."
    )


def _shapes(tree: Any) -> Iterator[tuple[str, tuple[list[int], str]]]:
    if "array" in tree:
        yield str(tree["array"]), (tree["shape"], tree["dtype"])
    for name in ("fields", "dict"):
        for part in tree.get(name, {}).values():
            yield from _shapes(part)
    for name in ("tuple", "list"):
        for part in tree.get(name, []):
            yield from _shapes(part)


def _rebuilt(tree: Any, arrays: dict[str, Any]) -> Any:
    if "array" in tree:
        return arrays[str(tree["array"])]
    if "value" in tree:
        return tree["value"]
    if "dict" in tree:
        return {name: _rebuilt(part, arrays) for name, part in tree["dict"].items()}
    if "type" in tree:
        module, name = tree["type"]
        if not module.startswith(_PACKAGE):
            raise ValueError(
                f"A sampler's file names the type {module}.{name}, which is not of this package."
            )
        kind = getattr(import_module(module), name)
        return kind(**{name: _rebuilt(part, arrays) for name, part in tree["fields"].items()})
    parts = [_rebuilt(part, arrays) for part in tree.get("tuple", tree.get("list"))]
    return tuple(parts) if "tuple" in tree else parts
