"""What a step of training sends, on paper: virtual tokens, a LoRA and full tuning, for 1 to 1,024 GPUs.

`python -m bench.communication` prints the tables that are in docs/guides/distributed.md. Nothing is measured: the
numbers follow from the shapes of the models. Data parallelism adds up the gradients of what is trained with a ring, in
which each GPU sends 2 (n - 1) / n times their bytes; FSDP gathers the weights twice, whatever is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

GPUS = (1, 2, 8, 64, 1024)
TENSOR_PARALLEL = 8
PREFIX_BYTES, LORA_BYTES, WEIGHT_BYTES = 4, 4, 2
"""A number's bytes: what is trained beside the model is float32; the model and its gradient are bfloat16."""


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family: L, E, H, Hkv, D, the width of the MLP, V; the head is not the table."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """How many numbers the model has."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    def prefix(self, tokens: int) -> int:
        """How many numbers a prefix has: 2 L Hkv P D."""
        return 2 * self.layers * self.kv_heads * tokens * self.head_dim

    def prompt(self, tokens: int) -> int:
        """How many a soft prompt has: P E."""
        return tokens * self.hidden

    def lora(self, rank: int) -> int:
        """How many a LoRA has, on the four projections of attention."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.layers * rank * (2 * (self.hidden + q) + 2 * (self.hidden + kv))


LLAMA_8B = Shape("Llama 3.1 8B", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = Shape("Llama 3.1 70B", 80, 8192, 64, 8, 128, 28672, 128256)


def all_reduce(size: float, gpus: int) -> float:
    """Bytes that each GPU sends so that all have the sum of `size` bytes."""
    return 2 * (gpus - 1) / gpus * size


def all_gather(size: float, gpus: int) -> float:
    """Bytes that each GPU sends so that all have the whole of `size` bytes."""
    return (gpus - 1) / gpus * size


def shown(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size else "0"
        size /= 1000
    raise AssertionError


def table(shape: Shape, tokens: int = 20, rank: int = 16) -> str:
    """Markdown: what each GPU sends a step."""
    lines = [
        f"| GPUs, {shape.name} | soft prompt, P = {tokens} | prefix, P = {tokens} | LoRA, rank {rank} | full tuning "
        "| besides, if FSDP has the weights |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gpus in GPUS:
        sizes = (
            all_reduce(shape.prompt(tokens) * PREFIX_BYTES, gpus),
            all_reduce(shape.prefix(tokens) * PREFIX_BYTES, gpus),
            all_reduce(shape.lora(rank) * LORA_BYTES, gpus),
            all_reduce(shape.weights * WEIGHT_BYTES, gpus),
            2 * all_gather(shape.weights * WEIGHT_BYTES, gpus),
        )
        lines.append(f"| {gpus:,} | {' | '.join(map(shown, sizes))} |")
    return "\n".join(lines)


def tensor_parallel_line(shape: Shape, tokens: int = 20) -> str:
    """What tensor parallelism adds for a prefix, in words."""
    size = all_gather(shape.prefix(tokens) * PREFIX_BYTES, TENSOR_PARALLEL)
    return f"{shape.name}, {TENSOR_PARALLEL} processes: {shown(size)} a step."


def main() -> None:
    """Prints what the page holds."""
    for shape in (LLAMA_8B, LLAMA_70B):
        print(table(shape), end="\n\n")
    print(tensor_parallel_line(LLAMA_8B))


if __name__ == "__main__":
    main()
