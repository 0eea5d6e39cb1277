"""What a device has to learn from: the records of its own file, encoded as the clients of the run encode theirs."""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from hosfl_client.wire.coded import IGNORE_INDEX

KINDS = ("blocks", "labelled", "prompted", "images")
#: Classes at most: a label travels in 32 bits.
CLASSES = 1 << 31
_SLOT = "{text}"
_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")


class DataError(ValueError):
    """The device's data cannot be used; says which setting mends it."""


class Example(NamedTuple):
    """One example.

    Attributes:
        values: Token ids ``(T,)`` int64, or an image ``(C, H, W)`` uint8.
        labels: ``(T,)`` int64 with -100 where no loss is taken, or one class, ``()``.
    """

    values: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]


@dataclass(frozen=True)
class DataSettings:
    """What a recipe says of the data, as the exported manifest carries it.

    Attributes:
        kind: ``blocks`` of running text, ``labelled`` texts of a classifier, ``prompted`` texts with a word for each
            class, or ``images``.
        batch_size: Examples a round; who holds fewer uses all.
        seed: Of the order of the examples.
        pad: Token at padding.
        eos: Token between documents; None: there is none.
        sequence_length: Of blocks.
        max_length: Most tokens of a text.
        prompt: With ``{text}``.
        label_words: A word for each class.
        label_names: The names of the classes by index; None: labels are indices.
        text_field: Of a record.
        label_field: Of a record.
        mean: Of pixels in [0, 1], one number or one a channel.
        std: Likewise.
        channels: 1 or 3.
    """

    kind: str
    batch_size: int = 4
    seed: int = 0
    pad: int = 0
    eos: int | None = None
    sequence_length: int = 128
    max_length: int = 128
    prompt: str = ""
    label_words: list[str] = field(default_factory=list)
    label_names: list[str] | None = None
    text_field: str = "text"
    label_field: str = "label"
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.5])
    channels: int = 3

    @classmethod
    def of(cls, told: Mapping[str, Any] | None, **own: Any) -> DataSettings:
        """From a manifest's ``data``, and what the user says in its place (None: nothing).

        Raises:
            DataError: The manifest says nothing of the data, or what is not known here.
        """
        if not told or told.get("kind") not in KINDS:
            raise DataError(
                f"--half: its manifest tells of no data that this client reads ({', '.join(KINDS)}); export it with a "
                "recipe whose data is TextData, DocstringData, ClassificationData or ImageData"
            )
        known = {one.name for one in fields(cls)}
        if unknown := sorted(told.keys() - known):
            raise DataError(f"--half: its manifest's data has {unknown[0]!r}, which this version does not know")
        for name, value in told.items():
            if not _TAKES[name](value):
                raise DataError(f"--half: its manifest's data has {name} = {value!r:.80}; export it again")
        settings = cls(**{**told, **{name: value for name, value in own.items() if value is not None}})
        for name in ("batch_size", "sequence_length", "max_length"):
            value = getattr(settings, name)
            if type(value) is not int or value < 1:
                raise DataError(f"--{name.replace('_', '-')} must be an integer >= 1, got {value!r}")
        return settings


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(one) in (int, float) and abs(one) < 1e9 for one in value)


#: What each field of a manifest's data may be.
_TAKES: dict[str, Callable[[Any], bool]] = {
    "kind": _is_text, **dict.fromkeys(("batch_size", "seed", "pad", "sequence_length", "max_length"), _is_count),
    "eos": lambda value: value is None or _is_count(value), "prompt": _is_text, "label_words": _are_texts,
    "label_names": lambda value: value is None or _are_texts(value), "text_field": _is_text, "label_field": _is_text,
    "mean": _are_numbers, "std": _are_numbers, "channels": lambda value: value in (1, 3),
}  # fmt: skip


