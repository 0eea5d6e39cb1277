"""What lies beside an exported half: ``phone.json``, which says all that the graph does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = "hosfl-half/2"
DTYPES = ("float32", "int64")
LABELS = ("token", "example")
#: Bytes that are read at once.
PIECE = 1 << 20


class HalfError(ValueError):
    """An exported half that cannot be used; the message names the file and the fix."""


@dataclass(frozen=True)
class Input:
    """What the graph takes of a batch.

    Attributes:
        name: Of the batch, and of the graph's input.
        dtype: ``float32`` or ``int64``.
        shape: -1 where any size goes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rung:
    r"""One bottleneck of a side adapter, ``q = up(pool(GELU(down(norm(h)))))``, which is in z already.

    ``norm`` is a layer norm over channels without weights, eps 1e-5; GELU is the one with erf; none has a bias. h is
    ``(B, S, d)``, ``(B, d)`` or a map ``(B, d, H, W)``, q has z's shape.

    Attributes:
        tap: The graph's output that is h.
        down: Parameter, ``(width, d)``, or ``(width, d, kernel, kernel)`` of a convolution with zeros around the map.
        up: Parameter, ``(channels of z, width)``.
        pooled: Height and width to which a map is averaged (adaptively); None: it has z's already.
    """

    tap: str
    down: str
    up: str
    pooled: tuple[int, int] | None = None


@dataclass(frozen=True)
class Manifest:
    """Of one exported half; all files are in its folder.

    Attributes:
        graph: File of the ONNX graph.
        weights: Safetensors file of the trained tensors at the start.
        files: SHA-256 of every file, by its name.
        parameters: ``[name, shape, dtype, graph input]`` of what is trained, in the order that numbers the directions;
            the first three are the entries of ``Terms.manifest``. A head's come last, and have no graph input: ``""``.
        inputs: What the graph takes of a batch, in its order.
        output: The graph's output z, ``(B, S, width)`` fp32.
        width: Of z.
        positions: S where it is always the same, of images; None: tokens.
        side: The side adapter's bottlenecks, from the lowest layer up; empty: there is none.
        backbone: As ``Terms.backbone``.
        architecture: Of the whole model.
        cut: Layers in the half.
        labels: ``token``: one a position (a causal LM), or ``example``.
        classes: How many labels there are; tokens, of a causal LM.
        pretrained: What was exported, for people.
        tokenizer: File for the library ``tokenizers``; None: no text, or none that it reads.
        pad_id: Token that fills a batch; None: no text.
        vocabulary: Tokens that it embeds; None: no text.
        max_length: Longest row; None: any.
        precision: As ``Terms.precision``.
        opset: Of the graph.
        quantization: ``none``, ``int8`` or ``int4``: of the frozen weights, not of what is trained.
        head: Of a client that keeps its labels: ``file``, of the arrays that are not trained, and how they are used, as
            `hosfl_client.head_file` reads it; None: the server has the labels.
        check: File of what was recorded on export, for `hosfl_client.check`; None: nothing.
        data: Of a recipe's data what makes its batches: `hosfl_client.examples.DataSettings`; None: not known.
        figures: What was measured on export, for people.
        format: Version of these fields.
    """

    graph: str
    weights: str
    files: Mapping[str, str]
    parameters: tuple[tuple[str, tuple[int, ...], str, str], ...]
    inputs: tuple[Input, ...]
    output: str
    width: int
    positions: int | None
    side: tuple[Rung, ...]
    backbone: str
    architecture: str
    cut: int
    labels: str
    classes: int
    pretrained: str
    tokenizer: str | None
    pad_id: int | None
    vocabulary: int | None
    max_length: int | None
    precision: str
    opset: int
    quantization: str
    figures: Mapping[str, Any]
    head: Mapping[str, Any] | None = None
    check: str | None = None
    data: Mapping[str, Any] | None = None
    format: str = FORMAT

    @property
    def terms(self) -> list[list[Any]]:
        """``[name, shape, dtype]`` of what is trained, as ``Terms.manifest`` has it."""
        return [[name, [*shape], dtype] for name, shape, dtype, _ in self.parameters]

    @property
    def of_head(self) -> list[str]:
        """Of what is trained, the names of what the graph does not take."""
        return [name for name, _, _, given in self.parameters if not given]

    @property
    def taps(self) -> tuple[str, ...]:
        """The graph's outputs that a side adapter needs, from the lowest layer up."""
        return tuple(rung.tap for rung in self.side)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read ``phone.json``, or the one beside ``phone.onnx``.

        Raises:
            HalfError: There is none, or it is of another version or damaged.
        """
        if not Path(path).name:
            raise HalfError(f"--half: {path} is a folder; give the .onnx file in it")
        path = Path(path).with_suffix(".json")
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise HalfError(
                f"--half: {path}: no manifest of an exported half ({reason}); copy all files that hosfl export-client "
                "wrote into one folder"
            ) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            said = found.get("format") if isinstance(found, dict) else None
            raise HalfError(f"{path}: format is {said!r:.80}, this client reads {FORMAT}; export the half again")
        try:
            return _read(cls, found)
        except (KeyError, TypeError, ValueError) as error:
            raise HalfError(f"{path} is damaged ({error!r:.200}); export the half again") from error

    def check_files(self, folder: Path) -> None:
        """Compare every file with its SHA-256.

        Raises:
            HalfError: One is missing or another.
        """
        for name, digest in self.files.items():
            if sha256(folder / name) != digest:
                raise HalfError(f"{folder / name} is not the file that was exported; copy all files of the half again")


def sha256(path: Path) -> str:
    """Of a file, a piece at a time.

    Raises:
        HalfError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise HalfError(f"{path}: {error.strerror}; copy all files of the half into one folder") from error
    return digest.hexdigest()


