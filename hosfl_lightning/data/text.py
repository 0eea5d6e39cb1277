"""Language modelling on the user's own text files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from hosfl_lightning.data.checks import check_at_least, check_choice, check_fraction
from hosfl_lightning.data.federated import FederatedDataModule
from hosfl_lightning.data.partition import fixed_subset, partition_iid
from hosfl_lightning.data.readers import read_documents
from hosfl_lightning.data.tokenization import Example, language_blocks, token_stream


class TextData(FederatedDataModule):
    """Language modelling on text, JSON-lines or CSV files, cut into blocks of `sequence_length` tokens.

    A plain text file is one document, each record of a `.jsonl`/`.csv` file another; the documents of a file are
    joined by eos and what does not fill a block at its end is dropped. Without `validation_files` the last
    `validation_fraction` of each file's blocks is held out.

    Args:
        files: Training files: .txt, .text, .md, .rst, .py, .jsonl or .csv, `.gz` after any of them.
        validation_files: Files for validation. None: the last part of each training file.
        test_files: Files for the test set. None: no test set.
        text_field: The field that holds a record's text.
        num_clients: Number of clients; needed for `partition: iid`. By file it may be left out.
        partition: `iid` deals the training blocks to the clients at random; `by_file` makes each file a client.
        validation_fraction: Share of each file's blocks, from its end, held out when there are no validation files.
        max_validation_examples: Keep only so many validation blocks, the same for every seed.
        batch_size: Blocks a client uses a round.
        sequence_length: Tokens per block.
        eval_batch_size: Blocks per batch of the held-out loaders.
        tokenizer: Name, folder or tokenizer; None: the model's own.
        seed: Fixes the partition and every client's order of blocks.

    Example::

        data = TextData(files=["shakespeare.txt"], num_clients=8, sequence_length=64, tokenizer="my-model")
    """

    def __init__(
        self,
        files: list[str],
        validation_files: list[str] | None = None,
        test_files: list[str] | None = None,
        text_field: str = "text",
        num_clients: int | None = None,
        partition: Literal["iid", "by_file"] = "iid",
        validation_fraction: float = 0.1,
        max_validation_examples: int | None = None,
        batch_size: int = 4,
        sequence_length: int = 128,
        eval_batch_size: int = 32,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, tokenizer, seed)
        check_at_least(2, sequence_length=sequence_length)
        check_at_least(1, num_clients=num_clients, max_validation_examples=max_validation_examples)
        check_fraction(validation_fraction=validation_fraction)
        check_choice(("iid", "by_file"), partition=partition)
        if not files:
            raise ValueError("files: name at least one training file")
        if partition == "iid" and num_clients is None:
            raise ValueError("num_clients: partition=iid needs the number of clients")
        if partition == "by_file" and num_clients not in (None, len(files)):
            raise ValueError(
                f"num_clients={num_clients}: partition=by_file makes each of the {len(files)} files a client"
            )
        self.files = list(files)
        self.validation_files = list(validation_files or [])
        self.test_files = list(test_files or [])
        self.text_field = text_field
        self.requested_clients = num_clients
        self.partition = partition
        self.validation_fraction = validation_fraction
        self.max_validation_examples = max_validation_examples
        self.sequence_length = sequence_length

    @override
    def setup(self, stage: str) -> None:
        """Read, tokenize, split and partition.

        Raises:
            FileNotFoundError: If a file is not there.
            ValueError: If a file cannot be read or is too short, or there are more clients than blocks.
        """
        if self.clients:
            return
        training = [self._blocks(path, "files") for path in self.files]
        validation = [block for path in self.validation_files for block in self._blocks(path, "validation_files")]
        self.test_set = [block for path in self.test_files for block in self._blocks(path, "test_files")]
        if not validation:
            validation = [block for path, blocks in zip(self.files, training) for block in self._hold_out(path, blocks)]
        self.validation_set = [validation[i] for i in fixed_subset(len(validation), self.max_validation_examples)]
        if self.partition == "by_file":
            stems = [Path(path).name.split(".")[0] for path in self.files]
            self.client_names = stems if len(set(stems)) == len(stems) else self.files
            self.clients = training
        else:
            blocks = [block for file in training for block in file]
            parts = partition_iid(len(blocks), self.requested_clients or 0, self.seed)
            self.clients = [[blocks[i] for i in part.tolist()] for part in parts]

    def _blocks(self, path: str, setting: str) -> list[Example]:
        stream = token_stream(read_documents(path, self.text_field, setting), self.resolve_tokenizer())
        blocks = language_blocks(stream, self.sequence_length)
        if not blocks:
            raise ValueError(
                f"{setting}: {path!r} has {len(stream)} tokens, fewer than one block; lower sequence_length from "
                f"{self.sequence_length} or leave the file out"
            )
        return blocks

    def _hold_out(self, path: str, blocks: list[Example]) -> list[Example]:
        """Take the last blocks off the list, at least one, and return them."""
        if len(blocks) < 2:
            raise ValueError(f"files: {path!r} has one block only; lower sequence_length or give validation_files")
        count = max(1, round(len(blocks) * self.validation_fraction))
        held_out = blocks[-count:]
        del blocks[-count:]
        return held_out
