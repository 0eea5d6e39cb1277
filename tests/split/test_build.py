from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from hosfl_lightning.split import SplitError, load_client_half, load_server_half, split
from tests.split.tiny_models import tiny_causal_lm, tiny_classifier

# Plain, tied, tied with a nested path and learnt positions, Conv1D, tuples, fused experts, classifiers.
CASES: dict[str, tuple[Any, Callable[[], PreTrainedModel]]] = {
    "llama": (AutoModelForCausalLM, lambda: tiny_causal_lm("llama")),
    "gemma3_text": (AutoModelForCausalLM, lambda: tiny_causal_lm("gemma3_text")),
    "opt": (AutoModelForCausalLM, lambda: tiny_causal_lm("opt")),
    "gpt2": (AutoModelForCausalLM, lambda: tiny_causal_lm("gpt2")),
    "bloom": (AutoModelForCausalLM, lambda: tiny_causal_lm("bloom")),
    "mixtral": (AutoModelForCausalLM, lambda: tiny_causal_lm("mixtral")),
    "bert": (AutoModelForSequenceClassification, lambda: tiny_classifier("bert")),
    "llama_classifier": (AutoModelForSequenceClassification, lambda: tiny_classifier("llama")),
    "modernbert": (AutoModelForSequenceClassification, lambda: tiny_classifier("modernbert")),
    "deberta-v2": (AutoModelForSequenceClassification, lambda: tiny_classifier("deberta-v2")),
}


@contextmanager
def tensors_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names in the file of the tensors that are materialised while inside."""
    names: set[str] = set()
    true_open = transformers.modeling_utils.safe_open

    class Slice:
        def __init__(self, name: str, true: Any) -> None:
            self.name, self.true = name, true

        def __getitem__(self, index: Any) -> torch.Tensor:
            names.add(self.name)
            return self.true[index]

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.true, attribute)

    class Opened:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.true = true_open(*args, **kwargs)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.true.get_slice(name))

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *args: object) -> None:
            self.true.__exit__(*args)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.true, attribute)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_open", Opened)
        yield names


def values(half: nn.Module) -> dict[str, torch.Tensor]:
    return dict(half.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("name", CASES)
def test_a_half_is_built_from_its_own_tensors_only(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto_class, build = CASES[name]
    model = build()
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    with tensors_read(monkeypatch) as read_by_client:
        client = load_client_half(tmp_path, 1, auto_class=auto_class)
    with tensors_read(monkeypatch) as read_by_server:
        server = load_server_half(tmp_path, 1, auto_class=auto_class)
    assert torch.equal(torch.get_rng_state(), state)

    tokens, mask = torch.arange(3, 15).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    tokens[1, :2] = mask[1, :2] = 0
    with torch.no_grad():
        whole = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        assert torch.equal(server(client(tokens, mask), mask), whole)

    for half, view in zip((client, server), split(model, 1, check=False)):
        assert values(half).keys() == values(view).keys()
        assert all(torch.equal(p, values(view)[n]) for n, p in values(half).items())
        assert not any(t.is_meta for t in [*half.parameters(), *half.buffers()])
        assert half.architecture == type(model).__name__
    tied = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
    shared = 3 if name == "deberta-v2" else 0  # relative positions and their norm
    assert len(read_by_client & read_by_server) == tied + shared
    assert not any(f"{client.layer_path.path}.{i}." in n for n in read_by_client for i in (1, 2, 3))
    assert not any(f"{client.layer_path.path}.0." in n for n in read_by_server)


def test_shards_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny_causal_lm("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with tensors_read(monkeypatch) as names:
        server = load_server_half(tmp_path, 3, dtype=torch.bfloat16)
    assert names == set(values(server))
    assert "UNEXPECTED" not in caplog.text
    assert {p.dtype for p in server.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in server.layers[3].parameters()) == sum(
        p.numel() for p in model.model.layers[3].parameters()
    )


def test_a_fresh_classification_head_leaves_the_random_state_alone(tmp_path: Path) -> None:
    tiny_causal_lm("llama").save_pretrained(tmp_path)
    state = torch.get_rng_state()
    server = load_server_half(tmp_path, 2, auto_class=AutoModelForSequenceClassification, num_labels=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert server(torch.zeros(1, 3, 32)).shape == (1, 5)
    assert ForkingPickler.dumps(server)  # what a spawned process is handed


def test_errors_come_before_any_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_causal_lm("llama").save_pretrained(tmp_path)
    with tensors_read(monkeypatch) as names:
        for load in (load_client_half, load_server_half):
            with pytest.raises(SplitError, match=r"cut=4 is out of range: LlamaForCausalLM has 4 layers"):
                load(tmp_path, 4)
    assert not names
