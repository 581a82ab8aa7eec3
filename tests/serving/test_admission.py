"""Which requests may have which prefix, decided beside the scheduler."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from prefixcore.adapters import AdapterError
from prefixcore.serving.admission import Admission, Load
from prefixcore.serving.catalog import Served
from prefixcore.serving.salt import make_salt
from prefixcore.serving.usage import AdapterUsage, Usage

DIGEST = "ab" * 32
KNOWN = Served("known", DIGEST, 5)


class Shelf:
    """A catalog with one adapter, "known", of five virtual tokens."""

    no_images: str | None = None

    def look_up(self, name: str, digest: str) -> Served:
        if name == "broken":
            raise OSError("no such device")
        if name != "known":
            raise AdapterError(f"there is no adapter {name!r}")
        return KNOWN


def admission() -> Admission:
    shelf: Any = Shelf()
    return Admission(shelf, placeholder=9)


def request(name: str | None = "known", ids: list[int] | None = None, **other: Any) -> Any:
    fields = {
        "request_id": "r",
        "cache_salt": None if name is None else make_salt(name, DIGEST),
        "prompt_token_ids": [9] * 5 + [1, 2] if ids is None else ids,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
        "pooling_params": None,
        "prompt_embeds": None,
        "skip_reading_prefix_cache": False,
        "mm_features": [],
        "lora_request": None,
        "resumable": False,
        "num_prompt_tokens": 7,
        "num_output_tokens": 3,
        "arrival_time": time.time() - 2,
        "get_finished_reason": lambda: "stop",
    }
    return SimpleNamespace(**{**fields, **other})


def test_a_prefix_is_loaded_into_the_first_blocks() -> None:
    """Of two groups of layers, which need not have blocks of one size."""
    ours, asked = admission(), request()
    ours.arrived(asked)
    assert ours.external_tokens(asked, 0) == 5
    ours.allocated(asked, [[7, 3], [4]], 5)
    step = ours.take_step()
    assert step.loads == [Load("r", KNOWN, 0, 5, [[7, 3], [4]])]
    assert ours.take_step().loads == []


def test_what_is_cached_is_not_loaded_again() -> None:
    ours, asked = admission(), request()
    assert ours.external_tokens(asked, 4) == 1
    ours.allocated(asked, [[7, 3]], 1)
    assert ours.take_step().loads == [Load("r", KNOWN, 4, 5, [[7, 3]])]
    assert ours.external_tokens(asked, 8) == 0
    ours.allocated(asked, [[7, 3]], 0)
    assert ours.take_step().loads == []


@pytest.mark.parametrize("salt", [None, "tenant 7"])
def test_requests_that_name_no_adapter_are_left_alone(salt: str | None) -> None:
    ours, asked = admission(), request(None, cache_salt=salt, skip_reading_prefix_cache=True)
    ours.arrived(asked)
    assert asked.skip_reading_prefix_cache
    assert ours.external_tokens(asked, 0) == 0
    ours.allocated(asked, [[1]], 0)
    ours.scheduled("r", 0)
    step = ours.take_step()
    assert not step.loads + step.refused + step.leaked


def image(offset: int, modality: str = "image") -> Any:
    """One of vLLM's `mm_features`."""
    return SimpleNamespace(modality=modality, mm_position=SimpleNamespace(offset=offset, length=1))


def test_images_behind_the_placeholders_are_admitted(caplog: pytest.LogCaptureFixture) -> None:
    """Unless the family's were not compared."""
    ours, asked = admission(), request(mm_features=[image(5), image(6)])
    assert ours.external_tokens(asked, 0) == 5
    ours = admission()
    ours.catalog.no_images = "not compared"
    assert ours.external_tokens(asked, 0) == 1
    assert "the prompt holds images: not compared" in caplog.text
    assert ours.external_tokens(request(request_id="text"), 0) == 5


