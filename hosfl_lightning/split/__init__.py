"""Cutting a Hugging Face model into a client half and a server half, LoRA on both, and side adapters."""

from hosfl_lightning.split.adapters import Lora, LoraHalf, add_lora
from hosfl_lightning.split.auxiliary import LinearHead, copied_head, linear_head
from hosfl_lightning.split.build import build_client, build_client_half, load_client_half, load_server_half
from hosfl_lightning.split.cut import check_tied_head, split
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.export import export_adapter
from hosfl_lightning.split.halves import ClientHalf, ServerHalf
from hosfl_lightning.split.head import ClientHead, Middle, split_server
from hosfl_lightning.split.image_halves import ImageClientHalf, ImageServerHalf
from hosfl_lightning.split.images import place_side_images, split_images
from hosfl_lightning.split.placement import Placement, add_side, place_side
from hosfl_lightning.split.run import run
from hosfl_lightning.split.side import Side
from hosfl_lightning.split.structure import LayerPath, find_layers

__all__ = [
    "ClientHalf",
    "ClientHead",
    "ImageClientHalf",
    "ImageServerHalf",
    "LayerPath",
    "LinearHead",
    "Lora",
    "LoraHalf",
    "Middle",
    "Placement",
    "ServerHalf",
    "Side",
    "SplitError",
    "add_lora",
    "add_side",
    "build_client",
    "build_client_half",
    "check_tied_head",
    "copied_head",
    "export_adapter",
    "find_layers",
    "linear_head",
    "load_client_half",
    "load_server_half",
    "place_side",
    "place_side_images",
    "run",
    "split",
    "split_images",
    "split_server",
]
