"""A client's half as files that a device without PyTorch runs."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from hosfl_client.manifest import Input, Manifest, Rung
from hosfl_lightning.clients.head import of_half
from hosfl_lightning.data.tokenization import pad_token_id
from hosfl_lightning.device.figures import measure
from hosfl_lightning.device.graph import OPSET, OUTPUT, to_onnx
from hosfl_lightning.device.head import described, head_of
from hosfl_lightning.device.quantize import quantized
from hosfl_lightning.device.recording import record
from hosfl_lightning.device.samples import Samples
from hosfl_lightning.device.writing import write_graph
from hosfl_lightning.files import discard, write_json, write_whole
from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.causal_lm import SplitCausalLM
from hosfl_lightning.models.checks import positions, vocabulary
from hosfl_lightning.models.halves import HEAD
from hosfl_lightning.models.pretrained import PretrainedError
from hosfl_lightning.split import SplitError
from hosfl_lightning.split.side import Bottleneck
from hosfl_lightning.wire import manifest as entries

Quantization = Literal["none", "int8", "int4"]


def export_client(
    model: SplitModule,
    out: str,
    quantize: Quantization = "none",
    mu: float = 1e-3,
    data: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the client's half of a model, with what it trains as it is now.

    Beside ``phone.onnx`` lie ``phone.json`` (the manifest, written last), ``phone.safetensors`` (what is trained) and,
    of text, ``phone.tokenizer.json``; above 32 MiB the weights are in ``phone.onnx.data``. The written half is then
    run; what was measured is in the manifest, and what a device is to compute again in ``phone.check.safetensors``.

    Args:
        model: The cut model; ``part="client"`` is enough.
        out: Path of the graph, ``*.onnx``.
        quantize: Of the frozen weights: ``none``, ``int8`` or ``int4``. Activations and what is trained stay fp32.
        mu: Smoothing length of the probes that are measured.
        data: What `hosfl_lightning.device.data.data_of` says of a recipe's; None: the device is told nothing of it.

    Returns:
        The manifest.

    Raises:
        ValueError: Such a path or smoothing length cannot be.
        SplitError: The half cannot be exported.
        ImportError: The extra ``device`` is not installed.
    """
    path = Path(out)
    if path.suffix != ".onnx":
        raise ValueError(f"--out: {out} is no path of a graph; give one that ends in .onnx")
    if not 0 < mu < float("inf"):
        raise ValueError(f"--mu must be above 0, got {mu:g}")
    _make(path.parent)
    if not model.client_parameters:
        raise SplitError("model: the client trains nothing, so it takes no part; set lora.client, side or "
                         "client_parameters")  # fmt: skip
    half, below = in_fp32(model)
    trained = {**below, **head_of(model)}
    samples = Samples(model)
    graph, bottlenecks = to_onnx(half, below, samples)
    if quantize != "none":
        graph = quantized(graph, quantize)
    beside = {end: path.with_suffix(end) for end in (".json", ".safetensors", ".tokenizer.json", ".head.safetensors")}
    discard(beside[".json"])  # no manifest while the files are of two exports
    files = write_graph(graph, path)
    del graph
    files[beside[".safetensors"].name] = _write(beside[".safetensors"], save(dict(trained)))
    text = _tokenizer(model)
    if text is not None:
        files[beside[".tokenizer.json"].name] = _write(beside[".tokenizer.json"], text.encode())
    told = _manifest(model, half, trained, bottlenecks, samples.image)
    if model.labels == "client":
        name, (head, arrays) = beside[".head.safetensors"].name, described(model)
        files[name] = _write(beside[".head.safetensors"], save(arrays))
        told = replace(told, head={**head, "file": name})
    written = replace(
        told, graph=path.name, weights=beside[".safetensors"].name, files=files, quantization=quantize, data=data,
        tokenizer=None if text is None else beside[".tokenizer.json"].name,
    )  # fmt: skip
    write_json(beside[".json"], written.as_json(), indent=1)
    recorded = path.with_suffix(".check.safetensors")
    files[recorded.name] = _write(recorded, record(path, trained, samples, mu))
    written = replace(written, check=recorded.name, figures=measure(path, half, below, samples, mu))
    write_json(beside[".json"], written.as_json(), indent=1)
    return written


