"""The messages of a secure sum: what is none is refused by the name of its field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hosfl_lightning.wire import (
    MaskedGradients,
    Message,
    SecureKeys,
    SecurePeers,
    SecureShares,
    UnmaskRequest,
    WireError,
    encode,
)

ROWS = torch.ones(2, 4, dtype=torch.uint8)
KEYS = SecureKeys(5, 2, {}, ROWS[0], 3)
PEERS = SecurePeers(5, 2, [2, 3], ROWS, 2)
SHARES = SecureShares(5, 2, [0, 3], ROWS)
MASKED = MaskedGradients(5, 2, ROWS[0])
UNMASK = UnmaskRequest(5, 2, [2, 3])
BAD: list[tuple[Message, str, Any]] = [
    *((one, name, value) for one in (KEYS, PEERS, SHARES, MASKED, UNMASK) for name in ("round", "client", "attempt")
      for value in (-1, None, True)),
    (KEYS, "num_terms", -1), (KEYS, "basis", []), (KEYS, "reason", None), (PEERS, "threshold", 1.0),
    *((one, name, value) for one, name in ((KEYS, "keys"), (MASKED, "masked")) for value in (ROWS, ROWS[0].int(), 1)),
    *((one, name, value) for one, name in ((PEERS, "keys"), (SHARES, "shares"))
      for value in (ROWS[0], ROWS[:1], ROWS.float())),
    *((one, "peers", value) for one in (PEERS, SHARES) for value in ((2, 3), [2, -3], [2, "3"])),
    *((UNMASK, "survivors", value) for value in (None, [2, 1.5])),
]  # fmt: skip


@pytest.mark.parametrize(("message", "name", "value"), BAD, ids=range(len(BAD)))
def test_a_bad_field_is_refused_by_name(message: Message, name: str, value: Any) -> None:
    encode(message)
    with pytest.raises(WireError, match=f"^{message.kind}: {name} must "):
        encode(replace(message, **{name: value}))
