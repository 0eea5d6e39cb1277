"""``hosfl export-client``: the client's half of a recipe, for devices without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import SUPPRESS

from hosfl_client.manifest import Manifest
from hosfl_lightning.device.export import export_client
from hosfl_lightning.models import SplitModule
from hosfl_lightning.recipe import Parser, read_files

#: Keys of a recipe that say nothing of the client's half.
BESIDE = ("seed_everything", "trainer", "data")
#: Correlation of the probes below which they are no estimate any more.
LEAST = 0.95
DESCRIPTION = """\
Write the client's half of a recipe, or of a run's config.yaml, as an ONNX graph and what belongs to it, for
hosfl-client: no PyTorch runs there. What was measured on the written half is printed.
"""


def main(args: list[str]) -> None:
    """``hosfl export-client --config RECIPE --out phone.onnx [--quantize none|int8|int4]``."""
    Parser.files = read_files(args)
    parser = Parser(prog="hosfl export-client", description=DESCRIPTION)
    parser.add_argument("-c", "--config", action="config", help="A recipe, or the config.yaml of a run.")
    parser.add_lightning_class_args(SplitModule, "model", subclass_mode=True, required=True)
    for name in BESIDE:
        parser.add_argument(f"--{name}", type=Any, default=None, help=SUPPRESS)
    parser.add_function_arguments(export_client, skip={"model"})
    given = parser.parse_args(args)
    given.model.init_args.part = "client"
    for name in BESIDE:
        given.pop(name)
    model = parser.instantiate_classes(given).model
    written = export_client(model, given.out, given.quantize, given.mu)
    print(table(written))


def table(manifest: Manifest) -> str:
    """What was written, and what was measured."""
    figures: Mapping[str, Any] = manifest.figures
    lines = [f"{', '.join(manifest.files)} and the manifest", "", f"{'batch':<16}{'max |Δz|':>12}{'relative':>12}"]
    lines += [f"{name:<16}{there:>12.1e}{relative:>12.1e}" for name, there, relative in figures["z"]]
    probes = figures["probes"]
    if probes is None:
        return "\n".join([*lines, "", "probes: their exact derivative is zero at the start, nothing to compare"])
    lines += ["", f"probes (mu={figures['mu']}): correlation with the exact derivative {probes:.4f}"]
    if probes < LEAST:
        lines.append(
            f"warning: below {LEAST} probes on this half hardly estimate the gradient; --quantize "
            f"{'int8' if manifest.quantization == 'int4' else 'none'}, or another --mu"
        )
    return "\n".join(lines)
