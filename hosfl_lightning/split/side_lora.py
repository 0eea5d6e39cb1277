"""LoRA and a side adapter as one PEFT adapter: a method of PEFT's, registered when this is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import peft
from peft import LoraConfig, LoraModel, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from torch import nn

from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.placement import Placement
from hosfl_lightning.split.side import NAME, Side, Tap, detach_side

#: ``peft_type`` in adapter_config.json; who reads it without this package is told by PEFT that it does not know it.
PEFT_TYPE = "HOSFL_LIGHTNING_SIDE_LORA"
#: Tried with these; PEFT has no public way to add a method, and other versions find an adapter's tensors otherwise.
TRIED = "0.21."


@dataclass
class SideLoraConfig(LoraConfig):
    """PEFT's LoRA settings, and where the bottlenecks go.

    Attributes:
        side: a `Placement` as plain values.

    Raises:
        SplitError: PEFT is of a version with which this was not tried.
    """

    side: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not peft.__version__.startswith(TRIED):
            raise SplitError(
                f"a side adapter beside LoRA needs peft {TRIED}x, and this is {peft.__version__}: "
                f"pip install 'peft=={TRIED}*'."
            )
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def placement(self) -> Placement:
        """Of the bottlenecks."""
        return Placement(**{**self.side, "side": Side(**self.side["side"])})


class SideLoraModel(LoraModel):
    """PEFT's LoRA, with bottlenecks from the layers below the cut to the smashed data."""

    tuner_layer_cls = (LoraLayer, Tap)  # type: ignore[assignment]  # PEFT asks isinstance

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise ValueError("a model takes one adapter with side modules: unload() the other one first.")

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        assert isinstance(config, SideLoraConfig)
        config.placement().attach(model, adapter_name)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        named = f".{NAME}.{adapter_name}."
        if named in key:
            return key.replace(named, f".{NAME}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    def _check_merge_allowed(self) -> None:
        raise ValueError("side modules are not linear, so they cannot be merged into the base: keep the PeftModel.")

    def delete_adapter(self, adapter_name: str) -> None:
        """LoRA's part and the bottlenecks, which PEFT would leave."""
        super().delete_adapter(adapter_name)
        detach_side(self.model)

    def unload(self) -> nn.Module:
        """The base model, without LoRA and without bottlenecks."""
        base: nn.Module = super().unload()
        detach_side(base)
        return base


_KEY = cast(PeftType, PEFT_TYPE)  # PEFT's own keys are strings too, of a closed enumeration
PEFT_TYPE_TO_CONFIG_MAPPING[_KEY] = SideLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[_KEY] = SideLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[_KEY] = SideLoraModel.prefix
