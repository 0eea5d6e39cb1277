"""One half as an ONNX graph: what is frozen inside, what is trained an input, what a side adapter needs an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hosfl_lightning.device.extra import device_extra, quiet
from hosfl_lightning.device.samples import Samples
from hosfl_lightning.split import SplitError
from hosfl_lightning.split.side import Bottleneck, ladder

#: Every runtime of the last years reads it; attention is then made of plain operators.
OPSET = 18
OUTPUT = "z"


class Graph(nn.Module):
    """``(θ_c, x) → z, h_1, .., h_L``: the half as a function of what it trains.

    Args:
        client: The client's half.
        names: Of what it trains, in order.
    """

    def __init__(self, client: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.client, self.names = client, tuple(names)
        self.bottlenecks: list[Bottleneck] = []

    def forward(self, trained: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Z, and with a side adapter what each bottleneck is given; which one that is stands in ``bottlenecks``."""
        named, side = dict(zip(self.names, trained)), ladder(self.client)
        if side is None:
            return (functional_call(self.client, named, tuple(inputs)),)
        with side.keeping() as kept:
            z = functional_call(self.client, named, tuple(inputs))
        self.__dict__["bottlenecks"] = [bottleneck for bottleneck, _ in kept]
        return (z, *[h for _, h in kept])


def to_onnx(half: Any, trained: Mapping[str, Tensor], samples: Samples) -> tuple[Any, list[Bottleneck]]:
    """The graph of a half, and the bottlenecks whose taps it gives: ``tap_0`` is what the first of them is given.

    Args:
        half: The client's, fp32, in eval mode.
        trained: θ_c by name, in manifest order.
        samples: Of what it takes.

    Returns:
        An ``onnx.ModelProto``; its inputs have the names in ``trained`` and in the half's ``inputs``.

    Raises:
        SplitError: PyTorch's exporter does not take this architecture.
    """
    with device_extra():
        import onnx  # noqa: F401  # torch's exporter would miss it much later
        import onnxscript  # noqa: F401
    graph = Graph(half, [*trained]).eval()
    values = [tensor.detach() for tensor in trained.values()]
    # Sizes that no dimension of a model has, and more than one: those would be taken for its own.
    batch = samples.batch(3, 7, "left")
    inputs = [batch[name] for name in half.inputs]
    sizes = [dict.fromkeys([0] if samples.image else [0, 1], torch.export.Dim.DYNAMIC) for _ in inputs]
    with torch.no_grad(), quiet():
        outputs = graph(values, inputs)
        names = [OUTPUT, *(f"tap_{number}" for number in range(len(outputs) - 1))]
        bottlenecks = graph.bottlenecks
        try:
            program = torch.export.export(
                graph, (values, inputs), strict=False, dynamic_shapes=([{} for _ in values], sizes)
            )
            exported: Any = torch.onnx.export(
                program, (), dynamo=True, opset_version=OPSET, input_names=[*trained, *half.inputs],
                output_names=names, verbose=False, optimize=True,
            )  # fmt: skip
        except Exception as error:  # tracing runs into whatever a model's code does
            raise SplitError(
                f"model: {half.architecture} cannot be exported to ONNX ({_reason(error):.200}); its clients need "
                "PyTorch: hosfl join"
            ) from error
    return exported.model_proto, bottlenecks


def _reason(error: BaseException) -> str:
    """The first line of what was at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