_OPTIONAL_COUNTS = ("positions", "pad_id", "vocabulary", "max_length")
_COUNTS = ("width", "cut", "classes", "opset")
_TEXTS = ("output", "backbone", "architecture", "pretrained", "precision", "quantization")


def _read(cls: type[Manifest], found: dict[str, Any]) -> Manifest:
    known = {field.name for field in fields(cls)}
    if found.keys() != known:
        raise ValueError(f"fields {sorted(found.keys() ^ known)}")
    held = dict(found)
    if not isinstance(held["files"], dict):
        raise TypeError("files is no dict")
    for name in ("graph", "weights", *([] if held["tokenizer"] is None else ["tokenizer"])):
        if held[name] not in held["files"]:
            raise ValueError(f"{name} is not among files")
    for name in held["files"]:
        if Path(_text(name)).name != name or name in ("", ".", ".."):
            raise ValueError(f"the file name {name!r} leads elsewhere")
    for name in _COUNTS:
        _count(held[name])
    for name in _OPTIONAL_COUNTS:
        if held[name] is not None:
            _count(held[name])
    for text in (*(held[name] for name in _TEXTS), *held["files"].values()):
        _text(text)
    held["parameters"] = tuple(
        (_text(name), _shape(shape), _one_of(dtype, ("float32",)), _text(given))
        for name, shape, dtype, given in held["parameters"]
    )
    held["inputs"] = tuple(
        Input(_text(one["name"]), _one_of(one["dtype"], DTYPES), _shape(one["shape"], -1)) for one in held["inputs"]
    )
    held["side"] = tuple(_rung(one, {name for name, *_ in held["parameters"]}) for one in held["side"])
    _one_of(held["labels"], LABELS)
    if held["head"] is not None and held["head"]["file"] not in held["files"]:
        raise ValueError("the head's file is not among files")
    if held["data"] is not None and not isinstance(held["data"], dict):
        raise TypeError("data is no dict")
    if held["check"] is not None and held["check"] not in held["files"]:
        raise ValueError("check is not among files")
    return cls(**held)


def _rung(one: dict[str, Any], parameters: set[str]) -> Rung:
    pooled = one["pooled"]
    if pooled is not None:
        height, width = _shape(pooled, 1)
        pooled = height, width
    return Rung(_text(one["tap"]), _one_of(one["down"], parameters), _one_of(one["up"], parameters), pooled)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    return value


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r:.80} is no count")
    return value


def _shape(value: Any, least: int = 0) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.80} is no shape")
    return tuple(_count(size, least) for size in value)


def _one_of(value: Any, known: Any) -> str:
    if value not in known:
        raise ValueError(f"{value!r:.80} is none of {', '.join(sorted(known))}")
    return _text(value)
