"""What a `FederatedDataModule` must hold after `setup`, checked before a round sees it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.data.federated import FederatedDataModule

#: What makes batches of examples.
BATCHES = ("collate", "client_batch", "val_dataloader")


class DataContractError(ValueError):
    """A data module breaks its contract; the message names the class."""


def check_clients(data: FederatedDataModule) -> None:
    """Refuse ``clients`` that are no list with the examples of each client, or that hold none at all.

    Raises:
        DataContractError: Names the class and what its ``setup`` must fill.
    """
    name, clients = type(data).__name__, data.clients
    if not _is_list(clients) or not all(map(_is_list, clients)):
        found = type(clients).__name__ if not _is_list(clients) else f"a list with {_other(clients)}"
        raise DataContractError(f"{name}.setup must fill clients with a list of each client's examples, not {found}")
    if not len(clients):
        raise DataContractError(f"{name}.setup left clients empty; it must fill a list of examples for each client")
    if type(data).client_batch is FederatedDataModule.client_batch and not any(map(len, clients)):
        raise DataContractError(f"{name}.setup gave {len(clients)} clients, and none of them an example")
    if len(data.client_names) != data.num_clients:
        raise DataContractError(f"{name}.setup gave {data.num_clients} clients {len(data.client_names)} client_names")


def check_held_out(data: FederatedDataModule) -> None:
    """Refuse a ``validation_set`` or ``test_set`` that is no list.

    Raises:
        DataContractError: Names the class and the attribute.
    """
    for attribute in ("validation_set", "test_set"):
        if not _is_list(getattr(data, attribute)):
            found = type(getattr(data, attribute)).__name__
            raise DataContractError(
                f"{type(data).__name__}.setup must fill {attribute} with a list of examples, not {found}"
            )


def check_examples(data: FederatedDataModule, examples: Sequence[Any], owner: str) -> None:
    """Refuse what `FederatedDataModule.collate` cannot make a batch of.

    A class that makes its batches in another way knows itself what an example is.

    An example has ``input_ids``, T >= 1 integers, and ``labels``: T integers, or one; all of them the one or the other.

    Raises:
        DataContractError: Names the class, whose example it is, and what an `Example` is.
    """
    if any(getattr(type(data), way) is not getattr(FederatedDataModule, way) for way in BATCHES):
        return
    kinds = set()
    for number, example in enumerate(examples):
        reason = _objection(example)
        if reason is None:
            kinds.add(torch.as_tensor(example.labels).ndim)
            reason = "some labels are one a token and others one an example" if len(kinds) > 1 else None
        if reason is not None:
            raise DataContractError(
                f"{type(data).__name__}: example {number} of {owner}: {reason}; give Example(input_ids, labels) with T "
                "token ids and T labels or one class"
            )


def check_batch(data: FederatedDataModule, batch: Any) -> None:
    """Refuse a batch that is no dict of tensors with integer ``labels``.

    Raises:
        DataContractError: Names the class and what ``collate`` must return.
    """
    name = type(data).__name__
    if not isinstance(batch, dict) or not all(isinstance(value, Tensor) for value in batch.values()):
        raise DataContractError(f"{name}.collate must return a dict of tensors, not {_told(batch)}")
    if "labels" not in batch:
        raise DataContractError(f"{name}.collate must return labels beside {', '.join(batch) or 'nothing'}")
    if batch["labels"].is_floating_point() or batch["labels"].ndim not in (1, 2):
        labels = batch["labels"]
        raise DataContractError(
            f"{name}.collate must return integer labels of shape (B,) or (B, T), not {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )


def _objection(example: Any) -> str | None:
    missing = [field for field in ("input_ids", "labels") if not hasattr(example, field)]
    if missing:
        return f"a {type(example).__name__} has no attribute {missing[0]}"
    length = _integers(example.input_ids)
    if not length:
        return f"input_ids are not a list of integers, but {_told(example.input_ids)}"
    if _integers(example.labels) not in (length, 0):
        return f"labels are neither {length} integers, as input_ids, nor one, but {_told(example.labels)}"
    return None


def _integers(value: Any) -> int | None:
    """Length of a row of integers; 0 of a single one; None of anything else, and of a row of none."""
    if isinstance(value, str | bytes | bool):
        return None
    try:
        found = torch.as_tensor(value if hasattr(value, "__len__") or isinstance(value, Tensor) else index(value))
    except (TypeError, ValueError, RuntimeError):
        return None
    if found.is_floating_point() or found.dtype == torch.bool or found.ndim > 1 or not found.numel():
        return None
    return len(found) if found.ndim else 0


def _is_list(value: Any) -> bool:
    """A list, or another sequence such as a torch data set."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | bytes | dict)


def _other(clients: Any) -> str:
    return next(type(client).__name__ for client in clients if not _is_list(client))


def _told(value: Any) -> str:
    return repr(value)[:60] if not isinstance(value, Tensor) else f"a tensor of shape {tuple(value.shape)}"
