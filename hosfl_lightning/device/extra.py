"""The libraries of the extra ``device``: nothing but exporting a half needs them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def device_extra() -> Iterator[None]:
    """Around imports of ``onnx``, ``onnxscript`` and ``onnxruntime``.

    Raises:
        ImportError: One of them is not installed; says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"exporting a client needs {error.name}, which is not installed: pip install 'hosfl_lightning[device]'",
            name=error.name,
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters say of themselves: a package that is not there, names that will change in PyTorch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
