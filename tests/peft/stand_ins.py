"""Tiny random models, tokenizers and data under the names of those that PEFT's tests fetch from the Hugging Face hub.

They are laid out as the hub's own cache is, so that everything finds them by their names, with the hub out of reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 1024

TEXT = [
    "classify the following into either positive or negative, or entailment, neutral or contradiction:",
    "This is a test prompt. A film that is a delight from the first minute to the last.",
    "The plot makes no sense at all, and nobody on the screen seems to mind. input: output: positive negative",
]

_SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 2}
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2}
_GROUPED = {**_SIZES, **_IDS, "num_key_value_heads": 2, "max_position_embeddings": 512}
_GPT = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_ENCODER = {**_SIZES, "vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 512}


def _opt() -> Any:
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 4, "num_hidden_layers": 3}
    ids = {**_IDS, "init_std": _IDS["initializer_range"]}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**ids, **sizes, word_embed_proj_dim=16, max_position_embeddings=512)
    )


def _gemma3() -> Any:
    layer_types = ["sliding_attention", "full_attention"]
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=128, layer_types=layer_types)
    )


def _deberta(model: Any, config: Any) -> Any:
    return model(config(**_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]))


def _t5() -> Any:
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**ids, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    )


def _bart() -> Any:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **ids,
            **sizes,
            d_model=32,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_position_embeddings=512,
            init_std=0.2,
            decoder_start_token_id=3,
            forced_eos_token_id=3,
        )
    )


_MODELS: dict[str, Callable[[], Any]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**_GPT)
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(**_GPT, rotary_dim=4)
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-t5": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**_GROUPED, "num_key_value_heads": 4})
    ),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_GROUPED)
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**_GROUPED, head_dim=8)
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**_GROUPED)
    ),
    "hf-internal-testing/tiny-random-gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT)),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**_GROUPED)
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: (
        transformers.BertForSequenceClassification(transformers.BertConfig(**_ENCODER))
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_ENCODER))
    ),
    "peft-internal-testing/tiny-random-BertModel": lambda: transformers.BertModel(transformers.BertConfig(**_ENCODER)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**_ENCODER)
    ),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: _deberta(
        transformers.DebertaModel, transformers.DebertaConfig
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: _deberta(
        transformers.DebertaV2Model, transformers.DebertaV2Config
    ),
}

_ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"
"""An adapter of which the tests read the configuration."""


def make_hub(home: Path) -> None:
    """Fills `home`, the folder that `HF_HOME` names, with all of them; those that are there stay."""
    for name, build in _MODELS.items():
        with _snapshot(home, name) as folder:
            if folder is not None:
                torch.manual_seed(0)
                build().save_pretrained(folder)
                tokenizer().save_pretrained(folder)
    with _snapshot(home, _ADAPTER) as folder:
        if folder is not None:
            from peft import LoraConfig

            LoraConfig(r=8, task_type="CAUSAL_LM").save_pretrained(folder)


@contextmanager
def _snapshot(home: Path, name: str) -> Iterator[Path | None]:
    """The folder for the files of a repository, which is found once the block has ended; None: it is there already."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    if (repository / "refs" / "main").exists():
        yield None
        return
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    (repository / "refs").mkdir(exist_ok=True)
    for revision in ("test", "main"):
        (repository / "refs" / revision).write_text("0" * 40)


def tokenizer() -> Any:
    """A byte-level tokenizer."""
    specials = ["<pad>", "<unk>", "<s>", "</s>"]
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    inner.train_from_iterator(TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def load_dataset(name: str, *arguments: Any, **options: Any) -> Any:
    """In place of `datasets.load_dataset`: a few rows with the columns of the data set of this name."""
    from datasets import Dataset, DatasetDict

    if name == "nyu-mll/glue":
        rows = {"sentence": TEXT * 4, "label": [0, 1, 1] * 4, "idx": list(range(12))}
        return DatasetDict(train=Dataset.from_dict(rows), validation=Dataset.from_dict(rows))
    if name == "ybelkada/english_quotes_copy":
        return DatasetDict(train=Dataset.from_dict({"quote": TEXT * 4, "author": ["nobody"] * 12}))
    raise NotImplementedError(f"there is no stand-in for the data set {name!r}")
