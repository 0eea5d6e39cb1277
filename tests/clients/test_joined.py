"""A client process that outlives a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hosfl_lightning.clients.joined import Joined
from hosfl_lightning.wire import RoundEnd, Terms, encode


def test_what_counted_in_one_run_does_not_count_in_another() -> None:
    loaded: list[tuple[int, Any]] = []

    def build(terms: Terms) -> Any:
        return SimpleNamespace(
            version=0, held_out_batches=0, handle=lambda _: [],
            load_own=lambda client, state: loaded.append((client, state)),
        )  # fmt: skip

    joined = Joined("ann", "0", build, notify=lambda _: None)
    for run in (bytes(16), bytes([1]) * 16):
        joined.handle(encode(Terms(6, 0, "Some", {}, 0, [], {}, {}, {}, keeps=False), run))
        joined.handle(encode(RoundEnd(5, [0]), run))
    assert loaded == [(0, None)] * 2  # both times this process has nothing of it
