"""The minibatches of clients that run as one batch, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.padding import FILL, drop_unpredictable, stack_rows
from hosfl_lightning.wire import Multiplier

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Cohort:
    """Clients whose batches run as one: all of a round (batched), or a single one (per client).

    Args:
        clients: Their ids, ascending.
        batch: Inputs, ``attention_mask`` over z's positions and ``labels`` of all, one after the other, on the host.
        rows: Each client's examples in the batch.
        widths: ``S_k``, the length of each client's own batch; the joint one is padded to the longest.
        num_terms: ``n_k``, each client's number of loss terms.
    """

    clients: list[int]
    batch: Batch
    rows: list[slice]
    widths: list[int]
    num_terms: list[int]

    @classmethod
    def join(cls, clients: list[int], batches: Sequence[Batch], count: Callable[[Tensor], int]) -> Cohort:
        """The clients' minibatches below each other; ``count`` gives the loss terms of one client's labels."""
        batches = [{**b, "labels": drop_unpredictable(b["labels"], b["attention_mask"])} for b in batches]
        sizes = [len(b["labels"]) for b in batches]
        ends = list(accumulate(sizes))
        return cls(
            clients=clients,
            batch={name: stack_rows([b[name] for b in batches], FILL.get(name, 0)) for name in batches[0]},
            rows=[slice(end - size, end) for end, size in zip(ends, sizes)],
            widths=[b["attention_mask"].shape[1] for b in batches],
            num_terms=[count(b["labels"]) for b in batches],
        )

    @property
    def num_examples(self) -> int:
        """Of all of them."""
        return len(self.batch["labels"])

    def parts(self) -> dict[int, tuple[slice, int, int]]:
        """By client: its examples, its width, its number of loss terms."""
        return dict(zip(self.clients, zip(self.rows, self.widths, self.num_terms)))

    def mask(self, rows: slice, width: int) -> Tensor:
        """One client's valid tokens ``(B_k, S_k)`` bool: padding and the joint batch's extra width do not travel."""
        return self.batch["attention_mask"][rows, :width].bool()

    def labels(self, rows: slice, width: int) -> Tensor:
        """One client's labels, ``(B_k, S_k)`` or ``(B_k,)``."""
        labels = self.batch["labels"][rows]
        return labels[:, :width] if labels.dim() > 1 else labels

    def multiplier(self, like: Tensor, messages: Sequence[Multiplier]) -> Tensor:
        """λ ``(B, S, h)`` of the clients that have one, zero elsewhere.

        Args:
            like: z.
            messages: What the server sent them.
        """
        joint, parts = torch.zeros_like(like), self.parts()
        for message in messages:
            rows, width, _ = parts[message.client]
            joint[rows, :width] = message.unpack(self.mask(rows, width))
        return joint


class Minibatches:
    """What a client's data and model make of a local step: a `Cohort`, a pure function of client and step.

    Args:
        data: A `hosfl_lightning.data.FederatedDataModule`.
        model: A `hosfl_lightning.models.SplitModule`.
        index: The client of the data that is this machine's own, whatever its number in the run; None: the data has a
            client for each number.
    """

    def __init__(self, data: Any, model: Any, index: int | None = None) -> None:
        self.data, self.model, self.index = data, model, index

    def __call__(self, clients: list[int], step: int) -> Cohort:
        """The minibatches of local step ``round · local_steps + s``."""
        places = clients if self.index is None else [self.index] * len(clients)
        batches = [self.model.prepare(self.data.client_batch(k, step)) for k in places]
        return Cohort.join(clients, batches, self.model.count)

    @property
    def held_out_batches(self) -> int:
        """Batches of the validation data."""
        return -(-len(self.data.validation_set) // self.data.eval_batch_size)

    def held_out(self, clients: list[int], number: int) -> Cohort:
        """A batch of the validation data, of one client."""
        size = self.data.eval_batch_size
        examples = self.data.validation_set[number * size : (number + 1) * size]
        return Cohort.join(clients, [self.model.prepare(self.data.collate(examples))], self.model.count)