def _make(folder: Path) -> None:
    """Before minutes of exporting."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"--out: {folder}: {error.strerror}; give a path in a folder that can be written") from error


def in_fp32(model: SplitModule) -> tuple[Any, Mapping[str, Tensor]]:
    """The client's half and what it trains of it, by name; a half of another precision is copied.

    Raises:
        SplitError: What it trains has another precision.
    """
    half: Any = copy.copy(model.client_half.eval())  # of the same tensors, and not compiled
    names = [*of_half(model)]
    for name, parameter in model.client_parameters.items():
        if parameter.dtype != torch.float32:
            raise SplitError(
                f"model.init_args.dtype: {name} is trained in {str(parameter.dtype).removeprefix('torch.')}, an "
                "exported half trains in float32; set it to float32"
            )
    if any(one.is_floating_point() and one.dtype != torch.float32 for one in half.state_dict().values()):
        half = copy.deepcopy(half).float()
    named = dict(half.named_parameters())
    return half, {name: named[name].detach().cpu().contiguous() for name in names}


def _manifest(
    model: SplitModule, half: Any, trained: Mapping[str, Tensor], bottlenecks: list[Bottleneck], image: Any
) -> Manifest:
    """But for what is known of the files."""
    text = image is None
    labels, classes = ("token", vocabulary(half)) if isinstance(model, SplitCausalLM) else ("example", _classes(model))
    inputs = {name: Input(name, "int64", (-1, -1)) for name in half.inputs}
    if not text:
        inputs = {name: Input(name, "float32", (-1, *image)) for name in half.inputs}
    return Manifest(
        graph="", weights="", files={}, tokenizer=None, quantization="none", figures={},
        parameters=tuple(
            (name, tuple(shape), dtype, "" if name.startswith(HEAD) else name)
            for name, shape, dtype in entries(trained)
        ),
        inputs=tuple(inputs.values()), output=OUTPUT, width=half.hidden_size,
        positions=None if text else half.positions,
        side=tuple(rung(number, one, half) for number, one in enumerate(bottlenecks)),
        backbone=model.client_fingerprint(), architecture=half.architecture, cut=half.cut, labels=labels,
        classes=classes, pretrained=Path(model.pretrained).name,
        pad_id=_pad(model, half) if text else None, vocabulary=vocabulary(half) if text else None,
        max_length=positions(half) if text else None, precision="32-true", opset=OPSET,
    )  # fmt: skip


def _classes(model: Any) -> int:
    return int(model.num_labels)


def rung(number: int, bottleneck: Bottleneck, half: nn.Module) -> Rung:
    """Which of the half's parameters a bottleneck has."""
    names = {id(parameter): name for name, parameter in half.named_parameters()}
    return Rung(f"tap_{number}", names[id(bottleneck.down.weight)], names[id(bottleneck.up.weight)], bottleneck.size)


def _tokenizer(model: SplitModule) -> str | None:
    """Of the library ``tokenizers``; None: there is none, or it is one that Python code makes."""
    try:
        found: Any = model.tokenizer()
    except PretrainedError:
        return None
    backend = getattr(found, "backend_tokenizer", None)
    return None if backend is None else str(backend.to_str())


def _pad(model: SplitModule, half: Any) -> int:
    try:
        return pad_token_id(model.tokenizer())  # type: ignore[arg-type]
    except (PretrainedError, ValueError, AttributeError):
        return int(half.config.get_text_config().pad_token_id or 0)


def _write(path: Path, data: bytes) -> str:
    write_whole(path, lambda file: file.write(data))
    return hashlib.sha256(data).hexdigest()
