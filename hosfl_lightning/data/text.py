"""Language modelling on the user's own text files."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from hosfl_lightning.data.checks import check_at_least, check_choice, check_fraction, check_share
from hosfl_lightning.data.federated import FederatedDataModule
from hosfl_lightning.data.partition import Partitioner, fixed_subset, spelled
from hosfl_lightning.data.readers import read_documents
from hosfl_lightning.data.tokenization import Example, language_blocks, token_stream


class TextData(FederatedDataModule):
    """Language modelling on text, JSON-lines or CSV files, cut into blocks of `sequence_length` tokens.

    A plain text file is one document, each record of a `.jsonl`/`.csv` file another; the documents of a file are
    joined by eos and what does not fill a block at its end is dropped. Of each file's blocks the last `test_fraction`
    are the test set, those before them the validation set unless there are `validation_files`, and the rest is for
    training: learning rates are tuned on other text than the result is told of.

    Args:
        files: Training files: .txt, .text, .md, .rst, .py, .jsonl or .csv, `.gz` after any of them.
        validation_files: Files for validation. None: the last part of each training file.
        test_files: Files for the test set. None: `test_fraction` of each training file, if that is not 0.
        text_field: The field that holds a record's text.
        num_clients: Number of clients; needed for `partition: iid`. By file it may be left out.
        partition: `iid` deals the training blocks to the clients at random; `by_file` makes each file a client.
        partitioner: In place of the word: an object that says which client holds which blocks; it is told their files.
        validation_fraction: Share of each file's blocks held out when there are no validation files: the last, or those
            before the test blocks.
        test_fraction: Share of each file's blocks, from its end, held out for the test set. 0: none.
        max_validation_examples: Keep only so many validation blocks, the same for every seed.
        max_test_examples: Keep only so many test blocks.
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
        partitioner: Partitioner | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        max_validation_examples: int | None = None,
        max_test_examples: int | None = None,
        batch_size: int = 4,
        sequence_length: int = 128,
        eval_batch_size: int = 32,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, tokenizer, seed)
        check_at_least(2, sequence_length=sequence_length)
        check_at_least(1, num_clients=num_clients)
        check_at_least(1, max_validation_examples=max_validation_examples, max_test_examples=max_test_examples)
        check_fraction(validation_fraction=validation_fraction)
        check_share(test_fraction=test_fraction)
        check_choice(("iid", "by_file"), partition=partition)
        if not files:
            raise ValueError("files: name at least one training file")
        if partition == "iid" and num_clients is None and partitioner is None:
            raise ValueError("num_clients: partition=iid needs the number of clients")
        if partition == "by_file" and num_clients not in (None, len(files)):
            raise ValueError(
                f"num_clients={num_clients}: partition=by_file makes each of the {len(files)} files a client"
            )
        if test_files and test_fraction:
            raise ValueError(f"test_fraction={test_fraction}: there are test_files; give one of the two")
        self.files = list(files)
        self.validation_files = list(validation_files or [])
        self.test_files = list(test_files or [])
        self.text_field = text_field
        self.requested_clients = num_clients
        self.partitioner = spelled(partitioner, partition)
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.max_validation_examples = max_validation_examples
        self.max_test_examples = max_test_examples
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
        test = [block for path in self.test_files for block in self._blocks(path, "test_files")]
        for path, blocks in zip(self.files, training):
            for_validation, for_test = self._hold_out(path, blocks)
            validation += for_validation
            test += for_test
        self.validation_set = [validation[i] for i in fixed_subset(len(validation), self.max_validation_examples)]
        self.test_set = [test[i] for i in fixed_subset(len(test), self.max_test_examples)]
        blocks = [block for file in training for block in file]
        files = [path for path, of_file in zip(self.files, training) for _ in of_file]
        self.deal(blocks, self.partitioner, files=files, num_clients=self.requested_clients)

    def _blocks(self, path: str, setting: str) -> list[Example]:
        stream = token_stream(read_documents(path, self.text_field, setting), self.resolve_tokenizer())
        blocks = language_blocks(stream, self.sequence_length)
        if not blocks:
            raise ValueError(
                f"{setting}: {path!r} has {len(stream)} tokens, fewer than one block; lower sequence_length from "
                f"{self.sequence_length} or leave the file out"
            )
        return blocks

    def _hold_out(self, path: str, blocks: list[Example]) -> tuple[list[Example], list[Example]]:
        """Take the last blocks off the list: those for validation, and behind them those for the test set."""
        shares = (0.0 if self.validation_files else self.validation_fraction, self.test_fraction)
        validation, test = (max(1, round(len(blocks) * share)) if share else 0 for share in shares)
        kept = len(blocks) - validation - test
        if kept < 1:
            raise ValueError(
                f"files: {path!r} has {len(blocks)} block(s), and {validation} for validation and {test} for testing "
                "leave none; lower sequence_length or give validation_files"
            )
        held_out = blocks[kept:]
        del blocks[kept:]
        return held_out[:validation], held_out[validation:]
