"""CommunicationMonitor: what crossed the cut, in bytes of encoded messages."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lightning.pytorch.callbacks import Callback
from typing_extensions import override

KINDS = ("smashed_data", "multiplier", "projected_gradients", "update")
#: What only some methods send, or travels only when a client returns; the records it replays count as updates.
RARE_KINDS = ("weights", "probed_data", "catch_up_request", "snapshot")
#: A gradient in few bits is counted as what it holds, as z and λ are in every codec.
COUNTED_AS = {"coded_gradient": "projected_gradients"}


class CommunicationMonitor(Callback):
    """Reports the length of the serialised messages, by kind and direction.

    A message to several receivers counts once for each. What a codec made smaller counts under the same key.

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
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the round and add it to the totals."""
        by_kind: Counter[str] = Counter()
        by_direction: Counter[str] = Counter(up=0, down=0)
        clients: set[int | None] = set()
        for sent in trainer.transport.entries():
            if sent.direction == "up" and sent.kind != "catch_up_request":
                clients.add(sent.client)
            by_kind[COUNTED_AS.get(sent.kind, sent.kind)] += sent.bytes * sent.receivers
            by_direction[sent.direction] += sent.bytes * sent.receivers
        self.client_rounds += len(clients)
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
