"""FlashAttention-4 in our paths: what it is called with and what is made of its answers, against the float64 reference.

A stand-in with its signature computes here; where the package is installed its signature is compared, and on a GPU it
computes itself.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.backends.problem import AttentionProblem, attention_problem
from prefixcore.backends.triton import choose, flash4, use_path
from prefixcore.backends.triton.choose import Path
from tests.device import DEVICE, triton_backend
from tests.ops.problems import Problem, check, output_alone, run

from . import flash4_stand_in

ON_A_GPU = DEVICE.type == "cuda"
of_the_stand_in = pytest.mark.skipif(ON_A_GPU, reason="it looks into what stands in for FlashAttention-4")
DTYPE = torch.bfloat16 if ON_A_GPU else torch.float32
# It compiles for each kind of problem, five to eight seconds: on a GPU those cases that differ most.
FEW = ("one group", "softcap", "sinks", "a bank", "packed", "packed, softcap, sinks, a bank", "window, softcap, sinks",
       "bidirectional")  # fmt: skip


@pytest.fixture(autouse=True)
def here(with_flash4: None) -> Iterator[None]:
    with triton_backend():
        yield


def fewer(cases: dict[str, Any]) -> list[str]:
    return [name for name in cases if name in FEW or not ON_A_GPU]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, ordinary_way: None) -> list[Path]:
    """The paths that have been chosen, of forwards and backwards."""
    seen: list[Path] = []
    for name in ("forward", "backward"):
        choice = getattr(choose, name)

        def watched(*arguments: Any, choice: Any = choice, **options: Any) -> Path:
            seen.append(choice(*arguments, **options))
            return seen[-1]

        monkeypatch.setattr(choose, name, watched)
    return seen


SIDE_BY_SIDE: dict[str, dict[str, Any]] = {
    "one query": {"T": 1},
    "three queries of one virtual token": {"T": 3, "P": 1},
    "one head a group": {"H": 2, "Hkv": 2, "heads_last": True},
    "one group": {"H": 4, "Hkv": 1, "T": 40, "P": 63},
    "head dim 80": {"D": 80, "heads_last": True},
    "head dim 128": {"D": 128, "B": 1, "H": 2, "Hkv": 1},
    "bidirectional": {"is_causal": False, "S": 11},
    "a chunk after a cache": {"T": 9, "S": 30},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "scale, large scores": {"scale": 0.9, "gain": 4.0},
    "float32 prefix of a smaller dtype": {"dtype": torch.float16, "prefix_dtype": torch.float32},
    "a bank": {"N": 3, "index": True, "lengths": True, "B": 5},
    "some rows without a prefix": {"index": True, "B": 5},
    "shorter prefix, sinks": {"lengths": True, "sinks": True},
    "packed": {"packed": (5, 1, 17)},
    "packed, softcap, sinks, a bank": {
        "packed": (5, 1, 17, 9, 3), "softcap": 3.0, "sinks": True, "N": 3, "index": True, "lengths": True},
    "packed, bidirectional": {"packed": (9, 4), "is_causal": False},
}  # fmt: skip


@pytest.mark.parametrize("case", fewer(SIDE_BY_SIDE))
def test_prefix_and_sequence_side_by_side(taken: list[Path], case: str) -> None:
    with use_path("fa4"):
        check(Problem(**{"T": 17, "P": 5, "dtype": DTYPE, **SIDE_BY_SIDE[case]}), attention=output_alone)
    assert [path.name for path in taken if not path.why.startswith("forced, and")] == ["fa4"] * 2


def test_packed_sequences_of_no_tokens() -> None:
    with use_path("fa4"):
        check(Problem(packed=(0, 5, 0, 0, 3, 0), P=3, dtype=DTYPE), attention=output_alone)


ELSEWHERE: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 7},
    "window, softcap, sinks": {"sliding_window": 7, "softcap": 3.0, "sinks": True},
    "window, packed": {"packed": (5, 12, 1), "sliding_window": 4},
    "window, bidirectional": {"sliding_window": 7, "is_causal": False},
    "window after a cache": {"T": 9, "S": 40, "sliding_window": 7},
}


@pytest.mark.parametrize("prefix", ["folded", "merged"])
@pytest.mark.parametrize("case", fewer(ELSEWHERE))
def test_windows_are_for_the_sequence_alone(
    taken: list[Path], monkeypatch: pytest.MonkeyPatch, case: str, prefix: str
) -> None:
    """The prefix is always seen: a second call does it, over rows that are folded, or our own kernels do."""
    monkeypatch.setattr(choose, "MERGED_KEYS", 1)
    with use_path(prefix):
        check(Problem(**{"T": 18, "P": 5, "dtype": DTYPE, **ELSEWHERE[case]}), attention=output_alone)
    for path in taken:
        assert path.name == prefix
        assert path.fused is flash4.FLASH4


@of_the_stand_in
@pytest.mark.parametrize("H", [2, 4])
@pytest.mark.parametrize("needs_prefix", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_deterministic_where_the_prefix_gets_a_gradient(H: int, needs_prefix: bool, told: bool) -> None:
    """Of one head a group FlashAttention-4 sums the keys' gradients in one order anyway."""
    tensors, _ = Problem(H=H, Hkv=2, heads_last=True).tensors()
    leaves = {name: x.requires_grad_(needs_prefix or "prefix" not in name) for name, x in tensors.items()}
    torch.use_deterministic_algorithms(told)
    try:
        with use_path("fa4"):
            prefixcore.prefix_attention(**leaves).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash4_stand_in.asked == [told or (needs_prefix and H > 2)]
    assert (leaves["prefix_key"].grad is not None) == needs_prefix


