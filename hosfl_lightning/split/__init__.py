"""Cutting a Hugging Face model into a client half and a server half, and LoRA on both."""

from hosfl_lightning.split.adapters import Lora, LoraHalf, add_lora
from hosfl_lightning.split.auxiliary import LinearHead, copied_head, linear_head
from hosfl_lightning.split.build import load_client_half, load_server_half
from hosfl_lightning.split.cut import check_tied_head, split
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.export import export_adapter
from hosfl_lightning.split.halves import ClientHalf, ServerHalf
from hosfl_lightning.split.image_halves import ImageClientHalf, ImageServerHalf
from hosfl_lightning.split.images import split_images
from hosfl_lightning.split.side import Side, add_side
from hosfl_lightning.split.structure import LayerPath, find_layers

__all__ = [
    "ClientHalf",
    "ImageClientHalf",
    "ImageServerHalf",
    "LayerPath",
    "LinearHead",
    "Lora",
    "LoraHalf",
    "ServerHalf",
    "Side",
    "SplitError",
    "add_lora",
    "add_side",
    "check_tied_head",
    "copied_head",
    "export_adapter",
    "find_layers",
    "linear_head",
    "load_client_half",
    "load_server_half",
    "split",
    "split_images",
]
