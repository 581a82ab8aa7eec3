"""The rules that share out the work, asked about CUDA tensors that do not exist."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from prefixcore.backends import triton
from prefixcore.backends.problem import AttentionProblem, attention_problem
from prefixcore.backends.triton import choose, flash4, fused_attention, thresholds, use_path, vendors
from prefixcore.cli import doctor


@pytest.fixture(autouse=True)
def fake_tensors(without_flash4: None) -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.fixture(autouse=True)
def by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the environment asks for fewer launches, as `make gpu` does once."""
    monkeypatch.setattr(choose, "FEWER_LAUNCHES", "0")


@pytest.fixture(autouse=True)
def pytorch_prefers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``pytorch_prefers(backend)``: what PyTorch would choose; cuDNN unless a test says otherwise."""

    def prefer(backend: SDPBackend) -> None:
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: backend.value)

    prefer(SDPBackend.CUDNN_ATTENTION)
    return prefer


def problem(
    T: int = 2048, S: int | None = None, D: int = 128, Dv: int | None = None, P: int = 64, is_causal: bool = True,
    dtype: torch.dtype = torch.bfloat16, window: int = 0, softcap: float = 0.0, **tensors: torch.Tensor,
) -> AttentionProblem:  # fmt: skip
    S, Dv = T if S is None else S, Dv or D

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    return attention_problem(
        empty(2, 8, T, D), empty(2, 4, S, D), empty(2, 4, S, Dv), empty(4, P, D), empty(4, P, Dv),
        is_causal=is_causal, sliding_window=window, softcap=softcap, **tensors,
    )  # fmt: skip


def bools(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool, device="cuda")


TABLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "training": ({}, "merged", "cuDNN does the sequence"),
    "bidirectional": ({"is_causal": False}, "merged", "cuDNN"),
    "bidirectional over more keys": ({"is_causal": False, "S": 3000}, "merged", "cuDNN"),
    "a window that hides nothing": ({"window": 2048}, "merged", "cuDNN"),
    "no prefix": ({"P": 0}, "merged", "cuDNN"),
    "short": ({"T": choose.MERGED_KEYS - 1}, "single", "fewer than"),
    "just long enough": ({"T": choose.MERGED_KEYS}, "merged", "cuDNN"),
    "one query": ({"T": 1, "S": 4096}, "decode", "1 queries"),
    "as many queries as are few": ({"T": choose.DECODE_QUERIES, "S": 4096}, "decode", "no more than"),
    "one query more": ({"T": choose.DECODE_QUERIES + 1, "S": 4096}, "single", "top-left"),
    "a chunk after a cache": ({"T": 1024, "S": 2048}, "single", "top-left"),
    "window": ({"window": 512}, "single", "sliding window"),
    "softcap": ({"softcap": 30.0}, "single", "softcap"),
    "other head dim of the values": ({"Dv": 64}, "single", "different head dims"),
    "odd head dim": ({"D": 20}, "single", "multiple of 8"),
    "too large a head dim": ({"D": 264}, "single", "256"),
    "no keys": ({"S": 0, "is_causal": False}, "single", "fewer than"),
}


def test_rows_that_wide_loads_cannot_read_are_not_for_fused_attention() -> None:
    def rows(stride: int) -> torch.Tensor:
        shape, strides = (2, 8, 2048, 128), (8 * 2048 * stride, 2048 * stride, stride, 1)
        return torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="cuda")

    assert fused_attention.cannot(problem()._replace(query=rows(136))) is None
    assert choose.forward(problem()._replace(query=rows(132))).name == "single"
    assert fused_attention.cannot(problem()._replace(query=rows(132))) == "rows do not begin at multiples of 16 bytes"
    assert fused_attention.is_aligned(torch.empty(64, 128, device="meta")[:, 4:68])
    assert not fused_attention.is_aligned(torch.empty(64, 128, device="meta")[:, 2:66])


@pytest.fixture
def launch() -> ModuleType:
    pytest.importorskip("triton")
    from prefixcore.backends.triton.kernels import launch

    return launch


def test_head_dims_that_no_kernel_has_are_refused_in_words(launch: ModuleType) -> None:
    with pytest.raises(ValueError, match="head dims of at most 256 on a GPU, got 264; run the slow reference"):
        launch.blocks_for("forward", problem(D=264))


@pytest.mark.parametrize(("capability", "family"), [((8, 9), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 120)])
def test_blocks_fit_the_shared_memory(
    monkeypatch: pytest.MonkeyPatch, launch: ModuleType, capability: tuple[int, int], family: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert launch.family(torch.device("cuda")) == family


@pytest.mark.parametrize("case", TABLE)
def test_the_table(case: str) -> None:
    arguments, path, why = TABLE[case]
    choice = choose.forward(problem(**arguments))
    assert choice.name == path
    assert why in choice.why
    assert (choice.fused is not None) == (path == "merged")


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"padding": (2, 2048)}, "padding"),
        ({"mask": (2, 8, 2048, 2048)}, "mask over queries"),
        ({"cu_seqlens": (3,)}, "packed"),
    ],
)
def test_what_no_fused_attention_is_given(tensors: dict[str, tuple[int, ...]], why: str) -> None:
    path = choose.forward(problem(**{name: bools(*shape) for name, shape in tensors.items()}))
    assert path.name == "single"
    assert why in path.why


def test_of_every_field_something_is_said() -> None:
    assert set(AttentionProblem._fields) == fused_attention.ALLOWED == flash4.ALLOWED


@pytest.mark.parametrize("off", [None, 0, False, 0.0])
def test_an_option_that_nobody_has_thought_of_is_for_our_own_kernels(off: Any) -> None:
    class Extended(AttentionProblem):
        """The record as it is after somebody has added an option to it."""

        _fields = (*AttentionProblem._fields, "temperature")  # type: ignore[assignment]
        temperature = property(operator.itemgetter(len(AttentionProblem._fields)))

    def extended(temperature: Any) -> Extended:
        return tuple.__new__(Extended, (*problem(), temperature))

    assert choose.forward(extended(off)).name == "merged"
    for on in (0.5, True, torch.zeros((), device="cuda")):
        for path in (choose.forward(extended(on)), choose.backward(extended(on), all_three=True, grad_lse=False)):
            assert path.name == "single"
            assert path.why == "there is a temperature, which PyTorch's fused attention is not known to take"


def test_banks_and_sinks_are_no_obstacle() -> None:
    """Fused attention never sees them."""
    index = torch.zeros(2, dtype=torch.long, device="cuda")
    assert choose.forward(problem(prefix_index=index)).name == "merged"
    assert choose.forward(problem(sinks=torch.zeros(8, device="cuda"))).name == "merged"


@pytest.mark.parametrize(
    ("backend", "name"),
    [(SDPBackend.CUDNN_ATTENTION, "cuDNN"), (SDPBackend.FLASH_ATTENTION, "FlashAttention"),
     (SDPBackend.EFFICIENT_ATTENTION, None), (SDPBackend.MATH, None)],
)  # fmt: skip
def test_which_fused_attention_is_pytorchs_choice(pytorch_prefers: Any, backend: SDPBackend, name: str | None) -> None:
    pytorch_prefers(backend)
    for path in (choose.forward(problem()), choose.backward(problem(), all_three=True, grad_lse=False)):
        assert path.name == ("merged" if name else "single")
        assert (path.fused.name if path.fused else None) == name
        assert name or "no fused kernel" in path.why


def test_pytorch_is_asked_about_the_very_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward asks for itself, with gradients: some kernels have one for fewer head dims."""
    asked: list[tuple[Any, ...]] = []

    def choice(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, dropout: float,
               is_causal: bool, *, scale: float, enable_gqa: bool) -> int:  # fmt: skip
        asked.append((mask, dropout, is_causal, enable_gqa, query.requires_grad and torch.is_grad_enabled()))
        return SDPBackend.CUDNN_ATTENTION.value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    with torch.no_grad():
        choose.forward(problem())
        choose.backward(problem(is_causal=False), all_three=True, grad_lse=False)
        with use_path("merged"):
            choose.forward(problem(T=1, S=700))
    assert asked == [(None, 0.0, True, True, False), (None, 0.0, False, True, True), (None, 0.0, False, True, False)]


