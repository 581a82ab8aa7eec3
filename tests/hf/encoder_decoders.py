"""Tiny random encoder-decoders of every known family."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 97
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
    "init_std": 0.2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,  # both stacks: transformers makes a cache of as many layers as the encoder has
    "num_decoder_layers": 3,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "initializer_factor": 1.0,
}
_WHISPER = {
    **_BART,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 64,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_MADE = {
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _BART),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", _BART),
    "marian": ("MarianConfig", "MarianMTModel", {**_BART, "decoder_vocab_size": VOCABULARY}),
    "m2m_100": ("M2M100Config", "M2M100ForConditionalGeneration", _BART),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", _T5),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER),
}
FAMILIES = list(_MADE)
TEXT = [name for name in FAMILIES if name != "whisper"]
BIASED = ("t5", "mt5")
"""Those that bias scores by position."""
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def make(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode; the same seed gives the same weights."""
    config, model, sizes = _MADE[family]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **changes})).eval()


def inputs(family: str) -> dict[str, Tensor]:
    """Two rows, the second padded on the right; or the sound of two."""
    generator = torch.Generator().manual_seed(1)
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 24, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    ids[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def labels() -> Tensor:
    return torch.tensor([[11, 23, 42, 7, 2], [31, 9, 2, -100, -100]])
