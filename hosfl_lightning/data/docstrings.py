"""Real text that is always there: the docstrings of installed packages, one package per client."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from hosfl_lightning.data import tokenization
from hosfl_lightning.data.cache import cached
from hosfl_lightning.data.checks import check_at_least
from hosfl_lightning.data.federated import FederatedDataModule
from hosfl_lightning.data.tokenization import Example, language_blocks, token_stream

DEFAULT_PACKAGES = (
    "huggingface_hub",
    "jsonargparse",
    "lightning",
    "numpy",
    "peft",
    "torch",
    "torchmetrics",
    "transformers",
)
#: A package's sets, in the order in which its documents are dealt.
PARTS = ("validation", "test", "training")
_BRANCHES = ("body", "orelse", "handlers", "finalbody", "cases")


class DocstringData(FederatedDataModule):
    """Language modelling on docstrings: client k holds those of package k, so the clients differ by nature.

    A package's `.py` files are read, never imported, in the order of a hash of their path, which spreads over its
    subfolders, until there is text enough. Of its distinct docstrings (a docstring seen in an earlier package or file
    counts no more), ordered by a hash of their text, the first are the validation set, the next the test set, the rest
    the client's: no docstring is in two of them. The split does not depend on `seed`, so runs of several seeds share
    one validation set. Documents are joined by eos and cut into blocks of `sequence_length` tokens.

    The blocks are kept in ``~/.cache/hosfl_lightning`` (or the folder in ``HOSFL_CACHE``; where that is empty, nowhere)
    and made anew when a file of a package, the tokenizer, Python or this code is another.

    Args:
        packages: Top-level names of installed packages, a client each. None: eight that this one depends on.
        batch_size: Blocks a client uses a round.
        sequence_length: Tokens per block.
        max_bytes_per_client: Docstring text a client trains on at most, in UTF-8 bytes.
        validation_bytes_per_client: Held-out text of each package for validation.
        test_bytes_per_client: Held-out text of each package for the test set.
        eval_batch_size: Blocks per batch of the held-out loaders.
        tokenizer: Name, folder or tokenizer; None: the model's own.
        seed: Fixes every client's order of blocks.

    Example::

        data = DocstringData(packages=["numpy", "torch"], tokenizer="my-model")
        data.setup("fit")
        data.client_batch(client=0, round=0)["input_ids"].shape  # (4, 128)
    """

    def __init__(
        self,
        packages: list[str] | None = None,
        batch_size: int = 4,
        sequence_length: int = 128,
        max_bytes_per_client: int = 200_000,
        validation_bytes_per_client: int = 8_000,
        test_bytes_per_client: int = 8_000,
        eval_batch_size: int = 32,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, tokenizer, seed)
        check_at_least(2, sequence_length=sequence_length)
        check_at_least(
            1,
            max_bytes_per_client=max_bytes_per_client,
            validation_bytes_per_client=validation_bytes_per_client,
            test_bytes_per_client=test_bytes_per_client,
        )
        self.packages = list(DEFAULT_PACKAGES if packages is None else packages)
        if not self.packages or len(set(self.packages)) < len(self.packages):
            raise ValueError(f"packages={self.packages}: name at least one package, each once")
        self.sequence_length = sequence_length
        self.budgets = (validation_bytes_per_client, test_bytes_per_client, max_bytes_per_client)

    @override
    def setup(self, stage: str) -> None:
        """Collect, split and tokenize the docstrings.

        Raises:
            ModuleNotFoundError: If a package is not installed.
            ValueError: If a package has too little text for one block of each set.
        """
        if self.clients:
            return
        tokenizer = self.resolve_tokenizer()
        settings = f"{self.packages} {self.sequence_length} {self.budgets}"
        told = _tokenizer_key(tokenizer)
        held: Mapping[str, Tensor]
        if told is None:
            held = self._made(tokenizer)
        else:
            name = f"docstrings-{_digest(f'{settings} {told}').hex()}"
            held = cached(name, f"{_code_key()} {_packages_key(self.packages)}", lambda: self._made(tokenizer))
        validation, test, training = ([_examples(held[f"{p}.{part}"]) for p in self.packages] for part in PARTS)
        self.validation_set = [block for blocks in validation for block in blocks]
        self.test_set = [block for blocks in test for block in blocks]
        self.clients = training
        self.client_names = self.packages

    def _made(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """The blocks of every package's sets, ``package.set``: int32, ``(blocks, sequence_length)``."""
        seen: set[str] = set()
        return {
            f"{package}.{part}": torch.stack([torch.as_tensor(block.input_ids) for block in blocks]).to(torch.int32)
            for package in self.packages
            for part, blocks in zip(PARTS, self._blocks(package, seen, tokenizer))
        }

    def _blocks(self, package: str, seen: set[str], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        """The package's validation, test and training blocks."""
        documents = collect_docstrings(package, sum(self.budgets), seen)
        parts = split_documents(documents, self.budgets)
        blocks = [language_blocks(token_stream(part, tokenizer), self.sequence_length) for part in parts]
        if not all(blocks):
            found = sum(len(text.encode()) for text in documents)
            validation, test, _ = self.budgets
            raise ValueError(
                f"packages: {package!r} has {found} bytes of docstrings, too few for blocks of {self.sequence_length} "
                f"tokens out of {validation} bytes of validation text, {test} of test text and the rest for training; "
                "lower these settings or leave the package out"
            )
        return blocks


def collect_docstrings(package: str, max_bytes: int, seen: set[str] | None = None) -> list[str]:
    """Distinct docstrings of a package, indentation removed, from as few files as give `max_bytes`.

    Args:
        package: Top-level name of an installed package; its code is not run.
        max_bytes: Stop after the file that reaches this many UTF-8 bytes.
        seen: Docstrings to leave out; those found are added.

    Raises:
        ModuleNotFoundError: If the package is not installed or has no Python files.
    """
    seen = set() if seen is None else seen
    documents: list[str] = []
    total = 0
    for path in _python_files(package):
        for text in _docstrings(path):
            if text not in seen:
                seen.add(text)
                documents.append(text)
                total += len(text.encode())
        if total >= max_bytes:
            break
    return documents


def split_documents(documents: list[str], budgets: tuple[int, ...]) -> list[list[str]]:
    """Deal distinct documents, by a hash of their text, to sets of at most `budgets` bytes, one set after the other.

    The document that overflows a set is cut there; its rest is used nowhere.
    """
    remaining = iter(sorted(documents, key=_digest))
    parts: list[list[str]] = []
    for budget in budgets:
        parts.append([])
        while budget > 0 and (text := next(remaining, None)) is not None:
            content = text.encode()
            parts[-1].append(content[:budget].decode(errors="ignore"))
            budget -= len(content)
    return parts


def _python_files(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    roots = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    # By the hash of the path inside the package: the same on every machine, and spread over the subfolders.
    files = [
        (_digest(path.relative_to(root).as_posix()), path)
        for root in roots
        for folder, _, names in os.walk(root)
        for path in (Path(folder, name) for name in names if name.endswith(".py"))
    ]
    if not files:
        raise ModuleNotFoundError(f"packages: {package!r} is not an installed package with Python files", name=package)
    return [path for _, path in sorted(files)]


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own invalid escapes are none of the user's business
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template or a test case, not a module
            return
    pending: list[ast.AST] = [tree]
    while pending:  # through statements only: ast.walk would visit every expression, at as much time as the parsing
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and _is_utf8(text):
                yield text
        pending += [child for branch in _BRANCHES for child in getattr(node, branch, ())]


def _examples(blocks: Tensor) -> list[Example]:
    return language_blocks(blocks.long().flatten(), blocks.shape[1])


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """All that a tokenizer does, in a word; None: its Python code may do anything."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    return f"{type(tokenizer).__qualname__} {tokenizer.eos_token_id} {_digest(backend.to_str()).hex()}"


def _code_key() -> str:
    """What reads the docstrings and cuts them: Python, the tokenizers' libraries, and the code of these files."""
    own = "".join(Path(file).read_text("utf-8") for file in (__file__, tokenization.__file__))
    return f"{sys.version} {tokenizers.__version__} {transformers.__version__} {_digest(own).hex()}"


def _packages_key(packages: list[str]) -> str:
    """Of every file that may be read: its name, length and time."""
    told = blake2b(digest_size=16)
    for package in packages:
        for path in _python_files(package):
            there = path.stat()
            told.update(f"{package} {path} {there.st_size} {there.st_mtime_ns};".encode())
    return told.hexdigest()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # an escape in the source may spell half of a surrogate pair
        return False
    return True


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
