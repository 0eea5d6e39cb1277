"""A client of split federated fine-tuning without PyTorch."""

import os

# ONNX Runtime (1.32, Linux) reports each session to Microsoft, under a number that it gives the device, unless this is
# set before its first import; its own `disable_telemetry_events` comes too late. 0 lets it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
