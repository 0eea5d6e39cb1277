"""Text classification from files or the hub, with a classifier head or with a prompt and label words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from hosfl_lightning.data.checks import check_at_least, check_choice
from hosfl_lightning.data.labels import LabelSet, check_from_zero, infer_labels, read_label_names
from hosfl_lightning.data.partition import Partitioner
from hosfl_lightning.data.prompt import LabelWords, PromptEncoder
from hosfl_lightning.data.readers import Reader
from hosfl_lightning.data.records import RecordData
from hosfl_lightning.data.rows import OnMissing, Row
from hosfl_lightning.data.tokenization import Example


class ClassificationData(RecordData):
    """Labelled texts dealt to clients, for a classifier (labels (B,)) or, with a prompt, for a causal LM.

    With `prompt` and `label_words` the task becomes language modelling as in MeZO: the example is the prompt with the
    text in it and the class's word behind it, and only the word's tokens are labelled (`PromptEncoder`).

    Args:
        train: Training examples: a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, each also with .gz), a
            folder of such files or of `save_to_disk`, a glob, or a list of these; with `hub` the name of the split.
        validation: The same for validation. None: `validation_fraction` of the training examples, the same for every
            seed.
        test: The same for the test set. None: no test set.
        hub: Name of a dataset for `datasets.load_dataset`; needs the extra `hub`. None: files.
        hub_config: Its configuration, if it has several.
        text_field: The field with the text.
        label_field: The field with the label: a class index or a class name. A whole number is the same label however
            a file writes it: 1, 1.0, "1" (see `LabelSet`).
        labels: File with the class names, one a line, or in JSON a list or `id2label`, such as the `labels.json` of a
            run. None: the names that the data set knows, else found in the training set: integers from 0 on as they
            are, names in sorted order.
        num_labels: Number of classes. None: as many as names or label words, else found in the training set.
        encoding: Of text, JSON and CSV files.
        delimiter: Between the cells of a CSV or TSV file. None: a comma, and in .tsv a tab.
        on_missing: What becomes of records whose text or label (or `field`) is absent, null, NaN or empty: `error`
            refuses the first, `skip` leaves them out and says how many.
        num_clients: Number of clients; by field it may be left out.
        partition: `iid` deals at random; `dirichlet` skews the labels (`alpha`); `field` makes a client of each value
            of `field`.
        alpha: Concentration of the Dirichlet partition; smaller is more skewed.
        field: The field that `partition: field` goes by.
        min_examples_per_client: Of the Dirichlet partition: it is drawn again, and then single examples are moved,
            until no client has fewer. 0: a client may be empty, and is never sampled.
        partitioner: In place of the four before: an object that says which client holds which examples; it is told
            their labels and fields.
        prompt: Template with "{text}", such as "{text} It was"; makes it a language-modelling task.
        label_words: One word per class, by index, such as [" terrible", " great"]. Labels are then integers from 0 on,
            or names listed in a file for `labels`: which word is which name is never guessed.
        max_length: Most tokens of an example; longer texts lose their end.
        max_train_examples: Use only so many training examples, the same for every seed.
        max_validation_examples: Use only so many validation examples.
        max_test_examples: Use only so many test examples.
        validation_fraction: Share of the training examples held out when `validation` is None.
        batch_size: Examples a client uses a round; a client that holds fewer uses all it has.
        eval_batch_size: Examples per batch of the held-out loaders.
        tokenizer: Name, folder or tokenizer; None: the model's own.
        seed: Fixes the partition and every client's order.

    Attributes:
        label_set: Number and names of the classes, known after `setup`.

    Example::

        data = ClassificationData(train="train.csv", num_clients=10, partition="dirichlet", alpha=0.3)
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        text_field: str = "text",
        label_field: str = "label",
        labels: str | None = None,
        num_labels: int | None = None,
        num_clients: int | None = None,
        partition: Literal["iid", "dirichlet", "field"] = "iid",
        alpha: float = 0.5,
        field: str | None = None,
        min_examples_per_client: int = 1,
        partitioner: Partitioner | None = None,
        prompt: str | None = None,
        label_words: list[str] | None = None,
        max_length: int = 128,
        max_train_examples: int | None = None,
        max_validation_examples: int | None = None,
        max_test_examples: int | None = None,
        validation_fraction: float = 0.1,
        batch_size: int = 4,
        eval_batch_size: int = 32,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        encoding: str = "utf-8",
        delimiter: str | None = None,
        on_missing: OnMissing = "error",
    ) -> None:
        check_at_least(1, num_labels=num_labels, max_length=max_length)
        check_at_least(0, min_examples_per_client=min_examples_per_client)
        check_choice(("iid", "dirichlet", "field"), partition=partition)
        if (prompt is None) != (label_words is None):
            raise ValueError("prompt and label_words go together: give both, or neither for a classifier")
        settings = {"alpha": alpha, "field": field, "min_examples_per_client": min_examples_per_client}
        super().__init__(
            sources=(train, validation, test),
            limits=(max_train_examples, max_validation_examples, max_test_examples),
            reader=Reader(encoding, delimiter, on_missing, hub, hub_config),
            validation_fraction=validation_fraction,
            num_clients=num_clients,
            partition=partition,
            partitioner=partitioner,
            words=settings,
            batch_size=batch_size, eval_batch_size=eval_batch_size, tokenizer=tokenizer, seed=seed,
        )  # fmt: skip
        self.text_field = text_field
        self.label_field = label_field
        self.labels = labels
        self.num_labels = num_labels
        self.prompt = prompt
        self.label_words = label_words
        self.max_length = max_length
        self.label_set = LabelSet(0)
        self._told_apart_by: LabelWords | None = None

    @property
    @override
    def label_names(self) -> Sequence[str] | None:
        """The names of the classes by index, known after `setup`; None where labels are integers."""
        return self.label_set.names

    @override
    def setup(self, stage: str) -> None:
        """Read, check, partition and tokenize.

        Raises:
            FileNotFoundError: If a file is not there.
            ImportError: If `hub` is set and `datasets` is not installed.
            ValueError: If a file, a record or a label is bad, or the partition cannot be made.
        """
        if self.clients:
            return
        (train, known), (validation, _), (test, _) = (self.read(split) for split in ("train", "validation", "test"))
        self.label_set = self._find_labels(train, known.get(self.label_field))
        for row in (*train, *validation, *test):  # in their order, before any are held out at random
            self.label_set.index(row, self.label_field)
        train, validation, test = map(self.limited, (train, validation, test), ("train", "validation", "test"))
        train, validation = self.hold_out(train, validation)
        self.validation_set = self._encode(validation)
        self.test_set = self._encode(test)
        labels = [self.label_set.index(row, self.label_field) for row in train]
        self.deal_rows(self._encode(train), train, labels)

    @override
    def needs(self, row: Row) -> None:
        row.text(self.text_field, "text_field")
        row.field(self.label_field, "label_field")

    @property
    @override
    def told_apart_by(self) -> LabelWords | None:
        return self._told_apart_by

    def _find_labels(self, train: list[Row], known: list[str] | None) -> LabelSet:
        """The classes, from the first of: names, the number given, the label words, the training set."""
        names = read_label_names(self.labels) if self.labels is not None else known
        words = None if self.label_words is None else len(self.label_words)
        if names is not None:
            found = LabelSet(len(names), names)
        elif words is not None:  # they are by index, and the order of names is not for us to guess
            found = LabelSet(words)
            if self.num_labels is None:
                check_from_zero(train, self.label_field, words)
        else:
            found = infer_labels(train, self.label_field)
            if found.names is None and self.num_labels is not None:
                found = LabelSet(self.num_labels)
            elif found.names is None:
                check_from_zero(train, self.label_field)
        for setting, number in (("num_labels", self.num_labels), ("label_words", words)):
            if number not in (None, found.count):
                raise ValueError(f"{setting}: {number} classes, but there are {found.count}")
        return found

    def _encode(self, rows: list[Row]) -> list[Example]:
        tokenizer = self.resolve_tokenizer()
        texts = [row.text(self.text_field, "text_field") for row in rows]
        labels = [self.label_set.index(row, self.label_field) for row in rows]
        if self.prompt is not None and self.label_words is not None:
            encoder = PromptEncoder(self.prompt, self.label_words, tokenizer, self.max_length)
            self._told_apart_by = encoder.told_apart_by()
            return encoder(texts, labels)
        if not texts:
            return []
        encoded = tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        return [Example(ids, label) for ids, label in zip(encoded["input_ids"], labels)]
