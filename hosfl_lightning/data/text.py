"""Language modelling on the user's own texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from hosfl_lightning.data.checks import check_at_least, check_choice, check_fraction, check_share
from hosfl_lightning.data.federated import FederatedDataModule
from hosfl_lightning.data.partition import ByFile, Partitioner, fixed_subset, spelled
from hosfl_lightning.data.readers import Reader, Texts
from hosfl_lightning.data.rows import OnMissing
from hosfl_lightning.data.shift import TextShift, heard
from hosfl_lightning.data.tokenization import Example, language_blocks, token_stream
from hosfl_lightning.parts import check_part

#: The split that a setting names the files of.
SPLITS = {"files": "train", "validation_files": "validation", "test_files": "test"}


class TextData(FederatedDataModule):
    """Language modelling on the user's texts, cut into blocks of `sequence_length` tokens.

    A plain text file is one document, each record of another file another; the documents of a file are joined by eos
    and what does not fill a block at its end is dropped. Of each file's blocks the last `test_fraction` are the test
    set, those before them the validation set unless there are `validation_files`, and the rest is for training:
    learning rates are tuned on other text than the result is told of. Files that are too short for that are taken
    together, unless each is to be a client.

    Args:
        files: Training texts: a file (.txt, .text, .md, .rst, .py, .jsonl, .ndjson, .json, .csv, .tsv, .parquet or
            .arrow, each also with .gz), a folder of such files or of `save_to_disk`, a glob, or a list of these; with
            `hub` the names of splits. What a folder or a glob finds is in the order of the paths.
        validation_files: The same for validation. None: the last part of each training file.
        test_files: The same for the test set. None: `test_fraction` of each training file, if that is not 0.
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
        hub: Name of a dataset for `datasets.load_dataset`; needs the extra `hub`. None: files.
        hub_config: Its configuration, if it has several.
        encoding: Of text, JSON and CSV files.
        delimiter: Between the cells of a CSV or TSV file. None: a comma, and in .tsv a tab.
        on_missing: What becomes of records whose text is absent, null or empty: `error` refuses the first, `skip`
            leaves them out and says how many.
        shift: What clients write in place of the texts, of `hosfl_lightning.data.shift` or a `TextShift` of your own.
            One for all changes documents before they are tokenized; one for each client changes the text of a block,
            which is tokenized anew and cut at `sequence_length`: held-out block i as client i mod N writes it.

    Example::

        data = TextData(files=["shakespeare.txt"], num_clients=8, sequence_length=64, tokenizer="my-model")
    """

    def __init__(
        self,
        files: str | list[str],
        validation_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
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
        hub: str | None = None,
        hub_config: str | None = None,
        encoding: str = "utf-8",
        delimiter: str | None = None,
        on_missing: OnMissing = "error",
        shift: TextShift | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, tokenizer, seed)
        if shift is not None:
            check_part(shift, TextShift, "data.init_args.shift")
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
        if test_files and test_fraction:
            raise ValueError(f"test_fraction={test_fraction}: there are test_files; give one of the two")
        self.files, self.validation_files, self.test_files = files, validation_files, test_files
        self.reader = Reader(encoding, delimiter, on_missing, hub, hub_config)
        self.text_field = text_field
        self.requested_clients = num_clients
        self.partitioner = spelled(partitioner, partition)
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.max_validation_examples = max_validation_examples
        self.max_test_examples = max_test_examples
        self.sequence_length = sequence_length
        self.shift = shift

    @override
    def setup(self, stage: str) -> None:
        """Read, tokenize, split and partition.

        Raises:
            FileNotFoundError: If a file is not there.
            ValueError: If a file cannot be read or is too short, or there are more clients than blocks.
        """
        if self.clients:
            return
        training = self._pieces(self.files, "files")
        validation, test = (
            [block for piece in self._pieces(source, setting) for block in piece.blocks]
            for source, setting in ((self.validation_files, "validation_files"), (self.test_files, "test_files"))
        )
        for piece in training:
            for_validation, for_test = self._hold_out(piece)
            validation += for_validation
            test += for_test
        self.validation_set = [validation[i] for i in fixed_subset(len(validation), self.max_validation_examples)]
        self.test_set = [test[i] for i in fixed_subset(len(test), self.max_test_examples)]
        blocks = [block for piece in training for block in piece.blocks]
        files = [piece.name for piece in training for _ in piece.blocks]
        self.deal(blocks, self.partitioner, files=files, num_clients=self.requested_clients)
        if self.shift is not None and self.shift.each_client:
            self._write_anew(self.shift)

    def _write_anew(self, shift: TextShift) -> None:
        """Every block as its client writes it."""
        number = count()
        self.clients = [
            [self._rewritten(shift, block, client, "train", next(number)) for block in blocks]
            for client, blocks in enumerate(self.clients)
        ]
        for split in ("validation", "test"):
            blocks = getattr(self, f"{split}_set")
            blocks[:] = [
                self._rewritten(shift, block, self.client_of_held_out(i), split, i) for i, block in enumerate(blocks)
            ]

    def _rewritten(self, shift: TextShift, block: Example, client: int, split: str, number: int) -> Example:
        tokenizer = self.resolve_tokenizer()
        text: Any = tokenizer.decode(block.input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ids = token_stream([heard(shift, text, client, self.seed, split, number)], tokenizer)[: self.sequence_length]
        if len(ids) < 2:
            raise ValueError(
                f"shift: {type(shift).__name__} leaves {len(ids)} token(s) of a block; raise sequence_length from "
                f"{self.sequence_length}"
            )
        return Example(ids, ids)

    def _as_written(self, texts: list[Texts], setting: str) -> list[Texts]:
        """The documents, changed where all clients write alike."""
        shift = self.shift
        if shift is None or shift.each_client:
            return texts
        found, number = [], 0
        for path, documents in texts:
            changed = [
                heard(shift, text, 0, self.seed, SPLITS[setting], number + i) for i, text in enumerate(documents)
            ]
            found.append(Texts(path, changed))
            number += len(documents)
        return found

    def _pieces(self, source: str | Sequence[str] | None, setting: str) -> list[_Piece]:
        """Each file's blocks; files too short to be split one by one are one piece, unless each is to be a client."""
        texts = self._as_written(self.reader.texts(source, self.text_field, setting), setting) if source else []
        pieces = [_Piece(one.path, self._blocks(one.documents)) for one in texts]
        shares = self._shares if setting == "files" else ()
        short = [i for i, piece in enumerate(pieces) if _left(piece.blocks, shares) < 1]
        if len(short) > 1 and (not isinstance(self.partitioner, ByFile) or setting != "files"):
            rank_zero_info(f"{setting}: {len(short)} of {len(texts)} files are short and taken together")
            together = self._blocks([document for i in short for document in texts[i].documents])
            pieces = [piece for i, piece in enumerate(pieces) if i not in set(short)]
            pieces.append(_Piece(f"{texts[short[0]].path} and {len(short) - 1} more", together))
        for piece in pieces:
            if not piece.blocks:
                raise ValueError(
                    f"{setting}: {piece.name!r} has too few tokens for one block; lower sequence_length from "
                    f"{self.sequence_length} or leave it out"
                )
        return pieces

    def _blocks(self, documents: Sequence[str]) -> list[Example]:
        return language_blocks(token_stream(documents, self.resolve_tokenizer()), self.sequence_length)

    @property
    def _shares(self) -> tuple[float, ...]:
        """Of the blocks of a training file: for validation, for the test set."""
        return (0.0 if self.validation_files else self.validation_fraction, self.test_fraction)

    def _hold_out(self, piece: _Piece) -> tuple[list[Example], list[Example]]:
        """Take the last blocks off the list: those for validation, and behind them those for the test set."""
        name, blocks = piece
        validation, test = (_share(len(blocks), share) for share in self._shares)
        kept = _left(blocks, self._shares)
        if kept < 1:
            raise ValueError(
                f"files: {name!r} has {len(blocks)} block(s), and {validation} for validation and {test} for testing "
                "leave none; lower sequence_length or give validation_files"
            )
        held_out = blocks[kept:]
        del blocks[kept:]
        return held_out[:validation], held_out[validation:]


class _Piece(NamedTuple):
    """What is split by itself: a file, or several short ones."""

    name: str
    blocks: list[Example]


def _share(count: int, share: float) -> int:
    return max(1, round(count * share)) if share else 0


def _left(blocks: list[Example], shares: Sequence[float]) -> int:
    return len(blocks) - sum(_share(len(blocks), share) for share in shares)
