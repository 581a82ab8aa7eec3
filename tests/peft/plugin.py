"""A pytest plugin for PEFT's tests: the hub replaced, the tests selected, `accelerate` underneath, and a guard.

The guard counts what went through our ops. A run in which they were not called, or in which `accelerate` refused a
model that is not listed, fails, whatever the tests say.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from typing import Any

import pytest

from . import stand_ins
from .selection import LEFT_OUT, LEFT_OUT_ACCELERATED, REFUSED, concerns_prompt_learning
from .source import PACKAGE

counts: Counter[str] = Counter()
refused: dict[tuple[str, str], str] = {}
tests_on_our_ops: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accelerate", action="store_true", help="switch prefixcore.accelerate on underneath")


def pytest_configure(config: pytest.Config) -> None:
    import datasets

    datasets.load_dataset = stand_ins.load_dataset
    utils = __import__(f"{PACKAGE}.testing_utils", fromlist=["hub_online_once"])
    utils.hub_online_once = lambda name: contextlib.nullcontext()
    if config.getoption("--accelerate"):
        _accelerate_every_model()
        _count_ops()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {**LEFT_OUT, **(LEFT_OUT_ACCELERATED if config.getoption("--accelerate") else {})}
    chosen = [item for item in items if concerns_prompt_learning(item)]
    kept = [item for item in chosen if getattr(item, "originalname", item.name) not in left_out]
    counts["left out"] = len(chosen) - len(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    before = counts["prefix_attention"] + counts["soft_embedding"]
    try:
        return (yield)
    finally:
        if counts["prefix_attention"] + counts["soft_embedding"] > before:
            tests_on_our_ops.add(item.nodeid)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("prefixcore")
    terminalreporter.write_line(f"left out: {counts['left out']}")
    if config.getoption("--accelerate"):
        terminalreporter.write_line(
            f"accelerated: {counts['accelerated']} models; calls of prefix_attention: {counts['prefix_attention']}, of "
            f"soft_embedding: {counts['soft_embedding']}, in {len(tests_on_our_ops)} tests"
        )
        for (model, method), why in sorted(refused.items()):
            known = REFUSED.get((model, method), "NOT LISTED")
            terminalreporter.write_line(f"refused: {method} on {model} ({known}): {why}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--accelerate") and session.testscollected:
        whole = session.testscollected > 500  # a part of them, chosen by -k, may need neither
        idle = whole and not (counts["prefix_attention"] and counts["soft_embedding"])
        if session.exitstatus == 0 and (idle or refused.keys() - REFUSED.keys()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _accelerate_every_model() -> None:
    """Lets every prompt-learning PeftModel that a test makes be accelerated."""
    import peft
    import peft.mapping_func

    from prefixcore.hf.peft.checkpointing import checkpointing_hidden

    original = peft.get_peft_model
    loaded = peft.PeftModel.from_pretrained.__func__

    @functools.wraps(original)
    def get_peft_model(model: Any, peft_config: Any, *arguments: Any, **options: Any) -> Any:
        if not peft_config.is_prompt_learning:
            return original(model, peft_config, *arguments, **options)
        with checkpointing_hidden(model):  # as accelerate(model, peft_config) does
            peft_model = original(model, peft_config, *arguments, **options)
        return _accelerated(peft_model)

    @functools.wraps(loaded)
    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        return _accelerated(loaded(cls, *arguments, **options))

    peft.get_peft_model = peft.mapping_func.get_peft_model = get_peft_model
    peft.PeftModel.from_pretrained = classmethod(from_pretrained)


def _accelerated(peft_model: Any) -> Any:
    import prefixcore

    if not peft_model._is_prompt_learning:
        return peft_model
    try:
        prefixcore.accelerate(peft_model)
        counts["accelerated"] += 1
    except (NotImplementedError, ValueError) as error:
        refused[type(peft_model.base_model).__name__, peft_model.peft_type.value] = str(error)
    return peft_model


def _count_ops() -> None:
    """Counts the calls of our two ops."""
    import prefixcore.hf.attention.interface
    import prefixcore.hf.peft.soft_prompt

    for module, name in (
        (prefixcore.hf.attention.interface, "prefix_attention"),
        (prefixcore.hf.peft.soft_prompt, "soft_embedding"),
    ):
        setattr(module, name, _counted(name, getattr(module, name)))


def _counted(name: str, op: Any) -> Any:
    @functools.wraps(op)
    def call(*arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        return op(*arguments, **options)

    return call
