"""What to train: the configurations of a prefix and of a soft prompt.

Names are those of PEFT where PEFT has one, so that a PEFT configuration can be carried over word by word.
Everything is checked when a configuration is made; a configuration never changes afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

TASK_TYPES = (
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that are trained along for a task type, as in PEFT."""

PLACES = ("encoder", "decoder", "cross")
"""Where attention is in an encoder-decoder."""

INITS = ("text", "vocab", "random", "zero", "tensor")
REPARAMETERIZATIONS = ("none", "mlp", "low_rank", "random_basis")
ENCODERS = ("MLP", "LSTM")
_PEFT_INITS = {"TEXT": "text", "SAMPLE_VOCAB": "vocab", "RANDOM": "random"}

SOURCE_INITS = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
"""What multitask prompt tuning can take of an earlier adapter, by PEFT's names."""

KeyValues: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""One (key [Hkv, P, D], value [Hkv, P, Dv]) a layer."""


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _num_tokens(init: Any) -> int:
    """P of initial values given as tensors; shapes are checked against the model later."""
    if isinstance(init, Tensor):
        if init.dim() != 2:
            raise ValueError(f"init as a tensor must be [P, width], got shape {list(init.shape)}")
        return init.shape[0]
    for layer, pair in enumerate(init):
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_pair or not all(isinstance(t, Tensor) and t.dim() == 3 for t in pair):
            raise ValueError(
                f"init must hold a (key [Hkv, P, D], value [Hkv, P, Dv]) pair a layer; entry {layer} does not"
            )
    if len(init) == 0:
        raise ValueError("init holds no layer: expected one (key, value) pair for every layer with a prefix")
    return init[0][0].shape[1]


@dataclass(frozen=True, eq=False)
class _Config:
    """What the three configurations share."""

    method: ClassVar[str]

    num_virtual_tokens: int | None = None
    init: str | Tensor | KeyValues | None = None
    init_text: str | None = None
    seed: int | None = field(default=None, kw_only=True)
    task_type: str | None = field(default="CAUSAL_LM", kw_only=True)
    tokenizer_name_or_path: str | None = field(default=None, kw_only=True)
    modules_to_save: list[str] | None = field(default=None, kw_only=True)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_common(self) -> None:
        if self.init is None:
            self._set(init="vocab" if self.init_text is None else "text")
        if isinstance(self.init, str):
            _check_choice("init", self.init, INITS)
        elif isinstance(self.init, (Tensor, Sequence)):
            num_tokens = _num_tokens(self.init)
            if self.num_virtual_tokens not in (None, num_tokens):
                raise ValueError(
                    f"num_virtual_tokens is {self.num_virtual_tokens} but init holds {num_tokens} of them; "
                    "leave num_virtual_tokens out or make them equal"
                )
            self._set(num_virtual_tokens=num_tokens)
        else:
            raise ValueError(
                f"init must be one of {', '.join(map(repr, INITS))} or tensors, got {type(self.init).__name__}"
            )
        if self.init == "text" and not self.init_text:
            raise ValueError("init='text' needs init_text, a text that is not empty")
        if self.init_text is not None and self.init != "text":
            raise ValueError(f"init_text is only read with init='text', but init is {self.init_name!r}")
        if self.num_virtual_tokens is not None:
            _check_positive("num_virtual_tokens", self.num_virtual_tokens)
        elif self.init not in ("text", "tensor"):
            raise ValueError(
                f"init={self.init!r} needs num_virtual_tokens (a text and tensors have a length of their own)"
            )
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63
        ):
            raise ValueError(f"seed must be an integer from 0 to 2**63 - 1 or None, got {self.seed!r}")
        for name in ("init_text", "tokenizer_name_or_path"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name} must be a string or None, got {getattr(self, name)!r}")
        if self.task_type is not None:
            _check_choice("task_type", self.task_type, TASK_TYPES)
        names = self.modules_to_save
        if names is not None:
            if isinstance(names, str) or not isinstance(names, Sequence) or not all(map(_is_name, names)):
                raise ValueError(f"modules_to_save must be a list of names of modules or None, got {names!r}")
            self._set(modules_to_save=list(dict.fromkeys(names)))

    @property
    def is_reparameterized(self) -> bool:
        """Whether something else than the virtual tokens themselves is trained."""
        return getattr(self, "reparameterization", "encoder") != "none"

    @property
    def head_names(self) -> list[str]:
        """What `modules_to_save` names; where it is None, the heads that PEFT trains along for `task_type`."""
        return list(HEADS.get(self.task_type or "", ())) if self.modules_to_save is None else self.modules_to_save

    @property
    def init_name(self) -> str:
        """The name of `init`; "tensor" where it was given as tensors."""
        return self.init if isinstance(self.init, str) else "tensor"

    def resolved(self, num_virtual_tokens: int) -> Self:
        """A copy with this P, in which tensors given as `init` are the word "tensor"."""
        return dataclasses.replace(self, num_virtual_tokens=num_virtual_tokens, init=self.init_name)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it; tensors given as `init` become the word 'tensor'."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {**values, "init": self.init_name}


@dataclass(frozen=True, eq=False)
class PrefixTuningConfig(_Config):
    """Prefix tuning: train keys and values that every query of every layer sees.

    Attention in each layer becomes `softmax(scale * q [P_k; K]^T) [P_v; V]` with trained `P_k` and `P_v` (Li and Liang,
    arXiv:2101.00190). P-tuning v2 (Liu et al., arXiv:2110.07602) is the same for language understanding.

    Args:
        num_virtual_tokens: P. May be left out where `init` has a length of its own: a text, tensors.
        init: the initial values. "text": keys and values that the frozen model computes for `init_text`
            (repeated or cut to P tokens); "vocab": the same for tokens drawn from the vocabulary; "random":
            unit normal, PEFT's default; "zero"; or tensors of any floating dtype: `[P, L*2*Hkv*D]` as PEFT stores
            them, or one `(key [Hkv, P, D], value [Hkv, P, Dv])` a layer. None: "text" if `init_text` is given, else
            "vocab". "tensor" stands for tensors that are kept elsewhere (in an adapter).
        init_text: the text of `init="text"`.
        prefix_projection: PEFT's name for `reparameterization="mlp"`.
        encoder_hidden_size: width of the MLP's hidden layer; None: Hkv*D.
        layers: indices of the layers that get a prefix, from 0; None: all.
        where: of an encoder-decoder which attention gets a prefix: any of "encoder" and "decoder" (self-attention) and
            "cross"; None: all three, the setting of Li and Liang for BART. PEFT's is ("decoder",). With `layers`, these
            are counted over all attention of the model and have to be there.
        num_frozen_tokens: how many virtual tokens, from the first, keep their initial values (as attention sinks, Xiao
            et al., arXiv:2309.17453).
        reparameterization: what is trained in place of the prefix. "none"; "mlp": an embedding and two linear layers
            (Li and Liang, section 4.3); "low_rank": two factors a layer; "random_basis": coefficients of a frozen
            random basis (Li et al., arXiv:1804.08838; Aghajanyan et al., arXiv:2012.13255).
        rank: of "low_rank".
        num_basis: how many numbers "random_basis" trains in all, 10 to 1,000 as a rule.
        seed: of random initial values (None: torch's global generator) and of the frozen basis (None: 0).
        task_type: PEFT's task type, kept in the adapter.
        tokenizer_name_or_path: the tokenizer that reads `init_text` where `attach` is given none; kept in the adapter.
        modules_to_save: modules of the model that are trained and saved too, by the ends of their names, such as
            `["score"]`. None: as PEFT does, the head ("classifier", "score" or "qa_outputs") where `task_type` is
            "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS", else none; `[]`: none.
        position_offset: where the text behind the prefix begins: True, at position P, as in PEFT and in servers;
            False, at position 0, as in the adapters library, so that a model with learned positions keeps all of them
            for the text. PEFT's files cannot say so, nor can a server do it; `prefixcore.bake` makes one of the other,
            exactly, where positions are rotary.
        init_weights: PEFT's name: "zero" is `init="zero"`; None leaves `init` as it is.

    Raises:
        ValueError: a value is out of range or two contradict each other.

    Examples:
        >>> prefixcore.PrefixTuningConfig(num_virtual_tokens=20).init
        'vocab'
        >>> prefixcore.PrefixTuningConfig(init_text="Translate to French:").init
        'text'
        >>> prefixcore.PrefixTuningConfig(num_virtual_tokens=20, prefix_projection=True).reparameterization
        'mlp'
    """

    method: ClassVar[str] = "prefix"

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    layers: list[int] | None = None
    where: tuple[str, ...] | None = None
    num_frozen_tokens: int = 0
    reparameterization: str = "none"
    rank: int = 8
    num_basis: int = 256
    position_offset: bool = field(default=True, kw_only=True)
    init_weights: InitVar[str | None] = None

    def __post_init__(self, init_weights: str | None) -> None:
        if init_weights is not None:
            if init_weights != "zero" or self.init not in (None, "zero"):
                raise ValueError(f"init_weights must be 'zero' or None, and agree with init; got {init_weights!r}")
            self._set(init="zero")
        self._check_common()
        _check_choice("reparameterization", self.reparameterization, REPARAMETERIZATIONS)
        if self.prefix_projection:
            if self.reparameterization not in ("none", "mlp"):
                raise ValueError(f"prefix_projection is the MLP, but reparameterization is {self.reparameterization!r}")
            self._set(reparameterization="mlp")
        self._set(prefix_projection=self.reparameterization == "mlp")
        if self.encoder_hidden_size is not None:
            _check_positive("encoder_hidden_size", self.encoder_hidden_size)
        _check_positive("rank", self.rank)
        _check_positive("num_basis", self.num_basis)
        if not isinstance(self.position_offset, bool):
            raise ValueError(f"position_offset must be True or False, got {self.position_offset!r}")
        self._check_where()
        self._check_layers()
        self._check_frozen()

    def _check_where(self) -> None:
        if self.where is None:
            return
        given = () if isinstance(self.where, str) or not isinstance(self.where, Sequence) else tuple(self.where)
        if not given or any(each not in PLACES for each in given):
            raise ValueError(f"where must be a list of some of {', '.join(map(repr, PLACES))}, got {self.where!r}")
        self._set(where=tuple(each for each in PLACES if each in given))

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        layers = list(self.layers) if isinstance(self.layers, Sequence) else []
        are_indices = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers)
        if not layers or not are_indices or len(set(layers)) != len(layers):
            raise ValueError(f"layers must be a list of distinct layer indices from 0, got {self.layers!r}")
        self._set(layers=sorted(layers))

    def _check_frozen(self) -> None:
        frozen, tokens = self.num_frozen_tokens, self.num_virtual_tokens
        if isinstance(frozen, bool) or not isinstance(frozen, int) or frozen < 0:
            raise ValueError(f"num_frozen_tokens must be an integer of at least 0, got {frozen!r}")
        if tokens is None:
            return
        if frozen > tokens or (frozen == tokens and self.reparameterization != "none"):
            raise ValueError(f"num_frozen_tokens is {frozen} of {tokens} virtual tokens: none would be left to train")


@dataclass(frozen=True, eq=False)
class PromptTuningConfig(_Config):
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
            _check_choice("prompt_tuning_init", prompt_tuning_init, tuple(_PEFT_INITS))
            init = _PEFT_INITS[prompt_tuning_init]
            if self.init not in (None, init):
                raise ValueError(f"prompt_tuning_init is {prompt_tuning_init!r} but init is {self.init_name!r}")
            self._set(init=init)
        if prompt_tuning_init_text is not None:
            if self.init_text not in (None, prompt_tuning_init_text):
                raise ValueError("prompt_tuning_init_text and init_text are two names for one text, and differ")
            self._set(init_text=prompt_tuning_init_text)
        self._check_common()
        _check_prompt_tensor(self.init)
        _check_choice("reparameterization", self.reparameterization, ("none", "low_rank", "random_basis"))
        _check_virtual_token_ids(self.virtual_token_ids, self.num_virtual_tokens)
        _check_positive("rank", self.rank)
        _check_positive("num_basis", self.num_basis)


@dataclass(frozen=True, eq=False)
class PTuningConfig(_Config):
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
        _check_prompt_tensor(self.init)
        _check_virtual_token_ids(self.virtual_token_ids, self.num_virtual_tokens)
        _check_choice("encoder_reparameterization_type", self.encoder_reparameterization_type, ENCODERS)
        if self.encoder_hidden_size is not None:
            _check_positive("encoder_hidden_size", self.encoder_hidden_size)
        _check_positive("encoder_num_layers", self.encoder_num_layers)
        dropout = self.encoder_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"encoder_dropout must be a number from 0 to below 1, got {dropout!r}")


def _check_virtual_token_ids(ids: Any, num_virtual_tokens: int | None) -> None:
    if ids is None:
        return
    each = [ids] if isinstance(ids, int) else ids
    are_ids = isinstance(each, (list, tuple)) and all(type(i) is int and i >= 0 for i in each)
    if not are_ids or not each or len(set(each)) != len(each):
        raise ValueError(f"virtual_token_ids must be a token id, or a list of different ones, got {ids!r}")
    if not isinstance(ids, int) and num_virtual_tokens is not None and len(each) != num_virtual_tokens:
        raise ValueError(
            f"virtual_token_ids holds {len(each)} ids for {num_virtual_tokens} virtual tokens: give one for each, or "
            "one for all"
        )


def _check_prompt_tensor(init: Any) -> None:
    if not isinstance(init, (str, Tensor)):
        raise ValueError("init of a soft prompt must be a single tensor [P, hidden], got a sequence")


@dataclass(frozen=True, eq=False)
class MultitaskPromptTuningConfig(_Config):
    """Multitask prompt tuning: one soft prompt, and a low-rank factor a task (Wang et al., arXiv:2303.02861).

    Args:
        num_virtual_tokens, init, init_text, seed, task_type, tokenizer_name_or_path, modules_to_save: as in
            `PromptTuningConfig`; `init` is that of the shared prompt.
        num_ranks: of the factors.
        num_tasks: how many tasks there are.
        prompt_tuning_init: PEFT's name of `init` ("TEXT", "SAMPLE_VOCAB", "RANDOM"); or what to begin from of an
            adapter of this kind: "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED".
        prompt_tuning_init_text: PEFT's name of `init_text`.
        prompt_tuning_init_state_dict_path: that adapter's safetensors file.
        prompt_tuning_init_task: of "EXACT_SOURCE_TASK", which task.

    Raises:
        ValueError: a value is out of range or two contradict each other.

    Examples:
        >>> from prefixcore.nn import MultitaskPromptTuningConfig
        >>> MultitaskPromptTuningConfig(num_virtual_tokens=20, num_tasks=3, prompt_tuning_init="RANDOM").init
        'random'
    """

    method: ClassVar[str] = "multitask-prompt"
    reparameterization: ClassVar[str] = "none"

    num_ranks: int = 1
    num_tasks: int = 1
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    source_init: str | None = None
    prompt_tuning_init: InitVar[str | None] = None
    prompt_tuning_init_text: InitVar[str | None] = None

    def __post_init__(self, prompt_tuning_init: str | None, prompt_tuning_init_text: str | None) -> None:
        if prompt_tuning_init in SOURCE_INITS:
            self._set(source_init=prompt_tuning_init)
        elif prompt_tuning_init is not None:
            _check_choice("prompt_tuning_init", prompt_tuning_init, (*_PEFT_INITS, *SOURCE_INITS))
            self._set(init=_PEFT_INITS[prompt_tuning_init])
        if self.source_init is not None:
            _check_choice("source_init", self.source_init, SOURCE_INITS)
            if not isinstance(self.prompt_tuning_init_state_dict_path, str):
                raise ValueError(f"prompt_tuning_init={self.source_init!r} needs prompt_tuning_init_state_dict_path")
            self._set(init="tensor")
        if prompt_tuning_init_text is not None:
            self._set(init_text=prompt_tuning_init_text)
        self._check_common()
        _check_prompt_tensor(self.init)
        _check_positive("num_ranks", self.num_ranks)
        _check_positive("num_tasks", self.num_tasks)
        task = self.prompt_tuning_init_task
        if isinstance(task, bool) or not isinstance(task, int) or task < 0:
            raise ValueError(f"prompt_tuning_init_task must be an integer of at least 0, got {task!r}")


@dataclass(frozen=True, eq=False)
class CPTConfig(_Config):
    """Context-aware prompt tuning: examples as a soft prompt, moved a little (Blau et al., arXiv:2410.17222).

    Args:
        cpt_token_ids: the tokens of the examples; as many virtual tokens.
        cpt_mask: their attention mask; None: ones.
        cpt_tokens_type_mask: their types: modulo four, 1 is an input's template, 2 an input, 3 an answer's template, 0
            (that is 4, 8, ...) an answer; one quarter for each example. None: ones.
        opt_weighted_loss_type: "none" or "decay": earlier examples count less.
        opt_loss_decay_factor: how much less, for each example.
        opt_projection_epsilon: how far the embedding of an input's token may move.
        opt_projection_format_epsilon: how far that of a template's token may.
        seed, task_type, tokenizer_name_or_path, modules_to_save: as in `PromptTuningConfig`.
        num_virtual_tokens, init, init_text: said by the tokens; leave them out.

    Raises:
        ValueError: a value is out of range or two contradict each other.

    Examples:
        >>> config = prefixcore.CPTConfig(cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4])
        >>> config.num_virtual_tokens
        4
        >>> with prefixcore.attach(model, config):
        ...     loss = model(torch.tensor([[9, 10]]), labels=torch.tensor([[9, 10]])).loss
    """

    method: ClassVar[str] = "cpt"

    cpt_token_ids: list[int] = field(default_factory=lambda: [0])
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] = field(default=None)  # type: ignore[arg-type]
    opt_weighted_loss_type: str = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1

    def __post_init__(self) -> None:
        if self.init not in (None, "tensor") or self.init_text is not None:
            raise ValueError("init of CPTConfig is the embeddings of cpt_token_ids; leave init and init_text out")
        ids = self.cpt_token_ids
        for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"):
            values = getattr(self, name)
            if values is None:
                values = [1] * len(ids)
            if isinstance(values, str) or not isinstance(values, Sequence) or not all(map(_is_count, values)):
                raise ValueError(f"{name} must be a list of integers from 0, got {values!r}")
            if len(values) != len(ids) or not ids:
                raise ValueError(f"{name} has {len(values)} numbers for {len(ids)} tokens: expected as many, and one")
            self._set(**{name: list(values)})
        if self.num_virtual_tokens not in (None, len(ids)):
            raise ValueError(f"num_virtual_tokens is {self.num_virtual_tokens}, but cpt_token_ids has {len(ids)}")
        self._set(num_virtual_tokens=len(ids), init="tensor")
        self._check_common()
        _check_choice("opt_weighted_loss_type", self.opt_weighted_loss_type, ("none", "decay"))
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**63:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


Config: TypeAlias = PrefixTuningConfig | PromptTuningConfig | PTuningConfig | MultitaskPromptTuningConfig | CPTConfig
