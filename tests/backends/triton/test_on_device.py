"""What only a GPU can show: streams, devices, graphs, compiled code, the same bits twice, no waiting, safe memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends import library, triton
from prefixcore.backends.problem import attention_problem
from prefixcore.backends.triton import PATHS, use_path
from tests.device import DEVICE, NAME
from tests.ops.problems import Problem, relative_error, run, varied

pytestmark = pytest.mark.skipif(NAME != "cuda", reason="needs a GPU: PREFIXCORE_TEST_DEVICE=cuda")

LONG = Problem(B=2, H=8, Hkv=2, T=1024, D=64, P=64, dtype=torch.bfloat16, heads_last=True)
LONG_PREFIX = varied(LONG, B=4, T=2048, D=128, P=520)
WORK = {
    "long": LONG,
    "long prefix": LONG_PREFIX,
    "short": Problem(B=3, H=6, Hkv=2, T=130, P=20, dtype=torch.bfloat16),
    "float32": Problem(B=2, T=700, P=20),
    "bank": Problem(B=6, N=3, index=True, lengths=True, T=600, dtype=torch.float16),
    "packed, window": Problem(packed=(5, 300, 1, 77), P=9, sliding_window=50, dtype=torch.bfloat16),
    "large prefix": Problem(B=4, H=8, Hkv=2, T=64, D=128, P=4096, dtype=torch.bfloat16),
    "decode": Problem(B=8, H=8, Hkv=2, T=1, S=300, P=2048, D=128, dtype=torch.bfloat16),
}


def step(problem: Problem, attention: Callable[..., Any] = prefixcore.prefix_attention) -> dict[str, Tensor]:
    """Output and gradients as in training: nothing comes in through the log-sum-exp."""

    def output_alone(**arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention(**arguments)
        return out, lse.detach()

    return run(problem, output_alone)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("work", WORK)
def test_the_same_bits_on_every_run(deterministic: None, work: str) -> None:
    first = step(WORK[work])
    for _ in range(3):
        for name, x in step(WORK[work]).items():
            assert torch.equal(x, first[name]), name


@pytest.mark.parametrize("work", WORK)
def test_outputs_and_prefix_gradients_never_vary(work: str) -> None:
    """Also where PyTorch's backward may sum in any order."""
    first = step(WORK[work])
    for _ in range(3):
        again = step(WORK[work])
        for name in ("out", "lse", "grad_prefix_key", "grad_prefix_value"):
            assert torch.equal(again[name], first[name]), name


@pytest.fixture(params=PATHS)
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every path, forced; FlashAttention-4's where it is installed."""
    if request.param == "fa4":
        request.getfixturevalue("with_flash4")
    with use_path(request.param):
        yield request.param


@pytest.mark.parametrize("problem", [LONG, LONG_PREFIX], ids=["long", "long prefix"])
def test_the_paths_agree(forced: str, problem: Problem) -> None:
    got = step(problem)
    with use_path("single"):
        want = step(problem)
    for name, x in want.items():
        assert relative_error(got[name], x) < 1e-2, name


def test_outputs_and_prefix_gradients_never_vary_on_any_path(forced: str) -> None:
    """Of a vendor's kernels, too: `thresholds.REPEATABLE` has the name of each for which this passes.

    Also of a prefix of one tile under many queries, which a vendor might share among its processors.
    """
    for problem in (LONG_PREFIX, varied(LONG_PREFIX, B=16, P=128), varied(LONG_PREFIX, H=2)):
        first = step(problem)
        for _ in range(5):
            again = step(problem)
            for name in ("out", "grad_prefix_key", "grad_prefix_value"):
                assert torch.equal(again[name], first[name]), name


def inputs(problem: Problem, device: torch.device = DEVICE) -> dict[str, Tensor]:
    tensors, _ = problem.tensors()
    return {name: x.to(device).requires_grad_() for name, x in tensors.items()}


