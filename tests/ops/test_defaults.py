"""What runs when nobody asks: the default backend of each op, type of device and dtype, whatever was compiled in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import prefixcore
from prefixcore.backends import library, nvidia, triton
from prefixcore.ops import select
from tests.device import NAME

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOPPER, TURING = (9, 0), (7, 5)
COMPILED = ((8, 0), (9, 0), (10, 0))

Here = Callable[..., None]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """``here(compiled, has_triton, gpu)``: a build for these architectures, on a machine with such a GPU, or none."""

    def set_up(
        compiled: tuple[tuple[int, int], ...] = (), has_triton: bool = True, gpu: tuple[int, int] | None = HOPPER
    ) -> None:
        monkeypatch.setattr(library, "CUDA_ARCHITECTURES", compiled)
        monkeypatch.setattr(triton, "_TRITON", has_triton)
        machine = nvidia.Machine(None, gpu) if gpu else nvidia.Machine("no GPU is there", (0, 0))
        monkeypatch.setattr(nvidia, "_machine", [machine])

    return set_up


def default(op: str, device: str, dtype: torch.dtype = torch.bfloat16) -> str:
    return prefixcore.which_backend(op, device, dtype).name


@pytest.mark.parametrize("op", select.OPS)
@pytest.mark.parametrize("compiled", [(), COMPILED], ids=["no CUDA", "CUDA"])
@pytest.mark.parametrize("has_triton", [False, True])
@pytest.mark.parametrize("gpu", [None, HOPPER])
def test_on_a_cpu(here: Here, op: str, compiled: tuple, has_triton: bool, gpu: tuple[int, int] | None) -> None:
    here(compiled, has_triton, gpu)
    for dtype in KERNEL_DTYPES:
        assert default(op, "cpu", dtype) == "cpu"
    assert default(op, "cpu", torch.float64) == "reference"


@pytest.mark.parametrize(
    ("compiled", "has_triton", "gpu", "attention", "embedding"),
    [
        ((), False, HOPPER, "reference", "reference"),
        ((), True, HOPPER, "triton", "triton"),
        (COMPILED, False, HOPPER, "reference", "cuda"),
        (COMPILED, True, HOPPER, "triton", "cuda"),
        (COMPILED, True, (12, 0), "triton", "cuda"),  # by the PTX of the last architecture
        ((), True, TURING, "reference", "reference"),
        (COMPILED, True, TURING, "reference", "reference"),
        (((7, 5),), True, TURING, "reference", "cuda"),
        (((9, 0),), True, (8, 6), "triton", "reference"),  # the embedding's kernels are compiled in, and not for it
    ],
)
def test_on_a_gpu(
    here: Here, compiled: tuple, has_triton: bool, gpu: tuple[int, int], attention: str, embedding: str
) -> None:
    here(compiled, has_triton, gpu)
    for dtype in KERNEL_DTYPES:
        assert default("prefix_attention", "cuda", dtype) == attention
        assert default("soft_embedding", "cuda", dtype) == embedding
    for op in select.OPS:
        assert default(op, "cuda", torch.float64) == "reference"


@pytest.mark.parametrize("op", select.OPS)
@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_elsewhere_there_is_the_reference_alone(here: Here, op: str, device: str) -> None:
    here(COMPILED)
    choice = prefixcore.which_backend(op, device, torch.float32)
    assert choice == ("reference", f"no backend has kernels for {device}")


def test_why_it_is_the_reference(here: Here) -> None:
    here(has_triton=False)
    choice = prefixcore.which_backend("soft_embedding", "cuda", torch.float32)
    assert choice.why == (
        "the cuda backend refuses: CUDA was not compiled in: build with PREFIXCORE_CUDA=1 where nvcc is installed; "
        "the triton backend refuses: Triton is not installed: pip install triton"
    )
    here(COMPILED, gpu=TURING)
    choice = prefixcore.which_backend("soft_embedding", "cuda", torch.float32)
    assert "the cuda backend refuses: it needs compute capability 8.0, and the GPU has 7.5" in choice.why


def test_of_two_kernels_for_one_op_the_dispatcher_keeps_one(here: Here) -> None:
    here(COMPILED)
    with (
        prefixcore.use_backend("triton"),
        pytest.raises(ValueError, match="triton backend was forced, but CUDA was compiled in"),
    ):
        prefixcore.which_backend("soft_embedding", "cuda", torch.float32)
    here()
    with (
        prefixcore.use_backend("cuda"),
        pytest.raises(ValueError, match="cuda backend was forced, but CUDA was not compiled in"),
    ):
        prefixcore.which_backend("soft_embedding", "cuda", torch.float32)


@pytest.mark.parametrize("compiled", [(), COMPILED], ids=["no CUDA", "CUDA"])
def test_the_reference_is_not_what_runs_on_a_gpu(
    here: Here, monkeypatch: pytest.MonkeyPatch, compiled: tuple[tuple[int, int], ...]
) -> None:
    """In fake CUDA tensors, for which no GPU has to be there: through the dispatcher, where kernels are registered."""
    here(compiled)
    monkeypatch.setitem(prefixcore.soft_embedding.__globals__, "soft_embedding_reference", _fails)
    with FakeTensorMode(), torch.device("cuda"):
        ids, weight = torch.zeros(2, 5, dtype=torch.int64), torch.empty(7, 4).bfloat16()
        out = prefixcore.soft_embedding(ids, weight, torch.empty(3, 4))
        grad = torch.ops.prefixcore.soft_embedding_backward(out, ids, 7, 3)
    assert (out.shape, out.dtype, out.device.type) == ((2, 5, 4), torch.bfloat16, "cuda")
    assert (grad.shape, grad.dtype, grad.device.type) == ((3, 4), torch.float32, "cuda")
    for op in (f"{op}{direction}" for op in select.OPS for direction in ("", "_backward")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prefixcore::{op}", "CUDA"), op


def _fails(input_ids: torch.Tensor, weight: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the reference ran")


@pytest.mark.skipif(NAME == "cuda", reason="its tables would have to be there in float64")
def test_the_reference_copies_no_table() -> None:
    """Not a byte of a table that is far larger than memory: only the rows that are named are read."""
    table = torch.zeros(1, 8).expand(2**40, 8)
    virtual = torch.ones(2, 8).requires_grad_()
    with prefixcore.use_backend("reference"):
        out = prefixcore.soft_embedding(torch.tensor([3, 2**40 + 1]), table, virtual)
        out.sum().backward()
    assert out[:, 0].tolist() == [0, 1]
    assert virtual.grad is not None
    assert virtual.grad[:, 0].tolist() == [0, 1]
