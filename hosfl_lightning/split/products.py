"""Matrix products of a compiled graph on a CPU by oneDNN, where MKL takes another vendor's processor for an old one."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from typing_extensions import override

#: Multiplications from which on oneDNN is worth its call; a function of the shape alone, as the graph is.
WORTH = 1 << 22

LIBRARY = torch.library.Library("hosfl_lightning", "FRAGMENT")
LIBRARY.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")


def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``a b + bias`` of ``(m, k)``, ``(k, n)`` and ``(n,)``, fp32, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


LIBRARY.impl("product", product, "CPU")


@torch.library.register_fake("hosfl_lightning::product", lib=LIBRARY)
def _shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


class Products(CustomGraphPass):
    """Puts `product` in the place of the large fp32 products of a graph, before inductor generates code."""

    @override
    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and _worth(node):
                *bias, a, b = node.args
                with graph.inserting_before(node):
                    new = graph.call_function(
                        torch.ops.hosfl_lightning.product.default, (a, b, bias[0] if bias else None)
                    )
                new.meta.update(node.meta)
                node.replace_all_uses_with(new)
                graph.erase_node(node)

    @override
    def uuid(self) -> str:
        """Part of the key under which inductor keeps its graphs."""
        return f"hosfl_lightning.products 1 {WORTH}"


def has_products() -> bool:
    """Whether this torch has oneDNN's."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _worth(node: fx.Node) -> bool:
    out, k = node.meta["val"], node.args[-1].meta["val"].shape[0]  # type: ignore[union-attr]
    bias = node.args[0].meta["val"] if len(node.args) == 3 else None  # type: ignore[union-attr]
    plain = not node.kwargs and (bias is None or bias.ndim == 1)
    return plain and out.device.type == "cpu" and out.dtype == torch.float32 and out.numel() * k >= WORTH