def read_examples(path: str | Path, settings: DataSettings, tokenizer: Any) -> list[Example]:
    """The examples of a file: .jsonl, .csv or .txt; of images .npz with ``images`` and ``labels``.

    Args:
        path: The file.
        settings: As the manifest and the user say.
        tokenizer: A `hosfl_client.text.Text`; None for images.

    Raises:
        DataError: The file is not there, cannot be read, or lacks what is asked of it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"--data: there is no file {path}")
    if tokenizer is None and settings.kind != "images":
        raise DataError("--half: it was exported without a tokenizer, so it reads no text; export it with its own")
    if settings.kind == "images":
        found = _images(path, settings)
    elif settings.kind == "blocks":
        stream = tokenizer.stream(_documents(path, settings), settings.eos)
        size = settings.sequence_length
        found = [Example(row, row) for row in stream[: len(stream) // size * size].reshape(-1, size)]
        if not found:
            raise DataError(f"--data: {path} has {len(stream)} tokens, too few for a block of {size}; give more text")
    else:
        texts, labels = _labelled(path, settings)
        if settings.kind == "labelled":
            rows = tokenizer.truncated(texts, settings.max_length)
            found = [Example(row, np.asarray(label, np.int64)) for row, label in zip(rows, labels)]
        else:
            found = _prompted(texts, labels, settings, tokenizer)
    if not found:
        raise DataError(f"--data: {path} holds no example")
    return found


def check_examples(examples: Sequence[Example], manifest: Any, settings: DataSettings) -> None:
    """Refuse what the half cannot take, before it is connected.

    Raises:
        DataError: An image of another size, a token without an embedding (that of padding too), a row without tokens
            or positions, an unknown class.
    """
    if settings.kind == "images":
        size = tuple(manifest.inputs[0].shape[2:])
        if wrong := {one.values.shape[1:] for one in examples} - {size}:
            raise DataError(f"--data: images of {wrong.pop()} pixels, the half takes {size}; resize them")
    else:
        _check_tokens(examples, manifest, settings.pad)
    if manifest.labels == ("example" if settings.kind in ("blocks", "prompted") else "token"):
        raise DataError(f"--half: its data is {settings.kind}, its model has labels of another kind; export it anew")
    lowest = 0 if manifest.labels == "example" else IGNORE_INDEX
    for one in examples:
        for label in (int(one.labels.min(initial=0)), int(one.labels.max(initial=0))):
            if not lowest <= label < manifest.classes:
                raise DataError(f"--data: label {label} is not in 0..{manifest.classes - 1}")


def _check_tokens(examples: Sequence[Example], manifest: Any, pad: int) -> None:
    lengths = {len(one.values) for one in examples}
    if 0 in lengths:
        raise DataError("--data: a text has no token that its tokenizer knows; take it out")
    most = max(int(one.values.max()) for one in examples)
    most = max(most, pad) if len(lengths) > 1 else most
    if manifest.vocabulary is not None and most >= manifest.vocabulary:
        raise DataError(f"--half: its tokenizer makes token {most}, it embeds {manifest.vocabulary}; export anew")
    if manifest.max_length is not None and max(lengths) > manifest.max_length:
        raise DataError(f"--data: a row of {max(lengths)} tokens, the half has {manifest.max_length} positions; export "
                        "it with a shorter sequence_length or max_length")  # fmt: skip


def _records(path: Path, running: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Place and fields of each record; running text would do as well."""
    if path.suffix not in (".csv", ".jsonl", ".ndjson"):
        kinds = ".txt, .md, .jsonl or .csv" if running else ".jsonl or .csv, with a text and a label a record"
        raise DataError(f"--data: {path} must be {kinds}")
    text = _decoded(path)
    if path.suffix == ".csv":
        if not text.strip():
            raise DataError(f"--data: {path} is empty; its first line names the fields")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            header, *rows = [row for row in reader if row]
        except (csv.Error, ValueError) as error:
            raise DataError(f"--data: {path} line {reader.line_num}: not valid CSV ({error})") from error
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                raise DataError(f"--data: {path} record {number} has {len(row)} cells, the header {len(header)}")
        return [(f"{path} record {i}", dict(zip(map(str.strip, header), row))) for i, row in enumerate(rows, 1)]
    found = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"--data: {path} line {number}: not valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"--data: {path} line {number} must be a JSON object with named fields")
            found.append((f"{path} line {number}", record))
    return found


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--data: {path} is no UTF-8 ({error}); write it as that") from error


