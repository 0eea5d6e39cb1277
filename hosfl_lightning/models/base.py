"""SplitModule: a cut model as a LightningModule; the server's training is its ``training_step``."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.arguments import given
from hosfl_lightning.data.prompt import LabelWords
from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.models.checks import check_state, check_tokens, smashed_objection
from hosfl_lightning.models.evaluated import Batch, Evaluated
from hosfl_lightning.models.fingerprint import of_all, of_first
from hosfl_lightning.models.halves import (
    HEAD,
    LABELS_STAY,
    Labels,
    Part,
    check_labels_at,
    client_alone,
    client_of_whole,
    here,
    hold,
)
from hosfl_lightning.models.pretrained import load_model, load_tokenizer, resolve
from hosfl_lightning.split import (
    Lora,
    Placement,
    ServerHalf,
    Side,
    SplitError,
    copied_head,
    export_adapter,
    place_side,
    run,
    split,
)
from hosfl_lightning.split.adapters import dropouts, training
from hosfl_lightning.split.client_parameters import ClientParameters, in_place
from hosfl_lightning.split.compiled import compile_half
from hosfl_lightning.wire import SmashedData


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """The server's optimizer unless the recipe says otherwise."""
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)


class SplitModule(Evaluated, ABC):
    r"""``ℓ(f_s(f_c(x; θ_c); θ_s), y)``, cut into a client half ``f_c`` and a server half ``f_s``.

    The server's step is an ordinary ``training_step`` on the smashed data; a subclass changes the loss by overriding
    `loss` and `count`. The clients never see this module, only ``client_half``.

    Args:
        pretrained: ``tiny_lm`` (ships with the package), a folder, a hub name, or a ``.gguf`` file, whose weights are
            unpacked (extra ``gguf``).
        cut: Number of layers the client holds, 1 .. layers − 1.
        lora: Adapters on both halves; None trains every weight of both halves.
        optimizer: The server's optimizer.
        lr_scheduler: The server's schedule, stepped once a round.
        dtype: Of the backbone: ``float32``, ``bfloat16``, or ``auto`` (as stored). Adapters are fp32.
        seed: Of the adapters' start and of a fresh head.
        client_holds: ``half``: a client never holds more than the layers before the cut. ``whole``: the server's half
            may be given to the clients as well, which methods without a cut need (FedAvg, ZOFL).
        side: A side adapter from the client's layers to the cut. Then nothing else of the client is trained but the
            LoRA that ``lora.client`` and what ``client_parameters`` ask for; without ``lora`` the server's half is
            trained whole.
        part: ``both`` halves, or the ``client``'s alone, for a device that joins a run: equal to the client half of
            ``both``, bit for bit, and nothing of the server's half is read or allocated (see `load_client`).
        client_parameters: Few parameters to train at the client, in place of LoRA (``lora.client: null``) or beside it:
            ``norm`` (weights and biases of norms), ``bias``, ``first_layer`` (the first convolution or patch
            embedding), ``ia3`` (in place of LoRA alone). Nothing else of the client is trained but the adapters.
        labels: Where they are, and with them the head and the loss. ``client``: the server's half is the layers in the
            middle alone, and each client has ``client_head``, the final norm and the head, whose loss and gradients
            are in closed form; a text never leaves it.
        compile: Compile both halves for the rounds, at the first batch of each shape; evaluations run eagerly. Probes
            then move all that a client trains at once, beside a copy of it, in the place of layer after layer.

    Raises:
        PretrainedError: The model cannot be loaded.
        SplitError: The cut is out of range, the architecture cannot be cut exactly, LoRA matches nothing on a half.
            With ``part="client"`` also later, from whatever needs the server's half.
    """

    #: What the orchestrator says in one line before the first round.
    labels_notice = "Labels travel from the clients to the server."
    auto_class: Any
    trains_head = False

    def __init__(
        self,
        pretrained: str,
        cut: int,
        lora: Lora | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        seed: int = 0,
        client_holds: Literal["half", "whole"] = "half",
        side: Side | None = None,
        part: Part = "both",
        client_parameters: ClientParameters | None = None,
        labels: Labels = "server",
        compile: bool = False,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        self.pretrained, self.cut, self.lora, self.side, self.seed = pretrained, cut, lora, side, seed
        self.client_holds, self.part, self.trains_at_client = client_holds, part, client_parameters
        self.labels, self.compiles = check_labels_at(labels, client_holds), compile
        if labels == "client":
            self.labels_notice = LABELS_STAY
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.made_with = given(self, inspect.currentframe())
        self.client_half, server, whole, self.client_head = hold(self, part, dtype, seed, **model_kwargs)
        # In a tuple: Lightning must see each parameter once, in its half.
        self._whole = (whole,)
        self._client_trainable = tuple(n for n, p in self.client_half.named_parameters() if p.requires_grad)
        if server is not None:
            self._modules["server_half"] = server
            self._server_trainable = tuple(n for n, p in server.named_parameters() if p.requires_grad)
        for half, what in ((self.client_half, "the client's half"), (server, "the server's half")):
            if compile and half is not None:
                compile_half(half, what)
        self.label_names: Sequence[str] | None = None
        self.strict_loading = False  # checkpoints hold what is trained, not the backbone
        self.make_metrics()

    # ---- what a subclass says about its model

    def load_whole(self, dtype: str, seed: int, **model_kwargs: Any) -> Any:
        """The uncut model."""
        return load_model(
            self.auto_class, self.pretrained, seed=seed, fresh_head=self.trains_head, dtype=dtype, **model_kwargs
        )

    def split_whole(self, whole: Any) -> tuple[Any, Any]:
        """Its two halves. The client's names what it takes of a batch (``inputs``) and its ``layers``."""
        return split(whole, self.cut)

    def place_side(self, whole: Any, side: Side) -> Placement:
        """Where in the uncut model the bottlenecks go."""
        return place_side(whole, self.cut, side, self.seed)

    def load_client(self, dtype: str, seed: int, **model_kwargs: Any) -> tuple[Any, Any]:
        """The client's half with its adapters, for ``part="client"``; nothing of the other half is read or allocated.

        With it the client's head, None with ``labels="server"``.
        A subclass that loads, cuts or places in a way of its own gets it from the whole, which is dropped at once.
        """
        ways = ("load_whole", "split_whole", "place_side")
        as_here = all(getattr(type(self), way) is getattr(SplitModule, way) for way in ways)
        return (client_alone if as_here else client_of_whole)(self, dtype, seed, **model_kwargs)

    def prepare(self, batch: Batch) -> Batch:
        """A client's batch with what the cut needs: ``attention_mask (B, S)``, 1 at the positions of z that count."""
        return batch

    def auxiliary_head(self, blocks: int) -> nn.Module:
        """A head over z for a client that has a loss of its own, from ``z (B, S, h)`` and ``attention_mask`` to logits.

        Args:
            blocks: Server layers in it.

        Returns:
            A new one; what asks for a gradient in it is its own, everything else may be shared with the server.

        Raises:
            SplitError: There is none, or not with so many layers.
        """
        if not isinstance(self.server_half, ServerHalf):
            raise SplitError(
                f"{type(self).__name__} has no auxiliary head, which trainer.algorithm needs: take a method without "
                "one (HOSFL, SplitFedV2), or override auxiliary_head"
            )
        return copied_head(self.server_half, blocks)

    # ---- what a subclass says about its task

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``ℓ``: the *mean* over the loss terms of the batch, a scalar with a graph."""

    @abstractmethod
    def count(self, labels: Tensor) -> int:
        """``n``: how many terms `loss` averages over; client weights are ``w_k = n_k / Σ n``."""

    def check_examples(self, examples: Sequence[Example], owner: str) -> None:
        """Refuse data that the model cannot take, with the setting to mend instead of an index error mid-run.

        Raises:
            ValueError: A token id beyond the embeddings, or a row longer than the positions; names whose it is.
        """
        check_tokens(examples, owner, self.client_half, self.pretrained)

    def name_labels(self, names: Sequence[str]) -> None:
        """Take the names of the classes from the data; they are exported with the adapter."""
        self.label_names = list(names)

    def choose_among(self, words: LabelWords | None) -> None:
        """Take the label words of the data, None where it has none; a model that tells classes by words counts hits."""

    def objection(self, message: SmashedData) -> str | None:
        """Why the server cannot take what a client sent, in words; None: it can. A subclass adds what its loss asks."""
        return smashed_objection(message, self.client_half)

    def fingerprint(self) -> str:
        """SHA-256 of one frozen tensor of the backbone, as bf16, so that any precision of one model gives the same."""
        halves: Any = (self.server_half, self.server_parameters), (self.client_half, self.client_parameters)
        return of_first([p for half, own in halves for n, p in half.named_parameters() if n not in own])

    def client_fingerprint(self) -> str:
        """SHA-256 of all frozen tensors of the client and their names, likewise; norm statistics are among them.

        What a device that joins a run and the server compare: equal for both values of ``part``.
        """
        trained = {id(p) for p in self.client_parameters.values()}
        held = self.client_half.state_dict(keep_vars=True)
        if self.client_head is not None:
            held |= self.client_head.state_dict(keep_vars=True, prefix=HEAD)
        return of_all({name: tensor for name, tensor in held.items() if id(tensor) not in trained})

    # ---- parameters

    @property
    def client_parameters(self) -> dict[str, nn.Parameter]:
        """θ_c by name, in manifest order: the order numbers the random directions. A head's come last, as `HEAD…`."""
        named = dict(self.client_half.named_parameters())
        head = {} if self.client_head is None else self.client_head.trained
        return {name: named[name] for name in self._client_trainable} | {HEAD + name: p for name, p in head.items()}

    @property
    def server_parameters(self) -> dict[str, nn.Parameter]:
        """θ_s by name; whether it asks for a gradient now or not."""
        named = dict(self.server_half.named_parameters())
        return {name: named[name] for name in self._server_trainable}

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, of all halves that are here, by name; references, not copies."""
        halves = {"client_half": self.client_parameters}
        if self.part == "both":
            halves["server_half"] = self.server_parameters
        return {f"{half}.{name}": p.detach() for half, named in halves.items() for name, p in named.items()}

    @torch.no_grad()
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Copy trained tensors in.

        Raises:
            SplitError: The state is of another model, cut or adapter.
        """
        mine = self.trained_state()
        check_state(mine, state)
        for name, tensor in mine.items():
            tensor.copy_(state[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained; the backbone is where it came from."""
        checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in self.trained_state().items()}
        checkpoint["label_names"] = self.label_names

    # ---- Lightning

    @property
    def server_half(self) -> Any:
        """``f_s``; a `SplitError` with ``part="client"``."""
        return here(self.part, "the server's half", self._modules.get("server_half"))

    @property
    def whole(self) -> Any:
        """The uncut model (a PeftModel with LoRA); its parameters are those of the halves."""
        return here(self.part, "the whole model", self._whole[0])

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of ``pretrained``; None where the data is not text."""
        return load_tokenizer(self.pretrained)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits through both halves, equal to the uncut model's bit for bit."""
        return self.above(self.client_half(input_ids, attention_mask), attention_mask)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of a prepared batch."""
        return self.above(run(self.client_half, batch), batch["attention_mask"])

    def above(self, z: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits of smashed data: through the server's half, and through the client's head where there is one."""
        head, states = self.last(z, attention_mask)
        return head(states, attention_mask)

    def last(self, z: Tensor, attention_mask: Tensor | None) -> tuple[Any, Tensor]:
        """The part that gives logits, and what it is given where the server's half is given ``z``."""
        if self.client_head is None:
            return self.server_half, z
        return self.client_head, self.server_half(z, attention_mask)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The server's loss on smashed data.

        Args:
            batch: ``z (B, S, h)`` with ``requires_grad``, ``attention_mask (B, S)``, ``labels``.
            batch_idx: The round.
        """
        return self.loss(self.above(batch["z"], batch["attention_mask"]), batch["labels"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The server's optimizer over θ_s; the clients' is the algorithm's."""
        optimizer = self.make_optimizer(list(self.server_parameters.values()))
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }

    def dropout_active(self) -> AbstractContextManager[None]:
        """The server adapters' own dropout is on inside; everything else keeps its mode."""
        return training(self._dropouts)

    @cached_property
    def _dropouts(self) -> list[nn.Module]:
        # Looked for once: a round needs them once a client.
        return dropouts(self.server_half)

    def export(self, directory: str) -> None:
        """Write one PEFT adapter that holds both halves; with a side adapter PEFT reads it after this package's import.

        Raises:
            SplitError: Without LoRA there is no adapter to write.
        """
        if self.lora is None:
            raise SplitError(
                "export: the model was trained without LoRA, so there is no adapter; set model.init_args.lora"
            )
        below = {name: p for name, p in self.client_parameters.items() if not name.startswith(HEAD)}
        plain = in_place(below, self.trains_at_client)
        export_adapter(self.whole, directory, resolve(self.pretrained), self.label_names, plain)
