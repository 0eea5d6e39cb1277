"""PeakMemoryMonitor in a plain Trainer: the second optimizer step, and the lower part's share of it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hosfl_lightning.callbacks import CommunicationMonitor, HybridOrder, PeakMemoryMonitor, ZerothOrderTraining
from hosfl_lightning.memory import MemoryMeter, plain_forward_peak
from hosfl_lightning.optim import SGD, AdamW
from tests.callbacks.drop_in.plain_modules import (
    CLASSES,
    FEATURES,
    LIGHTNING_WARNINGS,
    Sequential,
    fit,
    hybrid,
    loader,
    mlp,
    same_bits,
)

pytestmark = LIGHTNING_WARNINGS
ROWS, TOKENS, WIDTH = 4096, 64, 128


class Momentum(Sequential):
    """Rows in sequences, so that z is as a language model's."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0].view(-1, TOKENS, FEATURES)).flatten(0, 1), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=0.9)


def deep() -> Momentum:
    torch.manual_seed(0)
    below = [layer for width in (FEATURES, *[WIDTH] * 5) for layer in (nn.Linear(width, WIDTH), nn.Tanh())]
    return Momentum(*below, nn.Linear(WIDTH, CLASSES))


def measured(*callbacks: Callback, **settings: Any) -> dict[str, float]:
    monitor = PeakMemoryMonitor()
    fit(deep(), *callbacks, monitor, data=loader(ROWS, 2 * ROWS), **settings)
    return monitor.report


def by_hand() -> int:
    """The second step of the same training in plain PyTorch."""
    module = deep()
    optimizer: Any = module.configure_optimizers()
    batches = list(loader(ROWS, 2 * ROWS))
    for x, y in batches:
        with MemoryMeter() as meter, meter.role("step"):
            optimizer.zero_grad()
            module.training_step([x, y], 0).backward()
            optimizer.step()
    return meter.peak("step")


def test_a_plain_step_is_what_it_is_by_hand() -> None:
    report = measured()
    assert set(report) == {"static_bytes", "step_working_bytes"}
    assert report["step_working_bytes"] == pytest.approx(by_hand(), rel=0.01)
    parameters = sum(p.nbytes for p in deep().parameters())
    assert report["static_bytes"] == 2 * parameters  # and momentum


def test_hybrid_order_needs_less_and_below_the_cut_no_more_than_a_forward() -> None:
    plain, ours = measured(), measured(hybrid("net.10"))
    assert ours["step_working_bytes"] < 0.75 * plain["step_working_bytes"]
    x, _ = next(iter(loader(ROWS, 2 * ROWS)))
    lower = deep().net[:10]
    forward = plain_forward_peak(lambda: lower(x.view(-1, TOKENS, FEATURES)))
    # Beside the forward: a layer's saved bits, and what the generator of directions needs.
    assert forward <= ours["lower_working_bytes"] <= 1.1 * forward
    assert ours["lower_working_bytes"] < ours["step_working_bytes"]


@pytest.mark.parametrize("order", [partial(HybridOrder, "net.10"), ZerothOrderTraining], ids=["hybrid", "whole"])
def test_static_bytes_count_the_moments_of_what_is_trained_by_probes(order: Callable[..., Callback]) -> None:
    few, many = (measured(order(rule=rule))["static_bytes"] for rule in (SGD(lr=1e-3), AdamW(lr=1e-3)))
    module = deep()
    moved = module.net if order is ZerothOrderTraining else module.net[:10]
    assert many - few == 2 * sum(p.nbytes for p in moved.parameters())


def test_the_first_step_is_not_measured_and_all_batches_of_the_second_are() -> None:
    assert measured(max_steps=1) == {}
    steps: list[int] = []

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            steps.append(_get_current_dispatch_mode() is not None)

    monitor = PeakMemoryMonitor()
    fit(deep(), monitor, Watch(), data=loader(64, 512), accumulate_grad_batches=2)
    assert steps == [False, False, True, True, False, False, False, False]
    assert monitor.report


def test_it_changes_nothing_and_ends_with_a_run_that_breaks_off() -> None:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise KeyError("stop")

    one, other, order = mlp(), mlp(), hybrid()
    fit(one, hybrid(), PeakMemoryMonitor())
    fit(other, hybrid())
    assert same_bits(one, other)
    with pytest.raises(KeyError):
        fit(mlp(), order, PeakMemoryMonitor(), Breaks())
    assert _get_current_dispatch_mode() is None
    assert order.working is type(order)("net.2").working


def test_the_users_logger_gets_it(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(mlp(), hybrid(), PeakMemoryMonitor(), logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [row["step"] for row in rows if row["memory/lower_working_bytes"]]
    assert steps == ["1", "2", "3"]  # Trainer repeats what was logged once until the epoch ends
    assert [row["step"] for row in rows if row["client/multiplier_norm"]] == ["0", "1", "2", "3"]


def test_one_process_has_nothing_to_count() -> None:
    monitor = CommunicationMonitor()
    with pytest.warns(UserWarning, match="nothing to count in one process; use strategy='ddp'"):
        trainer = fit(mlp(), hybrid(), monitor)
    assert not [name for name in trainer.callback_metrics if name.startswith("comm/")]
    assert monitor.totals == {}
