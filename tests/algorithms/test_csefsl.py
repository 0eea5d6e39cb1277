"""CSE-FSL beside a plain loop; what it sends, what it needs, and how it goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning.algorithms import CSEFSL, TooFewClientsError
from hosfl_lightning.callbacks import PeakMemoryMonitor
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.run.training import collect
from tests.algorithms.auxiliary import Reference, WithHead, exact
from tests.algorithms.two_layers import Points, adamw, orchestrator
from tests.random_tokens import RandomTokens
from tests.small_run import plain
from tests.test_round import MakeModel


class Unwell(Points):
    """One client sends numbers that are none."""

    def __init__(self, client: int = 1) -> None:
        super().__init__()
        self.client = client

    def client_batch(self, client: int, round: int) -> dict[str, Tensor]:
        batch = super().client_batch(client, round)
        return {**batch, "points": batch["points"] * torch.nan} if client == self.client else batch


@pytest.mark.parametrize(("local_steps", "upload_every"), [(1, 1), (3, 1), (3, 2), (2, 5)])
def test_equals_a_plain_loop(tmp_path: Path, local_steps: int, upload_every: int) -> None:
    algorithm = CSEFSL(SGD(lr=0.1), local_steps=local_steps, upload_every=upload_every)
    trainer, model = orchestrator(algorithm, tmp_path), WithHead()
    reference = Reference(model)
    trainer.fit(model, Points())
    reference.run([trainer.sample(r) for r in range(5)], exact, local_steps, upload_every)
    reference.assert_equal(model, trainer)


def test_z_goes_up_every_kth_step_and_no_multiplier_comes_down(tmp_path: Path) -> None:
    """Of 5 rounds of 3 steps, steps 0, 4, 8 and 12 of the run; the last round has the last of them."""
    trainer = orchestrator(CSEFSL(SGD(lr=0.1), local_steps=3, upload_every=4), tmp_path, simulation="per_client")
    trainer.fit(WithHead(), Points())
    assert Counter((sent.kind, sent.direction) for sent in trainer.fleet.channel.ledger) == {
        ("weights", "down"): 3, ("smashed_data", "up"): 3, ("step_request", "down"): 3, ("weights", "up"): 3,
        ("round_end", "down"): 1,
    }  # fmt: skip
    assert trainer.endpoint.trained.keys() == {
        "layer.0.weight", "layer.0.bias", "auxiliary.linear.weight", "auxiliary.linear.bias",
    }  # fmt: skip


def test_the_head_starts_anew_in_every_run(tmp_path: Path) -> None:
    algorithm, model, name = CSEFSL(SGD(lr=0.1)), WithHead(), "auxiliary.linear.weight"
    start, begun = model.auxiliary_head(0).linear.weight, list[Tensor]()

    class Begins(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            begun.append(trainer.endpoint.trained[name].clone())

    for _ in range(2):
        trainer = orchestrator(algorithm, tmp_path, max_rounds=1, callbacks=[Begins()])
        trainer.fit(model, Points())
        assert not torch.equal(trainer.endpoint.trained[name], start)
    assert all(torch.equal(head, start) for head in begun)


def test_messages_that_are_encoded_change_nothing(tmp_path: Path) -> None:
    states = []
    for simulation in ("batched", "per_client"):
        trainer = orchestrator(CSEFSL(SGD(lr=0.1), local_steps=2), tmp_path, simulation=simulation)
        trainer.fit(WithHead(), Points())
        states.append(plain(kept(trainer)["method"]))
    assert states[0] == states[1]


def kept(trainer: Any) -> dict[str, Any]:
    """All that a run hands on to its next round."""
    return {**collect(trainer), "state_dict": trainer.lightning_module.trained_state()}


def resumed(algorithms: list[CSEFSL], folder: Path, **settings: Any) -> Any:
    """What a run holds in the end that stopped after two of its four rounds, and went on with other objects."""
    for rounds, algorithm, path in zip((2, 4), algorithms, (None, str(folder / "version_0"))):
        given = {"max_rounds": rounds, "logger": True, "enable_checkpointing": True, "val_check_interval": 1}
        trainer = orchestrator(algorithm, folder, **given | settings)
        trainer.fit(WithHead(optimizer=adamw()), Points(), ckpt_path=path)
    return plain(kept(trainer))


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    def algorithm() -> CSEFSL:
        return CSEFSL(AdamW(lr=0.05), local_steps=2, upload_every=3)

    trainer = orchestrator(algorithm(), tmp_path / "whole", max_rounds=4, val_check_interval=1)
    trainer.fit(WithHead(optimizer=adamw()), Points())
    expected, held = plain(kept(trainer)), resumed([algorithm(), algorithm()], tmp_path / "stopped")
    for name in ("method", "optimizer_states", "state_dict", "validations", "settings"):
        assert held[name] == expected[name], name


def test_a_client_that_cannot_be_taken_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    trainer, model = orchestrator(CSEFSL(SGD(lr=0.1)), tmp_path, max_rounds=1, clients_per_round=None), WithHead()
    reference = Reference(model)
    with pytest.warns(UserWarning, match="client 1 is refused"):
        trainer.fit(model, Unwell())
    reference.run([[0, 2, 3]], exact)
    reference.assert_equal(model, trainer)


def test_a_round_that_too_few_answer_leaves_no_trace(tmp_path: Path) -> None:
    algorithm = CSEFSL(AdamW(lr=0.1), local_steps=2)
    settings: dict[str, Any] = {"clients_per_round": None, "min_clients": 4}
    trainer, model = orchestrator(algorithm, tmp_path, **settings), WithHead(optimizer=adamw())
    reference = Reference(model)
    with pytest.warns(UserWarning, match="client 1 is refused"), pytest.raises(TooFewClientsError):
        trainer.fit(model, Unwell())
    reference.assert_equal(model, trainer, 0.0)


def test_keeps_a_graph_unless_it_recomputes(make_model: MakeModel, tmp_path: Path) -> None:
    """Peaks of clients beside a plain forward of the same client half and head; the gradient is the same."""
    peaks, states = {}, {}
    for checkpointing in (False, True):
        algorithm = CSEFSL(SGD(lr=0.1), checkpointing=checkpointing, auxiliary_blocks=1)
        data = RandomTokens([[48] * 8], batch_size=8)
        monitor = PeakMemoryMonitor()
        trainer = orchestrator(algorithm, tmp_path, clients_per_round=1, max_rounds=1, callbacks=[monitor])
        trainer.fit(make_model(), data)
        peaks[checkpointing] = monitor.report["client_peak_bytes"] / monitor.report["client_forward_bytes"]
        states[checkpointing] = plain(kept(trainer)["method"])
    assert peaks[False] > 1.5
    assert peaks[True] < 0.8 * peaks[False]
    assert states[False] == states[True]


@pytest.mark.parametrize("name", ["upload_every", "local_steps"])
def test_settings_out_of_range_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.algorithm: {name} must be >= 1, got 0"):
        CSEFSL(**{name: 0})