def test_pytorch_may_have_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> int:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch, "_fused_sdp_choice", none)
    assert choose.forward(problem()).name == "single"


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("because", ["activated", "ragged"])
def test_flash_attention_goes_before_cudnn(monkeypatch: pytest.MonkeyPatch, because: str, able: bool) -> None:
    """Where a user has activated a FlashAttention, and where the layout of cuDNN's log-sum-exp is not known."""
    if because == "activated":
        monkeypatch.setattr(fused_attention, "_active_flash", lambda: "FA3")
    else:
        monkeypatch.setattr(fused_attention, "_CUDNN_LAYOUT_IS_KNOWN", False)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda parameters: able)
    expected = "FlashAttention" if able else ("cuDNN" if because == "activated" else None)
    path = choose.forward(problem())
    assert (path.fused.name if path.fused else None) == expected


def test_the_backward() -> None:
    assert choose.backward(problem(), all_three=True, grad_lse=False).name == "merged"
    for options, why in (({"grad_lse": True}, "log-sum-exp"), ({"all_three": False}, "not all")):
        path = choose.backward(problem(), **{"all_three": True, "grad_lse": False, **options})
        assert path.name == "single"
        assert why in path.why
    assert choose.backward(problem(T=64), all_three=True, grad_lse=False).name == "single"


