"""Which clients are online in a round: a pure function of the seed, the round and the attempt."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.rng import Domain, Stream, words

#: Client sampling draws its permutations from tensor 0 of the same domain.
_TENSOR = 1


class Availability(ABC):
    """Who can take part in a round. Nothing is remembered, so a resumed run meets the same clients."""

    @abstractmethod
    def online(self, clients: int, seed: int, round: int, attempt: int = 0) -> Sequence[int]:
        """The clients that are there, ascending; maybe none.

        Args:
            clients: N, the number of clients of the run.
            seed: The run's seed.
            round: The round.
            attempt: How often the round was repeated, < 4096.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a resumed run must agree on; plain values."""


@dataclass(frozen=True)
class Always(Availability):
    """Every client, in every round."""

    @override
    def online(self, clients: int, seed: int, round: int, attempt: int = 0) -> range:
        return range(clients)

    @override
    def settings(self) -> dict[str, Any]:
        return {"name": "Always"}


@dataclass(frozen=True)
class Probability(Availability):
    """Client k is online if ``h_k < p · 2³²``, for each client, round and attempt on its own.

    ``h_k`` is word 0 of block k of the counter generator's stream (seed, client sampling, round, probe = attempt),
    tensor 1. So whether a client is online does not depend on how many there are.

    Args:
        p: Probability of being online, 0 < p <= 1.

    Raises:
        ValueError: A probability out of range.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"Probability: p must be in (0, 1], got {self.p}")

    @override
    def online(self, clients: int, seed: int, round: int, attempt: int = 0) -> list[int]:
        stream = Stream(seed, Domain.CLIENT_SAMPLING, round=round, probe=attempt)
        drawn = words(stream, _TENSOR, torch.arange(clients, device="cpu"))[:, 0]
        # An integer bound: torch compares integers with a float in fp32.
        return torch.nonzero(drawn < math.ceil(self.p * 2**32)).flatten().tolist()

    @override
    def settings(self) -> dict[str, Any]:
        return {"name": "Probability", "p": self.p}


class Trace(Availability):
    """Who was online is written down.

    A list has one entry a round and begins again at its end, as a recorded day does. A dictionary names the rounds at
    which the clients that are online change, round 0 among them; the last entry holds to the end of the run. Repeating
    a round finds the same clients.

    Example::

        Trace([[0, 1, 2], [0, 2]])                # client 1 every other round
        Trace({0: [0, 1], 10: [0], 20: [0, 1]})   # client 1 is away from round 10 to 19

    Args:
        rounds: Clients by round, in any order; or the path of a JSON file with such a list or object.

    Raises:
        ValueError: No such file, not a trace, or a client that cannot be; ``online``, too, for a client that the run
            does not have. The message names the setting.
    """

    def __init__(self, rounds: dict[int, list[int]] | list[list[int]] | str) -> None:
        table = _read(rounds) if isinstance(rounds, str) else rounds
        if not isinstance(table, list | dict):
            raise ValueError(f"Trace: rounds must be a list or a dictionary of lists of clients, got {table!r}")
        self.repeats = isinstance(table, list)
        items: Iterable[Any] = enumerate(table) if isinstance(table, list) else table.items()
        self.table = dict(sorted((_round(at), _clients(at, clients)) for at, clients in items))
        if 0 not in self.table:
            raise ValueError("Trace: rounds must name who is online in round 0")
        self._highest = max(((listed[-1], at) for at, listed in self.table.items() if listed), default=(-1, 0))

    @override
    def online(self, clients: int, seed: int, round: int, attempt: int = 0) -> list[int]:
        highest, at = self._highest
        if highest >= clients:
            raise ValueError(
                f"Trace: rounds names client {highest} in round {at}, but the clients are 0..{clients - 1}"
            )
        at = round % len(self.table) if self.repeats else max(start for start in self.table if start <= round)
        return list(self.table[at])

    @override
    def settings(self) -> dict[str, Any]:
        """By digest: a trace may be long."""
        content = json.dumps([self.repeats, list(self.table.items())]).encode()
        return {"name": "Trace", "rounds_sha256": hashlib.sha256(content).hexdigest()}


def among(ids: Sequence[int], clients: int) -> Tensor:
    """Which of so many clients are named, ``(clients,)`` bool."""
    named = torch.zeros(clients, dtype=torch.bool, device="cpu")
    if isinstance(ids, range):  # of 100,000 each would be an object
        named[ids.start : ids.stop : ids.step] = True
    else:
        found = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        named[found[found < clients]] = True
    return named


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"Trace: rounds is {path!r}, which is not a readable JSON file ({error})") from error


def _round(at: int | str) -> int:
    # The keys of a JSON object are strings.
    if not str(at).isdecimal():
        raise ValueError(f"Trace: rounds has the key {at!r}; a key must be a round, 0, 1, 2, ...")
    return int(at)


def _clients(at: int | str, listed: list[int]) -> list[int]:
    if not isinstance(listed, list):
        raise ValueError(f"Trace: rounds must have a list of clients for round {at}, got {listed!r}")
    for client in listed:
        if type(client) is not int or client < 0:
            raise ValueError(f"Trace: rounds names {client!r} in round {at}; a client is an integer >= 0")
    return sorted(set(listed))
