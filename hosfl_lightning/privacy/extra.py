"""The library of the extra ``privacy``: nothing but the accountant needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def privacy_extra() -> Iterator[None]:
    """Around imports of ``dp_accounting`` and of what it brings.

    Raises:
        ImportError: It is not installed; says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"trainer.privacy needs {error.name}, which is not installed: pip install 'hosfl_lightning[privacy]'",
            name=error.name,
        ) from error
