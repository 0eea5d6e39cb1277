"""A round in groups: the same as one batch to rounding, in the memory of one group, and gone on with to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import HERONSFL, ClientKind, Frozen, MixedHOSFL, SplitFedSGD
from hosfl_lightning.callbacks import GradientAlignment, KeepMessages
from hosfl_lightning.memory import MemoryMeter
from hosfl_lightning.optim import SGD
from hosfl_lightning.run import grouping
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.server import TooFewClientsError
from hosfl_lightning.wire import Message, Multiplier
from tests.faults import count_writes
from tests.random_tokens import RandomTokens
from tests.small_run import SmallRun, contents

pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")  # μ is large on purpose, as in test_round

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]
#: Client 1, a group of its own below, has a single token and so no loss term.
LENGTHS = [[9, 12], [1], [6, 10, 10, 4], [12, 11, 3], [5, 7]]


class Seen(Callback):
    """Losses, and what the server's gradient is when it steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.server_parameters.values()]))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.examples = outputs["num_examples"]


def hosfl() -> HOSFL:
    return HOSFL(probes=2, mu=2**-7, client_optimizer=SGD(lr=0.1))


def fit(make: MakeOrchestrator, model: SplitCausalLM, algorithm: Any = None, **settings: Any) -> Seen:
    seen = Seen()
    make(algorithm or hosfl(), max_rounds=2, callbacks=[seen], **settings).fit(model, RandomTokens(LENGTHS))
    return seen


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("algorithm", "of_model"),
    [(hosfl, {}), (lambda: SplitFedSGD(SGD(lr=0.1)), {}), (Frozen, {}), (hosfl, {"labels": "client"})],
    ids=["hosfl", "splitfed_sgd", "frozen", "labels at the client"],
)
def test_groups_equal_one_batch_to_rounding(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, sent: list[tuple[Message, int]],
    algorithm: Callable[[], Any], of_model: dict[str, Any], size: int,
) -> None:  # fmt: skip
    whole, parts = make_model(**of_model), make_model(**of_model)
    one = fit(make_orchestrator, whole, algorithm())
    multipliers = [m.multiplier.restore() for m, _ in sent if isinstance(m, Multiplier)]
    sent.clear()
    several = fit(make_orchestrator, parts, algorithm(), group_size=size)
    in_groups = [m.multiplier.restore() for m, _ in sent if isinstance(m, Multiplier)]
    torch.testing.assert_close(several.losses, one.losses, rtol=1e-5, atol=0)
    assert several.examples == one.examples == 12
    assert len(multipliers) == len(in_groups) == (0 if algorithm is Frozen else 10)
    for a, b in [*zip(in_groups, multipliers), *zip(several.gradients, one.gradients)]:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    for name, tensor in whole.trained_state().items():
        torch.testing.assert_close(parts.trained_state()[name], tensor, rtol=5e-5, atol=5e-5)


