"""The data module of records in files or on the hub: three splits, each with its limit, dealt to clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hosfl_lightning.data.checks import check_at_least, check_fraction
from hosfl_lightning.data.federated import FederatedDataModule
from hosfl_lightning.data.partition import ByField, Partitioner, fixed_subset, spelled
from hosfl_lightning.data.readers import Reader
from hosfl_lightning.data.rows import Row
from hosfl_lightning.data.tables import ClassNames

SPLITS = ("train", "validation", "test")
#: A file, folder or glob, several of them, or a split on the hub.
Source = str | Sequence[str]


class RecordData(FederatedDataModule):
    """Base of `ClassificationData` and `InstructionData`: reads, holds out and deals; a subclass encodes.

    Args:
        sources: Of `SPLITS`; None: no such split.
        limits: The most examples of each; None: all.
        reader: How the sources are read.
        validation_fraction: Share of the training examples held out when there is no validation source.
        num_clients: As the user has given it.
        partition: The word for a partition.
        words: What belongs to the word, as in `spelled`.
        partitioner: An object in its place, or None.
        base: Arguments of `FederatedDataModule`.
    """

    def __init__(
        self,
        sources: Sequence[Source | None],
        limits: Sequence[int | None],
        reader: Reader,
        validation_fraction: float,
        num_clients: int | None,
        partition: str,
        words: dict[str, Any],
        partitioner: Partitioner | None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        most = {f"max_{split}_examples": limit for split, limit in zip(SPLITS, limits)}
        check_at_least(1, num_clients=num_clients, **most)
        check_fraction(validation_fraction=validation_fraction)
        if partition == "field" and words["field"] is None:
            raise ValueError("field: partition=field needs the name of the field to go by")
        if partition != "field" and num_clients is None and partitioner is None:
            raise ValueError(f"num_clients: partition={partition} needs the number of clients")
        self.sources, self.limits = dict(zip(SPLITS, sources)), dict(zip(SPLITS, limits))
        self.reader, self.validation_fraction = reader, validation_fraction
        self.requested_clients, self.partitioner = num_clients, spelled(partitioner, partition, **words)

    def needs(self, row: Row) -> None:
        """Ask a record for what every example must have."""
        raise NotImplementedError

    def read(self, split: str) -> tuple[list[Row], ClassNames]:
        """All records of a split, and the class names that its file knows."""
        source = self.sources[split]
        if source is None:
            return [], {}

        def asked(row: Row) -> None:
            self.needs(row)
            if split == "train" and isinstance(self.partitioner, ByField):
                row.field(self.partitioner.field, "field")

        rows, names = self.reader.rows(source, split, asked)
        return rows, names

    def limited(self, rows: list[Row], split: str) -> list[Row]:
        """At most as many as the split's limit says, the same for every seed."""
        return [rows[i] for i in fixed_subset(len(rows), self.limits[split])]

    def hold_out(self, train: list[Row], validation: list[Row]) -> tuple[list[Row], list[Row]]:
        """Training and validation records: the latter taken from the former where they have no source."""
        if self.sources["validation"] is not None:
            return train, validation
        if len(train) < 2:
            raise ValueError("train: one example only, none can be held out; give validation a file of its own")
        chosen = set(fixed_subset(len(train), max(1, round(len(train) * self.validation_fraction))))
        held_out = [row for index, row in enumerate(train) if index in chosen]
        kept = [row for index, row in enumerate(train) if index not in chosen]
        return kept, self.limited(held_out, "validation")

    def deal_rows(self, examples: Sequence[Any], rows: Sequence[Row], labels: Sequence[int] | None = None) -> None:
        """Give the training examples to the clients; ``rows`` are the records that they are of."""
        field: Callable[[str], list[Any]] = lambda name: [row.field(name, "field") for row in rows]  # noqa: E731
        self.deal(
            examples,
            self.partitioner,
            num_clients=self.requested_clients,
            labels=labels,
            files=[row.file for row in rows],
            field=field,
        )
