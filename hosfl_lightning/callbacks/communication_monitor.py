"""CommunicationMonitor: what crossed the cut, in bytes of encoded messages."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from hosfl_lightning.callbacks.round_callback import RoundCallback

KINDS = ("smashed_data", "multiplier", "projected_gradients", "update")
#: What only some methods send, or travels only when a client returns; the records it replays count as updates.
RARE_KINDS = (
    "weights", "probed_data", "catch_up_request", "snapshot", "step_request", "probe_request", "round_end",
    "acknowledgement", "unlabelled_data", "middle_output", "output_multiplier",
    "acknowledgement", "secure_keys", "secure_peers", "secure_shares", "masked_gradients", "unmask_request",
)  # fmt: skip
#: A gradient in few bits is counted as what it holds, as z and λ are in every codec.
COUNTED_AS = {"coded_gradient": "projected_gradients"}


class CommunicationMonitor(RoundCallback):
    """Reports the length of the serialised messages, by kind and direction.

    A message to several receivers counts once for each. What a codec made smaller counts under the same key.

    In a plain Trainer it counts what the ranks give each other for the part below `HybridOrder`'s cut: every rank's
    ``P`` fp32 scalars a step, to each of the others; with ``estimator="local"`` the adapter's gradient. What the
    strategy exchanges for the part above the cut is not counted. One process alone has nothing to count, and is told.

    | logged key | meaning | unit |
    |---|---|---|
    | ``comm/<kind>_bytes`` | this round, all clients, by kind of message (`KINDS`, `RARE_KINDS`) | bytes |
    | ``comm/up_bytes``, ``comm/down_bytes`` | this round, all clients and kinds | bytes |
    | ``comm/total_bytes`` | since the first round | bytes |

    Attributes:
        totals: Bytes by kind since the first round.
        up_bytes: Bytes from clients to the server since the first round.
        down_bytes: Bytes from the server to clients since the first round.
        client_rounds: How often a client took part in a round: sent more than that it is back.
    """

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.up_bytes = self.down_bytes = 0
        self.client_rounds = 0

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so where there is nothing to count."""
        super().on_train_start(trainer, pl_module)
        if isinstance(trainer, Trainer) and self.adopted and trainer.world_size == 1:
            rank_zero_warn("CommunicationMonitor has nothing to count in one process; use strategy='ddp' with several "
                           "devices, or leave it out")  # fmt: skip

    @override
    def report(self, trainer: Any, pl_module: Any) -> None:
        """Log the round and add it to the totals."""
        by_kind: Counter[str] = Counter()
        by_direction: Counter[str] = Counter(up=0, down=0)
        clients: set[int | None] = set()
        for sent in trainer.fleet.entries():
            if sent.direction == "up" and sent.kind != "catch_up_request":
                clients.add(sent.client)
            by_kind[COUNTED_AS.get(sent.kind, sent.kind)] += sent.bytes * sent.receivers
            by_direction[sent.direction] += sent.bytes * sent.receivers
        self._add(by_kind, by_direction, len(clients), pl_module)

    def exchanged(self, kind: str, nbytes: int, ranks: int, pl_module: Any) -> None:
        """Every rank sent ``nbytes`` to every other one: log the step and add it to the totals."""
        if ranks > 1:
            total = ranks * (ranks - 1) * nbytes
            self._add(Counter({kind: total}), Counter(up=total, down=0), ranks, pl_module)

    def _add(self, by_kind: Counter[str], by_direction: Counter[str], clients: int, pl_module: Any) -> None:
        self.client_rounds += clients
        self.totals += by_kind
        self.up_bytes += by_direction["up"]
        self.down_bytes += by_direction["down"]
        for kind, value in by_kind.items():
            pl_module.log(f"comm/{kind}_bytes", value)
        for direction, value in by_direction.items():
            pl_module.log(f"comm/{direction}_bytes", value)
        pl_module.log("comm/total_bytes", sum(self.totals.values()))

    @property
    def per_client_round(self) -> dict[str, float]:
        """Mean bytes by kind for each time that a client took part in a round; zero for one of `KINDS` not sent."""
        kinds = [*KINDS, *(kind for kind in RARE_KINDS if self.totals[kind])]
        return {kind: self.totals[kind] / max(self.client_rounds, 1) for kind in kinds}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "totals": dict(self.totals),
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "client_rounds": self.client_rounds,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals = Counter(state_dict["totals"])
        self.up_bytes, self.down_bytes = state_dict["up_bytes"], state_dict["down_bytes"]
        self.client_rounds = state_dict["client_rounds"]
