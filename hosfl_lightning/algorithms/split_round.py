"""The six steps of a round, shared by every method whose clients answer λ with one gradient each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import override

from hosfl_client.wire.coded import ROW
from hosfl_lightning.aggregation import Median, TrimmedMean, combine, update_of
from hosfl_lightning.algorithms.base import Algorithm
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim import Beside, SharedDirections
from hosfl_lightning.server import Call, Descent, Outcome, Server
from hosfl_lightning.wire import (
    Codecs,
    CodedGradient,
    ProjectedGradients,
    SecureKeys,
    StepRequest,
    Terms,
    Update,
)


class SplitRound(Algorithm):
    """z up, λ down, coefficients up, one update to everybody: all clients stay bit-identical.

    Args:
        report_loss: With ``model.init_args.labels: client``, whether the clients tell their training loss; else nobody
            knows it, and the run logs none.
    """

    endpoint = SplitEndpoint
    codes_gradient = sums = labels_may_stay = grouped = True
    tells = frozenset({"multipliers"})

    def __init__(self, *args: Any, report_loss: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.report_loss = report_loss

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """Steps 2 to 6; both halves move at the very end, after the update is recorded."""
        descent = Descent(server, self.requests(server, call))
        update = server.record(self.update(server, fleet, descent))
        server.step()
        fleet.tell(update, call.online)
        return Outcome(descent.tally.loss, descent.tally.num_examples)

    def update(self, server: Server, fleet: Fleet, descent: Descent) -> Update:
        """Steps 4 and 5: the answers as one; in a secure sum that is all that the server sees of them."""
        rule, mu = server.client_rule, self.smoothing(server)
        if server.secure_threshold is None:
            answers = descent(lambda multipliers: fleet.ask(multipliers, ProjectedGradients, CodedGradient))
            return combine(server.screen(answers, descent.tally), rule, self.aggregation, mu)
        from hosfl_lightning.server.secure_sum import SecureSum  # whose libraries are an extra

        secure, keys = SecureSum(server, fleet), descent(lambda multipliers: fleet.ask(multipliers, SecureKeys))
        num_terms, mean = secure.mean(keys, descent.tally)
        heard = [*num_terms], [*num_terms.values()]
        return update_of(server.call.round, secure.basis.describe(), mean, *heard, rule, mu)

    def requests(self, server: Server, call: Call) -> dict[int, StepRequest]:
        """What begins the round, by client."""
        return call.to_each()

    def smoothing(self, server: Server) -> float | None:
        """``μ`` of the answers, as rounded, for the record; None: they have none."""
        return None

    @override
    def check(self, module: SplitModule) -> None:
        """A server that has the labels knows the loss."""
        super().check(module)
        if not self.report_loss and module.labels == "server":
            raise ValueError(
                "trainer.algorithm.init_args.report_loss: false keeps nothing back, as the server has the labels; "
                "leave it out, or set model.init_args.labels: client"
            )

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **({} if self.report_loss else {"report_loss": False})}

    @override
    def terms(self, module: SplitModule, seed: int, codecs: Codecs, clients: int) -> Terms:
        """Says where the labels are as well, unless they travel."""
        terms = super().terms(module, seed, codecs, clients)
        if module.labels == "server":
            return terms
        basis = self.basis_with_head(module, seed, 0, self.parameters(module))
        if codecs.gradient != "fp32" and isinstance(basis, Beside) and isinstance(basis.first, SharedDirections):
            raise ValueError(
                f"trainer.codec.gradient={codecs.gradient}: the {basis.first.probes} scalars of a client would share a "
                "scale with the gradient of its head; leave it out"
            )
        return replace(terms, settings={**terms.settings, "labels": "client", "report_loss": self.report_loss})

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
        if basis is not None and (sent := basis.of_clients([0]).size) < ROW:
            raise ValueError(
                f"trainer.codec.gradient: the {sent} numbers that a client sends are not fewer bytes in ternary, "
                f"which is for {ROW} and more of a gradient that it knows; leave it out"
            )
