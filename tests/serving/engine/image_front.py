"""Conversations with images over HTTP, of the server that `prefixcore serve` starts, beside transformers.

    python -m tests.serving.engine.image_front

`test_image_families` runs it where torchvision can be imported.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from prefixcore.serving import launch
from prefixcore.serving.before_start import choose_placeholder

from .image_world import ImageWorld, make_image

FAMILY = "qwen2_5_vl"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type in ('image', 'image_url') %}MARK{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
ASKED = "the quick brown fox jumps over what? "
LENGTH = 256
TOKENS = 8


class Place:
    """A server, and what it has to answer."""

    def __init__(self, world: ImageWorld, url: str) -> None:
        self.world, self.url = world, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def text(self) -> str:
        return f"u:{ASKED}{self.world.mark};a:"

    def expected(self, name: str | None, image: Image.Image) -> list[int]:
        return self.world.answer_about(name, self.text(), image, TOKENS)

    def read(self, image: Image.Image) -> int:
        """How many tokens a request has without virtual ones."""
        return self.world.processor(text=[self.text()], images=[image], return_tensors="pt")["input_ids"].shape[1]

    def in_words(self, ids: Iterable[int]) -> str:
        return self.world.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, name: str | None, image: Image.Image, **more: Any) -> Any:
        content: Any = [{"type": "text", "text": ASKED}, {"type": "image_url", "image_url": {"url": url_of(image)}}]
        return self.client.chat.completions.create(
            model=name or "model",
            messages=[{"role": "user", "content": content}],
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
            **more,
        )


def url_of(image: Image.Image) -> str:
    return f"data:image/png;base64,{data_of(image)}"


def data_of(image: Image.Image) -> str:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def check_chats(place: Place) -> None:
    """All at once, and once more from cached blocks: the same text with two images, each with two adapters and none."""
    asked = [(name, make_image(seed)) for name in ("first", "second", None) for seed in (1, 2)]
    expected = [place.expected(*each) for each in asked]
    assert len(set(map(tuple, expected))) == len(asked)
    for is_again in (False, True):
        with ThreadPoolExecutor(len(asked)) as pool:
            made = list(pool.map(lambda each: place.chat(*each), asked))
        assert [each.choices[0].token_ids for each in made] == expected
        for (name, image), each in zip(asked, made, strict=True):
            assert each.model == (name or "model")
            assert each.usage.prompt_tokens == len(each.prompt_token_ids) == place.read(image)
            details = each.usage.prompt_tokens_details
            assert not is_again or (details is not None and details.cached_tokens > 0)


def check_a_stream(place: Place) -> None:
    image = make_image(3)
    *parts, last = place.chat("second", image, stream=True, stream_options={"include_usage": True})
    found = [token for part in parts for token in getattr(part.choices[0], "token_ids", None) or ()]
    assert found == place.expected("second", image)
    assert last.usage.prompt_tokens == place.read(image)


def check_other_interfaces(place: Place) -> None:
    """OpenAI's Responses and Anthropic's Messages."""
    image = make_image(4)
    words = place.in_words(place.expected("first", image))
    content: Any = [{"type": "input_text", "text": ASKED}, {"type": "input_image", "image_url": url_of(image)}]
    options: dict[str, Any] = {"model": "first", "temperature": 0}
    made = place.client.responses.create(
        input=[{"role": "user", "content": content}],
        max_output_tokens=TOKENS,
        extra_body={"ignore_eos": True},
        **options,
    )
    assert (made.output_text, made.usage.input_tokens) == (words, place.read(image))
    source = {"type": "base64", "media_type": "image/png", "data": data_of(image)}
    content = [{"type": "text", "text": ASKED}, {"type": "image", "source": source}]
    body = {**options, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
    answer = httpx.post(f"{place.url}/v1/messages", json=body, timeout=120).raise_for_status().json()
    assert answer["content"][0]["text"] == words
    counted = answer["usage"]
    assert counted["input_tokens"] + (counted.get("cache_read_input_tokens") or 0) == place.read(image)


def check_refusals(place: Place) -> None:
    """Videos, and prompts that are too long with their virtual tokens; the next request is answered as ever."""
    image = make_image(1)
    video: Any = [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}]
    long: Any = [
        {"type": "image_url", "image_url": {"url": url_of(image)}},
        {"type": "text", "text": "x" * (LENGTH - 40)},
    ]
    for content, words in ((video, "part of type 'video_url'"), (long, "64 of these tokens are the virtual")):
        with pytest.raises(openai.BadRequestError, match=words):
            place.client.chat.completions.create(model="second", messages=[{"role": "user", "content": content}])
    assert place.chat("second", image).choices[0].token_ids == place.expected("second", image)


def check(folder: Path) -> None:
    world = ImageWorld(folder, FAMILY)
    world.processor.chat_template = TEMPLATE.replace("MARK", world.mark)
    world.processor.save_pretrained(world.folder)
    world.add("first", 17, seed=1)
    world.add("second", 64, seed=2)
    placeholder = choose_placeholder(world.processor.tokenizer)
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH), "--block-size", "32")
    options += ("--enable-prompt-tokens-details",)
    log = folder / "log"
    try:
        with launch.start(world.folder, world.registry, placeholder=placeholder, arguments=options, log=log) as server:
            place = Place(world, server.url)
            for each in (check_chats, check_a_stream, check_other_interfaces, check_refusals):
                each(place)
    except BaseException:
        print(log.read_text()[-3000:])
        raise


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        check(Path(folder))
