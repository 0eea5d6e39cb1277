"""What is wrong with a user's data is said in one line before the run folder is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from hosfl_lightning import Orchestrator, SplitCausalLM, SplitSequenceClassifier
from hosfl_lightning.data import Example, FederatedDataModule
from hosfl_lightning.data.contract import DataContractError
from hosfl_lightning.join import _own_data
from hosfl_lightning.split import Lora

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]
pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")

SOUND = Example([5, 6, 7], [-100, 6, 7])
MUTE, FIRST_ONLY = Example([5, 6], [-100, -100]), Example([5, 6], [5, -100])
CLASS = Example([5, 6], 1)


class Mine(FederatedDataModule):
    """A user's: two clients and a validation set, in one of which something is wrong."""

    def __init__(self, clients: Any = None, validation: Any = None, test: Any = None) -> None:
        super().__init__(batch_size=2, eval_batch_size=2)
        self.given = (
            [[SOUND], [SOUND]] if clients is None else clients,
            [SOUND] if validation is None else validation,
            test or [],
        )

    def setup(self, stage: str) -> None:
        self.clients, self.validation_set, self.test_set = self.given


class Collates(Mine):
    """With a collate of its own."""

    def __init__(self, change: Callable[[dict[str, Tensor]], Any]) -> None:
        super().__init__()
        self.change = change

    def collate(self, examples: Any) -> Any:
        return self.change(super().collate(examples))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (Mine([]), r"Mine\.setup left clients empty"),
        (Mine([[], []]), r"Mine\.setup gave 2 clients, and none of them an example"),
        (Mine([[SOUND], [{"input_ids": [1], "labels": [1]}]]), "Mine: example 0 of client 'client_1': a dict has"),
        (Mine(validation=[SOUND, ([5], [5])]), "Mine: example 1 of validation: a tuple has no attribute input_ids"),
        (Mine([[MUTE], [FIRST_ONLY]]), "Mine: no client has a labelled example, so there is nothing to learn"),
        (Mine(validation=[MUTE, FIRST_ONLY]), "Mine: the validation set has nothing labelled, so it has no loss"),
        (Mine(test=[MUTE]), "Mine: the test set has nothing labelled, so it has no loss"),
        (Mine(validation=[]), "Mine has no validation examples"),
        (Mine([[SOUND], [Example([5, 6], [5, 260])]]), r"data of client 'client_1': label 260 is neither -100 nor "
         r"one of the model's 260 tokens; set data\.init_args\.tokenizer"),
        (Mine(validation=[Example([5, 6], [5, -1])]), "data of validation: label -1 is neither -100 nor one of"),
        (Mine([[Example([5, -6], [5, 6])], [SOUND]]), "data of client 'client_0': token id -6, but"),
        (Mine([[CLASS], [CLASS]], [CLASS]), "data of client 'client_0': one label an example, and a causal LM"),
        (Collates(lambda batch: {"input_ids": batch["input_ids"]}), r"Collates\.collate must return labels beside"),
        (Collates(lambda batch: list(batch.values())), r"Collates\.collate must return a dict of tensors, not "),
        (Collates(lambda batch: {"labels": batch["labels"]}), r"Collates\.collate must return input_ids, attention_"
         "mask, which SplitCausalLM takes; it returns labels"),
    ],
)  # fmt: skip
def test_refused_before_the_first_round(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, tmp_path: Path, data: Mine, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^(data: )?{reason}") as said:
        make_orchestrator().fit(make_model(), data)
    assert "\n" not in str(said.value)
    assert not (tmp_path / "runs").exists()


def test_no_federated_data(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    with pytest.raises(TypeError, match=r"^datamodule must be a .*FederatedDataModule, got LightningDataModule$"):
        make_orchestrator().fit(make_model(), L.LightningDataModule())


def test_labels_of_tokens_for_a_classifier(tiny_folder: Path, make_orchestrator: MakeOrchestrator) -> None:
    model = SplitSequenceClassifier(str(tiny_folder), cut=2, num_labels=2, lora=Lora())
    with pytest.raises(
        ValueError, match=r"^data of client 'client_0': several labels an example, and SplitSequenceCla"
    ):
        make_orchestrator().fit(model, Mine())
    with pytest.raises(ValueError, match=r"^data of client 'client_0': label 2 is not in 0\.\.1; set model\.init_args"):
        make_orchestrator().fit(model, Mine([[Example([5], torch.tensor(2))]], [CLASS]))


def test_an_example_of_another_kind(make_model: MakeModel) -> None:
    with pytest.raises(
        ValueError, match=r"^data of client 'a': an example has no input_ids; give text data, or override"
    ):
        make_model().check_examples([SimpleNamespace(pixel_values=torch.ones(1, 2, 2), labels=1)], "client 'a'")  # type: ignore[list-item]


def test_clients_that_never_count_are_named(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, capsys: pytest.CaptureFixture[str]
) -> None:
    make_orchestrator(max_rounds=1).fit(make_model(), Mine([[SOUND], [MUTE]]))
    assert "1 of 2 clients have nothing labelled and never count: client_1\n" in capsys.readouterr().out


def test_batches_without_a_label_leave_the_loss_a_number(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator
) -> None:
    """The mean is over the others, and no metric warns of NaN."""
    sound = [SOUND, Example([5, 6], [5, 6])]
    among = make_orchestrator(max_rounds=1, controls=["frozen"])
    among.fit(make_model(), Mine(validation=[*sound, MUTE, FIRST_ONLY]))
    alone = make_orchestrator(max_rounds=1)
    alone.fit(make_model(), Mine(validation=sound))
    assert among.summary["metrics_last"] == alone.summary["metrics_last"]
    assert among.run.result is not None
    assert len(among.run.result.last.batch_losses) == 1


def test_a_batch_whose_loss_is_nan_is_not_left_out_of_the_mean(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator
) -> None:
    class Breaks(SplitCausalLM):
        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return super().loss(logits, labels) * (torch.nan if len(labels) == 1 else 1)

    made = make_model()
    model = Breaks(made.pretrained, made.cut, made.lora)
    [values] = make_orchestrator().validate(model, Mine(validation=[SOUND] * 3))
    assert math.isnan(values["val/loss"])
    assert math.isfinite(values["val/token_accuracy"])


def test_an_evaluation_asks_only_for_what_it_uses(make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
    data = Mine([[MUTE]], validation=[MUTE], test=[SOUND])
    trainer = make_orchestrator()
    trainer.test(make_model(), data)
    assert len(trainer.predict(make_model(), data)) == 1
    with pytest.raises(DataContractError, match="the validation set has nothing labelled"):
        trainer.validate(make_model(), data)


def test_a_client_elsewhere_checks_its_own(make_model: MakeModel) -> None:
    terms: Any = SimpleNamespace(client=1)
    for clients, reason in (([[SOUND], []], "data: client 1, which is this machine's, holds no example"),
                            ([[SOUND], [{}]], "Mine: example 0 of this client: a dict has no"),
                            ([], r"Mine\.setup left clients empty")):  # fmt: skip
        data = Mine()
        data.given = clients, [SOUND], []  # type: ignore[assignment]
        with pytest.raises(DataContractError, match=f"^{reason}"):
            _own_data(terms, make_model(), data, None)
