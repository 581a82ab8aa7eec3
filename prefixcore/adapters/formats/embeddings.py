"""Soft prompts as plain embeddings: vLLM's prompt_embeds, TensorRT-LLM's prompt table, llama.cpp's batches."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import AdapterError, shown
from ..storage import naming
from .files import load_npy, load_torch, save_npy, save_torch
from .record import PROMPT, Contents, Facts, Written, as_numbers, one_prompt, rounded


class Vllm:
    """What a request of vLLM carries as `prompt_embeds` (server option `--enable-prompt-embeds`)."""

    name = "vllm"
    title = "vLLM prompt_embeds"
    kinds: tuple[str, ...] = (PROMPT,)
    is_folder = False
    position_offset = True
    needs_model = False
    layout = ".pt: one tensor [P, E], of torch.save"
    lost = "manifest, heads; which model it is for"

    def read(self, source: Path, facts: Facts) -> Contents:
        """A tensor [P, E], or [1, P, E]."""
        saved = load_torch(source)
        with naming(source):
            if isinstance(saved, torch.Tensor) and saved.dim() == 3:
                saved = saved.squeeze(0)
            return Contents(prompts=as_numbers("prompt_embeds", saved, [None, None])[None])

    def write(self, contents: Contents, facts: Facts, dtype: torch.dtype) -> Written:
        """One file."""
        return Written({"": save_torch(rounded("prompt_embeds", one_prompt(contents, self.title), dtype).clone())})


class TensorRtLlm:
    """TensorRT-LLM's prompt table (`--prompt_table_path`, `--prompt_tasks`, ids from the vocabulary's size on)."""

    name = "tensorrt-llm"
    title = "TensorRT-LLM prompt table"
    kinds: tuple[str, ...] = (PROMPT,)
    is_folder = False
    position_offset = True
    needs_model = False
    layout = ".npy: [tasks, P, E]"
    lost = "manifest, heads, names of tasks; which model it is for"

    def read(self, source: Path, facts: Facts) -> Contents:
        """A table [tasks, P, E], or [P, E] of one task."""
        table = load_npy(source)
        with naming(source):
            table = table[None] if table.dim() == 2 else table
            return Contents(prompts=as_numbers("prompt table", table, [None, None, None]))

    def write(self, contents: Contents, facts: Facts, dtype: torch.dtype) -> Written:
        """One file with every task."""
        assert contents.prompts is not None
        return Written({"": save_npy(rounded("prompt table", contents.prompts, dtype))})


class LlamaCpp:
    """The numbers of `llama_batch.embd`, [P, E] of float32 and nothing else, in the machine's byte order (little)."""

    name = "llama.cpp"
    title = "llama.cpp embeddings"
    kinds: tuple[str, ...] = (PROMPT,)
    is_folder = False
    position_offset = True
    needs_model = False
    layout = "raw float32 [P, E], as llama_batch.embd takes them"
    lost = "everything but the numbers, the shape too, so it is written and never read"

    def read(self, source: Path, facts: Facts) -> Contents:
        """Refuses: numbers without a shape fit any model whose width divides them."""
        raise AdapterError(
            f"{source}: raw numbers say neither how many virtual tokens there are nor how wide they are, and would fit "
            "another model too; read GGUF, which says both (--from gguf)"
        )

    def write(self, contents: Contents, facts: Facts, dtype: torch.dtype) -> Written:
        """One file."""
        if dtype != torch.float32:
            raise AdapterError("llama_batch.embd takes float32; leave --dtype out")
        return Written({"": one_prompt(contents, self.title).contiguous().numpy().astype("<f4").tobytes()})


class Gguf:
    """A GGUF file with the embeddings as its one tensor, for programs on the `gguf` package or ggml's reader."""

    name = "gguf"
    title = "GGUF tensor for llama.cpp"
    kinds: tuple[str, ...] = (PROMPT,)
    is_folder = False
    position_offset = True
    needs_model = False
    layout = ".gguf: tensor prompt_embeddings [P, E], general.architecture = prefixcore"
    lost = "manifest, heads; which model it is for"

    def read(self, source: Path, facts: Facts) -> Contents:
        """The tensor of that name."""
        from .gguf_file import read_tensor

        with naming(source):
            numbers = read_tensor(source, "prompt_embeddings")
            return Contents(prompts=as_numbers("prompt_embeddings", numbers, [None, None])[None])

    def write(self, contents: Contents, facts: Facts, dtype: torch.dtype) -> Written:
        """One file."""
        from .gguf_file import write_tensor

        if dtype not in (torch.float32, torch.float16):
            raise AdapterError(f"expected float32 or float16 for GGUF, got {shown(str(dtype))}")
        numbers = rounded("prompt_embeddings", one_prompt(contents, self.title), dtype)
        return Written({"": write_tensor("prompt_embeddings", numbers)})
