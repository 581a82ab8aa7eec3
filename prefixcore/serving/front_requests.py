"""What the front makes of a request for an adapter: P placeholders before its tokens, and the adapter in its salt.

Pure functions of JSON: which requests are refused, and how the others go on to vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .catalog import Served
from .openai_errors import Refusal
from .salt import SCHEME, make_salt

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
"""OpenAI's newer interface, and Anthropic's."""
OFFERED = (COMPLETIONS, CHAT, RESPONSES, MESSAGES)

_DROP = "makes vLLM compute the prompt's positions anew, without the adapter's prefix, so the answer would be wrong"
_REFUSED = {
    "echo": f"echo {_DROP}; leave it out, and put the prompt before the answer yourself",
    "prompt_logprobs": f"prompt_logprobs {_DROP}; leave it out, or ask the base model",
    "use_beam_search": "use_beam_search is not offered for an adapter, for it was not checked there; leave it out",
    "prompt_embeds": "prompt_embeds cannot be combined with an adapter; send text or token ids",
    "kv_transfer_params": "kv_transfer_params cannot be given for an adapter: the front uses them itself; leave it out",
    "ec_transfer_params": "ec_transfer_params cannot be given for an adapter; leave it out",
    "previous_response_id": "previous_response_id is not offered for an adapter; send the whole conversation as input",
    "background": "background is not offered for an adapter; leave it out",
}
_RENDERED = ("truncate_prompt_tokens", "truncation_side", "suffix")
"""Fields that the tokens already heed; heeded again they would cut the placeholders off."""

_TEXT_PARTS = (
    "text", "input_text", "output_text", "refusal", "thinking", "redacted_thinking", "reasoning_text", "summary_text",
    "tool_use", "tool_result",
)  # fmt: skip
_IMAGE_PARTS = {CHAT: "image_url", RESPONSES: "input_image", MESSAGES: "image"}
_MEDIA = (
    "image_url", "input_image", "image_pil", "image_embeds", "audio_url", "input_audio", "audio_embeds", "video_url",
    "video_embeds", "prompt_embeds",
)  # fmt: skip
"""Names by which vLLM finds media in a part of whatever type."""


def check_salts(body: Any) -> None:
    """Raises Refusal if a request brings a salt that names an adapter: that is for the front alone to say."""
    for salt in _salts(body):
        if isinstance(salt, str) and salt.startswith(SCHEME):
            raise Refusal(
                f"cache_salt: one that begins with {SCHEME!r} names an adapter, which a request does by its model; "
                "write the adapter's name as the model, and a salt of your own, or none",
                param="cache_salt",
                code="reserved_cache_salt",
            )


def _salts(value: Any) -> Iterator[Any]:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            if "cache_salt" in found:
                yield found["cache_salt"]
            waiting += found.values()
        elif isinstance(found, list):
            waiting += [each for each in found if isinstance(each, (dict, list))]


def check_request(body: Mapping[str, Any], path: str) -> None:
    """Raises Refusal if an adapter cannot answer this request rightly."""
    for field, why in _REFUSED.items():
        value = body.get(field)
        if value is not None and value is not False:
            raise Refusal(why, param=field, code="unsupported_with_adapter")
    own = body.get("cache_salt")
    if own is not None and not isinstance(own, str):
        raise Refusal(f"cache_salt: expected a text, got {type(own).__name__}", param="cache_salt")
    field = "input" if path == RESPONSES else "messages"
    for kind in _kinds(body, path):
        if kind not in _TEXT_PARTS and kind != _IMAGE_PARTS[path]:
            raise Refusal(
                f"{field}: a part of type {kind!r} cannot be read together with an adapter; send text, and images as "
                f"{_IMAGE_PARTS[path]!r}",
                param=field,
                code="unsupported_with_adapter",
            )


def holds_images(body: Mapping[str, Any], path: str) -> bool:
    """Whether the messages of a request that `check_request` has passed hold images."""
    return any(kind not in _TEXT_PARTS for kind in _kinds(body, path))


def _kinds(body: Mapping[str, Any], path: str) -> Iterator[Any]:
    """The types of the parts that the contents of messages consist of, and those of tools' results in these."""
    waiting = [] if path == COMPLETIONS else [body.get("input" if path == RESPONSES else "messages")]
    while waiting:
        found = waiting.pop()
        for each in found if isinstance(found, list) else ():
            content = each.get("content") if isinstance(each, dict) else None
            for part in content if isinstance(content, list) else ():
                kind = part.get("type", "text") if isinstance(part, dict) else "text"
                yield next((name for name in _MEDIA if name in part), kind) if kind in _TEXT_PARTS else kind
                if kind == "tool_result":
                    waiting.append([part])


def to_base(body: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """The same request to the base model; `base`: its name; None: vLLM takes its own where there is none."""
    rest = {name: value for name, value in body.items() if name != "model"}
    return rest if base is None else {**rest, "model": base}


def render_request(body: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """The request whose tokens vLLM is asked for: the same, to the base model, all at once."""
    rest = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    return to_base(rest, base)


def rendered_ids(rendered: Any) -> list[list[int]]:
    """The token ids of each prompt in what vLLM has rendered.

    Raises:
        Refusal: it is not what vLLM 0.32 answers.
    """
    prompts = rendered if isinstance(rendered, list) else [rendered]
    found = [prompt.get("token_ids") if isinstance(prompt, dict) else None for prompt in prompts]
    if not found or not all(isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in found):
        raise Refusal(
            "vLLM did not say which tokens the prompt has; this front is made for vLLM 0.32", status=500, code="render"
        )
    if any(prompt.get("features") for prompt in prompts):  # in a part that is not known to hold any
        raise Refusal(
            "the prompt holds images, audio or video where none can be read together with an adapter; send text, and "
            "images as parts of messages",
            code="unsupported_with_adapter",
        )
    return [ids for ids in found if ids]


def with_adapter(
    body: Mapping[str, Any],
    path: str,
    adapter: Served,
    prompts: list[list[int]] | None,
    placeholder: int,
    base: str | None = None,
) -> dict[str, Any]:
    """The request that goes on to vLLM.

    Args:
        body: the caller's.
        path: one of `OFFERED`.
        adapter: the one that its model names.
        prompts: the token ids of each prompt, as vLLM renders them; None: messages with images, which it reads itself.
        placeholder: the token id that stands P times before each.
        base: the base model's name, if it is known.

    Examples:
        >>> from prefixcore.serving.catalog import Served
        >>> from prefixcore.serving.front_requests import COMPLETIONS, with_adapter
        >>> capitals = Served("capitals", "0" * 64, num_virtual_tokens=2)
        >>> with_adapter({"model": "capitals", "prompt": "Peru ->"}, COMPLETIONS, capitals, [[7, 8]], 0)["prompt"]
        [[0, 0, 7, 8]]
    """
    if prompts is None:
        result = to_base(body, base)
    else:
        result = to_base({name: value for name, value in body.items() if name not in _RENDERED}, base)
        ids = [[placeholder] * adapter.num_virtual_tokens + prompt for prompt in prompts]
        if path == COMPLETIONS:
            result["prompt"] = ids
        else:  # what vLLM's decode stage is handed by its prefill stage: the tokens of these messages
            result["kv_transfer_params"] = {"prompt_token_ids": ids[0]}
    try:
        result["cache_salt"] = make_salt(adapter.name, adapter.digest, body.get("cache_salt"))
    except ValueError as error:
        raise Refusal(str(error), param="cache_salt") from error
    return result
