"""A tiny Llama with a tokenizer of one token a character: a whole model folder in a few milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\n"


def tokenizer() -> Any:
    """Printable ASCII and the line break, one token each; `<end>` ends a sequence and pads."""
    vocabulary = {"<end>": 0, "<unknown>": 1}
    vocabulary.update({character: i for i, character in enumerate(CHARACTERS, start=2)})
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )


def model(seed: int = 0) -> Any:
    """Two layers, hidden size 32, four query and two key/value heads, random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def folder(path: Path) -> Path:
    """Write the tiny model and its tokenizer as transformers does, and return `path`."""
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def encoder_folder(path: Path) -> Path:
    """Write a tiny BERT for the same tokenizer as transformers does, and return `path`."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def encoder_decoder_folder(path: Path) -> Path:
    """Write a tiny BART for the same tokenizer as transformers does, and return `path`."""
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(
        vocab_size=len(CHARACTERS) + 2,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        **sizes,
    )
    BartForConditionalGeneration(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
