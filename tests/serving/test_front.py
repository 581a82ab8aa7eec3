"""The front on a stand-in for vLLM: what reaches vLLM, what reaches the client, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from prefixcore.adapters import Registry
from prefixcore.serving.catalog import Catalog
from prefixcore.serving.front import Front
from prefixcore.serving.salt import parse_salt
from tests.serving import shelf
from tests.serving.fake_vllm import BASE, FakeVllm, Reply, call, ids_of

PLACEHOLDER = 7
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES_PATH = "/v1/responses", "/v1/messages"
MESSAGES = [{"role": "user", "content": "Peru?"}]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    shelf.write(folder / "capitals", seed=1, tokens=3)
    shelf.write(folder / "sums", seed=2, tokens=5)
    return folder


@pytest.fixture
def registry(original: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(original, tmp_path / "registry"))


class Server:
    """A front before a fake vLLM."""

    def __init__(self, registry: Path, **options: Any) -> None:
        self.vllm = FakeVllm(**options)
        self.adapters = Catalog(registry)
        self.app = Front(self.vllm, self.adapters, PLACEHOLDER)

    def post(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> Reply:
        return call(self.app, "POST", path, body, headers, self.vllm)

    def get(self, path: str, **headers: str) -> Reply:
        return call(self.app, "GET", path, headers=headers)

    @property
    def last(self) -> Any:
        """The body of the last request that reached vLLM."""
        return self.vllm.asked[-1][1]


@pytest.fixture
def server(registry: Path) -> Server:
    return Server(registry)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("Peru ->", [ids_of("Peru ->")]),
        (["Peru", "Chile"], [ids_of("Peru"), ids_of("Chile")]),
        ([11, 12, 13], [[11, 12, 13]]),
        ([[11, 12], [13]], [[11, 12], [13]]),
    ],
)
def test_a_prompt_of_any_kind_becomes_placeholders_and_tokens(
    server: Server, prompt: Any, ids: list[list[int]]
) -> None:
    reply = server.post(COMPLETIONS, model="capitals", prompt=prompt, max_tokens=2, return_token_ids=True)
    assert reply.status == 200
    assert server.last["prompt"] == [[PLACEHOLDER] * 3 + one for one in ids]
    assert server.last["max_tokens"] == 2
    salt = parse_salt(server.last["cache_salt"])
    assert salt is not None
    assert (salt.name, salt.digest, salt.own) == ("capitals", server.adapters.find("capitals").digest, None)
    assert reply.json["model"] == "capitals"
    total = sum(map(len, ids))
    assert reply.json["usage"]["prompt_tokens"] == total
    assert reply.json["usage"]["total_tokens"] == total + 2
    assert [choice["prompt_token_ids"] for choice in reply.json["choices"]] == ids
    assert reply.headers["x-prefixcore-digest"] == salt.digest


def test_a_chat_keeps_its_fields_and_gets_placeholders(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    reply = server.post(CHAT, model="sums", messages=MESSAGES, tools=tools, temperature=0)
    assert reply.status == 200
    ids = ids_of("<user>Peru?<assistant>")
    assert server.last["kv_transfer_params"] == {"prompt_token_ids": [PLACEHOLDER] * 5 + ids}
    assert server.last["messages"] == MESSAGES
    assert server.last["tools"] == tools
    assert reply.json["usage"]["prompt_tokens"] == len(ids)
    assert reply.json["prompt_token_ids"] == ids
    assert reply.json["model"] == "sums"


def test_a_stream_is_corrected_line_by_line(server: Server) -> None:
    reply = server.post(COMPLETIONS, model="capitals", prompt=["ab", "cde"], stream=True)
    *parts, last = reply.events
    assert [part["choices"][0]["text"] for part in parts] == ["ök", "ök"]
    assert [part["usage"]["prompt_tokens"] for part in parts] == [2, 3]
    assert last["usage"]["prompt_tokens"] == 5
    assert {event["model"] for event in reply.events} == {"capitals"}


def test_a_chat_stream(server: Server) -> None:
    reply = server.post(CHAT, model="capitals", messages=MESSAGES, stream=True)
    assert reply.events[0]["choices"][0]["delta"]["content"] == "ök"
    assert reply.events[-1]["usage"]["prompt_tokens"] == len(ids_of("<user>Peru?<assistant>"))


def test_the_tokens_of_a_cut_prompt_are_not_cut_again(server: Server) -> None:
    server.post(COMPLETIONS, model="capitals", prompt="Peru ->", truncate_prompt_tokens=2)
    assert server.last["prompt"] == [[PLACEHOLDER] * 3 + ids_of("->")]
    assert "truncate_prompt_tokens" not in server.last


def test_requests_without_an_adapter_pass_unchanged(server: Server) -> None:
    body = {"model": BASE, "prompt": "Peru", "cache_salt": "mine", "echo": True, "logprobs": 1}
    assert server.post(COMPLETIONS, **body).json["model"] == BASE
    assert server.vllm.asked == [(COMPLETIONS, body)]


def test_the_callers_own_salt_is_kept_beside_the_adapters(server: Server) -> None:
    server.post(COMPLETIONS, model="capitals", prompt="Peru", cache_salt="tenant 7")
    salt = parse_salt(server.last["cache_salt"])
    assert salt is not None
    assert (salt.name, salt.own) == ("capitals", "tenant 7")


@pytest.mark.parametrize("model", [BASE, "capitals", None])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES, MESSAGES_PATH, "/pooling"])
def test_a_salt_of_an_adapter_cannot_be_smuggled_in(server: Server, path: str, model: str | None) -> None:
    salt = f"prefixcore:sums:{server.adapters.find('sums').digest}"
    reply = server.post(path, model=model, prompt="Peru", messages=MESSAGES, cache_salt=salt)
    assert reply.status == 400
    assert path == MESSAGES_PATH or reply.error["code"] == "reserved_cache_salt"
    assert "write the adapter's name as the model" in reply.error["message"]
    assert server.vllm.asked == []


def test_a_salt_deep_inside_cannot_be_smuggled_in_either(server: Server) -> None:
    salt = f"prefixcore:sums:{server.adapters.find('sums').digest}"
    for requests in ([{"body": {"cache_salt": salt}}], [1, {"body": {"cache_salt": salt}}]):
        assert server.post("/v1/batch", requests=requests).status == 400
    # A second header is one that another reader may take for the first.
    headers = {"Content-Type": "multipart/form-data"}
    assert (
        call(server.app, "POST", COMPLETIONS, {"model": BASE, "prompt": "x", "cache_salt": salt}, headers).status == 400
    )
    raw = b'{"model": "tiny-base", "prompt": "x", "\\u0063ache_salt": "prefixcore\\u003asums:1"}'
    assert call(server.app, "POST", COMPLETIONS, raw).status == 400


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (COMPLETIONS, "echo", True),
        (COMPLETIONS, "prompt_logprobs", 0),
        (CHAT, "prompt_logprobs", 2),
        (CHAT, "echo", True),
        (COMPLETIONS, "use_beam_search", True),
        (COMPLETIONS, "prompt_embeds", "AAAA"),
        (CHAT, "kv_transfer_params", {"prompt_token_ids": [1]}),
    ],
)
def test_what_would_drop_the_prefix_is_refused_by_name(server: Server, path: str, field: str, value: Any) -> None:
    reply = server.post(path, model="capitals", prompt="Peru", messages=MESSAGES, **{field: value})
    assert reply.status == 400
    assert reply.error["param"] == field
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["message"].startswith(field)
    assert server.vllm.asked == []
    harmless = {"echo": False, "use_beam_search": False}.get(field)
    assert server.post(path, model="capitals", prompt="Peru", messages=MESSAGES, **{field: harmless}).status == 200


def ask(path: str) -> dict[str, Any]:
    return {"input": "Peru?"} if path == RESPONSES else {"messages": MESSAGES, "max_tokens": 4}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [RESPONSES, MESSAGES_PATH])
def test_responses_and_messages(server: Server, path: str, stream: bool) -> None:
    reply = server.post(path, model="sums", **ask(path), stream=stream, cache_salt="mine")
    ids = ids_of("<user>Peru?<assistant>")
    assert server.last["kv_transfer_params"] == {"prompt_token_ids": [PLACEHOLDER] * 5 + ids}
    salt = parse_salt(server.last["cache_salt"])
    assert salt is not None
    assert (salt.name, salt.own) == ("sums", "mine")
    whole = (
        [event.get("response") or event.get("message") or event for event in reply.events] if stream else [reply.json]
    )
    assert whole[0]["model"] == "sums"
    usage = whole[-1]["usage"]
    assert usage["input_tokens"] + usage.get("cache_read_input_tokens", 0) == len(ids)
    if path == RESPONSES:
        assert usage["total_tokens"] == len(ids) + 1
        details = usage["input_tokens_details"]
        assert (details["cached_tokens"], details["input_tokens_per_turn"]) == (len(ids) - 10, [len(ids)])
    else:
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (10, len(ids) - 10)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [RESPONSES, MESSAGES_PATH])
def test_a_failed_response_or_message_gets_words(registry: Path, path: str, stream: bool) -> None:
    server = Server(registry, failures=9)
    reply = server.post(path, model="sums", **ask(path), stream=stream)
    words = "could not answer with the adapter 'sums'"
    if not stream:
        assert reply.status == 500
        assert words in reply.error["message"]
        assert reply.json.get("type") == (None if path == RESPONSES else "error")
        return
    events = [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: {")]
    assert events[-1]["type"] == "error"
    assert words in (events[-1]["message"] if path == RESPONSES else events[-1]["error"]["message"])
    if path == RESPONSES:
        assert events[-1]["sequence_number"] == 1
        assert "\nevent: error\n" in reply.text


def test_what_responses_and_messages_cannot_have_is_refused_in_their_words(server: Server) -> None:
    for field in ("previous_response_id", "background"):
        reply = server.post(RESPONSES, model="sums", input="x", **{field: "yes"})
        assert (reply.status, reply.error["param"]) == (400, field)
    sound = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]
    assert server.post(RESPONSES, model="sums", input=sound).error["param"] == "input"
    reply = server.post(MESSAGES_PATH, model="sums", messages=sound, max_tokens=4)
    assert reply.status == 400
    words = "messages: a part of type 'input_audio' cannot be read together with an adapter; send text, and images as"
    assert reply.json == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": f"{words} 'image'"},
    }
    reply = server.post(MESSAGES_PATH, model="sums", messages=MESSAGES, max_tokens=2000)
    error = {"type": "invalid_request_error", "message": "max_tokens: too many"}
    assert (reply.status, reply.json) == (400, {"type": "error", "error": error})
    server.vllm.asked.clear()
    reply = server.post(MESSAGES_PATH, model="rivers", messages=MESSAGES, max_tokens=4)
    assert (reply.status, reply.error["type"]) == (404, "not_found_error")
    assert server.vllm.asked == [(MESSAGES_PATH, {"model": "rivers", "messages": MESSAGES, "max_tokens": 4})]


IMAGE_PARTS: dict[str, Any] = {
    CHAT: {"type": "image_url", "image_url": {"url": "data:,"}},
    RESPONSES: {"type": "input_image", "image_url": "data:,"},
    MESSAGES_PATH: {"type": "image", "source": {}},
}
"""A picture, as each interface words it."""


def about_a_picture(path: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": [{"type": "text", "text": "what?"}, IMAGE_PARTS[path]]}]
    return {"input": messages} if path == RESPONSES else {"messages": messages, "max_tokens": 4}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", IMAGE_PARTS)
def test_vllm_renders_pictures_behind_placeholders(server: Server, path: str, stream: bool) -> None:
    asked = about_a_picture(path)
    ids = ids_of("a IMG I b")
    for name, count in (("capitals", 3), ("sums", 5), ("capitals", 3)):
        reply = server.post(path, model=name, **asked, stream=stream, cache_salt="mine")
        assert reply.status == 200
        salt = parse_salt(server.last.pop("cache_salt"))
        assert salt is not None
        assert (salt.name, salt.own) == (name, "mine")
        assert server.last == {**asked, "stream": stream}
        made = server.vllm.rendered[-1]
        assert made["prompt_token_ids"] == [PLACEHOLDER] * count + ids
        assert [(each.offset, each.length) for each in made["mm_placeholders"]["image"]] == [
            (count + 2, 3),
            (count + 6, 1),
        ]
        whole = reply.events[-1] if stream else reply.json
        usage = (whole.get("response") or whole)["usage"]
        counted = usage.get("prompt_tokens", usage.get("input_tokens")) + usage.get("cache_read_input_tokens", 0)
        assert counted == len(ids)
    server.post(path, model=BASE, **asked)  # and without an adapter as they are
    assert server.vllm.rendered[-1]["prompt_token_ids"] == ids
    assert server.vllm.rendered[-1]["mm_placeholders"]["image"][0].offset == 2
    assert [options for *_, options in server.vllm.state.engine_client.renderer.asked] == [{"skip_mm_cache": False}] * 4


def test_a_request_that_starts_in_the_context_of_another_is_none_of_its(server: Server) -> None:
    """As a web server starts one that a client has sent ahead, when the answer before it is complete."""
    asked = about_a_picture(CHAT)

    def ask_more() -> None:
        for name in (BASE, "sums"):
            server.post(CHAT, model=name, **asked)
        server.post(CHAT, model="capitals", messages=MESSAGES)

    async def ahead(*connection: Any) -> None:
        server.app.app = server.vllm
        await server.vllm(*connection)
        await asyncio.to_thread(ask_more)

    server.app.app = ahead
    server.post(CHAT, model="capitals", **asked)
    ids = ids_of("a IMG I b")
    expected = [[PLACEHOLDER] * 3 + ids, ids, [PLACEHOLDER] * 5 + ids]
    assert [each["prompt_token_ids"] for each in server.vllm.rendered] == expected
    text = [body for _, body in server.vllm.asked if "kv_transfer_params" in body]
    assert [each["kv_transfer_params"]["prompt_token_ids"][:4] for each in text] == [[PLACEHOLDER] * 3 + ids_of("<")]


def test_a_picture_of_a_tools_result(server: Server) -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "see"}]}
    messages = [{"role": "user", "content": [result]}]
    server.post(MESSAGES_PATH, model="capitals", messages=messages, max_tokens=4)
    assert server.vllm.rendered == []
    result["content"] = [IMAGE_PARTS[MESSAGES_PATH]]
    server.post(MESSAGES_PATH, model="capitals", messages=messages, max_tokens=4)
    assert server.vllm.rendered[-1]["prompt_token_ids"][:3] == [PLACEHOLDER] * 3


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "data:,"}},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "text", "text": "x", "audio_url": {"url": "data:,"}},
        {"input_image": "data:,"},
    ],
)
def test_other_media_are_refused(server: Server, part: dict[str, Any]) -> None:
    """Also where they hide in a part of text, for whose sake vLLM drops the token ids that it is handed."""
    reply = server.post(CHAT, model="capitals", messages=[{"role": "user", "content": [part]}])
    assert (reply.status, reply.error["param"]) == (400, "messages")
    assert "send text, and images as 'image_url'" in reply.error["message"]
    assert server.vllm.asked == []


def test_pictures_of_a_family_that_was_not_compared_are_refused(server: Server) -> None:
    server.adapters.no_images = "not compared"
    reply = server.post(CHAT, model="capitals", **about_a_picture(CHAT))
    assert (reply.status, reply.error["message"]) == (400, "images: not compared; send text alone")
    assert server.vllm.asked == []
    assert server.post(CHAT, model="capitals", messages=MESSAGES).status == 200


def test_a_vllm_that_renders_in_another_way_is_refused(server: Server) -> None:
    server.vllm.state.engine_client.renderer = object()
    reply = server.post(CHAT, model="capitals", **about_a_picture(CHAT))
    assert (reply.status, reply.error["code"]) == (500, "render")
    assert "vLLM 0.32" in reply.error["message"]
    assert server.vllm.asked == []


@pytest.mark.parametrize("name", ["rivers", "../registry/capitals", "capitals/", ".hidden", ""])
def test_an_unknown_model_is_told_what_there_is(server: Server, name: str) -> None:
    reply = server.post(COMPLETIONS, model=name, prompt="Peru")
    assert reply.status == 404
    assert reply.error["code"] == "model_not_found"
    assert reply.error["message"] == f"The model {name!r} does not exist. There are: tiny-base, capitals, sums."


def test_models_are_listed_with_the_adapters(server: Server, registry: Path) -> None:
    shelf.damage(registry / "sums")
    cards = server.get("/v1/models").json["data"]
    assert [card["id"] for card in cards] == [BASE, "capitals"]
    assert cards[1]["parent"] == BASE
    assert cards[1]["digest"] == server.adapters.find("capitals").digest
    assert cards[1]["max_model_len"] == 61
    assert server.get("/v1/models/capitals").json["id"] == "capitals"
    assert server.get("/v1/models/rivers").status == 404
    assert "sums" in server.adapters.problems()


def test_a_damaged_adapter_is_refused_and_the_others_are_served(server: Server, registry: Path) -> None:
    assert server.post(COMPLETIONS, model="sums", prompt="1+1").status == 200
    shelf.damage(registry / "sums")
    reply = server.post(COMPLETIONS, model="sums", prompt="1+1")
    assert reply.status == 400
    assert reply.error["code"] == "adapter_not_servable"
    assert "sums/adapter_model.safetensors" in reply.error["message"]
    assert str(registry) not in reply.text
    assert server.post(COMPLETIONS, model="capitals", prompt="Peru").status == 200


def test_a_soft_prompt_says_how_it_becomes_a_prefix(server: Server, registry: Path) -> None:
    shelf.soft_prompt(registry / "prompt")
    reply = server.post(COMPLETIONS, model="prompt", prompt="Peru")
    assert reply.status == 400
    assert "prefixcore bake prompt --model MODEL --out NEW, then prefixcore add NEW" in reply.error["message"]


def test_a_link_is_refused_as_the_connector_refuses_it(server: Server, registry: Path, tmp_path: Path) -> None:
    (registry / "linked").symlink_to(shelf.write(tmp_path / "elsewhere", seed=3))
    reply = server.post(COMPLETIONS, model="linked", prompt="Peru")
    assert reply.status == 400
    assert "a link" in reply.error["message"]
    assert "linked" not in [card["id"] for card in server.get("/v1/models").json["data"]]
    assert Registry(registry).find("linked").problem is not None


def test_adapters_are_seen_as_they_come_and_go(server: Server, registry: Path) -> None:
    assert server.post(COMPLETIONS, model="new", prompt="Peru").status == 404
    shelf.write(registry / "new", seed=5, tokens=2)
    assert server.post(COMPLETIONS, model="new", prompt="Peru").status == 200
    before = server.last["cache_salt"]
    shelf.replace(registry / "new", seed=6, tokens=4)
    assert server.post(COMPLETIONS, model="new", prompt="Peru").status == 200
    assert server.last["cache_salt"] != before
    assert server.last["prompt"][0][:5] == [PLACEHOLDER] * 4 + ids_of("P")
    import shutil

    shutil.rmtree(registry / "new")
    assert server.post(COMPLETIONS, model="new", prompt="Peru").status == 404


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_replaced_meanwhile_is_asked_for_again(registry: Path, stream: bool) -> None:
    server = Server(registry, failures=1, on_failure=lambda: shelf.replace(registry / "sums", seed=9, tokens=2))
    reply = server.post(COMPLETIONS, model="sums", prompt="1+1", stream=stream)
    assert reply.status == 200
    assert "error" not in reply.text
    assert server.last["prompt"] == [[PLACEHOLDER] * 2 + ids_of("1+1")]
    assert reply.headers["x-prefixcore-digest"] == server.adapters.find("sums").digest


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_replaced_meanwhile_is_asked_about_a_picture_again(registry: Path, stream: bool) -> None:
    server = Server(registry, failures=1, on_failure=lambda: shelf.replace(registry / "sums", seed=9, tokens=2))
    assert server.post(CHAT, model="sums", **about_a_picture(CHAT), stream=stream).status == 200
    assert server.vllm.rendered[-1]["prompt_token_ids"][:3] == [PLACEHOLDER] * 2 + ids_of("a")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_in_vllm_gets_words(registry: Path, stream: bool) -> None:
    server = Server(registry, failures=5)
    reply = server.post(COMPLETIONS, model="sums", prompt="1+1", stream=stream)
    error = reply.events[0]["error"] if stream else reply.error
    assert reply.status == (200 if stream else 500)
    assert "could not answer with the adapter 'sums'" in error["message"]
    assert server.vllm.failures == 4  # nothing had changed, so nothing was tried again


def test_a_client_without_the_key_learns_nothing(registry: Path) -> None:
    server = Server(registry, key="secret")
    for path, body in [
        (COMPLETIONS, {"model": "rivers", "prompt": "x"}),
        (COMPLETIONS, {"model": "capitals", "prompt": "x"}),
        (COMPLETIONS, {"model": "capitals", "prompt": "x", "echo": True}),
    ]:
        reply = server.post(path, **body)
        assert (reply.status, reply.json) == (401, {"error": "Unauthorized"})
    assert server.get("/v1/models").status == 401
    key = {"authorization": "Bearer secret"}
    assert server.post(COMPLETIONS, key, model="capitals", prompt="x").status == 200
    assert len(server.get("/v1/models", **key).json["data"]) == 3


def test_internal_endpoints_are_closed(server: Server) -> None:
    for path in (f"{COMPLETIONS}/render", f"{CHAT}/render", "/inference/v1/generate", "/v1/chat/completions/derender"):
        assert server.post(path, model=BASE, prompt="x").status == 403
    assert server.vllm.asked == []


def test_other_endpoints_with_an_adapters_name(server: Server) -> None:
    reply = server.post("/v1/embeddings", model="capitals", input="Peru")
    assert reply.status == 400
    assert COMPLETIONS in reply.error["message"]
    assert server.post("/v1/messages/count_tokens", model="capitals", messages=MESSAGES).status == 200
    assert server.last == {"messages": MESSAGES}
    assert server.post("/tokenize", model="capitals", prompt="Peru").status == 200
    assert server.last == {"prompt": "Peru"}
    assert server.get("/health").status == 200


def test_vllms_own_error_about_the_prompt_is_passed_on(server: Server) -> None:
    reply = server.post(COMPLETIONS, model="capitals", prompt="")
    assert (reply.status, reply.error["message"]) == (400, "prompt: missing")


def test_a_server_that_cannot_render_is_told_what_it_lacks(registry: Path) -> None:
    async def old(scope: Any, receive: Any, send: Any) -> None:
        from tests.serving.fake_vllm import answer

        if scope["path"].endswith("/render"):
            await answer(send, 404, {"detail": "Not Found"})
        else:
            await FakeVllm()(scope, receive, send)

    reply = call(Front(old, Catalog(registry), 0), "POST", COMPLETIONS, {"model": "capitals", "prompt": "x"})
    assert reply.status == 500
    assert "--enable-scale-out" in reply.error["message"]


def test_a_server_without_the_connector_says_so() -> None:
    reply = call(Front(FakeVllm()), "POST", COMPLETIONS, {"model": "capitals", "prompt": "x"})
    assert reply.status == 500
    assert "prefixcore serve" in reply.error["message"]
