# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that outlive a process."""

import os
from pathlib import Path

import jax

__all__ = ["enable_cache"]


def enable_cache(path: str | Path | None = None) -> Path:
    """Keep compiled programs on disk: another process with the same model and shapes compiles nothing.

    All of JAX in this process uses it. Call it before anything is compiled. Programs are found again by what
    they compute, by JAX's version and by the machine; what is not found is compiled, and kept. Tracing is not
    spared.

    Args:
        path: a folder, made where it does not exist; None: ``numpyro_sbtm`` in the folder that
            ``XDG_CACHE_HOME`` names, or in ``~/.cache``.

    Returns:
        The folder. To empty it, delete it.

    Raises:
        NotADirectoryError: if something else is there.

    Reference:
        https://docs.jax.dev/en/latest/persistent_compilation_cache.html

    Examples:
        >>> import tempfile
        >>> from numpyro_sbtm import enable_cache
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     enable_cache(folder)
    """
    if path is None:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numpyro_sbtm"
    folder = Path(path).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"`path` is {str(path)!r}, which is no folder. Pass a folder, or a new path."
        )
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # by default JAX keeps only what takes a second to compile: there are many that take less
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
