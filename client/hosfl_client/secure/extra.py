"""The libraries of a secure sum, which not everybody has."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hosfl_client.bfloat16 import Array
from hosfl_client.refusals import TermsError

if TYPE_CHECKING:
    from hosfl_client.secure.participants import Participants

#: By the names that they are imported by.
LIBRARIES = {"cryptography": "cryptography", "Crypto": "pycryptodome"}


def missing() -> str | None:
    """The first of the libraries that is not installed."""
    return next((name for module, name in LIBRARIES.items() if find_spec(module) is None), None)


def participants(tensor: Callable[[Array], Any]) -> Participants:
    """An endpoint's part in secure sums.

    Args:
        tensor: A uint8 array in what the endpoint's messages hold.

    Raises:
        TermsError: A library is not installed.
    """
    if (library := missing()) is not None:
        raise TermsError(
            f"the run sums its answers securely (trainer.secure_aggregation), which needs {library}; install the extra "
            "secure: pip install 'hosfl-client[secure]'"
        )
    from hosfl_client.secure.participants import Participants

    return Participants(tensor)