REFUSED = {
    "there is no adapter 'other'": request("other"),
    "OSError: no such device": request("broken"),
    "expected prefixcore:NAME:DIGEST": request(cache_salt="prefixcore:known"),
    "expected it at position 0, got 1": request(ids=[1] * 7),
    "expected it at position 4, got 1": request(ids=[9] * 4 + [1, 2]),
    "more than 5 times": request(ids=[9] * 6 + [1]),
    "at least one real token": request(ids=[9] * 5),
    "the prompt has 1 tokens": request(ids=[9]),
    "log-probabilities of the prompt": request(sampling_params=SimpleNamespace(prompt_logprobs=0)),
    "`prompt_logprobs`, or `echo`": request(
        sampling_params=SimpleNamespace(prompt_logprobs=None, prompt_logprob_token_ids=[1])
    ),
    "skip_reading_prefix_cache": request(skip_reading_prefix_cache=True),
    "pooling task": request(sampling_params=None, pooling_params=object()),
    "holds embeddings": request(prompt_embeds=object()),
    "has to be token ids": request(prompt_token_ids=None, prompt_embeds=object()),
    "holds audio or video": request(mm_features=[image(5), image(6, "video")]),
    "images have to stand behind the placeholders": request(mm_features=[image(5), image(4)]),
    "a LoRA": request(lora_request=object()),
    "arrives in pieces": request(resumable=True),
}


@pytest.mark.parametrize(("reason", "asked"), REFUSED.items(), ids=list(REFUSED))
def test_refusals(reason: str, asked: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One token is declared to come from outside and reported to have failed; vLLM asks for it in any case."""
    ours = admission()
    with caplog.at_level(logging.ERROR):
        ours.arrived(asked)
    assert reason in caplog.text
    assert not asked.skip_reading_prefix_cache
    assert ours.external_tokens(asked, 0) == 1
    ours.allocated(asked, [[7]], 1)
    step = ours.take_step()
    assert (step.loads, step.refused) == ([], ["r"])
    ours.finished(asked)
    assert ours.take_usage() == Usage(refused=1)
    assert ours.external_tokens(request(), 0) == 5  # the same name again is another request


@pytest.mark.parametrize("computed", [0, 4])
def test_a_request_that_runs_without_its_prefix_is_ended(computed: int, caplog: pytest.LogCaptureFixture) -> None:
    """No way to it is known; if vLLM had one, its blocks would be reported as broken, step by step until it is gone."""
    ours, asked = admission(), request()
    ours.arrived(asked)
    ours.allocated(asked, [[7, 3]], 0)
    ours.scheduled("r", computed)
    assert "scheduled without its prefix" in caplog.text
    assert ours.take_step().leaked == [7]
    assert ours.take_step().leaked == [7]
    ours.finished(asked)
    assert ours.take_step().leaked == []


def test_what_an_adapter_was_used_for() -> None:
    ours = admission()
    for reason, name in (("stop", "known"), ("error", "known"), ("stop", None)):
        asked = request(name, get_finished_reason=lambda reason=reason: reason)
        ours.arrived(asked)
        ours.finished(asked)
    usage = ours.take_usage()
    used = usage.adapters.pop("known")
    assert not usage, "a request that names no adapter is none of ours"
    assert (used.requests, used.failed, used.prompt_tokens, used.generation_tokens) == (2, 1, 4, 6)
    assert all(2 <= seconds < 60 for seconds in used.seconds)
    assert not ours.take_usage()


def test_usage_is_counted_beside_what_others_read() -> None:
    first = {"adapters": {"known": vars(AdapterUsage(1, seconds=[0.5]))}, "refused": 1}
    usage = Usage.from_dict(first)
    usage.merge(Usage.from_dict(first))
    assert usage.adapters["known"] == AdapterUsage(2, seconds=[0.5, 0.5])
    assert (usage.refused, first["adapters"]["known"]["seconds"]) == (2, [0.5])


def test_a_request_that_has_its_prefix_runs(caplog: pytest.LogCaptureFixture) -> None:
    ours, asked = admission(), request()
    ours.arrived(asked)
    ours.allocated(asked, [[7, 3]], 5)
    ours.scheduled("r", 5)
    assert ours.take_step().leaked == []
    assert not caplog.text
