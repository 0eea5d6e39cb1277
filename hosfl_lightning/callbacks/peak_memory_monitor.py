"""PeakMemoryMonitor: what one client needs, beside a plain forward of the same batch, and what the server needs.

What a client's round costs in arithmetic and time is measured in the same rehearsal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from typing_extensions import override

from hosfl_lightning.callbacks.drop_in.step_memory import StepMemory
from hosfl_lightning.callbacks.rehearsal import Around, Rehearsal
from hosfl_lightning.memory import MemoryMeter, plain_forward_peak, storage_bytes
from hosfl_lightning.optim.compiled import eager
from hosfl_lightning.server.server import loss_of
from hosfl_lightning.split import run
from hosfl_lightning.wire import Message, MiddleOutput, Multiplier, Update


class PeakMemoryMonitor(Callback):
    """Measures the memory of each role once, before the first round, on *one* client's batch.

    Static bytes (parameters, buffers, optimizer state) are exact sums; working bytes are the peak of live tensor
    storage while the client answers, followed operation by operation. It answers the real server in the method's own
    conversation, and everything is put back, so measured and unmeasured runs are the same run. Frames on their way are
    nobody's. On CUDA the allocator's own peak is logged as well.

    | logged key | meaning | unit |
    |---|---|---|
    | ``memory/client_static_bytes`` | client parameters, buffers, optimizer state | bytes |
    | ``memory/client_forward_bytes`` | parameters, buffers + a plain no-grad forward of what it holds | bytes |
    | ``memory/client_peak_bytes`` | static + the highest of forward, answer to λ, update | bytes |
    | ``memory/client_waiting_bytes`` | held while waiting for λ, beside the static bytes and the batch | bytes |
    | ``memory/server_static_bytes`` | server parameters and buffers | bytes |
    | ``memory/server_peak_bytes`` | static + forward and backward of one client's smashed data | bytes |
    | ``memory/cuda_peak_bytes`` | ``torch.cuda.max_memory_allocated`` of the round, joint batch | bytes |
    | ``compute/client_forwards`` | FLOPs of one client's round over those of one forward of the client half | – |
    | ``time/client_seconds`` | one client's round, without the server | seconds |

    FLOPs are those of matrix products, convolutions and attention. Of a method whose rounds differ, memory is that of
    round 0, arithmetic and time are the mean.

    In a plain Trainer, of each rank's own process, once, the run's second optimizer step (the first one makes the
    optimizer's state), beside ``memory/cuda_peak_bytes`` of each batch:

    | logged key | meaning | unit |
    |---|---|---|
    | ``memory/static_bytes`` | parameters, buffers, optimizer state | bytes |
    | ``memory/step_working_bytes`` | peak of what the step makes: activations, graph, gradients | bytes |
    | ``memory/lower_working_bytes`` | with `HybridOrder`: of what is done below the cut for λ, beside z and λ | bytes |
    """

    def __init__(self) -> None:
        self.report: dict[str, float] = {}
        self._step: StepMemory | None = None

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure, then log once; a plain Trainer's step is measured as it runs."""
        if isinstance(trainer, Trainer):
            self._step = StepMemory(trainer)
            return
        if not trainer.fleet.simulated:
            return  # no client is here
        with eager(pl_module.compiles):  # a graph's own buffers and products pass the meters by
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        rehearsal = Rehearsal(trainer)
        batch = trainer.to_device(rehearsal.cohort.batch)
        self.report = {**measure_client(rehearsal, batch)}
        with trainer.fabric.autocast():
            self.report |= measure_server(pl_module, batch, trainer.algorithm.server_order)
        self.report |= measure_compute(rehearsal, pl_module.client_half, batch)
        for name, value in self.report.items():
            kind = {"client_forwards": "compute", "client_seconds": "time"}.get(name, "memory")
            pl_module.log(f"{kind}/{name}", value)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A round's peak begins at its start."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        if self._step is not None:
            self._step.begin_batch(trainer)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step's report, and the allocator's peak, where there is one."""
        if self._step is not None and self._step.end_batch(trainer, pl_module):
            self.report = self._step.report
            for name, value in self.report.items():
                pl_module.log(f"memory/{name}", value)
        if trainer.strategy.root_device.type == "cuda":
            pl_module.log("memory/cuda_peak_bytes", torch.cuda.max_memory_allocated(trainer.strategy.root_device))

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Meter no longer, whatever happened in the step."""
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The run is over."""
        if self._step is not None:
            self._step.stop()
            self._step = None


def measure_client(rehearsal: Rehearsal, batch: dict[str, Tensor]) -> dict[str, int]:
    """Inference, then the client's own round on the same batch; everything ends as it was."""
    client = rehearsal.endpoint.client
    head = getattr(rehearsal.endpoint, "head", None)  # where the labels stay with the client
    held = [client.half] if head is None else [client.half, head.head]
    static = storage_bytes([t for part in held for t in (*part.parameters(), *part.buffers())])
    with rehearsal.autocast():
        forward = plain_forward_peak(lambda: run(client.half, batch))
    meter, waiting = MemoryMeter(), 0

    @contextmanager
    def metered(request: Message) -> Iterator[None]:
        nonlocal waiting
        with meter, meter.role("client"):
            if isinstance(request, Multiplier | MiddleOutput | Update):
                waiting = max(waiting, meter.live("client"))
            yield

    with rehearsal.undone():
        rehearsal.round()  # so that the optimizer's state is there while the next one is measured
        state = storage_bytes(rehearsal.endpoint.slots(rehearsal.cohort.clients[0]))
        rehearsal.round(metered)
    return {
        "client_static_bytes": static + state,
        "client_forward_bytes": static + forward,
        "client_peak_bytes": static + state + meter.peak("client"),
        "client_waiting_bytes": waiting,
    }


def measure_compute(rehearsal: Rehearsal, half: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """FLOPs of a client's round in forwards of the client half, and its seconds; everything ends as it was.

    Args:
        rehearsal: Of the client.
        half: The client half.
        batch: Of the client, on its device.
    """
    # Not the optimizer's: a frozen client may have nothing to train.
    device, rounds, seconds = next(iter(batch.values())).device, 0.0, 0.0
    with torch.no_grad(), rehearsal.autocast():
        forward = flops_of(lambda: run(half, batch), device)
    for round, share in rehearsal.algorithm.kinds_of_round():
        with rehearsal.undone():
            rehearsal.round(counted(tally := [0], device), round)
        with rehearsal.undone():
            rehearsal.round(timed(clock := [0.0], device), round)
        rounds, seconds = rounds + share * tally[0], seconds + share * clock[0]
    return {"client_forwards": rounds / forward if forward else 0.0, "client_seconds": seconds}


def counted(tally: list[int], device: torch.device) -> Around:
    """Adds the FLOPs of a client's answers to ``tally[0]``."""

    @contextmanager
    def around(request: Message) -> Iterator[None]:
        with flop_counter(device) as counter:
            yield
        tally[0] += counter.get_total_flops()

    return around


def timed(clock: list[float], device: torch.device) -> Around:
    """Adds the seconds of a client's answers to ``clock[0]``."""

    @contextmanager
    def around(request: Message) -> Iterator[None]:
        synchronize(device)
        began = time.perf_counter()
        yield
        synchronize(device)
        clock[0] += time.perf_counter() - began

    return around


@contextmanager
def flop_counter(device: torch.device) -> Iterator[FlopCounterMode]:
    """Counts matrix products, convolutions and attention."""
    # The CPU's fused attention is not in torch's table; as matrix products it is counted.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with attention, FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        yield counter


def flops_of(work: Callable[[], object], device: torch.device) -> int:
    """Of matrix products, convolutions and attention."""
    with flop_counter(device) as counter:
        work()
    return counter.get_total_flops()


def backward_of_convolution(
    gradient: list[int], inputs: list[int], weights: list[int], *rest: Any, out_shape: Any = None
) -> int:
    """A forward for each gradient that is asked for; torch 2.13 counts the weights' as if there were no groups."""
    transposed, asked = rest[4], rest[7]
    return (asked[0] + asked[1]) * conv_flop_count(inputs, weights, gradient, transposed)


CORRECTED = {torch.ops.aten.convolution_backward: backward_of_convolution}


def synchronize(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_server(module: Any, batch: dict[str, Tensor], order: str = "first") -> dict[str, int]:
    """Forward and, where it trains by backprop, backward of one client's smashed data; gradients are dropped again."""
    if order == "none":
        return {"server_static_bytes": 0, "server_peak_bytes": 0}
    static = storage_bytes([*module.server_half.parameters(), *module.server_half.buffers()])
    with torch.no_grad():
        z = run(module.client_half, batch)
    backprop = order == "first"
    z.requires_grad_(backprop)
    with torch.enable_grad() if backprop else torch.no_grad(), MemoryMeter() as meter, meter.role("server"):
        if module.labels == "client":  # λ₂ comes from elsewhere
            output = module.server_half(z, batch["attention_mask"])
            given: Tensor | None = torch.zeros_like(output)
        else:
            smashed = {"z": z, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
            output, given = loss_of(module.training_step(smashed, 0)), None
        if backprop:
            torch.autograd.backward(output, given)
        peak = meter.peak("server")
    for parameter in module.server_half.parameters():
        parameter.grad = None
    return {"server_static_bytes": static, "server_peak_bytes": static + peak}
