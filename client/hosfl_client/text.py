"""Texts as token ids, by the tokenizer that was exported with the half."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hosfl_client.examples import DataError


class Text:
    """A tokenizer as the run's PyTorch clients use theirs.

    Args:
        path: A ``tokenizer.json``.

    Raises:
        DataError: It is none.
    """

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # of no type of its own
            raise DataError(f"--half: its tokenizer {path} cannot be read ({error}); export it again") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, nothing before or behind them."""
        return [one.ids for one in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def truncated(self, texts: Sequence[str], most: int) -> list[np.ndarray[Any, Any]]:
        """Ids of each text with what the tokenizer puts around it, at most so many."""
        self.tokenizer.enable_truncation(most)
        try:
            return [np.asarray(one.ids, np.int64) for one in self.tokenizer.encode_batch(list(texts))]
        finally:
            self.tokenizer.no_truncation()

    def leading(self) -> list[int]:
        """What it puts before every text, maybe nothing."""
        [plain], [full] = self.plain(["a"]), self.truncated(["a"], 1 << 20)
        ids = full.tolist()
        return next(ids[:i] for i in range(len(ids)) if ids[i : i + len(plain)] == plain)

    def stream(self, documents: Sequence[str], eos: int | None) -> np.ndarray[Any, Any]:
        """The documents' ids in one row ``(T,)`` with eos between them; special tokens spelled out stay plain text.

        Raises:
            DataError: There are several, and no eos token.
        """
        if len(documents) > 1 and eos is None:
            raise DataError("--data: the tokenizer has no eos token to put between documents; give one .txt")
        self.tokenizer.encode_special_tokens = True
        try:
            rows = self.plain(documents)
        finally:
            self.tokenizer.encode_special_tokens = False
        ids = [i for number, row in enumerate(rows) for i in ([eos, *row] if number else row)]
        return np.asarray(ids, np.int64)