def gradients(leaves: dict[str, Tensor]) -> list[Tensor]:
    out = prefixcore.prefix_attention(**leaves)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))]


@pytest.mark.parametrize("work", ["long", "short", "decode"])
def test_nothing_waits_for_the_gpu(work: str) -> None:
    problem = WORK[work]
    leaves = inputs(problem)
    index = torch.zeros(problem.B, dtype=torch.long, device=DEVICE)
    for check in (False, True):  # the first time kernels are compiled and loaded, which waits
        torch.cuda.set_sync_debug_mode("error" if check else "default")
        try:
            prefixcore.prefix_attention(**leaves, prefix_index=index).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("work", ["long", "short"])
def test_a_stream_of_its_own(work: str) -> None:
    """The kernels run on PyTorch's current stream: after what was put there before, and not on the default one."""
    leaves = inputs(WORK[work])
    want = gradients(leaves)
    stream = torch.cuda.Stream()
    late = {name: torch.zeros_like(x).requires_grad_() for name, x in leaves.items()}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever is on another stream reads the zeros
        with torch.no_grad():
            for name, x in late.items():
                x.copy_(leaves[name])
        got = gradients(late)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current() -> None:
    leaves = inputs(LONG)
    there = {name: x.detach().to("cuda:1").requires_grad_() for name, x in leaves.items()}
    assert torch.cuda.current_device() == 0
    for a, b in zip(gradients(there), gradients(leaves), strict=True):
        assert a.device.index == 1
        assert relative_error(a.to(DEVICE), b) < 1e-2
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("work", ["long", "short", "decode"])
def test_cuda_graphs(work: str) -> None:
    """Captured forward and backward, replayed on other inputs."""
    leaves = inputs(WORK[work])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(leaves)
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(leaves)
    with torch.no_grad():
        for x in leaves.values():
            x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(got, gradients(leaves), strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_code(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(prefixcore.prefix_attention, fullgraph=True, mode=mode)
    want = step(LONG)
    for _ in range(3):
        for name, x in step(LONG, compiled).items():
            assert relative_error(x, want[name]) < 1e-2, name


def test_opcheck() -> None:
    tensors, _ = Problem(T=9).tensors()
    p = attention_problem(**{name: x.clone().requires_grad_() for name, x in tensors.items()})
    torch.library.opcheck(torch.ops.prefixcore.prefix_attention.default, p, atol=1e-3, rtol=1e-3)
    p = attention_problem(**tensors)
    out, lse = torch.ops.prefixcore.prefix_attention(*p)
    backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, *p, True, True, True)
    torch.library.opcheck(torch.ops.prefixcore.prefix_attention_backward.default, backward)


def test_autocast_computes_in_the_autocast_dtype() -> None:
    leaves = {name: x.detach().float().requires_grad_() for name, x in inputs(LONG).items()}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = prefixcore.prefix_attention(**leaves)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves.values())


def test_values_out_of_range_touch_nothing_outside() -> None:
    """They raise on the CPU; here nobody looks, and ``compute-sanitizer`` watches."""
    tensors, _ = Problem(B=2, N=3, T=70, dtype=torch.bfloat16).tensors()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    for index, lengths in (([-7, 9], [5, 5, 5]), ([0, 2], [-3, 10**6, 2**40])):
        out = prefixcore.prefix_attention(
            **leaves,
            prefix_index=torch.tensor(index, device=DEVICE),
            prefix_lengths=torch.tensor(lengths, device=DEVICE),
        )
        out.sum().backward()
    packed, _ = Problem(packed=(30, 40), dtype=torch.bfloat16).tensors()
    for ends in ([0, 90, 70], [-5, 30, 10**9], [60, 10, 70]):
        leaves = {name: x.detach().requires_grad_() for name, x in packed.items()}
        out = prefixcore.prefix_attention(**leaves, cu_seqlens=torch.tensor(ends, device=DEVICE))
        out.sum().backward()
    torch.cuda.synchronize()


