"""One pass over held-out data with Trainer's hooks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader

from hosfl_lightning.run.by_client import ByClient
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.hooks import fire

Loop = Literal["validation", "test", "predict"]
_STAGES = {
    "validation": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
    "predict": RunningStage.PREDICTING,
}


def held_out(trainer: TrainerFace, loop: Loop) -> DataLoader[Any] | ByClient:
    """The batches of an evaluation, as the data module loads them, or client by client."""
    data = trainer.datamodule
    loaders = {"validation": data.val_dataloader, "test": data.test_dataloader, "predict": data.predict_dataloader}
    loader = loaders[loop]()
    if not (trainer.by_client or trainer.algorithm.personal):
        return loader
    return ByClient(trainer, "val" if loop == "validation" else loop, loader)


@torch.no_grad()
def run_evaluation(trainer: TrainerFace, loop: Loop) -> list[Any]:
    """Both halves on every batch; returns what ``<loop>_step`` returned."""
    model, batches = trainer.lightning_module, held_out(trainer, loop)
    trainer.state.stage = _STAGES[loop]
    trainer.set_num_batches(loop, len(batches))
    step = getattr(model, f"{loop}_step")
    trainer.call(f"on_{loop}_start")
    trainer.call(f"on_{loop}_epoch_start")
    outputs = []
    for i, batch in enumerate(batches):
        trainer.call(f"on_{loop}_batch_start", batch=batch, batch_idx=i, dataloader_idx=0)
        with trainer.fabric.autocast():
            outputs.append(step(trainer.to_device(batch), i))
        trainer.call(f"on_{loop}_batch_end", outputs=outputs[-1], batch=batch, batch_idx=i, dataloader_idx=0)
    # The module first: it logs what callbacks read in the same hook and in the next.
    fire(model, f"on_{loop}_epoch_end")
    trainer.call_callbacks(f"on_{loop}_epoch_end")
    trainer.call(f"on_{loop}_end")
    return batches.in_order(outputs) if isinstance(batches, ByClient) and loop == "predict" else outputs
