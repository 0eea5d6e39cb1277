"""CommunicationMonitor: what crossed the cut, in bytes of encoded messages."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lightning.pytorch.callbacks import Callback
from typing_extensions import override

KINDS = ("smashed_data", "multiplier", "projected_gradients", "update")
#: What travels only when a client returns; the records it replays count as updates.
CATCH_UP_KINDS = ("catch_up_request", "snapshot")


class CommunicationMonitor(Callback):
    """Reports the length of the serialised messages, by kind and direction.

    A message to several receivers counts once for each.

    | logged key | meaning | unit |
    |---|---|---|
    | ``comm/<kind>_bytes`` | this round, all clients, by kind of message (`KINDS`) | bytes |
    | ``comm/up_bytes``, ``comm/down_bytes`` | this round, all clients and kinds | bytes |
    | ``comm/total_bytes`` | since the first round | bytes |
    """

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.client_rounds = 0

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the round and add it to the totals."""
        by_kind: Counter[str] = Counter()
        by_direction: Counter[str] = Counter(up=0, down=0)
        for sent in trainer.transport.entries():
            self.client_rounds += sent.kind == "smashed_data"
            by_kind[sent.kind] += sent.bytes * sent.receivers
            by_direction[sent.direction] += sent.bytes * sent.receivers
        self.totals += by_kind
        for kind, value in by_kind.items():
            pl_module.log(f"comm/{kind}_bytes", value)
        for direction, value in by_direction.items():
            pl_module.log(f"comm/{direction}_bytes", value)
        pl_module.log("comm/total_bytes", sum(self.totals.values()))

    @property
    def per_client_round(self) -> dict[str, float]:
        """Mean bytes by kind for each time that a client sent its z; zero for a kind that never travelled."""
        kinds = [*KINDS, *(kind for kind in CATCH_UP_KINDS if self.totals[kind])]
        return {kind: self.totals[kind] / max(self.client_rounds, 1) for kind in kinds}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"totals": dict(self.totals), "client_rounds": self.client_rounds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals, self.client_rounds = Counter(state_dict["totals"]), state_dict["client_rounds"]
