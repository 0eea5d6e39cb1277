"""Why a client cannot go on: its own exceptions."""

from __future__ import annotations


class EndpointError(RuntimeError):
    """The server asks for what this client does not do."""


class TermsError(ValueError):
    """The client cannot take part in the run: its model or its code are others than the terms say."""


class CatchUpError(RuntimeError):
    """A client that came back does not hold what the others hold."""
