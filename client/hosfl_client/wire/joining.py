"""How a client on another machine comes and goes: the first message of a stream, and the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hosfl_client.wire.arrays import Arrays
from hosfl_client.wire.checks import check_counts, check_strings
from hosfl_client.wire.errors import FieldError


@dataclass(frozen=True, eq=False)
class Hello:
    """Client to server, before anything else: who I am and what I can do. The answer is `Terms`, or `Bye`.

    Attributes:
        round: Updates that the process holds; 0 before it knows the run.
        name: As in the client's certificate.
        package: Version of the software.
        session: Which process it is, for the server to know whether what it was asked is forgotten.
        endpoints: What it can run, by the names that `Terms.endpoint` gives.
    """

    kind: ClassVar[str] = "hello"
    round: int
    name: str
    package: str
    session: str
    endpoints: list[str]

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round)
        check_strings(self.kind, name=self.name, package=self.package, session=self.session)
        if not isinstance(self.endpoints, list):
            raise FieldError(f"hello: endpoints must be a list, got {self.endpoints!r:.80}")
        for name in self.endpoints:
            check_strings(self.kind, endpoints=name)


@dataclass(frozen=True, eq=False)
class Bye:
    """Either way, the last message of a stream. A stream that ends without one was cut: it is taken up again.

    Attributes:
        round: Where the run is.
        reason: For people.
        final: Whether coming back would change nothing: the run is over, or the client cannot take part.
        failed: Whether that is a failure.
    """

    kind: ClassVar[str] = "bye"
    round: int
    reason: str
    final: bool = True
    failed: bool = False

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round)
        check_strings(self.kind, reason=self.reason)
        if type(self.final) is not bool or type(self.failed) is not bool:
            raise FieldError(
                f"bye: final and failed must be true or false, got {self.final!r:.80}, {self.failed!r:.80}"
            )
