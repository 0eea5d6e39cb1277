"""The contract of a run: all that a client must know beside its data, its model and the messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar

from hosfl_client.wire.arrays import Arrays
from hosfl_client.wire.checks import check_counts, check_settings, check_strings
from hosfl_client.wire.errors import FieldError

SEEDS = 1 << 64
#: How an update record moves θ_c, to the bit: the standard that every engine keeps.
RULES = "hosfl-rules/1"


@dataclass(frozen=True, eq=False)
class Terms:
    """Server to client k, when it joins; the protocol's version and the run's id are in the envelope.

    A client computes nothing that is not fixed by its terms, its data and the messages.

    Attributes:
        round: The round that the run is at, >= 0.
        client: Client number k, >= 0; None: the same terms for all.
        endpoint: What the client runs, by the name of its class.
        settings: Of the method, those of the client's side; plain values.
        seed: The run's 64 bits, of directions, of stochastic rounding, of coordinate subsets.
        manifest: ``[name, shape, dtype]`` of what is trained, in the order that numbers the directions.
        rule: Name and hyper-parameters of the update rule at the start; messages carry those of their round.
        basis: In what the round's answers and updates are expressed; empty where there are none.
        codecs: In what z, λ and a gradient travel: ``smashed_data``, ``multiplier``, ``gradient``.
        keeps: Whether a client keeps θ_c from round to round, and replays the updates that it missed; else each of its
            rounds begins with the server's weights.
        precision: Of forwards, as Fabric names it.
        backbone: Fingerprint of what a client holds and does not train; empty: not compared.
        rules: The standard by which updates move θ_c; a client that keeps another would end with other bits.
        privacy: How what it sends is clipped and noised, as `hosfl_client.privacy.Mechanism` takes it; empty: not.
        secure_aggregation: Whether answers to λ are summed under masks (`wire.secure`).
    """

    kind: ClassVar[str] = "terms"
    round: int
    client: int | None
    endpoint: str
    settings: dict[str, Any]
    seed: int
    manifest: list[list[Any]]
    rule: dict[str, Any]
    basis: dict[str, Any]
    codecs: dict[str, Any]
    keeps: bool = True
    precision: str = "32-true"
    backbone: str = ""
    rules: str = RULES
    privacy: dict[str, Any] = field(default_factory=dict)
    secure_aggregation: bool = False

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round)
        if self.client is not None:
            check_counts(self.kind, client=self.client)
        check_strings(
            self.kind, endpoint=self.endpoint, precision=self.precision, backbone=self.backbone, rules=self.rules
        )
        for name in ("keeps", "secure_aggregation"):
            if type(getattr(self, name)) is not bool:
                raise FieldError(f"terms: {name} must be true or false, got {getattr(self, name)!r:.80}")
        for name in ("settings", "rule", "basis", "codecs", "privacy"):
            check_settings(self.kind, name, getattr(self, name))
        if type(self.seed) is not int or not 0 <= self.seed < SEEDS:
            raise FieldError(f"terms: seed must be an integer of 64 bits, got {self.seed!r:.80}")
        if not isinstance(self.manifest, list) or not all(map(_is_entry, self.manifest)):
            raise FieldError("terms: manifest must be a list of [name, shape, dtype]")


def difference(mine: list[list[Any]], theirs: list[list[Any]]) -> str | None:
    """The first two entries that differ, in words; None: the manifests are the same."""
    for pair in zip_longest(mine, theirs):
        if pair[0] != pair[1]:
            here, there = ("nothing" if entry is None else f"{entry[0]} {entry[1]} {entry[2]}" for entry in pair)
            return f"{here} here, {there} there"
    return None


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    name, shape, dtype = entry
    sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    return isinstance(name, str) and sizes and isinstance(dtype, str)
