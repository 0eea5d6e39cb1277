"""The wire's engine here: PyTorch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from hosfl_client.wire.arrays import WORDS, Arrays, Form


class TorchArrays(Arrays):
    """Tensors on any device; what is read is on the CPU."""

    def __init__(self) -> None:
        super().__init__({code: getattr(torch, word) for code, word in WORDS.items()})

    @override
    def word(self, code: str) -> str:
        return str(self.dtypes.get(code, code))

    @override
    def are(self, value: object) -> bool:
        return isinstance(value, Tensor)

    @override
    def buffer(self, array: Tensor) -> memoryview:
        return array.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data

    @override
    def view(self, buffers: bytearray, start: int, form: Form) -> Tensor:
        dtype = self.dtypes[form.code]
        if not form.bytes:
            return torch.empty(form.shape, dtype=dtype)
        return torch.frombuffer(buffers, dtype=dtype, count=math.prod(form.shape), offset=start).reshape(form.shape)

    @override
    def pack_bits(self, mask: Tensor) -> Tensor:
        octets = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
        return (octets << shifts).sum(1, dtype=torch.uint8)

    @override
    def unpack_bits(self, packed: Tensor, shape: list[int]) -> Tensor:
        bits = np.unpackbits(packed.numpy(), count=math.prod(shape))  # without a temporary, which torch would take
        return torch.from_numpy(bits).view(torch.bool).view(shape)

    @override
    def not_finite(self, array: Tensor) -> int:
        if not array.is_floating_point() or not array.numel():
            return 0
        if all(map(math.isfinite, torch.stack(array.aminmax()).tolist())):  # one wait for a device
            return 0
        return int((~array.isfinite()).sum())


TENSORS = TorchArrays()
manifest = TENSORS.manifest
