"""Pipeline parallelism by torch.distributed.pipelining in two processes: equal to one process, and whole adapters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

import prefixcore
from tests import tiny
from tests.distributed import launch
from tests.distributed.pipeline import CASES, Case, alone, batch_of, several


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Mapping[str, Any]]:
    return launch.run("pipeline", folder, tiny.folder(folder / "base"))


def assert_equal(ranks: list[Any], expected: Any, case: Case) -> None:
    """The gradients and the values of one process, the same bits in both."""
    tolerance = 1e-6 if case.dtype == torch.float32 else 1e-10
    for key in ("gradients", "values"):
        for mine, others, one in zip(ranks[0][key], ranks[1][key], expected[key], strict=True):
            assert torch.equal(mine, others)
            torch.testing.assert_close(mine, one, rtol=10 * tolerance, atol=tolerance)
    losses = torch.tensor(ranks[1]["losses"], dtype=torch.float64)  # those of the last stage
    torch.testing.assert_close(losses, torch.tensor(expected["losses"], dtype=torch.float64), rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_two_stages_train_as_one_process(ranks: Any, name: str) -> None:
    case, found = CASES[name], [rank[name] for rank in ranks]
    for mine, others in zip(found[0]["start"], found[1]["start"], strict=True):
        assert torch.equal(mine, others)
    assert_equal(found, alone(case, found[0]["start"]), case)
    assert found[0]["layers"][0] == 0
    assert found[0]["layers"][1] == found[1]["layers"][0]
    for rank in found:  # nothing that another stage has takes memory here
        assert rank["freed"] > 0
        assert rank["kept for nothing"] == 0


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_two_stages_is_whole(ranks: Any, folder: Path, name: str) -> None:
    case = CASES[name]
    model = case.model().to(case.dtype)
    with prefixcore.load(model, folder / name / "adapter", trainable=True) as handle:
        for got, trained in zip(handle.parameters(), ranks[0][name]["values"], strict=True):
            assert torch.equal(got.float(), trained.float())  # files hold float32
        assert handle.source is not None
        assert handle.source.base_model["num_hidden_layers"] == case.model().config.num_hidden_layers


def test_layers_of_other_stages_may_stay_in_the_files(ranks: Any) -> None:
    case = CASES["float32"]
    assert_equal([rank["offloaded"] for rank in ranks], alone(case), case)
    assert [rank["offloaded"]["meta"] for rank in ranks] == [0, 0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("starts", r"expected the first layer of each of 2 stages, .* of the 2 that the model has, got \[0, 2\]"),
        ("again", "the model is cut already, to one stage a process: load it anew"),
        ("model", "is in another process, so the model cannot run by itself"),
        ("generate", "is in another process, so the model cannot run by itself"),
        ("summed twice", "True"),
        ("gradients are left", "have been summed, are still there"),
        ("some gradients are left", "have been summed, are still there"),
        ("batches", "the stages have read different batches.* give every process the whole batch"),
        ("other starts", "have layers 0 to 0, 3 to 3 of 4, each once is expected: give every process the same starts"),
        ("other weights", "models with different weights: load the same ones in every process"),
        ("other prefixes", "different things to the model: attach the same configuration"),
        ("trained besides", r"1 parameters besides the virtual tokens are trained, lm_head.weight .* freeze them"),
        ("detached", "the handle is detached, so the stage has nothing to train: load the model anew"),
        ("not summed", r"changed by the gradients of this stage alone.* call stage.sum_gradients\(\)"),
        ("not summed, saved", r"changed by the gradients of this stage alone.* call stage.sum_gradients\(\)"),
        ("labels", r"schedule.step\(..., target=labels\)"),
        ("cache", "keeps no cache of keys and values"),
        ("no batch", "needs input_ids: every process gives the whole batch"),
        ("two stacks", "has two stacks of layers, and a pipeline is for models of one"),
    ],
)
def test_what_cannot_be_right_is_said(ranks: Any, name: str, said: str) -> None:
    for rank in ranks:
        assert re.search(said, rank["refusals"][name]), rank["refusals"][name]


def test_a_process_needs_a_group_that_it_is_in(ranks: Any) -> None:
    assert "this process is not in the group" in ranks[1]["refusals"]["group"]


def test_an_adapter_that_no_row_names_is_no_more_changed_than_by_one_process(ranks: Any) -> None:
    for one, other, expected in zip(ranks[0]["several"], ranks[1]["several"], several(in_stages=False), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


def test_layers_that_transformers_has_shared_out_are_refused(ranks: Any) -> None:
    if "pp_size" not in inspect.signature(DistributedConfig).parameters:
        pytest.skip("transformers knows no pp_size")
    for rank in ranks:
        assert "shared out to 2 processes when it was loaded (pp_size)" in rank["refusals"]["pp_size"]
        assert "give the handle to prefixcore.pipeline_stage" in rank["refusals"]["pp_size"]


def test_batches_of_another_shape_are_said(ranks: Any) -> None:
    said = [rank["refusals"] for rank in ranks]
    assert "hands on hidden states [2, 3, 32], but this one reads a batch whose are [2, 5, 32]" in said[1]["shape"]
    assert "would hand on hidden states [2, 10, 32], where the next has room for [2, 5, 32]" in said[0]["longer"]


def test_a_pipeline_needs_processes() -> None:
    with prefixcore.attach(tiny.model(), CASES["prefix"].config) as handle:
        with pytest.raises(RuntimeError, match="call torch.distributed.init_process_group first"):
            prefixcore.pipeline_stage(handle)
        handle.model(**batch_of(CASES["prefix"])[0])


@pytest.mark.slow
def test_the_example_trains_in_two_stages(tmp_path: Path) -> None:
    """As by one process, which `tests/test_examples.py` runs it in."""
    base, found = tiny.folder(tmp_path / "base"), []
    for processes in (1, 2):
        out = tmp_path / f"in-{processes}"
        line = launch.command("", processes=processes)[:-2] + [str(launch.ROOT / "examples" / "pipeline_loop.py")]
        process = launch.start([*line, "--model", str(base), "--out", str(out), "--steps", "3"])
        try:
            output, _ = process.communicate(timeout=launch.SECONDS)
        finally:
            launch.end(process)
        assert process.returncode == 0, output
        found.append(load_file(out / "adapter_model.safetensors")["prompt_embeddings"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
