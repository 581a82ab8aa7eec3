"""The front in vLLM's own server, as `prefixcore serve` starts it, asked with the `openai` package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefixcore.adapters import Registry
from prefixcore.serving import launch
from prefixcore.serving.baked import bake_registry
from prefixcore.serving.before_start import choose_placeholder
from prefixcore.serving.client import Client, ServingError
from prefixcore.serving.validate_reference import Reference
from tests import tiny
from tests.cli.fixtures import prefixcore
from tests.serving import shelf

__all__ = ["prefixcore"]

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if tools %}{{ tools | length }} tools\n{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Peru?"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
VIRTUAL = {"capitals": 17, "sums": 5, "long": 150}
"""The prefixes; a soft prompt, `asked`, stands beside them."""
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512")


def make_model() -> Any:
    """A Llama whose heads are as large as vLLM's attention on the CPU needs, for the tiny tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny.CHARACTERS) + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.15,  # so that a prefix changes what is generated
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, a registry, and the reference that knows both."""
    folder = tmp_path_factory.mktemp("front")
    model, tokenizer = make_model(), tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder / "tiny-llama")
    tokenizer.save_pretrained(folder / "tiny-llama")
    for seed, (name, tokens) in enumerate(VIRTUAL.items(), start=1):
        shelf.write(folder / "adapters" / name, seed=seed, tokens=tokens, model=model)
    shelf.soft_prompt(folder / "adapters" / "asked", 6, seed=4, model=model)
    assert not bake_registry(Registry(folder / "adapters"), folder / "baked", lambda: model)
    adapters = {name: folder / "adapters" / name for name in (*VIRTUAL, "asked")}
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, reference=Reference(model, tokenizer, adapters))


@pytest.fixture(scope="module")
def server(place: Any) -> Iterator[Any]:
    placeholder = choose_placeholder(place.tokenizer)
    with launch.start(
        place.folder / "tiny-llama",
        place.folder / "adapters",
        placeholder=placeholder,
        baked=place.folder / "baked",
        arguments=OPTIONS,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(place: Any, name: str, ids: list[int], tokens: int = 8) -> list[int]:
    return place.reference.continuation(None if name == "tiny-llama" else name, ids, tokens)[0]


def without_end(ids: list[int]) -> list[int]:
    return [token for token in ids if token != 0]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-llama", "asked", "capitals", "long", "sums"]
    assert client.models.retrieve("sums").owned_by == "prefixcore"


@pytest.mark.parametrize("name", ["capitals", "sums", "long", "asked", "tiny-llama"])
def test_completions_of_every_kind(client: openai.OpenAI, place: Any, name: str) -> None:
    texts = ["Peru ->", "x", "the quick brown fox " * 9]
    ids = [place.reference.ids(text) for text in texts]
    answers = [expected(place, name, one) for one in ids]
    options: Any = {"model": name, "max_tokens": 8, "temperature": 0, "extra_body": {"return_token_ids": True}}
    for text, one, answer in zip(texts, ids, answers, strict=True):
        for prompt in (text, one):
            made: Any = client.completions.create(prompt=prompt, **options)
            assert without_end(made.choices[0].token_ids) == answer
            assert made.choices[0].prompt_token_ids == one
            assert made.usage.prompt_tokens == len(one)
            assert made.model == name
    for prompts in (texts, ids):
        made = client.completions.create(prompt=prompts, **options)
        assert [without_end(choice.token_ids) for choice in made.choices] == answers
        assert made.usage.prompt_tokens == sum(map(len, ids))


@pytest.mark.parametrize("name", ["capitals", "long", "tiny-llama"])
def test_streams(client: openai.OpenAI, place: Any, name: str) -> None:
    ids = place.reference.ids("Peru ->")
    usage: Any = {"include_usage": True}
    stream: Any = client.completions.create(
        model=name, prompt="Peru ->", max_tokens=8, temperature=0, stream=True, stream_options=usage
    )
    *parts, last = list(stream)
    assert "".join(part.choices[0].text for part in parts) == place.reference.text(expected(place, name, ids))
    assert last.usage.prompt_tokens == len(ids)
    assert {part.model for part in parts} == {name}


@pytest.mark.parametrize("name", ["capitals", "long", "tiny-llama"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
def test_chat(client: openai.OpenAI, place: Any, name: str, tools: Any) -> None:
    messages: Any = MESSAGES
    ids = place.tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    answer = expected(place, name, ids)
    options: Any = {"model": name, "messages": messages, "max_tokens": 8, "temperature": 0}
    if tools:
        options |= {"tools": tools, "tool_choice": "none"}
    made: Any = client.chat.completions.create(**options, logprobs=True, extra_body={"return_token_ids": True})
    assert without_end(made.choices[0].token_ids) == answer
    assert made.prompt_token_ids == ids
    assert made.usage.prompt_tokens == len(ids)
    assert made.model == name
    stream: Any = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    *parts, last = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == place.reference.text(answer)
    assert last.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("name", ["capitals", "long", "asked", "tiny-llama"])
def test_responses(client: openai.OpenAI, place: Any, name: str) -> None:
    ids = rendered(place, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Peru?"}])
    answer = place.reference.text(expected(place, name, ids))
    content: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Peru?"}]}]
    options: Any = {"model": name, "instructions": "be brief", "max_output_tokens": 8, "temperature": 0}
    for given in ("Peru?", content):
        made = client.responses.create(input=given, **options)
        assert (made.output_text, made.model) == (answer, name)
        assert made.usage is not None
        assert (made.usage.input_tokens, made.usage.total_tokens - made.usage.output_tokens) == (len(ids), len(ids))
    with client.responses.stream(input="Peru?", **options) as stream:
        parts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        last: Any = stream.get_final_response()
    assert "".join(parts) == last.output_text == answer
    assert (last.model, last.usage.input_tokens) == (name, len(ids))


@pytest.mark.parametrize("name", ["capitals", "long", "asked", "tiny-llama"])
def test_messages(server: Any, place: Any, name: str) -> None:
    """Anthropic's interface, asked as its package asks."""
    ids = rendered(place, MESSAGES)
    answer = place.reference.text(expected(place, name, ids))
    body = {"model": name, "system": "be brief", "messages": MESSAGES[1:], "max_tokens": 8, "temperature": 0}
    made = httpx.post(f"{server.url}/v1/messages", json=body, timeout=120).json()
    assert (made["content"][0]["text"], made["model"]) == (answer, name)
    assert made["usage"]["input_tokens"] + made["usage"].get("cache_read_input_tokens", 0) == len(ids)
    lines = httpx.post(f"{server.url}/v1/messages", json={**body, "stream": True}, timeout=120).text.split("\n")
    events = [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: {")]
    assert (
        "".join(event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta") == answer
    )
    assert events[0]["message"]["model"] == name
    (usage,) = [event["usage"] for event in events if event["type"] == "message_delta"]
    assert usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0) == len(ids)
    counted = httpx.post(f"{server.url}/v1/messages/count_tokens", json=body, timeout=120).json()
    assert counted["input_tokens"] == len(ids)


def rendered(place: Any, messages: list[dict[str, str]]) -> list[int]:
    return place.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def test_all_at_once_and_twice(client: openai.OpenAI, place: Any) -> None:
    """Several adapters and none in the same batches, on the same texts, so that cached blocks are hit."""
    texts = [f"text {number} " * 20 for number in range(4)]
    jobs = [(name, text) for text in texts for name in ("capitals", "sums", "long", "asked", "tiny-llama")] * 2

    def ask(job: tuple[str, str]) -> list[int]:
        made: Any = client.completions.create(
            model=job[0], prompt=job[1], max_tokens=6, temperature=0, extra_body={"return_token_ids": True}
        )
        return without_end(made.choices[0].token_ids)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, jobs))
    assert found == [expected(place, name, place.reference.ids(text), 6) for name, text in jobs]


