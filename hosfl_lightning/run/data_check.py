"""The user's data against its contract and the model, before a run folder is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.contract import (
    DataContractError,
    check_batch,
    check_clients,
    check_examples,
    check_held_out,
)
from hosfl_lightning.data.notice import say
from hosfl_lightning.models import SplitImageClassifier, SplitModule
from hosfl_lightning.models.image_classification import OF_IMAGES
from hosfl_lightning.padding import drop_unpredictable

#: Clients whose examples are looked at together.
TOGETHER = 1000


def set_up(data: FederatedDataModule, model: SplitModule, stage: str) -> None:
    """Have the examples made.

    Raises:
        DataContractError: The class lacks a method that makes them.
    """
    try:
        data.setup(stage)
    except NotImplementedError as error:
        hint = f"; {OF_IMAGES}" if isinstance(model, SplitImageClassifier) else ""
        raise DataContractError(f"data: {error}{hint}") from error


def check_data(data: FederatedDataModule, model: SplitModule, fn: TrainerFn, elsewhere: str | None = None) -> None:
    """Refuse data that a round or an evaluation would fail on, or make nothing of.

    Args:
        data: Set up.
        model: That is to be trained or evaluated.
        fn: What is going to be done.
        elsewhere: Of a server whose clients are on other machines, where it validates (``server``, ``clients``,
            ``both``); None: the clients' data is here.

    Raises:
        ValueError: Names the class, or the setting to change.
    """
    fitting = fn is TrainerFn.FITTING
    if fitting:
        check_clients(data)
        check_each(data, model)
        if elsewhere is None:
            check_training(data, model)
    check_held_out(data)
    for examples, what in ((data.validation_set, "validation"), (data.test_set, "test")):
        check_one(data, model, examples, what)
    if (fitting and elsewhere != "clients") or fn is TrainerFn.VALIDATING:
        check_labelled(data, model, data.val_dataloader(), "validation")
    if (fitting and len(data.test_set)) or fn is TrainerFn.TESTING:
        check_labelled(data, model, data.test_dataloader(), "test")


def check_each(data: FederatedDataModule, model: SplitModule) -> None:
    """Every client's examples: of many clients together, and one client after the other where that finds fault."""
    names = data.client_names
    for first in range(0, len(names), TOGETHER):
        clients = range(first, min(first + TOGETHER, len(names)))
        try:
            check_one(data, model, [one for k in clients for one in data.clients[k]], "its clients")
        except ValueError:
            for k in clients:
                check_one(data, model, data.clients[k], f"client {names[k]!r}")


def check_one(data: FederatedDataModule, model: SplitModule, examples: Any, owner: str) -> None:
    """The examples of a client or a held-out set, each by itself."""
    if isinstance(model, SplitImageClassifier):  # what an example of text is does not matter then
        model.check_examples(examples, owner)
        if type(data).collate is FederatedDataModule.collate and len(examples):
            raise DataContractError(f"{type(data).__name__}: its batches are of text; {OF_IMAGES}")
        return
    check_examples(data, examples, owner)
    model.check_examples(examples, owner)


def check_training(data: FederatedDataModule, model: SplitModule) -> None:
    """The first batch of a client, and whether the clients have anything to learn from.

    Raises:
        ValueError: The batch lacks something, or no client has a loss term.
    """
    client = next((k for k, examples in enumerate(data.clients) if len(examples)), 0)
    batch(data, model, data.client_batch(client, 0))
    without, holding = list[str](), 0
    for name, examples in zip(data.client_names, data.clients):
        holding += len(examples) > 0
        if len(examples) and all(hasattr(x, "labels") for x in examples):
            without += [] if any(_terms(model, x) for x in examples) else [name]
    if without and len(without) == holding:
        raise DataContractError(
            f"{type(data).__name__}: no client has a labelled example, so there is nothing to learn (-100 is no label, "
            "and a first token is predicted by nothing)"
        )
    if without:
        say(f"{len(without)} of {len(data.clients)} clients have nothing labelled and never count: {_some(without)}")


def check_labelled(data: FederatedDataModule, model: SplitModule, batches: Iterable[Any], what: str) -> None:
    """Refuse held-out data whose loss would be a mean over nothing.

    Raises:
        ValueError: No batch has a loss term.
    """
    if not any(model.count(batch(data, model, one)) for one in batches):
        raise DataContractError(
            f"{type(data).__name__}: the {what} set has nothing labelled, so it has no loss (-100 is no label, and a "
            "first token is predicted by nothing)"
        )


def batch(data: FederatedDataModule, model: SplitModule, given: Any) -> Tensor:
    """The labels that count of a batch, which is as the model's client half takes it.

    Raises:
        ValueError: It is not.
    """
    check_batch(data, given)
    prepared, wanted = model.prepare(given), dict.fromkeys([*model.client_half.inputs, "attention_mask"])
    missing = [name for name in wanted if name not in prepared]
    if missing:
        raise DataContractError(
            f"{type(data).__name__}.collate must return {', '.join(missing)}, which {type(model).__name__} takes; it "
            f"returns {', '.join(given)}"
        )
    return drop_unpredictable(prepared["labels"], prepared["attention_mask"])


def _terms(model: SplitModule, example: Any) -> int:
    return model.count(torch.as_tensor(example.labels)[None])


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
