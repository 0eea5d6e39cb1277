"""The data module of a federation: one set of examples per client, and a minibatch per client and round."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from hosfl_lightning.arguments import given
from hosfl_lightning.data.checks import check_at_least
from hosfl_lightning.data.dealt import Dealt
from hosfl_lightning.data.partition import Examples, Partitioner, deal
from hosfl_lightning.data.prompt import LabelWords
from hosfl_lightning.data.tokenization import collate, load_tokenizer, pad_token_id
from hosfl_lightning.rng import Domain, permutation


class FederatedDataModule(L.LightningDataModule):
    """Base of all federated data: a subclass fills `clients`, `validation_set` and perhaps `test_set` in `setup`.

    Client k with n_k examples uses b = min(batch_size, n_k) of them a round. Round r is batch r mod ⌊n_k / b⌋ of
    epoch e = r div ⌊n_k / b⌋, whose order is `permutation(n_k, seed, DATA_ORDER, round=e, client=k)`. A batch is thus a
    pure function of (seed, client, round): resuming needs no state, and rounds a client misses cost nothing. Within an
    epoch no example repeats; the n_k mod b examples that fill no batch sit that epoch out. The global random state of
    Python, NumPy and torch is neither read nor changed. What an example is, only `collate` knows: here an `Example` of
    token ids, in `ImageData` an image and its class.

    Args:
        batch_size: Examples a client uses a round; a client that holds fewer uses all it has.
        eval_batch_size: Examples per batch of the validation, test and predict loaders.
        tokenizer: Name, folder or tokenizer; None: the orchestrator sets the model's own before `setup`.
        seed: Fixes the partition and every client's order.

    Attributes:
        clients: The examples of each client, lists or other sequences; one that has none is never sampled.
        validation_set: Held-out examples, shared by all clients.
        tokenizer_of: The model whose tokenizer the orchestrator has set, if it was None.
        test_set: Further held-out examples; empty when there are none.

    Example::

        class Letters(FederatedDataModule):
            def setup(self, stage: str) -> None:
                tokenizer = self.resolve_tokenizer()
                texts = ["aaaa bbbb", "cccc dddd"]
                self.clients = [language_blocks(token_stream([text], tokenizer), 4) for text in texts]
                self.validation_set = language_blocks(token_stream(["eeee"], tokenizer), 4)
    """

    def __init__(
        self,
        batch_size: int = 4,
        eval_batch_size: int = 32,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.made_with = given(self, inspect.currentframe())
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.tokenizer = tokenizer
        self.tokenizer_of: str | None = None
        self.seed = seed
        self.clients: Sequence[Sequence[Any]] = []
        self.validation_set: list[Any] = []
        self.test_set: list[Any] = []
        self._names: list[str] = []
        self._orders: dict[int, tuple[int, list[int]]] = {}

    @override
    def setup(self, stage: str) -> None:
        """Fill `clients`, `validation_set` and `test_set`, whatever the stage; a second call changes nothing."""
        raise NotImplementedError(f"{type(self).__name__}.setup must fill clients and validation_set")

    @property
    def num_clients(self) -> int:
        """Number of clients, known after `setup`."""
        if not len(self.clients):
            raise RuntimeError('the clients are not known yet: call setup("fit") first')
        return len(self.clients)

    @property
    def holders(self) -> list[int]:
        """Ascending ids of the clients that hold an example: only they are sampled."""
        empty = {client for client, examples in enumerate(self.clients) if not len(examples)}
        return [client for client in range(self.num_clients) if client not in empty]

    def client_of_held_out(self, number: int) -> int:
        """Whose a held-out example is, by its number in the validation or the test set: they are dealt in turn."""
        return number % self.num_clients

    @property
    def client_names(self) -> list[str]:
        """One name per client: what it holds, or `client_k`."""
        return self._names or [f"client_{k}" for k in range(self.num_clients)]

    @client_names.setter
    def client_names(self, names: Sequence[str]) -> None:
        self._names = list(names)

    @property
    def label_names(self) -> Sequence[str] | None:
        """The names of the classes by index, known after `setup`; None where there are none."""
        return None

    @property
    def told_apart_by(self) -> LabelWords | None:
        """By which token of a labelled word the classes differ, known after `setup`; None where there are no such."""
        return None

    def deal(self, examples: Sequence[Any], partitioner: Partitioner, **known: Any) -> None:
        """Give the training examples to the clients: sets `clients`, and `client_names` if the partitioner has names.

        Args:
            examples: Encoded, in the order in which the partitioner is told of them. Another sequence than a list is
                kept as it is, and read when an example is used: see `hosfl_lightning.data.dealt.TokenRows`.
            partitioner: Says which client holds which.
            known: What it is told beside their number: `num_clients`, `labels`, `files` and `field` of `Examples`.

        Raises:
            ValueError: If it breaks its contract, or needs what is not known.
        """
        told = Examples(len(examples), type(self).__name__, **known)
        self._names, parts = deal(partitioner, told, self.seed)
        if isinstance(examples, list):
            self.clients = [[examples[i] for i in part.tolist()] for part in parts]
        else:
            ends = np.cumsum([len(part) for part in parts])
            self.clients = Dealt(examples, torch.cat(parts).numpy(), ends)

    def resolve_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself, loaded once if only its name was given."""
        self.tokenizer = load_tokenizer(self.tokenizer)
        return self.tokenizer

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """The batch that a list of B examples makes.

        Returns:
            input_ids, attention_mask (B, T) and labels ((B, T), -100 where no loss is taken; or (B,)), all int64,
            padded on the right to the longest row.
        """
        return collate(examples, pad_token_id(self.resolve_tokenizer()))

    def client_batch(self, client: int, round: int) -> dict[str, Tensor]:
        """The minibatch that a client uses in a round.

        Args:
            client: 0..num_clients - 1.
            round: 0, 1, ...

        Returns:
            What `collate` makes of the examples.

        Raises:
            ValueError: If the client or the round is out of range, or the client holds no example.
        """
        if not 0 <= client < self.num_clients:
            raise ValueError(f"client={client} is not in 0..{self.num_clients - 1}")
        if round < 0:
            raise ValueError(f"round={round}: rounds count from 0")
        examples = self.clients[client]
        if not len(examples):
            raise ValueError(f"client={client} holds no example, so it has no minibatch; those that do: holders")
        return self.collate([examples[i] for i in self.chosen(client, round)])

    def chosen(self, client: int, round: int) -> list[int]:
        """Which of its examples are in a client's minibatch of a round."""
        size, batches = self._batches(client)
        epoch, batch = divmod(round, batches)
        return self._order(client, epoch)[batch * size : (batch + 1) * size]

    def most_uses(self, client: int, rounds: int) -> int:
        """In how many of so many rounds an example of the client is chosen at most: once an epoch."""
        return -(-rounds // self._batches(client)[1])

    @override
    def val_dataloader(self) -> EVAL_DATALOADERS:
        """The validation set in order."""
        return self._loader(self.validation_set, "validation")

    @override
    def test_dataloader(self) -> EVAL_DATALOADERS:
        """The test set in order."""
        return self._loader(self.test_set, "test")

    @override
    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """The test set, or the validation set where there is none."""
        return self._loader(self.test_set or self.validation_set, "test or validation")

    def _batches(self, client: int) -> tuple[int, int]:
        """Examples of a minibatch, and minibatches of an epoch."""
        held = len(self.clients[client])
        size = min(self.batch_size, held)
        return size, held // size

    def _order(self, client: int, epoch: int) -> list[int]:
        """The client's order in an epoch; the last one is kept, as a cache and nothing more."""
        if len(self.clients[client]) == 1:
            return [0]
        known = self._orders.get(client)
        if known is None or known[0] != epoch:
            order = permutation(len(self.clients[client]), self.seed, Domain.DATA_ORDER, round=epoch, client=client)
            known = self._orders[client] = (epoch, order.tolist())
        return known[1]

    def _loader(self, examples: list[Any], what: str) -> DataLoader:
        if not examples:
            raise ValueError(f"data: {type(self).__name__} has no {what} examples")
        return DataLoader(
            examples,  # type: ignore[arg-type]
            batch_size=self.eval_batch_size,
            collate_fn=self.collate,
            generator=torch.Generator(),  # without its own, every new iterator draws from the global one
        )
