"""Text classification from JSON-lines, CSV or the hub, with a classifier head or with a prompt and label words."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from hosfl_lightning.data.checks import check_at_least, check_choice, check_fraction
from hosfl_lightning.data.federated import FederatedDataModule
from hosfl_lightning.data.labels import LabelSet, infer_labels, read_label_names
from hosfl_lightning.data.partition import Partitioner, fixed_subset, spelled
from hosfl_lightning.data.prompt import PromptEncoder
from hosfl_lightning.data.readers import Row, read_hub, read_rows
from hosfl_lightning.data.tokenization import Example


class ClassificationData(FederatedDataModule):
    """Labelled texts dealt to clients, for a classifier (labels (B,)) or, with a prompt, for a causal LM.

    With `prompt` and `label_words` the task becomes language modelling as in MeZO: the example is the prompt with the
    text in it and the class's word behind it, and only the word's tokens are labelled (`PromptEncoder`).

    Args:
        train: Training file (.jsonl, .csv, also with .gz), or with `hub` the name of the split.
        validation: The same for validation. None: `validation_fraction` of the training examples, the same for every
            seed.
        test: The same for the test set. None: no test set.
        hub: Name of a dataset for `datasets.load_dataset`; needs the extra `hub`. None: files.
        hub_config: Its configuration, if it has several.
        text_field: The field with the text.
        label_field: The field with the label: a class index or a class name.
        labels: JSON file with the list of class names. None: the hub's names, else found in the training set.
        num_labels: Number of classes. None: as many as names or label words, else found in the training set.
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
        train: str,
        validation: str | None = None,
        test: str | None = None,
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
    ) -> None:
        super().__init__(batch_size, eval_batch_size, tokenizer, seed)
        check_at_least(1, num_labels=num_labels, num_clients=num_clients, max_length=max_length)
        check_at_least(0, min_examples_per_client=min_examples_per_client)
        check_at_least(1, max_train_examples=max_train_examples)
        check_at_least(1, max_validation_examples=max_validation_examples, max_test_examples=max_test_examples)
        check_fraction(validation_fraction=validation_fraction)
        check_choice(("iid", "dirichlet", "field"), partition=partition)
        if partition == "field" and field is None:
            raise ValueError("field: partition=field needs the name of the field to go by")
        if partition != "field" and num_clients is None and partitioner is None:
            raise ValueError(f"num_clients: partition={partition} needs the number of clients")
        if (prompt is None) != (label_words is None):
            raise ValueError("prompt and label_words go together: give both, or neither for a classifier")
        self.sources = {"train": train, "validation": validation, "test": test}
        self.limits = {"train": max_train_examples, "validation": max_validation_examples, "test": max_test_examples}
        self.hub = hub
        self.hub_config = hub_config
        self.text_field = text_field
        self.label_field = label_field
        self.labels = labels
        self.num_labels = num_labels
        self.requested_clients = num_clients
        settings = {"alpha": alpha, "field": field, "min_examples_per_client": min_examples_per_client}
        self.partitioner = spelled(partitioner, partition, **settings)
        self.prompt = prompt
        self.label_words = label_words
        self.max_length = max_length
        self.validation_fraction = validation_fraction
        self.label_set = LabelSet(0)
        self._hub_names: list[str] | None = None

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
        train, validation, test = (self._rows(split) for split in ("train", "validation", "test"))
        self.label_set = self._find_labels(train)
        if self.sources["validation"] is None:
            train, validation = self._hold_out(train)
        examples = self._encode(train)
        self.validation_set = self._encode(validation)
        self.test_set = self._encode(test)
        self.deal(
            examples,
            self.partitioner,
            num_clients=self.requested_clients,
            labels=[self.label_set.index(row, self.label_field) for row in train],
            field=lambda name: [row.field(name, "field") for row in train],
        )

    def _rows(self, split: str) -> list[Row]:
        source = self.sources[split]
        if source is None:
            return []
        if self.hub is None:
            rows = read_rows(source, split)
        else:
            rows, names = read_hub(self.hub, self.hub_config, source)
            self._hub_names = names.get(self.label_field, self._hub_names)
        return [rows[i] for i in fixed_subset(len(rows), self.limits[split])]

    def _find_labels(self, train: list[Row]) -> LabelSet:
        """The classes, from the first of: names, the number given, the label words, the training set."""
        names = read_label_names(self.labels) if self.labels is not None else self._hub_names
        words = None if self.label_words is None else len(self.label_words)
        count = self.num_labels or words
        found = LabelSet(count) if count else infer_labels(train, self.label_field)
        if names is not None:
            found = LabelSet(len(names), names)
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
        return kept, [held_out[i] for i in fixed_subset(len(held_out), self.limits["validation"])]

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
