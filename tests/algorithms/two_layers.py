"""A model of two layers, cut between them, beside the same two layers in plain PyTorch; clients with points to sort.

What a test looks at in a run of them is here as well: what crosses, its last update, its clients by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hosfl_lightning import Orchestrator
from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.callbacks import DimensionFreeAggregation
from hosfl_lightning.clients.cohort import Minibatches
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.wire import Codecs, Message, Update

FEATURES, WIDTH, CLASSES = 5, 6, 3
#: Examples of each client: unequal, and one with fewer than a minibatch.
SIZES = (7, 2, 9, 4)


class FirstLayer(nn.Module):
    """``z = tanh(W x + b)``, one position: ``(B, F)`` to ``(B, 1, h)``."""

    inputs: ClassVar[tuple[str, ...]] = ("points",)
    hidden_size = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh())

    @property
    def layers(self) -> dict[int, nn.Module]:
        return {0: self.layer}

    def forward(self, points: Tensor) -> Tensor:
        return self.layer(points)[:, None]


class SecondLayer(nn.Module):
    """``W z + b``: ``(B, 1, h)`` to logits ``(B, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    @property
    def layers(self) -> dict[int, nn.Module]:
        return {1: self.layer}

    def forward(self, z: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(z[:, 0])


class TwoLayers(SplitModule):
    """All weights of both layers are trained; the loss is the cross entropy of ``labels (B,)``."""

    def __init__(self, optimizer: Any = None, seed: int = 0, **settings: Any) -> None:
        super().__init__("two layers", cut=1, optimizer=optimizer or sgd(), seed=seed, **settings)

    def load_whole(self, dtype: str, seed: int, **model_kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.ModuleList([FirstLayer(), SecondLayer()])

    def split_whole(self, whole: Any) -> tuple[Any, Any]:
        return whole[0], whole[1]

    def tokenizer(self) -> None:
        return None

    def check_examples(self, examples: Sequence[Any], owner: str) -> None:
        pass

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "attention_mask": torch.ones(len(batch["labels"]), 1, dtype=torch.long)}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def count(self, labels: Tensor) -> int:
        return len(labels)


class Points(FederatedDataModule):
    """Each client walks through its points in order, round after round; other clients see other classes more often."""

    def __init__(self, sizes: Sequence[int] = SIZES, batch_size: int = 3, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=8, seed=seed)
        self.sizes = sizes

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def points(number: int, client: int) -> list[Any]:
            x = torch.randn(number, FEATURES, generator=generator) + 0.3 * client
            return [{"points": row, "labels": row.sum().gt(0).long() + row[0].gt(1).long()} for row in x]

        self.clients = [points(number, k) for k, number in enumerate(self.sizes)]
        self.validation_set = [point for k in range(len(self.sizes)) for point in points(4, k)]

    def client_batch(self, client: int, round: int) -> dict[str, Tensor]:
        own: list[Any] = self.clients[client]
        size = min(self.batch_size, len(own))
        return collate([own[(round * size + i) % len(own)] for i in range(size)])

    def val_dataloader(self) -> EVAL_DATALOADERS:
        generator = torch.Generator()  # without its own, every new iterator draws from the global one
        return DataLoader(self.validation_set, batch_size=8, collate_fn=collate, generator=generator)  # type: ignore[arg-type]


def collate(points: Sequence[Any]) -> dict[str, Tensor]:
    return {name: torch.stack([point[name] for point in points]) for name in points[0]}


def sgd(lr: float = 0.2) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr)


def adamw(lr: float = 0.02) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.1)


def orchestrator(algorithm: Algorithm, folder: Path, **settings: Any) -> Orchestrator:
    """Quiet: five rounds of three of the clients."""
    given: dict[str, Any] = {
        "max_rounds": 5, "clients_per_round": 3, "val_check_interval": 5, "default_root_dir": str(folder),
        "enable_progress_bar": False, "enable_checkpointing": False, "logger": False,
    }  # fmt: skip
    return Orchestrator(algorithm, **given | settings)


class Crossing(Callback):
    """All messages between the server and the clients of a run, as they are sent; a rehearsal's are none of them."""

    def __init__(self) -> None:
        self.up: list[Message] = []
        self.down: list[Message] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        channel = trainer.fleet.channel
        up, down = channel.up, channel.down
        channel.up = lambda message: self.up.append(message) or up(message)
        channel.down = lambda message, receivers=1: self.down.append(message) or down(message, receivers)


def last_update(trainer: Orchestrator) -> Update:
    """The update record of the run's last round."""
    [watcher] = [one for one in trainer.callbacks if isinstance(one, DimensionFreeAggregation)]
    assert watcher._update is not None
    return watcher._update


def endpoint_of(algorithm: Algorithm, model: SplitModule) -> Any:
    """The method's clients by themselves, of run seed 0, with no server and no data."""
    terms = algorithm.terms(model, 0, Codecs(), clients=len(SIZES))
    return Endpoint.of(model, Minibatches(None, model), terms, Fabric(accelerator="cpu", devices=1))


def plain(model: TwoLayers) -> tuple[nn.Sequential, nn.Linear]:
    """Copies of the two layers that know nothing of the package."""
    first, second = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh()), nn.Linear(WIDTH, CLASSES)
    first.load_state_dict(model.client_half.layer.state_dict())
    second.load_state_dict(model.server_half.layer.state_dict())
    return first, second


def assert_equal(model: TwoLayers, first: nn.Module, second: nn.Module, tolerance: float = 1e-6) -> None:
    """To rounding: the weights of the two halves and of the two layers."""
    mine = [*model.client_half.layer.parameters(), *model.server_half.layer.parameters()]
    for a, b in zip(mine, [*first.parameters(), *second.parameters()], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
