"""A device answers as a client in PyTorch with the same data does, and refuses what it cannot do by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosfl_client import messages as here
from hosfl_client.endpoint import Endpoint
from hosfl_client.examples import DataSettings, read_examples
from hosfl_client.half import OnnxHalf
from hosfl_client.minibatches import Minibatches
from hosfl_client.refusals import EndpointError, TermsError
from hosfl_client.text import Text
from lightning.fabric import Fabric

from hosfl_lightning.clients import Endpoint as TorchEndpoint
from hosfl_lightning.clients import Minibatches as TorchMinibatches
from hosfl_lightning.data import TextData
from hosfl_lightning.run.settings import RunSettings
from hosfl_lightning.wire import (
    Codecs,
    CodedGradient,
    Multiplier,
    ProbeRequest,
    ProjectedGradients,
    SmashedData,
    StepRequest,
    Terms,
    Update,
    decode,
    encode,
)
from tests.fleet.pipe_client import model_of
from tests.fleet.test_pipe import CASES

TEXT = "the quick brown fox jumps over the lazy dog; " * 12