@pytest.mark.parametrize("forced", choose.PATHS)
def test_a_path_can_be_forced(monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    monkeypatch.setattr(flash4, "unavailable", lambda _: None)
    with use_path(forced):
        path = choose.forward(problem(T=64))
        assert path.name == forced
        assert path.why.startswith("forced")
        backward = choose.backward(problem(T=64), all_three=True, grad_lse=False)
        assert backward.name == ("single" if forced.startswith("decode") else forced)
        assert backward.why.startswith("forced")
        backward = choose.backward(problem(T=64), all_three=True, grad_lse=True)
        assert backward.name == ("short" if forced == "short" else "single")
    assert choose.forward(problem(T=64)).why != "forced"


FOLDED: dict[str, tuple[dict[str, Any], str]] = {
    "long enough": ({"P": 320}, "cuDNN does the prefix, cuDNN the sequence"),
    "a window": ({"P": 512, "window": 100}, "cuDNN does the prefix, our kernels the sequence"),
    "a chunk after a cache": ({"P": 512, "T": 1024}, "cuDNN does the prefix, our kernels the sequence"),
    "another head dim": ({"P": 1024, "D": 64}, "cuDNN does the prefix"),
}


@pytest.mark.parametrize("case", FOLDED)
def test_long_prefixes_are_for_vendors(case: str) -> None:
    arguments, why = FOLDED[case]
    path = choose.forward(problem(**{"S": 2048, **arguments}))
    assert path.name == "folded"
    assert why in path.why
    assert path.prefix is fused_attention.CUDNN


@pytest.mark.parametrize(
    ("arguments", "why"),
    [({"P": 319}, "319 virtual tokens, fewer than 320"), ({"P": 512, "D": 64}, "fewer than 1024"),
     ({"P": 512, "T": 511}, "511 keys, fewer than 512"), ({"P": 512, "softcap": 3.0}, "softcap"),
     ({"P": 0}, "no prefix")],
)  # fmt: skip
def test_what_is_not_folded(arguments: dict[str, Any], why: str) -> None:
    assert choose.forward(problem(**arguments)).name != "folded"
    assert why in dict(choose.considered(problem(**arguments)))["folded"]


def test_only_a_prefix_that_all_rows_share_is_folded() -> None:
    index, one = (torch.zeros(count, dtype=torch.long, device="cuda") for count in (2, 1))
    for options, why in (
        ({"prefix_index": index}, "their own entry"), ({"prefix_lengths": one}, "stands on the GPU"),
    ):  # fmt: skip
        assert choose.forward(problem(P=512, **options)).name == "merged"
        assert why in dict(choose.considered(problem(P=512, **options)))["folded"]


def test_a_prefix_gets_its_gradient_only_from_kernels_that_repeat_it(
    monkeypatch: pytest.MonkeyPatch, pytorch_prefers: Any
) -> None:
    """In deterministic mode PyTorch has no cuDNN itself; of the others some are not worth it."""

    def backward(**options: Any) -> choose.Path:
        return choose.backward(problem(P=512), **{"all_three": True, "grad_lse": False, **options})

    assert backward().name == "merged"
    assert backward(needs_prefix=False).name == "folded"
    training = choose.Pass(training=True)
    assert "same bits on every run" in dict(choose.considered(problem(P=512), training))["folded"]
    with use_path("folded"):
        assert backward().name == "folded"
    monkeypatch.setattr(vendors, "REPEATABLE", (*vendors.REPEATABLE, "cuDNN"))
    path = backward()
    assert (path.name, path.fused, path.prefix) == ("folded", fused_attention.CUDNN, fused_attention.CUDNN)
    path = backward(all_three=False)
    assert (path.name, path.fused) == ("folded", None)
    assert backward(grad_lse=True).name == "single"
    pytorch_prefers(SDPBackend.FLASH_ATTENTION)
    monkeypatch.setattr(vendors, "FOLDED_VENDORS", ("FlashAttention",))
    assert backward().name == "folded"
    monkeypatch.setattr(fused_attention, "_active_flash", lambda: "FA4")  # of which PyTorch does not ask it
    assert backward().name == "merged"
    monkeypatch.setattr(vendors, "FOLDED_VENDORS", ())
    assert "not quicker than our own" in dict(choose.considered(problem(P=512)))["folded"]


def test_the_doctor_says_why_a_long_prefix_is_not_left_to_a_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "refuses", lambda *_: None)
    rows = {(name, direction): (path, why) for name, direction, path, why in doctor.gpu_paths()}
    long = "training, T = 2048, P = 2048, bfloat16"
    assert rows[long, "forward"] == ("folded", "cuDNN does the prefix, cuDNN the sequence")
    path, why = rows[long, "backward"]
    assert path == "merged"
    assert "; not folded: cuDNN's gradients are not known to have the same bits on every run" in why
    assert rows["training, T = 2048, P = 64, bfloat16", "forward"] == ("merged", "cuDNN does the sequence")


