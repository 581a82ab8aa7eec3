"""Nearest tokens against a comparison with the whole table at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from prefixcore.adapters import read_adapter
from prefixcore.audit import nearest
from prefixcore.audit.errors import NotMeasuredError
from prefixcore.audit.running import FrozenRun
from prefixcore.audit.virtual import VirtualTokens, virtual_tokens
from prefixcore.audit.vocabulary import nearest_to_prefix, nearest_to_prompt, start_ids
from tests.hf.models import make


@pytest.fixture(autouse=True, params=[7, 4096], ids=["in chunks", "at once"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK", request.param)


def check(found, targets, table):
    """`found` names the rows of `table` [V, F] that are nearest to each of `targets` [P, F]."""
    cosines = normalize(targets, dim=1) @ normalize(table, dim=1).T
    for row, each in zip(found["tokens"], cosines, strict=True):
        best = each.topk(len(row))
        assert [token["id"] for token in row] == best.indices.tolist()
        assert [token["cosine"] for token in row] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_soft_prompt_is_compared_with_the_embeddings(model, tokenizer, prompt, quiet):
    adapter = read_adapter(prompt)
    virtual = virtual_tokens(adapter)
    start = start_ids(model, adapter.config, tokenizer, virtual.count)
    assert start == tokenizer("swap:")["input_ids"]
    found = nearest_to_prompt(model, tokenizer, virtual, start, quiet)
    table = model.get_input_embeddings().weight.detach()
    check(found["kinds"]["embedding"], virtual.prompt, table)
    kind = found["kinds"]["embedding"]
    assert kind["cosine_with_start"] == pytest.approx(
        torch.cosine_similarity(virtual.prompt, table[start]).tolist(), abs=1e-4
    )
    between = normalize(table, dim=1) @ normalize(table, dim=1).T
    between.fill_diagonal_(-1)
    assert kind["median_between_real_tokens"] == pytest.approx(float(between.max(1).values.median()), abs=1e-4)
    assert found["norms"]["vocabulary"]["greatest"] == pytest.approx(float(table.norm(dim=1).max()), rel=1e-5)
    assert sum(found["norms"]["histogram"]["counts"]) == len(table)
    assert kind["tokens"][0][0]["text"] == tokenizer.decode([kind["tokens"][0][0]["id"]])


def test_a_prefix_is_compared_with_the_first_layer(model, tokenizer, prefix, quiet):
    virtual = virtual_tokens(read_adapter(prefix))
    found = nearest_to_prefix(FrozenRun(model), tokenizer, virtual, None, quiet)
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.get_input_embeddings().weight)[:, None]  # [V, 1, E]
    values = layer.self_attn.v_proj(hidden)[:, 0]
    key, value = (x.transpose(0, 1).flatten(1) for x in virtual.pairs[0])
    check(found["kinds"]["value"], value, values)
    keys = layer.self_attn.k_proj(hidden).view(-1, 1, 2, 16).transpose(1, 2)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    for place in range(virtual.count):
        cos, sin = model.model.rotary_emb(hidden, torch.tensor([[place]]))
        _, rotated = apply_rotary_pos_emb(keys, keys, cos, sin)
        at_place = {"tokens": found["kinds"]["key"]["tokens"][place : place + 1]}
        check(at_place, key[place : place + 1], rotated[:, :, 0].flatten(1))


@pytest.mark.parametrize("position_offset", [True, False])
def test_an_untrained_prefix_is_its_text(position_offset, model, tokenizer, tmp_path, quiet):
    import prefixcore

    config = prefixcore.PrefixTuningConfig(init_text="ab ->", position_offset=position_offset)
    with prefixcore.attach(model, config, tokenizer=tokenizer) as handle:
        handle.save(tmp_path / "start")
    adapter = read_adapter(tmp_path / "start")
    start = start_ids(model, adapter.config, tokenizer, 5)
    found = nearest_to_prefix(FrozenRun(model), tokenizer, virtual_tokens(adapter), start, quiet)
    for kind in found["kinds"].values():
        assert "".join(row[0]["text"] for row in kind["tokens"]) == "ab ->"
        assert kind["still_nearest_to_start"] == 5
        assert min(kind["cosine_with_start"]) > 0.999


def test_where_there_is_no_such_list_it_is_said(model, tokenizer, quiet):
    later = VirtualTokens(1, (0,), {1: (torch.randn(2, 1, 16), torch.randn(2, 1, 16))})
    with pytest.raises(NotMeasuredError, match="leaves out the first attention layer"):
        nearest_to_prefix(FrozenRun(model), tokenizer, later, None, quiet)


def test_a_first_layer_that_reads_more_than_the_token_is_found_out(tokenizer, quiet):
    mixed = make("llama")
    embed = mixed.get_input_embeddings()
    embed.register_forward_hook(lambda module, inputs, output: output.cumsum(1))
    virtual = VirtualTokens(1, (0,), {0: (torch.randn(2, 1, 16), torch.randn(2, 1, 16))})
    with pytest.raises(NotMeasuredError, match="follow from the text before a token"):
        nearest_to_prefix(FrozenRun(mixed), tokenizer, virtual, None, quiet)