@of_the_stand_in
def test_the_sequences_gradients_are_handed_on_without_a_copy() -> None:
    """To autograd, which takes any strides; what the op itself gives is laid out as its fake kernel says."""
    tensors, _ = Problem(T=17, P=5, heads_last=True).tensors()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with use_path("fa4"):
        out = prefixcore.prefix_attention(**leaves)
        key, value = torch.autograd.grad(out.sum(), (leaves["key"], leaves["value"]))
        for grad, x in ((key, leaves["key"]), (value, leaves["value"])):
            assert grad.stride() == (22 * 2 * 32, 32, 2 * 32, 1)
            assert grad.untyped_storage().nbytes() == 2 * 22 * 2 * 32 * 4
            assert x.stride() != grad.stride()
        p = attention_problem(**leaves)
        out, lse = torch.ops.prefixcore.prefix_attention(*p)
        grads = torch.ops.prefixcore.prefix_attention_backward(
            torch.ones_like(out), None, out, lse, *p, True, True, True
        )
    assert [grad.stride() for grad in grads[:3]] == [x.stride() for x in list(leaves.values())[:3]]
    assert torch.equal(grads[1], key)


@of_the_stand_in
def test_values_out_of_range_are_clamped() -> None:
    """The stand-in looks whether what it is told to read is there."""
    tensors, _ = Problem(packed=(3, 4), P=3).tensors()
    for ends in ([0, 9, 7], [-5, 3, 10**9], [6, 1, 7], [5, 3, 4]):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        with use_path("fa4"):
            prefixcore.prefix_attention(**leaves, cu_seqlens=torch.tensor(ends)).sum().backward()
    wild = {"prefix_index": torch.tensor([-7, 9, 1]), "prefix_lengths": torch.tensor([2, 2**40])}
    tame = {"prefix_index": torch.tensor([-1, 1, 1]), "prefix_lengths": torch.tensor([2, 5])}
    tensors, _ = Problem(B=3, N=2).tensors()
    with use_path("fa4"):
        a, b = (prefixcore.prefix_attention(**tensors, **options) for options in (wild, tame))
    assert torch.equal(a, b)


@of_the_stand_in
def test_what_it_cannot_do_is_refused_where_it_is_forced() -> None:
    for option, why in (
        ({"sliding_window": 7}, "sliding window"), ({"mask": "padding"}, "padding mask"), ({"mask": "bool"}, "a mask"),
        ({"Dv": 16}, "different head dims"), ({"D": 20}, "multiple of 8"), ({"P": 0}, "no prefix"),
        ({"D": 136}, "more than 128"), ({"T": 30, "S": 20}, "fewer keys than queries"),
    ):  # fmt: skip
        tensors, options = Problem(**{"T": 33, **option}).tensors()
        with use_path("fa4"), pytest.raises(ValueError, match=f"the fa4 path was forced, but .*{why}"):
            prefixcore.prefix_attention(**tensors, **options)


def record(T: int = 2048, P: int = 64, **options: Any) -> AttentionProblem:
    """Too large to compute; its memory is one number."""
    heads = [torch.empty(1).expand(1, count, T, 64) for count in (8, 2, 2)]
    prefix = torch.empty(1).expand(2, P, 64)
    return attention_problem(*heads, prefix, prefix, **options)


def aligned(p: AttentionProblem) -> AttentionProblem:
    return p._replace(**{name: getattr(p, name).contiguous() for name in ("query", "key", "value")})


