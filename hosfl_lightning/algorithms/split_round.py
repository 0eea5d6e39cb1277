"""The six steps of a round, shared by every method whose clients answer λ with one gradient each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from typing_extensions import override

from hosfl_client.wire.coded import ROW
from hosfl_lightning.aggregation import Median, TrimmedMean, combine, update_of
from hosfl_lightning.algorithms.base import Algorithm
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.server import Call, Inbox, Outcome, Server
from hosfl_lightning.wire import (
    Codecs,
    CodedGradient,
    Multiplier,
    ProjectedGradients,
    SmashedData,
    StepRequest,
    Update,
)


class SplitRound(Algorithm):
    """z up, λ down, coefficients up, one update to everybody: all clients stay bit-identical."""

    endpoint = SplitEndpoint
    codes_gradient = sums = True
    tells = frozenset({"multipliers"})

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """Steps 2 to 6; both halves move at the very end, after the update is recorded."""
        inbox = server.admit(fleet.ask(self.requests(server, call), SmashedData))
        loss, multipliers = server.backward(inbox)
        update = server.record(self.update(server, fleet, multipliers, inbox))
        server.step()
        fleet.tell(update, call.online)
        return Outcome(loss, inbox.num_examples)

    def update(self, server: Server, fleet: Fleet, multipliers: Mapping[int, Multiplier], inbox: Inbox) -> Update:
        """Steps 4 and 5: the answers as one; in a secure sum that is all that the server sees of them."""
        rule, mu = server.client_rule, self.smoothing(server)
        if server.secure_threshold is None:
            answers = server.screen(fleet.ask(multipliers, ProjectedGradients, CodedGradient), inbox)
            return combine(answers, rule, self.aggregation, mu)
        from hosfl_lightning.server.secure_sum import SecureSum  # whose libraries are an extra

        secure = SecureSum(server, fleet)
        num_terms, mean = secure.mean(multipliers, inbox)
        heard = [*num_terms], [*num_terms.values()]
        return update_of(server.call.round, secure.basis.describe(), mean, *heard, rule, mu)

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
