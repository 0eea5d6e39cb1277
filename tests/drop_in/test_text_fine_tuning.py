"""Pattern: a Hugging Face classifier with warm-up per step, decay groups and saved hyperparameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

from hosfl_lightning.callbacks import HybridOrder, ZerothOrderTraining
from hosfl_lightning.optim import SGD
from tests.drop_in.side_by_side import (
    CLIENT_KEYS,
    QUIET_WARNINGS,
    ZEROTH_ORDER_KEYS,
    Outcome,
    assert_learns,
    assert_only_added,
    fit,
)

pytestmark = QUIET_WARNINGS


class TextClassifier(L.LightningModule):
    def __init__(
        self,
        num_labels: int = 2,
        learning_rate: float = 5e-3,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.2,
        vocab_size: int = 12,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = BertConfig(
            vocab_size=vocab_size, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, num_labels=num_labels, initializer_range=0.3,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config)
        self.accuracy = MulticlassAccuracy(num_labels)

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self(**batch)
        self.accuracy(output.logits, batch["labels"])
        self.log_dict({"val/loss": output.loss, "val/accuracy": self.accuracy}, prog_bar=True)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        plain = ("bias", "LayerNorm.weight")
        groups = [
            {"params": [p for n, p in named if not n.endswith(plain)], "weight_decay": self.hparams.weight_decay},
            {"params": [p for n, p in named if n.endswith(plain)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, int(self.hparams.warmup_ratio * steps), steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]


class Sentences(Dataset[dict[str, Tensor]]):
    """The first word decides the label; rows are padded."""

    def __init__(self, size: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 12, (size, 8), generator=generator)
        self.lengths = torch.randint(4, 9, (size,), generator=generator)
        self.labels = (self.ids[:, 0] > 6).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = (torch.arange(8) < self.lengths[index]).long()
        return {"input_ids": self.ids[index] * mask, "attention_mask": mask, "labels": self.labels[index]}


def train(folder: Path, *callbacks: Callback, **settings: Any) -> Outcome:
    L.seed_everything(1, verbose=False)
    module, data = TextClassifier(), Sentences()
    loaders = DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, batch_size=32)
    return fit(module, *loaders, callbacks=callbacks, max_epochs=10, default_root_dir=folder, **settings)


CUT = "model.bert.encoder.layer.1"


def test_the_layers_below_the_cut_learn_and_only_the_callback_came_in(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", gradient_clip_val=1.0)
    ours = train(tmp_path / "ours", HybridOrder(CUT, SGD(lr=0.1), probes=8), gradient_clip_val=1.0)
    frozen = train(tmp_path / "frozen", HybridOrder(CUT, SGD(lr=0.0), probes=1), gradient_clip_val=1.0)
    assert_only_added(plain, ours, CLIENT_KEYS)
    assert_learns(ours, frozen, margin=0.05)
    loaded = TextClassifier.load_from_checkpoint(ours.checkpoint_path, weights_only=True)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in ours.module.state_dict().items())


def test_the_whole_model_learns_without_a_gradient(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    ours = train(tmp_path / "ours", ZerothOrderTraining(SGD(lr=0.03), probes=4))
    frozen = train(tmp_path / "frozen", ZerothOrderTraining(SGD(lr=0.0)))
    assert_only_added(plain, ours, ZEROTH_ORDER_KEYS)
    assert_learns(ours, frozen, margin=0.03)
    assert all(p.grad is None for p in ours.module.parameters())