@of_the_stand_in
def test_when_it_is_taken() -> None:
    p = aligned(record())
    assert choose.forward(p) == Path("fa4", "FlashAttention-4 does prefix and sequence side by side")
    assert choose.backward(p, all_three=True, grad_lse=False).name == "fa4"
    for options in ({"all_three": False, "grad_lse": False}, {"all_three": True, "grad_lse": True}):
        assert choose.backward(p, **options).name in ("single", "folded")
    assert choose.forward(aligned(record(T=choose.FA4_KEYS - 1))).name == "merged"
    assert choose.forward(aligned(record(P=0))).name == "merged"
    packed = aligned(record(cu_seqlens=torch.tensor([0, 1000, 2048])))
    assert choose.forward(packed).name == "fa4"
    short = packed._replace(cu_seqlens=torch.arange(9) * 256)
    assert choose.forward(short).name == "merged"
    window = choose.forward(aligned(record(sliding_window=100)))
    assert (window.name, window.fused) == ("merged", flash4.FLASH4)
    window = choose.forward(aligned(record(P=1024, sliding_window=100, softcap=3.0)))
    assert (window.name, window.fused, window.prefix) == ("folded", flash4.FLASH4, flash4.FLASH4_REPEATABLE)


@of_the_stand_in
def test_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(flash4, "installed", lambda: None)
    assert choose.forward(aligned(record())).name == "merged"
    reason = "FlashAttention-4 is not installed (pip install prefixcore[flash])"
    assert flash4.unavailable(torch.device("cpu")) == reason
    monkeypatch.setattr(flash4, "installed", lambda: "4.0.0b1")
    flash4._loaded.cache_clear()

    def broken(name: str) -> Any:
        raise RuntimeError("no CUDA driver")

    monkeypatch.setattr(flash4, "import_module", broken)
    reason = "flash-attn-4 4.0.0b1 cannot be imported (RuntimeError: no CUDA driver)"
    assert flash4.unavailable(torch.device("cpu")) == reason
    assert dict(choose.considered(aligned(record())))["fa4"] == reason
    with pytest.raises(RuntimeError, match="cannot be imported .*; install flash-attn-4 anew, or remove it"):
        flash4._interface()
    flash4._loaded.cache_clear()
    old = SimpleNamespace(_flash_attn_fwd=lambda q, k, v: None, _flash_attn_bwd=flash4_stand_in._flash_attn_bwd)
    monkeypatch.setattr(flash4, "import_module", lambda name: old)
    assert "has another interface (_flash_attn_fwd lacks cu_seqlens_q, " in (
        flash4.unavailable(torch.device("cpu")) or ""
    )
    flash4._loaded.cache_clear()


@of_the_stand_in
def test_which_devices_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, there in (((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        reason = flash4.unavailable(torch.device("cuda", 0))
        assert (reason is None) == there
        assert (
            there or "for Hopper and Blackwell, and the GPU has compute capability {}.{}".format(*capability) in reason
        )


def test_our_calls_fit_the_recorded_signature() -> None:
    for name, needed in (("_flash_attn_fwd", flash4.FORWARD), ("_flash_attn_bwd", flash4.BACKWARD)):
        assert set(needed) <= set(inspect.signature(getattr(flash4_stand_in, name)).parameters)


def test_the_recorded_signature_is_the_packages() -> None:
    """Read from its source: to import it takes a GPU."""
    try:
        package = importlib.metadata.distribution(flash4.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flash-attn-4 is not installed: `pip install --no-deps flash-attn-4` is enough to compare")
    if package.version != flash4_stand_in.VERSION:
        pytest.skip(f"recorded of {flash4_stand_in.VERSION}, here is {package.version}")
    tree = ast.parse(package.locate_file("flash_attn/cute/interface.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        theirs = functions[name].args
        defaults = [ast.literal_eval(default) for default in theirs.defaults]
        ours = inspect.signature(getattr(flash4_stand_in, name)).parameters
        assert [argument.arg for argument in theirs.args] == list(ours)
        assert [x.default for x in ours.values() if x.default is not x.empty] == defaults


@of_the_stand_in
def test_gradients_do_not_depend_on_the_path() -> None:
    results = []
    for path in ("fa4", "folded", "merged", "single"):
        with use_path(path):
            results.append(run(Problem(T=9, P=3, heads_last=True), output_alone))
    for other in results[1:]:
        for name, x in results[0].items():
            torch.testing.assert_close(other[name], x, atol=2e-5, rtol=2e-5)
