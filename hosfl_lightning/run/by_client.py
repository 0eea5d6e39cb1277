"""Held-out data of clients whose halves are their own: each client's examples by its own half."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import pstdev
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader

from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim import swapped
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.run.face import TrainerFace

OwnHalves = Mapping[int, Mapping[str, Tensor]]
"""What clients have for themselves, by client and name in the client half; who is not there holds the start."""
#: Which metrics are told client by client, by a word in their names, and what is the worst of them.
TOLD = {"loss": max, "accuracy": min}


def own_halves(trainer: TrainerFace) -> OwnHalves:
    """Of the run, or of the checkpoint that is evaluated; the model of a run that is over still has them."""
    endpoint = vars(trainer).get("endpoint")
    if trainer.ckpt_path is None and endpoint is not None and endpoint.model is trainer.lightning_module:
        return endpoint.own_parameters()
    return trainer.own_halves


def of_checkpoint(model: SplitModule, checkpoint: Mapping[str, Any]) -> OwnHalves:
    """What a checkpoint says of them; nothing, if it is not of a personal run.

    Raises:
        CheckpointError: They are of another client half.
    """
    held, mine = checkpoint.get("personal", {}), model.client_parameters
    for client, named in held.items():
        for name, tensor in named.items():
            if name not in mine or mine[name].shape != tensor.shape:
                raise CheckpointError(
                    f"ckpt_path: client {client} has a {name} of shape {[*tensor.shape]}, the model has not; use the "
                    "recipe it was made with"
                )
    return held


@contextmanager
def held_by(model: SplitModule, halves: OwnHalves, client: int) -> Iterator[None]:
    """The model's client half is that client's inside."""
    mine = model.client_parameters
    with swapped([(mine[name], theta.to(mine[name])) for name, theta in halves.get(client, {}).items()]):
        yield


class ByClient:
    """Batches of a held-out set, client after client; while one is out, the client half is its owner's.

    In the end it logs ``<stage>/loss_worst`` and ``<stage>/loss_std``, over clients' means, and of each accuracy the
    lowest and the deviation.

    Args:
        trainer: Whose model and data they are.
        stage: ``val`` or ``test``, before the names of metrics.
        loader: Of the held-out set, whose examples it has in their order.
    """

    def __init__(self, trainer: TrainerFace, stage: str, loader: DataLoader[Any]) -> None:
        self.trainer, self.stage, self.loader = trainer, stage, loader
        self.examples = cast(Any, loader.dataset)
        data: FederatedDataModule = trainer.datamodule
        found: dict[int, list[int]] = {}
        for i in range(len(self.examples)):
            found.setdefault(data.client_of_held_out(i), []).append(i)
        self.numbers = dict(sorted(found.items()))
        self.size = data.eval_batch_size

    def __len__(self) -> int:
        return sum(-(-len(numbers) // self.size) for numbers in self.numbers.values())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        model, halves = self.trainer.lightning_module, own_halves(self.trainer)
        metrics = {name: metric.to(self.trainer.fabric.device) for name, metric in model.build_metrics().items()}
        means: list[dict[str, float]] = []
        for client, numbers in self.numbers.items():
            with held_by(model, halves, client), model.also(metrics):
                for first in range(0, len(numbers), self.size):
                    yield self.loader.collate_fn([self.examples[i] for i in numbers[first : first + self.size]])
            if metrics["loss"].update_called:  # else nothing of it was labelled
                means.append({name: float(value) for name, value in model.computed(metrics).items()})
            for metric in metrics.values():
                metric.reset()
        model.log_dict({f"{self.stage}/{name}": value for name, value in spread(means).items()})

    def in_order(self, outputs: Iterable[Tensor]) -> list[Tensor]:
        """Rows of the batches' outputs as the examples stand in the set, each a batch of its own."""
        rows = [row for output in outputs for row in output.split(1)]
        numbers = [i for owned in self.numbers.values() for i in owned]
        return [row for _, row in sorted(zip(numbers, rows), key=lambda pair: pair[0])]


def spread(means: list[dict[str, float]]) -> dict[str, float]:
    """The worst and the standard deviation of the clients' losses and accuracies, over the clients there are."""
    found: dict[str, float] = {}
    for name in means[0] if means else ():
        kind = next((kind for kind in TOLD if kind in name), None)
        if kind is not None:
            values = [one[name] for one in means]
            found |= {f"{name}_worst": TOLD[kind](values), f"{name}_std": pstdev(values)}
    return found
