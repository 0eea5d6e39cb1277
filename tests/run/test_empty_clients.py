"""Clients without an example: never sampled, in no count, and no run waits for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.availability import Probability
from hosfl_lightning.compare.conditions import conditions
from hosfl_lightning.join import _own_data
from hosfl_lightning.optim import SGD
from hosfl_lightning.run.serving import ServedData
from hosfl_lightning.run.settings import RunSettings
from tests.random_tokens import RandomTokens

MakeModel = Callable[..., SplitCausalLM]
#: Clients 1, 4 and 5 hold nothing.
LENGTHS = [[9, 12, 7], [], [6, 10], [12, 11], [], [], [5, 8]]
HOLDERS = [0, 2, 3, 6]


class Asked(Callback):
    """Who was asked in each round."""

    def __init__(self) -> None:
        self.clients: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clients.append(batch.clients)


def fit(make_model: MakeModel, folder: Path, data: RandomTokens, **settings: Any) -> tuple[Orchestrator, Asked]:
    asked = Asked()
    given: dict[str, Any] = {
        "max_rounds": 30, "val_check_interval": 30, "default_root_dir": str(folder), "callbacks": [asked],
        "enable_progress_bar": False, "enable_checkpointing": False,
    }  # fmt: skip
    trainer = Orchestrator(HOSFL(probes=1, client_optimizer=SGD(lr=1e-3)), **given | settings)
    trainer.fit(make_model(), data)
    return trainer, asked


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
def test_they_are_never_sampled(make_model: MakeModel, tmp_path: Path, simulation: str) -> None:
    trainer, asked = fit(make_model, tmp_path, RandomTokens(LENGTHS), clients_per_round=2, simulation=simulation)
    assert len(asked.clients) == 30
    assert all(len(clients) == 2 for clients in asked.clients)
    assert {client for clients in asked.clients for client in clients} == set(HOLDERS)
    assert not trainer.run.refused


def test_all_are_all_that_hold_something(make_model: MakeModel, tmp_path: Path) -> None:
    trainer, asked = fit(make_model, tmp_path, RandomTokens(LENGTHS), max_rounds=3)
    assert asked.clients == [HOLDERS] * 3
    summary = json.loads((Path(trainer.log_dir) / "summary.json").read_text())
    assert (summary["clients"], summary["clients_per_round"]) == (7, 4)


def test_those_online_without_an_example_take_no_place(make_model: MakeModel, tmp_path: Path) -> None:
    here = {"availability": Probability(0.8), "clients_per_round": 3, "on_too_few": "repeat"}
    trainer, asked = fit(make_model, tmp_path, RandomTokens(LENGTHS), **here)
    able = [set(trainer.clients_online(round)) & set(HOLDERS) for round in range(30)]
    assert all(set(clients) <= set(HOLDERS) for clients in asked.clients)
    assert [len(clients) for clients in asked.clients] == [min(3, len(there)) for there in able]


def test_they_weigh_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    """Nothing but their numbers is of the run: without them the same clients end at the same bits."""

    class Renumbered(RandomTokens):
        """The holders alone, whose minibatches are those of their old numbers."""

        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.whole = self.clients
            self.clients = [self.clients[client] for client in HOLDERS]

        def client_batch(self, client: int, round: int) -> dict[str, torch.Tensor]:
            alone, self.clients = self.clients, self.whole
            try:
                return super().client_batch(HOLDERS[client], round)
            finally:
                self.clients = alone

    ends = []
    for number, kind in enumerate((RandomTokens, Renumbered)):
        trainer, _ = fit(make_model, tmp_path / str(number), kind(LENGTHS), max_rounds=3)
        ends.append(trainer.lightning_module.trained_state())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_more_a_round_than_hold_something_is_refused_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    message = "trainer.clients_per_round is 5, but only 4 of the data's 7 clients hold an example; lower it to 4"
    with pytest.raises(ValueError, match=message):
        fit(make_model, tmp_path, RandomTokens(LENGTHS), clients_per_round=5)
    with pytest.raises(ValueError, match=r"trainer.min_clients is 5, but a round has 4 clients"):
        fit(make_model, tmp_path, RandomTokens(LENGTHS), min_clients=5)
    with pytest.raises(ValueError, match=r"RandomTokens.setup gave 2 clients, and none of them an example"):
        fit(make_model, tmp_path, RandomTokens([[], []]))


def test_a_site_that_holds_nothing_is_told_when_it_joins(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="data: client 1, which is this machine's, holds no example"):
        _own_data(SimpleNamespace(client=1), make_model(), RandomTokens(LENGTHS), 1)  # type: ignore[arg-type]


def test_a_server_counts_every_client_elsewhere() -> None:
    """What they hold only they know."""
    served = ServedData(RandomTokens(LENGTHS), ["ann", "bob", "cid"])
    assert served.holders == [0, 1, 2]
    assert RunSettings().sample_size(served.num_clients, served.num_clients - len(served.holders)) == 3


def test_conditions_of_a_comparison_are_of_those_that_hold_something() -> None:
    data = RandomTokens(LENGTHS)
    data.tokenizer = "unused"
    data.setup("fit")
    data.collate = lambda examples: {"labels": torch.tensor([len(one.labels) for one in examples])}  # type: ignore
    assert conditions(data)["examples"] == [3, 0, 2, 2, 0, 0, 2]