def test_a_dense_mask_is_not_read_past_its_end() -> None:
    """What compute-sanitizer is to see: a tile of few rows is wider than a head's group of them."""
    problem = Problem(B=4, H=2, Hkv=2, T=1, S=300, P=20, mask="additive", dtype=torch.bfloat16)
    with torch.no_grad():
        tensors, options = problem.tensors()
        out = prefixcore.prefix_attention(**tensors, **options)
        with prefixcore.use_backend("reference"):
            assert relative_error(out, prefixcore.prefix_attention(**tensors, **options)) < 2e-2


def test_memory_beyond_32_bits() -> None:
    """An input of more than 2^31 elements: offsets are 64 bits wide."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    B, H, T, D = 5, 32, 131072, 128
    query = torch.randn(1, T, H, D, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    whole = torch.empty(B, T, H, D, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    whole.copy_(query)
    assert whole.numel() > 2**31
    key, value = torch.randn(2, 1, 1, 64, D, dtype=torch.bfloat16, device=DEVICE)
    prefix_key, prefix_value = torch.randn(2, 1, 20, D, dtype=torch.bfloat16, device=DEVICE)
    key, value = key.expand(B, 1, 64, D), value.expand(B, 1, 64, D)
    with torch.no_grad(), use_path("single"):
        out = prefixcore.prefix_attention(whole, key, value, prefix_key, prefix_value, is_causal=False)
    last = prefixcore.prefix_attention(
        query[:, :, -8:].float(), *(x[:1].float() for x in (key, value)), prefix_key.float(), prefix_value.float(),
        is_causal=False,
    )  # fmt: skip
    assert relative_error(out[-1:, :, -8:], last) < 1e-2


def test_the_longest_row() -> None:
    tensors, _ = Problem(B=1, H=2, Hkv=1, T=131072, D=64, P=20, dtype=torch.bfloat16, heads_last=True).tensors()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    prefixcore.prefix_attention(**leaves).sum().backward()
    for name, x in leaves.items():
        assert x.grad is not None
        assert x.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("E", [1, 70, 4096])
def test_the_soft_embedding_by_default(E: int, dtype: torch.dtype) -> None:
    """In CUDA where that was compiled in, else in Triton; and the same bits on every run."""
    default = "cuda" if library.CUDA_ARCHITECTURES else "triton"
    assert prefixcore.which_backend("soft_embedding", DEVICE, dtype).name == default
    ids = torch.randint(0, 1020, (7, 300), device=DEVICE)
    weight = torch.randn(1000, E, device=DEVICE).to(dtype)
    grads = []
    for backend in (None, None, "reference"):
        virtual = torch.randn(20, E, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
        with prefixcore.use_backend(backend):
            out = prefixcore.soft_embedding(ids, weight, virtual)
            out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(dtype))
        grads.append((out.detach(), virtual.grad))
    assert torch.equal(grads[0][0], grads[2][0])
    assert torch.equal(grads[0][1], grads[1][1])
    assert relative_error(grads[0][1], grads[2][1]) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("kernels", ["default", "triton"])
def test_the_soft_embedding_in_a_cuda_graph(kernels: str) -> None:
    """Which also shows that nothing waits for the GPU; replayed on other ids, some of them out of range."""
    forward, backward = {
        "default": (torch.ops.prefixcore.soft_embedding, torch.ops.prefixcore.soft_embedding_backward),
        "triton": (triton.soft_embedding, triton.soft_embedding_backward),
    }[kernels]
    ids, weight = torch.randint(0, 1020, (7, 300), device=DEVICE), torch.randn(1000, 70, device=DEVICE).half()
    virtual, grad = torch.randn(20, 70, device=DEVICE), torch.randn(7, 300, 70, device=DEVICE).half()

    def both() -> tuple[Tensor, Tensor]:
        return forward(ids, weight, virtual), backward(grad, ids, 1000, 20)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    ids.random_(-5, 1025)
    graph.replay()
    for a, b in zip(got, both(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert torch.equal(a.isnan(), b.isnan())
