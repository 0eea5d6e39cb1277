"""The data of most tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.data.tokenization import Example


class RandomTokens(FederatedDataModule):
    """Clients with examples of different number and length; two tokens alternate, so there is something to learn.

    Args:
        lengths: Per client, the lengths of its examples.
        seed: Of the tokens.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], batch_size: int = 4, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=4, seed=seed)
        self.lengths = lengths

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def example(length: int) -> Example:
            start = int(torch.randint(3, 9, (), generator=generator))
            ids = [start + i % 2 for i in range(length)]
            return Example(ids, list(ids))

        self.clients = [[example(n) for n in of_client] for of_client in self.lengths]
        self.validation_set = [example(12) for _ in range(8)]
