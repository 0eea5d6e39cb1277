"""A device that is measured: moments and peaks on it, and models, clients and batches of some sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.mezo import LR
from hosfl_lightning.clients import ForwardOnlyClient
from hosfl_lightning.memory import MemoryMeter
from hosfl_lightning.optim import SGD, ZerothOrder
from hosfl_lightning.split import Lora, LoraHalf, add_lora, split

PROBES = 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Size(NamedTuple):
    """Of a model, of its batches and of a direction, and how many pairs are timed."""

    models: dict[str, dict[str, Any]]
    batches: tuple[tuple[int, int], ...]
    numels: tuple[int, ...]
    pairs: int


def opt(hidden: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """Of `OPTConfig`."""
    return {"hidden_size": hidden, "word_embed_proj_dim": hidden, "num_hidden_layers": layers, "ffn_dim": 4 * hidden,
            "num_attention_heads": heads, "vocab_size": vocabulary, "max_position_embeddings": 2048}  # fmt: skip


REAL = Size(
    {"OPT-125M": opt(768, 12, 12, 50272), "OPT-1.3B": opt(2048, 24, 32, 50272)},
    ((8, 512), (1, 64)), (1, 127, 4096, 10**6 + 1, 10**8 + 7), 10,
)  # fmt: skip
TINY = Size({"tiny": opt(32, 3, 4, 128)}, ((2, 8), (1, 4)), (1, 127, 4097), 2)


class Bench:
    """A device and the sizes that are measured on it."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.size, self.cuda = size, device.type == "cuda"
        self.device = torch.device("cuda", device.index or 0) if self.cuda else device
        if self.cuda:
            torch.cuda.set_device(self.device)

    def stamp(self) -> Any:
        """A moment in the work of the device."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, began: Any, ended: Any) -> float:
        """Seconds, after `wait`."""
        return float(began.elapsed_time(ended)) / 1e3 if self.cuda else ended - began

    def wait(self) -> None:
        """Until the device has done all."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def ratio(self, ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
        """(median of ``ours / theirs``, median seconds of ``theirs``); the first two pairs warm up."""
        marks = []
        for _ in range(self.size.pairs + 2):
            began = self.stamp()
            ours()
            middle = self.stamp()
            theirs()
            marks.append((began, middle, self.stamp()))
        return self.median(marks[2:])

    def median(self, marks: list[tuple[Any, Any, Any]]) -> tuple[float, float]:
        """As `ratio`, of moments before, between and after."""
        self.wait()
        times = [(self.between(a, b), self.between(b, c)) for a, b, c in marks]
        return statistics.median(a / b for a, b in times), statistics.median(b for _, b in times)

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Bytes that are made while it is open, at their most, in the list when it closes."""
        found: list[int] = []
        if self.cuda:
            self.wait()
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            yield found
            self.wait()
            found.append(torch.cuda.max_memory_allocated(self.device) - before)
        else:
            with MemoryMeter() as meter, meter.role("all"):
                yield found
            found.append(meter.peak("all"))

    def model(self, name: str, dtype: torch.dtype, full: bool) -> nn.Module:
        """The whole, with LoRA on q_proj and v_proj of all layers or trained in full."""
        config = OPTConfig(**self.size.models[name], dropout=0.0, tie_word_embeddings=False)
        with self.device:
            whole: Any = OPTForCausalLM(config)
        whole.to(dtype).eval()
        half = LoraHalf()
        return whole if full else add_lora(whole, self.cut(name), Lora(half, half), head=False).get_base_model()

    def cut(self, name: str) -> int:
        """A third of the layers."""
        return self.size.models[name]["num_hidden_layers"] // 3

    def half(self, name: str, dtype: torch.dtype, full: bool) -> nn.Module:
        """The client's."""
        torch.manual_seed(0)
        whole: Any = self.model(name, dtype, full)
        return split(whole, self.cut(name), check=False)[0]

    def client(self, half: nn.Module, probe_batch: Any = 1) -> ForwardOnlyClient:
        """Of such a half."""
        trained = [(n, p) for n, p in half.named_parameters() if p.requires_grad]
        optimizer = ZerothOrder(trained, SGD(lr=LR), module=half, probes=PROBES)
        return ForwardOnlyClient(half, optimizer, probe_batch)

    def batch(self, shape: tuple[int, int], name: str) -> dict[str, Tensor]:
        """Tokens, none of them padding."""
        ids = torch.randint(0, self.size.models[name]["vocab_size"], shape, device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def grid(self, *kinds: bool) -> Iterator[tuple[str, str, str, torch.dtype, bool]]:
        """(words, model, name of dtype, dtype, full) of each."""
        for (name, (words, dtype)), full in product(product(self.size.models, DTYPES.items()), kinds):
            yield f"{name}, {words}, {'full' if full else 'LoRA'}", name, words, dtype, full
