"""The corpus of the embedded model: the text of the standard library of the Python that runs this.

Every module counts twice: as its source, and as its prose (docstrings, comment blocks and long strings, each a document
of its own), since prose is what the model is later fine-tuned on. No text of an installed package is read.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EOS = 257
LONGEST_WINDOW = 512
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n){3,}", re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """Byte streams (int16, documents separated by ``EOS``) and the SHA-256 of all four."""

    source: np.ndarray
    prose: np.ndarray
    heldout_source: np.ndarray
    heldout_prose: np.ndarray
    sha256: str


def corpus_files(root: Path) -> list[Path]:
    """The library's modules below ``root`` in a fixed order, without tests, tables and files made by the build."""
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [
        path
        for path in files
        if not EXCLUDED_FOLDERS & set(path.parts) and not path.parts[0].startswith(("config-", "_sysconfigdata"))
    ]
    return sorted(kept, key=lambda path: path.as_posix())


def prose_of(text: str) -> list[str]:
    """Docstrings, other long strings that read like sentences, and comment blocks of one module, in order."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 300:
            found.append(inspect.cleandoc(node.value))
    found += [re.sub(r"^[ \t]*# ?", "", block, flags=re.MULTILINE).strip() for block in COMMENT_BLOCK.findall(text)]
    long_enough = (document for document in dict.fromkeys(found) if len(document) >= 40)
    return [document for document in long_enough if document.count(" ") > len(document) / 20]


def build_corpus(root: Path) -> Corpus:
    """Read every file of :func:`corpus_files`; one in twenty, chosen by the hash of its name, is held out whole.

    Raises:
        ValueError: if a stream is shorter than one window, as below a folder that is no standard library.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("source", "prose", "heldout_source", "heldout_prose")}
    for path in corpus_files(root):
        try:
            text = (root / path).read_text(encoding="utf-8")
            prose = prose_of(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        heldout = "heldout_" if hashlib.sha256(path.as_posix().encode()).digest()[0] % 20 == 0 else ""
        # The manual's topics are one table of escaped strings: only the strings themselves are worth reading.
        for kind, documents in (("source", [text] if "pydoc_data" not in path.parts else []), ("prose", prose)):
            for document in documents:
                data = np.frombuffer(document.encode(), dtype=np.uint8).astype(np.int16)
                parts[heldout + kind] += [data, np.array([EOS], dtype=np.int16)]
    streams = {name: np.concatenate([np.zeros(0, np.int16), *arrays]) for name, arrays in parts.items()}
    if short := [name for name, stream in streams.items() if len(stream) <= LONGEST_WINDOW]:
        raise ValueError(f"--stdlib: too little text below {root} for {short}; give the folder of the standard library")
    digest = hashlib.sha256()
    for stream in streams.values():
        digest.update(stream.astype("<i2").tobytes())
    return Corpus(**streams, sha256=digest.hexdigest())
