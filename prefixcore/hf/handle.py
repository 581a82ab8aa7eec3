"""`Handle`: what `attach` and `load` return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters import Manifest, upload, write_adapter
from ..adapters.whole import are_in_parts
from ..nn import Config, CPTPrompt, LayerShape, Prefix
from ..nn.trained import trained_parameters
from ..ops import which_backend
from ..ops.select import Choice
from .attention.patch import ATTACHMENT
from .bank.attached import AnyPrompt, Attached
from .bank.bank import Bank
from .bank.beside_peft import train_together
from .bank.heads import Heads
from .bank.reach import has_kernel
from .checkpoint import uninstall
from .families import is_known
from .model.devices import device_of
from .model.peft_names import missing
from .model.signature import argument_names
from .model.undone import UndoneAfterBlock
from .tested_classes import PACKED, TESTED

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Handle(UndoneAfterBlock):
    """A prefix or a soft prompt on a model. As a context manager it detaches at the end of the block.

    Attributes:
        model: the model, changed in place.
        module: the trainable module, also `model.prefixcore` while attached.
        config: what `module` trains: P is set, and a start given as tensors is the word "tensor".
        tokenizer: the tokenizer that `attach` was given, for the manifest; or None, also in a copy.
        heads: what is trained along in the model itself (`modules_to_save`).
        forced: in what the model is not the one that the adapter was trained for, where `strict=False` has loaded it.
        source: the manifest of the adapter that was loaded; None: it was attached anew, or PEFT wrote it.

    Examples:
        >>> handle = prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4))
        >>> optimizer = torch.optim.AdamW(handle.parameters(), lr=5e-3)
        >>> handle.num_trainable
        128
        >>> handle.bake().shape  # [P, E]
        torch.Size([4, 32])
        >>> handle.detach()
        >>> handle.is_attached
        False
    """

    def __init__(
        self,
        bank: Bank,
        adapter: Attached,
        layer_shapes: list[LayerShape],
        tokenizer: Any = None,
    ) -> None:
        self._bank, self._adapter = bank, adapter
        adapter.handle = self
        self._layer_shapes = layer_shapes
        self.tokenizer = tokenizer
        self.forced: tuple[str, ...] = ()
        self.source: Manifest | None = None
        self.heads = Heads(bank.model)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model takes its handle along, but no tokenizer, which may be large or not picklable.
        return {**self.__dict__, "tokenizer": None}

    @property
    def model(self) -> PreTrainedModel:
        return self._bank.model

    @property
    def module(self) -> Prefix | AnyPrompt:
        return self._adapter.module

    @property
    def config(self) -> Config:
        return self.module.config

    @property
    def is_attached(self) -> bool:
        """Whether the model still carries what this handle stands for."""
        here = self.model.__dict__.get(ATTACHMENT) is self._bank
        return here and self._bank.adapters.get(self._adapter.name) is self._adapter

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self._adapter.num_virtual_tokens

    @property
    def can_pack(self) -> bool:
        """Whether the model takes what `PackedCollator` makes: a class tested so, whose head knows `logits_to_keep`."""
        is_prefix = self._adapter.is_prefix
        if isinstance(self.module, CPTPrompt) or not (is_prefix or has_kernel(self._bank)):
            return False
        if is_prefix and (self._bank.cache_layers or self._bank.is_hybrid):  # where nothing keeps texts apart
            return False
        packs = is_known(self.model) or (is_prefix and type(self.model).__name__ in TESTED[PACKED])
        return packs and "logits_to_keep" in argument_names(self.model)

    @property
    def num_trainable(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the prefix, the soft prompt, or what reparameterizes it, and of `modules_to_save`.

        Without those that are never trained: initial values that something is added to, frozen virtual tokens.
        """
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names in `module`; those of `modules_to_save` with their names in the model."""
        yield from trained_parameters(self.module)
        yield from self.heads.named_parameters()

    def bake(self) -> list[tuple[Tensor, Tensor]] | Tensor:
        """The final values: one (key [Hkv, P, D], value [Hkv, P, Dv]) a layer, or the prompt [P, E].

        Copies in the module's dtype (float32 unless the model was cast after attaching), on the model's device.
        """
        return self.module.bake()

    def backend(self) -> Choice:
        """Which backend the op behind this handle (`prefix_attention` or `soft_embedding`) uses here, and why.

        "concatenated", which is no backend of the op, where the model's own attention reads the prefix with its keys.
        """
        if self._adapter.is_prefix and self._bank.cache_layers:
            return Choice("concatenated", "transformers' attention interface does not reach this model's attention")
        op = "prefix_attention" if isinstance(self.module, Prefix) else "soft_embedding"
        return which_backend(op, device_of(self.model), self.model.dtype)

    def disabled(self) -> AbstractContextManager[None]:
        """A block in which the model computes as if nothing were attached.

        For the thread that runs the block: calls of other threads, also of those that are started inside, see what is
        attached. All that one thread runs inside is meant, so do not `await` in the block. A backward repeats under
        gradient checkpointing what its forward did, wherever it runs.
        """
        return self._bank.disabled()

    def save(
        self,
        directory: str | Path,
        *,
        task: str | None = None,
        record: Mapping[str, Any] | None = None,
        curve: bytes | None = None,
        license: str | None = None,
        intended_use: str | None = None,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        split: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Path:
        """Writes the adapter: PEFT's two files, the manifest, and the training state where there is more than values.

        In several processes: what is whole in each (DDP, tensor parallelism, stages of a pipeline) may be saved by one
        alone; where all do, each puts the same whole folder in place. What FSDP2 shards must be saved by all, and one
        of them writes.

        What is not said of a loaded adapter stays as it was said of that one, as far as it still holds: after more
        training its task, license and intended use, but no metrics.

        Args:
            directory: a new folder, or an adapter's, which is replaced as a whole.
            task: the one task that it was trained for, in words; for the manifest.
            record: how it was trained and how it did, as `json` can write it; for `training.json`.
            curve: a picture of the training, PNG; for `curve.png`.
            license: what others may do with it, best as an SPDX identifier ("CC-BY-4.0").
            intended_use: what it was made for, and what not.
            data: the training data: `sha256` of what was used, and more (`prefixcore.training.describe_data`).
            metrics: numbers by their names, measured on held-out examples; only with `split`.
            split: which examples were held out: a name, a seed and a fraction, a digest.
            training: settings of the training by their names: texts, numbers, true, false or None.
            seed: that of the training.

        Returns:
            The folder.

        Raises:
            AdapterError: a value is not finite, the folder is something else than an adapter, or what is said of the
                adapter is not what the manifest can hold.
            OSError: the file system refused. In all cases nothing has been written.
            RuntimeError: of a stage of a pipeline, whose gradients were not summed (`ModelStage.sum_gradients`).
        """
        if self._bank.stage is not None:
            self._bank.stage.check_summed()
        shapes = self._layer_shapes or None
        manifest = Manifest.create(
            self.model,
            self.config,
            shapes,
            task=task,
            tokenizer=self.tokenizer,
            forced=self.forced,
            base_model=self._adapter.base_model,
            license=license,
            intended_use=intended_use,
            data=data,
            metrics=metrics,
            split=split,
            training=training,
            seed=seed,
        )
        write_adapter(
            directory,
            module=self.module,
            config=self.config,
            manifest=manifest,
            heads=self.heads.trained,
            record=record,
            curve=curve,
            source=self.source,
        )
        return Path(directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | bool | None = None,
        **said: Any,
    ) -> CommitInfo | None:
        """Puts the adapter on the Hugging Face Hub, from where `prefixcore.load(model, repo_id)` takes it.

        In several processes one calls it; or all of them, where FSDP2 shards what was trained, and the first uploads.

        Args:
            repo_id: the `name` of `prefixcore.adapters.upload`.
            private, revision, create_pr, commit_message, token: as of `prefixcore.adapters.upload`.
            said: of the adapter, as of `save`: its task, its license, ...

        Returns:
            huggingface_hub's record of the commit; as a text it is the URL. None where another process uploads.

        Raises:
            AdapterError: as of `save` and of `upload`.
        """
        together = are_in_parts([self.module, *self.heads.trained.values()])
        with TemporaryDirectory() as parent:
            folder = self.save(Path(parent) / "adapter", **said)
            if together and torch.distributed.get_rank() > 0:
                return None
            return upload(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                token=token,
            )

    def train_with_peft(self, *, virtual_tokens: bool = True, peft: bool = True) -> None:
        """Says what is trained in a model that also holds an adapter of PEFT's, a LoRA say, whichever came first.

        `attach` freezes PEFT's adapters with the rest of the model, and PEFT's `get_peft_model` freezes the virtual
        tokens; both say so. Call this when both are in the model, and before the optimizer is made. In a `PromptBank`
        it is said for each adapter by its own handle.

        Args:
            virtual_tokens: whether they are trained.
            peft: whether PEFT's adapters are trained, those that were before `attach`, or are now.

        Raises:
            ValueError: a `PromptBank` loaded the virtual tokens to be used, without `trainable=True`.
        """
        train_together(self._bank, self._adapter, virtual_tokens=virtual_tokens, peft=peft)

    def detach(self) -> None:
        """Puts the model back to what it was before. The handle keeps the values: `save` and `bake` still work."""
        self._bank.remove(self._adapter)
        self.heads.detach()
        uninstall(self._bank)

    def _take_back(self) -> None:
        self.detach()

    if not TYPE_CHECKING:  # else every name would pass for an attribute

        def __getattr__(self, name: str) -> Any:
            raise missing(name)

    def __repr__(self) -> str:
        state = "" if self.is_attached else ", detached"
        return (
            f"Handle({self.config.method} on {type(self.model).__name__}, {self.num_virtual_tokens} virtual tokens, "
            f"{self.num_trainable:,} trainable{state})"
        )


def attached(model: PreTrainedModel) -> Handle | None:
    """The handle of what is attached to `model`, also if the model is a copy of an attached one; None: nothing is.

    Of a model with a bank of several, that of the first.
    """
    bank = model.__dict__.get(ATTACHMENT)
    return None if bank is None else next((adapter.handle for adapter in bank.adapters.values()), None)
