"""What a partitioner is told, what it must return, and the check of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

Parts = Sequence[Tensor] | Mapping[str, Tensor]
CONTRACT = "a partitioner returns, for each client, a 1-D tensor of integers from 0..n-1, and no index twice"


class NotKnownError(ValueError):
    """A partitioner asks for what the data does not have."""


class Examples:
    """What a partitioner is told of n training examples. What it asks for and the data lacks ends with one line.

    Args:
        count: n.
        owner: The class of the data, for messages.
        num_clients: The setting `num_clients` of the data.
        labels: The class of each example.
        files: The file of each example.
        field: Gives the values of a named field, one for each example.
    """

    def __init__(
        self,
        count: int,
        owner: str = "the data",
        num_clients: int | None = None,
        labels: Sequence[Hashable] | None = None,
        files: Sequence[str] | None = None,
        field: Callable[[str], Sequence[Hashable]] | None = None,
    ) -> None:
        self.owner = owner
        self.requested_clients = num_clients
        self._count, self._labels, self._files, self._field = count, labels, files, field

    def __len__(self) -> int:
        """Number of examples."""
        return self._count

    @property
    def num_clients(self) -> int:
        """How many clients to make; only who reads it needs the setting."""
        if self.requested_clients is None:
            raise NotKnownError(f"the number of clients: set num_clients of {self.owner}")
        return self.requested_clients

    @property
    def labels(self) -> Sequence[Hashable]:
        """The class of each example, as an index."""
        return self._known(self._labels, "the label of each example")

    @property
    def files(self) -> Sequence[str]:
        """The path of the file that each example is from; examples of a file stand together."""
        return self._known(self._files, "the file of each example")

    def field(self, name: str) -> Sequence[Hashable]:
        """The value of a field for each example, as the file has it."""
        return self._known(self._field, f"field {name!r} of each example")(name)

    def _known(self, value: Any, what: str) -> Any:
        if value is None:
            raise NotKnownError(f"{what}, which {self.owner} does not have: take a partitioner that goes by others")
        return value


class Partitioner(ABC):
    """S_1, ..., S_k ⊆ {0..n-1} with S_i ∩ S_j = ∅ for i ≠ j, and ∪_j S_j = {0..n-1} where `complete`.

    A subclass says which of n examples client j holds. It must be a pure function of its arguments, so that every
    process, method and resumed run meets the same clients: take random numbers from `numpy.random.default_rng(seed)` or
    a `torch.Generator`, not from the global state. A client may be left empty; it is never sampled.

    Attributes:
        complete: Whether every example must be with a client. A subclass that leaves examples out sets it False.

    Example::

        class OddAndEven(Partitioner):
            def __call__(self, examples: Examples, seed: int) -> list[Tensor]:
                return [torch.arange(first, len(examples), 2) for first in range(2)]
    """

    complete: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, examples: Examples, seed: int) -> Parts:
        """Deal the examples.

        Args:
            examples: How many there are, how many clients are asked for, and labels, fields and files where known.
            seed: The data's seed.

        Returns:
            An index tensor per client, 1-D, of any integer type and in any order; or a dictionary of them, whose keys
            name the clients.
        """


def deal(partitioner: Partitioner, examples: Examples, seed: int) -> tuple[list[str], list[Tensor]]:
    """Call a partitioner and check what it returns.

    Returns:
        The clients' names, empty if it gives none, and an ascending index tensor (int64) per client.

    Raises:
        ValueError: If it breaks the contract, or asks for what is not known; names its class.
    """
    name = type(partitioner).__name__
    try:
        found = partitioner(examples, seed)
    except NotKnownError as error:
        raise ValueError(f"partitioner: {name} needs {error}") from None
    if not isinstance(found, Mapping | list | tuple):
        raise ValueError(f"partitioner: {name} returns a {type(found).__name__}, no list or dictionary; {CONTRACT}")
    names = [str(key) for key in found] if isinstance(found, Mapping) else []
    given = list(found.values()) if isinstance(found, Mapping) else found
    parts = _ascending(given, len(examples)) or [
        _indices(part, f"{name} gives client {k}", len(examples)) for k, part in enumerate(given)
    ]
    _check_whole(parts, partitioner, examples)
    return names, parts


def say(line: str) -> None:
    """One line to the user, from one process."""
    if not getattr(rank_zero_only, "rank", 0):
        print(line, flush=True)


def _ascending(parts: Sequence[Any], n: int) -> list[Tensor]:
    """All clients' at once; none where a part has to be looked at by itself."""
    if not parts or any(not isinstance(p, Tensor) or p.ndim != 1 or p.dtype != torch.int64 or p.is_cuda for p in parts):
        return []
    sizes, joined = [len(part) for part in parts], torch.cat(list(parts))
    if len(joined) and not 0 <= int(joined.min()) <= int(joined.max()) < n:
        return []
    first = torch.arange(len(parts)).repeat_interleave(torch.tensor(sizes)) * n  # client k's are in k·n .. k·n + n − 1
    return [*((first + joined).sort().values - first).split(sizes)]


def _indices(part: Any, who: str, n: int) -> Tensor:
    """One client's, ascending."""
    try:
        indices = torch.as_tensor(part, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"partitioner: {who} a {type(part).__name__}, which is no tensor; {CONTRACT}") from error
    if indices.shape == (0,):
        return indices.long()  # an empty list is a tensor of floats
    if indices.ndim != 1 or indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        found = f"{str(indices.dtype).removeprefix('torch.')} of shape {tuple(indices.shape)}"
        raise ValueError(f"partitioner: {who} {found}; {CONTRACT}")
    indices = indices.long().sort().values
    outside = [index for index in (int(indices[0]), int(indices[-1])) if not 0 <= index < n]
    if outside:
        raise ValueError(f"partitioner: {who} index {outside[0]}, and there are {n} examples; {CONTRACT}")
    return indices


def _check_whole(parts: list[Tensor], partitioner: Partitioner, examples: Examples) -> None:
    """All clients together."""
    name, wanted = type(partitioner).__name__, examples.requested_clients
    if wanted not in (None, len(parts)):
        raise ValueError(f"num_clients={wanted}: {name} makes {len(parts)} clients; set it to that or null")
    counts = torch.bincount(torch.cat([torch.empty(0, dtype=torch.int64), *parts]), minlength=len(examples))
    if (counts > 1).any():
        raise ValueError(
            f"partitioner: {name} gives index {int(counts.argmax())} {int(counts.max())} times; {CONTRACT}"
        )
    left = int((counts == 0).sum())
    if left == len(examples):
        raise ValueError(f"partitioner: {name} gives none of {len(examples)} examples to a client")
    if left and partitioner.complete:
        raise ValueError(
            f"partitioner: {name} leaves out {left} of {len(examples)} examples; give each to a client, or set "
            f"complete = False in {name}"
        )
    if left:
        say(f"{name}: {left} of {len(examples)} examples are with no client")
    empty = sum(not len(part) for part in parts)
    if empty:
        say(f"{name}: {empty} of {len(parts)} clients hold no example and are never sampled")
