"""Who may come in: the certificate's name is on the list, and the certificate is not revoked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hosfl_lightning.link.allow_list import AllowList
from hosfl_lightning.link.credentials import Site, peer_name
from hosfl_lightning.link.reception import Stream
from hosfl_lightning.link.revoked import Revoked


class Gate:
    """Who may come in, by files that are read again when they change.

    Args:
        clients: ``clients.yaml``.
        certs: The server's folder; None: plain text, and a client's name is what it says.

    Raises:
        ValueError: A file that is not there, or not good.
    """

    def __init__(self, clients: str, certs: str | None) -> None:
        self.site = None if certs is None else Site.load(certs, "server")
        if not Path(clients).is_file():
            raise ValueError(
                f"--clients: there is no {clients}; write one with a line NUMBER: NAME, such as 0: hospital-a, for "
                "each client"
            )
        self.allowed = AllowList(clients)
        self.revoked = None if certs is None else Revoked(Path(certs) / "revoked.txt")

    @property
    def total(self) -> int:
        """Clients of the run, whether they are there or not."""
        return self.allowed.total

    @property
    def names(self) -> list[str]:
        """Of all numbers."""
        return [self.allowed.names.get(number, f"nobody_{number}") for number in range(self.total)]

    def server_credentials(self) -> Any | None:
        """gRPC's; None: plain text."""
        return None if self.site is None else self.site.server_credentials()

    def refresh(self) -> bool:
        """Look at the files; whether anything changed."""
        changed = self.allowed.refresh()
        return (self.revoked is not None and self.revoked.refresh()) or changed

    def identify(self, stream: Stream) -> tuple[str | None, Any]:
        """Name and serial number of a stream's certificate; no name: plain text, the client says it itself.

        Raises:
            IdentityError: It is none that can be read.
        """
        if self.site is None:
            return None, None
        peer = peer_name(stream.auth)
        return peer.name, peer.serial

    def number_of(self, name: str) -> int | None:
        """Of a client that is on the list; None: it is not."""
        return self.allowed.number_of(name)

    def objection(self, name: str, serial: Any) -> str | None:
        """Why a client may not come in, or must leave, in words; None: it may."""
        if self.revoked is not None and serial in self.revoked:
            return f"the certificate of {name} is revoked"
        if self.allowed.number_of(name) is None:
            return f"{name:.80} is not among the clients of this run"
        return None
