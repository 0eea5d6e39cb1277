"""An oracle in Python's integers, written from the definition and sharing nothing with the package."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Words = tuple[int, int, int, int]


def _philox(counter: Words, key: tuple[int, int]) -> Words:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            product1 // 2**32 ^ c1 ^ k0,
            product1 % 2**32,
            product0 // 2**32 ^ c3 ^ k1,
            product0 % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.fixture(scope="session")
def philox() -> Callable[[Words, tuple[int, int]], Words]:
    return _philox


@pytest.fixture(scope="session")
def block_bits() -> Callable[..., int]:
    """The 128 bits of a block as one integer, word 0 lowest: element e of Rademacher is bit e mod 128."""

    def bits(seed: int, domain: int, tensor: int, block: int, *, round: int = 0, field: int = 0, probe: int = 0) -> int:
        c1 = (block // 2**32) * 2**24 + domain * 2**16 + tensor
        counter = (block % 2**32, c1, field * 2**12 + probe, round)
        return sum(word << 32 * i for i, word in enumerate(_philox(counter, (seed % 2**32, seed // 2**32))))

    return bits


class MemoryMeter(TorchFunctionMode):
    """Bytes of the storages that torch functions make while it is on: now and at most.

    A function mode, because entering a dispatch mode imports torch._dynamo.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        return sum(self.live.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                pointer = storage.data_ptr()
                if pointer not in inputs and pointer not in self.live:
                    self.live[pointer] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, pointer, None)
        self.peak = max(self.peak, self.now)
        return result


@pytest.fixture
def memory_meter() -> MemoryMeter:
    return MemoryMeter()
