"""What z and λ cost in each codec, and what the loss pays for it.

    python benchmarks/codecs.py --config recipes/tiny_lm/hosfl_lora.yaml

Runs the recipe once a pair of codecs, with its controls, and prints bytes per client and round, then the losses. What
follows the benchmark's own arguments is handed to ``hosfl fit``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from hosfl_lightning import cli
from hosfl_lightning.run.identity import hardware

#: (z, λ): the same for both, then λ coarser than z.
PAIRS = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("int8", "int8"), ("int8", "int4"), ("int4", "int4")]


def run(pair: tuple[str, ...], folder: Path, arguments: list[str]) -> dict[str, Any]:
    """The summary of one run."""
    root = folder / "_".join(pair)
    codecs = [f"--trainer.codec.{name}={codec}" for name, codec in zip(("smashed_data", "multiplier"), pair)]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    cli.main(["fit", *arguments, *codecs, *quiet, f"--trainer.default_root_dir={root}"])
    return json.loads(next(root.rglob("summary.json")).read_text())


def sizes(pair: tuple[str, ...], summary: dict[str, Any], first: dict[str, Any]) -> str:
    """A line of what is sent."""
    sent = summary["bytes_per_client_round"]
    up, down = (sent[kind] / 1024 for kind in ("smashed_data", "multiplier"))
    ratio = sum(first["bytes_per_client_round"].values()) / sum(sent.values())
    return f"{pair[0]:>5} {pair[1]:>5} {up:8.1f} {down:8.1f} {ratio:7.2f}"


def losses(pair: tuple[str, ...], summary: dict[str, Any], first: dict[str, Any]) -> str:
    """A line of what the loss pays."""
    loss, change = summary["val_loss_last"], summary["val_loss_last"] / first["val_loss_last"] - 1
    controls = [summary["controls"].get(name, {}).get("val_loss_last") for name in ("frozen", "first_order")]
    shown = " ".join("      –" if value is None else f"{value:7.4f}" for value in controls)
    gap = "      –" if summary["gap_closed"] is None else f"{summary['gap_closed']:+7.1%}"
    return f"{pair[0]:>5} {pair[1]:>5} {loss:9.4f} {change:+8.2%} {shown} {gap}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", default=[",".join(pair) for pair in PAIRS], help="z,λ for each run")
    own, arguments = parser.parse_known_args()
    pairs = [tuple(pair.split(",")) for pair in own.pairs]
    with tempfile.TemporaryDirectory() as folder:
        summaries = [run(pair, Path(folder), arguments) for pair in pairs]
    print(f"{hardware(torch.device('cpu'))}: hosfl fit {' '.join(arguments)}")
    heads = {sizes: "  up KiB down KiB   fewer", losses: " val loss   change  frozen 1st order   gap"}
    for line, head in heads.items():
        print(f"    z     λ {head}")
        print("\n".join(line(pair, summary, summaries[0]) for pair, summary in zip(pairs, summaries)), end="\n\n")


if __name__ == "__main__":
    main()
