"""The libraries of the extra ``remote``: nothing but connections needs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# gRPC writes by itself to the standard error, into the table of a console, a line for every handshake that fails.
# GRPC_VERBOSITY=info brings it back.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@contextmanager
def remote_extra() -> Iterator[None]:
    """Around imports of ``grpc`` and ``cryptography``.

    Raises:
        ImportError: One of them is not installed; says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"remote clients need {error.name}, which is not installed: pip install 'hosfl_lightning[remote]'",
            name=error.name,
        ) from error
