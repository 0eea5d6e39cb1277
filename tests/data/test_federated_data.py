from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data import Example, FederatedDataModule
from hosfl_lightning.rng import Domain, permutation

SIZES = (10, 3, 4)


class NumberedData(FederatedDataModule):
    """Client k's example i is 1 + i tokens 100·k + i, so that a batch shows what it is made of."""

    def setup(self, stage: str) -> None:
        self.clients = [[numbered(100 * client + i, 1 + i) for i in range(size)] for client, size in enumerate(SIZES)]
        self.validation_set = [numbered(i, 1 + i % 2) for i in range(5)]


def numbered(token: int, length: int) -> Example:
    return Example([token] * length, [token] * length)


def make(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> NumberedData:
    data = NumberedData(**{"batch_size": 4, "tokenizer": tokenizer, "seed": 7, **settings})
    data.setup("fit")
    return data


def members(data: FederatedDataModule, client: int, round: int) -> list[int]:
    return data.client_batch(client, round)["input_ids"][:, 0].tolist()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_batch_is_a_function_of_seed_client_and_round(tokenizer: PreTrainedTokenizerBase) -> None:
    wanted = [(client, round) for client in range(3) for round in range(6)]
    forward = make(tokenizer)
    first = {at: forward.client_batch(*at) for at in wanted}
    with torch.random.fork_rng():
        torch.manual_seed(999)
        backward = make(tokenizer)
        again = {at: backward.client_batch(*at) for at in reversed(wanted)}
    assert all(same(first[at], again[at]) for at in wanted)
    assert all(same(first[at], forward.client_batch(*at)) for at in wanted)
    assert not same(first[0, 0], make(tokenizer, seed=8).client_batch(0, 0))


def test_the_order_is_the_counter_generators(tokenizer: PreTrainedTokenizerBase) -> None:
    data = make(tokenizer)
    order = permutation(10, 7, Domain.DATA_ORDER, round=3, client=0).tolist()
    assert members(data, 0, 6) + members(data, 0, 7) == order[:8]
    order = [200 + i for i in permutation(4, 7, Domain.DATA_ORDER, round=5, client=2).tolist()]
    assert members(data, 2, 5) == order


def test_no_example_repeats_within_an_epoch_and_all_are_used_over_epochs(tokenizer: PreTrainedTokenizerBase) -> None:
    data = make(tokenizer)
    epochs = [members(data, 0, 2 * epoch) + members(data, 0, 2 * epoch + 1) for epoch in range(20)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert set().union(*epochs) == set(range(10))
    assert len({tuple(epoch) for epoch in epochs}) > 15


def test_a_small_client_uses_all_it_has_and_nothing_twice(tokenizer: PreTrainedTokenizerBase) -> None:
    data = make(tokenizer)
    assert all(sorted(members(data, 1, round)) == [100, 101, 102] for round in range(5))


def test_batches_hold_only_the_clients_own_examples(tokenizer: PreTrainedTokenizerBase) -> None:
    data = make(tokenizer)
    for client, round in [(c, r) for c in range(3) for r in range(5)]:
        assert all(token // 100 == client for token in members(data, client, round))


def test_padding_and_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = make(tokenizer).client_batch(0, 0)
    lengths = batch["input_ids"][:, 0] + 1
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    assert torch.equal(batch["attention_mask"], mask.long())
    assert torch.equal(batch["input_ids"], torch.where(mask, batch["input_ids"][:, :1], tokenizer.pad_token_id))
    assert torch.equal(batch["labels"], torch.where(mask, batch["input_ids"], -100))


def test_loaders_give_everything_in_order(tokenizer: PreTrainedTokenizerBase) -> None:
    data = make(tokenizer, eval_batch_size=2)
    for loader in (data.val_dataloader(), data.predict_dataloader()):
        batches = list(loader)
        assert [batch["input_ids"][:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
        assert batches[0]["labels"].tolist() == [[0, -100], [1, 1]]
    with pytest.raises(ValueError, match="NumberedData has no test examples"):
        data.test_dataloader()
    data.test_set = data.clients[1]
    assert next(iter(data.test_dataloader()))["input_ids"][:, 0].tolist() == [100, 101]
    assert next(iter(data.predict_dataloader()))["input_ids"][:, 0].tolist() == [100, 101]


def test_names_and_number_of_clients(tokenizer: PreTrainedTokenizerBase) -> None:
    data = make(tokenizer)
    assert data.num_clients == 3
    assert data.client_names == ["client_0", "client_1", "client_2"]
    with pytest.raises(RuntimeError, match=r'call setup\("fit"\) first'):
        _ = NumberedData().num_clients


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"eval_batch_size": -1}])
def test_sizes_must_be_positive(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*at least 1"):
        NumberedData(**settings)


@pytest.mark.parametrize(
    ("client", "round", "message"), [(3, 0, "client=3 is not in 0..2"), (-1, 0, "client"), (0, -1, "round")]
)
def test_out_of_range(tokenizer: PreTrainedTokenizerBase, client: int, round: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokenizer).client_batch(client, round)


def test_a_subclass_must_have_a_setup() -> None:
    with pytest.raises(NotImplementedError, match=r"FederatedDataModule.setup must fill"):
        FederatedDataModule().setup("fit")
