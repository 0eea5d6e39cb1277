"""The libraries of the extra ``device``: nothing but exporting a half needs them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("torch.onnx", "onnxscript", "onnx_ir")


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
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
