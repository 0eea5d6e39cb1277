"""What a callback saves: peak memory and seconds of a training step in a plain ``lightning.Trainer``.

    python -m benchmarks.drop_in_memory --out docs/results

One LightningModule that knows nothing of hybrid order, an OPT-shaped causal language model with random weights (hidden
256, 8 layers, 4 heads, ffn 1024), trained by AdamW in fp32 at several sequence lengths; the cut is at half depth. The
vocabulary is 256, bytes: the logits of a large one are above the cut whatever the method, which is measured apart.

Peaks are those of `MemoryMeter`, which follows every tensor from the start of the run: parameters, gradients, optimizer
state, activations. They are read at the second batch, when optimizer state is there and `HybridOrder` has done its
check. Seconds are the processor's, of runs without a meter: other work on the machine counts little. Writes
``drop_in_memory.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.drop_in_memory_report import BACKPROP, CHECKPOINTED, FORWARD, HYBRID, page, picture
from hosfl_lightning.callbacks import HybridOrder, ZerothOrderTraining
from hosfl_lightning.memory import MemoryMeter
from hosfl_lightning.optim import SGD
from hosfl_lightning.run.identity import hardware

#: The batch whose peak is read, counted from 0.
METERED = 1
HEADS = 4
#: Times the model's own.
VOCABULARIES = (4, 32)
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "inference_mode": False, "max_epochs": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of the model and its batches."""

    hidden: int = 256
    layers: int = 8
    vocabulary: int = 256
    batch: int = 2
    positions: int = 2048

    @property
    def cut(self) -> str:
        return f"model.model.decoder.layers.{self.layers // 2}"

    @property
    def below(self) -> list[str]:
        """OPT registers its last norm before the layers, so what is below has to be named."""
        names = ["embed_tokens", "embed_positions", *(f"layers.{i}" for i in range(self.layers // 2))]
        return [f"model.model.decoder.{name}" for name in names]

    def model(self) -> OPTForCausalLM:
        config = OPTConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers, ffn_dim=4 * self.hidden,
            num_attention_heads=HEADS, word_embed_proj_dim=self.hidden, max_position_embeddings=self.positions,
            dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        return OPTForCausalLM(config).train()

    def data(self, length: int, batches: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary, (batches * self.batch, length), generator=generator)
        return DataLoader(ids, batch_size=self.batch)  # type: ignore[arg-type]


class LanguageModel(L.LightningModule):
    """As users write it."""

    def __init__(self, model: OPTForCausalLM) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.model(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-4)


@dataclass(frozen=True)
class Method:
    """A row: what is done to the user's run."""

    name: str
    callback: Callable[[Shape], Callback] | None = None
    checkpointing: bool = False
    frozen: bool = False
    trained: bool = True

    def fit(self, shape: Shape, length: int, watch: Watch, batches: int) -> None:
        module = LanguageModel(shape.model())
        if self.checkpointing:
            module.model.activation_checkpointing_enable({"use_reentrant": False})
        if self.frozen:
            for name in shape.below:
                module.get_submodule(name).requires_grad_(False)
        callbacks = [self.callback(shape)] if self.callback else []
        trainer = L.Trainer(**QUIET, callbacks=[*callbacks, watch])
        if self.trained:
            trainer.fit(module, shape.data(length, batches))
        else:
            trainer.validate(module, shape.data(length, batches), verbose=False)


def hybrid(shape: Shape) -> Callback:
    """Two forward probes, plain SGD below the cut."""
    return HybridOrder(shape.cut, SGD(lr=1e-4), client=shape.below)


def zeroth(shape: Shape) -> Callback:
    """One central probe, plain SGD."""
    return ZerothOrderTraining(SGD(lr=1e-6))


METHODS = [
    Method(FORWARD, trained=False),
    Method(BACKPROP),
    Method(CHECKPOINTED, checkpointing=True),
    Method("backprop, lower half frozen", frozen=True),
    Method(HYBRID, hybrid),
    Method(f"{HYBRID}, checkpointed", hybrid, checkpointing=True),
    Method("ZerothOrderTraining", zeroth),
]


class Watch(Callback):
    """Processor seconds of every batch; with a meter its peak, what is held after it, what the lower part works with.

    Args:
        shape: Says where the cut is.
        meter: Slows the run down.
    """

    def __init__(self, shape: Shape, meter: MemoryMeter | None = None) -> None:
        self.shape, self.meter = shape, meter
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self.held: list[int] = []
        #: Bytes that each run of the lower part took beyond what was there, one list a batch.
        self.lower: list[list[int]] = []
        self._undo = ExitStack()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.meter is None:
            return
        cut = pl_module.get_submodule(self.shape.cut)
        decoder = pl_module.get_submodule("model.model.decoder")
        # First of the cut's hooks: a probe ends in HybridOrder's.
        for handle in (decoder.register_forward_pre_hook(self._lower_begins, prepend=True),
                       cut.register_forward_pre_hook(self._lower_ends, prepend=True)):  # fmt: skip
            self._undo.callback(handle.remove)
        self.meter.adopt("run", [*pl_module.parameters(), *pl_module.buffers()])
        self._undo.enter_context(self.meter)
        self._undo.enter_context(self.meter.role("run"))

    def on_train_batch_start(self, *_: Any) -> None:
        self._start: int | None = None
        self.lower.append([])
        if self.meter is not None:
            self.meter.reset_peak("run")
            self._peak = 0
        self._began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._began)
        if self.meter is not None:
            self._next_phase()
            self.peaks.append(self._peak)
            self.held.append(self.meter.live("run"))

    def on_train_end(self, *_: Any) -> None:
        self._undo.close()

    on_validation_start, on_validation_end = on_train_start, on_train_end  # type: ignore[assignment]
    on_validation_batch_start, on_validation_batch_end = on_train_batch_start, on_train_batch_end  # type: ignore

    def _next_phase(self) -> None:
        assert self.meter is not None
        self._peak = max(self._peak, self.meter.peak("run"))
        self.meter.reset_peak("run")

    def _lower_begins(self, *_: Any) -> None:
        assert self.meter is not None
        self._next_phase()
        self._start = self.meter.live("run")

    def _lower_ends(self, *_: Any) -> None:
        assert self.meter is not None
        if self._start is not None:  # None: a checkpointed layer runs again
            self.lower[-1].append(self.meter.peak("run") - self._start)
            self._start = None
            self._next_phase()


def metered(method: Method, shape: Shape, length: int) -> dict[str, int]:
    """Bytes of one batch in the course of a run."""
    watch = Watch(shape, MemoryMeter())
    method.fit(shape, length, watch, METERED + 1)
    peak, held, lower = watch.peaks[METERED], watch.held[METERED], max(watch.lower[METERED])
    return {"peak_bytes": peak, "held_bytes": held, "lower_working_bytes": lower}


def timed(method: Method, shape: Shape, length: int, repeats: int) -> float:
    """Processor seconds of a step, without a meter; the first one warms up."""
    watch = Watch(shape)
    method.fit(shape, length, watch, repeats + 1)
    return statistics.median(watch.seconds[1:])


def row(method: Method, shape: Shape, length: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    seconds = timed(method, shape, length, repeats)
    found = {"method": method.name, "length": length, **metered(method, shape, length), "seconds": seconds}
    print(json.dumps(found), flush=True)
    return found


def with_vocabulary(shape: Shape, length: int) -> dict[str, Any]:
    """Peaks of the two methods that another vocabulary is to compare."""
    compared = [method for method in METHODS if method.name in (BACKPROP, HYBRID)]
    peaks = {method.name: metered(method, shape, length)["peak_bytes"] for method in compared}
    return {"vocabulary": shape.vocabulary, "length": length, "peak_bytes": peaks}


def results(lengths: Sequence[int], shape: Shape, repeats: int) -> dict[str, Any]:
    """Everything that is known: method after method at each length, then larger vocabularies at the longest."""
    rows = [row(method, shape, length, repeats) for length in lengths for method in METHODS]
    larger = [replace(shape, vocabulary=factor * shape.vocabulary) for factor in VOCABULARIES]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": hardware(torch.device("cpu")),
        "model": {
            **vars(shape), "heads": HEADS, "cut": shape.layers // 2, "precision": "fp32", "optimizer": "AdamW",
            "parameters": sum(p.numel() for p in shape.model().parameters()),
        },
        "rows": rows,
        "vocabularies": [with_vocabulary(other, max(lengths)) for other in larger],
    }  # fmt: skip


def shown(own: argparse.Namespace) -> str:
    """The command, without the machine's paths."""
    words = ["python -m benchmarks.drop_in_memory --out OUT", *(["--quick"] if own.quick else [])]
    words += ["--lengths", *map(str, own.lengths)] if own.lengths else []
    return " ".join([*words, f"--repeats {own.repeats} --threads {own.threads}"])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence (default: 128 512 2048)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that it runs")
    own = parser.parse_args(argv)
    torch.set_num_threads(own.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Lightning's advice on workers, and what it asks of torch.
    warnings.filterwarnings("ignore", module="lightning|torch")
    shape = Shape(hidden=32, layers=4, vocabulary=16, positions=128) if own.quick else Shape()
    lengths = own.lengths or ([128] if own.quick else [128, 512, 2048])
    found = results(lengths, shape, own.repeats)
    found["command"] = shown(own)
    own.out.mkdir(parents=True, exist_ok=True)
    (own.out / "drop_in_memory.json").write_text(json.dumps(found, indent=1) + "\n")
    (own.out / "drop_in_memory.md").write_text(page(found))
    picture(found).savefig(own.out / "drop_in_memory.png")


if __name__ == "__main__":
    main()
