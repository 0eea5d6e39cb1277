"""The per-role memory meter: how many bytes of tensors client and server each hold, in one process.

A split model trained in simulation shares its process with the other half, so no operating-system figure says what a
client alone would need. The meter follows tensor storages instead, and books each to a *role*:

    live(r) = Σ bytes of the storages created (or adopted) under role r and not yet freed
    peak(r) = max of live(r) since the last ``reset_peak(r)``

Three numbers describe a role, and a report that leaves one out can flatter any method:

=================  ===================================================================================================
resident           ``live(r)`` between rounds: parameters, buffers, optimizer state, whatever never leaves
peak of a phase    ``reset_peak(r)`` before the phase, ``peak(r)`` after it: working bytes are that minus the resident
held while waiting ``live(r)`` minus resident after the smashed data left and before λ is back: the autograd graph of a
                   first-order client, no more than z for a forward-only one
=================  ===================================================================================================

The bytes are those that PyTorch asks of its allocator for tensors. Scratch that a kernel allocates and frees inside one
operator is invisible (on CPU: convolutions, bfloat16 products, the backward of attention, layer norm and embeddings),
and so are an allocator's rounding and fragmentation. On CUDA, report ``torch.cuda.max_memory_allocated`` beside it: it
sees all that, but cannot tell the roles apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from typing_extensions import override

_UNASSIGNED = "unassigned"


class _Account:
    """Bytes of one role."""

    __slots__ = ("live", "peak")

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0

    def change(self, nbytes: int) -> None:
        self.live += nbytes
        if self.live > self.peak:
            self.peak = self.live


class _Entry:
    """One storage that is followed: the account that pays for it, its bytes, and the reference that reports its end."""

    __slots__ = ("account", "nbytes", "reference")

    def __init__(self, account: _Account) -> None:
        self.account = account
        self.nbytes = 0
        self.reference: weakref.ref[torch.UntypedStorage] | None = None


class MemoryMeter(TorchDispatchMode):
    """Books every tensor storage that is created while the mode is active to the role current at its creation.

    A storage stays with its first role until it is freed, whoever uses it: clone a tensor where it changes hands, or
    its sender pays for it. Views and in-place results are the storage they share. A storage that is older than the
    meter, or was made while it was suspended, is not counted until it is adopted, so adopt parameters and inputs first.
    Strided tensors on real devices are followed, on all devices together; sparse and meta tensors are not. Storages
    that leave are noticed after the mode has ended, too, and an ended meter may be entered again.

    Costs about 10 µs an operator: some 5 % of a forward at hidden size 512 and 8 x 128 tokens, more than the forward
    itself for a toy model. So meter one round in many, and :meth:`suspend` it in loops of many small operators.

    Example::

        meter = MemoryMeter()
        meter.adopt("client", client.parameters())
        with meter, meter.role("client"):
            resident = meter.live("client")
            z = client(batch)
        print(meter.peak("client") - resident, meter.live("client") - resident)
    """

    def __init__(self) -> None:
        super().__init__()
        self._accounts: dict[str, _Account] = {}
        self._entries: dict[int, _Entry] = {}
        self._current = self._account(_UNASSIGNED)
        self._suspended = False

    def adopt(self, role: str, tensors: Iterable[Tensor]) -> None:
        """Books storages that exist already, such as parameters, buffers and inputs, to ``role``.

        Args:
            role: The role that pays.
            tensors: Any tensors; a storage shared by several, or already booked to a role, is booked once and stays.
        """
        account = self._account(role)
        for tensor in tensors:
            self._follow(tensor, account)

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Makes ``name`` the role that pays for new storages; roles nest, and the innermost pays."""
        previous, self._current = self._current, self._account(name)
        try:
            yield
        finally:
            self._current = previous

    @contextmanager
    def suspend(self) -> Iterator[None]:
        """Stops booking new storages, for loops of many small operators such as a chunked perturbation.

        The cost of the meter is per operator and is then a multiple of the work. What is created in the meantime is
        never counted, what is freed in the meantime is: account for the loop's scratch by its known chunk size. Free of
        cost when the meter is the innermost dispatch mode; below another one, operators still pass through it.
        """
        innermost = _get_current_dispatch_mode() is self
        if innermost:
            self.__exit__(None, None, None)
        previous, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = previous
            if innermost:
                self.__enter__()

    def live(self, role: str) -> int:
        """Bytes that ``role`` holds now.

        Raises:
            KeyError: ``role`` was never adopted to or entered.
        """
        return self._known(role).live

    def peak(self, role: str) -> int:
        """Most bytes that ``role`` held at once since the last :meth:`reset_peak`.

        Raises:
            KeyError: ``role`` was never adopted to or entered.
        """
        return self._known(role).peak

    def reset_peak(self, role: str | None = None) -> None:
        """Starts a new phase: the peak of ``role`` (of every role if None) is what it holds now.

        Raises:
            KeyError: ``role`` was never adopted to or entered.
        """
        for account in self._accounts.values() if role is None else [self._known(role)]:
            account.peak = account.live

    @override
    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._suspended:
            account = None if _returns_alias(func) else self._current
            for tensor in _tensors(out):
                self._follow(tensor, account)
        return out

    def _follow(self, tensor: Tensor, account: _Account | None) -> None:
        """Books a storage not seen before to ``account``, and the growth of a known one (``resize_``) to its owner."""
        if tensor.is_meta or tensor.layout is not torch.strided or tensor._is_zerotensor():
            return
        storage = tensor.untyped_storage()
        # A storage's Python object lives exactly as long as the storage, so its id names it and its end is the end.
        key = id(storage)
        entry = self._entries.get(key)
        if entry is None:
            if account is None:
                return
            entry = self._entries[key] = _Entry(account)
            entry.reference = weakref.ref(storage, partial(self._freed, key))
        nbytes = storage.nbytes()
        if nbytes != entry.nbytes:
            # A reallocation holds the old bytes until the new ones are filled.
            entry.account.change(nbytes)
            entry.account.change(-entry.nbytes)
            entry.nbytes = nbytes

    def _freed(self, key: int, _: object) -> None:
        entry = self._entries.pop(key)
        entry.account.change(-entry.nbytes)

    def _account(self, role: str) -> _Account:
        return self._accounts.setdefault(role, _Account())

    def _known(self, role: str) -> _Account:
        if role not in self._accounts:
            raise KeyError(f"no role {role!r} in this memory meter; known: {', '.join(self._accounts)}")
        return self._accounts[role]


def plain_forward_peak(forward: Callable[[], object]) -> int:
    """Bytes that ``forward()`` needs without autograd beyond those that exist already: the yardstick of a client.

    Args:
        forward: A call of no arguments, such as ``lambda: client(batch)``; its result is dropped.
    """
    with MemoryMeter() as meter, meter.role("forward"), torch.no_grad():
        forward()
    return meter.peak("forward")


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, a shared one once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@cache
def _returns_alias(func: torch._ops.OpOverload) -> bool:
    """Whether an operator returns storages it was given (views, in-place, out=) and creates none."""
    return any(value.alias_info is not None for value in func._schema.returns)


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for item in out:
            yield from _tensors(item)
