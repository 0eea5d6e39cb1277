"""The six steps of a round, shared by every method whose clients answer λ with one gradient each."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from hosfl_client.wire.coded import ROW
from hosfl_lightning.aggregation import Median, TrimmedMean, combine
from hosfl_lightning.algorithms.base import Algorithm
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.wire import Codecs, CodedGradient, ProjectedGradients, SmashedData, StepRequest


class SplitRound(Algorithm):
    """z up, λ down, coefficients up, one update to everybody: all clients stay bit-identical."""

    endpoint = SplitEndpoint
    codes_gradient = True
    tells = frozenset({"multipliers"})

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """Steps 2 to 6; both halves move at the very end, after the update is recorded."""
        inbox = server.admit(fleet.ask(self.requests(server, call), SmashedData))
        loss, multipliers = server.backward(inbox)
        answers = server.screen(fleet.ask(multipliers, ProjectedGradients, CodedGradient), inbox)
        update = server.record(combine(answers, server.client_rule, self.aggregation, self.smoothing(server)))
        server.step()
        fleet.tell(update, call.online)
        return Outcome(loss, inbox.num_examples)

    def requests(self, server: Server, call: Call) -> dict[int, StepRequest]:
        """What begins the round, by client."""
        return call.to_each()

    def smoothing(self, server: Server) -> float | None:
        """``μ`` of the answers, as rounded, for the record; None: they have none."""
        return None

    @override
    def check_codecs(self, codecs: Codecs, sizes: Sequence[int]) -> None:
        """Ternary is refused as well where it would do harm and nobody would see it."""
        super().check_codecs(codecs, sizes)
        if codecs.gradient != "ternary":
            return
        if isinstance(self.aggregation, Median | TrimmedMean):
            raise ValueError(
                f"trainer.codec.gradient: in ternary about half of a client's values are zero, and "
                f"{type(self.aggregation).__name__} makes most of the update zero; take int4, or NormClippedMean"
            )
        basis = self.basis(0, 0, sizes)
        if basis is not None and basis.size < ROW:
            raise ValueError(
                f"trainer.codec.gradient: the {basis.size} numbers that a client sends are not fewer bytes in ternary, "
                f"which is for {ROW} and more of a gradient that it knows; leave it out"
            )