def _field(where: str, record: dict[str, Any], name: str, setting: str) -> Any:
    value = record.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"--data: {where} has no {name!r}, only {', '.join(record)}; set {setting}, or mend the record")
    return value


def _text(where: str, record: dict[str, Any], settings: DataSettings) -> str:
    value = _field(where, record, settings.text_field, "--text-field")
    if not isinstance(value, str):
        raise DataError(f"--data: {where}: {settings.text_field!r} must be a text, not {value!r:.60}")
    return value


def _documents(path: Path, settings: DataSettings) -> list[str]:
    if path.suffix in (".txt", ".text", ".md", ".rst", ".py"):
        return [_decoded(path)]
    return [_text(where, record, settings) for where, record in _records(path, running=True)]


def _labelled(path: Path, settings: DataSettings) -> tuple[list[str], list[int]]:
    records = _records(path)
    names = {_whole(name): index for index, name in enumerate(settings.label_names or ())}
    count = len(settings.label_words) or len(names) or CLASSES
    labels = []
    for where, record in records:
        given = _whole(_field(where, record, settings.label_field, "--label-field"))
        if given in names:
            labels.append(names[given])
        elif _WHOLE.fullmatch(given) and not any(map(_WHOLE.fullmatch, names)):
            labels.append(int(given))
        else:
            known = ", ".join(names) or "no names: classes count from 0"
            raise DataError(f"--data: {where}: label {given!r} is none of the exported ones ({known})")
        if not 0 <= labels[-1] < count:
            raise DataError(f"--data: {where}: label {labels[-1]} is not in 0..{count - 1}")
    return [_text(where, record, settings) for where, record in records], labels


def _whole(value: Any) -> str:
    """A label as a text that is the same however a file writes it: 1, 1.0 and "1"."""
    text = str(value).strip()
    return str(int(text.split(".")[0])) if _WHOLE.fullmatch(text) else text


def _prompted(texts: list[str], labels: list[int], settings: DataSettings, tokenizer: Any) -> list[Example]:
    """``[prompt(text), word(label)]``, the loss on the word's tokens; a text that is too long loses its end."""
    start = tokenizer.leading()

    def encode(texts: Sequence[str], words: Sequence[str]) -> list[list[int]]:
        full = [settings.prompt.replace(_SLOT, text) + word for text, word in zip(texts, words)]
        return [[*start, *ids] for ids in tokenizer.plain(full)]

    longest = max(settings.label_words, key=lambda word: len(encode([""], [word])[0]))

    def shortened(text: str) -> str:
        def length(count: int) -> int:
            return len(encode([text[:count]], [longest])[0])

        if length(len(text)) <= settings.max_length:
            return text
        kept = bisect_right(range(len(text)), settings.max_length, key=length) - 1
        while kept > 0 and length(kept) > settings.max_length:  # a longer text may have fewer tokens
            kept -= 1
        return text[:kept]

    texts = [shortened(text) for text in texts]
    words = [settings.label_words[label] for label in labels]
    found = []
    for asked, answered, word in zip(encode(texts, [""] * len(texts)), encode(texts, words), words):
        if answered[: len(asked)] != asked or len(answered) == len(asked):
            raise DataError(f"--half: its label word {word!r} merges with the end of its prompt; export another")
        row = np.asarray(answered, np.int64)
        found.append(Example(row, np.where(np.arange(len(row)) < len(asked), IGNORE_INDEX, row)))
    return found


def _images(path: Path, settings: DataSettings) -> list[Example]:
    """``images (n, H, W)`` or ``(n, C, H, W)`` uint8 and ``labels (n,)`` of a .npz file; nothing in it is executed."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
            images, labels = np.asarray(held["images"]), np.asarray(held["labels"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
        raise DataError(f"--data: {path} must be a .npz with the arrays images and labels ({error})") from error
    images = images[:, None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, settings.channels):
        raise DataError(
            f"--data: {path}: images must be uint8 (n, H, W) or (n, {settings.channels}, H, W), got {images.dtype} "
            f"{images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"--data: {path}: labels must be integers ({len(images)},), got {labels.dtype} {labels.shape}")
    return [Example(image, label) for image, label in zip(images, labels.astype(np.int64))]
