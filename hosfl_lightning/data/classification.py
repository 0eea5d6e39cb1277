"""Text classification from files or the hub, with a classifier head or with a prompt and label words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from hosfl_lightning.data.checks import check_at_least, check_choice, check_fraction
from hosfl_lightning.data.federated import FederatedDataModule
from hosfl_lightning.data.labels import LabelSet, check_from_zero, infer_labels, read_label_names
from hosfl_lightning.data.partition import fixed_subset, partition_by_field, partition_dirichlet, partition_iid
from hosfl_lightning.data.prompt import PromptEncoder
from hosfl_lightning.data.readers import Reader
from hosfl_lightning.data.rows import OnMissing, Row
from hosfl_lightning.data.tokenization import Example


class ClassificationData(FederatedDataModule):
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
        min_examples_per_client: The Dirichlet partition refuses a draw that leaves a client with fewer.
        prompt: Template with "{text}", such as "{text} It was"; makes it a language-modelling task.
        label_words: One word per class, by index, such as [" terrible", " great"].
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
        super().__init__(batch_size, eval_batch_size, tokenizer, seed)
        check_at_least(1, num_labels=num_labels, num_clients=num_clients, max_length=max_length)
        check_at_least(1, min_examples_per_client=min_examples_per_client, max_train_examples=max_train_examples)
        check_at_least(1, max_validation_examples=max_validation_examples, max_test_examples=max_test_examples)
        check_fraction(validation_fraction=validation_fraction)
        check_choice(("iid", "dirichlet", "field"), partition=partition)
        if partition == "field" and field is None:
            raise ValueError("field: partition=field needs the name of the field to go by")
        if partition != "field" and num_clients is None:
            raise ValueError(f"num_clients: partition={partition} needs the number of clients")
        if (prompt is None) != (label_words is None):
            raise ValueError("prompt and label_words go together: give both, or neither for a classifier")
        self.sources = {"train": train, "validation": validation, "test": test}
        self.limits = {"train": max_train_examples, "validation": max_validation_examples, "test": max_test_examples}
        self.reader = Reader(encoding, delimiter, on_missing, hub, hub_config)
        self.text_field = text_field
        self.label_field = label_field
        self.labels = labels
        self.num_labels = num_labels
        self.requested_clients = num_clients
        self.partition = partition
        self.alpha = alpha
        self.field = field
        self.min_examples_per_client = min_examples_per_client
        self.prompt = prompt
        self.label_words = label_words
        self.max_length = max_length
        self.validation_fraction = validation_fraction
        self.label_set = LabelSet(0)
        self._known_names: list[str] | None = None

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
            ValueError: If a file, a record or a label is bad, or a client would be empty.
        """
        if self.clients:
            return
        train, validation, test = (self._rows(split) for split in ("train", "validation", "test"))
        self.label_set = self._find_labels(train)
        train, validation, test = map(self._limited, (train, validation, test), ("train", "validation", "test"))
        if self.sources["validation"] is None:
            train, validation = self._hold_out(train)
        examples = self._encode(train)
        parts = self._parts(train)
        self.validation_set = self._encode(validation)
        self.test_set = self._encode(test)
        self.clients = [[examples[i] for i in part.tolist()] for part in parts]

    def _rows(self, split: str) -> list[Row]:
        source = self.sources[split]
        if source is None:
            return []
        rows, names = self.reader.rows(source, split, self._needs)
        if split == "train":
            self._known_names = names.get(self.label_field)
        return rows

    def _limited(self, rows: list[Row], split: str) -> list[Row]:
        return [rows[i] for i in fixed_subset(len(rows), self.limits[split])]

    def _needs(self, row: Row) -> None:
        """What every example must have."""
        row.text(self.text_field, "text_field")
        row.field(self.label_field, "label_field")
        if self.partition == "field":
            row.field(str(self.field), "field")

    def _find_labels(self, train: list[Row]) -> LabelSet:
        """The classes, from the first of: names, the number given, the label words, the training set."""
        names = read_label_names(self.labels) if self.labels is not None else self._known_names
        words = None if self.label_words is None else len(self.label_words)
        if names is not None:
            found = LabelSet(len(names), names)
        elif words is not None:  # they are by index, and the order of names is not for us to guess
            found = LabelSet(words)
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

    def _hold_out(self, train: list[Row]) -> tuple[list[Row], list[Row]]:
        if len(train) < 2:
            raise ValueError("train: one example only, none can be held out; give validation a file of its own")
        chosen = set(fixed_subset(len(train), max(1, round(len(train) * self.validation_fraction))))
        held_out = [row for index, row in enumerate(train) if index in chosen]
        kept = [row for index, row in enumerate(train) if index not in chosen]
        return kept, self._limited(held_out, "validation")

    def _parts(self, train: list[Row]) -> list[Tensor]:
        if self.partition == "field":
            groups = partition_by_field([row.field(str(self.field), "field") for row in train])
            if self.requested_clients not in (None, len(groups)):
                raise ValueError(f"num_clients={self.requested_clients}: field {self.field!r} has {len(groups)} values")
            self.client_names = list(groups)
            return list(groups.values())
        clients = self.requested_clients or 0
        if self.partition == "iid":
            return partition_iid(len(train), clients, self.seed)
        labels = [self.label_set.index(row, self.label_field) for row in train]
        return partition_dirichlet(labels, clients, self.alpha, self.seed, self.min_examples_per_client)

    def _encode(self, rows: list[Row]) -> list[Example]:
        tokenizer = self.resolve_tokenizer()
        texts = [row.text(self.text_field, "text_field") for row in rows]
        labels = [self.label_set.index(row, self.label_field) for row in rows]
        if self.prompt is not None and self.label_words is not None:
            return PromptEncoder(self.prompt, self.label_words, tokenizer, self.max_length)(texts, labels)
        if not texts:
            return []
        encoded = tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        return [Example(ids, label) for ids, label in zip(encoded["input_ids"], labels)]
