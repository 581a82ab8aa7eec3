"""The configuration of a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import ClassVar

from .base import BaseConfig
from .checks import check_choice, check_positive

PLACES = ("encoder", "decoder", "cross")
"""Where attention is in an encoder-decoder."""

REPARAMETERIZATIONS = ("none", "mlp", "low_rank", "random_basis")


@dataclass(frozen=True, eq=False)
class PrefixTuningConfig(BaseConfig):
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
        check_choice("reparameterization", self.reparameterization, REPARAMETERIZATIONS)
        if self.prefix_projection:
            if self.reparameterization not in ("none", "mlp"):
                raise ValueError(f"prefix_projection is the MLP, but reparameterization is {self.reparameterization!r}")
            self._set(reparameterization="mlp")
        self._set(prefix_projection=self.reparameterization == "mlp")
        if self.encoder_hidden_size is not None:
            check_positive("encoder_hidden_size", self.encoder_hidden_size)
        check_positive("rank", self.rank)
        check_positive("num_basis", self.num_basis)
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
