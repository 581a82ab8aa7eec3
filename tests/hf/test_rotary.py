"""Keys moved to other positions: those that the model itself computes there, in every layer, or a refusal in words."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from prefixcore.adapters import AdapterError
from prefixcore.hf.attention.recording import record
from prefixcore.hf.model.signature import argument_names
from prefixcore.hf.positions import rotary, rotary_probe
from prefixcore.hf.positions.rotary import turn, why_fixed

from .tiny_models import every_class, make

IDS = torch.tensor([[17, 40, 63, 9, 88]])
BY = 23

_NOPE = {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "layer_types": ["full_attention"] * 3}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "16 in halves", {}),
    "linear": ("LlamaForCausalLM", "16 in halves", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "yarn": ("LlamaForCausalLM", "16 in halves", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    "llama3": ("LlamaForCausalLM", "16 in halves", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "phi": ("PhiForCausalLM", "8 in halves", {}),
    "stablelm": ("StableLmForCausalLM", "4 in halves", {}),
    "gpt-neox": ("GPTNeoXForCausalLM", "4 in halves", {}),
    "glm": ("GlmForCausalLM", "8 in pairs", {}),
    "cohere": ("CohereForCausalLM", "16 in pairs", {}),
    "cohere2": ("Cohere2ForCausalLM", "16 in pairs, none", {}),
    "granite": ("GraniteForCausalLM", "16 in halves", {}),
    "olmo": ("OlmoForCausalLM", "16 in halves", {}),
    "olmo2": ("Olmo2ForCausalLM", "16 in halves", {}),
    "smollm3": ("SmolLM3ForCausalLM", "16 in halves, none, 16 in halves", _NOPE),
    "gemma3": ("Gemma3ForCausalLM", "16 in halves, 16 in halves", {}),
    "gemma4": ("Gemma4ForCausalLM", "16 in halves, 16 in halves", {}),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", "16 in halves, 16 in halves", {}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "16 in halves", {}),
    "mixtral": ("MixtralForCausalLM", "16 in halves", {}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "16 in halves from 16", {}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", "16 in pairs from 16", {}),
    "llama4": ("Llama4ForCausalLM", "16 in pairs, none", {}),
    "nanochat": ("NanoChatForCausalLM", "16 in halves", {}),
    "falcon": ("FalconForCausalLM", "16 in halves", {}),
    "falcon-alibi": ("FalconForCausalLM", "none", {"alibi": True}),
    "gpt-j": ("GPTJForCausalLM", "16 in pairs", {}),
    "codegen": ("CodeGenForCausalLM", "16 in pairs", {}),
    "ernie-vl": ("Ernie4_5_VLMoeForConditionalGeneration", "16 in pairs", {}),
    "zaya": ("ZayaForCausalLM", "8 in halves", {}),
    "bloom": ("BloomForCausalLM", "none", {}),
    "mpt": ("MptForCausalLM", "none", {}),
}  # fmt: skip
"""A class, which coordinates of its keys turn (in all layers, or in each of them), and changes to its configuration."""

FLOAT32 = {"gpt-j", "codegen"}
"""Families whose attention has no float64."""

TWO_TABLES = {"gemma3", "gemma4", "modernbert-decoder"}


def build(family: str, **changes: Any) -> Any:
    name, _, own = FAMILIES[family]
    own = {**own, **changes}
    if "rope_parameters" in own:
        own["rope_parameters"] = {"rope_theta": 10000.0, **own["rope_parameters"]}
    return make(name, "llama" if name == "LlamaForCausalLM" else every_class()[name], **own)


def cached_keys(model: Any, ids: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of ids at positions from `first` on, as the model puts them into its cache."""
    takes = "position_ids" in argument_names(model)
    positions = {"position_ids": torch.arange(first, first + ids.shape[1])[None]} if takes else {}
    if hasattr(model.config, "kv_lora_rank"):  # its cache holds what keys and values are made of
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "forward", partial(model.forward, **positions))
            return [(call.key[0], call.value[0]) for call in record(model, ids)]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, **positions)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def described(found: Any) -> list[str]:
    words = []
    for each in found:
        count = 2 * len(each.frequencies)
        if not count:
            words.append("none")
            continue
        layout = "halves" if int(each.second[0] - each.first[0]) == count // 2 else "pairs"
        start = int(each.first[0])
        words.append(f"{count} in {layout}" + (f" from {start}" if start else ""))
    return words


