"""A tiny split language model, its data, and an orchestrator over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.callbacks.rehearsal import Rehearsal
from hosfl_lightning.fleet import Channel
from hosfl_lightning.models.pretrained import TINY_LM, resolve
from hosfl_lightning.optim import SGD
from hosfl_lightning.padding import FILL, stack_rows
from hosfl_lightning.split import Lora, LoraHalf
from hosfl_lightning.wire import Message
from tests.random_tokens import RandomTokens

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and on a busy machine for long

VOCAB = 260  # of the byte tokenizer


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the tests run that draw their cases at random, and what some of them need."""
    parser.addoption("--fuzz", type=int, default=5000, help="damaged frames that the fuzz test decodes")
    parser.addoption("--soak", type=float, default=0, metavar="S", help="seconds of kills of remote clients and server")
    parser.addoption("--kills", type=int, default=5, metavar="N", help="SIGKILLs of a run")
    parser.addoption("--flower", metavar="PYTHON", help="the python of an environment that has flwr")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written into the home of whoever tests, by processes of their own neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSFL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-init Llama of four layers with the byte tokenizer, saved as a user's model would be."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            initializer_range=0.1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve(TINY_LM)).save_pretrained(folder)
    return folder


class Joined(RandomTokens):
    """One client that holds, each round, what the three of ``apart`` hold."""

    num_clients = 1  # type: ignore[assignment]

    def __init__(self, apart: RandomTokens) -> None:
        super().__init__(apart.lengths)
        self.apart = RandomTokens(apart.lengths)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.apart.tokenizer = self.tokenizer
        self.apart.setup(stage)

    def client_batch(self, client: int, round: int) -> dict[str, Tensor]:
        parts = [self.apart.client_batch(k, round) for k in range(3)]
        return {name: stack_rows([p[name] for p in parts], fill) for name, fill in FILL.items()}


@pytest.fixture
def make_model(tiny_folder: Path) -> Callable[..., SplitCausalLM]:
    """A fresh split model; keyword arguments replace the defaults."""

    def make(**kwargs: Any) -> SplitCausalLM:
        targets = ["q_proj", "v_proj", "down_proj"]
        lora = Lora(client=LoraHalf(r=2, target_modules=targets), server=LoraHalf(r=4, target_modules="all-linear"))
        settings: dict[str, Any] = {"pretrained": str(tiny_folder), "cut": 2, "lora": lora, "optimizer": sgd}
        return SplitCausalLM(**(settings | kwargs))

    return make


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


@pytest.fixture
def make_orchestrator(tmp_path: Path) -> Callable[..., Orchestrator]:
    """A quiet orchestrator in a temporary folder; keyword arguments replace the defaults."""

    def make(algorithm: Any = None, **kwargs: Any) -> Orchestrator:
        settings: dict[str, Any] = {
            "max_rounds": 3, "val_check_interval": 2, "default_root_dir": str(tmp_path / "runs"),
            "enable_progress_bar": False, "enable_checkpointing": False,
        }  # fmt: skip
        return Orchestrator(algorithm or HOSFL(client_optimizer=SGD(lr=0.1)), **(settings | kwargs))

    return make


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Message, int]]:
    """Every message that crosses, as it was sent, and to how many; but for those of rehearsals."""
    kept: list[tuple[Message, int]] = []
    send, rehearse = Channel._send, Rehearsal.round

    def keeping(self: Channel, message: Any, direction: str, receivers: int) -> Any:
        kept.append((message, receivers))
        return send(self, message, direction, receivers)

    def unheard(self: Rehearsal, *args: Any) -> None:
        before = len(kept)
        rehearse(self, *args)
        del kept[before:]

    monkeypatch.setattr(Channel, "_send", keeping)
    monkeypatch.setattr(Rehearsal, "round", unheard)
    return kept


@pytest.fixture
def data() -> RandomTokens:
    """Three clients: 6, 4 and 5 examples of different lengths."""
    return RandomTokens([[9, 12, 7, 12, 5, 8], [6, 10, 10, 4], [12, 11, 3, 9, 12]])
