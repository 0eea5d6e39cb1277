"""A control with a client of its own: other weights, another method, the same rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hosfl_lightning import HOSFL, Control, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import FedAvg, Frozen, SplitFedSGD
from hosfl_lightning.models.another_client import with_client
from hosfl_lightning.optim import SGD, Uncompressed
from hosfl_lightning.run.table import _share, cost_lines, losses_table
from hosfl_lightning.split import Lora, LoraHalf, Side
from tests.random_tokens import RandomTokens

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]
SERVER = LoraHalf(r=4, target_modules="all-linear")
CLIENT = LoraHalf(r=3, target_modules=["o_proj", "up_proj"])
SIDE = {"lora": Lora(client=None, server=SERVER), "side": Side(client=4, taps="all", server=3)}
METHOD = {"estimator": "local", "compression": Uncompressed(), "client_optimizer": SGD(lr=0.5)}


@pytest.fixture
def data() -> RandomTokens:
    return RandomTokens([[8, 12], [10, 6, 7]])


def server_of(model: SplitCausalLM) -> dict[str, torch.Tensor]:
    return {name: bits for name, bits in model.trained_state().items() if name.startswith("server_half.")}


@pytest.mark.parametrize(
    ("control", "client"),
    [
        (Control("lora", SplitFedSGD(SGD(lr=0.2)), CLIENT), {"lora": Lora(CLIENT, SERVER), "side": Side(0, "all", 3)}),
        (Control("narrow", HOSFL(**METHOD), side=2), {**SIDE, "side": Side(2, "all", 3)}),
        (Control("both", HOSFL(probes=2, client_optimizer=SGD(lr=0.2)), CLIENT, 4), {"lora": Lora(CLIENT, SERVER)}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_is_the_run_of_that_client(
    control: Control, client: dict[str, Any], make_model: MakeModel, make_orchestrator: MakeOrchestrator,
    data: RandomTokens,
) -> None:  # fmt: skip
    alone, beside = make_model(**SIDE), make_model(**SIDE)
    make_orchestrator(HOSFL(**METHOD)).fit(alone, data)
    trainer = make_orchestrator(HOSFL(**METHOD), controls=[control])
    trainer.fit(beside, data)
    for name, bits in alone.trained_state().items():
        assert torch.equal(bits, beside.trained_state()[name])

    by_hand = make_orchestrator(control.algorithm)
    by_hand.fit(make_model(**(SIDE | client)), data)
    found = trainer.summary["controls"][control.name]
    assert found["val_loss_last"] == by_hand.summary["val_loss_last"] != trainer.summary["val_loss_last"]
    for cost in ("d_client", "client_peak_bytes", "bytes_per_client_round", "up_per_client_round", "adapter"):
        assert found[cost] == by_hand.summary[cost]
    assert (beside.lora, beside.side) == (SIDE["lora"], SIDE["side"])


def test_the_one_called_first_order_closes_the_gap(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    first_order = Control("first_order", SplitFedSGD(SGD(lr=0.2)), lora=CLIENT)
    small = Control("small steps", SplitFedSGD(SGD(lr=0.05)), lora=CLIENT)
    trainer = make_orchestrator(HOSFL(**METHOD), controls=["frozen", small, first_order], max_rounds=6)
    trainer.fit(make_model(**SIDE), data)
    controls = trainer.summary["controls"]
    frozen, ours, first = (
        run["val_loss_last"] for run in (controls["frozen"], trainer.summary, controls["first_order"])
    )
    assert frozen > first
    assert trainer.summary["gap_closed"] == pytest.approx((frozen - ours) / (frozen - first))
    shares = {name: run["gap_closed"] for name, run in controls.items()}
    assert (shares["frozen"], shares["first_order"]) == (0, 1) and 0 < shares["small steps"] < 1


def test_another_client_beside_the_same_server(make_model: MakeModel) -> None:
    model = make_model(**SIDE)
    other = with_client(model, CLIENT, 0)
    assert other.side == Side(client=0, taps="all", server=3) and other.lora == Lora(CLIENT, SERVER)
    assert [*server_of(other)] == [*server_of(model)]
    assert all(torch.equal(bits, server_of(other)[name]) for name, bits in server_of(model).items())
    assert not {*other.client_parameters} & {*model.client_parameters}
    assert type(other) is type(model) and other.make_optimizer is model.make_optimizer
    assert with_client(make_model(lora=Lora(CLIENT, SERVER)), CLIENT, 0).side is None


@pytest.mark.parametrize(
    ("lora", "side", "own", "says"),
    [
        (None, 0, SIDE, "trains nothing; take the control frozen"),
        (CLIENT, 0, {"lora": None, "side": Side(client=4)}, "set model.init_args.lora"),
    ],
)
def test_a_client_that_cannot_be_is_refused(
    lora: LoraHalf | None, side: int, own: dict[str, Any], says: str, make_model: MakeModel
) -> None:
    with pytest.raises(ValueError, match=says):
        with_client(make_model(**own), lora, side)


@pytest.mark.parametrize(
    ("controls", "says"),
    [
        (lambda: [Control("a/b", Frozen())], "a folder's as well: no slash"),
        (lambda: [Control("", Frozen())], "a folder's as well"),
        (lambda: ["frozen", Control("frozen", Frozen(), CLIENT)], "frozen is there twice"),
        (
            lambda: [Control("averaged", FedAvg(local_steps=2), CLIENT)],
            r"a round of FedAvg \(averaged\) is not a control's",
        ),
    ],
)
def test_a_control_that_is_none_is_refused(
    controls: Callable[[], list[Any]], says: str, make_orchestrator: MakeOrchestrator
) -> None:
    with pytest.raises(ValueError, match=f"trainer.controls: .*{says}"):
        make_orchestrator(controls=controls())


def test_the_table_says_what_each_client_reached_sent_and_needed(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
) -> None:
    published = Control("as published", HOSFL(probes=2, client_optimizer=SGD(lr=0.2)), lora=CLIENT)
    trainer = make_orchestrator(HOSFL(**METHOD), controls=[published, "frozen"])
    trainer.fit(make_model(**SIDE), data)
    table = losses_table(trainer.summary)
    clients = ["before", "HOSFL, side adapter", "as published", "frozen (control)"]
    assert [*table.columns[0].cells] == clients
    assert [column.header for column in table.columns][-3:] == ["gap closed", "sends", "memory"]
    lines = dict(cost_lines(trainer.summary))
    assert lines["gap closed"] == "not known without the control first_order"
    assert lines["frozen (control)"].startswith("trains nothing; computes 1.0 forwards a round; peaks at ")
    trained = sum(p.numel() for p in trainer.lightning_module.client_parameters.values())
    assert f"trains {trained:,} numbers (side adapter)" in lines["HOSFL, side adapter"]
    assert "numbers (LoRA); computes 3.0 forwards" in lines["as published"]
    assert "its answer" in lines["as published"] and "its answer" not in lines["frozen (control)"]
    assert _share(-0.001) == "0%"