@pytest.mark.parametrize(
    ("error", "words", "request_"),
    [
        (openai.NotFoundError, "There are: tiny-llama, asked, capitals", {"model": "rivers"}),
        (openai.BadRequestError, "echo makes vLLM compute", {"echo": True, "logprobs": 1}),
        (openai.BadRequestError, "prompt_logprobs makes vLLM", {"extra_body": {"prompt_logprobs": 1}}),
        (openai.BadRequestError, "names an adapter", {"extra_body": {"cache_salt": "prefixcore:sums:" + "0" * 64}}),
        (openai.BadRequestError, "150 of these tokens are", {"model": "long", "prompt": "x" * 400}),
        (openai.BadRequestError, "cannot be served", {"model": "broken"}),
    ],
)
def test_refusals(client: openai.OpenAI, place: Any, error: Any, words: str, request_: Any) -> None:
    if request_.get("model") == "broken":
        shutil.copytree(place.folder / "adapters" / "sums", place.folder / "adapters" / "broken")
        shelf.damage(place.folder / "adapters" / "broken")
    options: Any = {"model": "capitals", "prompt": "Peru ->", "max_tokens": 4, **request_}
    with pytest.raises(error) as raised:
        client.completions.create(**options)
    assert words in str(raised.value)
    shutil.rmtree(place.folder / "adapters" / "broken", ignore_errors=True)
    made = client.completions.create(model="capitals", prompt="Peru ->", max_tokens=4, temperature=0)
    ids = place.reference.ids("Peru ->")
    assert made.choices[0].text == place.reference.text(expected(place, "capitals", ids, 4))


