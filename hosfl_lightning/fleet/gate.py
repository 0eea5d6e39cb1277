"""Who may come in, as the fleet asks it."""

from __future__ import annotations

from typing import Any, Protocol

from hosfl_lightning.link.reception import Stream


class Gate(Protocol):
    """Who may come in."""

    @property
    def total(self) -> int:
        """Clients of the run, whether they are there or not."""

    def refresh(self) -> bool:
        """Look at what is written down; whether anything changed."""

    def identify(self, stream: Stream) -> tuple[str | None, Any]:
        """Name and serial number of a stream's certificate; no name: plain text, the client says it itself.

        Raises:
            ValueError: It is none that can be read.
        """

    def number_of(self, name: str) -> int | None:
        """Of a client that may come in."""

    def objection(self, name: str, serial: Any) -> str | None:
        """Why a client may not come in, or must leave, in words."""