def test_the_doctor_says_why_a_forced_path_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced for the whole process, as by PREFIXCORE_GPU_PATH, and of no use for some of the problems or for all."""
    monkeypatch.setattr(triton, "refuses", lambda *_: None)
    monkeypatch.setattr(choose._forced, "name", "no such path")
    for _, _, path, why in doctor.gpu_paths():
        assert (path, "unknown path 'no such path' (PREFIXCORE_GPU_PATH)" in why) == ("none", True)
    monkeypatch.setattr(choose._forced, "name", "fa4")
    rows = {(name, direction): (path, why) for name, direction, path, why in doctor.gpu_paths()}
    path, why = rows["the same in float32", "forward"]
    assert (path, "the fa4 path was forced, but" in why) == ("none", True)


def test_what_is_considered_ends_with_what_is_taken() -> None:
    assert [name for name, _ in choose.considered(problem(T=1, S=4096))] == ["decode_once", "decode"]
    rules = ["decode_once", "decode", "fa4", "folded", "short", "merged"]
    assert [name for name, _ in choose.considered(problem())] == rules
    assert [name for name, _ in choose.considered(problem(T=64))][-1] == "single"
    assert sorted(choose._RULES) == sorted(choose.PATHS)


def test_forcing_what_cannot_be_done(pytorch_prefers: Any) -> None:
    with use_path("merged"):
        with pytest.raises(ValueError, match="forced, but there is a softcap; stop forcing it, or force 'single'"):
            choose.forward(problem(softcap=30.0))
        pytorch_prefers(SDPBackend.MATH)
        with pytest.raises(ValueError, match="no fused kernel with a log-sum-exp for float32"):
            choose.forward(problem(dtype=torch.float32))
        # The backward then has the single path: output and log-sum-exp are all it needs.
        assert choose.backward(problem(softcap=30.0), all_three=True, grad_lse=False).name == "single"


def test_packed_rows_are_not_decoded() -> None:
    packed = problem(T=4, cu_seqlens=bools(3))
    assert choose.forward(packed).name == "single"
    with use_path("decode"), pytest.raises(ValueError, match="forced, but the rows are packed"):
        choose.forward(packed)


def test_unknown_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown path 'both'"), use_path("both"):
        pass
    monkeypatch.setattr(choose._forced, "name", "both")  # as PREFIXCORE_GPU_PATH=both would
    for ask in (lambda: choose.forward(problem()), lambda: choose.backward(problem(), all_three=True, grad_lse=False)):
        with pytest.raises(ValueError, match=r"unknown path 'both' \(PREFIXCORE_GPU_PATH\)"):
            ask()


def test_fewer_launches_are_off_until_a_gpu_has_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    few, short = problem(T=1, S=4096), problem(T=64)
    what: dict[str, Any] = {"all_three": False, "grad_lse": True}
    assert os.environ.get("PREFIXCORE_FEWER_LAUNCHES", "0") == thresholds.FEWER_LAUNCHES
    assert not choose.fewer_launches()
    assert (choose.forward(few).name, choose.backward(short, **what).name) == ("decode", "single")
    monkeypatch.setattr(choose, "FEWER_LAUNCHES", "1")
    assert (choose.forward(few).name, choose.backward(short, **what).name) == ("decode_once", "short")
    assert choose.forward(short).name == "single"
    assert choose.forward(problem(T=4, cu_seqlens=bools(3))).name == "single"
    wide = problem(T=64, D=256, dtype=torch.float32)
    assert choose.backward(wide, **what).name == "single"
    half = wide._replace(**{name: getattr(wide, name).bfloat16() for name in ("query", "key", "value")})
    assert choose.backward(half, **what).name == "short"
    for long in (problem(T=choose.SHORT_KEYS + 1), problem(T=64)._replace(query=problem(T=8192).query)):
        assert choose.backward(long, **what).name == "single"
    monkeypatch.setattr(choose, "FEWER_LAUNCHES", "yes")
    with pytest.raises(ValueError, match="PREFIXCORE_FEWER_LAUNCHES: expected 0 or 1, got 'yes'"):
        choose.forward(few)