def test_one_group_is_one_batch_to_the_bit(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    states = []
    for size in ("auto", 5, 4):
        model = make_model()
        fit(make_orchestrator, model, group_size=size)
        states.append(torch.cat([t.flatten() for t in model.trained_state().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])  # the bits can tell


def test_memory_is_that_of_a_group(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    class Metered(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.meter = MemoryMeter()
            self.meter.__enter__()

        def on_train_batch_end(self, *args: Any) -> None:
            self.meter.__exit__(None, None, None)
            self.peak = self.meter.peak("unassigned")

    def peak(clients: int, size: Any) -> int:
        metered = Metered()
        trainer = make_orchestrator(HOSFL(), max_rounds=1, group_size=size, callbacks=[metered])
        trainer.fit(make_model(), RandomTokens([[32, 32]] * clients))
        return metered.peak

    few, many = peak(4, 2), peak(16, 2)
    assert many < 1.05 * few
    assert peak(16, "auto") > 3 * many


def test_a_run_in_groups_goes_on_to_the_bit_and_in_the_same_groups(tmp_path: Path) -> None:
    with count_writes():
        settings: dict[str, Any] = {"group_size": 1, "clients_per_round": None}
        whole, parts = SmallRun(tmp_path / "a", settings=settings), SmallRun(tmp_path / "b", settings=settings)
        whole.fit()
        parts.fit(max_rounds=2)
        with pytest.raises(CheckpointError, match=r"trainer\.group_size is 2, the run was made with 1"):
            parts.fit(ckpt_path=parts.folder, group_size=2)
        parts.fit(ckpt_path=parts.folder)
    a, b = contents(whole.folder), contents(parts.folder)
    assert a["metrics.csv"] == b["metrics.csv"]
    assert a["checkpoints/last.ckpt"]["state_dict"] == b["checkpoints/last.ckpt"]["state_dict"]


def test_a_round_in_groups_is_one_round_to_those_who_watch(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator
) -> None:
    rows = []
    for size in (2, "auto"):
        callbacks = [GradientAlignment(every_n_rounds=1), KeepMessages(rounds=1)]
        trainer = make_orchestrator(hosfl(), max_rounds=1, group_size=size, callbacks=callbacks)
        trainer.fit(make_model(), RandomTokens(LENGTHS))
        rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    measured = [name for name in rows[0] if name.startswith(("alignment/", "client/", "comm/"))]
    assert {"alignment/cosine", "client/multiplier_norm", "comm/total_bytes"} <= {*measured}
    torch.testing.assert_close(*([row[name] for name in measured] for row in rows), rtol=1e-3, atol=1e-5)


def test_a_secure_sum_is_of_all_groups(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    models = [make_model(), make_model()]
    for model, size in zip(models, (2, "auto")):
        fit(make_orchestrator, model, group_size=size, secure_aggregation=True)
    for name, tensor in models[1].trained_state().items():
        torch.testing.assert_close(models[0].trained_state()[name], tensor, rtol=5e-5, atol=5e-5)


def test_clients_of_all_groups_count(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    with pytest.raises(TooFewClientsError, match="4 valid answer"):
        fit(make_orchestrator, model, group_size=2, min_clients=5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.trained_state().items())
    fit(make_orchestrator, model, group_size=2, min_clients=4)


def test_auto_is_by_shapes_and_leaves_small_rounds_whole(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model, trainer = RandomTokens([[8, 8]] * 20, batch_size=2), make_model(), make_orchestrator()
    data.setup("fit")
    trainer.datamodule, trainer.lightning_module = data, model
    data.tokenizer = model.tokenizer()
    assert grouping.group_size(trainer) is None  # z of a client are 2 * 8 * 32 numbers
    monkeypatch.setattr(grouping, "MOST_NUMBERS", 20 * 512)
    assert grouping.group_size(trainer) is None
    monkeypatch.setattr(grouping, "MOST_NUMBERS", 18 * 512)
    assert grouping.group_size(trainer) == 18
    monkeypatch.setattr(grouping, "MOST_NUMBERS", 1)
    assert grouping.group_size(trainer) == grouping.LEAST_CLIENTS == 16
    data.clients = data.clients[:16]
    trainer.forget_holding()
    assert grouping.group_size(trainer) is None


def test_what_cannot_be_is_named(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    for size in (0, True, "all"):
        with pytest.raises(ValueError, match=r"trainer\.group_size must be auto, or a number of clients >= 1"):
            make_orchestrator(group_size=size)
    with pytest.raises(ValueError, match=r"trainer\.group_size=2 is of clients that run as one batch"):
        make_orchestrator(group_size=2, simulation="per_client")

    class Own(HOSFL):
        def server_round(self, server: Any, fleet: Any, call: Any) -> Any:
            return super().server_round(server, fleet, call)

    for algorithm in (HERONSFL(), HOSFL(personal=True), MixedHOSFL([ClientKind("first_order", share=1.0)]), Own()):
        with pytest.raises(ValueError, match=f"trainer.group_size=2: the clients of {algorithm.name} do not run in"):
            make_orchestrator(algorithm, group_size=2).fit(make_model(), RandomTokens(LENGTHS))
