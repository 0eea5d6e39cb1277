from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from hosfl_lightning.data import Example, FederatedDataModule
from hosfl_lightning.data.contract import (
    DataContractError,
    check_batch,
    check_clients,
    check_examples,
    check_held_out,
)


class Mine(FederatedDataModule):
    """Whatever a test puts in it."""


class Other(FederatedDataModule):
    """Its examples are its own business."""

    def collate(self, examples: Any) -> Any:
        return examples


def mine(**attributes: Any) -> Mine:
    data = Mine()
    for name, value in attributes.items():
        setattr(data, name, value)
    return data


GOOD = Example([1, 2], [-100, 2])


@pytest.mark.parametrize(
    "example",
    [
        GOOD,
        Example(torch.tensor([1, 2]), np.array([1, 2])),  # type: ignore[arg-type]
        Example([np.int64(1)], torch.tensor(3)),  # type: ignore[list-item]
        Example([1], np.int32(3)),  # type: ignore[arg-type]
    ],
)
def test_examples_that_are_some(example: Example) -> None:
    check_examples(mine(), [example, example], "client 'a'")


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ({"input_ids": [1], "labels": [1]}, "a dict has no attribute input_ids"),
        (([1], [1]), "a tuple has no attribute input_ids"),
        (Example([], []), r"input_ids are not a list of integers, but \[\]"),
        (Example([0.5], [1]), r"input_ids are not a list of integers, but \[0\.5\]"),
        (Example("text", [1]), "input_ids are not a list of integers, but 'text'"),
        (Example(torch.ones(1, 2, dtype=torch.long), [1, 2]), r"but a tensor of shape \(1, 2\)"),
        (Example([[1], [2, 3]], [1, 2]), r"input_ids are not a list of integers, but \[\[1\], \[2, 3\]\]"),
        (Example([1, 2], [1]), r"labels are neither 2 integers, as input_ids, nor one, but \[1\]"),
        (Example([1, 2], None), "labels are neither 2 integers, as input_ids, nor one, but None"),
        (Example([1, 2], 0.5), r"labels are neither 2 integers, as input_ids, nor one, but 0\.5"),
        (Example([1, 2], "positive"), "nor one, but 'positive'"),
        (Example([1, 2], True), "nor one, but True"),
        (Example([1, 2], 1), "some labels are one a token and others one an example"),
    ],
)
def test_examples_that_are_none(example: Any, reason: str) -> None:
    said = (
        rf"^Mine: example 1 of client 'a': .*{reason}; give Example\(input_ids, labels\) with T token ids and T labels"
    )
    with pytest.raises(DataContractError, match=said):
        check_examples(mine(), [GOOD, example], "client 'a'")
    check_examples(Other(), [example], "client 'a'")


@pytest.mark.parametrize(
    ("clients", "reason"),
    [
        ([], "left clients empty; it must fill a list of examples for each client"),
        (None, "must fill clients with a list of each client's examples, not NoneType"),
        ({"a": [GOOD]}, "must fill clients with a list of each client's examples, not dict"),
        ([[GOOD], iter([GOOD])], "must fill clients with .*, not a list with list_iterator"),
        ([[GOOD], {0: GOOD}], "must fill clients with .*, not a list with dict"),
        ([[], []], "gave 2 clients, and none of them an example"),
    ],
)
def test_clients_that_are_none(clients: Any, reason: str) -> None:
    with pytest.raises(DataContractError, match=rf"^Mine\.setup {reason}"):
        check_clients(mine(clients=clients))


def test_clients_that_are_some() -> None:
    check_clients(mine(clients=[[GOOD], []]))
    check_clients(mine(clients=(Subset([GOOD, GOOD], [1]), [GOOD])))  # type: ignore[arg-type]


def test_names_of_others() -> None:
    with pytest.raises(DataContractError, match=r"^Mine\.setup gave 2 clients 1 client_names$"):
        check_clients(mine(clients=[[GOOD], [GOOD]], client_names=["a"]))


@pytest.mark.parametrize("attribute", ["validation_set", "test_set"])
def test_held_out_sets_that_are_none(attribute: str) -> None:
    with pytest.raises(
        DataContractError, match=rf"^Mine\.setup must fill {attribute} with a list of examples, not gen"
    ):
        check_held_out(mine(**{attribute: (one for one in [GOOD])}))


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ([1, 2], r"a dict of tensors, not \[1, 2\]"),
        ({"input_ids": torch.ones(2, 3), "labels": [1, 2]}, "a dict of tensors, not "),
        ({"input_ids": torch.ones(2, 3)}, "labels beside input_ids"),
        ({"labels": torch.ones(2)}, r"integer labels of shape \(B,\) or \(B, T\), not torch\.float32 of shape \(2,\)"),
        ({"labels": torch.tensor(1)}, r"integer labels of shape \(B,\) or \(B, T\), not torch\.int64 of shape \(\)"),
    ],
)
def test_batches_that_are_none(batch: Any, reason: str) -> None:
    with pytest.raises(DataContractError, match=rf"^Mine\.collate must return {reason}"):
        check_batch(mine(), batch)
