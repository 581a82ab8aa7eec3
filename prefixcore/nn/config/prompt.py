"""The configurations of a soft prompt: trained itself, or through an encoder."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import ClassVar

from .base import PEFT_INITS, BaseConfig
from .checks import check_choice, check_positive, check_prompt_tensor, check_virtual_token_ids

ENCODERS = ("MLP", "LSTM")


@dataclass(frozen=True, eq=False)
class PromptTuningConfig(BaseConfig):
    """Prompt tuning: train embeddings that are put before the input (Lester et al., arXiv:2104.08691).

    Args:
        num_virtual_tokens: P. May be left out where `init` has a length of its own: a text, a tensor.
        init: the initial values. "text": the embeddings of `init_text` (repeated or cut to P tokens); "vocab": those of
            tokens drawn from the vocabulary; "random": unit normal, PEFT's default; "zero"; or a tensor
            `[P, E]` of any floating dtype. None: "text" if `init_text` is given, else "vocab". "tensor" stands for a
            tensor that is kept elsewhere (in an adapter).
        init_text: the text of `init="text"`.
        reparameterization: what is trained in place of the prompt: "none", "low_rank" or "random_basis" (an
            MLP or LSTM is `PTuningConfig`).
        virtual_token_ids: where the virtual tokens stand in the text, in place of before it: P ids of the tokenizer,
            each of which stands for one of them wherever it is; or one id, whose k-th occurrence stands for the k-th
            and which each text holds P times. They may be ids beyond the model's table.
        rank, num_basis, seed, task_type, tokenizer_name_or_path, modules_to_save: as in `PrefixTuningConfig`.
        prompt_tuning_init, prompt_tuning_init_text: PEFT's names of `init` ("TEXT", "SAMPLE_VOCAB", "RANDOM")
            and `init_text`.

    Raises:
        ValueError: a value is out of range or two contradict each other.

    Examples:
        >>> prefixcore.PromptTuningConfig(num_virtual_tokens=20, prompt_tuning_init="RANDOM").init
        'random'
    """

    method: ClassVar[str] = "prompt"

    reparameterization: str = "none"
    rank: int = 8
    num_basis: int = 256
    virtual_token_ids: int | list[int] | None = None
    prompt_tuning_init: InitVar[str | None] = None
    prompt_tuning_init_text: InitVar[str | None] = None

    def __post_init__(self, prompt_tuning_init: str | None, prompt_tuning_init_text: str | None) -> None:
        if prompt_tuning_init is not None:
            check_choice("prompt_tuning_init", prompt_tuning_init, tuple(PEFT_INITS))
            init = PEFT_INITS[prompt_tuning_init]
            if self.init not in (None, init):
                raise ValueError(f"prompt_tuning_init is {prompt_tuning_init!r} but init is {self.init_name!r}")
            self._set(init=init)
        if prompt_tuning_init_text is not None:
            if self.init_text not in (None, prompt_tuning_init_text):
                raise ValueError("prompt_tuning_init_text and init_text are two names for one text, and differ")
            self._set(init_text=prompt_tuning_init_text)
        self._check_common()
        check_prompt_tensor(self.init)
        check_choice("reparameterization", self.reparameterization, ("none", "low_rank", "random_basis"))
        check_virtual_token_ids(self.virtual_token_ids, self.num_virtual_tokens)
        check_positive("rank", self.rank)
        check_positive("num_basis", self.num_basis)


@dataclass(frozen=True, eq=False)
class PTuningConfig(BaseConfig):
    """P-tuning: train a soft prompt through a small encoder (Liu et al., arXiv:2103.10385).

    Args:
        num_virtual_tokens, init, init_text, virtual_token_ids, seed, task_type, modules_to_save: as in
            `PromptTuningConfig`, and so is `tokenizer_name_or_path`. With `init="random"` the encoder alone makes the
            prompt, as in PEFT; with any other initial values the encoder is added to them, and begins at zero.
        encoder_reparameterization_type: "MLP" (three linear layers) or "LSTM" (bidirectional, then two).
        encoder_hidden_size: hidden width of the encoder; None: the model's hidden size.
        encoder_num_layers: layers of the LSTM; the MLP has its three whatever this says, as in PEFT.
        encoder_dropout: between the layers of the LSTM, while training.

    Raises:
        ValueError: a value is out of range or two contradict each other.

    Examples:
        >>> config = prefixcore.PTuningConfig(num_virtual_tokens=20, encoder_reparameterization_type="LSTM")
        >>> config.is_reparameterized
        True
    """

    method: ClassVar[str] = "p-tuning"

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    virtual_token_ids: int | list[int] | None = None

    def __post_init__(self) -> None:
        self._check_common()
        check_prompt_tensor(self.init)
        check_virtual_token_ids(self.virtual_token_ids, self.num_virtual_tokens)
        check_choice("encoder_reparameterization_type", self.encoder_reparameterization_type, ENCODERS)
        if self.encoder_hidden_size is not None:
            check_positive("encoder_hidden_size", self.encoder_hidden_size)
        check_positive("encoder_num_layers", self.encoder_num_layers)
        dropout = self.encoder_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"encoder_dropout must be a number from 0 to below 1, got {dropout!r}")