@pytest.mark.parametrize("family", FAMILIES)
def test_moved_keys_are_those_that_the_model_computes_there(family: str) -> None:
    model = build(family)
    if family not in FLOAT32:
        model.double()
        model.config._experts_implementation = "eager"  # others have no float64
    assert why_fixed(model) is None
    found = rotary_probe.probed_turns(model)
    words = FAMILIES[family][1].split(", ")
    assert described(found) == (words * len(found) if len(words) == 1 else words)
    if family in TWO_TABLES:
        assert not torch.equal(found[0].frequencies, found[1].frequencies)
    here = cached_keys(model, IDS, 3)
    assert len(here) == len(found)
    there = cached_keys(model, IDS, 3 + BY)
    for (key, value), (expected, _), (_, same) in zip(turn(model, here, BY), there, here, strict=True):
        torch.testing.assert_close(key.double(), expected.double(), rtol=2e-5, atol=2e-5)
        assert value is same
    if words == ["none"]:
        return
    far = [float((key - moved).norm() / key.norm()) for (key, _), (moved, _) in zip(here, there, strict=True)]
    assert max(far) > 0.1, "a test that nothing could fail"
    each = torch.tensor([BY, 0, BY, 0, 0])
    for (key, _), (old, _), (new, _) in zip(turn(model, here, each), here, there, strict=True):
        expected = torch.where(each[:, None] > 0, new, old)
        torch.testing.assert_close(key.double(), expected.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "phi", "glm", "gemma3", "smollm3", "gpt-j", "qwen3-moe"])
def test_in_bfloat16_the_same_layout_is_found(family: str) -> None:
    model = build(family)
    exact = rotary_probe.probed_turns(model)
    found = rotary_probe.probed_turns(model.bfloat16())
    for one, other in zip(exact, found, strict=True):
        assert torch.equal(one.first, other.first)
        assert torch.equal(one.second, other.second)
        torch.testing.assert_close(one.frequencies, other.frequencies, rtol=0.01, atol=0)
    here, there = cached_keys(model, IDS, 3), cached_keys(model, IDS, 3 + BY)
    for (key, _), (expected, _) in zip(turn(model, here, BY), there, strict=True):
        assert float((key - expected.float()).norm() / expected.float().norm()) < 0.05


def test_scores_that_depend_on_more_than_the_distance_are_found_out() -> None:
    """HunYuan's norm comes behind its rotary embedding: trained weights scale what has turned."""
    model = make("HunYuanDenseV1ForCausalLM", every_class()["HunYuanDenseV1ForCausalLM"])
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.self_attn.key_layernorm.weight, 0.5, 2.0)
    assert "has keys in layer 0 that turn with their position by none of its 1 tables" in str(why_fixed(model))


def test_some_layers_turn_by_their_own_table() -> None:
    model = build("gemma3")
    here, there = cached_keys(model, IDS, 0), cached_keys(model, IDS, BY)
    ((key, _),) = turn(model, here[1:], BY, [1])
    torch.testing.assert_close(key, there[1][0], rtol=1e-4, atol=1e-4)
    ((wrong, _),) = turn(model, here[1:], BY, [0])
    assert not torch.allclose(wrong, there[1][0], rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"layer of each of 1 pairs, got 2 \(all layers of the model\)"):
        turn(model, here[1:], BY)
    with pytest.raises(ValueError, match="layer of each of 1 pairs, got 2$"):
        turn(model, here[1:], BY, [0, 1])
    with pytest.raises(AdapterError, match="keys of layer 0 have 8 numbers, but those of Gemma3ForCausalLM have 16"):
        turn(model, [(key[..., :8], value) for key, value in here], BY)