def test_an_adapter_that_comes_and_is_replaced(client: openai.OpenAI, place: Any) -> None:
    folder, model = place.folder / "adapters" / "new", make_model()
    ids = place.reference.ids("Peru -> Lima, " * 12)
    seen = []
    for seed, tokens in ((11, 9), (12, 9), (13, 140)):
        shelf.write(folder, seed=seed, tokens=tokens, model=model)
        made: Any = client.completions.create(
            model="new", prompt=ids, max_tokens=8, temperature=0, extra_body={"return_token_ids": True}
        )
        seen.append(without_end(made.choices[0].token_ids))
        reference = Reference(make_model(), place.tokenizer, {"new": folder})
        assert seen[-1] == reference.continuation("new", ids, 8)[0]
    assert len({tuple(answer) for answer in seen}) == 3
    shutil.rmtree(folder)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="new", prompt="x")


def test_our_own_client(server: Any, place: Any) -> None:
    ours = Client(server.url)
    text = place.reference.text(expected(place, "sums", place.reference.ids("2 + 3 =")))
    assert ours.generate("sums", "2 + 3 =", max_tokens=8) == text
    assert ours.generate("sums", ["2 + 3 =", "2 + 3 ="], max_tokens=8) == [text, text]
    assert "".join(ours.stream("sums", "2 + 3 =", max_tokens=8)) == text
    assert ours.chat("sums", "Peru?", max_tokens=4) == "".join(ours.stream_chat("sums", "Peru?", max_tokens=4))
    with pytest.raises(ServingError, match="There are: tiny-llama, asked, capitals") as raised:
        ours.generate("rivers", "x")
    assert raised.value.status == 404


def validate(prefixcore: Any, url: str, place: Any) -> tuple[int, Any, str]:
    report = place.folder / "report.json"
    options = ["--model", place.folder / "tiny-llama", "--adapters", place.folder / "adapters", "--json", report]
    code, out, err = prefixcore("validate-serving", "--url", url, *options)
    return code, json.loads(report.read_text()), out + err


def test_it_is_validated(server: Any, place: Any, prefixcore: Any) -> None:
    from vllm import __version__

    code, report, text = validate(prefixcore, server.url, place)
    assert code == 0, text
    assert {line["verdict"] for line in report["lines"]} == {"passed"}
    leak = next(line for line in report["lines"] if line["check"] == "leak")
    assert leak["numbers"]["answers that a cache helped with"] > 0
    assert report["server"].endswith(f"(vLLM {__version__})")


def test_plain_vllm_is_found_out(place: Any, prefixcore: Any, tmp_path: Path) -> None:
    """Without the front it knows no adapter; and given the adapters' names for the bare model, it is no better."""
    import sys

    port = launch.free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place.folder / "tiny-llama")]
    command += ["--served-model-name", "tiny-llama", "capitals", "--host", "127.0.0.1", "--port", str(port), *OPTIONS]
    with open(tmp_path / "log", "wb") as log:
        server = launch.launch(command, "127.0.0.1", port, output=log)
        server.log = tmp_path / "log"
        try:
            launch.wait_until_ready(server)
            code, report, text = validate(prefixcore, server.url, place)
        finally:
            server.stop()
    assert code == 3, text
    failed = {(line["check"], line["subject"]) for line in report["lines"] if line["verdict"] == "FAILED"}
    assert {("served", "sums"), ("served", "long"), ("answers", "capitals"), ("stream", "capitals")} <= failed
    assert "the prefix is not applied" in text
    assert any(check == "dropped prefix" for check, _ in failed)
