"""A graph on the disk, its weights in it or beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

from hosfl_lightning.files import discard, write_whole

#: Bytes of weights above which they lie in a file of their own, which is mapped and not read: loading has half the
#: peak. A protocol buffer could hold 2 GB.
LARGEST = 1 << 25
#: Tensors below stay in the graph.
SMALL = 1024
#: Where tensors begin in the file, so that they can be mapped.
ALIGNMENT = 4096


def write_graph(graph: Any, path: Path) -> dict[str, str]:
    """Durably write an ``onnx.ModelProto``, which is used up.

    Returns:
        SHA-256 of the one or two files, by name.
    """
    strip(graph)
    beside = path.with_name(f"{path.name}.data")
    tensors = [one for one in graph.graph.initializer if len(one.raw_data) >= SMALL]
    written = {}
    if sum(len(one.raw_data) for one in tensors) > LARGEST:
        written[beside.name] = _write(beside, lambda file: _move(tensors, file, beside.name))
    else:
        discard(beside)
    written[path.name] = _write(path, lambda file: file.write(graph.SerializeToString()))
    return written


def strip(graph: Any) -> None:
    """Drop what an exporter tells of itself, in place: of every node, in which file of this machine it was made."""
    for part in (graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        for field in ("metadata_props", "doc_string"):
            part.ClearField(field)
    graph.graph.ClearField("value_info")
    del graph.metadata_props[:]


class _Digesting:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.position = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.position += len(data)


def _write(path: Path, fill: Any) -> str:
    digests = []

    def write(file: BinaryIO) -> None:
        digesting = _Digesting(file)
        fill(digesting)
        digests.append(digesting.digest.hexdigest())

    write_whole(path, write)
    return digests[0]


def _move(tensors: list[Any], file: _Digesting, name: str) -> None:
    """The tensors' bytes into the file; the graph says where they are."""
    from onnx import TensorProto
    from onnx.external_data_helper import set_external_data

    for tensor in tensors:
        file.write(bytes(-file.position % ALIGNMENT))
        data, start = tensor.raw_data, file.position
        file.write(data)
        set_external_data(tensor, name, start, len(data))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
