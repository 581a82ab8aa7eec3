"""How the triton backend stands in the dispatcher: fake CUDA tensors, forced and refused, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import prefixcore
from prefixcore.backends import nvidia, triton
from prefixcore.backends.problem import attention_problem
from prefixcore.backends.protocol import DTYPES
from prefixcore.backends.triton import beside, choose, folded, merged, single, use_path
from tests.device import DEVICE, NAME, triton_backend
from tests.ops.problems import Problem

A_GPU = nvidia.Machine(None, (9, 0))

without_gpu = pytest.mark.skipif(NAME == "cuda", reason="there is a GPU")


@pytest.fixture
def no_machine_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "_machine", [])
    monkeypatch.setattr(triton, "_too_old", {})


def test_importing_prefixcore_does_not_import_triton() -> None:
    code = "import sys, prefixcore; from prefixcore.backends import triton; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@without_gpu
def test_without_a_gpu_the_reference_runs_and_says_why(no_machine_is_known: None) -> None:
    choice = prefixcore.which_backend("prefix_attention", "cuda", torch.bfloat16)
    assert choice == ("reference", "the triton backend refuses: no GPU is there")
    refusal = "triton backend was forced, but no GPU is there"
    with prefixcore.use_backend("triton"), pytest.raises(ValueError, match=refusal):
        prefixcore.which_backend("prefix_attention", "cuda", torch.bfloat16)


def test_with_a_gpu_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "_machine", [A_GPU])
    for dtype in DTYPES:
        assert prefixcore.which_backend("prefix_attention", "cuda", dtype) == ("triton", triton.describe())
    assert prefixcore.which_backend("prefix_attention", "cuda", torch.float64).name == "reference"
    assert "not on mps" in (triton.refuses("prefix_attention", "mps", torch.bfloat16) or "")
    monkeypatch.setattr(triton, "_TRITON", False)
    choice = prefixcore.which_backend("prefix_attention", "cuda", torch.bfloat16)
    assert choice == ("reference", "the triton backend refuses: Triton is not installed: pip install triton")


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [([(7, 5)], "needs compute capability 8.0, and the GPU has 7.5"), ([(8, 6)], None), ([(7, 0), (9, 0)], None)],
)
def test_old_gpus(
    monkeypatch: pytest.MonkeyPatch, no_machine_is_known: None, capabilities: list[Any], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[getattr(device, "index", device)]
    )
    refusal = triton.refuses("prefix_attention", "cuda", torch.bfloat16)
    assert reason in refusal if reason and refusal else refusal is reason
    if len(capabilities) > 1:  # one of several is too old: only when its own tensors come is it known
        first, second = (SimpleNamespace(device=torch.device("cuda", index), is_cuda=True) for index in range(2))
        with pytest.raises(RuntimeError, match="cannot run on cuda:0: .* the GPU has 7.0"):
            triton._check_device(first)
        triton._check_device(second)


@pytest.mark.parametrize("heads_last", [False, True])
def test_shapes_of_fake_cuda_tensors(monkeypatch: pytest.MonkeyPatch, heads_last: bool) -> None:
    """What compiled code is told about the outputs: on the device of the inputs, laid out as promised."""
    monkeypatch.setattr(nvidia, "_machine", [A_GPU])
    with FakeTensorMode():
        shape = (2, 33, 8, 64) if heads_last else (2, 8, 33, 64)
        tensors = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        if heads_last:
            tensors = [x.transpose(1, 2) for x in tensors]
        prefix = [torch.empty(8, 5, 64, device="cuda") for _ in range(2)]
        out, lse = prefixcore.prefix_attention(*tensors, *prefix, return_lse=True)
        p = attention_problem(*tensors, *prefix)
        grads = torch.ops.prefixcore.prefix_attention_backward(out, None, out, lse, *p, True, True, True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert [x.dtype for x in grads] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for x in (out, lse, *grads):
        assert x.device.type == "cuda"
    assert out.transpose(1, 2).is_contiguous()
    for grad in grads[:3]:
        assert grad.stride() == tensors[0].stride()


@pytest.mark.usefixtures("ordinary_way")
@pytest.mark.parametrize("path", choose.PATHS)
def test_the_path_that_was_chosen_runs(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, path: str
) -> None:
    if path == "fa4":
        request.getfixturevalue("with_flash4")
    ran: list[str] = []
    for module, name in (
        (merged, "forward"), (folded, "forward"), (beside, "forward"), (single, "forward"), (single, "decode"),
        (single, "decode_once"),
    ):  # fmt: skip
        real = getattr(module, name)

        def watched(*arguments: Any, real: Any = real, what: tuple[Any, str] = (module, name)) -> Any:
            ran.append(what[1] if what[1].startswith("decode") else what[0].__name__.rsplit(".", 1)[1])
            return real(*arguments)

        monkeypatch.setattr(module, name, watched)
    tensors, _ = Problem(T=5).tensors()
    with triton_backend(), use_path(path):
        if path in ("merged", "folded", "fa4") and DEVICE.type == "cuda":
            tensors = {name: x.bfloat16() for name, x in tensors.items()}
        prefixcore.prefix_attention(**tensors)
    assert ran[0] == {"fa4": "beside", "short": "single"}.get(path, path)


@pytest.mark.parametrize("problem", [Problem(B=0), Problem(T=0), Problem(T=0, S=5), Problem(B=0, N=2, index=True)])
def test_where_there_is_no_query(problem: Problem) -> None:
    """The gradients of what nobody asked anything of are zero, not whatever the memory held."""
    tensors, options = problem.tensors()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with triton_backend():
        out, lse = prefixcore.prefix_attention(**leaves, **options, return_lse=True)
        (out.sum() + lse.sum()).backward()
    assert out.numel() == lse.numel() == 0
    for name, x in leaves.items():
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert not x.grad.any(), name


def test_compiled_code_may_be_the_first_to_ask(monkeypatch: pytest.MonkeyPatch, no_machine_is_known: None) -> None:
    """Looking at the machine cannot be traced, and is not."""

    def look() -> nvidia.Machine:
        torch._dynamo.graph_break()
        return A_GPU

    look._dynamo_marked_constant = nvidia._look_at_the_machine._dynamo_marked_constant  # type: ignore[attr-defined]
    monkeypatch.setattr(nvidia, "_look_at_the_machine", look)

    def ask(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if triton.refuses("prefix_attention", "cuda", torch.bfloat16) else x + 2

    torch._dynamo.reset()
    assert torch.compile(ask, fullgraph=True, backend="eager")(torch.zeros(())).item() == 2
