"""Over HTTP, on vLLM's own server: what a client sees, and that the server outlives what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serving.soak import OPTIONS, SETTINGS, Soak

from .server import Failed, Server
from .world import World, prompts


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    world.add("http-a", 17, seed=1)
    world.add("http-b", 64, seed=2)
    with Server(world, tmp_path_factory.mktemp("server") / "log", SETTINGS, *OPTIONS) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_tokens(server: Server, world: World, stream: bool) -> None:
    pairs = [(name, prompt) for name in ("http-a", "http-b", None) for prompt in prompts(3, seed=1)]
    with ThreadPoolExecutor(len(pairs)) as pool:
        found = pool.map(lambda pair: server.complete(world.request(*pair), stream=stream), pairs)
        assert list(found) == [world.answer(*pair) for pair in pairs]


def test_the_openai_package(server: Server, world: World) -> None:
    request = world.request("http-a", [5, 6, 7])
    client = openai.OpenAI(base_url=server.url, api_key="none")
    body = {"cache_salt": request["cache_salt"], "return_token_ids": True, "ignore_eos": True}
    made: Any = client.completions.create(
        model="tiny", prompt=request["prompt_token_ids"], max_tokens=16, temperature=0, extra_body=body
    )
    assert made.choices[0].token_ids == world.answer("http-a", [5, 6, 7])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_refused_request_is_an_error_and_the_reason_is_logged(server: Server, world: World, stream: bool) -> None:
    request = world.request("http-a", [5, 6, 7])
    with pytest.raises(Failed, match="Internal server error"):
        server.complete({**request, "prompt_token_ids": request["prompt_token_ids"][1:]}, stream=stream)
    assert "the prompt has to begin with the placeholder 0, 17 times" in server.log.read_text()
    assert server.complete(request, stream=stream) == world.answer("http-a", [5, 6, 7])


def test_echo_with_logprobs_is_refused(server: Server, world: World) -> None:
    request = world.request("http-a", [5, 6, 7])
    with pytest.raises(Failed):
        server.complete(request, echo=True, logprobs=1)
    assert server.complete(request, logprobs=1) == world.answer("http-a", [5, 6, 7])


def test_a_prompt_that_is_cut_on_the_left_is_refused(server: Server, world: World) -> None:
    """Without its placeholders it would be answered without the prefix."""
    with pytest.raises(Failed):
        server.complete(world.request("http-a", [5, 6, 7]), truncate_prompt_tokens=10)


def test_beam_search(server: Server, world: World) -> None:
    """Its requests carry the salt along; with a single beam it is greedy."""
    request = world.request("http-a", [5, 6, 7])
    body = {"model": "tiny", "prompt": request["prompt_token_ids"], "cache_salt": request["cache_salt"]}
    body |= {"max_tokens": 8, "use_beam_search": True, "n": 1, "ignore_eos": True, "return_token_ids": True}
    choice = server.client.post("/completions", json=body).raise_for_status().json()["choices"][0]
    assert choice["token_ids"][-8:] == world.answer("http-a", [5, 6, 7], 8)


def test_requests_that_lose_their_blocks(server: Server, world: World) -> None:
    """Ten answers of 300 tokens at once, where 20 blocks of 32 hold two: who is preempted reads its prefix again."""
    pairs = [(name, prompt) for name in ("http-a", "http-b") for prompt in prompts(5, seed=5)]
    expected = [world.answer(*pair, 300) for pair in pairs]
    requests = [world.request(*pair) for pair in pairs]  # before any is sent, so that all come at once
    before = server.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(len(pairs)) as pool:
        assert list(pool.map(lambda request: server.complete(request, 300), requests)) == expected
    assert server.metric("vllm:num_preemptions_total") > before


def test_each_adapter_is_among_the_metrics(server: Server, world: World) -> None:
    """Streamed or not, and without what was refused; virtual tokens are in no count."""
    world.add("http-counted", 33, seed=3)
    request = world.request("http-counted", [5, 6, 7])
    refused = server.metric("vllm:prefixcore_refused_requests_total")
    server.complete(request, 16)
    server.complete(request, 9, stream=True)
    server.complete(world.request(None, [5, 6, 7]), 4)
    with pytest.raises(Failed):
        server.complete({**request, "prompt_token_ids": request["prompt_token_ids"][1:]})
    expected = {
        "requests_total": 2, "failed_requests_total": 0, "prompt_tokens_total": 6, "generation_tokens_total": 25,
        "e2e_request_latency_seconds_count": 2,
    }  # fmt: skip
    server.complete(world.request(None, [5, 6, 7]), 4)  # what has ended is counted with the next step

    def found() -> dict[str, float]:
        return {name: server.metric(f"vllm:prefixcore_{name}", "http-counted") for name in expected}

    assert found() == expected
    assert server.metric("vllm:prefixcore_e2e_request_latency_seconds_sum", "http-counted") > 0
    assert server.metric("vllm:prefixcore_refused_requests_total") == refused + 1


def test_half_a_minute_of_everything(server: Server, world: World) -> None:
    found = Soak(world, server).run(30, 4)
    assert found["differences"] == []
    assert found["requests answered"] > 30
    assert found["requests refused"] > 0
    assert found["adapters replaced"] > 0
    assert found["preemptions"] > 0