def test_layers_that_share_keys_turn_as_the_layer_that_made_them() -> None:
    model = make("Gemma3nForCausalLM", "gemma3n_text")
    calls = record(model, IDS)
    assert torch.equal(calls[0].key, calls[2].key)
    pairs = [(call.key[0], call.value[0]) for call in calls]
    moved = turn(model, pairs, BY)
    assert torch.equal(moved[0][0], moved[2][0])
    assert torch.equal(moved[1][0], moved[3][0])
    assert not torch.allclose(turn(model, pairs[1:2], BY, [0])[0][0], moved[1][0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GPT2LMHeadModel", "has learned positions: keys cannot be moved to other positions, as those of the text"),
        ("OPTForCausalLM", "has positions in its embeddings (a table of 96): keys cannot be moved"),
        ("BartForCausalLM", "has positions in its embeddings (a table of 96): keys cannot be moved"),
        ("BlenderbotSmallForCausalLM", "has positions in its embeddings (a table of 96): keys cannot be moved"),
        ("XGLMForCausalLM", "has keys in layer 0 that turn with their position by none of its 0 tables"),
        ("JambaForCausalLM", "does not heed the positions that it is given and knows where a token stands in another"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_turn_is_refused_in_words(name: str, words: str, dtype: torch.dtype) -> None:
    model = make(name, every_class()[name]).to(dtype)
    assert str(why_fixed(model)).startswith(f"{name} {words}")
    with pytest.raises(AdapterError, match=re.escape(words)):
        turn(model, [], 1)


def test_layers_that_begin_anew_at_position_0_are_found_out() -> None:
    """RecurrentGemma's forget what was before it, so that no turn leads from a text at P to one at 0."""
    model = make("RecurrentGemmaForCausalLM", "recurrent_gemma")
    assert "has keys in layer 0 that turn with their position by none of its 1 tables" in str(why_fixed(model))


def test_encoders_and_encoder_decoders_are_refused_in_words() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
    assert why_fixed(t5) == (
        "T5ForConditionalGeneration is an encoder-decoder: only keys of a decoder alone can be moved to other positions"
    )
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    for model in (
        transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4)),
        transformers.ModernBertModel(transformers.ModernBertConfig(**sizes, num_attention_heads=4, pad_token_id=0)),
    ):
        assert str(why_fixed(model.eval())).startswith(f"{type(model).__name__} is an encoder: keys cannot be moved")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_tables_that_change_with_the_length_are_refused_without_a_run(kind: str) -> None:
    options: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        options |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    model = make("LlamaForCausalLM", "llama", rope_parameters=options)
    assert f"of the kind '{kind}', which turn by the length of the text" in str(why_fixed(model))
    assert model not in rotary._found


class _Other(torch.nn.Module):
    """A rotary embedding with angles that are in no table."""

    def __init__(self, rotary_emb: Any) -> None:
        super().__init__()
        self.inner = rotary_emb

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return self.inner(x, position_ids * position_ids)


def test_a_table_that_the_model_does_not_turn_by_proves_nothing() -> None:
    """Nor does a layer in which it holds stand for the next one."""
    model = build("llama")
    model.model.rotary_emb = _Other(model.model.rotary_emb)
    assert "has keys in layer 0 that turn with their position by none of its 1 tables" in str(why_fixed(model))
    model = build("phi")
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(_with_other_angles, with_kwargs=True)
    assert "has keys in layer 1 that turn with their position by none of its 1 tables" in str(why_fixed(model))


def _with_other_angles(module: Any, args: Any, kwargs: Any) -> Any:
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (cos.flip(-1), sin.flip(-1))}


def test_positions_that_are_added_beside_are_found_out() -> None:
    """A model that turns keys by a table that it has, and adds a little of a learned position to its embeddings."""
    model = build("llama")
    table = 0.02 * torch.randn(96, 64, generator=torch.Generator().manual_seed(0))

    def add(module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] + table[kwargs["position_ids"]].to(args[0].dtype), *args[1:]), kwargs

    model.model.layers[0].register_forward_pre_hook(add, with_kwargs=True)
    assert "has keys in layer 0 that turn" in str(why_fixed(model))
    assert "has keys in layer 0 that turn" in str(why_fixed(model.bfloat16()))


def test_keys_that_are_zero_show_nothing() -> None:
    model = build("llama")
    torch.nn.init.zeros_(model.model.layers[1].self_attn.k_proj.weight)
    assert "has keys in layer 1 that are all zero, or no numbers" in str(why_fixed(model))


def test_a_model_is_read_once_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    probed = rotary_probe.probed_turns
    monkeypatch.setattr(rotary, "probed_turns", lambda model: runs.append(model.dtype) or probed(model))
    model = build("phi").train()
    before = model.config._attn_implementation, len(model.model._forward_pre_hooks)
    pairs = cached_keys(build("phi"), IDS, 0)
    for _ in range(2):
        turn(model, pairs, 1)
        assert why_fixed(model) is None
    assert runs == [torch.float32]
    assert model.training
    assert (model.config._attn_implementation, len(model.model._forward_pre_hooks)) == before
    model.bfloat16()
    assert why_fixed(model) is None
    model.model.rotary_emb.inv_freq /= 2
    here, there = cached_keys(model.eval(), IDS, 0), cached_keys(model, IDS, BY)
    (key, _), _ = turn(model, here, BY)
    assert float((key - there[0][0].float()).norm() / key.norm()) < 0.05
    assert runs == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_where_no_tokens_can_be_read_a_known_family_turns_as_it_is_known_to() -> None:
    """Tensor parallelism, FSDP, weights that are elsewhere: what holds for llama is not looked for in Phi."""
    llama, phi = build("llama"), build("phi")
    pairs = cached_keys(llama, IDS, 0)
    expected = turn(llama, pairs, BY)
    for name in ("head_group", "data_meshes", "without_values"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rotary, name, lambda model: ["a group"])
            patch.setattr(rotary, "probed_turns", None)
            for (key, _), (same, _) in zip(turn(llama, pairs, BY), expected, strict=True):
                assert torch.equal(key, same)
            assert "so that it cannot be seen how its keys turn with their position" in str(why_fixed(phi))


def test_a_model_with_few_positions_is_not_asked_for_others() -> None:
    """GPT-J looks its angles up: past the table is an error, on a GPU one that ends the process."""
    model = make("GPTJForCausalLM", "gptj", n_positions=12)
    assert why_fixed(model) is None
    model = make("GPTJForCausalLM", "gptj", n_positions=6)
    assert "has no more than 6 positions" in str(why_fixed(model))
