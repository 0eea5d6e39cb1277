"""Examples that clients share by index: the same batches as lists give, and nothing read before it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hosfl_lightning.data import IID, Example, Examples, FederatedDataModule, Partitioner, TokenRows
from hosfl_lightning.data.content import content
from hosfl_lightning.models.pretrained import TINY_LM, resolve

IDS = torch.randint(3, 200, (60, 7), generator=torch.Generator().manual_seed(0))


class Uneven(Partitioner):
    """Client 1 holds nothing; the others' indices come in any order."""

    def __call__(self, examples: Examples, seed: int) -> list[Tensor]:
        order = torch.arange(len(examples) - 1, -1, -1)
        return [order[:1], order[:0], order[1:20], order[20:]]


class Dealt(FederatedDataModule):
    """Of rows of one tensor, or of a list of them."""

    def __init__(self, examples: Any, partitioner: Partitioner, **known: Any) -> None:
        super().__init__(batch_size=3, tokenizer=resolve(TINY_LM))
        self.deal(examples, partitioner, **known)
        self.validation_set = [Example([1, 2], [1, 2])]


def as_list() -> list[Example]:
    return [Example(row.tolist(), row.tolist()) for row in IDS]


@pytest.mark.parametrize(("partitioner", "known"), [(Uneven(), {}), (IID(), {"num_clients": 60})])
def test_shared_rows_are_what_lists_are(partitioner: Partitioner, known: dict[str, Any]) -> None:
    shared, listed = (Dealt(examples, partitioner, **known) for examples in (TokenRows(IDS), as_list()))
    assert shared.num_clients == listed.num_clients
    assert shared.holders == listed.holders
    for client in shared.holders:
        for round in range(9):
            mine, theirs = (data.client_batch(client, round) for data in (shared, listed))
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert content(shared) == content(listed)


def test_a_client_is_a_sequence() -> None:
    clients = Dealt(TokenRows(IDS), Uneven()).clients
    assert [len(examples) for examples in clients] == [1, 0, 19, 40]
    assert torch.equal(torch.stack([one.labels for one in clients[2]]), IDS[40:59])  # ascending
    assert [len(examples) for examples in clients[2:]] == [19, 40]
    assert torch.equal(clients[-1][-1].input_ids, IDS[39]) and len(clients[-1][1:3]) == 2
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            clients[wrong]


def test_no_example_is_read_before_it_is_used() -> None:
    class Counted(TokenRows):
        reads = 0

        def __getitem__(self, at: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(at)

    data = Dealt(Counted(torch.zeros(20_000, 4, dtype=torch.int64)), IID(), num_clients=1_000)
    assert data.num_clients == len(data.holders) == 1_000 and Counted.reads == 0
    data.client_batch(7, 2)
    assert Counted.reads == data.batch_size


def test_labels_may_be_one_an_example() -> None:
    rows = TokenRows(IDS, torch.arange(60))
    assert int(rows[5].labels) == 5 and len(rows[3:9]) == 6  # type: ignore[arg-type]
